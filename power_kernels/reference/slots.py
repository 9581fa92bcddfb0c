"""sample_slots: `sample_tokens` with what a table holds for each row's slot, then the early rejection."""

from __future__ import annotations

import numpy as np
import torch

from .. import rng
from ..slots import SlotBound, SlotField, SlotFlag
from ..state import Status
from .sampling import sample_tokens_out


def sample_slots_out(
    field, exponent, bound, cumw, logits, slot, position, live, workspace, token, values, flags, entropy
) -> None:
    """One token a row that is ours, and whether its proposal is rejected. Shapes: see `power_kernels.sample_slots`."""
    slots, columns = slot.cpu().numpy(), field.cpu().numpy()
    inside = (slots >= 0) & (slots < len(columns))
    ours = np.zeros_like(inside)
    ours[inside] = columns[slots[inside], SlotField.ACTIVE] != 0
    rows = torch.from_numpy(np.flatnonzero(ours))
    if not len(rows):
        return
    mine = slots[ours]
    of = {column: columns[mine, column] for column in SlotField}
    t = position.cpu().numpy()[ours] + 1 - of[SlotField.BASE]
    drawn, q, weight, h, status = _draw(logits[rows.to(logits.device)], exponent.cpu()[mine], of, t)

    bad = status != Status.OK
    counted = live.cpu().numpy()[ours] & ~bad
    weights = cumw.cpu().numpy()[mine] + weight.astype(np.float64)
    cumw[torch.from_numpy(mine[counted]).to(cumw.device)] = torch.from_numpy(weights[counted]).to(cumw.device)
    rejected = counted & _rejects(weights, t + 1, of, bound.cpu().numpy()[mine])

    stop = of[SlotField.STOP_TOKEN]
    emitted = np.where(bad, np.maximum(stop, 0), np.where(rejected & (stop >= 0), stop, drawn))
    results = np.stack([q, weight, h if entropy else np.zeros_like(h)], axis=1)
    for target, result in ((token, emitted), (values, results), (flags, status + SlotFlag.REJECTED * rejected)):
        target[rows.to(target.device)] = torch.from_numpy(result).to(target.device, target.dtype)


def _draw(logits, exponent, of, t) -> tuple[np.ndarray, ...]:
    """token int64, logq, weight, entropy float32 and status of each row, all [rows]."""
    words = rng.counters(t, of[SlotField.SERIAL], of[SlotField.CHAIN_ID], of[SlotField.PROMPT_ID], rng.STREAM_POSITION)
    exclude = np.where(t == of[SlotField.FIRST], of[SlotField.EXCLUDE], -1)
    alpha, beta = exponent.unbind(1)
    seed, counter, exclude = map(
        torch.from_numpy, (of[SlotField.SEED], words.astype(np.uint32).view(np.int32), exclude)
    )
    token = torch.empty(len(t), dtype=torch.int64, device="cpu")
    logp, logq, weight, entropy = torch.empty(4, len(t), dtype=torch.float32, device="cpu")
    status = torch.empty(len(t), dtype=torch.int32, device="cpu")
    sample_tokens_out(
        logits, alpha, beta, seed, counter, exclude, None, token, logp, logq, weight, entropy, status
    )  # fmt: skip
    return token.numpy(), logq.numpy(), weight.numpy(), entropy.numpy(), status.numpy()


def _rejects(weights, length, of, bound) -> np.ndarray:
    """Whether W + max(term(least), term(horizon)) < theta, bool [rows]; least as in `ReferenceChain.most_log_f`, but n
    for n + 1: what closes an answer is not known here. A NaN rejects nothing."""
    theta, bonus = bound[:, SlotBound.THETA], bound[:, SlotBound.LENGTH_BONUS]

    def below(n) -> np.ndarray:
        n = np.maximum(n, 1).astype(np.float64)
        return weights + (bonus * n - np.log(n)) < theta

    horizon = of[SlotField.HORIZON]
    with np.errstate(invalid="ignore"):
        return below(np.where(of[SlotField.CAN_END_EARLY] != 0, length, horizon)) & below(horizon)
