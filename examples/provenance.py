"""Where a recorded result comes from."""

import importlib
import shlex
import sys
import time

import keras


def provenance():
    """The command of this process, the time, the backend, and versions of packages."""
    backend = keras.backend.backend()
    packages = ("keras_sparsity", "keras", backend, "numpy")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "backend": backend,
        "versions": {p: importlib.import_module(p).__version__ for p in packages},
    }
