"""What the package asks of torch.cuda, shown on a CPU with torch's functions replaced by ones that keep a record.

On a device these lines change no answer, only whether it comes, how fast, or from which memory: tests of results, of a
device too, cannot tell whether they are there.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from power_kernels.api import HuggingFaceEngine, PowerConfig, PowerSampler, torch_private
from power_kernels.api.driver import captured, memory
from power_kernels.api.engines.huggingface.decode_attention import FLASH, DecodeView
from power_kernels.api.engines.huggingface.engine import bucket
from power_kernels.triton import launch
from tests import tiny_models
from tests.recorded_graph import RecordedGraphs

HERE, THERE = torch.device("cuda:0"), torch.device("cuda:1")


# ---- recordings


def test_steps_are_recorded_for_few_numbers_of_rows_and_few_lengths(monkeypatch):
    """Six slots that run empty: 1, 2, 4 or 6 chains are fed, also where 3 or 5 are left; lengths go by eights."""
    keys, left, run = set(), set(), captured.CapturedSteps.run
    monkeypatch.setattr(captured, "recorder", lambda device: RecordedGraphs())
    monkeypatch.setattr(captured.CapturedSteps, "run", lambda self, key, step: keys.add(key) or run(self, key, step))
    engine = HuggingFaceEngine(
        tiny_models.llama(), remember=False, length_multiple=8, attention="padded", self_check=False
    )
    config = PowerConfig(alpha=3.0, max_new_tokens=12, block_size=6, mcmc_steps=5, lanes=1)
    sampler = PowerSampler(engine, capture=True)
    for done, _ in enumerate(sampler.stream([[5, 6, 7]], config, num_chains=7, max_chains=6, seed=3, eos_token_id=[])):
        left.add(7 - done)
    assert {5, 3} < left
    assert {chains for chains, _ in keys} == {1, 2, 4, 6}
    assert {length % 8 for _, length in keys} == {0}
    assert len({length for _, length in keys}) >= 2


def test_bounds_of_long_answers_are_four_to_an_octave_and_on_a_cpu_exact():
    for multiple in (8, 64):
        assert {bucket(length, multiple) for length in range(2049, 4097)} == {2560, 3072, 3584, 4096}
    assert [bucket(length, 64) for length in (1, 64, 65, 512)] == [64, 64, 128, 512]
    assert [bucket(length, 1) for length in (1, 63, 2049)] == [1, 63, 2049]


# ---- torch.cuda, replaced


class Cuda:
    """The current device and stream, which contexts change and bring back. failing: a recording does not end well."""

    def __init__(self, monkeypatch):
        self.device, self.stream, self.failing, self.recorded = HERE, "the caller's", False, []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.device.index)
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda to, name=name: self.inside(name, to))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "a graph")
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
        monkeypatch.setattr(torch.cuda, "graph", self.recording)

    @contextmanager
    def inside(self, name: str, to):
        before = getattr(self, name)
        setattr(self, name, to)
        try:
            yield
        finally:
            setattr(self, name, before)

    @contextmanager
    def recording(self, graph, *, pool, stream, capture_error_mode):
        """torch's own: where ending the recording raises, the stream that it had set stays."""
        before, self.stream = self.stream, stream
        self.recorded.append((self.device, stream))
        yield
        if self.failing:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.stream = before


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    monkeypatch.setattr(captured, "_streams", {})
    monkeypatch.setattr(torch_private, "end_failed_capture", lambda device, pool: None)
    return Cuda(monkeypatch)


@pytest.mark.parametrize("failing", [False, True])
def test_a_recording_brings_the_caller_s_device_and_stream_back_also_where_it_fails(failing, cuda):
    cuda.failing = failing
    recording = captured.CudaGraphs(THERE).new()
    steps = []
    if failing:
        with pytest.raises(RuntimeError, match="not permitted"):
            recording.capture(lambda: steps.append(cuda.stream))
    else:
        recording.capture(lambda: steps.append(cuda.stream))
    assert steps == ["a stream of cuda:1"]
    assert cuda.recorded == [(THERE, "a stream of cuda:1")]
    assert (cuda.device, cuda.stream) == (HERE, "the caller's")


def test_recordings_of_a_device_share_a_stream(cuda):
    """Libraries keep a workspace for every stream that they saw."""
    for device in (THERE, HERE, THERE):
        captured.CudaGraphs(device).new().capture(lambda: None)
    assert [stream for _, stream in cuda.recorded] == ["a stream of cuda:1", "a stream of cuda:0", "a stream of cuda:1"]
    assert len(captured._streams) == 2


class Kernel:
    """Notes the grid and the device that was current."""

    def __init__(self, cuda: Cuda):
        self.cuda, self.launches = cuda, []

    def __getitem__(self, grid):
        return lambda *arguments, **meta: self.launches.append((grid, self.cuda.device, arguments, meta))


def test_a_kernel_is_launched_on_the_device_of_its_tensors_whichever_is_current(cuda):
    kernel = Kernel(cuda)
    for device in (HERE, THERE):
        launch(kernel, (3, 2), device, "x", TILE=8)
    assert kernel.launches == [((3, 2), device, ("x",), {"TILE": 8}) for device in (HERE, THERE)]
    assert cuda.device == HERE


@pytest.mark.parametrize("grid", [(0,), (4, 0), (0, 4)])
def test_an_empty_grid_is_not_launched(grid, cuda):
    kernel = Kernel(cuda)
    launch(kernel, grid, HERE, "x")
    assert kernel.launches == []


def test_memory_that_torch_holds_and_does_not_use_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert memory.free_bytes(HERE) == 1400


# ---- flash attention


@pytest.mark.parametrize(("window", "longest"), [(None, 40), (7, 7), (64, 40)])
def test_flash_is_told_of_no_more_positions_than_a_window_shows(window, longest, monkeypatch):
    """It divides its work by them."""
    told = []

    def flash(query, keys, values, **given):
        told.append((given["longest"], given["used"].tolist()))
        return torch.zeros(query.shape), torch.zeros(query.shape[1], query.shape[0])

    monkeypatch.setattr(torch_private, "flash_attention_of_sequences", flash)
    slab, query = torch.zeros(2, 1, 64, 16), torch.zeros(2, 1, 1, 16).transpose(1, 2)
    DecodeView(torch.tensor([39, 3]), 40, FLASH).attend(query, slab, slab, 1.0, window, None)
    assert told == [(longest, [min(40, window or 40), 4])]
