"""kv_copy_ranges in torch."""

from __future__ import annotations

import torch


def kv_copy_ranges(dst: torch.Tensor, src: torch.Tensor, ranges: torch.Tensor) -> None:
    """Ragged slices of every layer's K and V. See `power_kernels.kv_copy_ranges`."""
    for dst_row, src_row, start, stop in ranges.tolist():
        if stop > start:
            dst[:, dst_row, :, start:stop] = src[:, src_row, :, start:stop]
