"""Power-sampling rows in a batch of SGLang's scheduler process.

    logits [B, V], slot, position -> token [B]; logq, weight, entropy [B, 3]; flags [B]

A slot is a row of SGLang's request pool. What a row needs is written to `SlotTable` when its request is scheduled, and
the rest follows from slot and position, so chunked prefill, reordered batches and requests that come back take nothing
more. Nothing here waits for the device: results leave as SGLang's auxiliary output, which its scheduler copies to the
host beside the tokens, and go to the client in `meta_info`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sglang.srt.managers.auxiliary_output import append_auxiliary_output
from torch import nn

from power_kernels.api.engines.serving.proposal import COLUMNS
from power_kernels.api.engines.serving.rows import PowerRows
from power_kernels.api.engines.sglang.parameters import DRAWS
from power_kernels.slots import SlotField


class PowerWorker:
    """The requests that are ours in this process's request pool. rows: None before the first of them."""

    def __init__(self):
        self.rows: PowerRows | None = None
        self._slot: dict[str, int] = {}  # by request
        self._name: dict[int, str] = {}  # by slot

    def admit(self, batch, vocab_size: int) -> None:
        """These requests are about to be prefilled, each in its slot. batch: SGLang's `ScheduleBatch`."""
        for request in batch.reqs:
            arguments = request.sampling_params.custom_params
            if not arguments and self.rows is None:
                continue
            if self.rows is None:
                slots = batch.req_to_token_pool.req_to_token.shape[0]
                self.rows = PowerRows(slots, torch.device(batch.device), vocab_size)
            slot = request.kv.req_pool_idx
            before = self._name.pop(slot, None)
            if self._slot.get(before) == slot:  # else it was retracted, and came again in another slot
                del self._slot[before]
            # A request that was retracted comes again with what it had drawn, whose running sum is lost.
            if self.rows.add(slot, arguments, resumed=bool(request.output_ids)):
                self._slot[request.rid] = slot
                self._name[slot] = request.rid
            else:  # a client may give an ordinary request the name of one of ours that has ended
                self._slot.pop(request.rid, None)

    def slots(self, names: list[str]) -> np.ndarray:
        """Of requests; -1 for those that are not ours."""
        return np.array([self._slot.get(name, -1) for name in names], np.int64)


WORKER = PowerWorker()


@dataclass
class Drawn:
    """What is to be sent along with a batch's tokens: SGLang's `DeviceAuxiliaryOutput`, and on the host its
    `HostAuxiliaryOutput`.

    ours: bool [B] on the host, None where no row is ours. values float32 [B, 3], flags int64 [B].
    """

    ours: np.ndarray | None = None
    values: torch.Tensor | None = None
    flags: torch.Tensor | None = None

    def send_with(self, logits_output) -> None:
        if self.ours is not None:
            logits_output.auxiliary_device_output = append_auxiliary_output(logits_output.auxiliary_device_output, self)

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> Drawn:
        return Drawn(self.ours, copy_tensor(self.values), copy_tensor(self.flags))

    def consume(self, batch, commits) -> None:
        """The tokens are in their requests: put the results beside them."""
        values, flags = self.values.tolist(), self.flags.tolist()
        for row in np.flatnonzero(self.ours):
            if commits[row] is None:
                continue  # in the middle of its prompt, or ended before
            request = batch.reqs[row]
            if request.customized_info is None:
                request.customized_info = {}
            draws = request.customized_info.setdefault(DRAWS, [])
            if len(draws) != commits[row].output_index or len(commits[row].token_ids) != 1:
                raise RuntimeError(
                    f"SGLang has committed {commits[row]} of request {request.rid}, of which {len(draws)} draws are "
                    "known; the next one was expected"
                )
            draws.append((*values[row], flags[row]))


class PowerSampler(nn.Module):
    """Before SGLang's `Sampler`, which draws the ordinary rows."""

    def __init__(self, base: nn.Module, worker: PowerWorker = WORKER):
        super().__init__()
        self.base = base
        self._worker = worker
        self._batch, self._drawn = None, None

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)  # what else the runner reads and calls

    @contextlib.contextmanager
    def drawing(self, batch) -> Iterator[Drawn]:
        """While this is open, `forward` is asked for this batch (SGLang's `ForwardBatch`). Gives what it draws."""
        self._batch, self._drawn = batch, Drawn()
        try:
            yield self._drawn
        finally:
            self._batch, self._drawn = None, None

    def forward(self, logits_output, sampling_info, *args, **kwargs) -> torch.Tensor:
        """As `Sampler.forward`; the fourth of args are the positions of the tokens that were fed."""
        rows = self._worker.rows
        if self._batch is None or rows is None:
            return self.base(logits_output, sampling_info, *args, **kwargs)
        slots = self._worker.slots(self._batch.rids)
        ours = slots >= 0
        if not ours.any():
            return self.base(logits_output, sampling_info, *args, **kwargs)
        positions = args[3]
        token = self._draw(logits_output.next_token_logits, slots, ours, positions)
        if ours.all():
            return token
        # After ours: SGLang divides the logits where they stand.
        ordinary = self.base(logits_output, sampling_info, *args, **kwargs)
        slot = self._batch.req_pool_indices[: len(ours)]
        mine = rows.table.field[slot, SlotField.ACTIVE] != 0
        return torch.where(mine, token, ordinary.long())

    def _draw(self, logits: torch.Tensor, slots: np.ndarray, ours: np.ndarray, positions: torch.Tensor) -> torch.Tensor:
        rows, count = self._worker.rows, len(slots)
        rows.flush()
        slot, position = self._batch.req_pool_indices[:count].long(), positions[:count].long()
        field = rows.table.field[slot]
        # Before that it is in the middle of its prompt, which comes in chunks, and SGLang throws the draw away.
        live = position + 1 >= field[:, SlotField.BASE] + field[:, SlotField.FIRST]
        token = torch.zeros(count, dtype=torch.int64, device=logits.device)
        values = torch.zeros(count, COLUMNS, dtype=torch.float32, device=logits.device)
        flags = torch.zeros(count, dtype=torch.int64, device=logits.device)
        rows.draw_rows(slots[ours], logits[:count], slot, position, live, token, values, flags)
        self._drawn.ours, self._drawn.values, self._drawn.flags = ours, values, flags
        return token
