"""The compiled kernels, executed thread by thread on a CPU (tests/ptx): no race, no access out of bounds, no undefined
value, the same bytes under every schedule.

Subprocesses without TRITON_INTERPRET. `make ptx` runs all six schedules, sm_90, the mutants and what is long.
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

pytestmark = pytest.mark.skipif(
    native.why_not() is not None, reason=f"the executor cannot be built: {native.why_not()}"
)


def run(*arguments: str) -> None:
    """pytest with compiled kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment["OMP_NUM_THREADS"] = "1"
    options = ["-p", "tests.ptx.plugin", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


def test_the_executor_finds_what_was_planted_and_nothing_else():
    run("tests/ptx/selftest.py")


def test_every_listed_configuration_runs_free_of_races_under_three_schedules(tmp_path):
    """The kernels' own tests on compiled code for sm_80; of the heads' tests, which are long, those with few rows,
    and of those by slot what decides and writes, and of those of particles what the configurations leave out."""
    report = tmp_path / "report.json"
    heads = "(float64 and (3-33-127 or 17-136-600)) or rows_may_lie or bad_row"
    particles = "test_the_selection or (test_the_survivors and (horizon or closes or light))"
    long = "test_triton_lm_head or test_sample_slots or test_triton_particles"
    slots = "as_the_words_say or not_ours or leaves_rows_behind or last_bit"
    run(
        *("tests/test_triton_kernels.py", "tests/test_paged_kv.py", "tests/test_triton_lm_head.py"),
        *("tests/test_long_answers.py", "tests/test_sample_slots.py", "tests/test_triton_particles.py"),
        *("tests/ptx/configurations.py", "-k", f"not ({long}) or {heads} or {slots} or {particles}"),
        *("--ptx-schedules", "in order, random often, independent lanes", "--ptx-report", str(report)),
    )
    found = json.loads(report.read_text())
    assert found["findings"] == []
    assert found["configurations_not_run"] == []
    assert len(found["configurations"]) == 99
    assert len(found["schedules"]) == 3
