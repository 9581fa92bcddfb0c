"""vLLM's V1 model runner, in this process (`make test-vllm`): its sampler, and whole chains."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
from vllm import SamplingParams

from power_kernels.api import EngineBusyError, PowerConfig, PowerSampler
from power_kernels.api.engines.serving.rows import PowerRows
from power_kernels.api.engines.serving.versions import VLLM, Stack
from power_kernels.api.engines.vllm import UntestedVersionError, VllmEngine
from power_kernels.api.engines.vllm.parameters import check_exact
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.slots import SlotField, SlotFlag
from power_kernels.state import Status
from tests.stacks import chains, seen, tiny
from tests.vllm import engines, mixed

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


def test_a_v1_runner_serves_here(engine):
    assert type(engines.runner(engine)).__module__ == "vllm.v1.worker.cpu_model_runner"


def test_every_row_is_the_reference_s_on_the_logits_that_the_worker_saw(engine):
    """Chunked prompts, exclusion, and a seed, an alpha and a beta of each row."""
    with seen.seen() as rows:
        mixed.proposals_of_many_users(engine)
    kinds = seen.check(rows)
    seen.assert_exponents_differ(rows, 6)
    assert kinds["rows"] >= 150, kinds
    assert kinds["excluded"] >= 6, kinds
    assert kinds["in their prompt"] >= 2, kinds


def test_ordinary_rows_are_what_they_are_without_ours(engine):
    mixed.assert_ordinary_rows_untouched(engine)


# What is asked for, and at least how many acceptances and proposals that the worker ended it must bring: 97 chains.
SETTINGS = {
    "as it is": (CONFIG, dict(prompts=16), 80, 110),
    "no early rejection": (replace(CONFIG, early_rejection=False), dict(prompts=8), 35, 0),
    "four lanes": (replace(CONFIG, lanes=4), dict(prompts=8), 35, 60),
    "EOS": (CONFIG, dict(prompts=12, eos_token_id=tiny.EOS), 30, 50),
    "EOS, four lanes": (replace(CONFIG, lanes=4), dict(prompts=6, eos_token_id=tiny.EOS), 18, 30),
    "stop strings": (replace(CONFIG, stop=("ab", "c1")), dict(prompts=8, eos_token_id=tiny.EOS[:3]), 20, 25),
    "stop strings alone, four lanes": (
        replace(CONFIG, stop=("ab", "c1"), lanes=4), dict(prompts=6, eos_token_id=[]), 7, 25
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
    "prefix forwarded": (
        replace(CONFIG, free_prefix=False, max_new_tokens=12, block_size=6, mcmc_steps=2), dict(prompts=3), 3, 3
    ),
    "two chains a prompt": (replace(CONFIG, max_new_tokens=24), dict(prompts=4, num_chains=2), 30, 25),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_chains_are_the_hugging_face_engine_s(engine, reference, name):
    config, call, accepted, ended = SETTINGS[name]
    with seen.seen() as rows:
        ours = chains.drawn(engine, config, seed=2024, **call)
    chains.assert_same_chains(ours, reference(replace(config, lanes=1), seed=2024, **call))
    assert chains.accepted(ours) >= accepted
    assert sum(bool(row.flags & SlotFlag.REJECTED) for row in rows) >= ended
    seen.check(rows)
    engines.assert_nothing_is_left(engine)


@pytest.fixture(scope="module")
def without_cache(folder):
    yield (made := engines.engine(folder, enable_prefix_caching=False))
    engines.shut_down(made)


@pytest.fixture(scope="module")
def small_pool(folder):
    """Of fewer blocks than 16 chains of up to 145 + 48 tokens want."""
    yield (made := engines.engine(folder, kv_cache_memory_bytes=engines.blocks(28)))
    engines.shut_down(made)


def test_without_a_prefix_cache_the_chains_are_the_same(without_cache, reference):
    ours = chains.drawn(without_cache, CONFIG, prompts=16, seed=2024)
    chains.assert_same_chains(ours, reference(CONFIG, prompts=16, seed=2024))
    assert chains.accepted(ours) >= 60
    assert sum(result.cost.cached for result in ours) == 0
    engines.assert_nothing_is_left(without_cache)


@pytest.mark.parametrize(("lanes", "least"), [(1, 20), (2, 18)])
def test_preemption_changes_no_chain(small_pool, reference, lanes, least):
    with engines.preemptions(small_pool) as preempted:
        ours = chains.drawn(small_pool, replace(CONFIG, lanes=lanes), prompts=16, seed=2024)
    assert len(preempted) >= least
    chains.assert_same_chains(ours, reference(CONFIG, prompts=16, seed=2024))
    engines.assert_nothing_is_left(small_pool)


def test_a_proposal_recomputes_less_than_half_a_block_of_its_prompt(engine):
    """Of what it shares with its chain: on average, the tail of a block. The token that gives the first draw is one
    more."""
    with opened_requests(engine) as opened:
        results = chains.drawn(engine, CONFIG, prompts=16, seed=1)
    recomputed = sum(result.cost.recomputed for result in results)
    later = len(opened) - len(results)
    assert later >= 200
    assert recomputed / later + 1 <= tiny.BLOCK / 2 + 1
    cached = sum(result.cost.cached for result in results)
    prompts = sum(len(prompt) for prompt in opened)
    assert sum(result.cost.prefill for result in results) + recomputed + cached + len(opened) == prompts


def test_the_account_adds_up(engine):
    """Every token that went through the model is in one place: what the driver says is what the scheduler did."""
    with scheduled_tokens(engine) as scheduled:
        results = chains.drawn(engine, replace(CONFIG, lanes=3), prompts=6, seed=9, eos_token_id=tiny.EOS)
    forwarded = sum(result.cost.forwarded for result in results)
    # What was on its way when a request was aborted has gone through the model and is told to nobody.
    assert 0 <= sum(scheduled) - forwarded <= 0.02 * forwarded
    assert sum(result.cost.voided for result in results) >= 30


@contextlib.contextmanager
def opened_requests(engine):
    """The prompts of all requests that are opened."""
    prompts: list[list[int]] = []
    add = engine._llm.add_request

    def noted(name, prompt, params):
        prompts.append(prompt["prompt_token_ids"])
        return add(name, prompt, params)

    engine._llm.add_request = noted
    yield prompts
    del engine._llm.add_request


@contextlib.contextmanager
def scheduled_tokens(engine):
    """How many tokens each step read."""
    counts: list[int] = []
    owner = engines.scheduler(engine)
    schedule = owner.schedule

    def noted(*args, **kwargs):
        output = schedule(*args, **kwargs)
        counts.append(output.total_num_scheduled_tokens)
        return output

    owner.schedule = noted
    yield counts
    del owner.schedule


# -- what is bad, and what is refused


def test_a_chain_whose_logits_go_bad_stops_and_the_others_go_on(engine, reference, monkeypatch):
    draw = PowerRows.draw

    def poisoned(self, logits, slots, position, *rest):
        field = self.table.field[slots]
        bad = (field[:, SlotField.PROMPT_ID] == 2) & (field[:, SlotField.SERIAL] == 3)
        logits = logits.clone()
        logits[bad] = float("nan")
        draw(self, logits, slots, position, *rest)

    monkeypatch.setattr(PowerRows, "draw", poisoned)
    call = dict(prompts=4, seed=2024, eos_token_id=tiny.EOS[:2])
    ours = chains.drawn(engine, CONFIG, **call)
    theirs = reference(CONFIG, **call)
    assert (ours[2].finish, ours[2].status, ours[2].steps) == ("fault", Status.NAN, 2)
    chains.assert_same_chains(ours[:2] + ours[3:], theirs[:2] + theirs[3:])
    engines.assert_nothing_is_left(engine)


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
    ours = sorted([*first, *rest], key=lambda result: result.prompt_id)
    chains.assert_same_chains(ours, theirs)


def test_a_request_that_vllm_ends_by_itself_is_an_error_and_leaves_nothing(engine, monkeypatch):
    step = engine._llm.step

    def ended():
        outputs = step()
        for output in outputs:
            if output.finished:
                output.outputs[0].finish_reason = "abort"
        return outputs

    monkeypatch.setattr(engine._llm, "step", ended)
    with pytest.raises(RuntimeError, match="vLLM ended a request by itself: abort"):
        chains.drawn(engine, CONFIG, prompts=3, seed=1)
    monkeypatch.undo()
    engines.assert_nothing_is_left(engine)


def test_other_requests_of_the_engine_are_not_lost(engine):
    engine._llm.add_request("other", {"prompt_token_ids": [5, 6]}, mixed.plain(None))
    with pytest.raises(EngineBusyError, match="other requests"):
        chains.drawn(engine, CONFIG, prompts=1)
    outputs = []
    while engine._llm.has_unfinished_requests():
        outputs += engine._llm.step()
    assert len(outputs[-1].outputs[0].token_ids) == 6


def test_an_engine_that_is_there_is_taken_as_it_is(engine):
    again = VllmEngine(engine._llm)
    assert (again.vocab_size, again.max_context, again.eos_token_ids) == (tiny.VOCAB, 512, (1,))
    with pytest.raises(ArgumentError, match="engine_args are"):
        VllmEngine(engine._llm, max_num_seqs=3)
    with pytest.raises(ArgumentTypeError, match="model is a int"):
        VllmEngine(3)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("speculative_config", lambda config: setattr(config, "speculative_config", object())),
        ("watermark_config", lambda config: setattr(config, "watermark_config", object())),
        ("logits_processors", lambda config: setattr(config.model_config, "logits_processors", ["a.B"])),
        ("enable_trace_replay", lambda config: setattr(config.model_config, "enable_trace_replay", True)),
        (
            "enable_batch_sharded_sampling",
            lambda config: setattr(config.parallel_config, "enable_batch_sharded_sampling", True),
        ),
        ("runner", lambda config: setattr(config.model_config, "runner_type", "pooling")),
    ],
)
def test_what_draws_could_not_be_exact_under_is_refused_by_name(engine, monkeypatch, named, change):
    config = copy.copy(engine._llm.vllm_config)
    config.model_config, config.parallel_config = copy.copy(config.model_config), copy.copy(config.parallel_config)
    change(config)
    monkeypatch.setattr(engine._llm, "vllm_config", config)
    with pytest.raises(ArgumentError, match=named):
        VllmEngine(engine._llm)


REFUSED = dict(
    n=2, temperature=0.5, top_k=5, top_p=0.9, min_p=0.1, presence_penalty=0.5, frequency_penalty=0.5,
    repetition_penalty=1.2, logit_bias={3: 1.0}, allowed_token_ids=[3], bad_words=["a"], min_tokens=2, stop="x",
    thinking_token_budget=3, prompt_logprobs=1, logprob_token_ids=[4],
)  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_could_not_be_exact_is_refused_by_name(name):
    check_exact(SamplingParams(max_tokens=4, logprobs=2, stop_token_ids=[1], seed=3))
    with pytest.raises(ArgumentError, match=name):
        check_exact(SamplingParams(**{name: REFUSED[name]}))


def test_workers_without_our_sampler_are_found_out(engine, monkeypatch):
    runner = engines.runner(engine)
    monkeypatch.setattr(runner, "sampler", runner.sampler.base)
    with pytest.raises(RuntimeError, match=r"VLLM_PLUGINS.*V2 model runner"):
        VllmEngine(engine._llm)
    engines.assert_nothing_is_left(engine)


def test_another_version_is_refused_by_name(engine, monkeypatch):
    monkeypatch.setattr(Stack, "installed", lambda stack: "0.47.1")
    with pytest.raises(UntestedVersionError, match=r"vLLM is 0\.47\.1; tested: .*POWER_KERNELS_UNTESTED_VLLM=1"):
        VllmEngine(engine._llm)
    monkeypatch.setenv(VLLM.allow, "1")
    VllmEngine(engine._llm)
