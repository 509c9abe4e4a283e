"""Child processes, forked from one that has imported Keras, and waiting for them."""

import multiprocessing
import time

PROCESSES = multiprocessing.get_context("forkserver")
# Keras' seeding imports TensorFlow on every backend, where it is installed.
PROCESSES.set_forkserver_preload(["keras", "keras_sparsity", "tensorflow"])


def wait_until(condition, seconds=60):
    """Waits until `condition()` is true, and returns what it is."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value
