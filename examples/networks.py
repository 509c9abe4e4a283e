"""The networks of the examples: functional models that return logits."""

import functools

from keras import Input, Model, layers


def build(name, input_shape, classes):
    """Builds the network called `name` for images of `input_shape`.

    Args:
        name: A key of `NETWORKS`.
        input_shape: `(height, width, channels)` of one image.
        classes: Number of classes, the length of the logits.

    Returns:
        An uncompiled functional model.
    """
    if name not in NETWORKS:
        raise ValueError(
            f"Argument `name` must be one of {', '.join(NETWORKS)}. "
            f"Received: name={name}"
        )
    inputs = Input(input_shape)
    x = NETWORKS[name](inputs)
    # Logits stay in float32 under a mixed precision policy.
    outputs = layers.Dense(classes, dtype="float32", name="logits")(x)
    return Model(inputs, outputs, name=name)


def small_cnn(x):
    x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(64, 3, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    return layers.Dense(64, activation="relu")(x)


def lenet_300_100(x):
    x = layers.Flatten()(x)
    x = layers.Dense(300, activation="relu")(x)
    return layers.Dense(100, activation="relu")(x)


def lenet5(x):
    x = layers.Conv2D(6, 5, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(16, 5, activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = layers.Dense(120, activation="relu")(x)
    return layers.Dense(84, activation="relu")(x)


def cifar_resnet(x, blocks):
    """The ResNet of `6 * blocks + 2` layers for small images.

    Three stages of basic blocks, 16, 32 and 64 channels wide; a 1x1 convolution
    on the shortcut where the shape changes.

    Reference:
        - [He et al., 2015](https://arxiv.org/abs/1512.03385), section 4.2
    """
    x = layers.ReLU()(_convolution(x, 16))
    for width in (16, 32, 64):
        for block in range(blocks):
            strides = 2 if width > 16 and block == 0 else 1
            y = layers.ReLU()(_convolution(x, width, strides=strides))
            y = _convolution(y, width)
            if strides > 1:
                x = _convolution(x, width, kernel_size=1, strides=strides)
            x = layers.ReLU()(layers.Add()([x, y]))
    return layers.GlobalAveragePooling2D()(x)


def _convolution(x, filters, kernel_size=3, strides=1):
    x = layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
    )(x)
    return layers.BatchNormalization(momentum=0.9)(x)


NETWORKS = {
    "small_cnn": small_cnn,
    "lenet_300_100": lenet_300_100,
    "lenet5": lenet5,
    "resnet20": functools.partial(cifar_resnet, blocks=3),
    "resnet50": functools.partial(cifar_resnet, blocks=8),
}
