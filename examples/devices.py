"""On what to train: one device, several of this machine, or several machines."""

import contextlib

import keras
from absl import app, flags

FLAGS = flags.FLAGS

flags.DEFINE_enum(
    "strategy",
    "none",
    ["none", "mirrored", "multi_worker", "data_parallel"],
    "Several devices: mirrored over all of this machine, or multi_worker as TF_CONFIG "
    "says (TensorFlow); data_parallel (JAX).",
)
flags.DEFINE_integer(
    "virtual_devices",
    None,
    "Split the CPU into as many devices, to try a strategy without GPUs.",
    lower_bound=1,
)


def scope():
    """The scope in which everything is done, by `--strategy`."""
    backend = {"none": keras.backend.backend(), "data_parallel": "jax"}.get(
        FLAGS.strategy, "tensorflow"
    )
    if backend != keras.backend.backend():
        raise app.UsageError(
            f"--strategy={FLAGS.strategy} needs KERAS_BACKEND={backend}. "
            f"Received: {keras.backend.backend()}"
        )
    match FLAGS.strategy:
        case "mirrored":
            tf = _tensorflow()
            # By name, since TensorFlow by itself takes one device where none is a GPU.
            kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
            names = [device.name for device in tf.config.list_logical_devices(kind)]
            if len(names) > 1:
                return tf.distribute.MirroredStrategy(names).scope()
            print("There is one device: no strategy is needed.")
        case "multi_worker":
            _tensorflow()
            from keras_sparsity.distribution import MultiWorkerMirroredStrategy

            return MultiWorkerMirroredStrategy().scope()
        case "data_parallel":
            if FLAGS.virtual_devices:
                import jax

                jax.config.update("jax_num_cpu_devices", FLAGS.virtual_devices)
            return keras.distribution.DataParallel().scope()
    return contextlib.nullcontext()


def _tensorflow():
    """TensorFlow with the devices asked for, not a line for every reduction."""
    import tensorflow as tf

    tf.get_logger().setLevel("WARNING")
    if FLAGS.virtual_devices:
        cpu, *_ = tf.config.list_physical_devices("CPU")
        parts = [tf.config.LogicalDeviceConfiguration()] * FLAGS.virtual_devices
        tf.config.set_logical_device_configuration(cpu, parts)
    return tf


def shares(batch_size):
    """Number of devices that share each batch evenly."""
    if FLAGS.strategy == "none":
        return 1
    if FLAGS.strategy == "data_parallel":
        devices = len(keras.distribution.list_devices())
    else:
        import tensorflow as tf

        devices = tf.distribute.get_strategy().num_replicas_in_sync
    if batch_size % devices:
        raise app.UsageError(
            f"--batch_size must be a multiple of the {devices} devices. "
            f"Received: {batch_size}"
        )
    return devices


def shared_out(data, batch_size):
    """Arrays of `data` without the few last images that do not divide by `shares`.

    JAX takes no others, and TensorFlow none in a first batch. A replica that is given
    no image would make the statistics of its batch normalization NaN.
    """
    devices = shares(batch_size)

    def cut(images, labels):
        count = len(images) // devices * devices
        return images[:count], labels[:count]

    train, validation, test = (cut(*pair) for pair in data[:3])
    return data._replace(
        train=train, validation=validation, test=test, count=len(train[0])
    )
