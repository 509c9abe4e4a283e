"""Multiplications, against what one counts by hand."""

import functools
import math

import keras
import numpy as np
import pytest
from keras import layers

from keras_sparsity.macs import uses_per_weight
from keras_sparsity.regularizers import HALO
from keras_sparsity.report import report
from keras_sparsity.wrappers import LTP, Penalized


def built(layer, *shapes):
    """`layer`, after a symbolic call on inputs of these shapes."""
    layer(*[keras.Input(shape) for shape in shapes])
    return layer


def macs(layer):
    """Multiply-accumulates per sample of all weights in `layer`, or `None`."""
    uses = uses_per_weight(layer)
    counts = [uses[id(w)] for w in layer.weights]
    if None in counts:
        return None
    return sum(
        n * math.prod(w.shape) for n, w in zip(counts, layer.weights, strict=True)
    )


STACKED_CELLS = [layers.LSTMCell(4), layers.LSTMCell(2)]
FIRST = {"data_format": "channels_first"}

# Each product is positions * size of the kernel, and calls where there are several.
BY_HAND = {
    "dense": (layers.Dense(5), [(3,)], 3 * 5),
    "dense_2d": (layers.Dense(5), [(7, 3)], 7 * 3 * 5),
    "dense_3d": (layers.Dense(5), [(2, 7, 3)], 2 * 7 * 3 * 5),
    "conv1d": (layers.Conv1D(4, 3), [(10, 2)], 8 * 3 * 2 * 4),
    "conv1d_same": (layers.Conv1D(4, 3, padding="same"), [(10, 2)], 10 * 3 * 2 * 4),
    "conv1d_causal": (layers.Conv1D(4, 3, padding="causal"), [(10, 2)], 10 * 3 * 2 * 4),
    "conv1d_strides": (layers.Conv1D(4, 3, strides=2), [(10, 2)], 4 * 3 * 2 * 4),
    "conv1d_dilated": (layers.Conv1D(4, 3, dilation_rate=2), [(10, 2)], 6 * 3 * 2 * 4),
    "conv2d": (layers.Conv2D(4, 3), [(8, 6, 2)], 6 * 4 * 9 * 2 * 4),
    "conv2d_strides": (
        layers.Conv2D(4, 3, strides=2, padding="same"),
        [(8, 6, 2)],
        4 * 3 * 9 * 2 * 4,
    ),
    "conv2d_groups": (layers.Conv2D(4, 3, groups=2), [(8, 6, 2)], 6 * 4 * 9 * 1 * 4),
    "conv2d_first": (layers.Conv2D(4, 3, **FIRST), [(2, 8, 6)], 6 * 4 * 9 * 2 * 4),
    "conv3d": (layers.Conv3D(4, 2), [(4, 5, 6, 2)], 3 * 4 * 5 * 8 * 2 * 4),
    "depthwise1d": (layers.DepthwiseConv1D(3), [(10, 2)], 8 * 3 * 2),
    "depthwise2d": (
        layers.DepthwiseConv2D(3, depth_multiplier=2),
        [(8, 6, 2)],
        6 * 4 * 9 * 2 * 2,
    ),
    "separable1d": (layers.SeparableConv1D(4, 3), [(10, 2)], 8 * (3 * 2 + 2 * 4)),
    "separable2d": (
        layers.SeparableConv2D(4, 3),
        [(8, 6, 2)],
        6 * 4 * (9 * 2 + 2 * 4),
    ),
    "conv1d_transpose": (layers.Conv1DTranspose(4, 3), [(10, 2)], 10 * 3 * 2 * 4),
    "conv2d_transpose": (
        layers.Conv2DTranspose(4, 3, strides=2),
        [(8, 6, 2)],
        8 * 6 * 9 * 2 * 4,
    ),
    "conv3d_transpose": (
        layers.Conv3DTranspose(4, 2),
        [(4, 5, 6, 2)],
        4 * 5 * 6 * 8 * 2 * 4,
    ),
    "einsum": (layers.EinsumDense("ab,bc->ac", 5), [(3,)], 3 * 5),
    "einsum_2d": (
        layers.EinsumDense("abc,cd->abd", (None, 5)),
        [(7, 3)],
        7 * 3 * 5,
    ),
    "einsum_heads": (
        layers.EinsumDense("abc,cde->abde", (None, 2, 4)),
        [(7, 3)],
        7 * 3 * 2 * 4,
    ),
    "einsum_merge": (
        layers.EinsumDense("abcd,cde->abe", (None, 8)),
        [(7, 2, 4)],
        7 * 2 * 4 * 8,
    ),
    "einsum_local": (
        layers.EinsumDense("abc,bcd->abd", (7, 5)),
        [(7, 3)],
        7 * 3 * 5,
    ),
    "einsum_ellipsis": (
        layers.EinsumDense("...x,xy->...y", 5),
        [(2, 7, 3)],
        2 * 7 * 3 * 5,
    ),
    "einsum_ellipsis_last": (
        layers.EinsumDense("ab...,bc->ac...", 5),
        [(3, 2, 7)],
        2 * 7 * 3 * 5,
    ),
    "embedding": (layers.Embedding(9, 4), [(5,)], 0),
    "batch_normalization": (layers.BatchNormalization(), [(5, 3)], 0),
    "simple_rnn": (layers.SimpleRNN(4), [(7, 3)], 7 * (3 + 4) * 4),
    "lstm": (layers.LSTM(4), [(7, 3)], 7 * (3 + 4) * 4 * 4),
    "gru": (layers.GRU(4), [(7, 3)], 7 * (3 + 4) * 3 * 4),
    "stacked_rnn": (
        layers.RNN(STACKED_CELLS),
        [(7, 3)],
        7 * ((3 + 4) * 4 * 4 + (4 + 2) * 4 * 2),
    ),
    "bidirectional": (
        layers.Bidirectional(layers.LSTM(4)),
        [(7, 3)],
        2 * 7 * (3 + 4) * 4 * 4,
    ),
    "time_distributed": (
        layers.TimeDistributed(layers.Dense(5)),
        [(7, 3)],
        7 * 3 * 5,
    ),
    "time_distributed_2d": (
        layers.TimeDistributed(layers.Dense(5)),
        [(7, 4, 3)],
        7 * 4 * 3 * 5,
    ),
    "time_distributed_conv": (
        layers.TimeDistributed(layers.Conv2D(4, 3)),
        [(5, 8, 6, 2)],
        5 * 6 * 4 * 9 * 2 * 4,
    ),
    "attention": (
        layers.MultiHeadAttention(2, 4),
        [(5, 8), (7, 6)],
        5 * 8 * 2 * 4 + 2 * (7 * 6 * 2 * 4) + 5 * 2 * 4 * 8,
    ),
    "grouped_query_attention": (
        layers.GroupQueryAttention(4, 6, 2),
        [(5, 8), (7, 8)],
        5 * 8 * 6 * 4 + 2 * (7 * 8 * 2 * 4) + 5 * 6 * 4 * 8,
    ),
}
by_hand = pytest.mark.parametrize(
    "layer, shapes, expected", BY_HAND.values(), ids=BY_HAND
)


@by_hand
def test_macs_are_those_counted_by_hand(layer, shapes, expected):
    assert macs(built(type(layer).from_config(layer.get_config()), *shapes)) == expected


@pytest.mark.parametrize(
    "wrap",
    [
        functools.partial(LTP, l0=1e-6),
        functools.partial(Penalized, regularizer=HALO(1e-3, 1e-3)),
    ],
    ids=["LTP", "Penalized"],
)
@pytest.mark.parametrize("kind", ["dense_2d", "conv2d_strides", "gru", "attention"])
def test_a_method_around_a_layer_changes_nothing(kind, wrap):
    layer, shapes, expected = BY_HAND[kind]
    wrapped = built(wrap(type(layer).from_config(layer.get_config())), *shapes)
    uses = uses_per_weight(wrapped)
    assert expected == sum(
        uses[id(w)] * math.prod(w.shape) for w in wrapped.layer.weights
    )


@pytest.mark.parametrize(
    "layer, shape",
    [
        (layers.Dense(5), (None, 3)),
        (layers.Conv2D(4, 3), (None, None, 2)),
        (layers.Conv1D(4, 3, padding="same"), (None, 2)),
        (layers.EinsumDense("...x,xy->...y", 5), (None, 3)),
        (layers.LSTM(4), (None, 3)),
        (layers.TimeDistributed(layers.Dense(5)), (None, 3)),
        (layers.ConvLSTM1D(4, 3), (5, 8, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, keras.Layer) else "",
)
def test_what_is_not_known_gives_none(layer, shape):
    layer = built(layer, shape)
    assert macs(layer) is None
    assert report(keras.Sequential([keras.Input(shape), layer])).macs is None


class Odd(keras.Layer):
    """A custom layer with attributes that mean something else in Keras' layers."""

    kernel_size = 3
    data_format = "json"
    equation = "linear"
    cell = "prison"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = self.add_weight(shape=(4, 5), name="table")

    def call(self, inputs):
        return inputs @ self.table


def test_a_custom_layer_never_fails_a_report():
    report(keras.Sequential([keras.Input((4,)), Odd()]))


def test_macs_of_a_layer_that_cannot_be_traced_are_not_known():
    class Untraceable(keras.Layer):
        def call(self, inputs):
            return inputs

        def compute_output_spec(self, inputs):
            raise NotImplementedError

    model = keras.Sequential([layers.Dense(3), Untraceable()])
    model(np.ones((2, 4), "float32"))
    assert report(model).macs is None


def test_a_layer_that_is_called_twice_works_twice():
    x = keras.Input((4,))
    dense, tower = layers.Dense(4), keras.Sequential([layers.Dense(4)])
    model = keras.Model(x, tower(tower(tower(dense(dense(x))))))
    assert report(model).macs == 2 * 16 + 3 * 16


@pytest.mark.parametrize("wrap", [lambda v: v, functools.partial(LTP, l0=1e-6)])
def test_each_call_counts_with_its_own_size(wrap):
    x, longer = keras.Input((10, 2)), keras.Input((20, 2))
    conv = wrap(layers.Conv1D(4, 3))
    attention = wrap(layers.MultiHeadAttention(2, 4))
    model = keras.Model(
        [x, longer],
        [conv(x), conv(longer), attention(x, x), attention(x, longer)],
    )
    heads = 2 * 2 * 4  # the size of each of four kernels: queries, keys, values, output
    queries_and_output, keys_and_values = 2 * (10 + 10), 2 * (10 + 20)
    expected = (8 + 18) * 3 * 2 * 4 + (queries_and_output + keys_and_values) * heads
    assert report(model).macs == expected


def test_each_call_of_a_model_counts_with_its_own_size():
    inner = keras.Input((None, 2))
    conv, sequential = layers.Conv1D(4, 3), keras.Sequential([layers.Dense(5)])
    tower = keras.Model(inner, sequential(conv(inner)))
    x, longer = keras.Input((10, 2)), keras.Input((20, 2))
    model = keras.Model([x, longer], [tower(x), tower(longer), conv(longer)])
    expected = (8 + 18 + 18) * 3 * 2 * 4 + (8 + 18) * 4 * 5
    assert report(model).macs == expected


def test_a_layer_built_elsewhere_counts_with_the_size_it_has_here():
    conv = built(layers.Conv1D(4, 3), (10, 2))
    model = keras.Sequential([keras.Input((20, 2)), conv])
    assert report(model).macs == 18 * 3 * 2 * 4


@pytest.mark.parametrize("wrap", [lambda v: v, functools.partial(LTP, l0=1e-6)])
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_multiplies_where_it_is_reversed(wrap, tied):
    tokens = keras.Input((12,), dtype="int32")
    embedding = wrap(layers.ReversibleEmbedding(50, 8, tie_weights=tied))
    model = keras.Model(tokens, embedding(embedding(tokens), reverse=True))
    assert report(model).macs == 12 * 50 * 8


def test_element_wise_weights_multiply_once_per_value():
    stack = [layers.PReLU(), layers.LayerNormalization(axis=(1, 2))]
    model = keras.Sequential([keras.Input((6, 4)), *stack])
    for layer in stack:
        for weight in layer.weights:
            weight.assign(weight + 1)
    assert report(model).macs <= 3 * 24


def test_lenet_300_100():
    dense = [layers.Dense(units) for units in (300, 100, 10)]
    model = keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), *dense])
    assert report(model).macs == 266_200


def test_resnet_20_for_cifar_10():
    def block(x, filters, strides):
        y = conv(filters, 3, strides)(x)
        y = conv(filters, 3)(layers.ReLU()(layers.BatchNormalization()(y)))
        if strides > 1:
            x = conv(filters, 1, strides)(x)
        return layers.ReLU()(layers.Add()([x, layers.BatchNormalization()(y)]))

    conv = functools.partial(layers.Conv2D, padding="same", use_bias=False)
    x = given = keras.Input((32, 32, 3))
    x = conv(16, 3)(x)
    for filters in (16, 32, 64):
        for index in range(3):
            x = block(x, filters, 2 if filters > 16 and index == 0 else 1)
    x = layers.Dense(10)(layers.GlobalAveragePooling2D()(x))
    # 40.55 M is the well-known number; the two shortcuts that convolve add 0.26 M.
    shortcuts = 16**2 * 16 * 32 + 8**2 * 32 * 64
    assert report(keras.Model(given, x)).macs == 40_551_040 + shortcuts
