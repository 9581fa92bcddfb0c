"""Discrete particle Gibbs in float64 numpy: one position of a group, the selection, and a whole chain (DESIGN 3.9).

Particles are distinct open prefixes with weights. At each position every child of every particle is weighed, those that
close leave as candidates, and of the others at most N survive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..particles import Tally
from ..state import Status
from . import rows as ref
from .sampling import float64_rows, row_status

_NAN = float("nan")


def log_add(a: float, b: float) -> float:
    return float(np.logaddexp(a, b))


@dataclass
class Children:
    """All children of a group's particles. log_weight [R, V], nats; -inf where there is none. logp [R, V].

    closes: bool [R, V]. reference: (row, token) of the child that must survive, or None. order: the rows, as the
    prefixes of their particles come in lexicographic order.
    """

    log_weight: np.ndarray
    logp: np.ndarray
    closes: np.ndarray
    reference: tuple[int, int] | None
    order: list[int]


@dataclass
class Branched:
    """The rows after one position. One entry a row, (parent, token, log_weight, logp) or None where it is empty.

    order: the rows, those that are taken in the lexicographic order of their prefixes, then the others.
    candidate: (parent, token, logp) of the closing child that is kept now, or None where the one of before stays.
    tally: the new one. log_threshold: log kappa, -inf where every open child survived.
    """

    rows: list[tuple[int, int, float, float] | None]
    order: list[int]
    candidate: tuple[int, int, float] | None
    tally: list[float]
    log_threshold: float


def weigh(z: list[np.ndarray], log_weight: np.ndarray, alpha: float, length_bonus: float) -> tuple[np.ndarray, ...]:
    """(log_weight, logp) [R, V] of all children: omega p(v)^alpha e^lambda. z: logits [V] of each row."""
    weights, logps = [], []
    for row, weight in zip(z, log_weight, strict=True):
        if weight == -math.inf:
            logp = np.full(row.size, -np.inf)
        else:
            gap = row - row.max()
            logp = gap - math.log1p(ref.rest(row, 1.0))
        logps.append(logp)
        weights.append(weight + length_bonus + alpha * logp)
    return np.array(weights), np.array(logps)


def branch(
    children: Children, tally: list[float], closing_bonus: float, rho: float, uniform: tuple[float, float]
) -> Branched:
    """One position of one group. uniform: of the open children's draw, and of the candidate's."""
    tally = list(tally)
    candidate = _close(children, tally, closing_bonus, uniform[1])
    weight = np.where(children.closes, -np.inf, children.log_weight)
    reference = children.reference
    if reference is not None and children.closes[reference]:
        reference = None
    survivors, log_threshold = _survivors(weight, reference, children.order, tally[Tally.MASS], rho, uniform[0])
    rows = _placed(survivors, reference, children.logp)
    return Branched(rows, _sorted(rows, children.order), candidate, tally, log_threshold)


def _close(children: Children, tally: list[float], closing_bonus: float, u: float) -> tuple[int, int, float] | None:
    """Add the children that close to the tally, in place, and draw whether one of them is kept from now on, and which.

    A weighted reservoir: each of all candidates but the reference is the kept one in proportion to its weight.
    """
    weight = np.where(children.closes, children.log_weight, -np.inf)
    top = float(weight.max())
    if top == -math.inf:
        return None
    tally[Tally.MASS] = log_add(tally[Tally.MASS], top + math.log(np.exp(weight - top).sum()))
    if children.reference is not None and children.closes[children.reference]:
        tally[Tally.REFERENCE] = float(weight[children.reference]) + closing_bonus
        weight[children.reference] = -np.inf
        top = float(weight.max())
        if top == -math.inf:
            return None
    mass = np.exp(weight - top)
    fresh = top + math.log(mass.sum()) + closing_bonus
    before, tally[Tally.OTHERS] = tally[Tally.OTHERS], log_add(tally[Tally.OTHERS], fresh)
    old_share = math.exp(before - tally[Tally.OTHERS])
    if u < old_share:
        return None
    row, token = np.unravel_index(_first_above(mass.ravel(), (u - old_share) / (1.0 - old_share)), mass.shape)
    tally[Tally.KEPT] = float(weight[row, token]) + closing_bonus
    return int(row), int(token), float(children.logp[row, token])


def _first_above(mass: np.ndarray, u: float) -> int:
    """The first entry, in order, whose running sum exceeds u of the whole; one with mass."""
    cdf = np.cumsum(mass)
    above = np.flatnonzero((cdf > u * cdf[-1]) & (mass > 0))
    return int(above[0]) if above.size else int(np.flatnonzero(mass)[-1])


def _survivors(
    weight: np.ndarray, reference: tuple[int, int] | None, order: list[int], log_mass: float, rho: float, u: float
) -> tuple[list[tuple[int, int, float]], float]:
    """(row, token, log_weight) of the open children that survive, the heavy ones first, and log kappa.

    weight [R, V]: of the open children, nats. log_mass: of all candidates so far.
    """
    particles = weight.shape[0] - 1
    top = float(weight.max())
    if top == -math.inf:
        return [], -math.inf
    mass = np.exp(weight - top)
    log_floor = -math.inf
    if rho > 0:
        log_floor = math.log(rho / particles) + log_add(log_mass, top + math.log(mass.sum()))
    heavy, log_threshold = _threshold(mass[order], top, log_floor)
    heavy = [(order[place], token) for place, token in heavy]
    survivors = [(row, token, float(weight[row, token])) for row, token in heavy]
    light = mass.copy()
    for child in heavy:
        light[child] = 0.0
    must = reference if reference is not None and reference not in heavy else None
    if log_threshold == -math.inf:
        # Nothing but what is kept has any mass; the reference is kept with the weight that it has.
        return survivors + ([(*must, float(weight[must]))] if must is not None else []), log_threshold
    by_floor = log_threshold <= log_floor
    drawn = _drawn(light, order, log_threshold - top, particles - len(heavy), by_floor, must, u)
    return survivors + [(row, token, log_threshold) for row, token in drawn], log_threshold


def _threshold(mass: np.ndarray, top: float, log_floor: float) -> tuple[list[tuple[int, int]], float]:
    """The heavy children, the heaviest first, and log kappa: sum over open children of min(1, omega/kappa) = N.

    mass [R, V], relative to e^top, in the order of the particles, by which equally heavy children are taken. What is
    below the threshold is summed without the heavy children: a difference of large sums may come out as 0, and all
    children as heavy.
    """
    particles = mass.shape[0] - 1
    rest = mass.copy()
    floor = math.exp(min(log_floor - top, 700.0))
    heavy: list[tuple[int, int]] = []
    while True:
        row, token = np.unravel_index(int(rest.argmax()), rest.shape)
        left, most = float(rest.sum()), float(rest[row, token])
        if most <= 0.0 or most < floor or most * (particles - len(heavy)) <= left:
            break
        heavy.append((int(row), int(token)))
        rest[row, token] = 0.0
    if left <= 0.0:
        return heavy, log_floor
    return heavy, max(log_floor, top + math.log(left) - math.log(particles - len(heavy)))


def _drawn(
    light: np.ndarray,
    order: list[int],
    log_threshold: float,
    places: int,
    by_floor: bool,
    must: tuple[int, int] | None,
    u: float,
) -> list[tuple[int, int]]:
    """A systematic draw along the lexicographic order: each light child with probability omega/kappa, and `must`.

    The order must depend on the particles alone, as this one does, and not on the rows they are in: which children
    survive together depends on it, and a sweep must draw them as a start would have, given that the reference survived.
    places: how many there are. by_floor: the threshold is the floor; then there are as many points as the line has.
    """
    light = light[order]
    line = np.cumsum(light.ravel())
    kappa = math.exp(log_threshold) if log_threshold < 700.0 else math.inf
    count = places
    if by_floor:  # which rounding alone could make one more than the places
        count = min(math.ceil(line[-1] / kappa), places) if kappa < math.inf else 0
    own = -1
    if must is not None:
        own = int(np.ravel_multi_index((order.index(must[0]), must[1]), light.shape))
        start = float(line[own - 1]) if own > 0 else 0.0
        # Rounding can take the last child of the line beyond its end.
        v = min((start + u * float(light.ravel()[own])) / kappa, math.nextafter(max(count, 1), 0.0))
        point = math.floor(v)
        u = v - point
    chosen: list[int] = []
    for k in range(max(count, must is not None)):
        if must is not None and k == point:
            chosen.append(own)
            continue
        target = (u + k) * kappa
        if by_floor and target >= line[-1]:
            break
        child = _at(light.ravel(), line, target)
        if child != own and (not chosen or child != chosen[-1]):  # which only rounding could make the same
            chosen.append(child)
    if must is not None and own not in chosen:
        chosen.append(own)
    places_of = (np.unravel_index(child, light.shape) for child in chosen)
    return [(order[int(place)], int(token)) for place, token in places_of]


def _at(mass: np.ndarray, line: np.ndarray, target: float) -> int:
    """The first child, of those with mass, whose running sum exceeds target."""
    above = np.flatnonzero((line > target) & (mass > 0))
    return int(above[0]) if above.size else int(np.flatnonzero(mass)[-1])


def _placed(
    survivors: list[tuple[int, int, float]], reference: tuple[int, int] | None, logp: np.ndarray
) -> list[tuple[int, int, float, float] | None]:
    """The survivors in rows: the reference in the last, the first child of a particle in its parent's, others where no
    particle has a child."""
    last = logp.shape[0] - 1
    rows: list = [None] * (last + 1)
    waiting = []
    for row, token, weight in survivors:
        entry = (row, token, weight, float(logp[row, token]))
        if (row, token) == reference:
            rows[last] = entry
        elif row < last and rows[row] is None:
            rows[row] = entry
        else:
            waiting.append(entry)
    free = (i for i in range(last) if rows[i] is None)
    for entry, i in zip(waiting, free, strict=False):
        rows[i] = entry
    return rows


def _sorted(rows: list[tuple[int, int, float, float] | None], order: list[int]) -> list[int]:
    """The rows in the lexicographic order of their new prefixes, then the empty ones."""
    taken = [i for i, row in enumerate(rows) if row is not None]
    taken.sort(key=lambda i: (order.index(rows[i][0]), rows[i][1]))
    return taken + [i for i, row in enumerate(rows) if row is None]


def moves(tally, u: float) -> bool:
    """The metropolised selection: whether the kept candidate takes the reference's place.

    It was drawn among the others in proportion to its weight, g_k / (G - g_r), and is accepted with probability
    min(1, (G - g_r) / (G - g_k)). Without a reference it is taken.
    """
    others, kept, reference = (float(tally[i]) for i in (Tally.OTHERS, Tally.KEPT, Tally.REFERENCE))
    if others == -math.inf:
        return False
    top = max(others, reference)
    without_kept = max(math.exp(others - top) - math.exp(kept - top), 0.0) + math.exp(reference - top)
    return u * without_kept < math.exp(others - top)


# -- the operators


def branch_particles_out(
    logits, alpha, log_weight, order, stop_state, reference, last, closing_bonus, uniform, eos, stop_next,
    length_bonus, rho, workspace, tally, parent, token, child_log_weight, logp, child_order, candidate, candidate_logp,
    log_threshold, status,
) -> None:  # fmt: skip
    """One position of G groups. Shapes: see `power_kernels.branch_particles`."""
    groups, rows = log_weight.shape
    z = list(float64_rows(logits))
    weights, sums = log_weight.cpu().numpy(), tally.cpu().numpy()
    table = None if stop_next is None else stop_next.cpu().numpy()
    for g in range(groups):
        own, a = z[g * rows : (g + 1) * rows], float(alpha[g])
        wanted = int(reference[g])
        states = [_status(own[i], weights[g, i], a) for i in range(rows)]
        if wanted >= 0 and states[-1] is Status.OK and not _can_be_referred_to(own[-1], weights[g, -1], wanted):
            states[-1] = Status.BAD_TOKEN
        status[g] = torch.tensor([int(s) for s in states], dtype=torch.int32)
        branched = Branched([None] * rows, list(range(rows)), None, list(sums[g]), _NAN)
        if all(s is Status.OK for s in states):
            log_weights, logps = weigh(own, weights[g], a, length_bonus)
            closes = np.zeros(log_weights.shape, bool)
            closes[:, [v for v in eos.tolist() if 0 <= v < logits.shape[1]]] = True
            if table is not None:
                closes |= table[stop_state[g].cpu().numpy().clip(0, len(table) - 1)] < 0
            closes |= bool(last[g])
            own_reference = (rows - 1, wanted) if wanted >= 0 else None
            children = Children(log_weights, logps, closes, own_reference, order[g].tolist())
            branched = branch(
                children, list(sums[g]), float(closing_bonus[g]), rho, tuple(float(u) for u in uniform[g])
            )
        for i, entry in enumerate(branched.rows):
            row = (-1, -1, -math.inf, _NAN) if entry is None else entry
            parent[g, i], token[g, i], child_log_weight[g, i], logp[g, i] = row
        child_order[g] = torch.tensor(branched.order, dtype=torch.int32)
        kept = (-1, -1, _NAN) if branched.candidate is None else branched.candidate
        candidate[g, 0], candidate[g, 1], candidate_logp[g] = kept
        tally[g] = torch.tensor(branched.tally, dtype=torch.float64)
        log_threshold[g] = branched.log_threshold


def _status(z: np.ndarray, log_weight: float, alpha: float) -> Status:
    """An empty row is not looked at."""
    if log_weight == -math.inf:
        return Status.OK
    return row_status(z, alpha, alpha) if log_weight < math.inf else Status.NAN


def _can_be_referred_to(z: np.ndarray, log_weight: float, token: int) -> bool:
    return token < z.size and log_weight > -math.inf and z[token] > -math.inf


def select_candidate_out(tally, uniform, moved) -> None:
    """Whether the kept candidate takes the reference's place. Shapes: see `power_kernels.select_candidate`."""
    values = [moves(row, float(u)) for row, u in zip(tally.cpu().numpy(), uniform.tolist(), strict=True)]
    moved.copy_(torch.tensor(values, dtype=torch.bool))
