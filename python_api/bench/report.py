"""Results as data (JSON, CSV) and as tables.

JSON: {"schema": 1, "environment": {...}, "copy_bytes_per_s": ..., "formulas": {op: words}, "records": [...]}, a record
for each contender of each point. CSV: the records, a line each.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

import power_kernels as pk
from power_kernels.api.bench.harness import Point, Suite, Timing, Workload, dtype_name

SCHEMA = 1
LIBRARIES = ("triton", "numpy", "flashinfer-python", "liger-kernel", "vllm", "cut-cross-entropy")
# What a record holds; numbers are null where a contender was not run, which `reason` explains.
COLUMNS = (
    "op", "dtype", "shape", "contender", "ours", "yardstick", "median_s", "min_s", "rounds", "cuda_graph", "bytes",
    "gb_per_s", "percent_of_copy", "flops", "tflop_per_s", "count", "unit", "per_s", "over_ours", "over_yardstick",
    "peak_bytes", "resident_bytes", "reason",
)  # fmt: skip


def environment(device: torch.device, clock, grid: str) -> dict:
    """Everything about the machine and the software that a reader of the numbers needs."""
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    data = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": (cpu or [platform.processor()])[0],
        "device_type": device.type,
        "grid": grid,
        "clock": clock.name,
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average_before": load_average(),
        "backend": pk.backend_for(device),
        "power_kernels": pk.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": {name: _version(name) for name in LIBRARIES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        data |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda or torch.version.hip,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
        }
    return data


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def records(
    suite: Suite, point: Point, work: Workload, timings: dict[str, Timing], missing: dict[str, str], copy: float
) -> list[dict]:
    """A record for each contender of one point, those that were not run included."""
    common = {
        "op": point.op,
        "dtype": dtype_name(point.dtype),
        "shape": dict(point.shape),
        "bytes": work.bytes,
        "flops": work.flops,
        "count": work.count,
        "unit": suite.unit,
    }
    out = []
    ours = timings[work.ours].median
    yardstick = timings[work.yardstick].median if work.yardstick else None
    for name, timing in timings.items():
        seconds = timing.median
        values = {
            **common,
            "contender": name,
            "ours": name == work.ours,
            "yardstick": name == work.yardstick,
            "median_s": seconds,
            "min_s": timing.least,
            "rounds": timing.rounds,
            "cuda_graph": timing.graph,
            "gb_per_s": work.bytes / seconds / 1e9,
            "percent_of_copy": 100 * work.bytes / seconds / copy,
            "tflop_per_s": work.flops / seconds / 1e12,
            "per_s": work.count / seconds,
            "over_ours": seconds / ours,
            "over_yardstick": seconds / yardstick if yardstick else None,
            "peak_bytes": timing.peak_bytes,
            "resident_bytes": timing.resident_bytes,
        }
        out.append({column: values.get(column) for column in COLUMNS})
    for name, reason in missing.items():
        values = {**common, "contender": name, "ours": False, "yardstick": False, "reason": reason}
        out.append({column: values.get(column) for column in COLUMNS})
    return out


def write(results: dict, folder: Path) -> None:
    """`ops.json` and `ops.csv` in a folder that is there."""
    (folder / "ops.json").write_text(json.dumps(results, indent=1) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in results["records"]:
        writer.writerow({**record, "shape": shape_text(record["shape"])})
    (folder / "ops.csv").write_text(text.getvalue())


def shape_text(shape: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in shape.items())


# ----------------------------------------------------------------------------------------------------
# Tables


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def pad(line: list[str]) -> str:
        first, *others = (c.rjust(w) for c, w in zip(line, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others])

    return "\n".join(map(pad, [header, ["-" * w for w in widths], *rows]))


def time_text(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def rate_text(rate: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rate >= scale:
            return f"{rate / scale:.3g} {unit}"
    return f"{rate:.3g}"


def suite_table(suite: Suite, rows: list[dict], cuda: bool) -> str:
    """One line a point: ours, then how many times longer each of the others took."""
    points: dict[str, list[dict]] = {}
    for record in rows:
        points.setdefault(f"{record['dtype']} {shape_text(record['shape'])}", []).append(record)
    names = list(dict.fromkeys(r["contender"] for r in rows if r["median_s"] is not None and not r["ours"]))
    header = ["", "time", f"{suite.unit}/s", "GB/s", "of copy", "peak KiB", *names]
    lines = []
    for point, group in points.items():
        by_name = {r["contender"]: r for r in group}
        ours = next(r for r in group if r["ours"])
        cells = [
            f"{by_name[n]['over_ours']:.2f}x" if n in by_name and by_name[n]["median_s"] is not None else "-"
            for n in names
        ]
        lines.append(
            [point, time_text(ours["median_s"]), rate_text(ours["per_s"]), f"{ours['gb_per_s']:.1f}",
             f"{ours['percent_of_copy']:.0f}%", f"{ours['peak_bytes'] / 1024:.0f}", *cells]
        )  # fmt: skip
    first = next(r for r in rows if r["ours"])
    launched = sorted({r["contender"] for r in rows if r["cuda_graph"] is False}) if cuda else []
    reasons = sorted({f"{r['contender']}: {r['reason']}" for r in rows if r["reason"]})
    return "\n".join(
        [
            f"\n{suite.title}: {suite.op}",
            f"bytes = {suite.formula}",
            f"the first columns are of {first['contender']}; then the time of each other over it",
            table(header, lines),
            *(f"  not run: {reason}" for reason in reasons),
            *([f"  launched, not replayed as a CUDA graph: {', '.join(launched)}"] if launched else []),
        ]
    )
