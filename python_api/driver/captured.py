"""Decode steps recorded once and replayed: one launch a step, no host in between.

A step may be recorded when everything that the host decides about it is in its key: the rows that it feeds and
whatever `CapturableEngine.prepare` returned. The first step with a new key runs as it is, which compiles kernels and
fills caches; the second is recorded; from then on it is replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

from power_kernels.api import torch_private
from power_kernels.api.driver.memory import is_out_of_memory


class Recording(Protocol):
    """A recorded step."""

    def capture(self, launch: Callable[[], None]) -> None:
        """Record what `launch` does, without doing it."""
        ...

    def replay(self) -> None:
        """Do what was recorded, on the tensors that it was recorded with."""
        ...


_streams: dict[torch.device, torch.cuda.Stream] = {}  # libraries keep a workspace for every stream that they saw


class CudaGraphs:
    """Recordings as CUDA graphs. They replay one after the other, so they share their memory."""

    def __init__(self, device: torch.device):
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.pool = torch.cuda.graph_pool_handle()

    def new(self) -> Recording:
        return _CudaGraph(self)


class _CudaGraph:
    def __init__(self, graphs: CudaGraphs):
        self.device, self.pool, self.graph = graphs.device, graphs.pool, torch.cuda.CUDAGraph()

    def capture(self, launch: Callable[[], None]) -> None:
        if self.device not in _streams:
            _streams[self.device] = torch.cuda.Stream(self.device)
        stream = _streams[self.device]
        # The outer context brings the caller's stream back where torch's own, which ends with the recording, fails to.
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            recording = torch.cuda.graph(self.graph, pool=self.pool, stream=stream, capture_error_mode="thread_local")
            try:
                with recording:
                    launch()
            except BaseException:
                torch_private.end_failed_capture(self.device, self.pool)
                raise

    def replay(self) -> None:
        self.graph.replay()


def recorder(device: torch.device):
    """What records steps on a device, or None where nothing does."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CapturedSteps:
    """The recordings of one run, by key. work: False once a step could not be recorded."""

    def __init__(self, graphs):
        self._graphs, self.work = graphs, True
        self._recordings: dict[Hashable, Recording | None] = {}

    def run(self, key: Hashable, launch: Callable[[], None]) -> bool:
        """Do `launch`, from its recording where there is one. Returns whether it was replayed."""
        if not self.work or key not in self._recordings:
            self._recordings[key] = None
            launch()
            return False
        if self._recordings[key] is None:
            recording = self._graphs.new()
            try:
                recording.capture(launch)
            except Exception as error:
                if is_out_of_memory(error) or not isinstance(error, RuntimeError):
                    raise
                # A model that waits for its device somewhere, as eager mixtures of experts do.
                warnings.warn(
                    f"the decode step cannot be recorded as a graph and runs as it is: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self.work = False
                launch()
                return False
            self._recordings[key] = recording
        self._recordings[key].replay()
        return True
