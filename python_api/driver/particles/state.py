"""The state of particles in G slots, as plain tensors, and how chains come and go (DESIGN 3.9).

N particles a slot, in rows [0, N): a lane of the engine each. Row N is the reference's. Of keys and values a slot has
N lanes and two rows more, N and N + 1: the current answer's, which the reference reads, and the kept candidate's; which
is which changes when the kept candidate becomes the answer. H = max_new_tokens, K = sweeps, R = N + 1 rows.

Answer positions count from 0; positions of keys and values from the start of the prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
import torch

from power_kernels import rng
from power_kernels.law import ParticleLaw
from power_kernels.particles import Tally
from power_kernels.state import Mode


class GroupField(IntEnum):
    """Columns of `ParticleState.field` int64 [G, 14]."""

    MODE = 0  # Mode.IDLE, PROPOSE while it runs, DONE or FAULT
    SWEEP = 1  # 0 for the start
    POSITION = 2  # the answer position whose tokens are drawn next
    BASE = 3  # prompt length
    LENGTH = 4  # tokens of the current answer, 0 before there is one
    KEPT_LENGTH = 5  # tokens of the kept candidate
    ANSWER_ROW = 6  # 0 or 1: which of the two rows holds the current answer's keys and values
    PROMPT_ID = 7
    CHAIN_ID = 8
    FAULT = 9  # the Status that stopped the chain
    FED = 10  # rows fed so far
    FORKS = 11  # rows that were copied into others
    COPIED = 12  # positions of keys and values that this took
    CANDIDATES = 13  # how often a candidate was kept


@dataclass
class ParticleState:
    """Every tensor of a run. All have one row a slot."""

    field: torch.Tensor  # i64 [G, 14]
    uniforms: torch.Tensor  # f64 [G, K+1, H, 2]: of each sweep and position (`rng.particle_uniforms`)
    sweep_uniforms: torch.Tensor  # f64 [G, K+1, 2]
    # The rows.
    log_weight: torch.Tensor  # f64 [G, R]
    order: torch.Tensor  # i32 [G, R]
    token: torch.Tensor  # i32 [G, R, H]: each row's prefix
    logp: torch.Tensor  # f64 [G, R, H]
    stop_state: torch.Tensor  # i16 [G, R, A]: the stop automaton's state after t tokens; A = H + 1, or 0 without any
    tally: torch.Tensor  # f64 [G, 4]
    same: torch.Tensor  # i32 [G, N+2, N+2]: leading positions at which two rows hold the same keys and values
    # Answers: the current one, and the kept candidate.
    answer: torch.Tensor  # i32 [G, 2, H]
    answer_logp: torch.Tensor  # f64 [G, 2, H]
    answer_stop: torch.Tensor  # i16 [G, 2, A]
    # What each sweep did.
    log_total: torch.Tensor  # f64 [G, K+1]: log Zhat
    cut: torch.Tensor  # i32 [G, K+1]
    left: torch.Tensor  # i32 [G, K+1]: where the new answer left the one before, -1 where it did not
    sweep_logp: torch.Tensor  # f64 [G, K+1]: log p of the answer after it
    sweep_length: torch.Tensor  # i32 [G, K+1]
    sweep_fed: torch.Tensor  # i64 [G, K+1]: rows fed
    # The next step.
    input_id: torch.Tensor  # i64 [G, N]: the token that each lane feeds
    position: torch.Tensor  # i64 [G, N]: its position
    live: torch.Tensor  # bool [G, N]: whether the lane holds a particle
    reference: torch.Tensor  # i64 [G]
    last: torch.Tensor  # bool [G]
    closing_bonus: torch.Tensor  # f64 [G]
    uniform: torch.Tensor  # f64 [G, 2]
    # Copies of keys and values, rows (to, from, start, stop). First the kept candidate's, then those of the lanes.
    keep_from_lane: torch.Tensor  # i32 [G, 4], lane -> chain row
    keep_from_answer: torch.Tensor  # i32 [G, 4], chain row -> chain row
    fork_from_lane: torch.Tensor  # i32 [G, N, 4], lane -> lane
    fork_from_answer: torch.Tensor  # i32 [G, N, 4], chain row -> lane

    @staticmethod
    def allocate(groups: int, law: ParticleLaw, device: torch.device | str = "cpu") -> ParticleState:
        n, rows, horizon, sweeps = law.particles, law.particles + 1, law.max_new_tokens, law.sweeps + 1
        automaton = horizon + 1 if law.stops else 0

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(groups, *shape, dtype=dtype, device=device)

        i16, i32, i64, f64 = torch.int16, torch.int32, torch.int64, torch.float64
        return ParticleState(
            field=zeros(len(GroupField), dtype=i64),
            uniforms=zeros(sweeps, horizon, 2, dtype=f64),
            sweep_uniforms=zeros(sweeps, 2, dtype=f64),
            log_weight=zeros(rows, dtype=f64).fill_(-math.inf),
            order=torch.arange(rows, dtype=i32, device=device).repeat(groups, 1),
            token=zeros(rows, horizon, dtype=i32),
            logp=zeros(rows, horizon, dtype=f64),
            stop_state=zeros(rows, automaton, dtype=i16),
            tally=zeros(len(Tally), dtype=f64).fill_(-math.inf),
            same=zeros(n + 2, n + 2, dtype=i32),
            answer=zeros(2, horizon, dtype=i32),
            answer_logp=zeros(2, horizon, dtype=f64),
            answer_stop=zeros(2, automaton, dtype=i16),
            log_total=zeros(sweeps, dtype=f64),
            cut=zeros(sweeps, dtype=i32),
            left=zeros(sweeps, dtype=i32),
            sweep_logp=zeros(sweeps, dtype=f64),
            sweep_length=zeros(sweeps, dtype=i32),
            sweep_fed=zeros(sweeps, dtype=i64),
            input_id=zeros(n, dtype=i64),
            position=zeros(n, dtype=i64),
            live=zeros(n, dtype=torch.bool),
            reference=zeros(dtype=i64).fill_(-1),
            last=zeros(dtype=torch.bool),
            closing_bonus=zeros(dtype=f64),
            uniform=zeros(2, dtype=f64),
            keep_from_lane=zeros(4, dtype=i32),
            keep_from_answer=zeros(4, dtype=i32),
            fork_from_lane=zeros(n, 4, dtype=i32),
            fork_from_answer=zeros(n, 4, dtype=i32),
        )

    @property
    def groups(self) -> int:
        return self.field.shape[0]

    @property
    def particles(self) -> int:
        return self.position.shape[1]

    def first(self, groups: int) -> ParticleState:
        """A view of the first slots."""
        return ParticleState(**{f.name: getattr(self, f.name)[:groups] for f in fields(self)})

    def move(self, source: int, target: int) -> None:
        """Move the chain of slot `source` into slot `target`."""
        for f in fields(self):
            tensor = getattr(self, f.name)
            tensor[target] = tensor[source]

    def retire(self, slot: int) -> None:
        """Leave a slot idle: stepping on it changes nothing."""
        self.field[slot, GroupField.MODE] = Mode.IDLE
        self.log_weight[slot] = -math.inf
        self.live[slot] = False
        self.position[slot] = 0
        self.reference[slot] = -1

    def admit(self, slot: int, prompt: list[int], chain_id: int, prompt_id: int, *, seed: int) -> None:
        """Put a fresh chain into a slot: one particle, the empty prefix, in lane 0, fed with the prompt's last token.

        Its answer's row must hold all but the last token of the prompt, which the lane takes over (`fork_from_answer`).
        """
        _, sweeps, horizon, _ = self.uniforms.shape
        base, device = len(prompt), self.field.device
        at = (np.arange(horizon)[None], np.arange(sweeps)[:, None], chain_id, prompt_id)
        self.uniforms[slot] = torch.from_numpy(rng.particle_uniforms(seed, *at)).to(device)
        sweep_uniforms = rng.sweep_uniforms(seed, np.arange(sweeps), chain_id, prompt_id)
        self.sweep_uniforms[slot] = torch.from_numpy(sweep_uniforms).to(device)
        for name in ("same", "cut", "left", "sweep_fed", "answer_stop", "stop_state"):
            getattr(self, name)[slot] = 0
        field = torch.zeros(len(GroupField), dtype=torch.int64)
        field[GroupField.MODE] = Mode.PROPOSE
        field[GroupField.BASE], field[GroupField.FED] = base, 1
        field[GroupField.PROMPT_ID], field[GroupField.CHAIN_ID] = prompt_id, chain_id
        self.field[slot] = field.to(device)
        self.sweep_fed[slot, 0] = 1
        self.log_weight[slot] = -math.inf
        self.log_weight[slot, 0] = 0.0
        self.order[slot] = torch.arange(self.order.shape[1], dtype=torch.int32, device=device)
        self.tally[slot] = -math.inf
        self.input_id[slot] = prompt[-1]
        self.position[slot] = base - 1
        self.live[slot] = False
        self.live[slot, 0] = True
        self.reference[slot] = -1
        self.last[slot] = horizon == 1
        self.closing_bonus[slot] = 0.0
        self.uniform[slot] = self.uniforms[slot, 0, 0]
        n = self.particles
        self.same[slot, 0, n] = self.same[slot, n, 0] = base - 1
        self.fork_from_answer[slot, 0] = torch.tensor([slot * n, 2 * slot, 0, base - 1], dtype=torch.int32)

    def forget_copies(self) -> None:
        """The copies that were asked for have been made."""
        for name in ("keep_from_lane", "keep_from_answer", "fork_from_lane", "fork_from_answer"):
            getattr(self, name).zero_()
