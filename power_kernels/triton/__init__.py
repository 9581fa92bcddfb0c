"""Triton kernels for CUDA and ROCm devices: one file an op family, the same names as csrc/.

Each file names its launch constants once; the launcher and `configurations()` both read them, so that what the tests
compile offline (registers, spills, load widths) is what runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
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
    torch.bool: "*u1",
}


LOGITS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Configuration:
    """One specialisation of a kernel as a launcher requests it, enough to compile it for any target offline."""

    name: str
    kernel: Any  # a triton.JITFunction
    signature: Mapping[str, str]  # argument -> Triton type, constexprs left out
    constexprs: Mapping[str, Any]
    aligned: tuple[str, ...] = ()  # pointers at 16 bytes, integers that are multiples of 16, where Triton looks
    num_warps: int = 4
    num_stages: int | None = None  # None: the target's default
    maxnreg: int | None = None  # NVIDIA only: registers a thread may take, where ptxas left to itself spills
    wide: str | None = None  # "v4": what it streams must come in 16-byte loads
    elements: int | None = None  # that a program takes in one pass of its hot loop
    targets: tuple[str, ...] | None = None  # that it is launched on; None: all


def split(meta: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Constexprs and number of warps of a launcher's constants."""
    return {k: v for k, v in meta.items() if k != "num_warps"}, meta["num_warps"]


def logits_configurations(
    name: str, kernel, signature: Mapping[str, str], meta: Mapping[str, Any], choices: Mapping[str, tuple]
) -> list[Configuration]:
    """A kernel over rows of logits: every dtype, 16-byte and single-entry loads (VEC), every combination of `choices`.

    signature: all but logits_ptr and stride_row. meta: the launcher's constants. A kernel without a constexpr VEC reads
    single entries only.
    """
    constexprs, warps = split(meta)
    found = []
    for dtype in LOGITS:
        for width in (16 // dtype.itemsize, 1) if "VEC" in kernel.arg_names else (None,):
            for combination in product(*choices.values()):
                chosen = {**({} if width is None else {"VEC": width}), **dict(zip(choices, combination, strict=True))}
                found.append(
                    Configuration(
                        name=" ".join([name, str(dtype)[6:], *(f"{k}={v}" for k, v in chosen.items())]),
                        kernel=kernel,
                        signature={"logits_ptr": POINTER[dtype], "stride_row": "i64", **signature},
                        constexprs={**constexprs, **chosen},
                        aligned=("logits_ptr",) if (width or 1) > 1 else (),
                        num_warps=warps,
                        # where a tile has as many entries a thread
                        wide="v4" if (width or 1) > 1 and meta["TILE"] >= 32 * warps * width else None,
                        elements=meta.get("TILE") if name.startswith("mass") else None,
                    )
                )
    return found


def configurations() -> list[Configuration]:
    """Every shipped configuration of every kernel of this package."""
    from . import chain, kv_cache, lm_head, paged_kv, particles, sampling, scoring, slots

    modules = (sampling, scoring, slots, lm_head, chain, kv_cache, paged_kv, particles)
    return [c for module in modules for c in module.configurations()]


def launch(kernel, grid: tuple[int, ...], device: torch.device, *args, **meta) -> None:
    """Launch on the device that holds the tensors, whichever is current. An empty grid launches nothing."""
    if 0 in grid:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)
