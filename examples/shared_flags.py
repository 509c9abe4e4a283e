"""The flags that `train.py` and `compare.py` share: network, data set, precision."""

import math

import models
from absl import app, flags

flags.DEFINE_string(
    "model",
    "small_cnn",
    f"Network to train: {', '.join(models.NETWORKS)}, or keras_cv/ and a preset of "
    "keras-cv.",
)
flags.DEFINE_string(
    "dataset",
    "digits",
    "digits, an image classification data set of tensorflow-datasets, or the path of "
    "an .npz file with x_train, y_train, x_test and y_test.",
)
flags.DEFINE_string("data_dir", None, "Where tensorflow-datasets keeps its data.")
flags.DEFINE_bool("download", False, "Let tensorflow-datasets download the data set.")
flags.DEFINE_integer(
    "image_size", None, "Height and width to resize images to.", lower_bound=1
)
flags.DEFINE_float(
    "validation_split", 0.1, "Part of the training images held out, in (0, 1)."
)
flags.DEFINE_integer(
    "images", None, "Train with so many images of the others at most.", lower_bound=1
)
flags.DEFINE_float(
    "momentum", 0.9, "Momentum of sgd, everywhere.", lower_bound=0, upper_bound=1
)
flags.DEFINE_float("weight_decay", 0, "Weight decay of the weights.", lower_bound=0)
flags.DEFINE_enum(
    "precision",
    "float32",
    ["float32", "mixed_bfloat16", "mixed_float16"],
    "Keras dtype policy.",
)

flags.register_validator("model", models.is_known, models.EXPECTED)
flags.register_validator(
    "validation_split", lambda part: 0 < part < 1, "must be in (0, 1)"
)


def check_finite(values):
    """Refuses what absl lets through: NaN is on neither side of a bound.

    Args:
        values: Dict of the values of flags by name.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise app.UsageError(f"--{name} must be finite. Received: {value}")
