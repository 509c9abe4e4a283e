"""Layers around layers: LTP, which learns thresholds, and Penalized."""

import functools
import math

import keras
from keras import ops

from keras_sparsity.bounds import Bounds
from keras_sparsity.checks import check_number
from keras_sparsity.handover import Handover
from keras_sparsity.selection import Governed, choose, full_precision
from keras_sparsity.steering import Steering, shift_thresholds, weights_to_go
from keras_sparsity.substitution import (
    SubstitutingWrapper,
    TransparentWrapper,
    Untracked,
)

# The largest part of the largest w**2 that a threshold can take: a layer always keeps
# its largest weight, and gradients still reach it when the threshold rests there.
_HIGHEST = 1 - 2**-10

# A kernel of equal values has no spread to measure thresholds with. This relative
# floor on its variance leaves its gates open. One of zeros has no size either.
_SMALLEST_VARIANCE = 1e-6
_ZERO = 1e-30


def magnitude_variance(squares, w):
    """`Var(|w|)`, the population variance, as a float32 scalar > 0."""
    mean_square = ops.mean(squares)
    variance = mean_square - ops.square(ops.mean(ops.abs(w)))
    variance = ops.maximum(variance, _SMALLEST_VARIANCE * mean_square)
    return ops.where(variance > _ZERO, variance, 1.0)


@keras.saving.register_keras_serializable("keras_sparsity")
class LTP(SubstitutingWrapper):
    """Learned threshold pruning: a layer that learns which of its weights to keep.

    Every gated weight tensor has one trainable threshold. With
    `m = sigmoid((w**2 - tau) / T)` and `T = temperature * Var(|w|)`, the layer computes

    ```
    w * m                  in training (the soft gate)
    w * (w**2 > tau)       in inference (the hard gate)
    ```

    and adds `l0 * sum(m)`, an estimate of the number of weights kept, to the loss. The
    gate is constant with respect to `w` in every gradient, as in the paper: weights
    get `m` times their gradient, thresholds get the exact one.

    `l0` is the price of a weight: at rest a weight is kept if deleting it would
    raise the loss by more than `l0`, to first order.

    The layer is called, built, saved and cloned like the layer in it and takes its
    name. A threshold is never negative and never above the largest `w**2`: the largest
    weight is always kept. A tie with the threshold is pruned. Where all magnitudes are
    equal, all weights are kept. Weights and gates are float32 under every dtype policy;
    only the product is cast to the layer's compute type.

    Args:
        layer: The `keras.Layer` to prune: any that has a trainable weight of rank 2 or
            more.
        l0: Float >= 0, the coefficient of the number of weights. It adds up over
            weights, so useful values are small: 1e-6 to 3e-5. Defaults to 1e-6.
        temperature: Float > 0, the width of the soft gate in units of `Var(|w|)`.
            Defaults to 1e-2.
        initial_threshold: Float >= 0, in `threshold_units`. Defaults to 0: nothing is
            pruned at the start, but the soft gate is `sigmoid(w**2 / T)`, so in
            training weights near zero count half from the first step on.
        threshold_units: `"variance"`: the threshold is `tau / Var(|w|)`, of which
            every layer can have the same and one learning rate serves all; or
            `"absolute"`, the paper's: the threshold is `tau`, whose gradient grows as
            the spread of the weights falls; take `variables="kernel"` with it where
            biases have rank 2 and start at zero (`GRU`). Defaults to `"variance"`.
        variables: Which weights to gate: `None` for every trainable weight of rank 2
            or more (some layers have biases of rank 2: `"kernel"` leaves them out), a
            regular expression that is searched in their names, or a predicate on the
            variable. Defaults to `None`.
        **kwargs: `name` (defaults to the layer's) and `trainable`.

    Attributes:
        thresholds: List of float32 scalar variables, one for each gated weight, named
            `ltp_threshold_...`, in `threshold_units`.
        strength: Float32 scalar variable, 1 unless `SparsityTarget` steers it: the
            factor on `l0`.

    Raises:
        ValueError: If an argument is out of its range, if the layer has nothing to
            gate (when it is built), or if its weights are governed already.

    Example:

    ```python
    x = LTP(keras.layers.Conv2D(64, 3), l0=1e-6)(x)
    ```

    Reference:

    - [Azarian et al., Learned Threshold Pruning](https://arxiv.org/abs/2003.00075),
        section 3. The units of the variance are this package's.
    """

    # Taken back further and further when there are enough zeros, thresholds fall into
    # the gap that they have left and open the gates of weights near zero. Crossing such
    # a gap closes nothing for some looks and then much at once: hence the brake.
    steering = Steering(
        distance=weights_to_go,
        lowest=1e-3,
        highest=1e6,
        approach=0.8,
        correction=0.1,
        back=0.25,
        brake=1.5,
        moves_with_rate=True,
        place=shift_thresholds,
    )

    def __init__(
        self,
        layer,
        l0=1e-6,
        temperature=1e-2,
        initial_threshold=0.0,
        threshold_units="variance",
        variables=None,
        **kwargs,
    ):
        super().__init__(layer, variables=variables, **kwargs)
        self.l0 = check_number("l0", l0, at_least=0)
        self.temperature = check_number("temperature", temperature, above=0)
        self.initial_threshold = check_number(
            "initial_threshold", initial_threshold, at_least=0
        )
        if threshold_units not in ("variance", "absolute"):
            raise ValueError(
                'Argument `threshold_units` must be "variance" or "absolute". '
                f"Received: threshold_units={threshold_units!r}"
            )
        self.threshold_units = threshold_units

    def build_gates(self, variables):
        self._counts = Handover()
        self.thresholds = [
            self.add_weight(
                name=f"ltp_threshold_{self.suffix(variable)}",
                shape=(),
                dtype="float32",
                initializer=keras.initializers.Constant(self.initial_threshold),
                # A regularizer is counted once however often the layer is called.
                regularizer=functools.partial(self._price, index),
                constraint=Bounds(0.0),
                autocast=False,
            )
            for index, variable in enumerate(variables)
        ]
        # A variable, since `SparsityTarget` changes it while training is compiled.
        self.strength = self.add_weight(
            name="ltp_strength",
            shape=(),
            dtype="float32",
            initializer="ones",
            trainable=False,
            autocast=False,
        )

    def _price(self, index, threshold):
        variable = self.gated[index]
        handed = self._counts.take(index, (variable, self.thresholds[index]))
        count, slope = handed or self._count(*self._soft_gate(variable, threshold))
        # The count's value, with its exact derivative: nothing else of the gate is
        # kept from the call, no graph and no tensor of the kernel's size.
        threshold = ops.convert_to_tensor(threshold)
        count = count + slope * (threshold - ops.stop_gradient(threshold))
        return self.strength * (self.l0 * count)

    def _measure(self, variable, threshold):
        """Squares of the weights, `tau`, the unit of the threshold and `Var(|w|)`."""
        w = ops.stop_gradient(ops.cast(variable, "float32"))
        squares = w * w
        variance = magnitude_variance(squares, w)
        unit = variance if self.threshold_units == "variance" else 1.0
        tau = threshold * unit
        # Held below the largest square, but in value only: the gradient, which would
        # be cut off by a minimum, can bring a threshold back.
        held = ops.stop_gradient(ops.minimum(tau, _HIGHEST * ops.max(squares)))
        return squares, held + (tau - ops.stop_gradient(tau)), unit, variance

    def _soft_gate(self, variable, threshold):
        """The gate, and how steeply its argument falls with the threshold."""
        squares, tau, unit, variance = self._measure(variable, threshold)
        sharpness = 1 / (self.temperature * variance)
        # A sum, with the signs on the scalars: TensorFlow negates what it subtracts.
        return ops.sigmoid(squares * sharpness + -tau * sharpness), unit * sharpness

    def _count(self, gate, steepness):
        """`sum(m)` and its derivative with respect to the threshold, as constants."""
        gate = ops.stop_gradient(gate)
        count = ops.sum(gate)
        return count, steepness * (ops.sum(gate * gate) - count)

    def effective_weights(self, training):
        weights = []
        pairs = zip(self.gated, self.thresholds, strict=True)
        for index, (variable, threshold) in enumerate(pairs):
            if training:
                gate, steepness = self._soft_gate(variable, threshold)
                count = self._count(gate, steepness)
                self._counts.put(index, (variable, threshold), count)
                weights.append(ops.cast(variable, "float32") * gate)
            else:
                squares, tau, *_ = self._measure(variable, threshold)
                weights.append(ops.where(squares > tau, full_precision(variable), 0.0))
        return weights

    def relative_squares(self):
        """The squares of the gated weights over `tau`, infinite if always kept."""
        for variable, threshold in zip(self.gated, self.thresholds, strict=True):
            squares, _, unit, _ = self._measure(variable, threshold)
            kept = squares > _HIGHEST * ops.max(squares)
            # By the threshold as it is trained, which a factor moves.
            yield ops.where(kept, math.inf, squares / (threshold * unit))

    def governed_weights(self):
        """What inference computes with: see `selection.Governed`."""
        return [
            Governed(variable, "LTP", effective, self._measure(variable, threshold)[1])
            for variable, effective, threshold in zip(
                self.gated,
                self.effective_weights(training=False),
                self.thresholds,
                strict=True,
            )
        ]

    def count_pruned(self):
        """How many of the gated weights inference computes without, of how many."""
        gates = self.effective_weights(training=False)
        zeros = sum(int(ops.sum(ops.cast(ops.equal(w, 0), "int32"))) for w in gates)
        return zeros, sum(math.prod(w.shape) for w in gates)

    def get_config(self):
        config = {
            "l0": self.l0,
            "temperature": self.temperature,
            "initial_threshold": self.initial_threshold,
            "threshold_units": self.threshold_units,
        }
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable("keras_sparsity")
class Penalized(TransparentWrapper):
    """A layer in which every kernel has a regularizer of its own.

    For layers whose config has one regularizer for several kernels, as
    `MultiHeadAttention`, or none. A regularizer that a kernel has already is kept: the
    penalties add up. The layer itself computes what it would without the wrapper.

    Args:
        layer: The `keras.Layer` to regularize.
        regularizer: A `keras.regularizers.Regularizer`; every trainable weight of rank
            2 or more in the layer gets a fresh copy.
        **kwargs: `name` (defaults to the layer's) and `trainable`.

    Attributes:
        regularizers: List of the copies, in the order of the layer's weights.

    Raises:
        TypeError: If `regularizer` is not a regularizer.
        ValueError: If the layer has nothing to regularize, or is governed already.

    Example:

    ```python
    attention = keras.layers.MultiHeadAttention(num_heads=4, key_dim=32)
    x = Penalized(attention, HALO(xi=3e-7, psi=5e-4))(x, x)
    ```
    """

    def __init__(self, layer, regularizer, **kwargs):
        super().__init__(layer, **kwargs)
        if not isinstance(regularizer, keras.regularizers.Regularizer):
            raise TypeError(
                "Argument `regularizer` must be a `keras.regularizers.Regularizer`. "
                f"Received: regularizer={regularizer!r}"
            )
        # Never computed itself, and so no part of this layer.
        self._prototype = Untracked([regularizer])

    def build(self, input_shape=None):
        super().build(input_shape)
        self.regularizers = []
        self._kernels = Untracked(choose(self.layer))
        (prototype,) = self._prototype.content
        for kernel in self._kernels.content:
            copy = type(prototype).from_config(prototype.get_config())
            self.regularizers.append(copy)
            copy(kernel)  # creates its scale now
            kernel.regularizer = _both(kernel.regularizer, copy)

    def governed_weights(self):
        """What inference computes with: see `selection.Governed`."""
        return [
            Governed(kernel, type(copy).__name__, full_precision(kernel))
            for kernel, copy in zip(
                self._kernels.content, self.regularizers, strict=True
            )
        ]

    def get_config(self):
        (regularizer,) = self._prototype.content
        serialized = keras.saving.serialize_keras_object(regularizer)
        return {**super().get_config(), "regularizer": serialized}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        config["regularizer"] = keras.saving.deserialize_keras_object(
            config["regularizer"], custom_objects=custom_objects
        )
        return super().from_config(config, custom_objects=custom_objects)


def _both(first, second):
    if first is None:
        return second
    return lambda kernel: first(kernel) + second(kernel)
