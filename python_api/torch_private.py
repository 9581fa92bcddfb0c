"""Every call into torch that torch does not promise to keep, in one place.

Each says what it does, why nothing public does it, and the oldest and newest torch in which it was seen to be there
(this package needs torch >= 2.11). Callers can do without: where one is missing they say so and take another way.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable

import torch

# ---- CUDA graphs


def end_failed_capture(device: torch.device, pool) -> None:
    """Stop the allocator from serving a graph's pool after its recording has failed.

    torch before 2.12 goes on allocating from it; later ones end this themselves, and the call then raises or is gone.
    `torch._C._cuda_endAllocateToPool(device index, pool)`: torch 2.11 to 2.13.
    """
    with contextlib.suppress(AttributeError, RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)


# ---- oneDNN, on a CPU


def reordered_linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] in oneDNN's blocked layout, for `linear_of_reordered`. It takes as much memory again.

    torch's own compiler emits this for frozen weights; nothing public does. 16: about how many rows to expect.
    `torch.ops.mkldnn._reorder_linear_weight(weight, rows)`, rows a hint: torch 2.11 to 2.13, builds with oneDNN.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)


def linear_of_reordered(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """rows [n, in] W^T + b of a weight that `reordered_linear_weight` gave.

    `torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")`: torch 2.11 to 2.13, builds with oneDNN.
    """
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@functools.cache
def can_reorder_linear() -> bool:
    """Whether this build of torch has the two operators above and they multiply right."""
    rows, weight = torch.ones(3, 8, device="cpu"), torch.ones(4, 8, device="cpu")
    want = torch.full((3, 4), 8.0, device="cpu")
    try:
        return torch.equal(linear_of_reordered(rows, reordered_linear_weight(weight), None).to(want.dtype), want)
    except (AttributeError, RuntimeError):
        return False


# ---- flash attention


def flash_attention_of_sequences(
    query: torch.Tensor,  # [rows, heads, dim], one query a sequence
    keys: torch.Tensor,  # [T, kv_heads, dim], unit inner stride
    values: torch.Tensor,  # [T, kv_heads, dim]
    *,
    queries: torch.Tensor,  # int32 [rows + 1]: 0, 1, 2, ...
    start: torch.Tensor,  # int32 [rows + 1]: where each sequence's keys begin
    used: torch.Tensor,  # int32 [rows]: how many of them there are
    longest: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query a sequence, each to its own run of keys.

    Returns (out [rows, heads, dim], log of the sum of the exponentials of the scaled scores, float32 [heads, rows]).

    `torch.nn.functional` has no form that takes lengths from device tensors for keys that lie apart.
    `torch.ops.aten._flash_attention_forward(..., seqused_k=)`: torch 2.11 to 2.13, CUDA builds, fp16 and bf16.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, keys, values, queries, start, 1, longest, 0.0, False, False, scale=scale, seqused_k=used
    )
    return out, lse


# ---- modules


def hooks_of(module: torch.nn.Module) -> tuple[Callable, ...]:
    """The hooks that run around a module's forward pass, those before it first.

    There are public ways to add hooks and none to list them.
    `Module._forward_pre_hooks`, `Module._forward_hooks`: torch 2.11 to 2.13.
    """
    return (*module._forward_pre_hooks.values(), *module._forward_hooks.values())


# ---- torch.compile


def compile_every_shape() -> None:
    """Let torch.compile keep as many programs of one function as a benchmark has shapes; else the ninth runs eagerly.

    `torch._dynamo.config.cache_size_limit`: documented, under a private name.
    """
    torch._dynamo.config.cache_size_limit = 256


def with_own_compile_cache(function: Callable) -> Callable:
    """A copy of a plain function whose compilations torch keeps, and counts against its limit, apart from others'.

    Dynamo keys both by code object, which closures made by one `def` share, and no option of torch.compile keeps them
    apart: so the copy has a code object of its own. torch 2.11 to 2.13.
    """
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def mark_dynamic(x: torch.Tensor, axis: int) -> None:
    """Tell torch.compile that this size will change. `torch._dynamo.mark_dynamic`: documented, under a private name."""
    torch._dynamo.mark_dynamic(x, axis)


def is_compiler_error(error: BaseException) -> bool:
    """Whether torch.compile could not make a program, as opposed to the program failing.

    `torch._dynamo.exc.TorchDynamoException`: torch 2.11 to 2.13.
    """
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)
