"""The chain on the device: `mh_accept` and `mh_advance` (DESIGN sections 3, 5.4, 5.5).

mh_accept:   W = sum of the first n weights (float64, one by one in position order)     F = W - log n
             accept = not F' < F + log u                                                log_ratio = F' - F
Shapes: weights f32 [B, T], [B, T'], everything else [B]. Bytes: 4 B (n + n').

mh_advance:  one decode step of the whole law for every lane, one program a chain. The lanes of a chain are vectors of
P_PAD entries, so that every column of the state is a register; a scalar is taken from a lane by a masked sum. Positions
are walked and copied in blocks. What each step does, field by field, is `reference.mh_advance`.
Shapes: `state.ChainState`. Bytes: about 200 a lane, plus 16 a token walked and 32 a token committed; under a divergence
cut 8 a token searched and 48 a token committed; with stop strings 2 a lane and 4 a token committed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import rng as contract
from ..errors import ArgumentError
from ..law import Cut
from ..state import (
    CHAIN_FIELDS,
    LANE_FIELDS,
    MAX_LANES,
    ChainField,
    ChainState,
    Cost,
    LaneField,
    LaneStatus,
    Mode,
    Outcome,
    Status,
)
from . import Configuration, launch, split
from .rng import uniforms
from .sampling import seed_stride, take

_INF = tl.constexpr(float("inf"))
_UNDEFINED = tl.constexpr(float("nan"))
_FAR = tl.constexpr(0x7FFFFFFF)

_OK = tl.constexpr(int(Status.OK))
_NAN = tl.constexpr(int(Status.NAN))
_POS_INF = tl.constexpr(int(Status.POS_INF))
_BAD_TOKEN = tl.constexpr(int(Status.BAD_TOKEN))
_BAD_LENGTH = tl.constexpr(int(Status.BAD_LENGTH))
_PENDING = tl.constexpr(int(Status.PENDING))


# ---------------------------------------------------------------------------------------------------------------
# mh_accept

# One row a thread, one warp a program: the additions of a row are a chain, only rows run side by side.
ACCEPT = {"ROWS": 32, "UNROLL": 8, "num_warps": 1}


@triton.jit
def _running_sum(weights, length, UNROLL: tl.constexpr):
    """W of each row in position order, and whether a used weight is NaN or +inf. weights: pointers [ROWS]."""
    total = tl.zeros_like(length).to(tl.float64)
    has_nan = length != length
    has_inf = length != length
    longest = tl.max(length, 0)
    for start in range(0, longest, UNROLL):
        for i in tl.static_range(UNROLL):
            used = start + i < length
            # Past the end 0.0 is added, which changes no bit: the sum is never -0.0.
            w = tl.load(weights + (start + i), mask=used, other=0.0)
            has_nan = has_nan | (w != w)
            has_inf = has_inf | (w == _INF)
            total += w.to(tl.float64)
    return total, has_nan, has_inf


_ACCEPT_POINTERS = {
    "weights_cur_ptr": "*fp32",
    "weights_prop_ptr": "*fp32",
    "len_cur_ptr": "*i32",
    "len_prop_ptr": "*i32",
    "log_u_ptr": "*fp64",
    "accept_ptr": "*u1",
    "log_ratio_ptr": "*fp64",
    "status_ptr": "*i32",
}
_ACCEPT_INTEGERS = {
    "rows": "i32", "longest_cur": "i32", "longest_prop": "i32", "stride_cur": "i64", "stride_prop": "i64",
}  # fmt: skip


@triton.jit(do_not_specialize=list(_ACCEPT_INTEGERS), do_not_specialize_on_alignment=list(_ACCEPT_POINTERS))
def _mh_accept_kernel(
    weights_cur_ptr,  # [B, T] fp32, row stride stride_cur
    weights_prop_ptr,  # [B, T'] fp32, row stride stride_prop
    len_cur_ptr,  # [B] i32
    len_prop_ptr,  # [B] i32
    log_u_ptr,  # [B] fp64
    accept_ptr,  # [B] bool
    log_ratio_ptr,  # [B] fp64
    status_ptr,  # [B] i32
    rows,
    longest_cur,
    longest_prop,
    stride_cur: tl.int64,
    stride_prop: tl.int64,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """ROWS rows, a thread each."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    n_cur = tl.load(len_cur_ptr + row, mask=live, other=0)
    n_prop = tl.load(len_prop_ptr + row, mask=live, other=0)
    log_u = tl.load(log_u_ptr + row, mask=live, other=0.0)
    fits = (n_cur >= 1) & (n_cur <= longest_cur) & (n_prop >= 1) & (n_prop <= longest_prop)
    n_cur = tl.where(fits, n_cur, 0)
    n_prop = tl.where(fits, n_prop, 0)
    wide = row.to(tl.int64)
    w_cur, nan_cur, inf_cur = _running_sum(weights_cur_ptr + wide * stride_cur, n_cur, UNROLL)
    w_prop, nan_prop, inf_prop = _running_sum(weights_prop_ptr + wide * stride_prop, n_prop, UNROLL)
    f_cur = w_cur - tl.log(tl.maximum(n_cur, 1).to(tl.float64))
    f_prop = w_prop - tl.log(tl.maximum(n_prop, 1).to(tl.float64))
    ratio = f_prop - f_cur
    # -inf against -inf: neither answer can occur
    status = tl.where(ratio != ratio, _NAN, _OK)
    status = tl.where(inf_cur | inf_prop | (log_u == _INF), _POS_INF, status)
    status = tl.where(nan_cur | nan_prop | (log_u != log_u), _NAN, status)
    status = tl.where(fits, status, _BAD_LENGTH)
    ok = status == _OK
    rejected = f_prop < f_cur + log_u
    tl.store(accept_ptr + row, ok & (rejected == 0), mask=live)
    tl.store(log_ratio_ptr + row, tl.where(ok, ratio, _UNDEFINED), mask=live)
    tl.store(status_ptr + row, status, mask=live)


def mh_accept_out(
    weights_cur: torch.Tensor,
    weights_prop: torch.Tensor,
    len_cur: torch.Tensor,
    len_prop: torch.Tensor,
    log_u: torch.Tensor,
    accept: torch.Tensor,
    log_ratio: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """`mh_accept` into preallocated tensors: one launch, no synchronisation, no allocation.

    weights f32 [B, T] and [B, T'] (unit inner stride); lengths i32 [B]; log_u, log_ratio f64 [B] (nats); accept bool
    [B]; status i32 [B].
    """
    rows = log_u.shape[0]
    launch(
        _mh_accept_kernel,
        (triton.cdiv(rows, ACCEPT["ROWS"]),),
        log_u.device,
        weights_cur,
        weights_prop,
        len_cur,
        len_prop,
        log_u,
        accept,
        log_ratio,
        status,
        rows,
        weights_cur.shape[1],
        weights_prop.shape[1],
        weights_cur.stride(0),
        weights_prop.stride(0),
        **ACCEPT,
    )


# ---------------------------------------------------------------------------------------------------------------
# mh_advance

# 4 warps: a block of positions is one a thread. Barriers order what one thread writes and another reads. Every thread
# reads the chain's scalars and one writes them back: so all that a program counts on (the fields, the costs, what each
# step has forwarded) is read before the first barrier and written after it.
ADVANCE = {"BLOCK": 128, "num_warps": 4}
# ptxas would rather spill than give up a step of occupancy, of which one program a chain has no use. NVIDIA only.
REGISTERS = 128

_MODE = tl.constexpr(int(ChainField.MODE))
_LENGTH = tl.constexpr(int(ChainField.LENGTH))
_OPENED = tl.constexpr(int(ChainField.OPENED))
_LAST = tl.constexpr(int(ChainField.LAST))
_HORIZON = tl.constexpr(int(ChainField.HORIZON))
_STAGE = tl.constexpr(int(ChainField.STAGE))
_FINAL = tl.constexpr(int(ChainField.FINAL))
_BASE = tl.constexpr(int(ChainField.BASE))
_CHAIN_ID = tl.constexpr(int(ChainField.CHAIN_ID))
_PROMPT_ID = tl.constexpr(int(ChainField.PROMPT_ID))
_FAULT = tl.constexpr(int(ChainField.FAULT))
_CLOSED = tl.constexpr(int(ChainField.CLOSED))
_PROMPT_TOKEN = tl.constexpr(int(ChainField.PROMPT_TOKEN))
CHAIN_PITCH = tl.constexpr(CHAIN_FIELDS)

_LANE_STATUS = tl.constexpr(int(LaneField.STATUS))
_LANE_SERIAL = tl.constexpr(int(LaneField.SERIAL))
_LANE_DIVERGENCE = tl.constexpr(int(LaneField.DIVERGENCE))
_LANE_POSITION = tl.constexpr(int(LaneField.POSITION))
_LANE_VALID = tl.constexpr(int(LaneField.VALID))
_LANE_EXCLUDE = tl.constexpr(int(LaneField.EXCLUDE))
_LANE_FAULT = tl.constexpr(int(LaneField.FAULT))
_LANE_EPOCH = tl.constexpr(int(LaneField.EPOCH))
LANE_PITCH = tl.constexpr(LANE_FIELDS)

_START = tl.constexpr(int(Mode.START))
_EXTEND = tl.constexpr(int(Mode.EXTEND))
_PROPOSE = tl.constexpr(int(Mode.PROPOSE))
_DONE = tl.constexpr(int(Mode.DONE))
_FAULTED_CHAIN = tl.constexpr(int(Mode.FAULT))

_IDLE = tl.constexpr(int(LaneStatus.IDLE))
_RUNNING = tl.constexpr(int(LaneStatus.RUNNING))
_CLOSED_LANE = tl.constexpr(int(LaneStatus.CLOSED))
_FAULTED_LANE = tl.constexpr(int(LaneStatus.FAULTED))

_REJECTED = tl.constexpr(int(Outcome.REJECTED))
_UNCHANGED = tl.constexpr(int(Outcome.UNCHANGED))
_ACCEPTED = tl.constexpr(int(Outcome.ACCEPTED))

_UNIFORM = tl.constexpr(int(Cut.UNIFORM))
_DIVERGENCE_ENTROPY = tl.constexpr(int(Cut.DIVERGENCE_ENTROPY))

_COST_EXTENSION = tl.constexpr(int(Cost.EXTENSION))
_COST_PROPOSAL = tl.constexpr(int(Cost.PROPOSAL))
_COST_PREFIX = tl.constexpr(int(Cost.SAVED_PREFIX))
_COST_EARLY = tl.constexpr(int(Cost.SAVED_EARLY))

_STREAM_BITS = tl.constexpr(contract.STREAM_BITS)
_STREAM_POSITION = tl.constexpr(contract.STREAM_POSITION)
_STREAM_STEP = tl.constexpr(contract.STREAM_STEP)


# What the sections of `_mh_advance_kernel` hand to each other. Entries are scalars unless something else is said.


class _Law(NamedTuple):
    """`law.Law`."""

    max_new_tokens: tl.tensor
    block_size: tl.tensor
    mcmc_steps: tl.tensor
    final_steps: tl.tensor
    early_rejection: tl.tensor
    free_prefix: tl.tensor
    karan_du: tl.tensor
    stops: tl.tensor
    cut: tl.tensor


class _Ends(NamedTuple):
    """What ends an answer: a pointer to tokens, and how many they are; a pointer to the stop automaton's next states,
    [states, vocabulary]."""

    token: tl.tensor
    many: tl.tensor
    stop_next: tl.tensor
    vocabulary: tl.tensor


class _Draws(NamedTuple):
    """What all random numbers of a chain have in common (DESIGN section 4)."""

    seed: tl.tensor
    chain_id: tl.tensor
    prompt_word: tl.tensor


class _Chain(NamedTuple):
    """The fields of a chain that a step may change (`ChainField`)."""

    mode: tl.tensor
    length: tl.tensor
    opened: tl.tensor
    last: tl.tensor
    horizon: tl.tensor
    stage: tl.tensor
    final: tl.tensor
    closed: tl.tensor
    fault: tl.tensor


class _Answer(NamedTuple):
    """Pointers to the rows of a chain: [width] by position, [serials] by serial."""

    token: tl.tensor
    logq: tl.tensor
    cumw: tl.tensor
    cumz: tl.tensor
    stop_state: tl.tensor
    outcome: tl.tensor
    left: tl.tensor
    forwarded: tl.tensor
    step_weight: tl.tensor
    step_logq: tl.tensor


class _Places(NamedTuple):
    """[P_PAD]: which lane of its chain, whether there is such a lane, which lane of the state."""

    place: tl.tensor
    live: tl.tensor
    lane: tl.tensor


class _Lanes(NamedTuple):
    """[P_PAD]: the fields of a chain's lanes (`LaneField`), and the KV that each needs from its chain."""

    status: tl.tensor
    serial: tl.tensor
    div: tl.tensor
    pos: tl.tensor
    valid: tl.tensor
    exclude: tl.tensor
    fault: tl.tensor
    epoch: tl.tensor
    open_start: tl.tensor
    open_stop: tl.tensor


class _LaneRows(NamedTuple):
    """Pointers to the rows [lanes, width] of a chain's lanes and to theta [lanes]; width of a row."""

    token: tl.tensor
    logq: tl.tensor
    cumw: tl.tensor
    cumz: tl.tensor
    stop_state: tl.tensor
    theta: tl.tensor
    width: tl.tensor


class _Sample(NamedTuple):
    """[P_PAD]: what was sampled for each lane."""

    status: tl.tensor
    token: tl.tensor
    logq: tl.tensor
    weight: tl.tensor
    entropy: tl.tensor


@triton.jit
def leave_probability(x):
    """1 - exp(x) of float64 x = log q, by Kahan's formula (`reference.leave_probability`)."""
    e = tl.exp(x)
    ends = (e == 1.0) | (e == 0.0)
    inner = (1.0 - e) * x / tl.where(ends, 1.0, tl.log(tl.where(ends, 0.5, e)))
    return tl.where(x >= 0.0, 0.0, tl.where(e == 1.0, -x, tl.where(e == 0.0, 1.0, inner)))


@triton.jit
def _walk(logq_ptr, draws, serial, start, length, BLOCK: tl.constexpr):
    """The first position of [start, length) where the proposal leaves the current answer (3.4), or length."""
    found = length
    block = start
    while (block < length) & (found == length):
        t = block + tl.arange(0, BLOCK)
        inside = t < length
        logq = tl.load(logq_ptr + t, mask=inside, other=0.0).to(tl.float64)
        _token_uniform, keep = uniforms(draws.seed, t, serial, draws.chain_id, draws.prompt_word | _STREAM_POSITION)
        leaves = inside & (keep < leave_probability(logq))
        found = tl.min(tl.where(leaves, t, length), 0)
        block += BLOCK
    return found


@triton.jit
def _cut_at(cumz_ptr, limit, length, BLOCK: tl.constexpr):
    """The first d of [0, length) with cumz[d + 1] > limit (3.6), or length."""
    found = length
    block = tl.zeros_like(length)
    while (block < length) & (found == length):
        t = block + tl.arange(0, BLOCK)
        inside = t < length
        sums = tl.load(cumz_ptr + t + 1, mask=inside, other=0.0)
        found = tl.min(tl.where(inside & (sums > limit), t, length), 0)
        block += BLOCK
    return found


@triton.jit
def _log_z(z):
    """log z of float64 z >= 0."""
    return tl.where(z > 0.0, tl.log(tl.where(z > 0.0, z, 1.0)), -_INF)


@triton.jit
def _fixed_point_sum(logq_ptr, length, BLOCK: tl.constexpr):
    """The sum of a row of logq in whole units of 2^-32 nats, so that no order of summation shows."""
    total = tl.zeros_like(length).to(tl.int64)
    for block in range(0, length, BLOCK):
        t = block + tl.arange(0, BLOCK)
        logq = tl.load(logq_ptr + t, mask=t < length, other=0.0).to(tl.float64)
        total += tl.sum((tl.maximum(logq, -65536.0) * 4294967296.0).to(tl.int64), 0)
    return total.to(tl.float64) / 4294967296.0


@triton.jit
def _is_eos(token, ends):
    """Which of a vector of tokens end an answer."""
    hit = token != token
    for i in range(ends.many):
        hit = hit | (token == tl.load(ends.token + i))
    return hit


# ---- 0. the fields


@triton.jit
def _load_chain(field):
    return _Chain(
        mode=tl.load(field + _MODE),
        length=tl.load(field + _LENGTH),
        opened=tl.load(field + _OPENED),
        last=tl.load(field + _LAST),
        horizon=tl.load(field + _HORIZON),
        stage=tl.load(field + _STAGE),
        final=tl.load(field + _FINAL),
        closed=tl.load(field + _CLOSED),
        fault=tl.load(field + _FAULT),
    )


@triton.jit
def _store_chain(field, chain):
    tl.store(field + _MODE, chain.mode)
    tl.store(field + _LENGTH, chain.length)
    tl.store(field + _OPENED, chain.opened)
    tl.store(field + _LAST, chain.last)
    tl.store(field + _HORIZON, chain.horizon)
    tl.store(field + _STAGE, chain.stage)
    tl.store(field + _FINAL, chain.final)
    tl.store(field + _CLOSED, chain.closed)
    tl.store(field + _FAULT, chain.fault)


@triton.jit
def _load_lanes(field, live):
    """field: pointers [P_PAD] to the lanes' fields. No KV is asked for yet."""
    return _Lanes(
        status=tl.load(field + _LANE_STATUS, mask=live, other=_IDLE),
        serial=tl.load(field + _LANE_SERIAL, mask=live, other=0),
        div=tl.load(field + _LANE_DIVERGENCE, mask=live, other=0),
        pos=tl.load(field + _LANE_POSITION, mask=live, other=0),
        valid=tl.load(field + _LANE_VALID, mask=live, other=0),
        exclude=tl.load(field + _LANE_EXCLUDE, mask=live, other=-1),
        fault=tl.load(field + _LANE_FAULT, mask=live, other=0),
        epoch=tl.load(field + _LANE_EPOCH, mask=live, other=0),
        open_start=live.to(tl.int32) * 0,
        open_stop=live.to(tl.int32) * 0,
    )


@triton.jit
def _store_lanes(field, lanes, live):
    tl.store(field + _LANE_STATUS, lanes.status, mask=live)
    tl.store(field + _LANE_SERIAL, lanes.serial, mask=live)
    tl.store(field + _LANE_DIVERGENCE, lanes.div, mask=live)
    tl.store(field + _LANE_POSITION, lanes.pos, mask=live)
    tl.store(field + _LANE_VALID, lanes.valid, mask=live)
    tl.store(field + _LANE_EXCLUDE, lanes.exclude, mask=live)
    tl.store(field + _LANE_FAULT, lanes.fault, mask=live)
    tl.store(field + _LANE_EPOCH, lanes.epoch, mask=live)


@triton.jit
def _started(lanes, here, serial, div, pos, exclude, base):
    """The lanes, of which `here` starts: it shares [0, div) with its chain and samples position `pos` next."""
    stop = base + pos - 1
    return _Lanes(
        status=tl.where(here, _RUNNING, lanes.status),
        serial=tl.where(here, serial, lanes.serial),
        div=tl.where(here, div, lanes.div),
        pos=tl.where(here, pos, lanes.pos),
        valid=tl.where(here, stop, lanes.valid),
        exclude=tl.where(here, exclude, lanes.exclude),
        fault=tl.where(here, 0, lanes.fault),
        epoch=tl.where(here, lanes.epoch + 1, lanes.epoch),
        open_start=tl.where(here, lanes.valid, lanes.open_start),
        open_stop=tl.where(here, tl.maximum(lanes.valid, stop), lanes.open_stop),
    )


@triton.jit
def _changed(lanes, status, valid):
    """The lanes with other STATUS and VALID."""
    return _Lanes(
        status=status,
        serial=lanes.serial,
        div=lanes.div,
        pos=lanes.pos,
        valid=valid,
        exclude=lanes.exclude,
        fault=lanes.fault,
        epoch=lanes.epoch,
        open_start=lanes.open_start,
        open_stop=lanes.open_stop,
    )


# ---- 1. receive


@triton.jit
def _receive(law, chain, lanes, at, answer, rows, sample, got, ends, base):
    """What was sampled for the lanes `got`: a fault, a place in a forwarded prefix, a kept token, or one to append.

    Returns the lanes, those with a new token, those whose token was kept and that walk on, the running sums of weights
    and of 1 - q of the proposals with their new token (the second is 0 under the uniform cut), and which of the new
    tokens end an answer.
    """
    extending = chain.mode == _EXTEND
    # up to the divergence the token that was fed is the chain's own
    valid = tl.where(got & (lanes.pos <= lanes.div), base + lanes.pos, lanes.valid)
    prefix = got & (lanes.pos < lanes.div)  # a forwarded prefix: what was sampled there is not used

    # numbers that would poison the chain, whoever made them
    weight, logq, h = sample.weight, sample.logq, sample.entropy
    undefined = (weight != weight) | (logq != logq) | (h != h)
    status = tl.where((sample.status == _OK) & undefined, _NAN, sample.status)
    status = tl.where((status == _OK) & ((weight == _INF) | (h == _INF)), _POS_INF, status)
    unknown = (law.stops > 0) & ((sample.token < 0) | (sample.token >= ends.vocabulary))
    status = tl.where((status == _OK) & unknown, _BAD_TOKEN, status)
    bad = got & (lanes.pos >= lanes.div) & (status != _OK)
    good = got & (lanes.pos >= lanes.div) & (status == _OK)

    again = good & (lanes.pos == lanes.div) & (extending == 0) & (sample.token == lanes.exclude)  # all else has no mass
    append = good & (again == 0)
    # A forwarded prefix that reaches the end of the answer was an unchanged step. So is one whose token was kept under
    # a divergence cut, which has no walk that could go on.
    kept = (prefix & (lanes.pos + 1 == chain.length)) | (again & (law.cut != _UNIFORM))
    again = again & (law.cut == _UNIFORM)
    tl.store(answer.outcome + lanes.serial, tl.zeros_like(lanes.serial).to(tl.int8) + _UNCHANGED, mask=kept)
    tl.store(answer.left + lanes.serial, tl.zeros_like(lanes.serial) - 1, mask=kept)

    first = append & (lanes.pos == lanes.div)
    later = append & (lanes.pos > lanes.div)
    row = at.place.to(tl.int64) * rows.width + lanes.pos
    before = tl.load(answer.cumw + lanes.pos, mask=first, other=0.0) + tl.load(rows.cumw + row, mask=later, other=0.0)
    total = before + weight.to(tl.float64)
    tl.store(rows.token + row, sample.token.to(tl.int32), mask=append)
    tl.store(rows.logq + row, logq, mask=append)
    tl.store(rows.cumw + row + 1, total, mask=append)
    z = tl.zeros_like(total)
    if law.cut != _UNIFORM:
        z = tl.load(answer.cumz + lanes.pos, mask=first, other=0.0) + tl.load(rows.cumz + row, mask=later, other=0.0)
        # max: entropies round, and Z must not fall
        z += leave_probability(logq.to(tl.float64)) * tl.maximum(h, 0.0).to(tl.float64)
        tl.store(rows.cumz + row + 1, z, mask=append)
    ended = _is_eos(sample.token, ends)
    if law.stops:
        state = tl.load(answer.stop_state + lanes.pos, mask=first, other=0).to(tl.int64)
        state += tl.load(rows.stop_state + row, mask=later, other=0).to(tl.int64)
        state = tl.load(ends.stop_next + state * ends.vocabulary + sample.token, mask=append, other=0)
        tl.store(rows.stop_state + row + 1, state, mask=append)
        ended = ended | (state.to(tl.int32) < 0)
    lanes = _Lanes(
        status=tl.where(kept, _IDLE, tl.where(bad, _FAULTED_LANE, lanes.status)),
        serial=lanes.serial,
        div=lanes.div,
        pos=tl.where(prefix | append, lanes.pos + 1, lanes.pos),
        valid=valid,
        exclude=lanes.exclude,
        fault=tl.where(bad, status, lanes.fault),
        epoch=tl.where(prefix & (kept == 0), lanes.epoch + 1, lanes.epoch),
        open_start=lanes.open_start,
        open_stop=lanes.open_stop,
    )
    return lanes, append, again, total, z, ended


@triton.jit
def _test(law, chain, lanes, answer, rows, at, append, total, z, ended, length_term_ptr, ends):
    """The acceptance test of the lanes `append` with a new token (3.2, 3.3). Returns the lanes, and the tokens saved by
    rejecting early. total, z, ended: as `_receive` has them."""
    extending = chain.mode == _EXTEND
    cap = tl.where((law.karan_du == 0) | extending, chain.horizon, chain.length)
    closed = append & (ended | (lanes.pos == cap))
    tested = append & (extending == 0)
    theta = tl.load(rows.theta + at.place, mask=tested, other=0.0)
    tested = tested & (closed | ((law.early_rejection > 0) & (law.karan_du == 0)))
    if law.karan_du:
        f = total - tl.load(answer.cumw + lanes.pos, mask=tested, other=0.0)
    else:
        # An open answer ends at its next token at the earliest, and at the horizon if nothing else ends it. In between
        # F can become no more than at these two: no weight is positive, the term is convex, Z grows.
        at_least = tl.where((ends.many > 0) | (law.stops > 0), lanes.pos + 1, cap)
        nearest = tl.load(length_term_ptr + tl.where(closed, lanes.pos, at_least), mask=tested, other=0.0)
        farthest = tl.load(length_term_ptr + tl.where(closed, lanes.pos, cap), mask=tested, other=0.0)
        f = total + tl.maximum(nearest, farthest)
        if law.cut != _UNIFORM:
            f -= _log_z(z)
    rejected = tested & (f < theta)
    # Z = 0 takes rounding, and no step leaves such an answer: none may go there.
    rejected = rejected | (tested & closed & (law.cut != _UNIFORM) & (z == 0.0))
    tl.store(answer.outcome + lanes.serial, tl.zeros_like(lanes.serial).to(tl.int8) + _REJECTED, mask=rejected)
    saved = tl.sum(tl.where(rejected & (closed == 0), cap - lanes.pos, 0), 0)
    status = tl.where(rejected, _IDLE, tl.where(closed, _CLOSED_LANE, lanes.status))
    return _changed(lanes, status, lanes.valid), saved


@triton.jit
def _walk_on(law, draws, chain, lanes, at, answer, again, base, BLOCK: tl.constexpr):
    """Each lane of `again`, whose token was kept after all, walks on behind it (3.4). Returns the lanes, and the tokens
    that were saved."""
    saved = 0
    walking = tl.min(tl.where(again, at.place, _FAR), 0)
    while walking != _FAR:
        here = at.place == walking
        serial = take(lanes.serial, at.place, walking)
        start = take(lanes.pos, at.place, walking) + 1
        found = _walk(answer.logq, draws, serial, start, chain.length, BLOCK)
        fed = start
        if law.free_prefix:
            saved += found - start
            fed = found
        if fed == chain.length:
            tl.store(answer.outcome + serial, _UNCHANGED)
            tl.store(answer.left + serial, -1)
            lanes = _changed(lanes, tl.where(here, _IDLE, lanes.status), lanes.valid)
        else:
            tl.store(answer.left + serial, found)
            exclude = tl.load(answer.token + found, mask=found < chain.length, other=-1)
            lanes = _started(lanes, here, serial, found, fed, exclude, base)
        again = again & (here == 0)
        walking = tl.min(tl.where(again, at.place, _FAR), 0)
    return lanes, saved


# ---- 2. resolve


@triton.jit
def _stop_at_fault(chain, lanes, serial, fault):
    """A chain that has reached bad logits: that step and those prefetched after it were not made."""
    chain = _Chain(
        mode=tl.zeros_like(chain.mode) + _FAULTED_CHAIN,
        length=chain.length,
        opened=tl.where(chain.mode == _PROPOSE, serial, chain.opened),
        last=chain.last,
        horizon=chain.horizon,
        stage=chain.stage,
        final=chain.final,
        closed=chain.closed,
        fault=fault,
    )
    return chain, _changed(lanes, tl.zeros_like(lanes.status) + _IDLE, lanes.valid)


@triton.jit
def _commit(law, chain, lanes, at, answer, rows, winner, ends, base, BLOCK: tl.constexpr):
    """The closed lane `winner` holds the lowest serial: its answer becomes the chain's, every other lane is void."""
    serial = take(lanes.serial, at.place, winner)
    d = take(lanes.div, at.place, winner)
    n = take(lanes.pos, at.place, winner)
    row = winner.to(tl.int64) * rows.width
    for block in range(d, n, BLOCK):
        t = block + tl.arange(0, BLOCK)
        inside = t < n
        tl.store(answer.token + t, tl.load(rows.token + row + t, mask=inside), mask=inside)
        tl.store(answer.logq + t, tl.load(rows.logq + row + t, mask=inside), mask=inside)
        tl.store(answer.cumw + t + 1, tl.load(rows.cumw + row + t + 1, mask=inside), mask=inside)
        if law.cut != _UNIFORM:
            tl.store(answer.cumz + t + 1, tl.load(rows.cumz + row + t + 1, mask=inside), mask=inside)
        if law.stops:
            tl.store(answer.stop_state + t + 1, tl.load(rows.stop_state + row + t + 1, mask=inside), mask=inside)
    tl.debug_barrier()
    end = n + tl.zeros_like(at.place)
    ended = _is_eos(tl.load(answer.token + end - 1), ends)
    if law.stops:
        ended = ended | (tl.load(answer.stop_state + end).to(tl.int32) < 0)
    # A lane that walked on in this launch counts on a copy that its next opening will replace.
    copied = tl.where(lanes.open_stop > lanes.open_start, lanes.open_start, lanes.valid)
    valid = tl.where(at.place == winner, base + n - 1, tl.minimum(copied, base + d))
    extending = chain.mode == _EXTEND
    if chain.mode == _PROPOSE:
        tl.store(answer.outcome + serial, _ACCEPTED)
    step = tl.where(extending, chain.opened, serial)
    tl.store(answer.step_weight + step, tl.load(answer.cumw + n))
    tl.store(answer.step_logq + step, _fixed_point_sum(answer.logq, n, BLOCK))
    chain = _Chain(
        mode=tl.zeros_like(chain.mode) + _PROPOSE,
        length=n,
        opened=tl.where(extending, chain.opened, serial + 1),
        last=tl.where(extending, chain.opened - 1 + law.mcmc_steps, chain.last),
        horizon=chain.horizon,
        stage=chain.stage,
        final=chain.final,
        closed=tl.max(ended.to(tl.int32), 0),
        fault=chain.fault,
    )
    return chain, _changed(lanes, tl.zeros_like(lanes.status) + _IDLE, valid)


# ---- 3. schedule


@triton.jit
def _draw_proposal(law, draws, length, answer, length_term_ptr, serial, BLOCK: tl.constexpr):
    """The cut of a step (3.2, 3.6) and its walk (3.4). Returns theta, where the proposal leaves the answer, the first
    position to sample (both `length` if it never does), and the tokens that were saved."""
    cut_uniform, accept_uniform = uniforms(
        draws.seed, tl.zeros_like(serial), serial, draws.chain_id, draws.prompt_word | _STREAM_STEP
    )
    theta = tl.log(1.0 - accept_uniform)
    begin = tl.minimum((cut_uniform * length.to(tl.float64)).to(tl.int32), length - 1)
    f = tl.load(answer.cumw + length) + tl.load(length_term_ptr + length)
    if law.cut != _UNIFORM:
        mass = tl.load(answer.cumz + length)
        theta = (f - _log_z(mass)) + theta
        found = _cut_at(answer.cumz, cut_uniform * mass, length, BLOCK)
        fed = found
        begin = found
    else:
        if law.karan_du == 0:
            theta = f + theta
        found = _walk(answer.logq, draws, serial, begin, length, BLOCK)
        fed = tl.where(law.free_prefix > 0, found, begin)
    return theta, found, fed, fed - begin


@triton.jit
def _schedule(law, draws, chain, lanes, at, answer, rows, length_term_ptr, base, BLOCK: tl.constexpr):
    """Start the next lanes: an extension at the start of a stage, else proposals until no lane is free or no step is
    left; end stages and the chain (3.1). Returns the chain, the lanes, and the tokens that were saved."""
    mode, opened, last, horizon = chain.mode, chain.opened, chain.last, chain.horizon
    stage, final, length = chain.stage, chain.final, chain.length
    saved = 0
    extend = mode == _START
    if mode == _START:
        opened = tl.zeros_like(opened) + 1
        tl.store(answer.cumw, 0.0)
        if law.cut != _UNIFORM:
            tl.store(answer.cumz, 0.0)
        if law.stops:
            tl.store(answer.stop_state, 0)
    going = extend | (mode == _PROPOSE)
    while going:
        # The lane to start, if any, and what it runs.
        free = tl.min(tl.where(at.live & (lanes.status == _IDLE), at.place, _FAR), 0)
        chosen = free
        number = opened
        found = length
        fed = length
        drawn = -1
        starts = extend
        if extend:
            begin = stage * law.block_size
            number = tl.zeros_like(opened)
            if law.karan_du:
                begin = length
                # The published code can extend from the same position twice; those draws must not repeat.
                number = -(stage + 1)
            mode = tl.zeros_like(mode) + _EXTEND
            stage += 1
            horizon = tl.minimum(begin + law.block_size, law.max_new_tokens)
            chosen = tl.zeros_like(free)
            extend = mode == _START
        elif (free != _FAR) & (opened <= last):
            opened += 1
            theta, found, fed, walked = _draw_proposal(law, draws, length, answer, length_term_ptr, number, BLOCK)
            saved += walked
            tl.store(rows.theta + free, theta)
            tl.store(answer.forwarded + number, 0)
            starts = fed < length
            drawn = tl.load(answer.token + found, mask=found < length, other=-1)
            tl.store(answer.left + number, tl.where(starts, found, -1))
            if fed == length:
                tl.store(answer.outcome + number, _UNCHANGED)
        elif tl.max((at.live & (lanes.status != _IDLE)).to(tl.int32), 0) > 0:
            going = mode != mode
        elif (chain.closed == 0) & (stage * law.block_size < law.max_new_tokens) & (final == 0):
            extend = mode == _PROPOSE
        elif (law.final_steps > 0) & (final == 0):
            final = tl.zeros_like(final) + 1
            horizon = tl.zeros_like(horizon) + law.max_new_tokens
            last = opened - 1 + law.final_steps
        else:
            mode = tl.zeros_like(mode) + _DONE
            going = mode != mode

        if starts:
            lanes = _started(lanes, at.place == chosen, number, found, fed, drawn, base)
        going = going & (mode == _PROPOSE)
    chain = _Chain(
        mode=mode,
        length=length,
        opened=opened,
        last=last,
        horizon=horizon,
        stage=stage,
        final=final,
        closed=chain.closed,
        fault=chain.fault,
    )
    return chain, lanes, saved


# ---- 4. emit


@triton.jit
def _next_input(lanes, at, answer, rows, prompt_token):
    """The token that each lane feeds next: its own or the chain's last one, or the prompt's. 0 for idle lanes, which is
    harmless: nothing at or beyond VALID is trusted."""
    busy = at.live & (lanes.status != _IDLE)
    before = tl.maximum(lanes.pos - 1, 0)
    row = at.place.to(tl.int64) * rows.width + before
    own = tl.load(rows.token + row, mask=busy & (lanes.pos > lanes.div), other=0)
    shared = tl.load(answer.token + before, mask=busy & (lanes.pos <= lanes.div) & (lanes.pos > 0), other=0)
    shared = tl.where(lanes.pos > 0, shared, prompt_token)
    return tl.where(busy, tl.where(lanes.pos > lanes.div, own, shared), 0)


_ADVANCE_POINTERS = {
    "field_ptr": "*i32",
    "token_ptr": "*i32",
    "logq_ptr": "*fp32",
    "cumw_ptr": "*fp64",
    "cumz_ptr": "*fp64",
    "stop_state_ptr": "*i16",
    "outcome_ptr": "*i8",
    "left_ptr": "*i32",
    "forwarded_ptr": "*i32",
    "step_weight_ptr": "*fp64",
    "step_logq_ptr": "*fp64",
    "cost_ptr": "*i64",
    "lane_field_ptr": "*i32",
    "lane_token_ptr": "*i32",
    "lane_logq_ptr": "*fp32",
    "lane_cumw_ptr": "*fp64",
    "lane_cumz_ptr": "*fp64",
    "lane_stop_state_ptr": "*i16",
    "lane_theta_ptr": "*fp64",
    "input_id_ptr": "*i64",
    "position_ptr": "*i64",
    "counter_ptr": "*i32",
    "exclude_ptr": "*i64",
    "commit_range_ptr": "*i32",
    "open_range_ptr": "*i32",
    "length_term_ptr": "*fp64",
    "seed_ptr": "*i64",
    "eos_ptr": "*i64",
    "stop_next_ptr": "*i16",
    "new_token_ptr": "*i64",
    "new_logq_ptr": "*fp32",
    "new_weight_ptr": "*fp32",
    "new_status_ptr": "*i32",
    "new_entropy_ptr": "*fp32",
}
_ADVANCE_INTEGERS = (
    "seed_stride", "eos_count", "vocabulary", "width", "serials", "max_new_tokens", "block_size", "mcmc_steps",
    "final_steps", "early_rejection", "free_prefix", "karan_du", "stops", "cut", "lanes",
)  # fmt: skip


@triton.jit(do_not_specialize=list(_ADVANCE_INTEGERS), do_not_specialize_on_alignment=list(_ADVANCE_POINTERS))
def _mh_advance_kernel(
    field_ptr,  # [C, CHAIN_PITCH] i32
    token_ptr,  # [C, width] i32
    logq_ptr,  # [C, width] fp32
    cumw_ptr,  # [C, width] fp64
    cumz_ptr,  # [C, width] fp64, not read under the uniform cut
    stop_state_ptr,  # [C, width] i16, not read without stop strings
    outcome_ptr,  # [C, serials] i8
    left_ptr,  # [C, serials] i32
    forwarded_ptr,  # [C, serials] i32
    step_weight_ptr,  # [C, serials + 1] fp64
    step_logq_ptr,  # [C, serials + 1] fp64
    cost_ptr,  # [C, 4] i64
    lane_field_ptr,  # [C*P, LANE_PITCH] i32
    lane_token_ptr,  # [C*P, width] i32
    lane_logq_ptr,  # [C*P, width] fp32
    lane_cumw_ptr,  # [C*P, width] fp64
    lane_cumz_ptr,  # [C*P, width] fp64, not read under the uniform cut
    lane_stop_state_ptr,  # [C*P, width] i16, not read without stop strings
    lane_theta_ptr,  # [C*P] fp64
    input_id_ptr,  # [C*P] i64
    position_ptr,  # [C*P] i64
    counter_ptr,  # [C*P, 4] i32
    exclude_ptr,  # [C*P] i64
    commit_range_ptr,  # [C, 4] i32
    open_range_ptr,  # [C*P, 4] i32
    length_term_ptr,  # [width + 1] fp64
    seed_ptr,  # [1] or [C] i64
    eos_ptr,  # [eos_count] i64
    stop_next_ptr,  # [states, vocabulary] i16, not read without stop strings
    new_token_ptr,  # [C*P] i64
    new_logq_ptr,  # [C*P] fp32
    new_weight_ptr,  # [C*P] fp32
    new_status_ptr,  # [C*P] i32
    new_entropy_ptr,  # [C*P] fp32, read by the cut law that weighs by entropy
    seed_stride,  # from a chain's seed to the next one's: 0 or 1
    eos_count,
    vocabulary,
    width,  # max_new_tokens + 1
    serials,  # one more than the steps of a chain
    max_new_tokens,
    block_size,
    mcmc_steps,
    final_steps,
    early_rejection,
    free_prefix,
    karan_du,
    stops,
    cut,  # a Cut
    lanes,  # P, a chain
    P_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chain: receive, resolve, schedule, emit."""
    c = tl.program_id(0)
    law = _Law(
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        mcmc_steps=mcmc_steps,
        final_steps=final_steps,
        early_rejection=early_rejection,
        free_prefix=free_prefix,
        karan_du=karan_du,
        stops=stops,
        cut=cut,
    )
    ends = _Ends(token=eos_ptr, many=eos_count, stop_next=stop_next_ptr, vocabulary=vocabulary)
    row, steps = c.to(tl.int64) * width, c.to(tl.int64) * serials
    answer = _Answer(
        token=token_ptr + row,
        logq=logq_ptr + row,
        cumw=cumw_ptr + row,
        cumz=cumz_ptr + row,
        stop_state=stop_state_ptr + row,
        outcome=outcome_ptr + steps,
        left=left_ptr + steps,
        forwarded=forwarded_ptr + steps,
        step_weight=step_weight_ptr + steps + c,
        step_logq=step_logq_ptr + steps + c,
    )
    place = tl.arange(0, P_PAD)
    at = _Places(place=place, live=place < lanes, lane=c * lanes + place)
    first = c.to(tl.int64) * lanes * width
    rows = _LaneRows(
        token=lane_token_ptr + first,
        logq=lane_logq_ptr + first,
        cumw=lane_cumw_ptr + first,
        cumz=lane_cumz_ptr + first,
        stop_state=lane_stop_state_ptr + first,
        theta=lane_theta_ptr + c * lanes,
        width=width,
    )

    field = field_ptr + c * CHAIN_PITCH
    base = tl.load(field + _BASE)
    draws = _Draws(
        seed=tl.load(seed_ptr + c * seed_stride),
        chain_id=tl.load(field + _CHAIN_ID),
        prompt_word=tl.load(field + _PROMPT_ID) << _STREAM_BITS,
    )
    chain = _load_chain(field)
    lane_field = lane_field_ptr + at.lane * LANE_PITCH
    now = _load_lanes(lane_field, at.live)
    column = tl.arange(0, 4)
    cost = tl.load(cost_ptr + c * 4 + column)

    # ---- 1. receive the sampled token of every running lane
    extending = chain.mode == _EXTEND
    active = extending | (chain.mode == _PROPOSE)
    status = tl.load(new_status_ptr + at.lane, mask=at.live, other=_PENDING)
    got = at.live & (now.status == _RUNNING) & (status != _PENDING) & active
    cause = tl.where(extending, _COST_EXTENSION, _COST_PROPOSAL)
    cost += tl.where(column == cause, tl.sum(got.to(tl.int32), 0), 0)
    of_step = got & (extending == 0)
    forwarded = answer.forwarded + now.serial
    spent = tl.load(forwarded, mask=of_step, other=0)

    sample = _Sample(
        status=status,
        token=tl.load(new_token_ptr + at.lane, mask=got, other=-1),
        logq=tl.load(new_logq_ptr + at.lane, mask=got, other=0.0),
        weight=tl.load(new_weight_ptr + at.lane, mask=got, other=0.0),
        entropy=tl.load(new_entropy_ptr + at.lane, mask=got & (cut == _DIVERGENCE_ENTROPY), other=1.0),
    )
    now, append, again, total, z, ended = _receive(law, chain, now, at, answer, rows, sample, got, ends, base)
    now, saved_early = _test(law, chain, now, answer, rows, at, append, total, z, ended, length_term_ptr, ends)
    cost += tl.where(column == _COST_EARLY, saved_early, 0)
    now, saved_walking = _walk_on(law, draws, chain, now, at, answer, again, base, BLOCK)

    # ---- 2. resolve the lowest unresolved serial
    # Lane rows were written by one thread and are read by others from here on; chain rows were read, and may change.
    tl.debug_barrier()
    # Here, so that the barrier of a commit comes before a voided step opens again and counts from 0.
    tl.store(forwarded, spent + 1, mask=of_step)
    commit_lane = 0
    commit_start = 0
    commit_stop = 0
    lowest = tl.min(tl.where(at.live & (now.status != _IDLE), now.serial, _FAR), 0)
    if active & (lowest != _FAR):
        winner = tl.min(tl.where((now.status != _IDLE) & (now.serial == lowest), place, _FAR), 0)
        state = take(now.status, place, winner)
        if state == _FAULTED_LANE:
            chain, now = _stop_at_fault(chain, now, lowest, take(now.fault, place, winner))
        elif state == _CLOSED_LANE:
            commit_lane = c * lanes + winner
            commit_start = base + tl.minimum(take(now.div, place, winner), chain.length - 1)
            commit_stop = base + take(now.pos, place, winner) - 1
            chain, now = _commit(law, chain, now, at, answer, rows, winner, ends, base, BLOCK)
    commit = commit_range_ptr + c * 4
    tl.store(commit, c)
    tl.store(commit + 1, commit_lane)
    tl.store(commit + 2, commit_start)
    tl.store(commit + 3, commit_stop)

    # ---- 3. schedule: open lanes, end stages
    chain, now, saved_opening = _schedule(law, draws, chain, now, at, answer, rows, length_term_ptr, base, BLOCK)

    # ---- 4. emit what each lane feeds next
    feed = _next_input(now, at, answer, rows, tl.load(field + _PROMPT_TOKEN))
    busy = now.status != _IDLE
    tl.store(input_id_ptr + at.lane, feed.to(tl.int64), mask=at.live)
    tl.store(position_ptr + at.lane, tl.where(busy, base + now.pos - 1, now.valid).to(tl.int64), mask=at.live)
    left_out = tl.where((now.status == _RUNNING) & (now.pos == now.div), now.exclude, -1)
    tl.store(exclude_ptr + at.lane, left_out.to(tl.int64), mask=at.live)
    counter = counter_ptr + at.lane * 4
    tl.store(counter, now.pos, mask=at.live)
    tl.store(counter + 1, now.serial, mask=at.live)
    tl.store(counter + 2, tl.zeros_like(place) + draws.chain_id, mask=at.live)
    tl.store(counter + 3, tl.zeros_like(place) + (draws.prompt_word | _STREAM_POSITION), mask=at.live)
    ranges = open_range_ptr + at.lane * 4
    tl.store(ranges, at.lane, mask=at.live)
    tl.store(ranges + 1, tl.zeros_like(place) + c, mask=at.live)
    tl.store(ranges + 2, now.open_start, mask=at.live)
    tl.store(ranges + 3, now.open_stop, mask=at.live)
    _store_lanes(lane_field, now, at.live)
    _store_chain(field, chain)
    cost += tl.where(column == _COST_PREFIX, saved_walking + saved_opening, 0)
    tl.store(cost_ptr + c * 4 + column, cost)


# Vectors over lanes: one lane needs no reductions, and most users have one or a few.
_WIDTHS = (1, 4, MAX_LANES)


def mh_advance(*args) -> None:
    """One decode step of the whole law for every lane, in one launch. See `power_kernels.mh_advance`.

    Takes the tensors of `ChainState` in order, length_term f64 [H + 2], seed i64 [1] or [C], eos i64 [E], stop_next i16
    [S, V] or any, the sampled token i64, logq f32, weight f32, status i32 [C*P], entropy f32 [C*P] or any, and
    `Law.constants()`. Raises ArgumentError for more than MAX_LANES lanes a chain, and for runs of several draws.
    """
    n_state = len(ChainState.__dataclass_fields__)
    tensors, law = args[: n_state + 9], args[n_state + 9 :]
    state = ChainState(*tensors[:n_state])
    _length_term, seed, eos, stop_next, sampled_token, *_sampled = tensors[n_state:]
    if state.chains == 0:
        return
    if state.lanes > MAX_LANES:
        raise ArgumentError(f"state has {state.lanes} lanes a chain; backend 'triton' runs at most {MAX_LANES}")
    rows = state.lane_field.shape[0]
    if sampled_token.numel() != rows:
        raise ArgumentError(
            f"sampled_token has shape {list(sampled_token.shape)}; backend 'triton' takes one draw a lane, [{rows}]"
        )
    launch(
        _mh_advance_kernel,
        (state.chains,),
        state.field.device,
        *tensors,
        seed_stride(seed),
        eos.shape[0],
        stop_next.shape[1],
        state.token.shape[1],
        state.outcome.shape[1],
        *map(int, law),
        state.lanes,
        P_PAD=min(width for width in _WIDTHS if width >= state.lanes),
        **ADVANCE,
        **({} if torch.version.hip else {"maxnreg": REGISTERS}),
    )


def configurations() -> list[Configuration]:
    """mh_accept, and mh_advance for 1, up to 4 and up to 16 lanes; the law is in the arguments."""
    constexprs, warps = split(ACCEPT)
    found = [
        Configuration(
            name="mh_accept",
            kernel=_mh_accept_kernel,
            signature={**_ACCEPT_POINTERS, **_ACCEPT_INTEGERS},
            constexprs=constexprs,
            num_warps=warps,
        )
    ]
    constexprs, warps = split(ADVANCE)
    for width in _WIDTHS:
        found.append(
            Configuration(
                name=f"mh_advance P_PAD={width}",
                kernel=_mh_advance_kernel,
                signature={**_ADVANCE_POINTERS, **dict.fromkeys(_ADVANCE_INTEGERS, "i32")},
                constexprs={"P_PAD": width, **constexprs},
                num_warps=warps,
                maxnreg=REGISTERS,
            )
        )
    return found
