"""Data sets of tensorflow-datasets, opened, or the reason why not."""

import pathlib


def image_set(name, data_dir=None, download=False):
    """The builder of a data set whose files are there, its image and its label.

    The last two are names: of the features that a classifier learns from.

    Raises:
        ImportError: If what reads the files is not installed.
        ValueError: If there is no such data set, if it is not for image
            classification, or if its files are not there and cannot be had: says what
            to do.
    """
    try:
        import tensorflow  # noqa: F401 (reads the files, whatever the Keras backend)
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"Data set `{name}` comes through tensorflow-datasets, which reads it "
            "with TensorFlow. Install both with "
            '`pip install "keras-sparsity[examples,tensorflow]"`.'
        ) from error
    folder = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    try:
        found = tfds.builder(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"No data set is called `{name}`. Expected `digits`, the path of an .npz "
            "file, or a name of tensorflow-datasets, such as mnist, fashion_mnist, "
            f"cifar10, cifar100 or imagenet2012. {_contents(folder)}"
        ) from None
    except AssertionError as error:  # of a version or a config that it has not
        raise ValueError(f"Data set `{name}` is not there: {error}") from error
    image, label = _image_and_label(found.info)  # before a download for nothing
    if pathlib.Path(found.data_path).exists():
        return found, image, label
    by_hand = found.MANUAL_DOWNLOAD_INSTRUCTIONS
    manual = f" Some files must be fetched by hand: {by_hand}" if by_hand else ""
    if not download:
        raise ValueError(
            f"Data set `{name}` is not there. {_contents(folder)} "
            f"Choose another `--data_dir`, or let `--download` fetch it.{manual}"
        )
    try:
        found.download_and_prepare()
    except Exception as error:  # of many kinds: network, disk, files to fetch by hand
        raise ValueError(
            f"Data set `{name}` could not be downloaded to {folder}: {error}\n"
            "On a machine with a network run the same command with `--download`, and "
            f"copy its {found.data_path} to this one.{manual}"
        ) from error
    return found, image, label


def _image_and_label(info):
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


def _contents(folder):
    """What `folder` has whole, by name and version, or name, config and version."""
    infos = [
        info
        for levels in ("*/*", "*/*/*")
        for info in folder.glob(f"{levels}/dataset_info.json")
    ]
    names = sorted({info.relative_to(folder).parts[0] for info in infos})
    return f"{folder} has: {', '.join(names) or 'nothing'}."
