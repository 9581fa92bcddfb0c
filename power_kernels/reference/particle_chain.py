"""One chain of particles in float64 Python: a start, then sweeps over its answer (DESIGN 3.9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import rng
from ..law import ParticleLaw, SweepCut
from ..particles import Tally
from .particles import Children, branch, moves, weigh


@dataclass(frozen=True)
class ParticleAnswer:
    """A closed answer, or a prefix. logp: of each token, nats."""

    tokens: tuple[int, ...] = ()
    logp: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def prefix(self, n: int) -> ParticleAnswer:
        return ParticleAnswer(self.tokens[:n], self.logp[:n])

    def append(self, token: int, logp: float) -> ParticleAnswer:
        return ParticleAnswer((*self.tokens, token), (*self.logp, logp))


@dataclass(frozen=True)
class Sweep:
    """What a start or a sweep did. answer: after it. cut: its first position, -1 where it had nothing to do.
    log_total: log Zhat. kept_back: leading tokens that are those of the answer before (0 for a start)."""

    answer: ParticleAnswer
    cut: int
    log_total: float
    kept_back: int


class ReferenceParticles:
    """One chain, from its start to its last sweep.

    next_logits: a function from a tuple of answer tokens to the logits [V] of the next one. law: a `ParticleLaw`.
    eos: the tokens that close an answer. stop_next: int16 [S, V], the stop strings' automaton (3.1).
    """

    def __init__(
        self,
        next_logits: Callable[[tuple[int, ...]], np.ndarray],
        law: ParticleLaw,
        *,
        alpha: float,
        seed: int = 0,
        eos: Sequence[int] = (),
        chain_id: int = 0,
        prompt_id: int = 0,
        stop_next: np.ndarray | None = None,
    ):
        self.next_logits = next_logits
        self.law = law
        self.alpha = alpha
        self.seed = seed
        self.eos = list(eos)
        self.ids = (chain_id, prompt_id)
        self.stop_next = stop_next

    def run(self) -> list[Sweep]:
        """The start and all sweeps, in order."""
        done = [self.sweep(None, 0)]
        for number in range(1, self.law.sweeps + 1):
            done.append(self.sweep(done[-1].answer, number))
        return done

    def sweep(self, answer: ParticleAnswer | None, number: int) -> Sweep:
        """Sweep `number` over an answer, or with None the start."""
        cut_uniform, select_uniform = (float(u) for u in rng.sweep_uniforms(self.seed, number, *self.ids))
        cut = 0 if answer is None else self.cut(answer, cut_uniform)
        if cut < 0:
            return Sweep(answer, cut, math.nan, len(answer))
        kept, tally = self.particles(answer, cut, number)
        moved = answer is None or moves(tally, select_uniform)
        after = kept if moved else answer
        return Sweep(after, cut, tally[Tally.MASS], 0 if answer is None else _common(answer.tokens, after.tokens))

    def cut(self, answer: ParticleAnswer, u: float) -> int:
        """Where a sweep begins; -1 where it begins behind the answer, and changes nothing."""
        if self.law.cut is SweepCut.WHOLE:
            return 0
        length = len(answer) if self.law.cut is SweepCut.UNIFORM else self.law.max_new_tokens
        cut = min(int(u * length), length - 1)
        return cut if cut < len(answer) else -1

    def particles(
        self, answer: ParticleAnswer | None, cut: int, number: int
    ) -> tuple[ParticleAnswer | None, list[float]]:
        """The candidate that was kept (None: there was none but the answer) and the tally, from position `cut` on."""
        rows: list[ParticleAnswer | None] = [None] * (self.law.particles + 1)
        weights = [-math.inf] * len(rows)
        # The one particle there is, in the reference's row where there is a reference.
        first = 0 if answer is None else -1
        rows[first] = ParticleAnswer() if answer is None else answer.prefix(cut)
        weights[first] = self.alpha * sum(rows[first].logp) + self.law.length_bonus * cut
        order = list(range(len(rows)))
        kept, tally = None, [-math.inf] * len(Tally)
        for position in range(cut, self.law.max_new_tokens):
            if all(row is None for row in rows):
                break
            reference = -1
            if answer is not None and rows[-1] is not None:
                reference = answer.tokens[position]
            branched = branch(
                self.children(rows, weights, order, reference, position + 1 == self.law.max_new_tokens),
                tally,
                # The cut law's ratio, once: an answer of n tokens was cut here with probability 1/n.
                -math.log(position + 1) if answer is not None and self.law.cut is SweepCut.UNIFORM else 0.0,
                self.law.rho,
                tuple(float(u) for u in rng.particle_uniforms(self.seed, position, number, *self.ids)),
            )
            if branched.candidate is not None:
                parent, token, logp = branched.candidate
                kept = rows[parent].append(token, logp)
            tally, order = branched.tally, branched.order
            rows = [None if r is None else rows[r[0]].append(r[1], r[3]) for r in branched.rows]
            weights = [-math.inf if r is None else r[2] for r in branched.rows]
        return kept, tally

    def children(self, rows, weights, order: list[int], reference: int, last: bool) -> Children:
        none = np.zeros(len(self.next_logits(())))
        z = [none if row is None else np.asarray(self.next_logits(row.tokens), np.float64) for row in rows]
        log_weight, logp = weigh(z, np.array(weights), self.alpha, self.law.length_bonus)
        closes = np.zeros(log_weight.shape, bool)
        closes[:, self.eos] = True
        if self.stop_next is not None:
            closes |= self.stop_next[[0 if row is None else self.stop_state(row.tokens) for row in rows]] < 0
        closes |= last
        return Children(log_weight, logp, closes, (len(rows) - 1, reference) if reference >= 0 else None, order)

    def stop_state(self, tokens: tuple[int, ...]) -> int:
        state = 0
        for token in tokens:
            state = int(self.stop_next[state, token])
        return state


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Leading tokens that are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
