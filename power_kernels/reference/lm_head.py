"""sample_from_hidden and score_from_hidden in float64: the logits first, then the operators over logits."""

from __future__ import annotations

import torch

from .sampling import sample_tokens_out
from .scoring import score_tokens_out


def head_logits(hidden, lm_head, bias, softcap: float, scale: float) -> torch.Tensor:
    """z = cap(scale * (hidden @ lm_head.T + bias)), float64 [rows, V], on the host: not every device has float64."""
    z = hidden.to("cpu", torch.float64) @ lm_head.to("cpu", torch.float64).T
    if bias is not None:
        z += bias.to("cpu", torch.float64)
    z *= scale
    return softcap * torch.tanh(z / softcap) if softcap > 0 else z


def sample_from_hidden_out(
    hidden, lm_head, bias, alpha, beta, seed, counter, exclude, softcap, scale,
    logits, workspace, token, logp, logq, weight, entropy, status,
) -> None:  # fmt: skip
    """One token of softmax(beta z) a row, with its quantities. Shapes: see `power_kernels.sample_from_hidden`."""
    z = head_logits(hidden, lm_head, bias, softcap, scale)
    logits.copy_(z)
    outputs = (token, logp, logq, weight, entropy, status)
    sample_tokens_out(z, alpha, beta, seed, counter, exclude, workspace, *outputs)


def score_from_hidden_out(
    hidden, lm_head, bias, tokens, alpha, beta, softcap, scale, workspace, logp, logq, weight, entropy, status
) -> None:
    """The quantities of given tokens. Shapes: see `power_kernels.score_from_hidden`."""
    lm_head = lm_head.to("cpu", torch.float64)
    for i in range(hidden.shape[0]):  # a row at a time: no logits [N, V] here either
        row = slice(i, i + 1)
        columns = (None if column is None else column[row] for column in (logp, logq, weight, entropy, status))
        z = head_logits(hidden[row], lm_head, bias, softcap, scale)
        score_tokens_out(z, tokens[row], alpha[row], beta[row], workspace, *columns)
