"""Models of every shape of graph, and what tests ask of them."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops, tree

import keras_sparsity as ks

RNG = np.random.default_rng(0)
LTP = functools.partial(ks.LTP, l0=1e-6)
HALO = ks.HALO(xi=1e-3, psi=1e-3)
BITE = 3.0  # a threshold, in variances, that closes about half of the gates


def features(*shape):
    return RNG.normal(size=shape).astype("float32")


def outputs(model, x):
    """What the model computes in inference, as a flat list of arrays."""
    computed = tree.flatten(model(x, training=False))
    return [ops.convert_to_numpy(ops.cast(y, "float32")) for y in computed]


def values(variables):
    return [ops.convert_to_numpy(variable) for variable in variables]


def assert_equal(received, expected):
    for value, reference in zip(received, expected, strict=True):
        np.testing.assert_array_equal(value, reference)


def assert_close(received, expected):
    for value, reference in zip(received, expected, strict=True):
        scale = np.abs(reference).max()
        np.testing.assert_allclose(value, reference, rtol=1e-6, atol=1e-6 * scale)


def total(penalties):
    return sum(float(ops.convert_to_numpy(penalty)) for penalty in penalties)


def plain_weights(model):
    """The weights that the dense model has too."""
    own = ("halo_scale", "halo_strength", "ltp_threshold", "ltp_strength", "keep_mask")
    return [w for w in model.weights if not w.name.startswith(own)]


def scales(model):
    return [w for w in model.weights if w.name == "halo_scale"]


def thresholds(model):
    return [w for w in model.weights if w.name.startswith("ltp_threshold")]


def close_gates(model):
    for threshold in thresholds(model):
        threshold.assign(BITE)


def names(model):
    """Names of the model, its layers and those of the models in it."""
    inner = [names(v) if isinstance(v, keras.Model) else v.name for v in model.layers]
    return [model.name, inner, getattr(model, "output_names", None)]


def kinds(model):
    return [type(layer).__name__ for layer in model.layers]


def zeros(model):
    return sum(int((w == 0).sum()) for w in values(model.weights) if w.ndim >= 2)


def mlp(**kwargs):
    """Three dense layers: 4 x 6, 6 x 5 and 5 x 3 weights."""
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, activation="relu", name="first"),
            layers.Dense(5, activation="relu", name="second"),
            layers.Dense(3, name="logits"),
        ],
        **kwargs,
    )


# Models of every shape of graph, each with its inputs.


def sequential():
    stack = [keras.Input((6, 6, 2)), layers.Conv2D(3, 3), layers.BatchNormalization()]
    stack += [layers.ReLU(), layers.Flatten(), layers.Dropout(0.5), layers.Dense(2)]
    return keras.Sequential(stack, name="stack"), features(2, 6, 6, 2)


def functional_in_sequential():
    x = keras.Input((4,))
    body = keras.Model(x, layers.Dense(5, "relu", name="hidden")(x), name="body")
    model = keras.Sequential([keras.Input((4,)), body, layers.Dense(2)])
    return model, features(2, 4)


def two_levels():
    x = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4)], name="inner")
    outer = keras.Model(x, layers.Dense(3)(inner(x)) + 1.0, name="outer")
    z = keras.Input((4,), name="given")
    return keras.Model(z, layers.Dense(2)(outer(z)), name="top"), features(2, 4)


def lazy_sequential():
    model = keras.Sequential([keras.Sequential([layers.Dense(4)]), layers.Dense(3)])
    model.build((None, 4))
    return model, features(2, 4)


def branching():
    x = keras.Input((4,))
    a, b = layers.Dense(3, "relu")(x), layers.Dense(3, "tanh")(x)
    both = layers.Add()([a, layers.Multiply()([a, b])])
    return keras.Model(x, layers.Concatenate()([both, x])), features(2, 4)


def several_inputs():
    a, b = keras.Input((4,)), keras.Input((3,), dtype="int32")
    words = layers.Flatten()(layers.Embedding(7, 2)(b))
    model = keras.Model([a, b], layers.Dense(2)(layers.Concatenate()([a, words])))
    return model, [features(2, 4), np.array([[1, 2, 3], [4, 5, 6]])]


def dicts():
    given = {
        "image": keras.Input((4,), name="image"),
        "side": keras.Input((3,), name="side"),
    }
    hidden = layers.Concatenate()([layers.Dense(3)(given["image"]), given["side"]])
    label = layers.Dense(2, name="label")(hidden)
    model = keras.Model(given, {"label": label, "box": layers.Dense(4)(hidden)})
    return model, {"image": features(2, 4), "side": features(2, 3)}


def several_outputs():
    x = keras.Input((4,))
    hidden = layers.Dense(3)(x)
    return keras.Model(x, [hidden, layers.Dense(2)(hidden), x]), features(2, 4)


def shared():
    a, b = keras.Input((4,)), keras.Input((4,))
    tower = keras.Sequential([keras.Input((4,)), layers.Dense(4)], name="tower")
    twice = layers.Dense(4, name="twice")
    model = keras.Model([a, b], [twice(twice(tower(a))), tower(b)])
    return model, [features(2, 4), features(2, 4)]


def with_operations():
    x = keras.Input((4,))
    a, b = layers.Dense(3)(x), layers.Dense(3)(x)
    y = ops.max(ops.stack([a, b], axis=1), axis=1)
    y = ops.where(y > 0, y, 0.1 * y)[:, None, :2]
    return keras.Model(x, layers.Dense(2)(y)), features(2, 4)


def mobile():
    """An inverted residual block, as in the MobileNets."""
    x = keras.Input((6, 6, 4))
    y = layers.Conv2D(8, 1, use_bias=False)(x)
    y = layers.ReLU(6.0)(layers.BatchNormalization()(y))
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y)
    y = layers.ReLU(6.0)(layers.BatchNormalization()(y))
    y = layers.BatchNormalization()(layers.Conv2D(4, 1, use_bias=False)(y))
    y = layers.GlobalAveragePooling2D()(layers.Add()([x, y]))
    return keras.Model(x, layers.Dense(2)(y)), features(2, 6, 6, 4)


def attention():
    a, b, mask = (
        keras.Input((3, 4)),
        keras.Input((5, 4)),
        keras.Input((3, 5), dtype=bool),
    )
    y = layers.MultiHeadAttention(2, 2)(a, b, attention_mask=mask)
    y = layers.LayerNormalization()(layers.Add()([a, y]))
    y = layers.MultiHeadAttention(2, 2)(y, y, use_causal_mask=True)
    model = keras.Model([a, b, mask], layers.EinsumDense("abc,cd->abd", (None, 2))(y))
    seen = np.tril(np.ones((2, 3, 5), bool))
    return model, [features(2, 3, 4), features(2, 5, 4), seen]


def recurrent():
    x = keras.Input((4,), dtype="int32")
    y = layers.Embedding(6, 3, mask_zero=True)(x)
    y, h, c = layers.LSTM(3, return_sequences=True, return_state=True)(y)
    y = layers.Bidirectional(layers.GRU(3))(y, initial_state=[h, c])
    return keras.Model(x, layers.Dense(2)(y)), np.array([[1, 2, 0, 0], [3, 4, 5, 0]])


class Residual(keras.Layer):
    """A layer that is not registered, of layers without names."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.inner = layers.Dense(units)
        self.outer = layers.Dense(units)

    def build(self, input_shape):
        self.inner.build(input_shape)
        self.outer.build(input_shape)
        self.built = True

    def call(self, inputs):
        return inputs + self.outer(ops.relu(self.inner(inputs)))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def custom():
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(2)(Residual(4, name="own")(x))), features(2, 4)


MODELS = [
    sequential,
    functional_in_sequential,
    two_levels,
    lazy_sequential,
    branching,
    several_inputs,
    dicts,
    several_outputs,
    shared,
    with_operations,
    mobile,
    attention,
    recurrent,
    custom,
]
every_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
every_method = pytest.mark.parametrize("method", [LTP, HALO], ids=["LTP", "HALO"])
