"""sample_slots: one token a row, its parameters in a table by slot, and the early rejection (DESIGN 3.3, 5.8).

    t = position + 1 - BASE    n = t + 1    term(n) = lambda n - log n    W = cumw + weight
    rejected = W + max(term(CAN_END_EARLY ? n : HORIZON), term(HORIZON)) < THETA

Two launches, those of sample_tokens (`sampling.py`, whose helpers do the work) with other loads in front:
`_slot_mass_kernel` takes beta from the row's slot, `_slot_finish_kernel` the rest, and adds the sum, the test and what
is emitted. A row that is not ours ends once its slot's ACTIVE is read: neither its logits nor its outputs are touched.

Shapes: logits [B, V] (fp32, fp16, bf16; unit inner stride, any row stride), the table's tensors [N, ...].
Bytes moved: those of sample_tokens, + 8 B of slots and 8 of ACTIVE a program, + about 150 a row of the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rng import STREAM_BITS
from ..slots import SLOT_FIELDS, SlotBound, SlotField, SlotFlag
from ..state import Status
from . import Configuration, launch, logits_configurations
from .rng import uniforms
from .sampling import (
    FINISH,
    LEAST_TILES,
    MASS,
    MOST_TILES,
    draw_token,
    excluded_token,
    mass_split,
    quantities,
    row_masses,
    row_of,
    tile_count,
    tile_records,
    tiles_block,
    vector_width,
)

_FIELDS = tl.constexpr(SLOT_FIELDS)
_ACTIVE = tl.constexpr(int(SlotField.ACTIVE))
_BASE = tl.constexpr(int(SlotField.BASE))
_FIRST = tl.constexpr(int(SlotField.FIRST))
_EXCLUDE = tl.constexpr(int(SlotField.EXCLUDE))
_SERIAL = tl.constexpr(int(SlotField.SERIAL))
_CHAIN_ID = tl.constexpr(int(SlotField.CHAIN_ID))
_PROMPT_ID = tl.constexpr(int(SlotField.PROMPT_ID))
_HORIZON = tl.constexpr(int(SlotField.HORIZON))
_STOP_TOKEN = tl.constexpr(int(SlotField.STOP_TOKEN))
_CAN_END_EARLY = tl.constexpr(int(SlotField.CAN_END_EARLY))
_SEED = tl.constexpr(int(SlotField.SEED))
_THETA = tl.constexpr(int(SlotBound.THETA))
_LENGTH_BONUS = tl.constexpr(int(SlotBound.LENGTH_BONUS))
_REJECTED = tl.constexpr(int(SlotFlag.REJECTED))
_OK = tl.constexpr(int(Status.OK))
_STREAM_BITS = tl.constexpr(STREAM_BITS)


# ---- helpers


@triton.jit
def _slot_of(slot_ptr, field_ptr, row, slots):
    """The row's slot, -1 where the row is not ours."""
    slot = tl.load(slot_ptr + row)
    inside = (slot >= 0) & (slot < slots)
    active = tl.load(field_ptr + slot * _FIELDS + _ACTIVE, mask=inside, other=0)
    return tl.where(active != 0, slot, -1)


@triton.jit
def _below(weight_sum, bonus, length, theta):
    """Whether W + term(length) < theta; a length of 0 or less counts as 1."""
    n = tl.maximum(length, 1).to(tl.float64)
    return weight_sum + (bonus * n - tl.log(n)) < theta


# ---- kernels


@triton.jit(
    do_not_specialize=["V", "stride_row", "tiles", "programs", "each", "slots"],
    do_not_specialize_on_alignment=["slot_ptr", "field_ptr", "exponent_ptr", "work_ptr"],
)
def _slot_mass_kernel(
    logits_ptr,  # [B, V] fp32 | fp16 | bf16, row stride stride_row
    slot_ptr,  # [B] i64
    field_ptr,  # [N, 12] i64
    exponent_ptr,  # [N, 2] fp32: alpha, beta
    work_ptr,  # [B, 4, tiles] fp32, see sampling._mass_kernel
    V,
    stride_row: tl.int64,  # in units of VEC entries
    tiles,
    programs,  # a row
    each,  # tiles a program
    slots,  # N
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
    VEC: tl.constexpr,  # entries a load: 16 bytes, or 1
):
    """A part of the tiles of one row that is ours, one after the other."""
    row = tl.program_id(0) // programs
    start = (tl.program_id(0) % programs) * each
    slot = _slot_of(slot_ptr, field_ptr, row, slots)
    if slot >= 0:
        logits = row_of(logits_ptr, row, stride_row, VEC)
        record = work_ptr + row.to(tl.int64) * (4 * tiles)
        tile_records(logits, tl.load(exponent_ptr + slot * 2 + 1), record, V, tiles, start, each, ENTROPY, TILE, VEC)


@triton.jit(
    do_not_specialize=[
        "V", "stride_row", "token_stride", "values_stride", "column_stride", "flags_stride", "tiles", "slots",
        "has_entropy",
    ],
    do_not_specialize_on_alignment=[
        "slot_ptr", "position_ptr", "live_ptr", "field_ptr", "exponent_ptr", "bound_ptr", "cumw_ptr", "work_ptr",
        "token_ptr", "values_ptr", "flags_ptr",
    ],
)  # fmt: skip
def _slot_finish_kernel(
    logits_ptr,  # [B, V] fp32 | fp16 | bf16, row stride stride_row
    slot_ptr,  # [B] i64
    position_ptr,  # [B] i64
    live_ptr,  # [B] bool
    field_ptr,  # [N, 12] i64
    exponent_ptr,  # [N, 2] fp32: alpha, beta
    bound_ptr,  # [N, 2] fp64: theta, lambda
    cumw_ptr,  # [N] fp64, read and written
    work_ptr,  # [B, 4, tiles] fp32, see sampling._mass_kernel
    token_ptr,  # [B] i64, any stride
    values_ptr,  # [B, 3] fp32, any strides: logq, weight, entropy
    flags_ptr,  # [B] i64, any stride
    V,
    stride_row: tl.int64,  # in units of VEC entries
    token_stride: tl.int64,
    values_stride: tl.int64,  # from a row to the next one
    column_stride: tl.int64,
    flags_stride: tl.int64,
    tiles,
    slots,  # N
    has_entropy,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    VEC: tl.constexpr,
):
    """One row that is ours: its sums, its draw, its token's quantities, its proposal's W and early rejection."""
    row = tl.program_id(0)
    slot = _slot_of(slot_ptr, field_ptr, row, slots)
    if slot >= 0:
        row_ptr = row_of(logits_ptr, row, stride_row, VEC)
        field = field_ptr + slot * _FIELDS
        alpha = tl.load(exponent_ptr + slot * 2).to(tl.float64)
        beta32 = tl.load(exponent_ptr + slot * 2 + 1)
        beta = beta32.to(tl.float64)
        is_live = tl.load(live_ptr + row)
        # Read by every thread here, before the barriers of the sums below, and written by one after them.
        sum_before = tl.load(cumw_ptr + slot, mask=is_live, other=0.0)
        status, index, top, mass, m, rest_1, rest_b, moment = row_masses(
            work_ptr, row, tiles, alpha, beta, has_entropy, TILES
        )

        t = tl.load(position_ptr + row) + 1 - tl.load(field + _BASE)
        given = tl.where(t == tl.load(field + _FIRST), tl.load(field + _EXCLUDE), -1)
        status, skip = excluded_token(row_ptr, given, status, V)
        x = -1
        if status == _OK:
            prompt = tl.load(field + _PROMPT_ID) << _STREAM_BITS  # the stream of positions is 0
            u, _ = uniforms(tl.load(field + _SEED), t, tl.load(field + _SERIAL), tl.load(field + _CHAIN_ID), prompt)
            x = draw_token(row_ptr, index, top, mass, m, beta32, u, skip, V, tiles, TILE, VEC)
        z_x = tl.load(row_ptr + tl.maximum(x, 0)).to(tl.float32).to(tl.float64)
        _, logq, weight, entropy = quantities(status, z_x, m, rest_1, rest_b, moment, alpha, beta)

        stop = tl.load(field + _STOP_TOKEN)
        emitted = tl.maximum(stop, 0)
        flags = status
        if status == _OK:
            emitted = x.to(tl.int64)
            if is_live:
                weight_sum = sum_before + weight.to(tl.float64)
                tl.store(cumw_ptr + slot, weight_sum)
                theta = tl.load(bound_ptr + slot * 2 + _THETA)
                bonus = tl.load(bound_ptr + slot * 2 + _LENGTH_BONUS)
                horizon = tl.load(field + _HORIZON)
                least = tl.where(tl.load(field + _CAN_END_EARLY) != 0, t + 1, horizon)
                # Two comparisons, not one with the larger term: a NaN rejects nothing, whatever a maximum makes of it.
                if _below(weight_sum, bonus, least, theta) & _below(weight_sum, bonus, horizon, theta):
                    flags = status | _REJECTED
                    emitted = tl.where(stop >= 0, stop, emitted)
        tl.store(token_ptr + row * token_stride, emitted)
        tl.store(flags_ptr + row * flags_stride, flags.to(tl.int64))
        values = values_ptr + row * values_stride
        tl.store(values, logq)
        tl.store(values + column_stride, weight)
        tl.store(values + 2 * column_stride, tl.where(has_entropy != 0, entropy, 0.0))


# ---- launcher


def sample_slots_out(
    field: torch.Tensor,
    exponent: torch.Tensor,
    bound: torch.Tensor,
    cumw: torch.Tensor,
    logits: torch.Tensor,
    slot: torch.Tensor,
    position: torch.Tensor,
    live: torch.Tensor,
    workspace: torch.Tensor,
    token: torch.Tensor,
    values: torch.Tensor,
    flags: torch.Tensor,
    entropy: bool,
) -> None:
    """`sample_slots` into preallocated tensors: two launches, no synchronisation, no allocation.

    Shapes and dtypes: see the kernels. token, values and flags may have more rows; workspace B * 4 * ceil(V / 256)
    entries or more.
    """
    rows, vocabulary = logits.shape
    slots, tiles, width = field.shape[0], tile_count(vocabulary), vector_width(logits)
    programs, each = mass_split(rows, tiles)
    stride = logits.stride(0) // width
    launch(
        _slot_mass_kernel,
        (rows * programs,),
        logits.device,
        logits,
        slot,
        field,
        exponent,
        workspace,
        vocabulary,
        stride,
        tiles,
        programs,
        each,
        slots,
        ENTROPY=entropy,
        VEC=width,
        **MASS,
    )
    launch(
        _slot_finish_kernel,
        (rows,),
        logits.device,
        logits,
        slot,
        position,
        live,
        field,
        exponent,
        bound,
        cumw,
        workspace,
        token,
        values,
        flags,
        vocabulary,
        stride,
        token.stride(0),
        *values.stride(),
        flags.stride(0),
        tiles,
        slots,
        int(entropy),
        TILES=tiles_block(vocabulary),
        VEC=width,
        **FINISH,
    )


_INTEGERS = ("V", "tiles", "slots")
_MASS_SIGNATURE = {
    "slot_ptr": "*i64",
    "field_ptr": "*i64",
    "exponent_ptr": "*fp32",
    "work_ptr": "*fp32",
    **dict.fromkeys((*_INTEGERS, "programs", "each"), "i32"),
}
_FINISH_SIGNATURE = {
    "slot_ptr": "*i64",
    "position_ptr": "*i64",
    "live_ptr": "*u1",
    "field_ptr": "*i64",
    "exponent_ptr": "*fp32",
    "bound_ptr": "*fp64",
    "cumw_ptr": "*fp64",
    "work_ptr": "*fp32",
    "token_ptr": "*i64",
    "values_ptr": "*fp32",
    "flags_ptr": "*i64",
    **dict.fromkeys(("token_stride", "values_stride", "column_stride", "flags_stride"), "i64"),
    **dict.fromkeys((*_INTEGERS, "has_entropy"), "i32"),
}


def configurations() -> list[Configuration]:
    """As those of sample_tokens: every dtype in both load widths, with and without entropy, both widths over tiles."""
    masses = logits_configurations("mass by slot", _slot_mass_kernel, _MASS_SIGNATURE, MASS, {"ENTROPY": (False, True)})
    finishers = logits_configurations(
        "finish by slot", _slot_finish_kernel, _FINISH_SIGNATURE, FINISH, {"TILES": (LEAST_TILES, MOST_TILES)}
    )
    return masses + finishers
