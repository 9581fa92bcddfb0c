"""`power-kernels diagnose`: have the chains of a results file, or of a run's folder, mixed?

power-kernels generate --model MODEL --prompts prompts.jsonl --num-chains 4 --final-steps 400 --out results.jsonl
power-kernels diagnose results.jsonl

Here are the options and what is printed; `experiments/diagnostics.py` has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

from power_kernels.errors import ArgumentError

SHOWN = 20  # prompts with a line of their own
REASONS = 5  # prompts whose verdict is explained
POOLED = (
    "Steps of different horizons have different targets. What is pooled for R-hat and ESS is the steps at one\n"
    "horizon, of the chains of one prompt, and nothing else."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE.jsonl", help="results of generate, or the folder of a run of eval"
    )
    parser.add_argument(
        "--horizon", type=int, metavar="TOKENS", help="diagnose these steps (default: the last horizon)"
    )
    parser.add_argument(
        "--discard", type=float, default=0.0, metavar="SHARE", help="of the pooled steps, left out in front (default 0)"
    )
    parser.add_argument("--plots", metavar="FOLDER", help="draw traces, ranks, autocorrelation and acceptance")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status, 0 whatever the verdict is. Raises ArgumentError."""
    if not 0 <= arguments.discard < 1:
        raise ArgumentError(f"--discard is {arguments.discard}; it must lie in [0, 1)")
    if arguments.horizon is not None and arguments.horizon < 1:
        raise ArgumentError(f"--horizon is {arguments.horizon}; it must be at least 1")
    for path in arguments.files:
        if not os.path.exists(path):
            raise ArgumentError(f"{path} cannot be read: there is no such file or folder")

    from dataclasses import asdict

    from power_kernels.api.experiments import diagnostics

    laws = {name: prompts for path in arguments.files for name, prompts in _laws(Path(path)).items()}
    if not laws:
        raise ArgumentError(f"{', '.join(arguments.files)}: no chain there has made a step")
    found = {
        name: {
            prompt: diagnostics.diagnose(chains, arguments.horizon, arguments.discard)
            for prompt, chains in prompts.items()
        }
        for name, prompts in laws.items()
    }
    if arguments.horizon is not None and not any(d.steps for of_law in found.values() for d in of_law.values()):
        there = {h for prompts in laws.values() for chains in prompts.values() for h in diagnostics.horizons_of(chains)}
        raise ArgumentError(
            f"--horizon is {arguments.horizon}, where no step was made; allowed: {', '.join(map(str, sorted(there)))}"
        )
    rates = {name: _rates(prompts, diagnostics) for name, prompts in laws.items()}
    if arguments.json:
        told = {
            name: {
                "prompts": {prompt: asdict(diagnosis) for prompt, diagnosis in of_law.items()},
                "acceptance": {by: [asdict(rate) for rate in of_by] for by, of_by in rates[name].items()},
            }
            for name, of_law in found.items()
        }
        print(json.dumps(told, indent=1))
    else:
        print("\n\n".join(text(name, of_law, rates[name]) for name, of_law in found.items()))
        print(f"\n{POOLED}")
    if arguments.plots:
        from power_kernels.api.experiments import chain_plots

        for name, prompts in laws.items():
            folder = Path(arguments.plots)
            if len(laws) > 1:
                folder /= re.sub(r"[^\w.-]+", "-", name).strip("-")
            try:
                drawn, skipped = chain_plots.draw(name, prompts, found[name], folder)
            except OSError as error:
                raise ArgumentError(f"--plots {folder} cannot be written: {error}") from None
            said = [f"drawn: {path}" for path in drawn] + [f"not drawn: {n}, {why}" for n, why in skipped.items()]
            print(*said, sep="\n", file=sys.stderr)
    return 0


def _laws(path: Path) -> dict[str, dict[str, list]]:
    """Chains by what they were drawn alike as (a file, or an arm on a task) and by prompt; none where no step was made.
    Raises ArgumentError."""
    from power_kernels.api.experiments.diagnostics import from_record

    laws: dict[str, dict[str, list]] = {}
    for name, label, record in _folder(path) if path.is_dir() else _file(path):
        chain = from_record(record, label)
        laws.setdefault(name, {}).setdefault(str(record.get("question", record["prompt_id"])), []).append(chain)
    return {
        name: prompts
        for name, prompts in laws.items()
        if any(chain.outcome for chains in prompts.values() for chain in chains)
    }


def _file(path: Path):
    """(what they were drawn alike as, the chain's name, the record) of each line."""
    from power_kernels.api.commands.output_file import whole_lines

    for number, _, line in whole_lines(path):
        try:
            record = json.loads(line)
            label = f"{record['chain_id']}"
            record["prompt_id"], record["finish"]
        except (ValueError, KeyError, TypeError):
            raise ArgumentError(f"{path} line {number} is not a record of power-kernels") from None
        yield str(path), label, record


def _folder(path: Path):
    """The same, of a run: its seeds are chains of the same law."""
    from power_kernels.api.experiments.records import RunFolder

    folder = RunFolder(path)
    config = folder.config()
    if not config:
        raise ArgumentError(f"{path} is not the folder of a run: it has no config.json")
    for task in config["tasks"]:
        for arm in config["arms"]:
            for seed in config["seeds"]:
                for record in folder.read(task, arm, seed):
                    yield f"{arm} on {task}", f"seed {seed}, {record['chain_id']}", record


def _rates(prompts: dict[str, list], diagnostics) -> dict[str, list]:
    chains = [chain for of_prompt in prompts.values() for chain in of_prompt]
    return {
        "horizon": diagnostics.by_horizon(chains),
        "step": diagnostics.by_step(chains, 10),
        "position": diagnostics.by_position(chains, 10),
    }


# ---------------------------------------------------------------- what is printed


def text(name: str, found: dict, rates: dict[str, list]) -> str:
    """Of chains that were drawn alike: figures a prompt, the verdicts and what to change, acceptance."""
    worst = sorted(found, key=lambda prompt: -found[prompt].rhat)
    shown = [prompt for prompt in found if prompt in worst[:SHOWN]]
    more = f"; the {SHOWN} worst are shown, --json has all" if len(found) > SHOWN else ""
    chains = {d.chains + d.elsewhere for d in found.values()}
    each = "1 chain" if chains == {1} else f"{' or '.join(map(str, sorted(chains)))} chains"
    lines = [f"{name}: {_count(len(found), 'prompt')}, {each} each{more}", ""]
    head = ("prompt", "horizon", "chains", "steps", "log p", "sd", "MCSE", "R-hat", "R-hat W", "bulk ESS", "tail ESS",
            "accepted", "unchanged", "verdict")  # fmt: skip
    lines += _columns([head, *(_line(prompt, found[prompt]) for prompt in shown)])
    lines += ["", *_verdicts(found, shown), "", "acceptance, all prompts and chains:"]
    lines += _columns([("horizon", *_RATE), *((str(rate.low), *_rate(rate)) for rate in rates["horizon"])])
    for by, title in (("step", "step of its horizon"), ("position", "left at token")):
        lines += ["", *_columns([(title, *_RATE), *((_span(rate), *_rate(rate)) for rate in rates[by])])]
    return "\n".join(lines)


def _line(prompt: str, d) -> tuple[str, ...]:
    place = (prompt, str(d.horizon), str(d.chains), str(d.steps))
    if d.logp is None:
        return (*place, *"-" * 9, d.verdict)
    steps = d.chains * d.steps
    ess = (_figure(d.logp.ess_bulk, ".0f"), _figure(d.logp.ess_tail, ".0f"))
    figures = (f"{d.logp.mean:.2f}", f"{d.logp.sd:.2f}", _figure(d.logp.mcse, ".2g"), _figure(d.logp.rhat, ".3f"))
    shares = (f"{d.accepted / steps:.3f}", f"{d.unchanged / steps:.3f}")
    return (*place, *figures, _figure(d.weight.rhat, ".3f"), *ess, *shares, d.verdict)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _verdicts(found: dict, shown: list[str]) -> list[str]:
    """Each verdict with how many have it, their reasons, and each advice once."""
    counts = Counter(d.verdict for d in found.values())
    lines = ["verdict: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())]
    reasons = [prompt for prompt in shown if found[prompt].verdict != "no steps"]
    for prompt in sorted(reasons, key=lambda prompt: -found[prompt].rhat)[:REASONS]:
        lines.append(f"  {prompt}: {found[prompt].verdict}. {found[prompt].reason}")
    if len(reasons) > REASONS:
        lines.append(f"  ... (--json has all {len(found)})")
    advice = Counter(line for d in found.values() for line in _alike(d.advice))
    if advice:
        lines.append("what to change:")
        lines += [
            f"  {line}" + (f" ({_count(n, 'prompt')})" if len(found) > 1 else "") for line, n in advice.most_common(8)
        ]
    return lines


def _alike(advice: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(advice))


_RATE = ("steps", "accepted", "unchanged", "rejected", "95 % of accepted")


def _rate(rate) -> tuple[str, ...]:
    shares = (f"{n / rate.steps:.3f}" for n in (rate.accepted, rate.unchanged, rate.rejected))
    low, high = rate.interval()
    return (str(rate.steps), *shares, f"{low:.3f} to {high:.3f}")


def _span(rate) -> str:
    return str(rate.low) if rate.high == rate.low + 1 else f"{rate.low} to {rate.high - 1}"


def _columns(lines: list[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            [f"{line[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    ]


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")
