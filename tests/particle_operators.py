"""Every random choice of `branch_particles` and `select_candidate`, enumerated position by position (DESIGN 3.9, 9.1).

A backend's masses may carry the rounding of float32, but then consistently: a prefix has one weight whatever else is
in the group. So the law is asked of the weights that the backend itself gives, in float64:

* `prefix_weights` reads them off passes in which nothing is thresholded.
* A light child's inclusion probability is its weight over the one that it came out with.

Then pi K = pi holds to the rounding of float64, for pi from the same weights, whatever their own error is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch

import power_kernels as pk
from power_kernels.law import ParticleLaw, SweepCut
from power_kernels.particles import Tally
from power_kernels.state import Status
from tests.exact_law import Space, Tokens, log_softmax
from tests.particle_enumeration import (
    NAN,
    NOTHING,
    Child,
    Enumerated,
    Position,
    acceptance,
    candidate_intervals,
    cut_law,
    log_near,
    log_sum,
)
from tests.toys import Toy

EXACT = 1e-9  # how near a uniform may come to a boundary that comes of float64 alone: candidates and the selection
NO_TALLY = (NOTHING,) * len(Tally)


class Group(NamedTuple):
    """The rows of one group. The kept candidate is not part of it: nothing but the selection depends on it."""

    prefixes: tuple[Tokens | None, ...]
    log_weights: tuple[float, ...]
    order: tuple[int, ...]
    tally: tuple[float, ...]  # its Tally.KEPT is -inf


class Request(NamedTuple):
    group: Group
    reference: int  # next token, or -1
    closing_bonus: float


# From whom, and with what kept (tokens, selection weight), a group is reached, and the probability.
Kept = tuple[Tokens | None, float]
Reached = dict[Tokens | None, dict[Kept, float]]


class Calls:
    """Groups of one position, all in one call. The masses of rows without a particle are NaN."""

    def __init__(self, toy: Toy, alpha: float, length_bonus: float, rho: float):
        self.toy, self.alpha, self.length_bonus, self.rho = toy, alpha, length_bonus, rho
        self.requests: list[tuple[Request, float, tuple[float, float]]] = []

    def add(self, request: Request, kept: float, uniform: tuple[float, float]) -> int:
        self.requests.append((request, kept, uniform))
        return len(self.requests) - 1

    def run(self, *, last: bool, close: bool = True) -> None:
        """close: whether anything closes but at the last position."""
        toy, groups = self.toy, [request.group for request, _, _ in self.requests]
        size, rows = len(groups), len(groups[0].prefixes)
        logits = np.full((size, rows, toy.vocab), NAN, np.float32)
        state = np.zeros((size, rows), np.int16)
        for g, group in enumerate(groups):
            for i, prefix in enumerate(group.prefixes):
                if prefix is not None:
                    logits[g, i] = toy.logits(prefix)
                    for token in prefix if toy.stop else ():
                        state[g, i] = toy.stop_next[state[g, i], token]
        tallies = [(*g.tally[: Tally.KEPT], kept, *g.tally[Tally.KEPT + 1 :]) for g, (_, kept, _) in
                   zip(groups, self.requests, strict=True)]  # fmt: skip
        stops = bool(toy.stop) and close
        self.out = pk.branch_particles(
            torch.from_numpy(logits.reshape(size * rows, toy.vocab)),
            torch.full((size,), self.alpha),
            torch.tensor([g.log_weights for g in groups], dtype=torch.float64),
            torch.tensor([g.order for g in groups], dtype=torch.int32),
            torch.tensor([request.reference for request, _, _ in self.requests]),
            torch.full((size,), last),
            torch.tensor([request.closing_bonus for request, _, _ in self.requests], dtype=torch.float64),
            torch.tensor([uniform for _, _, uniform in self.requests], dtype=torch.float64),
            torch.tensor(tallies, dtype=torch.float64),
            eos=torch.tensor(toy.eos if close else (), dtype=torch.int64),
            stop_state=torch.from_numpy(state) if stops else None,
            stop_next=torch.from_numpy(toy.stop_next) if stops else None,
            length_bonus=self.length_bonus,
            rho=self.rho,
        )
        assert (self.out.status == int(Status.OK)).all()
        self.found = list(zip(*(column.tolist() for column in self.out), strict=True))

    def result(self, at: int) -> pk.BranchOutput:
        """Of one group, in plain Python."""
        return pk.BranchOutput(*self.found[at])


def prefix_weights(toy: Toy, horizon: int, alpha: float, length_bonus: float) -> dict[Tokens, float]:
    """log of p(u)^alpha e^(lambda n) of every prefix and answer, as the operator weighs it: nothing closes, and there
    are more rows than children, so that each comes out with its weight."""
    weight: dict[Tokens, float] = {(): 0.0}
    opened: list[Tokens] = [()]
    for _ in range(horizon):
        empty = len(opened) * (toy.vocab - 1) + 2
        group = Group(
            (*opened, *[None] * empty),
            (*(weight[u] for u in opened), *[NOTHING] * empty),
            tuple(range(len(opened) + empty)),
            NO_TALLY,
        )
        calls = Calls(toy, alpha, length_bonus, 0.0)
        calls.add(Request(group, -1, 0.0), NOTHING, (0.5, 0.5))
        calls.run(last=False, close=False)
        out = calls.result(0)
        assert out.log_threshold == NOTHING
        for parent, token, log_weight in zip(out.parent, out.token, out.log_weight, strict=True):
            if parent >= 0:
                weight[(*opened[parent], token)] = log_weight
        opened = [x for u in opened for v in range(toy.vocab) if (x := (*u, v)) in weight and not toy.ends(x)]
    return weight


class Question:
    """What the law says of one request, and what the operator answers at each interval of its uniforms."""

    def __init__(self, toy: Toy, request: Request, weight: dict[Tokens, float], last: bool, rho: float):
        group = request.group
        self.request, self.children = request, {}
        closes: set[Child] = set()
        for row, prefix in enumerate(group.prefixes):
            for v in range(toy.vocab) if prefix is not None else ():
                x = (*prefix, v)
                if x in weight:
                    self.children[row, v] = group.log_weights[row] + weight[x] - weight[prefix]
                    if last or toy.ends(x):
                        closes.add((row, v))
        reference = (len(group.prefixes) - 1, request.reference) if request.reference >= 0 else None
        self.reference = reference if reference not in closes else None
        opened = {c: w for c, w in self.children.items() if c not in closes}
        self.log_mass = log_sum([group.tally[Tally.MASS], *(self.children[c] for c in closes)])
        self.closing = {c: self.children[c] + request.closing_bonus for c in closes if c != reference}
        self.closed_reference = self.children[reference] + request.closing_bonus if reference in closes else None
        self.position = Position(opened, list(group.order), len(group.prefixes) - 1, self.log_mass, rho)
        self.candidates = candidate_intervals(self.closing, group.tally[Tally.OTHERS])
        self.survivors = self.position.intervals(self.reference)
        self.toy = toy

    def ask(self, calls: Calls, kept: float, margin: float, ends: bool) -> None:
        """At both ends of each interval, `margin` inside as rounding moves them, or in the middle of each alone."""

        def points(intervals, margin):
            for at, i in enumerate(intervals):
                assert i.measure > 4 * margin, "an interval too narrow to look into: take another toy"
                inside = (float(i.low) + margin, float(i.high) - margin) if ends else (float(i.low + i.high) / 2,)
                yield from ((at, u) for u in inside)

        first, second = list(points(self.survivors, margin)), list(points(self.candidates, EXACT))
        self.asked = []
        for k in range(max(len(first), len(second))):
            (i, u), (j, v) = first[k % len(first)], second[k % len(second)]
            self.asked.append((i, j, calls.add(self.request, kept, (u, v))))

    def hear(self, calls: Calls, kept: float, error: float) -> None:
        """Check every answer, and learn with what weight the light children come out. error: of masses, relative."""
        position, request = self.position, self.request
        self.rows: dict[int, object] = {}  # of each interval of the survivors' uniform
        self.kept: dict[int, object] = {}
        self.drawn: dict[Child, float] = {}
        for i, j, at in self.asked:
            out = calls.result(at)
            rows = list(zip(out.parent, out.token, out.log_weight, strict=True))
            found = {row[:2]: row[2] for row in rows if row[0] >= 0}
            assert found.keys() == self.survivors[i].outcome
            for child, w in found.items():
                heavy = child in position.heavy
                assert abs(w - position.log_weight(child)) < (1e-12 if heavy else error)
                if not heavy:
                    assert self.drawn.setdefault(child, w) == w
            if position.light:
                assert abs(out.log_threshold - position.log_kappa) < error
            if self.reference is not None:
                assert rows[-1][:2] == self.reference
            for (parent, token, _), logp in zip(rows, out.logp, strict=True):
                if parent >= 0:
                    z = self.toy.logits(request.group.prefixes[parent])
                    assert abs(logp - log_softmax(z)[token]) < max(error, 1e-12)
            outcome = self.candidates[j].outcome
            assert tuple(out.candidate) == (outcome or (-1, -1))
            if outcome is not None:
                assert abs(out.tally[Tally.KEPT] - self.closing[outcome]) < 1e-12
            else:
                assert out.tally[Tally.KEPT] == kept
            before = request.group.tally
            assert log_near(out.tally[Tally.MASS], self.log_mass)
            assert log_near(out.tally[Tally.OTHERS], log_sum([before[Tally.OTHERS], *self.closing.values()]))
            own = before[Tally.REFERENCE] if self.closed_reference is None else self.closed_reference
            assert log_near(out.tally[Tally.REFERENCE], own)
            # One uniform has no say in what the other draws.
            tally = (out.tally[Tally.OTHERS], NOTHING, out.tally[Tally.REFERENCE], out.tally[Tally.MASS])
            after = (tuple(rows), tuple(out.order), tally)
            assert self.rows.setdefault(i, after) == after
            chosen = (outcome, out.tally[Tally.KEPT])
            assert self.kept.setdefault(j, chosen) == chosen

    def settle(self, drawn: dict[Child, float]) -> None:
        """The intervals' measures from the weights that the light children came out with."""
        assert all(drawn[c] == w for c, w in self.drawn.items())
        rough = self.survivors
        if drawn:
            self.position.weigh_light(drawn)
            self.survivors = self.position.intervals(self.reference)
        assert [i.outcome for i in self.survivors] == [i.outcome for i in rough]

    def groups(self):
        """(probability, group after, order of its taken rows checked)."""
        prefixes = self.request.group.prefixes
        for i, interval in enumerate(self.survivors):
            rows, order, tally = self.rows[i]
            after = tuple(None if p < 0 else (*prefixes[p], v) for p, v, _ in rows)
            taken = [after[r] for r in order if after[r] is not None]
            assert taken == sorted(taken)
            assert all(after[r] is None for r in order[len(taken) :])
            yield interval.measure, Group(after, tuple(w for _, _, w in rows), order, tally)

    def kept_after(self, kept: Kept) -> list[tuple[float, Kept]]:
        found = []
        for j, interval in enumerate(self.candidates):
            child, weight = self.kept[j]
            if child is None:
                found.append((interval.measure, kept))
            else:
                found.append((interval.measure, ((*self.request.group.prefixes[child[0]], child[1]), weight)))
        return found


def enumerate_operators(
    toy: Toy, law: ParticleLaw, alpha: float, space: Space, *, margin: float, error: float, ends: bool = True
) -> tuple[Enumerated, dict[Tokens, float]]:
    """A start and a sweep of every answer by the operators of the backend that serves now, and its `prefix_weights`.

    margin: how near a uniform may come to a boundary of the survivors. error: of float32 masses, relative. ends: look
    at both ends of each interval; in its middle alone otherwise, where calls are slow.
    """
    weight = prefix_weights(toy, law.max_new_tokens, alpha, law.length_bonus)
    rows, size = law.particles + 1, len(space.answers)
    out = Enumerated(np.zeros((size, size)), np.zeros(size), np.zeros(size))
    reached: dict[Group, Reached] = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
    finished: list[tuple[Tokens | None, Kept, tuple[float, ...], float]] = []

    def begin(prefix: Tokens, row: int, origin: Tokens | None, probability: float) -> None:
        prefixes, weights = [None] * rows, [NOTHING] * rows
        prefixes[row], weights[row] = prefix, weight[prefix]
        reached[Group(tuple(prefixes), tuple(weights), tuple(range(rows)), NO_TALLY)][origin][None, NOTHING] += (
            probability
        )

    begin((), 0, None, 1.0)
    for t in range(law.max_new_tokens):
        for i, x in enumerate(space.answers):
            places = cut_law(law.cut, len(x), law.max_new_tokens)
            if t in places:
                begin(x[:t], -1, x, places[t])
            if t == 0:
                out.matrix[i, i] += 1.0 - sum(places.values())
        calls = Calls(toy, alpha, law.length_bonus, law.rho)
        questions: dict[Request, Question] = {}
        samples: dict[Request, float] = {}

        def question(request: Request, kept: float, t: int = t, questions=questions, calls=calls, samples=samples):
            if request not in questions:
                one = Question(toy, request, weight, t + 1 == law.max_new_tokens, law.rho)
                one.ask(calls, kept, margin, ends)
                questions[request], samples[request] = one, kept
            return questions[request]

        used: dict[Request, list[Tokens | None]] = defaultdict(list)
        for group, origins in reached.items():
            for x, kepts in origins.items():
                bonus = -math.log(t + 1) if x is not None and law.cut is SweepCut.UNIFORM else 0.0
                request = Request(group, x[t] if x is not None and group.prefixes[-1] is not None else -1, bonus)
                kept = max(w for _, w in kepts)
                if question(request, kept).reference in questions[request].position.light:
                    # Which light children there are, and with what weight, does not depend on the reference; without
                    # one every light child survives somewhere, and shows.
                    question(request._replace(reference=-1), kept)
                used[request].append(x)
        calls.run(last=t + 1 == law.max_new_tokens)
        for request, one in questions.items():
            one.hear(calls, samples[request], error)
        after: dict[Group, Reached] = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
        for request, origins in used.items():
            one = questions[request]
            if one.reference in one.position.light:
                one.settle(questions[request._replace(reference=-1)].drawn)
            else:
                one.settle(one.drawn)
            kept_after = {}
            for x in origins:
                moved: dict[Kept, float] = defaultdict(float)
                for kept, probability in reached[request.group][x].items():
                    if kept not in kept_after:
                        kept_after[kept] = one.kept_after(kept)
                    for share, new in kept_after[kept]:
                        moved[new] += share * probability
                for measure, group in one.groups():
                    for kept, probability in moved.items():
                        after[group][x][kept] += measure * probability
        reached = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
        for group, origins in after.items():
            if any(prefix is not None for prefix in group.prefixes):
                reached[group] = origins
                continue
            for x, kepts in origins.items():
                finished += [(x, kept, group.tally, probability) for kept, probability in kepts.items()]
    assert not reached
    select(finished, space, out)
    return out, weight


def select(finished, space: Space, out: Enumerated) -> None:
    """The end of every sweep, by select_candidate on both sides of its boundary; the start's candidate is taken."""
    tallies, uniforms, expected = [], [], []
    for x, (kept, kept_weight), tally, probability in finished:
        tally = (tally[Tally.OTHERS], kept_weight, tally[Tally.REFERENCE], tally[Tally.MASS])
        if x is None:
            out.start[space.index[kept]] += probability
            out.weighed[space.index[kept]] += probability * math.exp(tally[Tally.MASS])
            continue
        accept = acceptance(tally)
        i = space.index[x]
        out.matrix[i, i] += probability * (1.0 - accept)
        if kept is not None:
            out.matrix[i, space.index[kept]] += probability * accept
        for u, moves in (
            (accept - EXACT, True),
            (accept + EXACT, False),
            (0.0, accept > 0),
            (1 - 2.0**-53, accept == 1),
        ):
            if 0.0 <= u < 1.0:
                tallies.append(tally)
                uniforms.append(u)
                expected.append(moves)
    moved = pk.select_candidate(torch.tensor(tallies, dtype=torch.float64), torch.tensor(uniforms, dtype=torch.float64))
    assert moved.tolist() == expected
