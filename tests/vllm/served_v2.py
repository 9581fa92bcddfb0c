"""Chains in the engine core on vLLM's V2 model runner, its kernels in Triton's interpreter (`make test-vllm`), with the
scheduler of its kind: synchronous and asynchronous."""

from __future__ import annotations

import pytest

from tests.vllm import interpreted  # noqa: F401, before vLLM

# isort: split
from vllm.exceptions import VLLMValidationError
from vllm.platforms.cpu import CpuPlatform

from tests.stacks import tiny
from tests.vllm import serving

SMALL = dict(max_tokens=16, block_size=8, mcmc_steps=3)


@pytest.fixture(scope="module", params=["PowerScheduler", "AsyncPowerScheduler"])
def llm(folder, request):
    """A CPU's platform turns asynchronous scheduling off."""
    before = CpuPlatform.check_and_update_config.__func__

    def asynchronous(cls, config):
        before(cls, config)
        config.scheduler_config.async_scheduling = True

    wanted = request.param.startswith("Async")
    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            patch.setattr(CpuPlatform, "check_and_update_config", classmethod(asynchronous))
        made = serving.started(folder, async_scheduling=wanted)
    assert type(serving.scheduler(made)).__name__ == request.param
    yield made
    serving.shut_down(made)


@pytest.mark.parametrize(
    "asked",
    [dict(lanes=2), dict(eos=tiny.EOS[:6]), dict(stop=("ab", "c1"))],
    ids=["two lanes", "EOS", "stop strings"],
)
def test_served_chains_are_those_of_the_hugging_face_engine(llm, huggingface, asked):
    prompts, asked = tiny.prompts(3), SMALL | asked
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [serving.params(seed=i, **asked) for i in range(3)],
        use_tqdm=False,
    )
    for i, output in enumerate(outputs):
        serving.assert_same_answer(output, serving.drawn_here(huggingface, prompts[i], seed=i, **asked))
    serving.assert_nothing_is_left(llm)


def test_admission_is_asked_and_costs_the_workers_nothing(llm):
    """The class that refuses takes on no request, so that no row's logits are copied for it."""
    with pytest.raises(VLLMValidationError, match=r"^alpha is 0.5; it must lie in \[1, 1e\+37\]"):
        llm.generate({"prompt_token_ids": [3]}, serving.params(seed=1, alpha=0.5), use_tqdm=False)
    worker = llm.llm_engine.model_executor.driver_worker
    sampler = getattr(worker, "worker", worker).model_runner.sampler
    assert [type(one).__name__ for one in sampler.logits_processors].count("PowerAdmission") == 1
    assert not sampler.needs_logits_processing.any()
