"""sample_tokens on top of `rows.py`, and what scoring shares with it."""

from __future__ import annotations

import math

import numpy as np
import torch

from .. import rng
from ..state import Status
from . import rows as ref

_NAN = float("nan")


def float64_rows(logits: torch.Tensor):
    for row in logits:
        yield row.to(device="cpu", dtype=torch.float64).numpy()


def write(target: torch.Tensor | None, values: list) -> None:
    if target is not None:
        target.copy_(torch.tensor(values, dtype=torch.float64, device="cpu").reshape(target.shape))


def row_status(z: np.ndarray, alpha: float, beta: float) -> Status:
    """The wrappers look at exponents only where they lie on the host, so every backend reports bad ones by row."""
    sound = 0.0 < alpha < math.inf and 0.0 < beta < math.inf
    return ref.row_status(z) if sound else Status.NAN


def sample_tokens_out(
    logits, alpha, beta, seed, counter, exclude, workspace, token, logp, logq, weight, entropy, status
) -> None:
    """One token of softmax(beta z) a row, with its quantities. Shapes: see `power_kernels.sample_tokens`."""
    out_token, out_logp, out_logq, out_weight, out_entropy, out_status = [], [], [], [], [], []
    words = counter.cpu().numpy().view(np.uint32)
    uniform = rng.uniforms(words, seed.cpu().numpy())[..., 0]
    skip = [-1] * logits.shape[0] if exclude is None else exclude.tolist()
    for i, z in enumerate(float64_rows(logits)):
        a, b = float(alpha[i]), float(beta[i])
        row = row_status(z, a, b)
        if row is Status.OK and skip[i] >= z.size:
            row = Status.BAD_TOKEN
        if row is Status.OK:
            drawn = ref.draw_token(z, b, float(uniform[i]), skip[i])
            q = ref.token_quantities(z, drawn, a, b)
            values = (drawn, q.logp, q.logq, q.weight, ref.entropy(z) if entropy is not None else _NAN)
        else:
            values = (-1, _NAN, _NAN, _NAN, _NAN)
        for column, value in zip(
            (out_token, out_logp, out_logq, out_weight, out_entropy, out_status), (*values, row), strict=True
        ):
            column.append(value)
    token.copy_(torch.tensor(out_token, dtype=torch.int64, device="cpu"))
    write(logp, out_logp)
    write(logq, out_logq)
    write(weight, out_weight)
    write(entropy, out_entropy)
    write(status, out_status)
