"""The chain on the device: `mh_accept` and `mh_advance` (DESIGN sections 3, 5.4, 5.5).

mh_accept:   W = sum of the first n weights (float64, one by one in position order)     F = W - log n
             accept = not F' < F + log u                                                log_ratio = F' - F
Shapes: weights f32 [B, T], [B, T'], everything else [B]. Bytes: 4 B (n + n').

mh_advance:  one decode step of the whole law for every lane, one program a chain. The lanes of a chain are vectors of
P_PAD entries, so that every column of the state is a register; a scalar is taken from a lane by a masked sum. Positions
are walked and copied in blocks. What each step does, field by field, is `reference.mh_advance`.
Shapes: `state.ChainState`. Bytes: about 200 a lane, plus 16 a token walked and 32 a token committed; under a divergence
cut 8 a token searched and 48 a token committed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from power_kernels import rng as contract
from power_kernels.errors import ArgumentError
from power_kernels.state import (
    CHAIN_FIELDS,
    LANE_FIELDS,
    MAX_LANES,
    ChainField,
    ChainState,
    Cost,
    Cut,
    LaneField,
    LaneStatus,
    Mode,
    Outcome,
    Status,
)
from power_kernels.triton import Configuration, launch, split
from power_kernels.triton.rng import uniforms
from power_kernels.triton.sampling import seed_step, take

_INF = tl.constexpr(float("inf"))
_UNDEFINED = tl.constexpr(float("nan"))
_FAR = tl.constexpr(0x7FFFFFFF)

_OK = tl.constexpr(int(Status.OK))
_NAN = tl.constexpr(int(Status.NAN))
_POS_INF = tl.constexpr(int(Status.POS_INF))
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


@triton.jit
def leave_probability(x):
    """1 - exp(x) of float64 x = log q, by Kahan's formula (`reference.leave_probability`)."""
    e = tl.exp(x)
    ends = (e == 1.0) | (e == 0.0)
    inner = (1.0 - e) * x / tl.where(ends, 1.0, tl.log(tl.where(ends, 0.5, e)))
    return tl.where(x >= 0.0, 0.0, tl.where(e == 1.0, -x, tl.where(e == 0.0, 1.0, inner)))


@triton.jit
def _walk(logq_ptr, seed, chain_id, prompt_word, serial, start, length, BLOCK: tl.constexpr):
    """The first position of [start, length) where the proposal leaves the current answer (3.4), or length."""
    found = length
    block = start
    while (block < length) & (found == length):
        t = block + tl.arange(0, BLOCK)
        inside = t < length
        logq = tl.load(logq_ptr + t, mask=inside, other=0.0).to(tl.float64)
        _token_uniform, keep = uniforms(seed, t, serial, chain_id, prompt_word | _STREAM_POSITION)
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
def _is_eos(token, eos_ptr, eos_count):
    """Which of a vector of tokens end an answer."""
    hit = token != token
    for i in range(eos_count):
        hit = hit | (token == tl.load(eos_ptr + i))
    return hit


_ADVANCE_POINTERS = {
    "field_ptr": "*i32",
    "token_ptr": "*i32",
    "logq_ptr": "*fp32",
    "cumw_ptr": "*fp64",
    "cumz_ptr": "*fp64",
    "outcome_ptr": "*i8",
    "left_ptr": "*i32",
    "forwarded_ptr": "*i32",
    "cost_ptr": "*i64",
    "lane_field_ptr": "*i32",
    "lane_token_ptr": "*i32",
    "lane_logq_ptr": "*fp32",
    "lane_cumw_ptr": "*fp64",
    "lane_cumz_ptr": "*fp64",
    "lane_theta_ptr": "*fp64",
    "input_id_ptr": "*i64",
    "position_ptr": "*i64",
    "counter_ptr": "*i32",
    "exclude_ptr": "*i64",
    "commit_range_ptr": "*i32",
    "open_range_ptr": "*i32",
    "log_n_ptr": "*fp64",
    "seed_ptr": "*i64",
    "eos_ptr": "*i64",
    "new_token_ptr": "*i64",
    "new_logq_ptr": "*fp32",
    "new_weight_ptr": "*fp32",
    "new_status_ptr": "*i32",
    "new_entropy_ptr": "*fp32",
}
_ADVANCE_INTEGERS = (
    "seed_step", "eos_count", "width", "serials", "max_new_tokens", "block_size", "mcmc_steps", "final_steps",
    "early_rejection", "free_prefix", "karan_du", "cut", "lanes",
)  # fmt: skip


@triton.jit(do_not_specialize=list(_ADVANCE_INTEGERS), do_not_specialize_on_alignment=list(_ADVANCE_POINTERS))
def _mh_advance_kernel(
    field_ptr,  # [C, CHAIN_PITCH] i32
    token_ptr,  # [C, width] i32
    logq_ptr,  # [C, width] fp32
    cumw_ptr,  # [C, width] fp64
    cumz_ptr,  # [C, width] fp64, not read under the uniform cut
    outcome_ptr,  # [C, serials] i8
    left_ptr,  # [C, serials] i32
    forwarded_ptr,  # [C, serials] i32
    cost_ptr,  # [C, 4] i64
    lane_field_ptr,  # [C*P, LANE_PITCH] i32
    lane_token_ptr,  # [C*P, width] i32
    lane_logq_ptr,  # [C*P, width] fp32
    lane_cumw_ptr,  # [C*P, width] fp64
    lane_cumz_ptr,  # [C*P, width] fp64, not read under the uniform cut
    lane_theta_ptr,  # [C*P] fp64
    input_id_ptr,  # [C*P] i64
    position_ptr,  # [C*P] i64
    counter_ptr,  # [C*P, 4] i32
    exclude_ptr,  # [C*P] i64
    commit_range_ptr,  # [C, 4] i32
    open_range_ptr,  # [C*P, 4] i32
    log_n_ptr,  # [width + 1] fp64
    seed_ptr,  # [1] or [C] i64
    eos_ptr,  # [eos_count] i64
    new_token_ptr,  # [C*P] i64
    new_logq_ptr,  # [C*P] fp32
    new_weight_ptr,  # [C*P] fp32
    new_status_ptr,  # [C*P] i32
    new_entropy_ptr,  # [C*P] fp32, read by the cut law that weighs by entropy
    seed_step,  # from a chain's seed to the next one's: 0 or 1
    eos_count,
    width,  # max_new_tokens + 1
    serials,  # one more than the steps of a chain
    max_new_tokens,
    block_size,
    mcmc_steps,
    final_steps,
    early_rejection,
    free_prefix,
    karan_du,
    cut,  # a Cut
    lanes,  # P, a chain
    P_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chain: receive, resolve, schedule, emit."""
    c = tl.program_id(0)
    chain_row = c.to(tl.int64) * width
    token_ptr += chain_row
    logq_ptr += chain_row
    cumw_ptr += chain_row
    cumz_ptr += chain_row
    steps = c.to(tl.int64) * serials  # where the chain's rows by serial begin
    seed = tl.load(seed_ptr + c * seed_step)

    field = field_ptr + c * CHAIN_PITCH
    mode = tl.load(field + _MODE)
    length = tl.load(field + _LENGTH)
    opened = tl.load(field + _OPENED)
    last = tl.load(field + _LAST)
    horizon = tl.load(field + _HORIZON)
    stage = tl.load(field + _STAGE)
    final = tl.load(field + _FINAL)
    base = tl.load(field + _BASE)
    chain_id = tl.load(field + _CHAIN_ID)
    prompt_word = tl.load(field + _PROMPT_ID) << _STREAM_BITS
    chain_fault = tl.load(field + _FAULT)
    chain_closed = tl.load(field + _CLOSED)

    index = tl.arange(0, P_PAD)
    live = index < lanes
    lane = c * lanes + index
    lane_row = lane.to(tl.int64) * width
    lane_field = lane_field_ptr + lane * LANE_PITCH
    lane_status = tl.load(lane_field + _LANE_STATUS, mask=live, other=_IDLE)
    serial = tl.load(lane_field + _LANE_SERIAL, mask=live, other=0)
    div = tl.load(lane_field + _LANE_DIVERGENCE, mask=live, other=0)
    pos = tl.load(lane_field + _LANE_POSITION, mask=live, other=0)
    valid = tl.load(lane_field + _LANE_VALID, mask=live, other=0)
    exclude = tl.load(lane_field + _LANE_EXCLUDE, mask=live, other=-1)
    lane_fault = tl.load(lane_field + _LANE_FAULT, mask=live, other=0)
    epoch = tl.load(lane_field + _LANE_EPOCH, mask=live, other=0)

    column = tl.arange(0, 4)
    cost = tl.load(cost_ptr + c * 4 + column)
    saved_prefix = 0
    commit_lane = 0
    commit_start = 0
    commit_stop = 0
    open_start = tl.zeros_like(index)
    open_stop = tl.zeros_like(index)

    # ---- 1. receive the sampled token of every running lane
    extending = mode == _EXTEND
    status = tl.load(new_status_ptr + lane, mask=live, other=_PENDING)
    got = live & (lane_status == _RUNNING) & (status != _PENDING) & (extending | (mode == _PROPOSE))
    cause = tl.where(extending, _COST_EXTENSION, _COST_PROPOSAL)
    cost += tl.where(column == cause, tl.sum(got.to(tl.int32), 0), 0)
    of_step = got & (extending == 0)
    forwarded = forwarded_ptr + steps + serial
    spent = tl.load(forwarded, mask=of_step, other=0)
    # up to the divergence the token that was fed is the chain's own
    valid = tl.where(got & (pos <= div), base + pos, valid)

    prefix = got & (pos < div)  # a forwarded prefix: what was sampled there is not used
    new_logq = tl.load(new_logq_ptr + lane, mask=got, other=0.0)
    new_weight = tl.load(new_weight_ptr + lane, mask=got, other=0.0)
    h = tl.load(new_entropy_ptr + lane, mask=got & (cut == _DIVERGENCE_ENTROPY), other=1.0)
    # numbers that would poison the chain, whoever made them
    undefined = (new_weight != new_weight) | (new_logq != new_logq) | (h != h)
    status = tl.where((status == _OK) & undefined, _NAN, status)
    status = tl.where((status == _OK) & ((new_weight == _INF) | (h == _INF)), _POS_INF, status)
    bad = got & (pos >= div) & (status != _OK)
    lane_status = tl.where(bad, _FAULTED_LANE, lane_status)
    lane_fault = tl.where(bad, status, lane_fault)

    token = tl.load(new_token_ptr + lane, mask=got, other=-1)
    good = got & (pos >= div) & (status == _OK)
    again = good & (pos == div) & (extending == 0) & (token == exclude)  # nothing else has mass
    append = good & (again == 0)
    # A forwarded prefix that reaches the end of the answer was an unchanged step. So is one whose token was kept under
    # a divergence cut, which has no walk that could go on.
    kept = (prefix & (pos + 1 == length)) | (again & (cut != _UNIFORM))
    again = again & (cut == _UNIFORM)
    tl.store(outcome_ptr + steps + serial, tl.full([P_PAD], _UNCHANGED, tl.int8), mask=kept)
    tl.store(left_ptr + steps + serial, tl.full([P_PAD], -1, tl.int32), mask=kept)
    lane_status = tl.where(kept, _IDLE, lane_status)
    epoch = tl.where(prefix & (kept == 0), epoch + 1, epoch)

    first = append & (pos == div)
    before = tl.load(cumw_ptr + pos, mask=first, other=0.0)
    before += tl.load(lane_cumw_ptr + lane_row + pos, mask=append & (pos > div), other=0.0)
    total = before + new_weight.to(tl.float64)
    tl.store(lane_token_ptr + lane_row + pos, token.to(tl.int32), mask=append)
    tl.store(lane_logq_ptr + lane_row + pos, new_logq, mask=append)
    tl.store(lane_cumw_ptr + lane_row + pos + 1, total, mask=append)
    z = tl.zeros_like(total)
    if cut != _UNIFORM:
        z = tl.load(cumz_ptr + pos, mask=first, other=0.0)
        z += tl.load(lane_cumz_ptr + lane_row + pos, mask=append & (pos > div), other=0.0)
        # max: entropies round, and Z must not fall
        z += leave_probability(new_logq.to(tl.float64)) * tl.maximum(h, 0.0).to(tl.float64)
        tl.store(lane_cumz_ptr + lane_row + pos + 1, z, mask=append)
    pos = tl.where(prefix | append, pos + 1, pos)

    cap = tl.where((karan_du == 0) | extending, horizon, length)
    closed = append & (_is_eos(token, eos_ptr, eos_count) | (pos == cap))
    tested = append & (extending == 0)
    theta = tl.load(lane_theta_ptr + lane, mask=tested, other=0.0)
    tested = tested & (closed | ((early_rejection > 0) & (karan_du == 0)))
    if karan_du:
        against = tl.load(cumw_ptr + pos, mask=tested, other=0.0)
    elif cut != _UNIFORM:
        against = _log_z(z)
    else:
        # An open answer ends at its next token at the earliest, and at the horizon if no token is EOS.
        at_least = tl.where(eos_count > 0, pos + 1, cap)
        against = tl.load(log_n_ptr + tl.where(closed, pos, at_least), mask=tested, other=0.0)
    rejected = tested & (total - against < theta)
    # Z = 0 takes rounding, and no step leaves such an answer: none may go there.
    rejected = rejected | (tested & closed & (cut != _UNIFORM) & (z == 0.0))
    tl.store(outcome_ptr + steps + serial, tl.full([P_PAD], _REJECTED, tl.int8), mask=rejected)
    saved_early = tl.sum(tl.where(rejected & (closed == 0), cap - pos, 0), 0)
    cost += tl.where(column == _COST_EARLY, saved_early, 0)
    lane_status = tl.where(rejected, _IDLE, tl.where(closed, _CLOSED_LANE, lane_status))

    # lanes whose token was kept after all walk on
    walking = tl.min(tl.where(again, index, _FAR), 0)
    while walking != _FAR:
        here = index == walking
        number = take(serial, index, walking)
        start = take(pos, index, walking) + 1
        found = _walk(logq_ptr, seed, chain_id, prompt_word, number, start, length, BLOCK)
        fed = start
        if free_prefix:
            saved_prefix += found - start
            fed = found
        if fed == length:
            tl.store(outcome_ptr + steps + number, _UNCHANGED)
            tl.store(left_ptr + steps + number, -1)
            lane_status = tl.where(here, _IDLE, lane_status)
        else:
            tl.store(left_ptr + steps + number, found)
            open_start = tl.where(here, valid, open_start)
            open_stop = tl.where(here, tl.maximum(valid, base + fed - 1), open_stop)
            valid = tl.where(here, base + fed - 1, valid)
            div = tl.where(here, found, div)
            pos = tl.where(here, fed, pos)
            exclude = tl.where(here, tl.load(token_ptr + found, mask=found < length, other=-1), exclude)
            lane_fault = tl.where(here, 0, lane_fault)
            epoch = tl.where(here, epoch + 1, epoch)
        again = again & (here == 0)
        walking = tl.min(tl.where(again, index, _FAR), 0)

    # ---- 2. resolve the lowest unresolved serial
    # Lane rows were written by one thread and are read by others from here on; chain rows were read, and may change.
    tl.debug_barrier()
    # Here, so that the barrier of a commit comes before a voided step opens again and counts from 0.
    tl.store(forwarded, spent + 1, mask=of_step)
    active = extending | (mode == _PROPOSE)
    lowest = tl.min(tl.where(live & (lane_status != _IDLE), serial, _FAR), 0)
    if active & (lowest != _FAR):
        winner = tl.min(tl.where((lane_status != _IDLE) & (serial == lowest), index, _FAR), 0)
        state = take(lane_status, index, winner)
        if state == _FAULTED_LANE:
            # this step and those prefetched after it were not made
            opened = tl.where(mode == _PROPOSE, lowest, opened)
            mode = tl.zeros_like(mode) + _FAULTED_CHAIN
            chain_fault = take(lane_fault, index, winner)
            lane_status = tl.zeros_like(lane_status) + _IDLE
        elif state == _CLOSED_LANE:
            d = take(div, index, winner)
            n = take(pos, index, winner)
            row = (c * lanes + winner).to(tl.int64) * width
            for block in range(d, n, BLOCK):
                t = block + tl.arange(0, BLOCK)
                inside = t < n
                tl.store(token_ptr + t, tl.load(lane_token_ptr + row + t, mask=inside), mask=inside)
                tl.store(logq_ptr + t, tl.load(lane_logq_ptr + row + t, mask=inside), mask=inside)
                tl.store(cumw_ptr + t + 1, tl.load(lane_cumw_ptr + row + t + 1, mask=inside), mask=inside)
                if cut != _UNIFORM:
                    tl.store(cumz_ptr + t + 1, tl.load(lane_cumz_ptr + row + t + 1, mask=inside), mask=inside)
            tl.debug_barrier()
            # The chain's KV lacks its last token; an extension starts there and so must copy it too.
            commit_lane = c * lanes + winner
            commit_start = base + tl.minimum(d, length - 1)
            commit_stop = base + n - 1
            length = n
            ending = tl.load(token_ptr + n - 1 + tl.zeros_like(index))
            chain_closed = tl.max(_is_eos(ending, eos_ptr, eos_count).to(tl.int32), 0)
            lane_status = tl.zeros_like(lane_status) + _IDLE
            # A lane that walked on in this launch counts on a copy that its next opening will replace.
            copied = tl.where(open_stop > open_start, open_start, valid)
            valid = tl.where(index == winner, base + n - 1, tl.minimum(copied, base + d))
            if mode == _EXTEND:
                mode = tl.zeros_like(mode) + _PROPOSE
                last = opened - 1 + mcmc_steps
            else:
                tl.store(outcome_ptr + steps + lowest, _ACCEPTED)
                opened = lowest + 1

    tl.store(field + _FAULT, chain_fault)
    commit = commit_range_ptr + c * 4
    tl.store(commit, c)
    tl.store(commit + 1, commit_lane)
    tl.store(commit + 2, commit_start)
    tl.store(commit + 3, commit_stop)

    # ---- 3. schedule: open lanes, end stages
    extend = mode == _START
    if mode == _START:
        opened = tl.zeros_like(opened) + 1
        tl.store(cumw_ptr, 0.0)
        if cut != _UNIFORM:
            tl.store(cumz_ptr, 0.0)
    going = extend | (mode == _PROPOSE)
    while going:
        # The lane to start, if any, and what it runs.
        free = tl.min(tl.where(live & (lane_status == _IDLE), index, _FAR), 0)
        chosen = free
        number = opened
        found = length
        fed = length
        drawn = -1
        starts = extend
        if extend:
            begin = stage * block_size
            number = tl.zeros_like(opened)
            if karan_du:
                begin = length
                # The published code can extend from the same position twice; those draws must not repeat.
                number = -(stage + 1)
            mode = tl.zeros_like(mode) + _EXTEND
            stage += 1
            horizon = tl.minimum(begin + block_size, max_new_tokens)
            chosen = tl.zeros_like(free)
            extend = mode == _START
        elif (free != _FAR) & (opened <= last):
            opened += 1
            cut_uniform, accept_uniform = uniforms(
                seed, tl.zeros_like(number), number, chain_id, prompt_word | _STREAM_STEP
            )
            theta_new = tl.log(1.0 - accept_uniform)
            begin = tl.minimum((cut_uniform * length.to(tl.float64)).to(tl.int32), length - 1)
            if cut != _UNIFORM:
                mass = tl.load(cumz_ptr + length)
                theta_new = (tl.load(cumw_ptr + length) - _log_z(mass)) + theta_new
                found = _cut_at(cumz_ptr, cut_uniform * mass, length, BLOCK)
                fed = found
            else:
                if karan_du == 0:
                    theta_new = (tl.load(cumw_ptr + length) - tl.load(log_n_ptr + length)) + theta_new
                found = _walk(logq_ptr, seed, chain_id, prompt_word, number, begin, length, BLOCK)
                fed = begin
                if free_prefix:
                    saved_prefix += found - begin
                    fed = found
            tl.store(lane_theta_ptr + c * lanes + free, theta_new)
            tl.store(forwarded_ptr + steps + number, 0)
            starts = fed < length
            drawn = tl.load(token_ptr + found, mask=found < length, other=-1)
            tl.store(left_ptr + steps + number, tl.where(starts, found, -1))
            if fed == length:
                tl.store(outcome_ptr + steps + number, _UNCHANGED)
        elif tl.max((live & (lane_status != _IDLE)).to(tl.int32), 0) > 0:
            going = mode != mode
        elif (chain_closed == 0) & (stage * block_size < max_new_tokens) & (final == 0):
            extend = mode == _PROPOSE
        elif (final_steps > 0) & (final == 0):
            final = tl.zeros_like(final) + 1
            horizon = tl.zeros_like(horizon) + max_new_tokens
            last = opened - 1 + final_steps
        else:
            mode = tl.zeros_like(mode) + _DONE
            going = mode != mode

        if starts:
            here = index == chosen
            open_start = tl.where(here, valid, open_start)
            open_stop = tl.where(here, tl.maximum(valid, base + fed - 1), open_stop)
            lane_status = tl.where(here, _RUNNING, lane_status)
            serial = tl.where(here, number, serial)
            div = tl.where(here, found, div)
            pos = tl.where(here, fed, pos)
            valid = tl.where(here, base + fed - 1, valid)
            exclude = tl.where(here, drawn, exclude)
            lane_fault = tl.where(here, 0, lane_fault)
            epoch = tl.where(here, epoch + 1, epoch)
        going = going & (mode == _PROPOSE)

    # ---- 4. emit what each lane feeds next
    busy = lane_status != _IDLE
    at = tl.maximum(pos - 1, 0)
    own = tl.load(lane_token_ptr + lane_row + at, mask=live & busy & (pos > div), other=0)
    shared = tl.load(token_ptr + at, mask=live & busy & (pos <= div) & (pos > 0), other=0)
    shared = tl.where(pos > 0, shared, tl.load(field + _PROMPT_TOKEN))
    # Idle lanes are harmless: nothing at or beyond VALID is trusted.
    feed = tl.where(busy, tl.where(pos > div, own, shared), 0)
    tl.store(input_id_ptr + lane, feed.to(tl.int64), mask=live)
    tl.store(position_ptr + lane, tl.where(busy, base + pos - 1, valid).to(tl.int64), mask=live)
    left_out = tl.where((lane_status == _RUNNING) & (pos == div), exclude, -1)
    tl.store(exclude_ptr + lane, left_out.to(tl.int64), mask=live)
    counter = counter_ptr + lane * 4
    tl.store(counter, pos, mask=live)
    tl.store(counter + 1, serial, mask=live)
    tl.store(counter + 2, tl.zeros_like(index) + chain_id, mask=live)
    tl.store(counter + 3, tl.zeros_like(index) + (prompt_word | _STREAM_POSITION), mask=live)
    ranges = open_range_ptr + lane * 4
    tl.store(ranges, lane, mask=live)
    tl.store(ranges + 1, tl.zeros_like(index) + c, mask=live)
    tl.store(ranges + 2, open_start, mask=live)
    tl.store(ranges + 3, open_stop, mask=live)

    tl.store(lane_field + _LANE_STATUS, lane_status, mask=live)
    tl.store(lane_field + _LANE_SERIAL, serial, mask=live)
    tl.store(lane_field + _LANE_DIVERGENCE, div, mask=live)
    tl.store(lane_field + _LANE_POSITION, pos, mask=live)
    tl.store(lane_field + _LANE_VALID, valid, mask=live)
    tl.store(lane_field + _LANE_EXCLUDE, exclude, mask=live)
    tl.store(lane_field + _LANE_FAULT, lane_fault, mask=live)
    tl.store(lane_field + _LANE_EPOCH, epoch, mask=live)

    tl.store(field + _MODE, mode)
    tl.store(field + _LENGTH, length)
    tl.store(field + _OPENED, opened)
    tl.store(field + _LAST, last)
    tl.store(field + _HORIZON, horizon)
    tl.store(field + _STAGE, stage)
    tl.store(field + _FINAL, final)
    tl.store(field + _CLOSED, chain_closed)
    cost += tl.where(column == _COST_PREFIX, saved_prefix, 0)
    tl.store(cost_ptr + c * 4 + column, cost)


# Vectors over lanes: one lane needs no reductions, and most users have one or a few.
_WIDTHS = (1, 4, MAX_LANES)


def mh_advance(*args) -> None:
    """One decode step of the whole law for every lane, in one launch. See `power_kernels.mh_advance`.

    Takes the tensors of `ChainState` in order, log_n f64 [H + 2], seed i64 [1] or [C], eos i64 [E], the sampled token
    i64, logq f32, weight f32, status i32 [C*P], entropy f32 [C*P] or any, and `Law.constants()`. Raises ArgumentError
    for more than MAX_LANES lanes a chain.
    """
    n_state = len(ChainState.__dataclass_fields__)
    *tensors, max_new_tokens, block_size, mcmc_steps, final_steps, early_rejection, free_prefix, karan_du, cut = args
    state = ChainState(*tensors[:n_state])
    _log_n, seed, eos, *_sampled = tensors[n_state:]
    if state.chains == 0:
        return
    if state.lanes > MAX_LANES:
        raise ArgumentError(f"state has {state.lanes} lanes a chain; backend 'triton' runs at most {MAX_LANES}")
    launch(
        _mh_advance_kernel,
        (state.chains,),
        state.field.device,
        *tensors,
        seed_step(seed),
        eos.shape[0],
        state.token.shape[1],
        state.outcome.shape[1],
        max_new_tokens,
        block_size,
        mcmc_steps,
        final_steps,
        int(early_rejection),
        int(free_prefix),
        int(karan_du),
        cut,
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
