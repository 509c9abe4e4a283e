"""AlexNet for ImageNet."""

from keras import layers


def alexnet(x):
    """AlexNet in one tower: 61,100,840 parameters with the logits of ImageNet.

    The variant that torchvision has, with which LTP's 79.1 % of top-5 agree: 64, 192,
    384, 256 and 256 channels, no groups, no response normalization.

    Reference:
        - [Krizhevsky, 2014](https://arxiv.org/abs/1404.5997), the one-tower network
    """
    x = layers.ZeroPadding2D(2)(x)
    x = layers.Conv2D(64, 11, strides=4, activation="relu")(x)
    x = layers.MaxPooling2D(3, strides=2)(x)
    x = layers.Conv2D(192, 5, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D(3, strides=2)(x)
    for width in (384, 256, 256):
        x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D(3, strides=2)(x)
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dropout(0.5)(x)
        x = layers.Dense(4096, activation="relu")(x)
    return x
