"""The range in which scales and thresholds are kept."""

import warnings

import keras
from keras import ops
from keras.src.backend.common import global_state


class Bounds(keras.constraints.Constraint):
    """Puts a variable back into `[low, high]` after an optimizer's update.

    Being called by the optimizer, it also warns if weight decay reached the variable.

    Args:
        low: Float, the smallest value.
        high: Float, the largest value, or `None` for no limit. Defaults to `None`.
    """

    def __init__(self, low, high=None):
        self.low = low
        self.high = high

    def __call__(self, variable):
        optimizer = _current_optimizer()
        # Keras has no public way to ask what `exclude_from_weight_decay` left out.
        if getattr(optimizer, "weight_decay", None) and optimizer._use_weight_decay(
            variable
        ):
            warnings.warn(
                f"Weight decay of the optimizer '{optimizer.name}' pulls scales or "
                "thresholds of the model towards zero. Compile the model with "
                "`SparsityOptimizer(optimizer)`, or first call "
                '`optimizer.exclude_from_weight_decay(var_names=["_scale", '
                '"_threshold"])`.',
                stacklevel=2,
            )
        if self.high is None:
            return ops.maximum(variable, self.low)
        return ops.clip(variable, self.low, self.high)


def _current_optimizer():
    """The optimizer that is applying an update, or `None`."""
    # Nothing public leads from a variable to its optimizer. An optimizer applies
    # constraints in a name scope of its own, which knows who opened it.
    scopes = global_state.get_global_attribute("name_scope_stack", default=[])
    return getattr(scopes[-1], "caller", None) if scopes else None
