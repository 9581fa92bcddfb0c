"""What an answer costs, end to end: plain generation, the published algorithm, a loop that keeps its KV
cache, ours.

    python bench/end_to_end.py                    the full table (SmolLM2-135M, fp32, one thread, T = 128)
    python bench/end_to_end.py --quick            the same in miniature, to see that it runs
    python bench/end_to_end.py --only ours-1,ours-16

Each pair (prompt, seed) is a cell. In a cell every method of one chain runs once, between two runs of plain
generation, and its processor time is divided by theirs: what else the machine does drifts slower than a cell.
The methods of many chains run once a seed in the same manner, on a batch that goes round the prompts.

Tokens forwarded: model positions computed for real tokens. Plain generation of an answer of T tokens to a
prompt of P forwards P + T - 1 (the last token is never fed) and is 1.00; "over plain" is the ratio of the
totals. Processor time: of the whole process, all threads; "over plain" is the median over cells, in brackets
the extremes. Acceptance: steps that kept the proposal over steps made; "changed": only those whose proposal
was another answer. log p: base log-probability of the answers, nats, mean. Methods of the same law should
agree within a few standard deviations of the mean, which is given. Two lanes make the same chain as one.

Plain sampling through our engine (alpha = 1, no steps) separates what the engine gains, faster matrix
products included, from what the algorithm costs.

The methods that sample the power law make the same number of steps from the same schedule. The answers run
to their full length: no token ends them, and then the published algorithm has the same law as the exact one.
"""

from __future__ import annotations

import argparse
import statistics

import common
import opponents
import torch
import transformers
from common import QUESTIONS, Progress, Timed, target, timed

SINGLE = ("published", "kv-loop", "kv-loop-early", "engine-1", "ours-1", "lanes-1")
BATCHED = ("engine-16", "ours-16")
METHODS = (*SINGLE, *BATCHED)
LABELS = {
    "plain-1": "plain generate",
    "published": "published algorithm (re-prefill)",
    "kv-loop": "KV-keeping MH loop",
    "kv-loop-early": "KV-keeping MH loop, early reject",
    "ours-1": "power_kernels, 1 chain",
    "lanes-1": "power_kernels, 1 chain, 2 lanes",
    "engine-1": "plain sampling, our engine",
    "plain-16": "plain generate, batch {batch}",
    "engine-16": "plain sampling, our engine, {batch}",
    "ours-16": "power_kernels, {batch} chains",
}
# What must hold (tokens over plain, processor time over plain at one chain and at sixteen, gain of a batch).
TARGETS = {"tokens": 3.3, "cpu-1": 4.0, "cpu-16": 3.5, "batch": 3.0}


class Bench:
    """The methods under one setting; each takes (prompt index or indices, seed)."""

    def __init__(self, arguments):
        # Here, not above: the opponents and their tests need nothing of ours.
        from power_kernels.api import PowerConfig, PowerSampler
        from power_kernels.api.commands import packaged_model

        self.arguments = arguments
        directory = packaged_model.ensure_model()
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(directory, dtype=torch.float32).eval()
        opponents.without_eos(self.model)
        # A model of its own: the engine may set the attention of the one it is given.
        self.sampler = PowerSampler(load(directory, dtype=torch.float32).eval())
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.prompts = [packaged_model.chat_prompt(tokenizer, question) for question in QUESTIONS[: arguments.prompts]]
        self.config = PowerConfig
        self.setting(arguments.tokens)

    def setting(self, tokens: int) -> None:
        arguments = self.arguments
        self.length = tokens
        self.schedule = {
            "alpha": arguments.alpha,
            "max_new_tokens": tokens,
            "block_size": -(-tokens // arguments.blocks),
            "mcmc_steps": arguments.steps,
        }

    def call(self, method: str, prompt: int, seed: int) -> Timed:
        """method: plain-1, plain-16 or one of METHODS; prompt is ignored by the batches."""
        tokens, schedule = self.prompts[prompt], self.schedule
        batch = [self.prompts[i] for i in self.batch_prompts()]
        plain = self.config(alpha=1.0, max_new_tokens=self.length, block_size=None, mcmc_steps=0, lanes=1)
        calls = {
            "plain-1": lambda: opponents.plain(self.model, [tokens], max_new_tokens=self.length, seed=seed),
            "plain-16": lambda: opponents.plain(self.model, batch, max_new_tokens=self.length, seed=seed),
            "published": lambda: opponents.published(self.model, tokens, seed=seed, **schedule),
            "kv-loop": lambda: opponents.kv_loop(self.model, tokens, seed=seed, **schedule),
            "kv-loop-early": lambda: opponents.kv_loop(self.model, tokens, early_rejection=True, seed=seed, **schedule),
            "engine-1": lambda: self.sampler.generate([tokens], plain, seed=seed, eos_token_id=[]),
            "engine-16": lambda: self.sampler.generate(batch, plain, seed=seed, eos_token_id=[], max_chains=len(batch)),
            # The prompt's identity makes this the same chain as in the batch.
            "ours-1": lambda: self.sampler.generate(
                [tokens], self.config(lanes=1, **schedule), seed=seed, eos_token_id=[], prompt_ids=[prompt]
            ),
            "lanes-1": lambda: self.sampler.generate(
                [tokens], self.config(lanes=2, **schedule), seed=seed, eos_token_id=[], prompt_ids=[prompt]
            ),
            "ours-16": lambda: self.sampler.generate(
                batch, self.config(lanes=1, **schedule), seed=seed, eos_token_id=[], max_chains=len(batch)
            ),
        }
        ours = self.sampler if method.split("-")[0] in ("engine", "ours", "lanes") else None
        return timed(calls[method], ours)

    def plain_forwarded(self, method: str, prompt: int) -> int:
        """What plain generation of the same answers forwards: the denominator of every ratio of tokens."""
        indices = self.batch_prompts() if method.endswith("-16") else [prompt]
        return sum(opponents.plain_forwarded(len(self.prompts[i]), self.length) for i in indices)

    def batch_prompts(self) -> list[int]:
        """The prompt of each answer of a batch: they go round."""
        return [i % len(self.prompts) for i in range(self.arguments.batch)]

    def warm_up(self, methods) -> None:
        """Everything once, short: the first call of a kind pays for imports, compilation and page faults."""
        length = self.length
        self.setting(4)
        for method in ("plain-1", *methods, *(["plain-16"] if set(BATCHED) & set(methods) else [])):
            self.call(method, 0, 0)
        self.setting(length)


def sandwich(bench: Bench, plain: str, methods, prompt: int, seed: int, say) -> dict:
    """One cell: the methods between two runs of plain generation."""
    cell = {"prompt": prompt, "seed": seed, "runs": {}}
    order = [plain, *methods, plain]
    for position, method in enumerate(order):
        say(f"{LABELS[method].format(batch=bench.arguments.batch)}: prompt {prompt}, seed {seed}")
        run = bench.call(method, prompt, seed)
        if method == plain and position:
            first = cell["runs"][plain]
            first.cpu, first.wall = (first.cpu + run.cpu) / 2, (first.wall + run.wall) / 2
        else:
            cell["runs"][method] = run
    for method, run in cell["runs"].items():
        expected = bench.plain_forwarded(method, prompt)
        cell.setdefault("plain_forwarded", {})[method] = expected
        if run.account:
            # What the prefill would be if chains of one prompt did not share it.
            every = bench.batch_prompts() if method in BATCHED else [prompt]
            run.account["prefill_unshared"] = sum(len(bench.prompts[i]) - 1 for i in every)
        if method == plain and run.forwarded != expected:
            raise AssertionError(f"plain generation forwarded {run.forwarded} tokens, not {expected}")
        if any(len(answer) != bench.length for answer in run.answers):
            raise AssertionError(f"{method} ended an answer before {bench.length} tokens")
    return cell


def summary(cells: list[dict], method: str, plain: str) -> dict:
    """One row of the table. All times in seconds of processor."""
    runs = [cell["runs"][method] for cell in cells]
    answers = sum(len(run.answers) for run in runs)
    ratios = [cell["runs"][method].cpu / cell["runs"][plain].cpu for cell in cells]
    token_ratios = [run.forwarded / cell["plain_forwarded"][method] for run, cell in zip(runs, cells, strict=True)]
    steps = sum(run.steps for run in runs)
    logp = [value for run in runs for value in run.logp]
    return {
        "method": method,
        "answers": answers,
        "forwarded_per_answer": sum(run.forwarded for run in runs) / answers,
        "tokens_over_plain": sum(run.forwarded for run in runs)
        / sum(cell["plain_forwarded"][method] for cell in cells),
        "tokens_over_plain_range": [min(token_ratios), max(token_ratios)],
        "cpu_per_answer": sum(run.cpu for run in runs) / answers,
        "wall_per_answer": sum(run.wall for run in runs) / answers,
        "cpu_over_plain": statistics.median(ratios),
        "cpu_over_plain_range": [min(ratios), max(ratios)],
        "steps": steps,
        "acceptance": sum(run.accepted + run.unchanged for run in runs) / steps if steps else None,
        "changed": sum(run.accepted for run in runs) / steps if steps else None,
        "logp": statistics.fmean(logp),
        "logp_error": statistics.stdev(logp) / len(logp) ** 0.5 if len(logp) > 1 else None,
        "account": {name: sum(run.account[name] for run in runs) for name in runs[0].account},
    }


def table(rows: list[dict], batch: int) -> str:
    form = "{:33} {:>7} | {:>9} {:>17} | {:>9} {:>18} | {:>11} | {:>12}"
    lines = [
        form.format("", "", "tokens", "", "processor", "", "", ""),
        form.format("", "answers", "an answer", "over plain", "an answer", "over plain", "accepted", "log p"),
    ]
    for row in rows:
        low, high = row["tokens_over_plain_range"]
        tokens = f"{row['tokens_over_plain']:.2f} [{low:.2f}-{high:.2f}]"
        low, high = row["cpu_over_plain_range"]
        cpu = f"{row['cpu_over_plain']:.2f} [{low:.2f}-{high:.2f}]"
        accepted = "" if row["acceptance"] is None else f"{row['acceptance']:.2f} ({row['changed']:.2f})"
        error = "" if row["logp_error"] is None else f" +-{row['logp_error']:.1f}"
        lines.append(
            form.format(
                LABELS[row["method"]].format(batch=batch),
                row["answers"],
                f"{row['forwarded_per_answer']:.0f}",
                tokens,
                f"{row['cpu_per_answer']:.2f} s",
                cpu,
                accepted,
                f"{row['logp']:.1f}{error}",
            )
        )
    lines.append("(in brackets: extremes over cells; after accepted: steps that changed the answer)")
    return "\n".join(lines)


def verdicts(rows: list[dict], batch: int) -> list[dict]:
    by = {row["method"]: row for row in rows}
    one, two, many = by.get("ours-1"), by.get("lanes-1"), by.get("ours-16")
    found = []
    if one:
        found.append(target("tokens forwarded over plain, 1 chain", one["tokens_over_plain"], TARGETS["tokens"]))
    if many:
        name = f"tokens forwarded over plain, {batch} chains"
        found.append(target(name, many["tokens_over_plain"], TARGETS["tokens"]))
    for row, name, bound in (
        (one, "1 chain", "cpu-1"),
        (two, "1 chain in 2 lanes", "cpu-1"),
        (many, f"{batch} chains", "cpu-16"),
    ):
        if row:
            found.append(target(f"processor time over plain, {name}", row["cpu_over_plain"], TARGETS[bound]))
    if one and many:
        gain = one["cpu_per_answer"] / many["cpu_per_answer"]
        found.append(target(f"time per answer, 1 chain / {batch} chains", gain, TARGETS["batch"], at_most=False))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=3, help=f"how many of the {len(QUESTIONS)} questions (3)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds for each (2)")
    parser.add_argument("--tokens", type=int, default=128, help="length of every answer (128)")
    parser.add_argument("--blocks", type=int, default=4, help="stages (4)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a stage (4)")
    parser.add_argument("--alpha", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=16, help="answers in the batch of many (16)")
    parser.add_argument("--only", default=",".join(METHODS), help=f"of {','.join(METHODS)}; plain always runs")
    parser.add_argument("--quick", action="store_true", help="one prompt, one seed, 16 tokens: no figure to quote")
    parser.add_argument("--json", metavar="OUT", help="write every cell and the table to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a measured target is missed")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.prompts, arguments.seeds, arguments.tokens = 1, 1, 16
    methods = arguments.only.split(",")
    for name, value, most in (
        ("--prompts", arguments.prompts, len(QUESTIONS)),
        ("--seeds", arguments.seeds, None),
        ("--batch", arguments.batch, None),
        ("--blocks", arguments.blocks, arguments.tokens),
    ):
        if value < 1 or (most is not None and value > most):
            parser.error(f"{name} must be at least 1" + (f" and at most {most}" if most else ""))
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--only knows {', '.join(METHODS)}; not {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)

    transformers.utils.logging.disable_progress_bar()
    bench = Bench(arguments)
    single = [method for method in SINGLE if method in methods]
    batched = [method for method in BATCHED if method in methods]
    say = Progress(
        arguments.seeds
        * (arguments.prompts * (len(single) + 2 if single else 0) + (len(batched) + 2 if batched else 0))
    )
    bench.warm_up(methods)
    cells, batches = [], []
    for seed in range(arguments.seeds):
        if single:
            for prompt in range(arguments.prompts):
                cells.append(sandwich(bench, "plain-1", single, prompt, seed, say))
        if batched:
            batches.append(sandwich(bench, "plain-16", batched, 0, seed, say))
    for cell in cells + batches:
        for method, run in cell["runs"].items():
            if not run.logp:  # plain generation keeps none; not part of its time
                for index, answer in enumerate(run.answers):
                    prompt = index % len(bench.prompts) if method.endswith("-16") else cell["prompt"]
                    run.logp.append(opponents.log_probability(bench.model, bench.prompts[prompt], answer))

    rows = [summary(cells, method, "plain-1") for method in (["plain-1", *single] if single else [])]
    if batches:
        rows += [summary(batches, method, "plain-16") for method in ("plain-16", *batched)]
    lengths = [len(prompt) for prompt in bench.prompts]
    info = common.machine()
    print(
        f"SmolLM2-135M-Instruct, fp32, one thread; {arguments.prompts} chat prompts of {min(lengths)}-"
        f"{max(lengths)} tokens x {arguments.seeds} seeds; T = {bench.length}, {arguments.blocks} blocks, "
        f"{arguments.steps} steps a block, alpha {arguments.alpha:g}\n"
        f"{common.machine_text(info)}\n"
    )
    print(table(rows, arguments.batch))
    for row in rows:
        if row["account"]:
            account = ", ".join(
                f"{name} {value / row['answers']:.0f}"
                for name, value in row["account"].items()
                if name != "prefill_unshared"
            )
            print(f"{LABELS[row['method']].format(batch=arguments.batch)}, tokens an answer: {account}")
    by = {row["method"]: row for row in rows}
    if many := by.get("ours-16"):
        more = (many["account"]["prefill_unshared"] - many["account"]["prefill"]) / many["answers"]
        unshared = (many["forwarded_per_answer"] + more) / by["plain-16"]["forwarded_per_answer"]
        print(
            "(Chains of one prompt share its prefill, plain generation's batch does not; without sharing, "
            f"{unshared:.2f} x the tokens.)"
        )
    found = verdicts(rows, arguments.batch)
    print("\n" + common.targets_text(found))
    if arguments.json:
        plain = [
            cell | {"runs": {method: vars(run) for method, run in cell["runs"].items()}} for cell in cells + batches
        ]
        document = {
            "suite": "cost",
            "labels": {name: text.format(batch=arguments.batch) for name, text in LABELS.items()},
            "setting": {key: value for key, value in vars(arguments).items() if key != "json"},
            "prompt_lengths": lengths,
            "machine": info,
            "table": rows,
            "targets": found,
            "cells": plain,
        }
        common.write(arguments.json, document)
        print(f"written to {arguments.json}")
    return 1 if arguments.check and common.missed(found) else 0
