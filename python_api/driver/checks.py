"""Numbers and lists of a user, checked and made plain. Errors name the argument, its value and what is allowed.

A number is what Python's `numbers` calls one (NumPy's scalars are), or a tensor or array without dimensions that holds
one. A bool is no number: where it stands for one, two arguments have been mixed up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real

from power_kernels.errors import ArgumentError, ArgumentTypeError


def integer(what: str, value, least: int, most: int | None = None) -> int:
    """value as an int in [least, most]. what: the beginning of the message, up to the value ("seed is").

    Raises ArgumentTypeError for what is no integer, ArgumentError for one out of range.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentTypeError(f"{what} {value!r}; it must be an integer")
    if value < least or (most is not None and value > most):
        allowed = f"be at least {least}" if most is None else f"lie in [{least}, {most}]"
        raise ArgumentError(f"{what} {value}; it must {allowed}")
    return int(value)


def number(name: str, value) -> int | float:
    """value as Python's own int or float. Raises ArgumentTypeError for what is no real number."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"{name} is {value!r}; it must be a number")
    if isinstance(value, Integral):
        return int(value)
    try:
        return float(value)
    except OverflowError:  # a fraction beyond all floats
        return math.inf if value > 0 else -math.inf


def switch(name: str, value) -> bool:
    value = plain(value)
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} is {value!r}; it must be True or False")
    return value


def items(name: str, value) -> list:
    """The entries of a sequence, tensor or array. A string and a tokenizer's mapping can be iterated, too, but are
    mistakes: ArgumentTypeError."""
    if hasattr(value, "tolist"):
        value = value.tolist()  # no list where there is only one number
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}; it must be a list")
    return list(value)


def plain(value):
    """The Python number in a NumPy scalar or in a tensor without dimensions; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
