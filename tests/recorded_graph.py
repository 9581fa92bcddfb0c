"""A CUDA graph's stand-in on a CPU: operators recorded with the tensors that they got, and run again on those.

What a graph does not know, a recording does not either: Python that ran in between, and any value that a tensor had.
A value that is read while recording is an error, as it would be a wait for the device. The operators' own wrappers may
look (`power_kernels/ops`): on a device they do not.
"""

from __future__ import annotations

import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LOOKS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.lift_fresh.default,  # a value of the host's that becomes a tensor
}


class LookedAtTensorError(RuntimeError):
    pass


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in _LOOKS:
            if not _from_an_operator():
                raise LookedAtTensorError(f"{function} while a step is recorded")
            return function(*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out


def _from_an_operator() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if "/power_kernels/ops/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


class RecordedGraph:
    def __init__(self):
        self.calls: list = []
        self.done_once = False

    def capture(self, launch) -> None:
        """Unlike a device's, this does what it records; the first replay then does nothing."""
        with _Recorder(self.calls):
            launch()
        self.done_once = True

    def replay(self) -> None:
        if self.done_once:
            self.done_once = False
            return
        with torch.inference_mode():
            for function, args, kwargs, recorded in self.calls:
                inputs = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
                out = function(*args, **kwargs)
                for old, new in zip(tree_leaves(recorded), tree_leaves(out), strict=True):
                    # What is a view of its input, or the input itself, has changed with it.
                    if isinstance(new, torch.Tensor) and _memory(new) not in inputs:
                        old.copy_(new)


def _memory(tensor: torch.Tensor) -> int:
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


class RecordedGraphs:
    """What `captured.recorder` gives."""

    def __init__(self):
        self.made: list[RecordedGraph] = []

    def new(self) -> RecordedGraph:
        self.made.append(RecordedGraph())
        return self.made[-1]
