"""The record of a trail, read back: which network to take."""

import contextlib
import dataclasses
import json
import math
import pathlib
import warnings

import keras

from keras_sparsity.checks import check_number

FORMAT = 1

# Metrics are computed in float32: 0.88 may come back as 0.87999999.
_METRIC_TOLERANCE = 1e-6

_SIGN = {"max": 1, "min": -1}


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

    def load(
        self, custom_objects: dict | None = None, safe_mode: bool = True
    ) -> keras.Model:
        """The finalized model of this epoch, a plain Keras model.

        Args:
            custom_objects: Dict of the names of classes and functions that are not
                registered with Keras, to them.
            safe_mode: Boolean: `False` to load the code of `Lambda` layers too, from a
                trail that you trust. Defaults to `True`.

        Raises:
            FileNotFoundError: If the checkpoint was not kept.
            ValueError: If it has such code in it, in safe mode.
        """
        if not self.path.exists():
            raise FileNotFoundError(
                f"The checkpoint of epoch {self.epoch} was not kept: there is no file "
                f"'{self.path}'. `SparsityTrail` has an argument `keep`."
            )
        return keras.saving.load_model(self.path, custom_objects, safe_mode=safe_mode)


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
        header, *records = read_lines(directory / "trail.jsonl")
        self.monitor: str = header["monitor"]
        self.mode: str = header["mode"]
        self.points: list[Point] = read_points(directory, header, records)

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
            ValueError: If an argument is no number, or no point meets the conditions.
        """
        check_number("min_sparsity", min_sparsity)
        check_number("max_sparsity", max_sparsity)
        if min_metric is not None:
            check_number("min_metric", min_metric)
        if max_drop is not None:
            check_number("max_drop", max_drop, at_least=0)
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

        if not self.points:
            raise ValueError("A trail without points cannot be drawn.")
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


def _range(name, points):
    values = [getattr(p, name) for p in points] or [math.nan]
    return f"{name} {min(values):.4f} to {max(values):.4f}"


def read_points(directory, header, records):
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


def read_lines(path):
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
    if not records or records[0].get("format") != FORMAT:
        raise ValueError(f"'{path}' is not a trail of format {FORMAT}.")
    return records


@contextlib.contextmanager
def _extra(package):
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'This needs {package}: pip install "keras-sparsity[examples]"'
        ) from error
