"""Power requests to a vLLM whose engine core has the chains, and the same chains on the Hugging Face engine."""

from __future__ import annotations

import gc

import numpy as np
from vllm import LLM, SamplingParams

from power_kernels.api import PowerConfig, PowerResult, PowerSampler
from power_kernels.api.engines.vllm import plugin
from power_kernels.api.engines.vllm.serve import admission
from power_kernels.api.engines.vllm.serve.scheduler import STATISTICS
from tests.stacks import tiny

SCHEDULER = "power_kernels.api.engines.vllm.serve.scheduler.PowerScheduler"
ASKED = dict(alpha=2.0, temperature=1 / 1.5, block_size=16, mcmc_steps=5)  # as a client says it


def started(folder, **args) -> LLM:
    """At most 256 tokens a step: longer prompts arrive in chunks."""
    plugin.register()
    given = dict(
        dtype="float32", enforce_eager=True, block_size=tiny.BLOCK, kv_cache_memory_bytes=64 << 20, max_model_len=512,
        gpu_memory_utilization=0.1, seed=0, max_num_batched_tokens=256, max_num_seqs=32,
        scheduler_cls=SCHEDULER, logits_processors=[admission.NAME],
    )  # fmt: skip
    return LLM(model=str(folder), **(given | args))


def shut_down(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def scheduler(llm: LLM):
    return llm.llm_engine.engine_core.engine_core.scheduler


def params(*, seed: int, max_tokens: int = 48, eos=(), stop=(), **asked) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, seed=seed, stop_token_ids=list(eos), stop=list(stop), ignore_eos=True,
        extra_args=ASKED | asked,
    )  # fmt: skip


def drawn_here(engine, prompt: list[int], *, seed: int, max_tokens: int = 48, eos=(), stop=(), **asked) -> PowerResult:
    """By the Hugging Face engine, with one lane."""
    config = PowerConfig(**(ASKED | asked | dict(max_new_tokens=max_tokens, stop=tuple(stop), lanes=1)))
    (result,) = PowerSampler(engine, tiny.tokenizer()).generate([prompt], config, seed=seed, eos_token_id=list(eos))
    return result


def assert_same_answer(output, expected: PowerResult) -> None:
    """output: a `RequestOutput` of vLLM."""
    completion, told = output.outputs[0], output.kv_transfer_params[STATISTICS]
    assert list(completion.token_ids) == expected.tokens
    assert completion.finish_reason == ("length" if expected.finish == "length" else "stop")
    assert told["finish"] == expected.finish
    assert (told["steps"], told["accepted"], told["unchanged"]) == (
        expected.steps, expected.accepted, expected.unchanged,
    )  # fmt: skip
    np.testing.assert_allclose(told["logp"], expected.logp, atol=1e-3)
    np.testing.assert_allclose(told["log_weight"], sum(expected.log_weights), atol=1e-3)
    if expected.finish == "eos":
        assert completion.text == tiny.tokenizer().decode(expected.tokens[:-1])
    else:
        assert completion.text == expected.text


def assert_nothing_is_left(llm: LLM) -> None:
    """No request, no chain, no block is held."""
    engine, owner = llm.llm_engine, scheduler(llm)
    engine.step()  # lets the worker hear of the last that ended
    assert not engine.has_unfinished_requests()
    assert owner.get_num_unfinished_requests() == 0
    assert not owner.requests
    assert not owner.running
    assert not owner.waiting
    assert not owner._lives
    assert not owner._owner
    assert not owner._waiting
    assert not owner._outgoing
    pool = owner.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is never given out
