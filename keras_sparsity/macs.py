"""How many multiplications and additions each weight takes part in."""

import collections
import math
import re

import keras

from keras_sparsity.selection import is_rewritable

# Keras' names for weights that are no factors of a matrix product.
_ADDED = ("bias", "beta")
_ELEMENTWISE = ("gamma", "alpha")


def uses_per_weight(layer, steps=1, outer=None) -> dict:
    """How often each weight in `layer` is multiplied, per sample.

    A dense weight works once per position of its input, one of a convolution once per
    position of its output (of its input, if it is transposed), one in a recurrent or
    `TimeDistributed` layer once per step, one of an embedding or a bias never. A layer
    of another kind is taken to work on the last axis, as a dense one. Weights at the
    image borders of a padded convolution are counted as everywhere else.

    Args:
        layer: A built layer.
        steps: Integer, how often the layer itself is called per sample.
        outer: Number of positions of the layer that this one is in, for layers that
            do not know their own, as the last one in `MultiHeadAttention`.

    Returns:
        Dict of `id(variable)` to a float, or to `None` where a size is not known.
    """
    shape = _input_shape(layer)
    found = {}
    inner_steps = steps
    if hasattr(layer, "cell") or isinstance(layer, keras.layers.TimeDistributed):
        inner_steps = _product([steps, shape[1] if shape else None])
    positions = _product(shape[1:-1]) if shape else None
    for inner in layer._layers:
        found.update(uses_per_weight(inner, inner_steps, positions or outer))
    for weight in layer.weights:
        if id(weight) not in found:
            uses = _uses(layer, weight, shape)
            if uses is None and not _is_convolutional_cell(layer):
                uses = outer
            found[id(weight)] = _product([steps, uses])
    return found


def calls_per_layer(model) -> dict:
    """How often each layer of a model is called, by `id(layer)`."""
    counts: collections.Counter = collections.Counter()
    layers = model.layers
    if isinstance(model, keras.Function):
        # Only the private nodes tell of a layer that is called more than once.
        nodes = model._nodes_by_depth.values()
        layers = [node.operation for level in nodes for node in level]
    for layer in layers:
        if is_rewritable(layer):
            counts.update(calls_per_layer(layer))
        else:
            counts[id(layer)] += 1
    return counts


def _uses(layer, weight, shape):
    if len(weight.shape) < 2 or weight.name in _ADDED or _looks_up(layer):
        return 0
    if weight.name in _ELEMENTWISE:
        return 1
    if shape is None or _is_convolutional_cell(layer):
        return None
    if hasattr(layer, "equation"):
        return _einsum_uses(layer.equation, shape, weight.shape)
    if hasattr(layer, "kernel_size") and hasattr(layer, "data_format"):
        transposed = hasattr(layer, "output_padding")
        seen = shape if transposed else layer.compute_output_shape(shape)
        first = layer.data_format == "channels_first"
        return _product(seen[2:] if first else seen[1:-1])
    return _product(shape[1:-1])


def _is_convolutional_cell(layer):
    return hasattr(layer, "kernel_size") and hasattr(layer, "recurrent_initializer")


def _looks_up(layer):
    return hasattr(layer, "embeddings_initializer")


def _einsum_uses(equation, shape, kernel_shape):
    """The product of all dimensions of an einsum, over the kernel's size."""
    given, kernel, _ = re.split(",|->", equation)
    head, dots, tail = given.partition("...")
    sizes = dict(zip(head, shape, strict=False))
    if tail:
        sizes.update(zip(tail, shape[-len(tail) :], strict=True))
    between = shape[len(head) : len(shape) - len(tail)] if dots else ()
    used = set(kernel.replace(".", ""))
    outer = [size for label, size in sizes.items() if label not in used]
    # The batch is the first dimension, whether it has a label or not.
    outer = [*between, *outer][1:] if not head else [*outer[1:], *between]
    return _product(outer)


def _input_shape(layer):
    config = layer.get_build_config() or {}
    # Of several inputs, as those of attention, the first.
    shapes = config.get("shapes_dict") or config
    shape = next(iter(shapes.values()), None)
    if not isinstance(shape, (tuple, list)):
        return None
    is_one = all(size is None or isinstance(size, int) for size in shape)
    return tuple(shape) if is_one else None


def _product(factors):
    factors = list(factors)
    if 0 in factors:
        return 0
    return None if None in factors else math.prod(factors)
