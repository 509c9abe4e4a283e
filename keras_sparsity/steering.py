"""How a method answers when it is steered, and the law that steers it."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from keras_sparsity.selection import to_array

# The largest rise of the logarithm of a strength at a look, as a part of its range:
# LTP's thresholds follow prices that grow by orders of magnitude, HALO's scales need
# time to answer. And the speed, a distance per look, that is too small to matter.
_CHANGE = 1 / 15
_STILL = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steering:
    """What `SparsityTarget` knows of a method.

    Args:
        distance: Function of the governors and a sparsity: how far they are from it,
            below 0 where it is exceeded.
        lowest: Float > 0, where its strength ends.
        highest: Float > `lowest`, where its strength ends.
        approach: Float in (0, 1): the part of the training in which the sparsity is
            approached evenly.
        correction: Float in (0, 1): the part of the training in which, from then on,
            what is still missing should come.
        back: Float in (0, 1]: the part of what is too much that is taken back at a
            time. Defaults to 1.
        brake: Float >= 1: how much faster a strength comes down than it goes up.
            Defaults to 1.
        moves_with_rate: Whether it goes on as fast with a lower learning rate and a
            strength that is higher by as much. Defaults to False.
        place: Function of the governors and a sparsity that brings them there at once,
            and says whether it could; `None` where nothing but training can. Defaults
            to `None`.
    """

    distance: Callable
    lowest: float
    highest: float
    approach: float
    correction: float
    back: float = 1.0
    brake: float = 1.0
    moves_with_rate: bool = False
    place: Callable | None = None

    def looks_left(self, progress, looks):
        """At how many of `looks` in a training what is missing should come."""
        return max(1.0, max(self.approach - progress, self.correction) * looks)

    def next_strength(self, strength, distance, last_distance, looks, slower):
        """The strength from a look on.

        Args:
            strength: The strength until then.
            distance: How far the sparsity is.
            last_distance: How far it was a look before.
            looks: At how many looks it should be reached.
            slower: The learning rate a look before over that of now.
        """
        needed = distance / looks
        if needed < 0:
            needed *= self.back
        speed = last_distance - distance
        change = (needed - speed) / (abs(needed) + abs(speed) + _STILL)
        if change < 0:
            change *= self.brake
        if self.moves_with_rate:
            strength *= slower
        strength *= (self.highest / self.lowest) ** (_CHANGE * change)
        return min(max(strength, self.lowest), self.highest)


def log_left(governors):
    """The logarithm of the part of the governors' weights that is left."""
    counts = [governor.count_pruned() for governor in governors]
    pruned, size = (sum(column) for column in zip(*counts, strict=True))
    return math.log(max(size - pruned, 1) / size)


def weights_to_go(governors, sparsity):
    """The logarithm of the weights left over those that shall be."""
    return log_left(governors) - math.log(1 - sparsity)


def scale_to_fall(governors, sparsity):
    """How far the smallest scale that shall stay is from where its weight is gone."""
    # In units of the latter, so that scales of several floors are one order.
    scales = np.concatenate(
        [(to_array(g.scale) / g.gone_below).ravel() for g in governors]
    )
    stays = min(round(sparsity * scales.size), scales.size - 1)
    return float(np.partition(scales, stays)[stays]) - 1


def shift_thresholds(governors, sparsity):
    """Multiplies the thresholds by the factor with which the sparsity is reached.

    Of trainable governors; what others have pruned counts. Where squares tie, and where
    more weights should go than can, it comes as near as it can.

    Returns:
        Whether there is such a factor.
    """
    shifted, size, zeros = [], 0, 0
    for governor in governors:
        pruned, count = governor.count_pruned()
        size += count
        if governor.trainable:
            shifted.append(governor)
        else:
            zeros -= pruned
    zeros += math.ceil(sparsity * size - 1e-6)  # 0.8 * 4400 is more than 3520
    ratios = [to_array(r).ravel() for g in shifted for r in g.relative_squares()]
    if not ratios:
        return False
    ratios = np.nan_to_num(np.concatenate(ratios).astype("float64"), posinf=math.inf)
    zeros = min(zeros, int(np.isfinite(ratios).sum()))
    if zeros <= 0:
        return False
    last = np.partition(ratios, zeros - 1)[zeros - 1]
    below, above = ratios[ratios < last], ratios[ratios > last]
    if ratios.size - above.size - zeros <= zeros - below.size or not below.size:
        gone, stays = last, above.min(initial=math.inf)
    else:
        gone, stays = below.max(), last
    factor = (gone + stays) / 2 if stays < math.inf else 2 * gone
    if not 0 < factor < math.inf:
        return False
    if not gone <= 1 < stays:
        for governor in shifted:
            for threshold in governor.thresholds:
                threshold.assign(factor * threshold)
    return True
