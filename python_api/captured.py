"""Decode steps recorded once and replayed: one launch a step, no host in between.

A step may be recorded when everything that the host decides about it is in its key: the rows that it feeds and
whatever `CapturableEngine.plan` returned. The first step with a new key runs as it is, which compiles kernels and
fills caches; the second is recorded; from then on it is replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Protocol

import torch


class Recording(Protocol):
    """A recorded step."""

    def capture(self, launch: Callable[[], None]) -> None:
        """Record what `launch` does, without doing it."""
        ...

    def replay(self) -> None:
        """Do what was recorded, on the tensors that it was recorded with."""
        ...


class CudaGraphs:
    """Recordings as CUDA graphs. They replay one after the other, so they share their memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def new(self) -> Recording:
        return _CudaGraph(self)


class _CudaGraph:
    def __init__(self, graphs: CudaGraphs):
        self.graphs, self.graph = graphs, torch.cuda.CUDAGraph()

    def capture(self, launch: Callable[[], None]) -> None:
        with torch.cuda.device(self.graphs.device), torch.cuda.graph(self.graph, pool=self.graphs.pool):
            launch()

    def replay(self) -> None:
        self.graph.replay()


def recorder(device: torch.device):
    """What records steps on a device, or None where nothing does."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CapturedSteps:
    """The recordings of one run, by key."""

    def __init__(self, graphs):
        self._graphs = graphs
        self._recordings: dict[Hashable, Recording | None] = {}
        self.replays = 0

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Do `launch`, from its recording where there is one."""
        if self._graphs is None or key not in self._recordings:
            self._recordings[key] = None
            launch()
            return
        recording = self._recordings[key]
        if recording is None:
            recording = self._graphs.new()
            try:
                recording.capture(launch)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # A model that waits for its device somewhere, as eager mixtures of experts do.
                warnings.warn(
                    f"the decode step cannot be recorded as a graph and runs as it is: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self._graphs = None
                launch()
                return
            self._recordings[key] = recording
        recording.replay()
        self.replays += 1
