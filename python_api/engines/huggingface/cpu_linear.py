"""The matrix products of small batches in fp32 on a CPU, where decoding spends four fifths of its time.

    y[n, out] = x[n, in] W[out, in]^T + b

torch's `linear` hands these to one BLAS call whatever n is, and for a few rows that call is slow. Which of three
library calls runs is fixed by n alone, so that a call repeated gives the same bits:

    n <= 2       W x^T, a single row doubled: one pass over W at the speed of the memory
    n <= 128     oneDNN, W reordered once a run into its blocked layout
    beyond       torch's linear

The figures are in bench/findings.md. The reordered weights take as much memory again as the weights while a run lasts,
so models above `PACKED_BYTES` keep torch's linear there.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear

from power_kernels.api import torch_private
from power_kernels.api.engines.huggingface.patches import Patches

DOUBLED_ROWS = 2
PACKED_ROWS = 128
PACKED_BYTES = 4 << 30


class SmallBatchLinear:
    """Stands in for the `forward` of one nn.Linear during a run."""

    def __init__(self, module: nn.Linear, pack: bool):
        self.module, self.pack = module, pack
        self.packed: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.module.weight, self.module.bias
        rows = x.reshape(-1, x.shape[-1])
        count = rows.shape[0]
        if 0 < count <= DOUBLED_ROWS:
            wide = rows if count == DOUBLED_ROWS else rows.repeat(DOUBLED_ROWS, 1)
            out = torch.mm(weight, wide.t()).t()[:count].contiguous()
            out = out if bias is None else out + bias
        elif 0 < count <= PACKED_ROWS and self.pack:
            if self.packed is None:
                self.packed = torch_private.reordered_linear_weight(weight)
            out = torch_private.linear_of_reordered(rows, self.packed, bias)
        else:
            return linear(x, weight, bias)
        return out.reshape(*x.shape[:-1], weight.shape[0])


def speed_up(model: nn.Module, patches: Patches) -> None:
    """Patch the linear layers of a model that runs in fp32 on a CPU. Packed weights live as long as `patches`."""
    pack = packed_bytes(model) > 0
    for module in _plain_layers(model):
        patches.add(module, "forward", SmallBatchLinear(module, pack))


def packed_bytes(model: nn.Module) -> int:
    """What the reordered weights take during a run; 0 where none are made."""
    total = sum(module.weight.nbytes for module in _plain_layers(model))
    return total if total <= PACKED_BYTES and torch_private.can_reorder_linear() else 0


def _plain_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if _is_plain(module)]


def _is_plain(module: nn.Module) -> bool:
    # Subclasses compute something else, and so does a forward that someone has replaced.
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.weight.is_contiguous()
    )
