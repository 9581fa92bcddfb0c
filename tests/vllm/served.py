"""Chains in the engine core, vLLM's V1 runner in this process (`make test-vllm`): what a client gets is what
`PowerSampler` draws on the Hugging Face engine with the same seed."""

from __future__ import annotations

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from power_kernels.api.engines.vllm.serve import admission
from tests.stacks import tiny
from tests.vllm import engines, serving

SMALL_POOL = 20  # blocks


@pytest.fixture(scope="module")
def llm(folder):
    yield (made := serving.started(folder))
    serving.shut_down(made)


SETTINGS = {
    "as it is": (16, dict()),
    "four lanes": (8, dict(lanes=4)),
    "no early rejection": (4, dict(early_rejection=0)),
    "EOS": (8, dict(eos=tiny.EOS)),
    "EOS, four lanes": (6, dict(eos=tiny.EOS, lanes=4)),
    "stop strings": (8, dict(stop=("ab", "c1"), eos=tiny.EOS[:3])),
    "stop strings alone, three lanes": (6, dict(stop=("ab", "c1"), lanes=3)),
    "divergence by entropy": (4, dict(cut="divergence-entropy")),
    "length bonus, final steps": (4, dict(length_bonus=0.5, final_steps=4, eos=tiny.EOS)),
    "one stage": (4, dict(block_size=64, max_tokens=24)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_served_chains_are_those_of_the_hugging_face_engine(llm, huggingface, name):
    """All of a setting at once; each request has a seed of its own."""
    count, asked = SETTINGS[name]
    prompts = tiny.prompts(count)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [serving.params(seed=100 + i, **asked) for i in range(count)],
        use_tqdm=False,
    )
    asked = {k: bool(v) if k == "early_rejection" else v for k, v in asked.items()}
    expected = [serving.drawn_here(huggingface, prompt, seed=100 + i, **asked) for i, prompt in enumerate(prompts)]
    for output, one in zip(outputs, expected, strict=True):
        serving.assert_same_answer(output, one)
    assert sum(one.accepted for one in expected) >= count
    finished = {one.finish for one in expected}
    assert "eos" in finished or "EOS" not in name
    assert "stop" in finished or "stop" not in name
    serving.assert_nothing_is_left(llm)


def test_ordinary_requests_beside_chains_are_what_they_are_alone(llm, huggingface):
    prompts = tiny.prompts(8)
    ordinary = [SamplingParams(max_tokens=40, temperature=0.7, seed=i, logprobs=2, ignore_eos=True) for i in range(8)]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    alone = [llm.generate(one, sampling, use_tqdm=False)[0] for one, sampling in zip(asked, ordinary, strict=True)]
    power = [serving.params(seed=i, lanes=1 + i % 3) for i in range(8)]
    mixed = llm.generate(
        [one for one in asked for _ in range(2)],
        [one for pair in zip(ordinary, power, strict=True) for one in pair],
        use_tqdm=False,
    )
    for before, after in zip(alone, mixed[::2], strict=True):
        assert before.outputs[0].token_ids == after.outputs[0].token_ids
        assert before.outputs[0].text == after.outputs[0].text
    for i, output in enumerate(mixed[1::2]):
        serving.assert_same_answer(output, serving.drawn_here(huggingface, prompts[i], seed=i))
    serving.assert_nothing_is_left(llm)


def test_a_seed_is_drawn_where_none_is_given_and_draws_the_same_answer_again(llm):
    prompt = {"prompt_token_ids": tiny.prompts(1)[0]}
    asked = serving.params(seed=None)
    first, second = llm.generate([prompt] * 2, [asked] * 2, use_tqdm=False)
    told = first.kv_transfer_params[serving.STATISTICS]
    assert told["seed"] != second.kv_transfer_params[serving.STATISTICS]["seed"]
    (again,) = llm.generate([prompt], serving.params(seed=told["seed"]), use_tqdm=False)
    assert again.outputs[0].token_ids == first.outputs[0].token_ids != second.outputs[0].token_ids


BAD = [
    (dict(extra_args={"alpha": 0.5}), "alpha is 0.5; it must lie in [1, 1e+37]"),
    (dict(extra_args={"alpha": "much"}), "alpha is 'much'; it must be valid number"),
    (dict(extra_args={"alpha": 4, "mcmc": 3}), "mcmc is 3 in a power request; allowed: alpha, block_size, mcmc_steps"),
    (dict(extra_args={"mcmc_steps": 3}), "mcmc_steps is 3 without alpha"),
    (dict(extra_args={"alpha": 4, "mcmc_steps": -1}), "mcmc_steps is -1; it must be at least 0"),
    (dict(extra_args={"alpha": 4, "block_size": 0}), "block_size is 0; it must be at least 1"),
    (dict(extra_args={"alpha": 4, "lanes": 99}), "lanes is 99; it must lie in [1, 16]"),
    (dict(extra_args={"alpha": 4, "cut": "anywhere"}), "cut is 'anywhere'; allowed: 'uniform'"),
    (dict(extra_args={"alpha": 4, "temperature": 2}), "early_rejection is True with temperature 2.0"),
    (dict(extra_args={"alpha": 4, "mcmc_steps": 10**9}), "steps; it must come to at most 100000"),
    (dict(extra_args={"power_proposal": 1}), "power_proposal is given; it is the server's own"),
    (dict(temperature=0.7), "temperature is 0.7 in a power request; it must be 1.0"),
    (dict(top_p=0.9), "top_p is 0.9 in a power request; it must be 1.0"),
    (dict(top_k=20), "top_k is 20 in a power request; it must be 0"),
    (dict(min_p=0.1), "min_p is 0.1 in a power request"),
    (dict(presence_penalty=1.0), "presence_penalty is 1.0 in a power request"),
    (dict(repetition_penalty=1.1), "repetition_penalty is 1.1 in a power request"),
    (dict(logit_bias={3: 1.0}), "logit_bias is {3: 1.0} in a power request"),
    (dict(bad_words=["a0a"]), "bad_words is ['a0a'] in a power request"),
    (dict(min_tokens=3), "min_tokens is 3 in a power request; it must be 0"),
    (dict(logprobs=1), "logprobs is 1 in a power request"),
    (dict(prompt_logprobs=1), "prompt_logprobs is 1 in a power request"),
    (dict(structured_outputs=StructuredOutputsParams(regex="a")), "structured_outputs is"),
    (dict(stop=["ab" * 200]), "stop holds 400 bytes; it must hold at most 256"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_cannot_be_exact_or_is_wrong_is_refused_at_admission(llm, wrong, message):
    sampling = SamplingParams(**(dict(max_tokens=4, extra_args={"alpha": 4.0}) | wrong))
    with pytest.raises(VLLMValidationError) as caught:
        llm.generate({"prompt_token_ids": [3, 4]}, sampling, use_tqdm=False)
    assert message in str(caught.value)


def test_defaults_of_the_server_are_no_wish_of_the_client(llm):
    sampling = serving.params(seed=1)
    sampling.top_k = 20
    admission.set_defaults({"top_k": 20})
    (output,) = llm.generate({"prompt_token_ids": tiny.prompts(1)[0]}, sampling, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 48
    admission.set_defaults({})


def test_a_chain_that_fails_ends_its_request_and_nothing_else(llm, huggingface, monkeypatch):
    """One of two whose chain breaks in the middle."""
    from power_kernels.api.engines.vllm.serve.chains import Chain

    advance, calls = Chain.advance, []

    def broken(self):
        calls.append(self.seed)
        if self.seed == 1 and calls.count(1) == 3:
            raise RuntimeError("broken on purpose")
        return advance(self)

    monkeypatch.setattr(Chain, "advance", broken)
    prompts = tiny.prompts(2)
    engine = llm.llm_engine
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, serving.params(seed=i, lanes=2))
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
    assert outputs["1"].outputs[0].finish_reason == "error"
    serving.assert_same_answer(outputs["0"], serving.drawn_here(huggingface, prompts[0], seed=0))
    serving.assert_nothing_is_left(llm)


def test_aborting_a_request_ends_its_children(llm):
    engine = llm.llm_engine
    names = [
        engine.add_request(str(i), {"prompt_token_ids": prompt}, serving.params(seed=i, lanes=3))
        for i, prompt in enumerate(tiny.prompts(3))
    ]
    for _ in range(30):
        engine.step()
    assert len(scheduler_requests(llm)) >= 3
    engine.abort_request(names, internal=True)
    serving.assert_nothing_is_left(llm)


def scheduler_requests(llm) -> list[str]:
    return list(serving.scheduler(llm).requests)


def test_preemption_changes_no_chain(folder, huggingface):
    """In a pool that holds a fourth of what 12 chains of two lanes want: at least 5 requests are preempted.

    The last test: what shuts one engine down takes what the other needs to run."""
    small = serving.started(folder, kv_cache_memory_bytes=engines.blocks(SMALL_POOL))
    owner, preempted = serving.scheduler(small), []
    preempt = owner._preempt_request
    owner._preempt_request = lambda request, *args, **more: (
        preempted.append(request.request_id),
        preempt(request, *args, **more),
    )
    prompts = tiny.prompts(12)
    outputs = small.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [serving.params(seed=i, lanes=2) for i in range(12)],
        use_tqdm=False,
    )
    for i, output in enumerate(outputs):
        serving.assert_same_answer(output, serving.drawn_here(huggingface, prompts[i], seed=i))
    assert len(preempted) >= 5, preempted
    serving.assert_nothing_is_left(small)
    serving.shut_down(small)
