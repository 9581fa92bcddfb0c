"""Tensors of a device, looked at on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def on_host(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Tensors that are all on one device, as arrays: views of what is on the CPU, else copies."""
    return [tensor.numpy() for tensor in tensors] if tensors[0].device.type == "cpu" else in_one_copy(tensors)


def in_one_copy(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Tensors of any dtypes, one behind the other as bytes: the host waits once."""
    parts = [tensor.flatten().view(torch.uint8) for tensor in tensors]
    stops = np.cumsum([part.numel() for part in parts])
    packed = np.split(torch.cat(parts).cpu().numpy(), stops[:-1])
    return [
        part.view(torch.empty(0, dtype=tensor.dtype, device="cpu").numpy().dtype).reshape(tensor.shape)
        for part, tensor in zip(packed, tensors, strict=True)
    ]
