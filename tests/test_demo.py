"""The demonstration, on a tiny random model with a tokenizer made here."""

import pytest
import torch
import transformers

from power_kernels.api.commands import demo, packaged_model


@pytest.fixture
def tiny(monkeypatch):
    """A two-layer Llama over a vocabulary of words, in the place of the model that would be fetched."""
    words = ["<end>", "<user>", "<answer>", "Why", "is", "it", "so", "?", "because", "the", "sky", "sea", "and", "."]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(words), eos_token="<end>", pad_token="<end>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<user> {{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} <answer>{% endif %}"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    monkeypatch.setattr(packaged_model, "load", lambda **_: (model, tokenizer))
    threads = torch.get_num_threads()
    yield tokenizer
    torch.set_num_threads(threads)


def _word_tokenizer(words):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return made


def test_chat_prompt_ends_where_the_answer_begins(tiny):
    assert tiny.convert_ids_to_tokens(packaged_model.chat_prompt(tiny, "Why is it so ?")) == [
        "<user>", "Why", "is", "it", "so", "?", "<answer>",
    ]  # fmt: skip


def test_the_demo_shows_three_answers_with_their_figures(tiny, capsys):
    arguments = ["--question", "Why is it so ?", "--question", "Why ?", "--max-new-tokens", "12", "--block-size", "6"]
    assert demo.main([*arguments, "--steps", "3", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("Question: ") == 2
    assert out.count("low temperature") == 2
    assert out.count("log p = ") == 6
    assert out.count("acceptance rate 0.") + out.count("acceptance rate 1.") == 2
    assert "tokens forwarded: 6 prompt + " in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_demo_says_what_is_wrong_instead_of_a_traceback(tiny, capsys):
    assert demo.main(["--alpha", "0.5"]) == 1
    assert "error: alpha is 0.5" in capsys.readouterr().err
    assert demo.main(["--question", "word " * 64]) == 1  # more than the tiny model's context
    assert "error: prompt" in capsys.readouterr().err


def test_columns_keep_their_width_and_lose_no_word():
    texts = ["one two three four five six", "a\n\nb", "word " * 20]
    lines = demo.columns(texts, 40).splitlines()
    assert max(map(len, lines)) <= 40
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert all(len(row) == 3 for row in cells)
    for index, text in enumerate(texts):
        assert " ".join(row[index] for row in cells).split() == text.split()
    assert [row[1] for row in cells[:3]] == ["a", "", "b"]
