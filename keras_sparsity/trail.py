"""The callback that leaves a trail of sparser and sparser networks."""

import itertools
import json
import numbers
import pathlib
import re
import tempfile
import time
import warnings
import zipfile
from typing import Any

import keras
import numpy as np

from keras_sparsity.counting import NEAR_ZERO, count_zeros, counted_weights, finite
from keras_sparsity.files import remove_unfinished, written_whole
from keras_sparsity.record import FORMAT, pareto_front, read_lines, read_points
from keras_sparsity.replicas import all_workers_have, is_chief
from keras_sparsity.selection import to_array
from keras_sparsity.state import restore_training_state, training_state
from keras_sparsity.transform import finalize

# The last words in the names of Keras' own losses and metrics, which tell the better
# direction. Before them may stand the name of an output, after them Keras' number.
_LOWER = re.compile(
    r"(loss|error|entropy|divergence|poisson|hinge|cosh|msl?e|map?e)(_\d+)?$"
)
_HIGHER = re.compile(
    "(acc|accuracy|auc|precision|recall|sensitivity|specificity|f1|score|io_?u"
    r"|similarity|correlation)(_\d+)?$"
)


class SparsityTrail(keras.callbacks.Callback):
    """Records sparsity and metrics at each epoch, and keeps finalized checkpoints.

    At the end of an epoch it counts the zeros under inference, over all the weights
    that a method governs (over all trainable weights of rank 2 or more in a model
    without any), and adds the result to `logs` as `"sparsity"`, for the callbacks after
    it and the history. The record, `trail.jsonl`, and the checkpoints, plain Keras
    models made by `keras_sparsity.finalize`, are put in place whole: if training is
    killed, at most the epoch under way is lost. Training again with the same directory
    continues the record. Of several workers that train together, the chief writes, and
    all must see the directory.

    A checkpoint has the weights of the model when the trail's turn comes. Where
    `keras.callbacks.SwapEMAWeights` evaluates averaged ones, give it before the trail,
    with `swap_on_epoch=True`, for checkpoints that are what was evaluated.

    With `resume=True` it keeps the whole state of the training too: a run that was
    killed, and is started again with the same command, goes on after the last epoch
    recorded, and ends with the weights and the trail of a run that was never killed.
    `epochs` of `fit` counts from the start of the first run, and `initial_epoch` is
    not looked at.
    The state is that of the model, of its optimizer (learning rate, slots, scales'
    and thresholds' own), of seed generators, and of the random generators of Python,
    NumPy and torch (on the CPU). Give the trail after callbacks that change the model
    or the optimizer at the end of an epoch: the state is that when its turn comes. Not
    in it are the random operations of TensorFlow, such as the order in which `fit`
    shuffles arrays there (give it data whose order is a function of the epoch, or
    `shuffle=False`); layers outside of the model; random numbers that are drawn
    without a seed or a `SeedGenerator`; what other callbacks remember, as
    `EarlyStopping`, `ReduceLROnPlateau` and `SwapEMAWeights` do; and of batch
    statistics that every replica has for itself all but the first's
    (`BatchNormalization(synchronized=True)` has one).

    Args:
        directory: Path of the directory to write to. It is made if it does not exist.
        monitor: Name of the metric that an epoch is judged by: one of the task, since
            losses contain the penalties. Defaults to `"val_accuracy"`.
        mode: `"max"` or `"min"`: which values of it are better; `"auto"` tells from the
            last word of it, as Keras names its metrics and losses. Defaults to
            `"auto"`.
        keep: Which checkpoints to keep: `"pareto"`, those of the epochs that no other
            beats (has at least the sparsity and at least as good a metric, and more of
            one; of equal ones, the earliest is kept); `"all"`; or `"none"`. A method
            without exact zeros before the prune, as HALO, has a single best epoch: keep
            all if others are to be pruned. Defaults to `"pareto"`.
        resume: Boolean: `True` to keep the state of the training, and to go on from
            that which the directory holds. Defaults to `False`.

    Raises:
        ValueError: If an argument is none of the above; at the start of training, if
            the directory holds the trail of another model, optimizer or metric, or
            with `resume=True` one without a state; at the end of an epoch, if `monitor`
            is not among the metrics.
        OSError: If the directory cannot be written: at the start of training, or, if
            the disk is full, at the end of an epoch. What it held is intact.

    Example:

    ```python
    trail = SparsityTrail("runs/resnet")
    model.fit(x, y, validation_data=(x_val, y_val), epochs=30, callbacks=[trail])
    model = Trail("runs/resnet").select(max_drop=0.01).load()
    ```
    """

    def __init__(
        self,
        directory,
        monitor: str = "val_accuracy",
        mode: str = "auto",
        keep: str = "pareto",
        resume: bool = False,
    ):
        super().__init__()
        for name, value, choices in (
            ("mode", mode, ("auto", "min", "max")),
            ("keep", keep, ("pareto", "all", "none")),
        ):
            if value not in choices:
                raise ValueError(
                    f"Argument `{name}` must be one of {choices}. "
                    f"Received: {name}={value!r}"
                )
        if not isinstance(monitor, str):
            raise ValueError(
                "Argument `monitor` must be the name of a metric. "
                f"Received: monitor={monitor!r}"
            )
        if not isinstance(resume, bool):
            raise ValueError(
                f"Argument `resume` must be True or False. Received: resume={resume!r}"
            )
        self.directory = pathlib.Path(directory)
        self.monitor = monitor
        self.mode = _direction(monitor) if mode == "auto" else mode
        self.keep = keep
        self.resume = resume

    def on_train_begin(self, logs=None):
        if is_chief(self.model):
            self._try_directory()
        record = self.directory / "trail.jsonl"
        lines: list[Any] = read_lines(record) if record.exists() else [None]
        self._header, self._records = lines[0], lines[1:]
        next_epoch = self._resume() if self.resume else None
        if not all_workers_have(self.model, len(self._records)):
            raise ValueError(
                "Argument `directory` must be one that all workers see. Received: "
                f"directory='{self.directory}', which holds other records than that "
                "of another worker."
            )
        earlier = self._records[-1]["seconds"] if self._records else 0.0
        self._began = time.monotonic() - earlier
        # On TensorFlow a model may be built by its first batch only.
        if self.model.built:
            _ = self.model.losses  # a penalty finds its weight when it is computed
            self._claim_directory(counted_weights(self.model))
            if self.keep != "none":
                finalize(self.model)  # raises now what it would after an epoch
        if next_epoch is not None:
            # As `BackupAndRestore` does: nothing public tells `fit` where to begin. At
            # the end: what is refused here must not change where the next `fit` begins.
            self.model._initial_epoch = next_epoch

    def _try_directory(self):
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryDirectory(dir=self.directory).cleanup()
            remove_unfinished(self.directory)  # what a killed run was writing
        except OSError as error:
            raise OSError(
                "Argument `directory` must be a directory that can be written. "
                f"Received: directory='{self.directory}' ({error})"
            ) from error

    def _resume(self):
        """Goes on from the state in the directory, if there is one: at which epoch."""
        if not self.model.built:
            raise ValueError(
                "A model must be built before its training can be resumed: give it a "
                "`keras.Input`, or call it on data first."
            )
        path = self.directory / "state.npz"
        if not path.exists():
            if self._records:
                raise ValueError(
                    "Argument `directory` must be new or hold the state of a training "
                    f"to resume. Received: directory='{self.directory}', a trail that "
                    "was recorded without `resume=True`."
                )
            return None
        _ = self.model.losses
        try:
            with path.open("rb") as file, np.load(file) as arrays:
                state = dict(arrays)
        except (ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"'{path}' is damaged: {error}") from error
        # The state is written before the record, so it may be one epoch ahead.
        recorded = len(self._records)
        self._header, *self._records = json.loads(str(state.pop("record")))
        if len(self._records) < recorded:
            raise ValueError(
                "Argument `directory` must be new or hold the state of a training "
                f"to resume. Received: directory='{self.directory}', a trail with "
                f"{recorded} epochs, the last ones recorded without `resume=True`: "
                f"its state is that of epoch {len(self._records)}."
            )
        self._claim_directory(counted_weights(self.model))
        epoch, epochs = int(state["epoch"]), self.params["epochs"]
        # Not for a new model: a command that is given again may find all done.
        if epoch >= epochs and int(to_array(self.model.optimizer.iterations)):
            warnings.warn(
                f"Nothing is left to train: '{self.directory}' holds the state after "
                f"{epoch} epochs, which the model gets, and `fit` was given "
                f"epochs={epochs}. With `resume=True` they count from the start of the "
                "first run: give more to go on, or another directory to begin anew.",
                stacklevel=2,
            )
        try:
            restore_training_state(self.model, state)
        except ValueError as error:
            raise ValueError(
                "Argument `directory` must be new or hold the training of this model "
                f"and optimizer. Received: directory='{self.directory}'. {error}"
            ) from error
        if is_chief(self.model):
            self._write_record()
        return epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.model._initial_epoch = None  # or the next `fit` would begin there too

    def on_train_end(self, logs=None):
        self.model._initial_epoch = None
        # What the chief has written is there for all when `fit` returns.
        all_workers_have(self.model, len(self._records))

    def on_epoch_end(self, epoch, logs=None):
        metrics = {k: float(v) for k, v in logs.items() if isinstance(v, numbers.Real)}
        if self.monitor not in metrics:
            raise ValueError(
                "Argument `monitor` must be one of the metrics of the epoch: "
                f"{', '.join(metrics)} (those of validation data begin with `val_` "
                "and are needed at every epoch: `validation_freq=1`). "
                f"Received: monitor={self.monitor!r}"
            )
        weights = counted_weights(self.model)
        self._claim_directory(weights)
        counts = count_zeros(weights)
        logs["sparsity"] = counts["sparsity"]
        record = {
            "epoch": len(self._records) + 1,
            "seconds": time.monotonic() - self._began,
            **counts,
            "metrics": {name: finite(value) for name, value in metrics.items()},
        }
        self._records.append(record)
        self._write(epoch)

    def _claim_directory(self, weights):
        """Begins the record, or makes sure that it is the record of this model."""
        header: dict[str, Any] = {
            "format": FORMAT,
            "monitor": self.monitor,
            "mode": self.mode,
            "near_zero": f"abs(w) <= {NEAR_ZERO} * max(abs(w)) of its tensor",
            "weights": [
                f"{name} {tuple(weight.variable.shape)} {weight.method}"
                for name, weight in weights.items()
            ],
        }
        found = self._header or header
        both = ([h["monitor"], h["mode"], *h["weights"]] for h in (found, header))
        for theirs, ours in itertools.zip_longest(*both, fillvalue="nothing"):
            if theirs != ours:
                raise ValueError(
                    "Argument `directory` must be new or hold the trail of this model "
                    f"and metric. Received: directory='{self.directory}', a trail with "
                    f"{theirs} where this one has {ours}. (A layer without a name of "
                    "its own gets another each time it is made.)"
                )
        self._header = header

    def _write(self, epoch):
        """Writes the last epoch's checkpoint, the state, and then the record.

        In this order a kill leaves no record without its checkpoint, and no state that
        is behind the record.
        """
        points = self._points()
        *_, latest = points
        # All workers must take part in making variables, those of the plain model; but
        # the chief alone writes.
        small = finalize(self.model) if latest in self._kept(points) else None
        if not is_chief(self.model):
            return
        if small is not None:
            with written_whole(latest.path) as path:
                small.save(path)
        if self.resume:
            state: dict[str, Any] = training_state(self.model)
            state["epoch"] = epoch + 1
            state["record"] = json.dumps([self._header, *self._records])
            with written_whole(self.directory / "state.npz") as path:
                np.savez(path, **state)
        self._write_record()

    def _write_record(self):
        with written_whole(self.directory / "trail.jsonl") as path:
            lines = [json.dumps(line) for line in (self._header, *self._records)]
            path.write_text("\n".join([*lines, ""]))
        points = self._points()
        kept = self._kept(points)
        for point in points:
            if point not in kept:
                point.path.unlink(missing_ok=True)

    def _points(self):
        return read_points(self.directory, self._header, self._records)

    def _kept(self, points):
        """Those of `points` whose checkpoint is to be kept."""
        match self.keep:
            case "all":
                return points
            case "pareto":
                return pareto_front(points, self.mode)
        return []


def _direction(monitor):
    if _LOWER.search(monitor):
        return "min"
    if _HIGHER.search(monitor):
        return "max"
    raise ValueError(
        "Argument `mode` must be 'max' or 'min' where the name of the metric does not "
        f"tell which is better. Received: mode='auto', monitor={monitor!r}"
    )
