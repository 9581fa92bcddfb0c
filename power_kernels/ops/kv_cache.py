"""kv_copy_ranges (DESIGN 5.6, 6)."""

from __future__ import annotations

import torch

from ..errors import ArgumentError
from .checks import check_rows, check_tensor, check_vectors
from .dispatch import define_kernel, run


def kv_copy_ranges(dst: torch.Tensor, src: torch.Tensor, ranges: torch.Tensor) -> None:
    """Copy ragged slices of every layer's K and V between two slabs, in one launch (DESIGN 5.6, 6).

    dst [G, R, heads, S, D] and src [G, R', heads, S', D], G = 2 * layers, of one dtype, unit inner stride, not sharing
    memory. ranges: int32 [N, 4], rows (dst_row, src_row, start, stop): for every g and head,
    dst[g, dst_row, :, start:stop] = src[g, src_row, :, start:stop]; stop <= start copies nothing. No two ranges may
    write the same positions. Neither that, nor that the slabs do not overlap in memory, is checked. A range outside the
    slabs raises ArgumentError on the CPU and is skipped on a device.
    Errors: as `sample_tokens`.
    """
    check_tensor("dst", dst, shape=(None,) * 5)
    check_tensor(
        "src", src, dtypes=(dst.dtype,), shape=(dst.shape[0], None, dst.shape[2], None, dst.shape[4]), like=dst
    )
    check_vectors(dst, ranges=(ranges, torch.int32, (None, 4)))
    for name, slab in (("dst", dst), ("src", src)):
        check_rows(name, slab)
    if ranges.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ranges(dst, src, ranges)
    run("kv_copy_ranges", dst.device, dst, src, ranges)


def _check_ranges(dst: torch.Tensor, src: torch.Tensor, ranges: torch.Tensor) -> None:
    for i, (dst_row, src_row, start, stop) in enumerate(ranges.tolist()):
        if stop <= start:
            continue
        inside = (
            0 <= dst_row < dst.shape[1]
            and 0 <= src_row < src.shape[1]
            and start >= 0
            and stop <= min(dst.shape[3], src.shape[3])
        )
        if not inside:
            raise ArgumentError(
                f"ranges[{i}] is {[dst_row, src_row, start, stop]}; rows must lie in [0, {dst.shape[1]}) and "
                f"[0, {src.shape[1]}), positions in [0, {min(dst.shape[3], src.shape[3])}]"
            )


define_kernel(
    "kv_copy_ranges",
    "kv_cache",
    "(Tensor(a!) dst, Tensor src, Tensor ranges) -> ()",
)
