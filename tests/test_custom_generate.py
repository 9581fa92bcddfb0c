"""`model.generate(custom_generate=power_sample)`: the chains of PowerSampler in the shape that generate() returns."""

import gc
import weakref

import pytest
import torch

from power_kernels.api import PowerConfig, PowerSampler, power_sample
from power_kernels.errors import ArgumentError
from tests.devices import DEVICE
from tests.tiny_models import llama

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]], device=DEVICE)
OPTIONS = {"alpha": 3.0, "block_size": 4, "mcmc_steps": 3}
PAD = 0


@pytest.fixture(scope="module")
def model():
    model = llama()
    model.generation_config.eos_token_id = [3, 4]
    model.generation_config.pad_token_id = PAD
    return model


def expected(model, prompts, *, max_new_tokens=12, eos=(3, 4), seed=7, num_chains=1):
    config = PowerConfig(max_new_tokens=max_new_tokens, **OPTIONS)
    return PowerSampler(model).generate(prompts, config, seed=seed, eos_token_id=list(eos), num_chains=num_chains)


def generate(model, ids=IDS, **arguments):
    arguments = {"max_new_tokens": 12, "attention_mask": torch.ones_like(ids), "seed": 7, **OPTIONS, **arguments}
    return model.generate(ids, custom_generate=power_sample, **arguments)


def check(out, ids, results):
    longest = max(len(r.tokens) for r in results)
    assert out.shape == (len(results), ids.shape[1] + longest)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    for row, result in zip(out[:, ids.shape[1] :].tolist(), results, strict=True):
        assert row == result.tokens + [PAD] * (longest - len(result.tokens))


def test_the_answers_are_the_samplers(model):
    results: list = []
    out = generate(model, power_results=results)
    check(out, IDS, expected(model, IDS))
    assert [r.steps > 0 for r in results] == [True, True]


def test_eos_of_the_call_rules(model):
    check(generate(model, eos_token_id=20), IDS, expected(model, IDS, eos=[20]))


def test_left_padding_is_not_part_of_the_prompt(model):
    ids = torch.tensor([[PAD, PAD, 7, 8], [9, 10, 11, 12]], device=DEVICE)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], device=DEVICE)
    out = generate(model, ids, attention_mask=mask)
    check(out, ids, expected(model, [[7, 8], [9, 10, 11, 12]]))


def test_several_answers_a_prompt_come_in_consecutive_rows(model):
    check(generate(model, num_chains=3), IDS.repeat_interleave(3, 0), expected(model, IDS, num_chains=3))
    out = generate(model, do_sample=True, top_k=0, num_return_sequences=2)
    repeated = IDS.repeat_interleave(2, 0)
    check(out, repeated, expected(model, repeated))


def test_torchs_seed_governs_a_call_without_one(model):
    def once():
        torch.manual_seed(3)
        return generate(model, seed=None)

    first = once()
    assert torch.equal(first, once())
    assert not torch.equal(first, generate(model, seed=None))


def test_the_model_generates_plainly_afterwards(model):
    plain = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 6}
    before = model.generate(IDS, **plain)
    generate(model)
    assert torch.equal(before, model.generate(IDS, **plain))


def test_a_model_is_not_kept_alive():
    model = llama()
    generate(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"do_sample": True}, "logits_processor holds TopKLogitsWarper"),  # generate()'s hidden top_k = 50
        ({"do_sample": True, "top_k": 0, "temperature": 0.5}, "logits_processor holds TemperatureLogitsWarper"),
        ({"repetition_penalty": 1.5}, "logits_processor holds RepetitionPenaltyLogitsProcessor"),
        ({"num_beams": 3}, "num_beams is 3"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate is True"),
        ({"max_time": 5.0}, "stopping_criteria holds MaxTimeCriteria"),
        ({"alpha": 0.5}, "alpha is 0.5"),
        ({"max_new_tokens": 100_000}, "must not exceed the model's context"),
    ],
)
def test_what_would_change_the_law_is_refused(model, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        generate(model, **arguments)
