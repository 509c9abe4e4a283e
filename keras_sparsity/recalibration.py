"""Batch statistics measured anew, for weights that are no longer what they were."""

import contextlib

import keras
import numpy as np
from keras import tree

from keras_sparsity.checks import check_integer
from keras_sparsity.selection import to_array, walk


def recalibrate(model, dataset, batch_size=32):
    """Sets the statistics of batch normalization to those of `dataset`, in place.

    ```
    moving_mean     = mean over the batches of the mean of each
    moving_variance = mean over the batches of the variance of each
    ```

    A batch counts by its size, and once for each call of a layer that is shared.

    A prune, or a gate that turns from soft to hard, changes what the layers after it
    receive, and statistics that were gathered before no longer fit. No label is
    needed, nothing is trained: each batch passes through the model once, in inference
    (hard gates, no dropout), but for batch normalization, which normalizes each batch
    by its own statistics while it gathers them. A layer that is frozen is left as it
    is, and so is a model without batch normalization.

    Args:
        model: A built `keras.Model` of any kind, sparse, pruned or plain.
        dataset: Inputs as `keras.Model.predict` takes them: an array, a structure of
            arrays of equal length, or an iterable of batches, of which tuples are
            taken as `(x, y)` or `(x, y, sample_weight)`. Some thousand examples of
            the training data are enough.
        batch_size: Integer > 0, for arrays: those that training was done with give
            the same statistics. Defaults to 32.

    Returns:
        `model`.

    Raises:
        ValueError: If `batch_size` is no such integer, or `dataset` is empty or not
            what the model takes: labels among arrays, or a list of batches, which are
            several inputs to Keras, or if statistics become NaN or infinite. They are
            then as before, as they are if a batch fails.

    Example:

    ```python
    small = ks.prune(model, 0.95)
    ks.recalibrate(small, x_train[:10_000], batch_size=100)
    ```

    Reference:

    - [Wu and Johnson, Rethinking "Batch" in BatchNorm](
        https://arxiv.org/abs/2105.07576), section 3: "PreciseBN".
    """
    batch_size = check_integer("batch_size", batch_size, at_least=1)
    layers = [
        layer
        for layer in walk(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    statistics = [v for layer in layers for v in layer.non_trainable_variables]
    before = [(variable, to_array(variable)) for variable in statistics]
    empty = True
    try:
        with _gathering(layers), _without_gradients():
            for x in _batches(model, dataset, batch_size):
                model(x, training=False)
                empty = False
        if not all(np.isfinite(to_array(variable)).all() for variable in statistics):
            raise ValueError(
                "Argument `dataset` must lead to finite statistics. Received inputs, "
                f"or weights of '{model.name}', that lead to NaN or infinity."
            )
    except BaseException:
        for variable, value in before:
            variable.assign(value)
        raise
    if empty:
        raise ValueError(
            "Argument `dataset` must have at least one batch of inputs. "
            f"Received: dataset={dataset!r}"
        )
    return model


@contextlib.contextmanager
def _gathering(layers):
    """Lets `layers` gather statistics in a model that does inference."""
    momenta = [layer.momentum for layer in layers]
    # Keras asks for the mode of a whole model: there dropout and soft gates would come
    # along. On the objects, not the class, and for the time being.
    for layer in layers:
        layer.call = _call_that_gathers(layer)
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            del layer.call
            layer.momentum = momentum


def _without_gradients():
    """No graph of a batch: torch would keep all until Python collects them."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def _call_that_gathers(layer):
    """A call of `layer` in training, with the momentum for the mean of all calls."""
    seen = 0

    def call(inputs, training=None, **kwargs):
        nonlocal seen
        count = inputs.shape[0]
        layer.momentum = seen / (seen + count)
        seen += count
        return type(layer).call(layer, inputs, training=True, **kwargs)

    return call


def _batches(model, dataset, batch_size):
    leaves = tree.flatten(dataset)
    if leaves and all(hasattr(leaf, "shape") for leaf in leaves):
        _check_arrays(model, leaves)
        for start in range(0, len(leaves[0]), batch_size):
            yield tree.map_structure(
                lambda array, start=start: array[start : start + batch_size], dataset
            )
    elif isinstance(dataset, keras.utils.PyDataset):
        for index in range(len(dataset)):
            yield keras.utils.unpack_x_y_sample_weight(dataset[index])[0]
    elif hasattr(dataset, "__iter__"):
        for batch in dataset:
            yield keras.utils.unpack_x_y_sample_weight(batch)[0]
    else:
        raise ValueError(
            "Argument `dataset` must be arrays or an iterable of batches. "
            f"Received: dataset={dataset!r}"
        )


def _check_arrays(model, arrays):
    """What is too much would not be missed: Keras takes the inputs that it needs."""
    shapes = [tuple(array.shape) for array in arrays]
    if () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "Argument `dataset` must have arrays of equal length. "
            f"Received: arrays of shapes {shapes}"
        )
    inputs = len(getattr(model, "inputs", None) or arrays)  # a subclass names none
    if len(arrays) != inputs:
        raise ValueError(
            f"Argument `dataset` must have an array for each of the {inputs} inputs "
            f"of '{model.name}', and none of labels. Batches come as an iterator or a "
            f"data set, not as a list. Received: arrays of shapes {shapes}"
        )
