"""Power-sampling rows in a batch of vLLM's V1 model runner, which serves CPUs.

As `sampler_v2.py`, but that V1's table has no slots that a request keeps: its rows move. A slot is given to each
request here, and its row is found by its name.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput

from power_kernels.api.engines.serving.proposal import COLUMNS
from power_kernels.api.engines.serving.rows import PowerRows


class PowerSamplerV1:
    """In the place of vLLM's `Sampler`, which draws the ordinary rows. runner: its model runner."""

    def __init__(self, base, runner):
        self.base, self.runner = base, runner
        self.rows = PowerRows(runner.max_num_reqs, runner.device, runner.model_config.get_vocab_size())
        self._slot: dict[str, int] = {}  # by request
        self._free = list(range(runner.max_num_reqs))
        self._next = np.full(runner.max_num_reqs, -1)  # position that a slot's next draw is made at, -1 for any

    def __getattr__(self, name: str):
        return getattr(self.base, name)

    def __call__(self, logits: torch.Tensor, sampling_metadata, **options) -> SamplerOutput:
        names = self.runner.input_batch.req_ids
        if len(names) != len(logits):  # warming up
            return self.base(logits=logits, sampling_metadata=sampling_metadata, **options)
        slots = self._slots(names)
        ours = self.rows.on[slots]
        if not ours.any():
            return self.base(logits=logits, sampling_metadata=sampling_metadata, **options)
        drawn = self._draw(logits, names, slots, ours)
        if ours.all():
            return drawn
        # After ours: vLLM divides the logits where they stand.
        metadata = replace(sampling_metadata, max_num_logprobs=self._widest(names, ours))
        ordinary = self.base(logits=logits, sampling_metadata=metadata, **options)
        return _merged(ordinary, drawn, torch.from_numpy(ours))

    def _slots(self, names: list[str]) -> np.ndarray:
        for gone in [name for name in self._slot if name not in self.runner.requests]:
            slot = self._slot.pop(gone)
            self.rows.drop(slot)
            self._free.append(slot)
        for name in names:
            if name not in self._slot:
                slot = self._slot[name] = self._free.pop()
                request = self.runner.requests[name]
                self.rows.add(slot, request.sampling_params.extra_args, resumed=bool(request.output_token_ids))
                self._next[slot] = -1
        return np.array([self._slot[name] for name in names])

    def _draw(self, logits: torch.Tensor, names: list[str], slots: np.ndarray, ours: np.ndarray) -> SamplerOutput:
        runner, rows = self.runner, len(slots)
        position = runner.optimistic_seq_lens_cpu[:rows].long() - 1
        live = ~runner.discard_request_mask.np[:rows]
        at, wanted = position.numpy(), self._next[slots]
        for row in np.flatnonzero(ours & live & (wanted >= 0) & (at != wanted)):
            # It was preempted with a draw on its way, which is made again: its running sum has it twice.
            self.rows.add(int(slots[row]), runner.requests[names[row]].sampling_params.extra_args, resumed=True)
        self._next[slots[live]] = at[live] + 1
        self.rows.flush()
        token = torch.zeros(rows, dtype=torch.int64)
        values, flags = torch.zeros(rows, COLUMNS), torch.zeros(rows, dtype=torch.int64)
        self.rows.draw_rows(
            slots, logits, torch.from_numpy(slots), position, torch.from_numpy(live), token, values, flags
        )
        ids = token.to(torch.int32)[:, None]
        return SamplerOutput(ids, LogprobsTensors(ids.expand(-1, COLUMNS), values, flags))

    def _widest(self, names: list[str], ours: np.ndarray) -> int | None:
        """The most log-probabilities that an ordinary row wants, None where none does."""
        wanted = self.runner.input_batch.num_logprobs
        return max(
            (wanted[name] for name, mine in zip(names, ours, strict=True) if not mine and name in wanted), default=None
        )


def _merged(ordinary: SamplerOutput, drawn: SamplerOutput, ours: torch.Tensor) -> SamplerOutput:
    """The rows of each that are its own. Widths may differ: vLLM takes of a row what its request asked for."""
    theirs, power = ordinary.logprobs_tensors, drawn.logprobs_tensors
    token = torch.where(ours[:, None], drawn.sampled_token_ids, ordinary.sampled_token_ids)
    if theirs is None:
        return SamplerOutput(token, power)
    width = max(COLUMNS, theirs.logprobs.shape[1])

    def both(mine: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        out = other.new_zeros(len(ours), width)
        out[:, : other.shape[1]] = other
        out[ours, :COLUMNS] = mine[ours].to(out.dtype)
        return out

    return SamplerOutput(
        token,
        LogprobsTensors(
            both(power.logprob_token_ids, theirs.logprob_token_ids),
            both(power.logprobs, theirs.logprobs),
            torch.where(ours, power.selected_token_ranks, theirs.selected_token_ranks.long()),
        ),
    )
