"""DESIGN 9.4: the driver on a tiny random transformers model against enumeration, and against the reference chain.

The model's logits after every open prefix come from full forward passes in float64. They make a `Toy`, whose exact
output law is q K^m, or a product of stages (`tests/exact_law.py`); no burn-in, no tolerance, one p-value. The float32
engine differs from that law by less than 1e-5, which 8192 chains cannot see.
"""

from __future__ import annotations

import copy
import functools
import itertools

import numpy as np
import pytest
import torch

from power_kernels.api import HuggingFaceEngine, PowerConfig, PowerSampler
from power_kernels.reference import ReferenceChain
from power_kernels.state import Outcome
from tests import tiny_models
from tests.devices import DEVICE
from tests.exact_law import chi_square, output_law
from tests.toys import Toy

P_VALUE = 1e-5
SEED = 20
CHAINS = 8192
PROMPT = [2, 1, 1, 2, 0, 1]
ENDS = (3,)
HORIZON = 4


@functools.cache
def model(layers: int):
    """Vocabulary 4, hidden 16; scaled so that the logits of a row spread over two nats or so."""
    return tiny_models.llama(
        vocab_size=4, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, eos_token_id=ENDS[0], bos_token_id=0, pad_token_id=None,
    )  # fmt: skip


@functools.cache
def table(layers: int) -> Toy:
    """The model's logits after PROMPT and every open prefix, in float64."""
    toy = Toy(4, 0, seed=0, eos=ENDS)
    exact = copy.deepcopy(model(layers)).double()
    with torch.inference_mode():
        for n in range(HORIZON):
            prefixes = list(itertools.product(toy.open_tokens, repeat=n))
            ids = torch.tensor([[*PROMPT, *prefix] for prefix in prefixes], device=DEVICE)
            logits = exact(input_ids=ids, use_cache=False).logits[:, -1].cpu()
            toy.table |= dict(zip(prefixes, logits.numpy(), strict=True))
    return toy


CONFIGS = {
    "one stage": PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=4, block_size=None, mcmc_steps=2),
    "stages and final steps": PowerConfig(
        alpha=2.0, temperature=0.8, max_new_tokens=4, block_size=2, mcmc_steps=1, final_steps=1
    ),
    "beta equals alpha": PowerConfig(alpha=2.0, max_new_tokens=4, block_size=3, mcmc_steps=2),
    "divergence": PowerConfig(
        alpha=2.0, temperature=0.8, max_new_tokens=4, block_size=None, mcmc_steps=2, cut="divergence"
    ),
    "divergence by entropy": PowerConfig(
        alpha=2.0,
        temperature=0.8,
        max_new_tokens=4,
        block_size=2,
        mcmc_steps=2,
        final_steps=1,
        cut="divergence-entropy",
    ),
}
# lanes: prefetched proposals of the same chain. slots: chains of a batch; 90 does not divide the number of chains.
CASES = [
    ("one stage", 1, dict(lanes=1), 256),
    ("one stage", 2, dict(lanes=2), 256),
    ("one stage", 1, dict(lanes=2, free_prefix=False), 128),
    ("stages and final steps", 2, dict(lanes=1), 256),
    ("stages and final steps", 1, dict(lanes=2, early_rejection=False), 90),
    ("beta equals alpha", 2, dict(lanes=3), 128),
    ("divergence", 2, dict(lanes=2), 256),
    ("divergence by entropy", 2, dict(lanes=2), 256),
]


def test_the_logits_are_far_from_flat_and_depend_on_the_past():
    for layers in (1, 2):
        rows = np.array(list(table(layers).table.values()))
        rows -= np.logaddexp.reduce(rows, axis=1, keepdims=True)
        assert len(rows) == 1 + 3 + 9 + 27
        assert np.median(rows.max(1) - rows.min(1)) > 1.0
        assert rows.std(0).min() > 0.1  # across prefixes


@pytest.mark.parametrize(("name", "layers", "how", "slots"), CASES)
def test_answers_of_the_driver_follow_the_exact_law(name, layers, how, slots):
    """8192 chains, chi-square over every answer that can occur, p >= 1e-5; 4000 acceptances, 2000 unchanged steps.

    Under a divergence cut no step is unchanged.
    """
    config = PowerConfig(**{**CONFIGS[name].__dict__, **how})
    engine = HuggingFaceEngine(model(layers))
    assert engine.eos_token_ids == ENDS
    results = PowerSampler(engine).generate([PROMPT], config, num_chains=CHAINS, seed=SEED, max_chains=slots)
    law = output_law(table(layers), config.law, config.alpha, config.beta)
    p = chi_square((tuple(r.tokens) for r in results), law)
    assert p >= P_VALUE
    assert sum(r.accepted for r in results) >= 4000
    if config.cut == "uniform":
        assert sum(r.unchanged for r in results) >= 2000
    else:
        assert sum(r.unchanged for r in results) == 0


def test_the_test_has_power():
    """The same answers against laws that are wrong by a little: no step, one step, alpha instead of beta."""
    config = CONFIGS["one stage"]
    results = PowerSampler(HuggingFaceEngine(model(1))).generate(
        [PROMPT], config, num_chains=CHAINS, seed=SEED, max_chains=256
    )
    answers = [tuple(r.tokens) for r in results]
    for wrong in (dict(mcmc_steps=0), dict(mcmc_steps=1), dict(temperature=0.5)):
        other = PowerConfig(**{**config.__dict__, **wrong})
        p = chi_square(answers, output_law(table(1), other.law, other.alpha, other.beta))
        assert p < P_VALUE


@pytest.mark.parametrize(
    ("name", "lanes", "slots"),
    [("stages and final steps", 1, 128), ("stages and final steps", 2, 50), ("divergence by entropy", 2, 128)],
)
def test_chains_of_the_driver_are_those_of_the_reference(name, lanes, slots):
    """512 chains against `ReferenceChain` on the float64 logits, token for token and step for step.

    float32 logits move the CDFs by some 1e-6, so that one chain in ten thousand may differ: at most 2 of 512 here.
    """
    config = PowerConfig(**{**CONFIGS[name].__dict__, "lanes": lanes})
    results = PowerSampler(HuggingFaceEngine(model(2))).generate(
        [PROMPT], config, num_chains=512, seed=SEED, max_chains=slots
    )
    different = 0
    for r in results:
        chain = ReferenceChain(
            table(2).logits,
            config.law,
            alpha=config.alpha,
            beta=config.beta,
            seed=SEED,
            eos=ENDS,
            chain_id=r.chain_id,
        )
        answer = chain.run()
        if (r.tokens, r.outcomes) != (list(answer.tokens), chain.outcomes):
            different += 1
            continue
        np.testing.assert_allclose(r.log_weights, np.diff(answer.cumw), atol=1e-4)
        assert r.logp == pytest.approx(table(2).logp(answer.tokens), abs=1e-4)
    assert different <= 2
    assert sum(r.outcomes.count(Outcome.ACCEPTED) for r in results) >= 256
