"""What a chain returns, and what it cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from power_kernels.api.driver.host import on_host
from power_kernels.api.driver.stop import StopStrings
from power_kernels.api.driver.text import answer_text
from power_kernels.law import Law
from power_kernels.state import ChainField, ChainState, Cost, Outcome, Status


@dataclass(frozen=True)
class TokenAccount:
    """Tokens forwarded for one answer, by cause, and tokens that the exact shortcuts saved.

    prefill: of the prompt. extension: growing the answer. proposal: Metropolis-Hastings proposals, of which accepted
    went into proposals that changed the answer, voided into prefetched ones that such a change made void (or that a
    fault stopped), and rejected into the others. recalled: those of extension and proposal that the engine knew from an
    earlier forward pass of the same prefix, and did not forward again. recomputed: prompt and answer forwarded again by
    the requests of a serving stack, as far as its prefix cache did not have them; cached: what it had. saved_prefix:
    positions a proposal kept without a forward pass. saved_early: positions left when a proposal was rejected early;
    None when answers can end early, since nobody knows how long it would have become.

    Of particles: extension: of the start, proposal: of the sweeps, a token a row; a reference's rows are not forwarded.
    forks: rows that were copied into others, copied: the positions of keys and values that this took. candidates: how
    often a closed answer was kept in the place of another.
    """

    prefill: int
    extension: int
    proposal: int
    accepted: int
    voided: int
    recalled: int
    saved_prefix: int
    saved_early: int | None
    answer: int
    recomputed: int = 0
    cached: int = 0
    forks: int = 0
    copied: int = 0
    candidates: int = 0

    @property
    def forwarded(self) -> int:
        return self.prefill + self.recomputed + self.extension + self.proposal - self.recalled

    @property
    def rejected(self) -> int:
        return self.proposal - self.accepted - self.voided

    @property
    def ratio(self) -> float:
        """Tokens forwarded per token of the answer."""
        return self.forwarded / max(self.answer, 1)


@dataclass
class Counts:
    """Tokens of one chain that the driver counts, and not `mh_advance`: see `TokenAccount`. undelivered: drawn for
    proposals that had ended before they came."""

    prefill: int = 0
    recalled: int = 0
    recomputed: int = 0
    cached: int = 0
    undelivered: int = 0


@dataclass(frozen=True)
class SweepResult:
    """What the start of particles or one of their sweeps did (DESIGN 3.9).

    log_total: log Zhat, nats: of a start an estimate of the log of the target's normalising constant, too low on
    average. cut: the answer position where it began. left: where its answer leaves the one before, -1 where it is that
    one. logp: of the answer after it, n: its tokens. rows: particles fed, one token each.
    """

    log_total: float
    cut: int
    left: int
    logp: float
    n: int
    rows: int


@dataclass(frozen=True)
class PowerResult:
    """One answer, the last state of one chain.

    tokens: generated ids, EOS included. text: what they add to the text of the prompt, without special tokens; None
    without a tokenizer. Where a stop string closed the answer the text ends before it. log_weights: the weight of each
    token in nats. steps, accepted (steps that changed the answer), unchanged (steps that kept every token):
    Metropolis-Hastings steps. outcomes: each step's. left: where each step's proposal left the answer of its time, -1
    where it kept every token. step_logp, step_weight: log p and W (the sum of the weights) of the whole answer after
    each step, in nats, log p to 2^-32 nats a token. step_horizon: the horizon H of each step, whose target is pi_H:
    steps of different horizons have different targets (in the published code, whose answers may shrink, the most that
    the horizon can be). finish: "eos", "stop" (a stop string), "length"
    (max_new_tokens), "context" (what the prompt left of the model's context, less than max_new_tokens and perhaps
    nothing), or "fault" with `status` saying what the logits were like (the answer is then the chain's last good
    state).

    Of particles: sweeps has the start and each sweep; a sweep is a step, accepted where it changed the answer;
    log_weights is empty, and step_weight holds log Zhat.
    """

    prompt_id: int
    chain_id: int
    tokens: list[int]
    text: str | None
    token_logp: list[float]
    log_weights: list[float]
    outcomes: list[Outcome]
    left: list[int]
    step_logp: list[float]
    step_weight: list[float]
    step_horizon: list[int]
    finish: Literal["eos", "stop", "length", "context", "fault"]
    status: Status
    cost: TokenAccount
    sweeps: tuple[SweepResult, ...] = ()

    @cached_property
    def logp(self) -> float:
        """log p of the answer under the base model, in nats."""
        return float(np.sum(self.token_logp))

    @property
    def steps(self) -> int:
        return len(self.outcomes)

    @property
    def accepted(self) -> int:
        return sum(o is Outcome.ACCEPTED for o in self.outcomes)

    @property
    def unchanged(self) -> int:
        return sum(o is Outcome.UNCHANGED for o in self.outcomes)

    @property
    def acceptance_rate(self) -> float:
        """Share of the steps whose proposal was accepted, those that proposed the current answer again included."""
        return (self.accepted + self.unchanged) / self.steps if self.steps else float("nan")


def read_results(
    state: ChainState,
    slots: Sequence[int],
    *,
    alpha: float,
    law: Law,
    can_end_early: bool,
    eos: Collection[int],
    stop: StopStrings | None,
    counts: Sequence[Counts],
    tokenizer,
    prompts: Mapping[int, list[int]],
) -> list[PowerResult]:
    """The results of chains that have stopped. alpha: as float32 holds it. eos, stop: the tokens and
    the strings that end an answer. counts: of each. prompts: token ids by prompt id."""
    rows = _on_host(state, slots)
    return [
        _result(
            {name: of_chain[i] for name, of_chain in rows.items()},
            alpha=alpha,
            law=law,
            can_end_early=can_end_early,
            eos=eos,
            stop=stop,
            counts=counts[i],
            tokenizer=tokenizer,
            prompts=prompts,
        )
        for i in range(len(slots))
    ]


# What an answer is made of.
_READ = (
    "field", "token", "logq", "cumw", "outcome", "left", "forwarded", "step_weight", "step_logq", "cost",
)  # fmt: skip


def _on_host(state: ChainState, slots: Sequence[int]) -> dict[str, np.ndarray]:
    """The rows of some chains, by the name of their tensor."""
    index = torch.tensor(slots, device="cpu").to(state.field.device, non_blocking=True)
    return dict(zip(_READ, on_host([getattr(state, name)[index] for name in _READ]), strict=True))


def _result(
    rows: dict[str, np.ndarray], *, alpha, law: Law, can_end_early, eos, stop, counts: Counts,
    tokenizer, prompts,
) -> PowerResult:  # fmt: skip
    """rows: the chain's, by the name of their tensor."""
    field, cost = rows["field"].tolist(), rows["cost"].tolist()
    prompt_id = field[ChainField.PROMPT_ID]
    n, made = field[ChainField.LENGTH], slice(1, field[ChainField.OPENED])
    tokens = rows["token"][:n].tolist()
    weights = np.diff(rows["cumw"][: n + 1])
    logq = rows["logq"][:n].astype(np.float64)
    outcomes = [Outcome(o) for o in rows["outcome"][made].tolist()]
    forwarded = rows["forwarded"][made].tolist()
    status = Status(field[ChainField.FAULT])
    finish = "fault" if status is not Status.OK else "length"
    if finish != "fault" and field[ChainField.CLOSED]:
        finish = "eos" if tokens[-1] in eos else "stop"
    text = None
    if tokenizer is not None:
        write = stop.before if finish == "stop" else answer_text
        text = write(tokenizer, prompts[prompt_id], tokens)
    after = _last_written(outcomes, law.mcmc_steps, field[ChainField.STAGE])
    step_weight, step_logq = rows["step_weight"][after], rows["step_logq"][after]
    return PowerResult(
        prompt_id=prompt_id,
        chain_id=field[ChainField.CHAIN_ID],
        tokens=tokens,
        text=text,
        token_logp=((weights + logq) / alpha).tolist(),  # w = alpha*logp - logq
        log_weights=weights.tolist(),
        outcomes=outcomes,
        left=rows["left"][made].tolist(),
        step_logp=((step_weight + step_logq) / alpha).tolist(),
        step_weight=step_weight.tolist(),
        step_horizon=_horizons(len(outcomes), law, field[ChainField.STAGE]),
        finish=finish,
        status=status,
        cost=TokenAccount(
            prefill=counts.prefill,
            extension=cost[Cost.EXTENSION],
            proposal=cost[Cost.PROPOSAL] + counts.undelivered,
            accepted=sum(n for n, o in zip(forwarded, outcomes, strict=True) if o is Outcome.ACCEPTED),
            voided=cost[Cost.PROPOSAL] + counts.undelivered - sum(forwarded),
            recalled=counts.recalled,
            saved_prefix=cost[Cost.SAVED_PREFIX],
            saved_early=None if can_end_early else cost[Cost.SAVED_EARLY],
            answer=n,
            recomputed=counts.recomputed,
            cached=counts.cached,
        ),
    )


def _last_written(outcomes: Sequence[Outcome], mcmc_steps: int, stages: int) -> list[int]:
    """For each step, the column of `ChainState.step_weight` that holds the answer after it: its own, where it was
    accepted or was the first of a stage, or else that of the step before."""
    columns: list[int] = []
    for serial, outcome in enumerate(outcomes, 1):
        first = mcmc_steps > 0 and serial % mcmc_steps == 1 % mcmc_steps and serial <= stages * mcmc_steps
        own = outcome is Outcome.ACCEPTED or first or not columns
        columns.append(serial if own else columns[-1])
    return columns


def _horizons(steps: int, law: Law, stages: int) -> list[int]:
    """Of each step: its stage's, and the last one of those that follow the stages."""
    most = law.max_new_tokens
    ends = [min(stage * law.block_size, most) for stage in range(1, stages + 1)]
    return [*(end for end in ends for _ in range(law.mcmc_steps)), *[most] * law.final_steps][:steps]


def empty_result(prompt_id: int, chain_id: int, *, has_text: bool) -> PowerResult:
    """Of a prompt that leaves no room for an answer in the model's context."""
    nothing = TokenAccount(
        prefill=0, extension=0, proposal=0, accepted=0, voided=0, recalled=0, saved_prefix=0, saved_early=0, answer=0
    )
    return PowerResult(
        prompt_id=prompt_id, chain_id=chain_id, tokens=[], text="" if has_text else None, token_logp=[], log_weights=[],
        outcomes=[], left=[], step_logp=[], step_weight=[], step_horizon=[], finish="context", status=Status.OK,
        cost=nothing,
    )  # fmt: skip
