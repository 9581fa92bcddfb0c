"""Whole answers, measured: `python bench/end_to_end.py [SUITE] [options]`.

    cost         (default) what an answer costs: plain generation, the published algorithm, a KV-keeping loop, ours
    latency      one prompt: how much sooner the answer is there with 1, 2, 4, 8 prefetch lanes and with the default
    quality      one prompt: how likely answers are, for how many forward passes one after the other, by method
    throughput   many prompts through a fixed number of slots: answers per second, and what the lanes do meanwhile
    decode       on a GPU: one decode step against the memory's bandwidth, its parts, and whether it ever waits

`SUITE --help` lists a suite's options and explains its columns, as bench/README.md does; `--quick` runs in miniature,
`--json OUT` keeps every cell for bench/plots.py. Without the device that is asked for a suite says "not measured" and
exits with 2.
"""

from __future__ import annotations

import importlib
import os
import sys

if __name__ == "__main__":
    # Before torch is imported: its thread pool is sized then.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SUITES = ("cost", "latency", "quality", "throughput", "decode")


def main(argv: list[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    suite = given.pop(0) if given and not given[0].startswith("-") else "cost"
    if suite not in SUITES:
        print(f"error: there is no suite {suite!r}; there are {', '.join(SUITES)}", file=sys.stderr)
        return 2
    return importlib.import_module(suite).main(given)


if __name__ == "__main__":
    raise SystemExit(main())
