"""Stop strings from end to end: the bytes of a tokenizer's tokens, `.text`, generate(), the command line.

That the law is right is shown in test_stop_law.py and test_chain_identity.py.
"""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from power_kernels.api import PowerConfig, PowerSampler, power_sample
from power_kernels.api.commands import cli
from power_kernels.api.driver.stop import StopStrings, before_stop, token_bytes
from power_kernels.errors import ArgumentError, ArgumentTypeError
from tests.devices import DEVICE
from tests.test_user_inputs import byte_tokenizer, llama_tokenizer, word_tokenizer
from tests.tiny_models import llama
from tests.toys import ToyEngine, straddling_toy

CONFIG = dict(alpha=2.0, block_size=6, mcmc_steps=3)


def letters_tokenizer(vocab: int = 97) -> PreTrainedTokenizerFast:
    """Of the byte-level kind: token i is the printable character 32 + i, or a newline; 0 is a special token."""
    names = ["<end>", *(chr(33 + i) for i in range(1, 90)), "\u010a", *(f"<{i}>" for i in range(91, vocab))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<end>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Split("", "isolated"), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


# ---------------------------------------------------------------------------------------------------------------
# The bytes of tokens


def test_byte_level_tokens_are_their_bytes():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.add_tokens([AddedToken("  def\u20ac", normalized=False), AddedToken("<repo>", special=True)])
    found = token_bytes(tokenizer, 300)
    assert sorted(found[:256]) == [bytes([byte]) for byte in range(256)]
    assert found[256:259] == [b"", "  def\u20ac".encode(), b""]  # a special token has no text, an added one has
    assert found[259:] == [b""] * 41  # rows of the model's head that no token has
    ids = tokenizer("na\u00efve \u20ac\n").input_ids
    assert b"".join(found[i] for i in ids) == "na\u00efve \u20ac\n".encode()


def test_pieces_of_sentencepiece_are_their_bytes():
    found = token_bytes(llama_tokenizer(), 12)
    pieces = [b"", b" a", b"b", b" ", b"a", b"", b"<unk>", b"\xe2", b"\x82", b"\xac", b"\n", b"("]
    assert found == pieces


def test_added_tokens_have_the_bytes_that_decoders_give_them():
    """They go through the decoder, too: letters that stand for bytes are bytes, and low lines spaces."""
    letters = byte_tokenizer()
    letters.add_tokens([AddedToken("\u00e9x", normalized=False), AddedToken("\u20acx", normalized=False)])
    assert token_bytes(letters, 258)[256:] == [b"\xe9x", "\u20acx".encode()]
    pieces = llama_tokenizer()
    pieces.add_tokens([AddedToken("\u2581\u2581", normalized=False)])
    assert token_bytes(pieces, 13)[12] == b"  "


def test_a_tokenizer_whose_tokens_have_no_bytes_is_refused():
    with pytest.raises(ArgumentError, match=r"^stop is given with a tokenizer whose decoder is .*stop strings need"):
        token_bytes(word_tokenizer(), 10)
    odd = byte_tokenizer()
    odd.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("q", "Q")])
    with pytest.raises(ArgumentError, match=r"decodes token \d+ to '.*Q' behind .*; stop strings need the bytes"):
        token_bytes(odd, 256)


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("return 1\n\nprint", ("\nprint", "\n\n"), "return 1"),
        ("a\nb\nc", ("\nc", "\nb"), "a"),
        ("stop", ("stop",), ""),
        ("nothing", ("x",), "nothing"),
    ],
)
def test_the_text_ends_before_the_first_stop_string(text, stop, left):
    assert before_stop(text, stop) == left


@pytest.mark.parametrize(
    ("stop", "prompt", "answer", "text"),
    [
        (("x",), b"a", b"bcxd", "bc"),
        (("x", "cx"), b"a", b"bcx", "b"),
        (("\u00e9", "x"), b"a\xc3", b"\xa9bcx", "\u00e9bc"),  # a character that begins in the prompt is no match
        (("\ufffd", "x"), b"a", b"\xc3bcx", "\ufffdbc"),  # nor is what a decoder writes for a broken one
        (("\u20ac",), b"a", b"b\x82\xe2\x82\xac", "b\ufffd"),
    ],
)
def test_the_text_ends_where_the_law_found_the_string(stop, prompt, answer, text):
    tokenizer = byte_tokenizer()
    of_byte = {piece: token for token, piece in enumerate(token_bytes(tokenizer, 256))}
    tokens, before = ([of_byte[bytes([byte])] for byte in piece] for piece in (answer, prompt))
    strings = StopStrings.of(tokenizer, stop, 256)
    state, length = 0, 0
    while state >= 0:
        state, length = strings.table[state, tokens[length]], length + 1
    assert strings.before(tokenizer, before, tokens[:length]) == text


def test_a_string_that_the_decoder_does_not_write_is_left_out_all_the_same():
    """Of bytes that are no character together, SentencePiece's decoder writes none: "(" of a byte token, too."""
    words = llama_tokenizer()
    vocab = json.loads(words.backend_tokenizer.to_str())
    vocab["model"]["vocab"]["<0x28>"] = 12
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(vocab)), eos_token="</s>")
    strings = StopStrings.of(tokenizer, ["("], 13)
    assert strings.table[0, 12] == strings.table[0, 11] == -1
    assert tokenizer.decode([2, 8, 12]) == "b\ufffd\ufffd"
    assert strings.before(tokenizer, [4], [2, 8, 12]) == "b\ufffd"
    assert strings.before(tokenizer, [4], [1, 2, 11]) == " ab"


def test_the_name_of_a_special_token_as_a_string_means_the_token_and_its_spelling():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": ["<|turn|>"]})
    strings = StopStrings.of(tokenizer, ["<|turn|>"], len(tokenizer))
    end, turn = tokenizer.convert_tokens_to_ids(["<|end|>", "<|turn|>"])
    assert (strings.table[0, turn], strings.table[0, end]) == (-1, 0)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "<|turn|>"]
    state = 0
    for letter in letters:
        assert state >= 0
        state = strings.table[state, letter]
    assert state == -1
    a = tokenizer.convert_tokens_to_ids("a")
    assert strings.before(tokenizer, [a], [a, turn]) == strings.before(tokenizer, [a], [a, *letters]) == "a"


# ---------------------------------------------------------------------------------------------------------------
# The sampler


def test_answers_end_with_the_token_that_completes_a_string_and_their_texts_before_it():
    """200 answers of a toy, at least 80 of which a string ends; the others hold none."""
    toy = straddling_toy()
    config = PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=5, block_size=2, mcmc_steps=3, stop=toy.stop)
    results = PowerSampler(ToyEngine(toy), toy.tokenizer()).generate([[5]], config, num_chains=200)
    stopped = [r for r in results if r.finish == "stop"]
    assert len(stopped) >= 80
    for r in results:
        text = b"".join(toy.spell[token] for token in r.tokens).decode()
        assert toy.ends(tuple(r.tokens)) == (r.finish == "stop")
        assert not any(toy.ends(tuple(r.tokens[:n])) for n in range(1, len(r.tokens)))
        assert r.text == before_stop(text, toy.stop)
    assert any(r.text for r in stopped)


def test_the_prompt_is_no_part_of_a_match():
    toy = straddling_toy()
    config = PowerConfig(alpha=1.0, max_new_tokens=1, mcmc_steps=0, stop="ab")
    results = PowerSampler(ToyEngine(toy), toy.tokenizer()).generate([[0]], config, num_chains=50)  # "a"
    assert [1] in [r.tokens for r in results]
    assert all(r.finish == ("stop" if r.tokens == [2] else "length") for r in results)


def test_a_length_bonus_makes_answers_longer():
    """p = 4e-30 under no difference, by the sign of a difference of 2,000 means; here simply more than 0.3 tokens."""
    toy, means = straddling_toy(), []
    for bonus in (-0.5, 0.0, 0.7):
        config = PowerConfig(alpha=2.0, max_new_tokens=5, mcmc_steps=20, stop=toy.stop, length_bonus=bonus)
        results = PowerSampler(ToyEngine(toy), toy.tokenizer()).generate([[5]], config, num_chains=500)
        means.append(sum(len(r.tokens) for r in results) / 500)
    assert means[0] + 0.1 < means[1] < means[2] - 0.3


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(ArgumentTypeError, match=r"^stop is \['ab'\] and there is no tokenizer; pass PowerSampler"):
        PowerSampler(ToyEngine(straddling_toy())).generate([[5]], PowerConfig(max_new_tokens=4, stop="ab"))


def test_a_tokenizer_without_a_vocabulary_is_refused():
    class Words:
        """What `PowerSampler` needs of a tokenizer, and no more."""

        def __call__(self, text):
            raise AssertionError

        def decode(self, tokens, **how):
            return "x" * len(tokens)

    with pytest.raises(ArgumentError, match=r"^stop is given with a tokenizer of the type Words, which has no get_voc"):
        PowerSampler(ToyEngine(straddling_toy()), Words()).generate([[5]], PowerConfig(max_new_tokens=4, stop="ab"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"length_bonus": 1e7}, ArgumentError, "length_bonus is 10000000.0; it must lie in [-1e+06, 1e+06]"),
        ({"stop": [""]}, ArgumentError, "stop[0] is empty; it would close every answer at once"),
        ({"stop": ["a", 3]}, ArgumentTypeError, "stop[1] is 3, a int; it must be a str"),
        ({"stop": 3}, ArgumentTypeError, "stop is"),
        ({"stop": "\ud800"}, ArgumentError, "stop[0] is '\\ud800', which holds half of a surrogate pair"),
        ({"length_bonus": float("inf")}, ArgumentError, "length_bonus is inf"),
        ({"length_bonus": "1"}, ArgumentTypeError, "length_bonus is '1'"),
        (
            {"length_bonus": 0.1, "compat": "karan-du", "early_rejection": False},
            ArgumentError,
            "length_bonus is 0.1 with compat='karan-du', which has none; it must be 0 there",
        ),
    ],
)
def test_bad_stop_strings_and_length_terms_are_refused_by_name(arguments, error, message):
    with pytest.raises(error) as caught:
        PowerConfig(**arguments)
    assert str(caught.value).startswith(message)


def test_one_string_and_a_list_of_it_are_the_same():
    assert PowerConfig(stop="a") == PowerConfig(stop=["a"]) == PowerConfig(stop=("a",)) == PowerConfig(stop=["a", "a"])


def test_a_set_of_strings_is_the_same_in_every_process():
    """Sets of strings have an order of their own in each; a run that goes on compares what it was told."""
    strings = [f"{i}" for i in range(20)]
    assert PowerConfig(stop=set(strings)).stop == PowerConfig(stop=frozenset(strings)).stop == tuple(sorted(strings))


# ---------------------------------------------------------------------------------------------------------------
# A model of transformers: the sampler, generate(), the command line


@pytest.fixture(scope="module")
def model():
    return llama()


STOP = [chr(33 + i) for i in range(40, 60)]  # a fifth of the tokens
IDS = torch.tensor([[5, 6, 7, 8]], device=DEVICE)


@pytest.fixture(scope="module")
def expected(model):
    config = PowerConfig(max_new_tokens=24, stop=STOP, **CONFIG)
    return PowerSampler(model, letters_tokenizer()).generate(IDS, config, num_chains=6, seed=3)


def test_generate_honours_stop_strings(model, expected):
    """Chains of a tiny llama, a fifth of whose tokens stop; all but one of them at least end so."""
    assert sum(r.finish == "stop" for r in expected) >= 5
    results: list = []
    out = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), custom_generate=power_sample, max_new_tokens=24, seed=3, num_chains=6,
        stop_strings=STOP, tokenizer=letters_tokenizer(), power_results=results, **CONFIG,
    )  # fmt: skip
    assert [r.tokens for r in results] == [r.tokens for r in expected]
    assert [r.text for r in results] == [r.text for r in expected]
    for row, result in zip(out[:, IDS.shape[1] :].tolist(), results, strict=True):
        assert row[: len(result.tokens)] == result.tokens
        if result.finish == "stop":
            assert result.tokens[-1] in range(40, 60)
            assert result.text == letters_tokenizer().decode(result.tokens[:-1])


def test_stop_strings_of_the_generation_config_are_honoured(model, expected):
    config = model.generation_config
    try:
        config.stop_strings = STOP
        results: list = []
        arguments = dict(
            attention_mask=torch.ones_like(IDS), custom_generate=power_sample, max_new_tokens=24, seed=3, num_chains=6,
            power_results=results, **CONFIG,
        )  # fmt: skip
        model.generate(IDS, tokenizer=letters_tokenizer(), **arguments)
        assert [r.tokens for r in results] == [r.tokens for r in expected]
    finally:
        config.stop_strings = None


def test_generate_without_the_tokenizer_of_its_stop_strings_says_what_to_pass(model):
    with pytest.raises(ArgumentTypeError, match=r"^stop_strings is 'x' and there is no tokenizer; pass the model's as"):
        model.generate(IDS, custom_generate=power_sample, stop_strings="x", max_new_tokens=4, **CONFIG)


def test_tokens_that_a_tokenizer_gets_later_stop_later_answers(model):
    """97 tokens of the model, the last six of which have no names at first."""
    tokenizer, late = letters_tokenizer(91), range(91, 97)
    sampler = PowerSampler(model, tokenizer)
    config = PowerConfig(max_new_tokens=24, stop="late", **CONFIG)

    def drawn():
        return sampler.generate(IDS, config, num_chains=20, seed=3)

    assert sum(token in late for r in drawn() for token in r.tokens[:-1]) >= 5
    tokenizer.add_tokens([f"late{i}" for i in late])
    after = drawn()
    assert not any(token in late for r in after for token in r.tokens[:-1])
    assert any(r.finish == "stop" and r.tokens[-1] in late for r in after)


def test_lanes_early_rejection_and_prefix_leave_answers_with_stop_strings_as_they_are(model, expected):
    for how in (dict(lanes=3), dict(early_rejection=False), dict(free_prefix=False, lanes=2)):
        config = PowerConfig(max_new_tokens=24, stop=STOP, **CONFIG, **how)
        results = PowerSampler(model, letters_tokenizer()).generate(IDS, config, num_chains=6, seed=3, max_chains=4)
        assert [(r.tokens, r.finish) for r in results] == [(r.tokens, r.finish) for r in expected]


def test_the_command_line_takes_stop_strings_and_a_length_bonus(model, tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "out.jsonl"
    model.save_pretrained(folder)
    letters_tokenizer().save_pretrained(folder)
    options = ["--max-new-tokens", "24", "--block-size", "6", "--mcmc-steps", "3", "--alpha", "2"]
    stops = [option for string in STOP for option in ("--stop", string)]
    arguments = ["generate", "--model", str(folder), "--prompt", "&'()", "--out", str(out), "--quiet", *options]
    assert cli.main([*arguments, *stops, "--length-bonus", "0.2", "--num-chains", "4"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(record["finish"] == "stop" for record in records) >= 3
    for record in records:
        if record["finish"] == "stop":
            assert record["tokens"][-1] in range(40, 60)
            assert not any(string in record["text"] for string in STOP)
    # Another length term is another run.
    assert cli.main([*arguments, *stops, "--length-bonus", "0.3", "--num-chains", "4"]) == 2
    assert "was drawn with another" in capsys.readouterr().err


def test_the_command_line_says_what_is_no_line_break_and_refuses_a_tokenizer_before_weights(model, tmp_path, capsys):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    letters_tokenizer().save_pretrained(folder)
    arguments = ["generate", "--model", str(folder), "--prompt", "&'", "--quiet", "--max-new-tokens", "2"]
    assert cli.main([*arguments, "--stop", "\\n", "--stop", "\n"]) == 0
    assert capsys.readouterr().err.count("holds a backslash and a letter") == 1
    (folder / "model.safetensors").unlink()
    word_tokenizer().save_pretrained(folder)
    assert cli.main([*arguments, "--stop", "w1"]) == 2
    assert "stop is given with a tokenizer whose decoder is" in capsys.readouterr().err
