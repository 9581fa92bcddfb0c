"""What the operators are compared with: torch.compile, and kernels of other libraries where they are installed.

Another library's function is imported when its contender is made; one that cannot be imported, or that fails on a
shape, is reported in the results with the reason, and nothing else is affected.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from power_kernels.api import torch_private
from power_kernels.api.bench.harness import Call, Point, Workload


def compiled(function: Callable) -> Callable:
    """`function` compiled for each set of shapes alone: the best case for torch.compile."""
    torch_private.compile_every_shape()
    return torch.compile(function, dynamic=False)


def add_compiled(work: Workload, point: Point, name: str, function: Callable, call: Callable[[Callable], Call]) -> None:
    """Add the contender that `call` makes from the compiled function, where the point asks for it."""
    if point.compiled:
        work.contenders[name] = call(compiled(function))
        work.graph |= {name}
    else:
        work.missing[name] = "not at this point, since a compilation takes seconds"


def vllm_cache_write(ops, gathered: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> Call:
    """vLLM's write of the keys and values of every layer, gathered before, into slots of its cache.

    gathered [2 * layers, N, heads, width], cache [2 * layers, blocks, block, heads, width], slots i64 [N].
    """
    scale = torch.ones(1, device=cache.device)

    def run() -> None:
        for g in range(0, len(cache), 2):
            ops.reshape_and_cache_flash(
                gathered[g], gathered[g + 1], cache[g], cache[g + 1], slots, "auto", scale, scale
            )

    return run


def add_library(work: Workload, name: str, module: str, make: Callable[[object], Call], device: torch.device) -> None:
    """Add a contender of another library, made from its module, or the reason why there is none."""
    if device.type != "cuda":
        work.missing[name] = "needs a CUDA device"
        return
    try:
        work.contenders[name] = make(importlib.import_module(module))
        work.optional |= {name}
    except ImportError:
        work.missing[name] = "not installed"
    except Exception as error:  # another version than the one this was written for
        work.missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
