"""The options of `power-kernels bench` and of bench/ops.py, and what can be said of them before torch is imported."""

from __future__ import annotations

import argparse
from pathlib import Path

from power_kernels.errors import ArgumentError

# The operators that `run.SUITES` measures, in its order.
OPS = (
    "mh_accept",
    "mh_advance",
    "sample_tokens",
    "score_tokens",
    "sample_slots",
    "branch_particles",
    "sample_from_hidden",
    "score_from_hidden",
    "kv_copy_ranges",
    "block_table_fork",
    "kv_copy_blocks",
    "decode_attention",
)
GRIDS = ("quick", "default", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `power-kernels bench` and of bench/ops.py."""
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--quick", dest="grid", action="store_const", const="quick", help="tiny sizes, to see it run")
    grid.add_argument("--full", dest="grid", action="store_const", const="full", help="on a CPU, the GPU's sizes too")
    parser.set_defaults(grid="default")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU (default 1)")
    parser.add_argument("--seconds", type=float, help="of rounds at each point (default 0.5, 0.02 with --quick)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/ops.json and DIR/ops.csv")


def run(arguments: argparse.Namespace) -> int:
    """Look at the options, then measure. Returns the exit status; raises ArgumentError or BackendError."""
    seconds = arguments.seconds if arguments.seconds is not None else 0.02 if arguments.grid == "quick" else 0.5
    if arguments.threads < 1:
        raise ArgumentError(f"--threads is {arguments.threads}; it must be at least 1")
    if not seconds >= 0:
        raise ArgumentError(f"--seconds is {seconds}; it must not be negative")
    if arguments.out is not None:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"--out {arguments.out} cannot be written: {error}") from None
    from power_kernels.api.bench.run import measure_suites

    return measure_suites(arguments, seconds)
