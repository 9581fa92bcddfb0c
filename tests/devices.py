"""Where the tests run: `pytest --device cpu` (the default) or `--device cuda`.

On the CPU the Triton kernels run in Triton's interpreter, on CPU tensors. On a CUDA device they are compiled and
launched. Most tests of operators describe their data on the host and check it there; `carried` lets them keep that: a
call of the triton backend with host tensors is made on copies on the device, laid out as the originals are (strides,
offset, alignment, and whatever lies between the rows), and what the operator wrote is copied back, its surroundings
included, so that a stray write shows. What depends on tensors being on the device (dispatch, values that nobody looks
at, graphs, streams) is in test_cuda.py, and the drivers' and engines' tests keep their tensors there throughout.

conftest.py sets the environment variable before any test module, or triton, is imported.
"""

from __future__ import annotations

import os

import pytest
import torch

VARIABLE = "POWER_KERNELS_TEST_DEVICE"
DEVICE = torch.device(os.environ.get(VARIABLE, "cpu"))
ON_CUDA = DEVICE.type == "cuda"

host_only = pytest.mark.skipif(ON_CUDA, reason="runs on the host whatever the device: part of the CPU run")

# Above this many entries only the tensor's own entries travel, not what lies between them.
_WHOLE = 1 << 26


def _extent(tensor: torch.Tensor) -> int:
    """Entries of the storage from the tensor's first to its last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_strided((_extent(tensor),), (1,), tensor.storage_offset())


def on_device(value, device: torch.device = DEVICE):
    """A tensor's copy on the device with its strides, its surroundings and its misalignment; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or device.type == "cpu":
        return value
    return copied_to(value, device)


def copied_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    extent = _extent(tensor)
    # Allocations are aligned to 64 bytes or more here and there.
    pad = tensor.data_ptr() % 64 // tensor.element_size() if extent else 0
    copy = torch.empty(pad + extent, dtype=tensor.dtype, device=device)
    view = copy.as_strided(tensor.shape, tensor.stride(), pad)
    if extent <= _WHOLE:
        copy[pad:].copy_(_flat(tensor))
    else:
        view.copy_(tensor)
    return view


def copy_back(tensor: torch.Tensor, copy: torch.Tensor) -> None:
    if _extent(tensor) <= _WHOLE:
        _flat(tensor).copy_(_flat(copy))
    else:
        tensor.copy_(copy)


def carried(run, device: torch.device = DEVICE):
    """`dispatch.serve` for host tensors and a backend that needs them on `device`."""
    from power_kernels.ops import dispatch

    def runner(name: str, where: torch.device, *arguments) -> None:
        if dispatch.forced_backend() != "triton" or where.type != "cpu" or torch.compiler.is_compiling():
            return run(name, where, *arguments)
        schema = getattr(torch.ops.power_kernels, name).default._schema
        copies = [copied_to(a, device) if isinstance(a, torch.Tensor) else a for a in arguments]
        run(name, device, *copies)
        for declared, ours, theirs in zip(schema.arguments, arguments, copies, strict=True):
            if isinstance(ours, torch.Tensor) and declared.alias_info is not None and declared.alias_info.is_write:
                copy_back(ours, theirs)

    return runner
