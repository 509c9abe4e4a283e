"""What each kind of layer does to units: see `units`.

Kinds are layers that work unit by unit, or add units up. Any other layer is a barrier,
and all units that go into it stay.
"""

import keras
import numpy as np
from keras import layers, ops

from keras_sparsity.selection import to_array
from keras_sparsity.units import Call, Obstacle, Units

# Those that take one number at a time.
_ACTIVATIONS = {
    getattr(keras.activations, name)
    for name in (
        "celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh "
        "leaky_relu linear log_sigmoid mish relu relu6 selu sigmoid silu soft_shrink "
        "softplus softsign sparse_plus sparse_sigmoid squareplus tanh tanh_shrink"
    ).split()
}

_PADS = "it is constant, not 0, and '{}' pads with zeros"


class Barrier(Call):
    """A layer that may do anything: all that goes into it stays."""

    def __init__(self, layer, inputs, obstacle):
        self.layer = layer
        self._inputs = inputs
        self._obstacle = obstacle

    def uses(self):
        reason = f"it goes into '{self.layer.name}', which {self._obstacle}"
        for units in self._inputs:
            yield units, np.ones_like(units.used), reason

    def dead(self, reasons):
        if KINDS.get(type(self.layer)) is not _Mixing:
            return 0, []
        kernel = to_array(self.layer.kernel)
        live = np.any(kernel, axis=tuple(range(kernel.ndim - 1)))
        dead = len(live) - np.count_nonzero(live)
        return len(live), [f"its layer {self._obstacle}"] * dead


class _Mixing(Call):
    """Dense and convolution: each output is a sum over all inputs."""

    def __init__(self, layer, network, inputs, output):
        super().__init__(layer, network, inputs, output)
        (tensor,) = inputs
        if getattr(layer, "groups", 1) > 1:
            raise Obstacle("has groups")
        if len(layer.weights) != 1 + layer.use_bias:  # as those of its activation
            raise Obstacle("has weights of another kind")
        axis = _channels(layer, tensor)
        self._input = network.units(tensor, axis)
        kernel = _in_float32(layer.kernel)
        kernel = kernel.reshape(-1, *kernel.shape[-2:])
        self._feeds = kernel.any(0)
        self._sums = kernel.sum(0)
        self._folds = _folds(layer, self._input)
        if layer.activation in _ACTIVATIONS:
            varies = self._feeds[~self._folds].any(0)
            values = _activated(layer, self._constants(self._folds))
            self.output = network.new(axis, np.where(varies, np.nan, values))
        else:
            self.output = network.new(axis, np.full(kernel.shape[-1], np.nan))
            network.fix(self.output, "the activation of its layer may mix units")

    def _constants(self, folded):
        """What constant inputs add up to, with the bias."""
        return self._input.values[folded] @ self._sums[folded] + _bias(self.layer)

    def uses(self):
        used = (self._feeds & ~self._folds[:, None])[:, self.output.used].any(1)
        name, known = self.layer.name, self._input.known
        yield self._input, used & known, _PADS.format(name)
        reason = f"it shares its place with a unit that '{name}' uses"
        yield self._input, used & ~known, reason

    def dead(self, reasons):
        return _reasons_of_dead(self.output, reasons)

    def smaller(self, stays):
        before, after = stays(self._input), stays(self.output)
        if before.all() and after.all():
            return None
        # Units that nothing uses may stay for others' sake. Some of their inputs are
        # gone, so that they have other values, if none that anything sees: 0, which
        # is finite, as `0 * inf` in the next sum would not be.
        live = self.output.used | self.output.known
        kernel = np.where(live, to_array(self.layer.kernel), 0)
        bias = np.where(live, self._constants(self._folds & ~before), 0)[after]
        uses_bias = self.layer.use_bias or bool(bias.any())
        size = "units" if hasattr(self.layer, "units") else "filters"
        arguments = {size: int(after.sum()), "use_bias": uses_bias}
        weights = {"kernel": kernel[..., before, :][..., after]}
        return arguments, weights | ({"bias": bias} if uses_bias else {})


class _Unitwise(Call):
    """Each output comes from one input, and is what that is: dropout."""

    # Why a constant stays of which the layer makes none.
    _reason = "it is constant, but what '{}' makes of it is not"

    def __init__(self, layer, network, inputs, output):
        super().__init__(layer, network, inputs, output)
        if getattr(layer, "noise_shape", None) is not None:
            raise Obstacle("has a noise shape")
        (self._tensor,) = inputs
        self._input = network.units(self._tensor, self._axis())
        self._source = self._sources()
        rank = len(output.shape)
        axis = self._input.axis if rank == len(self._tensor.shape) else 1
        self.output = Units(axis, self._input.wires[self._source], self._values())

    def _axis(self):
        """Along which axis the units must lie, if the layer is not free."""

    def _sources(self):
        """From which input each output comes."""
        return np.arange(len(self._input.wires))

    def _values(self):
        """What each output always is."""
        return self._input.values

    def uses(self):
        # Not where the output is constant whatever the input is.
        before, after = self._input.known[self._source], self.output.known
        reason = self._reason.format(self.layer.name)
        for which, why in ((before & ~after, reason), (before == after, None)):
            used = np.zeros_like(self._input.used)
            used[self._source[which & self.output.used]] = True
            yield self._input, used, why


class _Flattening(_Unitwise):
    """Every position of a channel becomes a unit."""

    def _sources(self):
        shape = self._tensor.shape[1:]
        if None in shape:
            raise Obstacle("flattens a size that is not known")
        index = _lay(np.arange(len(self._input.wires)), self._input.axis, len(shape))
        return to_array(_called(self.layer, np.broadcast_to(index, (1, *shape))))[0]

    def _values(self):
        return self._input.values[self._source]


class _Elementwise(_Unitwise):
    """Activations: the layer itself tells what it makes of a constant."""

    def __init__(self, layer, network, inputs, output):
        if getattr(layer, "activation", keras.activations.linear) not in _ACTIVATIONS:
            raise Obstacle("may mix units")
        super().__init__(layer, network, inputs, output)

    def _values(self):
        known = self._constant()
        if not known.any():
            return self._input.values
        # The layer itself is asked, on a batch of one that holds the constants, and
        # zeros elsewhere: each unit comes from one input, so that these do not matter.
        axis, shape = self._input.axis, self._tensor.shape[1:]
        values = _lay(np.nan_to_num(self._input.values), axis, len(shape))
        # At all positions, since there may be a slope for each.
        image = np.broadcast_to(values, (1, *(size or 1 for size in shape)))
        image = _in_float32(_called(self.layer, image.astype("float32")))
        image = np.moveaxis(image, axis, 0).reshape(len(known), -1)
        low, high = image.min(1), image.max(1)
        return np.where(known & np.isclose(low, high, 1e-6, 1e-7), low, np.nan)

    def _constant(self):
        """Which outputs may be constant."""
        return self._input.known

    def smaller(self, stays):
        kept = stays(self._input)
        if kept.all():
            return None
        weights = {}
        for weight in self.layer.weights:
            array = to_array(weight)
            axis = self._input.axis - 1 if array.ndim > 1 else 0
            if array.shape[axis] == len(kept):  # else there is one for all
                array = array.compress(kept, axis)
            weights[weight.name] = array
        return {}, weights


class _Normalization(_Elementwise):
    """Batch normalization, whose statistics inference does not change."""

    def _axis(self):
        return self.layer.axis % len(self._tensor.shape)

    def _constant(self):
        gamma = 1.0 if self.layer.gamma is None else _in_float32(self.layer.gamma)
        return self._input.known | (gamma == 0)


class _Spatial(_Unitwise):
    """Works on the positions of each channel, and leaves a constant: pooling."""

    def _axis(self):
        return _channels(self.layer, self._tensor)


class _Padding(_Spatial):
    """Zeros around an image: a constant stays one if it is 0."""

    _reason = _PADS

    def _values(self):
        return np.where(self._input.values == 0, 0.0, np.nan)


class _Depthwise(_Spatial):
    """Depthwise convolution: some filters for each channel."""

    _reason = _PADS

    def _sources(self):
        channels = np.arange(len(self._input.wires))
        return np.repeat(channels, self.layer.depth_multiplier)

    def _values(self):
        if self.layer.activation not in _ACTIVATIONS:
            raise Obstacle("may mix units")
        kernel = _in_float32(self.layer.kernel).reshape(-1, len(self._source))
        # The kernel's sum is what the layer does to a constant wherever it is applied,
        # but for the border of a padded image: there only a 0 stays what it is.
        folds = _folds(self.layer, self._input)[self._source]
        inputs = np.where(folds, self._input.values[self._source], 0)
        values = _activated(self.layer, inputs * kernel.sum(0) + _bias(self.layer))
        return np.where(folds | ~kernel.any(0), values, np.nan)

    def dead(self, reasons):
        return _reasons_of_dead(self.output, reasons)

    def smaller(self, stays):
        before, after = stays(self._input), stays(self.output)
        if before.all():
            return None
        weights = {"kernel": to_array(self.layer.kernel)[..., before, :]}
        if self.layer.use_bias:
            weights["bias"] = to_array(self.layer.bias)[after]
        return {}, weights


class _Merging(Call):
    """Add and its like: a unit stays in all branches or in none."""

    def __init__(self, layer, network, inputs, output):
        super().__init__(layer, network, inputs, output)
        self._inputs = [network.units(tensor) for tensor in inputs]
        shapes = {tuple(tensor.shape) for tensor in inputs}
        if len(shapes) > 1 or len({units.axis for units in self._inputs}) > 1:
            raise Obstacle("merges tensors of different shapes")
        first, *others = self._inputs
        for units in others:
            network.tie(first.wires, units.wires)
        rank = len(output.shape) - 1
        values = [_lay(units.values, first.axis, rank) for units in self._inputs]
        values = _called(layer, values)
        self.output = Units(first.axis, first.wires, _in_float32(values).ravel())

    def uses(self):
        for units in self._inputs:
            yield units, self.output.used, None


class _Concatenating(Call):
    """The units of one input after those of the other."""

    def __init__(self, layer, network, inputs, output):
        super().__init__(layer, network, inputs, output)
        axis = layer.axis % len(output.shape)
        self._inputs = [network.units(tensor, axis) for tensor in inputs]
        wires = np.concatenate([units.wires for units in self._inputs])
        values = np.concatenate([units.values for units in self._inputs])
        self.output = Units(axis, wires, values)

    def uses(self):
        ends = np.cumsum([len(units.wires) for units in self._inputs])[:-1]
        parts = np.split(self.output.used, ends)
        for units, used in zip(self._inputs, parts, strict=True):
            yield units, used, None


# By the very type: what is derived from one may do something else.
KINDS: dict[type, type[Call]] = {
    getattr(layers, name): kind
    for kind, names in {
        _Mixing: "Dense Conv1D Conv2D Conv3D",
        _Depthwise: "DepthwiseConv1D DepthwiseConv2D",
        _Normalization: "BatchNormalization",
        _Elementwise: "Activation ELU LeakyReLU PReLU ReLU",
        _Unitwise: "AlphaDropout Dropout GaussianDropout GaussianNoise Identity "
        "SpatialDropout1D SpatialDropout2D SpatialDropout3D",
        _Spatial: "AveragePooling1D AveragePooling2D AveragePooling3D "
        "GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D "
        "GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D "
        "MaxPooling1D MaxPooling2D MaxPooling3D",
        _Padding: "ZeroPadding1D ZeroPadding2D ZeroPadding3D",
        _Flattening: "Flatten",
        _Merging: "Add Average Subtract",
        _Concatenating: "Concatenate",
    }.items()
    for name in names.split()
}


def _channels(layer, tensor):
    """The axis of the channels."""
    first = getattr(layer, "data_format", None) == "channels_first"
    return 1 if first else len(tensor.shape) - 1


def _lay(values, axis, rank):
    """`values` along an axis of a batch of one of this rank, the batch not counted."""
    return values.reshape([-1 if i == axis else 1 for i in range(rank + 1)])


def _folds(layer, units):
    """Which constants do to the layer what they do at every position."""
    padded = getattr(layer, "padding", "valid") != "valid" and any(
        size > 1 for size in layer.kernel_size
    )
    return units.values == 0 if padded else units.known


def _bias(layer):
    return 0.0 if layer.bias is None else _in_float32(layer.bias)


def _called(layer, inputs):
    """What the layer makes of `inputs`; a penalty of that is not left in the model."""
    with keras.StatelessScope(collect_losses=True):
        return layer(inputs)


def _activated(layer, values):
    return _in_float32(layer.activation(ops.cast(values, layer.compute_dtype)))


def _in_float32(tensor):
    return to_array(tensor).astype("float32", copy=False)


def _reasons_of_dead(units, reasons):
    return len(units.used), list(reasons(units)[units.known | ~units.used])
