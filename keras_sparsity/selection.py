"""Which weights of a layer, which layers of a model, and the reason when not.

Whatever governs a weight, a regularizer or a wrapper, is a `keras.Layer` with one
method, `governed_weights()`. Everything else in the package asks only that.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
from keras import ops

Filters: TypeAlias = str | Sequence[str] | Callable[[Any], bool] | None

# Optimizers see variables and nothing else, so the name must tell.
_METHOD_VARIABLE = re.compile(
    r"(halo|sws|ltp|magnitude|keep)_(scale|threshold|mask|step|strength)"
)


class Governed(NamedTuple):
    """A weight that a method governs, and what inference makes of it.

    Attributes:
        variable: The `keras.Variable` that is stored and trained.
        method: Name of the method, such as `"LTP"`.
        effective: Tensor of the variable's shape: the values that inference computes
            with, in float32 or more.
        threshold: Scalar tensor: a weight is kept where `w**2` is larger. `None` for
            methods without a threshold.
    """

    variable: keras.Variable
    method: str
    effective: Any
    threshold: Any = None


def walk(layer) -> list:
    """`layer` and all the layers in it, at any depth, each once, parents first."""
    found: dict[int, Any] = {id(layer): layer}
    # Private, because public `layers` exists on models only.
    for inner in layer._layers:
        found.update((id(each), each) for each in walk(inner) if id(each) not in found)
    return list(found.values())


def check_model(model, function: str, rewritable: bool = True) -> None:
    """Raises unless `model` is built, and Sequential or Functional if `rewritable`."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Argument `model` of `{function}` must be a `keras.Model`. "
            f"Received: model={model!r}"
        )
    if rewritable and not is_rewritable(model):
        raise TypeError(
            f"Argument `model` of `{function}` must be a Sequential or Functional "
            f"model. Received the subclassed model {type(model).__name__}: its layers "
            "are called by its own code, which nothing can rewrite. Use the methods in "
            "that code:\n"
            "    self.dense = keras_sparsity.LTP(keras.layers.Dense(64), l0=1e-6)\n"
            "    self.dense = keras.layers.Dense(\n"
            "        64, kernel_regularizer=keras_sparsity.HALO(xi=3e-7, psi=5e-4)\n"
            "    )"
        )
    if not model.built:
        raise ValueError(
            f"Argument `model` of `{function}` must be built. Received a model "
            "without weights yet: give it a `keras.Input`, or call it on data first."
        )


def is_rewritable(layer) -> bool:
    """Whether `layer` is a model whose graph of layers is known."""
    return isinstance(layer, (keras.Sequential, keras.Function))


def leaves(model) -> list:
    """The layers of `model` and of the models in it that are no such models, once."""
    found: dict[int, Any] = {}
    for layer in model.layers:
        inner = leaves(layer) if is_rewritable(layer) else [layer]
        found.update((id(leaf), leaf) for leaf in inner)
    return list(found.values())


def calls(model) -> list:
    """The nodes of the graph of `model`, its inputs left out, in the order they run."""
    # Only the private nodes tell of every call of a layer, and of the sizes there.
    by_depth = keras.Function(model.inputs, model.outputs)._nodes_by_depth
    nodes = [
        node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]
    ]
    return [node for node in nodes if not node.is_input]


def select(model, filters: Filters) -> list:
    """The `leaves` of `model` that `filters` select, or raises if there is none."""
    layers = leaves(model)
    selected = [layer for layer in layers if matches(layer, filters)]
    if not selected:
        raise ValueError(
            "Argument `filters` must match a layer. Received: "
            f"filters={filters!r}, and the layers are {[v.name for v in layers]}."
        )
    return selected


def governors(layer) -> list:
    """The wrappers and regularizers in `layer`, itself included, that govern."""
    return [inner for inner in walk(layer) if hasattr(inner, "governed_weights")]


def unwrapped(layer):
    """The layer in `layer`, if that is a wrapper that governs it; else `layer`."""
    return layer.layer if hasattr(layer, "governed_weights") else layer


def check_plain(model, function: str, others=()) -> None:
    """Raises a `ValueError` if methods or `others` are in `model`."""
    found = sorted(
        {type(governor).__name__ for governor in governors(model)} | {*others}
    )
    if found:
        raise ValueError(
            f"Argument `model` of `{function}` must be a plain model. Received one "
            f"with {', '.join(found)} in it: call `finalize` on it first, or `prune`."
        )


def check_ungoverned(layer, wrapper: str) -> None:
    """Raises a `ValueError` if something in `layer` governs its weights already."""
    for governor in governors(layer):
        raise ValueError(
            f"Argument `layer` of {wrapper} must be a layer whose weights nothing "
            f"governs yet. Received: layer '{layer.name}', which has a "
            f"{type(governor).__name__}. Take the layer within, or call `finalize` on "
            "the model first."
        )


def governed_weights(layer) -> list[Governed]:
    """Every governed weight in `layer`, once each, in the order of `layer.weights`."""
    for weight in layer.weights:
        # A penalty that was not computed yet, as after loading, has not met its kernel.
        if hasattr(weight.regularizer, "bind"):
            weight.regularizer.bind(weight)
    found: dict[int, Governed] = {}
    for governor in governors(layer):
        for governed in governor.governed_weights():
            found.setdefault(id(governed.variable), governed)
    return [found[id(v)] for v in layer.weights if id(v) in found]


def full_precision(variable):
    """The value of `variable` in float32, or in float64 if that is its type."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return ops.cast(variable, "float64" if dtype == "float64" else "float32")


def to_array(tensor) -> np.ndarray:
    """A tensor or a variable as an array."""
    return ops.convert_to_numpy(ops.convert_to_tensor(tensor))


def check_weights(model) -> None:
    """Raises a `ValueError` that names a weight of `model` that is NaN.

    The stored weights are looked at: a gate or a mask may hide a NaN.
    """
    for weight in model.weights:
        values = to_array(weight)
        if values.dtype.kind not in "iub" and np.isnan(values).any():
            raise ValueError(
                f"Weight '{weight.path}' must be free of NaN. Received "
                f"{np.isnan(values).sum()} NaN among {values.size} values: did the "
                "training diverge?"
            )


def is_method_variable(variable) -> bool:
    """Whether `variable` is a method's own, as a scale, a threshold or a mask is."""
    return _METHOD_VARIABLE.match(variable.name) is not None


def plain_weights(layer) -> list:
    """`layer.weights` without the methods' own: those of the layer before."""
    return [w for w in layer.weights if not is_method_variable(w)]


def is_prunable(variable) -> bool:
    """Whether `variable` is the kind of weight that methods govern by default."""
    return (
        len(variable.shape) >= 2
        and "float" in keras.backend.standardize_dtype(variable.dtype)
        and not is_method_variable(variable)
    )


def kernels(layer) -> list:
    """The floating-point weights of rank 2 or more in `layer` that it made to train."""
    # Frozen or not: a frozen layer must be rebuilt as it was. Only this private list
    # still tells what was trainable from what never was.
    made = {id(w) for inner in walk(layer) for w in inner._trainable_variables}
    return [w for w in layer.weights if id(w) in made and is_prunable(w)]


def prunable(layer) -> list:
    """The kernels of `layer` that are trainable now."""
    return [w for w in kernels(layer) if w.trainable and layer.trainable]


def name_within(layer, variable) -> str:
    """The names of the layers from `layer` down to `variable`, and its own."""
    for inner in layer._layers:
        if any(w is variable for w in inner.weights):
            return f"{inner.name}/{name_within(inner, variable)}"
    return variable.name


def choose(
    layer, variables: str | Callable[[Any], bool] | Sequence[int] | None = None
) -> list:
    """The weights of `layer` to govern.

    Args:
        layer: A built layer.
        variables: `None` for every prunable weight; a regular expression that is
            searched in the name of each and in its path within the layer; a
            predicate on the variable; or a list of positions among the kernels.

    Raises:
        ValueError: If nothing is left to govern.
    """
    candidates = kernels(layer)
    if isinstance(variables, (list, tuple)):
        chosen = [candidates[position] for position in variables]
    elif callable(variables):
        chosen = [w for w in candidates if variables(w)]
    elif isinstance(variables, str):
        chosen = [
            w
            for w in candidates
            if re.search(variables, w.name)
            or re.search(variables, name_within(layer, w))
        ]
    else:
        chosen = candidates
    if not chosen:
        weights = [f"{name_within(layer, w)} {tuple(w.shape)}" for w in layer.weights]
        raise ValueError(
            f"Layer '{layer.name}' (of type {type(layer).__name__}) has nothing to "
            "govern. Expected a trainable weight of rank 2 or more"
            + (f" that `variables={variables!r}` selects" if variables else "")
            + f". Received weights: {', '.join(weights) or 'none'}"
        )
    return chosen


def check_regex(name: str, pattern: str) -> None:
    """Raises a `ValueError` unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"Argument `{name}` must be a valid regex ({error}). "
            f"Received: {name}={pattern!r}"
        ) from error


def check_filters(filters: Filters) -> None:
    """Raises unless `filters` is something that can be matched."""
    patterns = [filters] if isinstance(filters, str) else filters
    if isinstance(patterns, Sequence):
        valid = all(isinstance(pattern, str) for pattern in patterns)
    else:
        valid = filters is None or callable(filters)
    if not valid:
        raise TypeError(
            "Argument `filters` must be None, a regex, a list of regexes, or a "
            f"callable of a layer. Received: filters={filters!r}"
        )
    if isinstance(patterns, Sequence):
        for pattern in patterns:
            check_regex("filters", pattern)


def matches(layer, filters: Filters) -> bool:
    """Whether `filters` select `layer`: as in `keras.Model.quantize`."""
    if filters is None:
        return True
    if callable(filters):
        return bool(filters(layer))
    patterns = [filters] if isinstance(filters, str) else filters
    return any(re.search(pattern, layer.name) for pattern in patterns)
