"""A training in a process of its own, for `test_distribution.py`.

    python distributed_training.py '{"devices": 1, ...}'

It ends with its final weights and history in an `.npz` file.
"""

import functools
import json
import os
import signal
import sys

SETTING = json.loads(sys.argv[1])
DEVICES = SETTING["devices"]
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"

import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import layers  # noqa: E402

import keras_sparsity as ks  # noqa: E402

METHODS = {
    "LTP": functools.partial(ks.LTP, l0=1e-3),
    "LTP absolute": functools.partial(
        ks.LTP, l0=1e-6, temperature=0.1, threshold_units="absolute"
    ),
    "HALO": ks.HALO(xi=1e-3, psi=1e-2),
    "MagnitudePruning": functools.partial(
        ks.MagnitudePruning, schedule=ks.CubicSparsity(0.8, 9, frequency=2)
    ),
    "LTP, batch norm": functools.partial(ks.LTP, l0=1e-3),
}


def make_strategy():
    """The strategy, which a process must make before anything else."""
    if keras.backend.backend() == "jax":
        distribution = keras.distribution.DataParallel()
        assert distribution.device_mesh.shape == (DEVICES,)
        return distribution
    import tensorflow as tf

    if "TF_CONFIG" in os.environ:
        return ks.distribution.MultiWorkerMirroredStrategy()
    cpu, *_ = tf.config.list_physical_devices("CPU")
    virtual = [tf.config.LogicalDeviceConfiguration()] * DEVICES
    tf.config.set_logical_device_configuration(cpu, virtual)
    if SETTING.get("one_device_strategy"):
        return tf.distribute.OneDeviceStrategy("CPU:0")
    if DEVICES == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(DEVICES)])


class Kill(keras.callbacks.Callback):
    """Ends the process in the middle of the second epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)


def train(strategy, method):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 6, 6, 2)).astype("float32")
    y = generator.integers(0, 3, size=64)
    keras.utils.set_random_seed(0)
    with strategy.scope():
        # With JAX an array is one, wherever its parts are: nothing to synchronize.
        synchronized = keras.backend.backend() == "tensorflow"
        normalization = [layers.BatchNormalization(synchronized=synchronized)]
        model = keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                layers.Conv2D(4, 3, name="conv"),
                *(normalization if "batch norm" in method else []),
                layers.ReLU(),
                layers.Flatten(),
                layers.Dense(3, name="dense"),
            ]
        )
    # Outside of the scope: a model stays where it was made.
    model = ks.sparsify(model, METHODS[method])
    with strategy.scope():
        model.compile(
            ks.SparsityOptimizer(keras.optimizers.SGD(0.05, momentum=0.9)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    callbacks = []
    if "trail" in SETTING:
        callbacks.append(ks.SparsityTrail(SETTING["trail"], resume=True))
    if SETTING.get("kill"):
        callbacks.append(Kill())
    # TensorFlow 2.21 may crash when it evaluates under a strategy of one device, with a
    # plain Keras model too.
    evaluates = not SETTING.get("one_device_strategy")
    history = model.fit(
        x,
        y,
        batch_size=16,
        epochs=3,
        shuffle=False,
        validation_data=(x, y) if evaluates else None,
        callbacks=callbacks,
        verbose=0,
    )
    results = {f"history/{name}": column for name, column in history.history.items()}
    if evaluates:
        results["evaluate"] = model.evaluate(x, y, 16, verbose=0)
        results["predict"] = model.predict(x[:36], 16, verbose=0)
        results["finalized"] = ks.finalize(model).predict(x[:36], 16, verbose=0)
    for index, variable in enumerate(model.weights):
        array = keras.ops.convert_to_numpy(variable)
        results[f"weight/{index} {variable.path}"] = array
    return {f"{method}/{name}": value for name, value in results.items()}


if __name__ == "__main__":
    strategy = make_strategy()
    results = {}
    for method in SETTING["methods"]:
        results |= train(strategy, method)
    np.savez(SETTING["output"], **results)
