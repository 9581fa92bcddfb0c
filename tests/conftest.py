"""Shared set-up: the device, the Triton interpreter on a CPU, one thread (a busy machine makes two slower than one),
poisoned memory."""

import json
import os
import sys
import zlib
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

# Their conftest.py set up the processes of a real vLLM, where nothing is compiled, and of a real SGLang, on a processor
# (make test-vllm, make test-sglang).
collect_ignore = ["vllm", "sglang"]

# Files of which nothing runs on a device, and what `pytest --device cuda` therefore leaves to the CPU run.
HOST_FILES = {
    "test_captured": "operators on a CPU stand in for a graph",
    "test_bench_end_to_end": "whole answers in miniature on the CPU",
    "test_bench_opponents": "the published algorithm is measured on CPUs",
    "test_bench_plots": "pictures",
    "test_bench_results": "small benchmarks on the CPU, and what is made of their results",
    "test_bench_suites": "byte formulas, and opponents compared on the CPU",
    "test_cli": "the command line takes its model to no device",
    "test_committed_experiment": "records and a table",
    "test_config": "numbers and their checks",
    "test_cpp_kernels": "the C++ kernels serve CPU tensors",
    "test_cpu_linear": "linear layers on a CPU",
    "test_demo": "three short answers of a tiny model on the CPU",
    "test_diagnostics": "what chains left behind",
    "test_distributed": "processes that meet over gloo, each on the CPU",
    "test_gpu_check": "the command that starts this run",
    "test_interrupts": "commands in processes of their own, on the CPU",
    "test_experiments": "runs of a tiny model on the CPU",
    "test_experiment_tasks": "questions, graders and tables",
    "test_grading": "answers are graded on the host",
    "test_install": "the build of the package",
    "test_device_calls": "torch.cuda replaced by what keeps a record",
    "test_instruction_sets": "the C++ kernels serve CPU tensors",
    "test_devices": "how tensors get to a device, shown with the host as the device",
    "test_packaged_model": "files and their conversion",
    "test_hub": "files, and processes on the CPU",
    "test_law_enumeration": "the reference, on the host whatever the device",
    "test_prefix_memory": "prefixes are remembered on a CPU only",
    "test_docs": "the text",
    "test_ptx": "the compiled kernels, executed on the CPU",
    "test_proposals": "dicts and their checks",
    "test_reproduce": "the text",
    "test_run_plots": "pictures",
    "test_runs": "what runs of draws go to is on the CPU",
    "test_statistics": "arrays of verdicts",
    "test_stop_law": "the reference, on the host whatever the device",
    "test_tensor_parallel": "processes on the CPU",
    "test_triton_compile": "compiles for every target without a device",
}


# Files that take longest. Each of several workers takes whole files (`--dist loadfile`): these come first, as the last
# ones leave one worker alone.
LONGEST = (
    "test_triton_compile",
    "test_docs",
    "test_ptx",  # finds what test_triton_compile has compiled
    "test_chain_identity",
    "test_install",
)


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="where the kernels run: cpu (Triton's interpreter, C++), cuda or cuda:N"
    )
    parser.addoption(
        "--shard", default="0/1", help="I/N: the I-th of N parts; tests that share a parameter `name` stay together"
    )
    parser.addoption("--results", help="a file to append a JSON line to for every test as it ends (bench/gpu_check.py)")


class Results:
    """A line for each test, at once: what was found survives a kill. Failures of set-up and tear-down count, too."""

    def __init__(self, path: str):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        reason = ""
        if report.outcome == "skipped":
            reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "xfail"
        elif report.outcome == "failed":
            told = [line for line in report.longreprtext.splitlines() if line.startswith("E  ")]
            reason = " ".join((told[0] if told else report.longreprtext[-300:])[1:].split())
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "reason": reason,
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config):
    if config.getoption("--results") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(os.path.abspath(config.getoption("--results"))))
    device = config.getoption("--device")
    device = "cuda:0" if device == "cuda" else device
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device is {device!r}; it must be cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"--device {device}: torch {torch.__version__} (built for CUDA {torch.version.cuda}) sees no CUDA device"
        )
    # before anything imports triton, which reads it once
    if kind == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        # What is compiled without a device is compiled once, whichever process asks, and kept from run to run: Triton's
        # keys hold its own version, the source, the options and the target.
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "triton"))
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    os.environ["POWER_KERNELS_TEST_DEVICE"] = device
    if kind == "cuda":
        torch.cuda.set_device(device)
        from power_kernels.ops import dispatch
        from tests.devices import carried

        dispatch.set_runner(carried(dispatch.serve))


def pytest_report_header(config):
    device = os.environ["POWER_KERNELS_TEST_DEVICE"]
    return f"device: {device}" + (f" ({torch.cuda.get_device_name(device)})" if device != "cpu" else "")


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        rank = {name: i for i, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    part, parts = map(int, config.getoption("--shard").split("/"))
    if parts > 1:

        def shard(item) -> int:
            # Tests of one law share what the reference computed for it once a process.
            name = getattr(item, "callspec", None) and item.callspec.params.get("name")
            return zlib.crc32(str(name or item.nodeid).encode()) % parts

        config.hook.pytest_deselected(items=[item for item in items if shard(item) != part])
        items[:] = [item for item in items if shard(item) == part]
    if os.environ["POWER_KERNELS_TEST_DEVICE"] != "cpu":
        for item in items:
            if reason := HOST_FILES.get(item.path.stem):
                item.add_marker(pytest.mark.skip(reason=f"host only: {reason}"))


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Every float tensor that the package allocates empty is NaN, so that an unwritten output shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        if out.is_floating_point() and out.device.type != "meta":
            out.fill_(float("nan"))
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture
def one_thread():
    """Whatever the test sets, and whatever was set before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def sparse(tmp_path):
    """Storage of any size that takes no memory until it is written."""

    def storage(entries: int, dtype: torch.dtype) -> torch.Tensor:
        path = tmp_path / f"sparse{len(list(tmp_path.iterdir()))}"
        with path.open("wb") as file:
            file.truncate(entries * dtype.itemsize)
        return torch.from_file(str(path), shared=False, size=entries, dtype=dtype)

    return storage


@pytest.fixture
def cpp():
    """Operators from the C++ backend."""
    from tests.op_helpers import serving

    with serving("cpp"):
        yield


@pytest.fixture
def fast():
    """Operators from the backend that suits many rows here."""
    from tests.op_helpers import FAST, serving

    with serving(FAST):
        yield


@pytest.fixture(autouse=True)
def lanes_are_not_measured(request, monkeypatch):
    """Chains that wait run at once, and lanes that nobody asked for are one: rows round with their number, and a noisy
    clock must not decide which bits a test compares. `@pytest.mark.measured` leaves the clock in."""
    huggingface = sys.modules.get("power_kernels.api.engines.huggingface")
    if huggingface is not None and "measured" not in request.keywords:
        engine = huggingface.HuggingFaceEngine
        monkeypatch.setattr(engine, "decode_seconds", lambda self, rows, length: [count**0.9 for count in rows])
