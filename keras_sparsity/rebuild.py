"""A model built anew, with other layers in place of its own."""

import contextlib

import keras
from keras import ops, tree

from keras_sparsity.selection import is_method_variable, is_rewritable, walk


def clone(obj):
    """A new layer or regularizer of the same config."""
    return type(obj).from_config(obj.get_config())


class Rebuilt:
    """`model` with `convert(layer)` in place of each of its layers.

    Models in the model are rebuilt too. A layer that several calls share is converted
    once. A converted layer that cannot be built or called where the old one was is
    replaced by a clone of the old one, and the error noted.

    Args:
        model: A built Sequential or Functional model.
        convert: Callable: a new layer for a layer of the model.

    Attributes:
        model: The new model, uncompiled, its weights as they were initialized.
        layers: List of pairs, each old layer and what stands in its place.
        errors: Dict of the names of layers that were cloned instead, and why.
    """

    def __init__(self, model, convert):
        self._convert = convert
        # id of an old layer: (the old layer, the new one)
        self._olds: dict = {}
        # id of a new layer: (the new layer, the old one)
        self._converted: dict = {}
        self.errors: dict[str, str] = {}
        # Custom layers need not be registered: their classes are at hand.
        classes = {type(layer).__name__: type(layer) for layer in walk(model)}
        with keras.saving.custom_object_scope(classes):
            self.model = self._rebuild(model)
        self.layers = [(old, self._new(old)) for _, old in self._converted.values()]

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
        new.dtype_policy = model.dtype_policy
        return new

    def _rebuild_sequential(self, model):
        (given,) = model.inputs
        x = keras.KerasTensor(given.shape, given.dtype)
        with keras.name_scope(model.name):
            for layer in model.layers:
                x = self._call(self._new(layer), x)
        return keras.Sequential(
            [
                keras.Input(
                    batch_shape=given.shape, dtype=given.dtype, name=given.name
                ),
                *(self._new(layer) for layer in model.layers),
            ],
            name=model.name,
            trainable=model.trainable,
        )

    def _new(self, layer):
        """What stands in the place of `layer`, made when asked for first."""
        if id(layer) not in self._olds:
            if is_rewritable(layer):
                new = self._rebuild(layer)
            elif isinstance(layer, keras.Layer):
                new = self._convert(layer)
                self._converted[id(new)] = (new, layer)
            else:
                new = layer  # an operation has no state
            self._olds[id(layer)] = (layer, new)
        return self._olds[id(layer)][1]

    def _call(self, new, *args, **kwargs):
        _, old = self._converted.get(id(new), (None, None))
        if old is None:
            return new(*args, **kwargs)
        new = self._new(old)  # a clone, where the first call showed that it must be
        try:
            return new(*args, **kwargs)
        except Exception as error:  # whatever it is, one layer must not fail the model
            if old.name in self.errors:
                raise
            self.errors[old.name] = str(error)
            spare = clone(old)
            spare.sparsity_error = str(error)  # for `report`
            self._olds[id(old)] = (old, spare)
            return spare(*args, **kwargs)


def _inputs_like(model):
    """New inputs of the names of the old ones, which `clone_model` would not keep."""
    names = {
        id(layer.output): layer.name
        for layer in model.layers
        if isinstance(layer, keras.layers.InputLayer)
    }
    return tree.map_structure(
        lambda x: keras.Input(
            batch_shape=x.shape, dtype=x.dtype, name=names.get(id(x), x.name)
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


def copy_state(old, new):
    """Copies the weights of a layer to one that differs in its methods only."""
    # As Keras saves them: some layers derive more from their weights when they load.
    for source, target in zip(_plain_layers(old), _plain_layers(new), strict=True):
        store: dict = {}
        source.save_own_variables(store)
        if store:
            # Through numpy: on JAX, variables would share a buffer that is donated.
            target.load_own_variables(
                {key: ops.convert_to_numpy(value) for key, value in store.items()}
            )
    sources = [w for w in old.weights if is_method_variable(w)]
    targets = [w for w in new.weights if is_method_variable(w)]
    if [w.name for w in sources] == [w.name for w in targets]:
        for source, target in zip(sources, targets, strict=True):
            target.assign(ops.convert_to_numpy(source))


def _plain_layers(layer):
    return [inner for inner in walk(layer) if not hasattr(inner, "governed_weights")]
