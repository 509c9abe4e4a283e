"""Which units of a model are dead, which of these can go, and why the others stay.

A unit is dead if it is constant, or if no output of the model depends on it. One pass
forward finds what is constant, one backward what is used: no second round finds more.
"""

import collections
import dataclasses

import numpy as np

from keras_sparsity.layer_kinds import KINDS, Barrier
from keras_sparsity.selection import calls, is_rewritable
from keras_sparsity.units import Call, Obstacle, Units

# Others, as those of adapters and quantized layers, are not understood.
_WEIGHTS = {"alpha", "beta", "bias", "gamma", "kernel", "moving_mean"}
_WEIGHTS |= {"moving_variance"}


@dataclasses.dataclass(frozen=True)
class DeadUnits:
    """Units of a layer without influence: constant, or used by nothing.

    Attributes:
        layer: Name of the layer.
        layer_type: Its class.
        units: Number of all units of the layer.
        dead: Number of those that this row is about.
        reason: Why they must stay, or `None`: `compact` removes them.
    """

    layer: str
    layer_type: str
    units: int
    dead: int
    reason: str | None


def dead_units(model) -> list[DeadUnits]:
    """A row for each layer of `model` and each reason why dead units of it stay."""
    found = {
        id(call.layer): (call.layer, *call.dead(network.reasons))
        for network in _networks(model)
        for call in network.calls
    }
    return [
        DeadUnits(layer.name, type(layer).__name__, units, dead, reason)
        for layer, units, reasons in found.values()
        for reason, dead in collections.Counter(reasons).items()
    ]


def smaller_layers(model) -> dict:
    """What is different in the layers of `model` without the units that can go.

    Returns:
        Dict of `id(layer)` to pairs: a dict of arguments, and one of the arrays of its
        weights by their names.
    """
    changes = {
        id(call.layer): call.smaller(network.stays)
        for network in _networks(model)
        for call in network.calls
    }
    return {key: change for key, change in changes.items() if change is not None}


def _networks(model):
    """The units of `model`, and of each of the models in it, apart."""
    models = {id(m): m for m in _models(model) if hasattr(m, "inputs")}.values()
    nodes = [calls(m) for m in models]
    counts = collections.Counter(id(node.operation) for each in nodes for node in each)
    return [_Network(m, each, counts) for m, each in zip(models, nodes, strict=True)]


def _models(model):
    inner = [m for layer in filter(is_rewritable, model.layers) for m in _models(layer)]
    return [model, *inner]


class _Network:
    """The units of the tensors of a model.

    Attributes:
        calls: List of what each call of a layer does to them, in the order of the run.
    """

    def __init__(self, model, nodes, counts):
        self._units: dict[int, Units] = {}  # of each tensor where they are known
        self._wires = np.arange(0)  # for each wire the one that it is tied to
        self._fixed: list[tuple] = []
        self._reasons: dict[int, str] = {}  # of each wire that stays
        self.calls: list[Call] = []
        for node in nodes:
            call = self._call(node, counts[id(node.operation)])
            self.calls.append(call)
            if call.output is not None:
                self._units[id(node.outputs[0])] = call.output
        for tensor in model.outputs:
            if id(tensor) in self._units:
                self.fix(self._units[id(tensor)], "it is an output of the model")
        for units, reason in self._fixed:
            units.used[:] = True
            self._keep(units.wires, reason)
        kept = []
        for call in reversed(self.calls):
            for units, used, reason in call.uses():
                units.used |= used
                kept.append((units.wires[used], reason))
        for wires, reason in reversed(kept):  # the first layer that needs it tells why
            if reason is not None:
                self._keep(wires, reason)
        for call in self.calls:
            if call.output is not None and not self.stays(call.output).any():
                wire = self._wires[call.output.wires[0]]
                self._reasons[wire] = "it is the last one of a layer"

    def _call(self, node, count):
        layer, kwargs = node.operation, node.arguments.kwargs
        try:
            if type(layer) not in KINDS:
                raise Obstacle("is of a kind that `compact` does not know")
            if count > 1:
                raise Obstacle("is called more than once")
            # As `training=True`, or a mask. `training=False` is as always here.
            given = [k for k, v in kwargs.items() if v is not None and v is not False]
            if given:
                raise Obstacle(f"is called with {', '.join(given)}")
            if not {weight.name for weight in layer.weights} <= _WEIGHTS:
                raise Obstacle("has weights of another kind")
            return KINDS[type(layer)](layer, self, node.input_tensors, node.outputs[0])
        except Obstacle as obstacle:
            found = [self._units.get(id(tensor)) for tensor in node.input_tensors]
            return Barrier(layer, [units for units in found if units], str(obstacle))

    def units(self, tensor, axis=None):
        """The units of a tensor; those along `axis` of one from a barrier.

        Raises:
            Obstacle: If they are not known, or lie along another axis.
        """
        units = self._units.get(id(tensor))
        if units is None and axis is None:
            raise Obstacle("follows a barrier or an input")
        if units is None:
            if tensor.shape[axis] is None:
                raise Obstacle("works along an axis of a size that is not known")
            units = self.new(axis, np.full(tensor.shape[axis], np.nan))
            self.fix(units, "it stays with an input, or with what a barrier puts out")
        if axis not in (None, units.axis):
            raise Obstacle("works along another axis")
        return units

    def new(self, axis, values):
        """Units that are tied to no others."""
        wires = len(self._wires) + np.arange(len(values))
        self._wires = np.append(self._wires, wires)
        return Units(axis, wires, values)

    def tie(self, wires, others):
        """Makes the units of two tensors stay or go together, pair by pair."""
        for wire, other in zip(wires, others, strict=True):
            self._wires[self._wires == self._wires[other]] = self._wires[wire]

    def fix(self, units, reason):
        """Makes units stay."""
        self._fixed.append((units, reason))

    def _keep(self, wires, reason):
        for wire in self._wires[wires]:
            self._reasons.setdefault(wire, reason)

    def reasons(self, units):
        """Why each of the units stays, or `None`."""
        found = map(self._reasons.get, self._wires[units.wires])
        return np.array([*found], object)

    def stays(self, units):
        """Which of the units stay."""
        return np.array([reason is not None for reason in self.reasons(units)])
