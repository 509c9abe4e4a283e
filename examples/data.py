"""Labelled images as arrays: scikit-learn's digits, or any set of
tensorflow-datasets."""

import math
import pathlib
from typing import NamedTuple

import keras
import numpy as np


class Data(NamedTuple):
    """Three sets, each a pair `(images, labels)`, and the number of classes.

    Images are float32 of shape `(count, height, width, channels)`, standardized
    by the mean and the standard deviation of the training images, per channel.
    """

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: int


class Batches(keras.utils.PyDataset):
    """Batches of arrays, in an order that is a function of the seed and the epoch.

    A training that goes on at a later epoch meets the order that it would have met.
    `fit` must be given the callback `follow`, which says which epoch it is, and
    `shuffle=False`, or Keras shuffles the batches once more.
    """

    def __init__(self, x, y, batch_size, seed):
        super().__init__()
        self.x, self.y = x, y
        self.batch_size = batch_size
        self.seed = seed
        self.follow = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: self.begin(epoch)
        )
        self.begin(0)

    def begin(self, epoch):
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.x))

    def __len__(self):
        return math.ceil(len(self.x) / self.batch_size)

    def __getitem__(self, index):
        start = index * self.batch_size
        rows = self.order[start : start + self.batch_size]
        return self.x[rows], self.y[rows]


def load(name, data_dir=None, download=False, image_size=None, validation=0.1, seed=0):
    """Loads a data set and holds a validation set out of its training images.

    Args:
        name: `"digits"`, the name of an image classification data set of
            tensorflow-datasets, such as `"fashion_mnist"`, or the path of a file
            `....npz` with the arrays `x_train`, `y_train`, `x_test` and `y_test`,
            images in 0 to 255.
        data_dir: Where tensorflow-datasets keeps its data. Defaults to its own
            choice, `~/tensorflow_datasets`.
        download: Whether tensorflow-datasets may download what is not there.
        image_size: Height and width to resize the images of tensorflow-datasets
            to. Defaults to the size that they have.
        validation: Fraction of the training images to hold out, in (0, 1).
        seed: Which images are held out.
    """
    if name == "digits":
        train, test, classes = _digits()
    elif name.endswith(".npz"):
        train, test, classes = _arrays(name)
    else:
        train, test, classes = _tfds(name, data_dir, download, image_size)
    train, held_out = _split(*train, validation, seed)
    mean = train[0].mean((0, 1, 2))
    deviation = train[0].std((0, 1, 2))

    def standardize(images, labels):
        return (images - mean) / deviation, labels

    return Data(
        standardize(*train), standardize(*held_out), standardize(*test), classes
    )


def _split(images, labels, fraction, seed):
    """Splits off a random `fraction` of the images."""
    order = np.random.default_rng(seed).permutation(len(images))
    kept, held_out = np.split(order, [round(len(images) * (1 - fraction))])
    return (images[kept], labels[kept]), (images[held_out], labels[held_out])


def _digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The digits are part of scikit-learn. Install it with "
            '`pip install "keras-sparsity[examples]"`.'
        ) from error
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype("float32")
    # The test set is the same whatever the seed of the run.
    train, test = _split(images, digits.target, fraction=0.2, seed=0)
    return train, test, 10


def _arrays(path):
    with np.load(path) as file:
        train, test = (
            ((file[f"x_{part}"] / 255).astype("float32"), file[f"y_{part}"].ravel())
            for part in ("train", "test")
        )
    return train, test, int(train[1].max()) + 1


def _tfds(name, data_dir, download, image_size):
    try:
        import tensorflow as tf  # reads the files, whatever the Keras backend
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"Data set `{name}` comes through tensorflow-datasets, which reads it "
            "with TensorFlow. Install both with "
            '`pip install "keras-sparsity[examples,tensorflow]"`.'
        ) from error
    folder = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    try:
        builder = tfds.builder(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"No data set is called `{name}`. Expected `digits` or a name of "
            f"tensorflow-datasets. {_contents(folder)}"
        ) from None
    if download:
        builder.download_and_prepare()
    elif not pathlib.Path(builder.data_path).exists():
        raise ValueError(
            f"Data set `{name}` is not there. {_contents(folder)} "
            "Choose another `--data_dir`, or let `--download` fetch it."
        )
    image, label = _image_and_label(builder.info)
    shape = builder.info.features[image].shape
    if image_size:
        shape = (image_size, image_size, shape[-1])
    elif None in shape:
        raise ValueError(
            f"The images of data set `{name}` are of several sizes. "
            "Choose one with `--image_size`."
        )

    def prepare(example):
        images = tf.cast(example[image], tf.float32) / 255
        if image_size:
            images = tf.image.resize(images, shape[:2])
        return images, example[label]

    def read(split):
        examples = builder.as_dataset(split=split).map(prepare)
        size = int(examples.cardinality())
        return tfds.as_numpy(examples.batch(size).get_single_element())

    train, test = _split_names(builder.info.splits)
    return read(train), read(test), builder.info.features[label].num_classes


def _image_and_label(info):
    """The names of the two features that a classifier learns from."""
    import tensorflow_datasets as tfds

    features = dict(info.features.items())
    image, label = info.supervised_keys or (None, None)
    if not (
        isinstance(features.get(image), tfds.features.Image)
        and isinstance(features.get(label), tfds.features.ClassLabel)
    ):
        raise ValueError(
            f"Data set `{info.name}` is not for image classification. Expected an "
            f"image and a class label as its supervised keys. "
            f"Received: {info.supervised_keys}"
        )
    return image, label


def _split_names(splits):
    """Training and test split, a fifth of the training data where no other is."""
    for test in ("test", "validation"):
        if test in splits:
            return "train", test
    return "train[:80%]", "train[80%:]"


def _contents(folder):
    names = sorted(path.name for path in folder.glob("*/") if path.is_dir())
    return f"{folder} has: {', '.join(names) or 'nothing'}."
