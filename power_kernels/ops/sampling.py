"""sample_tokens (DESIGN 2, 4, 5.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .checks import check_flag, check_logits, check_vectors
from .dispatch import OPS, define_functional, define_kernel, run
from .rows import check_outputs, check_sampling, new_workspace, row_outputs, workspace_size


class SampleOutput(NamedTuple):
    """One row per row of logits. token int64; logp, logq, weight, entropy float32 in nats; status int32."""

    token: torch.Tensor
    logp: torch.Tensor
    logq: torch.Tensor
    weight: torch.Tensor
    entropy: torch.Tensor | None
    status: torch.Tensor


def _check_sample(logits, alpha, beta, seed, counter, exclude) -> None:
    check_logits(logits)
    check_sampling(logits, logits.shape[0], alpha, beta, seed, counter, exclude)


def sample_tokens(
    logits: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    seed: torch.Tensor,
    counter: torch.Tensor,
    exclude: torch.Tensor | None = None,
    *,
    return_entropy: bool = False,
) -> SampleOutput:
    """Draw one token a row from q = softmax(beta * logits), with its log-probabilities (DESIGN 2, 4, 5.1).

    logits: float32, float16 or bfloat16 [B, V], unit inner stride, any row stride; -inf entries are never drawn.
    alpha, beta: float32 [B], finite and positive; where they are on a device and so are not looked at beforehand, a row
        with others has Status.NAN.
    seed: int64 [1], or [B] where each row has its own: it then draws what it would alone with that seed.
    counter: int32 [B, 4], the Philox counter of each row (`power_kernels.rng`): its first uniform draws the token.
    exclude: int64 [B] or None: a token that may not be drawn (-1: none); q is renormalised for the draw, while logq and
        weight are those of the full row. It is returned all the same when nothing else has mass.

    Returns token int64 [B]; logp = log softmax(z)[token], logq = log softmax(beta z)[token],
    weight = alpha*logp - logq (<= 0 whenever 1 <= beta <= alpha), and the entropy of softmax(z) if asked for, float32
    [B] in nats; status int32 [B], a `power_kernels.Status`. A bad row has token -1 and NaN quantities; the others are
    not affected. A row's result does not depend on the batch it is in.

    Raises ArgumentError for a shape, stride or value, ArgumentTypeError for a dtype or device.
    """
    _check_sample(logits, alpha, beta, seed, counter, exclude)
    check_flag("return_entropy", return_entropy)
    out = OPS.sample_tokens(logits, alpha, beta, seed, counter, exclude, return_entropy)
    token, logp, logq, weight, entropy, status = out
    return SampleOutput(token, logp, logq, weight, entropy if return_entropy else None, status)


def sample_tokens_out(
    logits, alpha, beta, seed, counter, exclude, workspace, token, logp, logq, weight, entropy, status
) -> None:
    """`sample_tokens` into preallocated tensors: no allocation, no wait, safe inside a CUDA graph.

    workspace: float32, contiguous, at least `workspace_size(B, V)` elements. exclude and entropy may be None.
    """
    _check_sample(logits, alpha, beta, seed, counter, exclude)
    check_vectors(logits, token=(token, torch.int64, (logits.shape[0],)))
    need = workspace_size(*logits.shape)
    check_outputs(logits, need, workspace, dict(logp=logp, logq=logq, weight=weight), entropy, status)
    run(
        "sample_tokens_out", logits.device,
        logits, alpha, beta, seed, counter, exclude, workspace, token, logp, logq, weight, entropy, status,
    )  # fmt: skip


def _sample_tokens(logits, alpha, beta, seed, counter, exclude, return_entropy):
    token = logits.new_empty(logits.shape[0], dtype=torch.int64)
    logp, logq, weight, entropy, status = row_outputs(logits, 3, return_entropy)
    run(
        "sample_tokens_out", logits.device,
        logits, alpha, beta, seed, counter, exclude, new_workspace(logits),
        token, logp, logq, weight, entropy if return_entropy else None, status,
    )  # fmt: skip
    return token, logp, logq, weight, entropy, status


def _sample_tokens_fake(logits, alpha, beta, seed, counter, exclude, return_entropy):
    return (logits.new_empty(logits.shape[0], dtype=torch.int64), *row_outputs(logits, 3, return_entropy))


define_kernel(
    "sample_tokens_out",
    "sampling",
    "(Tensor logits, Tensor alpha, Tensor beta, Tensor seed, Tensor counter, Tensor? exclude, "
    "Tensor(a!) workspace, Tensor(b!) token, Tensor(c!) logp, Tensor(d!) logq, Tensor(e!) weight, "
    "Tensor(f!)? entropy, Tensor(g!) status) -> ()",
)
define_functional(
    "sample_tokens",
    "(Tensor logits, Tensor alpha, Tensor beta, Tensor seed, Tensor counter, Tensor? exclude, "
    "bool return_entropy) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sample_tokens,
    _sample_tokens_fake,
)
