"""Several processes that hold one model together, by transformers' tensor-parallel plan (DESIGN section 6).

    torchrun --nproc-per-node 2 run.py
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_plan="auto"))

Each process runs the same calls on the same chains and keeps the keys and values of its own heads. What the plan sums
and gathers need not be the same bits everywhere, and one different token would part the chains for ever: so every
draw is that of the first rank, sent to the others in one small message a step. What the processes are asked to do is
compared before it is done.
"""

from __future__ import annotations

import hashlib
import sys
from typing import NamedTuple, TypeVar

import torch
from torch import distributed, nn

from power_kernels.api.driver.engine import UnsupportedModelError
from power_kernels.errors import ArgumentError

Drawn = TypeVar("Drawn", bound=NamedTuple)


class TensorParallelGroup:
    """The processes that hold `model` together. group: theirs. device: where the messages live."""

    def __init__(self, group: distributed.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)

    @classmethod
    def of(cls, model: nn.Module) -> TensorParallelGroup | None:
        """None for a model that this process holds alone.

        Raises UnsupportedModelError for parameters that are distributed in another way than over the ranks of one
        tensor-parallel group.
        """
        name, shared = type(model).__name__, {}
        if "torch.distributed.tensor" in sys.modules:  # else nothing can be a DTensor
            from torch.distributed.tensor import DTensor

            shared = {key: p for key, p in model.named_parameters() if isinstance(p, DTensor)}
        if not shared:
            if (getattr(model, "tp_size", None) or 1) > 1:
                raise UnsupportedModelError(
                    f"{name} was loaded for several processes, and none of its weights is shared"
                )
            return None
        meshes = {p.device_mesh for p in shared.values()}
        axes = {axis for mesh in meshes for axis in (mesh.mesh_dim_names or ("tp",))}
        if len(meshes) > 1 or axes != {"tp"} or next(iter(meshes)).ndim != 1:
            raise UnsupportedModelError(
                f"{name} has weights distributed over {', '.join(sorted(axes))}; only one axis, tp, is supported"
            )
        mesh = meshes.pop()
        heads = getattr(model.config.get_text_config(), "num_key_value_heads", None)
        if heads is not None and heads % mesh.size() and any(".k_proj." in key for key in shared):
            raise UnsupportedModelError(
                f"{name} has {heads} key and value heads, which {mesh.size()} processes cannot divide evenly"
            )
        return cls(mesh.get_group(), next(model.parameters()).device)

    def check_same(self, **given) -> None:
        """Raise ArgumentError, in every process, where the processes were given different values. All of them must
        call this with the same names; values are compared as their repr."""
        digests = [
            int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)
            for value in given.values()
        ]
        mine = torch.tensor(digests, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(everyone, mine, group=self.group)
        table = torch.stack(everyone).tolist()
        for place, name in enumerate(given):
            others = [rank for rank, row in enumerate(table) if row[place] != table[0][place]]
            if others:
                raise ArgumentError(
                    f"{name} is not the same in all processes: rank {others[0]} of {self.size} has another value than "
                    "rank 0. Processes that hold one model together must make the same calls"
                )

    def drawn(self, mine: Drawn) -> Drawn:
        """The first rank's draws: tensors [L] of 4 or 8 bytes an entry, or None, in place of this process's own.

        One broadcast, and nothing that waits for a device.
        """
        parts = [x.reshape(-1).view(torch.int32) for x in mine if x is not None]
        message = torch.cat(parts)
        distributed.broadcast(message, group_src=0, group=self.group)
        received = iter(message.split([part.numel() for part in parts]))
        return type(mine)(*(None if x is None else next(received).clone().view(x.dtype).view(x.shape) for x in mine))

    def first(self, value: float) -> float:
        """The first rank's number."""
        message = torch.tensor([value], dtype=torch.float64, device=self.device)
        distributed.broadcast(message, group_src=0, group=self.group)
        return message.item()

    def least(self, value: float) -> float:
        message = torch.tensor([value], dtype=torch.float64, device=self.device)
        distributed.all_reduce(message, distributed.ReduceOp.MIN, group=self.group)
        return message.item()

    def check_logits(self, model: nn.Module, width: int) -> None:
        """Raise UnsupportedModelError where the plan leaves each process a part of the logits."""
        head = model.get_output_embeddings()
        if head is not None and width != head.weight.shape[0]:
            raise UnsupportedModelError(
                f"{type(model).__name__} gives {width} logits of {head.weight.shape[0]}: its plan does not gather them"
            )
