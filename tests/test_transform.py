"""From dense to sparse and back: the same weights, names and outputs, on any graph."""

import functools
import gc
import os
import subprocess
import sys
import weakref

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


# sparsify


@every_model
@every_method
def test_sparsify_changes_neither_outputs_nor_names(make, method):
    model, x = make()
    sparse = ks.sparsify(model, method)
    assert names(sparse) == names(model)
    assert_equal(values(plain_weights(sparse)), values(model.weights))
    assert_equal(outputs(sparse, x), outputs(model, x))
    assert not sparse.compiled
    prunable = [w for w in model.trainable_weights if len(w.shape) >= 2]
    assert len(scales(sparse) + thresholds(sparse)) == len(prunable)


@pytest.mark.parametrize(
    "regularizer",
    [keras.regularizers.L1(0.1), keras.regularizers.L1L2(0.1, 0.2), ks.MCP(0.1, 3.0)],
    ids=lambda regularizer: type(regularizer).__name__,
)
def test_sparsify_takes_any_regularizer(regularizer):
    model = mlp()
    sparse = ks.sparsify(model, regularizer)
    fresh = functools.partial(type(regularizer).from_config, regularizer.get_config())
    expected = total(fresh()(layer.kernel) for layer in model.layers)
    np.testing.assert_allclose(total(sparse.losses), expected, rtol=1e-6)
    assert {row.method for row in ks.report(sparse).rows if len(row.shape) > 1} == {
        type(regularizer).__name__
    }


@every_method
def test_sparsify_and_finalize_share_nothing_with_the_original(method):
    model, x = with_operations()
    y = features(2, 1, 2)
    model.compile("sgd", "mse", run_eagerly=True)
    sparse = ks.sparsify(model, method)
    plain = ks.finalize(sparse)
    for each in (sparse, plain):
        each.compile("sgd", "mse", run_eagerly=True)
    for trained in (model, sparse, plain):
        others = [each for each in (model, sparse, plain) if each is not trained]
        before = [values(each.variables) for each in others]
        initial = values(trained.trainable_variables)
        trained.fit(x, y, verbose=0)
        for each, state in zip(others, before, strict=True):
            assert_equal(values(each.variables), state)
        moved = zip(values(trained.trainable_variables), initial, strict=True)
        assert any((new != old).any() for new, old in moved)


@pytest.mark.parametrize(
    "transform", [functools.partial(ks.sparsify, method=LTP), ks.finalize]
)
def test_the_original_does_not_keep_its_copies_alive(transform):
    model, _ = with_operations()
    copies = [weakref.ref(transform(model).layers[1]) for _ in range(2)]
    gc.collect()
    assert [copy() for copy in copies] == [None, None]


def test_shared_layers_stay_shared_and_cost_once():
    model, _ = shared()
    sparse = ks.sparsify(model, functools.partial(ks.LTP, l0=2.0, temperature=0.3))
    kernels = [w.astype("float64") for w in values(model.weights) if w.ndim == 2]
    expected = 0.0
    for w in kernels:
        arguments = w**2 / (0.3 * np.var(np.abs(w)))
        expected += 2.0 * np.sum(1 / (1 + np.exp(-arguments)))
    assert len(thresholds(sparse)) == len(kernels) == 2
    np.testing.assert_allclose(total(sparse.losses), expected, rtol=1e-5)


def test_halo_gives_every_kernel_in_an_attention_its_own_scales():
    model, _ = attention()
    sparse = ks.sparsify(model, HALO)
    shapes = [tuple(w.shape) for w in model.trainable_weights if len(w.shape) >= 2]
    assert sorted(tuple(scale.shape) for scale in scales(sparse)) == sorted(shapes)
    assert len({id(scale) for scale in scales(sparse)}) == len(shapes)
    assert HALO.weights == []  # the instance that was given is a pattern


@every_method
def test_an_existing_regularizer_is_kept(method):
    stack = [
        keras.Input((4,)),
        layers.Dense(3, kernel_regularizer="l2", use_bias=False),
    ]
    model = keras.Sequential(stack)
    bare = keras.Sequential([stack[0], layers.Dense(3, use_bias=False)])
    bare.set_weights(model.get_weights())
    expected = total(ks.sparsify(bare, method).losses) + total(model.losses)
    received = total(ks.sparsify(model, method).losses)
    np.testing.assert_allclose(received, expected, rtol=1e-6)


class Broken(ks.LTP):
    """Fails where it is told to: in its `build`, its `call`, or its second call."""

    def __init__(self, layer, where):
        super().__init__(layer, l0=1e-6)
        self.where = where
        self.calls = 0

    def build(self, input_shape=None):
        if self.where == "build":
            raise RuntimeError("cannot be built")
        super().build(input_shape)

    def call(self, inputs, *args, **kwargs):
        if self.where == "call" or (self.where == "second" and inputs.shape[-2] == 3):
            raise RuntimeError("cannot be called")
        return super().call(inputs, *args, **kwargs)


def breaking(where):
    """A method that fails for layers of the name `bad`."""

    def method(layer):
        if layer.name != "bad":
            return LTP(layer)
        if where == "method":
            raise RuntimeError("cannot be made")
        return Broken(layer, where)

    return method


@pytest.mark.parametrize("where", ["method", "build", "call", "second"])
def test_a_layer_that_cannot_be_handled_stays_dense(where):
    a, b = keras.Input((2, 4)), keras.Input((3, 4))
    bad = layers.Dense(4, name="bad")
    model = keras.Model([a, b], [layers.Dense(2, name="good")(bad(a)), bad(b)])
    x = [features(2, 2, 4), features(2, 3, 4)]
    sparse = ks.sparsify(model, breaking(where))
    assert_equal(outputs(sparse, x), outputs(model, x))
    rows = {row.layer: row for row in ks.report(sparse).rows if len(row.shape) > 1}
    assert rows["good"].method == "LTP"
    assert rows["bad"].method is None
    assert (
        "could not handle" in rows["bad"].reason and "cannot be" in rows["bad"].reason
    )
    assert len(ks.finalize(sparse).weights) == len(model.weights)


def test_layers_of_one_name_in_two_models_may_both_fail():
    stacks = [
        keras.Sequential([keras.Input((4,)), layers.Dense(4, name="bad")], name=name)
        for name in ("left", "right")
    ]
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(2)(stacks[1](stacks[0](x))))
    sparse = ks.sparsify(model, breaking("call"))
    assert [row.method for row in ks.report(sparse).rows[::2]] == [None, None, "LTP"]


def test_the_reason_survives_a_second_sparsify():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4, name="bad"),
            layers.Dense(4),
            layers.Dense(3, name="last"),
        ]
    )
    sparse = ks.sparsify(model, breaking("call"), filters="bad|dense")
    sparse = ks.sparsify(sparse, HALO, filters="last")
    assert "cannot be called" in ks.report(sparse).rows[0].reason


def test_a_method_that_can_handle_nothing_is_an_error():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="bad")])
    with pytest.raises(ValueError, match="(?s)`method`.*'bad'.*cannot be called"):
        ks.sparsify(model, breaking("call"))


@pytest.mark.parametrize(
    "method, reason",
    [
        (lambda layer: None, "it returned None, which is no `keras.Layer`$"),
        (layers.SpectralNormalization, "a SpectralNormalization around it does not"),
        (layers.TimeDistributed, "a TimeDistributed around it does not"),
    ],
    ids=["None", "SpectralNormalization", "TimeDistributed"],
)
def test_a_method_that_makes_something_else_is_an_error(method, reason):
    model = keras.Sequential([keras.Input((5, 4)), layers.Dense(4, name="a")])
    with pytest.raises(ValueError, match=f"^Argument `method`.*'a': {reason}"):
        ks.sparsify(model, method)


def test_a_layer_whose_weights_cannot_be_taken_stays_dense():
    def method(layer):
        wrap = layers.SpectralNormalization if layer.name == "first" else LTP
        return wrap(layer)

    sparse = ks.sparsify(mlp(), method)
    assert kinds(sparse) == ["Dense", "LTP", "LTP"]
    assert "SpectralNormalization" in ks.report(sparse).rows[0].reason


def test_frozen_layers_stay_as_they_are():
    model = mlp()
    model.get_layer("first").trainable = False
    sparse = ks.sparsify(model, LTP)
    assert kinds(sparse) == ["Dense", "LTP", "LTP"]
    assert not sparse.get_layer("first").trainable
    assert ks.report(sparse).rows[0].reason.startswith("frozen")


def test_a_frozen_inner_model_stays_frozen():
    model, x = functional_in_sequential()
    model.get_layer("body").trainable = False
    sparse = ks.sparsify(model, LTP)
    assert not sparse.get_layer("body").trainable
    assert len(thresholds(sparse)) == 1
    assert_equal(outputs(sparse, x), outputs(model, x))


@pytest.mark.parametrize("make", [functional_in_sequential, two_levels])
def test_layers_unfrozen_in_a_frozen_model_stay_so(make):
    model, _ = make()
    inner = next(v for v in model.layers if isinstance(v, keras.Model))
    inner.trainable = False
    inner.layers[-1].trainable = True
    count = len(model.trainable_weights)
    assert count > 2
    sparse = ks.sparsify(model, LTP)
    assert len(sparse.trainable_weights) == count + len(thresholds(sparse))
    assert len(ks.finalize(sparse).trainable_weights) == count


def test_two_methods_compose():
    model, x = sequential()
    sparse = ks.sparsify(model, LTP, filters=lambda v: isinstance(v, layers.Conv2D))
    close_gates(sparse)
    both = ks.sparsify(sparse, HALO)
    methods = {
        row.layer_type: row.method for row in ks.report(both).rows[::-1] if row.method
    }
    assert methods == {"Conv2D": "LTP", "Dense": "HALO"}
    assert_equal(values(thresholds(both)), values(thresholds(sparse)))
    assert_equal(outputs(both, x), outputs(sparse, x))


def test_thresholds_in_a_custom_layer_survive_another_sparsify():
    model, x = custom()
    sparse = ks.sparsify(model, LTP, filters="own")
    close_gates(sparse)
    both = ks.sparsify(sparse, HALO)
    assert_equal(values(thresholds(both)), [BITE, BITE])
    assert_equal(outputs(both, x), outputs(sparse, x))


@pytest.mark.parametrize(
    "filters, expected",
    [
        (None, ["LTP", "LTP", "LTP"]),
        ("^(first|logits)$", ["LTP", "Dense", "LTP"]),
        (["sec", "log"], ["Dense", "LTP", "LTP"]),
        (lambda layer: layer.name != "logits", ["LTP", "LTP", "Dense"]),
    ],
    ids=["None", "regex", "list", "callable"],
)
def test_filters_select_layers(filters, expected):
    assert kinds(ks.sparsify(mlp(), LTP, filters)) == expected


@pytest.mark.parametrize("filters", ["conv", [], lambda layer: False])
@pytest.mark.parametrize("function", ["sparsify", "prune"])
def test_filters_that_match_nothing_are_an_error(function, filters):
    argument = {"sparsify": LTP, "prune": 0.5}[function]
    with pytest.raises(ValueError, match="`filters`.*'first', 'second', 'logits'"):
        getattr(ks, function)(mlp(), argument, filters=filters)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


FUNCTIONS = {
    "sparsify": functools.partial(ks.sparsify, method=LTP),
    "prune": functools.partial(ks.prune, sparsity=0.5),
    "finalize": ks.finalize,
    "pruning_curve": functools.partial(ks.pruning_curve, x=features(2, 4)),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_subclassed_model_is_an_error_that_shows_the_way(function):
    model = Subclassed()
    model(features(2, 4))
    with pytest.raises(TypeError) as error:
        FUNCTIONS[function](model)
    for part in (function, "Subclassed", "keras_sparsity.LTP(", "keras_sparsity.HALO("):
        assert part in str(error.value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_unbuilt_model_is_an_error(function):
    with pytest.raises(ValueError, match=f"`model` of `{function}` must be built"):
        FUNCTIONS[function](keras.Sequential([layers.Dense(3)]))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_model_is_an_error(function):
    with pytest.raises(
        TypeError, match=f"`model` of `{function}` must be a `keras.Model`"
    ):
        FUNCTIONS[function](layers.Dense(3))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_lora_adapters_are_an_error(function):
    model = mlp()
    model.get_layer("second").enable_lora(2)
    with pytest.raises(ValueError, match=f"`{function}` must have no LoRA.*'second'"):
        FUNCTIONS[function](model)


@pytest.mark.parametrize("method", ["l1", None, 3, layers.Dense(3)])
def test_a_wrong_method_is_an_error(method):
    with pytest.raises(TypeError, match="Argument `method`.*Received: method="):
        ks.sparsify(mlp(), method)


@pytest.mark.parametrize("filters", [3, [3], {"first"}])
def test_wrong_filters_are_an_error(filters):
    for function in (FUNCTIONS["sparsify"], FUNCTIONS["prune"]):
        with pytest.raises(TypeError, match="Argument `filters`.*Received: filters="):
            function(mlp(), filters=filters)


@pytest.fixture(params=["mixed_bfloat16", "mixed_float16"])
def mixed_model(request):
    """An `mlp` in mixed precision, made before the global policy changed back."""
    keras.config.set_dtype_policy(request.param)
    model = mlp()
    keras.config.set_dtype_policy("float32")
    return model


@every_method
def test_mixed_precision_is_kept(mixed_model, method):
    x = features(8, 4)
    sparse = ks.sparsify(mixed_model, method)
    close_gates(sparse)
    for new in (sparse, ks.finalize(sparse)):
        assert new.dtype_policy == mixed_model.dtype_policy
        assert new.outputs[0].dtype == mixed_model.outputs[0].dtype
        assert {w.dtype for w in new.trainable_weights} == {"float32"}
    assert_equal(outputs(ks.finalize(sparse), x), outputs(sparse, x))
    if method is HALO:
        assert_equal(outputs(sparse, x), outputs(mixed_model, x))


class Dense(layers.Dense):
    """Unregistered, and of the name of a Keras layer."""

    def call(self, inputs):
        return 2 * super().call(inputs)


@pytest.mark.parametrize(
    "first, second", [(Dense, layers.Dense), (layers.Dense, Dense)]
)
@every_method
def test_a_custom_layer_may_have_the_name_of_a_keras_layer(method, first, second):
    model = keras.Sequential([keras.Input((4,)), first(5), second(3)])
    x = features(2, 4)
    sparse = ks.sparsify(model, method)
    plain = ks.finalize(sparse)
    assert [type(layer) for layer in plain.layers] == [first, second]
    assert_equal(outputs(sparse, x), outputs(model, x))
    assert_close(outputs(plain, x), outputs(model, x))


def test_statistics_are_carried_over():
    normalization = layers.Normalization()
    normalization.adapt(3 + 2 * features(50, 4))
    stack = [keras.Input((4,)), normalization, layers.Dense(3)]
    model = keras.Sequential([*stack, layers.BatchNormalization(), layers.Dense(2)])
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(features(16, 4), features(16, 2), verbose=0)
    x = features(5, 4)
    sparse = ks.sparsify(model, LTP)
    carried = [w for w in plain_weights(sparse) if not w.trainable]
    assert_equal(values(carried), values(model.non_trainable_weights))
    assert_equal(outputs(sparse, x), outputs(model, x))
    assert_close(outputs(ks.finalize(sparse), x), outputs(model, x))


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="lookups are TensorFlow operations"
)
def test_an_adapted_vocabulary_is_carried_over():
    lookup = layers.IntegerLookup()
    lookup.adapt(np.array([5, 6, 7]))
    stack = [keras.Input((3,), dtype="int64"), lookup, layers.Embedding(9, 4)]
    model = keras.Sequential(stack)
    x = np.array([[5, 6, 9]])
    assert_equal(outputs(ks.sparsify(model, LTP), x), outputs(model, x))


def test_inputs_keep_what_they_are():
    sparse = keras.backend.backend() != "torch"  # which has no sparse tensors
    a = keras.Input((4,), sparse=sparse, name="sparse")
    b = keras.Input((3,), optional=True, name="optional")
    c = keras.Input(batch_shape=(2, 3), dtype="int32", name="fixed")
    model = keras.Model([a, b, c], [b, c, layers.Dense(3)(a)])
    given = [layer.get_config() for layer in model.layers[:3]]
    sparse = ks.sparsify(model, LTP)
    assert [layer.get_config() for layer in sparse.layers[:3]] == given
    assert ks.finalize(sparse).get_config() == model.get_config()
    stack = keras.Sequential([a, layers.Dense(3)])
    new = ks.finalize(stack)
    assert new.get_config() == stack.get_config()


@every_method
def test_attention_may_be_called_in_any_way(method):
    a, mask = keras.Input((3, 4)), keras.Input((3, 3), dtype=bool)
    y = layers.MultiHeadAttention(2, 2)(query=a, value=a)
    y, scores = layers.MultiHeadAttention(2, 2)(
        y, y, attention_mask=mask, return_attention_scores=True, use_causal_mask=True
    )
    model = keras.Model([a, mask], [y, scores])
    x = [features(2, 3, 4), np.ones((2, 3, 3), bool)]
    sparse = ks.sparsify(model, method)
    assert all(row.method for row in ks.report(sparse).rows if len(row.shape) > 1)
    assert_equal(outputs(sparse, x), outputs(model, x))


def test_stateful_layers_stay_stateful():
    given = keras.Input(batch_shape=(2, 3, 4))
    memory = layers.GRU(3, stateful=True, name="memory")
    model = keras.Model(given, layers.Dense(2)(memory(given)))
    x = features(2, 3, 4)
    gated, penalized = ks.sparsify(model, LTP), ks.sparsify(model, HALO)
    for _ in range(2):
        expected = outputs(model, x)
        assert_equal(outputs(gated, x), expected)
        assert_equal(outputs(penalized, x), expected)
    assert kinds(gated)[1:] == ["GRU", "LTP"]
    assert "stateful" in ks.report(gated).rows[0].reason


@pytest.mark.parametrize("base", [keras.Sequential, keras.Model])
def test_a_subclass_with_its_own_training_step_stays_one(base):
    class Own(base):
        def train_step(self, *args, **kwargs):
            return super().train_step(*args, **kwargs)

    x = keras.Input((4,))
    dense = layers.Dense(3)
    model = Own([x, dense]) if base is keras.Sequential else Own(x, dense(x))
    assert type(ks.sparsify(model, LTP)) is Own


# finalize


@every_model
@every_method
def test_finalize_computes_the_same_and_is_plain(make, method):
    model, x = make()
    sparse = ks.sparsify(model, method)
    close_gates(sparse)
    plain = ks.finalize(sparse)
    assert_close(outputs(plain, x), outputs(sparse, x))
    assert "keras_sparsity" not in plain.to_json()
    assert plain.get_config() == model.get_config()
    assert len(plain.weights) == len(model.weights)
    if method is HALO:
        assert_equal(values(plain.weights), values(model.weights))
    else:
        assert ks.report(plain).nonzeros == ks.report(sparse).nonzeros


def test_weights_have_their_old_paths():
    model, _ = two_levels()
    plain = ks.finalize(ks.sparsify(model, LTP))
    assert [w.path for w in plain.weights] == [w.path for w in model.weights]


@every_method
def test_keep_zeros_then_finalize_is_finalize(method):
    model, x = mobile()
    sparse = ks.sparsify(model, method)
    close_gates(sparse)
    tuned = ks.finalize(sparse, keep_zeros=True)
    assert kinds(tuned).count("KeepZeros") == 4
    assert_close(outputs(tuned, x), outputs(sparse, x))
    assert_equal(
        values(ks.finalize(tuned).weights), values(ks.finalize(sparse).weights)
    )


def test_kept_zeros_survive_fine_tuning():
    sparse = ks.sparsify(mlp(), LTP)
    close_gates(sparse)
    tuned = ks.finalize(sparse, keep_zeros=True)
    tuned.compile(
        keras.optimizers.AdamW(0.1, weight_decay=0.1), "mse", run_eagerly=True
    )
    tuned.fit(features(64, 4), features(64, 3), epochs=2, verbose=0)
    for new, old in zip(
        ks.finalize(tuned).layers, ks.finalize(sparse).layers, strict=True
    ):
        new, old = values([new.kernel, old.kernel])
        assert (new[old == 0] == 0).all()
        assert (new[old != 0] != old[old != 0]).all()


def test_zeros_of_a_pruned_model_survive_fine_tuning():
    pruned = ks.prune(mlp(), 0.6, filters="first|second")
    tuned = ks.finalize(pruned, keep_zeros=True)
    assert kinds(tuned) == ["KeepZeros", "KeepZeros", "Dense"]
    tuned.compile("adam", "mse", run_eagerly=True)
    tuned.fit(features(64, 4), features(64, 3), verbose=0)
    small = ks.finalize(tuned)
    assert kinds(small) == ["Dense"] * 3
    for new, old in zip(small.layers, pruned.layers, strict=True):
        new, old = values([new.kernel, old.kernel])
        np.testing.assert_array_equal(new == 0, old == 0)


def test_no_zeros_to_keep_is_an_error():
    with pytest.raises(ValueError, match="`keep_zeros=True` needs zeros"):
        ks.finalize(mlp(), keep_zeros=True)


def wrapped_penalty(layer):
    return ks.Penalized(layer, HALO)


@pytest.mark.parametrize("method", [LTP, wrapped_penalty], ids=["LTP", "Penalized"])
@pytest.mark.parametrize(
    "copy",
    ["save", "clone", "sparsify", "finalize", "keep_zeros"],
)
def test_a_sparse_layer_may_be_frozen(method, copy, tmp_path):
    sparse = ks.sparsify(mlp(), method, filters="first|second")
    close_gates(sparse)
    sparse.get_layer("first").trainable = False
    x = features(8, 4)
    if copy == "save":
        sparse.save(tmp_path / "model.keras")
        new = keras.models.load_model(tmp_path / "model.keras")
    elif copy == "clone":
        new = keras.models.clone_model(sparse)
        new.set_weights(sparse.get_weights())
    elif copy == "sparsify":
        new = ks.sparsify(sparse, HALO)
    else:
        new = ks.finalize(sparse, keep_zeros=copy == "keep_zeros")
    assert_close(outputs(new, x), outputs(sparse, x))
    assert new.get_layer("first").trainable_weights == []
    assert ("LTP" in kinds(new)) == (method is LTP and "z" not in copy)


PREDICT = """
import sys
sys.modules["keras_sparsity"] = None  # importing it fails
import keras, numpy
model = keras.saving.load_model("model.keras")
numpy.save("predicted.npy", model.predict(numpy.load("x.npy"), verbose=0))
"""


def test_the_file_loads_in_keras_alone(tmp_path):
    model, x = sequential()
    sparse = ks.sparsify(model, LTP)
    close_gates(sparse)
    plain = ks.finalize(sparse)
    plain.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    path = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", PREDICT], cwd=tmp_path, env=path, check=True)
    predicted = np.load(tmp_path / "predicted.npy")
    np.testing.assert_array_equal(predicted, plain.predict(x, verbose=0))


def finalized_mlp():
    sparse = ks.sparsify(mlp(), LTP)
    close_gates(sparse)
    return ks.finalize(sparse)


def test_a_finalized_model_can_be_quantized():
    plain, x = finalized_mlp(), features(8, 4)
    (expected,) = outputs(plain, x)
    plain.quantize("int8", filters=lambda layer: hasattr(layer, "kernel"))
    assert plain.get_layer("first").kernel.dtype == "int8"
    (quantized,) = outputs(plain, x)
    assert np.abs(quantized - expected).max() < 0.05 * np.abs(expected).max()


def test_a_finalized_model_can_have_lora():
    plain, x = finalized_mlp(), features(8, 4)
    expected = outputs(plain, x)
    for layer in plain.layers:
        layer.enable_lora(2)
    assert_close(outputs(plain, x), expected)
    plain.compile("sgd", "mse", run_eagerly=True)
    plain.fit(x, features(8, 3), verbose=0)


def test_halo_that_never_computed_its_losses_can_be_finalized():
    layer = layers.Dense(3, kernel_regularizer=ks.HALO(1e-3, 1e-3))
    model = keras.Sequential([keras.Input((4,)), layer])
    x = features(2, 4)
    plain = ks.finalize(model)
    assert_equal(outputs(plain, x), outputs(model, x))
    assert "keras_sparsity" not in plain.to_json()


class Gated(keras.Layer):
    """A custom layer that makes a layer of this package in its own code."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = LTP(layers.Dense(4))

    def build(self, input_shape):
        self.inner.build(input_shape)
        self.built = True

    def call(self, inputs):
        return self.inner(inputs)


@pytest.mark.parametrize("function", ["finalize", "prune"])
def test_a_method_in_a_layers_own_code_cannot_be_taken_out(function):
    model = keras.Sequential([keras.Input((4,)), Gated(name="gated")])
    with pytest.raises(ValueError, match="'gated'"):
        FUNCTIONS[function](model)


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX has no float64 unless configured"
)
@every_method
def test_more_precision_is_kept(method):
    dense = layers.Dense(2, dtype="float64")
    model = keras.Sequential([keras.Input((4,), dtype="float64"), dense])
    sparse = ks.sparsify(model, method)
    for plain in (ks.finalize(sparse), ks.prune(sparse, 0), ks.prune(model, 0)):
        assert_equal(values(plain.weights), values(model.weights))


# prune


def pooled(model):
    """All weights of rank 2 or more of an `mlp`, in order."""
    return np.concatenate([w.ravel() for w in values(model.weights) if w.ndim >= 2])


@pytest.mark.parametrize("sparsity", [0, 0.01, 0.3, 0.5, 0.95, 0.999])
@pytest.mark.parametrize(
    "make", [mlp, lambda: ks.sparsify(mlp(), HALO)], ids=["plain", "HALO"]
)
def test_prune_zeroes_the_smallest_of_all(make, sparsity):
    model = make()
    before = pooled(ks.finalize(model))
    after = pooled(ks.prune(model, sparsity))
    count = int(np.floor(sparsity * before.size))
    expected = before.copy()
    expected[np.argsort(np.abs(before))[:count]] = 0
    np.testing.assert_array_equal(after, expected)
    assert (after == 0).sum() == count


def test_prune_breaks_ties_by_position():
    model = mlp()
    for layer in model.layers:
        layer.kernel.assign(np.where(features(*layer.kernel.shape) > 0, 0.5, -0.5))
    after = pooled(ks.prune(model, 0.5))
    half = after.size // 2
    assert (after[:half] == 0).all() and (after[half:] != 0).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_prune_counts_closed_gates_and_never_opens_them(sparsity):
    sparse = ks.sparsify(mlp(), LTP)
    close_gates(sparse)
    gated = pooled(ks.finalize(sparse))
    closed = int((gated == 0).sum())
    assert 0.3 * gated.size < closed < 0.9 * gated.size
    after = pooled(ks.prune(sparse, sparsity))
    assert (after[gated == 0] == 0).all()
    assert (after == 0).sum() == max(int(np.floor(sparsity * gated.size)), closed)


def test_prune_by_layer():
    small = ks.prune(mlp(), 0.3, scope="layer")
    counts = [int((w == 0).sum()) for w in values(small.weights) if w.ndim >= 2]
    assert counts == [int(0.3 * 24), int(0.3 * 30), int(0.3 * 15)]


def test_prune_of_filtered_layers_leaves_the_others():
    model = mlp()
    small = ks.prune(model, 0.5, filters=["first", "logits"])
    after, before = values(small.weights), values(model.weights)
    assert (after[0] == 0).sum() + (after[4] == 0).sum() == (24 + 15) // 2
    assert_equal(after[1:4], before[1:4])


def test_prune_of_filtered_layers_bakes_the_gates_of_the_others():
    sparse = ks.sparsify(mlp(), LTP)
    close_gates(sparse)
    small, plain = ks.prune(sparse, 0.999, filters="logits"), ks.finalize(sparse)
    assert_equal(values(small.weights)[:4], values(plain.weights)[:4])
    assert (values(small.weights)[4] == 0).sum() == 14


def test_prune_takes_governed_weights_alone_where_there_are_some():
    model = ks.sparsify(mlp(), HALO, filters="second")
    small = ks.prune(model, 0.5)
    assert [int((w == 0).sum()) for w in values(small.weights)[::2]] == [0, 15, 0]


def test_prune_leaves_frozen_layers():
    model = mlp()
    model.get_layer("second").trainable = False
    small = ks.prune(model, 0.999)
    assert [int((w == 0).sum()) for w in values(small.weights)[::2]] == [24, 0, 14]


@pytest.mark.parametrize(
    "make", [mlp, lambda: ks.sparsify(mlp(), LTP)], ids=["plain", "LTP"]
)
def test_prune_works_on_a_copy(make):
    model = make()
    before = values(model.weights)
    small = ks.prune(model, 0.9)
    assert_equal(values(model.weights), before)
    assert zeros(small) == int(0.9 * 69)
    assert "keras_sparsity" not in small.to_json() and not small.compiled


def test_shared_layers_are_pruned_once():
    model, _ = shared()
    small = ks.prune(model, 0.5)
    assert zeros(small) == (16 + 16) // 2
    assert len(small.weights) == len(model.weights)


@pytest.mark.parametrize(
    "sparsity", [1.0, 1.5, -0.1, np.nan, np.inf, "0.5", None, True]
)
def test_a_sparsity_out_of_range_is_an_error(sparsity):
    with pytest.raises(
        ValueError, match="Argument `sparsity` must be .* Received: sparsity="
    ):
        ks.prune(mlp(), sparsity)


def test_an_unknown_scope_is_an_error():
    with pytest.raises(
        ValueError, match='`scope` must be "global" or "layer".*\'all\''
    ):
        ks.prune(mlp(), 0.5, scope="all")


@pytest.mark.parametrize(
    "function, method",
    [
        ("finalize", LTP),
        ("finalize", HALO),
        ("prune", None),
        ("prune", LTP),
        ("prune", HALO),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_weight_that_is_nan_is_an_error_that_names_it(function, method):
    model = mlp() if method is None else ks.sparsify(mlp(), method)
    kernel = plain_weights(model)[2]
    bad = values([kernel])[0].copy()
    bad[1, 2] = np.nan
    kernel.assign(bad)
    with pytest.raises(ValueError, match="second/kernel' must be free of NaN"):
        FUNCTIONS[function](model)


@pytest.mark.parametrize("function", ["finalize", "prune"])
def test_a_weight_that_no_method_governs_must_not_be_nan_either(function):
    model = ks.sparsify(mlp(), LTP, filters="first")
    bias = model.get_layer("second").bias
    bias.assign(np.where(np.arange(bias.shape[0]) == 1, np.nan, 0.0))
    with pytest.raises(ValueError, match="second/bias' .*Received 1 NaN"):
        FUNCTIONS[function](model)


@pytest.mark.parametrize("function", ["finalize", "prune"])
def test_a_nan_under_a_mask_is_an_error(function):
    model = ks.sparsify(ks.prune(mlp(), 0.5), ks.KeepZeros)
    kernel = model.get_layer("second").layer.kernel
    (stored,) = values([kernel])
    kernel.assign(np.where(stored == 0, np.nan, stored))
    with pytest.raises(ValueError, match="second/kernel' must be free of NaN"):
        FUNCTIONS[function](model)


@pytest.mark.parametrize("function", ["finalize", "prune"])
def test_a_threshold_that_is_nan_is_an_error(function):
    model = ks.sparsify(mlp(), LTP)
    thresholds(model)[1].assign(np.nan)
    with pytest.raises(ValueError, match="second.*NaN"):
        FUNCTIONS[function](model)


def test_nothing_to_prune_is_an_error():
    model = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(name="norm")]
    )
    with pytest.raises(ValueError, match="Nothing to prune.*'norm'"):
        ks.prune(model, 0.5)
    frozen = mlp()
    frozen.trainable = False
    with pytest.raises(ValueError, match="Nothing to prune"):
        ks.prune(frozen, 0.5)


# pruning_curve


def own_loss(target, predicted):
    """A function that is not registered anywhere."""
    return ops.mean(ops.square(target - predicted), axis=-1)


@pytest.mark.parametrize(
    "method, loss",
    [(None, "mse"), (LTP, own_loss), (HALO, "mse")],
    ids=["plain", "LTP", "HALO"],
)
def test_pruning_curve_is_prune_and_evaluate(method, loss):
    model = mlp() if method is None else ks.sparsify(mlp(), method)
    x, y = features(16, 4), features(16, 3)
    model.compile("sgd", loss, metrics=["mae"], run_eagerly=True)
    before = values(model.weights)
    sparsities = [0.9, 0.5]
    curve = ks.pruning_curve(model, x, y, sparsities)
    assert [point["sparsity"] for point in curve] == sparsities
    for point in curve:
        small = ks.prune(model, point["sparsity"])
        small.compile("sgd", loss, metrics=["mae"], run_eagerly=True)
        expected = small.evaluate(x, y, verbose=0, return_dict=True)
        assert {key: point[key] for key in expected} == pytest.approx(expected)
    assert_equal(values(model.weights), before)


def test_pruning_curve_leaves_the_metrics_of_the_model_alone():
    metric = keras.metrics.MeanAbsoluteError()
    model = mlp()
    model.compile("sgd", "mse", metrics=[metric], run_eagerly=True)
    model.evaluate(features(16, 4), features(16, 3), verbose=0)
    before = total([metric.result()])
    ks.pruning_curve(model, features(16, 4), features(16, 3), [0.5])
    assert total([metric.result()]) == before


@pytest.mark.parametrize(("batch_size", "batches"), [(None, 2), (5, 8), (40, 1)])
def test_pruning_curve_evaluates_in_batches(batch_size, batches):
    class Calls(keras.metrics.Sum):
        def update_state(self, y, y_pred, sample_weight=None):
            super().update_state(1.0)

    model = mlp()
    model.compile("sgd", "mse", metrics=[Calls(name="calls")], run_eagerly=True)
    x, y = features(40, 4), features(40, 3)
    (point,) = ks.pruning_curve(model, x, y, [0.5], batch_size)
    assert point["calls"] == batches


def test_pruning_curve_of_a_model_that_is_not_compiled_is_an_error():
    with pytest.raises(ValueError, match="must be compiled"):
        ks.pruning_curve(mlp(), features(2, 4), features(2, 3), [0.5])


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.x[index::2], self.y[index::2]


def test_pruning_curve_takes_a_dataset_but_no_generator():
    model = mlp()
    model.compile("sgd", "mse", metrics=["mae"], run_eagerly=True)
    x, y = features(16, 4), features(16, 3)
    expected = ks.pruning_curve(model, x, y, [0.5, 0.9])
    received = ks.pruning_curve(model, Batches(x, y), sparsities=[0.5, 0.9])
    for point, reference in zip(received, expected, strict=True):
        assert point == pytest.approx(reference)
    batches = ((x, y) for _ in range(2))
    with pytest.raises(TypeError, match="`x` must be arrays or a dataset"):
        ks.pruning_curve(model, batches, sparsities=[0.5, 0.9])
    assert len(list(batches)) == 2


@pytest.mark.parametrize("sparsities", [[0.5, 1.0], [-0.1], [np.nan], ["0.5"]])
def test_pruning_curve_checks_its_sparsities(sparsities):
    model = mlp()
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match="Argument `sparsities`"):
        ks.pruning_curve(model, features(2, 4), features(2, 3), sparsities)
