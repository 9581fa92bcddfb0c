"""Plain sequential Monte Carlo, an opponent of the particles, on the driver's own rows and forks.

N particles, which need not be distinct. Each draws its next token from p^alpha e^lambda normalised over that token, and
the normaliser goes to its weight; before that, where the effective number of open particles, (sum w)^2 / sum w^2, is
below N/2, N of them are drawn anew, systematically, and weigh the same. Answers that close leave with their weight and
take no row any more. The answer is drawn in proportion to the weights at the end.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from selection import Candidates

from power_kernels import BranchOutput
from power_kernels.api.driver.particles.run import ParticleRun
from power_kernels.api.driver.particles.state import GroupField, ParticleState
from power_kernels.particles import Tally
from power_kernels.state import Status


def smc(run: ParticleRun, state: ParticleState, logits: torch.Tensor, candidates: Candidates) -> BranchOutput:
    """One position, in the place of `ParticleRun.branch` (`selection.watched`). Sweeps have no meaning here."""
    field = state.field[0].tolist()
    position, n = field[GroupField.POSITION], run.law.particles
    seed = [run.seed, field[GroupField.PROMPT_ID], field[GroupField.CHAIN_ID], position]
    random = np.random.default_rng(seed)
    live = (state.log_weight[0] > -math.inf).nonzero()[:, 0]
    logp = logits[live].double().log_softmax(-1)
    proposal = float(run.alpha[0]) * logp + run.law.length_bonus
    weight = (state.log_weight[0, live] + proposal.logsumexp(-1)).numpy()
    parent, weight = resampled(weight, n, random, always=position == 0)
    token = drawn(proposal, parent, random)
    token_logp = logp[torch.from_numpy(parent), torch.from_numpy(token)].numpy()
    closed = np.isin(token, run.eos.numpy()) | bool(state.last[0])
    lane = live.numpy()[parent]

    out = empty(state)
    keep(out, lane[closed], token[closed], token_logp[closed], weight[closed], random.random())
    answer = state.logp[0, lane[closed], :position].sum(-1) + torch.from_numpy(token_logp[closed])
    candidates.add(torch.from_numpy(weight[closed]), answer, position + 1)
    row = torch.from_numpy(placed(lane[~closed], n))
    for tensor, value in (
        (out.parent, lane), (out.token, token), (out.log_weight, weight), (out.logp, token_logp),
    ):  # fmt: skip
        tensor[0, row] = torch.from_numpy(value[~closed]).to(tensor.dtype)
    return out


def resampled(weight: np.ndarray, n: int, random, *, always: bool) -> tuple[np.ndarray, np.ndarray]:
    """(ancestor, log weight) of the particles after it; the same ones where their effective number is enough.

    weight: log, of the open ones. always: as at the first position, where N particles are one empty answer.
    """
    mass = np.exp(weight - weight.max())
    if not always and mass.sum() ** 2 >= n / 2 * (mass**2).sum():
        return np.arange(len(weight)), weight
    cdf = np.cumsum(mass)
    at = (random.random() + np.arange(n)) / n * cdf[-1]
    ancestor = np.minimum(np.searchsorted(cdf, at, side="right"), len(weight) - 1)
    return ancestor, np.full(n, weight.max() + math.log(cdf[-1] / n))


def drawn(proposal: torch.Tensor, parent: np.ndarray, random) -> np.ndarray:
    """A token of each child, in proportion to exp of its parent's row of `proposal` [L, V]."""
    cdf = (proposal - proposal.amax(1, keepdim=True)).exp().cumsum(1).numpy()
    uniform = random.random(len(parent))
    tokens = [np.searchsorted(cdf[p], u * cdf[p, -1], side="right") for p, u in zip(parent, uniform, strict=True)]
    return np.minimum(np.array(tokens, dtype=np.int64), proposal.shape[1] - 1)


def placed(lane: np.ndarray, n: int) -> np.ndarray:
    """The row of each child: the first of a particle in its parent's, so that no row that is copied from is written,
    the others where no particle has a child. lane: of each child's parent."""
    row = np.full(len(lane), -1)
    taken: set[int] = set()
    for child, of in enumerate(lane.tolist()):
        if of not in taken:
            taken.add(of)
            row[child] = of
    free = [i for i in range(n) if i not in taken]
    waiting = np.flatnonzero(row < 0)
    row[waiting] = free[: len(waiting)]
    return row


def empty(state: ParticleState) -> BranchOutput:
    """No children, no new candidate."""
    log_weight = torch.full_like(state.log_weight, -math.inf)
    nothing = torch.full_like(state.order, -1)
    return BranchOutput(
        parent=nothing, token=nothing.long(), log_weight=log_weight, logp=torch.full_like(log_weight, math.nan),
        order=torch.arange(nothing.shape[1], dtype=torch.int32)[None], candidate=torch.full((1, 2), -1),
        candidate_logp=log_weight.new_full((1,), math.nan), tally=state.tally.clone(),
        log_threshold=log_weight.new_full((1,), -math.inf), status=torch.full_like(nothing, int(Status.OK)),
    )  # fmt: skip


def keep(out: BranchOutput, lane, token, logp, weight, u: float) -> None:
    """Add the answers that close here to the tally, and draw whether one of them is kept from now on: a reservoir."""
    if not len(weight):
        return
    tally = out.tally[0]
    mass = np.exp(weight - weight.max())
    before, fresh = float(tally[Tally.OTHERS]), float(weight.max() + math.log(mass.sum()))
    tally[Tally.OTHERS] = tally[Tally.MASS] = together = float(np.logaddexp(before, fresh))
    old = math.exp(before - together)
    if u < old:
        return
    cdf = np.cumsum(mass)
    k = min(int(np.searchsorted(cdf, (u - old) / (1 - old) * cdf[-1], side="right")), len(mass) - 1)
    tally[Tally.KEPT] = float(weight[k])
    out.candidate[0], out.candidate_logp[0] = torch.tensor([lane[k], token[k]]), float(logp[k])
