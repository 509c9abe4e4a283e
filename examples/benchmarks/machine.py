"""The machine that a benchmark runs on."""

import os
import pathlib
import platform
import re


def hardware():
    """Name of the processor, and how many of its cores this process may use."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = cpuinfo.exists() and re.search(r"model name\s*: (.*)", cpuinfo.read_text())
    counts_own = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if counts_own else os.cpu_count()
    return f"{names[1] if names else platform.machine()}, {cores} cores"
