"""The callback that steers a training to the sparsity asked for."""

import math
import warnings

import keras

from keras_sparsity.checks import check_fraction, check_number
from keras_sparsity.selection import governors, to_array
from keras_sparsity.steering import Steering, log_left

# Times at which the sparsity is looked at, and the strengths are changed: in the whole
# training at least, and in an epoch at least.
_LOOKS = 50
_LOOKS_PER_EPOCH = 5

# A target is missed by so much, thresholds are shifted at once by so much, or either by
# so much of the weights that were to be left.
_MISSED, _SHIFTED, _OF_LEFT = 0.005, 0.02, 0.25


class SparsityTarget(keras.callbacks.Callback):
    """Steers HALO or LTP so that training ends at the sparsity asked for.

    Five times in each epoch, more often where there are less than ten, it compares how
    fast each method approaches the sparsity with how fast it must, and changes the
    `strength` of every HALO and LTP in the model, the factor on its penalty:

    ```
    needed   = distance / checks that remain
    speed    = distance at the last check - distance
    change   = (needed - speed) / (|needed| + |speed| + 0.01)
    strength = strength * (highest / lowest) ** (change / 15)   in lowest to highest
    ```

    |                    | LTP                         | HALO                          |
    |--------------------|-----------------------------|-------------------------------|
    | distance           | log(weights left / wanted)  | scale / (2 * scale_floor) - 1 |
    | strength           | 1e-3 to 1e6                 | 1e-3 to 10                    |
    | checks that remain | to 80 % of what is before   | to 40 % of the training, or   |
    |                    | `hold`, or at least a tenth | at least a twentieth of it    |
    | needed, if < 0     | a quarter                   | the whole                     |
    | change, if < 0     | one and a half times        | six times                     |

    where HALO's distance is that of the smallest scale that shall not fall: scales come
    down together, and what counts them would see nothing before most of them arrive.
    LTP's strength rises also as a schedule lowers the learning rate, and falls as one
    raises it, by as much: with SGD a threshold moves by the product of the two. A model
    with both has each steered to the sparsity.

    A weight counts as gone where LTP's hard gate is closed, and where HALO's scale has
    come to rest at its floor, which is where a `prune` to the same sparsity costs
    nothing. The coefficients of the model (`l0`, or `xi` and `psi`) are where it
    begins; what they should have been is found on the way, without compiling again.

    In the last part of the training, `hold`, LTP has the sparsity: its thresholds are
    trained on with the strength that they have, and at each check, the last of all too,
    multiplied by the one factor that brings them there. The weights that are left
    settle, as they do in the end of gradual pruning.

    Thresholds come down again slowly, and weights that were given up hardly come back:
    coefficients that are much too large for the sparsity cannot be made up for. Begin
    low: LTP with a tenth of the `l0` that would do without. And both methods need a
    learning rate that still moves something when the target comes near: one that falls
    evenly, as along a cosine, serves better than one that falls in steps early on.
    HALO wants some hundred checks, 20 epochs: it steers too coarsely in few steps. It
    must arrive early, at ten times its strength at most: begin with a `psi` that is
    several times what would do without.
    A warning tells where training ends off the target by more than 0.005, as one does
    that another callback stops early, or comes to `hold` off by more than 0.02; or
    either by more than a quarter of the weights that were to be left. When training has
    ended, strengths are 1 again; one that is interrupted, or fails, leaves them as they
    are, for one that goes on.

    Args:
        sparsity: Float in (0, 1): the part of the weights that the methods govern
            that shall be zero at the end of training.
        hold: Float in [0, 1): the part of the training, at its end, in which LTP has
            the sparsity. 0 serves better where fine-tuning follows: LTP is brought to
            it at the last check alone then. Defaults to 0.35.

    Attributes:
        reached: Float, the part of them that was gone when training ended; `None`
            before.
        shifted_from: Float, the part of them that LTP had come to when its thresholds
            were brought to the sparsity at once; `None` before, and without LTP.

    Raises:
        ValueError: If an argument is out of its range; at the start of training, if
            nothing in the model can be steered; at the end of an epoch whose number of
            batches was not known, if a `SparsityTrail` stands before.

    Example:

    ```python
    model = ks.sparsify(model, functools.partial(ks.LTP, l0=1e-7))
    rate = keras.optimizers.schedules.CosineDecay(0.1, 20 * steps_per_epoch)
    sgd = functools.partial(keras.optimizers.SGD, momentum=0.9)
    model.compile(ks.SparsityOptimizer(sgd(rate), sgd()), loss, metrics=["accuracy"])
    model.fit(x, y, epochs=20, callbacks=[ks.SparsityTarget(0.95)])
    ```
    """

    def __init__(self, sparsity, hold=0.35):
        super().__init__()
        self.sparsity = check_number("sparsity", sparsity, above=0)
        if self.sparsity >= 1:
            raise ValueError(
                "Argument `sparsity` must be in (0, 1). "
                f"Received: sparsity={sparsity!r}"
            )
        self.hold = check_fraction("hold", hold)
        self.reached = self.shifted_from = None

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
        self._methods: dict[Steering, list] = {}
        for governor in self._governors:
            self._methods.setdefault(governor.steering, []).append(governor)
        self.reached = self.shifted_from = None
        self._epochs = max(1, self.params["epochs"])
        self._per_epoch = max(_LOOKS_PER_EPOCH, math.ceil(_LOOKS / self._epochs))
        if self.params["steps"]:  # of generators it is not known
            self._per_epoch = min(self._per_epoch, self.params["steps"])
        self._epoch = 0  # counted from 1: nothing was trained yet
        self._holds = False

    def on_epoch_begin(self, epoch, logs=None):
        # In every epoch, not only in the first after other callbacks have restored what
        # they restore: a rate that was changed in between would else be answered to by
        # a training that was not cut, and not by one that was.
        self._epoch, self._looks = epoch + 1, 0
        self._last = self._look()

    def on_train_batch_end(self, batch, logs=None):
        steps = self.params["steps"]
        looks = (batch + 1) * self._per_epoch // steps if steps else 0
        if looks > self._looks:
            # More than one at a time where a call has many steps.
            passed, self._looks = looks - self._looks, looks
            if hasattr(self.model, "jax_state_sync"):
                self.model.jax_state_sync()  # variables are elsewhere during an epoch
            epochs = self._epoch - 1 + looks / self._per_epoch
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
        # They were for this training: the next one would else begin with a price that
        # its end, where the learning rate is all but zero, had made enormous.
        for governor in self._governors:
            governor.strength.assign(1.0)
        if not self._epoch:
            return
        self.reached = 1 - math.exp(log_left(self._governors))
        self._warn_if_off(_MISSED, self.reached, "training ended at")

    def _warn_if_off(self, limit, reached, what):
        limit = min(limit, _OF_LEFT * (1 - self.sparsity))
        if abs(reached - self.sparsity) > limit:
            coefficients = "higher" if reached < self.sparsity else "lower"
            warnings.warn(
                f"`SparsityTarget` was to lead to a sparsity of {self.sparsity}, and "
                f"{what} {reached:.4f} in epoch {self._epoch} of "
                f"{self.params['epochs']}. What leads nearer: more epochs, a "
                f"learning rate that falls later, or {coefficients} coefficients to "
                "begin with (`l0` of LTP, `xi` and `psi` of HALO).",
                stacklevel=3,
            )

    def _look(self):
        """How far each method is from the sparsity, and the learning rate."""
        distances = [
            steering.distance(steered, self.sparsity)
            for steering, steered in self._methods.items()
        ]
        return distances, float(to_array(self.model.optimizer.learning_rate))

    def _steer(self, epochs, looks_per_epoch):
        """Changes the strengths, `epochs` after the start of the training."""
        (last_distances, last_rate), self._last = self._last, self._look()
        distances, rate = self._last
        slower = last_rate / rate if last_rate > 0 and rate > 0 else 1.0
        for (steering, steered), distance, last in zip(
            self._methods.items(), distances, last_distances, strict=True
        ):
            led = (1 - self.hold if steering.place else 1) * self._epochs
            if steering.place and epochs >= led and self._place(steering, steered):
                continue
            looks = steering.looks_left(epochs / led, led * looks_per_epoch)
            for governor in steered:
                strength = float(to_array(governor.strength))
                governor.strength.assign(
                    steering.next_strength(strength, distance, last, looks, slower)
                )

    def _place(self, steering, steered):
        """Brings a method to the sparsity at once, where it can."""
        if self._holds:
            return steering.place(steered, self.sparsity)
        led_to = 1 - math.exp(log_left(steered))
        self._holds = steering.place(steered, self.sparsity)
        if self._holds:
            self.shifted_from = led_to
            self._warn_if_off(_SHIFTED, led_to, "thresholds are shifted at once from")
        return self._holds
