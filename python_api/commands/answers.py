"""What `power-kernels generate` does once its options are in order: load the model, draw, keep the answers."""

from __future__ import annotations

import argparse
import re
import sys

from power_kernels.api.commands.drawing import Drawing, answer_digests, ends_of_answers, prompt_rows
from power_kernels.api.commands.generate import INCOMPLETE
from power_kernels.api.commands.load import load_sampler, load_tokenizer
from power_kernels.api.commands.output_file import record
from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.distributed import RankLostError, Ranks, join
from power_kernels.api.driver.horizons import context_message
from power_kernels.api.driver.stop import token_bytes


def run(arguments: argparse.Namespace, config: PowerConfig, prompts: list[dict]) -> int:
    """Returns the exit status, as `generate.run` does. prompts: what the prompts file says, a dict a line."""
    try:
        with join() as ranks:
            return _drawing(arguments, config, prompts, ranks).run()
    except RankLostError as error:
        print(f"power-kernels: {error}", file=sys.stderr)
        if arguments.out:
            print(f"What is finished is in {arguments.out} and beside it; run the same command again", file=sys.stderr)
        return INCOMPLETE


def _drawing(arguments: argparse.Namespace, config: PowerConfig, prompts: list[dict], ranks: Ranks) -> Drawing:
    def first_says(message: str) -> None:
        """What all processes know is said by one."""
        if ranks.rank == 0:
            print(message, file=sys.stderr)

    # What the prompts are like is said before the weights are loaded, which may take minutes.
    tokenizer, context = load_tokenizer(arguments.model)
    rows = prompt_rows(prompts, tokenizer, arguments.chat, first_says)
    if message := context_message(dict(enumerate(map(len, rows))), config.max_new_tokens, context):
        first_says(message)
    if config.stop:
        token_bytes(tokenizer, len(tokenizer))  # refuses a tokenizer that stop strings cannot be had with
    for string in config.stop:
        if re.search(r"\\[nrt]", string):
            first_says(
                f"--stop {string} holds a backslash and a letter, no line break or tab; $'\\n' in a shell is one"
            )
    sampler = load_sampler(arguments, ranks, tokenizer)
    eos = [] if arguments.ignore_eos else ends_of_answers(sampler, prompts, arguments.chat, first_says)
    digests = answer_digests(
        rows,
        arguments.num_chains,
        config,
        model=arguments.model,
        dtype=str(sampler.engine.dtype),
        seed=arguments.seed,
        eos=eos,
    )
    return Drawing(
        sampler,
        ranks,
        rows,
        config,
        num_chains=arguments.num_chains,
        seed=arguments.seed,
        eos=eos,
        digests=digests,
        line=lambda result, run, seconds: record(result, prompts[result.prompt_id], run),
        out=arguments.out,
        show=_show,
        max_chains=arguments.max_chains,
        progress=not arguments.quiet,
    )


def _show(line: dict) -> None:
    cost, steps = line["cost"], line["steps"]
    print(
        f"--- prompt {line['prompt_id']}, chain {line['chain_id']}: logp {line['logp']:.2f} nats, accepted "
        f"{line['accepted']} of {steps} steps ({line['unchanged']} unchanged), {cost['forwarded']} tokens forwarded "
        f"for {cost['answer']} ({line['finish']})"
    )
    if "sweeps" in line:
        start, *sweeps = (f"{sweep['log_total']:.2f}" for sweep in line["sweeps"])
        print(f"    log Zhat {start} at the start" + (f", {', '.join(sweeps)} in the sweeps" if sweeps else ""))
    print(line["text"], flush=True)
