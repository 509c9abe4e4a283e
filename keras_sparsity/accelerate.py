"""A model whose sparse layers run sparse where that is faster on this machine."""

import dataclasses
import inspect

import keras
import numpy as np

from keras_sparsity.checks import check_integer
from keras_sparsity.products import NO_XLA, takes_xla
from keras_sparsity.rebuild import Rebuilt, check_rebuildable, clone, copy_state
from keras_sparsity.selection import check_plain, kernels, leaves, to_array
from keras_sparsity.sparse_layer import SparseLayer, why_dense
from keras_sparsity.timing import inference, paired_medians

# Less than this much faster is not worth it, and may be chance.
_LEAST_GAIN = 1.1


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """How a layer with a kernel runs in an accelerated model.

    Attributes:
        layer: Name of the layer.
        layer_type: Its class in the dense model.
        sparsity: Part of the zeros in its kernel.
        is_sparse: Whether it runs sparse.
        dense_ms: Milliseconds of a call of the dense layer; `None` if not measured.
        sparse_ms: Milliseconds of a call of the sparse one.
        reason: Why it runs dense, or `None`.
    """

    layer: str
    layer_type: str
    sparsity: float
    is_sparse: bool
    dense_ms: float | None = None
    sparse_ms: float | None = None
    reason: str | None = None

    @property
    def gain(self) -> float | None:
        """How many times faster the sparse layer is."""
        return self.dense_ms and self.sparse_ms and self.dense_ms / self.sparse_ms


@dataclasses.dataclass(frozen=True)
class Acceleration:
    """What `accelerate` measured and chose.

    Attributes:
        batch_size: The batch size measured at.
        rows: List of `LayerTime`, one for each layer with a kernel.
    """

    batch_size: int
    rows: list[LayerTime]

    def __str__(self):
        width = max([len("layer"), *(len(row.layer) for row in self.rows)])
        lines = [
            f"{'layer':{width}}{'zeros':>8}{'dense ms':>11}{'sparse ms':>11}"
            f"{'gain':>8}  runs"
        ]
        for row in self.rows:
            times = (
                f"{row.dense_ms:11.3f}{row.sparse_ms:11.3f}{row.gain:8.2f}"
                if row.gain
                else f"{'-':>11}{'-':>11}{'-':>8}"
            )
            runs = "sparse" if row.is_sparse else f"dense: {row.reason}"
            lines.append(f"{row.layer:{width}}{row.sparsity:8.1%}{times}  {runs}")
        count = sum(row.is_sparse for row in self.rows)
        lines.append(
            f"{count} of {len(self.rows)} layers run sparse at batch size "
            f"{self.batch_size}, backend {keras.backend.backend()}"
        )
        return "\n".join(lines)


def accelerate(model, batch_size):
    """A model for inference whose layers run sparse where that is faster here.

    A Dense, Conv1D, Conv2D or Conv3D layer runs sparse where its product by the
    sparse kernels of the backend, in float32, is measured to be at least 10 % faster
    than the dense layer: medians of calls in turns, on this machine, with as many
    threads as the backend has now. All others run as they are. The table of it is the
    attribute `acceleration` of the new model, an `Acceleration` to print.

    The model is made in memory, for `predict`, `evaluate` and calls, with any batch
    size. It keeps sparse kernels as constants, not as variables: without the penalties
    of their weights, which `evaluate` adds to the loss of `model`. Training, saving,
    exporting, cloning and loading weights raise an error once a layer runs sparse, and
    on TensorFlow `jit_compile=True` does, since XLA has no sparse kernels there.

    Args:
        model: A built Sequential or Functional `keras.Model` of fixed zeros, as
            `finalize` and `prune` make them.
        batch_size: Integer >= 1, how many samples there will be in a call.

    Returns:
        An uncompiled model that computes what `model` does in inference, up to
        rounding.

    Raises:
        TypeError: If the model is subclassed.
        ValueError: If the model is not built, a method governs a weight of it, or
            `batch_size` is out of range.

    Example:

    ```python
    fast = ks.accelerate(ks.finalize(model), batch_size=64)
    print(fast.acceleration)
    y = fast.predict(x, batch_size=64)
    ```
    """
    return accelerate_by(model, batch_size, paired_medians)


def accelerate_by(model, batch_size, measure):
    """As `accelerate`, by what `measure` says.

    Args:
        model, batch_size: See `accelerate`.
        measure: Function of a list of two functions without arguments, which run the
            dense layer and the sparse one: the seconds that each of them takes.
    """
    check_rebuildable(model, "accelerate")
    batch_size = check_integer("batch_size", batch_size, at_least=1)
    check_plain(model, "accelerate")
    rows = {
        id(layer): _choose(layer, batch_size, measure)
        for layer in leaves(model)
        if kernels(layer)
    }

    def convert(layer):
        row = rows.get(id(layer))
        return SparseLayer(layer) if row and row.is_sparse else clone(layer)

    rebuilt = Rebuilt(model, convert)
    for layer, error in rebuilt.errors.values():
        if id(layer) not in rows:
            raise error
        rows[id(layer)] = dataclasses.replace(
            rows[id(layer)], is_sparse=False, reason=_failure(error)
        )
    if any(row.is_sparse for row in rows.values()):
        _refuse_files_and_xla(rebuilt.model)
    rebuilt.model.acceleration = Acceleration(batch_size, list(rows.values()))
    return rebuilt.model


def _refuse_files_and_xla(model):
    """Gives reasons where Keras would fail without one, or only warn.

    On the model itself: it is of a class that Keras or the user made.
    """
    compile_with_keras = model.compile
    signature = inspect.signature(compile_with_keras)

    def compile(*args, **kwargs):
        asked = signature.bind(*args, **kwargs).arguments.get("jit_compile")
        if asked is True and not takes_xla():
            raise ValueError(NO_XLA)
        compile_with_keras(*args, **kwargs)

    def export(*args, **kwargs):
        raise NotImplementedError(
            f"Model '{model.name}' runs sparse in memory, and cannot be exported. "
            "Export the model that was given to `accelerate`."
        )

    model.compile, model.export = compile, export


def _choose(layer, batch_size, measure):
    values = np.concatenate([to_array(w).ravel() for w in kernels(layer)])
    row = LayerTime(
        layer=layer.name,
        layer_type=type(layer).__name__,
        sparsity=float(np.mean(values == 0)),
        is_sparse=False,
        reason=why_dense(layer),
    )
    if row.reason:
        return row
    if values.all():
        return dataclasses.replace(row, reason="its kernel has no zeros")
    shape = layer.get_build_config()["input_shape"][1:]
    try:
        sparse = SparseLayer(layer)
        copy_state(layer, sparse)
        x = keras.random.normal((batch_size, *shape), seed=0)
        dense_ms, sparse_ms = (
            1e3 * seconds
            for seconds in measure([inference(layer, x), inference(sparse, x)])
        )
    except Exception as error:  # a backend may lack a kernel on this machine only
        return dataclasses.replace(row, reason=_failure(error))
    is_sparse = dense_ms >= _LEAST_GAIN * sparse_ms
    return dataclasses.replace(
        row,
        is_sparse=is_sparse,
        dense_ms=dense_ms,
        sparse_ms=sparse_ms,
        reason=None if is_sparse else "sparse is not 10 % faster",
    )


def _failure(error):
    return f"it cannot run sparse: {error}"
