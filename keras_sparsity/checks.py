"""Checks of arguments that several modules share."""

import math


def check_number(name, value, above=None, at_least=None) -> float:
    """Returns `value` as a float, or raises a `ValueError` that names the argument."""
    expected = "a finite number"
    if above is not None:
        expected += f" > {above}"
    if at_least is not None:
        expected += f" >= {at_least}"
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if (
        not math.isfinite(number)
        or (above is not None and number <= above)
        or (at_least is not None and number < at_least)
    ):
        raise ValueError(
            f"Argument `{name}` must be {expected}. Received: {name}={value!r}"
        )
    return number


def check_integer(name, value, at_least) -> int:
    """Returns `value` as an int >= `at_least`, or raises a `ValueError`."""
    number = check_number(name, value, at_least=at_least)
    if number != int(number) or number >= 2**31:  # Keras counts in int32
        raise ValueError(
            f"Argument `{name}` must be an integer < 2**31. Received: {name}={value!r}"
        )
    return int(number)


def check_fraction(name, value) -> float:
    """Returns `value` as a float in [0, 1), or raises a `ValueError`."""
    sparsity = check_number(name, value, at_least=0)
    if sparsity >= 1:
        raise ValueError(
            f"Argument `{name}` must be a number in [0, 1). Received: {name}={value!r}"
        )
    return sparsity
