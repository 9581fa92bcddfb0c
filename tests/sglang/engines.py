"""SglangEngines of the tiny model."""

from __future__ import annotations

import contextlib
import time

from power_kernels.api import SglangEngine

GIVEN = dict(
    device="cpu", attention_backend="torch_native", dtype="float32", grammar_backend="none", page_size=1,
    max_total_tokens=8192, mem_fraction_static=0.05, context_length=512, max_running_requests=32,
)  # fmt: skip


def engine(folder, **args) -> SglangEngine:
    return SglangEngine(str(folder), **(GIVEN | args))


@contextlib.contextmanager
def replies(engine: SglangEngine):
    """The meta_info of all that SGLang says while this is open."""
    told: list[dict] = []
    reply = engine._reply

    def noted(name, out):
        told.append(out["meta_info"])
        return reply(name, out)

    engine._reply = noted
    yield told
    del engine._reply


def assert_nothing_is_left(engine: SglangEngine) -> None:
    """No request is on, in this process or in SGLang's."""
    engine._run(engine._settled())
    assert not engine._listeners
    assert not engine._manager.rid_to_state
    for _ in range(600):  # the step that aborts a request may still be on
        if engine._engine.flush_cache().success:  # which SGLang does where nothing runs and nothing waits
            return
        time.sleep(0.1)
    raise AssertionError("SGLang still works on something")
