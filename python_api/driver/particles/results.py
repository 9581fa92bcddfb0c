"""What a chain of particles returns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from power_kernels.api.driver.host import on_host
from power_kernels.api.driver.particles.state import GroupField, ParticleState
from power_kernels.api.driver.results import PowerResult, SweepResult, TokenAccount
from power_kernels.api.driver.stop import StopStrings
from power_kernels.api.driver.text import answer_text
from power_kernels.law import ParticleLaw
from power_kernels.state import Outcome, Status

_READ = (
    "field", "answer", "answer_logp", "log_total", "cut", "left", "sweep_logp", "sweep_length", "sweep_fed",
)  # fmt: skip


def read_results(
    state: ParticleState,
    slots: Sequence[int],
    *,
    law: ParticleLaw,
    eos: Collection[int],
    stop: StopStrings | None,
    tokenizer,
    prompts: Mapping[int, list[int]],
    prefilled: Sequence[int],
) -> list[PowerResult]:
    """The results of chains that have stopped. prefilled: prompt tokens that were forwarded for each."""
    index = torch.tensor(slots, device="cpu").to(state.field.device)
    rows = dict(zip(_READ, on_host([getattr(state, name)[index] for name in _READ]), strict=True))
    return [
        _result({name: of[i] for name, of in rows.items()}, law, eos, stop, tokenizer, prompts, prefilled[i])
        for i in range(len(slots))
    ]


def _result(rows, law: ParticleLaw, eos, stop, tokenizer, prompts, prefilled: int) -> PowerResult:
    field = rows["field"].tolist()
    n, row = field[GroupField.LENGTH], field[GroupField.ANSWER_ROW]
    tokens = rows["answer"][row, :n].tolist()
    status = Status(field[GroupField.FAULT])
    made = law.sweeps + 1 if status is Status.OK else field[GroupField.SWEEP]
    columns = (rows[name][:made].tolist() for name in ("log_total", "cut", "left", "sweep_logp", "sweep_length"))
    fed = rows["sweep_fed"].tolist()
    sweeps = tuple(SweepResult(*of_sweep) for of_sweep in zip(*columns, fed[:made], strict=True))
    finish = "fault" if status is not Status.OK else "length"
    if finish != "fault" and tokens[-1] in eos:
        finish = "eos"
    elif finish != "fault" and stop is not None and _stops(stop, tokens):
        finish = "stop"
    text = None
    if tokenizer is not None:
        write = stop.before if finish == "stop" else answer_text
        text = write(tokenizer, prompts[field[GroupField.PROMPT_ID]], tokens)
    proposal = sum(fed[1:])
    accepted = [sweep.left >= 0 for sweep in sweeps[1:]]
    return PowerResult(
        prompt_id=field[GroupField.PROMPT_ID],
        chain_id=field[GroupField.CHAIN_ID],
        tokens=tokens,
        text=text,
        token_logp=rows["answer_logp"][row, :n].tolist(),
        log_weights=[],
        outcomes=[Outcome.ACCEPTED if changed else Outcome.UNCHANGED for changed in accepted],
        left=[sweep.left for sweep in sweeps[1:]],
        step_logp=[sweep.logp for sweep in sweeps[1:]],
        step_weight=[sweep.log_total for sweep in sweeps[1:]],
        step_horizon=[law.max_new_tokens] * len(accepted),
        finish=finish,
        status=status,
        cost=TokenAccount(
            prefill=prefilled,
            extension=fed[0],
            proposal=proposal,
            accepted=sum(sweep.rows for sweep in sweeps[1:] if sweep.left >= 0),
            voided=0,
            recalled=0,
            saved_prefix=0,
            saved_early=None,
            answer=n,
            forks=field[GroupField.FORKS],
            copied=field[GroupField.COPIED],
            candidates=field[GroupField.CANDIDATES],
        ),
        sweeps=sweeps,
    )


def _stops(stop: StopStrings, tokens: Sequence[int]) -> bool:
    """Whether the last token completes a stop string."""
    state = 0
    for token in tokens:
        state = int(stop.table[state, token])
    return state < 0
