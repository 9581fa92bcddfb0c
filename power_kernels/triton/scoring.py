"""score_tokens: log-probabilities and weights of given tokens (DESIGN 2, 5.2).

The maths, the tile masses and the bytes of triton/sampling.py; the finisher reads one logit a row and draws nothing.

Shapes: logits [N, V] (fp32, fp16, bf16; unit inner stride, any row stride), tokens i64 [N], everything else [N].
Bytes moved: N * V * itemsize read once, + 16 N * V / TILE written and read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from power_kernels.state import Status
from power_kernels.triton import POINTER, Configuration, launch
from power_kernels.triton.sampling import (
    LEAST_TILES,
    LOGITS,
    mass_out,
    row_masses,
    split,
    store_quantities,
    tile_count,
    tiles_block,
)

SCORE = {"num_warps": 4}

_OK = tl.constexpr(int(Status.OK))
_BAD_TOKEN = tl.constexpr(int(Status.BAD_TOKEN))


@triton.jit(do_not_specialize=["V", "tiles"])
def _score_kernel(
    logits_ptr,  # [N, V] fp32 | fp16 | bf16, row stride stride_row
    tokens_ptr,  # [N] i64
    alpha_ptr,  # [N] fp32
    beta_ptr,  # [N] fp32
    work_ptr,  # [N, 4, tiles] fp32, see sampling._mass_kernel
    logp_ptr,  # [N] fp32
    logq_ptr,  # [N] fp32
    weight_ptr,  # [N] fp32
    entropy_ptr,  # [N] fp32 or None
    status_ptr,  # [N] i32
    V,
    stride_row,
    tiles,
    TILES: tl.constexpr,
):
    """One row: its sums and its token's quantities."""
    row = tl.program_id(0)
    alpha = tl.load(alpha_ptr + row).to(tl.float64)
    beta = tl.load(beta_ptr + row).to(tl.float64)
    status, _, _, _, m, rest_1, rest_b, entropy = row_masses(
        work_ptr, row, tiles, alpha, beta, entropy_ptr is not None, TILES
    )
    token = tl.load(tokens_ptr + row)
    inside = (token >= 0) & (token < V)
    status = tl.where((status == _OK) & (inside == 0), _BAD_TOKEN, status)
    z = tl.load(logits_ptr + row.to(tl.int64) * stride_row + tl.where(inside, token, 0)).to(tl.float32)
    store_quantities(
        row,
        status,
        z.to(tl.float64),
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
    launch(
        _score_kernel,
        (logits.shape[0],),
        logits.device,
        logits,
        tokens,
        alpha,
        beta,
        workspace,
        logp,
        logq,
        weight,
        entropy,
        status,
        logits.shape[1],
        logits.stride(0),
        tile_count(logits.shape[1]),
        TILES=tiles_block(logits.shape[1]),
        **SCORE,
    )


def configurations() -> list[Configuration]:
    """The finisher for every dtype, with and without entropy. `_mass_kernel` is listed by sampling.py."""
    found = []
    for dtype in LOGITS:
        for entropy in (False, True):
            constexprs, warps = split(SCORE)
            pointers = {
                "logits_ptr": POINTER[dtype],
                "tokens_ptr": "*i64",
                "alpha_ptr": "*fp32",
                "beta_ptr": "*fp32",
                "work_ptr": "*fp32",
                "logp_ptr": "*fp32",
                "logq_ptr": "*fp32",
                "weight_ptr": "*fp32",
                "status_ptr": "*i32",
                **({"entropy_ptr": "*fp32"} if entropy else {}),
            }
            found.append(
                Configuration(
                    name=f"score {dtype} entropy={entropy}",
                    kernel=_score_kernel,
                    signature={**pointers, "V": "i32", "stride_row": "i32", "tiles": "i32"},
                    constexprs={
                        **({} if entropy else {"entropy_ptr": None}),
                        "TILES": LEAST_TILES,
                        **constexprs,
                    },
                    aligned=(*pointers, "stride_row"),
                    num_warps=warps,
                )
            )
    return found
