"""What a benchmark runs on."""

import importlib
import os
import pathlib
import platform
import re

import keras

import keras_sparsity as ks


def setting(**more):
    """Versions, what a benchmark has `more` to say, and the hardware."""
    backend = importlib.import_module(keras.backend.backend())
    return {
        "backend": f"{keras.backend.backend()} {backend.__version__}",
        "keras": keras.__version__,
        "keras_sparsity": ks.__version__,
        **more,
        "hardware": _hardware(),
    }


def print_setting(**more):
    """Prints what `setting` returns, a line each, and returns it."""
    printed = setting(**more)
    print(*(f"{key}: {value}" for key, value in printed.items()), sep="\n")
    return printed


def _hardware():
    """Name of the processor, and how many of its cores this process may use."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = cpuinfo.exists() and re.search(r"model name\s*: (.*)", cpuinfo.read_text())
    counts_own = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if counts_own else os.cpu_count()
    return f"{names[1] if names else platform.machine()}, {cores} cores"
