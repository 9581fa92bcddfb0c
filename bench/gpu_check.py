"""Everything that a GPU can show about this checkout, nine minutes a plan: `make gpu-check OUT=dir [PLAN=...]`.

The plan `kernels`, the default:

    smoke        two minutes at most: every operator once against the reference, small and at real sizes, chains of
                 long answers, a tiny model with and without graphs; all that is wrong, on top of the summary
    tests        the test suite on the device (`pytest --device cuda`), a process a file, several at once
    benchmarks   bench/ops.py: every operator against its opponents
    durations    the time of each kernel at real sizes (torch.profiler)
    sanitizer    compute-sanitizer's memcheck and racecheck over the launches of the first stage
    ncu          Nsight Compute: traffic, throughput, registers and occupancy of each kernel at real sizes

The plan `smoke` is that first stage alone. Whole answers (bench/end_to_end.py) of the shapes of real models with random
weights, a folder OUT for each plan:

    decode       a decode step of Qwen2.5-7B, Qwen2.5-Math-7B and Phi-3.5-mini against the memory's bandwidth; its waits
    latency      Qwen2.5-7B, one prompt: 768 tokens by 1, 2, 4, 8 lanes and the default; the paper's 3072 by the default
    throughput   Qwen2.5-7B, 64 prompts in 64 slots against plain generation and the published algorithm

Uses the Python that runs it and what is installed there; needs no network, no compiled extension and no installed
package, and says what is missing. A stage that is over its time is killed and reported; time that a stage leaves over
goes to those behind it. Everything is written as it comes: OUT/summary.md is for people, OUT/stages.json,
OUT/environment.json, OUT/smoke.json, OUT/tests.jsonl, OUT/durations.jsonl, OUT/bench/, OUT/ncu.csv hold the figures,
OUT/logs/ what was printed. Exits with 1 if smoke, tests or a sanitizer failed or could not be run to their end, or if a
stage of whole answers failed, or was over its time with nothing in its table; with 2 if there is no device. Targets
that are missed are named and change no exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOKE_SECONDS = 120.0  # for a first look, whatever time there is
BUDGET = 520.0  # seconds for everything; the ninth minute is a reserve for what kills slowly

BROKEN = 3  # of bench/gpu_smoke.py: the device takes no more work from this process
PASSED, FAILED, LATE, ABSENT, REFUSED = "passed", "failed", "over its time", "not installed", "not permitted"
PARTLY = "over its time, partly measured"
HARMLESS = (PASSED, PARTLY, ABSENT, REFUSED)  # of a stage that must pass

PACKAGES = (
    "torch", "triton", "transformers", "numpy", "pytest", "hypothesis", "scipy", "tqdm", "tokenizers",
    "flashinfer-python", "liger-kernel", "vllm",
)  # fmt: skip
NEEDED = {
    "torch": "everything",
    "triton": "every kernel",
    "numpy": "the reference",
    "transformers": "the engine's tests",
    "pytest": "the tests",
    "hypothesis": "the fuzz tests",
    "scipy": "the statistical tests",
    "tqdm": "the driver",
}

# Test files that take longest, cut into parts; part I of N is chosen by tests/conftest.py.
PARTS = {
    "test_chain_identity": 4,
    "test_ops_backends": 3,
    "test_ops_fuzz": 3,
    "test_ops_errors": 2,
    "test_tiny_model_law": 2,
    "test_triton_kernels": 2,
}
# What says most first, should the time not suffice; the others follow by name.
FIRST = (
    "test_cuda", "test_long_answers", "test_chain_identity", "test_ops_backends", "test_triton_kernels",
    "test_ops_fuzz", "test_tiny_model_law", "test_huggingface_engine", "test_law_statistics",
    "test_ops_contract", "test_driver",
)  # fmt: skip

METRICS = {  # of Nsight Compute, and what the summary calls them; in base units
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "DRAM bytes read",
    "dram__bytes_write.sum": "DRAM bytes written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
}


@dataclass
class Result:
    """What came of a stage. lines: markdown for the summary. figures: anything for stages.json. top: markdown for the
    beginning of the summary."""

    status: str
    lines: list[str] = field(default_factory=list)
    figures: dict = field(default_factory=dict)
    top: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """run(check, seconds) has that many seconds. must_pass: the exit code depends on it."""

    name: str
    seconds: float
    run: Callable[[Check, float], Result]
    must_pass: bool = False


@dataclass(frozen=True)
class Finished:
    """A command that has ended. code is None where its time was over."""

    code: int | None
    seconds: float
    text: str


class Check:
    """One run: where it writes, what its commands get, and when it has to end."""

    def __init__(self, out: Path, device: str, budget: float):
        self.out, self.device = out, device
        self.logs = out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.begin = time.monotonic()
        self.end = self.begin + budget
        self.results: list[dict] = []
        self.missing: list[str] = []
        self.running: set[int] = set()
        self._scratch = tempfile.TemporaryDirectory(prefix="power-kernels-gpu-check-")
        scratch = Path(self._scratch.name)
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(checkout(scratch / "path")), str(ROOT), os.environ.get("PYTHONPATH")])
            ),
            "PYTHONUNBUFFERED": "1",  # logs hold what was printed when a kill comes
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",  # no test may try the network
            "TRITON_CACHE_DIR": str(scratch / "triton"),  # compiled here, by this Triton, for this device; shared
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        }
        for name in ("TRITON_INTERPRET", "POWER_KERNELS_BACKEND", "POWER_KERNELS_NVTX"):
            self.environment.pop(name, None)

    def remaining(self) -> float:
        return self.end - time.monotonic()

    def command(self, name: str, arguments: list, seconds: float, **environment: str) -> Finished:
        """Run to its end or for `seconds`, with everything it starts; what it prints is in logs/NAME.txt at once."""
        log = self.logs / f"{name}.txt"
        begin = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                [str(a) for a in arguments],
                cwd=ROOT,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running.add(process.pid)
            try:
                code = process.wait(timeout=max(seconds, 0.1))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                kill(process.pid)
                process.wait()
                self.running.discard(process.pid)
        return Finished(code, round(time.monotonic() - begin, 1), log.read_text(errors="replace"))

    def python(self, name: str, arguments: list, seconds: float, **environment: str) -> Finished:
        return self.command(name, [sys.executable, *arguments], seconds, **environment)

    def keep(self, stage: Stage, result: Result, seconds: float) -> None:
        """Write a stage's result, and the summary so far."""
        row = {"stage": stage.name, "seconds": round(seconds, 1), "must_pass": stage.must_pass, **asdict(result)}
        self.results.append(row)
        (self.out / "stages.json").write_text(json.dumps(self.results, indent=1))
        self.write_summary()

    def write_summary(self, waiting: tuple[str, ...] = ()) -> None:
        environment = read_json(self.out / "environment.json") or {}
        lines = ["# GPU check", "", environment.get("title", "the environment is not known"), ""]
        lines += [line for r in self.results if r["top"] for line in (*r["top"], "")]
        lines += ["| stage | result | seconds |", "|---|---|---|"]
        lines += [f"| {r['stage']} | {r['status']} | {r['seconds']} |" for r in self.results]
        lines += [f"| {name} | not reached | |" for name in waiting]
        lines += [f"| all | | {time.monotonic() - self.begin:.0f} |"]
        if self.missing:
            lines += ["", "## Missing here", "", *(f"- {line}" for line in self.missing)]
        for r in self.results:
            if r["lines"]:
                lines += ["", f"## {r['stage']}: {r['status']}", "", *r["lines"]]
        (self.out / "summary.md").write_text("\n".join(lines) + "\n")

    def failed(self) -> bool:
        return any(r["must_pass"] and r["status"] not in HARMLESS for r in self.results)


def kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def checkout(folder: Path) -> Path:
    """A folder for PYTHONPATH which makes `power_kernels.api` importable from a checkout that nobody installed.

    An installed package has python_api as power_kernels/api; in a checkout it stands beside it.
    """
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(
        f"""import importlib.util, os, sys

NAME, PLACE = "power_kernels.api", {str(ROOT / "python_api")!r}


class Beside:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != NAME:
            return None
        return importlib.util.spec_from_file_location(
            name, os.path.join(PLACE, "__init__.py"), submodule_search_locations=[PLACE]
        )


sys.meta_path.insert(0, Beside)
# This file stands before one that the machine may have.
for place in sys.path:
    other = os.path.join(place, "sitecustomize.py")
    if os.path.isfile(other) and not os.path.samefile(other, __file__):
        exec(compile(open(other).read(), other, "exec"), {{"__name__": "sitecustomize", "__file__": other}})
        break
"""
    )
    return folder


def read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_lines(path: Path) -> list[dict]:
    """The whole JSON lines of a file; a line that a kill cut short is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def last_lines(text: str, count: int = 12) -> list[str]:
    kept = [line for line in text.splitlines() if line.strip()][-count:]
    return ["```", *(line[:300] for line in kept), "```"] if kept else ["(it printed nothing)"]


@functools.cache
def find_tool(name: str) -> str | None:
    """An NVIDIA tool: on the path, in a CUDA or Nsight installation, or in a package of the Python that runs this."""
    if found := shutil.which(name):
        return found
    folders = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    places = [Path(folder) / sub / name for folder in folders for sub in ("bin", "compute-sanitizer")]
    for pattern in (f"cuda*/bin/{name}", f"cuda*/compute-sanitizer/{name}", f"cuda*/nsight-*/{name}"):
        places += sorted(Path("/usr/local").glob(pattern), reverse=True)
    for pattern in (f"nsight-compute/*/{name}", f"nsight-systems/*/bin/{name}"):
        places += sorted(Path("/opt/nvidia").glob(pattern), reverse=True)
    for folder in sys.path:
        if folder.endswith("-packages"):
            places += sorted(Path(folder).glob(f"nvidia/**/{name}"))
    return next((str(p) for p in places if p.is_file() and os.access(p, os.X_OK)), None)


# ---------------------------------------------------------------------------------------------------------------
# The environment

_ENVIRONMENT = """
import importlib.metadata, json, os, platform, sys
packages, data = json.loads(sys.argv[1]), {}
def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None
data["python"], data["platform"], data["cpus"] = platform.python_version(), platform.platform(), os.cpu_count()
data["packages"] = {name: version(name) for name in packages}
try:
    import torch
    data["packages"]["torch"] = torch.__version__
    data["cuda"] = torch.version.cuda
    data["devices"] = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        data["devices"].append({"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory,
                                "multiprocessors": p.multi_processor_count})
    if data["devices"]:
        torch.zeros(1, device="cuda")
except Exception as error:
    data["error"] = f"{type(error).__name__}: {error}"
print("ENVIRONMENT " + json.dumps(data))
"""


def environment(check: Check, seconds: float) -> Result:
    """What is here; figures["usable"] tells whether the other stages can run at all."""
    done = check.python("environment", ["-c", _ENVIRONMENT, json.dumps(PACKAGES)], seconds)
    found = re.findall(r"^ENVIRONMENT (.*)$", done.text, re.MULTILINE)
    data = json.loads(found[-1]) if found else {"error": "the environment could not be read", "packages": {}}
    data["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    data["tools"] = {name: find_tool(name) for name in ("compute-sanitizer", "ncu", "nsys", "nvidia-smi")}
    data["compilers"] = {name: shutil.which(name) for name in ("gcc", "clang", "c++")}
    if data["tools"]["nvidia-smi"]:
        query = "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
        smi = check.command("nvidia-smi", [data["tools"]["nvidia-smi"], query, "--format=csv"], 20)
        data["nvidia_smi"] = smi.text.strip().splitlines()
    if shutil.which("git"):
        commit = check.command("git", ["git", "log", "-1", "--format=%H"], 10)
        data["commit"] = commit.text.strip() if commit.code == 0 else None
    for name, use in NEEDED.items():
        if data["packages"].get(name) is None:
            check.missing.append(f"{name}: not installed; {use} cannot run without it")
    if not (data["compilers"]["gcc"] or data["compilers"]["clang"] or os.environ.get("CC")):
        check.missing.append("a C compiler (gcc, clang or $CC): Triton builds its launcher with one")
    on_device = check.device != "cpu"
    devices = data.get("devices") or []
    problem = data.get("error") or (None if devices or not on_device else "torch sees no CUDA device")
    data["title"] = (
        f"{devices[0]['name'] if devices and on_device else 'CPU'}, torch {data['packages'].get('torch')} "
        f"(CUDA {data.get('cuda')}), Triton {data['packages'].get('triton')}, Python {data.get('python')}, "
        f"commit {data.get('commit')}, {data['date']}"
    )
    (check.out / "environment.json").write_text(json.dumps(data, indent=1))
    if problem:
        return Result(FAILED, [problem, *([] if found else last_lines(done.text))], {"usable": False})
    return Result(PASSED, [], {"usable": True})


# ---------------------------------------------------------------------------------------------------------------
# The stages


def smoke(check: Check, seconds: float, script: Path = ROOT / "bench" / "gpu_smoke.py") -> Result:
    """Every group of bench/gpu_smoke.py in a process of its own, several at once; all items and facts in smoke.json."""
    end = time.monotonic() + min(seconds, SMOKE_SECONDS)
    listed = check.python("smoke-groups", [script, "--list"], min(seconds, SMOKE_SECONDS))
    groups = listed.text.splitlines()
    if listed.code != 0 or not groups:
        return Result(LATE if listed.code is None else FAILED, last_lines(listed.text))
    at_once = max(1, min(len(groups), (os.cpu_count() or 2) - 1))
    with ThreadPoolExecutor(at_once) as pool:
        found = pool.map(lambda numbered: smoke_group(check, script, *numbered, end), enumerate(groups))
    rows = [row for rows in found for row in rows]
    wrong = [row for row in rows if row["error"]]
    never = [row for row in rows if row["seconds"] is None]
    right = len(rows) - len(wrong) - len(never)
    top = [f"Smoke: {right} of {len(rows)} right, {len(wrong)} wrong, {len(never)} not reached (smoke.json)."]
    top += [f"- {row['group']}: {row['name']}: {' '.join(row['error'].split())[:300]}" for row in wrong]
    top += [f"- {row['group']}: {row['name']}: not reached when the time was over" for row in never]
    seen = [(row, ", ".join(f"{name} {value}" for name, value in row["facts"].items())) for row in rows]
    lines = [f"- {row['group']}: {row['name']}: {facts}" for row, facts in seen if facts]
    figures = {"right": right, "wrong": len(wrong), "not_reached": len(never)}
    (check.out / "smoke.json").write_text(json.dumps({**figures, "items": rows}, indent=1))
    return Result(FAILED if wrong else LATE if never else PASSED, lines, figures, top)


def smoke_group(check: Check, script: Path, number: int, group: str, end: float) -> list[dict]:
    """What came of each item. Where one ended its process, by a crash, a hang or a device that takes no more work from
    it, another process goes on behind it."""
    names, rows = ["(its start)"], []
    while len(rows) < len(names) and (left := end - time.monotonic()) > 1:
        before = len(rows)
        log = f"smoke-{number}-{before}"
        told = check.logs / f"{log}.jsonl"
        told.unlink(missing_ok=True)  # of an earlier run in the same folder
        # Half of what is left for an item, so that one that hangs leaves time to those behind it.
        options = ["--after", before, "--seconds", left / 2, "--out", told]
        done = check.python(log, [script, group, "--device", check.device, *options], left)
        lines = read_lines(told)
        names = next((line["items"] for line in lines if "items" in line), names)
        rows += [line for line in lines if "error" in line]
        if done.code is None:
            break
        if done.code not in (0, BROKEN) or len(rows) == before:
            how = f"ended its process with code {done.code}: {' '.join(last_lines(done.text)[1:-1])}"
            rows.append({"error": how, "trace": done.text[-6000:], "facts": {}, "seconds": done.seconds})
    rows += [{"error": None, "trace": None, "facts": {}, "seconds": None}] * (len(names) - len(rows))
    return [{"group": group, "name": name, **row} for name, row in zip(names, rows, strict=True)]


def parts_of(folder: Path) -> list[tuple[str, str]]:
    """(file, shard) in the order in which they are started. Files that run nothing on a device are left out."""
    text = (folder / "conftest.py").read_text()
    listed = re.search(r"HOST_FILES = \{(.*?)\n\}", text, re.DOTALL)
    host = set(re.findall(r'^    "(\w+)":', listed.group(1), re.MULTILINE)) if listed else set()
    files = [path for path in sorted(folder.glob("test_*.py")) if path.stem not in host]
    rank = {name: i for i, name in enumerate(FIRST)}
    files.sort(key=lambda path: (rank.get(path.stem, len(FIRST)), path.name))
    return [(str(p), f"{i}/{PARTS.get(p.stem, 1)}") for p in files for i in range(PARTS.get(p.stem, 1))]


def suite(check: Check, seconds: float, folder: Path = ROOT / "tests") -> Result:
    if check.python("pytest", ["-c", "import pytest"], 60).code != 0:
        return Result(FAILED, ["pytest is not installed: no test was run."])
    end = time.monotonic() + seconds
    results = check.out / "tests.jsonl"
    results.write_text("")
    parts = parts_of(folder)
    at_once = max(1, min(12, (os.cpu_count() or 2) - 1, len(parts)))

    def one(file: str, shard: str) -> tuple[str, Finished | None]:
        name = f"{Path(file).stem}-{shard.replace('/', 'of')}"
        left = end - time.monotonic()
        if left < 5:
            return name, None
        arguments = ["-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=100",
                     "--device", check.device, "--shard", shard, "--results", results, file]  # fmt: skip
        return name, check.python(f"tests-{name}", arguments, left)

    broken, late, never = [], [], []
    with ThreadPoolExecutor(at_once) as pool:
        for future in as_completed([pool.submit(one, *part) for part in parts]):
            name, done = future.result()
            if done is None:
                never.append(name)
            elif done.code is None:
                late.append(name)
            elif done.code not in (0, 1, 5):  # 1: tests failed, and say so themselves; 5: no test in this part
                broken.append((name, done))
    rows = read_lines(results)
    counts = Counter(row["outcome"] for row in rows)
    reasons = Counter(row["reason"] for row in rows if row["outcome"] == "skipped")
    lines = [f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped, {at_once} processes."]
    failures = [row for row in rows if row["outcome"] == "failed"]
    lines += [f"- failed: {row['test']}: {row['reason'][:300]}" for row in failures[:60]]
    if len(failures) > 60:
        lines.append(f"- and {len(failures) - 60} more: tests.jsonl")
    for name, done in broken:
        lines += [f"- {name} ended with code {done.code}:", *last_lines(done.text)]
    lines += [f"- killed when the time was over: {', '.join(sorted(late))}"] if late else []
    lines += [f"- never started, the time was over: {', '.join(sorted(never))}"] if never else []
    lines += ["", "Skipped, and why:", ""] if reasons else []
    lines += [f"- {count}: {reason}" for reason, count in reasons.most_common(25)]
    figures = {**counts, "processes": at_once, "late": late, "never": never, "broken": [name for name, _ in broken]}
    if failures or broken or not counts["passed"]:
        return Result(FAILED, lines, figures)
    return Result(LATE if late or never else PASSED, lines, figures)


_OPS = "from power_kernels.api.bench.run import SUITES; print('OPS', *(suite.op for suite in SUITES))"


def benchmarks(check: Check, seconds: float) -> Result:
    """bench/ops.py over all ops; where one of them ends the process, again over those behind it."""
    end = time.monotonic() + seconds
    listed = check.python("benchmarks-ops", ["-c", _OPS], min(60, seconds))
    found = re.search(r"^OPS (.*)$", listed.text, re.MULTILINE)
    left = found.group(1).split() if found else []
    if not left:
        return Result(FAILED, last_lines(listed.text))
    lines, broken, records, part, late = [], [], 0, 0, False
    while left and not late and end - time.monotonic() > 1:
        part += 1
        folder = check.out / "bench" / f"part{part}"  # written after every op
        arguments = ["bench/ops.py", "--device", check.device, "--seconds", "0.1", "--out", folder, "--ops", *left]
        done = check.python(f"benchmarks-{part}", arguments, end - time.monotonic())
        rows = (read_json(folder / "ops.json") or {}).get("records", [])
        records += len(rows)
        lines += ["```", *(line[:200] for line in done.text.strip().splitlines()[-200:]), "```", ""]
        late = done.code is None
        if done.code == 0:
            left = []
        elif not late:
            measured = {row["op"] for row in rows}
            left = [op for op in left if op not in measured]
            broken += left[:1] or [f"part {part}, after its last op"]
            left = left[1:]
    figures = {"records": records, "broken": broken, "late": late or bool(left)}
    lines = [f"{records} records." + (f" Ended the process: {', '.join(broken)}." if broken else ""), "", *lines]
    if broken or not records:
        return Result(LATE if late and not broken else FAILED, lines, figures)
    return Result(LATE if figures["late"] else PASSED, lines, figures)


def durations(check: Check, seconds: float) -> Result:
    path = check.out / "durations.jsonl"
    done = check.python(
        "durations", ["bench/gpu_targets.py", "durations", "--device", check.device, "--out", path], seconds
    )
    rows = read_lines(path)
    lines = ["| point | kernel | us | GB/s of all kernels by the formula |", "|---|---|---|---|"]
    for row in rows:
        total = sum(row["kernels_us"].values())
        rate = f"{row['bytes'] / total / 1e3:.0f}" if total else "not measured"
        for i, (kernel, us) in enumerate(row["kernels_us"].items()):
            lines.append(f"| {row['point'] if i == 0 else ''} | `{kernel}` | {us:.1f} | {rate if i == 0 else ''} |")
    if done.code is None:
        return Result(LATE, lines)
    if done.code or not any(row["kernels_us"] for row in rows):
        return Result(FAILED, lines + last_lines(done.text))
    return Result(PASSED, lines)


_SUMMARIES = {
    "memcheck": r"ERROR SUMMARY: (\d+) error",
    "racecheck": r"RACECHECK SUMMARY: (\d+) hazard",
}


def sanitizer(check: Check, seconds: float) -> Result:
    """Both tools side by side: most of their time is spent loading libraries."""
    if find_tool("compute-sanitizer") is None:
        return Result(ABSENT, ["compute-sanitizer is not installed (it comes with the CUDA toolkit)."])
    with ThreadPoolExecutor(len(_SUMMARIES)) as pool:
        found = dict(zip(_SUMMARIES, pool.map(lambda tool: sanitize(check, tool, seconds), _SUMMARIES), strict=True))
    lines = [line for tool, one in found.items() for line in (f"### {tool}: {one.status}", "", *one.lines, "")]
    worst = max((one.status for one in found.values()), key=(PASSED, REFUSED, LATE, FAILED).index)
    return Result(worst, lines, {tool: {"status": one.status, **one.figures} for tool, one in found.items()})


def sanitize(check: Check, tool: str, seconds: float) -> Result:
    done = check.command(
        tool,
        [find_tool("compute-sanitizer"), "--tool", tool, "--error-exitcode", "86", "--print-limit", "20",
         sys.executable, "bench/gpu_targets.py", "launch", "--device", check.device],
        seconds,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # each tensor an allocation of its own, whose ends are watched
    )  # fmt: skip
    launched = done.text.count("\nlaunched ") + done.text.startswith("launched ")
    found = re.findall(_SUMMARIES[tool], done.text)
    lines = [f"{launched} launches; {found[-1] if found else 'no count of'} errors or hazards."]
    figures = {"launched": launched, "found": int(found[-1]) if found else None}
    if done.code is None:
        return Result(LATE, [*lines, *last_lines(done.text, 4)], figures)
    if "Device not supported" in done.text:  # what it says where it may not attach to the driver
        return Result(REFUSED, ["compute-sanitizer cannot watch this device (Device not supported)."], figures)
    if done.code or not found or int(found[-1]) or not launched:
        reports = [line for line in done.text.splitlines() if line.startswith("=========")][:60]
        return Result(FAILED, [*lines, *(["```", *reports, "```"] if reports else last_lines(done.text))], figures)
    return Result(PASSED, lines, figures)


def ncu(check: Check, seconds: float) -> Result:
    program = find_tool("ncu")
    if program is None:
        return Result(ABSENT, ["ncu is not installed (it comes with the CUDA toolkit or with Nsight Compute)."])
    path = check.out / "ncu.csv"
    done = check.command(
        "ncu",
        [program, "--profile-from-start", "off", "--target-processes", "application-only",
         "--metrics", ",".join(METRICS), "--csv", "--page", "raw", "--print-units", "base",
         "--clock-control", "none",  # the device's settings stay as they are, and times are those of the other stages
         sys.executable, "bench/gpu_targets.py", "profile", "--device", check.device],
        seconds,
    )  # fmt: skip
    if "ERR_NVGPUCTRPERM" in done.text:
        note = "This user may not read the GPU's performance counters (ERR_NVGPUCTRPERM)."
        return Result(REFUSED, [f"{note} bench/profile.md says what helps."])
    rows = [line for line in done.text.splitlines() if line.startswith('"')]
    path.write_text("\n".join(rows) + "\n" if rows else "")
    lines, kernels = ncu_table(rows)
    if done.code is None:
        return Result(LATE, lines, {"kernels": kernels})
    if done.code or not kernels:
        return Result(FAILED, lines + last_lines(done.text), {"kernels": kernels})
    return Result(PASSED, lines, {"kernels": kernels})


def ncu_table(rows: list[str]) -> tuple[list[str], int]:
    """Markdown of ncu's raw page in CSV (a header, a row of units, a row a kernel), and how many kernels it holds."""
    table = list(csv.DictReader(rows))
    kernels = [row for row in table if row.get("ID", "").strip().isdigit()]
    lines = ["| kernel | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for row in kernels:
        values = [(row.get(metric) or "not measured").replace(",", "") for metric in METRICS]
        lines.append(f"| `{row.get('Kernel Name', '?')[:60]}` | " + " | ".join(values) + " |")
    return lines, len(kernels)


def end_to_end(name: str, suite: str, *options: str) -> Callable[[Check, float], Result]:
    """A stage's function: a suite of bench/end_to_end.py, on a CPU in miniature. It writes NAME.json as it goes."""

    def run(check: Check, seconds: float) -> Result:
        path = check.out / f"{name}.json"
        path.unlink(missing_ok=True)  # of an earlier run in the same folder
        given = ("--model", "tiny", "--quick") if check.device == "cpu" else options
        arguments = ["bench/end_to_end.py", suite, "--device", check.device, *given, "--json", path]
        done = check.python(name, arguments, seconds)
        document = read_json(path) or {}
        targets = document.get("targets", [])
        missed = [item["target"] for item in targets if item["met"] is False]
        printed = [line[:200] for line in done.text.splitlines() if line.strip() and not line.startswith("[")]
        lines = [f"Missed: {'; '.join(missed)}.", ""] if missed else []
        figures = {"targets": targets}
        if done.code is None:
            if all("not_measured" in row for row in document.get("table", ())):
                return Result(LATE, [*lines, "No row of its table was measured.", *last_lines(done.text)], figures)
            found = f"What was measured before is in {path.name}."
            return Result(PARTLY, [*lines, found, *last_lines(done.text)], figures)
        if done.code or not document:
            return Result(FAILED, [*lines, *last_lines(done.text)], figures)
        return Result(PASSED, [*lines, "```", *printed, "```"], figures)

    return run


def end_to_end_stage(name: str, seconds: float, suite: str, *options: str) -> Stage:
    """They must pass: a plan of whole answers has no other stages, and would else end well with nothing measured."""
    return Stage(name, seconds, end_to_end(name, suite, *options), must_pass=True)


SMOKE = Stage("smoke", SMOKE_SECONDS, smoke, must_pass=True)
STAGES = (
    SMOKE,
    Stage("tests", 160, suite, must_pass=True),
    Stage("benchmarks", 120, benchmarks),
    Stage("durations", 25, durations),
    Stage("sanitizer", 50, sanitizer, must_pass=True),
    Stage("ncu", 45, ncu),
)
PLANS = {
    "kernels": STAGES,
    "smoke": (SMOKE,),
    "decode": tuple(
        end_to_end_stage(f"decode-{shape}", 170, "decode", "--model", shape)
        for shape in ("qwen2.5-7b", "qwen2.5-math-7b", "phi-3.5-mini")
    ),
    "latency": (
        end_to_end_stage(
            "latency-short", 240, "latency", "--model", "qwen2.5-7b", "--setting", "short", "--seconds", "100"
        ),
        end_to_end_stage(
            "latency-paper", 270, "latency", "--model", "qwen2.5-7b", "--setting", "paper", "--lanes", "default",
            "--seconds", "150",
        ),
    ),
    "throughput": (end_to_end_stage("throughput", 510, "throughput", "--model", "qwen2.5-7b"),),
}  # fmt: skip
ENVIRONMENT = Stage("environment", 60, environment)


# ---------------------------------------------------------------------------------------------------------------


def run_stages(check: Check, stages: tuple[Stage, ...]) -> None:
    """One after the other. A stage has its own seconds and whatever is left over, but never those of later ones."""
    for i, stage in enumerate(stages):
        later = sum(s.seconds for s in stages[i + 1 :])
        seconds = max(check.remaining() - later, min(stage.seconds, check.remaining()))
        begin = time.monotonic()
        print(f"{stage.name}: up to {max(seconds, 0):.0f} s", flush=True)
        check.write_summary(tuple(s.name for s in stages[i:]))
        try:
            result = stage.run(check, seconds) if seconds >= 1 else Result(LATE, ["No time was left for it."])
        except Exception as error:  # what the other stages find is worth more than this one's mistake
            result = Result(FAILED, [f"{type(error).__name__}: {error}"])
        check.keep(stage, result, time.monotonic() - begin)
        check.write_summary(tuple(s.name for s in stages[i + 1 :]))
        print(f"{stage.name}: {result.status}, {time.monotonic() - begin:.0f} s", flush=True)


def main(arguments: list[str], stages: tuple[Stage, ...] | None = None) -> int:
    """stages: in place of a plan's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to see the stages run without a device")
    parser.add_argument("--seconds", type=float, default=BUDGET, help=f"for everything (default {BUDGET:.0f})")
    parser.add_argument("--plan", default="kernels", choices=PLANS, help="which stages (default kernels)")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="only these of the plan")
    given = parser.parse_args(arguments)
    stages = PLANS[given.plan] if stages is None else stages
    names = [s.name for s in stages]
    if unknown := set(given.stages or ()) - set(names):
        parser.error(f"the plan has the stages {', '.join(names)}; not {', '.join(sorted(unknown))}")
    given.out.mkdir(parents=True, exist_ok=True)
    check = Check(given.out.resolve(), given.device, given.seconds)

    def stop(number, frame):
        for group in list(check.running):
            kill(group)
        shutil.rmtree(check._scratch.name, ignore_errors=True)
        os._exit(128 + number)  # what was found is written already

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    begin = time.monotonic()
    found = environment(check, ENVIRONMENT.seconds)
    check.keep(ENVIRONMENT, found, time.monotonic() - begin)
    if found.figures["usable"]:
        run_stages(check, tuple(s for s in stages if s.name in (given.stages or names)))
    else:
        print("\n".join(found.lines), file=sys.stderr)
    print((check.out / "summary.md").read_text())
    if not found.figures["usable"]:
        return 2
    return 1 if check.failed() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
