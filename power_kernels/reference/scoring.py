"""score_tokens on top of `rows.py`."""

from __future__ import annotations

import math

import numpy as np

from ..state import Status
from . import rows as ref
from .sampling import float64_rows, row_status, write

_NAN = float("nan")


def score_tokens_out(logits, tokens, alpha, beta, workspace, logp, logq, weight, entropy, status) -> None:
    """The quantities of given tokens. Shapes: see `power_kernels.score_tokens`."""
    columns: list[list] = [[], [], [], [], []]
    given = tokens.tolist()
    for i, z in enumerate(float64_rows(logits)):
        a, b = float(alpha[i]), float(beta[i])
        row = row_status(z, a, b)
        if row is Status.OK and not 0 <= given[i] < z.size:
            row = Status.BAD_TOKEN
        if row is Status.OK:
            q = _scored(z, given[i], a, b)
            values = (q.logp, q.logq, q.weight, ref.entropy(z) if entropy is not None else _NAN)
        else:
            values = (_NAN,) * 4
        for column, value in zip(columns, (*values, row), strict=True):
            column.append(value)
    for target, column in zip((logp, logq, weight, entropy, status), columns, strict=True):
        write(target, column)


def _scored(z: np.ndarray, token: int, alpha: float, beta: float) -> ref.TokenQuantities:
    if z[token] == -np.inf:  # cannot be drawn, can be asked for: probability 0, weight -inf whatever alpha - beta
        return ref.TokenQuantities(-math.inf, -math.inf, -math.inf)
    return ref.token_quantities(z, token, alpha, beta)
