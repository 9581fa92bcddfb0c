"""VllmEngines of the tiny model."""

from __future__ import annotations

import contextlib
import gc

from power_kernels.api.engines.vllm import VllmEngine
from tests.stacks import tiny

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
