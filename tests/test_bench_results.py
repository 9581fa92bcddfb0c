"""The harness, its results and its plots: medians of rounds, records that explain themselves, pictures of all."""

import contextlib
import csv
import importlib
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from power_kernels.api.bench import harness, report, run
from power_kernels.api.bench.harness import Workload, measure, peak_memory, rounds
from power_kernels.api.bench.limits import limits_table, verdicts
from power_kernels.api.commands.cli import main
from tests.op_helpers import serving

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


class ScriptedClock:
    """A clock whose samples are given."""

    name = "scripted"

    def __init__(self, samples: dict):
        self.samples, self.calls = samples, dict.fromkeys(samples, 0)

    def prepare(self, call, graph):
        name = call()

        def sample():
            value = self.samples[name][self.calls[name] % len(self.samples[name])]
            self.calls[name] += 1
            return lambda: value

        return sample, False

    def now(self):
        return 0.0

    def finish(self):
        pass


def workload(**contenders) -> Workload:
    return Workload({name: lambda name=name: name for name in contenders}, "ours", bytes=1000, count=10)


def test_rounds_take_every_contender_in_turn_and_drop_the_slow_ones():
    """`slow` is more than 20 times slower than the fastest: it is asked for the fewest rounds and no more."""
    order = []

    def sampler(name, seconds):
        return lambda: order.append(name) or (lambda: seconds)

    times = rounds({"a": sampler("a", 1.0), "slow": sampler("slow", 21.0)}, ScriptedClock({}), 0.005)
    pairs = [tuple(order[2 * i : 2 * i + 2]) for i in range(harness.FEWEST_ROUNDS)]
    assert set(pairs) == {("a", "slow"), ("slow", "a")}  # each once a round, neither always behind the other
    assert len(times["slow"]) == harness.FEWEST_ROUNDS < len(times["a"])


def test_measure_gives_medians_and_reports_only_optional_failures():
    clock = ScriptedClock({"ours": [1.0, 5.0, 3.0, 2.0, 4.0]})
    work = workload(ours=None)

    def broken():
        raise ValueError("no such kernel\nand a long story")

    work.contenders["theirs"] = broken
    work.optional = frozenset({"theirs"})
    timings, missing = measure(work, CPU, clock, seconds=0)
    assert (timings["ours"].median, timings["ours"].least, timings["ours"].rounds) == (3.0, 1.0, 5)
    assert missing == {"theirs": "ValueError: no such kernel"}
    work.optional = frozenset()
    with pytest.raises(ValueError, match="no such kernel"):
        measure(work, CPU, clock, seconds=0)


def test_a_benchmark_that_did_not_do_its_work_is_an_error():
    work = workload(ours=None)

    def check():
        raise RuntimeError("nothing moved")

    work.check = check
    with pytest.raises(RuntimeError, match="nothing moved"):
        measure(work, CPU, ScriptedClock({"ours": [1.0]}), seconds=0)


@pytest.mark.parametrize("capturable", [True, False])
def test_the_cuda_clock_empties_the_cache_and_replays_what_can_be_captured(monkeypatch, capturable):
    """torch.cuda replaced by what notes its calls: the order of a sample, and a capture that fails."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 250.0  # ms

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def graph(captured):
        log.append("capture")
        yield
        if not capturable:
            raise RuntimeError("operation not permitted when stream is capturing")

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = dict(
        Event=Event, CUDAGraph=Graph, graph=graph, Stream=lambda device: stream,
        stream=lambda s: contextlib.nullcontext(), current_stream=lambda device: stream,
        synchronize=lambda device: None,
        get_device_properties=lambda device: types.SimpleNamespace(L2_cache_size=50 << 20),
    )  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = harness.CudaClock(CPU)
    assert clock.flush.nbytes == 200 << 20
    clock.flush = types.SimpleNamespace(zero_=lambda: log.append("flush"))
    sample, replayed = clock.prepare(lambda: log.append("call"), True)
    assert replayed is capturable
    assert log == ["call"] * 3 + ["capture", "call"] + ["replay"] * capturable
    log.clear()
    assert sample()() == 0.25
    assert log == ["flush", "event", "replay" if capturable else "call", "event"]


def test_memory_is_seen_whoever_allocates_it():
    """32 MiB: far above what the interpreter does meanwhile, above glibc's largest threshold for reusing memory."""
    size = 32 << 20
    allocated, resident = peak_memory(lambda: torch.ones(2, size // 8), CPU)
    assert size <= allocated < 1.1 * size
    hidden, resident = peak_memory(lambda: np.ones(size, dtype=np.int8), CPU)
    assert hidden == 0
    if resident is not None:
        assert 0.9 * size <= resident < 1.5 * size


def test_records_give_bandwidth_rates_and_ratios():
    clock = ScriptedClock({"ours": [2.0], "theirs": [8.0]})
    work = workload(ours=None, theirs=None)
    work.yardstick, work.missing = "theirs", {"nobody": "not installed"}
    suite = run.SUITES[0]
    timings, missing = measure(work, CPU, clock, seconds=0)
    point = harness.Point("mh_accept", torch.float32, {"rows": 1, "tokens": 2})
    ours, theirs, nobody = report.records(suite, point, work, timings, missing, copy=5000.0)
    assert ours["gb_per_s"] == 1000 / 2 / 1e9
    assert ours["percent_of_copy"] == 10
    assert ours["per_s"] == 5
    assert (ours["over_yardstick"], theirs["over_ours"]) == (0.25, 4)
    assert nobody["reason"] == "not installed"
    assert nobody["median_s"] is None
    assert all(tuple(record) == report.COLUMNS for record in (ours, theirs, nobody))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(folder, results, text) of `power-kernels bench --quick`."""
    folder = tmp_path_factory.mktemp("bench")
    with serving("cpp"), pytest.MonkeyPatch.context() as patch:
        text = []
        patch.setattr("builtins.print", lambda *parts, **_: text.append(" ".join(map(str, parts))))
        assert main(["bench", "--quick", "--device", "cpu", "--out", str(folder)]) == 0
    return folder, json.loads((folder / "ops.json").read_text()), "\n".join(text)


def test_a_quick_run_measures_every_op_and_prints_acceptance_first(quick):
    _, results, text = quick
    assert {r["op"] for r in results["records"]} == {suite.op for suite in run.SUITES} == set(results["formulas"])
    titles = [text.index(f"{suite.title}: {suite.op}") for suite in run.SUITES]
    assert titles == sorted(titles)
    assert "decisions/s" in text[titles[0] : titles[1]]
    for words in ("torch.logsumexp", "eager", "not run: FlashInfer", "not run: torch.compile", "at most 1.7x"):
        assert words in text


def test_results_hold_their_schema(quick):
    folder, results, _ = quick
    assert results["schema"] == report.SCHEMA
    assert results["copy_bytes_per_s"] > 1e8
    environment = results["environment"]
    assert environment["threads"] == 1
    assert all(environment[name] for name in ("date", "device", "clock", "torch", "python", "backend", "seconds"))
    assert environment["libraries"]["vllm"] is None or isinstance(environment["libraries"]["vllm"], str)
    for record in results["records"]:
        assert tuple(record) == report.COLUMNS
        if record["median_s"] is None:
            assert record["reason"]
            continue
        assert 0 < record["min_s"] <= record["median_s"]
        assert record["rounds"] >= 1
        assert math.isclose(record["gb_per_s"], record["bytes"] / record["median_s"] / 1e9)
        assert record["peak_bytes"] >= 0
    points = {(r["op"], r["dtype"], *r["shape"].values()) for r in results["records"]}
    assert sum(r["ours"] for r in results["records"]) == len(points)
    with open(folder / "ops.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["contender"] for line in lines] == [r["contender"] for r in results["records"]]
    assert tuple(lines[0]) == report.COLUMNS


def test_preallocated_forms_allocate_nothing(quick):
    _, results, _ = quick
    for record in results["records"]:
        if record["contender"].split(",")[0].endswith("_out") and record["median_s"] is not None:
            assert record["peak_bytes"] == 0, record
    eager = [r for r in results["records"] if r["op"] == "sample_tokens" and r["contender"] == "eager"]
    assert eager
    assert all(r["peak_bytes"] > r["shape"]["rows"] * r["shape"]["vocab"] * 4 for r in eager)


def record(**changes) -> dict:
    values = {
        **dict.fromkeys(report.COLUMNS), "op": "sample_tokens", "contender": "sample_tokens", "dtype": "float32",
        "shape": {"rows": 64, "vocab": 151_936}, "median_s": 1e-3, "over_yardstick": 1.0, "percent_of_copy": 90.0,
    }  # fmt: skip
    return {**values, **changes}


def test_limits_are_judged_by_the_worst_point():
    records = [record(over_yardstick=1.5), record(over_yardstick=1.8, shape={"rows": 1, "vocab": 151_936})]
    results = {"environment": {"device_type": "cpu"}, "records": records}
    (verdict,) = verdicts(results)
    assert (verdict["value"], verdict["holds"]) == (1.8, False)
    assert "DOES NOT HOLD" in limits_table(results)
    results["records"] = records[:1]
    assert "holds" in limits_table(results)
    results["records"] = [record(shape={"rows": 64, "vocab": 32_000})]
    assert limits_table(results) == ""


def test_limits_of_a_gpu_are_shares_of_the_copy_bandwidth_and_times():
    chains = {"chains": 64, "lanes": 4}
    results = {
        "environment": {"device_type": "cuda"},
        "records": [
            record(contender="sample_tokens_out", dtype="bfloat16", percent_of_copy=87.0),
            record(contender="sample_tokens_out, beta 3.7", dtype="bfloat16", percent_of_copy=79.0),
            record(contender="sample_tokens_out", percent_of_copy=91.0),
            record(op="mh_advance", contender="mh_advance", shape=chains, median_s=8 * 9e-6),
        ],
    }
    assert [(v["limit"].bound, v["holds"]) for v in verdicts(results)] == [
        (88, False),
        (78, True),
        (92, False),
        (10, True),
    ]


# ---- plots


@pytest.fixture(scope="module")
def plots():
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(ROOT / "bench"))
    return importlib.import_module("plots")


def test_plots_of_a_quick_run(quick, plots, tmp_path):
    """A quick run has two vocabularies, but each at another number of rows: no scaling to show."""
    folder, _, _ = quick
    drawn = plots.draw(folder / "ops.json", tmp_path)
    assert [p.name for p in drawn] == ["acceptance.png", "roofline.png", "speedup.png", "lm_head.png"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 20_000


def test_scaling_plots_show_each_size(quick, plots, tmp_path):
    _, results, _ = quick
    sampled = [r for r in results["records"] if r["op"] == "sample_tokens" and r["shape"]["vocab"] == 151_936]
    more = [
        {**r, "shape": {"rows": rows, "vocab": vocab}}
        for r in sampled
        for rows, vocab in ((1, 151_936), (16, 151_936), (16, 32_000), (16, 256_000))
    ]
    source = tmp_path / "ops.json"
    source.write_text(json.dumps({**results, "records": more}))
    assert {p.name for p in plots.draw(source, tmp_path)} >= {"rows.png", "vocabulary.png"}
    source.write_text(json.dumps({"schema": 0}))
    with pytest.raises(SystemExit, match="not a result of this version"):
        plots.draw(source, tmp_path)


def test_the_operators_are_collected_by_pytest_benchmark(tmp_path):
    out = tmp_path / "benchmark.json"
    command = [
        sys.executable, "-m", "pytest", "bench/ops.py", "-q", "-p", "no:cacheprovider", "--benchmark-only", "-k",
        "mh_accept and cumsum", "--benchmark-max-time=0.001", "--benchmark-min-rounds=1", f"--benchmark-json={out}",
    ]  # fmt: skip
    # Not as a worker of this run: pytest-benchmark times nothing there.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {b["name"] for b in json.loads(out.read_text())["benchmarks"]}
    accept = run.SUITES[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert len(names) == len(accept.points("quick", device))
