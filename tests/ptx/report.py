"""What execution says of the kernels' speed, without a GPU: `python -m tests.ptx.report [WORD ...]`.

Each operator runs once on a real shape, as its benchmark builds it (power_kernels.api.bench, which has the byte
formulas), compiled for sm_80: every block, one schedule. One row a kernel:

    blocks     of its launches
    insts      instructions that warps executed, of PTX: what ptxas merges or splits is not seen
    /unit      of these for each unit that the operator is paid by: a logit, a decision, a lane, a position
    moved      bytes of the 32-byte sectors that loads, stores, atomics and copies touched in global memory, a sector
               once for each warp instruction that touches it
    /least     of the least bytes that the operator's formula allows: 1 wastes no sector. Caches are not modelled: what
               several warps, blocks or instructions read counts as often
    conflicts  passes over the banks of shared memory that conflicts added, of all passes (wgmma's reads are not seen)
    barriers   that a block waits at
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

os.environ.pop("TRITON_INTERPRET", None)

import torch

import power_kernels as pk
from power_kernels.api.bench import chain, kv_cache, lm_head, logits, paged_kv
from power_kernels.api.bench.harness import Point, Suite
from tests.ptx import native
from tests.ptx.launcher import Launcher
from tests.ptx.machine import UNCHECKED

BF16 = torch.bfloat16
VOCABULARY = logits.VOCABULARY


@dataclass(frozen=True)
class Job:
    suite: Suite
    point: Point
    unit: str
    units: int = 1  # of each that the suite counts


def job(suite: Suite, unit: str, dtype=BF16, units: int = 1, **shape: int) -> Job:
    return Job(suite, Point(suite.op, dtype, shape), unit, units)


# The heads have 64 rows, the width of a model of 7B, and 16 tiles of the vocabulary; all tiles are alike.
JOBS = (
    job(logits.SAMPLE, "logit", units=VOCABULARY, rows=4, vocab=VOCABULARY),
    job(logits.SCORE, "logit", units=VOCABULARY, rows=4, vocab=VOCABULARY),
    job(lm_head.SAMPLE, "logit", units=4096, rows=64, width=3584, vocab=4096),
    job(lm_head.SCORE, "logit", units=4096, rows=64, width=3584, vocab=4096),
    job(chain.ACCEPT, "decision", torch.float32, rows=64, tokens=512),
    job(chain.ADVANCE, "lane", torch.float32, chains=16, lanes=4),
    job(kv_cache.COPY, "position", groups=56, heads=4, width=128, rows=4, suffix=300),
    job(paged_kv.TABLES, "proposal", chains=16, tokens=2048),
)
HEADER = f"{'':22}{'blocks':>8}{'insts':>13}{'/unit':>10}{'moved':>14}{'/least':>8}{'conflicts':>11}{'barriers':>10}"


def measure(chosen: Job) -> list[str]:
    """The rows of one operator."""
    work = chosen.suite.build(chosen.point, torch.device("cpu"))
    with Launcher([UNCHECKED]) as launcher, pk.use_backend("triton"):
        work.contenders[work.ours]()
    units = work.count * chosen.units
    lines = [f"{chosen.point}: {units:,} {chosen.unit}s, at least {work.bytes:,} bytes"]
    for kernel, c in launcher.counts.items():
        moved = native.SECTOR * (c["sectors_read"] + c["sectors_written"])
        conflicts = f"{c['conflicts'] / c['shared_passes']:.0%}" if c["shared_passes"] else "-"
        lines.append(
            f"  {kernel:20}{c['blocks']:8,}{c['instructions']:13,}{c['instructions'] / units:10.3g}{moved:14,}"
            f"{moved / work.bytes:8.3f}{conflicts:>11}{c['barriers'] / c['blocks']:10.3g}"
        )
    return lines


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    if why := native.why_not():
        print(f"execution is left out: {why}")
        return 0
    print(HEADER)
    for chosen in JOBS:
        if all(word in chosen.suite.op for word in words):
            print("\n".join(measure(chosen)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
