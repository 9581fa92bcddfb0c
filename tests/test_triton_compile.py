"""Every shipped Triton kernel compiled offline for every target: no spills, 16-byte loads, one exponential a logit; and
what is compiled here is what the launchers ask for.

Subprocesses without TRITON_INTERPRET compile for NVIDIA (PTX and machine code) and AMD; no GPU is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from power_kernels.triton.__main__ import hot_loop
from tests.triton_requests import key

ROOT = Path(__file__).resolve().parents[1]
NVIDIA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*NVIDIA, "gfx942")


def run_module(*arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def report() -> list[dict]:
    return run_module("power_kernels.triton", "--json", "--quick")


@pytest.fixture(scope="module")
def requests() -> list[dict]:
    return run_module("tests.triton_requests")


def on(report: list[dict], *targets: str) -> list[dict]:
    rows = [row for row in report if row["target"] in targets and not row["error"]]
    assert len({row["target"] for row in rows}) == len(targets), f"nothing was compiled for one of {targets}"
    return rows


def test_every_configuration_compiles_for_every_target(report):
    assert [(r["target"], r["name"], r["error"]) for r in report if r["error"]] == []
    for target in TARGETS:
        names = [r["name"] for r in on(report, target)]
        assert len(set(names)) == len(names)
        kernels = Counter(name.split()[0] for name in names)
        dtypes = 3 if target == "sm_80" else 2  # float16 is compiled for one target; `make kernels-report` has all
        # load widths and entropy; load widths and widths over tiles (both by row and by slot); widths; load widths;
        # load widths; groups small and large
        of_dtypes = dict(mass=8, finish=8, score=2, head_sample=2, head_score=2, branch_mass=2, branch=2)
        # lanes; units; widths over tiles
        others = dict(select=1, mh_accept=1, mh_advance=3, kv_copy=7, head_finish=2, head_given=2)
        expected = {**{kernel: dtypes * many for kernel, many in of_dtypes.items()}, **others}
        assert {kernel: kernels[kernel] for kernel in expected} == expected, target


def test_nothing_spills_and_nothing_lies_in_local_memory(report):
    """Stack and local memory on NVIDIA; scratch memory and spilled vector registers on AMD."""
    assert [(r["target"], r["name"], r["spill"]) for r in on(report, *TARGETS) if r["spill"]] == []


def test_logits_and_caches_come_in_16_byte_loads(report):
    wanted = [r for r in on(report, *NVIDIA) if r["wide"]]
    # masses (entropy or not) and finishers (2 widths), by row and by slot, of 3, 2 and 2 dtypes, caches (3 widths) on
    # three targets
    assert len(wanted) >= 7 * 2 * (2 + 2) + 3 * 3
    assert [(r["target"], r["name"], r["loads"]) for r in wanted if not r["loads"].get("128")] == []
    # A wave of 64 has half as many entries a thread to read; the finishers' tiles have 4 warps, so 8 bytes a thread.
    streaming = [r for r in on(report, "gfx942") if r["wide"] and r["name"].startswith(("mass", "kv_copy"))]
    assert len(streaming) == 2 * 4 + 3
    assert [(r["name"], r["loads"]) for r in streaming if not r["loads"].get("128")] == []


def test_a_copy_reads_and_writes_nothing_narrower_than_16_bytes(report):
    for row in on(report, *TARGETS):
        if row["name"].startswith("kv_copy") and row["wide"]:
            # the four words of the range are all that is read otherwise, on AMD through scalar registers
            assert sum(n for bits, n in row["loads"].items() if bits != "128") in (0, 4), row
            assert set(row["stores"]) == {"128"}, row


def test_an_integer_beta_costs_one_exponential_a_logit(report):
    """The masses hold 32 logits a thread. Their code has one ex2 a logit for exp(z - m), one for exp(beta (z - m)) in
    the branch that integers up to 16 do not take, and two for the entry of the argmax's thread that each thread reads
    again: 66. A power that took an exponential of its own would show as more."""
    masses = [r for r in on(report, *NVIDIA) if r["name"].startswith("mass")]
    assert len(masses) == (3 + 2 + 2) * 2 * 4
    assert {r["ex2"] for r in masses} == {32 + 32 + 2}


def test_the_mass_kernel_leaves_room_for_its_loads_in_flight(report):
    """16 warps a multiprocessor have 32 KB (bf16) or more under way, enough for 4 TB/s over 132 of them at 1 us."""
    for row in on(report, *NVIDIA):
        if row["name"].startswith(("mass", "branch_mass")):
            assert row["warps"] >= 16, row


def test_what_the_launchers_ask_for_is_what_is_compiled(requests):
    """Types, constants, alignment and options of each launch, over a spread of shapes, dtypes and alignments, are those
    of a configuration (triton_requests.key says what two lines of the same code have in common)."""

    listed = {key(r) for r in requests if r["kind"] == "listed"}
    asked = {key(r) for r in requests if r["kind"] == "request"}
    assert asked - listed == set()
    assert len({json.loads(a)["kernel"] for a in asked}) >= 17
    # Nor is anything listed that nobody asks for.
    kernels = ("_mass_kernel", "_score_kernel", "_mh_accept_kernel", "_mh_advance_kernel", "_kv_copy_kernel")
    particles = ("_branch_mass_kernel", "_branch_kernel", "_select_kernel")
    for kernel in (*kernels, *particles, "_head_kernel", "_slot_mass_kernel"):
        assert {k for k in listed - asked if json.loads(k)["kernel"] == kernel} == set()


def test_single_entry_loads_do_not_depend_on_the_alignment_of_the_base():
    code = """
import dataclasses, json, re
from power_kernels.triton import configurations
from power_kernels.triton.__main__ import TARGETS, compile_for
wanted = ("mass bfloat16 VEC=1 ENTROPY=False", "score float16 TILES=256", "kv_copy unit=8B BLOCK_D=32")
for c in configurations():
    if c.name in wanted:
        data = tuple(n for n in ("logits_ptr", "dst_ptr", "src_ptr") if n in c.signature)
        ptx = [compile_for(k, TARGETS["sm_90"]).asm["ptx"] for k in (c, dataclasses.replace(c, aligned=data))]
        print(json.dumps(re.findall(r"^\\t\\S.*;", ptx[0], re.M) == re.findall(r"^\\t\\S.*;", ptx[1], re.M)))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.stdout.split() == ["true"] * 3, run.stderr[-4000:]


def test_the_hot_loop_is_counted_along_its_shortest_way():
    """A loop of two loads with a branch around three instructions, inside a longer one without more loads."""
    sass = "\n".join(
        [
            "        /*0000*/                   S2R R0 ;",
            ".L_x_0:",
            "        /*0010*/                   MOV R1, R2 ;",
            ".L_x_1:",
            "        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;",
            "        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64] ;",
            "        /*0040*/              @!P0 BRA `(.L_x_2) ;",
            "        /*0050*/                   FADD R4, R4, R5 ;",
            "        /*0060*/                   FADD R4, R4, R5 ;",
            "        /*0070*/                   FADD R4, R4, R5 ;",
            ".L_x_2:",
            "        /*0080*/               @P1 BRA `(.L_x_1) ;",
            "        /*0090*/               @P2 BRA `(.L_x_0) ;",
            "        /*00a0*/                   EXIT ;",
            ".L_x_3:",
            "        /*00b0*/                   BRA `(.L_x_3);",
            "        /*00c0*/                   NOP;",
        ]
    )
    # 11 up to EXIT; the inner loop has 7, of which the branch jumps over 3
    assert hot_loop(sass) == (11, 7, 4)
