"""sample_slots: the sampler step of a serving stack, for rows whose parameters lie in a table by slot (DESIGN 5.8)."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from ..errors import ArgumentError, ArgumentTypeError
from ..slots import SLOT_FIELDS, SlotBound, SlotField, SlotTable
from .checks import check_flag, check_logits, check_tensor, check_vectors
from .dispatch import define_kernel, run
from .rows import check_workspace, new_workspace, workspace_size

SLOT_VALUES = 3  # columns of `values`: logq, weight, entropy


class SlotOutput(NamedTuple):
    """One row per row of logits. token int64 [B]; values float32 [B, 3] (logq, weight, entropy) in nats; flags int64
    [B], a `Status` and the bits of `SlotFlag`."""

    token: torch.Tensor
    values: torch.Tensor
    flags: torch.Tensor


def sample_slots(
    table: SlotTable,
    logits: torch.Tensor,
    slot: torch.Tensor,
    position: torch.Tensor,
    live: torch.Tensor,
    *,
    entropy: bool = False,
) -> SlotOutput:
    """Draw one token a row as `sample_tokens` does, with what the table holds for the row's slot, and tell whether the
    proposal it belongs to is rejected already (DESIGN 3.3, 5.8).

    table: a `SlotTable` of N slots; `table.cumw` is advanced. Its values are not looked at, here or on a device.
    logits: float32, float16 or bfloat16 [B, V], unit inner stride, any row stride.
    slot: int64 [B], each in [0, N). A row with another, or whose slot is not ACTIVE, is not ours.
    position: int64 [B], of the token that was fed. The answer position of the drawn one is t = position + 1 - BASE, its
        counter (t, SERIAL, CHAIN_ID, PROMPT_ID << 3), and EXCLUDE applies where t == FIRST.
    live: bool [B]: whether the draw counts. A row whose prompt is not read to its end is drawn and reported, touches
        nothing of the table and is never rejected.

    Of each row that is ours: logq, weight and entropy (0 unless asked for) of the drawn token x, bit for bit those of
    `sample_tokens`. If it is live, W = cumw[slot] + weight (float64) is stored in cumw; with n = t + 1 and
    term(n) = LENGTH_BONUS n - log n it is rejected when W + max(term(n), term(HORIZON)) < THETA, the first term only
    where CAN_END_EARLY. No weight may be positive for that: a THETA that is not -inf takes 1 <= beta <= alpha. A THETA
    lowered by 1e-9 (1 + |THETA|) covers the rounding of any backend: then nothing is rejected here that `mh_advance`
    would not reject.
    token: x; STOP_TOKEN where the row is rejected and STOP_TOKEN >= 0. A row whose status is not OK (`sample_tokens`;
    bad exponents are Status.NAN on every device) has NaN for its quantities, STOP_TOKEN or 0 for its token, and leaves
    cumw alone.
    A row that is not ours has token -1, values NaN, flags 0 and touches nothing.

    Two live rows of one slot are not allowed: ArgumentError on a host, undefined on a device.
    Raises ArgumentError for a shape, stride or value, ArgumentTypeError for a dtype, device or type.
    """
    _check(table, logits, slot, position, live)
    check_flag("entropy", entropy)
    rows = logits.shape[0]
    token = logits.new_full((rows,), -1, dtype=torch.int64)
    values = logits.new_full((rows, SLOT_VALUES), torch.nan, dtype=torch.float32)
    flags = logits.new_zeros(rows, dtype=torch.int64)
    _run(table, logits, slot, position, live, new_workspace(logits), token, values, flags, entropy)
    return SlotOutput(token, values, flags)


def sample_slots_out(
    table: SlotTable,
    logits: torch.Tensor,
    slot: torch.Tensor,
    position: torch.Tensor,
    live: torch.Tensor,
    workspace: torch.Tensor,
    token: torch.Tensor,
    values: torch.Tensor,
    flags: torch.Tensor,
    *,
    entropy: bool = False,
) -> None:
    """`sample_slots` into a stack's own tensors: two launches, no allocation, no wait, safe inside a CUDA graph.

    workspace: float32, contiguous, at least `workspace_size(B, V)` elements.
    token: int64 [B], values: float32 [B, 3], flags: int64 [B], or with more rows, of any strides (views of wider
    tensors). Rows of them that are not ours, and those beyond B, are left as they are.
    Errors: as `sample_slots`; ArgumentError also for a workspace or an output that is too small, or an output whose
    elements share memory.
    """
    _check(table, logits, slot, position, live)
    check_flag("entropy", entropy)
    check_workspace(logits, workspace, workspace_size(*logits.shape))
    _check_output("token", token, torch.int64, logits)
    _check_output("values", values, torch.float32, logits, SLOT_VALUES)
    _check_output("flags", flags, torch.int64, logits)
    _run(table, logits, slot, position, live, workspace, token, values, flags, entropy)


def _check(table, logits, slot, position, live) -> None:
    if not isinstance(table, SlotTable):
        raise ArgumentTypeError(f"table is a {type(table).__name__}; it must be a SlotTable")
    check_logits(logits)
    rows = (logits.shape[0],)
    check_vectors(logits, field=(table.field, torch.int64, (None, SLOT_FIELDS)))
    slots = table.field.shape[0]
    check_vectors(
        logits,
        exponent=(table.exponent, torch.float32, (slots, 2)),
        bound=(table.bound, torch.float64, (slots, len(SlotBound))),
        cumw=(table.cumw, torch.float64, (slots,)),
        slot=(slot, torch.int64, rows),
        position=(position, torch.int64, rows),
        live=(live, torch.bool, rows),
    )
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = Counter(s for s, counted in zip(slot.tolist(), live.tolist(), strict=True) if counted)
        for s, count in counts.items():
            if count > 1 and 0 <= s < slots and table.field[s, SlotField.ACTIVE]:
                raise ArgumentError(f"slot has {count} live rows of slot {s}; a slot must have one at most")


def _check_output(name: str, value, dtype: torch.dtype, logits: torch.Tensor, *width: int) -> None:
    check_tensor(name, value, dtypes=(dtype,), shape=(None, *width), like=logits)
    rows = logits.shape[0]
    if value.shape[0] < rows:
        raise ArgumentError(f"{name} has {value.shape[0]} rows; it must have at least {rows}")
    if any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)):
        raise ArgumentError(f"{name} has strides {list(value.stride())}; its elements must not share memory")


def _run(table: SlotTable, logits, *rest) -> None:
    run("sample_slots_out", logits.device, *table.tensors(), logits, *rest)


define_kernel(
    "sample_slots_out",
    "slots",
    "(Tensor field, Tensor exponent, Tensor bound, Tensor(a!) cumw, Tensor logits, Tensor slot, Tensor position, "
    "Tensor live, Tensor(b!) workspace, Tensor(c!) token, Tensor(d!) values, Tensor(e!) flags, bool entropy) -> ()",
)
