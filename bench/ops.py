"""Microbenchmarks of every operator against what one would write without it, on a CPU or a CUDA device.

    python bench/ops.py [--quick | --full] [--ops OP ...] [--out DIR]     the same as `power-kernels bench`
    pytest bench/ops.py --benchmark-only [-k mh_accept]                   the same contenders under pytest-benchmark

The suites, their byte formulas and their opponents are in `power_kernels.api.bench` (python_api/bench/), so that an
installed package has them too; bench/README.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler reports each start and stop

import pytest
import torch

from power_kernels.api.bench.harness import clock_for
from power_kernels.api.bench.options import add_arguments, run
from power_kernels.api.bench.run import SUITES

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CASES = [
    pytest.param(suite, point, name, id=f"{point} {name}".replace(" ", "-"))
    for suite in SUITES
    for point in suite.points("quick", DEVICE.type)
    for name in suite.core
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("suite", "point", "name"), CASES)
def test_operator(benchmark, suite, point, name):
    benchmark.group = str(point)
    call = suite.build(point, DEVICE).contenders[name]
    clock = clock_for(DEVICE)

    def finished() -> None:
        call()
        clock.finish()

    benchmark(finished)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
