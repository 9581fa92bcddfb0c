"""Validation of arguments: each error names the argument, its value and what is allowed."""

from __future__ import annotations

import math

import torch

from ..errors import ArgumentError, ArgumentTypeError

LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(name: str, value, *, dtypes=None, shape=None, like: torch.Tensor | None = None) -> None:
    """shape: a tuple whose None entries match anything."""
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
    if value.layout != torch.strided:
        raise ArgumentTypeError(f"{name} has layout {value.layout}; it must be torch.strided")
    if dtypes is not None and value.dtype not in dtypes:
        allowed = ", ".join(str(d) for d in dtypes)
        raise ArgumentTypeError(f"{name} has dtype {value.dtype}; allowed: {allowed}")
    if like is not None and value.device != like.device:
        raise ArgumentTypeError(f"{name} is on {value.device}; it must be on {like.device} like the first argument")
    if shape is not None:
        fits = value.dim() == len(shape) and all(
            want is None or got == want for got, want in zip(value.shape, shape, strict=True)
        )
        if not fits:
            want = ", ".join("*" if s is None else str(s) for s in shape)
            raise ArgumentError(f"{name} has shape {list(value.shape)}; it must be [{want}]")


def check_rows(name: str, value: torch.Tensor) -> None:
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ArgumentError(f"{name} has inner stride {value.stride(-1)}; it must be 1 (call .contiguous())")


def check_vector(name: str, value: torch.Tensor) -> None:
    if value.numel() > 1 and not value.is_contiguous():
        raise ArgumentError(f"{name} has strides {list(value.stride())}; it must be contiguous")


def check_flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be a bool")


def check_logits(logits) -> None:
    check_tensor("logits", logits, dtypes=LOGIT_DTYPES, shape=(None, None))
    if logits.shape[1] < 1:
        raise ArgumentError("logits has an empty vocabulary; V must be at least 1")
    check_rows("logits", logits)


def check_vectors(like: torch.Tensor, **vectors: tuple) -> None:
    """name=(tensor, dtype or dtypes, shape)."""
    for name, (value, dtypes, shape) in vectors.items():
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        check_tensor(name, value, dtypes=dtypes, shape=shape, like=like)
        check_vector(name, value)


def check_seed(like: torch.Tensor, seed, rows: int) -> None:
    """seed: int64, one for all rows or one a row."""
    check_vectors(like, seed=(seed, torch.int64, (None,)))
    if seed.shape[0] not in (1, rows):
        raise ArgumentError(f"seed has shape {list(seed.shape)}; it must be [1] or [{rows}]")


def check_exponents(**exponents: torch.Tensor) -> None:
    for name, values in exponents.items():
        if values.device.type != "cpu" or torch.compiler.is_compiling():
            continue
        for row, value in enumerate(values.tolist()):
            if not 0.0 < value < math.inf:
                raise ArgumentError(f"{name}[{row}] is {value}; it must be finite and positive")
