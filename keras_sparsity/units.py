"""The units of a model: its neurons, filters and channels.

A unit is an entry of a tensor along one axis. For each call of a layer an object says
which units of its output are constant, which of its inputs are used where some of its
outputs are, and how the layer is without some of them: see `layer_kinds`.
"""

from typing import Any

import numpy as np


class Units:
    """The units of a tensor.

    Attributes:
        axis: Integer, the axis of the tensor along which they lie.
        wires: Array of integers: units of one wire stay or go together.
        values: Array of what each always is, NaN where that depends on the input.
        used: Array of booleans: whether an output of the model depends on it.
    """

    def __init__(self, axis, wires, values):
        self.axis = axis
        self.wires = wires
        self.values = np.where(np.isfinite(values), values, np.nan)
        self.used = np.zeros(len(wires), bool)

    @property
    def known(self):
        return ~np.isnan(self.values)


class Obstacle(Exception):
    """Why a call of a layer is a barrier: what the layer does."""


class Call:
    """What a call of a layer does to units.

    Args:
        layer: The layer, built.
        network: What the units of tensors are taken from, and new ones made with.
        inputs: List of the tensors that the layer is called with.
        output: The tensor that it returns.

    Attributes:
        output: The units of that, `None` where they are not known.

    Raises:
        Obstacle: If that is not known.
    """

    output: Any = None

    def __init__(self, layer, network, inputs, output):
        self.layer = layer

    def uses(self):
        """Yields units, which of them are used, and why these must stay.

        Without a reason it is that of the units that they become.
        """
        raise NotImplementedError

    def dead(self, reasons):
        """How many units the layer makes, and for each dead one why it stays.

        Args:
            reasons: Callable: array of that for `Units`, `None` for those that go.
        """
        return 0, []

    def smaller(self, stays):
        """The arguments and the weights that differ without the units that go.

        Args:
            stays: Callable: array of booleans for `Units`.

        Returns:
            Two dicts, of arguments and of arrays by name; `None` if nothing differs.
        """
