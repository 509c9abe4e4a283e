"""Sparse models in small files, which others read without this package."""

import pathlib
import re

import keras

from keras_sparsity.files import read_archive, write_archive, written_whole
from keras_sparsity.selection import check_model, check_plain


def save_model(model, path):
    """Saves a plain model in a `.keras` file that is as small as its zeros make it.

    The file is an ordinary Keras archive whose members are compressed:
    `keras.saving.load_model` reads it without this package, and returns what it would
    of `model.save`, bit by bit: weights, optimizer and its state, losses and metrics.

    Args:
        model: A built `keras.Model` without objects of this package: what `finalize`,
            `prune` and `Trail` return.
        path: Path of the file, ending in `.keras`.

    Raises:
        TypeError: If `model` is no `keras.Model`.
        ValueError: If it is not built, or holds an object of this package, as HALO, LTP
            or `SparsityOptimizer`; if `path` ends otherwise.
        OSError: If the file cannot be written. One that was there stays as it was.

    Example:

    ```python
    ks.save_model(ks.finalize(model), "small.keras")
    model = keras.saving.load_model("small.keras")
    ```
    """
    check_model(model, "save_model", rewritable=False)
    check_plain(model, "save_model", _ours_in_config(model))
    path = _checked_path(path, ".keras")
    with written_whole(path) as beside:
        model.save(beside)
        write_archive(beside, read_archive(beside))


def export_litert(model, path):
    """Exports a plain model to a LiteRT (TensorFlow Lite) file with sparse weights.

    Weights of dense, convolution and depthwise layers with a part of zeros of about a
    third or more are stored as their nonzeros and where they are; the results are those
    of a dense file. This needs the TensorFlow backend. What LiteRT has no operation
    for, as recurrent layers and float16 products, becomes one of TensorFlow, as in
    `Model.export`: running such a file takes the Flex delegate.

    The file is smaller everywhere. **It is not faster on x86 with AVX**, where LiteRT
    makes the weights dense when it loads them. On ARM and in WebAssembly it is faster
    for convolutional networks with float weights of the kind that XNNPACK's sparse
    inference takes: a 3x3 convolution with stride 2 of 3 channels, then 1x1
    convolutions of which two thirds or more are zero, depthwise 3x3 and 5x5
    convolutions, additions and activations, up to a global average pooling. Other
    layers, dense ones too, run dense there as well.

    Args:
        model: A built `keras.Model` that no method governs: what `finalize`, `prune`
            and `Trail` return.
        path: Path of the file, ending in `.tflite`.

    Raises:
        TypeError: If `model` is no `keras.Model`.
        ValueError: If it is not built, or a method still governs its weights; if `path`
            ends otherwise.
        RuntimeError: If the backend is not TensorFlow, or LiteRT's converter fails.
        OSError: If the file cannot be written. One that was there stays as it was.

    Example:

    ```python
    ks.export_litert(ks.prune(model, 0.95), "small.tflite")
    ```

    Reference:

    - [Elsen et al., Fast Sparse ConvNets](https://arxiv.org/abs/1911.09723)
    """
    check_model(model, "export_litert", rewritable=False)
    check_plain(model, "export_litert")
    path = _checked_path(path, ".tflite")
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "`export_litert` needs the TensorFlow backend. Received: backend="
            f"'{keras.backend.backend()}'. Save the model with `save_model`, and let "
            "another process convert the file: KERAS_BACKEND=tensorflow "
            "python -m keras_sparsity convert model.keras model.tflite"
        )
    import tensorflow as tf

    with written_whole(path) as beside:
        try:
            model.export(
                beside,
                format="litert",
                verbose=False,
                optimizations=[tf.lite.Optimize.EXPERIMENTAL_SPARSITY],
            )
        except OSError:
            raise
        except Exception as error:  # the converter's own class is not public
            raise RuntimeError(
                f"LiteRT cannot convert model '{model.name}'. Its converter said: "
                f"{str(error).strip()}"
            ) from error


def _ours_in_config(model):
    """The classes of this package that loading the file of `model` would need."""
    return re.findall(r'"keras_sparsity>(\w+)"', model.to_json())


def _checked_path(path, suffix):
    path = pathlib.Path(path)
    if path.suffix != suffix:
        raise ValueError(
            f"Argument `path` must end in '{suffix}'. Received: path='{path}'"
        )
    return path
