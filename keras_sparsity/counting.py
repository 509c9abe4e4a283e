"""How sparse a model is under inference, as counted while it trains."""

import math

from keras import ops

from keras_sparsity.selection import (
    Governed,
    full_precision,
    governed_weights,
    name_within,
    prunable,
)

# The resolution of float16: a sum in it that holds the largest weight of a tensor would
# not notice one below this part of it. Relative to the tensor, so that a layer and any
# multiple of it, which batch normalization makes equal, count the same.
NEAR_ZERO = 2**-10


def counted_weights(model) -> dict[str, Governed]:
    """The weights that sparsity is counted over, by name."""
    weights = governed_weights(model) or [
        Governed(v, "none", full_precision(v)) for v in prunable(model)
    ]
    named: dict[str, Governed] = {}
    for weight in weights:
        name = name_within(model, weight.variable)
        while name in named:  # a layer may have two of one name in it
            name += "+"
        named[name] = weight
    return named


def count_zeros(weights: dict[str, Governed]) -> dict:
    """The parts of `weights` that are zero and nearly zero, in all and of each.

    The threshold of each, or `None`, stands beside its own.
    """
    rows, total, zeros, near_zeros = {}, 0, 0, 0
    for name, weight in weights.items():
        stored = full_precision(weight.variable)
        # A gate may hide a NaN, which is no zero.
        magnitude = ops.abs(ops.where(ops.isnan(stored), stored, weight.effective))
        limit = NEAR_ZERO * ops.max(magnitude)
        size = math.prod(magnitude.shape)
        zero = int(ops.sum(ops.cast(ops.equal(magnitude, 0), "int32")))
        near = int(ops.sum(ops.cast(ops.less_equal(magnitude, limit), "int32")))
        threshold = weight.threshold
        if threshold is not None:
            threshold = finite(float(ops.convert_to_numpy(threshold)))
        rows[name] = {
            "sparsity": zero / size,
            "near_zero": near / size,
            "threshold": threshold,
        }
        total, zeros, near_zeros = total + size, zeros + zero, near_zeros + near
    return {
        "sparsity": zeros / max(total, 1),
        "near_zero": near_zeros / max(total, 1),
        "weights": rows,
    }


def finite(value):
    """JSON has no NaN and no infinity: they become null."""
    return value if math.isfinite(value) else None
