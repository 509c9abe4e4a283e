"""Batch statistics measured anew."""

import functools

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparsity as ks

RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, size=(60, 5)).astype("float32")
LTP = functools.partial(ks.LTP, l0=1e-3, initial_threshold=1.0)


def network():
    inputs = keras.Input((5,))
    x = layers.Dense(6, name="first")(inputs)
    x = layers.Dropout(0.5)(x)
    x = layers.BatchNormalization(name="norm", momentum=0.9)(x)
    return keras.Model(inputs, layers.Dense(2, name="second")(x))


def statistics(model, name="norm"):
    layer = model.get_layer(name)
    return [
        keras.ops.convert_to_numpy(v)
        for v in (layer.moving_mean, layer.moving_variance)
    ]


def output_of_first(model):
    """The inputs of the normalization, in float64."""
    kernel, bias = (w.astype("float64") for w in model.get_layer("first").get_weights())
    return X @ kernel + bias


def test_one_batch_against_numpy():
    model = network()
    assert ks.recalibrate(model, X, batch_size=60) is model
    outputs = output_of_first(model)
    mean, variance = statistics(model)
    np.testing.assert_allclose(mean, outputs.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, outputs.var(0), rtol=1e-5)


def test_batches_count_by_their_size():
    model = network()
    ks.recalibrate(model, X[:50], batch_size=40)
    first, rest = np.split(output_of_first(model)[:50], [40])
    mean, variance = statistics(model)
    np.testing.assert_allclose(
        mean, 0.8 * first.mean(0) + 0.2 * rest.mean(0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        variance, 0.8 * first.var(0) + 0.2 * rest.var(0), rtol=1e-5
    )


@pytest.mark.parametrize("batch_size", [20, 60])
def test_every_call_of_a_shared_layer_counts(batch_size):
    norm = layers.BatchNormalization(name="norm")
    inputs = [keras.Input((5,)) for _ in range(3)]
    model = keras.Model(inputs, [norm(x) for x in inputs])
    ks.recalibrate(model, [X, 2 * X, X + 3], batch_size)
    mean, variance = statistics(model)
    np.testing.assert_allclose(mean, 4 / 3 * X.mean(0) + 1, rtol=1e-5)
    parts = np.split(X, 60 // batch_size)
    expected = 2 * np.mean([part.var(0) for part in parts], axis=0)
    np.testing.assert_allclose(variance, expected, rtol=1e-5)


def test_hard_gate_counts():
    model = ks.sparsify(network(), LTP, filters="first|second")
    plain = ks.finalize(model)
    assert ks.report(plain).sparsity > 0.1
    ks.recalibrate(model, X, batch_size=20)
    ks.recalibrate(plain, X, batch_size=20)
    for a, b in zip(statistics(model), statistics(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["iterable", "PyDataset"])
def test_iterables_of_batches(kind):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            rows = slice(20 * index, 20 * index + 20)
            return X[rows], np.zeros(20)

    model, other = network(), network()
    other.set_weights(model.get_weights())
    batches = Batches()
    iterable = (batches[index] for index in range(3))
    ks.recalibrate(model, batches if kind == "PyDataset" else iterable)
    ks.recalibrate(other, X, batch_size=20)
    for a, b in zip(statistics(model), statistics(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nested_models_and_several_inputs():
    inner = network()
    inputs = {name: keras.Input((5,), name=name) for name in ("a", "b")}
    outputs = layers.Concatenate()([inner(inputs["a"]), inputs["b"]])
    model = keras.Model(inputs, layers.BatchNormalization(name="last")(outputs))
    ks.recalibrate(model, {"a": X, "b": 2 * X}, batch_size=60)
    mean, variance = statistics(model, "last")
    np.testing.assert_allclose(mean[2:], 2 * X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance[2:], 4 * X.var(0), rtol=1e-5)
    assert not np.allclose(statistics(inner)[0], 0)


def test_a_normalization_of_ones_own():
    class Own(layers.BatchNormalization):
        def call(self, inputs, training=None):
            return super().call(inputs, training=training)

    model = keras.Sequential([keras.Input((5,)), Own(name="norm")])
    ks.recalibrate(model, X, batch_size=60)
    np.testing.assert_allclose(statistics(model)[0], X.mean(0), rtol=1e-5)


def test_no_graph_is_kept():
    class Watched(layers.Layer):
        def call(self, inputs):
            self.in_graph = getattr(inputs, "requires_grad", False)
            return inputs

    stack = [layers.Dense(4), Watched(name="watched"), layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((5,)), *stack])
    watched = model.get_layer("watched")
    model(X)
    # Nothing else records what no tape or transformation asks for.
    assert watched.in_graph == (keras.backend.backend() == "torch")
    ks.recalibrate(model, X)
    assert not watched.in_graph


def test_everything_else_stays():
    model = network()
    model.compile("sgd", "mse")
    model.fit(X, X[:, :2], epochs=1, verbose=0)
    before = (
        model.get_layer("norm").get_config(),
        model.get_layer("first").get_weights(),
    )
    ks.recalibrate(model, X)
    recalibrated = statistics(model)
    assert model.get_layer("norm").get_config() == before[0]
    for a, b in zip(model.get_layer("first").get_weights(), before[1], strict=True):
        np.testing.assert_array_equal(a, b)
    model.predict(X, verbose=0)
    for a, b in zip(statistics(model), recalibrated, strict=True):
        np.testing.assert_array_equal(a, b)  # inference is inference again
    model.fit(X, X[:, :2], epochs=1, verbose=0)
    assert not np.allclose(statistics(model)[0], recalibrated[0])  # it is trained on


def test_frozen_normalization_stays():
    model = network()
    model.get_layer("norm").trainable = False
    before = statistics(model)
    ks.recalibrate(model, X)
    for a, b in zip(statistics(model), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("batch_size", [0, -3, 2.5, None])
def test_batch_size_is_refused_by_name(batch_size):
    with pytest.raises(ValueError, match="Argument `batch_size` must be"):
        ks.recalibrate(network(), X, batch_size)


@pytest.mark.parametrize(
    "dataset, why",
    [
        ([X[:20], X[20:40]], "an array for each of the 1 inputs"),
        ((X, np.zeros(60)), "none of labels"),
        ((X, np.zeros(7)), "arrays of equal length"),
        ([(X, np.zeros(60)), (X, np.zeros(60))], "not as a list"),
        ([], "at least one batch"),
        (None, "arrays or an iterable of batches"),
        (np.float32(1.0), "arrays of equal length"),
    ],
    ids=["batches", "labels", "lengths", "pairs", "empty", "none", "scalar"],
)
def test_what_the_model_does_not_take_is_refused(dataset, why):
    model = network()
    before = statistics(model)
    with pytest.raises(ValueError, match=why):
        ks.recalibrate(model, dataset)
    for a, b in zip(statistics(model), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_half_done():
    model = network()
    before = statistics(model)
    with pytest.raises(ValueError, match="`dataset` must have at least one batch"):
        ks.recalibrate(model, iter([]))
    with pytest.raises(ValueError, match="expected shape"):
        ks.recalibrate(model, iter([X, X[:, :3]]))
    with pytest.raises(ValueError, match="`dataset` must lead to finite statistics"):
        ks.recalibrate(model, np.where(X > 1, np.nan, X))
    for a, b in zip(statistics(model), before, strict=True):
        np.testing.assert_array_equal(a, b)
