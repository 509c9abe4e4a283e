"""Labelled images: scikit-learn's digits, or any set of tensorflow-datasets."""

import math
import pathlib
import zipfile
from typing import Any, NamedTuple

import keras
import numpy as np
import tfds_source


class Data(NamedTuple):
    """Three sets, each a pair `(images, labels)`, and what there is to know of them.

    Images are float32 of shape `(count, height, width, channels)`, standardized
    by the mean and the standard deviation of the training images, per channel. Sets
    that are read from disk while they are used are pairs of a `tf.data.Dataset` of
    batches and `None`: what `fit` and `evaluate` take for `x` and `y` either way.

    Attributes:
        train, validation, test: The sets.
        classes: Number of classes.
        image_shape: `(height, width, channels)`.
        count: Number of training images.
        follow: Callback that tells a set read from disk which epoch it is; `None`
            for arrays.
    """

    train: tuple[Any, Any]
    validation: tuple[Any, Any]
    test: tuple[Any, Any]
    classes: int
    image_shape: tuple[int, ...]
    count: int
    follow: keras.callbacks.Callback | None = None

    def for_statistics(self, batch_size, count=10_000):
        """Inputs for `ks.recalibrate`: `count` of the training images, or all.

        Read from disk, in batches of `batch_size`, they are those that the first epoch
        begins with, augmented as they are there.
        """
        images, labels = self.train
        if labels is not None:
            return images[:count]
        self.follow.on_epoch_begin(0, None)  # whichever epoch came last
        return images.take(math.ceil(count / batch_size))


class Batches(keras.utils.PyDataset):
    """Batches of arrays, in an order that is a function of the seed and the epoch.

    A training that goes on at a later epoch meets the order that it would have met.
    `fit` must be given the callback `follow`, which says which epoch it is, and
    `shuffle=False`, or Keras shuffles the batches once more.

    Args:
        x, y: Arrays.
        batch_size: Images in a batch; the last one takes what is left.
        seed: Of the order, and of what `augment` draws.
        augment: Function of a batch of images and a `numpy.random.Generator`, such
            as `crop_and_flip`. Defaults to `None`.
    """

    def __init__(self, x, y, batch_size, seed, augment=None):
        super().__init__()
        self.x, self.y = x, y
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.follow = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: self.begin(epoch)
        )
        self.begin(0)

    def begin(self, epoch):
        self.epoch = epoch
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.x))

    def __len__(self):
        return math.ceil(len(self.x) / self.batch_size)

    def __getitem__(self, index):
        start = index * self.batch_size
        rows = self.order[start : start + self.batch_size]
        x = self.x[rows]
        if self.augment:
            generator = np.random.default_rng([self.seed, self.epoch, index])
            x = self.augment(x, generator)
        return x, self.y[rows]


def crop_and_flip(images, generator, padding=4):
    """Each image shifted by up to `padding` pixels, zeros moving in, or mirrored too.

    The standard augmentation of CIFAR: a random crop of the padded image, and a
    horizontal flip of every other one. Zero is the mean of standardized images.
    """
    count, height, width, _ = images.shape
    edges = (padding, padding)
    padded = np.pad(images, ((0, 0), edges, edges, (0, 0)))
    top, left = generator.integers(2 * padding + 1, size=(2, count, 1))
    rows = top + np.arange(height)
    columns = left + np.arange(width)
    mirrored = generator.random(count) < 0.5
    columns[mirrored] = columns[mirrored, ::-1]
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None]]


def load(
    name,
    data_dir=None,
    download=False,
    image_size=None,
    validation=0.1,
    seed=0,
    count=None,
):
    """Loads a data set and holds a validation set out of its training images.

    Args:
        name: `"digits"`, the name of an image classification data set of
            tensorflow-datasets, such as `"fashion_mnist"`, or the path of a file
            `....npz` with the arrays `x_train`, `y_train`, `x_test` and `y_test`,
            images in 0 to 255, of shape `(count, height, width[, channels])`.
        data_dir: Where tensorflow-datasets keeps its data. Defaults to its own
            choice, `~/tensorflow_datasets`.
        download: Whether tensorflow-datasets may download what is not there.
        image_size: Height and width to resize the images of tensorflow-datasets
            to; the others have the size that they have. Defaults to `None`.
        validation: Fraction of the training images to hold out, in (0, 1).
        seed: Which images are held out.
        count: How many of the other images to train with, at most. Defaults to all.
    """
    if image_size and not is_of_tfds(name):
        raise ValueError(
            "`--image_size` is for data sets of tensorflow-datasets: the digits and "
            "arrays have the size that they have. "
            f"Received: --image_size={image_size} --dataset={name}"
        )
    if name == "digits":
        train, test, classes = _digits()
    elif name.endswith(".npz"):
        train, test, classes = _arrays(name)
    else:
        train, test, classes = _tfds(name, data_dir, download, image_size)
    (images, labels), held_out = _split(*train, validation, seed)
    train = images[:count], labels[:count]  # in random order since the split
    mean = train[0].mean((0, 1, 2))
    deviation = train[0].std((0, 1, 2))

    def standardize(images, labels):
        return (images - mean) / deviation, labels

    return Data(
        *(standardize(*pair) for pair in (train, held_out, test)),
        classes=classes,
        image_shape=images.shape[1:],
        count=len(train[0]),
    )


def is_of_tfds(name):
    """Whether a data set comes through tensorflow-datasets."""
    return name != "digits" and not name.endswith(".npz")


def _split(images, labels, fraction, seed):
    """Splits off a random `fraction` of the images."""
    order = np.random.default_rng(seed).permutation(len(images))
    kept, held_out = np.split(order, [round(len(images) * (1 - fraction))])
    if not (kept.size and held_out.size):
        raise ValueError(
            "Of the images some must be left to train with, and some to choose by. "
            f"Received: {len(images)} images, of which a part of {fraction:g} is to be "
            "held out"
        )
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
    if not pathlib.Path(path).is_file():
        raise ValueError(f"There is no file `{path}`.")
    try:
        with open(path, "rb") as raw, np.load(raw) as file:
            arrays = dict(file)
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"`{path}` is no .npz file, or is cut: {error}") from error
    needed = [f"{kind}_{part}" for part in ("train", "test") for kind in "xy"]
    if not {*needed} <= {*arrays}:
        raise ValueError(
            f"`{path}` must have the arrays {', '.join(needed)}. "
            f"Received: {', '.join(arrays)}"
        )
    x_train, y_train, x_test, y_test = (arrays[name] for name in needed)
    train, test = _scaled(path, x_train, y_train), _scaled(path, x_test, y_test)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"`{path}` must have training and test images of one shape. "
            f"Received: {train[0].shape[1:]} and {test[0].shape[1:]}"
        )
    classes = int(y_train.max()) + 1
    if y_test.max() >= classes:
        raise ValueError(
            f"`{path}` must have a training image of every class. Received: labels to "
            f"{y_train.max()} to train with, and to {y_test.max()} to test"
        )
    return train, test, classes


def _scaled(path, images, labels):
    """Images of one channel may come without that axis, as Keras has them."""
    labels = labels.ravel()
    if images.ndim not in (3, 4) or not len(images) == len(labels) > 0:
        raise ValueError(
            f"`{path}` must have images of shape (count, height, width[, channels]), "
            f"and a label for each. Received: images of shape {images.shape}, "
            f"{len(labels)} labels"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            f"`{path}` must have labels that are whole numbers from 0. "
            f"Received: labels of {labels.dtype} from {labels.min()}"
        )
    if images.ndim == 3:
        images = images[..., None]
    return (images / 255).astype("float32"), labels


def _tfds(name, data_dir, download, image_size):
    import tensorflow as tf

    builder, image, label = tfds_source.image_set(name, data_dir, download)
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
        return next(examples.batch(size).as_numpy_iterator())

    train, test = _split_names(builder.info.splits)
    return read(train), read(test), builder.info.features[label].num_classes


def _split_names(splits):
    """Training and test split, a fifth of the training data where no other is."""
    for test in ("test", "validation"):
        if test in splits:
            return "train", test
    return "train[:80%]", "train[80%:]"
