"""A layer reads given tensors in place of its variables."""

import functools
import inspect

import keras
from keras import tree

from keras_sparsity.selection import (
    check_regex,
    check_ungoverned,
    choose,
    name_within,
    walk,
)

# Their variables show what is stored elsewhere, and are not read in their calls.
_FOREIGN = (keras.layers.TorchModuleWrapper, keras.layers.TFSMLayer)


def call_with(layer, substitutes, *args, **kwargs):
    """Calls `layer` with tensors in place of some of its variables.

    Args:
        layer: A built `keras.Layer`.
        substitutes: List of pairs `(variable, tensor)`; the tensor is cast to the
            type in which the layer reads the variable.
        *args, **kwargs: What `layer` is called with.

    Returns:
        A tuple `(outputs, losses)`. The losses that the layer added are for the
        caller to add again: the scope that carries the substitutes keeps them.
    """
    # A nested scope inherits nothing from an outer one, so every variable is mapped.
    # What the layer updates (batch statistics, seeds, metrics) is handed back.
    state = {id(v): v for v in [*layer.variables, *layer.metrics_variables]}
    mapping = {key: (v, v.value) for key, v in state.items()}
    substituted = {id(v): (v, tensor) for v, tensor in substitutes}
    mapping.update(substituted)
    with keras.StatelessScope(list(mapping.values()), collect_losses=True) as scope:
        given = {key: scope.get_current_value(v) for key, v in state.items()}
        outputs = layer(*args, **kwargs)
    # Otherwise the layer would count these losses too, beside the caller. There is no
    # public way to make a layer forget the losses of a call.
    layer._clear_losses()
    for key, variable in state.items():
        value = scope.get_current_value(variable)
        if value is given[key]:
            continue
        if key in substituted:
            raise ValueError(
                f"Layer '{layer.name}' (of type {type(layer).__name__}) must not "
                f"assign to its weight '{variable.path}' in its call: it would store "
                "what it was given in place of the weight."
            )
        variable.assign(value)
    return outputs, scope.losses


class Untracked:
    """Holds variables, or layers, for a layer that does not own them.

    Keras tracks those that are attributes of a layer, in a list too, and stores them
    in every file once more.
    """

    def __init__(self, content):
        self.content = list(content)


class TransparentWrapper(keras.layers.Wrapper):
    """Base of the wrappers: built, called and saved like the layer within.

    The wrapper takes the name of its layer, so that the names of a model's outputs,
    losses and metrics stay what they are. It has no precision of its own: it reads
    weights in float32, and its layer casts them to its own compute type.

    Args:
        layer: The `keras.Layer` to wrap, built or not.
        **kwargs: `name` and `trainable`, as for any layer.
    """

    def __new__(cls, layer, *args, **kwargs):
        # Keras inspects the signature of `call`: to know the arguments that are
        # tensors and those that are not, to fill in masks. It must be the layer's.
        wrapper = super().__new__(cls, layer, *args, **kwargs)
        if isinstance(layer, keras.Layer):
            wrapper.call = _with_signature(wrapper.call, layer.call)
        return wrapper

    def __init__(self, layer, **kwargs):
        if isinstance(layer, keras.Layer):  # `Wrapper` refuses what is none
            check_ungoverned(layer, type(self).__name__)
            kwargs.setdefault("name", layer.name)
        super().__init__(layer, dtype="float32", autocast=False, **kwargs)
        self.supports_masking = layer.supports_masking

    def __call__(self, *args, **kwargs):
        if not self.layer.built:
            # Keras gives `build` the shape of the first input only; a symbolic call
            # builds layers of any signature (attention, several inputs).
            with keras.name_scope(self.name):
                self.layer(*_symbolic(args), **_symbolic(kwargs))
        return super().__call__(*args, **kwargs)

    def call(self, *args, training=None, **kwargs):
        return self.layer(*args, **_with_training(training, kwargs))

    def compute_mask(self, inputs, previous_mask):
        return self.layer.compute_mask(inputs, previous_mask)

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        # `Layer` would take the shape from above and the wrapper's own type, which is
        # not the layer's in mixed precision. Tracing `call` gives both.
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def get_config(self):
        config = super().get_config()
        del config["dtype"]
        return config


class SubstitutingWrapper(TransparentWrapper):
    """Base of the wrappers whose layer computes with other weights than it stores.

    A subclass creates its own variables in `build_gates(variables)` and returns the
    tensors to compute with from `effective_weights(training)`, one for each of `gated`.

    Args:
        layer: The `keras.Layer` to wrap, built or not.
        variables: Which weights: see `selection.choose`.
        **kwargs: `name` and `trainable`, as for any layer.
    """

    def __init__(self, layer, variables=None, **kwargs):
        super().__init__(layer, **kwargs)
        if not (variables is None or isinstance(variables, str) or callable(variables)):
            # Positions are for `finalize`, which knows no name that a reload keeps.
            are_positions = isinstance(variables, (list, tuple)) and all(
                isinstance(position, int) for position in variables
            )
            if not are_positions:
                raise TypeError(
                    "Argument `variables` must be None, a regex, or a callable of a "
                    f"variable. Received: variables={variables!r}"
                )
        if isinstance(variables, str):
            check_regex("variables", variables)
        self.variables_to_gate = variables

    def build(self, input_shape=None):
        super().build(input_shape)
        if any(getattr(inner, "stateful", False) for inner in walk(self.layer)):
            raise ValueError(
                f"Layer '{self.layer.name}' must not be stateful: its states are kept "
                "apart from its weights, and would be lost. Received: stateful=True"
            )
        for inner in walk(self.layer):
            if isinstance(inner, _FOREIGN):
                raise ValueError(
                    f"Layer '{inner.name}' (of type {type(inner).__name__}) must "
                    "compute with Keras' variables for its weights to be gated: it "
                    "computes with those of another framework, past any gate."
                )
            # `Model.quantize` goes into every layer, and would put other kernels in
            # the place of those that are gated.
            inner.quantize = self.quantize
        self._gated = Untracked(choose(self.layer, self.variables_to_gate))
        self.build_gates(self._gated.content)

    @property
    def gated(self) -> list:
        """The variables of the layer that are gated."""
        return self._gated.content

    def suffix(self, variable) -> str:
        """What to end the names with of the wrapper's own variables for `variable`."""
        return name_within(self.layer, variable).replace("/", "_")

    def build_gates(self, variables):
        raise NotImplementedError

    def effective_weights(self, training) -> list:
        raise NotImplementedError

    def call(self, *args, training=None, **kwargs):
        weights = zip(self.gated, self.effective_weights(training), strict=True)
        kwargs = _with_training(training, kwargs)
        outputs, losses = call_with(self.layer, weights, *args, **kwargs)
        if losses:
            self.add_loss(sum(losses))
        return outputs

    def quantize(self, mode=None, config=None, **kwargs):
        raise ValueError(
            f"Layer '{self.name}' must not be quantized while {type(self).__name__} "
            "governs its weights: call `finalize` on the model first. "
            f"Received: mode={mode!r}"
        )

    def get_config(self):
        return {**super().get_config(), "variables": self.variables_to_gate}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        if isinstance(config["variables"], dict):
            config["variables"] = keras.saving.deserialize_keras_object(
                config["variables"], custom_objects=custom_objects
            )
        return super().from_config(config, custom_objects=custom_objects)


def _with_training(training, kwargs):
    """`kwargs` for any layer: Keras drops `training` where a layer does not have it."""
    return kwargs if training is None else {**kwargs, "training": training}


def _symbolic(structure):
    return tree.map_structure(
        lambda x: keras.KerasTensor(x.shape, x.dtype) if hasattr(x, "shape") else x,
        structure,
    )


def _with_signature(call, inner_call):
    """`call` with the signature of `inner_call`, and `training` if it has it not."""

    @functools.wraps(call)
    def wrapped(*args, **kwargs):
        return call(*args, **kwargs)

    signature = inspect.signature(inner_call)
    parameters = list(signature.parameters.values())
    if "training" not in signature.parameters:
        training = inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY)
        has_rest = parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
        index = len(parameters) - bool(has_rest)
        parameters.insert(index, training.replace(default=None))
    # What `inspect.signature` looks for first; mypy does not know it.
    wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters
    )
    return wrapped
