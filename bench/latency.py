"""One prompt, one answer: how much sooner it is there with prefetch lanes.

    python bench/end_to_end.py latency                        SmolLM2, T = 192, 8 blocks of 24, 10 steps: 8 minutes
    python bench/end_to_end.py latency --lanes 1,default      only these, so that more cells fit the time
    python bench/end_to_end.py latency --model qwen2.5-7b --device cuda --setting paper --lanes default

Each pair (prompt, seed) is a cell. In a cell each number of lanes runs once, in an order of its own, between two runs
of plain generation by the same engine (alpha = 1, no steps, one lane), whose mean is taken. Cells are begun as long as
the longest so far would still end within --seconds, one at least; they go through the prompts, then the seeds. The
table gives medians over cells, in brackets the extremes:

lanes          of one chain; "default" is what the driver chooses by itself, with its choices in brackets
wall           seconds an answer took
over 1 lane    wall time over that with one lane in the same cell; the same of processor time (all threads)
over plain     the two over plain generation of the same cell
steps          of the driver an answer took, those included that were answered from memory without a forward pass
useful         rows that went through the model for an extension or a proposal, over all rows that did
filled         tokens drawn, over steps times rows of the plan: a lane that waits or stands idle is empty
accepted       steps that kept the proposal (in brackets: steps that changed the answer)
differ         cells in which the answer or the course of the chain is another than with one lane

The number of lanes never changes a chain, as far as the model's own logits are identical. They need not be: a matrix
product sums in another order for another number of rows, and where a uniform number lies within such an error of a
boundary (1e-6 in float32, some 1e-2 in bfloat16) the draw goes the other way. From there on the chains differ, which
is another sample of the same law. Cells that differ are compared like the others.

Where memory does not hold the lanes that were asked for, the driver runs fewer, and that row is not measured. To choose
its default the driver measures decode steps in the first call of a model and device. That call is in the warm-up, so
this cost, which a user pays once, is in no figure.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

import common
import torch
import transformers
from common import QUESTIONS, Progress, Timed, shown, spread, target, timed
from shapes import ENTROPY, MODELS, SMOLLM2, Subject, device_of, subject

# (tokens, blocks, steps of a stage); blocks of the paper have 192 tokens.
SETTINGS = {"quick": (12, 3, 2), "small": (192, 8, 10), "short": (768, 4, 10), "paper": (3072, 16, 10)}
DEFAULT = "default"
# What must hold: default lanes over one lane on a CPU, over plain generation on a GPU.
TARGETS = {"cpu": 0.70, "cuda": 3.3}


class Bench:
    """One prompt at a time through one sampler."""

    def __init__(self, one: Subject, tokens: int, blocks: int, steps: int, alpha: float):
        from power_kernels.api import PowerConfig

        self.subject, self.config = one, PowerConfig
        self.schedule = {
            "alpha": alpha,
            "max_new_tokens": tokens,
            "block_size": -(-tokens // blocks),
            "mcmc_steps": steps,
        }

    def plain(self, prompt: int, seed: int, tokens: int | None = None) -> Timed:
        tokens = tokens or self.schedule["max_new_tokens"]
        config = self.config(alpha=1.0, max_new_tokens=tokens, block_size=None, mcmc_steps=0, lanes=1)
        return self._run(config, prompt, seed)

    def power(self, lanes: str, prompt: int, seed: int, tokens: int | None = None) -> Timed:
        """lanes: a number or "default"."""
        schedule = self.schedule | ({"max_new_tokens": tokens} if tokens else {})
        return self._run(self.config(lanes=None if lanes == DEFAULT else int(lanes), **schedule), prompt, seed)

    def _run(self, config, prompt: int, seed: int) -> Timed:
        sampler, prompts = self.subject.sampler, [self.subject.prompts[prompt]]
        return timed(
            lambda: sampler.generate(prompts, config, seed=seed, eos_token_id=[], prompt_ids=[prompt]),
            sampler,
            self.subject.device,
        )

    def warm_up(self, lanes: list[str]) -> None:
        """Everything once, short: the first call of a kind pays for imports, compilation and page faults."""
        self.plain(0, 0, 4)
        for each in lanes:
            self.power(each, 0, 0, 4)

    def cell(self, lanes: list[str], prompt: int, seed: int, say, keep=lambda runs: None) -> dict:
        """keep: called with the runs so far after each of them."""
        order = list(lanes)
        random.Random(f"{prompt} {seed}").shuffle(order)
        runs = {}

        def run(name: str, call) -> Timed:
            say(f"prompt {prompt}, seed {seed}: {name}")
            out = call()
            if any(len(answer) != self.schedule["max_new_tokens"] for answer in out.answers):
                raise AssertionError(f"{name} ended an answer early")
            say(f"    {out.wall:.1f} s, {out.report['decode_steps']} steps of {out.report['lanes']} lanes")
            return out

        first = run("plain", lambda: self.plain(prompt, seed))
        for each in order:
            runs[each] = run(label(each), lambda each=each: self.power(each, prompt, seed))
            keep({"plain": first} | runs)
        last = run("plain", lambda: self.plain(prompt, seed))
        first.cpu, first.wall = (first.cpu + last.cpu) / 2, (first.wall + last.wall) / 2
        return {"prompt": prompt, "seed": seed, "runs": {"plain": first} | {each: runs[each] for each in lanes}}


def differs(run: Timed, other: Timed) -> bool:
    """Whether two chains took another course: their answers, their steps or where their proposals left."""
    return (run.answers, run.outcomes, run.left) != (other.answers, other.outcomes, other.left)


def summary(cells: list[dict], lanes: str) -> dict:
    """One row of the table. lanes: a number, "default", or "plain"."""
    runs = [cell["runs"][lanes] for cell in cells]
    reports = [run.report for run in runs]
    chosen = dict(Counter(report["lanes"] for report in reports))
    asked = None if lanes == DEFAULT else 1 if lanes == "plain" else int(lanes)
    if short := [reason for report in reports if (reason := common.shortfall(report, 1, asked))]:
        return {"lanes": lanes, "chosen": chosen, "cells": len(cells), "not_measured": short[0]}
    steps = sum(run.steps for run in runs)

    def over(other: str, clock: str) -> dict | None:
        if any(other not in cell["runs"] for cell in cells):
            return None
        return spread(getattr(cell["runs"][lanes], clock) / getattr(cell["runs"][other], clock) for cell in cells)

    return {
        "lanes": lanes,
        "chosen": chosen,
        "cells": len(cells),
        "wall": spread(run.wall for run in runs),
        "cpu": spread(run.cpu for run in runs),
        "wall_over_one": over("1", "wall"),
        "cpu_over_one": over("1", "cpu"),
        "wall_over_plain": over("plain", "wall"),
        "cpu_over_plain": over("plain", "cpu"),
        "forwarded": spread(run.forwarded for run in runs),
        "decode_steps": spread(report["decode_steps"] for report in reports),
        "useful": spread(useful for useful in map(common.useful_fraction, reports) if useful is not None),
        "filled": spread(common.filled_fraction(run.report) for run in runs),
        "acceptance": sum(run.accepted + run.unchanged for run in runs) / steps if steps else None,
        "changed": sum(run.accepted for run in runs) / steps if steps else None,
        "differ": (
            sum(differs(cell["runs"][lanes], cell["runs"]["1"]) for cell in cells)
            if lanes != "plain" and all("1" in cell["runs"] for cell in cells)
            else None
        ),
        "account": {
            name: None if any(run.account[name] is None for run in runs) else sum(run.account[name] for run in runs)
            for name in runs[0].account
        },
    }


def label(lanes: str) -> str:
    return "default lanes" if lanes == DEFAULT else "1 lane" if lanes == "1" else f"{lanes} lanes"


def table(rows: list[dict]) -> str:
    form = "{:>14} | {:>22} | {:>18} {:>18} | {:>20} {:>20} | {:>16} | {:>6} {:>6} | {:>11} | {:>6}"
    columns = ("lanes", "seconds", "wall", "processor", "wall", "processor", "steps", "useful", "filled")
    columns += ("accepted", "differ")
    lines = [form.format("", "wall", "over 1 lane", "", "over plain", *[""] * 6), form.format(*columns)]
    for row in rows:
        name = row["lanes"]
        if name == DEFAULT:
            name += f" ({', '.join(map(str, sorted(row['chosen'])))})"
        if "not_measured" in row:
            lines.append(f"{name:>14} | {common.NOT_MEASURED}: {row['not_measured']}")
            continue
        own = row["lanes"] != "plain"
        accepted = "" if row["acceptance"] is None else f"{row['acceptance']:.2f} ({row['changed']:.2f})"
        useful = "" if row["useful"] is None else f"{row['useful']['median']:.0%}"
        differ = "" if row["differ"] is None else f"{row['differ']}/{row['cells']}"
        lines.append(
            form.format(
                name,
                shown(row["wall"]),
                shown(row["wall_over_one"]) if own else "",
                shown(row["cpu_over_one"]) if own else "",
                shown(row["wall_over_plain"]) if own else "",
                shown(row["cpu_over_plain"]) if own else "",
                shown(row["decode_steps"], 0),
                useful,
                f"{row['filled']['median']:.0%}",
                accepted,
                differ,
            )
        )
    lines.append(f"({rows[0]['cells']} cells; medians, in brackets extremes over cells)")
    return "\n".join(lines)


def verdicts(rows: list[dict], device_type: str) -> list[dict]:
    """What must hold of the default on this kind of device; only where it ran."""
    row = next((row for row in rows if row["lanes"] == DEFAULT), None)
    if row is None:
        return []
    if device_type == "cpu":
        ratio, name = row.get("wall_over_one"), "wall time, default lanes over 1 lane"
    else:
        ratio, name = row.get("wall_over_plain"), "wall time, default lanes over plain generation of the same engine"
    return [target(name, ratio and ratio["median"], TARGETS["cpu" if device_type == "cpu" else "cuda"])]


def document(arguments, one: Subject, cells: list[dict], lanes: list[str], info: dict, begun: dict) -> dict:
    """begun: runs of a cell that is not finished, which no row counts."""
    rows = [summary(cells, each) for each in ("plain", *lanes)] if cells else []

    def plain(runs: dict[str, Timed]) -> dict[str, dict]:
        return {name: vars(run) for name, run in runs.items()}

    return {
        "suite": "latency",
        "labels": {"plain": "plain sampling"} | {each: label(each) for each in lanes},
        "setting": {key: value for key, value in vars(arguments).items() if key != "json"},
        "model": one.about,
        "prompt_lengths": [len(prompt) for prompt in one.prompts],
        "machine": info,
        "table": rows,
        "targets": verdicts(rows, one.device.type),
        "cells": [cell | {"runs": plain(cell["runs"])} for cell in cells],
        "unfinished": plain(begun),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, choices=MODELS, help="smollm2, or a shape with random weights")
    parser.add_argument("--device", help="cpu or cuda:N (default: a GPU where there is one)")
    parser.add_argument(
        "--setting", choices=SETTINGS, help="small on a CPU, paper on a GPU: see --tokens and the others"
    )
    parser.add_argument("--tokens", type=int, help="length of the answer")
    parser.add_argument("--blocks", type=int, help="stages")
    parser.add_argument("--steps", type=int, help="steps of a stage")
    parser.add_argument("--alpha", type=float, default=4.0)
    parser.add_argument("--entropy", type=float, default=ENTROPY, help=f"nats, of random weights ({ENTROPY})")
    parser.add_argument("--lanes", default="1,2,4,8,default", help="numbers of lanes, and default (1,2,4,8,default)")
    parser.add_argument("--prompts", type=int, default=len(QUESTIONS), help=f"at most ({len(QUESTIONS)})")
    parser.add_argument("--seeds", type=int, default=2, help="at most, for each prompt (2)")
    parser.add_argument("--seconds", type=float, default=440.0, help="no cell is begun that would end later (440)")
    parser.add_argument("--quick", action="store_true", help="the setting quick, two prompts: no figure to quote")
    parser.add_argument("--json", metavar="OUT", help="write every run and the table to this file, after each run")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a measured target is missed")
    arguments = parser.parse_args(argv)
    lanes = arguments.lanes.split(",")
    for each in lanes:
        if each != DEFAULT and not (each.isdecimal() and int(each) >= 1):
            parser.error(f"--lanes has {each!r}; it must hold numbers of at least 1, or {DEFAULT}")
    try:
        device = device_of(arguments.device)
    except RuntimeError as error:
        print(f"latency: {common.NOT_MEASURED}: {error}")
        return 2
    if arguments.quick:
        arguments.prompts, arguments.seeds = min(arguments.prompts, 2), 1
    setting = arguments.setting or ("quick" if arguments.quick else "small" if device.type == "cpu" else "paper")
    for name, value in zip(("tokens", "blocks", "steps"), SETTINGS[setting], strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name, least, most in (
        ("tokens", 1, None),
        ("blocks", 1, arguments.tokens),
        ("steps", 0, None),
        ("prompts", 1, len(QUESTIONS)),
        ("seeds", 1, None),
    ):
        value = getattr(arguments, name)
        if value < least or (most is not None and value > most):
            parser.error(f"--{name} must be at least {least}" + (f" and at most {most}" if most else ""))
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()

    one = subject(arguments.model, device, arguments.prompts, QUESTIONS, entropy=arguments.entropy)
    bench = Bench(one, arguments.tokens, arguments.blocks, arguments.steps, arguments.alpha)
    bench.warm_up(lanes)
    info, say = common.machine(device), Progress()
    print(
        f"{one.about}; {len(one.prompts)} prompts; T = {arguments.tokens}, {arguments.blocks} blocks, "
        f"{arguments.steps} steps a block, alpha {arguments.alpha:g}\n{common.machine_text(info)}\n",
        flush=True,
    )
    cells: list[dict] = []

    def keep(begun: dict[str, Timed]) -> None:
        common.write(arguments.json, document(arguments, one, cells, lanes, info, begun))

    longest = 0.0
    for seed in range(arguments.seeds):
        for prompt in range(len(one.prompts)):
            begin = say.elapsed
            if cells and begin + longest > arguments.seconds:
                break
            cells.append(bench.cell(lanes, prompt, seed, say, keep))
            longest = max(longest, say.elapsed - begin)
            keep({})
    result = document(arguments, one, cells, lanes, info, {})
    print(table(result["table"]))
    print("\n" + common.targets_text(result["targets"]))
    if arguments.json:
        print(f"written to {arguments.json}")
    return 1 if arguments.check and common.missed(result["targets"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
