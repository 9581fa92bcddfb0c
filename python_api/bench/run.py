"""`power-kernels bench` at work: run the suites, print them, keep them. Its options are in `options.py`."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler reports each start and stop

import torch

import power_kernels as pk
from power_kernels.api.bench import attention, chain, kv_cache, lm_head, logits, paged_kv, particles, report, slots
from power_kernels.api.bench.harness import Suite, clock_for, copy_bandwidth, measure
from power_kernels.api.bench.limits import limits_table
from power_kernels.errors import ArgumentError, BackendError

SUITES = (
    chain.ACCEPT,
    chain.ADVANCE,
    logits.SAMPLE,
    logits.SCORE,
    slots.STEP,
    particles.BRANCH,
    lm_head.SAMPLE,
    lm_head.SCORE,
    kv_cache.COPY,
    paged_kv.TABLES,
    paged_kv.COPY,
    attention.DECODE,
)


def measure_suites(arguments: argparse.Namespace, seconds: float) -> int:
    """Measure and print; with --out the results are written after every suite, so that an interruption keeps them.

    arguments: sound ones (`options.run`). seconds: of rounds at each point.
    """
    device = _device(arguments.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        with torch.inference_mode():
            results = collect(
                [suite for suite in SUITES if suite.op in arguments.ops],
                device,
                arguments.grid,
                seconds,
                show=lambda text: print(text, flush=True),
                out=arguments.out,
            )
    finally:
        torch.set_num_threads(threads)
    print(limits_table(results))
    took = results["environment"]["seconds"]
    print(f"\n{took:.0f} s{f'; results in {arguments.out}' if arguments.out else ''}")
    return 0


def collect(suites: list[Suite], device: torch.device, grid: str, seconds: float, *, show, out: Path | None) -> dict:
    """The results of `report`, for the threads that torch has now. show: called with each part of the text."""
    clock = clock_for(device)
    begin = time.perf_counter()
    environment = report.environment(device, clock, grid)
    show(describe(environment))
    copy = copy_bandwidth(device, clock)
    show(f"copy: {copy / 1e9:.1f} GB/s read and written; alpha = beta = 4 unless a beta is named")
    results = {
        "schema": report.SCHEMA,
        "environment": environment,
        "copy_bytes_per_s": copy,
        "formulas": {suite.op: suite.formula for suite in suites},
        "records": [],
    }
    for suite in suites:
        rows = []
        for point in suite.points(grid, device.type):
            try:
                work = suite.build(point, device)
                timings, missing = measure(work, device, clock, seconds)
            except torch.OutOfMemoryError:
                show(f"\n{point}: does not fit the device's memory")
                continue
            rows += report.records(suite, point, work, timings, missing, copy)
            del work
        results["records"] += rows
        environment["seconds"] = round(time.perf_counter() - begin, 1)
        environment["load_average_after"] = report.load_average()
        if rows:
            show(report.suite_table(suite, rows, device.type == "cuda"))
        if out is not None:
            report.write(results, out)
    return results


def describe(environment: dict) -> str:
    libraries = ", ".join(f"{name} {version or 'not installed'}" for name, version in environment["libraries"].items())
    return (
        f"{environment['device']}; {environment['cpus']} CPUs, {environment['threads']} threads, "
        f"load {environment['load_average_before']}; {environment['clock']}\n"
        f"power_kernels {environment['power_kernels']} on {environment['backend']}, torch {environment['torch']}, "
        f"Python {environment['python']}; {libraries}"
    )


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except Exception as error:  # torch raises as many types as there are devices that are not there
        raise ArgumentError(f"--device {name} cannot be used: {error}") from None
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"--device is {name}; it must be a CPU or CUDA device")
    if pk.backend_for(device) == "reference":
        raise BackendError(f"the reference would serve {device}: nothing to measure; see `power-kernels doctor`")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # events and graphs belong to the current device
    return device
