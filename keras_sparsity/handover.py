"""Numbers that a layer's call has computed, handed to its losses."""

import threading

import keras
from keras import ops


class Handover:
    """Keeps what a layer's call has computed until the same pass asks for its losses.

    XLA merges two computations of the same thing; backends that run operation by
    operation do it twice. What was put is taken once, and only where it is still what
    would be computed anew: in the same TensorFlow graph, or in torch with the variables
    unchanged. Elsewhere `take` returns `None`.
    """

    def __init__(self):
        self._kept = {}

    def put(self, key, variables, numbers):
        """Keeps `numbers`, which were computed from `variables`, under `key`."""
        moment = _moment(variables)
        if moment is not None:
            self._kept[key] = (moment, numbers)

    def take(self, key, variables):
        """What was put under `key` in this pass, or `None`."""
        moment, numbers = self._kept.pop(key, (None, None))
        return numbers if moment is not None and moment == _moment(variables) else None


def _moment(variables):
    match keras.backend.backend():
        case "torch":  # which counts the changes of a tensor in place
            return [ops.convert_to_tensor(variable)._version for variable in variables]
        case "tensorflow":  # where replicas share a graph, and a thread each is theirs
            graph = getattr(ops.cast(variables[-1], "float32"), "graph", None)
            return None if graph is None else [id(graph), threading.get_ident()]
    return None  # JAX compiles, and merges
