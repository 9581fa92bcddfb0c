"""Requests of several kinds in one batch, straight to vLLM's engine."""

from __future__ import annotations

import math

from vllm import SamplingParams

from power_kernels.api.driver.engine import Opened
from power_kernels.api.engines.serving.proposal import proposal_of
from power_kernels.api.engines.vllm.parameters import proposal_params
from tests.stacks import seen, tiny


def run(engine, requests: list[tuple[list[int], SamplingParams]]) -> list:
    """The outputs of requests that are there at once, in their order."""
    llm, found = engine._llm, {}
    for i, (prompt, params) in enumerate(requests):
        llm.add_request(str(i), {"prompt_token_ids": prompt}, params)
    while llm.has_unfinished_requests():
        found.update({output.request_id: output for output in llm.step() if output.finished})
    return [found[str(i)].outputs[0] for i in range(len(requests))]


def power_params(prompt: list[int], k: int, *, tokens: int = 24, exclude: int = -1) -> SamplingParams:
    """The k-th user's: another alpha, beta, seed and chain each."""
    opened = Opened(
        lane=0, request=0, tokens=[], horizon=tokens, serial=3 + k, chain_id=k, prompt_id=2 * k, exclude=exclude,
        cumw=0.0, theta=-math.inf, length_bonus=0.0, eos=(), stops=False,
    )  # fmt: skip
    proposal = proposal_of(opened, len(prompt), alpha=1.5 + 0.5 * k, beta=1.0 + 0.4 * k, seed=100 - 7 * k)
    return proposal_params(proposal, ends=(), entropy=k % 2 == 1)


def proposals_of_many_users(engine, users: int = 7) -> None:
    """All at once, their prompts longer than a step reads; what each may not draw first is what it would draw."""
    prompts = [p * 2 for p in tiny.prompts(users)]
    first = run(engine, [(p, power_params(p, k, tokens=1)) for k, p in enumerate(prompts)])
    run(engine, [(p, power_params(p, k, exclude=first[k].token_ids[0])) for k, p in enumerate(prompts)])


def plain(logprobs: int | None, **other) -> SamplingParams:
    given = dict(temperature=0.7, seed=11, max_tokens=6, detokenize=False, ignore_eos=True, logprobs=logprobs)
    return SamplingParams(**(given | other))


def ordinary(filters: bool) -> list[SamplingParams]:
    """Of every width of log-probabilities, greedy, with a bias and with penalties. filters: top-k and top-p, too."""
    some = [
        plain(None), plain(0), plain(1), plain(4), plain(-1), plain(None, temperature=0.0),
        plain(2, flat_logprobs=True), plain(1, logit_bias={7: 3.0}), plain(0, repetition_penalty=1.3),
    ]  # fmt: skip
    return [*some, plain(3, top_k=5), plain(None, top_p=0.5)] if filters else some


def told(output) -> tuple:
    """All that an ordinary request is told."""
    logprobs = output.logprobs
    if logprobs is not None and not isinstance(logprobs, list):
        logprobs = [logprobs[i] for i in range(len(logprobs))]
    return list(output.token_ids), logprobs, output.finish_reason


def assert_ordinary_rows_untouched(engine, *, filters: bool = True) -> None:
    """Ordinary requests are told the same, to the last bit, whether what is beside them in the batch is ours or is
    ordinary, too. (Alone they may not be: products of other shapes round otherwise.)"""
    prompts, theirs = (
        [prompt[:14] for prompt in tiny.prompts(16)],
        ordinary(filters),
    )  # seeded ones may not come in chunks
    told_beside = []
    for beside in (
        [power_params(prompt, k, tokens=6) for k, prompt in enumerate(prompts[len(theirs) :])],
        [plain(None) for _ in prompts[len(theirs) :]],
    ):
        params = [*theirs, *beside]
        order = sorted(range(len(params)), key=lambda i: (i % len(beside), i))  # so that neighbours are of both kinds
        with seen.seen() as rows:
            outputs = dict(zip(order, run(engine, [(prompts[i], params[i]) for i in order]), strict=True))
        told_beside.append([told(outputs[i]) for i in range(len(theirs))])
        assert seen.check(rows)["rows"] == (6 * len(beside) if rows else 0)
    assert told_beside[0] == told_beside[1]
