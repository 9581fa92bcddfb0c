"""The compiled kernels, executed thread by thread on a CPU (tests/ptx): no race, no access out of bounds, no undefined
value, the same bytes under every schedule.

Subprocesses without TRITON_INTERPRET; `make ptx` runs the rest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.ptx import native

ROOT = Path(__file__).resolve().parents[1]
SCHEDULES = "in order, random often, independent lanes"

pytestmark = pytest.mark.skipif(
    native.why_not() is not None, reason=f"the executor cannot be built: {native.why_not()}"
)


def run(*arguments: str, report: Path | None = None) -> dict:
    """The tests named, with compiled kernels; what they found."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment["OMP_NUM_THREADS"] = "1"
    options = ["-p", "tests.ptx.plugin", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["--ptx-report", str(report)] if report else []
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    return json.loads(report.read_text()) if report else {}


def test_the_executor_finds_what_was_planted_and_nothing_else():
    run("tests/ptx/selftest.py")


def test_the_block_table_kernels_are_free_of_races_under_every_schedule(tmp_path):
    found = run("tests/test_paged_kv.py", "-k", "triton", report=tmp_path / "report.json")
    assert found["findings"] == []
    assert len(found["schedules"]) == 6
    kernels = {"_fork_kernel", "_share_kernel", "_extend_kernel", "_commit_kernel", "_rollback_kernel"}
    assert kernels <= {json.loads(request)["kernel"] for request in found["requests"]}
