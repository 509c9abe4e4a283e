"""What a whole training step computes, counted in the program of the step."""

import pathlib
import re
import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparsity as ks

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES / "benchmarks"))

import programs  # noqa: E402

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = X[:, :2]


def sigmoids_in_hlo(program):
    """Shapes of the sigmoids in an optimized XLA program, given as text."""
    # XLA's sigmoid is one of these, by its version and its target.
    sigmoid = r"= f32\[([\d,]+)\]\S* (?:logistic|exponential|tanh)\("
    return [tuple(map(int, s.split(","))) for s in re.findall(sigmoid, program)]


def sigmoids_on_jax(model):
    program, _ = programs.compiled_step(model, X, Y)
    return sigmoids_in_hlo(program.as_text())


def sigmoids_on_tensorflow(model):
    import tensorflow as tf

    batch = (tf.constant(X), tf.constant(Y))
    if model.jit_compile:
        step = tf.function(model.train_step, jit_compile=True)
        ir = step.experimental_get_compiler_ir(batch)
        return sigmoids_in_hlo(ir(stage="optimized_hlo"))
    graph = tf.function(model.train_step).get_concrete_function(batch).graph
    operations = graph.get_operations()
    return [tuple(op.outputs[0].shape) for op in operations if op.type == "Sigmoid"]


def sigmoids_on_torch(model):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten.sigmoid:
                shapes.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    with Recorder():
        model.train_step((torch.tensor(X), torch.tensor(Y)))
    return shapes


SIGMOIDS = {
    "jax": sigmoids_on_jax,
    "tensorflow": sigmoids_on_tensorflow,
    "torch": sigmoids_on_torch,
}
# With and without XLA where there is a choice.
JIT_COMPILE = {"jax": [True], "tensorflow": [False, True], "torch": [False]}


@pytest.mark.parametrize("units", ["variance", "absolute"])
@pytest.mark.parametrize("jit_compile", JIT_COMPILE[BACKEND])
def test_gate_of_a_weight_is_computed_once_per_step(units, jit_compile):
    stack = [keras.Input((4,)), layers.Dense(5), layers.Dense(3), layers.Dense(2)]
    model = keras.Sequential(stack)
    kernels = [tuple(layer.kernel.shape) for layer in model.layers]
    model = ks.sparsify(model, lambda layer: ks.LTP(layer, 1e-3, threshold_units=units))
    optimizer = ks.SparsityOptimizer(keras.optimizers.SGD(0.1, momentum=0.9))
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    model.train_on_batch(X, Y)  # makes the slots and the metrics
    assert sorted(SIGMOIDS[BACKEND](model)) == sorted(kernels)
