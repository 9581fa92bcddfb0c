"""What a worker answered for a request, as the chain takes it (`power_kernels.sample_slots` -> `mh_advance`).

token, values, flags of a reply -> draws_of -> sampled, a run a lane -> the driver
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from power_kernels.api.driver.engine import Opened, Sampled
from power_kernels.slots import SlotFlag
from power_kernels.state import Status


@dataclass(frozen=True)
class Draws:
    """One draw after the other of a request.

    token: as many. values float32 [n, 3]: logq, weight, entropy. status int64 [n]. cumw: W of the answer with them.
    believed: whether the chain rejects the request where the worker did; if not, the rejected draw is left out.
    """

    token: list[int]
    values: np.ndarray
    status: np.ndarray
    cumw: float
    believed: bool = True


def draws_of(
    opened: Opened, before: int, cumw: float, token: Sequence[int], values: np.ndarray, flags: np.ndarray
) -> Draws:
    """The draws of a reply, or of several in a row.

    opened: the request. before: tokens of the answer ahead of these; cumw: W of those. token, values float32 [n, 3],
    flags int64 [n]: of `power_kernels.sample_slots`. Of a draw that the worker has rejected, the last, the token was
    not shown.
    """
    token = list(token)
    sums = np.add.accumulate(np.append(cumw, values[:, 1].astype(np.float64)))
    believed = True
    if token and flags[-1] & SlotFlag.REJECTED:
        believed = opened.rejects(before + len(token), float(sums[-1]))
        if believed:
            token[-1] = opened.stand_in
        else:  # the worker's bound is the weaker one, so that this takes a device that rounds wildly
            token, values, flags, sums = token[:-1], values[:-1], flags[:-1], sums[:-1]
    return Draws(token, values, flags & ~int(SlotFlag.REJECTED), float(sums[-1]), believed)


def rest_of(opened: Opened, tokens: list[int], cumw: float) -> Opened:
    """What is still to be drawn of a request that has ended while its lane goes on. tokens, cumw: of the answer so
    far."""
    exclude = opened.exclude if len(tokens) == len(opened.tokens) else -1
    return opened._replace(tokens=tokens, cumw=cumw, exclude=exclude)


def sampled(runs: Mapping[int, Draws], rows: int, *, entropy: bool) -> Sampled:
    """Draws by lane as runs of `rows` lanes, PENDING where there are none. entropy: whether the run asked for it."""
    width = max((1, *(len(run.token) for run in runs.values())))
    token = np.zeros((rows, width), np.int64)
    values = np.zeros((3, rows, width), np.float32)
    status = np.full((rows, width), Status.PENDING, np.int32)
    for lane, run in runs.items():
        count = len(run.token)
        token[lane, :count], values[:, lane, :count], status[lane, :count] = run.token, run.values.T, run.status
    logq, weight, of_rows = map(torch.from_numpy, values)
    return Sampled(
        torch.from_numpy(token), logq, weight, torch.from_numpy(status), entropy=of_rows if entropy else None
    )
