"""MixNet-S: depthwise convolutions with kernels of several sizes in one layer."""

from typing import NamedTuple

from keras import layers, ops


class Stage(NamedTuple):
    """Blocks of one output width; the stride is that of the first.

    Attributes:
        repeats: Number of blocks.
        kernels: Sizes of the depthwise kernels, each on a part of the channels.
        expand: Number of parts in which the pointwise expansion is made.
        project: Number of parts in which the pointwise projection is made.
        strides: Of the first block.
        ratio: Width within the block over that of its input.
        filters: Output width.
        squeeze: Width of squeeze-and-excitation over the input's; 0 for none.
        activation: Of everything in the block.
    """

    repeats: int
    kernels: tuple[int, ...]
    expand: int
    project: int
    strides: int
    ratio: int
    filters: int
    squeeze: float = 0
    activation: str = "swish"


# Figure 5 of the paper, with the parts and ratios of the authors' code.
STAGES = (
    Stage(1, (3,), 1, 1, 1, 1, 16, activation="relu"),
    Stage(1, (3,), 2, 2, 2, 6, 24, activation="relu"),
    Stage(1, (3,), 2, 2, 1, 3, 24, activation="relu"),
    Stage(1, (3, 5, 7), 1, 1, 2, 6, 40, 0.5),
    Stage(3, (3, 5), 2, 2, 1, 6, 40, 0.5),
    Stage(1, (3, 5, 7), 1, 2, 2, 6, 80, 0.25),
    Stage(2, (3, 5), 1, 2, 1, 6, 80, 0.25),
    Stage(1, (3, 5, 7), 2, 2, 1, 6, 120, 0.5),
    Stage(2, (3, 5, 7, 9), 2, 2, 1, 3, 120, 0.5),
    Stage(1, (3, 5, 7, 9, 11), 1, 1, 2, 6, 200, 0.5),
    Stage(2, (3, 5, 7, 9), 1, 2, 1, 6, 200, 0.5),
)


def mixnet_s(x):
    """MixNet-S: 4,134,606 parameters with the logits of ImageNet.

    Reference:
        - [Tan, Le, 2019](https://arxiv.org/abs/1907.09595), figure 5
    """
    x = _norm(_pointwise(x, 16, kernel_size=3, strides=2), "relu")
    for stage in STAGES:
        for block in range(stage.repeats):
            x = mixnet_block(x, stage, strides=stage.strides if block == 0 else 1)
    x = _norm(_pointwise(x, 1536), "relu")
    x = layers.GlobalAveragePooling2D()(x)
    return layers.Dropout(0.2)(x)


def mixnet_block(x, stage, strides):
    """Expands, filters each part of the channels with its own kernel, projects."""
    width, inputs = x.shape[-1], x
    if stage.ratio > 1:
        x = _grouped(x, width * stage.ratio, stage.expand)
        x = _norm(x, stage.activation)
    parts = _split(x, len(stage.kernels))
    parts = [
        layers.DepthwiseConv2D(
            size,
            strides=strides,
            padding="same",
            use_bias=False,
            depthwise_initializer="he_normal",
        )(part)
        for size, part in zip(stage.kernels, parts, strict=True)
    ]
    x = _norm(_join(parts), stage.activation)
    if stage.squeeze:
        gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
        gate = _pointwise(gate, int(width * stage.squeeze), use_bias=True)
        gate = layers.Activation(stage.activation)(gate)
        gate = _pointwise(gate, x.shape[-1], use_bias=True)
        x = layers.Multiply()([x, layers.Activation("sigmoid")(gate)])
    x = _norm(_grouped(x, stage.filters, stage.project))
    return layers.Add()([x, inputs]) if x.shape == inputs.shape else x


def _split(x, count):
    """Parts of the channels; the first takes what is left over."""
    if count == 1:
        return [x]
    size = x.shape[-1] // count
    first = x.shape[-1] - size * (count - 1)
    return ops.split(x, list(range(first, x.shape[-1], size)), axis=-1)


def _join(parts):
    return layers.Concatenate()(parts) if len(parts) > 1 else parts[0]


def _grouped(x, filters, count):
    # Not `Conv2D(groups=count)`: TensorFlow has no gradient of that on a CPU.
    return _join([_pointwise(part, filters // count) for part in _split(x, count)])


def _pointwise(x, filters, kernel_size=1, strides=1, use_bias=False):
    return layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding="same",
        use_bias=use_bias,
        kernel_initializer="he_normal",
    )(x)


def _norm(x, activation="linear"):
    x = layers.BatchNormalization(momentum=0.99, epsilon=1e-3)(x)
    return layers.Activation(activation)(x)
