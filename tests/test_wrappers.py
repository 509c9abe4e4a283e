"""LTP, its masked companions and Penalized, against formulas in float64."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_sparsity import (
    HALO,
    LTP,
    ConstantSparsity,
    CubicSparsity,
    KeepZeros,
    MagnitudePruning,
    Penalized,
)
from keras_sparsity.selection import governed_weights

L0, TEMPERATURE = 1e-2, 0.05
THRESHOLD = {"variance": 0.6, "absolute": 0.15}
RNG = np.random.default_rng(0)
W = RNG.normal(size=(4, 6)).astype("float32")
EYE = np.eye(4, dtype="float32")  # what a kernel does to it is the kernel
X = RNG.normal(size=(16, 4)).astype("float32")
Y = RNG.normal(size=(16, 6)).astype("float32")
every_unit = pytest.mark.parametrize("units", THRESHOLD)


def array(x):
    return ops.convert_to_numpy(x)


def ltp(w=W, threshold=None, units="variance", l0=L0, temperature=TEMPERATURE):
    """An LTP around a Dense layer with the kernel `w` and no bias."""
    threshold = THRESHOLD[units] if threshold is None else threshold
    layer = layers.Dense(np.shape(w)[1], use_bias=False, name="dense")
    wrapped = LTP(layer, l0, temperature, threshold, units)
    wrapped.build((None, np.shape(w)[0]))
    layer.kernel.assign(w)
    return wrapped


def formulas(w, threshold, units="variance", temperature=TEMPERATURE):
    """The soft gate, the hard gate and `s = dm/dthreshold`, negated, in float64."""
    w = np.float64(w)
    variance = np.var(np.abs(w))
    unit = variance if units == "variance" else 1.0
    scale = temperature * variance
    soft = 1 / (1 + np.exp(-(w**2 - np.float64(threshold) * unit) / scale))
    return soft, w**2 > threshold * unit, soft * (1 - soft) / scale * unit


def compiled(wrapped, optimizer):
    model = keras.Sequential([keras.Input((4,)), wrapped])
    model.compile(optimizer, "mse")
    return model


def fit(model, epochs=1):
    return model.fit(X, Y, epochs=epochs, batch_size=8, shuffle=False, verbose=0)


# The gates of LTP.


@every_unit
def test_soft_gate_in_training_and_hard_gate_in_inference(units):
    wrapped = ltp(units=units)
    soft, hard, _ = formulas(W, THRESHOLD[units], units)
    assert 0 < hard.sum() < hard.size
    np.testing.assert_allclose(array(wrapped(EYE, training=True)), W * soft, rtol=1e-5)
    np.testing.assert_array_equal(array(wrapped(EYE, training=False)), W * hard)
    np.testing.assert_array_equal(array(wrapped(EYE)), W * hard)


@every_unit
def test_governed_weight_is_that_of_inference(units):
    (governed,) = governed_weights(ltp(units=units))
    _, hard, _ = formulas(W, THRESHOLD[units], units)
    assert governed.method == "LTP" and governed.variable.name == "kernel"
    np.testing.assert_array_equal(array(governed.effective), W * hard)
    unit = np.var(np.abs(W)) if units == "variance" else 1
    np.testing.assert_allclose(
        array(governed.threshold), THRESHOLD[units] * unit, rtol=1e-6
    )


@every_unit
def test_gradients_are_those_of_a_gate_that_is_constant(gradients, units):
    wrapped = ltp(units=units)
    upstream = RNG.normal(size=W.shape)
    tensor = ops.convert_to_tensor(upstream, "float32")

    def function():
        return ops.sum(tensor * wrapped(EYE, training=True)) + sum(wrapped.losses)

    d_w, d_threshold = gradients(function, [*wrapped.gated, *wrapped.thresholds])
    soft, _, slope = formulas(W, THRESHOLD[units], units)
    np.testing.assert_allclose(d_w, soft * upstream, rtol=1e-5)
    expected = -np.sum(slope * (L0 + upstream * W))
    np.testing.assert_allclose(d_threshold, expected, rtol=1e-4)


@every_unit
def test_price_is_l0_times_the_gates(units):
    wrapped = ltp(units=units)
    soft, _, _ = formulas(W, THRESHOLD[units], units)
    (loss,) = wrapped.losses
    np.testing.assert_allclose(array(loss), L0 * soft.sum(), rtol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_price_is_that_of_the_weights_of_now(training):
    wrapped = ltp()
    wrapped(EYE, training=training)
    wrapped.gated[0].assign(W**3)
    soft, _, _ = formulas(W**3, THRESHOLD["variance"])
    np.testing.assert_allclose(array(sum(wrapped.losses)), L0 * soft.sum(), rtol=1e-5)
    wrapped(EYE, training=training)
    wrapped.thresholds[0].assign(0.1)
    soft, _, _ = formulas(W**3, 0.1)
    np.testing.assert_allclose(array(sum(wrapped.losses)), L0 * soft.sum(), rtol=1e-5)


def test_price_and_task_may_be_differentiated_apart(gradients):
    wrapped = ltp()
    outputs = []

    def task():
        outputs.append(wrapped(EYE, training=True))
        return ops.sum(ops.square(outputs[-1]))

    variables = [*wrapped.gated, *wrapped.thresholds]
    soft, _, slope = formulas(W, THRESHOLD["variance"])
    d_w, d_threshold = gradients(task, variables)
    np.testing.assert_allclose(d_w, 2 * soft**2 * W, rtol=1e-5)
    expected = -np.sum(slope * 2 * soft * W**2)
    np.testing.assert_allclose(d_threshold, expected, rtol=1e-4)
    d_w, d_threshold = gradients(lambda: sum(wrapped.losses), variables)
    np.testing.assert_array_equal(d_w, 0)
    np.testing.assert_allclose(d_threshold, -L0 * slope.sum(), rtol=1e-5)


@pytest.mark.parametrize("jit_compile", ["auto", False])
def test_price_is_counted_once_for_a_layer_called_twice(jit_compile):
    wrapped = ltp(W[:, :4])
    inputs = keras.Input((4,))
    model = keras.Model(inputs, wrapped(wrapped(inputs)))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit_compile)
    soft, hard, _ = formulas(W[:, :4], THRESHOLD["variance"])
    for gate, loss in [
        (soft, model.fit(X, X, batch_size=16, verbose=0).history["loss"][0]),
        (hard, model.evaluate(X, X, verbose=0)),
    ]:
        kernel = W[:, :4] * gate
        task = np.mean((X @ kernel @ kernel - X) ** 2)
        np.testing.assert_allclose(loss, task + L0 * soft.sum(), rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_units_of_the_variance_follow_the_kernel(factor):
    wrapped = ltp()
    gated = array(wrapped(EYE, training=True))
    wrapped.gated[0].assign(factor * W)
    received = array(wrapped(EYE, training=True))
    np.testing.assert_allclose(received, factor * gated, rtol=1e-4)


def test_temperature_follows_the_kernel_in_absolute_units():
    wrapped = ltp(units="absolute")
    for w in (W, 3 * W, W**3):
        wrapped.gated[0].assign(w)
        soft, _, _ = formulas(w, THRESHOLD["absolute"], "absolute")
        np.testing.assert_allclose(
            array(wrapped(EYE, training=True)), w * soft, rtol=1e-4, atol=1e-7
        )


# The guards of LTP.


@every_unit
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_threshold_is_never_negative(units, optimizer):
    wrapped = ltp(units=units, threshold=0.01)
    getattr(keras.optimizers, optimizer)(1.0).apply(
        [ops.full((), 1e6)], wrapped.thresholds
    )
    assert array(wrapped.thresholds[0]) == 0


@every_unit
@pytest.mark.parametrize("threshold", [1e2, 1e6, 1e12, 1e30])
def test_largest_weight_survives_any_threshold(units, threshold):
    wrapped = ltp(units=units, threshold=threshold)
    largest = np.abs(W) == np.abs(W).max()
    np.testing.assert_array_equal(array(wrapped(EYE)), W * largest)
    # It is trained, too: its soft gate is half open at least.
    soft = array(wrapped(EYE, training=True)) / W
    assert np.isfinite(soft).all() and 0.5 <= soft[largest] <= 1
    assert np.isfinite(array(wrapped.losses[0]))
    (governed,) = governed_weights(wrapped)
    assert array(governed.threshold) < np.max(W**2)


@every_unit
def test_threshold_beyond_the_largest_weight_can_come_back(gradients, units):
    wrapped = ltp(units=units, threshold=1e3, l0=0.0)

    def task():  # falls as the largest weight's gate opens
        return -ops.sum(ops.square(wrapped(EYE, training=True)))

    (d_threshold,) = gradients(task, wrapped.thresholds)
    assert np.isfinite(d_threshold) and d_threshold > 0


def test_tie_with_the_threshold_is_pruned():
    w = np.array([[1.0, -1.0, 2.0, 0.5]])
    np.testing.assert_array_equal(
        array(ltp(w, threshold=1.0, units="absolute")(np.ones((1, 1)))), [[0, 0, 2, 0]]
    )


@every_unit
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1e9])
@pytest.mark.parametrize("value", [1.0, -3e-3, 1e4])
def test_constant_kernel_is_kept(units, threshold, value):
    wrapped = ltp(np.full((4, 6), value), threshold, units)
    np.testing.assert_array_equal(
        array(wrapped(EYE)), np.full((4, 6), value, "float32")
    )
    # There is no spread to measure with, and the soft gates are open, too.
    received = array(wrapped(EYE, training=True))
    np.testing.assert_allclose(received, np.full((4, 6), value), rtol=1e-6)


@every_unit
@pytest.mark.parametrize("temperature", [1e-2, 1e-12, 1e3])
def test_zero_kernel_is_finite_and_can_be_trained(gradients, units, temperature):
    wrapped = ltp(np.zeros((4, 6)), 0.5, units, temperature=temperature)

    def function():
        return ops.sum(wrapped(EYE, training=True)) + sum(wrapped.losses)

    np.testing.assert_array_equal(array(wrapped(EYE, training=True)), 0)
    d_w, d_threshold = gradients(function, [*wrapped.gated, *wrapped.thresholds])
    assert np.isfinite(d_w).all() and d_w.min() > 0
    assert np.isfinite(d_threshold) and abs(d_threshold) < 1 / temperature


# LTP as a layer.


def test_thresholds_are_named_after_their_weights():
    wrapped = LTP(layers.Bidirectional(layers.GRU(3)), L0)
    wrapped.build((None, 5, 4))
    names = [t.name for t in wrapped.thresholds]
    assert len(set(names)) == len(names) == len(wrapped.gated) == 6
    assert all(name.startswith("ltp_threshold_") for name in names)
    assert sum("forward" in name for name in names) == 3
    assert len({w.path for w in wrapped.weights}) == len(wrapped.weights)
    for threshold in wrapped.thresholds:
        assert threshold.dtype == "float32" and threshold.shape == ()
        assert threshold.trainable


def test_selected_weights_alone_are_gated():
    wrapped = LTP(layers.GRU(3), L0, initial_threshold=1e9, variables="^kernel$")
    wrapped.build((None, 5, 4))
    (governed,) = governed_weights(wrapped)
    assert governed.variable is wrapped.layer.cell.kernel
    assert np.count_nonzero(array(governed.effective)) == 1
    assert np.all(array(wrapped.layer.cell.recurrent_kernel) != 0)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_gate_is_float32_in_any_precision(dtype):
    layer = layers.Dense(6, use_bias=False, dtype=dtype)
    wrapped = LTP(layer, L0, TEMPERATURE, THRESHOLD["variance"])
    wrapped.build((None, 4))
    layer.kernel.assign(W)
    w = array(ops.cast(layer.kernel, "float32"))
    soft, hard, _ = formulas(w, THRESHOLD["variance"])
    assert wrapped.thresholds[0].dtype == "float32"
    np.testing.assert_allclose(array(wrapped.losses[0]), L0 * soft.sum(), rtol=1e-5)
    compute = layer.compute_dtype
    for training, expected in [(True, w * soft), (False, w * hard)]:
        outputs = wrapped(EYE, training=training)
        assert keras.backend.standardize_dtype(outputs.dtype) == compute
        rounded = array(ops.cast(ops.cast(expected, compute), "float32"))
        received = array(ops.cast(outputs, "float32"))
        np.testing.assert_allclose(received, rounded, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize(
    "precision", ["mixed_bfloat16", "mixed_float16"], indirect=True
)
def test_gate_is_float32_inside_a_mixed_precision_model(precision):
    class Inner(keras.Model):
        def __init__(self, wrapped):
            super().__init__()
            self.wrapped = wrapped

        def call(self, x):
            return self.wrapped(x)

    # No 16-bit type tells the first three, nor their squares, from the threshold.
    w = np.array([[1.0, 1.0001, 0.9999, 2.0]], "float32")
    model = Inner(ltp(w, threshold=1.0, units="absolute"))
    assert model.compute_dtype != "float32"
    outputs = array(ops.cast(model(np.ones((1, 1), "float32")), "float32"))
    np.testing.assert_array_equal(outputs != 0, [[False, True, False, True]])


def test_training_prunes_weights_that_cost_more_than_they_are_worth():
    wrapped = LTP(layers.Dense(1), l0=1e-3, temperature=0.1)
    model = keras.Sequential([keras.Input((8,)), wrapped])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    x = RNG.normal(size=(256, 8)).astype("float32")
    model.fit(x, x[:, :1] - 2 * x[:, 1:2], epochs=30, verbose=0)
    (governed,) = governed_weights(model)
    np.testing.assert_array_equal(
        array(governed.effective)[:, 0] != 0, np.arange(8) < 2
    )


@pytest.mark.parametrize(
    "argument, values, expected",
    [
        ("l0", [-1e-9, np.nan, np.inf, "1e-6", None, True], "a finite number >= 0"),
        ("temperature", [0, -1, np.nan, np.inf, "1", None], "a finite number > 0"),
        ("initial_threshold", [-1e-9, np.nan, None], "a finite number >= 0"),
        ("threshold_units", ["std", None, 1], '"variance" or "absolute"'),
    ],
)
def test_bad_argument_is_named(argument, values, expected):
    for value in values:
        with pytest.raises(ValueError, match=rf"`{argument}` must be {expected}"):
            LTP(layers.Dense(3), **{"l0": 1e-6, argument: value})


@pytest.mark.parametrize("inner", [layers.Dense(3), layers.GRU(3)])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: LTP(layer, 1e-5, 0.2, 0.3, "absolute", variables="kernel"),
        lambda layer: MagnitudePruning(layer, CubicSparsity(0.9, 70), name="mine"),
        lambda layer: KeepZeros(layer, variables="^kernel$", trainable=False),
        lambda layer: Penalized(layer, HALO(1e-3, 1e-2, scale_decay=0.1)),
    ],
    ids=["LTP", "MagnitudePruning", "KeepZeros", "Penalized"],
)
def test_config_round_trip(wrap, inner):
    wrapped = wrap(type(inner).from_config(inner.get_config()))
    config = keras.saving.serialize_keras_object(wrapped)
    copied = keras.saving.deserialize_keras_object(config)
    assert type(copied) is type(wrapped) and copied.layer is not wrapped.layer
    assert keras.saving.serialize_keras_object(copied) == config
    for key, value in vars(wrapped).items():  # every argument is in the config
        if type(value) in (str, float):
            assert getattr(copied, key) == value, key


WRAPPERS = [
    functools.partial(LTP, l0=L0),
    KeepZeros,
    functools.partial(MagnitudePruning, schedule=ConstantSparsity(0.5)),
    functools.partial(Penalized, regularizer=HALO(1e-3, 1e-2)),
]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["LTP", "Keep", "Magnitude", "Penalty"])
def test_weights_have_one_governor(wrap):
    governed = [inner(layers.Dense(3)) for inner in WRAPPERS]
    governed.append(layers.Dense(3, kernel_regularizer=HALO(1e-3, 1e-2)))
    governed.append(keras.Sequential([keras.Input((4,)), WRAPPERS[0](layers.Dense(3))]))
    for layer in governed:
        for _ in range(2):  # before it is built and after
            with pytest.raises(
                ValueError, match=f"governs yet. Received: .*{layer.name}"
            ):
                wrap(layer)
            layer(X)
            _ = layer.losses


@pytest.mark.parametrize("wrap", WRAPPERS[:3], ids=["LTP", "Keep", "Magnitude"])
def test_what_is_governed_is_not_quantized(wrap):
    block = keras.Sequential([keras.Input((4,)), layers.Dense(6), layers.Dense(2)])
    model = keras.Sequential([keras.Input((4,)), wrap(block)])
    stored, expected = model.get_weights(), array(model(X))
    with pytest.raises(ValueError, match="call `finalize` on the model first.*'int8'"):
        model.quantize("int8", filters="dense")
    for one, other in zip(model.get_weights(), stored, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(array(model(X)), expected)


# KeepZeros.


def test_keep_zeros_keeps_them_under_decay_and_momentum():
    dense = layers.Dense(6)
    dense.build((None, 4))
    zeros = RNG.random((4, 6)) < 0.5
    dense.kernel.assign(np.where(zeros, 0, W))
    wrapped = KeepZeros(dense)
    model = compiled(wrapped, keras.optimizers.AdamW(0.05, weight_decay=0.5))
    fit(model, epochs=2)
    dense.kernel.assign(array(dense.kernel) + 1.0)  # whatever happens to them
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    fit(model)
    (governed,) = governed_weights(model)
    np.testing.assert_array_equal(array(governed.effective) == 0, zeros)
    expected = X @ np.where(zeros, 0, array(dense.kernel)) + array(dense.bias)
    for training in (False, True):
        received = array(wrapped(X, training=training))
        np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-5)


def test_zeros_to_keep_are_saved(tmp_path):
    dense = layers.Dense(6)
    dense.build((None, 4))
    dense.kernel.assign(np.where(W > 0, W, 0))
    wrapped = KeepZeros(dense)
    model = compiled(wrapped, "sgd")
    dense.kernel.assign(W)  # the file has no zeros but those of the mask
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(array(loaded.layers[0].masks[0]), W > 0)
    np.testing.assert_array_equal(array(loaded(X)), array(model(X)))


# MagnitudePruning.


def zeros_by_step(wrapped, steps):
    counts = []
    for _ in range(steps):
        wrapped(X, training=True)
        (governed,) = governed_weights(wrapped)
        counts.append(int(np.sum(array(governed.effective) == 0)))
    return counts


@pytest.mark.parametrize(
    "schedule",
    [
        ConstantSparsity(0.7, begin_step=2, frequency=3),
        CubicSparsity(0.9, 7, begin_step=1, initial_sparsity=0.2, frequency=3),
        CubicSparsity(0.5, 5),
    ],
)
def test_magnitude_pruning_follows_its_schedule(schedule):
    wrapped = MagnitudePruning(layers.Dense(6), schedule)
    expected, count = [], 0
    for step in range(10):
        due = step >= schedule.begin_step
        due &= (step - schedule.begin_step) % schedule.frequency == 0
        if due or step == getattr(schedule, "end_step", None):
            count = int(np.floor(float(array(schedule(step))) * 24 + 1e-4))
        expected.append(count)
    assert zeros_by_step(wrapped, 10) == expected
    assert expected[-1] == int(schedule.final_sparsity * 24)


def test_magnitude_pruning_removes_the_smallest():
    wrapped = MagnitudePruning(layers.Dense(6, use_bias=False), ConstantSparsity(0.5))
    wrapped.build((None, 4))
    wrapped.layer.kernel.assign(W)
    kept = np.abs(W) > np.sort(np.abs(W), axis=None)[11]
    np.testing.assert_array_equal(array(wrapped(EYE, training=True)), W * kept)
    np.testing.assert_array_equal(array(wrapped(EYE)), W * kept)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    "kernel",
    [
        RNG.normal(size=(30, 40)),
        RNG.integers(-4, 5, size=(30, 40)),  # many ties, at the cut too
        RNG.normal(size=(30, 40)) * 10.0 ** RNG.integers(-44, 30, size=(30, 40)),
        np.ones((4, 6)),
        np.zeros((4, 6)),
    ],
    ids=["normal", "ties", "all sizes of float32", "ones", "zeros"],
)
def test_magnitude_pruning_equals_a_stable_sort(kernel, sparsity):
    kernel = np.asarray(kernel, "float32")
    count = int(np.floor(np.float32(sparsity) * np.float32(kernel.size)))
    expected = np.ones(kernel.size, bool)
    expected[np.argsort(np.abs(kernel), axis=None, kind="stable")[:count]] = False

    wrapped = MagnitudePruning(
        layers.Dense(kernel.shape[1]), ConstantSparsity(sparsity)
    )
    wrapped.build((None, kernel.shape[0]))
    wrapped.layer.kernel.assign(kernel)
    wrapped(np.zeros((1, kernel.shape[0]), "float32"), training=True)
    np.testing.assert_array_equal(array(wrapped.masks[0]).ravel(), expected)


def test_magnitude_pruning_in_fit():
    wrapped = MagnitudePruning(layers.Dense(6), CubicSparsity(0.75, 6, frequency=2))
    model = compiled(wrapped, keras.optimizers.SGD(0.1, momentum=0.9))
    fit(model, epochs=4)
    assert array(wrapped.step) == 8
    model.evaluate(X, Y, verbose=0)
    assert array(wrapped.step) == 8
    (governed,) = governed_weights(model)
    assert np.sum(array(governed.effective) == 0) == 18


def test_magnitude_pruning_rests_while_its_layer_is_frozen():
    dense = layers.Dense(6)
    wrapped = MagnitudePruning(dense, ConstantSparsity(0.5, frequency=1))
    wrapped(EYE, training=True)
    mask = array(wrapped.masks[0]).copy()
    dense.kernel.assign(1 / array(dense.kernel))  # the smallest are the largest now
    for trainable, expected, step in [(False, mask, 1), (True, ~mask, 2)]:
        wrapped.trainable = trainable
        wrapped(EYE, training=True)
        np.testing.assert_array_equal(array(wrapped.masks[0]), expected)
        assert array(wrapped.step) == step


@pytest.mark.parametrize("schedule", [0.5, None, "cubic"])
def test_schedule_must_be_callable(schedule):
    with pytest.raises(TypeError, match="`schedule` must be a callable of the step"):
        MagnitudePruning(layers.Dense(3), schedule)


# Penalized.


def test_penalized_gives_every_kernel_its_own_scale():
    attention = layers.MultiHeadAttention(2, 3)
    wrapped = Penalized(attention, HALO(1e-3, 1e-2))
    x = np.ones((2, 5, 4), "float32")
    bare = layers.MultiHeadAttention(2, 3)
    bare(x, x), wrapped(x, x)
    bare.set_weights(attention.get_weights())
    np.testing.assert_allclose(array(wrapped(x, x)), array(bare(x, x)), rtol=1e-6)
    # Biases of heads have two axes: they are kernels to every method.
    kernels = [w for w in attention.weights if len(w.shape) > 1]
    scales = [halo.scale for halo in wrapped.regularizers]
    assert [s.shape for s in scales] == [k.shape for k in kernels]
    assert [g.variable for g in governed_weights(wrapped)] == kernels
    expected = sum(1e-3 * np.abs(array(k)).sum() + 1e-2 * np.size(k) for k in kernels)
    np.testing.assert_allclose(array(sum(wrapped.losses)), expected, rtol=1e-5)
    trained = {id(w) for w in wrapped.trainable_weights}
    assert {id(s) for s in scales} <= trained
    assert len({w.path for w in wrapped.weights}) == len(wrapped.weights)


def test_penalized_counts_a_layer_called_twice_once():
    wrapped = Penalized(layers.Dense(4, use_bias=False), keras.regularizers.L1(0.5))
    inputs = keras.Input((4,))
    model = keras.Model(inputs, wrapped(wrapped(inputs)))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    loss = model.fit(X, X, batch_size=16, verbose=0).history["loss"][0]
    kernel = array(wrapped.layer.kernel)
    task = np.mean((X @ kernel @ kernel - X) ** 2)
    np.testing.assert_allclose(loss, task + 0.5 * np.abs(kernel).sum(), rtol=1e-5)


def test_penalized_keeps_the_regularizer_that_was_there():
    dense = layers.Dense(6, kernel_regularizer=keras.regularizers.L2(0.5))
    wrapped = Penalized(dense, HALO(1e-3, 1e-2))
    wrapped(X)
    w = array(dense.kernel).astype("float64")
    expected = 0.5 * np.sum(w**2) + 1e-3 * np.abs(w).sum() + 1e-2 * w.size
    np.testing.assert_allclose(array(sum(wrapped.losses)), expected, rtol=1e-5)


@pytest.mark.parametrize("regularizer", [None, "l2", 0.1, lambda w: 0.0])
def test_penalized_needs_a_regularizer(regularizer):
    with pytest.raises(TypeError, match="must be a `keras.regularizers.Regularizer`"):
        Penalized(layers.Dense(3), regularizer)
