"""Chains of an engine beside the Hugging Face engine's."""

from __future__ import annotations

import numpy as np

from power_kernels.api import PowerConfig, PowerResult, PowerSampler
from tests.stacks import tiny


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
