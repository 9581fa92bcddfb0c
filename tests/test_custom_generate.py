"""`model.generate(custom_generate=power_sample)`: the chains of PowerSampler in the shape that generate() returns."""

import functools
import gc
import inspect
import pickle
import re
import weakref

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AttentionInterface, GenerationConfig, PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from power_kernels.api import ContextWarning, PowerConfig, PowerSampler, power_sample
from power_kernels.api.driver.engine import UnsupportedModelError
from power_kernels.api.engines.huggingface import engine
from power_kernels.api.engines.huggingface.generate_call import _FOLLOWED
from power_kernels.errors import ArgumentError
from tests import lora
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


def test_a_model_is_checked_once_and_again_when_it_has_changed(monkeypatch):
    checked = []
    check = engine.check_decoding
    monkeypatch.setattr(engine, "check_decoding", lambda engine: checked.append(engine.dtype) or check(engine))
    model = llama()
    generate(model, max_new_tokens=2)
    generate(model, max_new_tokens=2)
    assert checked == [torch.float32]
    generate(model.bfloat16(), max_new_tokens=2)
    generate(model.float(), max_new_tokens=2)
    assert checked == [torch.float32, torch.bfloat16]
    model.set_attn_implementation("eager")
    generate(model, max_new_tokens=2)
    assert len(checked) == 3
    AttentionInterface.register(
        "triple_for_test",
        lambda module, query, key, value, mask, **rest: sdpa_attention_forward(
            module, query, key, 3 * value, mask, **rest
        ),
    )
    model.set_attn_implementation("triple_for_test")
    for _ in range(2):  # what has failed has not passed
        with pytest.raises(UnsupportedModelError, match="relative error"):
            generate(model, max_new_tokens=2)
    model.set_attn_implementation("sdpa")
    checked.clear()

    class OtherLinear(torch.nn.Linear):
        """What quantisation puts in the place of a layer."""

    other = OtherLinear(model.lm_head.in_features, model.lm_head.out_features, bias=False, device=DEVICE)
    model.lm_head = other
    generate(model, max_new_tokens=2)
    assert len(checked) == 1
    wrapped = lora.hand_made(model)
    generate(wrapped.get_base_model(), max_new_tokens=2)
    wrapped.set_adapter("second")
    for _ in range(2):
        generate(wrapped.get_base_model(), max_new_tokens=2)
    assert len(checked) == 3


def test_a_head_that_the_check_found_to_be_more_than_a_layer_is_not_taken_for_one_in_the_next_call():
    model = llama()
    model.generation_config.eos_token_id = [3, 4]

    def louder(module, args, kwargs, output):  # behind odd tokens; the engine's first look at a head is behind token 0
        output.logits = output.logits * (1 + 0.5 * (kwargs["input_ids"] % 2))[..., None]

    model.register_forward_hook(louder, with_kwargs=True)
    drawn = []
    for _ in range(2):
        results: list = []
        generate(model, power_results=results)
        drawn.append([(r.tokens, r.log_weights) for r in results])
    assert drawn[0] == drawn[1] == [(r.tokens, r.log_weights) for r in expected(model, IDS)]


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


# -----------------------------------------------------------------------------------------------------------
# What generate() can be asked for and a chain does not follow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # generate()'s hidden top_k = 50
        ({"do_sample": True}, r"asked for top_k=50; .*: pass do_sample=False \(or top_k=0\)$"),
        ({"do_sample": True, "top_k": 0, "temperature": 0.5}, "asked for temperature=0.5; .*: leave out temperature"),
        (
            {"temperature": 0.5},
            r"temperature=0.5; .*leave out temperature \(the temperature of the proposals is propos",
        ),
        ({"top_p": 0.9, "min_p": 0.1}, "asked for top_p=0.9, min_p=0.1; .*: leave out top_p, min_p$"),
        ({"repetition_penalty": 1.5}, "asked for repetition_penalty=1.5"),
        ({"num_beams": 3}, "asked for num_beams=3"),
        ({"num_beams": 3, "streamer": object}, "asked for num_beams=3"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "asked for top_k=4, penalty_alpha=0.6"),
        ({"constraints": ["a"]}, r"asked for constraints=\['a'\]"),
        ({"dola_layers": "high"}, "asked for dola_layers='high'"),
        ({"guidance_scale": 1.5, "negative_prompt_ids": IDS}, "asked for guidance_scale=1.5"),
        ({"negative_prompt_ids": IDS}, "given negative_prompt_ids, which power sampling does not follow"),
        ({"watermarking_config": {"bias": 2.5}}, "asked for watermarking_config="),
        ({"token_healing": True}, "asked for token_healing=True"),
        ({"prompt_lookup_num_tokens": 3}, "asked for prompt_lookup_num_tokens=3"),
        ({"return_dict_in_generate": True}, "asked for return_dict_in_generate=True"),
        ({"max_time": 5.0}, "asked for max_time=5.0"),
        ({"assistant_model": object()}, "given assistant_model, which"),
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [1]}, "given prefix_allowed_tokens_fn, which"),
        ({"synced_gpus": True}, "given synced_gpus, which"),
        ({"inputs_embeds": torch.zeros(2, 4, 32)}, "given inputs_embeds, which .*: leave it out"),
        ({"past_key_values": object()}, "given past_key_values, which"),
        ({"position_ids": torch.zeros_like(IDS)}, "given position_ids, which"),
        ({"pixel_values": IDS, "adapter_names": ["a", "b"]}, "given pixel_values, adapter_names, which"),
        ({"token_type_ids": torch.zeros_like(IDS)}, "given token_type_ids, which"),
        ({"output_attentions": True}, "given output_attentions, which"),
        ({"cache_implementation": "static"}, "given cache_implementation, which"),
        ({"logits_processor": [print]}, "logits_processor holds builtin_function_or_method"),
        ({"stopping_criteria": [print]}, "stopping_criteria holds builtin_function_or_method"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask has shape \[2, 5\]; it must be that of input_ids"),
        ({"alpha": 0.5}, "alpha is 0.5"),
    ],
)
def test_what_would_change_the_law_or_nothing_is_refused_by_name(model, arguments, message):
    if arguments.get("streamer") is object:
        arguments = {**arguments, "streamer": Recorder()}
    with pytest.raises(ArgumentError, match=message):
        generate(model, **arguments)


def test_answers_end_with_the_context(model):
    with pytest.warns(ContextWarning, match="^each of the prompts 0, 1 leaves less than max_new_tokens = 100000"):
        out = generate(model, max_new_tokens=100_000, eos_token_id=-1)
    assert out.shape[1] == model.config.max_position_embeddings


def test_every_setting_that_generate_knows_is_followed_or_refused(model):
    """Those that a later release of transformers brings, too."""
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    refused = set()
    for name in names - _FOLLOWED:
        with pytest.raises(ArgumentError, match=rf"^generate\(\) is (asked for|given) {name}\b"):
            generate(model, **{name: 3.25})
        refused.add(name)
    assert len(refused) > 50
    assert refused >= {"temperature", "top_k", "num_beams", "length_penalty", "compile_config"}


def test_what_asks_for_nothing_is_accepted(model):
    nothing = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0,
        "early_stopping": False, "output_scores": False, "position_ids": None, "stop_strings": None, "use_cache": False,
        "disable_compile": True,
    }  # fmt: skip
    check(generate(model, **nothing), IDS, expected(model, IDS))


def test_the_settings_of_an_instruct_model_are_refused_with_the_arguments_that_help():
    model = llama()
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}
    model.generation_config.update(eos_token_id=[3, 4], pad_token_id=PAD, **settings)
    model.generation_config.cache_implementation = "hybrid"  # as Gemma's says
    message = re.escape(
        "temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=1.1; power sampling draws from p(x)^alpha of the "
        "model's own distribution and follows none of it: pass do_sample=False (or temperature=1.0, top_k=0, "
        "top_p=1.0), pass repetition_penalty=1.0"
    )
    with pytest.raises(ArgumentError, match=message):
        generate(model)
    wanted = expected(model, IDS)
    check(generate(model, do_sample=False, repetition_penalty=1.0), IDS, wanted)
    check(generate(model, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0), IDS, wanted)
    with pytest.raises(ArgumentError, match=r"asked for repetition_penalty=1.1; .*: pass repetition_penalty=1.0$"):
        generate(model, generation_config=GenerationConfig(do_sample=False))


def test_a_method_called_without_generate_refuses_the_same(model):
    config = GenerationConfig(max_length=16, eos_token_id=[3, 4], pad_token_id=PAD)
    arguments = {"generation_config": config, "seed": 7, **OPTIONS}
    check(power_sample(model, IDS, **arguments), IDS, expected(model, IDS))
    with pytest.raises(ArgumentError, match="given inputs_embeds"):
        power_sample(model, IDS, inputs_embeds=torch.zeros(2, 4, 32), **arguments)
    config.do_sample, config.top_k = True, 5
    with pytest.raises(ArgumentError, match=r"top_k=5; .*pass do_sample=False \(or top_k=0\)"):
        power_sample(model, IDS, **arguments)


def test_arguments_may_be_bound_before(model):
    bound = functools.partial(power_sample, seed=7, **OPTIONS)
    arguments = {"custom_generate": bound, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 12}
    check(model.generate(IDS, **arguments), IDS, expected(model, IDS))
    with pytest.raises(ArgumentError, match="num_beams=3"):
        model.generate(IDS, num_beams=3, **arguments)


def test_it_is_a_function_to_whoever_looks_at_it():
    assert "num_chains" in inspect.signature(power_sample).parameters
    assert power_sample.__doc__.startswith("A decoding method")
    assert pickle.loads(pickle.dumps(power_sample)) is power_sample


# -----------------------------------------------------------------------------------------------------------
# Streamers


class Recorder(BaseStreamer):
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


def test_a_streamer_gets_the_answer_whole_and_its_end(model):
    streamer, results = Recorder(), []
    generate(model, IDS[:1], streamer=streamer, power_results=results)
    assert streamer.heard == [IDS[:1].tolist(), results[0].tokens, "end"]
    assert results[0].steps > 0


def test_a_reader_of_a_text_streamer_comes_to_an_end(model):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer, results = PreTrainedTokenizerFast(tokenizer_object=words), []
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=1)
    generate(model, IDS[:1], streamer=streamer, power_results=results)
    assert "".join(streamer) == tokenizer.decode(results[0].tokens)


def test_a_streamer_of_several_answers_is_refused_and_hears_the_end_of_every_failure(model):
    failures = [
        ({"ids": IDS}, "2 prompts and num_chains = 1; it takes one answer"),
        ({"num_chains": 2}, "1 prompts and num_chains = 2; it takes one answer"),
        ({"alpha": 0.5}, "alpha is 0.5"),
        ({"num_beams": 3}, "num_beams=3"),
    ]
    for arguments, message in failures:
        streamer = Recorder()
        with pytest.raises(ArgumentError, match=message):
            generate(model, **{"ids": IDS[:1], "streamer": streamer, **arguments})
        assert streamer.heard[-1] == "end"


# -----------------------------------------------------------------------------------------------------------
# Rows


def test_an_eos_and_a_padding_of_minus_one_are_none(model):
    ids = IDS[:1]
    out = generate(model, ids, eos_token_id=-1, pad_token_id=-1, attention_mask=torch.ones_like(ids), num_chains=2)
    results = expected(model, ids, eos=(), num_chains=2)
    assert out[:, 4:].tolist() == [r.tokens for r in results]
    assert out.shape == (2, 4 + 12)
    endless = generate(model, eos_token_id=[3, 4, -1], pad_token_id=-1)
    assert set(endless[endless < 0].tolist()) == set()


def test_ids_that_begin_with_bos_twice_are_named_and_left_as_they_are(model):
    ids = torch.tensor([[PAD, 1, 5, 6], [1, 1, 5, 6]], device=DEVICE)
    with pytest.warns(UserWarning, match=r"^prompt 1 begins with BOS twice.*add_special_tokens=False"):
        out = generate(model, ids, attention_mask=(ids != PAD).long())
    check(out, ids, expected(model, [[1, 5, 6], [1, 1, 5, 6]]))


def test_a_row_that_nearly_fills_the_context_is_shorter_and_the_others_are_not(model):
    """Context 96, a prompt of 90 and one of 2, padded to 90: 6 tokens for the first, 12 for the second."""
    ids = torch.full((2, 90), PAD, device=DEVICE)
    ids[0], ids[1, -2:] = 5, torch.tensor([5, 9])
    mask = (ids != PAD).long()
    results: list = []
    with pytest.warns(
        RuntimeWarning, match="prompt 0 leaves less than max_new_tokens = 12 of the model's context of 96"
    ):
        out = generate(model, ids, attention_mask=mask, eos_token_id=-1, power_results=results)
    assert [(len(r.tokens), r.finish) for r in results] == [(6, "context"), (12, "length")]
    assert out[0, 90:].tolist() == results[0].tokens + [PAD] * 6
    assert out[1, 90:].tolist() == results[1].tokens
