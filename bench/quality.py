"""One prompt, one answer: how likely its answers are, for how many forward passes one after the other.

    python bench/end_to_end.py quality --json quality.json         alpha 4, T = 64, 16 answers to each of three prompts
    python bench/end_to_end.py quality --json quality.json --tokens 64,128,192 --alpha 2,4 --eos off,on
    python bench/end_to_end.py quality --json quality.json --only mh-8x10,particles-32+0 --tokens 128
    python bench/end_to_end.py quality --clock --json quality.json         the wall clock of two of them, T = 128

A cell is one answer. Each is kept in the file as soon as it is there: after an interruption the same command goes on,
and other options add to the cells of the same file, also while another command writes to it. The table shows all cells
of the file.

--only takes methods, separated by commas:

plain            from the model, temperature 1
cold             from p^alpha normalised token by token, which is temperature 1/alpha
mh-BxS           Metropolis-Hastings, B blocks of S steps, one proposal at a time; mh-BxS-P in P lanes, which draw the
                 same answers in fewer steps, mh-BxS-default in as many as the driver chooses
particles-N+K    N particles and K sweeps; rows of the table are the start and each sweep of the same chains.
                 particles-N+K-rhoR: open answers that weigh little beside R/N of everything die out, which ends a chain
                 before T where its answers have
smc-N            plain sequential Monte Carlo, N particles that need not be distinct (smc.py)

The columns:

forwards/T       forward passes one after the other, over T: decode steps in which a row went through the model. What is
                 answered from memory is none
rows/T           rows that went through the model, over T, without the prompt's
log p            of the answers under the model, nats: the mean over prompts of the mean over answers, and its standard
                 error
given candidates the same, of particles and SMC: not of the one answer that the last sweep selects, but the mean over
                 this selection, given all its candidates. The same on average, with less noise; verdicts use it
tokens           of an answer, T where nothing ends one
each prompt      the mean for each prompt: given candidates, where there are such, or log p

Answers are independent, one random stream each, and drawn one at a time. With --alone K only the first K to each prompt
are; the others of plain, cold and Metropolis-Hastings run side by side, which takes less time and changes no law. Their
forward passes are not counted, since chains side by side share what is remembered.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import math
import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import common
import selection
import smc
import torch
import transformers
from common import Progress, Timed, spread, target, timed
from shapes import ENTROPY, MODELS, SMOLLM2, Subject, device_of, subject

SHORT_QUESTIONS = [
    "Which planet is closest to the sun, and is it the hottest one as well? Answer in one or two sentences.",
    "Name three birds that cannot fly and say in a few words how each escapes its enemies.",
    "Why does ice float on water? Answer in one sentence.",
]
METHODS = "plain,cold,mh-8x10,mh-8x10-4,mh-4x5,particles-4+2,particles-8+2,particles-16+2,particles-32+1,smc-16,smc-32"
SEED = 0


@dataclass(frozen=True)
class Setting:
    """The target: p^alpha e^(length_bonus n) over answers of at most `tokens` tokens. eos: whether a token ends one."""

    tokens: int
    alpha: float
    eos: bool
    length_bonus: float

    def __str__(self) -> str:
        ends = "EOS" if self.eos else "no EOS"
        bonus = f", lambda {self.length_bonus:g}" if self.length_bonus else ""
        return f"T = {self.tokens}, alpha {self.alpha:g}, {ends}{bonus}"


class Method:
    """One of --only. Raises ValueError for a name that is none."""

    FORM = re.compile(
        r"(plain|cold)|mh-(\d+)x(\d+)(?:-(\d+|default))?|particles-(\d+)\+(\d+)(?:-rho([\d.]+))?|smc-(\d+)"
    )

    def __init__(self, name: str):
        found = self.FORM.fullmatch(name)
        if found is None:
            raise ValueError(f"{name!r} is no method; the forms are plain, cold, mh-8x10, particles-16+1 and smc-16")
        self.name = name
        self.one_pass, self.blocks, self.steps, self.lanes, self.particles, self.sweeps, self.rho, self.smc = (
            found.groups()
        )

    @property
    def watched(self) -> bool:
        return bool(self.particles or self.smc)

    def config(self, setting: Setting):
        from power_kernels.api import PowerConfig

        target = {"alpha": setting.alpha, "max_new_tokens": setting.tokens, "length_bonus": setting.length_bonus}
        if self.watched:
            n, sweeps = int(self.particles or self.smc), int(self.sweeps or 0)
            return PowerConfig(kernel="particles", particles=n, sweeps=sweeps, rho=float(self.rho or 0), **target)
        if self.one_pass:
            target["alpha"] = 1.0 if self.one_pass == "plain" else setting.alpha
            return PowerConfig(block_size=None, mcmc_steps=0, lanes=1, **target)
        lanes = None if self.lanes == "default" else int(self.lanes or 1)
        block = -(-setting.tokens // int(self.blocks))
        return PowerConfig(block_size=block, mcmc_steps=int(self.steps), lanes=lanes, **target)

    def label(self, sweeps: int | None) -> str:
        if self.one_pass:
            return "plain" if self.one_pass == "plain" else "low temperature"
        if self.smc:
            return f"SMC, N = {self.smc}"
        if self.particles:
            after = f"{sweeps} sweep{'s' if sweeps > 1 else ''}" if sweeps else "start"
            return f"particles, N = {self.particles}, {'' if self.rho is None else f'rho {self.rho}, '}{after}"
        lanes = "" if self.lanes is None else f", {self.lanes} lanes"
        return f"MH {self.blocks} x {self.steps}{lanes}"


@dataclass(frozen=True)
class Point:
    """An answer at some cost. sweeps: of particles, those that were made; None for others. sequential, rows: None where
    they were not counted. mean_logp, mean_length: over the selection among the candidates."""

    sweeps: int | None
    sequential: int | None
    rows: int | None
    length: int
    logp: float
    mean_logp: float
    mean_length: float


# ----------------------------------------------------------------------------------------------------
# Cells


class Bench:
    def __init__(self, one: Subject):
        self.sampler, self.prompts = one.sampler, one.prompts

    def answers(self, method: Method, setting: Setting, prompt: int, wanted: list[int]) -> Iterator[tuple[int, list]]:
        """(which, its points) of each wanted answer, as soon as it is there."""
        if not method.watched:
            for result in self._results(method, setting, prompt, wanted):
                cost = (None, None)
                if len(wanted) == 1:
                    cost = (self.sampler.last_run.sequential, result.cost.forwarded - result.cost.prefill)
                length, logp = len(result.tokens), result.logp
                yield result.chain_id, [Point(None, *cost, length, logp, logp, length)]
            return
        for answer in wanted:
            with selection.watched(smc.smc if method.smc else selection.particles) as sweeps:
                (result,) = self._results(method, setting, prompt, [answer])
            points = _points(result, sweeps)
            if points[-1].sequential != self.sampler.last_run.sequential:
                raise AssertionError(f"{points[-1].sequential} forward passes were seen, {self.sampler.last_run}")
            if method.smc:
                points = [Point(**asdict(points[0]) | {"sweeps": None})]
            yield answer, points

    def _results(self, method: Method, setting: Setting, prompt: int, wanted: list[int]):
        others = {(prompt, chain) for chain in range(max(wanted) + 1) if chain not in wanted}
        stream = self.sampler.stream(
            [self.prompts[prompt]], method.config(setting), num_chains=max(wanted) + 1, skip=others, seed=SEED,
            eos_token_id=None if setting.eos else [], prompt_ids=[prompt], max_chains=len(wanted),
        )  # fmt: skip
        for result in stream:
            if result.finish == "fault":
                raise AssertionError(f"{method.name} met bad logits: {result.status}")
            yield result
        lanes = int(method.lanes or 1) if method.lanes != "default" and not method.watched else None
        if len(wanted) == 1 and (reason := common.shortfall(asdict(self.sampler.last_run), 1, lanes)):
            raise AssertionError(f"{method.name}: {reason}")


def _points(result, sweeps: list[selection.Sweep]) -> list[Point]:
    points, sequential, rows = [], 0, 0
    for i, (own, seen) in enumerate(zip(result.sweeps, sweeps, strict=True)):
        sequential, rows = sequential + seen.sequential, rows + own.rows
        points.append(Point(i, sequential, rows, own.n, own.logp, *seen.candidates.mean()))
    return points


def key(cell: dict) -> tuple:
    return tuple(cell[name] for name in ("method", "prompt", "answer", "tokens", "alpha", "eos", "length_bonus"))


# ----------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Mean:
    """The mean over prompts of means over answers, None of no answers. error: its standard error, None where a prompt
    has one answer."""

    value: float | None
    error: float | None
    prompts: dict[int, float]

    @staticmethod
    def of(values: dict[int, list[float]]) -> Mean:
        means = {prompt: statistics.fmean(own) for prompt, own in sorted(values.items())}
        error = None
        if not values:
            return Mean(None, None, {})
        if all(len(own) > 1 for own in values.values()):
            error = math.sqrt(sum(statistics.variance(own) / len(own) for own in values.values())) / len(values)
        return Mean(statistics.fmean(means.values()), error, means)

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")


def rows_of(cells: list[dict]) -> list[dict]:
    """A row a setting, method and number of sweeps, in the order in which they came."""
    groups: dict[tuple, list[tuple[int, dict]]] = {}
    for cell in cells:
        setting = Setting(cell["tokens"], cell["alpha"], cell["eos"], cell["length_bonus"])
        for point in cell["points"]:
            groups.setdefault((setting, cell["method"], point["sweeps"]), []).append((cell["prompt"], point))
    order = {setting: i for i, setting in enumerate(dict.fromkeys(setting for setting, *_ in groups))}
    rows = []
    for (setting, method, sweeps), points in sorted(groups.items(), key=lambda item: order[item[0][0]]):
        found = {}
        for name in ("sequential", "rows", "logp", "mean_logp", "length"):
            values: dict[int, list[float]] = {}
            for prompt, point in points:
                if point[name] is not None:
                    values.setdefault(prompt, []).append(point[name])
            found[name] = asdict(Mean.of(values))
        of = {"method": method, "sweeps": sweeps, "label": Method(method).label(sweeps), "answers": len(points)}
        rows.append({"setting": asdict(setting)} | of | found)
    return rows


def table(rows: list[dict]) -> str:
    form = "{:>36} | {:>7} | {:>10} {:>8} | {:>15} {:>16} | {:>7} | {}"
    columns = ("", "answers", "forwards/T", "rows/T", "log p", "given candidates", "tokens", "each prompt")
    lines, before = [], None
    for row in rows:
        setting = Setting(**row["setting"])
        if setting != before:
            lines += ["", str(setting), form.format(*columns)]
            before = setting
        t, method = setting.tokens, Method(row["method"])
        lines.append(
            form.format(
                row["label"],
                row["answers"],
                *("" if row[of]["value"] is None else f"{row[of]['value'] / t:.2f}" for of in ("sequential", "rows")),
                str(Mean(**row["logp"])),
                str(Mean(**row["mean_logp"])) if method.watched else "",
                f"{row['length']['value']:.1f}",
                "  ".join(f"{value:.1f}" for value in row["mean_logp"]["prompts"].values()),
            )
        )
    return "\n".join(lines[1:])


def verdicts(rows: list[dict], clock: list[dict]) -> list[dict]:
    """What must hold at alpha 4, without EOS, where it was measured; and of the wall clock."""

    def row(method: str, sweeps: int | None, tokens: int) -> dict | None:
        """Of particles any run with as many sweeps or more."""
        setting = asdict(Setting(tokens, 4.0, False, 0.0))
        own = [r for r in rows if r["setting"] == setting and r["sweeps"] == sweeps and "rho" not in r["method"]]
        own = [r for r in own if r["method"].split("+")[0] == method]
        return max(own, key=lambda r: r["answers"], default=None)

    def above(one: dict | None, tokens: int) -> tuple[float | None, str, list[float]]:
        """Nats above Metropolis-Hastings: on average, its standard error for the name, on each prompt of both."""
        other = row("mh-8x10", None, tokens)
        if one is None or other is None:
            return None, "", []
        own, theirs = Mean(**one["mean_logp"]), Mean(**other["mean_logp"])
        both = [own.prompts[p] - theirs.prompts[p] for p in own.prompts if p in theirs.prompts]
        errors = (own.error, theirs.error)
        known = "" if None in errors else f" (standard error {math.hypot(*errors):.2f})"
        return statistics.fmean(both) if both else None, known, both

    def over(one: dict | None, what: str) -> float | None:
        value = one and one[what]["value"]
        return value and value / one["setting"]["tokens"]

    one, start, longer = row("particles-16", 1, 64), row("particles-32", 0, 64), row("particles-32", 0, 128)
    found = []
    for of, name, forwards, nats in ((one, "N = 16, one sweep", 2.05, 2.0), (start, "N = 32, start", 1.02, 2.5)):
        value, error, _ = above(of, 64)
        found += [
            target(f"T = 64, {name}: forward passes one after the other, over T", over(of, "sequential"), forwards),
            target(f"T = 64, {name}: nats above MH 8 x 10{error}", value, nats, at_most=False),
        ]
    *_, each = above(longer, 128)
    prompts = sum(nats >= 10 for nats in each) if each else None
    name = f"T = {CLOCK_TOKENS}, N = 16, one sweep: wall time over MH 8 x 10, default lanes"
    return [
        target("T = 64, N = 16, one sweep: rows, over T", over(one, "rows"), 31),
        *found,
        target("T = 128, N = 32, start: prompts at least 10 nats above MH 8 x 10", prompts, 2, at_most=False),
        target(name, clock_ratio([cell for cell in clock if cell["tokens"] == CLOCK_TOKENS]), 0.5),
    ]


# ----------------------------------------------------------------------------------------------------
# The wall clock

CLOCK_TOKENS = 128
CLOCKED = {"mh-8x10-default": "MH 8 x 10, default lanes", "particles-16+1": "particles, N = 16, one sweep"}


def clock_cell(bench: Bench, setting: Setting, pair: int, say) -> dict:
    """Both once on the first prompt, the other one first in every other pair."""
    runs: dict[str, Timed] = {}
    for name in list(CLOCKED)[:: 1 if pair % 2 == 0 else -1]:
        say(f"clock, pair {pair}: {CLOCKED[name]}")
        config = Method(name).config(setting)
        runs[name] = timed(
            lambda config=config: bench.sampler.generate(
                bench.prompts[:1], config, seed=pair, eos_token_id=[], max_chains=1
            ),
            bench.sampler,
            bench.sampler.engine.device,
        )
        say(f"    {runs[name].wall:.1f} s, {runs[name].report['lanes']} lanes")
    return {"pair": pair, "tokens": setting.tokens, "runs": {name: vars(run) for name, run in runs.items()}}


def clock_ratio(cells: list[dict]) -> float | None:
    """Median wall time of particles over that of Metropolis-Hastings."""
    if not cells:
        return None
    mh, particles = ([cell["runs"][name]["wall"] for cell in cells] for name in CLOCKED)
    return statistics.median(particles) / statistics.median(mh)


def clock_tables(clock: list[dict]) -> list[str]:
    lines = []
    for tokens in sorted({cell["tokens"] for cell in clock}):
        cells = [cell for cell in clock if cell["tokens"] == tokens]
        lines.append(f"wall clock, one prompt, T = {tokens}, {len(cells)} pairs: median [extremes]")
        for name, label in CLOCKED.items():
            wall, cpu = (common.shown(spread(cell["runs"][name][of] for cell in cells)) for of in ("wall", "cpu"))
            lines.append(f"{label:>28}: {wall} s, processor {cpu} s")
        lines.append(f"{'ratio of medians':>28}: {clock_ratio(cells):.2f}")
    return lines


# ----------------------------------------------------------------------------------------------------
# The command


class Kept:
    """Everything that was measured: cells and pairs of the wall clock, in the file at `path` where one is given."""

    def __init__(self, path: str | None, one: Subject):
        """Raises ValueError for a file of something else."""
        self.path, self.one = path, one
        self.cells: dict[tuple, dict] = {}
        self.clock: dict[tuple[int, int], dict] = {}
        self.merge()

    def merge(self) -> None:
        """Take over what the file has, also from a command that runs at the same time."""
        if self.path is None or not Path(self.path).exists():
            return
        found = json.loads(Path(self.path).read_text())
        if found.get("suite") != "quality" or (found["name"], found["prompts"]) != (self.one.name, self.one.prompts):
            raise ValueError(f"{self.path} is not a result of this suite with this model and these prompts")
        for cell in found["cells"]:
            self.cells.setdefault(key(cell), cell)
        for cell in found["clock"]:
            self.clock.setdefault((cell["tokens"], cell["pair"]), cell)

    def write(self, arguments, info: dict) -> dict:
        """Merge and write. Returns the document. One command at a time does so."""
        if self.path is None:
            return self.document(arguments, info)
        folder = Path(self.path).parent
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.merge()
            document = self.document(arguments, info)
            common.write(self.path, document)
        finally:
            os.close(lock)
        return document

    def document(self, arguments, info: dict) -> dict:
        cells, clock = list(self.cells.values()), list(self.clock.values())
        rows = rows_of(cells)
        return {
            "suite": "quality",
            "setting": {name: value for name, value in vars(arguments).items() if name != "json"},
            "name": self.one.name,
            "model": self.one.about,
            "prompts": self.one.prompts,
            "machine": info,
            "table": rows,
            "targets": verdicts(rows, clock),
            "clock": clock,
            "cells": cells,
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, choices=MODELS, help="smollm2, or a shape with random weights")
    parser.add_argument("--device", help="cpu or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--only", default=METHODS, help=f"methods ({METHODS})")
    parser.add_argument("--tokens", default="64", help="lengths T (64)")
    parser.add_argument("--alpha", default="4", help="powers (4)")
    parser.add_argument("--eos", default="off", help="whether the end token ends answers: off, on (off)")
    parser.add_argument("--length-bonus", default="0", help="values of lambda, nats a token (0)")
    parser.add_argument("--answers", type=int, help="to each prompt (16)")
    parser.add_argument("--prompts", type=int, default=len(SHORT_QUESTIONS), help=f"at most ({len(SHORT_QUESTIONS)})")
    parser.add_argument("--alone", type=int, help="to each prompt, drawn one at a time (all)")
    parser.add_argument("--seconds", type=float, help="no cell is begun later (no limit)")
    parser.add_argument("--clock", action="store_true", help="the wall clock instead, at T = 128")
    parser.add_argument("--pairs", type=int, default=5, help="of the wall clock (5)")
    parser.add_argument("--entropy", type=float, default=ENTROPY, help=f"nats, of random weights ({ENTROPY})")
    parser.add_argument("--quick", action="store_true", help="T = 8, two prompts, two answers: no figure to quote")
    parser.add_argument("--json", metavar="OUT", help="keep every answer and the table in this file, and go on from it")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a measured target is missed")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.tokens, arguments.prompts = "8", min(arguments.prompts, 2)
        arguments.pairs = 1
    if arguments.answers is None:
        arguments.answers = 2 if arguments.quick else 16
    try:
        methods = [Method(name) for name in arguments.only.split(",")]
        settings = [
            Setting(int(tokens), float(alpha), {"off": False, "on": True}[eos], float(bonus))
            for tokens, alpha, eos, bonus in itertools.product(
                *(getattr(arguments, name).split(",") for name in ("tokens", "alpha", "eos", "length_bonus"))
            )
        ]
        for method, setting in itertools.product(methods, settings):
            method.config(setting)
    except (KeyError, ValueError) as error:
        parser.error(str(error))
    for name, least, most in (
        ("answers", 1, None),
        ("alone", 0, None),
        ("prompts", 1, len(SHORT_QUESTIONS)),
        ("pairs", 1, None),
    ):
        value = getattr(arguments, name)
        if value is not None and (value < least or (most is not None and value > most)):
            parser.error(f"--{name} must be at least {least}" + (f" and at most {most}" if most else ""))
    try:
        device = device_of(arguments.device)
    except RuntimeError as error:
        print(f"quality: {common.NOT_MEASURED}: {error}")
        return 2
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()

    one = subject(arguments.model, device, len(SHORT_QUESTIONS), SHORT_QUESTIONS, entropy=arguments.entropy)
    one = replace(one, plain=None)  # a copy of the model for opponents that are none of these
    if any(setting.eos for setting in settings) and not one.sampler.engine.eos_token_ids:
        parser.error("--eos has on; this model has no end token")
    try:
        kept = Kept(arguments.json, one)
    except ValueError as error:
        parser.error(str(error))
    bench, info, say = Bench(one), common.machine(device), Progress()
    print(f"{one.about}; {arguments.prompts} prompts\n{common.machine_text(info)}\n", flush=True)

    def keep() -> None:
        kept.write(arguments, info)

    if arguments.clock:
        setting = Setting(8 if arguments.quick else CLOCK_TOKENS, 4.0, False, 0.0)
        _clock(bench, setting, arguments, kept.clock, say, keep)
    else:
        _cells(bench, settings, methods, arguments, kept.cells, say, keep)
    result = kept.write(arguments, info)
    if result["cells"]:
        print(table(result["table"]))
    if result["clock"]:
        print("\n" + "\n".join(clock_tables(result["clock"])))
    print("\n" + common.targets_text(result["targets"]))
    if arguments.json:
        print(f"written to {arguments.json}")
    return 1 if arguments.check and common.missed(result["targets"]) else 0


def _cells(bench: Bench, settings, methods, arguments, cells: dict[tuple, dict], say, keep) -> None:
    """Every setting after the other; in it an answer of every method to every prompt, then the next one."""
    for setting, first in itertools.product(settings, range(arguments.answers)):
        for prompt, method in itertools.product(range(arguments.prompts), methods):
            alone = arguments.answers if method.watched or arguments.alone is None else arguments.alone
            if first > alone:
                continue
            asked = [first] if first < alone else range(first, arguments.answers)
            fresh = {
                answer: {"method": method.name, "prompt": prompt, "answer": answer} | asdict(setting)
                for answer in asked
            }
            wanted = [answer for answer, cell in fresh.items() if key(cell) not in cells]
            if not wanted:
                continue
            if arguments.seconds is not None and say.elapsed > arguments.seconds:
                return
            say(f"{setting}: {method.name}, prompt {prompt}, answers {', '.join(map(str, wanted))}")
            begin = time.process_time()
            for answer, points in bench.answers(method, setting, prompt, wanted):
                cell = fresh[answer] | {"points": [asdict(point) for point in points]}
                cells[key(cell)] = cell
                keep()
            say(f"    log p {points[-1].mean_logp:.1f}, {time.process_time() - begin:.1f} s of processor")


def _clock(bench: Bench, setting: Setting, arguments, clock: dict[tuple[int, int], dict], say, keep) -> None:
    """One short pair first, which no figure counts: the driver measures steps before it chooses the lanes."""
    wanted = [pair for pair in range(arguments.pairs) if (setting.tokens, pair) not in clock]
    if wanted:
        clock_cell(bench, Setting(8, 4.0, False, 0.0), 0, lambda text: None)
    for pair in wanted:
        if arguments.seconds is not None and say.elapsed > arguments.seconds:
            return
        clock[setting.tokens, pair] = clock_cell(bench, setting, pair, say)
        keep()


if __name__ == "__main__":
    raise SystemExit(main())
