"""SGLang as it may be started, one after the other: when an engine is closed, SGLang ends all child processes of the
program (`make test-sglang`)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from power_kernels.api import PowerConfig
from tests.sglang import engines
from tests.stacks import chains, tiny

CONFIG = PowerConfig(alpha=2.0, temperature=1 / 1.5, max_new_tokens=48, block_size=16, mcmc_steps=5, lanes=1)

# What SGLang is started with, and the environment.
STARTED = {
    "tokens in chunks, without overlap": (dict(chunked_prefill_size=32, disable_overlap_schedule=True), {}),
    "chunks beside decodes": (dict(chunked_prefill_size=32, enable_mixed_chunk=True), {}),
    "no prefix cache": (dict(disable_radix_cache=True), {}),
    "retraction": (dict(max_total_tokens=2048), {"SGLANG_TEST_RETRACT": "1"}),
    "two workers": (dict(tp_size=2), {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}),
}


@pytest.mark.parametrize("name", STARTED)
def test_however_sglang_works_the_chains_are_the_same(folder, huggingface, monkeypatch, name):
    args, environment = STARTED[name]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    engine = engines.engine(folder, **args)
    try:
        for lanes in (1, 3):
            call = dict(prompts=12, seed=2024, eos_token_id=tiny.EOS[:6])
            with engines.replies(engine) as told:
                ours = chains.drawn(engine, replace(CONFIG, lanes=lanes), **call)
            chains.assert_same_chains(ours, chains.drawn(huggingface, CONFIG, **call))
            assert chains.accepted(ours) >= 40
            if name == "retraction":
                assert sum(one.get("num_retractions", 0) for one in told) >= 5
            if name == "no prefix cache":
                assert sum(result.cost.cached for result in ours) == 0
                assert sum(result.cost.recomputed for result in ours) >= 5000
            engines.assert_nothing_is_left(engine)
    finally:
        engine.close()


def test_processes_without_our_sampler_are_found_out(folder, monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    with pytest.raises(RuntimeError, match="SGLANG_PLUGINS"):
        engines.engine(folder)
