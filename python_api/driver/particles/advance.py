"""What follows each position: prefixes grow, sweeps end and begin, and keys and values follow (DESIGN 3.9).

Plain tensor operations on all slots at once, which look at nothing on the host: on a CUDA device they are part of a
recorded step. The law itself is in `power_kernels.branch_particles` and `select_candidate`.
"""

from __future__ import annotations

import math

import torch

import power_kernels as pk
from power_kernels.api.driver.particles.state import GroupField, ParticleState
from power_kernels.law import ParticleLaw, SweepCut
from power_kernels.particles import Tally
from power_kernels.state import Mode, Status


def advance(
    state: ParticleState, law: ParticleLaw, branched: pk.BranchOutput, stop_next: torch.Tensor | None, alpha: float
) -> None:
    """Take one position's rows into the state, and lay out the next step and the copies that come before it."""
    field = state.field
    running = field[:, GroupField.MODE] == Mode.PROPOSE
    bad = running & (branched.status != Status.OK).any(1)
    running = running & ~bad
    position = field[:, GroupField.POSITION].clone()
    keeps = running & (branched.candidate[:, 0] >= 0)
    _keep(state, branched, position, keeps)
    _grow(state, branched, position, stop_next)
    copied = _copies(state, branched, position, running, keeps)
    ended = running & (branched.parent < 0).all(1)
    _end_sweep(state, branched, ended, stop_next)
    _next_step(state, law, branched, running, ended, position, alpha)
    field[:, GroupField.MODE] = torch.where(bad, int(Mode.FAULT), field[:, GroupField.MODE])
    field[:, GroupField.FAULT] = torch.where(bad, branched.status.amax(1).long(), field[:, GroupField.FAULT])
    _lay_out(state, law, copied)


def _at(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tensor[g, index[g]] of each slot g."""
    return tensor[torch.arange(tensor.shape[0], device=tensor.device), index]


def _put(tensor: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> None:
    """tensor[g, ..., index[g]] = value[g] along the last dimension; value: one dimension less."""
    at = index.view(-1, *[1] * (tensor.dim() - 1)).expand(*tensor.shape[:-1], 1)
    tensor.scatter_(-1, at, value.to(tensor.dtype)[..., None])


def _choose(chosen: torch.Tensor, value: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """`value` of the slots that are chosen; bool [G]."""
    return torch.where(chosen.view(-1, *[1] * (value.dim() - 1)), value, otherwise)


def _keep(state: ParticleState, branched: pk.BranchOutput, position: torch.Tensor, keeps: torch.Tensor) -> None:
    """The closing child that was drawn takes the place of the candidate that was kept before."""
    field = state.field
    parent, token = branched.candidate[:, 0].clamp(min=0), branched.candidate[:, 1]
    kept = 1 - field[:, GroupField.ANSWER_ROW]
    for name, prefix, value in (("answer", state.token, token), ("answer_logp", state.logp, branched.candidate_logp)):
        row = _at(prefix, parent).clone()
        _put(row, position, value)
        _store(getattr(state, name), kept, row, keeps)
    if state.answer_stop.shape[2]:
        _store(state.answer_stop, kept, _at(state.stop_state, parent), keeps)
    field[:, GroupField.KEPT_LENGTH] = torch.where(keeps, position + 1, field[:, GroupField.KEPT_LENGTH])
    field[:, GroupField.CANDIDATES] += keeps


def _store(tensor: torch.Tensor, row: torch.Tensor, value: torch.Tensor, chosen: torch.Tensor) -> None:
    """tensor[g, row[g]] = value[g] of the slots that are chosen."""
    tensor[torch.arange(len(row), device=row.device), row] = _choose(chosen, value, _at(tensor, row))


def _grow(
    state: ParticleState, branched: pk.BranchOutput, position: torch.Tensor, stop_next: torch.Tensor | None
) -> None:
    """Each row holds its parent's prefix and its own token. What empty rows hold says nothing."""
    parent = branched.parent.clamp(min=0).long()
    for tensor, value in ((state.token, branched.token.clamp(min=0)), (state.logp, branched.logp)):
        of = parent[:, :, None].expand_as(tensor)
        tensor.copy_(tensor.gather(1, of))
        _put(tensor, position, value)
    if stop_next is not None:
        of = parent[:, :, None].expand_as(state.stop_state)
        states = state.stop_state.gather(1, of)
        before = states.gather(2, position[:, None, None].expand(*parent.shape, 1))[..., 0]
        after = stop_next[before.long().clamp(min=0), branched.token.clamp(min=0)]
        state.stop_state.copy_(states)
        _put(state.stop_state, position + 1, after.clamp(min=0))


def _copies(
    state: ParticleState, branched: pk.BranchOutput, position: torch.Tensor, running: torch.Tensor, keeps: torch.Tensor
) -> torch.Tensor:
    """What of keys and values is copied where: to each row from the one that its particle came from, as far as the two
    are not the same already. Returns the positions that the rows of each slot hold now, int64 [G].
    """
    field, same = state.field, state.same
    groups, n, device = state.groups, state.particles, field.device
    slot = torch.arange(groups, device=device)
    answer_row, kept_row = n + field[:, GroupField.ANSWER_ROW], n + 1 - field[:, GroupField.ANSWER_ROW]
    held = field[:, GroupField.BASE] + position

    def place(row: torch.Tensor, answer_row: torch.Tensor) -> torch.Tensor:
        """Of a particle's row: the reference's keys and values lie in the answer's."""
        return torch.where(row < n, row, answer_row)

    own = torch.arange(n + 2, device=device).repeat(groups, 1)
    source = own.clone()
    parent = branched.parent[:, :n].long()
    taken = running[:, None] & (parent >= 0)
    source[:, :n] = torch.where(taken, place(parent, answer_row[:, None]), own[:, :n])
    candidate = place(branched.candidate[:, 0].clamp(min=0), answer_row)
    _store(source, kept_row, candidate, keeps)
    copies = source != own
    start = same.gather(2, source[:, :, None])[..., 0].long()
    stop = torch.where(copies, held[:, None], 0)

    def ranges(to, of, start, stop, wanted) -> torch.Tensor:
        zero = torch.zeros_like(to)
        return torch.stack([torch.where(wanted, v, zero) for v in (to, of, start, stop)], -1).to(torch.int32)

    lane = slot[:, None] * n
    to_lane, of_row = lane + own[:, :n], source[:, :n]
    first, end, forks = start[:, :n], stop[:, :n], copies[:, :n]
    state.fork_from_lane.copy_(ranges(to_lane, lane + of_row, first, end, forks & (of_row < n)))
    chain_row = 2 * slot[:, None] + of_row - n
    state.fork_from_answer.copy_(ranges(to_lane, chain_row, first, end, forks & (of_row >= n)))
    to_kept, first = 2 * slot + kept_row - n, _at(start, kept_row)
    kept_stop = torch.where(keeps, held, 0)
    state.keep_from_lane.copy_(ranges(to_kept, slot * n + candidate, first, kept_stop, keeps & (candidate < n)))
    state.keep_from_answer.copy_(ranges(to_kept, 2 * slot + candidate - n, first, kept_stop, keeps & (candidate >= n)))

    field[:, GroupField.FORKS] += copies.sum(1)
    field[:, GroupField.COPIED] += torch.where(copies, stop - start, 0).clamp(min=0).sum(1)
    wide = source[:, :, None].expand_as(same)
    after = same.gather(1, wide).gather(2, source[:, None, :].expand_as(same))
    equal = (source[:, :, None] == source[:, None, :]) & ~torch.eye(n + 2, dtype=torch.bool, device=device)
    held32 = held.to(torch.int32)[:, None, None]
    after = torch.where(equal, held32, after)
    after = torch.where(copies[:, :, None] | copies[:, None, :], torch.minimum(after, held32), after)
    same.copy_(after)
    return held


def _end_sweep(
    state: ParticleState, branched: pk.BranchOutput, ended: torch.Tensor, stop_next: torch.Tensor | None
) -> None:
    """Where no particle is open any more: the kept candidate may become the answer."""
    field = state.field
    sweep = field[:, GroupField.SWEEP]
    taken = torch.empty_like(ended)
    pk.ops.select_candidate_out(branched.tally, _at(state.sweep_uniforms, sweep)[:, 1].contiguous(), taken)
    moved = ended & taken
    answer_row = field[:, GroupField.ANSWER_ROW]
    before, after = _at(state.answer, answer_row), _at(state.answer, 1 - answer_row)
    length, kept_length = field[:, GroupField.LENGTH], field[:, GroupField.KEPT_LENGTH]
    place = torch.arange(before.shape[1], device=before.device)
    equal = (before == after) & (place < torch.minimum(length, kept_length)[:, None])
    common = equal.to(torch.int32).cumprod(1).sum(1)
    differs = moved & ~((common == length) & (common == kept_length))
    field[:, GroupField.ANSWER_ROW] = torch.where(moved, 1 - answer_row, answer_row)
    length = torch.where(moved, kept_length, length)
    field[:, GroupField.LENGTH] = length
    logp = _at(state.answer_logp, field[:, GroupField.ANSWER_ROW])
    total = torch.where(place < length[:, None], logp, 0.0).sum(1)
    for tensor, value in (
        (state.log_total, branched.tally[:, Tally.MASS]),
        (state.left, torch.where(differs, common, -1)),
        (state.sweep_logp, total),
        (state.sweep_length, length),
    ):
        value = torch.where(ended, value.to(tensor.dtype), _at(tensor, sweep))
        _put(tensor, sweep, value)


def _next_step(
    state: ParticleState,
    law: ParticleLaw,
    branched: pk.BranchOutput,
    running: torch.Tensor,
    ended: torch.Tensor,
    position: torch.Tensor,
    alpha: float,
) -> None:
    """The rows of the next position: those that were drawn, or those of the next sweep's beginning."""
    field = state.field
    sweep = field[:, GroupField.SWEEP] + ended
    done = ended & (sweep > law.sweeps)
    begins = ended & ~done
    sweep = sweep.clamp(max=law.sweeps)
    field[:, GroupField.SWEEP] = torch.where(begins, sweep, field[:, GroupField.SWEEP])
    field[:, GroupField.MODE] = torch.where(done, int(Mode.DONE), field[:, GroupField.MODE])
    length, answer_row = field[:, GroupField.LENGTH], field[:, GroupField.ANSWER_ROW]
    cut = torch.zeros_like(length)
    if law.cut is SweepCut.UNIFORM:
        u = _at(state.sweep_uniforms, sweep)[:, 0]
        cut = torch.minimum((u * length).long(), length - 1).clamp(min=0)
    _put(state.cut, sweep, torch.where(begins, cut.to(torch.int32), _at(state.cut, sweep)))
    after = torch.where(ended, cut, position + 1)
    field[:, GroupField.POSITION] = torch.where(running & ~done, after, field[:, GroupField.POSITION])
    # A sweep begins with one particle, the part of the answer before the cut, in the reference's row.
    answer, logp = _at(state.answer, answer_row), _at(state.answer_logp, answer_row)
    before = torch.arange(answer.shape[1], device=answer.device) < cut[:, None]
    weight = alpha * torch.where(before, logp, 0.0).sum(1) + law.length_bonus * cut
    fresh = torch.full_like(branched.log_weight, -math.inf)
    fresh[:, -1] = weight
    state.log_weight.copy_(_choose(running, _choose(begins, fresh, branched.log_weight), state.log_weight))
    state.log_weight.masked_fill_((done | ~running)[:, None], -math.inf)
    identity = torch.arange(branched.order.shape[1], dtype=torch.int32, device=field.device).expand_as(branched.order)
    state.order.copy_(_choose(begins, identity, branched.order))
    for tensor, value in (
        (state.token, answer),
        (state.logp, logp),
        (state.stop_state, _at(state.answer_stop, answer_row)),
    ):
        tensor[:, -1] = _choose(begins, value, tensor[:, -1])
    state.tally.copy_(_choose(begins, torch.full_like(branched.tally, -math.inf), branched.tally))
    field[:, GroupField.KEPT_LENGTH] = torch.where(begins, 0, field[:, GroupField.KEPT_LENGTH])


def _lay_out(state: ParticleState, law: ParticleLaw, held: torch.Tensor) -> None:
    """What the next step feeds, and what `branch_particles` is asked. held: positions that the rows held before it."""
    field, n = state.field, state.particles
    running = field[:, GroupField.MODE] == Mode.PROPOSE
    position, sweep, length = (field[:, c] for c in (GroupField.POSITION, GroupField.SWEEP, GroupField.LENGTH))
    particle = running[:, None] & (state.log_weight > -math.inf)
    state.live.copy_(particle[:, :n])
    fed = state.live.sum(1)
    field[:, GroupField.FED] += fed
    _put(state.sweep_fed, sweep, _at(state.sweep_fed, sweep) + fed)
    newest = (position - 1).clamp(min=0)[:, None, None].expand(-1, n, 1)
    state.input_id.copy_(torch.where(state.live, state.token[:, :n].gather(2, newest)[..., 0].long(), 0))
    place = (field[:, GroupField.BASE] + position - 1).clamp(min=0)
    state.position.copy_(torch.where(running, place, 0)[:, None].expand(-1, n))
    # Lanes are written there, those without a particle too: beyond it they hold what no other row holds.
    most = torch.minimum(held, place).to(torch.int32)[:, None, None]
    lane = torch.arange(n + 2, device=field.device) < n
    state.same.copy_(torch.where(lane[:, None] | lane[None], torch.minimum(state.same, most), state.same))
    at = position.clamp(max=law.max_new_tokens - 1)
    token = _at(state.answer, field[:, GroupField.ANSWER_ROW]).gather(1, at[:, None])[:, 0].long()
    state.reference.copy_(torch.where(particle[:, -1] & (position < length), token, -1))
    state.last.copy_(position + 1 >= law.max_new_tokens)
    if law.cut is SweepCut.UNIFORM:
        state.closing_bonus.copy_(torch.where(sweep > 0, -(at + 1).double().log(), 0.0))
    uniforms = _at(state.uniforms, sweep)
    state.uniform.copy_(uniforms.gather(1, at[:, None, None].expand(-1, 1, 2))[:, 0])
