"""Whole chains on a real SGLang on the CPU, in processes of its own (`make test-sglang`)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from power_kernels.api import EngineBusyError, PowerConfig, PowerSampler, SglangEngine
from power_kernels.api.driver.engine import Ended, Opened
from power_kernels.api.engines.serving.proposal import COLUMNS, KEY, proposal_of
from power_kernels.api.engines.serving.versions import SGLANG, Stack, UntestedVersionError
from power_kernels.api.engines.sglang.parameters import DRAWS, proposal_params
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.slots import SlotFlag
from power_kernels.state import Status
from tests.sglang import engines
from tests.stacks import chains, tiny

CONFIG = PowerConfig(alpha=2.0, temperature=1 / 1.5, max_new_tokens=48, block_size=16, mcmc_steps=5, lanes=1)


@pytest.fixture(scope="module")
def reference(huggingface):
    """What the Hugging Face engine draws, once for each configuration."""
    known = {}

    def drawn(config, **call):
        key = (config, tuple(sorted((name, str(value)) for name, value in call.items())))
        if key not in known:
            known[key] = chains.drawn(huggingface, config, **call)
        return known[key]

    return drawn


# What is asked for, and at least how many acceptances and proposals that the worker ended it must bring.
SETTINGS = {
    "as it is": (CONFIG, dict(prompts=16), 80, 110),
    "no early rejection": (replace(CONFIG, early_rejection=False), dict(prompts=8), 35, 0),
    "four lanes": (replace(CONFIG, lanes=4), dict(prompts=8), 35, 30),
    "EOS": (CONFIG, dict(prompts=12, eos_token_id=tiny.EOS), 30, 50),
    "EOS, four lanes": (replace(CONFIG, lanes=4), dict(prompts=6, eos_token_id=tiny.EOS), 18, 15),
    "other EOS than the model's": (CONFIG, dict(prompts=6, eos_token_id=[40, 41, 42, 43, 44, 45]), 20, 20),
    "stop strings": (replace(CONFIG, stop=("ab", "c1")), dict(prompts=8, eos_token_id=tiny.EOS[:3]), 20, 25),
    "stop strings alone, four lanes": (
        replace(CONFIG, stop=("ab", "c1"), lanes=4), dict(prompts=6, eos_token_id=[]), 7, 12
    ),
    "divergence": (replace(CONFIG, cut="divergence"), dict(prompts=6, eos_token_id=tiny.EOS), 16, 28),
    "divergence-entropy": (replace(CONFIG, cut="divergence-entropy"), dict(prompts=6), 26, 35),
    "length bonus": (
        replace(CONFIG, length_bonus=0.5, final_steps=4), dict(prompts=6, eos_token_id=tiny.EOS), 22, 38
    ),
    "published code": (
        replace(CONFIG, compat="karan-du", early_rejection=False, max_new_tokens=32),
        dict(prompts=4, eos_token_id=tiny.EOS), 9, 0,
    ),
    "two chains a prompt": (replace(CONFIG, max_new_tokens=24), dict(prompts=4, num_chains=2), 30, 25),
}  # fmt: skip


def rejected(told: list[dict]) -> int:
    """Requests that their worker ended."""
    ended = [one[DRAWS][-1] for one in told if one.get(DRAWS) and one["finish_reason"] is not None]
    return sum(bool(draw[COLUMNS] & SlotFlag.REJECTED) for draw in ended)


@pytest.mark.parametrize("name", SETTINGS)
def test_chains_are_the_hugging_face_engine_s(engine, reference, name):
    config, call, accepted, ended = SETTINGS[name]
    with engines.replies(engine) as told:
        ours = chains.drawn(engine, config, seed=2024, **call)
    chains.assert_same_chains(ours, reference(replace(config, lanes=1), seed=2024, **call))
    assert chains.accepted(ours) >= accepted
    assert rejected(told) >= ended
    engines.assert_nothing_is_left(engine)


def test_a_proposal_recomputes_one_token(engine):
    """The one that its first draw needs, where the cache is token by token."""
    ours = chains.drawn(engine, CONFIG, prompts=16, seed=1)
    assert sum(result.steps for result in ours) >= 200
    assert sum(result.cost.recomputed for result in ours) == 0
    assert sum(result.cost.cached for result in ours) >= 10_000


def test_ordinary_requests_beside_are_what_they_are_alone(engine):
    """Greedy ones, with a bias, with log-probabilities: while chains run, and before. (With a repetition penalty they
    are not even where those that come and go beside them are ordinary, too.)"""
    asked = [
        dict(input_ids=prompt[:30], sampling_params=dict(top_k=1, max_new_tokens=40, ignore_eos=True) | more, **told)
        for prompt, more, told in zip(
            tiny.prompts(4),
            ({}, dict(logit_bias={"7": 6.0}), {}, {}),
            ({}, {}, {}, dict(return_logprob=True)),
            strict=True,
        )
    ]

    async def ordinary() -> list[dict]:
        return await asyncio.gather(*(engine._engine.async_generate(**one) for one in asked))

    alone = engine._run(ordinary())
    stream = PowerSampler(engine, tiny.tokenizer()).stream(tiny.prompts(16), CONFIG, seed=8, max_chains=8)
    next(stream)
    task = engine._engine.loop.create_task(ordinary())
    with engines.replies(engine) as told:
        while not task.done():
            next(stream)
    stream.close()
    assert len(told) >= 20  # of ours, meanwhile
    for a, b in zip(alone, task.result(), strict=True):
        assert a["output_ids"] == b["output_ids"]
        assert len(a["output_ids"]) == 40
    for a, b in zip(*(one[3]["meta_info"]["output_token_logprobs"] for one in (alone, task.result())), strict=True):
        np.testing.assert_allclose(a[0], b[0], atol=1e-4)
    engines.assert_nothing_is_left(engine)


# -- what is refused


PROPOSAL = proposal_of(
    Opened(
        lane=0, request=0, tokens=[], horizon=9, serial=0, chain_id=0, prompt_id=0, exclude=-1, cumw=0.0,
        theta=-np.inf, length_bonus=0.0, eos=(), stops=False,
    ),
    3, 2.0, 1.5, 0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("params", "named"),
    [
        (dict(top_p=0.9), r"top_p is 0\.9 in a power request"),
        (dict(temperature=0.5), r"temperature is 0\.5 .*alpha and beta"),
        (dict(temperature=0.0), r"top_k is 1 "),
        (dict(top_k=5, min_p=0.1), r"top_k is 5 in a power request \(and min_p\)"),
        (dict(frequency_penalty=0.5), "frequency_penalty"),
        (dict(presence_penalty=0.5), "presence_penalty"),
        (dict(repetition_penalty=1.2), "repetition_penalty"),
        (dict(logit_bias={"3": 1.0}), "logit_bias"),
        (dict(ignore_eos=True), "ignore_eos"),
        (dict(custom_params={KEY: 3}), "power_proposal is a int"),
        (dict(custom_params={KEY: PROPOSAL.to_dict() | {"alpha": -1.0}}), r"power_proposal\.alpha is -1\.0"),
    ],
)
def test_a_request_that_could_not_be_exact_is_refused_by_name(engine, params, named):
    given = proposal_params(PROPOSAL, ends=(9,)) | params
    with pytest.raises((ArgumentError, ArgumentTypeError), match=named):
        engine._engine.generate(input_ids=[4, 5, 6], sampling_params=given)
    engines.assert_nothing_is_left(engine)


@pytest.mark.parametrize("name", ["return_logprob", "custom_logit_processor", "return_sampling_mask"])
def test_what_power_sampled_rows_would_not_get_is_refused_by_name(engine, name):
    """One request; and of two the one that is power-sampled, beside an ordinary one that may ask for it."""
    power, ordinary = proposal_params(PROPOSAL, ends=(9,)), dict(max_new_tokens=2)
    value = "{}" if name == "custom_logit_processor" else True

    def ask(**asked):
        async def answers():
            async for out in engine._manager.generate_request(GenerateReqInput(**asked)):
                return out

        return engine._run(answers())

    with pytest.raises(ArgumentError, match=f"{name} is .* in a power request"):
        ask(input_ids=[4, 5, 6], sampling_params=power, **{name: value})
    with pytest.raises(ArgumentError, match=f"{name} is .* in a power request"):
        ask(input_ids=[[4], [5]], sampling_params=[ordinary, power], **{name: [None, value]})
    if name == "return_logprob":
        first, second = ask(input_ids=[[4], [5]], sampling_params=[ordinary, power], return_logprob=[True, False])
        assert len(first["meta_info"]["output_token_logprobs"]) == len(first["output_ids"]) >= 1
        assert len(second["meta_info"][DRAWS]) == len(second["output_ids"]) >= 1
    engines.assert_nothing_is_left(engine)


def test_an_abort_ends_no_other_request(engine):
    """SGLang aborts every request whose name begins with what it is given; a new engine numbers its own from 2 on."""
    count, horizon = 24, 200
    new = SglangEngine(engine._engine)
    new.begin(chains=count, lanes=1, max_length=256, alpha=2.0, beta=2.0, seed=1)
    new.prefill(list(range(count)), [[20 + i] for i in range(count)])
    opened = [
        Opened(
            lane=i, request=i, tokens=[], horizon=horizon, serial=0, chain_id=i, prompt_id=0, exclude=-1, cumw=0.0,
            theta=-np.inf, length_bonus=0.0, eos=(), stops=True,
        )
        for i in range(count)
    ]  # fmt: skip
    new.requests(opened, [])
    drawn, on, state = np.zeros(count, int), set(range(count)), SimpleNamespace(chains=count, lanes=1)

    def step(ended=()):
        ended = [*ended, *(lane for lane in on if drawn[lane] == horizon)]
        new.requests([], [Ended(lane=lane, request=lane) for lane in ended])
        on.difference_update(ended)
        drawn[:] += (new.step(state).status != Status.PENDING).sum(1).numpy()

    while drawn.min() == 0:
        step()
    assert len(on) == count
    step(ended=range(3))
    while drawn[3:].min() < horizon:
        step()
    assert (drawn[:3] < horizon).all()
    new.end()
    engines.assert_nothing_is_left(new)


def test_a_request_of_one_s_own_is_answered_with_its_draws(engine):
    """By SGLang's own call, as its HTTP server makes it."""
    out = engine._engine.generate(input_ids=[4, 5, 6], sampling_params=proposal_params(PROPOSAL, ends=(9,)))
    draws = out["meta_info"][DRAWS]
    assert len(draws) == len(out["output_ids"]) <= 9
    assert all(len(draw) == COLUMNS + 1 for draw in draws)


def test_a_stream_that_is_closed_leaves_nothing_and_another_goes_on_from_it(engine, reference):
    theirs = reference(CONFIG, prompts=6, seed=3)
    sampler = PowerSampler(engine, tiny.tokenizer())
    stream = sampler.stream(tiny.prompts(6), CONFIG, seed=3, max_chains=3)
    first = [next(stream), next(stream)]
    with pytest.raises(EngineBusyError, match="a run of this engine is on"):
        sampler.generate(tiny.prompts(1), CONFIG)
    stream.close()
    engines.assert_nothing_is_left(engine)
    done = {(result.prompt_id, result.chain_id) for result in first}
    rest = list(sampler.stream(tiny.prompts(6), CONFIG, seed=3, skip=done))
    chains.assert_same_chains(sorted([*first, *rest], key=lambda result: result.prompt_id), theirs)


def test_other_requests_of_the_engine_are_not_mixed_up(engine):
    asked = engine._engine.async_generate(
        input_ids=[4, 5, 6], sampling_params=dict(max_new_tokens=400, ignore_eos=True)
    )
    task = engine._engine.loop.create_task(asked)
    engine._run(asyncio.sleep(0.2))
    with pytest.raises(EngineBusyError, match="other requests"):
        chains.drawn(engine, CONFIG, prompts=1)
    assert len(engine._run(task)["output_ids"]) == 400


def test_an_engine_that_is_there_is_taken_as_it_is(engine):
    again = SglangEngine(engine._engine)
    assert (again.vocab_size, again.max_context, again.eos_token_ids) == (tiny.VOCAB, 506, (1,))
    assert again.most_requests == 32
    with pytest.raises(ArgumentError, match="engine_args are"):
        SglangEngine(engine._engine, max_running_requests=3)
    with pytest.raises(ArgumentTypeError, match="model is a int"):
        SglangEngine(3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("speculative_algorithm", "EAGLE"),
        ("enable_watermark", True),
        ("dllm_algorithm", "LowConfidence"),
        ("preferred_sampling_params", '{"top_p": 0.9}'),
        ("enable_dp_attention", True),
        ("disaggregation_mode", "decode"),
        ("pp_size", 2),
    ],
)
def test_what_draws_could_not_be_exact_under_is_refused_by_name(engine, monkeypatch, name, value):
    from power_kernels.api.engines.sglang.engine import _check_arguments

    class Given:
        def __getattr__(self, asked):
            return value if asked == name else getattr(engine._engine.server_args, asked)

    _check_arguments(engine._engine.server_args)
    with pytest.raises(ArgumentError, match=name):
        _check_arguments(Given())


def test_another_version_is_refused_by_name(engine, monkeypatch):
    monkeypatch.setattr(Stack, "installed", lambda stack: "0.7.1")
    with pytest.raises(
        UntestedVersionError, match=r"SGLang is 0\.7\.1; tested: 0\.5\.23.*POWER_KERNELS_UNTESTED_SGLANG=1"
    ):
        SglangEngine(engine._engine)
    monkeypatch.setenv(SGLANG.allow, "1")
    SglangEngine(engine._engine)
