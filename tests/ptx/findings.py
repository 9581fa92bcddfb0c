"""What the checks found: kinds, what each means, which of them fail a test, and the text with Python lines."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

MEANING = {
    "OUT_OF_BOUNDS": "not in any tensor's storage",
    "OUTSIDE_VIEW": "in the storage, but in no argument's view of it",
    "MISALIGNED": "not a multiple of the access",
    "UNDEFINED_ADDRESS": "bytes or registers that nothing has written decide an address",
    "UNDEFINED_BRANCH": "the same decide a branch or predicate",
    "UNDEFINED_STORE": "the same reach global memory",
    "NOT_WRITTEN": "bytes of a declared output that the launch left out",
    "RACE_WARPS": "two warps of a block, one byte, one of them writes, no bar.sync between",
    "RACE_WARP": "two lanes of a warp, no collective between: right only while the warp runs in lockstep",
    "RACE_WARP_SYNC": "two lanes of a warp, only a shuffle or redux between: PTX promises no memory order there",
    "RACE_LANES": "two lanes of one store instruction, the same bytes",
    "RACE_BLOCKS": "two blocks of a launch (atomics with atomics excepted)",
    "RACY_ADDRESS": "a value that was read in a race decides an address",
    "RACY_BRANCH": "such a value decides a branch or predicate",
    "RACY_STORE": "such a value reaches global memory",
    "SCHEDULE_DIFFERS": "two schedules leave other bytes",
    "ASYNC_PENDING": "shared memory touched while a cp.async writes it, or written while a wgmma reads it",
    "BARRIER_MISMATCH": "warps wait at different bar.sync",
    "DIVERGENT_SYNC": "lanes of a warp wait at different collectives",
    "DIVISION_BY_ZERO": "an integer divided by zero",
    "HANG": "a warp took more instructions than any kernel needs",
    "ABORTED": "the launch was given up",
    "DIVERGENT_BRANCH": "for information: the lanes of a warp part",
    "NAN_TO_INTEGER": "for information: a NaN was converted",
}
INFORMATION = ("DIVERGENT_BRANCH", "NAN_TO_INTEGER")


@dataclass
class Finding:
    kind: str
    kernel: str
    buffer: str = "-"  # the arguments that lie in the storage, or "shared"
    source: str = ""
    other_source: str = ""  # of the access that it races with
    opcode: str = ""
    detail: str = ""
    same_value: bool | None = None  # two writes of the same bits; None: not two writes
    count: int = 1
    schedules: set[str] = field(default_factory=set)

    @property
    def key(self) -> tuple:
        where = (self.kernel, self.buffer, self.source, self.other_source, self.opcode)
        return (self.kind, *where, self.same_value)

    @property
    def fails(self) -> bool:
        """Whether this is a fault. Equal bits that several threads write to shared memory are not: shared memory is
        the compiler's alone, and Triton lets every thread that holds a copy of a value store it."""
        copies = self.buffer == "shared" and self.same_value
        return self.kind not in INFORMATION and not (self.kind.startswith("RACE") and copies)

    def __str__(self) -> str:
        lines = self.source + (f" / {self.other_source}" if self.other_source else "")
        same = " (same value)" if self.same_value else ""
        return (
            f"{self.kind}{same} {self.kernel} [{self.buffer}] {lines} ({self.opcode}) x{self.count} {self.detail} "
            f"under {', '.join(sorted(self.schedules))}: {MEANING[self.kind]}"
        )


class Findings(dict):
    """By key, so that what is found again is counted."""

    def add(self, found: Iterable[Finding]) -> None:
        for f in found:
            if f.key in self:
                self[f.key].count += f.count
                self[f.key].schedules |= f.schedules
            else:
                self[f.key] = f

    def faults(self) -> list[Finding]:
        return sorted((f for f in self.values() if f.fails), key=lambda f: (f.kernel, f.kind, f.source))


def current_test() -> str:
    """The test that launches, for the text of a finding."""
    return os.environ.get("PYTEST_CURRENT_TEST", "-").split("::")[-1].removesuffix(" (call)")
