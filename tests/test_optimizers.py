"""Scales and thresholds have a learning rate of their own; nothing else changes."""

import math
import re
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import ops

from keras_sparsity.optimizers import SparsityOptimizer
from keras_sparsity.regularizers import HALO

OPTIMIZERS = [
    keras.optimizers.Adadelta,
    keras.optimizers.Adafactor,
    keras.optimizers.Adagrad,
    keras.optimizers.Adam,
    keras.optimizers.Adamax,
    keras.optimizers.AdamW,
    keras.optimizers.Ftrl,
    keras.optimizers.Lamb,
    keras.optimizers.Lion,
    keras.optimizers.Muon,
    keras.optimizers.Nadam,
    keras.optimizers.RMSprop,
    keras.optimizers.ScheduleFreeAdamW,
    keras.optimizers.SGD,
]
X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = X[:, :3] - 0.5
STEPS = 4  # of an epoch
MULTIPLIER = 0.5


def values(variables):
    return [ops.convert_to_numpy(variable) for variable in variables]


def assert_close(received, expected, rtol=1e-6):
    for value, reference in zip(received, expected, strict=True):
        np.testing.assert_allclose(value, reference, rtol=rtol)


def rate(optimizer):
    return float(ops.convert_to_numpy(optimizer.learning_rate))


# Optimizers by themselves: a kernel, a scale and a threshold with given gradients.


def variables():
    kernel = np.linspace(-1, 1, 12).reshape(4, 3)
    return [
        keras.Variable(kernel, dtype="float32", name="kernel"),
        keras.Variable(np.ones((4, 3)), dtype="float32", name="halo_scale"),
        keras.Variable(1.0, dtype="float32", name="ltp_threshold_kernel"),
    ]


def gradients(step):
    rng = np.random.default_rng(step)
    return [rng.normal(size=shape).astype("float32") for shape in [(4, 3), (4, 3), ()]]


def updated(optimizer, steps, which=slice(None)):
    """Values of `variables()[which]` after some steps of the optimizer."""
    chosen = variables()[which]
    for step in range(steps):
        optimizer.apply([ops.array(g) for g in gradients(step)[which]], chosen)
    return values(chosen)


def descended(rates):
    """Scale and threshold after plain gradient descent, one step for each rate."""
    taken = [[r * g for g in gradients(k)[1:]] for k, r in enumerate(rates)]
    return [1 - sum(steps) for steps in zip(*taken, strict=True)]


def test_the_documented_optimizers_are_those_tested_here():
    documented = re.search(r"Tested as either: ([^.]*)", SparsityOptimizer.__doc__)
    names = re.findall(r"\w+", documented[1].replace(" and ", " "))
    assert names == [cls.__name__ for cls in OPTIMIZERS]


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_weights_and_scales_have_an_optimizer_each(cls):
    optimizer = SparsityOptimizer(cls(), multiplier=MULTIPLIER)
    kernel, *others = updated(optimizer, steps=3)
    assert_close([kernel], updated(cls(), steps=3, which=slice(1)), rtol=0)
    assert_close(others, descended(3 * [MULTIPLIER * rate(optimizer)]), rtol=1e-5)


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_any_optimizer_serves_scales_and_thresholds(cls):
    optimizer = SparsityOptimizer("sgd", cls(learning_rate=7.0), MULTIPLIER)
    bare = cls(learning_rate=MULTIPLIER * rate(optimizer))
    bare.exclude_from_weight_decay(var_names=["halo_scale", "ltp_threshold"])
    # The first variable, a kernel, is there because no variable may be without decay
    # on torch.
    _, *expected = updated(bare, steps=3)
    assert_close(updated(optimizer, steps=3)[1:], expected)


def test_accumulates_gradients_with_the_main_optimizer():
    def after(steps):
        main = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
        return updated(SparsityOptimizer(main, multiplier=MULTIPLIER), steps)

    assert_close(after(2), values(variables()), rtol=0)
    for steps in (3, 4, 5):
        mean = descended(3 * [MULTIPLIER * 0.1 / 3])
        assert_close(after(steps)[1:], mean, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "muon"])
def test_scales_and_thresholds_never_decay(name):
    main = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer = SparsityOptimizer(main, sparsity_optimizer=name)
    kernel, scale, threshold = decayed = variables()
    optimizer.apply([ops.zeros(variable.shape) for variable in decayed], decayed)
    start = values(variables())
    assert_close(values(decayed), [0.95 * start[0], start[1], start[2]])


def test_exclude_from_weight_decay_reaches_the_main_optimizer():
    optimizer = SparsityOptimizer(keras.optimizers.AdamW(0.1, weight_decay=0.5))
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    kernel, bias = (keras.Variable([1.0], name=name) for name in ("kernel", "bias"))
    optimizer.apply([ops.zeros(1), ops.zeros(1)], [kernel, bias])
    assert_close(values([kernel, bias]), [[0.95], [1.0]])


@pytest.mark.parametrize("clip", ["global_clipnorm", "clipnorm", "clipvalue"])
def test_scales_and_thresholds_stay_out_of_clipping(clip):
    def main():
        return keras.optimizers.SGD(0.1, **{clip: 0.01})

    kernel, *others = updated(SparsityOptimizer(main()), steps=1)
    assert_close([kernel], updated(main(), steps=1, which=slice(1)), rtol=0)
    assert_close(others, descended([0.1]), rtol=1e-5)


def test_follows_a_schedule_when_all_weights_are_frozen():
    schedule = keras.optimizers.schedules.InverseTimeDecay(0.1, 1, 1.0)
    optimizer = SparsityOptimizer(keras.optimizers.SGD(schedule))
    received = updated(optimizer, steps=3, which=slice(1, None))
    assert_close(received, descended([0.1, 0.1 / 2, 0.1 / 3]), rtol=1e-5)
    assert int(optimizer.iterations) == 3


def test_learning_rate_is_the_main_ones():
    optimizer = SparsityOptimizer(keras.optimizers.SGD(0.1), multiplier=3.0)
    assert rate(optimizer) == pytest.approx(0.1)
    optimizer.learning_rate = 0.2
    assert rate(optimizer.optimizer) == pytest.approx(0.2)
    assert rate(optimizer.sparsity_optimizer) == pytest.approx(0.6)


def test_the_sparsity_optimizer_is_a_copy():
    original = keras.optimizers.SGD(0.3, momentum=0.9)
    copy = SparsityOptimizer("adam", original).sparsity_optimizer
    assert copy.momentum == 0.9
    assert rate(original) == pytest.approx(0.3)


# Models: a dense layer with a scale and a threshold whose gradients are 2 and 1.


@keras.saving.register_keras_serializable("test_optimizers")
class Governed(keras.layers.Layer):
    def __init__(self, governed=True, **kwargs):
        super().__init__(**kwargs)
        self.governed = governed

    def build(self, input_shape):
        own = {"initializer": "zeros", "autocast": False}
        self.kernel = self.add_weight(name="kernel", shape=(4, 3), initializer="ones")
        if self.governed:
            self.scale = self.add_weight(name="halo_scale", shape=(4, 3), **own)
            self.threshold = self.add_weight(name="ltp_threshold", shape=(), **own)

    def call(self, inputs):
        if self.governed:
            self.add_loss(2 * ops.sum(self.scale) + self.threshold)
        return ops.matmul(inputs, self.kernel)

    def get_config(self):
        return {**super().get_config(), "governed": self.governed}


def compiled(optimizer, governed=True, **kwargs):
    model = keras.Sequential([keras.Input((4,)), Governed(governed)])
    model.compile(optimizer, loss="mse", **kwargs)
    return model


def fit(model, epochs=1, callbacks=()):
    return model.fit(
        X,
        Y,
        batch_size=len(X) // STEPS,
        epochs=epochs,
        callbacks=list(callbacks),
        shuffle=False,
        verbose=0,
    )


def threshold_after(main, epochs=1, callbacks=()):
    model = compiled(SparsityOptimizer(main, multiplier=MULTIPLIER))
    fit(model, epochs, callbacks)
    return values(model.weights)[2]


def inverse_time():
    """A rate of 0.1 / (1 + step)."""
    return keras.optimizers.schedules.InverseTimeDecay(0.1, 1, 1.0)


@pytest.mark.parametrize(
    "how",
    [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": "auto"}],
    ids=["eager", "no_jit", "auto_jit"],
)
def test_trains_in_fit(how):
    main = keras.optimizers.Adam(0.1)
    model = compiled(SparsityOptimizer(main, multiplier=MULTIPLIER), **how)
    bare = compiled(keras.optimizers.Adam(0.1), governed=False, **how)
    fit(model)
    fit(bare)
    threshold = -MULTIPLIER * 0.1 * STEPS
    scale = np.full((4, 3), 2 * threshold)
    assert_close(values(model.weights), [*values(bare.weights), scale, threshold])


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.1, "global_clipnorm": 0.5},
        {"clipnorm": 0.5, "loss_scale_factor": 8.0},
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_without_scales_it_is_the_main_optimizer(settings):
    bare = keras.optimizers.SGD(0.1, momentum=0.9, **settings)
    main = keras.optimizers.SGD.from_config(bare.get_config())
    models = [compiled(o, governed=False) for o in (SparsityOptimizer(main), bare)]
    for model in models:
        fit(model, epochs=2)
    received, expected = (values(model.weights) for model in models)
    assert_close(received, expected, rtol=0)
    assert int(models[0].optimizer.iterations) == int(bare.iterations)


@pytest.mark.parametrize("accumulated", [None, 2])
def test_follows_a_schedule_step_by_step(accumulated):
    main = keras.optimizers.SGD(inverse_time(), gradient_accumulation_steps=accumulated)
    steps = range(2 * STEPS) if accumulated is None else range(1, 2 * STEPS, 2)
    expected = -MULTIPLIER * sum(0.1 / (1 + step) for step in steps)
    assert threshold_after(main, epochs=2) == pytest.approx(expected, rel=1e-6)


def test_follows_learning_rate_scheduler():
    rates = [0.1, 0.01, 0.03]
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, _: rates[epoch])
    model = compiled(SparsityOptimizer("adam", multiplier=MULTIPLIER))
    logs = fit(model, epochs=3, callbacks=[scheduler]).history
    assert_close(logs["learning_rate"], rates)
    expected = -MULTIPLIER * STEPS * sum(rates)
    assert values(model.weights)[2] == pytest.approx(expected, rel=1e-6)


def test_follows_reduce_lr_on_plateau():
    # No improvement is enough: the rate falls after every epoch but the first.
    plateau = keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=1e3)
    main = keras.optimizers.SGD(0.1)
    expected = -MULTIPLIER * STEPS * (0.1 + 0.1 + 0.01)
    received = threshold_after(main, epochs=3, callbacks=[plateau])
    assert received == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("overwrite", [None, 2])
def test_averages_scales_and_thresholds_with_the_weights(overwrite):
    main = keras.optimizers.SGD(
        0.1, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=overwrite
    )
    threshold = average = 0.0
    for step in range(STEPS):
        threshold -= MULTIPLIER * 0.1
        average = 0.75 * average + 0.25 * threshold if step else threshold
        if overwrite and (step + 1) % overwrite == 0:
            threshold = average
    assert threshold_after(main) == pytest.approx(average, rel=1e-6)


def test_swap_ema_weights_finds_every_average():
    main = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.75)
    model = compiled(SparsityOptimizer(main))
    fit(model)  # which leaves the averages in the model
    averages = values(model.weights)
    others = [np.full(average.shape, 7.0) for average in averages]
    model.set_weights(others)
    swap = keras.callbacks.SwapEMAWeights()
    swap.set_model(model)
    swap.on_test_begin()
    assert_close(values(model.weights), averages, rtol=1e-5)
    swap.on_test_end()
    assert_close(values(model.weights), others)


@pytest.fixture
def mixed_float16():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(policy)


def test_loss_scaling_of_mixed_float16(mixed_float16):
    main = keras.optimizers.SGD(0.1, loss_scale_factor=64.0)  # `compile` overrules it
    model = compiled(SparsityOptimizer(main, multiplier=MULTIPLIER))
    bare = compiled(keras.optimizers.SGD(0.1), governed=False)
    for each in (model, bare):
        assert isinstance(each.optimizer, keras.optimizers.LossScaleOptimizer)
        fit(each, epochs=2)
    # Fewer than 8: a step is skipped until the loss scale is low enough.
    steps = int(model.optimizer.iterations)
    assert steps == int(bare.optimizer.iterations) > STEPS
    kernel, _, threshold = values(model.weights)
    assert_close([kernel], values(bare.weights), rtol=0)
    assert threshold == pytest.approx(-MULTIPLIER * 0.1 * steps, rel=1e-6)


def test_a_step_that_overflows_is_skipped_by_both():
    model = compiled(keras.optimizers.LossScaleOptimizer(SparsityOptimizer("sgd")))
    before = values(model.weights)
    model.train_on_batch(np.full((4, 4), np.inf), Y[:4])  # the kernel's overflows
    assert_close(values(model.weights), before, rtol=0)


def test_fixed_loss_scale_factor():
    main = keras.optimizers.SGD(0.1, loss_scale_factor=64.0)
    assert SparsityOptimizer(main).scale_loss(1.0) == 64.0
    expected = -MULTIPLIER * 0.1 * STEPS
    assert threshold_after(main) == pytest.approx(expected, rel=1e-6)


# Saving, and what is refused.


def demanding(cls=keras.optimizers.SGD, **kwargs):
    main = cls(inverse_time(), gradient_accumulation_steps=3, **kwargs)
    return SparsityOptimizer(main, "adam", MULTIPLIER)


def state(model):
    return values(model.weights + model.optimizer.variables)


def test_training_goes_on_exactly_after_reloading(tmp_path):
    uninterrupted, interrupted = (compiled(demanding(momentum=0.9)) for _ in range(2))
    fit(uninterrupted, epochs=2)
    fit(interrupted)
    interrupted.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    fit(reloaded)
    assert_close(state(reloaded), state(uninterrupted), rtol=0)


@keras.saving.register_keras_serializable("test_optimizers")
class Crossed(keras.layers.Layer):
    """Has its regularizers in another order than its kernels, all of one shape."""

    def __init__(self, second=None, first=None, **kwargs):
        super().__init__(**kwargs)
        self.second = second or HALO(xi=1e-1, psi=1e-1)
        self.first = first or HALO(xi=1e-2, psi=1e-2)

    def build(self, input_shape):
        self.kernels = [
            self.add_weight(name=name, shape=(4, 4), regularizer=regularizer)
            for name, regularizer in {"a": self.first, "b": self.second}.items()
        ]

    def call(self, inputs):
        return ops.matmul(ops.matmul(inputs, self.kernels[0]), self.kernels[1])[:, :3]

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        own = {"first": serialize(self.first), "second": serialize(self.second)}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config):
        own = ("first", "second")
        made = {k: keras.saving.deserialize_keras_object(config[k]) for k in own}
        return cls(**{**config, **made})


def compiled_without_scales(optimizer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), Crossed()])
    model.compile(optimizer, loss="mse")
    return model


def test_weights_that_are_loaded_before_the_first_step(tmp_path):
    model, loaded = (compiled(demanding()) for _ in range(2))
    model.save_weights(tmp_path / "model.weights.h5")
    loaded.load_weights(tmp_path / "model.weights.h5")
    fit(model)
    fit(loaded)
    assert_close(state(loaded), state(model), rtol=0)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "with the weights"])
@pytest.mark.parametrize("use_ema", [False, True])
def test_scales_that_are_made_late_get_their_own_slots(tmp_path, late, use_ema):
    optimizers = (demanding(momentum=0.9, use_ema=use_ema) for _ in range(3))
    uninterrupted, interrupted, restarted = map(compiled_without_scales, optimizers)
    fit(uninterrupted, epochs=2)
    fit(interrupted)
    interrupted.save_weights(tmp_path / "model.weights.h5")
    if not late:
        _ = restarted.losses  # makes the scales
    restarted.optimizer.build(restarted.trainable_variables)  # as `BackupAndRestore`
    restarted.load_weights(tmp_path / "model.weights.h5")
    fit(restarted)
    # Not exactly: TensorFlow compiles the averages otherwise after a restart.
    assert_close(state(restarted), state(uninterrupted), rtol=1e-4)


def test_an_optimizer_that_waits_may_be_used_without_the_scales():
    used, early = (compiled_without_scales(demanding()) for _ in range(2))
    gradients = [ops.ones(v.shape) for v in used.trainable_variables]
    used.optimizer.apply(gradients, used.trainable_variables)
    early.optimizer.build(early.trainable_variables)
    early.optimizer.apply(gradients)
    assert_close(state(early), state(used), rtol=0)


def test_an_optimizer_that_waits_says_so():
    model = compiled_without_scales(demanding())
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="waits for scales .* read `model.losses`"):
        model.optimizer.stateless_apply(model.optimizer.variables, [], [])
    with pytest.raises(ValueError, match="knows all variables"):
        _ = model.optimizer._model_variables_moving_average


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="TensorFlow's own variables"
)
def test_variables_of_tensorflow():
    import tensorflow as tf

    variable = tf.Variable([1.0, 2.0])
    SparsityOptimizer("sgd").apply_gradients([(tf.ones(2), variable)])
    np.testing.assert_allclose(variable, [0.99, 1.99])


def test_a_model_saved_before_training_trains_after_reloading(tmp_path):
    model = compiled_without_scales(demanding())
    model.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    fit(model)
    fit(reloaded)
    assert_close(state(reloaded), state(model), rtol=0)


def test_every_slot_is_stored_once(tmp_path):
    model = compiled(demanding(use_ema=True))
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        archive.extract("model.weights.h5", tmp_path)
    stored = []
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visititems(lambda _, item: stored.append(isinstance(item, h5py.Dataset)))
    assert sum(stored) == len(state(model))


def test_set_weights_restores_every_slot():
    source, target = demanding(use_ema=True), demanding(use_ema=True)
    updated(source, steps=4)
    target.build(variables())
    target.set_weights(values(source.variables))
    assert_close(values(target.variables), values(source.variables), rtol=0)


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_config_round_trip(cls):
    optimizer = demanding(cls)
    config = optimizer.get_config()
    assert config["multiplier"] == MULTIPLIER
    assert SparsityOptimizer.from_config(config).get_config() == optimizer.get_config()


@pytest.mark.parametrize("multiplier", [0, -1.0, math.nan, math.inf, "10", None])
def test_bad_multiplier(multiplier):
    with pytest.raises(ValueError, match="`multiplier` must be a finite number > 0"):
        SparsityOptimizer("sgd", multiplier=multiplier)


@pytest.mark.parametrize("argument", ["optimizer", "sparsity_optimizer"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: "no such optimizer",
        lambda: None,
        lambda: keras.optimizers.SGD,
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
        lambda: SparsityOptimizer("sgd"),
    ],
    ids=["name", "none", "class", "loss_scale", "nested"],
)
def test_bad_optimizer(argument, make):
    arguments = {"optimizer": "sgd", argument: make()}
    with pytest.raises(ValueError, match=f"Argument `{argument}` must be a Keras"):
        SparsityOptimizer(**arguments)
