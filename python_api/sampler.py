"""PowerSampler: many chains of many prompts in one ragged batch.

Every row of the batch is at its own position and its own Metropolis-Hastings step; a chain that stops leaves its slot
to the next one at once. The law of the chain lives in `power_kernels.mh_advance`; this file only feeds it.

    admit -> prefill -> [ forward + sample -> mh_advance -> KV ranges ]* -> result -> admit ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import power_kernels as pk
from power_kernels import nvtx, reference
from power_kernels.api.config import PowerConfig
from power_kernels.api.engine import Engine, EngineBusyError, Sampled
from power_kernels.api.engines.huggingface import HuggingFaceEngine
from power_kernels.api.progress import ProgressBar
from power_kernels.api.results import PowerResult, read_result
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.rng import MAX_PROMPT_ID, as_int64
from power_kernels.state import ChainField, Mode, Status

_STOPPED = (Mode.DONE, Mode.FAULT)


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during `PowerSampler.generate`. `.results` holds the answers that had finished."""

    def __init__(self, results: list[PowerResult]):
        super().__init__(f"interrupted after {len(results)} finished answers, which are in .results")
        self.results = results


@dataclass(frozen=True)
class _Job:
    prompt: list[int]
    prompt_id: int
    chain_id: int


class PowerSampler:
    """Draws answers from p(x)^alpha of a model.

    model: a transformers causal LM, or any `Engine`. tokenizer: needed for prompts that are strings, and for `.text`.
    """

    def __init__(self, model, tokenizer=None):
        if isinstance(model, torch.nn.Module):
            model = HuggingFaceEngine(model)
        elif not isinstance(model, Engine):
            raise ArgumentTypeError(
                f"model is a {type(model).__name__}; it must be a transformers causal LM or a power_kernels.api.Engine"
            )
        self.engine: Engine = model
        self.tokenizer = tokenizer

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]] | torch.Tensor,
        config: PowerConfig | None = None,
        *,
        num_chains: int = 1,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        prompt_ids: Sequence[int] | None = None,
        max_chains: int = 16,
        progress: bool = False,
    ) -> list[PowerResult]:
        """One result per prompt and chain, prompt-major.

        prompts: strings (needs the tokenizer), lists of token ids, or an integer tensor [B, P].
        num_chains: independent answers per prompt. seed: 64 bits; the same seed gives the same chains, whatever batch
        they run in. eos_token_id: an int or a sequence; None takes the engine's, [] runs every answer to
        max_new_tokens. prompt_ids: the prompts' identities in the random-number contract; their index in this call by
        default. max_chains: chains that run at once; the others wait for a free slot. progress: show a bar.

        A chain whose logits go bad (NaN, +inf, all -inf) stops with finish "fault"; the others are not affected.
        Raises ArgumentError or ArgumentTypeError for bad input before any work, and GenerationInterrupted, which
        carries the finished answers, on Ctrl-C.
        """
        jobs = self._jobs(prompts, num_chains, prompt_ids)
        order = {(job.prompt_id, job.chain_id): i for i, job in enumerate(jobs)}
        results: list[PowerResult | None] = [None] * len(jobs)
        try:
            for result in self._stream(jobs, config, seed, eos_token_id, max_chains, progress, len(jobs)):
                results[order[result.prompt_id, result.chain_id]] = result
        except KeyboardInterrupt:
            raise GenerationInterrupted([r for r in results if r is not None]) from None
        return results

    def stream(
        self,
        prompts,
        config: PowerConfig | None = None,
        *,
        num_chains: int = 1,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        prompt_ids: Sequence[int] | None = None,
        max_chains: int = 16,
        skip: Collection[tuple[int, int]] = (),
        progress: bool = False,
    ) -> Iterator[PowerResult]:
        """`generate`, yielding each result as soon as its chain stops. Input is checked before this returns.

        skip: (prompt id, chain id) of answers that an earlier call has drawn already.
        """
        jobs = self._jobs(prompts, num_chains, prompt_ids)
        wanted = [job for job in jobs if (job.prompt_id, job.chain_id) not in skip]
        return self._stream(wanted, config, seed, eos_token_id, max_chains, progress, len(jobs))

    # -- input

    def _jobs(self, prompts, num_chains, prompt_ids) -> list[_Job]:
        rows = self._token_rows(prompts)
        _integer("num_chains is", num_chains, 1)
        ids = list(range(len(rows))) if prompt_ids is None else _items("prompt_ids", prompt_ids)
        for i in ids:
            _integer("prompt_ids holds", i, 0, MAX_PROMPT_ID)
        if len(ids) != len(rows) or len(set(ids)) != len(ids):
            raise ArgumentError(f"prompt_ids is {ids}; it must hold one distinct id for each of {len(rows)} prompts")
        return [_Job(row, i, k) for row, i in zip(rows, ids, strict=True) for k in range(num_chains)]

    def _token_rows(self, prompts) -> list[list[int]]:
        if isinstance(prompts, torch.Tensor) and (
            prompts.dim() != 2 or prompts.dtype not in (torch.int64, torch.int32)
        ):
            raise ArgumentTypeError(
                f"prompts is a {prompts.dtype} tensor of shape {list(prompts.shape)}; it must be int64 [B, P]"
            )
        rows = []
        for i, prompt in enumerate(_items("prompts", prompts)):
            if isinstance(prompt, str):
                if self.tokenizer is None:
                    raise ArgumentTypeError(
                        f"prompts[{i}] is a string and there is no tokenizer; pass PowerSampler(model, tokenizer) or "
                        "token ids"
                    )
                prompt = self.tokenizer(prompt).input_ids
            row = _items(f"prompts[{i}]", prompt)
            if not row:
                raise ArgumentError(f"prompts[{i}] is empty; a prompt needs at least one token")
            for token in row:
                _integer(f"prompts[{i}] holds token id", token, 0, self.engine.vocab_size - 1)
            rows.append(row)
        if not rows:
            raise ArgumentError("prompts is empty; it must hold at least one prompt")
        return rows

    def _eos(self, eos_token_id) -> list[int]:
        if eos_token_id is None:
            return list(self.engine.eos_token_ids)
        ids = [eos_token_id] if isinstance(eos_token_id, int) else _items("eos_token_id", eos_token_id)
        for token in ids:
            _integer("eos_token_id holds", token, 0, self.engine.vocab_size - 1)
        return ids

    # -- the run

    def _stream(self, jobs, config, seed, eos_token_id, max_chains, progress, total) -> Iterator[PowerResult]:
        config = PowerConfig() if config is None else config
        if not isinstance(config, PowerConfig):
            raise ArgumentTypeError(f"config is a {type(config).__name__}; it must be a PowerConfig")
        _integer("seed is", seed, -(2**63), 2**64 - 1)
        _integer("max_chains is", max_chains, 1)
        eos = self._eos(eos_token_id)
        if not jobs:
            return iter(())
        limit = self.engine.max_context
        longest = max(jobs, key=lambda job: len(job.prompt))
        if limit is not None and len(longest.prompt) + config.max_new_tokens > limit:
            raise ArgumentError(
                f"prompt {longest.prompt_id} has {len(longest.prompt)} tokens and max_new_tokens is "
                f"{config.max_new_tokens}; together they must not exceed the model's context of {limit}"
            )
        run = _Run(self.engine, jobs, config, seed, eos, min(max_chains, len(jobs)), self.tokenizer)
        return run.results(ProgressBar(total, total - len(jobs)) if progress else None)


def _integer(what: str, value, least: int, most: int | None = None) -> None:
    """what: the beginning of the message, up to the value."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{what} {value!r}; it must be an integer")
    if value < least or (most is not None and value > most):
        allowed = f"be at least {least}" if most is None else f"lie in [{least}, {most}]"
        raise ArgumentError(f"{what} {value}; it must {allowed}")


def _items(name: str, value) -> list:
    """The entries of a sequence or tensor. A string and a tokenizer's mapping can be iterated too, but are mistakes."""
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()  # no list where there is only one number
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}; it must be a list")
    return list(value)


class _Run:
    """One call: fixed slots, chains streaming through them, the active ones always in front."""

    # Reading the modes waits for the device, and a stopped chain's lanes are harmless: look every few steps.
    POLL_STEPS = 8

    def __init__(self, engine: Engine, jobs: list[_Job], config: PowerConfig, seed: int, eos, slots, tokenizer):
        self.engine = nvtx.traced(engine, ("prefill", "transfer", "step", "move"))
        self.config, self.law, self.tokenizer = config, config.law, tokenizer
        if nvtx.enabled():
            for phase in ("admit", "advance", "retire"):
                setattr(self, phase, nvtx.in_range(phase, getattr(self, phase)))
        self.waiting = deque(jobs)
        self.slots = slots
        self.lanes = config.lanes or 1
        self.entropy = config.cut == "divergence-entropy"
        self.seed = seed
        self.max_length = max(len(job.prompt) for job in jobs) + config.max_new_tokens
        self.alpha = float(torch.tensor(config.alpha, dtype=torch.float32))
        self.can_end_early = bool(eos)
        device = engine.device
        self.seed_tensor = torch.tensor([as_int64(seed)], dtype=torch.int64, device=device)
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self.log_n = torch.from_numpy(reference.log_table(config.max_new_tokens)).to(device)
        self.poll_steps = 1 if device.type == "cpu" else self.POLL_STEPS
        # Tokens that the chain in each active slot has had forwarded by prefill, and recalled.
        self.prefill_cost: list[int] = []
        self.recalled: list[int] = []

    def results(self, bar) -> Iterator[PowerResult]:
        engine = self.engine
        try:
            engine.begin(
                chains=self.slots,
                lanes=self.lanes,
                max_length=self.max_length,
                alpha=self.alpha,
                beta=self.config.beta,
                seed=self.seed,
                entropy=self.entropy,
            )
        except EngineBusyError:
            raise
        except BaseException:
            engine.end()
            raise
        try:
            self.state = pk.ChainState.allocate(self.slots, self.lanes, self.law, engine.device)
            self.active = self.state.first(0)
            while self.admit():
                stopped: list[int] = []
                while not stopped:
                    sampled = 0
                    for _ in range(self.poll_steps):
                        sampled += self.advance(engine.step(self.active))
                    modes = self.active.field[:, ChainField.MODE].tolist()
                    stopped = [slot for slot, mode in enumerate(modes) if mode in _STOPPED]
                    if bar is not None:
                        bar.advance(sampled)
                # Last slot first, so that the chain that moves into a free slot is one that still runs.
                for slot in reversed(stopped):
                    result = self.retire(slot)
                    if bar is not None:
                        bar.finished(result)
                    yield result
        finally:
            engine.end()
            if bar is not None:
                bar.close()

    def admit(self) -> int:
        """Fill the free slots behind the active ones. Returns how many chains are active now."""
        first = len(self.prefill_cost)
        jobs = [self.waiting.popleft() for _ in range(min(self.slots - first, len(self.waiting)))]
        if jobs:
            slots = list(range(first, first + len(jobs)))
            self.prefill_cost += self.engine.prefill(slots, [job.prompt for job in jobs])
            self.recalled += [0] * len(jobs)
            for slot, job in zip(slots, jobs, strict=True):
                self.state.admit(slot, job.prompt, job.chain_id, job.prompt_id)
            self.active = self.state.first(len(self.prefill_cost))
            self.advance(self.nothing_sampled())  # opens the new chains, leaves the others as they are
        return len(self.prefill_cost)

    def nothing_sampled(self) -> Sampled:
        rows = len(self.prefill_cost) * self.lanes
        device = self.engine.device
        values = torch.zeros(rows, dtype=torch.float32, device=device)
        token = torch.zeros(rows, dtype=torch.int64, device=device)
        return Sampled(token, values, values, torch.full((rows,), Status.PENDING, dtype=torch.int32, device=device))

    def advance(self, sampled: Sampled) -> int:
        """Hand the draws to the chains. Returns how many lanes were fed."""
        state, fed = self.active, len(sampled.token)
        if sampled.recalled is not None:
            recalled = sampled.recalled.view(state.chains, -1).sum(1).tolist()
            fed = sum(recalled)
            for slot, tokens in enumerate(recalled):
                self.recalled[slot] += tokens
        pk.mh_advance(
            state, self.law, self.log_n, self.seed_tensor, self.eos,
            sampled.token, sampled.logq, sampled.weight, sampled.status,
        )  # fmt: skip
        self.engine.transfer(state.commit_range, state.open_range)
        return fed

    def retire(self, slot: int) -> PowerResult:
        last = len(self.prefill_cost) - 1
        result = read_result(
            self.state,
            slot,
            alpha=self.alpha,
            can_end_early=self.can_end_early,
            prefill=self.prefill_cost[slot],
            recalled=self.recalled[slot],
            tokenizer=self.tokenizer,
        )
        if slot != last:
            self.state.move(last, slot)
            self.engine.move(last, slot)
            for of_slot in (self.prefill_cost, self.recalled):
                of_slot[slot] = of_slot[last]
        self.prefill_cost.pop()
        self.recalled.pop()
        self.active = self.state.first(last)
        return result
