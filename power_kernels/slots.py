"""The parameters of a serving stack's requests by slot, which `sample_slots` reads (DESIGN 5.8), as plain tensors.

A slot is a row of the stack's own request table: a number of [0, N) that a request keeps while it runs, whatever row of
the batch it is in. Everything a draw depends on is keyed by the slot and by the token's position, so that chunked
prefill, reordered batches and preemption need no state. The enums below name columns and bits; csrc/state.h mirrors
them (an extension built from others is not loaded).

Positions count from the start of the prompt; answer positions from its end.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import torch

from .law import check_integer


class SlotField(IntEnum):
    """Columns of `SlotTable.field` int64 [N, 12]."""

    ACTIVE = 0  # 0: the slot is not ours, and the outputs of its row are left as they are
    BASE = 1  # prompt length
    FIRST = 2  # the answer position at which EXCLUDE applies
    EXCLUDE = 3  # the token that may not be drawn there, -1 for none
    SERIAL = 4  # SERIAL, CHAIN_ID and PROMPT_ID are words of the random numbers (DESIGN 4)
    CHAIN_ID = 5
    PROMPT_ID = 6
    HORIZON = 7  # the length at which the answer is closed
    STOP_TOKEN = 8  # what is emitted when the proposal is rejected early or its logits are bad, -1 for none
    CAN_END_EARLY = 9  # not 0: an EOS token or a stop string may close the answer before HORIZON
    SEED = 10  # 64 bits


SLOT_FIELDS = 12  # row pitch: a multiple of 16 bytes


class SlotBound(IntEnum):
    """Columns of `SlotTable.bound` float64 [N, 2], in nats."""

    THETA = 0  # -inf: never rejected
    LENGTH_BONUS = 1  # lambda, a token


class SlotFlag(IntEnum):
    """Bits of the flags of `sample_slots`; those below are a `Status`."""

    REJECTED = 8  # the proposal cannot be accepted any more


@dataclass
class SlotTable:
    """Every tensor of N slots, in the order of the schema of `sample_slots_out`: on one device, contiguous."""

    field: torch.Tensor  # i64 [N, 12]
    exponent: torch.Tensor  # f32 [N, 2]: alpha, beta
    bound: torch.Tensor  # f64 [N, 2]
    cumw: torch.Tensor  # f64 [N], nats: the running sum of the answer's weights, which `sample_slots` advances

    @staticmethod
    def allocate(slots: int, device: torch.device | str = "cpu") -> SlotTable:
        """N = `slots` >= 1 slots, none of them active. Raises ArgumentError or ArgumentTypeError for another number."""
        check_integer("slots", slots, 1)
        field = torch.zeros(slots, SLOT_FIELDS, dtype=torch.int64, device=device)
        field[:, [SlotField.EXCLUDE, SlotField.STOP_TOKEN]] = -1
        bound = torch.zeros(slots, len(SlotBound), dtype=torch.float64, device=device)
        bound[:, SlotBound.THETA] = -torch.inf
        return SlotTable(
            field=field,
            exponent=torch.ones(slots, 2, dtype=torch.float32, device=device),
            bound=bound,
            cumw=torch.zeros(slots, dtype=torch.float64, device=device),
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))
