"""What the suites of bench/end_to_end.py share: prompts, the timed call and its record, ratios, the machine, files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import opponents
import torch
import transformers

SCHEMA = 1
NOT_MEASURED = "not measured"

# With the chat template the first three are 69, 82 and 86 tokens long. To T = 128 in 4 blocks of 4 steps the published
# algorithm then forwards (20 P + 1580) / (P + 127) = 15.1 to 15.5 times plain, whose range others report for it.
QUESTIONS = [
    "My tomato plants have yellow leaves near the bottom of the stem, and some of the leaves have small "
    "brown spots. What are the likely causes, and what should I do about it this week?",
    "A baker has 240 rolls. In the morning she sells a quarter of them, at noon half of what is left, and "
    "in the afternoon she gives a dozen to a school. How many rolls are left in the evening? Show each step.",
    "Write a short story for a child of six about a lighthouse keeper who is afraid of the dark, and "
    "about the gull that helps him to light the lamp on the night of a great storm. Let the story have a "
    "beginning, a middle and an end, and a title.",
    "Explain to someone who has never programmed what a function is, why programmers use functions, and "
    "give one small example from everyday life and one in Python, with a comment on each line.",
    "I will visit Lisbon for two days in October with my parents, who cannot walk far. Suggest a plan for "
    "each day, with places to eat, and tell us which sights we should leave out.",
    "Compare the ways in which a bicycle and a train waste energy at a speed of thirty kilometres an "
    "hour, and say which of the two is the more efficient for one passenger, and why.",
]
# 64 different prompts of different lengths, so that nothing but the chat template's beginning could be shared.
SUBJECTS = (
    "why the sky is blue", "how bread rises", "what a mortgage is", "how a bicycle stays upright when it is moving",
    "why leaves turn yellow and red in autumn", "how a vaccine works", "what the moon does to the tides",
    "why old houses have thick walls and small windows",
)  # fmt: skip
READERS = (
    "a child of six", "a farmer", "a judge who has ten minutes", "a student of law", "somebody who learns English",
    "a class of twelve-year-olds that has just come back from lunch", "an engineer", "my grandmother, who was a nurse",
)  # fmt: skip


def many_questions(count: int) -> list[str]:
    """The first `count` of 64 questions, all different."""
    every = [f"Explain to {reader} {subject}." for reader in READERS for subject in SUBJECTS]
    return every[:count]


# ----------------------------------------------------------------------------------------------------
# One timed call


@dataclass
class Timed:
    """One timed call: seconds of processor and of wall clock, and what came out, summed over its answers.

    outcomes and left, a list an answer: what became of each step, and the position where its proposal left the answer,
    -1 where it did not (PowerResult.outcomes, .left). report: the driver's own account of the call (RunReport).
    """

    cpu: float
    wall: float
    forwarded: int
    answers: list[list[int]]
    logp: list[float]
    steps: int = 0
    accepted: int = 0
    unchanged: int = 0
    account: dict[str, int | None] = field(default_factory=dict)
    outcomes: list[list[int]] = field(default_factory=list)
    left: list[list[int]] = field(default_factory=list)
    report: dict = field(default_factory=dict)


ACCOUNT = (
    "prefill", "extension", "proposal", "accepted", "rejected", "voided", "recalled", "saved_prefix", "saved_early",
)  # fmt: skip


def timed(call: Callable[[], object], sampler=None, device: torch.device | str = "cpu") -> Timed:
    """Run and record. sampler: where the call went through one, its `last_run` is kept."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    out = call()
    wait()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if isinstance(out, opponents.Run):
        return Timed(cpu, wall, out.forwarded, out.answers, out.logp, out.steps, out.accepted, out.unchanged)
    return Timed(
        cpu,
        wall,
        sum(result.cost.forwarded for result in out),
        [result.tokens for result in out],
        [result.logp for result in out],
        sum(result.steps for result in out),
        sum(result.accepted for result in out),
        sum(result.unchanged for result in out),
        {name: _total(getattr(result.cost, name) for result in out) for name in ACCOUNT},
        [[int(outcome) for outcome in result.outcomes] for result in out],
        [list(result.left) for result in out],
        run_report(sampler) if sampler is not None else {},
    )


def _total(values: Iterable[int | None]) -> int | None:
    """None where one of them is not known (what early rejection saved, when answers can end early)."""
    values = list(values)
    return None if None in values else sum(values)


def run_report(sampler) -> dict:
    """`PowerSampler.last_run` as plain data."""
    return asdict(sampler.last_run) | {"filled": sampler.last_run.filled}


def shortfall(report: dict, slots: int, lanes: int | None) -> str | None:
    """Why a call is not the one that was asked for; None: it is.

    Where memory is short the driver warns and runs fewer chains at once, or fewer lanes. lanes: None leaves them to it,
    and with them how many chains run at once.
    """
    if lanes is None and not report["restarts"]:
        return None
    lanes = report["lanes"] if lanes is None else lanes
    if (report["slots"], report["lanes"], report["restarts"]) == (slots, lanes, 0):
        return None
    again = f", after {report['restarts']} that ran out of memory" if report["restarts"] else ""
    ran = f"{report['slots']} x {report['lanes']} lanes ran{again}"
    return f"memory did not hold {slots} x {lanes} lanes at once ({ran})"


def driver_fraction(seconds: dict[str, float]) -> float | None:
    """The driver's own share of the decode steps: everything but the model's forward pass and prefill.

    None where steps were replayed from a recording: the host's clock then only sees the launches.
    """
    if seconds.get("replay"):
        return None
    total = sum(value for phase, value in seconds.items() if phase != "prefill")
    return 1 - seconds["forward"] / total if total else None


def useful_fraction(report: dict) -> float | None:
    """Rows that brought an extension or a proposal on, over all that went through the model."""
    return report["useful_lane_steps"] / report["lane_steps"] if report.get("lane_steps") else None


def filled_fraction(report: dict) -> float | None:
    """`RunReport.filled`: tokens drawn, over decode steps times rows of the plan. None where no step was made."""
    return report["filled"] if report.get("row_steps") else None


# ----------------------------------------------------------------------------------------------------
# Ratios


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median and extremes; None of nothing."""
    values = list(values)
    return {"median": statistics.median(values), "low": min(values), "high": max(values)} if values else None


def shown(value: dict[str, float] | None, digits: int = 2) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value['median']:.{digits}f} [{value['low']:.{digits}f}-{value['high']:.{digits}f}]"


def target(name: str, value: float | None, bound: float, *, at_most: bool = True) -> dict:
    """One thing that must hold; met is None where it was not measured."""
    met = None if value is None else value <= bound if at_most else value >= bound
    return {"target": name, "value": value, "bound": bound, "at_most": at_most, "met": met}


def missed(found: list[dict]) -> bool:
    """Whether a target was measured and does not hold: what `--check` asks. What was not measured is not missed."""
    return any(item["met"] is False for item in found)


def targets_text(found: list[dict]) -> str:
    marks = {True: "ok  ", False: "MISS", None: "    "}
    lines = []
    for item in found:
        value = NOT_MEASURED if item["value"] is None else f"{item['value']:.2f}"
        bound = f"at {'most' if item['at_most'] else 'least'} {item['bound']}"
        lines.append(f"{marks[item['met']]} {item['target']}: {value} ({bound})")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------
# The machine, the progress, the file


def machine(device: torch.device | str = "cpu") -> dict:
    device = torch.device(device)
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device_type": device.type,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "backend": backend(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "cuda": torch.version.cuda or torch.version.hip}
    return found


def machine_text(found: dict) -> str:
    return (
        f"{found['gpu'] + '; ' if 'gpu' in found else ''}{found['cpu']}, {found['cores']} cores, {found['threads']} "
        f"thread{'s' if found['threads'] > 1 else ''}, load {found['load']:.1f}; torch {found['torch']}, "
        f"transformers {found['transformers']}; kernels: {found['backend']}"
    )


def backend(device: torch.device | str = "cpu") -> str:
    """Which implementation serves a device: without the extension a CPU's figures are the reference's."""
    import power_kernels

    return power_kernels.backend_for(torch.device(device))


class Progress:
    """Lines on the error stream: one before each call. rounds: how many there will be, None where nobody knows."""

    def __init__(self, rounds: int | None = None):
        self.started, self.done, self.rounds = time.perf_counter(), 0, rounds

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def __call__(self, text: str) -> None:
        if text.startswith(" "):  # what came of the call before
            print(f"[{text.strip()}]", file=sys.stderr, flush=True)
            return
        self.done += 1
        count = f"{self.done}/{self.rounds}" if self.rounds else f"{self.done}"
        print(f"[{count}, {self.elapsed:.0f} s] {text}", file=sys.stderr, flush=True)


def write(path: str | Path | None, document: dict) -> None:
    """The whole file or the old one, so that an interruption keeps what was measured before it."""
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps({"schema": SCHEMA, **document}, indent=1) + "\n")
    beside.replace(path)
