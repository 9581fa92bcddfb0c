"""Timing of contenders side by side, on a CPU or on one CUDA device.

All contenders of a point run in one process, in rounds that take each of them once, in another order each, so that a
noisy machine hurts all alike and none always finds the caches that another left; ratios are of medians over rounds.

CPU: with one thread the clock is the process's own processor time, which other programs do not lengthen; with more it
is the wall. A call shorter than `SHORTEST` is repeated within one sample, and one shorter than `WARMED` is preceded by
one that is not timed: inputs lie in whatever cache they fit, as they do where a product has just written them.

CUDA: each sample is one call between two events on the stream. Before it, a buffer four times the L2 cache is written,
which empties the cache of the inputs and keeps the device busy while the host enqueues the call. What never waits for
the device is replayed as a CUDA graph; the others pay for their launches.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler reports each start and stop

import torch

Call = Callable[[], object]

SHORTEST = 1e-3  # seconds of a sample on a CPU: a hundred times what the clock resolves
WARMED = 0.02  # seconds: what takes longer moves more than caches hold
FEWEST_ROUNDS = 5
SLOW = 20  # a contender this much slower than the fastest is not called after FEWEST_ROUNDS


@dataclass(frozen=True)
class Point:
    """One cell of a grid: an operator, the sizes of its arguments by name, the dtype of its largest one.

    compiled: torch.compile is among the contenders. It takes seconds a point, so that only some have it.
    """

    op: str
    dtype: torch.dtype
    shape: dict[str, int] = field(hash=False)
    compiled: bool = False

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.shape.items())
        return f"{self.op} {dtype_name(self.dtype)} {sizes}"


@dataclass
class Workload:
    """What is timed at a point.

    contenders: name -> call; `ours` names the one that ratios compare with. bytes: the least memory traffic of the
    operator, by its formula, whoever computes it. flops: of its products, 0 for none. count: what one call completes,
    in the suite's unit. yardstick: the contender that limits are stated against. graph: contenders that may be
    replayed as a CUDA graph. optional: contenders of other libraries, which may fail here and are then reported.
    missing: contenders that are not run, with the reason. check: raises when what was timed was not the real work.
    once: a call takes so long that one tells enough.
    """

    contenders: dict[str, Call]
    ours: str
    bytes: int
    count: int
    flops: int = 0
    yardstick: str | None = None
    graph: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    missing: dict[str, str] = field(default_factory=dict)
    check: Callable[[], None] | None = None
    once: bool = False


@dataclass(frozen=True)
class Suite:
    """The benchmark of one operator.

    title: what a reader looks for. unit: what `Workload.count` counts. formula: the bytes of `Workload.bytes`, in
    words. core: contenders that every workload of the suite has. points(grid, device type): the points of the grid
    "quick", "default" or "full". build(point, device): allocates and returns the workload.
    """

    op: str
    title: str
    unit: str
    formula: str
    core: tuple[str, ...]
    points: Callable[[str, str], list[Point]]
    build: Callable[[Point, torch.device], Workload]


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one contender, and the memory of one call on top of what was held before.

    peak_bytes: the most that torch's allocator held. resident_bytes: how far the process's resident memory rose,
    whoever allocated; None on a device, and where the system does not tell.
    """

    median: float
    least: float
    rounds: int
    graph: bool
    peak_bytes: int
    resident_bytes: int | None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ----------------------------------------------------------------------------------------------------
# Clocks


class CpuClock:
    """Samples of repeated calls, by processor or wall time."""

    def __init__(self):
        self.now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.name = "processor time" if torch.get_num_threads() == 1 else "wall time"

    def prepare(self, run: Call, graph: bool) -> tuple[Call, bool]:
        """The call to be sampled, warmed up, and whether it is a graph."""
        run()
        start = self.now()
        run()
        took = self.now() - start
        repeats = max(1, round(SHORTEST / max(took, 1e-9)))

        def sample() -> Callable[[], float]:
            if took < WARMED:
                run()
            begin = self.now()
            for _ in range(repeats):
                run()
            elapsed = (self.now() - begin) / repeats
            return lambda: elapsed

        return sample, False

    def finish(self) -> None:
        pass


class CudaClock:
    """Samples of single calls between events, the L2 cache emptied before each."""

    name = "CUDA events, L2 emptied"

    def __init__(self, device: torch.device):
        self.device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(4 * l2, 64 << 20), dtype=torch.uint8, device=device)

    def prepare(self, run: Call, graph: bool) -> tuple[Call, bool]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # kernels are compiled before anything is captured
            for _ in range(3):
                run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        if graph:
            captured = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(captured):
                    run()
            except RuntimeError:  # something in it waits for the device; the record says that it was not replayed
                graph = False
            else:
                run = captured.replay
                run()
        torch.cuda.synchronize(self.device)

        def sample() -> Callable[[], float]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            run()
            end.record()
            return lambda: start.elapsed_time(end) / 1e3

        return sample, graph

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


# ----------------------------------------------------------------------------------------------------
# Measuring


def measure(work: Workload, device: torch.device, clock, seconds: float = 0.5) -> tuple[dict[str, Timing], dict]:
    """Timings by contender, and why the missing ones are missing."""
    calls, missing = {}, dict(work.missing)
    for name, run in work.contenders.items():
        try:
            calls[name] = (run, False) if work.once else clock.prepare(run, name in work.graph)
        except torch.OutOfMemoryError as error:
            if name == work.ours:
                raise
            missing[name] = _first_line(error)
        except Exception as error:  # another library's kernel may not serve this shape, dtype or device
            if name not in work.optional:
                raise
            missing[name] = _first_line(error)
    if work.once:
        timings = {name: _once(run, device, clock) for name, (run, _) in calls.items()}
    else:
        samples = rounds({name: sample for name, (sample, _) in calls.items()}, clock, seconds)
        timings = {
            name: Timing(
                statistics.median(times), min(times), len(times), calls[name][1],
                *peak_memory(work.contenders[name], device),
            )
            for name, times in samples.items()
        }  # fmt: skip
    if work.check is not None:
        work.check()
    return timings, missing


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _once(run: Call, device: torch.device, clock: CpuClock) -> Timing:
    begin = clock.now()
    memory = peak_memory(run, device)
    elapsed = clock.now() - begin
    return Timing(elapsed, elapsed, 1, False, *memory)


def rounds(samples: dict[str, Call], clock, seconds: float) -> dict[str, list[float]]:
    """Seconds a call, by contender, of as many rounds as fit, and FEWEST_ROUNDS at least."""
    times: dict[str, list[float]] = {name: [] for name in samples}
    active, begin = list(samples), time.perf_counter()
    order, done = random.Random(0), 0
    while done < FEWEST_ROUNDS or time.perf_counter() - begin < seconds:
        order.shuffle(active)
        pending = {name: samples[name]() for name in active}
        clock.finish()
        for name, elapsed in pending.items():
            times[name].append(elapsed())
        done += 1
        if done == FEWEST_ROUNDS:
            median = {name: statistics.median(values) for name, values in times.items()}
            active = [name for name in samples if median[name] < SLOW * min(median.values())]
    return times


def copy_bandwidth(device: torch.device, clock, megabytes: int | None = None) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    megabytes = megabytes or (1024 if device.type == "cuda" else 128)
    source = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    sample, _ = clock.prepare(lambda: target.copy_(source), False)
    return 2 * source.nbytes / min(rounds({"copy": sample}, clock, 1.0)["copy"])


def peak_memory(run: Call, device: torch.device) -> tuple[int, int | None]:
    """(peak_bytes, resident_bytes) of `Timing`, of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        resident = _resident_growth(run)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, resident


def _resident_growth(run: Call) -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    except OSError:
        run()
        return None
    before = _kibibytes("VmRSS:")
    run()
    return max(0, _kibibytes("VmHWM:") - before) * 1024


def _kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
