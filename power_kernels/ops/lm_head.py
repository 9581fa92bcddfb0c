"""sample_from_hidden, score_from_hidden: the LM head fused with sampling and scoring (DESIGN 5.3)."""

from __future__ import annotations

import math

import torch

from ..errors import ArgumentError, ArgumentTypeError
from .checks import (
    LOGIT_DTYPES,
    check_flag,
    check_rows,
    check_tensor,
    check_vectors,
)
from .dispatch import OPS, define_functional, define_kernel, run
from .rows import check_outputs, check_sampling, check_scoring, row_outputs, workspace_size
from .sampling import SampleOutput
from .scoring import ScoreOutput

_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def hidden_workspace_size(rows: int, vocab: int) -> int:
    """float32 elements of workspace that the `_out` forms of the fused LM head need on any backend.

    The records of `workspace_size`, and one logit a row: 29 MB for 3,072 rows and a vocabulary of 151,936.
    """
    return workspace_size(rows, vocab) + rows


def _check_number(name: str, value, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be a float")
    # Kernels hold it in float32: neither infinity nor, for a number that is not zero, zero may come of that.
    held = value == 0 or _SMALLEST <= abs(value) <= _LARGEST
    if not (held and value >= least):
        bound = "" if least == -math.inf else f" and at least {least:g}"
        raise ArgumentError(f"{name} is {value}; it must be finite{bound}, and neither overflow nor underflow float32")


def _check_head(hidden, lm_head, bias, softcap, scale) -> None:
    check_tensor("hidden", hidden, dtypes=LOGIT_DTYPES, shape=(None, None))
    if hidden.shape[1] < 1:
        raise ArgumentError("hidden has no columns; D must be at least 1")
    check_rows("hidden", hidden)
    check_tensor("lm_head", lm_head, dtypes=(hidden.dtype,), shape=(None, hidden.shape[1]), like=hidden)
    if lm_head.shape[0] < 1:
        raise ArgumentError("lm_head has an empty vocabulary; V must be at least 1")
    check_rows("lm_head", lm_head)
    if bias is not None:
        dtypes = tuple(dict.fromkeys((hidden.dtype, torch.float32)))
        check_vectors(hidden, bias=(bias, dtypes, (lm_head.shape[0],)))
    _check_number("softcap", softcap, 0.0)
    _check_number("scale", scale, -math.inf)


def _check_sample(hidden, lm_head, bias, alpha, beta, seed, counter, exclude, softcap, scale) -> None:
    _check_head(hidden, lm_head, bias, softcap, scale)
    check_sampling(hidden, hidden.shape[0], alpha, beta, seed, counter, exclude)


def _check_score(hidden, lm_head, bias, tokens, alpha, beta, softcap, scale) -> None:
    _check_head(hidden, lm_head, bias, softcap, scale)
    check_scoring(hidden, hidden.shape[0], tokens, alpha, beta)


def _new_workspace(hidden, lm_head) -> torch.Tensor:
    return hidden.new_empty(hidden_workspace_size(hidden.shape[0], lm_head.shape[0]), dtype=torch.float32)


# ---- sampling


def sample_from_hidden(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    seed: torch.Tensor,
    counter: torch.Tensor,
    exclude: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
    return_entropy: bool = False,
) -> SampleOutput:
    """`sample_tokens` of z = cap(scale * (hidden @ lm_head.T + bias)), the LM head included (DESIGN 5.3).

    hidden: float32, float16 or bfloat16 [B, D], unit inner stride, any row stride. lm_head: the same dtype [V, D],
        likewise. bias: [V] of that dtype or float32, or None.
    softcap: cap(t) = softcap * tanh(t / softcap) (Gemma 2); 0 for none. scale: the logit scale (Cohere; for Granite 1 /
        logits_scaling).
    alpha, beta, seed, counter, exclude, return_entropy, the outputs and the errors: as `sample_tokens`.

    Products are summed in float32 and the logits stay float32: they are never rounded to the dtype of the inputs, as
    those of a bfloat16 model's own head are. One float32 scratch [B, V] is written.
    """
    _check_sample(hidden, lm_head, bias, alpha, beta, seed, counter, exclude, softcap, scale)
    check_flag("return_entropy", return_entropy)
    out = OPS.sample_from_hidden(
        hidden, lm_head, bias, alpha, beta, seed, counter, exclude, softcap, scale, return_entropy
    )
    token, logp, logq, weight, entropy, status = out
    return SampleOutput(token, logp, logq, weight, entropy if return_entropy else None, status)


def sample_from_hidden_out(
    hidden, lm_head, bias, alpha, beta, seed, counter, exclude, softcap, scale,
    logits, workspace, token, logp, logq, weight, entropy, status,
) -> None:  # fmt: skip
    """`sample_from_hidden` into preallocated tensors: no wait, safe inside a CUDA graph.

    logits: float32 [B, V], contiguous; it holds z afterwards. workspace: float32, contiguous, at least
    `hidden_workspace_size(B, V)` elements. bias, exclude and entropy may be None.
    """
    _check_sample(hidden, lm_head, bias, alpha, beta, seed, counter, exclude, softcap, scale)
    rows, vocab = hidden.shape[0], lm_head.shape[0]
    check_vectors(hidden, logits=(logits, torch.float32, (rows, vocab)), token=(token, torch.int64, (rows,)))
    need = hidden_workspace_size(hidden.shape[0], lm_head.shape[0])
    check_outputs(hidden, need, workspace, dict(logp=logp, logq=logq, weight=weight), entropy, status)
    run(
        "sample_from_hidden_out", hidden.device,
        hidden, lm_head, bias, alpha, beta, seed, counter, exclude, softcap, scale,
        logits, workspace, token, logp, logq, weight, entropy, status,
    )  # fmt: skip


def _sample_from_hidden(
    hidden, lm_head, bias, alpha, beta, seed, counter, exclude, softcap, scale, return_entropy
):  # fmt: skip
    rows, vocab = hidden.shape[0], lm_head.shape[0]
    token = hidden.new_empty(rows, dtype=torch.int64)
    logits = hidden.new_empty((rows, vocab), dtype=torch.float32)
    logp, logq, weight, entropy, status = row_outputs(hidden, 3, return_entropy)
    run(
        "sample_from_hidden_out", hidden.device,
        hidden, lm_head, bias, alpha, beta, seed, counter, exclude, softcap, scale,
        logits, _new_workspace(hidden, lm_head), token, logp, logq, weight, entropy if return_entropy else None, status,
    )  # fmt: skip
    return token, logp, logq, weight, entropy, status


def _sample_from_hidden_fake(
    hidden, lm_head, bias, alpha, beta, seed, counter, exclude, softcap, scale, return_entropy
):  # fmt: skip
    return (hidden.new_empty(hidden.shape[0], dtype=torch.int64), *row_outputs(hidden, 3, return_entropy))


# ---- scoring


def score_from_hidden(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    tokens: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
    return_entropy: bool = False,
) -> ScoreOutput:
    """`score_tokens` of z = cap(scale * (hidden @ lm_head.T + bias)), which is never stored (DESIGN 5.3).

    hidden [N, D], lm_head [V, D], bias, softcap, scale: as `sample_from_hidden`. The rest: as `score_tokens`.
    The memory on top of the inputs is `hidden_workspace_size(N, V)` floats, a 64th of the logits.
    """
    _check_score(hidden, lm_head, bias, tokens, alpha, beta, softcap, scale)
    check_flag("return_entropy", return_entropy)
    out = OPS.score_from_hidden(hidden, lm_head, bias, tokens, alpha, beta, softcap, scale, return_entropy)
    logp, logq, weight, entropy, status = out
    return ScoreOutput(logp, logq, weight, entropy if return_entropy else None, status)


def score_from_hidden_out(
    hidden, lm_head, bias, tokens, alpha, beta, softcap, scale, workspace, logp, logq, weight, entropy, status
) -> None:
    """`score_from_hidden` into preallocated tensors; see `sample_from_hidden_out`."""
    _check_score(hidden, lm_head, bias, tokens, alpha, beta, softcap, scale)
    need = hidden_workspace_size(hidden.shape[0], lm_head.shape[0])
    check_outputs(hidden, need, workspace, dict(logp=logp, logq=logq, weight=weight), entropy, status)
    run(
        "score_from_hidden_out", hidden.device,
        hidden, lm_head, bias, tokens, alpha, beta, softcap, scale, workspace, logp, logq, weight, entropy, status,
    )  # fmt: skip


def _score_from_hidden(hidden, lm_head, bias, tokens, alpha, beta, softcap, scale, return_entropy):
    logp, logq, weight, entropy, status = row_outputs(hidden, 3, return_entropy)
    run(
        "score_from_hidden_out", hidden.device,
        hidden, lm_head, bias, tokens, alpha, beta, softcap, scale, _new_workspace(hidden, lm_head),
        logp, logq, weight, entropy if return_entropy else None, status,
    )  # fmt: skip
    return logp, logq, weight, entropy, status


def _score_from_hidden_fake(hidden, lm_head, bias, tokens, alpha, beta, softcap, scale, return_entropy):
    return row_outputs(hidden, 3, return_entropy)


define_kernel(
    "sample_from_hidden_out",
    "lm_head",
    "(Tensor hidden, Tensor lm_head, Tensor? bias, Tensor alpha, Tensor beta, Tensor seed, Tensor counter, "
    "Tensor? exclude, float softcap, float scale, Tensor(a!) logits, Tensor(b!) workspace, Tensor(c!) token, "
    "Tensor(d!) logp, Tensor(e!) logq, Tensor(f!) weight, Tensor(g!)? entropy, Tensor(h!) status) -> ()",
)
define_functional(
    "sample_from_hidden",
    "(Tensor hidden, Tensor lm_head, Tensor? bias, Tensor alpha, Tensor beta, Tensor seed, Tensor counter, "
    "Tensor? exclude, float softcap, float scale, bool return_entropy) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sample_from_hidden,
    _sample_from_hidden_fake,
)
define_kernel(
    "score_from_hidden_out",
    "lm_head",
    "(Tensor hidden, Tensor lm_head, Tensor? bias, Tensor tokens, Tensor alpha, Tensor beta, float softcap, "
    "float scale, Tensor(a!) workspace, Tensor(b!) logp, Tensor(c!) logq, Tensor(d!) weight, Tensor(e!)? entropy, "
    "Tensor(f!) status) -> ()",
)
define_functional(
    "score_from_hidden",
    "(Tensor hidden, Tensor lm_head, Tensor? bias, Tensor tokens, Tensor alpha, Tensor beta, float softcap, "
    "float scale, bool return_entropy) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _score_from_hidden,
    _score_from_hidden_fake,
)
