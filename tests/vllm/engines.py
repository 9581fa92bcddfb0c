"""VllmEngines of the tiny model, and their chains beside the Hugging Face engine's."""

from __future__ import annotations

import contextlib
import gc

import numpy as np

from power_kernels.api import PowerConfig, PowerResult, PowerSampler
from power_kernels.api.engines.vllm import VllmEngine
from tests.vllm import tiny

CACHE = 64 << 20  # bytes


def blocks(count: int) -> int:
    """Bytes of a pool of so many blocks of the tiny model: keys and values of 2 layers and 2 heads of 32, float32."""
    return count * tiny.BLOCK * 2 * 2 * 2 * 32 * 4


def engine(folder, **args) -> VllmEngine:
    """At most 256 tokens a step: longer prompts arrive in chunks."""
    given = dict(
        dtype="float32", enforce_eager=True, block_size=tiny.BLOCK, kv_cache_memory_bytes=CACHE, max_model_len=512,
        gpu_memory_utilization=0.1, seed=0, max_num_batched_tokens=256, max_num_seqs=32,
    )  # fmt: skip
    return VllmEngine(str(folder), **(given | args))


def drawn(engine, config: PowerConfig, **call) -> list[PowerResult]:
    return PowerSampler(engine, tiny.tokenizer()).generate(tiny.prompts(call.pop("prompts", 8)), config, **call)


def assert_same_chains(ours: list[PowerResult], theirs: list[PowerResult]) -> None:
    """Of each chain all that does not say how it was computed. Weights come from logits that round differently."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        told = (a.prompt_id, a.chain_id)
        assert (b.prompt_id, b.chain_id) == told
        assert a.tokens == b.tokens, told
        assert (a.outcomes, a.left, a.finish, a.status, a.text) == (b.outcomes, b.left, b.finish, b.status, b.text), (
            told
        )
        np.testing.assert_allclose(a.log_weights, b.log_weights, atol=2e-4, err_msg=str(told))
        np.testing.assert_allclose(a.token_logp, b.token_logp, atol=2e-4, err_msg=str(told))


def accepted(results: list[PowerResult]) -> int:
    return sum(result.accepted for result in results)


def scheduler(engine: VllmEngine):
    """Of an engine core in this process."""
    return engine._llm.engine_core.engine_core.scheduler


def runner(engine: VllmEngine):
    """The model runner of an engine whose only worker is in this process."""
    worker = engine._llm.model_executor.driver_worker
    return getattr(worker, "worker", worker).model_runner


def shut_down(engine: VllmEngine) -> None:
    engine._llm.engine_core.shutdown()
    gc.collect()


@contextlib.contextmanager
def preemptions(engine: VllmEngine):
    """A list that gets the name of each request that is preempted."""
    names: list[str] = []
    owner = scheduler(engine)
    preempt = owner._preempt_request

    def noted(request, *args, **kwargs):
        names.append(request.request_id)
        return preempt(request, *args, **kwargs)

    owner._preempt_request = noted
    yield names
    owner._preempt_request = preempt


def assert_nothing_is_left(engine: VllmEngine) -> None:
    """No request, no block and no slot is held after a run."""
    while engine._llm.has_unfinished_requests():
        engine._llm.step()
    engine._llm.step()  # lets the worker hear of the last that ended
    owner = scheduler(engine)
    assert not owner.requests
    assert not owner.running
    assert not owner.waiting
    pool = owner.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is never given out
