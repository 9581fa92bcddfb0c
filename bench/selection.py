"""What the selection that ends a sweep of particles chooses from, and the mean of log p over its choice.

An answer is drawn from all candidates of its sweep, thousands of them. Its log p is one draw; the mean over the draw,
given the candidates, is the same on average and varies less (Rao and Blackwell). `watched` looks on while the driver
runs, one chain at a time, and keeps the candidates that weigh anything, and how many forward passes each sweep took.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from power_kernels import BranchOutput
from power_kernels.api.driver.particles.run import ParticleRun
from power_kernels.api.driver.particles.state import GroupField, ParticleState

# Nats below the heaviest at which a candidate is forgotten: a million of them weigh less than 1e-13.
_NOTHING = 45.0


class Candidates:
    """Closed answers of one sweep: selection weights and log p, in nats, and tokens. The reference is apart."""

    def __init__(self):
        self.log_weight = self.logp = self.length = torch.empty(0, dtype=torch.float64)
        self.reference: tuple[float, float, float] | None = None

    def add(self, log_weight: torch.Tensor, logp: torch.Tensor, length: int) -> None:
        """float64 [K] each: answers of `length` tokens."""
        weight = torch.cat([self.log_weight, log_weight])
        kept = (weight > weight.max() - _NOTHING) if len(weight) else torch.empty(0, dtype=torch.bool)
        self.log_weight = weight[kept]
        self.logp = torch.cat([self.logp, logp])[kept]
        self.length = torch.cat([self.length, torch.full_like(logp, length)])[kept]

    def probabilities(self) -> tuple[torch.Tensor, float]:
        """Of each candidate, and of the reference, to be the answer after the selection (DESIGN 3.9).

        Without a reference in proportion to the weights. With one, k is proposed with g_k / (G - g_r) and accepted with
        min(1, (G - g_r) / (G - g_k)), which is g_k / max(G - g_r, G - g_k); else the reference stays.
        """
        reference = -math.inf if self.reference is None else self.reference[0]
        top = max(reference, float(self.log_weight.max())) if len(self.log_weight) else reference
        g, g_r = (self.log_weight - top).exp(), math.exp(reference - top)
        others = g.sum()
        if self.reference is None:
            return g / others, 0.0
        p = g / torch.maximum(others, others + g_r - g)
        return p, max(1.0 - float(p.sum()), 0.0)

    def mean(self) -> tuple[float, float]:
        """Means over the selection: log p of the answer, and its tokens."""
        p, stays = self.probabilities()
        _, logp, length = self.reference or (0.0, 0.0, 0.0)
        return float(p @ self.logp) + stays * logp, float(p @ self.length) + stays * length


class Sweep:
    """The start or a sweep: its candidates, and in how many steps a row went through the model."""

    def __init__(self):
        self.sequential, self.candidates = 0, Candidates()


# Draws a position as `ParticleRun.branch` does, and adds the answers that it closes.
Draw = Callable[[ParticleRun, ParticleState, torch.Tensor, Candidates], BranchOutput]
_branch = ParticleRun.branch


def particles(run: ParticleRun, state: ParticleState, logits: torch.Tensor, candidates: Candidates) -> BranchOutput:
    """The driver's own draw: every child that closes is a candidate."""
    add_closing(run, state, logits, candidates)
    return _branch(run, state, logits)


def add_closing(run: ParticleRun, state: ParticleState, logits: torch.Tensor, candidates: Candidates) -> None:
    last, rows = bool(state.last[0]), (state.log_weight[0] > -math.inf).nonzero()[:, 0]
    if not last and not len(run.eos):
        return
    position = int(state.field[0, GroupField.POSITION])
    tokens = torch.arange(logits.shape[1]) if last else run.eos
    logp = logits[rows].double().log_softmax(-1)[:, tokens]
    answer = state.logp[0, rows, :position].sum(-1, keepdim=True) + logp
    weight = state.log_weight[0, rows, None] + run.law.length_bonus + float(run.alpha[0]) * logp
    weight = weight + state.closing_bonus[0]
    # The reference's particle is in the last row, and its child among those that close or among those that do not.
    referred = (rows == state.order.shape[1] - 1)[:, None] & (tokens == state.reference[0])[None]
    if bool(referred.any()):
        candidates.reference = (float(weight[referred]), float(answer[referred]), position + 1)
    others = ~referred & (weight > -math.inf)
    candidates.add(weight[others], answer[others], position + 1)


@contextmanager
def watched(draw: Draw = particles) -> Iterator[list[Sweep]]:
    """The sweeps of a chain of particles, as they are made. draw: what takes the place of the driver's own. One chain
    may run, one slot, and no stop strings."""
    sweeps: list[Sweep] = []

    def branch(run: ParticleRun, state: ParticleState, logits: torch.Tensor) -> BranchOutput:
        if state.groups != 1 or run.stop is not None:
            raise ValueError(f"{state.groups} chains at once, stop strings {run.stop}; one is watched, without any")
        while len(sweeps) <= int(state.field[0, GroupField.SWEEP]):
            sweeps.append(Sweep())
        sweeps[-1].sequential += bool(state.live.any())
        return draw(run, state, logits, sweeps[-1].candidates)

    ParticleRun.branch = branch
    try:
        yield sweeps
    finally:
        ParticleRun.branch = _branch
