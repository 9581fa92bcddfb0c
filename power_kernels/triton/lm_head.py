"""sample_from_hidden, score_from_hidden: the LM head fused with sampling and scoring (DESIGN 5.3).

    z = cap(scale * (hidden @ lm_head.T + bias))       cap(t) = softcap tanh(t / softcap), or t where softcap is 0

Two launches. `_head_kernel`, one program a tile of rows x 256 vocabulary entries, multiplies on the tensor cores with
fp32 sums, turns its sums into logits, which are never rounded, and writes of each row the four numbers that
triton/sampling.py writes of a tile: maximum, R1, Rb, entropy sum. Sampling also stores its logits once, for
`sampling._finish_kernel` to draw from; scoring stores the given token's logit alone, for `scoring._score_kernel`.

Shapes: hidden [B, D], lm_head [V, D] of one dtype (fp32, fp16, bf16; unit inner stride, any row stride), bias [V] of
that dtype or fp32, everything else [B] and contiguous.
Bytes moved: the weights, V * D * itemsize, from memory once: programs are numbered rows first, so that those which
share a tile of weights run side by side and meet it in the L2 cache; hidden, B * D * itemsize, once where it fits that
cache; + 16 B * ceil(V / 256) written and read. Sampling: + 4 B * V written, and two tiles a row of it read.
Arithmetic intensity: 2 * B / itemsize operations a byte: B in bf16, so that an H200 (989 TFLOP/s, 4.8 TB/s) waits for
the weights up to about 200 rows.

Rows are the M side of the product. A tensor core takes 64 of them at the least, and fewer rows are padded: at the peak
rates above, 64 rows of D = 3584 take 16 us a tile, where its weights take 50 us to come. The vocabulary as the M side
would pad to 16 rows only, but the sums over it would then cross all warps. Sampling takes 64 rows a program, scoring,
which has many, 128: above 64 rows sampling reads each weight ceil(B / 64) times from the L2 cache, and a product of its
own with `sample_tokens` may win.

A row's bits do not depend on the batch: the tile, the split of D into blocks and the order of all sums outside the
tensor core are the same for every B, because they are chosen by dtype and alignment alone. The order within a
tensor-core instruction is the hardware's. It is the same instruction for all rows, and none is known to let the
other rows change it, but no manual promises that.
fp32 inputs are multiplied in fp32 (`ieee`), not on tensor cores: TF32 keeps 10 bits, an error of 1e-3 in a logit of 1,
and three TF32 products, which would be near enough, make NaN of an infinity. Their smaller tiles suit small batches.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import LOGITS, POINTER, Configuration, launch, logits_configurations, split
from .sampling import (
    FINISH_SIGNATURE,
    _finish_kernel,
    finish_out,
    vector_width,
)
from .scoring import SCORE_SIGNATURE, _score_kernel, score_out

TILE = 256  # entries: what the workspace has room for, and what 8 warps hold the fp32 sums of in registers
LEAST_TILES = 1024  # every vocabulary up to 262,144 shares one specialisation of the finishers
MOST_TILES = 2048  # what is compiled and checked offline: vocabularies up to 524,288
FINISH = {"TILE": TILE, "num_warps": 8}
SCORE = {"GIVEN": True, "num_warps": 8}


def head_tile(dtype: torch.dtype, width: int, *, scoring: bool, tensor_memory: bool = False) -> dict:
    """The launch constants of `_head_kernel`; what they are chosen by does not contain the number of rows.

    128 bytes of every row are taken at a step. The number of stages is Triton's default, three on NVIDIA, with two of
    them, 80 KB or more of weights and rows, on their way on sm_90; two on AMD, where 64 KB is all that a program has.
    width: entries a load, 1 where rows are not 16-byte aligned; those pass through registers, so fewer at a time.
    tensor_memory: sm_100, where the registers would not hold a row of 128 a thread and its temporaries.
    """
    if dtype == torch.float32:
        rows, k = (32 if scoring and width > 1 else 16), 32
    elif width == 1:
        rows, k = 64, 16
    else:
        rows, k = (128 if scoring and not tensor_memory else 64), 64
    return {"BLOCK_R": rows, "BLOCK_V": TILE, "BLOCK_K": k, "VEC": width, "num_warps": 8}


_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_INF = tl.constexpr(float("inf"))


# ---- one tile


@triton.jit
def _cap(z, softcap):
    """softcap * tanh(z / softcap). The exponential is of a number <= 0, so nothing overflows; NaN stays NaN."""
    t = z / softcap
    a = tl.abs(t)
    e = tl.exp2(a * (-2.0 * _LOG2E))
    far = (1.0 - e) / (1.0 + e)
    # Where 1 - e would cancel: an odd polynomial, fitted to the least relative error, 4e-9, on [0, 0.625].
    s = a * a
    p = -0.33333282 + s * (0.13331442 + s * (-0.053739715 + s * (0.020639088 + s * -0.0057049873)))
    y = tl.where(a < 0.625, a + a * s * p, far)
    return softcap * tl.where(t < 0.0, -y, y)


@triton.jit(
    do_not_specialize=[
        "rows", "V", "D", "stride_hidden", "stride_head", "stride_logits", "row_tiles", "tiles", "bias_kind",
    ],
    do_not_specialize_on_alignment=[
        "bias_ptr", "bias_fp32_ptr", "beta_ptr", "tokens_ptr", "logits_ptr", "given_ptr", "work_ptr",
    ],
)  # fmt: skip
def _head_kernel(
    hidden_ptr,  # [B, D] fp32 | fp16 | bf16, row stride stride_hidden
    head_ptr,  # [V, D] the same dtype, row stride stride_head
    bias_ptr,  # [V] the same dtype; read if bias_kind is 1
    bias_fp32_ptr,  # [V] fp32; read if bias_kind is 2
    beta_ptr,  # [B] fp32
    tokens_ptr,  # [B] i64, or None: no logit of a given token is stored
    logits_ptr,  # [B, V] fp32, row stride stride_logits, or None: the logits are not stored
    given_ptr,  # [B] fp32: the logits of tokens that are in the vocabulary
    work_ptr,  # [B, 4, tiles] fp32, as sampling._mass_kernel writes it
    rows,
    V,
    D,  # this and the next two in units of VEC entries
    stride_hidden: tl.int64,
    stride_head: tl.int64,
    stride_logits: tl.int64,
    row_tiles,
    tiles,
    bias_kind,  # 0: none
    scale,
    softcap,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VEC: tl.constexpr,
):
    """BLOCK_R rows by BLOCK_V entries of the vocabulary."""
    tile = tl.program_id(0) // row_tiles
    first = tile * BLOCK_V
    row = (tl.program_id(0) % row_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < rows
    wide = row.to(tl.int64)
    column = tl.arange(0, BLOCK_V)
    real = column < V - first

    # Past the vocabulary the last row of the weights is read again, and left out below: no mask in the loop for it.
    hidden = hidden_ptr + wide[:, None] * (stride_hidden * VEC)
    head = head_ptr + tl.minimum(first + column, V - 1).to(tl.int64)[:, None] * (stride_head * VEC)
    k = tl.arange(0, BLOCK_K)
    hidden += k[None, :]
    head += k[None, :]
    z = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, D * VEC, BLOCK_K):
        inside = (k < D * VEC - start)[None, :]
        h = tl.load(hidden, mask=inside & live[:, None], other=0.0)
        w = tl.load(head, mask=inside, other=0.0)
        z = tl.dot(h, w.T, z, input_precision="ieee")
        hidden += BLOCK_K
        head += BLOCK_K

    bias = tl.load(bias_ptr + first + column, mask=real & (bias_kind == 1), other=0.0).to(tl.float32)
    bias += tl.load(bias_fp32_ptr + first + column, mask=real & (bias_kind == 2), other=0.0)
    z = (z + bias[None, :]) * scale
    if softcap > 0.0:
        z = _cap(z, softcap)
    # What was read twice leaves here, after the product: as -inf in it, it would be -inf * 0.
    z = tl.where(real[None, :], z, -_INF)

    if tokens_ptr is not None:
        at = tl.load(tokens_ptr + row, mask=live, other=-1) - first
        here = (at >= 0) & (at < BLOCK_V)
        at = tl.where(here, at, -1).to(tl.int32)
        given = tl.sum(tl.where(column[None, :] == at[:, None], z, 0.0), 1)
        tl.store(given_ptr + row, given, mask=here)

    top = tl.max(z, 1)
    shift = tl.where(top == -_INF, 0.0, top)
    beta = tl.load(beta_ptr + row, mask=live, other=1.0)
    peak = z == shift[:, None]
    peaks = tl.sum(peak.to(tl.float32), 1)
    d = tl.where(peak, -_INF, z - shift[:, None]) * _LOG2E
    rb = tl.sum(tl.exp2(d * beta[:, None]), 1)
    e = tl.exp2(d)
    r1 = tl.sum(e, 1)
    # exp2(-300) is 0 in fp32, so the bound only keeps -inf * 0 out.
    gap = tl.sum(tl.maximum(d, -300.0) * e, 1)
    # Every entry at the maximum left the sums, all but one come back: nothing is rounded against the removed 1.
    back = tl.maximum(peaks - 1.0, 0.0)
    record = work_ptr + wide * (4 * tiles) + tile
    tl.store(record, tl.where(r1 != r1, r1, top), mask=live)  # max() skips NaN, the sum does not
    tl.store(record + tiles, r1 + back, mask=live)
    tl.store(record + 2 * tiles, rb + back, mask=live)
    tl.store(record + 3 * tiles, gap * _LN2, mask=live)

    if logits_ptr is not None:
        to = logits_ptr + wide[:, None] * stride_logits + (first + column)[None, :]
        tl.store(to, z, mask=live[:, None] & real[None, :])


# ---- launchers


def tile_count(vocabulary: int) -> int:
    return -(-vocabulary // TILE)


def tiles_block(vocabulary: int) -> int:
    """The width of the finishers' vectors over tiles: a function of the vocabulary alone."""
    return max(LEAST_TILES, triton.next_power_of_2(tile_count(vocabulary)))


def _bias_kind(bias: torch.Tensor | None, dtype: torch.dtype) -> int:
    return 0 if bias is None else 1 if bias.dtype == dtype else 2


@functools.cache
def _has_tensor_memory(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 10


def _head_out(hidden, lm_head, bias, beta, tokens, logits, given, workspace, softcap: float, scale: float) -> None:
    """Tile records into the workspace, and logits or the tokens' logits where they are given."""
    rows, vocabulary = hidden.shape[0], lm_head.shape[0]
    width = min(vector_width(hidden), vector_width(lm_head))
    kind = _bias_kind(bias, lm_head.dtype)
    meta = head_tile(
        hidden.dtype, width, scoring=tokens is not None, tensor_memory=_has_tensor_memory(hidden.device)
    )  # fmt: skip
    row_tiles, tiles = triton.cdiv(rows, meta["BLOCK_R"]), tile_count(vocabulary)
    launch(
        _head_kernel,
        (row_tiles * tiles,),
        hidden.device,
        hidden,
        lm_head,
        bias if kind == 1 else lm_head,
        bias if kind == 2 else beta,
        beta,
        tokens,
        logits,
        given,
        workspace,
        rows,
        vocabulary,
        hidden.shape[1] // width,
        hidden.stride(0) // width,
        lm_head.stride(0) // width,
        0 if logits is None else logits.stride(0),
        row_tiles,
        tiles,
        kind,
        float(scale),
        float(softcap),
        **meta,
    )


def sample_from_hidden_out(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    seed: torch.Tensor,
    counter: torch.Tensor,
    exclude: torch.Tensor | None,
    softcap: float,
    scale: float,
    logits: torch.Tensor,
    workspace: torch.Tensor,
    token: torch.Tensor,
    logp: torch.Tensor,
    logq: torch.Tensor,
    weight: torch.Tensor,
    entropy: torch.Tensor | None,
    status: torch.Tensor,
) -> None:
    """`sample_from_hidden` into preallocated tensors: two launches, no synchronisation, no allocation.

    hidden [B, D], lm_head [V, D], bias [V]; logits f32 [B, V], unit inner stride, holds z afterwards; workspace f32,
    B * 4 * ceil(V / 256) entries or more; the rest as `sampling.sample_tokens_out`.
    """
    _head_out(hidden, lm_head, bias, beta, None, logits, workspace, workspace, softcap, scale)
    columns = (token, logp, logq, weight, entropy, status)
    vocabulary = lm_head.shape[0]
    finish_out(
        logits, alpha, beta, seed, counter, exclude, workspace, *columns,
        width=1,  # a tile is one entry a thread
        tiles=tile_count(vocabulary), tiles_block=tiles_block(vocabulary), constants=FINISH,
    )  # fmt: skip


def score_from_hidden_out(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    softcap: float,
    scale: float,
    workspace: torch.Tensor,
    logp: torch.Tensor,
    logq: torch.Tensor,
    weight: torch.Tensor,
    entropy: torch.Tensor | None,
    status: torch.Tensor,
) -> None:
    """`score_from_hidden` into preallocated tensors: two launches, no synchronisation, no allocation.

    hidden [N, D], lm_head [V, D], bias [V]; tokens i64 [N]; workspace f32, N * 4 * ceil(V / 256) + N entries or more;
    the rest as `scoring.score_tokens_out`.
    """
    rows, vocabulary = hidden.shape[0], lm_head.shape[0]
    given = workspace[rows * 4 * tile_count(vocabulary) :]
    _head_out(hidden, lm_head, bias, beta, tokens, None, given, workspace, softcap, scale)
    score_out(
        given, tokens, alpha, beta, workspace, logp, logq, weight, entropy, status, vocabulary=vocabulary,
        stride=1, tiles=tile_count(vocabulary), tiles_block=tiles_block(vocabulary), constants=SCORE,
    )  # fmt: skip


# Targets by where a product's sums lie.
_TENSOR_MEMORY = ("sm_100",)
_REGISTERS = ("sm_80", "sm_90", "gfx942")
_HEAD = {
    **dict.fromkeys(("bias_fp32_ptr", "beta_ptr", "given_ptr", "work_ptr"), "*fp32"),
    **dict.fromkeys(("rows", "V", "D", "row_tiles", "tiles", "bias_kind"), "i32"),
    **dict.fromkeys(("stride_hidden", "stride_head", "stride_logits"), "i64"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
}


def _head_configuration(dtype: torch.dtype, width: int, *, scoring: bool, tensor_memory: bool) -> Configuration:
    constexprs, warps = split(head_tile(dtype, width, scoring=scoring, tensor_memory=tensor_memory))
    data = dict.fromkeys(("hidden_ptr", "head_ptr", "bias_ptr"), POINTER[dtype])
    stored, absent = ({"tokens_ptr": "*i64"}, "logits_ptr") if scoring else ({"logits_ptr": "*fp32"}, "tokens_ptr")
    return Configuration(
        name=f"head_{'score' if scoring else 'sample'} {str(dtype)[6:]} VEC={width} ROWS={constexprs['BLOCK_R']}",
        kernel=_head_kernel,
        signature={**data, **stored, **_HEAD},
        constexprs={absent: None, **constexprs},
        aligned=("hidden_ptr", "head_ptr") if width > 1 else (),
        num_warps=warps,
        wide="v4" if width > 1 else None,
        elements=constexprs["BLOCK_V"] * constexprs["BLOCK_K"],
    )


def configurations() -> list[Configuration]:
    """The product for both uses, every dtype, 16-byte and single-entry loads; finishers for both widths over tiles."""
    heads = []
    for dtype in LOGITS:
        for width in (16 // dtype.itemsize, 1):
            for scoring in (False, True):
                plain, other = (
                    _head_configuration(dtype, width, scoring=scoring, tensor_memory=memory) for memory in (False, True)
                )
                if plain == other:
                    heads.append(plain)
                else:
                    heads += [replace(plain, targets=_REGISTERS), replace(other, targets=_TENSOR_MEMORY)]
    widths = {"TILES": (LEAST_TILES, MOST_TILES)}
    finishers = logits_configurations("head_finish", _finish_kernel, FINISH_SIGNATURE, FINISH, widths)
    given = logits_configurations("head_given", _score_kernel, SCORE_SIGNATURE, SCORE, widths)
    single = [
        c
        for c in finishers + given
        if c.signature["logits_ptr"] == POINTER[torch.float32] and c.constexprs.get("VEC", 1) == 1
    ]
    return heads + single
