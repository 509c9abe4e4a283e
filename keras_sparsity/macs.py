"""How many multiplications and additions each weight takes part in."""

import math
import re

import keras
from keras import tree

from keras_sparsity.rebuild import clone, random_state_kept
from keras_sparsity.selection import calls, is_rewritable, plain_weights, unwrapped

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


def uses_in_model(model) -> dict:
    """How often each weight of a model is multiplied, per sample, in all its calls.

    Returns:
        As `uses_per_weight`.
    """
    found: dict[int, list] = {id(w): [] for w in plain_weights(model)}
    if not hasattr(model, "inputs"):  # a Sequential with layers that cannot be traced
        return dict.fromkeys(found)
    for node in calls(model):
        if isinstance(node.operation, keras.Layer):
            arguments = node.arguments.args, node.arguments.kwargs
            for key, uses in _uses_in_call(node.operation, *arguments).items():
                found[key].append(uses)
    return {key: None if None in uses else sum(uses) for key, uses in found.items()}


def _uses_in_call(layer, args, kwargs):
    layer = unwrapped(layer)
    weights = plain_weights(layer)
    try:
        if _looks_up(layer) and (kwargs.get("reverse") or True in args[1:]):
            return _uses_reversed(weights, args[0])
        sized = (
            layer if _is_built_for(layer, args, kwargs) else _copy(layer, args, kwargs)
        )
        uses = uses_in_model(sized) if is_rewritable(sized) else uses_per_weight(sized)
        pairs = zip(weights, plain_weights(sized), strict=True)
        return {id(weight): uses[id(same)] for weight, same in pairs}
    except Exception:  # a layer may be anything, and a report must not fail for it
        return dict.fromkeys(map(id, weights))


def _uses_reversed(weights, inputs):
    """Of `ReversibleEmbedding(...)(inputs, reverse=True)`: a product with its table."""
    *_, table = [w for w in weights if w.name.endswith("embeddings")]
    unused = dict.fromkeys(map(id, weights), 0)
    return unused | {id(table): _product(inputs.shape[1:-1])}


def _is_built_for(layer, args, kwargs):
    """Whether `layer` was built for inputs of this size (or does not say for which)."""
    if not layer.weights:
        return True
    if is_rewritable(layer):
        built = [size for x in layer.inputs for size in x.shape]
    else:
        built = tree.flatten(layer.get_build_config() or {})
    given = [
        size
        for x in tree.flatten((args, kwargs))
        if isinstance(x, keras.KerasTensor)
        for size in x.shape
    ]
    return given[: len(built)] == built


def _copy(layer, args, kwargs):
    """A layer of the same config as `layer`, built for inputs of this size."""
    # Not the tensors of the model: they would keep the copy alive.
    args, kwargs = tree.map_structure(
        lambda x: (
            keras.Input(batch_shape=x.shape, dtype=x.dtype)
            if isinstance(x, keras.KerasTensor)
            else x
        ),
        (args, kwargs),
    )
    with random_state_kept():
        if is_rewritable(layer):
            return keras.models.clone_model(layer, input_tensors=args[0])
        copy = clone(layer)
        copy(*args, **kwargs)
    return copy


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
