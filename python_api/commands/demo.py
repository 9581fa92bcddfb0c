"""Two questions to a small real model: plain sampling, low temperature and power sampling, side by side.

    python -m power_kernels.api.commands.demo [--question TEXT ...] [--alpha 4] [--seed 0]

All three run through the same engine and keep their log-probabilities from the same kernel, so the figures
compare: plain is alpha = 1 without steps, low temperature is the proposal law (temperature 1/alpha) without
steps, power adds the Metropolis-Hastings steps. The same seed gives the last two the same first draft.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
import time

QUESTIONS = [
    "Why is the sky blue? Answer in one sentence.",
    "How do bees make honey? Answer in two sentences.",
]
COLUMNS = ("plain sampling", "low temperature", "power sampling")


def columns(texts: list[str], width: int) -> str:
    """The texts beside each other, each wrapped in its own column, within `width` characters."""
    gap = " | "
    each = (width - len(gap) * (len(texts) - 1)) // len(texts)
    wrapped = []
    for text in texts:
        lines = []
        for paragraph in text.strip().splitlines():
            # An empty paragraph is a blank line, not none.
            lines += textwrap.wrap(paragraph, each) or [""]
        wrapped.append(lines)
    height = max(map(len, wrapped))
    rows = zip(*(lines + [""] * (height - len(lines)) for lines in wrapped), strict=True)
    return "\n".join(gap.join(f"{cell:{each}}" for cell in row).rstrip() for row in rows)


def account(result, prompt_length: int) -> list[str]:
    """The acceptance rate and the token account of one power-sampled answer, in three lines."""
    cost = result.cost
    early = "unknown, as answers may end anywhere" if cost.saved_early is None else str(cost.saved_early)
    plain = prompt_length + len(result.tokens) - 1
    kept = result.accepted + result.unchanged
    return [
        f"acceptance rate {result.acceptance_rate:.2f}: of {result.steps} steps {result.accepted} changed the answer, "
        f"{result.unchanged} proposed it again, {result.steps - kept} were rejected",
        f"tokens forwarded: {cost.prefill} prompt + {cost.extension} extension + {cost.proposal} proposals - "
        f"{cost.recalled} recalled = {cost.forwarded}, {cost.forwarded / plain:.1f} x plain sampling of this answer "
        f"({plain})",
        f"tokens saved: {cost.saved_prefix} by the free prefix; by early rejection: {early}",
    ]


def report(question: str, results: list, prompt_length: int, width: int) -> str:
    """One question: the three answers, their log-probabilities, and what the third one cost."""
    power = results[-1]
    figures = [
        f"log p = {result.logp:.1f} nats\n{len(result.tokens)} tokens, {result.logp / len(result.tokens):.2f} a token"
        for result in results
    ]
    rule = "-" * width
    return "\n".join(
        [
            "=" * width,
            textwrap.fill(f"Question: {question}", width),
            rule,
            columns(list(COLUMNS), width),
            rule,
            columns([shown(result) for result in results], width),
            rule,
            columns(figures, width),
            rule,
            *(textwrap.fill(line, width, subsequent_indent="    ") for line in account(power, prompt_length)),
        ]
    )


def shown(result) -> str:
    return result.text.strip() + (" [...]" if result.finish in ("length", "context") else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m power_kernels.api.commands.demo",
        description="Power sampling beside plain sampling, on a small model.",
    )
    parser.add_argument("--question", action="append", help="ask this instead; may be given several times")
    parser.add_argument("--alpha", type=float, default=4.0, help="the power (4)")
    parser.add_argument("--max-new-tokens", type=int, default=72, help="longest answer (72)")
    parser.add_argument("--block-size", type=int, default=24, help="tokens of a stage (24)")
    parser.add_argument("--steps", type=int, default=5, help="steps after each stage (5)")
    parser.add_argument("--seed", type=int, default=0)
    # Two threads on a machine that is busy otherwise can be several times slower than one.
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    arguments = parser.parse_args(argv)

    started = time.perf_counter()
    import torch
    from transformers.utils import logging

    from power_kernels import backend_for
    from power_kernels.api import PowerConfig, PowerSampler
    from power_kernels.api.commands import packaged_model
    from power_kernels.errors import ArgumentError

    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    questions = arguments.question or QUESTIONS
    common = {"max_new_tokens": arguments.max_new_tokens, "block_size": arguments.block_size}
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    try:
        configs = [
            PowerConfig(alpha=1.0, mcmc_steps=0, **common),
            PowerConfig(alpha=arguments.alpha, mcmc_steps=0, **common),
            PowerConfig(alpha=arguments.alpha, mcmc_steps=arguments.steps, **common),
        ]
        model, tokenizer = packaged_model.load()
        sampler = PowerSampler(model, tokenizer)
        prompts = [packaged_model.chat_prompt(tokenizer, question) for question in questions]
        setting = (
            f"{packaged_model.DEMO}, fp32, {arguments.threads} thread(s), kernels: {backend_for('cpu')}. "
            f"alpha = {arguments.alpha:g}, {arguments.steps} steps after each stage of {arguments.block_size} tokens, "
            f"at most {arguments.max_new_tokens} tokens."
        )
        print(textwrap.fill(setting, width), flush=True)
        answers = []
        for name, config in zip(COLUMNS, configs, strict=True):
            print(f"{name} ...", file=sys.stderr, flush=True)
            answers.append(sampler.generate(prompts, config, seed=arguments.seed, progress=True))
    except (ArgumentError, packaged_model.ModelUnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for index, question in enumerate(questions):
        print(report(question, [results[index] for results in answers], len(prompts[index]), width))
    print("=" * width)
    note = (
        "log p: log-probability of the whole answer under the base model. Low temperature sharpens each token by "
        "itself, power sampling the answer as a whole."
    )
    print(textwrap.fill(note, width))
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
