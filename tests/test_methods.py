"""Every method on every kind of layer: train, save, reload, clone, finalize."""

import copy
import functools
import types

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sparsity as ks
from keras_sparsity.selection import governed_weights, prunable

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(8, 4)).astype("float32")
SEQUENCE = RNG.normal(size=(8, 5, 4)).astype("float32")
IMAGE = RNG.normal(size=(8, 5, 5, 4)).astype("float32")
VOLUME = RNG.normal(size=(8, 3, 3, 3, 2)).astype("float32")
IDS = RNG.integers(0, 6, size=(8, 5)).astype("int32")
Y = RNG.normal(size=(8, 2)).astype("float32")


@keras.saving.register_keras_serializable("tests")
class Bilinear(keras.Layer):
    """A custom layer: a weight of rank 3, one without a name, and one of rank 1."""

    def build(self, input_shape):
        size = input_shape[-1]
        self.form = self.add_weight(shape=(size, size, 2), name="form")
        self.linear = self.add_weight(shape=(size, 2))
        self.offset = self.add_weight(shape=(2,), initializer="zeros", name="offset")

    def call(self, x):
        squares = ops.einsum("bi,bj,ijk->bk", x, x, self.form)
        return squares + x @ self.linear + self.offset


@keras.saving.register_keras_serializable("tests")
class Noisy(keras.Layer):
    """A custom layer with a seed and statistics."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3, use_bias=False)
        self.norm = layers.BatchNormalization(momentum=0.5)
        self.dropout = layers.Dropout(0.3, seed=3)

    def build(self, input_shape):
        self.calls = self.add_weight(initializer="zeros", trainable=False, name="calls")
        self.dense.build(input_shape)
        self.norm.build((None, 3))

    def call(self, x, training=False):
        if training:
            self.calls.assign_add(1.0)
        x = self.norm(self.dense(x), training=training)
        return self.dropout(x, training=training)


# Layers side by side in one model, because models are what takes time to make.
KINDS = {
    "dense and custom": (
        FEATURES,
        lambda: [layers.Dense(3), Bilinear(), Noisy()],
    ),
    "sequences": (
        SEQUENCE,
        lambda: [
            layers.Conv1D(3, 2),
            layers.EinsumDense("abc,cd->abd", (5, 3)),
            layers.TimeDistributed(layers.Dense(3)),
            layers.MultiHeadAttention(2, 2),
        ],
    ),
    "recurrent": (
        SEQUENCE,
        lambda: [
            layers.SimpleRNN(3),
            layers.LSTM(3),
            layers.GRU(3),
            layers.Bidirectional(layers.SimpleRNN(2)),
        ],
    ),
    "images": (
        IMAGE,
        lambda: [
            layers.Conv2D(3, 2),
            layers.Conv2D(4, 2, groups=2),
            layers.DepthwiseConv2D(2),
            layers.SeparableConv2D(3, 2),
            layers.Conv2DTranspose(2, 2),
        ],
    ),
    "volumes": (VOLUME, lambda: [layers.Conv3D(3, 2)]),
    "tokens": (IDS, lambda: [layers.Embedding(6, 3)]),
}
LTP = functools.partial(ks.LTP, l0=1e-3, temperature=0.1)
METHODS = {
    "HALO": ks.HALO(xi=1e-3, psi=1e-2),
    "LTP": functools.partial(LTP, initial_threshold=0.3),
    "LTP absolute": functools.partial(
        LTP, initial_threshold=0.05, threshold_units="absolute"
    ),
    "MagnitudePruning": functools.partial(
        ks.MagnitudePruning, schedule=ks.ConstantSparsity(0.5, frequency=1)
    ),
    "KeepZeros": ks.KeepZeros,
}


def array(x):
    return ops.convert_to_numpy(x)


def arrays(variables):
    return [array(v).copy() for v in variables]


def assert_close(received, expected, rtol=1e-6):
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(received, expected, rtol=rtol, atol=rtol * scale)


def assert_all_close(variables, expected, rtol=1e-5):
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(
            array(variable), value, rtol=rtol, atol=rtol, err_msg=variable.path
        )


def candidates(model):
    """The weights that the methods are to govern."""
    return [w for layer in model.layers[:-1] for w in prunable(layer)]


def dense_model(kind):
    x, make = KINDS[kind]
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
    branches = []
    for layer in make():
        attends = isinstance(layer, layers.MultiHeadAttention)
        outputs = layer(inputs, inputs) if attends else layer(inputs)
        branches.append(layers.Flatten()(outputs))
    hidden = layers.Concatenate()([*branches, branches[0]])
    model = keras.Model(inputs, layers.Dense(2, name="head")(hidden))
    for weight in candidates(model):  # for KeepZeros: there are zeros to keep
        keep = RNG.random(weight.shape) < 0.5
        weight.assign(np.where(keep, array(weight), 0))
    return model


def fit(model, x, epochs=1):
    # Eager steps, where compiling them would take most of the time of these tests.
    model.run_eagerly = keras.backend.backend() == "tensorflow"
    model.fit(x, Y, batch_size=len(x), epochs=epochs, shuffle=False, verbose=0)


@pytest.fixture(
    scope="module",
    params=[(method, kind) for method in METHODS for kind in KINDS],
    ids=lambda pair: "-".join(pair),
)
def trained(request, tmp_path_factory):
    """A model after three steps of training, and its file and state after two."""
    keras.utils.set_random_seed(1)
    method, kind = request.param
    x = KINDS[kind][0]
    dense = dense_model(kind)
    model = ks.sparsify(dense, METHODS[method], filters=lambda v: v.name != "head")
    model.compile(ks.SparsityOptimizer("adam", "adam", multiplier=10), "mse")
    fit(model, x, epochs=2)
    path = tmp_path_factory.mktemp("trained") / "model.keras"
    model.save(path)
    halfway = arrays(model.variables)
    fit(model, x)
    return types.SimpleNamespace(
        method=method,
        dense=dense,
        model=model,
        x=x,
        outputs=array(model(x)),
        path=path,
        halfway=halfway,
    )


def test_every_kernel_is_governed(trained):
    governed = [tuple(g.variable.shape) for g in governed_weights(trained.model)]
    assert governed == [tuple(w.shape) for w in candidates(trained.dense)]


def test_reloaded_model_continues_as_uninterrupted(trained):
    loaded = keras.models.load_model(trained.path)
    for variable, value in zip(loaded.variables, trained.halfway, strict=True):
        if "seed" in variable.path:
            variable.assign(value)  # Keras does not save these
        np.testing.assert_array_equal(array(variable), value, err_msg=variable.path)
    fit(loaded, trained.x)
    assert_all_close(loaded.variables, arrays(trained.model.variables))
    slots = arrays(trained.model.optimizer.variables)
    assert_all_close(loaded.optimizer.variables, slots)


def test_every_weight_has_one_path(trained):
    weights = trained.model.weights
    assert len({w.path for w in weights}) == len(weights)


def test_clone_has_weights_of_its_own(trained):
    clone = keras.models.clone_model(trained.model)
    _ = clone.losses  # scales are made here
    shared = {id(w) for w in clone.weights} & {id(w) for w in trained.model.weights}
    assert not shared
    clone.set_weights(trained.model.get_weights())
    assert_close(array(clone(trained.x)), trained.outputs)


def test_deep_copy_has_weights_of_its_own(trained):
    copied = copy.deepcopy(trained.model)
    assert_all_close(copied.weights, arrays(trained.model.weights), rtol=0)
    assert_close(array(copied(trained.x)), trained.outputs)
    shared = {id(w) for w in copied.weights} & {id(w) for w in trained.model.weights}
    assert not shared


def test_finalized_model_is_plain_and_computes_the_same(trained):
    small = ks.finalize(trained.model)
    assert "keras_sparsity" not in small.to_json()
    effective = [array(g.effective) for g in governed_weights(trained.model)]
    assert_all_close(candidates(small), effective, rtol=0)
    zeros = sum(np.sum(values == 0) for values in effective)
    assert zeros > 0 or trained.method == "HALO"
    assert [v.name for v in small.layers] == [v.name for v in trained.dense.layers]
    assert [w.shape for w in small.weights] == [w.shape for w in trained.dense.weights]
    assert_close(array(small(trained.x)), trained.outputs)


def test_zeros_are_kept_in_fine_tuning(trained):
    small = ks.finalize(trained.model)
    tuned = ks.finalize(trained.model, keep_zeros=True)
    assert_close(array(tuned(trained.x)), array(small(trained.x)))
    tuned.compile(keras.optimizers.AdamW(0.05, weight_decay=0.5), "mse")
    fit(tuned, trained.x)
    plain = ks.finalize(tuned)
    assert "keras_sparsity" not in plain.to_json()
    assert_close(array(plain(trained.x)), array(tuned(trained.x)))
    before = arrays(candidates(small))
    for weight, old in zip(candidates(plain), before, strict=True):
        new = array(weight)
        assert np.all(new[old == 0] == 0), weight.path
        assert np.all(new[old != 0] != old[old != 0]), weight.path


# Precision and compilation: a convolution and a dense layer, both methods.


def small_model(method):
    keras.utils.set_random_seed(1)
    stack = [
        keras.Input((5, 5, 4)),
        layers.Conv2D(3, 2, activation="relu"),
        layers.Flatten(),
        layers.Dense(2, dtype="float32"),
    ]
    return ks.sparsify(keras.Sequential(stack), METHODS[method])


def method_variables(model):
    """Scales or thresholds, one for each of the two kernels."""
    return [w for w in model.trainable_weights if not w.name.endswith(("el", "as"))]


@pytest.mark.parametrize(
    "precision", ["mixed_bfloat16", "mixed_float16"], indirect=True
)
@pytest.mark.parametrize("method", ["HALO", "LTP"])
def test_training_in_mixed_precision(method, precision):
    model = small_model(method)
    sgd = keras.optimizers.SGD(0.05, momentum=0.9)
    optimizer = ks.SparsityOptimizer(sgd)
    if precision == "mixed_float16":  # at the default scale some steps overflow
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=256)
    model.compile(optimizer, "mse")
    before = arrays(method_variables(model))
    history = model.fit(IMAGE, Y, batch_size=4, epochs=5, shuffle=False, verbose=0)

    keras.config.set_dtype_policy("float32")
    exact = small_model(method)
    exact.compile(ks.SparsityOptimizer(sgd.from_config(sgd.get_config())), "mse")
    expected = exact.fit(IMAGE, Y, batch_size=4, epochs=5, shuffle=False, verbose=0)
    # 25 steps, each rounded to bfloat16's 8 bits (0.4 %): 3.5 % apart were seen.
    np.testing.assert_allclose(
        history.history["loss"], expected.history["loss"], rtol=0.08
    )
    for variable, old in zip(method_variables(model), before, strict=True):
        assert variable.dtype == "float32" and np.all(array(variable) != old)
    small = ks.finalize(model)
    assert small.layers[0].compute_dtype == precision.removeprefix("mixed_")
    assert_close(array(small(IMAGE)), array(model(IMAGE)), rtol=1e-6)


# Without XLA the step of JAX is the eager one.
JIT_COMPILE = {"tensorflow": [False, True], "jax": [True], "torch": []}


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="torch is eager; its compiler warns of deprecated parts of itself",
)
@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same_compiled_or_not(method):
    def losses(**arguments):
        model = small_model(method)
        sgd = keras.optimizers.SGD(0.05, momentum=0.9)
        model.compile(ks.SparsityOptimizer(sgd), "mse", **arguments)
        fitted = model.fit(IMAGE, Y, batch_size=4, epochs=3, shuffle=False, verbose=0)
        return fitted.history["loss"]

    eager = losses(run_eagerly=True)
    for jit_compile in JIT_COMPILE[keras.backend.backend()]:
        compiled = losses(jit_compile=jit_compile)
        np.testing.assert_allclose(compiled, eager, rtol=1e-5)
