"""score_tokens: log-probabilities and weights of given tokens (DESIGN 2, 5.2).

The maths, the tile masses and the bytes of triton/sampling.py; the finisher reads one logit a row and draws nothing.
triton/lm_head.py has the same one read logits that it kept.

Shapes: logits [N, V] (fp32, fp16, bf16; unit inner stride, any row stride), tokens i64 [N], everything else [N].
Bytes moved: N * V * itemsize read once, + 16 N * V / TILE written and read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..state import Status
from . import Configuration, launch, logits_configurations
from .sampling import (
    LEAST_TILES,
    MOST_TILES,
    mass_out,
    row_masses,
    store_quantities,
    tile_count,
    tiles_block,
)

SCORE = {"GIVEN": False, "num_warps": 4}

_OK = tl.constexpr(int(Status.OK))
_BAD_TOKEN = tl.constexpr(int(Status.BAD_TOKEN))


@triton.jit(
    do_not_specialize=["V", "stride_row", "tiles", "has_entropy"],
    do_not_specialize_on_alignment=[
        "logits_ptr", "tokens_ptr", "alpha_ptr", "beta_ptr", "work_ptr", "logp_ptr", "logq_ptr", "weight_ptr",
        "entropy_ptr", "status_ptr",
    ],
)  # fmt: skip
def _score_kernel(
    logits_ptr,  # [N, V] fp32 | fp16 | bf16, row stride stride_row; [N] fp32 of the tokens alone if GIVEN
    tokens_ptr,  # [N] i64
    alpha_ptr,  # [N] fp32
    beta_ptr,  # [N] fp32
    work_ptr,  # [N, 4, tiles] fp32, see sampling._mass_kernel
    logp_ptr,  # [N] fp32
    logq_ptr,  # [N] fp32
    weight_ptr,  # [N] fp32
    entropy_ptr,  # [N] fp32; not written unless has_entropy
    status_ptr,  # [N] i32
    V,
    stride_row: tl.int64,
    tiles,
    has_entropy,
    TILES: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """One row: its sums and its token's quantities."""
    row = tl.program_id(0)
    alpha = tl.load(alpha_ptr + row).to(tl.float64)
    beta = tl.load(beta_ptr + row).to(tl.float64)
    status, _, _, _, m, rest_1, rest_b, moment = row_masses(work_ptr, row, tiles, alpha, beta, has_entropy, TILES)
    token = tl.load(tokens_ptr + row)
    inside = (token >= 0) & (token < V)
    status = tl.where((status == _OK) & (inside == 0), _BAD_TOKEN, status)
    column = 0 if GIVEN else token
    z = tl.load(logits_ptr + row.to(tl.int64) * stride_row + column, mask=inside, other=0.0).to(tl.float32)
    store_quantities(
        row, status, z.to(tl.float64), m, rest_1, rest_b, moment, alpha, beta, logp_ptr, logq_ptr, weight_ptr,
        entropy_ptr, status_ptr, has_entropy,
    )  # fmt: skip


def score_out(
    logits, tokens, alpha, beta, workspace, logp, logq, weight, entropy, status, *,
    vocabulary, stride, tiles, tiles_block, constants,
) -> None:  # fmt: skip
    """`score_tokens_out` from tile records that are in the workspace already.

    stride: of a row of logits. tiles, tiles_block: of a row, and the width of vectors over them. constants: GIVEN, and
    the number of warps.
    """
    launch(
        _score_kernel,
        (tokens.shape[0],),
        logits.device,
        logits,
        tokens,
        alpha,
        beta,
        workspace,
        logp,
        logq,
        weight,
        logp if entropy is None else entropy,
        status,
        vocabulary,
        stride,
        tiles,
        int(entropy is not None),
        TILES=tiles_block,
        **constants,
    )


def score_tokens_out(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    workspace: torch.Tensor,
    logp: torch.Tensor,
    logq: torch.Tensor,
    weight: torch.Tensor,
    entropy: torch.Tensor | None,
    status: torch.Tensor,
) -> None:
    """`score_tokens` into preallocated tensors: two launches, no synchronisation, no allocation.

    logits [N, V]; tokens i64 [N]; status i32 [N]; alpha, beta, logp, logq, weight, entropy f32 [N] (nats);
    workspace f32, N * 4 * ceil(V / 256) entries or more. All but logits contiguous.
    """
    mass_out(logits, beta, workspace, entropy=entropy is not None)
    vocabulary = logits.shape[1]
    score_out(
        logits, tokens, alpha, beta, workspace, logp, logq, weight, entropy, status, vocabulary=vocabulary,
        stride=logits.stride(0), tiles=tile_count(vocabulary), tiles_block=tiles_block(vocabulary), constants=SCORE,
    )  # fmt: skip


SCORE_SIGNATURE = {
    "tokens_ptr": "*i64",
    "alpha_ptr": "*fp32",
    "beta_ptr": "*fp32",
    "work_ptr": "*fp32",
    "logp_ptr": "*fp32",
    "logq_ptr": "*fp32",
    "weight_ptr": "*fp32",
    "entropy_ptr": "*fp32",
    "status_ptr": "*i32",
    **dict.fromkeys(("V", "tiles", "has_entropy"), "i32"),
}


def configurations() -> list[Configuration]:
    """The finisher for every dtype and both widths over tiles. `_mass_kernel` is listed by sampling.py."""
    widths = {"TILES": (LEAST_TILES, MOST_TILES)}
    return logits_configurations("score", _score_kernel, SCORE_SIGNATURE, SCORE, widths)
