"""The callback that leads a training to the sparsity asked for."""

import math
import warnings

import keras

from keras_sparsity.checks import check_number
from keras_sparsity.selection import governors, to_array

# Times at which the sparsity is looked at, and the strengths are changed: in the whole
# training at least, and in an epoch at least.
_LOOKS = 50
_LOOKS_PER_EPOCH = 5

# The part of the training in which the target is approached evenly; and the part in
# which, from then on, what is still missing should come.
_APPROACH = 0.8
_CORRECTION = 0.1

# The largest change of the logarithm of the strengths at a look, as a part of their
# range: LTP's thresholds follow prices that grow by orders of magnitude, HALO's scales
# need time to answer. And the rate, in logarithms of the weights left per look, that
# is too small to matter.
_CHANGE = 1 / 15
_STILL = 0.01

# The part of the change that is made when there are enough zeros. What still comes then
# comes of the weights, not of the price; taken back further and further, thresholds
# fall into the gap that they have left and open the gates of weights near zero.
_ARRIVED = 0.25

# The part of the sparsity that shows that a method has begun to prune. HALO's scales
# need time before, in which being behind is no reason to push: its `patience`.
_BEGUN = 0.2

# A target is missed by so much, or by so much of the weights that were to be left.
_MISSED, _MISSED_OF_LEFT = 0.02, 0.25


class SparsityTarget(keras.callbacks.Callback):
    """Steers HALO or LTP so that training ends at the sparsity asked for.

    Five times in each epoch, more often where there are less than ten, it compares how
    fast the weights left become fewer with how fast they must, to be as few as asked
    for when 80 % of the training are over, and changes the `strength` of every HALO and
    LTP in the model, the factor on its penalty:

    ```
    left     = log(1 - sparsity now)
    needed   = (left - log(1 - sparsity)) / looks that remain
    rate     = left at the last look - left
    change   = (needed - rate) / (|needed| + |rate| + 0.01)
    strength = strength * range ** (change / 15)       a quarter of it if needed < 0
    ```

    where `range` is the highest strength over the lowest: 1e6 over 1e-3 for LTP, 10
    over 0.1 for HALO. The last looks always see a tenth of the training before them.
    HALO's scales need time before a weight falls: its strength changes only when a
    fifth of the sparsity is there or half of the training over.

    A weight counts as gone where LTP's hard gate is closed, and where HALO's scale has
    come to rest at its floor, which is where a `prune` to the same sparsity costs
    nothing. The coefficients of the model (`l0`, or `xi` and `psi`) are where it
    begins; what they should have been is found on the way, without compiling again.

    Thresholds come down again slowly, and weights that were given up hardly come back:
    coefficients that are much too large for the sparsity cannot be made up for. Begin
    low: LTP with a tenth of the `l0` that would do without. And both methods need a
    learning rate that still moves something when the target comes near: one that falls
    evenly, as along a cosine, serves better than one that falls in steps early on.
    A warning says so where training ends off the target by more than 0.02, or by more
    than a quarter of the weights that were to be left.

    Args:
        sparsity: Float in (0, 1): the part of the weights that the methods govern
            that shall be zero at the end of training.

    Raises:
        ValueError: If `sparsity` is out of its range; at the start of training, if
            nothing in the model can be steered; at the end of an epoch whose number of
            batches was not known, if a `SparsityTrail` stands before.

    Example:

    ```python
    model = ks.sparsify(model, functools.partial(ks.LTP, l0=1e-6))
    model.compile(ks.SparsityOptimizer("sgd"), loss, metrics=["accuracy"])
    model.fit(x, y, epochs=20, callbacks=[ks.SparsityTarget(0.95)])
    ```
    """

    def __init__(self, sparsity):
        super().__init__()
        self.sparsity = check_number("sparsity", sparsity, above=0)
        if self.sparsity >= 1:
            raise ValueError(
                "Argument `sparsity` must be in (0, 1). "
                f"Received: sparsity={sparsity!r}"
            )

    def on_train_begin(self, logs=None):
        _ = self.model.losses  # where scales are made late
        self._governors = [
            governor
            for governor in governors(self.model)
            if hasattr(governor, "strength")
        ]
        if not self._governors:
            raise ValueError(
                "`SparsityTarget` must be given to a model with HALO or LTP in it. "
                f"Received: model '{self.model.name}' without."
            )
        epochs = max(1, self.params["epochs"])
        self._per_epoch = max(_LOOKS_PER_EPOCH, math.ceil(_LOOKS / epochs))
        if self.params["steps"]:  # of generators it is not known
            self._per_epoch = min(self._per_epoch, self.params["steps"])
        self._left = None  # not before other callbacks have restored what they restore

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._looks = epoch, 0
        if self._left is None:
            self._left = self._log_left()

    def on_train_batch_end(self, batch, logs=None):
        steps = self.params["steps"]
        looks = (batch + 1) * self._per_epoch // steps if steps else 0
        if looks > self._looks:
            # More than one at a time where a call has many steps.
            passed, self._looks = looks - self._looks, looks
            if hasattr(self.model, "jax_state_sync"):
                self.model.jax_state_sync()  # variables are elsewhere during an epoch
            epochs = self._epoch + looks / self._per_epoch
            self._steer(epochs, self._per_epoch / passed)

    def on_epoch_end(self, epoch, logs=None):
        if self._looks:
            return
        if "sparsity" in (logs or {}):
            raise ValueError(
                "`SparsityTarget` must be given before `SparsityTrail` where the "
                "number of batches is not known: it steers at the end of an epoch "
                "then, and a trail keeps what it finds. Received: the other order."
            )
        self._steer(epoch + 1, 1)

    def on_train_end(self, logs=None):
        if self._left is None:
            return  # nothing was trained
        reached = 1 - math.exp(self._log_left())
        off = min(_MISSED, _MISSED_OF_LEFT * (1 - self.sparsity))
        if abs(reached - self.sparsity) > off:
            coefficients = "higher" if reached < self.sparsity else "lower"
            warnings.warn(
                f"`SparsityTarget` was to lead to a sparsity of {self.sparsity}, and "
                f"training ended at {reached:.4f} after {self._epoch + 1} of "
                f"{self.params['epochs']} epochs. What leads nearer: more epochs, a "
                f"learning rate that falls later, or {coefficients} coefficients to "
                "begin with (`l0` of LTP, `xi` and `psi` of HALO).",
                stacklevel=2,
            )

    def _steer(self, epochs, looks_per_epoch):
        """Changes the strengths, `epochs` after the start of the training."""
        progress = epochs / self.params["epochs"]
        last, self._left = self._left, self._log_left()
        remaining = max(_APPROACH - progress, _CORRECTION)
        looks = max(1.0, remaining * self.params["epochs"] * looks_per_epoch)
        needed = (self._left - math.log(1 - self.sparsity)) / looks
        rate = last - self._left
        change = (needed - rate) / (abs(needed) + abs(rate) + _STILL)
        if needed < 0:
            change *= _ARRIVED
        begun = self._left <= math.log(1 - _BEGUN * self.sparsity)
        for governor in self._governors:
            strength = float(to_array(governor.strength))
            # A strength that was changed tells, after a restart too, that it had begun.
            if not begun and strength == 1 and progress < governor.patience:
                continue
            low, high = governor.strength_range
            strength *= (high / low) ** (_CHANGE * change)
            governor.strength.assign(min(max(strength, low), high))

    def _log_left(self):
        """The logarithm of the part of the weights that is left."""
        counts = [governor.count_pruned() for governor in self._governors]
        pruned, size = (sum(column) for column in zip(*counts, strict=True))
        return math.log(max(size - pruned, 1) / size)
