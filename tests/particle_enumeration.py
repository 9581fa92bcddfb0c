"""The law of particles as numbers (DESIGN 3.9, 9.1): every random choice of a start and of a sweep, enumerated.

* `Position` writes the law of one position down: which children are heavy, the line of the others' inclusions, and
  what each uniform chooses on it, in rational numbers. It shares no code with the package.
* `enumerate_chain` replays `ReferenceParticles.sweep` along every branch of its uniforms.
* `enumerate_operators` does the same with `branch_particles` and `select_candidate`, position by position: all groups
  that can occur at a position, for every interval of their uniforms, are one call.

What the code does is looked at on both sides of every boundary of `Position`, so that an interval has the measure that
the law says, and its outcome is the code's.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from power_kernels.law import ParticleLaw, SweepCut
from power_kernels.particles import Tally
from power_kernels.reference import particle_chain, particles
from power_kernels.reference.particle_chain import ParticleAnswer, ReferenceParticles
from tests.exact_law import Space, Tokens, log_softmax, pieces
from tests.toys import Toy

Child = tuple[int, int]  # row and token
NOTHING = -math.inf
NAN = float("nan")

# -----------------------------------------------------------------------------------------------------------
# One position, on paper


class Interval(NamedTuple):
    """Of a uniform: from low to high one outcome."""

    low: Fraction
    high: Fraction
    outcome: object

    @property
    def measure(self) -> float:
        return float(self.high - self.low)


def log_sum(values) -> float:
    values = [v for v in values if v > NOTHING]
    top = max(values, default=NOTHING)
    return top + math.log(math.fsum(math.exp(v - top) for v in values)) if values else NOTHING


class Position:
    """The open children of one group, by (row, token), with their log-weights; log_mass: of all candidates.

    heavy: those that survive for certain. light: the others, along the line. log_kappa: -inf where all are heavy.
    """

    def __init__(self, weight: dict[Child, float], order: list[int], count: int, log_mass: float, rho: float):
        ranked = sorted((c for c in weight if weight[c] > NOTHING), key=lambda c: -weight[c])
        floor = math.log(rho / count) + log_sum([*weight.values(), log_mass]) if rho > 0 else NOTHING
        heavy = 0
        self.log_kappa = NOTHING
        # The fewest heavy children of which the next is no larger than the threshold that they leave.
        while heavy < len(ranked):
            rest = log_sum(weight[c] for c in ranked[heavy:])
            level = rest - math.log(count - heavy) if heavy < count else math.inf
            self.log_kappa = max(level, floor)
            if weight[ranked[heavy]] <= self.log_kappa:
                break
            heavy += 1
        self.weight, self.heavy = weight, ranked[:heavy]
        self.light = sorted(ranked[heavy:], key=lambda c: (order.index(c[0]), c[1]))
        if not self.light:
            self.log_kappa = NOTHING
        self.places = count - heavy if self.light and self.log_kappa > floor else None
        self.weigh_light(dict.fromkeys(self.light, self.log_kappa))

    def weigh_light(self, log_weight: dict[Child, float]) -> None:
        """Lay the line for the log-weights that light survivors come out with: log kappa, in exact arithmetic.

        An inclusion is the weight that a child has over the one that it comes out with, so that it is kept on average.
        """
        self.drawn_weight = log_weight
        inclusion = [Fraction(math.exp(self.weight[c] - log_weight[c])) for c in self.light]
        total = sum(inclusion, Fraction(0))
        assert self.places is None or abs(total - self.places) < 1e-12
        if abs(total - round(total)) < 1e-12:  # the floor may be the threshold; all but rounding is the same then
            inclusion = [i * round(total) / total for i in inclusion]
        self.line = [sum(inclusion[:i], Fraction(0)) for i in range(len(inclusion) + 1)]

    def intervals(self, reference: Child | None = None) -> list[Interval]:
        """Of the open children's uniform u. The outcome is the set of all survivors.

        The points u + k choose, for every whole k. With a reference on the line its own point is uniform on its piece
        of the line, [C, C + I), which is the law of the points given that one of them chooses the reference.
        """
        start, width = Fraction(0), Fraction(1)
        if reference in self.light:
            at = self.light.index(reference)
            start, width = self.line[at], self.line[at + 1] - self.line[at]
        steps = {Fraction(0), Fraction(1)}
        for end in self.line:
            step = (end - start) % 1
            while step < width:
                steps.add(step / width)
                step += 1
        steps = sorted(steps)
        found = []
        for low, high in pairwise(steps):
            point = (start + (low + high) / 2 * width) % 1
            outcome = set(self.heavy)
            while point < self.line[-1]:
                outcome.add(self.light[bisect_right(self.line, point) - 1])
                point += 1
            found.append(Interval(low, high, frozenset(outcome)))
        return found

    def log_weight(self, child: Child) -> float:
        return self.drawn_weight.get(child, self.weight[child])


def candidate_intervals(weight: dict[Child, float], before: float) -> list[Interval]:
    """Of the candidate's uniform: None where the one of before stays, else the closing child that takes its place.

    weight: selection weights of the closing children but the reference; before: that of all candidates until now.
    """
    closing = sorted(c for c in weight if weight[c] > NOTHING)
    top = max([before, *(weight[c] for c in closing)])
    masses = [(None, before), *((c, weight[c]) for c in closing)]
    shares = [(outcome, Fraction(math.exp(w - top))) for outcome, w in masses if w > NOTHING] if closing else []
    total, low = sum((share for _, share in shares), Fraction(0)), Fraction(0)
    found = []
    for outcome, share in shares or [(None, Fraction(1))]:
        high = low + share / total if shares else Fraction(1)
        found.append(Interval(low, high, outcome))
        low = high
    return found


def acceptance(tally) -> float:
    """The probability with which the kept candidate takes the reference's place."""
    others, kept, reference = (float(tally[i]) for i in (Tally.OTHERS, Tally.KEPT, Tally.REFERENCE))
    if others == NOTHING:
        return 0.0
    top = max(others, reference)
    without_kept = math.exp(others - top) - math.exp(kept - top) + math.exp(reference - top)
    return min(1.0, math.exp(others - top) / without_kept) if without_kept > 0 else 1.0


def cut_law(cut: SweepCut, length: int, horizon: int) -> dict[int, float]:
    """The places where a sweep of an answer of this length begins, and their probabilities."""
    if cut is SweepCut.WHOLE:
        return {0: 1.0}
    return dict.fromkeys(range(length), 1 / (length if cut is SweepCut.UNIFORM else horizon))


# -----------------------------------------------------------------------------------------------------------
# The reference chain, branch by branch


@dataclass
class Enumerated:
    """What the code does: matrix K [n, n] between a toy's answers, start [n] the law of the first answer, and weighed
    [n], E[Zhat 1{x}] of the start. Either is None where it was not asked for."""

    matrix: np.ndarray | None = None
    start: np.ndarray | None = None
    weighed: np.ndarray | None = None


class Branches:
    """Replays a program along all of its choices."""

    def __init__(self):
        self.path: list[list] = []  # [choice taken, how many there are] so far

    def begin(self) -> None:
        self.depth, self.probability = 0, 1.0

    def take(self, choices: list[tuple[float, object]]) -> object:
        """choices: (probability, value)."""
        if self.depth == len(self.path):
            self.path.append([0, len(choices)])
        probability, value = choices[self.path[self.depth][0]]
        self.depth += 1
        self.probability *= probability
        return value

    def runs(self, program: Callable[[], object]) -> Iterator[tuple[float, object]]:
        """(probability, result) of every run."""
        while True:
            self.begin()
            result = program()
            yield self.probability, result
            while self.path and self.path[-1][0] + 1 == self.path[-1][1]:
                self.path.pop()
            if not self.path:
                return
            self.path[-1][0] += 1


class _Enumerated(ReferenceParticles):
    """A chain that takes every branch. trusted: what the code does is `Position`'s law, boundary by boundary; else a
    mistake was planted, and the boundaries are searched for."""

    trusted = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.branches, self.tables = Branches(), {}
        self.plain_branch, self.plain_moves = particle_chain.branch, particle_chain.moves

    def cut(self, answer, u):
        key = ("cut", len(answer))
        if key not in self.tables:
            law = cut_law(self.law.cut, len(answer), self.law.max_new_tokens)
            expected, low = [], Fraction(0)
            for place, probability in law.items():
                expected.append(Interval(low, low + Fraction(probability), place))
                low = expected[-1].high
            if 1 - low > 1e-12:
                expected.append(Interval(low, Fraction(1), -1))
            plain = super().cut
            self.tables[key] = self.table(lambda u: plain(answer, u), expected)
        return self.branches.take(self.tables[key])

    def children(self, rows, weights, order, reference, last):
        key = ("children", tuple(rows), tuple(weights), tuple(order), reference, last)
        if key not in self.tables:
            self.tables[key] = super().children(rows, weights, order, reference, last)
            prefixes = [rows[i].tokens for i in order if rows[i] is not None]
            assert not self.trusted or prefixes == sorted(prefixes)
        return self.tables[key]

    def branch(self, children, tally, closing_bonus, rho, uniform):
        key = ("branch", id(children), tuple(tally), closing_bonus)
        if key not in self.tables:
            self.tables[key] = self.branch_table(children, tally, closing_bonus, rho)
        return self.branches.take(self.tables[key])

    def moves(self, tally, u):
        key = ("moves", tuple(tally))
        if key not in self.tables:
            accept = Fraction(acceptance(tally))
            expected = [Interval(Fraction(0), accept, True), Interval(accept, Fraction(1), False)]
            plain = self.plain_moves
            self.tables[key] = self.table(lambda u: plain(tally, u), [i for i in expected if i.measure > 0])
        return self.branches.take(self.tables[key])

    def table(self, outcome: Callable[[float], object], expected: list[Interval], agree=lambda a, b: a == b):
        """[(probability, outcome)] of the code: one for each interval of the law, the same at both of its ends."""
        if not self.trusted:
            found = pieces(outcome, [float(i.low) for i in expected[1:]])
            return [(high - low, value) for value, low, high in found]
        table = []
        for interval in expected:
            assert interval.measure > 1e-9, "an interval too narrow to look into: take another toy"
            value, last = outcome(float(interval.low) + 1e-12), outcome(float(interval.high) - 1e-12)
            assert value == last
            assert agree(value, interval.outcome)
            table.append((interval.measure, value))
        return table

    def branch_table(self, children, tally, closing_bonus, rho):
        weight = {tuple(map(int, c)): float(children.log_weight[tuple(c)]) for c in np.ndindex(children.closes.shape)}
        closes = {c for c in weight if children.closes[c]}
        reference = children.reference
        log_mass = log_sum([tally[Tally.MASS], *(weight[c] for c in closes)])
        opened = {c: w for c, w in weight.items() if c not in closes}
        position = Position(opened, children.order, self.law.particles, log_mass, rho)
        closing = {c: weight[c] + closing_bonus for c in closes if c != reference}

        def survivors(u: float):
            after = self.plain_branch(children, tally, closing_bonus, rho, (u, 0.5))
            return tuple(after.rows), tuple(after.order)

        def candidate(u: float):
            after = self.plain_branch(children, tally, closing_bonus, rho, (0.5, u))
            return after.candidate, tuple(after.tally)

        def survivors_agree(value, outcome) -> bool:
            rows, _ = value
            found = {row[:2]: row[2] for row in rows if row is not None}
            near = all(abs(w - position.log_weight(c)) < 1e-12 for c, w in found.items())
            return near and found.keys() == outcome and (reference not in opened or rows[-1][:2] == reference)

        def candidates_agree(value, outcome) -> bool:
            kept, after = value
            if kept is not None:
                assert abs(after[Tally.KEPT] - closing[kept[:2]]) < 1e-12
            else:
                assert after[Tally.KEPT] == tally[Tally.KEPT]
            assert log_near(after[Tally.MASS], log_mass)
            assert log_near(after[Tally.OTHERS], log_sum([tally[Tally.OTHERS], *closing.values()]))
            return (None if kept is None else kept[:2]) == outcome

        both = []
        first = self.table(survivors, position.intervals(reference if reference in opened else None), survivors_agree)
        second = self.table(candidate, candidate_intervals(closing, tally[Tally.OTHERS]), candidates_agree)
        for p, (rows, order) in first:
            for q, (kept, after) in second:
                both.append((p * q, particles.Branched(list(rows), list(order), kept, list(after), NAN)))
        return both


def log_near(a: float, b: float, error: float = 1e-12) -> bool:
    return a == b or abs(a - b) < error


def answer_of(toy: Toy, tokens: Tokens) -> ParticleAnswer:
    logp = (log_softmax(toy.logits(tokens[:t]))[v] for t, v in enumerate(tokens))
    return ParticleAnswer(tokens, tuple(map(float, logp)))


def enumerate_chain(
    toy: Toy, law: ParticleLaw, alpha: float, space: Space, *, start: bool = False, sweep: bool = True,
    trusted: bool = True,
) -> Enumerated:  # fmt: skip
    """The matrix of a sweep and the law of a start, as `ReferenceParticles.sweep` acts."""
    one = _Enumerated(toy.logits, law, alpha=alpha, eos=toy.eos, stop_next=toy.stop_next)
    one.trusted = trusted
    size = len(space.answers)
    out = Enumerated()
    no_uniforms = SimpleNamespace(
        sweep_uniforms=lambda seed, *where: (NAN, NAN), particle_uniforms=lambda seed, *where: (NAN, NAN)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(particle_chain, "rng", no_uniforms)
        patch.setattr(particle_chain, "branch", one.branch)
        patch.setattr(particle_chain, "moves", one.moves)
        if start:
            out.start, out.weighed = np.zeros(size), np.zeros(size)
            for probability, done in one.branches.runs(lambda: one.sweep(None, 0)):
                at = space.index[done.answer.tokens]
                out.start[at] += probability
                out.weighed[at] += probability * math.exp(done.log_total)
        if sweep:
            out.matrix = np.zeros((size, size))
            for i, x in enumerate(space.answers):
                answer = answer_of(toy, x)
                for probability, done in one.branches.runs(lambda a=answer: one.sweep(a, 1)):
                    out.matrix[i, space.index[done.answer.tokens]] += probability
    return out
