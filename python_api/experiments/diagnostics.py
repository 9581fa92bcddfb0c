"""Whether the chains of a prompt have mixed, by log p and W of their answers after every step.

A step at horizon H leaves pi_H invariant (DESIGN section 3.1), and H grows with the stage. Steps of different horizons
have different targets and are never pooled: a diagnosis is of the steps at one horizon, the last one unless told
otherwise, of all chains of one prompt.

R-hat, ESS and MCSE are ArviZ's: R-hat is rank-normalised, split and folded, ESS of the bulk and of the tails, as in
Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), "Rank-normalization, folding, and localization: an improved
R-hat", Bayesian Analysis 16:667, whose thresholds are used: R-hat < 1.01 and an ESS of 100 a chain. They hold for log p
and for W. That they are met is no proof: what no chain has found does not show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from power_kernels.api.experiments.statistics import wilson
from power_kernels.errors import ArgumentError

RHAT = 1.01
ESS_A_CHAIN = 100
CHAINS = 4  # at least, say the same authors
STUCK = 0.05  # chains that change their answer less often than this, with 95 % confidence, hardly move
BY_CHANCE = 5e-4  # of chains of one target to show a larger R-hat
APART = 1.1  # R-hat of chains that are still far from each other, however slowly each of them moves
LEAST = 4  # steps that ArviZ splits a chain into halves of


@dataclass(frozen=True)
class Chain:
    """What one chain has done, an entry a step.

    Args:
        name: to be told from the others of its prompt.
        logp, weight: of the answer after the step, nats.
        outcome: "R" rejected, "U" unchanged, "A" accepted.
        left: where the proposal left the answer, in tokens; -1 where it kept every token.
        horizon: in tokens.
        fault: whether bad logits stopped it.
    """

    name: str
    logp: np.ndarray
    weight: np.ndarray
    outcome: str
    left: np.ndarray
    horizon: np.ndarray
    fault: bool = False

    def at(self, horizon: int) -> np.ndarray:
        """The indices of its steps at a horizon."""
        return np.flatnonzero(self.horizon == horizon)


def from_record(record: dict, name: str) -> Chain:
    """The chain of a line of results. Raises ArgumentError where it holds no trace."""
    try:
        trace = record["trace"]
        arrays = {key: np.array(trace[key], dtype=np.float64) for key in ("logp", "weight")}
        arrays |= {key: np.array(trace[key], dtype=np.int64) for key in ("left", "horizon")}
        outcome, fault = trace["outcome"], record["finish"] == "fault"
        if any(array.shape != (len(outcome),) for array in arrays.values()) or set(outcome) - set("RUA"):
            raise ValueError("its entries differ in length, or an outcome is none of R, U, A")
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(f"record {name} has no trace of its steps: {error}") from None
    return Chain(name=name, outcome=outcome, fault=fault, **arrays)


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figures:
    """Of draws [chains, steps] of one quantity, nats; None where it is not defined: with fewer than 4 steps, and R-hat
    and ESS where every draw is the same.

    Args:
        mean, sd: over all draws.
        mcse: the Monte Carlo standard error of the mean.
        rhat: rank-normalised split R-hat, the larger of bulk and folded.
        ess_bulk, ess_tail: effective draws, for the middle and for the quantiles 5 % and 95 %.
    """

    mean: float
    sd: float
    mcse: float | None
    rhat: float | None
    ess_bulk: float | None
    ess_tail: float | None


def figures(draws: np.ndarray) -> Figures:
    """draws: [chains, steps], of one target."""
    draws = np.asarray(draws, dtype=np.float64)
    if draws.ndim != 2 or not draws.size:
        raise ArgumentError(f"draws is {draws.shape}; it must be [chains, steps], not empty")
    mean, sd = float(draws.mean()), float(draws.std())
    if draws.shape[1] < LEAST or np.ptp(draws) == 0:
        return Figures(mean, sd, None, None, None, None)
    from arviz_stats.base import array_stats

    with np.errstate(divide="ignore", invalid="ignore"):  # chains that never change, each at another place
        found = (
            array_stats.mcse(draws),
            array_stats.rhat(draws),
            array_stats.ess(draws, method="bulk"),
            array_stats.ess(draws, method="tail", prob=(0.05, 0.95)),
        )
    return Figures(mean, sd, *(None if math.isnan(value) else float(value) for value in found))


# ---------------------------------------------------------------- the diagnosis


@dataclass(frozen=True)
class Diagnosis:
    """Of the chains of a prompt, at one horizon.

    Args:
        horizon: tokens; 0 where no chain has made a step.
        chains, steps: what was pooled, `steps` of each chain.
        elsewhere: chains without a step at this horizon (their answer ended in an earlier stage), or stopped by a
            fault.
        accepted, unchanged, rejected: of the pooled steps.
        moved: chains whose answer changed in them.
        logp, weight: figures of both, None without steps.
        verdict: "mixed", "not mixed", "stuck", "one answer", "too few steps", "too few chains" or "no steps".
        reason: of the verdict, in words.
        advice: what to change.
    """

    horizon: int
    chains: int
    steps: int
    elsewhere: int
    accepted: int
    unchanged: int
    rejected: int
    moved: int
    logp: Figures | None
    weight: Figures | None
    verdict: str
    reason: str
    advice: tuple[str, ...]

    @property
    def rhat(self) -> float:
        """The larger one of log p and W. Where there is none, infinite for chains that are stuck, and else 0."""
        known = [f.rhat for f in (self.logp, self.weight) if f is not None and f.rhat is not None]
        return max(known, default=math.inf if self.verdict == "stuck" else 0.0)


def diagnose(chains: Sequence[Chain], horizon: int | None = None, discard: float = 0.0) -> Diagnosis:
    """Whether they have mixed.

    Args:
        chains: of one prompt, drawn alike.
        horizon: whose steps are pooled; the last one if None.
        discard: the share of the pooled steps that is left out in front.
    """
    if not 0 <= discard < 1:
        raise ArgumentError(f"discard is {discard}; it must lie in [0, 1)")
    horizons = horizons_of(chains)
    if horizon is None:
        horizon = horizons[-1] if horizons else 0
    places = [(chain, chain.at(horizon)) for chain in chains if not chain.fault]
    places = [(chain, steps) for chain, steps in places if len(steps)]
    elsewhere = len(chains) - len(places)
    if not places:
        reason = "no Metropolis-Hastings step was made"
        return Diagnosis(horizon, 0, 0, elsewhere, 0, 0, 0, 0, None, None, "no steps", reason, ())
    steps = min(len(steps) for _, steps in places)  # chains whose last stage reached the horizon have more than others
    steps -= int(discard * steps)
    places = [(chain, at[-steps:]) for chain, at in places]
    outcomes = ["".join(chain.outcome[i] for i in at) for chain, at in places]
    pooled = _Pooled(
        logp=np.array([chain.logp[at] for chain, at in places]),
        weight=np.array([chain.weight[at] for chain, at in places]),
        accepted=np.array([outcome.count("A") for outcome in outcomes]),
        unchanged=sum(outcome.count("U") for outcome in outcomes),
        horizons=len(horizons),
        early=_early(places),
    )
    logp, weight = figures(pooled.logp), figures(pooled.weight)
    verdict, reason, advice = _judge(pooled, logp, weight)
    if elsewhere:
        reason += f"; {elsewhere} more chains have no steps at this horizon and are left out"
    accepted = int(pooled.accepted.sum())
    return Diagnosis(
        horizon=horizon,
        chains=len(places),
        steps=steps,
        elsewhere=elsewhere,
        accepted=accepted,
        unchanged=pooled.unchanged,
        rejected=pooled.logp.size - accepted - pooled.unchanged,
        moved=int((pooled.accepted > 0).sum()),
        logp=logp,
        weight=weight,
        verdict=verdict,
        reason=reason,
        advice=tuple(advice),
    )


def horizons_of(chains: Iterable[Chain]) -> list[int]:
    return sorted({int(h) for chain in chains for h in np.unique(chain.horizon)})


@dataclass(frozen=True)
class _Pooled:
    """logp, weight: [chains, steps]. accepted: [chains]. unchanged: in all. horizons: that the chains went through.
    early: proposals that left the answer in the first half of where proposals leave, and those of them that were
    accepted."""

    logp: np.ndarray
    weight: np.ndarray
    accepted: np.ndarray
    unchanged: int
    horizons: int
    early: tuple[int, int]


def _early(places: list[tuple[Chain, np.ndarray]]) -> tuple[int, int]:
    left = np.concatenate([chain.left[at] for chain, at in places])
    accepted = np.array([chain.outcome[i] == "A" for chain, at in places for i in at])
    first = (left >= 0) & (2 * left < left.max(initial=0))
    return int(first.sum()), int((first & accepted).sum())


def _judge(pooled: _Pooled, logp: Figures, weight: Figures) -> tuple[str, str, list[str]]:
    """The verdict, its reason, and what to change."""
    chains, steps = pooled.logp.shape
    rate = pooled.accepted.sum() / pooled.logp.size
    _, most = wilson(rate, pooled.logp.size, 1.96)
    hardly = f"{pooled.accepted.sum()} of {pooled.logp.size} steps changed an answer"
    if np.ptp(pooled.logp) == 0 and np.ptp(pooled.weight) == 0 and most < STUCK and chains > 1:
        return "one answer", f"all {chains} chains hold the same answer, and keep it: {hardly}", [_ONE_ANSWER]
    defined = [f for f in (logp, weight) if f.rhat is not None and f.ess_bulk is not None and f.ess_tail is not None]
    rhat = max((f.rhat for f in defined), default=math.inf)
    ess = min((min(f.ess_bulk, f.ess_tail) for f in defined), default=0.0)
    wanted = ESS_A_CHAIN * chains
    told = f"R-hat and ESS are not defined by {steps} steps a chain"
    if defined:
        told = f"R-hat {rhat:.3f} and ESS {ess:.0f} of {pooled.logp.size} steps"
    thresholds = f"thresholds: {RHAT} and {wanted}"
    enough = rhat < RHAT and ess >= wanted
    if enough and chains > 1:
        return "mixed", f"{told}; {thresholds}", []
    alone = chains == 1 and pooled.unchanged > pooled.logp.size / 2  # others may hold the same answer
    if most < STUCK and not enough and not alone:
        return "stuck", f"{hardly}", _moves(pooled)
    if chains == 1:
        reason = "R-hat needs several, and one cannot show what it has not found"
        return "too few chains", reason, [f"at least {CHAINS} chains a prompt (num_chains, or seeds)"]
    own = min(_ess_alone(pooled.logp), _ess_alone(pooled.weight))
    apart = rhat >= max(RHAT, _rhat_by_chance(chains, own))
    if defined and (apart or rhat >= max(APART, _rhat_by_chance(chains, steps))):
        means = pooled.logp.mean(axis=1)
        reason = f"{told}: the chains are at different places (mean log p from {means.min():.2f} to {means.max():.2f})"
        if apart:
            reason += ", further from each other than each of them moves"
        return "not mixed", reason, _more_steps(pooled, None) + (_moves(pooled) if apart else _late(pooled))
    return "too few steps", f"{told}; {thresholds}", _more_steps(pooled, ess)


def _ess_alone(draws: np.ndarray) -> float:
    """Effective steps of a chain, each seen by itself, so that it does not matter where the others are. The mean."""
    from arviz_stats.base import array_stats

    moving = [chain for chain in draws if np.ptp(chain)]
    return float(np.mean([array_stats.ess(chain[None], method="mean") for chain in moving])) if moving else math.inf


_ONE_ANSWER = (
    "nothing, if p^alpha has its mass on that answer; where it should not, lower alpha, or draw other chains from the "
    "start with block_size=None"
)


def _more_steps(pooled: _Pooled, ess: float | None) -> list[str]:
    """ess: what the steps have come to, if more of them are worth as much."""
    chains, steps = pooled.logp.shape
    number = "several times as many steps"
    if ess is not None and ess > chains:
        number = f"about {_round_up(steps * ESS_A_CHAIN * chains / ess)} steps a chain"
    advice = [f"final_steps: {number} at the last horizon"]
    if pooled.horizons > 1:
        advice.append("block_size=None: one stage, all of whose steps have the last horizon's target")
    if chains < CHAINS:
        advice.append(f"at least {CHAINS} chains a prompt (num_chains, or seeds): fewer hide what they have not found")
    return advice


def _moves(pooled: _Pooled) -> list[str]:
    advice = ["a lower alpha, under which proposals are accepted more often"]
    if pooled.unchanged > pooled.logp.size / 5:
        share = pooled.unchanged / pooled.logp.size
        advice.append(f'cut="divergence": {share:.0%} of the steps proposed the answer they had')
    return advice + _late(pooled)


def _late(pooled: _Pooled) -> list[str]:
    proposals, accepted = pooled.early
    if proposals >= 20 and accepted == 0:
        return [
            f"the beginnings of the answers never changed (none of {proposals} proposals that left in the first half "
            "was accepted): a lower alpha, or a smaller max_new_tokens"
        ]
    return []


def _round_up(value: float) -> int:
    """To two digits."""
    scale = 10 ** max(math.floor(math.log10(value)) - 1, 0)
    return math.ceil(value / scale) * scale


def _rhat_by_chance(chains: int, steps: float) -> float:
    """What split R-hat of independent draws of one target exceeds with the chance BY_CHANCE: R-hat^2 = 1 + (F - 1) / n,
    with F the ratio of the variances between and within the 2 * chains halves of n draws each."""
    from scipy import special

    half = min(steps / 2, 1e9)
    if half < 2:
        return math.inf
    f = special.fdtri(2 * chains - 1, 2 * chains * (half - 1), 1 - BY_CHANCE)
    return math.sqrt(1 + max(f - 1, 0) / half)


# ---------------------------------------------------------------- acceptance


@dataclass(frozen=True)
class Rate:
    """Steps with something in common.

    Args:
        low, high: of what they have in common: low <= x < high.
        accepted, unchanged, rejected: how many there were.
    """

    low: int
    high: int
    accepted: int
    unchanged: int
    rejected: int

    @property
    def steps(self) -> int:
        return self.accepted + self.unchanged + self.rejected

    @property
    def share(self) -> float:
        """Of the steps, those that changed the answer."""
        return self.accepted / self.steps

    def interval(self) -> tuple[float, float]:
        """Wilson's, 95 %, for independent steps."""
        return wilson(self.share, self.steps, 1.96)


def by_horizon(chains: Sequence[Chain]) -> list[Rate]:
    """A rate a horizon, whose `low` it is."""
    values = np.concatenate([chain.horizon for chain in chains]) if chains else np.zeros(0, int)
    return _rates(chains, values, [(h, h + 1) for h in horizons_of(chains)])


def by_step(chains: Sequence[Chain], bins: int = 20) -> list[Rate]:
    """By the number of the step among those of its horizon, from 0."""
    numbers = [np.arange(len(chain.at(h))) for chain in chains for h in np.unique(chain.horizon)]  # in their order
    return _rates(chains, *_binned(np.concatenate([np.zeros(0), *numbers]), bins))


def by_position(chains: Sequence[Chain], bins: int = 12) -> list[Rate]:
    """By the token where the proposal left the answer; steps that kept every token are not among them."""
    return _rates(chains, *_binned(np.concatenate([np.zeros(0), *(chain.left for chain in chains)]), bins))


def _binned(values: np.ndarray, bins: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    values = values.astype(np.int64)
    width = max(1, -(-(int(values.max(initial=-1)) + 1) // bins))
    return values, [(low, low + width) for low in range(0, int(values.max(initial=-1)) + 1, width)]


def _rates(chains: Sequence[Chain], values: np.ndarray, bins: list[tuple[int, int]]) -> list[Rate]:
    """Empty bins are left out. values: of the steps of all chains, one after the other."""
    outcomes = np.array(list("".join(chain.outcome for chain in chains)))
    found = []
    for low, high in bins:
        of_bin = outcomes[(values >= low) & (values < high)]
        if len(of_bin):
            found.append(Rate(low, high, *(int((of_bin == outcome).sum()) for outcome in "AUR")))
    return found
