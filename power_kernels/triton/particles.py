"""branch_particles: one position of a group of particles; select_candidate: what a sweep ends with (DESIGN 3.9, 5.9).

    omega_iv = base_i + alpha (z_iv - m_i)      base_i = log_weight_i + lambda - alpha log1p(R1_i)      (log-domain)
    m, R1: of the row, as in sampling.py        kappa: sum over open children of min(1, omega / kappa) = N, or the floor

Two launches. `_branch_mass_kernel`, one warp a (row, tile), writes the tile record of `sampling.py` at beta = alpha,
and where children close splits it: maximum and mass of the open children, and of the closing ones but the reference.
`_branch_kernel`, one program a group, works on these numbers in float64 and reads a tile again where one of its
children is chosen. Open children are summed relative to the largest of them, closing ones to theirs.

Heavy children are taken out of the tile with the largest maximum, one after the other; its record is then that of what
is left, so a sum of what is left is never a difference. Light children are points on the line of what is left, tile by
tile in the order of the particles. With T the recorded mass of a tile and T64 the float64 sum of its logits, the point
takes a child with probability (omega / kappa) (T / T64); its weight is kappa T64 / T, so that the rounding of records
costs no exactness.

The interpreter shows no threads. What one thread writes and another reads goes through `tl.debug_barrier`: the split
records, and `child_order`, which first holds the list of rows without a child.

Shapes: G groups of R = N + 1 rows; logits [G R, V] (fp32, fp16, bf16; unit inner stride, any row stride), everything
else contiguous. Bytes moved: G R V itemsize read once (rows without a particle are not), + 2 bytes an entry with a stop
table, + 32 a tile, + one tile for each survivor.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..particles import Tally
from ..state import Status
from . import POINTER, Configuration, launch, logits_configurations, split
from .sampling import (
    LEAST_TILES,
    MASS,
    MOST_TILES,
    TILE,
    _read_tile,
    log1p,
    mass_split,
    row_masses,
    row_of,
    take,
    tile_count,
    tile_records,
    tiles_block,
    vector_width,
)

BRANCH_MASS = {**MASS, "PART": 256}  # a tile that is split is read in parts, which take fewer registers
BRANCH = {"TILE": TILE, "num_warps": 4}
REGISTERS = 255  # a thread on NVIDIA; ptxas left to itself takes 168 and spills
# (ROWS, TILES), the widths of the finisher's vectors over rows and tiles. Sums over 32 rows stay within a warp.
SMALL = (32, LEAST_TILES)  # N up to 31, vocabularies up to 262,144
LARGE = (256, MOST_TILES)  # N up to 128, and what is compiled and checked offline for larger vocabularies
SELECT = {"BLOCK": 128, "num_warps": 4}

_COLUMNS = tl.constexpr(len(Tally))
_OTHERS = tl.constexpr(int(Tally.OTHERS))
_KEPT = tl.constexpr(int(Tally.KEPT))
_REFERENCE = tl.constexpr(int(Tally.REFERENCE))
_MASS = tl.constexpr(int(Tally.MASS))
_OK = tl.constexpr(int(Status.OK))
_NAN = tl.constexpr(int(Status.NAN))
_BAD_TOKEN = tl.constexpr(int(Status.BAD_TOKEN))
_INF = tl.constexpr(float("inf"))
_UNDEFINED = tl.constexpr(float("nan"))
_FAR = tl.constexpr(0x7FFFFFFF)
_BELOW_ONE = tl.constexpr(1.0 - 2.0**-53)
_MOST_LOG = tl.constexpr(700.0)  # exp of more counts as infinite


# ---- helpers


@triton.jit
def _log_add(a, b):
    """log(e^a + e^b) of float64 values; exactly a where b is -inf."""
    top = tl.maximum(a, b)
    return tl.where(top == -_INF, -_INF, top + log1p(tl.exp(tl.minimum(a, b) - top)))


@triton.jit
def _relative(log_values):
    """The largest of float64 values, 0 if all are -inf, and their exponentials relative to it."""
    top = tl.max(log_values, 0)
    top = tl.where(top == -_INF, 0.0, top)
    return top, tl.where(log_values == -_INF, 0.0, tl.exp(log_values - top))


@triton.jit
def _first_above(mass, index, target):
    """The first entry with mass whose running sum exceeds target, and how much of its mass lies below target."""
    ends = tl.cumsum(mass, 0)
    at = tl.min(tl.where((ends > target) & (mass > 0.0), index, _FAR), 0)
    if at == _FAR:  # rounding alone can lead here
        at = tl.max(tl.where(mass > 0.0, index, 0), 0)
    return at, tl.maximum(target - take(ends, index, at - 1), 0.0) / take(mass, index, at)


@triton.jit
def _put(values, index, at, value):
    """The vector with values[at] = value."""
    return tl.where(index == at, value, values)


@triton.jit
def _stop_row(stop_state_ptr, stop_next_ptr, row, V, S, has_stops):
    """The row of the stop table for the state of a particle."""
    state = 0
    if has_stops:
        state = tl.minimum(tl.maximum(tl.load(stop_state_ptr + row).to(tl.int32), 0), S - 1)
    return stop_next_ptr + state.to(tl.int64) * V


@triton.jit
def _closes(token, V, last, eos_ptr, E, stop_ptr, has_stops):
    """Whether the children by these tokens close. stop_ptr: the row of the stop table."""
    closes = (token < V) & last
    for e in range(E):
        closes = closes | (token == tl.load(eos_ptr + e))
    if has_stops:
        closes = closes | (tl.load(stop_ptr + token, mask=token < V, other=0) < 0)
    return closes


@triton.jit
def _split_part(logits, part, V, wanted, last, eos_ptr, E, stop_ptr, has_stops, PART: tl.constexpr, VEC: tl.constexpr):
    """Logits [PART] of the open children in a part of a tile, and of the closing ones but `wanted`; -inf elsewhere."""
    z = _read_tile(logits, part, V, -1, PART, VEC)
    token = part * PART + tl.arange(0, PART)
    closes = _closes(token, V, last, eos_ptr, E, stop_ptr, has_stops)
    return tl.where(closes, -_INF, z), tl.where(closes & (token != wanted), z, -_INF)


@triton.jit
def _tile_parts(top, mass, alpha):
    """The largest maximum of tiles, and their masses relative to it."""
    highest = tl.max(top, 0)
    gap = tl.where(top == -_INF, 0.0, top.to(tl.float64) - highest.to(tl.float64))
    return highest, tl.where(top == -_INF, 0.0, tl.exp(alpha * gap) * mass)


@triton.jit
def _open_tiles(split_ptr, tiles, TILES: tl.constexpr):
    """Of one row: tile numbers, maxima fp32 and masses float64 of the open children that are not taken."""
    index = tl.arange(0, TILES)
    live = index < tiles
    top = tl.load(split_ptr + index, mask=live, other=-_INF)
    return index, top, tl.load(split_ptr + tiles + index, mask=live, other=0.0).to(tl.float64)


@triton.jit
def _closing_tiles(split_ptr, record_ptr, tiles, TILES: tl.constexpr):
    """The same of the closing children, without the reference. Their mass has its low bits in the record."""
    index = tl.arange(0, TILES)
    top = tl.load(split_ptr + 2 * tiles + index, mask=index < tiles, other=-_INF)
    some = top > -_INF
    high = tl.load(split_ptr + 3 * tiles + index, mask=some, other=0.0).to(tl.float64)
    low = tl.load(record_ptr + 3 * tiles + index, mask=some, other=0.0).to(tl.float64)
    return index, top, high + low


@triton.jit
def _exact_masses(z, top, alpha):
    """exp(alpha (z - top)) in float64; 0 where z is -inf."""
    shift = tl.where(top == -_INF, 0.0, top).to(tl.float64)
    return tl.where(z == -_INF, 0.0, tl.exp(alpha * (z.to(tl.float64) - shift)))


@triton.jit
def _open_tile(
    row_ptr, tile, V, last, eos_ptr, E, stop_ptr, has_stops, place, heavy, places, tokens, index, TILE: tl.constexpr
):
    """Tokens and logits [TILE] of one tile, -inf where a child closes or is one of the `heavy` first survivors.

    places, tokens: of the survivors. Heavy children leave a tile the largest logit first, of equal ones the first
    token: the last that has left tells which have.
    """
    z = _read_tile(row_ptr, tile, V, -1, TILE, 1)
    token = tile * TILE + tl.arange(0, TILE)
    left = tl.max(tl.where((index < heavy) & (places == place) & (tokens // TILE == tile), index, -1), 0)
    if left >= 0:
        token_left = take(tokens, index, left)
        z_left = tl.load(row_ptr + token_left).to(tl.float32)
        z = tl.where((z < z_left) | ((z == z_left) & (token > token_left)), z, -_INF)
    return token, tl.where(_closes(token, V, last, eos_ptr, E, stop_ptr, has_stops), -_INF, z)


# ---- kernels


@triton.jit(
    do_not_specialize=["V", "stride_row", "tiles", "programs", "each", "R", "E", "S", "has_stops"],
    do_not_specialize_on_alignment=[
        "alpha_ptr", "log_weight_ptr", "stop_state_ptr", "reference_ptr", "last_ptr", "eos_ptr", "stop_next_ptr",
        "work_ptr", "split_ptr",
    ],
)  # fmt: skip
def _branch_mass_kernel(
    logits_ptr,  # [G R, V] fp32 | fp16 | bf16, row stride stride_row
    alpha_ptr,  # [G] fp32
    log_weight_ptr,  # [G, R] fp64
    stop_state_ptr,  # [G, R] i16; not read unless has_stops
    reference_ptr,  # [G] i64
    last_ptr,  # [G] bool
    eos_ptr,  # [E] i64
    stop_next_ptr,  # [S, V] i16; not read unless has_stops
    work_ptr,  # [G R, 4, tiles] fp32: maximum, R1, Rb of each tile; low bits of the closing mass
    split_ptr,  # [G R, 4, tiles] fp32: maximum, mass of open children; of closing ones
    V,
    stride_row: tl.int64,  # in units of VEC entries
    tiles,
    programs,  # a row
    each,  # tiles a program
    R,
    E,
    S,
    has_stops,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    VEC: tl.constexpr,  # entries a load: 16 bytes, or 1
):
    """A part of the tiles of one row that holds a particle, one after the other. A mass of open children below 0 says
    that no child of the tile closes; then the record is theirs."""
    row = tl.program_id(0) // programs
    start = (tl.program_id(0) % programs) * each
    if tl.load(log_weight_ptr + row) != -_INF:
        group = row // R
        alpha32 = tl.load(alpha_ptr + group)
        alpha = alpha32.to(tl.float64)
        logits = row_of(logits_ptr, row, stride_row, VEC)
        record = work_ptr + row.to(tl.int64) * (4 * tiles)
        tile_records(logits, alpha32, record, V, tiles, start, each, False, TILE, VEC)

        last = tl.load(last_ptr + group) != 0
        stop_ptr = _stop_row(stop_state_ptr, stop_next_ptr, row, V, S, has_stops)
        wanted = tl.where(row % R == R - 1, tl.load(reference_ptr + group), -1)
        for tile in range(start, tl.minimum(start + each, tiles)):
            entry = split_ptr + row.to(tl.int64) * (4 * tiles) + tile
            first = tile * TILE
            may_close = last | (has_stops != 0)
            for e in range(E):
                eos = tl.load(eos_ptr + e)
                may_close = may_close | ((eos >= first) & (eos < first + TILE))
            open_mass = -1.0
            closing_top = -_INF
            if may_close:
                parts = tile * (TILE // PART)
                open_top = -_INF
                for part in range(parts, parts + TILE // PART):
                    still_open, closing = _split_part(
                        logits, part, V, wanted, last, eos_ptr, E, stop_ptr, has_stops, PART, VEC
                    )
                    open_top = tl.maximum(open_top, tl.max(still_open, 0))
                    closing_top = tl.maximum(closing_top, tl.max(closing, 0))
                open_sum = tl.zeros([], tl.float64)
                closing_sum = tl.zeros([], tl.float64)
                for part in range(parts, parts + TILE // PART):
                    still_open, closing = _split_part(
                        logits, part, V, wanted, last, eos_ptr, E, stop_ptr, has_stops, PART, VEC
                    )
                    open_sum += tl.sum(_exact_masses(still_open, open_top, alpha), 0)
                    closing_sum += tl.sum(_exact_masses(closing, closing_top, alpha), 0)
                open_mass = open_sum.to(tl.float32)
                tl.store(entry, open_top)
                high = closing_sum.to(tl.float32)
                tl.store(entry + 3 * tiles, high)
                tl.store(record + 3 * tiles + tile, (closing_sum - high.to(tl.float64)).to(tl.float32))
            tl.store(entry + tiles, open_mass)
            tl.store(entry + 2 * tiles, closing_top)


@triton.jit(
    do_not_specialize=["V", "stride_row", "tiles", "R", "E", "S", "has_stops"],
    do_not_specialize_on_alignment=[
        "logits_ptr", "alpha_ptr", "log_weight_ptr", "order_ptr", "stop_state_ptr", "reference_ptr", "last_ptr",
        "closing_bonus_ptr", "uniform_ptr", "eos_ptr", "stop_next_ptr", "work_ptr", "split_ptr", "tally_ptr",
        "parent_ptr", "token_ptr", "child_log_weight_ptr", "logp_ptr", "child_order_ptr", "candidate_ptr",
        "candidate_logp_ptr", "log_threshold_ptr", "status_ptr",
    ],
)  # fmt: skip
def _branch_kernel(
    logits_ptr,  # [G R, V] fp32 | fp16 | bf16, row stride stride_row
    alpha_ptr,  # [G] fp32
    log_weight_ptr,  # [G, R] fp64
    order_ptr,  # [G, R] i32
    stop_state_ptr,  # [G, R] i16; not read unless has_stops
    reference_ptr,  # [G] i64, negative: none
    last_ptr,  # [G] bool
    closing_bonus_ptr,  # [G] fp64
    uniform_ptr,  # [G, 2] fp64
    eos_ptr,  # [E] i64
    stop_next_ptr,  # [S, V] i16; not read unless has_stops
    work_ptr,  # [G R, 4, tiles] fp32, see _branch_mass_kernel
    split_ptr,  # [G R, 4, tiles] fp32, the same; the open children's change
    tally_ptr,  # [G, 4] fp64, read and written
    parent_ptr,  # [G, R] i32
    token_ptr,  # [G, R] i64
    child_log_weight_ptr,  # [G, R] fp64
    logp_ptr,  # [G, R] fp64
    child_order_ptr,  # [G, R] i32
    candidate_ptr,  # [G, 2] i64
    candidate_logp_ptr,  # [G] fp64
    log_threshold_ptr,  # [G] fp64
    status_ptr,  # [G, R] i32
    V,
    stride_row: tl.int64,
    tiles,
    R,
    E,
    S,
    has_stops,
    length_bonus: tl.float64,
    log_rho: tl.float64,  # log(rho / N), -inf where rho is 0
    ROWS: tl.constexpr,  # the width of vectors over rows, R or more
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One group: its rows, its closing children, its heavy and light survivors, and the rows that these take.

    A place is a particle's number in the order. Vectors [ROWS] are by place, by row or by survivor; `index` is the
    number of any.
    """
    group = tl.program_id(0).to(tl.int64)
    first = group * R
    order_ptr += first
    N = R - 1
    alpha = tl.load(alpha_ptr + group).to(tl.float64)
    last = tl.load(last_ptr + group) != 0
    wanted = tl.load(reference_ptr + group)
    bonus = tl.load(closing_bonus_ptr + group)
    index = tl.arange(0, ROWS)
    entry = tl.arange(0, TILE)
    row_at = tl.load(order_ptr + index, mask=index < R, other=-1)

    # The rows.
    status = tl.full([ROWS], _OK, tl.int32)  # by row
    base = tl.zeros([ROWS], tl.float64)  # by place, as all others
    log_1 = tl.zeros([ROWS], tl.float64)
    m = tl.zeros([ROWS], tl.float64)
    open_log = tl.full([ROWS], -_INF, tl.float64)  # the largest weight, and the sum relative to it
    open_sum = tl.zeros([ROWS], tl.float64)
    closing_log = tl.full([ROWS], -_INF, tl.float64)  # the same, by row
    closing_sum = tl.zeros([ROWS], tl.float64)
    for place in range(R):
        row = tl.load(order_ptr + place)
        weight = tl.load(log_weight_ptr + first + row)
        if weight != -_INF:
            found, tile_index, top, mass, m_row, rest_1, _, _ = row_masses(
                work_ptr, first + row, tiles, alpha, alpha, False, TILES
            )
            found = tl.where(weight < _INF, found, _NAN)
            m_row = m_row.to(tl.float64)
            log_1_row = log1p(rest_1)
            base_row = weight + length_bonus - alpha * log_1_row
            split_row = split_ptr + (first + row) * (4 * tiles)

            live = tile_index < tiles
            entries = split_row + tile_index
            open_mass = tl.load(entries + tiles, mask=live, other=0.0)
            whole = open_mass < 0.0
            open_top = tl.load(entries, mask=live & (open_mass >= 0.0), other=-_INF)
            open_top = tl.where(whole, top, open_top)
            open_mass = tl.where(whole, mass.to(tl.float32), open_mass)
            tl.store(entries, open_top, mask=live)
            tl.store(entries + tiles, open_mass, mask=live)
            highest, parts = _tile_parts(open_top, open_mass.to(tl.float64), alpha)
            open_log = _put(open_log, index, place, base_row + alpha * (highest.to(tl.float64) - m_row))
            open_sum = _put(open_sum, index, place, tl.sum(parts, 0))

            _, top, mass = _closing_tiles(split_row, work_ptr + (first + row) * (4 * tiles), tiles, TILES)
            highest, parts = _tile_parts(top, mass, alpha)
            closing_log = _put(closing_log, index, row, base_row + alpha * (highest.to(tl.float64) - m_row))
            closing_sum = _put(closing_sum, index, row, tl.sum(parts, 0))

            status = _put(status, index, row, found)
            base = _put(base, index, place, base_row)
            log_1 = _put(log_1, index, place, log_1_row)
            m = _put(m, index, place, m_row)
    tl.debug_barrier()  # the split records of all rows are there

    # The reference: its child is of row N.
    own_place = tl.min(tl.where(row_at == N, index, _FAR), 0)
    own_ptr = row_of(logits_ptr, first + N, stride_row, 1)
    asked = (wanted >= 0) & (take(status, index, N) == _OK)
    inside = asked & (wanted < V) & (tl.load(log_weight_ptr + first + N) > -_INF)
    own = tl.where(inside, wanted, 0).to(tl.int32)
    own_z = tl.load(own_ptr + own, mask=inside, other=-_INF).to(tl.float32).to(tl.float64)
    if asked & (own_z == -_INF):
        status = _put(status, index, N, _BAD_TOKEN)
    good = tl.max((status != _OK).to(tl.int32), 0) == 0
    own_stop_ptr = _stop_row(stop_state_ptr, stop_next_ptr, first + N, V, S, has_stops)
    own_closes = _closes(own, V, last, eos_ptr, E, own_stop_ptr, has_stops)
    own_ends = good & asked & own_closes
    own_goes_on = good & asked & (own_closes == 0)
    own_gap = own_z - take(m, index, own_place)
    own_weight = take(base, index, own_place) + alpha * own_gap
    own_logp = own_gap - take(log_1, index, own_place)

    # The closing children: what they add up to, and whether one of them is kept, and which.
    tally = tally_ptr + group * _COLUMNS
    old_others = tl.load(tally + _OTHERS)
    old_mass = tl.load(tally + _MASS)
    others = old_others
    kept = tl.load(tally + _KEPT)
    of_reference = tl.where(own_ends, own_weight + bonus, tl.load(tally + _REFERENCE))
    candidate_row = -1
    candidate_token = -1
    candidate_logp = tl.full([], _UNDEFINED, tl.float64)
    shift, closing = _relative(tl.where(good, closing_log, -_INF))
    closing = closing * closing_sum
    closed = tl.sum(closing, 0)
    log_closed = tl.where(closed > 0.0, shift + tl.log(tl.where(closed > 0.0, closed, 1.0)), -_INF)
    log_mass = _log_add(_log_add(old_mass, log_closed), tl.where(own_ends, own_weight, -_INF))
    if closed > 0.0:
        others = _log_add(old_others, log_closed + bonus)
        old_share = tl.exp(old_others - others)
        u = tl.load(uniform_ptr + 2 * group + 1)
        if u >= old_share:
            row, part = _first_above(closing, index, (u - old_share) / (1.0 - old_share) * closed)
            record = work_ptr + (first + row) * (4 * tiles)
            tile_index, top, mass = _closing_tiles(split_ptr + (first + row) * (4 * tiles), record, tiles, TILES)
            _, parts = _tile_parts(top, mass, alpha)
            tile, part = _first_above(parts, tile_index, part * tl.sum(parts, 0))
            row_ptr = row_of(logits_ptr, first + row, stride_row, 1)
            stop_ptr = _stop_row(stop_state_ptr, stop_next_ptr, first + row, V, S, has_stops)
            z = _read_tile(row_ptr, tile, V, -1, TILE, 1)
            token = tile * TILE + entry
            closes = _closes(token, V, last, eos_ptr, E, stop_ptr, has_stops)
            closes = closes & ((row != N) | (token != wanted))
            mass_64 = _exact_masses(tl.where(closes, z, -_INF), take(top, tile_index, tile), alpha)
            at, _ = _first_above(mass_64, entry, part * tl.sum(mass_64, 0))
            candidate_row = row
            candidate_token = tile * TILE + at
            place = tl.min(tl.where(row_at == row, index, _FAR), 0)
            gap = tl.load(row_ptr + candidate_token).to(tl.float64) - take(m, index, place)
            kept = take(base, index, place) + alpha * gap + bonus
            candidate_logp = gap - take(log_1, index, place)

    # The heavy children, and kappa.
    survivors = 0
    places = tl.full([ROWS], -1, tl.int32)  # by survivor, as all of these
    tokens = tl.zeros([ROWS], tl.int32)
    weights = tl.zeros([ROWS], tl.float64)
    logps = tl.zeros([ROWS], tl.float64)
    shift, most = _relative(tl.where(good, open_log, -_INF))  # by place: the heaviest of what is left, and its sum
    left = most * open_sum
    largest = tl.max(most, 0)
    rest = tl.sum(left, 0)
    log_floor = tl.full([], -_INF, tl.float64)
    if rest > 0.0:
        log_floor = log_rho + _log_add(log_mass, shift + tl.log(rest))
    floor = tl.exp(tl.minimum(log_floor - shift, _MOST_LOG))
    own_is_heavy = False
    while (largest > 0.0) & (largest >= floor) & (largest * (N - survivors).to(tl.float64) > rest):
        place = tl.min(tl.where(most == largest, index, _FAR), 0)
        row = tl.load(order_ptr + place)
        row_ptr = row_of(logits_ptr, first + row, stride_row, 1)
        stop_ptr = _stop_row(stop_state_ptr, stop_next_ptr, first + row, V, S, has_stops)
        split_row = split_ptr + (first + row) * (4 * tiles)
        tile_index, top, mass = _open_tiles(split_row, tiles, TILES)
        highest = tl.max(top, 0)
        tile = tl.min(tl.where(top == highest, tile_index, _FAR), 0)
        token, z = _open_tile(
            row_ptr, tile, V, last, eos_ptr, E, stop_ptr, has_stops, place, survivors, places, tokens, index, TILE
        )
        child = tl.min(tl.where(z == highest, token, _FAR), 0)
        gap = highest.to(tl.float64) - take(m, index, place)
        places = _put(places, index, survivors, place)
        tokens = _put(tokens, index, survivors, child)
        weights = _put(weights, index, survivors, take(base, index, place) + alpha * gap)
        logps = _put(logps, index, survivors, gap - take(log_1, index, place))
        own_is_heavy = own_is_heavy | ((place == own_place) & (child == own))
        survivors += 1

        z = tl.where(token == child, -_INF, z)
        z_top = tl.max(z, 0)
        z_mass = tl.sum(_exact_masses(z, z_top, alpha), 0).to(tl.float32)
        tl.store(split_row + tile, z_top)
        tl.store(split_row + tiles + tile, z_mass)
        top = _put(top, tile_index, tile, z_top)
        mass = _put(mass, tile_index, tile, z_mass.to(tl.float64))
        highest, parts = _tile_parts(top, mass, alpha)
        log_most = take(base, index, place) + alpha * (highest.to(tl.float64) - take(m, index, place)) - shift
        next_most = tl.where(highest == -_INF, 0.0, tl.exp(log_most))
        most = _put(most, index, place, next_most)
        left = _put(left, index, place, next_most * tl.sum(parts, 0))
        largest = tl.max(most, 0)
        rest = tl.sum(left, 0)
        tl.debug_barrier()  # the tile's record is there for all threads
    heavy = survivors
    log_threshold = log_floor
    if rest > 0.0:
        log_threshold = tl.maximum(log_floor, shift + tl.log(rest) - tl.log((N - heavy).to(tl.float64)))

    # The light children: points kappa (u + k) on the line of what is left.
    by_places = log_threshold > log_floor
    above = log_threshold - shift
    kappa = tl.where(above < _MOST_LOG, tl.exp(tl.minimum(above, _MOST_LOG)), _INF)
    u = tl.load(uniform_ptr + 2 * group)
    points = 0
    if rest > 0.0:
        points = N - heavy
        if by_places == 0:
            many = rest / kappa
            if many < points.to(tl.float64):
                points = many.to(tl.int32)
                points += (points.to(tl.float64) < many).to(tl.int32)
    own_is_due = own_goes_on & (own_is_heavy == 0)
    own_point = -1
    if own_is_due:
        own_point = 0
        if log_threshold > -_INF:
            # Where the reference lies on the line, and the uniform that a draw with this one among its points had.
            tile_index, top, mass = _open_tiles(split_ptr + (first + N) * (4 * tiles), tiles, TILES)
            _, parts = _tile_parts(top, mass, alpha)
            tile = own // TILE
            token, z = _open_tile(
                own_ptr, tile, V, last, eos_ptr, E, own_stop_ptr, has_stops, own_place, heavy, places, tokens, index,
                TILE,
            )  # fmt: skip
            mass_64 = _exact_masses(z, take(top, tile_index, tile), alpha)
            total_64 = tl.sum(mass_64, 0)
            row_unit = take(most, index, own_place)
            unit = row_unit * take(parts, tile_index, tile) / total_64
            start = tl.sum(tl.where(index < own_place, left, 0.0), 0)
            start += row_unit * tl.sum(tl.where(tile_index < tile, parts, 0.0), 0)
            start += unit * tl.sum(tl.where(token < own, mass_64, 0.0), 0)
            v = (start + u * unit * tl.sum(tl.where(token == own, mass_64, 0.0), 0)) / kappa
            end = tl.maximum(points, 1).to(tl.float64)
            v = tl.where(v < end, v, end * _BELOW_ONE)  # rounding can take the last child of the line beyond its end
            own_point = v.to(tl.int32)
            u = v - own_point.to(tl.float64)
            own_weight = log_threshold + tl.log(total_64 / take(mass, tile_index, tile))
    place_before = -1
    child_before = -1
    for k in range(tl.maximum(points, own_is_due.to(tl.int32))):
        place = own_place
        child = own
        weight = own_weight
        logp = own_logp
        chosen = k == own_point
        if chosen == 0:
            target = (u + k) * kappa
            if by_places | (target < rest):
                place, part = _first_above(left, index, target)
                row = tl.load(order_ptr + place)
                row_ptr = row_of(logits_ptr, first + row, stride_row, 1)
                stop_ptr = _stop_row(stop_state_ptr, stop_next_ptr, first + row, V, S, has_stops)
                tile_index, top, mass = _open_tiles(split_ptr + (first + row) * (4 * tiles), tiles, TILES)
                _, parts = _tile_parts(top, mass, alpha)
                tile, part = _first_above(parts, tile_index, part * tl.sum(parts, 0))
                token, z = _open_tile(
                    row_ptr, tile, V, last, eos_ptr, E, stop_ptr, has_stops, place, heavy, places, tokens, index, TILE
                )
                mass_64 = _exact_masses(z, take(top, tile_index, tile), alpha)
                total_64 = tl.sum(mass_64, 0)
                at, _ = _first_above(mass_64, entry, part * total_64)
                child = tile * TILE + at
                weight = log_threshold + tl.log(total_64 / take(mass, tile_index, tile))
                logp = tl.load(row_ptr + child).to(tl.float64) - take(m, index, place) - take(log_1, index, place)
                is_own = own_is_due & (place == own_place) & (child == own)
                # Only rounding can make adjacent points choose the same child.
                chosen = (is_own == 0) & ((place != place_before) | (child != child_before))
        if chosen:
            places = _put(places, index, survivors, place)
            tokens = _put(tokens, index, survivors, child)
            weights = _put(weights, index, survivors, weight)
            logps = _put(logps, index, survivors, logp)
            survivors += 1
            place_before = place
            child_before = child

    # Rows: the reference's is N, the first child of a particle takes its parent's, others wait for one without a child.
    destination = tl.full([ROWS], -1, tl.int32)
    taken = tl.zeros([ROWS], tl.int32)  # by row
    for j in range(survivors):
        place = take(places, index, j)
        row = tl.load(order_ptr + place)
        is_own = own_goes_on & (row == N) & (take(tokens, index, j) == own)
        is_first = (row < N) & (take(taken, index, row) == 0)
        goes_to = tl.where(is_own, N, tl.where(is_first, row, -1))
        destination = _put(destination, index, j, goes_to)
        taken = _put(taken, index, goes_to, 1)
    live = index < survivors
    waits = live & (destination < 0)
    vacant = (index < N) & (taken == 0)
    child_order_ptr += first
    number = tl.cumsum(vacant.to(tl.int32), 0) - 1
    tl.store(child_order_ptr + number, index, mask=vacant)
    tl.debug_barrier()  # the list of vacant rows is there
    turn = tl.cumsum(waits.to(tl.int32), 0) - 1
    destination = tl.where(waits, tl.load(child_order_ptr + turn, mask=waits, other=-1), destination)
    tl.debug_barrier()  # it has been read, and so has the tally
    parents = tl.load(order_ptr + places, mask=live, other=-1)
    tl.store(parent_ptr + first + destination, parents, mask=live)
    tl.store(token_ptr + first + destination, tokens.to(tl.int64), mask=live)
    tl.store(child_log_weight_ptr + first + destination, weights, mask=live)
    tl.store(logp_ptr + first + destination, logps, mask=live)
    filled = (taken != 0) | (vacant & (number < tl.sum(waits.to(tl.int32), 0)))
    empty = (index < R) & (filled == 0)
    tl.store(parent_ptr + first + index, -1, mask=empty)
    tl.store(token_ptr + first + index, -1, mask=empty)
    tl.store(child_log_weight_ptr + first + index, -_INF, mask=empty)
    tl.store(logp_ptr + first + index, _UNDEFINED, mask=empty)

    # The order of the new prefixes: by the parent's place, then the token.
    key = (places.to(tl.int64) << 32) | tokens.to(tl.int64)
    rank = tl.zeros([ROWS], tl.int32)
    for j in range(survivors):
        rank += (take(key, index, j) < key).to(tl.int32)
    tl.store(child_order_ptr + rank, destination, mask=live)
    tl.store(child_order_ptr + survivors + tl.cumsum(empty.to(tl.int32), 0) - 1, index, mask=empty)

    tl.store(status_ptr + first + index, status, mask=index < R)
    tl.store(candidate_ptr + 2 * group, candidate_row)
    tl.store(candidate_ptr + 2 * group + 1, candidate_token)
    tl.store(candidate_logp_ptr + group, candidate_logp)
    tl.store(log_threshold_ptr + group, tl.where(good, log_threshold, _UNDEFINED))
    tl.store(tally + _OTHERS, others)
    tl.store(tally + _KEPT, kept)
    tl.store(tally + _REFERENCE, of_reference)
    tl.store(tally + _MASS, tl.where(good, log_mass, old_mass))


@triton.jit(
    do_not_specialize=["G"],
    do_not_specialize_on_alignment=["tally_ptr", "uniform_ptr", "moved_ptr"],
)
def _select_kernel(
    tally_ptr,  # [G, 4] fp64
    uniform_ptr,  # [G] fp64
    moved_ptr,  # [G] bool
    G,
    BLOCK: tl.constexpr,
):
    """Whether the kept candidate takes the reference's place, with probability min(1, (G - g_r) / (G - g_k))."""
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = group < G
    tally = tally_ptr + group.to(tl.int64) * _COLUMNS
    others = tl.load(tally + _OTHERS, mask=live, other=-_INF)
    kept = tl.load(tally + _KEPT, mask=live, other=-_INF)
    reference = tl.load(tally + _REFERENCE, mask=live, other=-_INF)
    some = others > -_INF
    top = tl.where(some, tl.maximum(others, reference), 0.0)
    mass = tl.exp(others - top)
    without_kept = tl.maximum(mass - tl.exp(kept - top), 0.0) + tl.exp(reference - top)
    u = tl.load(uniform_ptr + group, mask=live, other=0.0)
    tl.store(moved_ptr + group, some & (u * without_kept < mass), mask=live)


# ---- launchers


def widths(rows: int, vocabulary: int) -> tuple[int, int]:
    """Of the finisher's vectors over the R rows of a group and the tiles of a row."""
    tiles = tiles_block(vocabulary)
    if rows <= SMALL[0] and tiles <= SMALL[1]:
        return SMALL
    return LARGE[0], max(LARGE[1], tiles)


def branch_particles_out(
    logits, alpha, log_weight, order, stop_state, reference, last, closing_bonus, uniform, eos, stop_next,
    length_bonus, rho, workspace, tally, parent, token, child_log_weight, logp, child_order, candidate, candidate_logp,
    log_threshold, status,
) -> None:  # fmt: skip
    """One position of G groups: two launches, no synchronisation, no allocation. Shapes: see
    `power_kernels.branch_particles`."""
    groups, rows = log_weight.shape
    vocabulary = logits.shape[1]
    tiles = tile_count(vocabulary)
    programs, each = mass_split(groups * rows, tiles)
    width = vector_width(logits)
    rows_width, tiles_width = widths(rows, vocabulary)
    records = workspace[: groups * rows * 4 * tiles]
    splits = workspace[groups * rows * 4 * tiles :]
    has_stops = int(stop_next is not None)
    states = stop_next.shape[0] if has_stops else 1
    if not has_stops:
        stop_state = stop_next = status.view(torch.int16)  # not read
    launch(
        _branch_mass_kernel,
        (groups * rows * programs,),
        logits.device,
        logits,
        alpha,
        log_weight,
        stop_state,
        reference,
        last,
        eos,
        stop_next,
        records,
        splits,
        vocabulary,
        logits.stride(0) // width,
        tiles,
        programs,
        each,
        rows,
        eos.shape[0],
        states,
        has_stops,
        VEC=width,
        **BRANCH_MASS,
    )
    launch(
        _branch_kernel,
        (groups,),
        logits.device,
        logits,
        alpha,
        log_weight,
        order,
        stop_state,
        reference,
        last,
        closing_bonus,
        uniform,
        eos,
        stop_next,
        records,
        splits,
        tally,
        parent,
        token,
        child_log_weight,
        logp,
        child_order,
        candidate,
        candidate_logp,
        log_threshold,
        status,
        vocabulary,
        logits.stride(0),
        tiles,
        rows,
        eos.shape[0],
        states,
        has_stops,
        float(length_bonus),
        math.log(rho) - math.log(rows - 1) if rho > 0 else -math.inf,
        ROWS=rows_width,
        TILES=tiles_width,
        **BRANCH,
        **({} if torch.version.hip else {"maxnreg": REGISTERS}),
    )


def select_candidate_out(tally: torch.Tensor, uniform: torch.Tensor, moved: torch.Tensor) -> None:
    """Whether the kept candidate takes the reference's place. Shapes: see `power_kernels.select_candidate`."""
    groups = tally.shape[0]
    grid = (triton.cdiv(groups, SELECT["BLOCK"]),)
    launch(_select_kernel, grid, tally.device, tally, uniform, moved, groups, **SELECT)


MASS_SIGNATURE = {
    "alpha_ptr": "*fp32",
    "log_weight_ptr": "*fp64",
    "stop_state_ptr": "*i16",
    "reference_ptr": "*i64",
    "last_ptr": POINTER[torch.bool],
    "eos_ptr": "*i64",
    "stop_next_ptr": "*i16",
    "work_ptr": "*fp32",
    "split_ptr": "*fp32",
    **dict.fromkeys(("V", "tiles", "programs", "each", "R", "E", "S", "has_stops"), "i32"),
}
BRANCH_SIGNATURE = {
    **{name: MASS_SIGNATURE[name] for name in MASS_SIGNATURE if name not in ("programs", "each")},
    **dict.fromkeys(("order_ptr", "parent_ptr", "child_order_ptr", "status_ptr"), "*i32"),
    **dict.fromkeys(("token_ptr", "candidate_ptr"), "*i64"),
    **dict.fromkeys(("closing_bonus_ptr", "uniform_ptr", "tally_ptr", "child_log_weight_ptr", "logp_ptr"), "*fp64"),
    **dict.fromkeys(("candidate_logp_ptr", "log_threshold_ptr"), "*fp64"),
    **dict.fromkeys(("length_bonus", "log_rho"), "fp64"),
}


def configurations() -> list[Configuration]:
    """Every dtype; the masses in 16-byte loads and single entries, the finisher small and large."""
    found = logits_configurations("branch_mass", _branch_mass_kernel, MASS_SIGNATURE, BRANCH_MASS, {})
    for rows, tiles in (SMALL, LARGE):
        chosen = {"ROWS": (rows,), "TILES": (tiles,)}
        finishers = logits_configurations("branch", _branch_kernel, BRANCH_SIGNATURE, BRANCH, chosen)
        found += [replace(finisher, maxnreg=REGISTERS) for finisher in finishers]
    constexprs, warps = split(SELECT)
    signature = {"tally_ptr": "*fp64", "uniform_ptr": "*fp64", "moved_ptr": POINTER[torch.bool], "G": "i32"}
    return [*found, Configuration("select", _select_kernel, signature, constexprs, num_warps=warps)]
