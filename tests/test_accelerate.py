"""Sparse execution: what runs sparse, what it computes, and what it refuses."""

import importlib.util
import inspect
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sparsity as ks
from keras_sparsity.accelerate import accelerate_by
from keras_sparsity.products import sparse_product
from keras_sparsity.timing import paired_medians

RNG = np.random.default_rng(0)
PACKAGE = pathlib.Path(ks.__file__).parent


def features(*shape):
    return RNG.normal(size=shape).astype("float32")


def sparse(model, sparsity=0.8):
    """`model` with random biases too, pruned in every layer."""
    for weight in model.trainable_weights:
        weight.assign(features(*weight.shape))
    return ks.prune(model, sparsity, scope="layer")


def network(*stack, shape=(7, 6, 4)):
    return sparse(keras.Sequential([keras.Input(shape), *stack]))


def taking(dense, sparse):
    """Measures any layer as `dense` and `sparse` seconds, after having run both."""

    def measure(functions):
        for function in functions:
            function()
        return dense, sparse

    return measure


def accelerated(model, batch_size=2):
    """`model` with all layers sparse that can be."""
    return accelerate_by(model, batch_size, taking(2.0, 1.0))


def assert_same_outputs(fast, model, *batch_sizes):
    for batch_size in batch_sizes:
        x = features(batch_size, *model.input_shape[1:])
        expected = model.predict(x, verbose=0)
        difference = np.abs(fast.predict(x, verbose=0) - expected).max()
        assert difference <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("columns", [1, 8, 33])
def test_the_product_is_that_of_numpy_in_float64(columns):
    matrix, x = features(30, 20) * (features(30, 20) > 1), features(20, columns)
    matrix[3] = 0  # a row without nonzeros
    received = ops.convert_to_numpy(sparse_product(matrix)(ops.convert_to_tensor(x)))
    expected = matrix.astype("float64") @ x.astype("float64")
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-5)


def test_a_matrix_of_zeros_has_a_product():
    zeros = sparse_product(np.zeros((3, 4), "float32"))(ops.ones((4, 2)))
    np.testing.assert_array_equal(ops.convert_to_numpy(zeros), np.zeros((3, 2)))


def test_dense_layers_are_those_of_numpy_in_float64():
    model = network(layers.Dense(9, activation="tanh"), shape=(3, 5))
    fast = accelerated(model)
    assert [row.is_sparse for row in fast.acceleration.rows] == [True]
    kernel, bias = (w.astype("float64") for w in model.get_weights())
    x = features(4, 3, 5)
    np.testing.assert_allclose(
        fast.predict(x, verbose=0), np.tanh(x @ kernel + bias), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "layer",
    [
        layers.Conv2D(5, 1, use_bias=False),
        layers.Conv2D(5, 3),
        layers.Conv2D(5, (2, 3), padding="same", activation="relu"),
        layers.Conv2D(5, 3, padding="same", strides=(2, 3)),
        layers.Conv2D(5, 2, padding="same", dilation_rate=2),
        layers.Conv2D(6, 3, padding="same", groups=2),
        layers.Conv2D(5, 5, strides=2),  # so few positions that images go together
    ],
    ids=["1x1", "valid", "same", "strides", "dilation", "groups", "few"],
)
def test_convolutions_compute_what_they_compute_dense(layer):
    model = network(layer)
    fast = accelerated(model)
    assert [row.is_sparse for row in fast.acceleration.rows] == [True]
    assert_same_outputs(fast, model, 1, 3)


@pytest.mark.parametrize("layer", [layers.Dense(5), layers.Conv2D(5, 3)])
def test_a_batch_may_be_empty(layer):
    assert accelerated(network(layer))(features(0, 7, 6, 4)).shape[0] == 0


def test_other_ranks_are_convolved_too():
    model = network(layers.Conv1D(5, 3, padding="causal", strides=2), shape=(40, 4))
    assert_same_outputs(accelerated(model), model, 3)
    model = network(layers.Conv3D(3, 2, padding="same"), shape=(3, 4, 3, 2))
    assert_same_outputs(accelerated(model), model, 3)


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="TensorFlow has no dense convolution of channels_first on CPUs",
)
def test_channels_may_come_first():
    convolution = layers.Conv2D(
        5, 3, padding="same", strides=2, data_format="channels_first"
    )
    model = network(convolution, shape=(4, 9, 7))
    assert_same_outputs(accelerated(model), model, 3)


def test_models_may_branch_nest_and_share_layers():
    shared = layers.Dense(6)
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(6, activation="relu")])
    given = keras.Input((6,))
    x = layers.Add()([shared(given), inner(shared(given))])
    model = sparse(keras.Model(given, layers.BatchNormalization()(x)))
    fast = accelerated(model)
    assert sum(row.is_sparse for row in fast.acceleration.rows) == 2
    assert [layer.name for layer in fast.layers] == [v.name for v in model.layers]
    assert_same_outputs(fast, model, 3)


def test_a_layer_runs_sparse_where_that_is_a_tenth_faster():
    model = network(layers.Flatten(), layers.Dense(9))
    for seconds, is_sparse in [(1.11, True), (1.09, False), (0.5, False)]:
        fast = accelerate_by(model, 2, taking(seconds, 1.0))
        (row,) = fast.acceleration.rows
        assert row.is_sparse == is_sparse
        assert row.gain == pytest.approx(seconds)
        assert ("dense: sparse is not 10 % faster" in str(fast.acceleration)) != (
            is_sparse
        )


def test_the_median_of_turns_is_measured():
    order = []
    seconds = paired_medians([lambda: order.append("a"), lambda: order.append("b")])
    assert len(seconds) == 2 and min(seconds) > 0
    assert order == ["a", "b"] * (len(order) // 2) and len(order) >= 14


def test_what_cannot_run_sparse_stays_dense_and_says_why():
    model = network(
        layers.DepthwiseConv2D(3),
        layers.Conv2D(4, 1, dtype="mixed_bfloat16", name="half"),
        layers.Conv2D(4, 1, activation=layers.PReLU()),
        layers.Conv2D(4, 1, name="full"),
    )
    full = model.get_layer("full")
    full.set_weights([np.ones(w.shape) for w in full.weights])
    fast = accelerated(model)
    reasons = [row.reason for row in fast.acceleration.rows]
    assert "only Dense, Conv1D, Conv2D and Conv3D" in reasons[0]
    assert "computes in bfloat16" in reasons[1]
    assert "its activation is a layer" in reasons[2]
    assert "no zeros" in reasons[3]
    assert_same_outputs(fast, model, 2)
    anywhere = network(layers.Conv2D(3, 3), shape=(None, None, 4))
    (row,) = accelerated(anywhere).acceleration.rows
    assert row.reason == "a size of its input is not known"


def test_governed_models_are_refused():
    model = ks.sparsify(network(layers.Conv2D(3, 3)), ks.HALO(xi=1e-3, psi=1e-3))
    with pytest.raises(ValueError, match="HALO in it: call `finalize` on it first"):
        ks.accelerate(model, 1)
    for batch_size in (0, 1e30):
        with pytest.raises(ValueError, match="`batch_size`"):
            ks.accelerate(ks.finalize(model), batch_size)


def test_penalties_of_outputs_stay_and_those_of_weights_go():
    model = network(
        layers.Flatten(),
        layers.Dense(9, activity_regularizer="l2", kernel_regularizer="l2"),
    )
    fast = accelerated(model)
    for each in (model, fast):
        each.compile(loss="mse")
    x, y = features(4, *model.input_shape[1:]), features(4, 9)
    penalty = 0.01 * np.sum(model.get_weights()[0] ** 2)
    expected = model.evaluate(x, y, verbose=0) - penalty
    assert fast.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-4)


def test_it_is_for_inference_in_memory(tmp_path):
    model = network(layers.Flatten(), layers.Dense(9))
    fast = accelerated(model)
    fast.compile("sgd", "mse")
    x, y = features(2, *model.input_shape[1:]), features(2, 9)
    expected = np.mean((model.predict(x, verbose=0) - y) ** 2)
    assert fast.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="Train the model that was given"):
        fast.fit(x, y, verbose=0)
    for store in (fast.save, fast.save_weights):
        with pytest.raises(NotImplementedError, match="Save the model that was given"):
            store(tmp_path / "fast.weights.h5")
    with pytest.raises(NotImplementedError, match="cannot be saved or cloned"):
        keras.models.clone_model(fast)
    with pytest.raises(NotImplementedError, match="Export the model that was given"):
        fast.export(tmp_path / "fast")
    with pytest.raises(NotImplementedError, match="report on that model too"):
        ks.report(fast)
    model.save_weights(tmp_path / "dense.weights.h5")
    with pytest.raises(ValueError, match="Load the weights into the dense model"):
        fast.load_weights(tmp_path / "dense.weights.h5")


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="only TensorFlow's sparse kernels are unknown to XLA",
)
def test_xla_is_refused_on_tensorflow():
    import tensorflow as tf

    model = network(layers.Flatten(), layers.Dense(9))
    fast = accelerated(model)
    x = features(2, *model.input_shape[1:])
    with pytest.raises(ValueError, match="XLA has no kernels for TensorFlow's sparse"):
        tf.function(fast, jit_compile=True)(x)
    with pytest.raises(ValueError, match="XLA has no kernels for TensorFlow's sparse"):
        fast.compile(loss="mse", jit_compile=True)
    names = list(inspect.signature(keras.Model.compile).parameters)
    others = [None] * (names.index("jit_compile") - 1)  # all but `self`
    with pytest.raises(ValueError, match="XLA has no kernels for TensorFlow's sparse"):
        fast.compile(*others, True)
    fast.compile(loss="mse")
    np.testing.assert_allclose(
        fast.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5
    )


WITHOUT_KERNELS = """
import sys
sys.modules["tensorflow"] = None  # importing it takes seconds
import keras, numpy
import keras_sparsity as ks

model = ks.prune(keras.Sequential([keras.Input((4,)), keras.layers.Dense(8)]), 0.5)
fast = ks.accelerate(model, 2)
print(fast.acceleration)
x = numpy.ones((2, 4))
numpy.testing.assert_array_equal(fast.predict(x), model.predict(x))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("jax") is None,
    reason="Keras' backend of NumPy needs JAX, which is not installed",
)
def test_a_backend_without_sparse_kernels_runs_dense():
    environment = {
        **os.environ,
        "KERAS_BACKEND": "numpy",
        "PYTHONPATH": str(PACKAGE.parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERNELS],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "the backend 'numpy' has no sparse kernels" in done.stdout


def test_by_default_it_goes_by_what_it_measures():
    stack = [layers.Dense(512, activation="relu"), layers.Dense(512)]
    model = network(*stack, shape=(512,))
    fast = ks.accelerate(model, batch_size=8)
    for row in fast.acceleration.rows:
        assert row.is_sparse == (row.dense_ms >= 1.1 * row.sparse_ms)
    assert_same_outputs(fast, model, 8)
