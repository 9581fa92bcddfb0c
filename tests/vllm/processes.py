"""vLLM in processes of its own (`make test-vllm`): an engine core, and two workers that hold the model together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from power_kernels.api import PowerConfig
from tests.stacks import chains, tiny
from tests.vllm import engines

CONFIG = PowerConfig(alpha=2.0, temperature=1 / 1.5, max_new_tokens=48, block_size=16, mcmc_steps=5, lanes=1)


@pytest.fixture(scope="module")
def engine(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        made = engines.engine(folder, tensor_parallel_size=2, distributed_executor_backend="mp")
    yield made
    engines.shut_down(made)


@pytest.mark.parametrize("lanes", [1, 4])
def test_chains_are_the_hugging_face_engine_s(engine, huggingface, lanes):
    call = dict(prompts=8, eos_token_id=tiny.EOS[:4], seed=2024)
    ours = chains.drawn(engine, replace(CONFIG, lanes=lanes), **call)
    chains.assert_same_chains(ours, chains.drawn(huggingface, CONFIG, **call))
    assert chains.accepted(ours) >= 20


def test_stop_strings_and_aborts_reach_the_engine_core(engine, huggingface):
    config, call = replace(CONFIG, stop=("ab", "c1"), lanes=2), dict(prompts=6, eos_token_id=[], seed=5)
    ours = chains.drawn(engine, config, **call)
    chains.assert_same_chains(ours, chains.drawn(huggingface, replace(config, lanes=1), **call))
    assert sum(result.finish == "stop" for result in ours) >= 2
    assert not engine._llm.has_unfinished_requests()
