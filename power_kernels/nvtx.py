"""NVTX ranges of the operators and of the driver, for Nsight Systems and Nsight Compute (bench/profile.md).

Off unless the environment has POWER_KERNELS_NVTX=1 or `enable()` is called. Off, nothing is run that would not be run
without this file: operators are traced by setting what `dispatch.run` calls, the driver's phases by wrapping an
object's methods when a run begins. Ranges are named after what they hold: `power_kernels.mh_advance`,
`power_kernels.step`, ...; those of operators lie inside those of the driver.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from .errors import BackendError
from .ops import dispatch

PREFIX = "power_kernels."

T = TypeVar("T")
_plain: dispatch.Runner | None = None  # what the operators called before, while ranges are on


def enabled() -> bool:
    return _plain is not None


def enable() -> None:
    """Switch the ranges on; runs of the driver that began before stay without. Does nothing when they are on.

    Raises BackendError where torch has no NVTX (a build without CUDA): ranges that nobody would see are a mistake.
    """
    global _plain
    if enabled():
        return
    try:
        torch.cuda.nvtx.mark(PREFIX + "enable")
    except RuntimeError as error:
        raise BackendError(f"NVTX ranges cannot be switched on: {error} (torch {torch.__version__})") from error
    _plain = dispatch.set_runner(_run_in_range)


def disable() -> None:
    """Switch the ranges off again."""
    global _plain
    if enabled():
        dispatch.set_runner(_plain)
        _plain = None


def _run_in_range(name: str, device: torch.device, *args) -> None:
    if torch.compiler.is_compiling():  # a graph holds the operator, not the range
        return _plain(name, device, *args)
    torch.cuda.nvtx.range_push(PREFIX + name)
    try:
        return _plain(name, device, *args)
    finally:
        torch.cuda.nvtx.range_pop()


def in_range(name: str, function: Callable) -> Callable:
    """`function` inside a range, whether or not ranges are on."""

    def ranged(*args, **kwargs):
        torch.cuda.nvtx.range_push(PREFIX + name)
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.nvtx.range_pop()

    return ranged


class _Traced:
    """Everything of another object, some of its methods inside ranges."""

    def __init__(self, target, methods: Iterable[str]):
        self._target = target
        for name in methods:
            setattr(self, name, in_range(name, getattr(target, name)))

    def __getattr__(self, name: str):
        return getattr(self._target, name)


def traced(target: T, methods: Iterable[str]) -> T:
    """`target` itself while ranges are off; else a stand-in whose `methods` run inside ranges."""
    return _Traced(target, methods) if enabled() else target


def enable_from_environment() -> None:
    """POWER_KERNELS_NVTX=1 switches the ranges on when the operators are imported; unset, empty or 0 does not."""
    if os.environ.get("POWER_KERNELS_NVTX", "0") not in ("", "0"):
        enable()


# Whichever is imported first, this file or the operators, brings the other along: the switch holds for both.
enable_from_environment()
