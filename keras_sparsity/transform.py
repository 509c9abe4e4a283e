"""From a dense model to a sparse one, and from that to a plain one."""

import functools

import keras

from keras_sparsity.masks import KeepZeros
from keras_sparsity.rebuild import Rebuilt, check_rebuildable, clone
from keras_sparsity.selection import (
    check_filters,
    check_weights,
    governed_weights,
    governors,
    kernels,
    plain_weights,
    prunable,
    select,
    to_array,
    unwrapped,
)
from keras_sparsity.wrappers import Penalized


def sparsify(model, method, filters=None):
    """A new model of the same weights, in which a method governs the layers' weights.

    The model may be Sequential or Functional, nested, branching, trained or not; a
    layer that is shared stays shared. A layer with nothing to govern, a frozen one and
    one that is governed already stay as they are, and so does one that the method
    cannot handle: `report` says why. Models in the model are gone into, every other
    layer is taken whole.

    Args:
        model: A built Sequential or Functional `keras.Model`.
        method: A `keras.regularizers.Regularizer`, of which every kernel (trainable
            weight of rank 2 or more) gets a fresh copy; or a callable that takes a
            layer and returns a layer, such as `functools.partial(LTP, l0=1e-6)`: one
            of the same weights, or a wrapper of this package.
        filters: Which layers: `None` for all, a regex that is searched in their names,
            a list of such, or a callable `layer -> bool`. Defaults to `None`.

    Returns:
        An uncompiled model that shares nothing with `model`.

    Raises:
        TypeError: If the model is subclassed, or `method` or `filters` is something
            else.
        ValueError: If the model is not built, if `filters` match no layer, or if the
            method can handle none of those that they match.

    Example:

    ```python
    model = ks.sparsify(model, ks.HALO(xi=3e-7, psi=5e-4))
    model = ks.sparsify(model, functools.partial(ks.LTP, l0=1e-6), filters="conv")
    ```
    """
    check_rebuildable(model, "sparsify")
    check_filters(filters)
    if isinstance(method, keras.regularizers.Regularizer):
        wrap = functools.partial(_penalize, regularizer=method)
    elif callable(method) and not isinstance(method, keras.Layer):
        wrap = functools.partial(_wrap, method=method)
    else:
        raise TypeError(
            "Argument `method` must be a `keras.regularizers.Regularizer` or a "
            f"function that takes a layer and returns one. Received: method={method!r}"
        )
    selected = select(model, filters)
    candidates = {
        id(layer) for layer in selected if prunable(layer) and not governors(layer)
    }

    def convert(layer):
        return wrap(layer) if id(layer) in candidates else clone(layer)

    rebuilt = Rebuilt(model, convert)
    if candidates and len(rebuilt.errors) == len(candidates):
        names = [layer.name for layer, _ in rebuilt.errors.values()]
        _, error = next(iter(rebuilt.errors.values()))
        raise ValueError(
            f"Argument `method` must be able to handle one of the layers {names}. "
            f"Received for layer '{names[0]}': {error}"
        ) from error
    for old, new in rebuilt.layers:
        if id(old) in candidates and isinstance(new, KeepZeros):
            new.keep_zeros()
    return rebuilt.model


def _wrap(layer, method):
    wrapped = method(clone(layer))
    if not isinstance(wrapped, keras.Layer):
        raise TypeError(f"it returned {wrapped!r}, which is no `keras.Layer`")
    return wrapped


class _Tag(keras.regularizers.Regularizer):
    """Shows which weight an argument of a layer regularizes."""

    def __init__(self, argument):
        self.argument = argument


def _penalize(layer, regularizer):
    """A layer like `layer`, with a copy of `regularizer` for each of its kernels."""
    # A regularizer that cannot say what it governs needs a wrapper that can.
    if hasattr(regularizer, "governed_weights"):
        arguments = _regularizer_arguments(layer)
        if arguments:
            copies = {name: clone(regularizer) for name in arguments}
            return clone(layer, **copies)
    return Penalized(clone(layer), regularizer)


def _regularizer_arguments(layer):
    """The arguments of `layer` that regularize its kernels one by one; else none.

    The layer is asked, not known: in one of the same config every free argument gets a
    tag, and its kernels tell which tag they were given.
    """
    config = layer.get_config()
    free = [k for k, v in config.items() if k.endswith("_regularizer") and v is None]
    if not free:
        return set()  # nor is a layer probed that cannot be built from its config
    probe = clone(layer, **{k: _Tag(k) for k in free})
    probe.build_from_config(layer.get_build_config())
    tags = [kernel.regularizer for kernel in prunable(probe)]
    arguments = {tag.argument for tag in tags if isinstance(tag, _Tag)}
    return arguments if len(arguments) == len(tags) else set()


def finalize(model, keep_zeros=False):
    """A new plain Keras model that computes what the sparse model does in inference.

    Gates and masks are baked into the weights, scales and thresholds are gone. Nothing
    of this package is in the model: its file loads with Keras alone. Names of layers
    and order of weights are those of the model before `sparsify`.

    Args:
        model: A built Sequential or Functional `keras.Model`.
        keep_zeros: Boolean: `True` for a model to fine-tune, in which the governed
            layers are in `KeepZeros`, and so are those with zeros in a weight of rank
            2 or more, as after `prune`. A second `finalize` gives the plain model.
            Defaults to `False`.

    Returns:
        An uncompiled model that shares nothing with `model`.

    Raises:
        TypeError: If the model is subclassed.
        ValueError: If the model is not built, if one of its weights is NaN, or if
            there are no zeros to keep.

    Example:

    ```python
    small = ks.finalize(model)
    small.save("small.keras")

    tuned = ks.finalize(ks.prune(model, 0.95), keep_zeros=True)
    tuned.compile("adamw", "mse")
    tuned.fit(x, y)
    small = ks.finalize(tuned)
    ```
    """
    check_rebuildable(model, "finalize")
    check_weights(model)
    values = {
        id(governed.variable): to_array(governed.effective)
        for governed in governed_weights(model)
    }
    kept: set[int] = set()
    if keep_zeros:
        kept = {*values, *(id(w) for w in kernels(model) if not to_array(w).all())}
        if not kept:
            raise ValueError(
                "Argument `keep_zeros=True` needs zeros to keep. Received a model "
                "that no method governs, without a zero in its weights of rank 2 or "
                "more."
            )
    return plain(model, values, kept)


def plain(model, values, kept=frozenset()):
    """`model` without its methods, with `{id(variable): array}` for its weights.

    The zeros of the variables whose ids are `kept` get masks.
    """
    methods = {keras.saving.get_registered_name(type(g)) for g in governors(model)}

    def convert(layer):
        inner = unwrapped(layer)
        governed = bool(governors(inner))
        plain = clone(inner, **_strip(inner.get_config(), methods) if governed else {})
        found = [i for i, w in enumerate(kernels(layer)) if id(w) in kept]
        return KeepZeros(plain, variables=found) if found else plain

    rebuilt = Rebuilt(model, convert)
    for _, error in rebuilt.errors.values():
        raise error
    for old, new in rebuilt.layers:
        for variable, copy in zip(plain_weights(old), plain_weights(new), strict=True):
            if id(variable) in values:
                copy.assign(values[id(variable)])
        if isinstance(new, KeepZeros):
            new.keep_zeros()
        elif governors(new):
            raise ValueError(
                f"Layer '{old.name}' (of type {type(old).__name__}) must have no "
                f"{type(governors(new)[0]).__name__} that it makes in its own code: "
                "its config cannot say how it is without. Build the layer without the "
                "method, and use `sparsify` on the model."
            )
    return rebuilt.model


def _strip(config, methods):
    """A config without the objects of `methods`: what a wrapper wraps, or None."""
    if isinstance(config, dict):
        if config.get("registered_name") in methods:
            return _strip(config["config"].get("layer"), methods)
        # Without build_config, layers are built by their call in the new model.
        return {k: _strip(v, methods) for k, v in config.items() if k != "build_config"}
    if isinstance(config, (list, tuple)):
        return type(config)(_strip(value, methods) for value in config)
    return config
