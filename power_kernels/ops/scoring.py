"""score_tokens (DESIGN 2, 5.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .checks import check_flag, check_logits
from .dispatch import OPS, define_functional, define_kernel, run
from .rows import check_outputs, check_scoring, new_workspace, row_outputs, workspace_size


class ScoreOutput(NamedTuple):
    """One row per row of logits: logp, logq, weight, entropy float32 in nats; status int32."""

    logp: torch.Tensor
    logq: torch.Tensor
    weight: torch.Tensor
    entropy: torch.Tensor | None
    status: torch.Tensor


def _check_score(logits, tokens, alpha, beta) -> None:
    check_logits(logits)
    check_scoring(logits, logits.shape[0], tokens, alpha, beta)


def score_tokens(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    *,
    return_entropy: bool = False,
) -> ScoreOutput:
    """logp, logq and weight of given tokens (DESIGN 2, 5.2).

    logits: float32, float16 or bfloat16 [N, V], unit inner stride. tokens: int64 [N]. alpha, beta: float32 [N].
    Returns float32 [N] in nats and status int32 [N]; a token outside [0, V) is Status.BAD_TOKEN, a token whose logit
    is -inf has logp = logq = weight = -inf. Errors: as `sample_tokens`.
    """
    _check_score(logits, tokens, alpha, beta)
    check_flag("return_entropy", return_entropy)
    out = OPS.score_tokens(logits, tokens, alpha, beta, return_entropy)
    logp, logq, weight, entropy, status = out
    return ScoreOutput(logp, logq, weight, entropy if return_entropy else None, status)


def score_tokens_out(logits, tokens, alpha, beta, workspace, logp, logq, weight, entropy, status) -> None:
    """`score_tokens` into preallocated tensors; see `sample_tokens_out`."""
    _check_score(logits, tokens, alpha, beta)
    need = workspace_size(*logits.shape)
    check_outputs(logits, need, workspace, dict(logp=logp, logq=logq, weight=weight), entropy, status)
    args = (logits, tokens, alpha, beta, workspace, logp, logq, weight, entropy, status)
    run("score_tokens_out", logits.device, *args)


def _score_tokens(logits, tokens, alpha, beta, return_entropy):
    logp, logq, weight, entropy, status = row_outputs(logits, 3, return_entropy)
    run(
        "score_tokens_out", logits.device,
        logits, tokens, alpha, beta, new_workspace(logits),
        logp, logq, weight, entropy if return_entropy else None, status,
    )  # fmt: skip
    return logp, logq, weight, entropy, status


def _score_tokens_fake(logits, tokens, alpha, beta, return_entropy):
    return row_outputs(logits, 3, return_entropy)


define_kernel(
    "score_tokens_out",
    "scoring",
    "(Tensor logits, Tensor tokens, Tensor alpha, Tensor beta, Tensor(a!) workspace, "
    "Tensor(b!) logp, Tensor(c!) logq, Tensor(d!) weight, Tensor(e!)? entropy, Tensor(f!) status) -> ()",
)
define_functional(
    "score_tokens",
    "(Tensor logits, Tensor tokens, Tensor alpha, Tensor beta, bool return_entropy) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _score_tokens,
    _score_tokens_fake,
)
