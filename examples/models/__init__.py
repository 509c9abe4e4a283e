"""The networks of the examples: functional models that return logits."""

import functools
import pathlib

from keras import Input, Model, layers

from models import applications, keras_cv_backbones
from models.alexnet import alexnet
from models.cifar_resnet import cifar_resnet
from models.lenet import lenet5, lenet_300_100, small_cnn
from models.mixnet import mixnet_s
from models.vgg import vgg_like

# From images to features.
FAMILIES = {
    "small_cnn": small_cnn,
    "lenet_300_100": lenet_300_100,
    "lenet5": lenet5,
    "vgg_like": vgg_like,
    "resnet20": functools.partial(cifar_resnet, blocks=3),
    "cifar_resnet50": functools.partial(cifar_resnet, blocks=8),
    "alexnet": alexnet,
    "mixnet_s": mixnet_s,
}

NETWORKS = (*FAMILIES, *applications.MODULES)
EXPECTED = f"must be one of {', '.join(NETWORKS)}, or keras_cv/PRESET"


def is_known(name):
    """Whether `build` makes a network of this name, as far as the name tells."""
    return name in NETWORKS or name.startswith(keras_cv_backbones.PREFIX)


def build(name, input_shape, classes, weights=None):
    """Builds the network called `name` for images of `input_shape`.

    Args:
        name: One of `NETWORKS`, or `keras_cv/` and a preset of keras-cv: the name of
            one, or the folder that holds one.
        input_shape: `(height, width, channels)` of one image.
        classes: Number of classes, the length of the logits.
        weights: `None` for new ones; `"imagenet"` for those that Keras or keras-cv
            has of this network; or the file of a model of the same network.
            Defaults to `None`.

    Returns:
        An uncompiled functional model, of images as `data.load` standardizes them.
    """
    if not is_known(name):
        raise ValueError(
            f"Argument `name` must be one of {', '.join(NETWORKS)}, or keras_cv/ and a "
            f"preset of keras-cv. Received: name={name}"
        )
    pretrained = weights == "imagenet"
    if pretrained and name in FAMILIES:
        raise ValueError(
            f"There are no ImageNet weights for {name}. Expected `weights` to be the "
            "file of a model trained before, or None to start from new ones. "
            f"Received: weights={weights}"
        )
    if weights and not pretrained and not pathlib.Path(weights).is_file():
        raise ValueError(
            "Argument `weights` must be imagenet or a file that is there. "
            f"Received: weights={weights}"
        )
    inputs = Input(input_shape)
    if name in applications.MODULES:
        x = applications.application(inputs, name, classes, pretrained)
        outputs = layers.Activation("linear", dtype="float32", name="logits")(x)
    else:
        if name in FAMILIES:
            x = FAMILIES[name](inputs)
        else:
            x = keras_cv_backbones.backbone(inputs, name, pretrained)
        # Logits stay in float32 under a mixed precision policy.
        outputs = layers.Dense(classes, dtype="float32", name="logits")(x)
    model = Model(inputs, outputs, name=pathlib.Path(name).name)
    if weights and not pretrained:
        model.load_weights(weights)
    return model
