"""The trail of sparser and sparser networks that a training run leaves."""

import contextlib
import dataclasses
import itertools
import json
import math
import numbers
import os
import pathlib
import re
import time
import warnings
from typing import Any

import keras
from keras import ops

from keras_sparsity.optimizers import warn_of_weight_decay
from keras_sparsity.selection import (
    Governed,
    governed_weights,
    name_within,
    prunable,
)
from keras_sparsity.transform import finalize

_FORMAT = 1

# The resolution of float16: a sum in it that holds the largest weight of a tensor would
# not notice one below this part of it. Relative to the tensor, so that a layer and any
# multiple of it, which batch normalization makes equal, count the same.
_NEAR_ZERO = 2**-10

# Metrics are computed in float32: 0.88 may come back as 0.87999999.
_METRIC_TOLERANCE = 1e-6

# What the names of Keras' own losses and metrics tell about the better direction.
_LOWER = re.compile("loss|error|entropy|divergence|poisson|hinge|cosh|ms[el]|ma[ep]")
_HIGHER = re.compile(
    "acc|auc|precision|recall|sensitivity|specificity|f1|score|io_?u|similarity|correl"
)
_SIGN = {"max": 1, "min": -1}


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
        lines: list[Any] = _read(record) if record.exists() else [None]
        self._header, self._records = lines[0], lines[1:]
        earlier = self._records[-1]["seconds"] if self._records else 0.0
        self._began = time.monotonic() - earlier
        # On TensorFlow a model may be built by its first batch only.
        if self.model.built:
            _ = self.model.losses  # a penalty finds its weight when it is computed
            self._claim_directory(_counted_weights(self.model))
            if self.keep != "none":
                finalize(self.model)  # raises now what it would after an epoch
        warn_of_weight_decay(self.model)

    def on_epoch_end(self, epoch, logs=None):
        metrics = {k: float(v) for k, v in logs.items() if isinstance(v, numbers.Real)}
        if self.monitor not in metrics:
            raise ValueError(
                "Argument `monitor` must be one of the metrics of the epoch: "
                f"{', '.join(metrics)} (those of validation data begin with `val_`). "
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
            "format": _FORMAT,
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
        points = _points(self.directory, self._header, self._records)
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


@dataclasses.dataclass(frozen=True)
class Point:
    """One epoch of a trail.

    Attributes:
        epoch: Number of the epoch in the trail, from 1.
        seconds: Time in training since the trail began.
        sparsity: Part of the weights that are zero under inference.
        near_zero: Part of the weights that are zero or nearly: at most `2**-10` times
            the largest magnitude in their tensor. It tells how far a method is that
            makes no exact zeros before the prune.
        metric: Value of the monitored metric; NaN if it was not finite.
        metrics: Dict of all the epoch's metrics.
        weights: Dict from the path of each weight to a dict of its own `sparsity`,
            `near_zero` and `threshold` (compared with `w**2`; `None` without one).
        path: Where the checkpoint is, if it was kept.
    """

    epoch: int
    seconds: float
    sparsity: float
    near_zero: float
    metric: float
    metrics: dict[str, float]
    weights: dict[str, dict[str, float | None]]
    path: pathlib.Path

    def load(self) -> keras.Model:
        """The finalized model of this epoch, a plain Keras model.

        Raises:
            FileNotFoundError: If the checkpoint was not kept.
        """
        if not self.path.exists():
            raise FileNotFoundError(
                f"The checkpoint of epoch {self.epoch} was not kept: there is no file "
                f"'{self.path}'. `SparsityTrail` has an argument `keep`."
            )
        return keras.saving.load_model(self.path)


class Trail:
    """The record that `SparsityTrail` wrote, read back.

    Args:
        directory: Path of the trail's directory.

    Attributes:
        points: List of `Point`, in the order of the epochs.
        monitor: Name of the metric that epochs are judged by.
        mode: `"max"` or `"min"`: which values of it are better.

    Raises:
        FileNotFoundError: If there is no trail.
        ValueError: If the record is damaged. A last line that is cut is left out with a
            warning.

    Example:

    ```python
    trail = Trail("runs/resnet")
    trail.plot("trail.png")
    model = trail.select(min_sparsity=0.95).load()
    ```
    """

    def __init__(self, directory):
        directory = pathlib.Path(directory)
        header, *records = _read(directory / "trail.jsonl")
        self.monitor: str = header["monitor"]
        self.mode: str = header["mode"]
        self.points: list[Point] = _points(directory, header, records)

    def select(
        self,
        min_sparsity: float = 0.0,
        max_sparsity: float = 1.0,
        min_metric: float | None = None,
        max_drop: float | None = None,
    ) -> Point:
        """The best point under conditions, whose bounds are included.

        With `min_metric` or `max_drop` that is the sparsest point, otherwise the one
        with the best metric; among equals the best in the other respect, then the
        earliest. Considered are the points that can be loaded (in a trail without
        checkpoints, all) and whose metric is finite.

        Args:
            min_sparsity: Float, the least sparsity. Defaults to 0.
            max_sparsity: Float, the largest sparsity. Defaults to 1.
            min_metric: Float, the worst value of the monitored metric to accept: the
                least in mode `"max"`, the largest in mode `"min"`.
            max_drop: Float, how much worse than the trail's best the metric may be, as
                an absolute difference.

        Raises:
            ValueError: If no point meets the conditions.
        """
        sign = _SIGN[self.mode]
        points = [p for p in self.points if math.isfinite(p.metric)]
        loadable = [p for p in points if p.path.exists()] or points
        floor = -math.inf
        if min_metric is not None:
            floor = sign * min_metric
        if max_drop is not None and points:
            floor = max(floor, max(sign * p.metric for p in points) - max_drop)
        chosen = [
            p
            for p in loadable
            if min_sparsity <= p.sparsity <= max_sparsity
            and sign * p.metric >= floor - _METRIC_TOLERANCE * abs(floor)
        ]
        if not chosen:
            raise ValueError(
                "Expected conditions that a point of the trail meets. Received: "
                f"{min_sparsity=}, {max_sparsity=}, {min_metric=}, {max_drop=}. There "
                f"are {len(loadable)} points with {_range('sparsity', loadable)} and "
                f"{_range('metric', loadable)} ({self.monitor})."
            )
        if floor > -math.inf:
            return max(chosen, key=lambda p: (p.sparsity, sign * p.metric))
        return max(chosen, key=lambda p: (sign * p.metric, p.sparsity))

    def to_dataframe(self):
        """A `pandas.DataFrame`: a row per epoch, a column per quantity.

        The columns of a weight are named `weights/<its path>/sparsity` and so on.
        """
        with _extra("pandas"):
            import pandas as pd

        rows = []
        for point in self.points:
            row = dataclasses.asdict(point)
            rows.append({**row, **row.pop("metrics")})
        return pd.json_normalize(rows, sep="/")

    def plot(self, path):
        """Draws the trail to an image file.

        Above, metric against sparsity: the epochs joined in their order, those that no
        other beats marked by their number. Below, the sparsity of each weight over the
        epochs, the last one's in figures. A trail without any zero is drawn by the
        weights near zero.

        Args:
            path: Path of the file, such as `"trail.png"` or `"trail.pdf"`.
        """
        with _extra("matplotlib"):
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator, PercentFormatter

        zeros = "sparsity" if any(p.sparsity for p in self.points) else "near_zero"
        names = list(self.points[-1].weights)
        height = max(1.2, 0.2 * len(names))
        figure = Figure(figsize=(9, 5 + height), dpi=120, layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=[4, height])

        def draw(points, *args, **kwargs):
            x, y = [getattr(p, zeros) for p in points], [p.metric for p in points]
            above.plot(x, y, *args, **kwargs)

        draw(self.points, ".-", color="0.6", linewidth=1, label="epochs, in order")
        draw(self.points[:1], "s", color="0.3", label="the first")
        front = pareto_front(self.points, self.mode)
        draw(front, "o", color="C3", label="those that no other beats")
        above.set(xlabel=zeros, ylabel=self.monitor)
        above.xaxis.set_major_formatter(PercentFormatter(1))
        above.grid(alpha=0.3)
        above.legend()

        rows = [[p.weights[name][zeros] for p in self.points] for name in names]
        last = [f"{row[-1]:.1%}" for row in rows]
        edges = (0.5, len(self.points) + 0.5, len(names) - 0.5, -0.5)
        image = below.imshow(rows, aspect="auto", vmin=0, vmax=1, extent=edges)
        below.set_xlabel("epoch")
        below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        below.set_yticks(range(len(names)), names, fontsize="small")
        right = below.secondary_yaxis("right")
        right.set_yticks(range(len(names)), last, fontsize="small")
        bar = figure.colorbar(image, location="top", aspect=80)
        bar.set_label(f"{zeros} of each weight, the last epoch's on the right")
        bar.ax.xaxis.set_major_formatter(PercentFormatter(1))
        figure.savefig(path)


def pareto_front(points, mode) -> list[Point]:
    """The points that no other beats, in the order of their epochs.

    A point beats another if it has at least the sparsity and at least as good a metric,
    and more of one. Of equal points the first stays; none whose metric is NaN does.
    """
    sign = _SIGN[mode]
    finite = [p for p in points if math.isfinite(p.metric)]
    front: list[Point] = []
    # From the sparsest down, a point must have a better metric than all before it.
    for point in sorted(finite, key=lambda p: (-p.sparsity, -sign * p.metric)):
        if not front or sign * point.metric > sign * front[-1].metric:
            front.append(point)
    return sorted(front, key=lambda p: p.epoch)


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
        Governed(v, "none", ops.cast(v, "float32")) for v in prunable(model)
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


def _range(name, points):
    values = [getattr(p, name) for p in points] or [math.nan]
    return f"{name} {min(values):.4f} to {max(values):.4f}"


def _points(directory, header, records):
    points = []
    for record in records:
        metrics = {
            name: math.nan if value is None else value
            for name, value in record["metrics"].items()
        }
        metric = metrics[header["monitor"]]
        path = directory / f"epoch-{record['epoch']:04d}.keras"
        points.append(Point(**{**record, "metrics": metrics}, metric=metric, path=path))
    return points


def _read(path):
    """The lines of a record as dicts, the header first."""
    if not path.exists():
        raise FileNotFoundError(f"Argument `directory` must hold a trail: no '{path}'")
    records = []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == 1 or number < len(lines):
                raise ValueError(f"Line {number} of '{path}' is damaged.") from error
            warnings.warn(f"The last line of '{path}' is cut: left out.", stacklevel=3)
    if not records or records[0].get("format") != _FORMAT:
        raise ValueError(f"'{path}' is not a trail of format {_FORMAT}.")
    return records


@contextlib.contextmanager
def _written_beside(path):
    """Gives a path to write to, and puts the file in place once it is whole."""
    beside = path.with_name(f"unfinished{path.suffix}")
    yield beside
    with open(beside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


@contextlib.contextmanager
def _extra(package):
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'This needs {package}: pip install "keras-sparsity[examples]"'
        ) from error
