"""Where a recorded result comes from."""

import importlib
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time

import keras


def provenance():
    """Command, time, commit, backend, versions of packages, and hardware."""
    backend = keras.backend.backend()
    packages = ("keras_sparsity", "keras", backend, "numpy")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "backend": backend,
        "versions": {p: importlib.import_module(p).__version__ for p in packages},
        "hardware": hardware(),
    }


def _commit():
    """Of the copy of the repository that this file is in, if it is one."""
    describe = ["git", "describe", "--always", "--dirty"]
    folder = pathlib.Path(__file__).parent
    try:
        found = subprocess.run(describe, cwd=folder, capture_output=True, text=True)
    except OSError:  # there is no git
        return None
    return found.stdout.strip() or None


def hardware():
    """Name of the processor, and how many of its cores this process may use."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = cpuinfo.exists() and re.search(r"model name\s*: (.*)", cpuinfo.read_text())
    return f"{names[1] if names else platform.machine()}, {cores()} cores"


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
