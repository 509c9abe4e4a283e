"""HALO, SWS and MCP against their formulas in float64, and as parts of a model."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_sparsity.regularizers import HALO, MCP, SWS
from keras_sparsity.selection import governed_weights
from keras_sparsity.transform import sparsify

XI, PSI = 3e-2, 5e-3
FLOOR, CEILING = 1e-2, 10.0
RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6)).astype("float32")
Y = RNG.normal(size=(32, 3)).astype("float32")


def array(x):
    return ops.convert_to_numpy(x)


def kernel_variable(values, dtype="float32"):
    return keras.Variable(np.asarray(values), dtype=dtype, name="kernel")


def halo_on(w, scale, **kwargs):
    """A HALO that has met a kernel `w` and has the given scales, and the kernel."""
    halo, kernel = HALO(XI, PSI, **kwargs), kernel_variable(w)
    halo(kernel)
    halo.scale.assign(np.asarray(scale, "float32"))
    return halo, kernel


def halo_formula(w, scale, decay=0.0):
    """Value and gradients with respect to `w` and `scale`, in float64."""
    w, scale = np.float64(w), np.float64(np.float32(scale))
    magnitude = np.maximum(np.abs(scale), FLOOR)
    value = (
        XI * np.sum(np.abs(w) / magnitude**2)
        + PSI * np.sum(magnitude)
        + decay / 2 * np.sum(scale**2)
    )
    pull = PSI - 2 * XI * np.abs(w) / magnitude**3
    return value, XI * np.sign(w) / magnitude**2, np.sign(scale) * pull + decay * scale


def model_of(first, second=None):
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="tanh", kernel_regularizer=first),
            keras.layers.Dense(3, kernel_regularizer=second),
        ]
    )


def fit(model, epochs=1):
    return model.fit(X, Y, epochs=epochs, batch_size=8, shuffle=False, verbose=0)


# The penalties.


@pytest.mark.parametrize("scale_decay", [0.0, 1e-2])
def test_halo_value_and_gradients(gradients, scale_decay):
    scale = np.geomspace(FLOOR, CEILING, 24).reshape(4, 6)
    scale[:, ::2] *= -1
    w = RNG.normal(size=(4, 6)).astype("float32")
    w[1, :3] = 0
    halo, kernel = halo_on(w, scale, scale_decay=scale_decay)
    value, d_w, d_scale = halo_formula(w, scale, scale_decay)

    np.testing.assert_allclose(array(halo(kernel)), value, rtol=1e-6)
    # A loss scale must pass through the gradients that HALO writes out.
    received = gradients(lambda: 1024 * halo(kernel), [kernel, halo.scale])
    np.testing.assert_allclose(received[0] / 1024, d_w, rtol=1e-6)
    # Where the two terms cancel, they are exact in units of their sum.
    np.testing.assert_allclose(received[1] / 1024, d_scale, rtol=1e-5, atol=1e-6 * PSI)


@pytest.mark.parametrize("scale_decay", [0.0, 1e-2])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, -1e-12, -1e-4, 1e15, -1e15])
def test_halo_is_finite_far_outside_its_range(gradients, scale, scale_decay):
    w = np.array([[-3.0, 0.0, 1e-20, 0.5]], "float32")
    halo, kernel = halo_on(w, np.full(w.shape, scale), scale_decay=scale_decay)
    value, d_w, d_scale = halo_formula(w, np.full(w.shape, scale), scale_decay)

    np.testing.assert_allclose(array(halo(kernel)), value, rtol=1e-6)
    received = gradients(lambda: halo(kernel), [kernel, halo.scale])
    assert all(np.isfinite(gradient).all() for gradient in received)
    np.testing.assert_allclose(received[0], d_w, rtol=1e-6)
    np.testing.assert_allclose(received[1], d_scale, rtol=1e-6)


@pytest.mark.parametrize(
    "psi, scale_decay, exponent, profiled",
    [
        (PSI, 0.0, 1 / 3, 3 * 2 ** (-2 / 3) * XI ** (1 / 3) * PSI ** (2 / 3)),
        (0.0, PSI, 1 / 4, np.sqrt(2 * XI * PSI)),
    ],
)
def test_halo_scales_come_to_rest(gradients, psi, scale_decay, exponent, profiled):
    w = np.geomspace(1e-2, 1, 6).reshape(2, 3) * [1, -1, 1]
    halo, kernel = HALO(XI, psi, scale_decay), kernel_variable(w)
    halo(kernel)
    for _ in range(150):
        (d_scale,) = gradients(lambda: halo(kernel), [halo.scale])
        halo.scale.assign_sub(20 * d_scale)
    rest = (2 * XI * np.abs(w) / (psi or scale_decay)) ** exponent
    np.testing.assert_allclose(array(halo.scale), rest, rtol=1e-5)
    # |w| ** (1/3) and |w| ** (1/2): the penalty that is left when scales have settled.
    expected = profiled * np.sum(np.abs(w) ** (1 / 3 if psi else 1 / 2))
    np.testing.assert_allclose(array(halo(kernel)), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, -0.7, 1e-2])
def test_sws_value_and_gradients(gradients, scale):
    w = RNG.normal(size=(3, 4)).astype("float32")
    w[0, 0] = 0
    sws, kernel = SWS(XI, PSI), kernel_variable(w)
    sws(kernel)
    assert sws.scale.shape == () and sws.scale.name == "sws_scale"
    sws.scale.assign(scale)
    size, scale = np.abs(np.float64(w)).sum(), np.float64(np.float32(scale))

    expected = XI * size / scale**2 + PSI * scale**2
    np.testing.assert_allclose(array(sws(kernel)), expected, rtol=1e-6)
    d_w, d_scale = gradients(lambda: sws(kernel), [kernel, sws.scale])
    np.testing.assert_allclose(d_w, XI * np.sign(w) / scale**2, rtol=1e-5)
    expected = -2 * XI * size / scale**3 + 2 * PSI * scale
    np.testing.assert_allclose(d_scale, expected, rtol=1e-5)


def test_mcp_value_and_gradient(gradients):
    lam, gamma = 0.5, 3.0
    w = np.array([[-2.0, -1.5, -0.4, 0.0], [1e-3, 1.0, 1.49, 100.0]], "float32")
    mcp, kernel = MCP(lam, gamma), kernel_variable(w)
    size = np.abs(np.float64(w))

    inside = lam * size - size**2 / (2 * gamma)
    value = np.where(size <= gamma * lam, inside, gamma * lam**2 / 2).sum()
    np.testing.assert_allclose(array(mcp(kernel)), value, rtol=1e-6)
    (d_w,) = gradients(lambda: mcp(kernel), [kernel])
    slope = np.sign(w) * np.maximum(lam - size / gamma, 0)
    np.testing.assert_allclose(d_w, slope, rtol=1e-5, atol=1e-7)


# The range of the scale.


@pytest.mark.parametrize("gradient, end", [(1e9, FLOOR), (-1e9, CEILING)])
def test_optimizer_step_leaves_halo_scale_within_range(gradient, end):
    halo, _ = halo_on(np.ones((2, 3)), np.ones((2, 3)))
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.apply([ops.full((2, 3), gradient)], [halo.scale])
    np.testing.assert_array_equal(array(halo.scale), np.float32(end))


def test_optimizer_step_brings_an_assigned_scale_back():
    halo, _ = halo_on(np.ones((1, 4)), [[0.0, -5.0, 1e15, 0.5]])
    keras.optimizers.SGD(1.0).apply([ops.zeros((1, 4))], [halo.scale])
    np.testing.assert_allclose(array(halo.scale), [[FLOOR, FLOOR, CEILING, 0.5]])


def test_optimizer_step_leaves_sws_scale_above_its_floor():
    sws = SWS(XI, PSI)
    sws(kernel_variable(np.ones((2, 3))))
    keras.optimizers.SGD(1.0).apply([ops.full((), 1e9)], [sws.scale])
    np.testing.assert_allclose(array(sws.scale), 1e-3)


@pytest.mark.parametrize("scale", [1e-12, -1e-12])
def test_halo_of_zeros_below_the_floor_is_that_at_the_floor(gradients, scale):
    halo, kernel = halo_on(np.zeros((2, 3)), np.full((2, 3), scale))
    np.testing.assert_allclose(array(halo(kernel)), 6 * PSI * FLOOR, rtol=1e-6)
    d_w, d_scale = gradients(lambda: halo(kernel), [kernel, halo.scale])
    np.testing.assert_array_equal(d_w, 0)
    np.testing.assert_allclose(d_scale, np.sign(scale) * PSI, rtol=1e-6)


def test_revived_weights_do_not_throw_scales_out_of_range():
    halo = HALO(xi=1e-6, psi=1e-3)
    model = model_of(halo)
    _ = model.losses
    halo.scale.assign(np.full((6, 8), FLOOR))  # as after a long time near zero
    model.layers[0].kernel.assign(np.full((6, 8), 3.0))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    history = fit(model, epochs=3).history["loss"]
    assert np.isfinite(history).all()
    scale = array(halo.scale)
    assert scale.min() >= FLOOR and scale.max() <= CEILING


# As a part of a model.


def test_scales_are_trained_with_the_weights():
    model = model_of(HALO(XI, PSI), SWS(XI, PSI))
    model.compile("sgd", "mse")
    fit(model)
    assert [w.name for w in model.trainable_weights] == [
        *["kernel", "bias", "halo_scale"],
        *["kernel", "bias", "sws_scale"],
    ]
    scale = model.layers[0].kernel_regularizer.scale
    assert scale.dtype == "float32" and scale.shape == (6, 8)
    assert not np.any(array(scale) == 1)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch's own loop")
def test_a_torch_optimizer_trains_the_scales_of_a_model_that_was_sparsified():
    import torch

    base = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6, name="inner")])
    model = sparsify(keras.Sequential([base, *model_of(None).layers]), HALO(XI, PSI))
    kernels = [array(governed.effective) for governed in governed_weights(model)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sum(model.losses).backward()
    optimizer.step()
    scales = [w for w in model.weights if w.name == "halo_scale"]
    for scale, w in zip(scales, kernels, strict=True):
        _, _, gradient = halo_formula(w, np.ones(w.shape))
        np.testing.assert_allclose(array(scale), 1 - 0.1 * gradient, rtol=1e-6)
    assert len(scales) == 3
    stored = model.state_dict()
    assert all(f"_torch_params.{scale.path}" in stored for scale in scales)


@pytest.mark.parametrize("penalty", [HALO, SWS])
@pytest.mark.parametrize("units", [6, 5])
def test_second_kernel_is_refused(penalty, units):
    shared = penalty(XI, PSI)
    layers = [
        keras.layers.Dense(n, kernel_regularizer=shared, name=f"dense_of_{n}_{i}")
        for i, n in enumerate([6, units])
    ]
    model = keras.Sequential([keras.Input((6,)), *layers])
    name = penalty.__name__
    with pytest.raises(ValueError, match=rf"Make a new {name} for every kernel"):
        _ = model.losses
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=rf"dense_of_{units}_1/kernel"):
        model.fit(X, X[:, :units], verbose=0)


def test_attention_with_one_regularizer_is_told_of_penalized():
    layer = keras.layers.MultiHeadAttention(2, 3, kernel_regularizer=HALO(XI, PSI))
    layer.build((None, 4, 6), (None, 4, 6))
    with pytest.raises(ValueError, match=r"Penalized\(layer, HALO\(\.\.\.\)\)"):
        _ = layer.losses


def test_clone_has_fresh_scales():
    model = model_of(HALO(XI, PSI), SWS(XI, PSI))
    model.compile("sgd", "mse")
    fit(model)
    clone = keras.models.clone_model(model)
    _ = clone.losses
    for old, new in zip(model.layers, clone.layers, strict=True):
        assert old.kernel_regularizer is not new.kernel_regularizer
        np.testing.assert_array_equal(array(new.kernel_regularizer.scale), 1)
    fit(model)
    np.testing.assert_array_equal(array(clone.layers[0].kernel_regularizer.scale), 1)


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
@pytest.mark.parametrize("penalty", [HALO, SWS])
def test_scales_are_restored_before_the_first_call(tmp_path, penalty, suffix):
    model = model_of(penalty(XI, PSI), penalty(XI, PSI))
    model.compile("sgd", "mse")
    fit(model)
    path = tmp_path / f"model{suffix}"
    if suffix == ".keras":
        model.save(path)
        loaded = keras.models.load_model(path)
    else:
        model.save_weights(path)
        loaded = model_of(penalty(XI, PSI), penalty(XI, PSI))
        assert not loaded.layers[0].kernel_regularizer.built
        loaded.load_weights(path)
    for old, new in zip(model.layers, loaded.layers, strict=True):
        expected = array(old.kernel_regularizer.scale)
        np.testing.assert_array_equal(array(new.kernel_regularizer.scale), expected)
        np.testing.assert_array_equal(array(new.losses[0]), array(old.losses[0]))


def test_model_that_never_met_its_scales_is_saved(tmp_path):
    path = tmp_path / "model.keras"
    model_of(HALO(XI, PSI), SWS(XI, PSI)).save(path)
    loaded = keras.models.load_model(path)
    loaded.compile("sgd", "mse")
    fit(loaded)
    assert len(loaded.trainable_weights) == 6


def test_governs_its_kernel_from_the_start(tmp_path):
    model = model_of(HALO(XI, PSI), MCP(1e-3, 1e3))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded, keras.models.clone_model(model)):
        governed = governed_weights(each)
        assert [g.method for g in governed] == ["HALO", "MCP"]
        for g, layer in zip(governed, each.layers, strict=True):
            assert g.variable is layer.kernel and g.threshold is None
            np.testing.assert_array_equal(array(g.effective), array(layer.kernel))


def test_reloaded_training_continues_as_uninterrupted(tmp_path):
    model = model_of(HALO(XI, PSI, scale_decay=1e-3), SWS(XI, PSI))
    model.compile("adam", "mse")
    fit(model, epochs=2)
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    slots, restored = model.optimizer.variables, resumed.optimizer.variables
    for old, new in zip(slots, restored, strict=True):
        np.testing.assert_array_equal(array(new), array(old))
    fit(model, epochs=2)
    fit(resumed, epochs=2)
    for old, new in zip(model.weights, resumed.weights, strict=True):
        np.testing.assert_allclose(array(new), array(old), rtol=1e-6)


def test_every_weight_is_stored_once(stored_arrays):
    model = model_of(HALO(XI, PSI), HALO(XI, PSI))
    _ = model.losses
    assert len({w.path for w in model.weights}) == len(model.weights) == 8
    assert len(stored_arrays(model)) == 8


@pytest.mark.parametrize(
    "penalty",
    [
        HALO(1e-7, 2e-3, scale_decay=1e-4, scale_floor=1e-2, scale_ceiling=5.0),
        SWS(1e-5, 1e-2),
        MCP(1e-4, 1e3),
    ],
    ids=lambda penalty: type(penalty).__name__,
)
def test_config_round_trip(penalty):
    config = keras.regularizers.serialize(penalty)
    copy = keras.regularizers.deserialize(config)
    assert type(copy) is type(penalty)
    assert copy.get_config() == penalty.get_config()
    numbers = {k for k, v in vars(penalty).items() if type(v) is float}
    assert numbers and numbers <= penalty.get_config().keys()


# float32 whatever the kernel is.


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
@pytest.mark.parametrize("penalty", [HALO(3e-7, 5e-4), SWS(3e-7, 5e-4)])
def test_penalty_is_float32_in_any_precision(penalty, dtype):
    penalty = type(penalty).from_config(penalty.get_config())
    layer = keras.layers.Dense(5, kernel_regularizer=penalty, dtype=dtype)
    layer(X)
    (loss,) = layer.losses
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    assert penalty.scale.dtype == "float32"
    scales = 30 if isinstance(penalty, HALO) else 1
    w = array(ops.cast(layer.kernel, "float32")).astype("float64")
    expected = 3e-7 * np.abs(w).sum() + 5e-4 * scales
    np.testing.assert_allclose(array(loss), expected, rtol=1e-6)


# Arguments.


@pytest.mark.parametrize("value", [-1e-9, np.nan, np.inf, "1e-3", None, True, [1e-3]])
@pytest.mark.parametrize(
    "penalty, argument",
    [
        *[(HALO, name) for name in ("xi", "psi", "scale_decay", "scale_floor")],
        (HALO, "scale_ceiling"),
        *[(SWS, "xi"), (SWS, "psi"), (MCP, "lam"), (MCP, "gamma")],
    ],
)
def test_bad_number_is_named(penalty, argument, value):
    valid = {"lam": 1.0, "gamma": 1.0} if penalty is MCP else {"xi": 1.0, "psi": 1.0}
    with pytest.raises(ValueError, match=rf"Argument `{argument}` must be .*Received"):
        penalty(**{**valid, argument: value})


@pytest.mark.parametrize(
    "argument, value",
    [("scale_floor", 1e-25), ("scale_floor", 1), ("scale_ceiling", 1)],
)
def test_scale_starts_within_its_range(argument, value):
    with pytest.raises(ValueError, match=rf"Argument `{argument}` must be"):
        HALO(XI, PSI, **{argument: value})


def test_zero_gamma_is_refused():
    with pytest.raises(ValueError, match="`gamma` must be a finite number > 0"):
        MCP(1.0, 0.0)
