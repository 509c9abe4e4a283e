"""Which weights of a layer, which layers of a model."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_sparsity import selection
from keras_sparsity.masks import KeepZeros, MagnitudePruning
from keras_sparsity.regularizers import HALO, MCP, SWS
from keras_sparsity.schedules import ConstantSparsity
from keras_sparsity.wrappers import LTP, Penalized


def built(layer, *shape):
    layer(keras.Input(shape))
    return layer


def names(weights):
    return [w.name for w in weights]


def halo():
    return HALO(xi=1e-3, psi=1e-3)


# prunable


@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (layers.Dense(3), (4,), ["kernel"]),
        (layers.Conv2D(3, 2), (4, 4, 2), ["kernel"]),
        (
            layers.SeparableConv1D(3, 2),
            (4, 2),
            ["depthwise_kernel", "pointwise_kernel"],
        ),
        (layers.LSTM(3), (4, 2), ["kernel", "recurrent_kernel"]),
        (layers.GRU(3), (4, 2), ["kernel", "recurrent_kernel", "bias"]),
        (layers.Embedding(5, 3), (4,), ["embeddings"]),
        (layers.BatchNormalization(), (4, 4, 2), []),
        (layers.SpectralNormalization(layers.Dense(3)), (4,), ["kernel"]),
        (layers.ReLU(), (4,), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, keras.Layer) else "",
)
def test_prunable_are_trainable_weights_of_rank_two_or_more(layer, shape, expected):
    assert names(selection.prunable(built(layer, *shape))) == expected


def test_what_is_frozen_is_not_prunable():
    layer = built(layers.Dense(3), 4)
    layer.trainable = False
    assert selection.prunable(layer) == []


def test_integers_are_not_prunable():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    model.quantize("int8", filters="dense")
    assert model.layers[0].kernel.dtype == "int8"
    assert selection.prunable(model) == []


@pytest.mark.parametrize(
    "wrap",
    [
        functools.partial(LTP, l0=1e-6),
        KeepZeros,
        functools.partial(MagnitudePruning, schedule=ConstantSparsity(0.5)),
        functools.partial(Penalized, regularizer=halo()),
        functools.partial(Penalized, regularizer=SWS(1e-3, 1e-3)),
        functools.partial(Penalized, regularizer=MCP(1e-3, 3.0)),
    ],
    ids=["LTP", "KeepZeros", "MagnitudePruning", "HALO", "SWS", "MCP"],
)
def test_a_methods_own_variables_are_known(wrap):
    dense = layers.Dense(3)
    layer = built(wrap(dense), 4)
    own = [w for w in layer.weights if not any(w is v for v in dense.weights)]
    assert [selection.is_method_variable(w) for w in own] == [True] * len(own)
    assert selection.plain_weights(layer) == dense.weights == [dense.kernel, dense.bias]
    assert selection.prunable(layer) == [dense.kernel]


@pytest.mark.parametrize("name", ["kernel", "scale", "threshold", "mask", "gamma"])
def test_names_that_others_use_are_not_a_methods(name):
    assert not selection.is_method_variable(keras.Variable(0.0, name=name))


# choose


@pytest.mark.parametrize(
    "variables, expected",
    [
        (None, ["kernel", "recurrent_kernel", "kernel", "recurrent_kernel"]),
        ("recurrent", ["recurrent_kernel", "recurrent_kernel"]),
        ("^kernel", ["kernel", "kernel"]),
        ("backward", ["kernel", "recurrent_kernel"]),
        (lambda variable: variable.shape[0] == 2, ["kernel", "kernel"]),
    ],
    ids=["None", "regex", "anchored", "path", "predicate"],
)
def test_choose_selects_by_name_path_or_predicate(variables, expected):
    layer = built(layers.Bidirectional(layers.LSTM(3)), 4, 2)
    assert names(selection.choose(layer, variables)) == expected


@pytest.mark.parametrize("variables", [None, "bias", lambda variable: False])
def test_nothing_to_choose_is_an_error_that_shows_what_there_is(variables):
    layer = built(layers.BatchNormalization(name="norm"), 4)
    with pytest.raises(ValueError, match=r"'norm'.*gamma \(4,\), beta \(4,\)"):
        selection.choose(layer, variables)


# walk, leaves


def nested():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="b")], name="in")
    x = keras.Input((4,), name="x")
    again = layers.Dense(4, name="a")
    model = keras.Model(x, inner(again(inner(again(x)))), name="top")
    return model, inner


def test_walk_finds_every_layer_once_parents_first():
    model, _ = nested()
    wrapper = built(LTP(layers.Bidirectional(layers.LSTM(3, name="rnn")), 1e-6), 4, 2)
    found = selection.walk(model)
    assert len({id(layer) for layer in found}) == len(found)
    assert {layer.name for layer in found} >= {"top", "x", "a", "in", "b"}
    assert found[0] is model
    kinds = [type(layer).__name__ for layer in selection.walk(wrapper)]
    assert kinds[:2] == ["LTP", "Bidirectional"]
    assert kinds.count("LSTM") == kinds.count("LSTMCell") == 2


def test_leaves_are_the_layers_of_models_in_models_once():
    model, _ = nested()
    assert [layer.name for layer in selection.leaves(model)] == ["x", "a", "b"]


def test_layers_that_are_no_models_are_taken_whole():
    x = keras.Input((4, 2))
    model = keras.Model(x, layers.TimeDistributed(layers.Dense(3), name="whole")(x))
    assert [layer.name for layer in selection.leaves(model)][1:] == ["whole"]


# governed_weights


def test_governed_weights_come_once_and_in_the_order_of_the_weights():
    x = keras.Input((4,))
    shared = LTP(layers.Dense(4), 1e-6)
    penalized = layers.Dense(4, kernel_regularizer=halo())
    tower = keras.Sequential([keras.Input((4,)), shared, penalized])
    model = keras.Model(x, layers.Dense(2)(tower(shared(tower(x)))))
    _ = model.losses
    governed = selection.governed_weights(model)
    assert [g.method for g in governed] == ["LTP", "HALO"]
    assert [g.variable for g in governed] == [shared.layer.kernel, penalized.kernel]
    weights = [id(w) for w in model.weights]
    places = [weights.index(id(g.variable)) for g in governed]
    assert places == sorted(places)


def test_effective_is_what_inference_computes_with():
    layer = built(LTP(layers.Dense(5, use_bias=False), 1e-6, initial_threshold=3.0), 4)
    (governed,) = selection.governed_weights(layer)
    computed = layer(np.eye(4, dtype="float32"), training=False)
    effective = ops.convert_to_numpy(governed.effective)
    np.testing.assert_array_equal(effective, ops.convert_to_numpy(computed))
    kernel = ops.convert_to_numpy(governed.variable)
    threshold = float(ops.convert_to_numpy(governed.threshold))
    np.testing.assert_array_equal(effective, np.where(kernel**2 > threshold, kernel, 0))
    assert 0 < (effective == 0).sum() < effective.size


def test_a_penalty_governs_before_it_was_ever_computed(tmp_path):
    stack = [keras.Input((4,)), layers.Dense(3, kernel_regularizer=halo())]
    model = keras.Sequential(stack)
    assert [g.method for g in selection.governed_weights(model)] == ["HALO"]
    _ = model.losses
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    (governed,) = selection.governed_weights(loaded)
    assert governed.variable is loaded.layers[0].kernel


def test_a_plain_model_has_no_governed_weights():
    assert selection.governed_weights(nested()[0]) == []


def test_weights_are_governed_once():
    with pytest.raises(
        ValueError, match="whose weights nothing governs yet.*has a HALO"
    ):
        LTP(layers.Dense(3, kernel_regularizer=halo()), 1e-6)
    with pytest.raises(ValueError, match="has a LTP.*finalize"):
        LTP(layers.TimeDistributed(LTP(layers.Dense(3), 1e-6)), 1e-6)


# matches


@pytest.mark.parametrize(
    "filters, expected",
    [
        (None, True),
        ("conv", True),
        ("^conv$", False),
        ("dense", False),
        (["dense", "2d"], True),
        (("dense",), False),
        ([], False),
        (lambda layer: isinstance(layer, layers.Conv2D), True),
        (lambda layer: [], False),
    ],
)
def test_filters_match_as_in_quantize(filters, expected):
    layer = layers.Conv2D(3, 2, name="my_conv2d")
    assert selection.matches(layer, filters) is expected


# name_within


def test_names_within_a_layer_start_below_it():
    layer = built(layers.Bidirectional(layers.LSTM(3, name="rnn")), 4, 2)
    found = [selection.name_within(layer, w) for w in selection.prunable(layer)]
    assert found == [
        "forward_rnn/lstm_cell/kernel",
        "forward_rnn/lstm_cell/recurrent_kernel",
        "backward_rnn/lstm_cell/kernel",
        "backward_rnn/lstm_cell/recurrent_kernel",
    ]
    dense = built(layers.Dense(3), 4)
    assert selection.name_within(dense, dense.kernel) == "kernel"
