"""A layer with other weights is the same layer with those weights assigned to it."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_sparsity.selection import prunable
from keras_sparsity.substitution import (
    SubstitutingWrapper,
    TransparentWrapper,
    call_with,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 4)).astype("float32")
Y = RNG.normal(size=(8, 4)).astype("float32")
SEQUENCE = RNG.normal(size=(8, 5, 4)).astype("float32")


def array(x):
    return ops.convert_to_numpy(x)


@keras.saving.register_keras_serializable("tests")
class Scaled(SubstitutingWrapper):
    """Computes with `factor` times the weights that it stores."""

    def __init__(self, layer, factor=3.0, **kwargs):
        super().__init__(layer, **kwargs)
        self.factor = factor

    def build_gates(self, variables):
        pass

    def effective_weights(self, training):
        return [self.factor * ops.cast(v, "float32") for v in self.gated]


def scaled_by_hand(layer, factor=3.0):
    for variable in prunable(layer):
        variable.assign(factor * array(variable))
    return layer


@keras.saving.register_keras_serializable("tests")
class Stateful(keras.Layer):
    """Batch statistics, a seed, a counter, and losses of three kinds."""

    def __init__(self, **kwargs):
        kwargs.setdefault("activity_regularizer", keras.regularizers.L2(0.1))
        super().__init__(**kwargs)
        self.dense = layers.Dense(4, kernel_regularizer="l2")
        self.norm = layers.BatchNormalization(momentum=0.5)
        self.dropout = layers.Dropout(0.5, seed=3)

    def build(self, input_shape):
        self.calls = self.add_weight(
            name="calls", dtype="int32", initializer="zeros", trainable=False
        )
        self.dense.build(input_shape)
        self.norm.build(input_shape)

    def call(self, x, training=False):
        if training:
            self.calls.assign_add(1)
        x = self.norm(self.dense(x), training=training)
        x = self.dropout(x, training=training)
        self.add_loss(ops.mean(ops.square(x)))
        return x


def sequential():
    return keras.Sequential(
        [
            layers.Dense(4, activity_regularizer="l2"),
            layers.BatchNormalization(momentum=0.5),
            layers.Dropout(0.5, seed=3),
        ]
    )


def recurrent():
    return layers.GRU(4, dropout=0.5, reset_after=False, seed=3)


STATEFUL = {
    "custom": (Stateful, X),
    "sequential": (sequential, X),
    "recurrent": (recurrent, SEQUENCE),
}


# The function.


def test_call_with_reads_the_substitutes():
    layer = layers.Dense(3, activation="tanh")
    layer.build(X.shape)
    kernel, bias = RNG.normal(size=(4, 3)), RNG.normal(size=3)
    before = array(layer.kernel)
    substitutes = [
        (layer.kernel, ops.convert_to_tensor(kernel, "float32")),
        (layer.bias, ops.convert_to_tensor(bias, "float32")),
    ]
    outputs, losses = call_with(layer, substitutes, X)
    np.testing.assert_allclose(array(outputs), np.tanh(X @ kernel + bias), rtol=1e-5)
    assert losses == []
    np.testing.assert_array_equal(array(layer.kernel), before)


def test_gradients_pass_through_the_substitutes(gradients):
    layer = layers.Dense(3, use_bias=False)
    layer.build(X.shape)
    upstream = RNG.normal(size=(8, 3)).astype("float32")
    weights = ops.convert_to_tensor(upstream)

    def function():
        squares = ops.square(ops.convert_to_tensor(layer.kernel))
        outputs, _ = call_with(layer, [(layer.kernel, squares)], X)
        return ops.sum(outputs * weights)

    (received,) = gradients(function, [layer.kernel])
    expected = 2 * array(layer.kernel) * (X.T @ upstream)
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-6)


def test_call_with_hands_losses_to_the_caller():
    layer = layers.Dense(
        3, kernel_regularizer=keras.regularizers.L2(1.0), activity_regularizer="l1"
    )
    layer.build(X.shape)
    tripled = 3 * ops.convert_to_tensor(layer.kernel)
    outputs, (loss,) = call_with(layer, [(layer.kernel, tripled)], X)
    expected = 0.01 * np.abs(array(outputs)).sum() / len(X)
    np.testing.assert_allclose(array(loss), expected, rtol=1e-5)
    # What is left is the kernel's own, of the weights that are stored.
    (loss,) = layer.losses
    np.testing.assert_allclose(array(loss), np.sum(array(layer.kernel) ** 2), rtol=1e-5)


# State.


@pytest.mark.parametrize("kind", STATEFUL)
def test_state_is_updated_as_without_the_wrapper(kind):
    make, x = STATEFUL[kind]
    bare, wrapped = make(), Scaled(make())
    for layer in (bare, wrapped):
        layer(keras.KerasTensor(x.shape))  # builds it
    wrapped.layer.set_weights(bare.get_weights())
    scaled_by_hand(bare)
    for training in (True, True, False):
        expected = bare(x, training=training)
        received = wrapped(x, training=training)
        np.testing.assert_allclose(array(received), array(expected), rtol=1e-4)
    kernels = {id(v) for v in wrapped.gated}
    for one, other in zip(wrapped.layer.variables, bare.variables, strict=True):
        if id(one) not in kernels:
            np.testing.assert_allclose(array(one), array(other), rtol=1e-5, atol=1e-7)


def test_metrics_in_the_layer_are_updated():
    class Measured(layers.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.mean = keras.metrics.Mean()

        def call(self, x):
            outputs = super().call(x)
            self.mean.update_state(outputs)
            return outputs

    wrapped = Scaled(Measured(3))
    outputs = [array(wrapped(x)) for x in (X, 2 * X)]
    mean = array(wrapped.layer.mean.result())
    np.testing.assert_allclose(mean, np.mean(outputs), rtol=1e-5)


@pytest.mark.parametrize("kind", STATEFUL)
def test_training_is_as_without_the_wrapper(kind):
    make, x = STATEFUL[kind]
    histories, states = [], []
    for wrap in (lambda layer: layer, lambda layer: Scaled(layer, factor=1.0)):
        keras.utils.set_random_seed(2)
        model = keras.Sequential([keras.Input(batch_shape=(4, *x.shape[1:]))])
        model.add(wrap(make()))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        fit = model.fit(x, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        histories.append(fit.history)
        states.append([array(v) for v in model.layers[0].variables])
    bare, wrapped = histories
    assert bare.keys() == wrapped.keys()
    for key in bare:
        np.testing.assert_allclose(wrapped[key], bare[key], rtol=1e-5, err_msg=key)
    for expected, received in zip(*states, strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-6)


def test_stateless_call_returns_the_updates():
    wrapped = Scaled(Stateful())
    wrapped(X)
    state = wrapped.non_trainable_variables
    before = [array(v).copy() for v in state]
    trainable = [v.value for v in wrapped.trainable_variables]
    given = [v.value for v in state]
    _, updated = wrapped.stateless_call(trainable, given, X, training=True)
    for variable, old, new in zip(state, before, updated, strict=True):
        np.testing.assert_array_equal(array(variable), old)
        assert np.any(array(new) != old), variable.path


# The signature of the layer.


def same_as_by_hand(make, *args, **kwargs):
    """Asserts that `Scaled(layer)` is the layer with scaled weights, called alike."""
    wrapped, bare = Scaled(make()), make()
    wrapped(*args, **kwargs), bare(*args, **kwargs)  # builds them
    bare.set_weights(wrapped.layer.get_weights())
    scaled_by_hand(bare)
    received = keras.tree.flatten(wrapped(*args, **kwargs))
    expected = keras.tree.flatten(bare(*args, **kwargs))
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(array(one), array(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_attention_of_several_inputs(training):
    mask = np.tril(np.ones((5, 5), bool))[None]
    same_as_by_hand(
        lambda: layers.MultiHeadAttention(2, 3, dropout=0.3, seed=1),
        *(SEQUENCE, 2 * SEQUENCE, -SEQUENCE),
        attention_mask=mask,
        return_attention_scores=True,
        training=training,
    )


def test_recurrent_layer_with_states_in_and_out():
    state = [X, -X]
    same_as_by_hand(
        lambda: layers.LSTM(4, return_state=True), SEQUENCE, initial_state=state
    )


def test_list_of_inputs():
    class Product(keras.Layer):
        def build(self, input_shapes):
            (_, self.n), (_, self.m) = input_shapes
            self.kernel = self.add_weight(name="kernel", shape=(self.n, self.m))

        def call(self, inputs):
            first, second = inputs
            return ops.sum((first @ self.kernel) * second, axis=-1)

    same_as_by_hand(Product, [X, Y])


@pytest.mark.parametrize("wrap", [Scaled, TransparentWrapper])
def test_masks_pass_through(wrap):
    ids = np.array([[1, 2, 0, 0], [4, 3, 4, 5]])
    embedding, lstm = layers.Embedding(6, 4, mask_zero=True), layers.LSTM(3)
    inputs = keras.Input((4,), dtype="int32")
    wrapped = wrap(embedding)
    hidden = layers.Dropout(0.0)(wrapped(inputs))
    outputs = keras.Model(inputs, wrap(lstm)(hidden))(ids)
    np.testing.assert_array_equal(array(wrapped.compute_mask(ids, None)), ids != 0)
    if wrap is Scaled:
        scaled_by_hand(embedding), scaled_by_hand(lstm)
    for row, length in enumerate([2, 4]):
        expected = lstm(embedding(ids[row : row + 1, :length]))
        np.testing.assert_allclose(array(outputs)[row], array(expected)[0], rtol=1e-4)


def test_names_and_specs_are_those_of_the_layer():
    inputs = keras.Input((4,))
    outputs = Scaled(layers.Dense(3, name="head"))(inputs)
    model = keras.Model(inputs, outputs)
    assert model.output_names == ["head"]
    assert model.layers[1].compute_output_shape((None, 4)) == (None, 3)
    assert [w.path for w in model.weights] == ["head/head/kernel", "head/head/bias"]


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_output_has_the_type_of_the_layer(dtype):
    wrapped = Scaled(layers.Dense(3, dtype=dtype))
    symbolic = wrapped(keras.Input((4,)))
    expected = wrapped.layer.compute_dtype
    assert symbolic.dtype == expected
    assert keras.backend.standardize_dtype(wrapped(X).dtype) == expected
    assert wrapped.layer.kernel.dtype == wrapped.layer.variable_dtype


def test_stateful_recurrent_layer_is_refused():
    with pytest.raises(ValueError, match="'memory' must not be stateful"):
        Scaled(layers.LSTM(3, stateful=True, name="memory"))(SEQUENCE)


def torch_module(directory):
    import torch

    return layers.TorchModuleWrapper(torch.nn.Linear(4, 3), output_shape=(None, 3))


def saved_model(directory):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    model.export(str(directory), verbose=False)
    return layers.TFSMLayer(str(directory))


@pytest.mark.parametrize(
    "make, backend", [(torch_module, "torch"), (saved_model, "tensorflow")]
)
def test_layer_that_reads_no_keras_variables_is_refused(tmp_path, make, backend):
    if keras.backend.backend() != backend:
        pytest.skip(f"the layer exists on {backend} only")
    layer = make(tmp_path)
    kernel, expected = layer.weights[0], array(layer(X))
    # What the wrapper hands over is not read: the layer would never be gated.
    outputs, _ = call_with(layer, [(kernel, ops.zeros_like(kernel))], X)
    np.testing.assert_array_equal(array(outputs), expected)
    with pytest.raises(ValueError, match="must compute with Keras' variables"):
        Scaled(layer)(X)


def test_training_argument_reaches_the_layer():
    wrapped = Scaled(sequential())
    out = [array(wrapped(X, training=mode)) for mode in (None, False, True)]
    np.testing.assert_array_equal(out[0], out[1])
    assert np.any(out[2] == 0) and not np.any(out[1] == 0)


# What a wrapper around a wrapper, or around nothing, is told.


def test_what_is_no_layer_is_refused():
    with pytest.raises(ValueError, match="Layer .* supplied to Wrapper isn't"):
        Scaled("dense")


@pytest.mark.parametrize("variables", [3, ["kernel"], True])
def test_variables_must_select(variables):
    with pytest.raises(TypeError, match="`variables` must be None, a regex, or a call"):
        Scaled(layers.Dense(3), variables=variables)


def names_of(layer, variables):
    wrapped = Scaled(layer, variables=variables)
    wrapped.build(SEQUENCE.shape)
    return [w.name for w in wrapped.gated]


def test_variables_are_selected():
    every = ["kernel", "recurrent_kernel", "bias"]
    assert names_of(layers.GRU(2), None) == every  # this bias has two rows
    assert names_of(layers.GRU(2), "kernel") == every[:2]
    assert names_of(layers.GRU(2), "^recurrent") == every[1:2]
    assert names_of(layers.GRU(2), lambda v: v.shape[0] == 4) == every[:1]
    assert names_of(layers.Dense(2), None) == ["kernel"]
    both = layers.Bidirectional(layers.LSTM(2), name="both")
    assert names_of(both, "forward.*/kernel$") == ["kernel"]


@pytest.mark.parametrize(
    "layer, variables, received",
    [
        (layers.Dense(2, name="d"), "no_such", r"'no_such'.*d/kernel|kernel \(4, 2\)"),
        (layers.Dense(2), lambda v: False, "nothing to govern"),
        (layers.BatchNormalization(name="norm"), None, r"'norm'.*gamma \(4,\)"),
        (layers.Activation("relu"), None, "Received weights: none"),
    ],
)
def test_nothing_to_govern_is_an_error(layer, variables, received):
    with pytest.raises(ValueError, match=received):
        Scaled(layer, variables=variables)(X)


@keras.saving.register_keras_serializable("tests")
def is_recurrent(variable):
    return variable.name.startswith("recurrent")


@pytest.mark.parametrize("variables", ["recurrent", is_recurrent, None])
def test_selection_is_saved_and_cloned(tmp_path, variables):
    wrapped = Scaled(layers.LSTM(3), variables=variables)
    model = keras.Sequential([keras.Input((5, 4)), wrapped])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for copy in (loaded, keras.models.clone_model(model)):
        names = [w.name for w in copy.layers[0].gated]
        assert names == [w.name for w in wrapped.gated]
        assert copy.layers[0].gated[0] is not wrapped.gated[0]
    np.testing.assert_array_equal(array(loaded(SEQUENCE)), array(model(SEQUENCE)))


def test_any_predicate_can_be_cloned():
    wrapped = Scaled(layers.LSTM(3), variables=lambda v: v.shape[0] == 4)
    model = keras.Sequential([keras.Input((5, 4)), wrapped])
    clone = keras.models.clone_model(model)
    assert [w.name for w in clone.layers[0].gated] == ["kernel"]


def test_no_weight_is_stored_twice(stored_arrays):
    model = keras.Sequential([keras.Input((5, 4)), Scaled(layers.LSTM(3))])
    assert len(stored_arrays(model)) == len(model.weights) == 3
