"""Power-sampling rows in a batch of vLLM's V2 model runner (`ModelState.custom_sampler`).

    logits [B, V], slot, position -> token [B, 1]; logq, weight, entropy [B, 3]; flags [B]

A slot is a row of vLLM's request table. What a row needs is written to `SlotTable` when its request comes, and the rest
follows from slot and position, so chunked prefill, reordered batches and resumed requests take nothing more. Nothing
here waits for the device. The results are put where vLLM puts log-probabilities, which brings them to the client with
everything else: logq, weight and entropy in the place of the values, flags in the place of the rank.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad
from vllm import SamplingParams
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from power_kernels.api.engines.serving.proposal import COLUMNS
from power_kernels.api.engines.serving.rows import PowerRows


class PowerSamplerV2:
    """In the place of vLLM's `Sampler`, which draws the ordinary rows. slots: of the request table."""

    def __init__(self, base, device: torch.device, slots: int):
        self.base, self.rows = base, PowerRows(slots, device, base.sampling_states.vocab_size)

    def __getattr__(self, name: str):
        return getattr(self.base, name)  # what else the runner reads and calls

    def add_request(self, slot: int, *args) -> None:
        """args: the sampling parameters; before them the prompt's length in older versions."""
        *before, params = args
        state = self.base.req_states
        # A request that was preempted comes again with what it had drawn, whose weights nobody has any more.
        resumed = bool(state.prefill_len.np[slot] > state.prompt_len.np[slot])
        ours = self.rows.add(slot, params.extra_args, resumed=resumed)
        # vLLM must rank no token and alter no logit for a row that is ours.
        self.base.add_request(slot, *before, SamplingParams() if ours else params)

    def apply_staged_writes(self) -> None:
        self.base.apply_staged_writes()
        self.rows.flush()

    def __call__(self, logits: torch.Tensor, batch) -> SamplerOutput:
        ours = self.rows.on[batch.idx_mapping_np]
        if not ours.any():
            return self.base(logits, batch)
        if ours.all() and not self.base.compute_nans:
            output = self._new_output(logits, batch)
        else:
            output = self.base(logits, batch)
            output.logprobs_tensors = _widened(output.logprobs_tensors, logits)
        into = output.logprobs_tensors
        self.rows.draw_rows(
            batch.idx_mapping_np,
            logits,
            batch.idx_mapping.long(),  # int32 before 0.32
            batch.positions[batch.logits_indices],  # of the tokens that were fed
            output.num_sampled > 0,
            output.sampled_token_ids[:, 0],
            into.logprobs[:, :COLUMNS],
            into.selected_token_ranks,
        )
        return output

    def _new_output(self, logits: torch.Tensor, batch) -> SamplerOutput:
        # New tensors a step: vLLM copies them to the host while the next step runs.
        rows, device = batch.num_reqs, logits.device
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            batch.seq_lens.new_ones(rows),
            batch.seq_lens,
            batch.cu_num_logits,
            batch.idx_mapping,
            self.base.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=torch.empty(rows, 1, dtype=torch.int64, device=device),
            logprobs_tensors=_no_logprobs(rows, device),
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )


def _no_logprobs(rows: int, device: torch.device) -> LogprobsTensors:
    """Room for our columns. The token ids beside them say nothing: a client reads those that were sampled."""
    return LogprobsTensors(
        torch.zeros(rows, COLUMNS, dtype=torch.int32, device=device),
        torch.zeros(rows, COLUMNS, dtype=torch.float32, device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
    )


def _widened(tensors: LogprobsTensors | None, logits: torch.Tensor) -> LogprobsTensors:
    """vLLM's log-probabilities with room for our columns. Of more columns than a request asked for it takes the first,
    as it does where its neighbours asked for more."""
    if tensors is None:
        return _no_logprobs(logits.shape[0], logits.device)
    missing = COLUMNS - tensors.logprobs.shape[1]
    if missing > 0:
        ids, logprobs = (
            pad(tensors.logprob_token_ids, (0, missing)),
            pad(tensors.logprobs, (0, missing), value=-torch.inf),
        )
        tensors = tensors._replace(logprob_token_ids=ids, logprobs=logprobs)
    if tensors.selected_token_ranks.dtype != torch.int64:
        tensors = tensors._replace(selected_token_ranks=tensors.selected_token_ranks.long())
    return tensors
