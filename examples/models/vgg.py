"""VGG for small images."""

from keras import layers


def vgg_like(x):
    """The 13 convolutions of VGG-16, with batch-norm, for images of 32 pixels.

    Without the last max-pooling, and with the logits as its only dense layer: this is
    the "VGG-like" network of HALO, with 14,710,464 convolution weights.

    Reference:
        - [Simonyan, Zisserman, 2014](https://arxiv.org/abs/1409.1556), configuration D
        - [Seto et al., 2020](https://arxiv.org/abs/2008.10183)
    """
    for stage, (width, depth) in enumerate(
        [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]
    ):
        if stage:
            x = layers.MaxPooling2D()(x)
        for _ in range(depth):
            x = layers.Conv2D(
                width,
                3,
                padding="same",
                use_bias=False,
                kernel_initializer="he_normal",
            )(x)
            x = layers.BatchNormalization(momentum=0.9)(x)
            x = layers.ReLU()(x)
    return layers.GlobalAveragePooling2D()(x)
