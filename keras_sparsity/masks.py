"""Layers whose weights are masked: KeepZeros and MagnitudePruning."""

import math

import keras
from keras import ops

from keras_sparsity.selection import Governed, full_precision
from keras_sparsity.substitution import SubstitutingWrapper


class _Masked(SubstitutingWrapper):
    """Base of the wrappers that keep a mask of ones and zeros for every weight."""

    method = ""

    def _mask_initializer(self, variable):
        return "ones"

    def build_gates(self, variables):
        self.masks = [
            self.add_weight(
                name=f"{self.method}_mask_{self.suffix(variable)}",
                shape=variable.shape,
                dtype="bool",
                initializer=self._mask_initializer(variable),
                trainable=False,
            )
            for variable in variables
        ]

    def effective_weights(self, training):
        return [
            ops.where(ops.convert_to_tensor(mask), full_precision(variable), 0.0)
            for variable, mask in zip(self.gated, self.masks, strict=True)
        ]

    def governed_weights(self):
        """What inference computes with: see `selection.Governed`."""
        return [
            Governed(variable, type(self).__name__, effective)
            for variable, effective in zip(
                self.gated, self.effective_weights(training=False), strict=True
            )
        ]


@keras.saving.register_keras_serializable("keras_sparsity")
class KeepZeros(_Masked):
    """A layer whose zero weights stay zero, whatever the optimizer does to them.

    ```
    kernel * mask          in training and in inference
    ```

    The mask is 1 where the weight was not zero when the wrapper was built around a
    built layer, and is saved with it. It is for fine-tuning a pruned model: momentum
    and weight decay move a stored weight even where its gradient is zero.

    Args:
        layer: The built `keras.Layer` whose zeros to keep.
        variables: Which weights have masks: see `LTP`. Defaults to `None`, every
            trainable weight of rank 2 or more.
        **kwargs: `name` (defaults to the layer's) and `trainable`.

    Attributes:
        masks: List of boolean variables, one for each such weight.

    Raises:
        ValueError: If the layer has no such weight, or its weights are governed
            already.

    Example:

    ```python
    tuned = ks.finalize(model, keep_zeros=True)   # KeepZeros around governed layers
    tuned.compile("adamw", "mse")
    tuned.fit(x, y)
    small = ks.finalize(tuned)                    # a plain model again
    ```
    """

    method = "keep"

    def _mask_initializer(self, variable):
        return lambda shape, dtype: ops.not_equal(variable, 0)

    def keep_zeros(self):
        """Makes the mask anew from the zeros that the weights have now."""
        for variable, mask in zip(self.gated, self.masks, strict=True):
            mask.assign(ops.not_equal(variable, 0))


@keras.saving.register_keras_serializable("keras_sparsity")
class MagnitudePruning(_Masked):
    """Gradual magnitude pruning: a layer's smallest weights become zero by schedule.

    ```
    kernel * mask,   mask = 0 for the floor(schedule(step) * size) smallest |kernel|
    ```

    Every weight tensor is pruned to the same sparsity. The step is counted, and the
    mask made anew, in the training calls of the layer itself, so no callback is
    needed; a layer that is called twice in a step counts two. While the layer is
    frozen, its mask and its step stay as they are.

    Args:
        layer: The `keras.Layer` to prune.
        schedule: `CubicSparsity`, `ConstantSparsity` or any registered serializable
            callable of the step with their method `is_due`.
        variables: Which weights to prune: see `LTP`. Defaults to `None`, every
            trainable weight of rank 2 or more.
        **kwargs: `name` (defaults to the layer's) and `trainable`.

    Raises:
        TypeError: If the schedule is not callable.
        ValueError: If the layer has nothing to prune, or is governed already.

    Example:

    ```python
    x = MagnitudePruning(keras.layers.Dense(300), CubicSparsity(0.95, 6000))(x)
    ```

    Reference:

    - [Zhu and Gupta, To prune, or not to prune](https://arxiv.org/abs/1710.01878).
    """

    method = "magnitude"

    def __init__(self, layer, schedule, variables=None, **kwargs):
        super().__init__(layer, variables=variables, **kwargs)
        if not (callable(schedule) and hasattr(schedule, "is_due")):
            raise TypeError(
                "Argument `schedule` must be a callable of the step with a method "
                f"`is_due`, as `CubicSparsity` is. Received: schedule={schedule!r}"
            )
        self.schedule = schedule

    def build_gates(self, variables):
        super().build_gates(variables)
        self.step = self.add_weight(
            name="magnitude_step",
            shape=(),
            dtype="int32",
            initializer="zeros",
            trainable=False,
            aggregation="only_first_replica",
        )

    def effective_weights(self, training):
        if training and self.trainable:
            step = ops.convert_to_tensor(self.step)
            is_due = self.schedule.is_due(step)
            sparsity = self.schedule(step)
            for variable, mask in zip(self.gated, self.masks, strict=True):
                magnitude = ops.abs(ops.stop_gradient(ops.cast(variable, "float32")))
                mask.assign(
                    ops.cond(
                        is_due,
                        lambda m=magnitude: _largest(m, sparsity),
                        lambda m=mask: ops.convert_to_tensor(m),
                    )
                )
            self.step.assign(step + 1)
        return super().effective_weights(training)

    def get_config(self):
        schedule = keras.saving.serialize_keras_object(self.schedule)
        return {**super().get_config(), "schedule": schedule}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        config["schedule"] = keras.saving.deserialize_keras_object(
            config["schedule"], custom_objects=custom_objects
        )
        return super().from_config(config, custom_objects=custom_objects)


def _largest(magnitude, sparsity):
    """Mask without the `floor(sparsity * size)` smallest entries, ties by position."""
    # Bits of floats >= 0 have the order of the floats, so 31 halvings of their range
    # find the entry at the cut exactly. A sort takes ten times as long, and more.
    bits = ops.view(ops.reshape(magnitude, (-1,)), "int32")
    size = math.prod(magnitude.shape)
    zeros = ops.cast(ops.floor(sparsity * size), "int32")

    def at_most(limit):
        return ops.sum(ops.cast(bits <= limit, "int32"))

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = at_most(middle) >= zeros
        return ops.where(enough, low, middle + 1), ops.where(enough, middle, high)

    low, _ = ops.fori_loop(0, 31, halve, (ops.min(bits), ops.max(bits)))
    ties = ops.cast(bits == low, "int32")
    pruned_ties = zeros - ops.sum(ops.cast(bits < low, "int32"))
    mask = (bits > low) | ((bits == low) & (ops.cumsum(ties) > pruned_ties))
    return ops.reshape(mask, magnitude.shape)
