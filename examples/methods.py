"""The ways from a new network to plain sparse ones that `compare.py` compares.

Every way has the same number of epochs in all, from the first dense one to the last of
fine-tuning. The last phase lowers the learning rate to zero, along a cosine; those
before it do so or leave it as it is, whichever serves the method better.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import keras
import numpy as np

import keras_sparsity as ks
from keras_sparsity.selection import walk

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way from a new network to plain sparse ones.

    Attributes:
        governs: Callable of the target, the number of steps and the settings, which
            are keyword arguments: the method, for `ks.sparsify`.
        settings: Dicts of which to choose one, on validation data: arguments of the
            method, and `pretrain`, `falls_from` or `multiplier` where they are to
            differ.
        pretrain: Part of the epochs that train the dense network before.
        targets: Whether each sparsity takes a training of its own. If not, one training
            serves all of them.
        cut: Callable of the trained model and the target: the plain sparse model.
        prunes: Whether it prunes at all: else its only sparsity is zero.
        steady: Whether the learning rate stays what it is until the last phase. If not,
            it falls to zero in each of them.
        falls_from: Part of the last phase after which the rate falls.
        callbacks: Callable of the target, the number of steps and the part of the
            epochs that fine-tunes after: for `fit`.
        multiplier: Learning rate of scales and thresholds over that of the weights.
    """

    governs: Callable
    settings: tuple = ({},)
    pretrain: float = 0.0
    targets: bool = False
    cut: Callable = ks.prune
    callbacks: Callable = lambda target, steps, finetune: []
    multiplier: float = 1.0
    prunes: bool = True
    steady: bool = False
    falls_from: float = 0.0


def penalty(regularizer, *settings, **fields):
    def governs(target, steps, **arguments):
        return regularizer(**arguments)

    return Method(governs, settings, **fields)


def gates(governs, *settings, **fields):
    """A dense network first, and then gates that come to the zeros of each target."""
    return Method(
        governs,
        settings or ({},),
        pretrain=0.5,
        targets=True,
        cut=lambda model, target: ks.finalize(model),
        steady=True,
        **fields,
    )


def cubic(target, steps):
    """From dense to `target` in three quarters of the steps; the rest is to recover."""
    return ks.CubicSparsity(
        target, end_step=max(1, steps * 3 // 4), frequency=max(1, steps // 100)
    )


def gradual(target, steps):
    return functools.partial(ks.MagnitudePruning, schedule=cubic(target, steps))


def masked(target, steps):
    return ks.KeepZeros


def learned(target, steps, **settings):
    return functools.partial(ks.LTP, **settings)


def steered(target, steps, finetune):
    if finetune:  # which is where the weights settle, not the end of this phase
        return [ks.SparsityTarget(target, hold=0)]
    return [ks.SparsityTarget(target)]


def cut_at_steps(target, steps, finetune):
    return [GlobalMagnitude(cubic(target, steps))]


class GlobalMagnitude(keras.callbacks.Callback):
    """Zeroes the smallest weights of a model of `KeepZeros` layers, by a schedule.

    `ks.MagnitudePruning` prunes every tensor to the same sparsity; this has one cut
    for all of them.
    """

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.step = 0

    def on_train_batch_begin(self, batch, logs=None):
        if self.schedule.is_due(self.step):
            if hasattr(self.model, "jax_state_sync"):
                self.model.jax_state_sync()  # variables are elsewhere during an epoch
            self.prune(float(self.schedule(self.step)))
        self.step += 1

    def prune(self, sparsity):
        pairs = [
            (abs(keras.ops.convert_to_numpy(variable)), mask)
            for layer in walk(self.model)
            if hasattr(layer, "masks")
            for variable, mask in zip(layer.gated, layer.masks, strict=True)
        ]
        magnitudes = np.concatenate([magnitude.ravel() for magnitude, _ in pairs])
        zeros = int(sparsity * magnitudes.size)
        cut = np.partition(magnitudes, zeros)[zeros]
        for magnitude, mask in pairs:
            mask.assign(magnitude >= cut)


# The settings are those that LeNet-300-100 on Fashion-MNIST has to choose from: another
# network has others, which `compare.py --settings` gives.
METHODS = {
    "dense": Method(lambda target, steps: None, prunes=False),
    "magnitude": Method(lambda target, steps: None),
    "l1": penalty(
        keras.regularizers.L1,
        {"l1": 3e-5},
        {"l1": 1e-4},
        {"l1": 1.7e-4},
        {"l1": 3e-4},
        {"l1": 1e-3},
    ),
    "sws": penalty(
        ks.SWS,
        {"xi": 1e-5, "psi": 1e-2},
        {"xi": 3e-5, "psi": 1e-2},
        {"xi": 1e-4, "psi": 1e-2},
        {"xi": 3e-4, "psi": 1e-2},
        {"xi": 1e-3, "psi": 1e-2},
        {"xi": 3e-3, "psi": 1e-2},
    ),
    "mcp": penalty(
        ks.MCP,
        {"lam": 1e-4, "gamma": 1e3},
        {"lam": 1.7e-4, "gamma": 1e3},
        {"lam": 3e-4, "gamma": 1e3},
        {"lam": 1e-3, "gamma": 1e3},
        {"lam": 3e-3, "gamma": 1e3},
    ),
    "halo": penalty(
        ks.HALO,
        {"xi": 1e-7, "psi": 7e-5},
        {"xi": 1e-7, "psi": 1e-4},
        {"xi": 1e-7, "psi": 1.4e-4},
        {"xi": 1e-7, "psi": 2e-4},
        {"xi": 1e-7, "psi": 3e-4},
        {"xi": 1e-7, "psi": 5e-4},
        {"xi": 1e-7, "psi": 1e-3},
        {"xi": 1e-7, "psi": 2e-3},
        {"xi": 3e-7, "psi": 7e-5},
        {"xi": 3e-7, "psi": 1e-4},
        {"xi": 3e-7, "psi": 1.4e-4},
        {"xi": 3e-7, "psi": 2e-4},
        {"xi": 3e-7, "psi": 3e-4},
        multiplier=4.0,
    ),
    "halo_steered": penalty(
        ks.HALO,
        {"xi": 3e-7, "psi": 7e-4},
        {"xi": 1e-7, "psi": 3e-4},
        multiplier=4.0,
        targets=True,
        callbacks=steered,
    ),
    "gradual": gates(gradual),
    "gradual_global": gates(
        masked,
        {},
        {"falls_from": 0.6},
        callbacks=cut_at_steps,
    ),
    "ltp": gates(
        learned, {"l0": 1e-7}, {"l0": 1e-7, "falls_from": 0.6}, callbacks=steered
    ),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """How all of them train."""

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    finetune: float
    recalibrate: bool

    def fit(self, model, data, epochs, multiplier=1.0, callbacks=(), falls_from=0.0):
        rate = self.learning_rate
        steps = self.steps(data, epochs)
        steady = round(falls_from * steps)
        if steady < steps:
            rate = keras.optimizers.schedules.CosineDecay(
                rate, steps - steady, warmup_target=rate, warmup_steps=steady
            )
        optimizer = keras.optimizers.SGD(
            rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay or None,
        )
        model.compile(
            ks.SparsityOptimizer(
                optimizer,
                keras.optimizers.SGD(momentum=self.momentum),
                multiplier,
            ),
            LOSS,
        )
        model.fit(
            *data.train, self.batch_size, epochs, callbacks=list(callbacks), verbose=0
        )

    def steps(self, data, epochs):
        return epochs * math.ceil(len(data.train[0]) / self.batch_size)


def configured(method, settings):
    """`method` as `settings` want it, and those that are arguments for `governs`."""
    own = settings.keys() & {"pretrain", "falls_from", "multiplier"}
    arguments = {name: settings[name] for name in settings.keys() - own}
    return dataclasses.replace(method, **{n: settings[n] for n in own}), arguments


def phases(method, epochs, finetune):
    """Epochs before `method`, with it, and of fine-tuning: `epochs` in all."""
    before, after = round(method.pretrain * epochs), round(finetune * epochs)
    return before, epochs - before - after, after


def curve(network, data, method, settings, sparsities, training):
    """Trains `network` by `method`: sparsity and accuracies at each of `sparsities`.

    Args:
        network: Callable without arguments: a new network, always the same.
        data: `data.Data`.
        method: A `Method`.
        settings: One of its settings.
        sparsities: List of floats in [0, 1).
        training: A `Training`.

    Returns:
        List of dicts, one for each of `sparsities`: the accuracies, those with batch
        statistics gathered anew if `training.recalibrate`, the sparsities of all and
        of each layer, and what `SparsityTarget` reached where it led, and shifted
        LTP's thresholds from.
    """
    method, arguments = configured(method, settings)
    pretrain, epochs, finetune = phases(method, training.epochs, training.finetune)
    steps = training.steps(data, epochs)
    dense = network()
    if pretrain:
        training.fit(dense, data, pretrain, falls_from=float(method.steady))

    def governed(target):
        """The model that `method` has trained, and the callbacks that it had."""
        governs = method.governs(target, steps, **arguments)
        model = dense if governs is None else ks.sparsify(dense, governs)
        callbacks = method.callbacks(target, steps, finetune)
        falls_from = float(method.steady) if finetune else method.falls_from
        training.fit(model, data, epochs, method.multiplier, callbacks, falls_from)
        return model, callbacks

    trained = None if method.targets else governed(None)
    points = []
    for sparsity in sparsities if method.prunes else [0.0]:
        model, callbacks = governed(sparsity) if method.targets else trained
        small = method.cut(model, sparsity)
        if finetune:
            small = ks.sparsify(small, ks.KeepZeros)
            training.fit(small, data, finetune, falls_from=method.falls_from)
            small = ks.finalize(small)
        small.compile(loss=LOSS, metrics=["accuracy"])
        report = ks.report(small)
        points.append(
            {
                "target": sparsity,
                "sparsity": report.sparsity,
                **led_to(callbacks),
                **accuracies(small, data),
                "layers": {
                    row.path: row.sparsity for row in report.rows if len(row.shape) >= 2
                },
            }
        )
        if training.recalibrate:
            inputs = data.for_statistics(training.batch_size)
            ks.recalibrate(small, inputs, training.batch_size)
            points[-1]["recalibrated"] = accuracies(small, data)
    return points


def led_to(callbacks):
    """Where training ended that was led to a sparsity, before any prune."""
    for callback in callbacks:
        if isinstance(callback, ks.SparsityTarget):
            names = ("reached", "shifted_from")
            return {name: getattr(callback, name) for name in names}
    return {}


def accuracies(model, data):
    """Of a compiled model: a second measurement does not compile it again."""
    return {
        name: model.evaluate(*pair, batch_size=100, verbose=0)[1]
        for name, pair in [("validation", data.validation), ("test", data.test)]
    }
