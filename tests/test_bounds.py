"""Bounds of scales and thresholds, and the warning about weight decay."""

import functools
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_sparsity as ks
from keras_sparsity.bounds import Bounds

METHODS = {
    "halo": ks.HALO(xi=1e-3, psi=1e-2),
    "sws": ks.SWS(xi=1e-3, psi=1e-2),
    "ltp": functools.partial(ks.LTP, l0=1e-3),
}


def fit(optimizer, method):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    if method:
        model = ks.sparsify(model, METHODS[method])
    model.compile(optimizer, "mse")
    model.fit(np.ones((8, 4), "float32"), np.ones((8, 3), "float32"), verbose=0)


def excluding():
    optimizer = keras.optimizers.AdamW(0.1)
    optimizer.exclude_from_weight_decay(var_names=["_scale", "_threshold"])
    return optimizer


@pytest.mark.parametrize("low, high", [(0.5, 2.0), (0.5, None)])
def test_value_is_clipped(low, high):
    values = np.array([-3.0, 0.0, 0.5, 1.0, 2.0, 9.0], "float32")
    clipped = ops.convert_to_numpy(Bounds(low, high)(ops.convert_to_tensor(values)))
    np.testing.assert_array_equal(clipped, np.clip(values, low, high))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "optimizer",
    [keras.optimizers.AdamW, lambda: keras.optimizers.SGD(0.1, weight_decay=0.1)],
    ids=["adamw", "sgd"],
)
def test_weight_decay_is_warned_of_in_fit(optimizer, method):
    with pytest.warns(UserWarning, match="Weight decay of the optimizer"):
        fit(optimizer(), method)


@pytest.mark.parametrize(
    "optimizer, method",
    [
        (lambda: ks.SparsityOptimizer(keras.optimizers.AdamW()), "ltp"),
        (lambda: ks.SparsityOptimizer(keras.optimizers.AdamW()), "halo"),
        (excluding, "halo"),
        (excluding, "ltp"),
        (lambda: keras.optimizers.AdamW(weight_decay=0.0), "ltp"),
        (keras.optimizers.SGD, "halo"),
        (keras.optimizers.AdamW, None),
    ],
    ids=[
        "own-ltp",
        "own-halo",
        "excluded-halo",
        "excluded-ltp",
        "zero",
        "none",
        "plain",
    ],
)
def test_no_warning_where_it_does_not_reach(optimizer, method):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(optimizer(), method)
