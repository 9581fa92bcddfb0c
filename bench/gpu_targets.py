"""Launches every kernel, for a sanitizer or a profiler (bench/gpu_check.py, bench/profile.md).

    python bench/gpu_targets.py launch     small odd sizes and nothing else: what compute-sanitizer watches
    python bench/gpu_targets.py profile    real sizes, warmed up, between cudaProfilerStart and -Stop: for ncu and nsys
    python bench/gpu_targets.py durations  real sizes, the time of every kernel by torch.profiler; needs no privileges

Small sizes are those of tests/test_ops_contract.py, so that an operator that has tests has these; real ones are the
middle of the benchmark's grid for a device, with its byte formula. Run from the checkout; `--device cpu` shows the same
on the host, where the profilers' modes only run the calls.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


def small_arguments(device: str) -> dict:
    """Name of each launch -> (operator, arguments on the device). Every operator that backends implement is there."""
    os.environ["POWER_KERNELS_TEST_DEVICE"] = device  # before tests.devices is imported
    sys.path.insert(0, str(ROOT))
    try:
        import pytest  # noqa: F401
    except ImportError:
        sys.modules["pytest"] = mock.MagicMock()  # the tests' arguments are plain functions
    from power_kernels.ops import dispatch
    from tests import test_ops_contract as contract

    made = {name: (name, make) for name, make in contract.ARGUMENTS.items() if name in dispatch.KERNELS}
    for case, (name, make) in contract.OTHER_ARGUMENTS.items():
        made[f"{name}, {case}"] = (name, make)
    # a tile's edges and one entry more; rows of an odd stride, never 16-byte aligned
    for vocab in (1, 255, 1025, 4097):
        made[f"sample_tokens_out, V={vocab}"] = (
            "sample_tokens_out",
            lambda vocab=vocab: (*contract.sample_arguments(3, vocab), *contract.sample_outputs(3, vocab)),
        )
        made[f"sample_slots_out, V={vocab}"] = (
            "sample_slots_out",
            lambda vocab=vocab: (*contract.slot_arguments(3, vocab), *contract.slot_outputs(3, vocab), True),
        )
    return {case: (name, make, contract) for case, (name, make) in made.items()}


def without_arguments() -> list[str]:
    from power_kernels.ops import dispatch
    from tests import test_ops_contract as contract

    return sorted(set(dispatch.KERNELS) - set(contract.ARGUMENTS))


def launch(device: str) -> int:
    import torch

    torch.set_grad_enabled(False)
    for case, (name, make, contract) in small_arguments(device).items():
        contract.call(name, contract.placed(make()))
        if device != "cpu":
            torch.cuda.synchronize()
        print(f"launched {case}", flush=True)
    return 0


def workloads(device: str, grid: str):
    """(point, our call, bytes by the formula, flops) of each suite: the point in the middle of its grid."""
    import torch

    from power_kernels.api.bench.run import SUITES

    where = torch.device(device)
    for suite in SUITES:
        points = sorted(suite.points(grid, where.type), key=lambda point: math.prod(point.shape.values()))
        if not points:
            continue
        point = points[len(points) // 2]
        try:
            work = suite.build(point, where)
        except Exception as error:  # one suite that cannot be built hides no other
            print(f"not run: {point}: {type(error).__name__}: {error}", flush=True)
            continue
        yield str(point), work.contenders[work.ours], work.bytes, work.flops


def profile(device: str, grid: str) -> int:
    """Each call three times before, so that what is profiled is compiled and warm, then once in its range."""
    import torch

    on_cuda = device != "cpu"
    torch.set_grad_enabled(False)
    for name, call, size, flops in workloads(device, grid):
        for _ in range(3):
            call()
        print(f"profiling {name}: {size} bytes by the formula, {flops} flops", flush=True)
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            torch.cuda.nvtx.range_push(name)
        call()
        if on_cuda:
            torch.cuda.nvtx.range_pop()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
    return 0


def durations(device: str, grid: str, out) -> int:
    """The median time of each kernel of our calls over 20 of them, a line of JSON each."""
    import torch
    from torch.profiler import ProfilerActivity

    on_cuda = device != "cpu"
    torch.set_grad_enabled(False)
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    flush = torch.empty(2**28, dtype=torch.int8, device=device) if on_cuda else None  # several times any L2 cache
    for name, call, size, flops in workloads(device, grid):
        for _ in range(3):
            call()
        kernels: dict[str, list[float]] = {}
        with torch.profiler.profile(activities=[activity]) as recorded:
            for _ in range(20 if on_cuda else 2):
                if on_cuda:
                    flush.zero_()
                call()
            if on_cuda:
                torch.cuda.synchronize()
        for event in recorded.events():
            # On a device our kernels' names begin with an underscore, torch's do not.
            on_device = str(event.device_type).endswith("CUDA") and event.name.startswith("_")
            if on_device or (not on_cuda and "power_kernels" in event.name):
                kernels.setdefault(event.name, []).append(event.time_range.elapsed_us())
        medians = {kernel: sorted(times)[len(times) // 2] for kernel, times in kernels.items()}
        line = {"point": name, "bytes": size, "flops": flops, "kernels_us": medians}
        print(json.dumps(line), file=out, flush=True)
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("launch", "profile", "durations"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--grid", default="default", choices=("quick", "default", "full"))
    parser.add_argument("--out", type=Path, help="the file for the JSON lines (default: the screen)")
    given = parser.parse_args(arguments)
    out = given.out.open("w") if given.out else sys.stdout
    match given.mode:
        case "launch":
            return launch(given.device)
        case "profile":
            return profile(given.device, given.grid)
        case "durations":
            return durations(given.device, given.grid, out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
