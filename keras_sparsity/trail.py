"""The callback that leaves a trail of sparser and sparser networks."""

import contextlib
import itertools
import json
import math
import numbers
import os
import pathlib
import re
import time
from typing import Any

import keras
from keras import ops

from keras_sparsity.record import FORMAT, pareto_front, read_lines, read_points
from keras_sparsity.selection import (
    Governed,
    full_precision,
    governed_weights,
    name_within,
    prunable,
)
from keras_sparsity.transform import finalize

# The resolution of float16: a sum in it that holds the largest weight of a tensor would
# not notice one below this part of it. Relative to the tensor, so that a layer and any
# multiple of it, which batch normalization makes equal, count the same.
_NEAR_ZERO = 2**-10

# What the names of Keras' own losses and metrics tell about the better direction.
_LOWER = re.compile("loss|error|entropy|divergence|poisson|hinge|cosh|ms[el]|ma[ep]")
_HIGHER = re.compile(
    "acc|auc|precision|recall|sensitivity|specificity|f1|score|io_?u|similarity|correl"
)


class SparsityTrail(keras.callbacks.Callback):
    """Records sparsity and metrics at each epoch, and keeps finalized checkpoints.

    At the end of an epoch it counts the zeros under inference, over all the weights
    that a method governs (over all trainable weights of rank 2 or more in a model
    without any), and adds the result to `logs` as `"sparsity"`, for the callbacks after
    it and the history. The record, `trail.jsonl`, and the checkpoints, plain Keras
    models made by `keras_sparsity.finalize`, are put in place whole: if training is
    killed, at most the epoch under way is lost. Training again with the same directory
    continues the record.

    Args:
        directory: Path of the directory to write to. It is made if it does not exist.
        monitor: Name of the metric that an epoch is judged by: one of the task, since
            losses contain the penalties. Defaults to `"val_accuracy"`.
        mode: `"max"` or `"min"`: which values of it are better; `"auto"` tells from the
            name of Keras' own metrics and losses. Defaults to `"auto"`.
        keep: Which checkpoints to keep: `"pareto"`, those of the epochs that no other
            beats (has at least the sparsity and at least as good a metric, and more of
            one; of equal ones, the earliest is kept); `"all"`; or `"none"`. A method
            without exact zeros before the prune, as HALO, has a single best epoch: keep
            all if others are to be pruned. Defaults to `"pareto"`.
        resume: Must be `False`.

    Raises:
        ValueError: If an argument is none of the above; at the start of training, if
            the directory holds the trail of another model or metric; at the end of an
            epoch, if `monitor` is not among the metrics.
        OSError: At the start of training, if the directory cannot be written.

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
        if resume:
            raise ValueError(
                "Argument `resume` must be False: exact resuming is not available in "
                f"this version. Received: resume={resume!r}"
            )
        self.directory = pathlib.Path(directory)
        self.monitor = monitor
        self.mode = _direction(monitor) if mode == "auto" else mode
        self.keep = keep

    def on_train_begin(self, logs=None):
        trial = self.directory / "unfinished.keras"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            trial.touch()
            trial.unlink()
        except OSError as error:
            raise OSError(
                "Argument `directory` must be a directory that can be written. "
                f"Received: directory='{self.directory}' ({error})"
            ) from error
        record = self.directory / "trail.jsonl"
        lines: list[Any] = read_lines(record) if record.exists() else [None]
        self._header, self._records = lines[0], lines[1:]
        earlier = self._records[-1]["seconds"] if self._records else 0.0
        self._began = time.monotonic() - earlier
        # On TensorFlow a model may be built by its first batch only.
        if self.model.built:
            _ = self.model.losses  # a penalty finds its weight when it is computed
            self._claim_directory(_counted_weights(self.model))
            if self.keep != "none":
                finalize(self.model)  # raises now what it would after an epoch

    def on_epoch_end(self, epoch, logs=None):
        metrics = {k: float(v) for k, v in logs.items() if isinstance(v, numbers.Real)}
        if self.monitor not in metrics:
            raise ValueError(
                "Argument `monitor` must be one of the metrics of the epoch: "
                f"{', '.join(metrics)} (those of validation data begin with `val_`, and "
                "are needed at every epoch: `validation_freq=1`). "
                f"Received: monitor={self.monitor!r}"
            )
        weights = _counted_weights(self.model)
        self._claim_directory(weights)
        counts = _count_zeros(weights)
        logs["sparsity"] = counts["sparsity"]
        record = {
            "epoch": len(self._records) + 1,
            "seconds": time.monotonic() - self._began,
            **counts,
            "metrics": {name: _finite(value) for name, value in metrics.items()},
        }
        self._records.append(record)
        self._write()

    def _claim_directory(self, weights):
        """Begins the record, or makes sure that it is the record of this model."""
        header: dict[str, Any] = {
            "format": FORMAT,
            "monitor": self.monitor,
            "mode": self.mode,
            "near_zero": f"abs(w) <= {_NEAR_ZERO} * max(abs(w)) of its tensor",
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

    def _write(self):
        """Writes the last epoch's checkpoint, then the record, then deletes others'.

        In this order a kill leaves no record without its checkpoint.
        """
        points = read_points(self.directory, self._header, self._records)
        *_, latest = points
        if self.keep == "pareto":
            front = pareto_front(points, self.mode)
            dropped = [point for point in points if point not in front]
        else:
            dropped = [] if self.keep == "all" else [latest]
        if latest not in dropped:
            with _written_beside(latest.path) as path:
                finalize(self.model).save(path)
        with _written_beside(self.directory / "trail.jsonl") as path:
            lines = [json.dumps(line) for line in (self._header, *self._records)]
            path.write_text("\n".join([*lines, ""]))
        for point in dropped:
            point.path.unlink(missing_ok=True)


def _direction(monitor):
    name = monitor.removeprefix("val_")
    if _LOWER.search(name):
        return "min"
    if _HIGHER.search(name):
        return "max"
    raise ValueError(
        "Argument `mode` must be 'max' or 'min' where the name of the metric does not "
        f"tell which is better. Received: mode='auto', monitor={monitor!r}"
    )


def _counted_weights(model):
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


def _count_zeros(weights):
    rows, total, zeros, near_zeros = {}, 0, 0, 0
    for name, weight in weights.items():
        magnitude = ops.abs(weight.effective)
        limit = _NEAR_ZERO * ops.max(magnitude)
        size = math.prod(magnitude.shape)
        zero = int(ops.sum(ops.cast(ops.equal(magnitude, 0), "int32")))
        near = int(ops.sum(ops.cast(ops.less_equal(magnitude, limit), "int32")))
        threshold = weight.threshold
        if threshold is not None:
            threshold = _finite(float(ops.convert_to_numpy(threshold)))
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


def _finite(value):
    """JSON has no NaN and no infinity: they become null."""
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def _written_beside(path):
    """Gives a path to write to, and puts the file in place once it is whole."""
    beside = path.with_name(f"unfinished{path.suffix}")
    yield beside
    with open(beside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
