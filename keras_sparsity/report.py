"""Looking at a model: zeros, multiplications and bytes, weight by weight."""

import dataclasses
import io

import keras
import numpy as np
from keras import ops

from keras_sparsity.files import write_archive
from keras_sparsity.influence import DeadUnits, dead_units
from keras_sparsity.macs import uses_in_model
from keras_sparsity.selection import (
    check_model,
    check_weights,
    governed_weights,
    governors,
    is_prunable,
    leaves,
    plain_weights,
    to_array,
    unwrapped,
)


@dataclasses.dataclass(frozen=True)
class WeightRow:
    """One weight tensor of a model, as inference uses it.

    Attributes:
        path: The variable's path.
        layer: Name of the layer of the model that it belongs to.
        layer_type: Class of that layer, without the wrappers of this package.
        shape: Tuple of integers.
        method: Name of the method that governs it, or `None`.
        reason: Why no method does, or `None`.
        nonzeros: Number of values that are not zero in inference.
        sparsity: Part of the values that are zero.
        threshold: A value is kept where its square is larger; `None` without one.
        macs: Multiply-accumulate operations per sample if nothing were zero; `None`
            where a size of the input is not known.
        effective_macs: Those with values that are not zero.
        bytes: Size of the tensor in memory.
    """

    path: str
    layer: str
    layer_type: str
    shape: tuple
    method: str | None
    reason: str | None
    nonzeros: int
    sparsity: float
    threshold: float | None
    macs: int | None
    effective_macs: int | None
    bytes: int

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))


@dataclasses.dataclass(frozen=True)
class SparsityReport:
    """What `report` found.

    Attributes:
        rows: List of `WeightRow`, in the order of `model.weights`.
        sparsity: Part of the zeros, under inference, in the governed weights; where
            nothing is governed, in all weights of rank 2 or more that are trainable or
            of type int8 (quantized); where there are none, in all weights of that rank.
        parameters: Number of values in all weights.
        nonzeros: Number of those that are not zero.
        total_sparsity: Part of the zeros in all of them.
        macs: Multiply-accumulate operations per sample with weights, if nothing were
            zero; `None` if those of one weight are not known.
        effective_macs: Those with values that are not zero.
        compressed_bytes: Size of the file that `save_model` writes of the finalized
            model, estimated from config and weights: within a few percent, in files of
            a few kilobytes within about a tenth. `None` if the model has no config
            that can be written, as with `LTP(variables=)` of a function.
        dead_units: List of `DeadUnits`: neurons and filters that have no influence, and
            why they must stay, or that `compact` removes them. Those of layers that a
            method governs are not looked for.
    """

    rows: list[WeightRow]
    sparsity: float
    compressed_bytes: int | None
    dead_units: list[DeadUnits]

    @property
    def parameters(self) -> int:
        return sum(row.size for row in self.rows)

    @property
    def nonzeros(self) -> int:
        return sum(row.nonzeros for row in self.rows)

    @property
    def total_sparsity(self) -> float:
        return (self.parameters - self.nonzeros) / max(self.parameters, 1)

    @property
    def macs(self) -> int | None:
        return _total(row.macs for row in self.rows)

    @property
    def effective_macs(self) -> int | None:
        return _total(row.effective_macs for row in self.rows)

    def to_dataframe(self):
        """The rows as a `pandas.DataFrame`."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "`to_dataframe` needs pandas. Install it with "
                '`pip install "keras-sparsity[examples]"`.'
            ) from error
        return pandas.DataFrame([dataclasses.asdict(row) for row in self.rows])

    def __str__(self):
        head = ("weight", "type", "shape", "method", "zeros", "nonzeros", "MACs")
        lines = [
            (
                row.path,
                row.layer_type,
                "x".join(map(str, row.shape)),
                row.method or "-",
                f"{row.sparsity:.1%}",
                f"{row.nonzeros:,}",
                _count(row.effective_macs),
            )
            for row in self.rows
            if len(row.shape) >= 2
        ]
        rest = [row for row in self.rows if len(row.shape) < 2]
        reasons: dict[str, list[str]] = {}
        if any(row.method for row in self.rows):
            for row in self.rows:
                if row.method is None and len(row.shape) >= 2:
                    reasons.setdefault(row.reason or "", []).append(row.path)
        text = _table([head, *lines])
        if rest:
            text += f"\nand {len(rest)} weights of rank 0 and 1, which are not pruned"
        for reason, paths in reasons.items():
            text += f"\n- {', '.join(paths)}: {reason}"
        for found in self.dead_units:
            fate = f"stay: {found.reason}" if found.reason else "go with `compact`"
            text += f"\n- {found.dead} of {found.units} units of {found.layer} are dead"
            text += f" and {fate}"
        return (
            f"{text}\n"
            f"sparsity {self.sparsity:.2%} ({self.total_sparsity:.2%} of all "
            f"{self.parameters:,} parameters), {self.nonzeros:,} nonzeros\n"
            f"MACs {_count(self.effective_macs)} of {_count(self.macs)}, "
            f"compressed file about {_count(self.compressed_bytes)} bytes"
        )


def report(model) -> SparsityReport:
    """Looks at every weight of a model: its method, zeros, multiplications and bytes.

    Everything is as in inference: under the hard gate, before or after `finalize`.

    Args:
        model: A built Sequential or Functional `keras.Model`, sparse or not.

    Returns:
        A `SparsityReport`; print it, or read its `rows` and totals.

    Raises:
        TypeError: If the model is subclassed.
        ValueError: If the model is not built, or one of its weights is NaN.

    Example:

    ```python
    print(ks.report(model))
    ks.report(model).sparsity
    ```
    """
    check_model(model, "report")
    check_weights(model)
    governed = {id(g.variable): g for g in governed_weights(model)}
    rows: list[WeightRow] = []
    arrays: list[tuple] = []
    uses = uses_in_model(model)
    for layer in leaves(model):
        for weight in plain_weights(layer):
            if any(weight is seen for seen, _ in arrays):
                continue  # shared with a layer before
            found = governed.get(id(weight))
            values = to_array(found.effective if found else weight)
            arrays.append((weight, values))
            rows.append(_row(layer, weight, found, values, uses[id(weight)]))
    if governed:
        counted = [row for row in rows if row.method]
    else:
        matrices = [
            (weight.trainable or values.dtype == "int8", row)
            for (weight, values), row in zip(arrays, rows, strict=True)
            if len(row.shape) >= 2
        ]
        counted = [row for is_active, row in matrices if is_active]
        counted = counted or [row for _, row in matrices]  # of a frozen model
    size = sum(row.size for row in counted)
    zeros = size - sum(row.nonzeros for row in counted)
    return SparsityReport(
        rows=rows,
        sparsity=zeros / max(size, 1),
        compressed_bytes=_compressed_bytes(model, arrays),
        dead_units=dead_units(model),
    )


def _row(layer, weight, governed, values, uses):
    nonzeros = int(np.count_nonzero(values))
    has_threshold = governed is not None and governed.threshold is not None
    return WeightRow(
        path=weight.path,
        layer=layer.name,
        layer_type=type(unwrapped(layer)).__name__,
        shape=tuple(weight.shape),
        method=governed.method if governed else None,
        reason=None if governed else _reason(layer, weight),
        nonzeros=nonzeros,
        sparsity=1 - nonzeros / max(values.size, 1),
        threshold=(
            float(ops.convert_to_numpy(governed.threshold)) if has_threshold else None
        ),
        macs=None if uses is None else uses * values.size,
        effective_macs=None if uses is None else uses * nonzeros,
        bytes=values.nbytes,
    )


def _reason(layer, weight):
    if len(weight.shape) < 2:
        return f"rank {len(weight.shape)}: only weights of rank 2 or more are pruned"
    if not is_prunable(weight):
        return f"type {weight.dtype}: only floating-point weights are pruned"
    if not weight.trainable:
        return "frozen: not trainable"
    if hasattr(layer, "sparsity_error"):
        return f"the method could not handle its layer: {layer.sparsity_error}"
    if governors(layer):
        return "left out by the method of its layer"
    return "no method was given for its layer"


def _compressed_bytes(model, weights):
    """Size of a zip like the model's file, of `(variable, array)` pairs for weights."""
    import h5py  # a dependency of keras

    try:
        config = model.to_json()
    except (TypeError, ValueError):  # as of a function that nobody registered
        return None
    hdf5 = io.BytesIO()
    with h5py.File(hdf5, "w") as file:
        for index, (variable, array) in enumerate(weights):
            # Names take room in small files: a group per layer, as Keras has.
            layer = variable.path.rpartition("/")[0]
            group = file.require_group(f"layers/{layer}/vars")
            group.attrs["name"] = layer
            group.create_dataset(str(index), data=array)
    archive = io.BytesIO()
    write_archive(
        archive,
        {
            "metadata.json": keras.__version__,
            "config.json": config,
            "model.weights.h5": hdf5.getvalue(),
        },
    )
    return len(archive.getvalue())


def _total(numbers):
    numbers = list(numbers)
    return None if None in numbers else sum(numbers)


def _count(number):
    return "unknown" if number is None else f"{number:,}"


def _table(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index > 3 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
