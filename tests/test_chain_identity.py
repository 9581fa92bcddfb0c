"""DESIGN 9.3: whatever changes only how a chain is computed leaves the chain identical to the one-lane reference."""

import numpy as np
import pytest
import torch

from power_kernels.api import PowerConfig, PowerSampler
from power_kernels.reference import ReferenceChain
from tests.toys import Toy, ToyEngine, power_toy

print(PowerConfig, np, pytest, torch, Toy)


def test_basic():
    toy = power_toy()
    config = PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=5, block_size=2, mcmc_steps=4, final_steps=3, lanes=2)
    engine = ToyEngine(toy)
    out = PowerSampler(engine).generate([[5], [6, 7, 1]], config, num_chains=50, seed=3)
    for r in out:
        ref = ReferenceChain(toy.logits, config.law, alpha=2.0, beta=config.beta, seed=3, eos=toy.eos, chain_id=r.chain_id, prompt_id=r.prompt_id)
        a = ref.run()
        assert list(a.tokens) == r.tokens
        assert ref.outcomes == r.outcomes
        np.testing.assert_allclose(np.diff(a.cumw), r.log_weights, atol=1e-5)
    print(sum(r.accepted for r in out), sum(r.steps for r in out), sum(r.unchanged for r in out))
