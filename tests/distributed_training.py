"""Trainings in processes of their own, for `test_distribution.py`."""

import contextlib
import functools
import os
import signal

import keras
import numpy as np
from keras import layers

import keras_sparsity as ks

METHODS = {
    "LTP": functools.partial(ks.LTP, l0=1e-3),
    "LTP absolute": functools.partial(
        ks.LTP, l0=1e-6, temperature=1.0, threshold_units="absolute"
    ),
    "HALO": ks.HALO(xi=1e-3, psi=1e-2),
    "MagnitudePruning": functools.partial(
        ks.MagnitudePruning, schedule=ks.CubicSparsity(0.8, 9, frequency=2)
    ),
    "KeepZeros": ks.KeepZeros,
}
ON_TENSORFLOW = keras.backend.backend() == "tensorflow"


def run(cases, output, trails=None, kill=False, tf_config=None, devices=2):
    """What a process does: trains, and stores the results.

    Args:
        cases: Dict of lists of cases by way to train (see `scope_of`). A case is a
            method, and what else is in the model.
        output: Path of the folder for an `.npz` file per way.
        trails: Dict of directories, of a resumable trail each, by way and case.
        kill: Whether to end in the middle of the second epoch.
        tf_config: The value of `TF_CONFIG`, of a worker among several.
        devices: Number of virtual devices.
    """
    if tf_config:
        os.environ["TF_CONFIG"] = tf_config
    split_the_cpu(devices)
    for way in cases:
        scope = scope_of(way)
        results = {}
        for case in cases[way]:
            trail = (trails or {}).get((way, case))
            results |= train(way, scope, case, trail, kill)
        output.mkdir(parents=True, exist_ok=True)
        np.savez(output / f"{way}.npz", **results)


def split_the_cpu(devices):
    if ON_TENSORFLOW:
        import tensorflow as tf

        cpu, *_ = tf.config.list_physical_devices("CPU")
        virtual = [tf.config.LogicalDeviceConfiguration()] * devices
        tf.config.set_logical_device_configuration(cpu, virtual)
    else:
        import jax

        jax.config.update("jax_num_cpu_devices", devices)


def scope_of(way):
    """What gives the scope to make and to compile a model in."""
    if not ON_TENSORFLOW:
        distribution = keras.distribution.DataParallel() if way == "two" else None
        keras.distribution.set_distribution(distribution)  # of the whole process
        return contextlib.nullcontext
    import tensorflow as tf

    match way:
        case "one":
            return contextlib.nullcontext
        case "two":
            return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope
        case "strategy" | "compiled":
            return tf.distribute.OneDeviceStrategy("CPU:0").scope
        case "worker":
            return ks.distribution.MultiWorkerMirroredStrategy().scope


def train(way, scope, case, trail, kill):
    method, *features = case.split(", ")
    policies = [feature for feature in features if feature.startswith("mixed")]
    keras.config.set_dtype_policy(policies[0] if policies else "float32")
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 6, 6, 2)).astype("float32")
    y = generator.integers(0, 3, size=64)
    keras.utils.set_random_seed(0)
    with scope():
        # With JAX an array is one, wherever its parts are: nothing to synchronize.
        normalization = layers.BatchNormalization(synchronized=ON_TENSORFLOW)
        model = keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                layers.Conv2D(4, 3, name="conv"),
                *([normalization] if "batch norm" in features else []),
                layers.ReLU(),
                layers.Flatten(),
                *([layers.Dropout(0.3)] if "dropout" in features else []),
                layers.Dense(3, name="dense"),
                layers.Activation("linear", dtype="float32"),
            ]
        )
    # Outside of the scope: a model stays where it was made.
    if method == "KeepZeros":
        model = ks.prune(model, 0.5)
    model = ks.sparsify(model, METHODS[method])
    with scope():
        model.compile(
            ks.SparsityOptimizer(keras.optimizers.SGD(0.05, momentum=0.9)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=True if way == "compiled" else "auto",
        )
    callbacks, strengths = [], []

    def look(epoch, logs):
        found = [v for v in model.weights if v.name == "ltp_strength"]
        strengths.append([keras.ops.convert_to_numpy(v) for v in found])

    if "target" in features:
        # Soon there, so that prices fall: where they grow, rounding grows with them.
        callbacks.append(ks.SparsityTarget(0.05))
        callbacks.append(keras.callbacks.LambdaCallback(on_epoch_end=look))
    if trail:
        callbacks.append(ks.SparsityTrail(trail, resume=True))
    if kill:
        callbacks.append(Kill())
    # TensorFlow 2.21 may crash when it evaluates under a strategy of one device, with a
    # plain Keras model too: with a trail only, in a process of its own.
    evaluates = trail or way not in ("strategy", "compiled")
    history = model.fit(
        x,
        y,
        batch_size=16,
        epochs=3,
        shuffle=False,
        validation_data=(x, y) if trail else None,
        callbacks=callbacks,
        verbose=0,
    )
    history.history.pop("sparsity", None)  # the trail's
    results = {f"history/{name}": column for name, column in history.history.items()}
    if strengths:
        results["strengths"] = np.array(strengths)
    small = ks.finalize(model)
    if evaluates:
        results["evaluate"] = model.evaluate(x, y, 16, verbose=0)
        results["predict"] = model.predict(x[:36], 16, verbose=0)
        results["finalized"] = small.predict(x[:36], 16, verbose=0)
    if way in ("one", "worker"):  # TensorFlow's own strategies take no such batch first
        results["evaluate an odd batch"] = model.evaluate(x[:35], y[:35], 35, verbose=0)
    weights = {
        "weight": model.weights,
        "finalized": small.weights,
        "pruned": ks.prune(model, 0.7).weights,
    }
    for kind, variables in weights.items():
        for index, variable in enumerate(variables):
            array = keras.ops.convert_to_numpy(variable)
            results[f"{kind}/{index} {variable.name}"] = array
    results["replicas differ by"] = max(
        np.ptp(copies(model, variable), axis=0).max() for variable in model.variables
    )
    return {f"{case}/{name}": value for name, value in results.items()}


def copies(model, variable):
    """The arrays of `variable` on all the devices of this process."""
    if not ON_TENSORFLOW:
        return [np.asarray(s.data, float) for s in variable.value.addressable_shards]
    strategy = model.distribute_strategy
    parts = strategy.experimental_local_results(variable.value)
    return [np.asarray(part, float) for part in parts]


class Kill(keras.callbacks.Callback):
    """Ends the process in the middle of the second epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)
