"""Many prompts in steps of a fixed number of rows: answers per second, and what the rows do meanwhile.

    python bench/end_to_end.py throughput                     SmolLM2, 64 prompts, 16 rows, T = 64: 7 minutes
    python bench/end_to_end.py throughput --model qwen2.5-7b --device cuda --slots 64

Plain generation comes first and last and its mean is taken; in between our engine's plain sampling, power sampling
and the published algorithm one answer at a time, as it is published, on the first --published prompts. Answers run to
their full length, so that all methods write the same number of tokens. All power sampling follows the same schedule.

answers/s      answers over wall time; tokens/s: their tokens over wall time
over plain     answers per second over those of plain generation at the same batch (transformers' generate, left-padded)
forwarded      tokens forwarded an answer
useful         rows that went through the model for an extension or a proposal, over all rows that did
filled         tokens drawn, over steps times rows of the plan: a lane that waits or idles is empty, and so is a slot
               that is free while the last answers end
driver         the driver's own share of a decode step: all but the model's forward pass (by the host's clock; not where
               steps are replayed from a recording, whose parts `decode` measures)
accepted       steps that kept the proposal (in brackets: steps that changed the answer)

The driver plans power sampling in at most as many rows a step as there are --slots, which is plain generation's batch:
so many chains at once while others wait, more lanes of each when the last ones end. It measures decode steps in the
first call of a model and device. That call is in the warm-up, so this cost, which a user pays once, is in no figure.
With --lanes P each chain has P lanes all along; where memory holds fewer than that, the method is not measured.
"""

from __future__ import annotations

import argparse

import common
import opponents
import torch
import transformers
from common import NOT_MEASURED, Progress, Timed, many_questions, target, timed
from shapes import ENTROPY, MODELS, SMOLLM2, Subject, device_of, subject

METHODS = ("plain", "engine", "ours", "published")
LABELS = {
    "plain": "plain generate, batch {slots}",
    "engine": "plain sampling, our engine, {slots} slots",
    "ours": "power_kernels, {slots} slots, {lanes} lane{s}",
    "published": "published algorithm, one at a time",
}
# (prompts, slots, tokens, blocks, steps, answers of the published algorithm) by kind of device.
SIZES = {"quick": (6, 4, 12, 3, 2, 1), "cpu": (64, 16, 64, 4, 4, 2), "cuda": (64, 64, 576, 3, 10, 1)}
# What must hold: useful lane-steps; the driver's share on a CPU; answers per second over the published one's on a GPU.
TARGETS = {"filled": 0.92, "driver": 0.10, "published": 50.0}


class Bench:
    """All prompts by each method."""

    def __init__(self, one: Subject, slots: int, lanes: int | None, published: int, schedule: dict):
        from power_kernels.api import PowerConfig

        self.subject, self.config, self.slots, self.lanes = one, PowerConfig, slots, lanes
        self.published, self.schedule = published, schedule

    def call(self, method: str, seed: int) -> Timed:
        one, tokens = self.subject, self.schedule["max_new_tokens"]
        plain = self.config(alpha=1.0, max_new_tokens=tokens, block_size=None, mcmc_steps=0, lanes=1)
        power = self.config(lanes=self.lanes, **self.schedule)
        if method in ("engine", "ours"):
            config = plain if method == "engine" else power
            one.sampler.engine.most_rows = self.slots
            return timed(
                lambda: one.sampler.generate(one.prompts, config, seed=seed, eos_token_id=[], max_chains=self.slots),
                one.sampler,
                one.device,
            )
        return timed(self._batches if method == "plain" else self._published, device=one.device)

    def _batches(self) -> opponents.Run:
        """transformers' generate over the prompts, in batches of as many as there are slots."""
        total = opponents.Run([])
        for first in range(0, len(self.subject.prompts), self.slots):
            batch = self.subject.prompts[first : first + self.slots]
            _add(
                total,
                opponents.plain(self.subject.plain, batch, max_new_tokens=self.schedule["max_new_tokens"], seed=first),
            )
        return total

    def _published(self) -> opponents.Run:
        total = opponents.Run([])
        for seed, prompt in enumerate(self.subject.prompts[: self.published]):
            _add(total, opponents.published(self.subject.plain, prompt, seed=seed, **self.schedule))
        return total

    def warm_up(self, methods: list[str]) -> None:
        schedule, prompts, published = self.schedule, self.subject.prompts, self.published
        self.schedule = schedule | {"max_new_tokens": 4, "block_size": 2}
        self.subject.prompts, self.published = prompts[: self.slots], 1
        for method in methods:
            self.call(method, 0)
        self.schedule, self.subject.prompts, self.published = schedule, prompts, published


def _add(total: opponents.Run, run: opponents.Run) -> None:
    for name, value in vars(run).items():
        setattr(total, name, getattr(total, name) + value)


def summary(method: str, run: Timed, plain: Timed | None, slots: int, lanes: int | None) -> dict:
    """One row of the table; plain: the run of plain generation, None where it did not run.

    slots and lanes are those that were asked for (lanes: None for the driver's choice, of both).
    """
    answers = len(run.answers)
    rate = answers / run.wall
    report = run.report
    if report and (reason := common.shortfall(report, slots, lanes)):
        return {"method": method, "slots": report["slots"], "lanes": report["lanes"], "not_measured": reason}
    seconds = report.get("seconds", {})
    return {
        "method": method,
        "answers": answers,
        "wall": run.wall,
        "cpu": run.cpu,
        "answers_per_s": rate,
        "tokens_per_s": sum(map(len, run.answers)) / run.wall,
        "forwarded_per_answer": run.forwarded / answers,
        "forwarded_per_s": run.forwarded / run.wall,
        "over_plain": rate * plain.wall / len(plain.answers) if plain else None,
        "lanes": report.get("lanes"),
        "slots": report.get("slots"),
        "useful": common.useful_fraction(report),
        "widened": report.get("widened"),
        "filled": common.filled_fraction(report),
        "driver": common.driver_fraction(seconds) if report else None,
        "seconds": seconds,
        "decode_steps": report.get("decode_steps"),
        "acceptance": (run.accepted + run.unchanged) / run.steps if run.steps else None,
        "changed": run.accepted / run.steps if run.steps else None,
        "account": run.account,
    }


def label(row: dict, slots: int) -> str:
    """slots: plain generation's batch; the driver's own runs are called by what ran."""
    lanes, slots = row["lanes"], row["slots"] or slots
    return LABELS[row["method"]].format(slots=slots, lanes=lanes, s="" if lanes == 1 else "s")


def table(rows: list[dict], slots: int) -> str:
    form = "{:38} {:>7} | {:>9} {:>9} {:>10} | {:>9} | {:>6} {:>6} {:>6} | {:>11}"
    columns = ("answers", "answers/s", "tokens/s", "over plain", "forwarded", "useful", "filled", "driver", "accepted")
    lines = [form.format("", *columns)]
    for row in rows:
        if "not_measured" in row:
            lines.append(f"{label(row, slots):38} {NOT_MEASURED}: {row['not_measured']}")
            continue
        lines.append(
            form.format(
                label(row, slots),
                row["answers"],
                f"{row['answers_per_s']:.3g}",
                f"{row['tokens_per_s']:.3g}",
                "" if row["over_plain"] is None else f"{row['over_plain']:.3f}",
                f"{row['forwarded_per_answer']:.0f}",
                "" if row["useful"] is None else f"{row['useful']:.0%}",
                "" if row["filled"] is None else f"{row['filled']:.0%}",
                "" if row["driver"] is None else f"{row['driver']:.0%}",
                "" if row["acceptance"] is None else f"{row['acceptance']:.2f} ({row['changed']:.2f})",
            )
        )
    for row in rows:
        if row.get("seconds"):
            steps = row["decode_steps"]
            parts = ", ".join(
                f"{phase} {1e3 * value / steps:.2f}"
                for phase, value in row["seconds"].items()
                if phase != "prefill" and (value or phase != "replay")
            )
            prefill = row["seconds"]["prefill"]
            lines.append(f"{label(row, slots)}: {steps} steps, ms a step: {parts}; prefill {prefill:.2f} s in all")
    return "\n".join(lines)


def verdicts(rows: list[dict], device_type: str) -> list[dict]:
    by = {row["method"]: row for row in rows}
    ours, published = by.get("ours"), by.get("published")
    found = []
    if ours:
        # The stricter of the two shares: on a CPU an idle lane does not go through the model and is not in the other.
        filled, driver = ours.get("filled"), ours.get("driver")
        found.append(target("share of rows that drew a token", filled, TARGETS["filled"], at_most=False))
        found.append(target("the driver's own share of a step", driver, TARGETS["driver"]))
    if ours and published and device_type == "cuda":
        ratio = None if "not_measured" in ours else ours["answers_per_s"] / published["answers_per_s"]
        found.append(
            target("answers per second over the published algorithm", ratio, TARGETS["published"], at_most=False)
        )
    return found


def document(arguments, one: Subject, runs: dict[str, Timed], info: dict) -> dict:
    slots, lanes = min(arguments.slots, len(one.prompts)), {"engine": 1, "ours": arguments.lanes or None}
    rows = [summary(method, run, runs.get("plain"), slots, lanes.get(method)) for method, run in runs.items()]
    return {
        "suite": "throughput",
        "labels": {row["method"]: label(row, arguments.slots) for row in rows},
        "setting": {key: value for key, value in vars(arguments).items() if key != "json"},
        "model": one.about,
        "prompt_lengths": [len(prompt) for prompt in one.prompts],
        "machine": info,
        "table": rows,
        "targets": verdicts(rows, one.device.type),
        "cells": [{"runs": {method: vars(run) for method, run in runs.items()}}],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, choices=MODELS, help="smollm2, or a shape with random weights")
    parser.add_argument("--device", help="cpu or cuda:N (default: a GPU where there is one)")
    for name, words in (
        ("prompts", "prompts, at most 64"),
        ("slots", "the most rows of a step, and plain generation's batch"),
        ("tokens", "length of every answer"),
        ("blocks", "stages"),
        ("steps", "steps of a stage"),
        ("published", "answers by the published algorithm, one at a time"),
    ):
        values = "/".join(str(SIZES[kind][_PLACES[name]]) for kind in ("cpu", "cuda"))
        parser.add_argument(f"--{name}", type=int, help=f"{words} (CPU/GPU: {values})")
    parser.add_argument("--lanes", type=int, default=0, help="of each chain all along; 0 leaves them to the driver (0)")
    parser.add_argument("--alpha", type=float, default=4.0)
    parser.add_argument("--entropy", type=float, default=ENTROPY, help=f"nats, of random weights ({ENTROPY})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(METHODS), help=f"of {','.join(METHODS)}")
    parser.add_argument("--quick", action="store_true", help="six prompts, 12 tokens: no figure to quote")
    parser.add_argument("--json", metavar="OUT", help="write the runs and the table to this file after each run")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a measured target is missed")
    arguments = parser.parse_args(argv)
    try:
        device = device_of(arguments.device)
    except RuntimeError as error:
        print(f"throughput: {NOT_MEASURED}: {error}")
        return 2
    sizes = SIZES["quick" if arguments.quick else device.type]
    for name, place in _PLACES.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, sizes[place])
        if getattr(arguments, name) < (0 if name in ("steps", "published") else 1):
            parser.error(f"--{name} is {getattr(arguments, name)}, which is too small")
    if arguments.prompts > 64 or arguments.blocks > arguments.tokens or arguments.lanes < 0:
        parser.error("there are 64 prompts, no more blocks than tokens, and no negative number of lanes")
    methods = arguments.only.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--only knows {', '.join(METHODS)}; not {', '.join(sorted(unknown))}")
    if not arguments.published:
        methods = [method for method in methods if method != "published"]
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()

    one = subject(arguments.model, device, arguments.prompts, many_questions(64), entropy=arguments.entropy)
    schedule = {
        "alpha": arguments.alpha,
        "max_new_tokens": arguments.tokens,
        "block_size": -(-arguments.tokens // arguments.blocks),
        "mcmc_steps": arguments.steps,
    }
    bench = Bench(one, arguments.slots, arguments.lanes or None, arguments.published, schedule)
    bench.warm_up(methods)
    info = common.machine(device)
    print(
        f"{one.about}; {len(one.prompts)} prompts; T = {arguments.tokens}, {arguments.blocks} blocks, "
        f"{arguments.steps} steps a block, alpha {arguments.alpha:g}\n{common.machine_text(info)}\n",
        flush=True,
    )
    order = [method for method in METHODS if method in methods] + (["plain"] if "plain" in methods else [])
    say, runs = Progress(len(order)), {}
    for method in order:
        say(
            LABELS[method].format(
                slots=arguments.slots, lanes=arguments.lanes or "default", s="s"[arguments.lanes == 1 :]
            )
        )
        run = bench.call(method, arguments.seed)
        if any(len(answer) != arguments.tokens for answer in run.answers):
            raise AssertionError(f"{method} ended an answer before {arguments.tokens} tokens")
        if method in runs:
            first = runs[method]
            first.cpu, first.wall = (first.cpu + run.cpu) / 2, (first.wall + run.wall) / 2
        else:
            runs[method] = run
        common.write(arguments.json, document(arguments, one, runs, info))
    result = document(arguments, one, runs, info)
    print(table(result["table"], arguments.slots))
    print("\n" + common.targets_text(result["targets"]))
    if arguments.json:
        print(f"written to {arguments.json}")
    return 1 if arguments.check and common.missed(result["targets"]) else 0


_PLACES = {"prompts": 0, "slots": 1, "tokens": 2, "blocks": 3, "steps": 4, "published": 5}


if __name__ == "__main__":
    raise SystemExit(main())
