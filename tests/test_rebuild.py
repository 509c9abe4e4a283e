"""What a model that is built anew keeps of the one before."""

import functools

import keras
import numpy as np
import pytest
from graphs import (
    HALO,
    LTP,
    assert_equal,
    close_gates,
    mlp,
    outputs,
    plain_weights,
    values,
)
from keras import layers

import keras_sparsity as ks


def block(factor):
    """A class of the same name as any other block, which nothing knows."""

    class Block(layers.Dense):
        def call(self, inputs):
            return factor * super().call(inputs)

    return Block


@pytest.mark.parametrize("method", [HALO, LTP])
def test_custom_classes_may_have_one_name(method):
    model = keras.Sequential([keras.Input((6,)), block(1)(5), block(3)(4)])
    x = np.random.default_rng(0).normal(size=(7, 6)).astype("float32")
    sparse = ks.sparsify(model, method)
    assert_equal(outputs(sparse, x), outputs(model, x))
    close_gates(sparse)
    assert_equal(outputs(ks.finalize(sparse), x), outputs(sparse, x))


FACTOR = 3.0


def stretched(x):
    return FACTOR * keras.ops.tanh(x)


@pytest.mark.parametrize("method", [HALO, LTP])
@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.Lambda(lambda x: FACTOR * keras.ops.tanh(x)),
        lambda: layers.Lambda(stretched),
        lambda: layers.Dense(5, activation=lambda x: FACTOR * keras.ops.tanh(x)),
        lambda: layers.Dense(5, activation=stretched),
        lambda: layers.TimeDistributed(layers.Dense(5, activation=stretched)),
        lambda: layers.LSTM(5, activation=stretched),
    ],
    ids=["lambda", "Lambda", "Dense of a lambda", "Dense", "TimeDistributed", "LSTM"],
)
@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_functions_need_not_be_registered(method, make):
    model = keras.Sequential([keras.Input((3, 6)), layers.Dense(5), make()])
    inputs = keras.Input((3, 6))
    model = keras.Model(inputs, layers.Dense(2)(model(inputs)))
    x = np.random.default_rng(0).normal(size=(7, 3, 6)).astype("float32")
    sparse = ks.sparsify(model, method)
    assert_equal(outputs(sparse, x), outputs(model, x))
    kernels = [row for row in ks.report(sparse).rows if len(row.shape) >= 2]
    assert all(row.method for row in kernels)
    close_gates(sparse)
    assert_equal(outputs(ks.finalize(sparse), x), outputs(sparse, x))


class Halves(keras.initializers.Initializer):
    def __call__(self, shape, dtype=None):
        return keras.ops.full(shape, 0.5, dtype)


class AtMostOne(keras.constraints.Constraint):
    def __call__(self, w):
        return keras.ops.minimum(w, 1)


@pytest.mark.parametrize("method", [HALO, LTP])
def test_initializers_and_constraints_need_not_be_registered(method):
    dense = layers.Dense(4, kernel_initializer=Halves(), kernel_constraint=AtMostOne())
    sparse = ks.sparsify(keras.Sequential([keras.Input((6,)), dense]), method)
    assert all(row.method for row in ks.report(sparse).rows if len(row.shape) >= 2)
    plain = ks.finalize(sparse).layers[0]
    assert_equal(values([plain.kernel]), values([dense.kernel]))
    assert type(plain.kernel_constraint) is AtMostOne


def test_a_choice_of_weights_need_not_be_serializable():
    def named(variable, name):
        return variable.name == name

    is_kernel = functools.partial(named, name="kernel")
    sparse = ks.sparsify(mlp(), functools.partial(ks.LTP, variables=is_kernel))
    close_gates(sparse)
    x = np.random.default_rng(0).normal(size=(7, 4)).astype("float32")
    small = ks.finalize(sparse)
    assert_equal(outputs(small, x), outputs(sparse, x))
    # Nor is the size of a file known that cannot be written.
    assert ks.report(sparse).compressed_bytes is None
    assert "compressed file about unknown bytes" in str(ks.report(sparse))
    assert ks.report(small).nonzeros == ks.report(sparse).nonzeros


@pytest.mark.parametrize("method", [HALO, LTP])
def test_what_is_frozen_within_a_layer_stays_so(method):
    x = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(2, 4)
    dense = layers.Dense(3)
    model = keras.Model(x, dense(attention(x, x)))
    attention._query_dense.trainable = False
    dense.kernel.trainable = False
    flags = [w.trainable for w in model.weights]
    assert flags.count(False) == 3
    sparse = ks.sparsify(model, method)
    for new in (sparse, ks.finalize(sparse)):
        assert [w.trainable for w in plain_weights(new)] == flags


def test_halo_that_has_no_scale_yet_is_carried_over():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, kernel_regularizer=ks.HALO(xi=1e-3, psi=1e-2)),
            layers.Dense(4, name="out"),
        ]
    )
    both = ks.sparsify(model, LTP, filters="out")
    assert {row.method for row in ks.report(both).rows if len(row.shape) == 2} == {
        "HALO",
        "LTP",
    }
    assert_equal(
        values(both.layers[0].weights[:2]), values(model.layers[0].weights[:2])
    )


def test_a_subclass_that_cannot_be_made_again_is_told():
    class Own(keras.Model):
        def __init__(self):
            inputs = keras.Input((6,))
            super().__init__(inputs, layers.Dense(4)(inputs))

        def train_step(self, *args, **kwargs):
            raise NotImplementedError

    with pytest.warns(UserWarning, match="without `train_step` of Own"):
        sparse = ks.sparsify(Own(), LTP)
    assert type(sparse).train_step is keras.Model.train_step


def test_a_layer_without_regularizers_is_not_probed():
    class Twice(layers.Layer):  # which Keras cannot build from its config, and warns
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = layers.Dense(4)

        def call(self, inputs):
            return 2 * self.inner(inputs)

    sparse = ks.sparsify(keras.Sequential([keras.Input((6,)), Twice()]), HALO)
    assert ks.report(sparse).rows[0].method == "HALO"
