"""Models and surroundings as users bring them: adapters, autocast, default devices, long contexts, quantisation."""

from __future__ import annotations

import importlib.util
import json
import warnings

import pytest
import torch
import transformers

from power_kernels.api import PowerConfig, PowerSampler
from power_kernels.api.commands import load
from power_kernels.api.driver.engine import UnsupportedModelError
from power_kernels.api.engines.huggingface import HuggingFaceEngine
from power_kernels.api.engines.huggingface.self_check import compute_dtype
from power_kernels.errors import ArgumentError
from tests import commands, lora, tiny_models
from tests.devices import DEVICE, host_only
from tests.test_huggingface_engine import Script, prompt_of

SHORT = PowerConfig(alpha=2.0, max_new_tokens=8, block_size=4, mcmc_steps=2)
PROMPTS = [[5, 9, 11], [7, 3]]


@pytest.fixture(scope="module")
def llama():
    return tiny_models.llama()


def drawn(sampler: PowerSampler, **changes) -> list:
    return [(r.tokens, r.steps, r.accepted) for r in sampler.generate(PROMPTS, SHORT, seed=1, **changes)]


# ---- adapters

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
WRAPPED = [lora.hand_made, pytest.param(lora.of_peft, marks=needs_peft)]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_the_engine_decodes_the_active_adapter(wrap):
    """Of two adapters and none; what each decodes is what the wrapped model says."""
    model = tiny_models.llama()
    wrapped = wrap(model)
    engine = HuggingFaceEngine(wrapped)
    found = []

    def play():
        script = Script(engine, wrapped, chains=2, lanes=1)
        script.admit([prompt_of(5, 1), prompt_of(8, 2)])
        for _ in range(3):
            script.play()
        engine.end()
        found.append(drawn(PowerSampler(engine)))

    play()
    wrapped.set_adapter("second")
    play()
    with wrapped.disable_adapter():
        play()
    assert len(set(map(str, found))) == 3
    assert found[2] == drawn(PowerSampler(tiny_models.llama()))


@pytest.mark.parametrize("wrap", WRAPPED)
def test_an_adapter_that_changes_during_a_run_is_noticed(wrap):
    wrapped = wrap(tiny_models.llama())
    sampler = PowerSampler(wrapped)
    for change in (lambda: wrapped.set_adapter("second"), lambda: wrapped.set_adapter("first")):
        stream = sampler.stream(PROMPTS, SHORT, max_chains=1)
        next(stream)
        change()
        with pytest.raises(ArgumentError, match="adapters have changed while a run is on"):
            next(stream)
        assert len(drawn(sampler)) == 2
    stream = sampler.stream(PROMPTS, SHORT, max_chains=1)
    next(stream)
    with wrapped.disable_adapter(), pytest.raises(ArgumentError, match="adapters have changed"):
        next(stream)


@pytest.mark.measured
def test_step_times_are_those_of_the_adapter():
    wrapped = lora.hand_made(tiny_models.llama())
    engine = HuggingFaceEngine(wrapped, self_check=False)
    first = engine.decode_seconds([1], 64)
    wrapped.set_adapter("second")
    assert engine.decode_seconds([1], 64) != first
    wrapped.set_adapter("first")
    assert engine.decode_seconds([1], 64) == first


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "PROMPT_TUNING", "is_prompt_learning": True}, "'first' is PROMPT_TUNING, .* virtual tokens"),
        ({"alora_invocation_tokens": [4, 5]}, "'first' is LORA with alora_invocation_tokens"),
    ],
)
def test_adapters_outside_the_layers_are_refused_by_name(llama, config, said):
    wrapped = lora.HandMadePeftModel(tiny_models.llama(), **config)
    with pytest.raises(UnsupportedModelError, match=said):
        PowerSampler(wrapped)
    # PeftModel.generate hands the model inside on, its own method upon it.
    inside = wrapped.get_base_model()
    wrapped.prepare = lambda: None
    inside.prepare_inputs_for_generation = _Bound(wrapped)
    with pytest.raises(UnsupportedModelError, match=said):
        HuggingFaceEngine(inside)


class _Bound:
    def __init__(self, owner):
        self.__self__ = owner


@needs_peft
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_prompt_learning_of_peft_is_refused_by_name(kind):
    import peft

    from power_kernels.api.engines.huggingface.custom_generate import power_sample

    wrapped = peft.get_peft_model(tiny_models.llama(), getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match="virtual tokens before each prompt"):
        PowerSampler(wrapped)
    ids = torch.tensor(PROMPTS[:1], device=DEVICE)
    with pytest.raises(UnsupportedModelError, match="virtual tokens before each prompt"):
        wrapped.generate(input_ids=ids, custom_generate=power_sample, max_new_tokens=4, block_size=4, mcmc_steps=1)


# ---- surroundings


def test_autocast_is_refused_before_any_work(llama):
    sampler = PowerSampler(llama)
    want = drawn(sampler)
    said = "torch.autocast is on .* dtype=torch.bfloat16"
    with torch.autocast(DEVICE.type, torch.bfloat16):
        with pytest.raises(ArgumentError, match=said):
            PowerSampler(llama)
        with pytest.raises(ArgumentError, match=said):
            sampler.generate(PROMPTS, SHORT)
        with torch.autocast(DEVICE.type, enabled=False):
            assert drawn(sampler) == want
    stream = sampler.stream(PROMPTS, SHORT, max_chains=1)
    next(stream)
    with torch.autocast(DEVICE.type, torch.bfloat16), pytest.raises(ArgumentError, match=said):
        next(stream)
    assert drawn(sampler) == want


@host_only
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "moe_qwen3"])
def test_a_default_device_elsewhere_changes_nothing(family):
    """On meta tensors whatever the host reads raises."""
    model = tiny_models.FAMILIES[family]()
    want = drawn(PowerSampler(model), eos_token_id=[])
    with torch.device("meta"):
        assert drawn(PowerSampler(model), eos_token_id=[]) == want
    torch.set_default_device("meta")
    try:
        assert drawn(PowerSampler(model), eos_token_id=[]) == want
        ids = torch.tensor(PROMPTS[:1], device="cpu")
        answer = model.generate(
            ids,
            custom_generate=power_sample_of(),
            max_new_tokens=4,
            alpha=2.0,
            block_size=4,
            mcmc_steps=1,
            pad_token_id=0,
        )
        assert answer.device.type == "cpu"
    finally:
        torch.set_default_device(None)


def power_sample_of():
    from power_kernels.api import power_sample

    return power_sample


# ---- contexts


def test_a_yarn_model_has_the_context_that_the_factor_gives():
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": tiny_models.CONTEXT,
    }  # fmt: skip
    model, reference = (tiny_models.llama(rope_parameters=dict(rope)) for _ in range(2))
    engine = HuggingFaceEngine(model)
    assert engine.max_context == 4 * tiny_models.CONTEXT
    script = Script(engine, reference, chains=1, lanes=2, max_length=tiny_models.CONTEXT + 20)
    script.admit([prompt_of(tiny_models.CONTEXT + 5, 1)])
    for _ in range(4):
        script.play()
    # Publishers that write the stretched number mean that one.
    stretched = tiny_models.llama(rope_parameters=dict(rope), max_position_embeddings=4 * tiny_models.CONTEXT)
    assert HuggingFaceEngine(stretched, self_check=False).max_context == 4 * tiny_models.CONTEXT


def test_a_context_may_be_given(llama):
    engine = HuggingFaceEngine(llama, max_context=120, self_check=False)
    assert len(PowerSampler(engine).generate([prompt_of(100, 1)], SHORT)[0].tokens) <= 8
    with pytest.raises(ArgumentError, match="context is 120"):
        engine.begin(chains=1, lanes=1, max_length=121, alpha=1.0, beta=1.0, seed=0)
    with pytest.raises(ArgumentError, match="max_context is 0"):
        HuggingFaceEngine(llama, max_context=0)


def test_positions_that_were_never_learned_are_refused():
    model = tiny_models.gpt2()
    with pytest.raises(ArgumentError, match="max_context is 97; GPT2LMHeadModel has learned 96 positions"):
        HuggingFaceEngine(model, max_context=97)
    assert HuggingFaceEngine(model, max_context=50, self_check=False).max_context == 50


# ---- more than text


@pytest.mark.parametrize("name", tiny_models.MULTIMODAL)
def test_text_goes_through_the_language_model_of_models_that_also_see(name):
    """And through layers that attend to another layer's keys and values, rollbacks and commits included."""
    build = tiny_models.MULTIMODAL[name]
    engine = HuggingFaceEngine(build())
    assert engine._head is not None
    script = Script(engine, build(), chains=2, lanes=2)
    script.admit([prompt_of(3, 1), prompt_of(12, 2)])
    for _ in range(8):
        script.play()
    assert script.counts["compared"] >= 20
    assert script.counts["rollback"] >= 3


def test_layers_that_share_keys_and_values_are_not_compiled():
    model = tiny_models.gemma3n()
    assert len(HuggingFaceEngine(model, self_check=False)._layout.layers) == 3
    with pytest.raises(
        UnsupportedModelError, match=r"another layer's keys and values, which compile=.* does not support"
    ):
        HuggingFaceEngine(model, compile="eager")


# ---- quantisation


@host_only
def test_quantisation_that_looks_at_the_whole_batch_is_refused_and_said_why():
    """torch's dynamic int8 takes one scale from all rows, so that a row's logits depend on its batchmates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantised = torch.ao.quantization.quantize_dynamic(tiny_models.llama(), {torch.nn.Linear}, torch.qint8)
    with pytest.raises(UnsupportedModelError, match=r"a row's logits depend on its batchmates .* scale is taken from"):
        HuggingFaceEngine(quantised)


def test_a_quantised_checkpoint_is_placed_by_its_loader(tmp_path, monkeypatch):
    """BitNet's ternary weights, which transformers itself computes on a CPU. `.to` moves no quantised model."""
    pytest.importorskip("accelerate")
    path = commands.save(commands.markov_model().to(torch.bfloat16), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    moved = transformers.PreTrainedModel.to

    def to(self, *args, **kwargs):
        assert not getattr(self, "is_quantized", False), "a quantised model was moved"
        return moved(self, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "to", to)
    model = load._model(path, "auto", DEVICE.type)
    assert model.is_quantized
    assert model.device.type == DEVICE.type


@pytest.mark.parametrize(
    ("quantisation", "dtype"),
    [
        (None, torch.float32),
        ({"quant_method": "gptq"}, torch.float16),
        ({"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "bfloat16"}, torch.bfloat16),
        (transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16), torch.float16),
    ],
)
def test_tolerances_are_those_of_the_dtype_that_products_are_computed_in(llama, quantisation, dtype, monkeypatch):
    monkeypatch.setattr(llama.config, "quantization_config", quantisation, raising=False)
    assert compute_dtype(llama, torch.float32) == dtype
    assert compute_dtype(llama, torch.bfloat16) == torch.bfloat16
