"""kv_copy_ranges: ragged slices of every layer's K and V between two slabs, in one launch (DESIGN 5.6, 6).

    for every range (dst_row, src_row, start, stop):   dst[:, dst_row, :, start:stop] = src[:, src_row, :, start:stop]

Shapes: dst [G, Rd, heads, S, D], src [G, Rs, heads, S', D] of one dtype (moved as bytes), unit stride along D, any
other strides; ranges i32 [R, 4], contiguous. A range is copied whole or not at all: it is skipped when it is empty, or
when a row or position lies outside a slab. The slabs must not share memory, ranges must not write the same positions.
Bytes moved: 2 * G * heads * D * itemsize a position. One program a (range, g, part of the range's blocks); a program
of an empty range reads 16 bytes and leaves. Every size and stride is an argument: a device compiles the few block
widths below, whatever the model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import POINTER, Configuration, launch, split

COPY = {"num_warps": 4}
_BLOCK = 2048  # words at a time: four 16-byte loads in flight a thread
_PROGRAMS = 16384  # long ranges are divided until there are this many; a program without work costs its launch

_STRIDES = ("dst_g", "dst_row", "dst_head", "dst_position", "src_g", "src_row", "src_head", "src_position")
_SIZES = ("dst_rows", "src_rows", "heads", "positions", "units")


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES], do_not_specialize_on_alignment=["ranges_ptr"])
def _kv_copy_kernel(
    dst_ptr,  # [G, Rd, heads, S, D] words
    src_ptr,  # [G, Rs, heads, S', D] words
    ranges_ptr,  # [R, 4] i32: dst_row, src_row, start, stop
    dst_g: tl.int64,  # strides in units of UNIT words
    dst_row: tl.int64,
    dst_head: tl.int64,
    dst_position: tl.int64,
    src_g: tl.int64,
    src_row: tl.int64,
    src_head: tl.int64,
    src_position: tl.int64,
    dst_rows,
    src_rows,
    heads,
    positions,  # min(S, S')
    units,  # a position: D / UNIT
    UNIT: tl.constexpr,  # words a unit: 4 when every address is a multiple of 16 bytes
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A part of one range of one layer's K or V."""
    ranges_ptr += tl.program_id(0) * 4
    to = tl.load(ranges_ptr)
    of = tl.load(ranges_ptr + 1)
    start = tl.load(ranges_ptr + 2)
    stop = tl.load(ranges_ptr + 3)
    inside = (to >= 0) & (to < dst_rows) & (of >= 0) & (of < src_rows) & (start >= 0) & (stop <= positions)
    if inside & (start < stop):
        g = tl.program_id(1).to(tl.int64)
        # Strides count units, so that the compiler sees that every offset is a multiple of UNIT words; that the slabs
        # begin at multiples of 16 bytes it is told by the launcher.
        dst_base = dst_ptr + (g * dst_g + to.to(tl.int64) * dst_row) * UNIT
        src_base = src_ptr + (g * src_g + of.to(tl.int64) * src_row) * UNIT
        if UNIT > 1:
            dst_base = tl.multiple_of(dst_base, 4 * UNIT)
            src_base = tl.multiple_of(src_base, 4 * UNIT)
        blocks = tl.cdiv(stop - start, BLOCK_S)
        for item in range(tl.program_id(2), heads * blocks, tl.num_programs(2)):
            head = (item // blocks).to(tl.int64)
            position = start + (item % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
            live = position < stop
            position = position.to(tl.int64)
            source = src_base + (head * src_head + position * src_position) * UNIT
            target = dst_base + (head * dst_head + position * dst_position) * UNIT
            for first in range(0, units * UNIT, BLOCK_D):
                word = first + tl.arange(0, BLOCK_D)[None, :]
                mask = live & (word < units * UNIT)
                tl.store(target + word, tl.load(source + word, mask=mask), mask=mask)


_WORD = {16: (torch.int32, 4), 8: (torch.int32, 2), 4: (torch.int32, 1), 2: (torch.int16, 1), 1: (torch.uint8, 1)}


def _common_unit(dst: torch.Tensor, src: torch.Tensor) -> int:
    """The largest power of two, at most 16, that divides every address and stride of both slabs, in bytes."""
    bits = 16 | dst.shape[4] * dst.element_size() | dst.data_ptr() | src.data_ptr()
    for slab in (dst, src):
        item = slab.element_size()
        bits |= slab.storage_offset() * item
        for size, stride in zip(slab.shape[:4], slab.stride()[:4], strict=True):
            if size > 1:
                bits |= stride * item
    return bits & -bits


def _words(slab: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # The stride of a dimension of size 1 means nothing, but `view` would check it.
    strides = [stride if size > 1 else 0 for size, stride in zip(slab.shape, slab.stride(), strict=True)]
    return slab.as_strided(slab.shape, [*strides[:4], 1]).view(dtype)


# Words of a position at a time: 128, 256 or 512 bytes of it; narrower units are for odd shapes and have one width.
_WIDTHS = {16: (32, 64, 128), 8: (32,), 4: (32,), 2: (32,), 1: (32,)}


def _blocks(unit_bytes: int, words: int) -> dict[str, int]:
    widths = _WIDTHS[unit_bytes]
    width = next((w for w in widths if w >= words), widths[-1])
    return {"BLOCK_S": _BLOCK // width, "BLOCK_D": width}


def kv_copy_ranges(dst: torch.Tensor, src: torch.Tensor, ranges: torch.Tensor) -> None:
    """See `power_kernels.kv_copy_ranges`. One launch, no synchronisation, no allocation on the device."""
    if dst.numel() == 0 or src.numel() == 0:
        return
    unit_bytes = _common_unit(dst, src)
    dtype, unit = _WORD[unit_bytes]
    to, of = _words(dst, dtype), _words(src, dtype)
    groups, _, heads, _, words = to.shape
    positions = min(to.shape[3], of.shape[3])
    meta = _blocks(unit_bytes, words)
    wanted = triton.cdiv(_PROGRAMS, max(ranges.shape[0] * groups, 1))
    parts = min(wanted, heads * triton.cdiv(positions, meta["BLOCK_S"]))
    launch(
        _kv_copy_kernel,
        (ranges.shape[0], groups, parts),
        dst.device,
        to,
        of,
        ranges,
        *(stride // unit for stride in to.stride()[:4]),
        *(stride // unit for stride in of.stride()[:4]),
        to.shape[1],
        of.shape[1],
        heads,
        positions,
        words // unit,
        UNIT=unit,
        **meta,
        **COPY,
    )


def configurations() -> list[Configuration]:
    """Every unit and block width, whatever the head dimension and dtype."""
    constexprs, warps = split(COPY)
    found = []
    for unit_bytes, (dtype, unit) in _WORD.items():
        pointer = POINTER[dtype]
        for width in _WIDTHS[unit_bytes]:
            found.append(
                Configuration(
                    name=f"kv_copy unit={unit_bytes}B BLOCK_D={width}",
                    kernel=_kv_copy_kernel,
                    signature={
                        "dst_ptr": pointer,
                        "src_ptr": pointer,
                        "ranges_ptr": "*i32",
                        **dict.fromkeys(_STRIDES, "i64"),
                        **dict.fromkeys(_SIZES, "i32"),
                    },
                    constexprs={"UNIT": unit, **_blocks(unit_bytes, width), **constexprs},
                    aligned=("dst_ptr", "src_ptr") if unit_bytes == 16 else (),
                    num_warps=warps,
                    wide="v4" if unit_bytes == 16 else None,
                    elements=_BLOCK,
                )
            )
    return found
