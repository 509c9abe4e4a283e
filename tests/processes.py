"""Child processes, forked from one that has imported Keras and done nothing."""

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
# Keras' seeding imports TensorFlow on every backend, where it is installed.
PROCESSES.set_forkserver_preload(["keras", "keras_sparsity", "tensorflow"])
