"""Networks of `keras.applications`, with ImageNet weights or without."""

import imagenet
import keras
from keras import layers

# Each module holds a network and the preprocessing that its weights were made with.
MODULES = {
    "ResNet50": keras.applications.resnet,
    "MobileNetV2": keras.applications.mobilenet_v2,
    "EfficientNetB0": keras.applications.efficientnet,
}


def pixels(x):
    """Pixels in [0, 255] again, from images standardized as ImageNet is.

    The networks are made for three channels: a gray image gives them all the same.
    """
    if x.shape[-1] == 1:
        x = layers.Concatenate()([x, x, x])
    scale = [255 * deviation for deviation in imagenet.DEVIATION]
    return layers.Rescaling(scale, [255 * mean for mean in imagenet.MEAN])(x)


def application(x, name, classes, pretrained):
    """Logits of the network of this name in `keras.applications`."""
    module = MODULES[name]
    if pretrained and classes != 1000:
        raise ValueError(
            f"The ImageNet weights of {name} are for its 1000 classes. Received a data "
            f"set of {classes}: start from new weights."
        )
    arguments = {
        "input_tensor": module.preprocess_input(pixels(x)),
        "classes": classes,
        "classifier_activation": None,
    }
    try:
        network = getattr(module, name)(
            weights="imagenet" if pretrained else None, **arguments
        )
    except Exception as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"The ImageNet weights of {name} could not be had: {error}. On a machine "
            f"with a network run `keras.applications.{name}()`, and copy its folder "
            "~/.keras/models to this one."
        ) from error
    return network.output
