"""How many multiplications and additions each weight takes part in."""

import math
import re

import keras


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
            found[id(weight)] = _product([steps, outer if uses is None else uses])
    return found


def _uses(layer, weight, shape):
    if len(weight.shape) < 2 or "bias" in weight.name or _looks_up(layer):
        return 0
    if shape is None:
        return None
    if hasattr(layer, "equation"):
        return _einsum_uses(layer.equation, shape, weight.shape)
    if hasattr(layer, "kernel_size") and hasattr(layer, "data_format"):
        transposed = hasattr(layer, "output_padding")
        seen = shape if transposed else layer.compute_output_shape(shape)
        first = layer.data_format == "channels_first"
        return _product(seen[2:] if first else seen[1:-1])
    return _product(shape[1:-1])


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
