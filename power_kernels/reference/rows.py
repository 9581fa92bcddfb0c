"""One row of logits in float64 numpy: what a token adds to a chain, and how it is drawn (DESIGN sections 2, 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..state import Status


def row_status(z: np.ndarray) -> Status:
    """What is wrong with a row of logits, if anything. z: [V]."""
    if np.isnan(z).any():
        return Status.NAN
    if (z == np.inf).any():
        return Status.POS_INF
    if (z == -np.inf).all():
        return Status.NO_MASS
    return Status.OK


def rest(z: np.ndarray, beta: float) -> float:
    """sum_v exp(beta * (z_v - max z)) without the argmax, so that log1p(rest) keeps a peaked row's digits."""
    mass = np.exp(beta * (z - z.max()))
    mass[np.argmax(z)] = 0.0
    return float(mass.sum())


@dataclass(frozen=True)
class TokenQuantities:
    """What one token contributes to a chain, in nats (section 2)."""

    logp: float
    logq: float
    weight: float


def token_quantities(z: np.ndarray, token: int, alpha: float, beta: float) -> TokenQuantities:
    """logp, logq and weight w = alpha*logp - logq of `token` under logits z [V] (a row whose status is OK)."""
    z = np.asarray(z, np.float64)
    gap = float(z[token] - z.max())
    log_norm_p = math.log1p(rest(z, 1.0))  # LSE(z) - max z
    log_norm_q = math.log1p(rest(z, beta))  # LSE(beta z) - beta max z
    logp = gap - log_norm_p
    logq = beta * gap - log_norm_q
    weight = log_norm_q - beta * log_norm_p
    if alpha != beta:
        weight += (alpha - beta) * logp
    if 1.0 <= beta <= alpha:
        weight = min(weight, 0.0)
    return TokenQuantities(logp, logq, weight)


def entropy(z: np.ndarray) -> float:
    """Entropy of softmax(z) in nats. z: [V], status OK."""
    z = np.asarray(z, np.float64)
    gap = z - z.max()
    mass = np.exp(gap)
    finite = np.where(mass > 0, gap, 0.0)
    return float(math.log1p(rest(z, 1.0)) - (mass * finite).sum() / mass.sum())


def draw_token(z: np.ndarray, beta: float, u: float, exclude: int = -1) -> int:
    """Inverse CDF of softmax(beta z) in vocabulary order (section 4): the first v whose CDF exceeds u.

    exclude: a token to leave out (section 3.4); it is returned all the same when nothing else has mass.
    """
    z = np.asarray(z, np.float64)
    if exclude >= 0:
        z = z.copy()
        z[exclude] = -np.inf
        if z.max() == -np.inf:
            return exclude
    mass = np.exp(beta * (z - z.max()))
    cdf = np.cumsum(mass)
    above = np.flatnonzero((cdf > u * cdf[-1]) & (mass > 0))
    return int(above[0]) if above.size else int(np.flatnonzero(mass)[-1])
