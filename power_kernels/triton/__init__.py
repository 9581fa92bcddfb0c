"""Triton kernels for CUDA and ROCm devices: one file an op family, the same names as csrc/.

Each file names its launch constants once; the launcher and `configurations()` both read them, so that what the tests
compile offline (registers, spills, load widths) is what runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Triton's names of the tensor element types, for the signatures of `Configuration`.
POINTER = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Configuration:
    """One specialisation of a kernel as a launcher requests it, enough to compile it for any target offline."""

    name: str
    kernel: Any  # a triton.JITFunction
    signature: Mapping[str, str]  # argument -> Triton type, constexprs left out
    constexprs: Mapping[str, Any]
    aligned: tuple[str, ...] = ()  # pointers at 16 bytes, integers that are multiples of 16
    num_warps: int = 4
    wide: str | None = None  # the vector load that the data must come through in PTX, e.g. "v4"


def configurations() -> list[Configuration]:
    """Every shipped configuration of every kernel of this package."""
    from . import chain, kv_cache, sampling, scoring

    return [c for module in (sampling, scoring, chain, kv_cache) for c in module.configurations()]


def launch(kernel, grid: tuple[int, ...], device: torch.device, *args, **meta) -> None:
    """Launch on the device that holds the tensors, whichever is current. An empty grid launches nothing."""
    if 0 in grid:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)
