"""A tensor that a layer's call has computed, handed to its losses."""

import threading

import keras
from keras import ops


class Handover:
    """Keeps tensors from a layer's call until the same pass asks for its losses.

    XLA merges two computations of the same thing; backends that run operation by
    operation do it twice. A tensor is taken once, and only where it is still what
    would be computed anew: in the same TensorFlow graph, or in torch with the variable
    unchanged. Elsewhere `take` returns `None`.
    """

    def __init__(self):
        self._kept = {}

    def put(self, variable, tensor):
        """Keeps `tensor`, which was computed from `variable`."""
        # Replicas of `tf.distribute` call the same layer from threads of their own.
        self._kept[threading.get_ident(), id(variable)] = (_moment(variable), tensor)

    def take(self, variable):
        """What was put for `variable` in this pass, or `None`."""
        moment, tensor = self._kept.pop(
            (threading.get_ident(), id(variable)), (None, None)
        )
        if moment is None or moment != _moment(variable):
            return None
        # A torch pass without gradients leaves nothing to differentiate.
        return tensor if getattr(tensor, "requires_grad", True) else None


def _moment(variable):
    value = ops.cast(variable, "float32")
    if keras.backend.backend() == "torch":
        return value._version  # torch counts the changes of a tensor in place
    return getattr(value, "graph", None)  # of TensorFlow; not when it runs eagerly
