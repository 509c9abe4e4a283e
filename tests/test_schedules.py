"""Schedules of sparsity against their formulas in float64."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_sparsity.schedules import ConstantSparsity, CubicSparsity


def sparsities(schedule, steps):
    values = [schedule(ops.convert_to_tensor(step, "int32")) for step in steps]
    return [float(ops.convert_to_numpy(value)) for value in values]


def test_constant_sparsity():
    schedule = ConstantSparsity(0.9, begin_step=3)
    received = sparsities(schedule, [0, 2, 3, 4, 10**9])
    np.testing.assert_allclose(received, [0, 0, 0.9, 0.9, 0.9], rtol=1e-6)


def test_constant_sparsity_begins_at_once_by_default():
    np.testing.assert_allclose(sparsities(ConstantSparsity(0.5), [0]), [0.5])


@pytest.mark.parametrize("begin_step, initial_sparsity", [(0, 0.0), (7, 0.2)])
def test_cubic_sparsity(begin_step, initial_sparsity):
    schedule = CubicSparsity(0.95, 57, begin_step, initial_sparsity)
    steps = np.arange(begin_step, 80)
    progress = np.clip((steps - begin_step) / (57 - begin_step), 0, 1)
    expected = 0.95 + (initial_sparsity - 0.95) * (1 - progress) ** 3
    received = sparsities(schedule, steps)
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)
    assert sparsities(schedule, range(begin_step)) == [0] * begin_step


def test_cubic_sparsity_ends_at_its_ends():
    schedule = CubicSparsity(0.95, end_step=60, begin_step=10, initial_sparsity=0.3)
    received = sparsities(schedule, [9, 10, 60, 61, 10**6])
    np.testing.assert_allclose(received, [0, 0.3, 0.95, 0.95, 0.95], rtol=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [
        ConstantSparsity(0.9, begin_step=10, frequency=5),
        CubicSparsity(0.9, 70, begin_step=10, initial_sparsity=0.1, frequency=5),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_config_round_trip(schedule):
    config = keras.saving.serialize_keras_object(schedule)
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is type(schedule)
    assert vars(copy) == vars(schedule)


@pytest.mark.parametrize(
    "argument, value, expected",
    [
        *[("final_sparsity", v, r"a number in \[0, 1\)") for v in (1, 1.5)],
        *[("final_sparsity", v, "a finite number >= 0") for v in (-0.1, np.nan, "1")],
        *[("initial_sparsity", v, r"a number in \[0, 1\)") for v in (1, 2)],
        *[("initial_sparsity", v, "a finite number") for v in (-1, None, True)],
        *[("begin_step", v, "a finite number >= 0") for v in (-1, "0", np.inf)],
        ("begin_step", 0.5, "an integer"),
        *[("frequency", v, "a finite number >= 1") for v in (0, -100, None)],
        ("frequency", 1.5, "an integer"),
        *[("end_step", v, "a finite number >= 1") for v in (0, np.nan, "60")],
        ("end_step", 60.5, "an integer"),
    ],
)
def test_bad_argument_is_named(argument, value, expected):
    valid = {"final_sparsity": 0.9, "end_step": 60}
    with pytest.raises(ValueError, match=f"`{argument}` must be {expected}"):
        CubicSparsity(**{**valid, argument: value})
    if argument not in ("end_step", "initial_sparsity"):
        with pytest.raises(ValueError, match=f"`{argument}` must be {expected}"):
            ConstantSparsity(**{"final_sparsity": 0.9, argument: value})


def test_end_must_come_after_the_begin():
    with pytest.raises(ValueError, match="`end_step` must be a finite number >= 6"):
        CubicSparsity(0.9, end_step=5, begin_step=5)
