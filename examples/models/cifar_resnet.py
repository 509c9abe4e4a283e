"""Residual networks for small images."""

from keras import layers


def cifar_resnet(x, blocks):
    """The ResNet of `6 * blocks + 2` layers.

    Three stages of basic blocks, 16, 32 and 64 channels wide; a 1x1 convolution
    on the shortcut where the shape changes. ResNet-20 has 3 blocks in a stage; the
    "ResNet-50" of HALO has 8 and, with 100 classes, 764,404 parameters.

    Reference:
        - [He et al., 2015](https://arxiv.org/abs/1512.03385), section 4.2
        - [Seto et al., 2020](https://arxiv.org/abs/2008.10183)
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
