"""What users bring along: numbers of other libraries, conversations, prompts that nearly fill the context, tokenizers
that drop a space. Each test says the right value for input that did something else in one project or another.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from power_kernels.api import ContextWarning, PowerConfig, PowerSampler, RunReport, generate_sharded
from power_kernels.api.driver.text import answer_text, end_of_turn
from power_kernels.errors import ArgumentError, ArgumentTypeError
from tests.toys import Toy, ToyEngine, power_toy

CONFIG = PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=5, block_size=2, mcmc_steps=3, final_steps=2)
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def summary(result):
    return result.tokens, result.log_weights, result.outcomes, result.finish, result.token_logp


def sampler(tokenizer=None, *, toy=None, context=None, eos=(0,)):
    engine = ToyEngine(power_toy() if toy is None else toy)
    engine.max_context, engine.eos_token_ids = context, eos
    return PowerSampler(engine, tokenizer)


# -----------------------------------------------------------------------------------------------------------
# Tokenizers: each is built here, of a few pieces


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A space is part of the word behind it, decoding drops the first one, and rare characters are bytes."""
    pieces = ["</s>", "\u2581a", "b", "\u2581", "a", "<s>", "<unk>", "<0xE2>", "<0x82>", "<0xAC>", "\n", "("]
    words = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("\u2581", "a")], byte_fallback=True))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(" ", 1, 0)
    words.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    words.add_special_tokens(["<s>", "</s>"])
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as GPT-2's tokenizer has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def word_tokenizer(*, template: str | None = CHAT, add_bos: bool = True) -> PreTrainedTokenizerFast:
    """Words w0 to w7 and the marks of a chat, whose token that ends a turn is 12 and not EOS, which is 0."""
    pieces = [f"w{i}" for i in range(8)] + ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    words = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="w7"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([AddedToken(p, special=True) for p in pieces[8:]])
    if add_bos:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 8)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="w0")
    tokenizer.chat_template = template
    return tokenizer


# -----------------------------------------------------------------------------------------------------------
# Numbers


def test_numbers_of_numpy_and_torch_are_numbers():
    plain = PowerConfig(
        alpha=2.0, temperature=0.5, max_new_tokens=12, block_size=6, mcmc_steps=2, final_steps=1, lanes=2
    )
    given = PowerConfig(
        alpha=np.float32(2.0),
        temperature=torch.tensor(0.5),
        max_new_tokens=np.int64(12),
        block_size=torch.tensor(6),
        mcmc_steps=np.uint8(2),
        final_steps=np.array(1),
        lanes=np.int32(2),
        early_rejection=np.True_,
    )
    assert given == plain
    assert repr(given) == repr(plain)  # and so is everything that is derived from it
    expected = [summary(r) for r in sampler().generate([[5], [6]], CONFIG, num_chains=2, seed=3, prompt_ids=[4, 9])]
    results = sampler().generate(
        [[np.int64(5)], [torch.tensor(6)]],
        CONFIG,
        num_chains=np.int64(2),
        seed=np.int64(3),
        prompt_ids=np.array([4, 9]),
        eos_token_id=np.int32(0),
        max_chains=torch.tensor(3),
        share=(np.int64(0), np.int64(1)),
    )
    assert [summary(r) for r in results] == expected


@pytest.mark.parametrize("value", [np.True_, torch.tensor(True), np.float64(2.0), np.array([2]), "2", 2 + 0j])
def test_what_is_no_integer_in_another_library_is_none_here(value):
    with pytest.raises(ArgumentTypeError, match=r"^max_new_tokens is .*; it must be an integer"):
        PowerConfig(max_new_tokens=value)
    with pytest.raises(ArgumentTypeError, match=r"^seed is .*; it must be an integer"):
        sampler().generate([[5]], CONFIG, seed=value)


def test_minus_one_is_an_eos_that_never_comes():
    def drawn(of_the_model=(), **given):
        results = sampler(toy=Toy(3, 5, seed=3), eos=of_the_model).generate([[5]], CONFIG, num_chains=8, **given)
        return [summary(r) for r in results]

    endless = drawn(eos_token_id=[])
    assert {finish for *_, finish, _ in endless} == {"length"}
    assert all(drawn(eos_token_id=eos) == endless for eos in (-1, [-1], np.int64(-1), torch.tensor([-1])))
    assert drawn(of_the_model=(-1,)) == endless
    assert drawn(eos_token_id=[0, -1]) == drawn(eos_token_id=0) != endless


# -----------------------------------------------------------------------------------------------------------
# The context


def test_a_prompt_that_nearly_fills_the_context_has_a_horizon_of_its_own_and_the_others_have_theirs():
    """Context 8: rooms of 6, 3, 0, 3 and -1 tokens for 5."""
    prompts = [[5, 6], [5] * 5, [6] * 8, [7] * 5, [8] * 9]
    with pytest.warns(RuntimeWarning, match=r"^each of the prompts 1, 2, 3, 4 leaves less than max_new_tokens = 5"):
        results = sampler(context=8).generate(prompts, CONFIG, num_chains=8)
    assert [(r.prompt_id, r.chain_id) for r in results] == [(i, k) for i in range(5) for k in range(8)]
    free = sampler().generate([prompts[0]], CONFIG, num_chains=8)
    assert [summary(r) for r in results[:8]] == [summary(r) for r in free]
    short = PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=3, block_size=2, mcmc_steps=3, final_steps=2)
    for i in (1, 3):
        own = sampler().generate([prompts[i]], short, num_chains=8, prompt_ids=[i])
        found = results[8 * i : 8 * i + 8]
        assert [r.tokens for r in found] == [r.tokens for r in own]
        assert [r.log_weights for r in found] == [r.log_weights for r in own]
        assert [r.finish for r in found] == [{"length": "context"}.get(r.finish, r.finish) for r in own]
    assert {r.finish for r in results[8:16] + results[24:32]} == {"context", "eos"}
    for r in results[16:24] + results[32:]:
        assert (r.tokens, r.finish, r.text, r.steps, r.logp, r.cost.forwarded) == ([], "context", None, 0, 0.0, 0)


def test_a_part_of_the_answers_has_the_same_horizons():
    prompts = [[5] * 5, [5, 6], [6] * 8]
    with pytest.warns(RuntimeWarning, match="each of the prompts 0, 2 leaves"):
        whole = {
            (r.prompt_id, r.chain_id): summary(r) for r in sampler(context=8).generate(prompts, CONFIG, num_chains=2)
        }
    with pytest.warns(RuntimeWarning, match="each of the prompts 0, 2 leaves"):
        left = list(sampler(context=8).stream(prompts, CONFIG, num_chains=2, skip={(1, 0), (1, 1), (2, 0), (2, 1)}))
    assert {(r.prompt_id, r.chain_id): summary(r) for r in left} == {key: whole[key] for key in ((0, 0), (0, 1))}


def test_nothing_is_said_where_every_answer_fits_and_a_context_without_room_for_any_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(context=8).generate([[5] * 3, [6]], CONFIG)
    with pytest.raises(ArgumentError, match=r"^prompt 0 has 8 tokens, which leave no room .* context of 8$"):
        sampler(context=8).generate([[5] * 8], CONFIG)
    with pytest.raises(ArgumentError, match=r"^prompt 1 has 8 tokens, .* context of 8, and the others have no fewer$"):
        sampler(context=8).generate([[5] * 9, [6] * 8], CONFIG)


def test_what_the_context_leaves_a_prompt_does_not_depend_on_the_others():
    """Rooms of 3, 5 and 1 tokens for 5: alone, together, and without the one that has its five."""
    prompts = [[5] * 5, [6], [7] * 7]

    def drawn(chosen):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ContextWarning)
            results = sampler(context=8).generate([prompts[i] for i in chosen], CONFIG, num_chains=4, prompt_ids=chosen)
        return {(r.prompt_id, r.chain_id): summary(r) for r in results}

    together = drawn([0, 1, 2])
    assert {finish for (i, _), (*_, finish, _) in together.items() if i != 1} == {"context", "eos"}
    for chosen in ([0], [1], [2], [0, 2]):
        assert drawn(chosen) == {key: summed for key, summed in together.items() if key[0] in chosen}
    with pytest.warns(ContextWarning, match=r"^prompt 0 leaves less than max_new_tokens = 5"):
        sampler(context=8).generate(prompts[:1], CONFIG)


def test_the_report_of_a_call_adds_up_its_runs():
    prompts, rooms = [[5], [6] * 5, [7] * 7, [8] * 8], [5, 3, 1]
    whole, parts = sampler(context=8), []
    with pytest.warns(ContextWarning, match="different numbers of tokens are drawn in separate runs"):
        stream = whole.stream(prompts, CONFIG, num_chains=6, max_chains=4)
    results = [next(stream)]
    assert whole.last_run.drawn > 0  # it is told while the call goes on
    results += stream
    for i, room in enumerate(rooms):
        alone = sampler()
        config = replace(CONFIG, max_new_tokens=room)
        alone.generate([prompts[i]], config, num_chains=6, max_chains=4, prompt_ids=[i])
        parts.append(alone.last_run)
    report, counts = (
        whole.last_run,
        ("decode_steps", "row_steps", "lane_steps", "useful_lane_steps", "drawn", "widened"),
    )
    for name in (*counts, "replays", "restarts"):
        assert getattr(report, name) == sum(getattr(part, name) for part in parts), name
    assert all(getattr(report, name) > max(getattr(part, name) for part in parts) for name in counts[:5])
    assert report.drawn == sum(r.cost.extension + r.cost.proposal for r in results)
    assert report.filled == sum(part.filled * part.row_steps for part in parts) / report.row_steps
    assert (report.slots, report.lanes, report.captured) == (4, max(part.lanes for part in parts), False)
    # Of runs that took long enough to be told apart; and the most slots of one, the most lanes of another.
    one, other = (RunReport(*given) for given in ((8, 1, False), (2, 5, True)))
    one.seconds["forward"], other.seconds["forward"], other.seconds["prefill"] = 1.0, 2.0, 4.0
    both = RunReport.of_runs([one, other])
    assert (both.slots, both.lanes, both.captured) == (8, 5, True)
    assert {phase: s for phase, s in both.seconds.items() if s} == {"forward": 3.0, "prefill": 4.0}
    with pytest.warns(ContextWarning):
        whole.generate(prompts, CONFIG, share=(3, 4))  # the prompt without room: there was nothing to run
    assert whole.last_run is None


# -----------------------------------------------------------------------------------------------------------
# Conversations and BOS


def test_a_conversation_is_put_into_the_chat_template_and_ends_with_the_turn():
    tokenizer = word_tokenizer()
    talk = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}]
    tokens = [8, 9, 1, 12, 10, 2, 3, 12, 11]
    expected = sampler().generate([tokens], CONFIG, num_chains=4, eos_token_id=[0, 12])
    found = sampler(tokenizer).generate([talk], CONFIG, num_chains=4)
    assert [summary(r) for r in found] == [summary(r) for r in expected]
    rows, eos = sampler(tokenizer).read([talk, "w5", [1, 2]])
    assert rows == [tokens, [8, 5], [1, 2]]
    assert eos == [0, 12]
    assert sampler(tokenizer).read([talk], eos_token_id=[3])[1] == [3]
    assert sampler(tokenizer, eos=(12,)).read([talk])[1] == [12]
    assert sampler(tokenizer).read(["w5"])[1] == [0]


def test_a_conversation_keeps_its_end_of_turn_where_the_answers_are_divided():
    talk = [{"role": "user", "content": "w2"}]
    expected = [summary(r) for r in sampler(word_tokenizer()).generate([talk], CONFIG, num_chains=4)]
    for given in ({}, {"eos_token_id": [0, 12]}):
        found = generate_sharded(sampler(word_tokenizer()), [talk], CONFIG, num_chains=4, **given)
        assert [summary(r) for r in found] == expected
    endless = sampler(word_tokenizer(), toy=Toy(3, 5, seed=3))
    assert generate_sharded(endless, [talk], CONFIG, eos_token_id=-1)[0].finish == "length"


def test_the_end_of_a_turn_is_the_special_token_behind_what_the_assistant_said():
    assert end_of_turn(word_tokenizer()) == 12
    assert end_of_turn(word_tokenizer(template=CHAT.replace("<|end|>", " \n<|end|>"))) == 12
    assert end_of_turn(word_tokenizer(template=CHAT.replace("<|end|>", " w3 <|end|>"))) is None
    assert end_of_turn(word_tokenizer(template=CHAT.replace("<|end|>", ""))) is None
    assert end_of_turn(word_tokenizer(template="{{ raise_exception('no') }}")) is None
    assert end_of_turn(word_tokenizer(template=None)) is None


@pytest.mark.parametrize(
    ("prompts", "kind", "message"),
    [
        (
            [{"role": "user", "content": "w1"}],
            ArgumentTypeError,
            r"prompts\[0\] is a message; a conversation is a list",
        ),
        ([[{"role": "user"}]], ArgumentError, r"prompts\[0\] does not fit the chat template of the model"),
        ([[1], [{"content": "w1"}]], ArgumentError, r"prompts\[1\] does not fit the chat template of the model"),
    ],
)
def test_a_conversation_that_is_none_is_refused_by_its_place(prompts, kind, message):
    strict = CHAT.replace("{% for m in messages %}", "{% for m in messages %}{{ m.role + m.content }}")
    with pytest.raises(kind, match=message):
        sampler(word_tokenizer(template=strict)).generate(prompts, CONFIG)
    with pytest.raises(
        ArgumentTypeError, match=r"prompts\[0\] is a (message|conversation and there is no tokenizer|list)"
    ):
        sampler().generate([prompts[-1]], CONFIG)


def test_a_string_that_begins_with_bos_gets_no_second_one():
    tokenizer = word_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "w2"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer(text).input_ids[:2] == [8, 8]  # or the test shows nothing
    with pytest.warns(UserWarning, match="^prompt 1 begins with <s>, which the tokenizer puts in front, too"):
        rows, _ = sampler(tokenizer).read(["w1", text])
    assert rows == [[8, 1], [8, 10, 2, 12, 11]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampler(word_tokenizer(add_bos=False)).read([text])[0] == [[8, 10, 2, 12, 11]]


# -----------------------------------------------------------------------------------------------------------
# The text of an answer


def test_the_prompts_text_and_the_answers_are_the_text_of_both():
    """Every way to cut 300 random texts of a Llama-type tokenizer, but inside a character."""
    tokenizer, cuts = llama_tokenizer(), 0
    generator = np.random.default_rng(0)
    assert tokenizer.decode([1, 2]) == "ab"  # the space is gone, or the test shows nothing
    for _ in range(300):
        parts = [[1], [2], [3], [4], [10], [11], [5], [7, 8, 9]]
        chosen = [parts[i] for i in generator.integers(len(parts), size=generator.integers(2, 50))]
        for k in range(1, len(chosen)):
            prompt, tokens = ([token for part in half for token in part] for half in (chosen[:k], chosen[k:]))
            text = answer_text(tokenizer, prompt, tokens)
            whole = tokenizer.decode(prompt + tokens, skip_special_tokens=True)
            assert tokenizer.decode(prompt, skip_special_tokens=True) + text == whole
            cuts += text.startswith(" ")
    assert cuts > 300


def test_a_character_that_the_prompt_begins_is_the_answers():
    euro = [7, 8, 9]
    tokenizer = llama_tokenizer()
    for k in (1, 2):
        assert answer_text(tokenizer, [5, 1, *euro[:k]], [*euro[k:], 1]) == "\u20ac a"
        assert answer_text(tokenizer, euro[:k], [*euro[k:], 1]) == "\u20ac a"
    tokenizer = byte_tokenizer()
    ids = tokenizer("x \u20ac y").input_ids
    for k in (3, 4):
        assert answer_text(tokenizer, ids[:k], ids[k:]) == "\u20ac y"
    assert answer_text(tokenizer, ids[:3], ids[5:]) == " y"  # it never became one
    assert answer_text(tokenizer, ids[:2], ids[2:4]) == "\ufffd"


def test_special_tokens_at_the_end_of_the_prompt_cost_no_space():
    """Whatever stands between the prompt's last word and the answer."""
    tokenizer = llama_tokenizer()
    assert answer_text(tokenizer, [5, 2] + [0, 5] * 30, [1, 2, 0]) == " ab"
    assert answer_text(tokenizer, [5], [1, 2, 0]) == "ab"  # the text begins here, and so it would be written


def test_an_answer_is_decoded_alone_where_the_text_before_it_changes_with_it():
    class Cleaning:
        """Takes the space before a full stop away, as clean_up_tokenization_spaces does."""

        def decode(self, tokens, skip_special_tokens):
            return "".join("a ."[t] for t in tokens).replace(" .", ".")

    assert answer_text(Cleaning(), [0, 1], [2, 0]) == ".a"
    assert answer_text(Cleaning(), [0, 1], [0, 2]) == "a."


def test_an_answers_text_keeps_its_space():
    results = sampler(llama_tokenizer()).generate([[5, 2]], CONFIG, num_chains=8)
    for r in results:
        assert r.text == "".join({0: "", 1: " a", 2: "b"}[t] for t in r.tokens)
    assert any(r.text.startswith(" ") for r in results)
