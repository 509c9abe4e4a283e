"""The smallest networks: LeNet-300-100, LeNet-5 and a convolutional one."""

from keras import layers


def small_cnn(x):
    x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(64, 3, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    return layers.Dense(64, activation="relu")(x)


def lenet_300_100(x):
    """Two dense layers: 266,610 parameters with the logits of MNIST.

    Reference:
        - LeCun et al., 1998, Gradient-based learning applied to document recognition
    """
    x = layers.Flatten()(x)
    x = layers.Dense(300, activation="relu")(x)
    return layers.Dense(100, activation="relu")(x)


def lenet5(x):
    """LeNet-5 as in the code of HALO: 61,706 parameters with the logits of MNIST.

    Reference:
        - [Seto et al., 2020](https://arxiv.org/abs/2008.10183)
    """
    x = layers.Conv2D(6, 5, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(16, 5, activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = layers.Dense(120, activation="relu")(x)
    return layers.Dense(84, activation="relu")(x)
