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
from graphs import (
    BITE,
    HALO,
    LTP,
    assert_close,
    assert_equal,
    attention,
    close_gates,
    custom,
    every_method,
    every_model,
    features,
    functional_in_sequential,
    kinds,
    mlp,
    mobile,
    names,
    outputs,
    plain_weights,
    scales,
    sequential,
    shared,
    thresholds,
    total,
    two_levels,
    values,
    with_operations,
)
from keras import layers

import keras_sparsity as ks

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


def test_zeros_are_kept_in_frozen_layers_and_beside_what_is_governed():
    pruned = ks.prune(mlp(), 0.6, filters="first|second")
    pruned.get_layer("first").trainable = False
    sparse = ks.sparsify(pruned, LTP, filters="logits")
    tuned = ks.finalize(sparse, keep_zeros=True)
    assert kinds(tuned) == ["KeepZeros"] * 3
    tuned.trainable = True
    tuned.compile("adam", "mse", run_eagerly=True)
    tuned.fit(features(64, 4), features(64, 3), verbose=0)
    small = ks.finalize(tuned)
    for name in ("first", "second"):
        new, old = values([v.get_layer(name).kernel for v in (small, pruned)])
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
