"""A model built anew, with other layers in place of its own, and its weights."""

import contextlib
import inspect
import random
import tempfile
import warnings
from inspect import isfunction
from typing import Any

import keras
from keras import tree

from keras_sparsity.replicas import scope_of
from keras_sparsity.selection import (
    check_model,
    governors,
    is_method_variable,
    is_rewritable,
    plain_weights,
    to_array,
    walk,
)


def clone(obj, **changes):
    """A new layer, operation or regularizer of the same config, but for `changes`."""
    from_config, config = type(obj).from_config, obj.get_config()
    # A config has the code of a lambda, but not the globals that it refers to.
    lambdas = {
        name: value
        for name, value in vars(obj).items()
        if name in config and isfunction(value) and value.__name__ == "<lambda>"
    }
    reads_code = "safe_mode" in inspect.signature(from_config).parameters
    with _known(walk(obj) if isinstance(obj, keras.Layer) else [obj]):
        if not reads_code:
            return from_config({**config, **changes, **lambdas})
        # `Lambda` takes nothing else. What is in memory is no code from elsewhere.
        new = from_config({**config, **changes}, safe_mode=False)
    for name, function in lambdas.items():
        setattr(new, name, function)
    return new


def _known(objects):
    """A scope in which configs of `objects` are read: they need not be registered."""
    known: dict[str, Any] = {}
    for obj in objects:
        for part in (obj, *vars(obj).values()):  # initializers and constraints too
            if isfunction(part):
                known[part.__name__] = part
            elif hasattr(part, "get_config") and not _is_of_keras(part):
                known[type(part).__name__] = type(part)
    return keras.saving.custom_object_scope(known)


def _is_of_keras(obj):
    return type(obj).__module__.startswith("keras.")


@contextlib.contextmanager
def random_state_kept():
    """Leaves Python's generator, from which Keras draws the seeds of layers, alone.

    The caller's own code may be in the middle of using it, as to shuffle its data.
    """
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def check_rebuildable(model, function):
    """Raises unless `model` can be built anew without losing anything."""
    check_model(model, function)
    for layer in walk(model):
        if getattr(layer, "lora_enabled", False):
            raise ValueError(
                f"Argument `model` of `{function}` must have no LoRA adapters: what "
                "they add to a kernel would be lost. Received one in layer "
                f"'{layer.name}'. Save the weights, and load them into the model built "
                "without adapters."
            )


class Rebuilt:
    """`model` with `convert(layer)` in place of each of its layers.

    Models in the model are rebuilt too. A layer that several calls share is converted
    once. A layer that `convert` fails for, or whose conversion cannot be called where
    the layer was or cannot take its weights, is cloned instead, and the error noted.

    Args:
        model: A built Sequential or Functional model.
        convert: Callable: a new layer for a layer of the model.
        fill: Callable: gives the weights of a layer to what stands in its place.
            Defaults to `copy_state`.
        clones: Boolean, whether to clone a layer that fails, and not raise its error.

    Attributes:
        model: The new model, uncompiled, of the same weights.
        layers: List of pairs, each old layer and what stands in its place.
        errors: Dict of `id(layer)` to pairs of a layer that was cloned, and why.
    """

    def __init__(self, model, convert, fill=None, clones=True):
        self._convert = convert
        self._fill = fill or copy_state
        self._clones = clones
        self.errors: dict[int, tuple] = {}
        with _known(walk(model)), scope_of(model), random_state_kept():
            # Scales are made when a penalty is computed first.
            _ = model.losses
            while not self._built(model):
                pass
        if keras.backend.backend() == "torch":
            # Scales come too late for `parameters()` and `state_dict()`: Keras lists
            # what they have when it builds a layer. Nothing public lists it anew.
            for layer in walk(self.model):
                layer._track_variables()

    def _built(self, model):
        """Whether the model could be built without the layers known to fail."""
        self._olds: dict[int, tuple] = {}  # by the id of the new layer
        self._news: dict[int, object] = {}  # by the id of the old one
        try:
            self.model = self._rebuild(model)
            _ = self.model.losses  # makes their scales
            self.layers = list(self._olds.values())
            for old, new in self.layers:
                with self._noting_errors(old):
                    self._fill(old, new)
        except _Again:
            return False
        return True

    def _rebuild(self, model):
        if isinstance(model, keras.Sequential):
            new = self._rebuild_sequential(model)
        else:
            with _uncompiled(model):
                new = keras.models.clone_model(
                    model,
                    input_tensors=_inputs_like(model),
                    clone_function=self._new,
                    call_function=self._call,
                )
        warn_of_lost_steps(model, new)
        new.dtype_policy = model.dtype_policy
        if not model.trainable:
            flags = [(layer, layer.trainable) for layer in walk(new)[1:]]
            new.trainable = False  # and all in it, but some may have been unfrozen
            for layer, flag in flags:
                layer.trainable = flag
        return new

    def _rebuild_sequential(self, model):
        (given,) = model.inputs
        _, first, *_ = walk(model)
        start = [clone(first)] if isinstance(first, keras.layers.InputLayer) else []
        x = start[0].output if start else keras.KerasTensor(given.shape, given.dtype)
        with keras.name_scope(model.name):
            for layer in model.layers:
                x = self._call(self._new(layer), x)
        is_made_alike = type(model).__init__ is keras.Sequential.__init__
        new = (type(model) if is_made_alike else keras.Sequential)(
            [*start, *map(self._new, model.layers)], name=model.name
        )
        if not start:  # it was built by its first call
            new.build(given.shape)
        return new

    def _new(self, layer):
        """What stands in the place of `layer`, made when asked for first."""
        if id(layer) not in self._news:
            if is_rewritable(layer):
                new = self._rebuild(layer)
            elif isinstance(layer, keras.Layer):
                new = self._converted(layer)
                self._olds[id(new)] = (layer, new)
            else:
                new = clone(layer)  # an operation
            self._news[id(layer)] = new
        return self._news[id(layer)]

    def _converted(self, layer):
        if id(layer) not in self.errors:
            try:
                return self._convert(layer)
            except Exception as error:  # whatever it is, one layer must not fail all
                self._note(layer, error)
        new = clone(layer)
        new.sparsity_error = str(self.errors[id(layer)][1])  # for `report`
        return new

    def _note(self, old, error):
        if not self._clones:
            raise ValueError(
                f"Layer '{old.name}' could not be built anew: {error}"
            ) from error
        self.errors[id(old)] = (old, error)

    def _call(self, new, *args, **kwargs):
        old, _ = self._olds.get(id(new), (None, None))
        with self._noting_errors(old):
            return new(*args, **kwargs)

    @contextlib.contextmanager
    def _noting_errors(self, old):
        """Notes that what was made of `old` fails, and begins again."""
        try:
            yield
        except Exception as error:
            if old is None or id(old) in self.errors:
                raise
            self._note(old, error)
            # A shared layer may stand elsewhere in the model by now.
            raise _Again from error


class _Again(Exception):
    """One more layer is known that must be cloned."""


def _inputs_like(model):
    """New inputs like the old ones, of their names, which `clone_model` would lose."""
    layers = {
        id(layer.output): layer
        for layer in model.layers
        if isinstance(layer, keras.layers.InputLayer)
    }
    return tree.map_structure(
        lambda x: (
            clone(layers[id(x)]).output
            if id(x) in layers
            else keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name)
        ),
        model.input,
    )


@contextlib.contextmanager
def _uncompiled(model):
    """`clone_model` compiles the clone of a compiled model, with a built optimizer."""
    compiled, model.compiled = model.compiled, False
    try:
        yield
    finally:
        model.compiled = compiled


def warn_of_lost_steps(model, new):
    """Warns if `new`, a plain model, trains otherwise than the subclass `model`.

    Keras cannot make a second model of a subclass that has its own `__init__`.
    """
    lost = [
        name
        for name in ("train_step", "test_step", "predict_step", "compute_loss")
        if getattr(type(model), name, None) is not getattr(type(new), name, None)
    ]
    if lost:
        warnings.warn(
            f"The new model is a {type(new).__name__}, without `{'`, `'.join(lost)}` "
            f"of {type(model).__name__}, which has an `__init__` of its own. Make "
            f"`{type(model).__name__}(inputs, outputs)` of the new model's inputs and "
            "outputs, if it can be made so.",
            stacklevel=2,
        )


def copy_state(old, new):
    """Copies the weights of a layer to one that differs in its methods only."""
    sources, targets = _plain_layers(old), _plain_layers(new)
    if len(sources) != len(targets):
        raise ValueError(
            f"a {type(new).__name__} around it does not say what it governs, and so "
            "cannot be given its weights"
        )
    copy_trainable(old, new)
    # As Keras saves them: some layers derive more from their weights when they load.
    for source, target in zip(sources, targets, strict=True):
        store: dict = {}
        source.save_own_variables(store)
        if store:
            # Through numpy: on JAX, variables would share a buffer that is donated.
            target.load_own_variables({k: to_array(v) for k, v in store.items()})
        if hasattr(source, "save_assets"):
            with tempfile.TemporaryDirectory() as directory:
                source.save_assets(directory)
                target.load_assets(directory)
    if hasattr(old, "sparsity_error"):
        new.sparsity_error = old.sparsity_error
    if list(map(type, governors(old))) == list(map(type, governors(new))):
        sources = filter(is_method_variable, old.weights)
        targets = filter(is_method_variable, new.weights)
        for source, target in zip(sources, targets, strict=True):
            target.assign(to_array(source))


def copy_trainable(old, new):
    """Freezes what is frozen within `old`, which no config tells, in a copy of it."""
    pairs = list(zip(_plain_layers(old), _plain_layers(new), strict=True))
    sources, targets = plain_weights(old), plain_weights(new)
    if len(sources) == len(targets):  # a layer for inference may have other weights
        pairs += zip(sources, targets, strict=True)
    for source, target in pairs:  # a layer before those in it, and before its weights
        if target.trainable != source.trainable:
            target.trainable = source.trainable


def _plain_layers(layer):
    return [inner for inner in walk(layer) if not hasattr(inner, "governed_weights")]
