"""What several test files need: seeds, gradients on every backend, stored arrays."""

import io
import os
import tempfile
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import ops


def pytest_configure(config):
    """On JAX, makes compiling cheap: it takes most of the time of the tests.

    A program is compiled once in a run, however many models have it, and with little
    optimization, since most run only a few times.
    """
    if keras.backend.backend() == "jax":
        import jax

        # Not kept for the next run: JAX writes programs in place, and one that an
        # interrupted run has cut would fail every test that reads it.
        directory = tempfile.TemporaryDirectory()
        config.add_cleanup(directory.cleanup)
        jax.config.update("jax_compilation_cache_dir", directory.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_disable_most_optimizations", True)
        # Child processes too: with other optimizations JAX rounds otherwise.
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


@pytest.fixture(autouse=True)
def _fixed_seed():
    keras.utils.set_random_seed(1)


@pytest.fixture
def precision(request):
    """The dtype policy that a test is parametrized with, in force."""
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


def _tensorflow_gradients(function, variables):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        value = function()
    return tape.gradient(value, [v.value for v in variables])


def _jax_gradients(function, variables):
    import jax

    def stateless(values):
        with keras.StatelessScope(list(zip(variables, values, strict=True))):
            return function()

    return jax.grad(stateless)([v.value for v in variables])


def _torch_gradients(function, variables):
    import torch

    return torch.autograd.grad(
        function(), [v.value for v in variables], allow_unused=True
    )


@pytest.fixture
def gradients():
    """`gradients(function, variables)`: of a scalar, as arrays; zeros if unused."""
    backends = {
        "tensorflow": _tensorflow_gradients,
        "jax": _jax_gradients,
        "torch": _torch_gradients,
    }

    def gradients(function, variables):
        computed = backends[keras.backend.backend()](function, variables)
        return [
            np.zeros(v.shape) if g is None else ops.convert_to_numpy(g)
            for v, g in zip(variables, computed, strict=True)
        ]

    return gradients


@pytest.fixture
def stored_arrays(tmp_path):
    """`stored_arrays(model)`: the names of the arrays in the file of a model."""

    def stored_arrays(model):
        path = tmp_path / "stored.keras"
        model.save(path)
        names = []

        def visit(name, item):
            if isinstance(item, h5py.Dataset):
                names.append(name)

        with zipfile.ZipFile(path) as archive:
            weights = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(weights) as file:
            file.visititems(visit)
        return names

    return stored_arrays
