"""sample_tokens: one token a row from softmax(beta z), with its log-probabilities and weight (DESIGN 2, 4, 5.1).

    m = max z          R1 = sum_v exp(z_v - m) without one argmax          Rb = the same of exp(beta (z_v - m))
    logp = (z_x - m) - log1p(R1)       logq = beta (z_x - m) - log1p(Rb)
    weight = (alpha - beta) logp + log1p(Rb) - beta log1p(R1)          entropy = log1p(R1) - E / (1 + R1)
    E = sum_v (z_v - m) exp(z_v - m)   x = the first v, in vocabulary order, with CDF_q(v) > u

Two launches. `_mass_kernel`, one warp a (row, tile), reads every logit once and writes four fp32 numbers a tile,
relative to the tile's own maximum; it knows neither randomness nor exclusion and also serves scoring. `_finish_kernel`,
one program a row, combines the tiles in float64, picks a tile by their prefix and reads that tile once more (and the
excluded token's tile when there is one).

Shapes: logits [B, V] (fp32, fp16, bf16; unit inner stride, any row stride), everything else [B] and contiguous.
Bytes moved: B * V * itemsize read once, + 16 B * V / TILE written and read, + one or two tiles a row read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from power_kernels.state import Status
from power_kernels.triton import POINTER, Configuration, launch
from power_kernels.triton.rng import uniforms

# A tile is one warp's, 32 entries a thread: the reductions of larger programs through shared memory were a third of the
# kernel's instructions.
TILE = 1024
MASS = {"TILE": TILE, "num_warps": 1}
_PROGRAMS = 8192  # one-warp programs that fill any device; beyond that each takes more tiles, to save their starts
FINISH = {"TILE": TILE, "num_warps": 4}
LEAST_TILES = 256  # every vocabulary up to 262,144 shares one specialisation

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
def _power_sum(e, beta):
    """sum e**beta of a tile, beta = 1, 2, ... 8: no second exponential."""
    if beta == 4.0:
        e = e * e
        total = tl.sum(e * e, 0)
    elif beta == 2.0:
        total = tl.sum(e * e, 0)
    elif beta == 3.0:
        total = tl.sum(e * e * e, 0)
    elif beta == 1.0:
        total = tl.sum(e, 0)
    elif beta == 5.0:
        e2 = e * e
        total = tl.sum(e2 * e2 * e, 0)
    elif beta == 6.0:
        e = e * e
        total = tl.sum(e * e * e, 0)
    elif beta == 7.0:
        e2 = e * e
        total = tl.sum(e2 * e2 * e2 * e, 0)
    else:
        e = e * e
        e = e * e
        total = tl.sum(e * e, 0)
    return total


@triton.jit
def _tile_record(logits, beta, record, tiles, V, first, ENTROPY: tl.constexpr, TILE: tl.constexpr):
    """The four numbers of one tile, from logits (a pointer to its first entry) to record."""
    entry = tl.arange(0, TILE)
    # Two branches so that full tiles load without a mask: one at a V that is no multiple of 16 would split their
    # 16-byte loads.
    if first + TILE <= V:
        z = tl.load(logits + entry).to(tl.float32)
    else:
        z = tl.load(logits + entry, mask=entry < V - first, other=-_INF).to(tl.float32)

    top = tl.max(z, 0)
    if top == _INF:  # NaN is told first, and max() skips it
        top = tl.where(tl.max((z != z).to(tl.int32), 0) > 0, _UNDEFINED, top)
    shift = tl.where(top == -_INF, 0.0, top)
    peak = z == shift
    ties = tl.sum(peak.to(tl.int32), 0)
    # Every entry at the maximum leaves the sums, all but one come back: nothing is rounded against the removed 1.
    back = tl.maximum(ties - 1, 0).to(tl.float32)
    d = tl.where(peak, -_INF, z - shift) * _LOG2E
    power = (beta == tl.floor(beta)) & (beta >= 1.0) & (beta <= 8.0)
    rb = back
    if not power:  # before e, so that the two exponentials never share the registers
        rb = tl.sum(tl.exp2(d * beta), 0)
    e = tl.exp2(d)
    r1 = tl.sum(e, 0)
    if ENTROPY:
        # exp2(-300) is 0 in fp32, so the bound only keeps -inf * 0 out.
        tl.store(record + 3 * tiles, tl.sum(tl.maximum(d, -300.0) * e, 0) * _LN2)
    tl.store(record, tl.where((r1 != r1) & (top != _INF), _UNDEFINED, top))  # a NaN below a finite maximum
    tl.store(record + tiles, r1 + back)
    if power:
        rb = _power_sum(e, beta)
    tl.store(record + 2 * tiles, rb + back)


@triton.jit(do_not_specialize=["V", "tiles", "programs", "share"])
def _mass_kernel(
    logits_ptr,  # [B, V] fp32 | fp16 | bf16, row stride stride_row
    beta_ptr,  # [B] fp32
    work_ptr,  # [B, 4, tiles] fp32: maximum, R1, Rb, entropy sum of each tile
    V,
    stride_row,
    tiles,
    programs,  # a row
    share,  # tiles a program
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    """A share of one row's tiles, one after the other.

    A tile's maximum also tells what is wrong with it: NaN if an entry is NaN, else +inf if one is +inf, -inf if there
    is no mass.
    """
    row = tl.program_id(0) // programs
    start = (tl.program_id(0) % programs) * share
    logits = logits_ptr + row.to(tl.int64) * stride_row
    record = work_ptr + row.to(tl.int64) * (4 * tiles)
    beta = tl.load(beta_ptr + row)
    for tile in range(start, tl.minimum(start + share, tiles)):
        first = tile * TILE
        _tile_record(logits + first, beta, record + tile, tiles, V, first, ENTROPY, TILE)


# ---- rows


@triton.jit
def _read_tile(row_ptr, tile, V, skip, TILE: tl.constexpr):
    """The logits of one tile again, fp32 [TILE], -inf at `skip` and past the vocabulary."""
    token = tile * TILE + tl.arange(0, TILE)
    z = tl.load(row_ptr + token, mask=token < V, other=-_INF).to(tl.float32)
    return tl.where(token == skip, -_INF, z)


@triton.jit
def row_masses(work_ptr, row, tiles, alpha, beta, ENTROPY: tl.constexpr, TILES: tl.constexpr):
    """The records of one row, combined in float64. alpha, beta: float64; unsound ones make the status NAN.

    Returns status, tile numbers [TILES], tile maxima fp32 [TILES], tile masses 1 + rb float64 [TILES], and the row's
    maximum, R1, Rb, entropy.
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
    entropy = rest_1
    if ENTROPY:
        gaps = tl.load(record + 3 * tiles, mask=live, other=0.0).to(tl.float64)
        gap = tl.sum(e1 * (gaps + d * (1.0 + r1)), 0)
        entropy = log1p(rest_1) - gap / (1.0 + rest_1)
    return status, index, top, 1.0 + rb, m, rest_1, rest_b, entropy


@triton.jit
def store_quantities(
    row, status, z, m, rest_1, rest_b, entropy, alpha, beta, logp_ptr, logq_ptr, weight_ptr, entropy_ptr, status_ptr
):  # fmt: skip
    """logp, logq, weight of the token with logit z (float64) and the row's entropy; NaN where the status is not OK."""
    ok = status == _OK
    gap = z - m.to(tl.float64)
    log_1 = log1p(rest_1)
    log_b = log1p(rest_b)
    logp = gap - log_1
    weight = tl.where(alpha == beta, 0.0, (alpha - beta) * logp) + (log_b - beta * log_1)
    weight = tl.where((beta >= 1.0) & (beta <= alpha), tl.minimum(weight, 0.0), weight)
    # A given token may have no mass; none is drawn without.
    weight = tl.where(z == -_INF, -_INF, weight)
    tl.store(logp_ptr + row, tl.where(ok, logp, _UNDEFINED).to(tl.float32))
    tl.store(logq_ptr + row, tl.where(ok, beta * gap - log_b, _UNDEFINED).to(tl.float32))
    tl.store(weight_ptr + row, tl.where(ok, weight, _UNDEFINED).to(tl.float32))
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, tl.where(ok, entropy, _UNDEFINED).to(tl.float32))
    tl.store(status_ptr + row, status)


@triton.jit(do_not_specialize=["tiles"])
def _finish_kernel(
    logits_ptr,  # [B, V] fp32 | fp16 | bf16, row stride stride_row
    alpha_ptr,  # [B] fp32
    beta_ptr,  # [B] fp32
    seed_ptr,  # [1] i64
    counter_ptr,  # [B, 4] i32, the bit patterns of uint32
    exclude_ptr,  # [B] i64 or None; negative: none
    work_ptr,  # [B, 4, tiles] fp32, see _mass_kernel
    token_ptr,  # [B] i64
    logp_ptr,  # [B] fp32
    logq_ptr,  # [B] fp32
    weight_ptr,  # [B] fp32
    entropy_ptr,  # [B] fp32 or None
    status_ptr,  # [B] i32
    V,
    stride_row,
    tiles,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row: its sums, its draw, its token's quantities."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_row
    alpha = tl.load(alpha_ptr + row).to(tl.float64)
    beta = tl.load(beta_ptr + row).to(tl.float64)
    status, index, top, mass, m, rest_1, rest_b, entropy = row_masses(
        work_ptr, row, tiles, alpha, beta, entropy_ptr is not None, TILES
    )

    skip = -1
    if exclude_ptr is not None:
        given = tl.load(exclude_ptr + row)
        status = tl.where((status == _OK) & (given >= V), _BAD_TOKEN, status)
        if (status == _OK) & (given >= 0):
            skip = given.to(tl.int32)
            if tl.load(row_ptr + skip).to(tl.float32) == -_INF:
                skip = -1

    x = -1
    if status == _OK:
        c = counter_ptr + row * 4
        u, _ = uniforms(tl.load(seed_ptr), tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3))
        if skip >= 0:
            # Only the excluded token's tile changes; its new maximum keeps what is left from underflowing.
            z = _read_tile(row_ptr, skip // TILE, V, skip, TILE)
            z_top = tl.max(z, 0)
            here = index == skip // TILE
            top = tl.where(here, z_top, top)
            e = tl.exp((z - tl.where(z_top == -_INF, 0.0, z_top)).to(tl.float64) * beta)
            mass = tl.where(here, tl.sum(e, 0), mass)
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
            # The fraction of the tile's mass, not the mass: within the tile the sums below are what counts.
            part = tl.maximum(target - take(prefix, index, tile - 1), 0.0) / take(mass, index, tile)
            z = _read_tile(row_ptr, tile, V, skip, TILE)
            token = tile * TILE + tl.arange(0, TILE)
            e = tl.exp((z - take(top, index, tile)).to(tl.float64) * beta)
            cdf = tl.cumsum(e, 0)
            some = e > 0.0
            x = tl.min(tl.where((cdf > part * tl.sum(e, 0)) & some, token, _FAR), 0)
            if x == _FAR:
                x = tl.max(tl.where(some, token, 0), 0)
    z_x = tl.load(row_ptr + tl.maximum(x, 0)).to(tl.float32).to(tl.float64)
    tl.store(token_ptr + row, x.to(tl.int64))
    store_quantities(
        row,
        status,
        z_x,
        m,
        rest_1,
        rest_b,
        entropy,
        alpha,
        beta,
        logp_ptr,
        logq_ptr,
        weight_ptr,
        entropy_ptr,
        status_ptr,
    )


# ---- launchers


def tile_count(vocabulary: int) -> int:
    return -(-vocabulary // TILE)


def tiles_block(vocabulary: int) -> int:
    """The width of the finisher's vectors over tiles: a function of the vocabulary alone."""
    return max(LEAST_TILES, triton.next_power_of_2(tile_count(vocabulary)))


def mass_out(logits, beta, workspace, *, entropy: bool) -> None:
    """Write the tile records of every row. logits [B, V], beta [B] f32, workspace f32 (>= B * 4 * tiles entries)."""
    rows, vocabulary = logits.shape
    tiles = tile_count(vocabulary)
    share = max(1, rows * tiles // _PROGRAMS)
    programs = triton.cdiv(tiles, share)
    launch(
        _mass_kernel,
        (rows * programs,),
        logits.device,
        logits,
        beta,
        workspace,
        vocabulary,
        logits.stride(0),
        tiles,
        programs,
        share,
        ENTROPY=entropy,
        **MASS,
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

    logits [B, V]; seed i64 [1]; counter i32 [B, 4]; exclude, token i64 [B]; status i32 [B]; alpha, beta, logp, logq,
    weight, entropy f32 [B] (nats); workspace f32, B * 4 * ceil(V / 256) entries or more. All but logits contiguous.
    """
    mass_out(logits, beta, workspace, entropy=entropy is not None)
    launch(
        _finish_kernel,
        (logits.shape[0],),
        logits.device,
        logits,
        alpha,
        beta,
        seed,
        counter,
        exclude,
        workspace,
        token,
        logp,
        logq,
        weight,
        entropy,
        status,
        logits.shape[1],
        logits.stride(0),
        tile_count(logits.shape[1]),
        TILES=tiles_block(logits.shape[1]),
        **FINISH,
    )


LOGITS = (torch.bfloat16, torch.float16, torch.float32)


def split(meta: dict) -> tuple[dict, int]:
    """Constexprs and number of warps of a launcher's constants."""
    return {k: v for k, v in meta.items() if k != "num_warps"}, meta["num_warps"]


def configurations() -> list[Configuration]:
    """Every dtype, with and without entropy and exclusion, for row strides that are multiples of 16 and not."""
    found = []
    for dtype in LOGITS:
        for even in (True, False):
            for entropy in (False, True):
                constexprs, warps = split(MASS)
                found.append(
                    Configuration(
                        name=f"mass {dtype} entropy={entropy} even_stride={even}",
                        kernel=_mass_kernel,
                        signature={
                            "logits_ptr": POINTER[dtype],
                            "beta_ptr": "*fp32",
                            "work_ptr": "*fp32",
                            "V": "i32",
                            "stride_row": "i32",
                            "tiles": "i32",
                            "programs": "i32",
                            "share": "i32",
                        },
                        constexprs={"ENTROPY": entropy, **constexprs},
                        aligned=("logits_ptr", "beta_ptr", "work_ptr", *(("stride_row",) if even else ())),
                        num_warps=warps,
                        wide="v4" if even else None,
                    )
                )
        for entropy in (False, True):
            for exclude in (False, True):
                constexprs, warps = split(FINISH)
                pointers = {
                    "logits_ptr": POINTER[dtype],
                    "alpha_ptr": "*fp32",
                    "beta_ptr": "*fp32",
                    "seed_ptr": "*i64",
                    "counter_ptr": "*i32",
                    "exclude_ptr": "*i64" if exclude else None,
                    "work_ptr": "*fp32",
                    "token_ptr": "*i64",
                    "logp_ptr": "*fp32",
                    "logq_ptr": "*fp32",
                    "weight_ptr": "*fp32",
                    "entropy_ptr": "*fp32" if entropy else None,
                    "status_ptr": "*i32",
                }
                present = {k: v for k, v in pointers.items() if v is not None}
                found.append(
                    Configuration(
                        name=f"finish {dtype} entropy={entropy} exclude={exclude}",
                        kernel=_finish_kernel,
                        signature={**present, "V": "i32", "stride_row": "i32", "tiles": "i32"},
                        constexprs={
                            **{k: None for k in pointers if k not in present},
                            "TILES": LEAST_TILES,
                            **constexprs,
                        },
                        aligned=(*present, "stride_row"),
                        num_warps=warps,
                    )
                )
    return found
