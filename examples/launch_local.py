"""Starts several worker processes of `train.py` on this machine, as on several.

    python examples/launch_local.py --workers=2 -- --method=halo --epochs=10

What stands after `--` goes to each of them, `--strategy=multi_worker` is added. Their
output is passed on, every line with the number of its worker. When one fails, or this
process ends, even by SIGKILL, all are ended. It is meant for a machine without GPUs: a
worker takes all that it sees, and `--strategy=mirrored` uses those of one machine
better.

On several machines start `train.py --strategy=multi_worker` on each of them, with the
same flags and a `TF_CONFIG` that differs in its index, as `worker_config` makes it.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import app, flags

FLAGS = flags.FLAGS

# What a worker runs. Whatever ends this process, SIGKILL too, closes the pipe that the
# worker's standard input is, and by that ends the worker.
WORKER = """
import os, pathlib, runpy, sys, threading

def end_with_launcher():
    os.read(0, 1)
    os._exit(1)

threading.Thread(target=end_with_launcher, daemon=True).start()
del sys.argv[0]
sys.path[0] = str(pathlib.Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
"""

flags.DEFINE_integer("workers", 2, "Number of processes.", lower_bound=1)


def main(argv):
    train = pathlib.Path(__file__).with_name("train.py")
    command = [sys.executable, "-c", WORKER, str(train), "--strategy=multi_worker"]
    addresses = free_addresses(FLAGS.workers)
    workers = []
    # A request to end this process must reach the workers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for index in range(FLAGS.workers):
            environment = os.environ | {
                "KERAS_BACKEND": "tensorflow",
                "PYTHONUNBUFFERED": "1",  # a line is passed on when it is printed
                "TF_CONFIG": worker_config(addresses, index),
            }
            worker = subprocess.Popen(
                [*command, *argv[1:]],
                stdin=subprocess.PIPE,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            workers.append(worker)
            threading.Thread(target=pass_on, args=(index, worker)).start()
        sys.exit(wait(workers))
    finally:
        end(workers)


def free_addresses(count):
    """Addresses on this machine that no process listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


def worker_config(addresses, index):
    """The value of `TF_CONFIG` for one of the workers."""
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": addresses}, "task": task})


def pass_on(index, worker):
    for line in worker.stdout:
        print(f"[worker {index}] {line.rstrip()}", flush=True)


def wait(workers):
    """Waits until all have succeeded or one has failed; returns its exit code."""
    while True:
        codes = [worker.poll() for worker in workers]
        for index, code in enumerate(codes):
            if code:  # negative where a signal ended it
                print(f"Worker {index} ended with code {code}: all are ended.")
                return code if code > 0 else 128 - code
        if None not in codes:
            return 0
        time.sleep(0.1)


def end(workers):
    for worker in workers:
        worker.terminate()
    for worker in workers:
        try:
            worker.wait(10)
        except subprocess.TimeoutExpired:
            worker.kill()


if __name__ == "__main__":
    app.run(main)
