"""What a benchmark runs on."""

import importlib
import pathlib
import sys

import keras

import keras_sparsity as ks

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from provenance import hardware  # noqa: E402


def setting(**more):
    """Versions, what a benchmark has `more` to say, and the hardware."""
    backend = importlib.import_module(keras.backend.backend())
    return {
        "backend": f"{keras.backend.backend()} {backend.__version__}",
        "keras": keras.__version__,
        "keras_sparsity": ks.__version__,
        **more,
        "hardware": hardware(),
    }


def print_setting(**more):
    """Prints what `setting` returns, a line each, and returns it."""
    printed = setting(**more)
    print(*(f"{key}: {value}" for key, value in printed.items()), sep="\n")
    return printed
