"""What torchrun and accelerate tell each process that they start, read without torch."""

from __future__ import annotations

import os

from power_kernels.errors import ArgumentError


def from_environment(name: str, default: int, least: int) -> int:
    """The integer that an environment variable holds. Raises ArgumentError for anything below `least` or no integer."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) < least:
        raise ArgumentError(f"{name} is {value!r} in the environment; it must be an integer of at least {least}")
    return int(value)
