"""Every shipped Triton kernel compiled offline: no spills, 16-byte loads, on every target that Triton knows.

One subprocess without TRITON_INTERPRET compiles for NVIDIA (PTX and machine code) and AMD; no GPU is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def report() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "power_kernels.triton", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def on(report: list[dict], target: str) -> list[dict]:
    rows = [row for row in report if row["target"] == target]
    assert rows, f"nothing was compiled for {target}"
    return rows


def test_every_configuration_compiles_for_every_target(report):
    assert [(r["target"], r["name"], r["error"]) for r in report if r["error"]] == []
    names = {r["name"] for r in on(report, "sm_90")}
    for kernel in ("mass", "finish", "score", "mh_accept", "mh_advance", "kv_copy"):
        assert any(name.startswith(kernel) for name in names), kernel


def test_nothing_spills_on_sm_90(report):
    # ptxas may save a few registers around a float64 division: in kernels of one program a row or chain, outside loops
    allowed = {r["name"]: 32 if r["name"].startswith(("mh_advance", "finish")) else 0 for r in on(report, "sm_90")}
    spilling = {r["name"]: r["stack"] for r in on(report, "sm_90") if r["stack"] > allowed[r["name"]] or r["local"]}
    assert spilling == {}


def test_logits_and_caches_come_in_16_byte_loads_on_sm_90(report):
    wanted = [r for r in on(report, "sm_90") if r["wide"]]
    assert len(wanted) >= 10
    for row in wanted:
        assert any(load.startswith(f"ld.global.{row['wide']}") for load in row["loads"]), row


def test_a_copy_reads_and_writes_nothing_narrower_than_16_bytes_on_sm_90(report):
    for row in on(report, "sm_90"):
        if row["name"].startswith("kv_copy") and row["wide"]:
            # the four words of the range are all that is read otherwise
            assert sum(n for load, n in row["loads"].items() if not load.startswith("ld.global.v4")) == 4, row
            assert all(store.startswith("st.global.v4") for store in row["stores"]), row


def test_the_mass_kernel_leaves_room_for_16_warps_on_sm_90(report):
    """128 registers let 16 warps stay on a multiprocessor, each with 2 KB or more of loads in flight."""
    for row in on(report, "sm_90"):
        if row["name"].startswith("mass") and row["wide"]:
            assert row["registers"] <= 128, row
