"""Global and per-layer magnitude pruning: the last step of HALO and of any penalty."""

import collections.abc
import contextlib
import math

import keras
import numpy as np
from keras import tree

from keras_sparsity.checks import check_fraction
from keras_sparsity.rebuild import check_rebuildable
from keras_sparsity.recalibration import recalibrate
from keras_sparsity.selection import (
    Governed,
    check_filters,
    check_weights,
    full_precision,
    governed_weights,
    plain_weights,
    prunable,
    select,
    to_array,
)
from keras_sparsity.transform import plain


def prune(model, sparsity, scope="global", filters=None):
    """A new plain model in which the smallest weights are zero.

    ```
    floor(sparsity * N) of the N effective weights that are selected are zero
    ```

    Selected are the governed weights; all trainable weights of rank 2 or more where
    nothing is governed. Effective is what inference computes with: weights that a gate
    has closed are zero already, count, and are never filled again; there may be more
    of them than asked for. Ties go by position: the order of `model.weights`, and the
    row-major order in a weight.

    Args:
        model: A built Sequential or Functional `keras.Model`.
        sparsity: Float in [0, 1), the part of the selected weights that is zero.
        scope: `"global"`: one pool of all selected weights; `"layer"`: each layer to
            that sparsity. Defaults to `"global"`.
        filters: Which layers: see `sparsify`. Weights of others are not pruned.

    Returns:
        An uncompiled plain model that shares nothing with `model`: see `finalize`.

    Raises:
        TypeError: If the model is subclassed, or `filters` is something else.
        ValueError: If the model is not built, `sparsity` or `scope` is out of range,
            `filters` match no layer, nothing is selected, or a weight is NaN.

    Example:

    ```python
    small = ks.prune(model, 0.95)
    ```

    Reference:

    - [Seto et al., HALO](https://arxiv.org/abs/2008.10183): the last step.
    """
    check_rebuildable(model, "prune")
    sparsity = check_fraction("sparsity", sparsity)
    if scope not in ("global", "layer"):
        raise ValueError(
            f'Argument `scope` must be "global" or "layer". Received: scope={scope!r}'
        )
    check_filters(filters)
    check_weights(model)
    return plain(model, pruned_values(model, sparsity, scope, filters))


def pruning_curve(
    model,
    x,
    y=None,
    sparsities=(0.5, 0.8, 0.9, 0.95, 0.98, 0.99),
    batch_size: int | None = None,
    calibration_data=None,
):
    """The compiled metrics of `prune(model, s)` for each `s`.

    Args:
        model: A compiled Sequential or Functional `keras.Model`.
        x, y: What `model.evaluate` takes, but no generator: they are gone through once
            for each sparsity.
        sparsities: Sequence of floats in [0, 1).
        batch_size: Integer, samples per batch of `model.evaluate`, for arrays.
            Defaults to `None`: what Keras takes, 32.
        calibration_data: Training inputs, as `recalibrate` takes them but no generator:
            the batch statistics of every pruned model are gathered from them anew,
            in batches of `batch_size`. Defaults to `None`: they are the model's.

    Returns:
        A list of dicts, one for each sparsity: `"sparsity"` and the metrics.

    Raises:
        TypeError: If `x` or `calibration_data` is a generator, or `sparsities` is no
            sequence.
        ValueError: If the model is not compiled; else as `prune`, and as `recalibrate`,
            whose `dataset` is `calibration_data`.

    Example:

    ```python
    for point in ks.pruning_curve(model, x_val, y_val, [0.9, 0.95, 0.98]):
        print(point["sparsity"], point["accuracy"])
    ```
    """
    check_rebuildable(model, "pruning_curve")
    if not model.compiled:
        raise ValueError(
            "Argument `model` of `pruning_curve` must be compiled with the metrics to "
            "compute. Received a model that is not compiled."
        )
    for name, data in (("x", x), ("calibration_data", calibration_data)):
        if isinstance(data, collections.abc.Iterator):
            raise TypeError(
                f"Argument `{name}` must be arrays or a dataset, which every sparsity "
                f"can go through. Received: {name}={data!r}, which the first one would "
                "use up."
            )
    if not np.iterable(sparsities):
        raise TypeError(
            "Argument `sparsities` must be a sequence of numbers in [0, 1). Received: "
            f"sparsities={sparsities!r}"
        )
    sparsities = [check_fraction("sparsities", sparsity) for sparsity in sparsities]
    check_weights(model)
    values = [pruned_values(model, sparsity) for sparsity in sparsities]
    small = plain(model, {})
    # The public way goes through a file's form, and so fails for a loss or a metric
    # that is a function nobody registered.
    config = {**model._compile_config.config, "optimizer": None}
    small.compile(**config)
    variables = dict(zip(map(id, plain_weights(model)), small.weights, strict=True))
    curve = []
    with _metrics_kept(config):
        for sparsity, weights in zip(sparsities, values, strict=True):
            for key, value in weights.items():
                variables[key].assign(value)
            if calibration_data is not None:
                recalibrate(
                    small, calibration_data, 32 if batch_size is None else batch_size
                )
            metrics = small.evaluate(x, y, batch_size, verbose=0, return_dict=True)
            curve.append({"sparsity": sparsity, **metrics})
    return curve


@contextlib.contextmanager
def _metrics_kept(config):
    """Lets metrics of a model be used in another one: they keep their results."""
    metrics = [v for v in tree.flatten(config) if isinstance(v, keras.Metric)]
    before = [(v, to_array(v)) for metric in metrics for v in metric.variables]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def pruned_values(model, sparsity, scope="global", filters=None):
    """`{id(variable): array}` of the selected weights of `model`, pruned."""
    governed = {id(g.variable): g for g in governed_weights(model)}
    selected = select(model, filters)
    pools = []
    seen: set[int] = set()
    for layer in selected:
        if governed:
            pool = [governed[id(w)] for w in layer.weights if id(w) in governed]
        else:
            pool = [Governed(w, "", full_precision(w)) for w in prunable(layer)]
        pools.append([g for g in pool if id(g.variable) not in seen])
        seen.update(id(g.variable) for g in pools[-1])
    if not seen:
        expected = (
            "a weight that a method governs, as in other layers of the model"
            if governed
            else "a trainable weight of rank 2 or more"
        )
        raise ValueError(
            f"Nothing to prune: expected {expected}, in one of the layers "
            f"{[layer.name for layer in selected]}. Received none."
        )
    if scope == "global":
        pools = [[governed for pool in pools for governed in pool]]
    # What is governed but not selected keeps its effective values.
    values = {key: to_array(g.effective) for key, g in governed.items()}
    for pool in pools:
        arrays = {id(g.variable): to_array(g.effective) for g in pool}
        values.update(_prune_pool(arrays, sparsity))
    return values


def _prune_pool(arrays, sparsity):
    if not arrays:
        return {}
    flat = np.concatenate([a.ravel() for a in arrays.values()])
    # A stable sort, so that ties go by position.
    order = np.argsort(np.abs(flat), kind="stable")
    flat[order[: math.floor(sparsity * flat.size)]] = 0
    ends = np.cumsum([a.size for a in arrays.values()])[:-1]
    return {
        key: part.reshape(a.shape)
        for (key, a), part in zip(arrays.items(), np.split(flat, ends), strict=True)
    }
