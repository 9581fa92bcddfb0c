"""sample_tokens: one token a row from softmax(beta z), with its log-probabilities and weight (DESIGN 2, 4, 5.1).

    m = max z          R1 = sum_v exp(z_v - m) without one argmax          Rb = the same of exp(beta (z_v - m))
    logp = (z_x - m) - log1p(R1)       logq = beta (z_x - m) - log1p(Rb)
    weight = (alpha - beta) logp + log1p(Rb) - beta log1p(R1)          entropy = log1p(R1) - E / (1 + R1)
    E = sum_v (z_v - m) exp(z_v - m)   x = the first v, in vocabulary order, with CDF_q(v) > u

Two launches. `_mass_kernel`, one warp a (row, tile), reads every logit once and writes four fp32 numbers a tile,
relative to the tile's own maximum; it knows neither randomness nor exclusion and also serves scoring. `_finish_kernel`,
one program a row, combines the tiles in float64, picks a tile by their prefix and reads that tile once more (and the
excluded token's tile when there is one).

A logit costs one exponential where beta is an integer up to 16, whose powers come by squaring, and two otherwise. One
row of 151,936 logits is 149 warps, more than a device has multiprocessors: every load of the row is in flight at once,
and a narrower tile could only add to the finisher's work.

Shapes: logits [B, V] (fp32, fp16, bf16; unit inner stride, any row stride), everything else [B] and contiguous.
Bytes moved: B * V * itemsize read once, + 16 B * V / TILE written and read, + one or two tiles a row read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..state import Status
from . import Configuration, launch, logits_configurations
from .rng import uniforms

# A tile is one warp's, 32 entries a thread: the reductions of larger programs through shared memory were a third of the
# kernel's instructions. The same for every batch, so that a row's bits do not depend on it.
TILE = 1024
_THREADS = tl.constexpr(32)  # of a warp: what a tile's entries are summed over last; a wave of 64 adds one step
MASS = {"TILE": TILE, "num_warps": 1}
_PROGRAMS = 8192  # one-warp programs that fill any device; beyond that each takes more tiles, to save their starts
FINISH = {"TILE": TILE, "num_warps": 4}
LEAST_TILES = 256  # every vocabulary up to 262,144 shares one specialisation
MOST_TILES = 512  # what is compiled and checked offline: vocabularies up to 524,288

_OK = tl.constexpr(int(Status.OK))
_NAN = tl.constexpr(int(Status.NAN))
_POS_INF = tl.constexpr(int(Status.POS_INF))
_NO_MASS = tl.constexpr(int(Status.NO_MASS))
_BAD_TOKEN = tl.constexpr(int(Status.BAD_TOKEN))

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_INF = tl.constexpr(float("inf"))
_UNDEFINED = tl.constexpr(float("nan"))
_FAR = tl.constexpr(0x7FFFFFFF)
_MOST_POWER = tl.constexpr(
    16
)  # beyond, the rounding of e = exp(z - m) would grow to more than that of exp(beta (z - m))


# ---- helpers in float64


@triton.jit
def log1p(x):
    """log(1 + x) of float64 values >= 0, by Kahan's formula: no library call that a target might lack."""
    u = 1.0 + x
    plain = u == 1.0
    return tl.where(plain, x, tl.log(u) * x / tl.where(plain, 1.0, u - 1.0))


@triton.jit
def take(values, index, at):
    """values[at] of a vector, where index is its tl.arange; 0 when `at` is outside."""
    return tl.sum(tl.where(index == at, values, tl.zeros_like(values)), 0)


# ---- tile masses


@triton.jit
def row_of(logits_ptr, row, stride_row, VEC: tl.constexpr):
    """The row's first entry. With VEC > 1 the launcher has seen that every row begins at a multiple of 16 bytes; Triton
    sees it from the pointer's own alignment and the stride in units of VEC."""
    return logits_ptr + row.to(tl.int64) * stride_row * VEC


@triton.jit
def _thread_sums(x, VEC: tl.constexpr):
    """The sum of the entries that each thread of a warp holds when they come VEC at a time: [TILE] -> [_THREADS]."""
    return tl.sum(tl.sum(tl.reshape(x, [x.shape[0] // (_THREADS * VEC), _THREADS, VEC]), 2), 0)


@triton.jit
def _thread_maxima(x, VEC: tl.constexpr):
    return tl.max(tl.max(tl.reshape(x, [x.shape[0] // (_THREADS * VEC), _THREADS, VEC]), 2), 0)


@triton.jit
def _power_sums(e, n, VEC: tl.constexpr):
    """Each thread's sum of e**n, n = 1, 2, 3, ...: by squaring, the last square together with the sum."""
    while ((n & 1) == 0) & (n > 2):
        e = e * e
        n = n >> 1
    if n == 2:
        sums = _thread_sums(e * e, VEC)
    elif n == 1:
        sums = _thread_sums(e, VEC)
    else:
        odd = e
        while n > 3:
            n = n >> 1
            e = e * e
            if (n & 1) == 1:
                odd = odd * e
        sums = _thread_sums(odd * (e * e), VEC)
    return sums


@triton.jit
def _tile_record(
    logits, beta, power, record, tiles, left, ENTROPY: tl.constexpr, TILE: tl.constexpr, VEC: tl.constexpr
):
    """The four numbers of one tile, from logits (a pointer to its first entry, of which `left` remain) to record."""
    entry = tl.arange(0, TILE)
    z = tl.load(logits + entry, mask=entry < left, other=-_INF).to(tl.float32)
    highest = _thread_maxima(z, VEC)
    top = tl.max(highest, 0)
    if top == _INF:  # NaN is told first, and max() skips it
        top = tl.where(tl.max((z != z).to(tl.int32), 0) > 0, _UNDEFINED, top)
    shift = tl.where(top == -_INF, 0.0, top)

    # One argmax must leave the sums before anything is added to it, or its 1 would round the rest away. Comparing every
    # entry with the maximum was a quarter of the instructions. Instead the thread that holds an argmax is left out
    # of the sums, and its 32 entries are read once more, one a thread: only these are compared.
    thread = tl.arange(0, _THREADS)
    winner = tl.min(tl.where(highest == top, thread, _THREADS - 1), 0)
    others = thread != winner
    held = (thread // VEC) * (_THREADS * VEC) + winner * VEC + thread % VEC
    y = tl.load(logits + held, mask=held < left, other=-_INF).to(tl.float32)
    peak = y == shift
    # Every entry at the maximum leaves these 32, all but one come back.
    back = tl.maximum(tl.sum(peak.to(tl.int32), 0) - 1, 0).to(tl.float32)
    dy = tl.where(peak, -_INF, y - shift) * _LOG2E

    d = (z - shift) * _LOG2E
    rb = tl.zeros_like(highest)
    if power == 0:  # before e, so that the two exponentials never share the registers
        rb = _thread_sums(tl.exp2(d * beta), VEC)
    e = tl.exp2(d)
    r1 = tl.sum(tl.where(others, _thread_sums(e, VEC), 0.0) + tl.exp2(dy), 0)
    if ENTROPY:
        # The argmax adds 0. exp2(-300) is 0 in fp32, so the bound only keeps -inf * 0 out.
        tl.store(record + 3 * tiles, tl.sum(tl.maximum(d, -300.0) * e, 0) * _LN2)
    tl.store(record, tl.where((r1 != r1) & (top != _INF), _UNDEFINED, top))  # a NaN below a finite maximum
    tl.store(record + tiles, r1 + back)
    if power > 0:
        rb = _power_sums(e, power, VEC)
    tl.store(record + 2 * tiles, tl.sum(tl.where(others, rb, 0.0) + tl.exp2(dy * beta), 0) + back)


@triton.jit
def tile_records(
    logits, beta, record, V, tiles, start, each, ENTROPY: tl.constexpr, TILE: tl.constexpr, VEC: tl.constexpr
):
    """Those of tiles [start, start + each) of one row, from logits (its first entry) to record (its first tile's)."""
    whole = (beta == tl.floor(beta)) & (beta >= 1.0) & (beta <= _MOST_POWER)
    power = tl.where(whole, beta, 0.0).to(tl.int32)
    for tile in range(start, tl.minimum(start + each, tiles)):
        first = tile * TILE
        left = tl.multiple_of(V - first, VEC)
        _tile_record(logits + first, beta, power, record + tile, tiles, left, ENTROPY, TILE, VEC)


@triton.jit(
    do_not_specialize=["V", "stride_row", "tiles", "programs", "each"],
    do_not_specialize_on_alignment=["beta_ptr", "work_ptr"],
)
def _mass_kernel(
    logits_ptr,  # [B, V] fp32 | fp16 | bf16, row stride stride_row
    beta_ptr,  # [B] fp32
    work_ptr,  # [B, 4, tiles] fp32: maximum, R1, Rb, entropy sum of each tile
    V,
    stride_row: tl.int64,  # in units of VEC entries
    tiles,
    programs,  # a row
    each,  # tiles a program
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
    VEC: tl.constexpr,  # entries a load: 16 bytes, or 1
):
    """A part of one row's tiles, one after the other.

    A tile's maximum also tells what is wrong with it: NaN if an entry is NaN, else +inf if one is +inf, -inf if there
    is no mass.
    """
    row = tl.program_id(0) // programs
    start = (tl.program_id(0) % programs) * each
    logits = row_of(logits_ptr, row, stride_row, VEC)
    record = work_ptr + row.to(tl.int64) * (4 * tiles)
    tile_records(logits, tl.load(beta_ptr + row), record, V, tiles, start, each, ENTROPY, TILE, VEC)


# ---- rows


@triton.jit
def _read_tile(row_ptr, tile, V, skip, TILE: tl.constexpr, VEC: tl.constexpr):
    """The logits of one tile again, fp32 [TILE], -inf at `skip` and past the vocabulary."""
    first = tile * TILE
    entry = tl.arange(0, TILE)
    left = tl.multiple_of(V - first, VEC)
    z = tl.load(row_ptr + first + entry, mask=entry < left, other=-_INF).to(tl.float32)
    return tl.where(entry == skip - first, -_INF, z)


@triton.jit
def row_masses(work_ptr, row, tiles, alpha, beta, has_entropy, TILES: tl.constexpr):
    """The records of one row, combined in float64. alpha, beta: float64; unsound ones make the status NAN.

    Returns status, tile numbers [TILES], tile maxima fp32 [TILES], tile masses 1 + rb float64 [TILES], and the row's
    maximum, R1, Rb, E (undefined unless has_entropy).
    """
    index = tl.arange(0, TILES)
    live = index < tiles
    record = work_ptr + row.to(tl.int64) * (4 * tiles) + index
    top = tl.load(record, mask=live, other=-_INF)
    r1 = tl.load(record + tiles, mask=live, other=0.0).to(tl.float64)
    rb = tl.load(record + 2 * tiles, mask=live, other=0.0).to(tl.float64)

    m = tl.max(top, 0)
    nan = tl.max((top != top).to(tl.int32), 0)
    status = tl.where(nan > 0, _NAN, tl.where(m == _INF, _POS_INF, tl.where(m == -_INF, _NO_MASS, _OK)))
    # Nobody looked at the exponents before: that would have made the host wait.
    sound = (alpha > 0.0) & (alpha < _INF) & (beta > 0.0) & (beta < _INF)
    status = tl.where(sound, status, _NAN)
    m = tl.where(status == _OK, m, 0.0)

    empty = top == -_INF
    # in float64: fp32 would overflow between logits of opposite signs
    d = tl.where(empty, 0.0, top.to(tl.float64) - m.to(tl.float64))
    # Exactly one argmax of the row leaves the sums: that of the first tile which holds one.
    argmax_tile = index == tl.min(tl.where(top == m, index, _FAR), 0)
    e1 = tl.where(empty, 0.0, tl.exp(d))
    eb = tl.where(empty, 0.0, tl.exp(d * beta))
    rest_1 = tl.sum(tl.where(argmax_tile, r1, e1 * (1.0 + r1)), 0)
    rest_b = tl.sum(tl.where(argmax_tile, rb, eb * (1.0 + rb)), 0)
    moment = rest_1
    if has_entropy:
        gaps = tl.load(record + 3 * tiles, mask=live, other=0.0).to(tl.float64)
        moment = tl.sum(e1 * (gaps + d * (1.0 + r1)), 0)
    return status, index, top, 1.0 + rb, m, rest_1, rest_b, moment


@triton.jit
def quantities(status, z, m, rest_1, rest_b, moment, alpha, beta):
    """logp, logq, weight of the token with logit z (float64) and the row's entropy, all fp32; NaN where the status is
    not OK."""
    ok = status == _OK
    gap = z - m.to(tl.float64)
    log_1 = log1p(rest_1)
    log_b = log1p(rest_b)
    logp = gap - log_1
    weight = tl.where(alpha == beta, 0.0, (alpha - beta) * logp) + (log_b - beta * log_1)
    weight = tl.where((beta >= 1.0) & (beta <= alpha), tl.minimum(weight, 0.0), weight)
    # A given token may have no mass; none is drawn without.
    weight = tl.where(z == -_INF, -_INF, weight)
    entropy = log_1 - moment / (1.0 + rest_1)
    return (
        tl.where(ok, logp, _UNDEFINED).to(tl.float32),
        tl.where(ok, beta * gap - log_b, _UNDEFINED).to(tl.float32),
        tl.where(ok, weight, _UNDEFINED).to(tl.float32),
        tl.where(ok, entropy, _UNDEFINED).to(tl.float32),
    )


@triton.jit
def store_quantities(
    row, status, z, m, rest_1, rest_b, moment, alpha, beta, logp_ptr, logq_ptr, weight_ptr, entropy_ptr, status_ptr,
    has_entropy,
):  # fmt: skip
    """`quantities` of a row, and its status."""
    logp, logq, weight, entropy = quantities(status, z, m, rest_1, rest_b, moment, alpha, beta)
    tl.store(logp_ptr + row, logp)
    tl.store(logq_ptr + row, logq)
    tl.store(weight_ptr + row, weight)
    if has_entropy:
        tl.store(entropy_ptr + row, entropy)
    tl.store(status_ptr + row, status)


@triton.jit
def _tile_masses(z, top, beta, TILE: tl.constexpr):
    """exp(beta (z - top)) of one tile for a float64 scan, in the arithmetic of the mass kernel; 0 where z is -inf."""
    return tl.exp2((z - tl.where(top == -_INF, 0.0, top)) * _LOG2E * beta).to(tl.float64)


@triton.jit
def excluded_token(row_ptr, given, status, V):
    """The row's status, BAD_TOKEN for a token of V or more, and the token to leave out of the draw, -1 for none."""
    status = tl.where((status == _OK) & (given >= V), _BAD_TOKEN, status)
    skip = -1
    if (status == _OK) & (given >= 0):
        skip = given.to(tl.int32)
        if tl.load(row_ptr + skip).to(tl.float32) == -_INF:
            skip = -1
    return status, skip


@triton.jit
def draw_token(row_ptr, index, top, mass, m, beta32, u, skip, V, tiles, TILE: tl.constexpr, VEC: tl.constexpr):
    """The token whose part of the CDF holds u, by the tiles of `row_masses`; the row is read again in one or two.

    beta32: fp32. u: float64. skip: a token with mass that may not be drawn, unless nothing else has any, or -1.
    """
    beta = beta32.to(tl.float64)
    if skip >= 0:
        # Only the excluded token's tile changes; its new maximum keeps what is left from underflowing.
        z = _read_tile(row_ptr, skip // TILE, V, skip, TILE, VEC)
        z_top = tl.max(z, 0)
        here = index == skip // TILE
        top = tl.where(here, z_top, top)
        mass = tl.where(here, tl.sum(_tile_masses(z, z_top, beta32, TILE), 0), mass)
        m_draw = tl.max(top, 0)
    else:
        m_draw = m
    if m_draw == -_INF:
        x = skip  # nothing else has mass
    else:
        scale = tl.where(top == -_INF, 0.0, tl.exp((top - m_draw).to(tl.float64) * beta))
        mass = mass * scale
        prefix = tl.cumsum(mass, 0)
        target = u * take(prefix, index, tiles - 1)
        tile = tl.min(tl.where((prefix > target) & (mass > 0.0), index, _FAR), 0)
        if tile == _FAR:  # rounding alone can lead here
            tile = tl.max(tl.where(mass > 0.0, index, 0), 0)
        # Of the tile's mass: within the tile the sums below are what counts, so both sides are scaled to them.
        part = tl.maximum(target - take(prefix, index, tile - 1), 0.0)
        of = take(mass, index, tile)
        z = _read_tile(row_ptr, tile, V, skip, TILE, VEC)
        token = tile * TILE + tl.arange(0, TILE)
        e = _tile_masses(z, take(top, index, tile), beta32, TILE)
        cdf = tl.cumsum(e, 0)
        some = e > 0.0
        x = tl.min(tl.where((cdf * of > part * tl.sum(e, 0)) & some, token, _FAR), 0)
        if x == _FAR:
            x = tl.max(tl.where(some, token, 0), 0)
    return x


@triton.jit(
    do_not_specialize=["V", "stride_row", "tiles", "seed_stride", "has_exclude", "has_entropy"],
    do_not_specialize_on_alignment=[
        "alpha_ptr", "beta_ptr", "seed_ptr", "counter_ptr", "exclude_ptr", "work_ptr", "token_ptr",
        "logp_ptr", "logq_ptr", "weight_ptr", "entropy_ptr", "status_ptr",
    ],
)  # fmt: skip
def _finish_kernel(
    logits_ptr,  # [B, V] fp32 | fp16 | bf16, row stride stride_row
    alpha_ptr,  # [B] fp32
    beta_ptr,  # [B] fp32
    seed_ptr,  # [1] or [B] i64
    counter_ptr,  # [B, 4] i32, the bit patterns of uint32
    exclude_ptr,  # [B] i64, negative: none; not read unless has_exclude
    work_ptr,  # [B, 4, tiles] fp32, see _mass_kernel
    token_ptr,  # [B] i64
    logp_ptr,  # [B] fp32
    logq_ptr,  # [B] fp32
    weight_ptr,  # [B] fp32
    entropy_ptr,  # [B] fp32; not written unless has_entropy
    status_ptr,  # [B] i32
    V,
    stride_row: tl.int64,  # in units of VEC entries
    tiles,
    seed_stride,  # from a row's seed to the next one's: 0 or 1
    has_exclude,
    has_entropy,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    VEC: tl.constexpr,
):
    """One row: its sums, its draw, its token's quantities."""
    row = tl.program_id(0)
    row_ptr = row_of(logits_ptr, row, stride_row, VEC)
    alpha = tl.load(alpha_ptr + row).to(tl.float64)
    beta32 = tl.load(beta_ptr + row)
    beta = beta32.to(tl.float64)
    status, index, top, mass, m, rest_1, rest_b, moment = row_masses(
        work_ptr, row, tiles, alpha, beta, has_entropy, TILES
    )

    skip = -1
    if has_exclude:
        status, skip = excluded_token(row_ptr, tl.load(exclude_ptr + row), status, V)

    x = -1
    if status == _OK:
        c = counter_ptr + row * 4
        seed = tl.load(seed_ptr + row * seed_stride)
        u, _ = uniforms(seed, tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3))
        x = draw_token(row_ptr, index, top, mass, m, beta32, u, skip, V, tiles, TILE, VEC)
    z_x = tl.load(row_ptr + tl.maximum(x, 0)).to(tl.float32).to(tl.float64)
    tl.store(token_ptr + row, x.to(tl.int64))
    store_quantities(
        row, status, z_x, m, rest_1, rest_b, moment, alpha, beta, logp_ptr, logq_ptr, weight_ptr, entropy_ptr,
        status_ptr, has_entropy,
    )  # fmt: skip


# ---- launchers


def tile_count(vocabulary: int) -> int:
    return -(-vocabulary // TILE)


def tiles_block(vocabulary: int) -> int:
    """The width of the finisher's vectors over tiles: a function of the vocabulary alone."""
    return max(LEAST_TILES, triton.next_power_of_2(tile_count(vocabulary)))


def vector_width(logits: torch.Tensor) -> int:
    """Entries a load: 16 bytes where the rows of logits [B, V] begin and end at multiples of them, otherwise 1."""
    item = logits.element_size()
    return 1 if (logits.data_ptr() | logits.stride(0) * item | logits.shape[1] * item) % 16 else 16 // item


def mass_split(rows: int, tiles: int) -> tuple[int, int]:
    """Programs a row of the mass kernel, and tiles a program."""
    each = max(1, rows * tiles // _PROGRAMS)
    return triton.cdiv(tiles, each), each


def seed_stride(seed: torch.Tensor) -> int:
    """From a row's seed to the next one's, in a vector of one for all or one a row."""
    return int(seed.shape[0] != 1)


def mass_out(logits, beta, workspace, *, entropy: bool) -> None:
    """Write the tile records of every row. logits [B, V], beta [B] f32, workspace f32 (>= B * 4 * tiles entries)."""
    rows, vocabulary = logits.shape
    tiles = tile_count(vocabulary)
    programs, each = mass_split(rows, tiles)
    width = vector_width(logits)
    launch(
        _mass_kernel,
        (rows * programs,),
        logits.device,
        logits,
        beta,
        workspace,
        vocabulary,
        logits.stride(0) // width,
        tiles,
        programs,
        each,
        ENTROPY=entropy,
        VEC=width,
        **MASS,
    )


def finish_out(
    logits, alpha, beta, seed, counter, exclude, workspace, token, logp, logq, weight, entropy, status, *,
    width, tiles, tiles_block, constants,
) -> None:  # fmt: skip
    """`sample_tokens_out` from tile records that are in the workspace already.

    width: entries a load. tiles, tiles_block: of a row, and the width of vectors over them. constants: `FINISH`.
    """
    launch(
        _finish_kernel,
        (logits.shape[0],),
        logits.device,
        logits,
        alpha,
        beta,
        seed,
        counter,
        token if exclude is None else exclude,
        workspace,
        token,
        logp,
        logq,
        weight,
        logp if entropy is None else entropy,
        status,
        logits.shape[1],
        logits.stride(0) // width,
        tiles,
        seed_stride(seed),
        int(exclude is not None),
        int(entropy is not None),
        TILES=tiles_block,
        VEC=width,
        **constants,
    )


def sample_tokens_out(
    logits: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    seed: torch.Tensor,
    counter: torch.Tensor,
    exclude: torch.Tensor | None,
    workspace: torch.Tensor,
    token: torch.Tensor,
    logp: torch.Tensor,
    logq: torch.Tensor,
    weight: torch.Tensor,
    entropy: torch.Tensor | None,
    status: torch.Tensor,
) -> None:
    """`sample_tokens` into preallocated tensors: two launches, no synchronisation, no allocation.

    logits [B, V]; seed i64 [1] or [B]; counter i32 [B, 4]; exclude, token i64 [B]; status i32 [B]; alpha, beta, logp,
    logq, weight, entropy f32 [B] (nats); workspace f32, B * 4 * ceil(V / 256) entries or more. All but logits
    contiguous.
    """
    mass_out(logits, beta, workspace, entropy=entropy is not None)
    columns = (token, logp, logq, weight, entropy, status)
    vocabulary = logits.shape[1]
    finish_out(
        logits, alpha, beta, seed, counter, exclude, workspace, *columns,
        width=vector_width(logits), tiles=tile_count(vocabulary), tiles_block=tiles_block(vocabulary), constants=FINISH,
    )  # fmt: skip


FINISH_SIGNATURE = {
    "alpha_ptr": "*fp32",
    "beta_ptr": "*fp32",
    "seed_ptr": "*i64",
    "counter_ptr": "*i32",
    "exclude_ptr": "*i64",
    "work_ptr": "*fp32",
    "token_ptr": "*i64",
    "logp_ptr": "*fp32",
    "logq_ptr": "*fp32",
    "weight_ptr": "*fp32",
    "entropy_ptr": "*fp32",
    "status_ptr": "*i32",
    **dict.fromkeys(("V", "tiles", "seed_stride", "has_exclude", "has_entropy"), "i32"),
}


def configurations() -> list[Configuration]:
    """Every dtype in 16-byte loads and single entries, the masses with and without entropy, both widths over tiles."""
    masses = logits_configurations(
        "mass",
        _mass_kernel,
        {"beta_ptr": "*fp32", "work_ptr": "*fp32", **dict.fromkeys(("V", "tiles", "programs", "each"), "i32")},
        MASS,
        {"ENTROPY": (False, True)},
    )
    finishers = logits_configurations(
        "finish",
        _finish_kernel,
        FINISH_SIGNATURE,
        FINISH,
        {"TILES": (LEAST_TILES, MOST_TILES)},
    )
    return masses + finishers
