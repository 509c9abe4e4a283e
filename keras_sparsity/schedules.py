"""How sparse `MagnitudePruning` makes a layer at which step."""

import keras
from keras import ops

from keras_sparsity.checks import check_fraction, check_integer


@keras.saving.register_keras_serializable("keras_sparsity")
class ConstantSparsity:
    """One sparsity from a step on.

    ```
    sparsity(step) = final_sparsity if step >= begin_step else 0
    ```

    Args:
        final_sparsity: Float in [0, 1), the part of the weights that is zero.
        begin_step: Integer >= 0, the training step of the first prune. Defaults to 0.
        frequency: Integer >= 1, steps between two prunes. Defaults to 100.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    ```python
    MagnitudePruning(layer, ConstantSparsity(0.9, begin_step=1000))
    ```
    """

    def __init__(self, final_sparsity, begin_step=0, frequency=100):
        self.final_sparsity = check_fraction("final_sparsity", final_sparsity)
        self.begin_step = check_integer("begin_step", begin_step, at_least=0)
        self.frequency = check_integer("frequency", frequency, at_least=1)

    def __call__(self, step):
        """The sparsity at `step`, an integer tensor."""
        return ops.where(step >= self.begin_step, self.final_sparsity, 0.0)

    def is_due(self, step):
        """Whether weights are pruned at `step`, an integer tensor: a boolean one."""
        steps = step - self.begin_step
        return ops.logical_and(steps >= 0, ops.equal(steps % self.frequency, 0))

    def get_config(self):
        return dict(vars(self))

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable("keras_sparsity")
class CubicSparsity(ConstantSparsity):
    """A sparsity that rises fast and then slowly.

    ```
    progress = clip((step - begin_step) / (end_step - begin_step), 0, 1)
    sparsity(step) = final_sparsity
                     + (initial_sparsity - final_sparsity) * (1 - progress)**3
    ```

    and 0 before `begin_step`.

    Args:
        final_sparsity: Float in [0, 1), the part of weights that is zero in the end.
        end_step: Integer > `begin_step`, the training step at which it is reached.
        begin_step: Integer >= 0, the training step of the first prune. Defaults to 0.
        initial_sparsity: Float in [0, 1), at `begin_step`. Defaults to 0.
        frequency: Integer >= 1, steps between two prunes. Defaults to 100.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    ```python
    MagnitudePruning(layer, CubicSparsity(0.95, end_step=6000))
    ```

    Reference:

    - [Zhu and Gupta, To prune, or not to prune](https://arxiv.org/abs/1710.01878),
        section 3.
    """

    def __init__(
        self,
        final_sparsity,
        end_step,
        begin_step=0,
        initial_sparsity=0.0,
        frequency=100,
    ):
        super().__init__(final_sparsity, begin_step, frequency)
        first = self.begin_step + 1
        self.end_step = check_integer("end_step", end_step, at_least=first)
        self.initial_sparsity = check_fraction("initial_sparsity", initial_sparsity)

    def __call__(self, step):
        """The sparsity at `step`, an integer tensor."""
        steps = ops.cast(step, "float32") - self.begin_step
        progress = ops.clip(steps / (self.end_step - self.begin_step), 0.0, 1.0)
        rise = self.final_sparsity - self.initial_sparsity
        sparsity = self.final_sparsity - rise * (1.0 - progress) ** 3
        return ops.where(step >= self.begin_step, sparsity, 0.0)

    def is_due(self, step):
        """Whether weights are pruned at `step`: the last one, `end_step`, always is."""
        return ops.logical_or(super().is_due(step), ops.equal(step, self.end_step))
