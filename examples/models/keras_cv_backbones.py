"""Backbones of keras-cv, by the name of a preset."""

import pathlib

from keras import Model, layers

from models.applications import pixels

PREFIX = "keras_cv/"


def backbone(x, name, pretrained):
    """Pooled features of a backbone of keras-cv.

    Args:
        x: Images.
        name: `keras_cv/` and the name of a preset, such as `resnet50`, or the
            folder of one that was downloaded before.
        pretrained: Whether to load the preset's weights too.
    """
    try:
        import keras_cv
    except ImportError as error:
        raise ImportError(
            f"{name} is in keras-cv, which needs TensorFlow whatever the backend. "
            'Install both with `pip install "keras-sparsity[keras-cv,tensorflow]"`.'
        ) from error
    families = [c for n, c in vars(keras_cv.models).items() if n.endswith("Backbone")]
    handles = {
        preset: about["kaggle_handle"]
        for family in families
        for preset, about in family.presets.items()
        if "kaggle_handle" in about
    }
    preset = name.removeprefix(PREFIX)
    if preset not in handles and not pathlib.Path(preset).is_dir():
        raise ValueError(
            f"keras-cv has no preset {preset}. Expected a folder or one of "
            f"{', '.join(sorted(handles))}."
        )
    handle = handles.get(preset, preset)
    (base,) = keras_cv.models.ResNetBackbone.__bases__  # of all, but not public
    try:
        network = base.from_preset(
            handle, load_weights=pretrained, include_rescaling=True
        )
    except Exception as error:  # of many kinds: network, disk, what is in the files
        source = f"the files of {handle}"
        if handle.startswith("kaggle://"):
            path = handle.removeprefix("kaggle://")
            source = f'the folder that `kagglehub.model_download("{path}")` returns'
        raise RuntimeError(
            f"{name} could not be loaded: {error}. From a machine with a network copy "
            f"{source}, and give keras_cv/FOLDER."
        ) from error
    # A plain model: keras-cv's own class cannot be rebuilt from another's layers.
    x = Model(network.input, network.output, name="backbone")(pixels(x))
    return layers.GlobalAveragePooling2D()(x)
