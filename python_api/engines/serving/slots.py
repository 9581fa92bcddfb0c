"""The sampler's table of slots in the process that samples, and how it is kept up to date.

A slot is a row of the stack's own request table. What a request brings is written down on the host (`stage`, `drop`)
and goes to the device in one copy before the next draw (`flush`); a step without news copies nothing, and no step waits
for the device.
"""

from __future__ import annotations

import numpy as np
import torch

from power_kernels import SlotTable, sample_slots_out, workspace_size
from power_kernels.api.engines.serving.proposal import Proposal
from power_kernels.errors import ArgumentTypeError
from power_kernels.law import check_integer
from power_kernels.rng import as_int64
from power_kernels.slots import SLOT_FIELDS, SlotField

# A slot's row of every tensor of `SlotTable`, side by side, and its number.
_ROW = np.dtype(
    [("slot", "i8"), ("field", "i8", SLOT_FIELDS), ("exponent", "f4", 2), ("bound", "f8", 2), ("cumw", "f8")]
)


class SlotRows:
    """A `SlotTable` of so many slots on a device, none of them ours yet, and the draws of batches of it.

    on: bool [slots], the slots that are ours, as they will be after the next `flush`; not to be written to.
    rows, vocab: of the largest batch of logits. entropy: whether draws give the entropy of their rows.
    Raises ArgumentError or ArgumentTypeError.
    """

    def __init__(self, slots: int, device: torch.device | str, *, rows: int, vocab: int, entropy: bool = False):
        check_integer("rows", rows, 1)
        check_integer("vocab", vocab, 1)
        self.device = torch.device(device)
        self.table = SlotTable.allocate(slots, device)
        self.entropy = entropy
        self.on = np.zeros(slots, bool)
        self._workspace = torch.empty(workspace_size(rows, vocab), dtype=torch.float32, device=device)
        self._host = np.zeros(slots, _ROW)
        self._host["slot"] = np.arange(slots)
        self._news: set[int] = set()

    def stage(self, slot: int, proposal: Proposal) -> None:
        """From the next `flush` on, the slot draws for this proposal, whatever it drew for before.

        Raises ArgumentError for a slot that there is not, ArgumentTypeError for what is no `Proposal`.
        """
        check_integer("slot", slot, 0, len(self.on) - 1)
        if not isinstance(proposal, Proposal):
            raise ArgumentTypeError(f"proposal is a {type(proposal).__name__}; it must be a Proposal")
        row = self._host[slot]
        field = row["field"]
        field[SlotField.ACTIVE] = 1
        field[SlotField.BASE] = proposal.base
        field[SlotField.FIRST] = proposal.first
        field[SlotField.EXCLUDE] = proposal.exclude
        field[SlotField.SERIAL] = proposal.serial
        field[SlotField.CHAIN_ID] = proposal.chain_id
        field[SlotField.PROMPT_ID] = proposal.prompt_id
        field[SlotField.HORIZON] = proposal.horizon
        field[SlotField.STOP_TOKEN] = proposal.stop_token
        field[SlotField.CAN_END_EARLY] = proposal.ends_early
        field[SlotField.SEED] = as_int64(proposal.seed)
        row["exponent"] = proposal.alpha, proposal.beta
        row["bound"] = proposal.theta, proposal.length_bonus  # as `SlotBound` has them
        row["cumw"] = proposal.cumw
        self.on[slot] = True
        self._news.add(slot)

    def drop(self, slot: int) -> None:
        """The slot is not ours any more, if it was. Raises as `stage` does."""
        check_integer("slot", slot, 0, len(self.on) - 1)
        if self.on[slot]:
            self._host[slot]["field"][SlotField.ACTIVE] = 0
            self.on[slot] = False
            self._news.add(slot)

    def flush(self) -> None:
        """Bring the news to the device, in front of what the current stream is given next. Before every draw."""
        if not self._news:
            return
        packed = torch.from_numpy(self._host[list(self._news)].view(np.uint8).reshape(len(self._news), _ROW.itemsize))
        self._news.clear()
        if self.device.type == "cuda":
            # torch gives pinned memory to nobody else before the copies out of it are done.
            packed = packed.pin_memory().to(self.device, non_blocking=True)

        def column(name: str, dtype: torch.dtype) -> torch.Tensor:
            kind, offset = _ROW.fields[name]
            return packed[:, offset : offset + kind.itemsize].view(dtype)

        slot = column("slot", torch.int64)[:, 0]
        self.table.field.index_copy_(0, slot, column("field", torch.int64))
        self.table.exponent.index_copy_(0, slot, column("exponent", torch.float32))
        self.table.bound.index_copy_(0, slot, column("bound", torch.float64))
        self.table.cumw.index_copy_(0, slot, column("cumw", torch.float64)[:, 0])

    def draw(
        self,
        logits: torch.Tensor,
        slot: torch.Tensor,
        position: torch.Tensor,
        live: torch.Tensor,
        token: torch.Tensor,
        values: torch.Tensor,
        flags: torch.Tensor,
    ) -> None:
        """`power_kernels.sample_slots_out` of the table: what is ours is drawn into token, values and flags."""
        sample_slots_out(
            self.table, logits, slot, position, live, self._workspace, token, values, flags, entropy=self.entropy
        )
