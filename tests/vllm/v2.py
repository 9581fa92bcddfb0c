"""vLLM's V2 model runner, in this process, its kernels in Triton's interpreter: some 0.1 s a step, so that chains are
short (`make test-vllm`)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.vllm import interpreted  # noqa: F401, before vLLM

# isort: split
from vllm.platforms.cpu import CpuPlatform

from power_kernels.api import PowerConfig
from power_kernels.slots import SlotFlag
from tests.stacks import chains, seen, tiny
from tests.vllm import engines, mixed

CONFIG = PowerConfig(alpha=2.0, temperature=1 / 1.5, max_new_tokens=16, block_size=8, mcmc_steps=3, lanes=1)


@pytest.fixture(scope="module")
def overlapping(folder):
    """vLLM's asynchronous scheduler, which the CPU's platform turns off, and a pool too small for all requests: one of
    the 7 blocks is never given out, and an answer takes up to 4."""
    before = CpuPlatform.check_and_update_config.__func__

    def asynchronous(cls, config):
        before(cls, config)
        config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(asynchronous))
        made = engines.engine(folder, kv_cache_memory_bytes=engines.blocks(7), max_model_len=128, async_scheduling=True)
    yield made
    engines.shut_down(made)


def test_a_v2_runner_serves_here(engine):
    assert type(engines.runner(engine)).__module__ == "vllm.v1.worker.cpu.model_runner"
    assert type(engines.runner(engine).sampler).__name__ == "PowerSamplerV2"


def test_every_row_is_the_reference_s_on_the_logits_that_the_worker_saw(engine):
    with seen.seen() as rows:
        mixed.proposals_of_many_users(engine)
    kinds = seen.check(rows)
    seen.assert_exponents_differ(rows, 6)
    assert kinds["rows"] >= 150, kinds
    assert kinds["excluded"] >= 6, kinds
    assert kinds["in their prompt"] >= 2, kinds
    assert kinds["with entropy"] >= 60, kinds


def test_ordinary_rows_are_what_they_are_without_ours(engine):
    mixed.assert_ordinary_rows_untouched(engine, filters=False)  # whose kernel the interpreter cannot run


@pytest.mark.parametrize(
    ("config", "call"),
    [
        (CONFIG, dict(prompts=5)),
        (replace(CONFIG, lanes=3), dict(prompts=3, eos_token_id=tiny.EOS)),
        (replace(CONFIG, cut="divergence-entropy", stop=("ab", "c1")), dict(prompts=3, eos_token_id=[])),
    ],
    ids=["as it is", "three lanes, EOS", "divergence, stop strings"],
)
def test_chains_are_the_hugging_face_engine_s(engine, huggingface, config, call):
    with seen.seen() as rows:
        ours = chains.drawn(engine, config, seed=2024, **call)
    assert seen.check(rows)["rows"] >= 100
    chains.assert_same_chains(ours, chains.drawn(huggingface, replace(config, lanes=1), seed=2024, **call))
    engines.assert_nothing_is_left(engine)


def test_asynchronous_scheduling_and_preemption_change_no_chain(overlapping, huggingface):
    """Driver, scheduler and worker take turns in one process: how often a request is preempted does not depend on the
    machine's speed."""
    assert type(engines.scheduler(overlapping)).__name__ == "AsyncScheduler"
    config = replace(CONFIG, lanes=2, max_new_tokens=40, block_size=20)
    call = dict(prompts=6, eos_token_id=tiny.EOS[:4])
    with engines.preemptions(overlapping) as preempted, seen.seen() as rows:
        ours = chains.drawn(overlapping, config, seed=7, **call)
    assert len(preempted) >= 5
    assert sum(bool(row.flags & SlotFlag.REJECTED) for row in rows) >= 3
    chains.assert_same_chains(ours, chains.drawn(huggingface, replace(config, lanes=1), seed=7, **call))
    engines.assert_nothing_is_left(overlapping)
