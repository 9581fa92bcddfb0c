"""The command line: results as they finish, going on after an interruption, errors before work, the doctor."""

import errno
import importlib.util
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from power_kernels import use_backend
from power_kernels.api import PowerConfig, PowerSampler
from power_kernels.api.commands import answers, drawing, load
from power_kernels.api.commands.cli import main
from power_kernels.api.commands.generate import INTERRUPTED
from power_kernels.api.commands.output_file import OutputFile, RecordFile
from power_kernels.api.driver.horizons import ContextWarning
from power_kernels.api.engines.huggingface import HuggingFaceEngine
from power_kernels.errors import ArgumentError
from tests import lora
from tests.tiny_models import mamba

VOCAB = 32


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A tiny Llama with a word-level tokenizer, on disk."""
    path = tmp_path_factory.mktemp("model")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(path)
    return str(path)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"id": "one", "prompt": "w5 w6 w7"}, {"tokens": [8, 9]}, {"prompt": "w4", "level": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return str(path)


OPTIONS = [
    "--max-new-tokens",
    "24",
    "--block-size",
    "8",
    "--mcmc-steps",
    "3",
    "--num-chains",
    "2",
    "--seed",
    "5",
    "--quiet",
]


def read(path):
    with open(path) as file:
        return {(r["prompt_id"], r["chain_id"]): r for r in map(json.loads, file)}


def assert_same(records, others):
    """The same chains. Rounding of logp, and who pays for a shared prompt, depend on the batch a chain ran in."""
    assert records.keys() == others.keys()
    for key, record in records.items():
        for name in ("tokens", "steps", "accepted", "unchanged", "finish", "status", "text", "digest"):
            assert record[name] == others[key][name]
        assert record["logp"] == pytest.approx(others[key]["logp"], abs=2e-4)


def run(model_path, prompts, out, *more):
    return main(["generate", "--model", model_path, "--prompts", prompts, "--out", str(out), *OPTIONS, *more])


@pytest.fixture
def uninterrupted(model_path, prompts, tmp_path):
    out = tmp_path / "whole.jsonl"
    assert run(model_path, prompts, out) == 0
    return read(out)


def test_results_are_those_of_the_sampler(model_path, uninterrupted):
    model = LlamaForCausalLM.from_pretrained(model_path)
    config = PowerConfig(max_new_tokens=24, block_size=8, mcmc_steps=3)
    expected = PowerSampler(model).generate([[5, 6, 7], [8, 9], [4]], config, num_chains=2, seed=5)
    assert len(uninterrupted) == 6
    for result in expected:
        record = uninterrupted[result.prompt_id, result.chain_id]
        assert record["tokens"] == result.tokens
        assert record["accepted"] == result.accepted
        assert record["logp"] == pytest.approx(result.logp, abs=1e-4)
        assert record["finish"] == result.finish
    assert uninterrupted[0, 0]["id"] == "one"
    assert uninterrupted[0, 0]["text"].startswith(" w")  # behind the words of the prompt


def test_a_second_run_draws_nothing_and_a_cut_line_is_drawn_again(model_path, prompts, tmp_path, uninterrupted, capsys):
    out = tmp_path / "whole.jsonl"
    assert run(model_path, prompts, out) == 0
    assert "0 answers written" in capsys.readouterr().err
    content = out.read_bytes()
    out.write_bytes(content[: content.rfind(b"\n", 0, -1) + 40])  # killed in the middle of the last line
    assert run(model_path, prompts, out) == 0
    assert "1 answers written" in capsys.readouterr().err
    assert_same(read(out), uninterrupted)
    assert out.read_bytes().count(b"\n") == 6


def test_an_interrupted_run_keeps_its_answers_and_goes_on(model_path, prompts, tmp_path, uninterrupted):
    """The real command, Ctrl-C between answers; every other moment and signal is in test_interrupts.py."""
    out = tmp_path / "part.jsonl"
    command = [
        sys.executable, "-m", "power_kernels.api.commands.cli", "generate", "--model", model_path, "--prompts", prompts,
        "--out", str(out), *OPTIONS, "--max-chains", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out.exists() and out.read_bytes().count(b"\n")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=1200)
    finished = read(out)
    assert finished, errors
    if process.returncode == INTERRUPTED:  # else the run was quicker than the signal
        assert f"interrupted: {len(finished)} of 6 answers are in {out}" in errors
    assert_same(finished, {key: uninterrupted[key] for key in finished})
    assert run(model_path, prompts, out) == 0
    assert_same(read(out), uninterrupted)


def test_a_file_of_another_run_is_refused_and_left_alone(model_path, prompts, tmp_path, uninterrupted, capsys):
    out = tmp_path / "whole.jsonl"
    before = out.read_bytes()
    assert run(model_path, prompts, out, "--alpha", "3") == 2
    assert "was drawn with another model, configuration, seed or prompt" in capsys.readouterr().err
    assert out.read_bytes() == before
    out.write_text("not a record\n")
    assert run(model_path, prompts, out) == 2
    assert "line 1 is not a record" in capsys.readouterr().err


def test_a_run_may_go_on_with_other_lanes(model_path, prompts, tmp_path, uninterrupted, capsys):
    assert run(model_path, prompts, tmp_path / "whole.jsonl", "--lanes", "2", "--no-free-prefix") == 0
    assert "0 answers written" in capsys.readouterr().err


def test_a_model_that_cannot_be_rewound_is_refused(prompts, tmp_path, model_path, capsys):
    path = tmp_path / "recurrent"
    mamba().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(model_path, name), path)
    assert run(str(path), prompts, tmp_path / "none.jsonl") == 2
    assert f"--model {path}: " in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_an_error(model_path, prompts, tmp_path, capsys):
    assert run(model_path, prompts, tmp_path) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_two_processes_cannot_write_one_file(model_path, prompts, tmp_path, capsys):
    import fcntl

    out = tmp_path / "locked.jsonl"
    with open(out, "a") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert run(model_path, prompts, out) == 2
    assert "is being written by another process" in capsys.readouterr().err


def test_answers_end_in_the_order_of_the_prompts_and_an_ordered_file_is_left_alone(
    model_path, prompts, tmp_path, monkeypatch
):
    out, written = tmp_path / "out.jsonl", []
    write = OutputFile.write
    monkeypatch.setattr(OutputFile, "write", lambda self, line: (written.append(line["prompt_id"]), write(self, line)))
    assert run(model_path, prompts, out, "--max-chains", "4") == 0
    assert list(read(out)) == [(i, k) for i in range(3) for k in range(2)]
    assert written != sorted(written)  # they did finish in another order, or the test shows nothing
    before = out.stat()
    assert run(model_path, prompts, out) == 0
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_putting_answers_in_order_keeps_the_link_and_the_mode_of_the_file(model_path, prompts, tmp_path):
    target, link = tmp_path / "disk" / "target.jsonl", tmp_path / "link.jsonl"
    target.parent.mkdir()
    target.touch(mode=0o640)
    link.symlink_to(target)
    assert run(model_path, prompts, link, "--max-chains", "4") == 0
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert len(read(target)) == 6
    assert os.listdir(target.parent) == ["target.jsonl"]


def test_a_file_that_is_replaced_stays_locked(model_path, prompts, tmp_path, monkeypatch):
    """Another process may open the new file as soon as it has the name, while parts are still being removed."""
    out = tmp_path / "out.jsonl"
    refused = []
    rewrite = OutputFile._rewrite

    def tried(self, found):
        rewrite(self, found)
        with pytest.raises(ArgumentError, match="is being written by another process"):
            RecordFile(out)
        refused.append(True)

    monkeypatch.setattr(OutputFile, "_rewrite", tried)
    assert run(model_path, prompts, out, "--max-chains", "4") == 0
    assert refused
    RecordFile(out).close()


def test_an_interruption_in_the_exchange_of_descriptors_leaves_an_open_one(tmp_path, monkeypatch):
    """Ctrl-C as the call that closes the old file returns; the file is then closed as after any interruption."""
    (tmp_path / "out.jsonl.part-1").write_text(json.dumps({"prompt_id": 0, "chain_id": 0, "digest": "d"}) + "\n")
    output = OutputFile.__new__(OutputFile)
    close, opened = os.close, []

    def interrupted(file):
        close(file)
        if file == opened[0]:
            opened[0] = None
            raise KeyboardInterrupt

    def rewrite(self, found):
        opened.append(self.file)
        monkeypatch.setattr(os, "close", interrupted)
        _rewrite(self, found)

    _rewrite = OutputFile._rewrite
    monkeypatch.setattr(OutputFile, "_rewrite", rewrite)
    with pytest.raises(KeyboardInterrupt):
        output.__init__(tmp_path / "out.jsonl", {(0, 0): "d"})
    assert opened == [None]
    assert output.file == -1
    assert read(tmp_path / "out.jsonl").keys() == {(0, 0)}
    RecordFile(tmp_path / "out.jsonl").close()  # nobody holds it


def test_an_answer_that_is_written_is_on_the_disk(tmp_path, monkeypatch):
    """The file after each record, and the names of the file and of its new folders before the first."""
    synced = []
    fsync = os.fsync

    def noted(file):
        fsync(file)
        synced.append((os.readlink(f"/proc/self/fd/{file}"), os.fstat(file).st_size))

    monkeypatch.setattr(os, "fsync", noted)
    out = tmp_path / "new" / "folder" / "out.jsonl"
    file = RecordFile(out)
    assert {name for name, _ in synced} == {str(tmp_path), str(tmp_path / "new"), str(tmp_path / "new" / "folder")}
    for i in range(3):
        file.write({"prompt_id": i})
        assert synced[-1] == (str(out), out.stat().st_size)
    file.close()


@pytest.mark.parametrize("drawn", [0, 2])
def test_out_of_memory_keeps_the_answers_and_says_what_to_lower(
    model_path, prompts, tmp_path, uninterrupted, monkeypatch, capsys, drawn
):
    """The memory is gone after so many answers, however few chains are tried."""
    out = tmp_path / "out.jsonl"
    step = HuggingFaceEngine.step

    def failing(self, state):
        if out.read_bytes().count(b"\n") >= drawn:
            raise torch.OutOfMemoryError("as much as there is")
        return step(self, state)

    monkeypatch.setattr(HuggingFaceEngine, "step", failing)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        assert run(model_path, prompts, out, "--max-chains", "2") == 1
    printed = capsys.readouterr().err
    assert "out of memory on cpu: as much as there is" in printed
    assert "Not one chain fits" in printed
    if drawn:
        assert f"2 of 6 answers are in {out}; the same command goes on from there" in printed
    monkeypatch.undo()
    assert run(model_path, prompts, out) == 0
    assert_same(read(out), uninterrupted)


def test_a_full_disk_keeps_the_answers_that_fit(model_path, prompts, tmp_path, uninterrupted, monkeypatch, capsys):
    """After 2 answers and half of the third: a write that comes out short, then one that fails, as a kernel has it."""
    out = tmp_path / "out.jsonl"
    write, calls = os.write, []

    def full(file, data):
        if not bytes(data).startswith(b'{"prompt_id"') and not calls:
            return write(file, data)
        calls.append(len(data))
        if len(calls) == 3:
            return write(file, data[: len(data) // 2])
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    monkeypatch.setattr(os, "write", full)
    assert run(model_path, prompts, out) == 1
    monkeypatch.undo()
    printed = capsys.readouterr().err
    assert f"--out {out} cannot be written: [Errno 28]" in printed
    assert f"2 of 6 answers are in {out}" in printed
    assert run(model_path, prompts, out) == 0
    assert_same(read(out), uninterrupted)


def test_a_line_of_prompts_may_hold_other_line_breaks(model_path, tmp_path):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"prompt": "w5 \u2028 \x85 w6"}, ensure_ascii=False) + "\r\n", newline="")
    assert run(model_path, str(path), out) == 0
    assert {record["prompt"] for record in read(out).values()} == {"w5 \u2028 \x85 w6"}


def test_other_keys_of_a_prompt_are_in_its_record_and_a_byte_order_mark_is_not_in_the_way(model_path, tmp_path):
    """A resumed run repeats them, too; a key that a record has itself gets another name."""
    lines = [
        {"prompt": "w5", "answer": "42", "id": "a", "level": {"n": [1, None]}},
        {"text": "w9", "prompt": "w6", "finish": 3, "tokens": "w1"},
        {"tokens": [7, 8], "prompt_text": 1, "text": 2, "prompt": 5},
    ]
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert run(model_path, str(path), out) == 0
    whole = out.read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    assert list(records[0])[:7] == ["prompt_id", "chain_id", "prompt", "answer", "id", "level", "text"]
    assert records[1]["answer"] == "42"
    assert records[1]["level"] == {"n": [1, None]}
    assert {key: records[2][f"prompt_{key}"] for key in ("text", "finish", "tokens")} == {
        "text": "w9", "finish": 3, "tokens": "w1"
    }  # fmt: skip
    assert (records[4]["prompt_text"], records[4]["prompt_prompt_text"], records[4]["prompt"]) == (1, 2, 5)
    assert records[4]["tokens"] != [7, 8]
    out.write_bytes(whole[: whole.rfind(b"\n", 0, -1) + 40])
    assert run(model_path, str(path), out) == 0
    assert [line.split(b', "cost": ')[0] for line in out.read_bytes().splitlines()] == [
        line.split(b', "cost": ')[0] for line in whole.splitlines()
    ]


def test_prompts_that_nearly_fill_the_context_are_named_before_the_model_is_loaded(
    model_path, tmp_path, monkeypatch, capsys
):
    """Context 256, 24 new tokens: prompts of 3, 240 and 260 tokens."""
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts = [{"prompt": "w5 w6 w7"}, {"prompt": "w5 " * 240}, {"tokens": [5] * 260}]
    path.write_text("".join(json.dumps(line) + "\n" for line in prompts))
    message = "each of the prompts 1, 2 leaves less than max_new_tokens = 24 of the model's context of 256"

    def loaded(*arguments):
        assert message in capsys.readouterr().err
        return load_sampler(*arguments)

    load_sampler = answers.load_sampler
    monkeypatch.setattr(answers, "load_sampler", loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ContextWarning)  # it is said once
        assert run(model_path, str(path), out, "--ignore-eos") == 0
    found = [(r["finish"], len(r["tokens"])) for r in read(out).values()]
    assert found == [("length", 24)] * 2 + [("context", 16)] * 2 + [("context", 0)] * 2

    def refused(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(answers, "load_sampler", refused)
    path.write_text(json.dumps(prompts[2]) + "\n")
    assert run(model_path, str(path), tmp_path / "none.jsonl") == 2
    assert "prompt 0 has 260 tokens, which leave no room for an answer" in capsys.readouterr().err


# Users who have no adapters need no PEFT; without it `lora.load` stands for what transformers loads with it.
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")


@pytest.fixture(params=["by hand", pytest.param("by PEFT", marks=needs_peft)])
def adapter_path(request, model_path, tmp_path, monkeypatch):
    """The folder of an adapter of the tiny Llama, with neither a configuration nor a tokenizer."""
    model = LlamaForCausalLM.from_pretrained(model_path)
    if request.param == "by PEFT":
        lora.of_peft(model).save_pretrained(tmp_path, selected_adapters=["first"])
        return str(tmp_path / "first")
    monkeypatch.setattr(load, "is_peft_available", lambda: True)
    loader = SimpleNamespace(from_pretrained=lora.load)
    monkeypatch.setattr(load, "AutoModelForCausalLM", loader)
    return lora.save(lora.hand_made(model), model_path, tmp_path / "adapter")


def test_an_adapters_folder_is_a_model(adapter_path, model_path, prompts, tmp_path, capsys):
    """Its base says what the context is, and reads the prompts; its own layers draw."""
    outs = [tmp_path / "adapter.jsonl", tmp_path / "base.jsonl"]
    for path, out in zip((adapter_path, model_path), outs, strict=True):
        assert run(path, prompts, out) == 0, capsys.readouterr().err
    adapted, plain = map(read, outs)
    assert len(adapted) == 6
    assert all(record["text"] and record["tokens"] != plain[key]["tokens"] for key, record in adapted.items())
    config = PowerConfig(max_new_tokens=24, block_size=8, mcmc_steps=3)
    model = load.AutoModelForCausalLM.from_pretrained(adapter_path)
    expected = PowerSampler(model).generate([[5, 6, 7], [8, 9], [4]], config, num_chains=2, seed=5)
    assert [adapted[r.prompt_id, r.chain_id]["tokens"] for r in expected] == [r.tokens for r in expected]
    prompt = json.dumps({"tokens": [5] * 256})
    (tmp_path / "long.jsonl").write_text(prompt)
    assert run(adapter_path, str(tmp_path / "long.jsonl"), tmp_path / "none.jsonl") == 2
    assert "no room for an answer in the model's context of 256" in capsys.readouterr().err
    assert main(["doctor", "--model", adapter_path]) == 0
    assert f"decoding of {adapter_path}" in capsys.readouterr().out


def test_an_adapters_own_tokenizer_is_taken(adapter_path, model_path):
    """Also where its files do not say what kind it is."""
    words = Tokenizer(models.WordLevel({f"w{VOCAB - 1 - i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.save(os.path.join(adapter_path, "tokenizer.json"))
    tokenizer, context = load.load_tokenizer(adapter_path)
    assert tokenizer("w3").input_ids == [VOCAB - 4]
    assert context == 256


def test_an_adapter_that_cannot_be_loaded_says_why(adapter_path, model_path, capsys, monkeypatch):
    command = ["generate", "--model", adapter_path, "--prompt", "w1", "--quiet"]
    monkeypatch.setattr(load, "is_peft_available", lambda: False)
    assert main(command) == 2
    assert f"cannot be loaded: it is an adapter of {model_path}, which needs PEFT: pip install peft" in (
        capsys.readouterr().err
    )
    config = os.path.join(adapter_path, "adapter_config.json")
    with open(config, "w") as file:
        json.dump({"peft_type": "LORA"}, file)
    assert main(command) == 2
    assert "adapter_config.json does not name the model that it adapts" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chat_path(model_path, tmp_path_factory):
    """The same model, a base model: its template ends turns with w9, a special token, and its EOS is w2. BOS is w1."""
    path = str(shutil.copytree(model_path, tmp_path_factory.mktemp("chat") / "model"))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["w1", "w9"])
    words.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", bos_token="w1")
    tokenizer.chat_template = "w1{% for m in messages %} w{{ 3 + loop.index }} {{ m.content }} w9{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


def test_the_end_of_a_turn_in_the_chat_template_ends_answers_and_is_said(chat_path, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w5"}\n{"messages": [{"role": "user", "content": "w6 w7"}]}\n{"tokens": [8]}\n')
    tokens = [[1, 4, 5, 9], [1, 4, 6, 7, 9], [8]]
    config = PowerConfig(max_new_tokens=24, block_size=8, mcmc_steps=3)
    sampler = PowerSampler(LlamaForCausalLM.from_pretrained(chat_path))
    expected = sampler.generate(tokens, config, num_chains=2, seed=5, eos_token_id=[2, 9])
    assert any(r.tokens[-1] == 9 for r in expected)  # or the test shows nothing
    assert run(chat_path, str(path), tmp_path / "chat.jsonl", "--chat") == 0
    assert "w9 ends answers, too: it ends a turn in the model's chat template" in capsys.readouterr().err
    assert [r["tokens"] for r in read(tmp_path / "chat.jsonl").values()] == [r.tokens for r in expected]
    path.write_text('{"prompt": "w1 w5"}\n')
    assert run(chat_path, str(path), tmp_path / "plain.jsonl") == 0
    printed = capsys.readouterr().err
    assert "ends answers, too" not in printed
    assert "prompt 0 begins with w1, which the tokenizer puts in front, too" in printed
    expected = sampler.generate([[1, 5]], config, num_chains=2, seed=5)
    assert [r["tokens"] for r in read(tmp_path / "plain.jsonl").values()] == [r.tokens for r in expected]


def test_prompts_are_printed_without_a_file(model_path, capsys):
    arguments = ["generate", "--model", model_path, "--prompt", "w3 w4", "--prompt", "w5", *OPTIONS]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("--- prompt") == 4
    assert "tokens forwarded for" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "0.5"], "alpha is 0.5"),
        (["--mcmc-steps", "-1"], "mcmc_steps is -1"),
        (["--block-size", "-2"], "block_size is -2"),
        (["--temperature", "2.0"], "early_rejection is True with temperature 2.0"),
        (["--model", "/nowhere"], "--model /nowhere cannot be loaded"),
        (["--device", "cuda:99"], "cannot be loaded on cuda:99"),
        (["--chat"], "prompt 0 does not fit the chat template"),
    ],
)
def test_bad_options_exit_with_2_and_name_the_option(model_path, prompts, tmp_path, capsys, options, message):
    assert run(model_path, prompts, tmp_path / "none.jsonl", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-chains", "0"], "--num-chains is 0; it must be at least 1"),
        (["--max-chains", "0"], "--max-chains is 0; it must be at least 1"),
        (["--threads", "-1"], "--threads is -1; it must be at least 1"),
        (["--threads", "0"], "--threads is 0; it must be at least 1"),
        (["--seed", str(2**64)], f"--seed is {2**64}; it must have 64 bits"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "w1 \udcff"], "is not UTF-8 text"),  # how a command line's byte 0xff is read
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(options, message, capsys):
    assert main(["generate", "--model", "/nowhere", "--prompt", "w1", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "w1 \\ud800"}', "line 2 holds half of a surrogate pair"),
        ('{"prompt": "w1", "id": "\\udfff"}', "line 2 holds half of a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 2 holds half of a surrogate pair"),
        ('{"tokens": ["1"]}', "line 2 holds tokens that are not token ids"),
        ('{"tokens": [true]}', "line 2 holds tokens that are not token ids"),
        ('{"tokens": [-1]}', "line 2 holds tokens that are not token ids"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_a_line_of_prompts_that_no_model_could_take_is_refused_before_one_is_loaded(tmp_path, capsys, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w1", "id": "\\ud83d\\ude00"}\n' + line + "\n")  # a whole pair is a character
    assert run("/nowhere", str(path), tmp_path / "none.jsonl") == 2
    assert message in capsys.readouterr().err


def test_what_a_tokenizer_refuses_is_named():
    def tokenizer(text):
        raise TypeError("no such text")

    with pytest.raises(ArgumentError, match="prompt 3 is refused by the tokenizer of the model: no such text"):
        drawing.prompt_tokens(3, {"prompt": "w1"}, tokenizer, chat=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"text": "w1"}', "line 2 must be an object with one of"),
        ('{"prompt": 3}', "line 2 must be an object with one of"),
        ('{"tokens": [99]}', "holds token id 99"),
        ('{"tokens": []}', "line 2 must be an object with one of"),
        ('{"messages": []}', "line 2 must be an object with one of"),
        ('{"messages": [{"role": "user"}]}', "prompt 1 does not fit the chat template"),
    ],
)
def test_bad_prompt_files_name_the_line(model_path, tmp_path, capsys, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w1"}\n' + line + "\n")
    assert run(model_path, str(path), tmp_path / "none.jsonl") == 2
    assert message in capsys.readouterr().err


def test_the_doctor_names_the_backend_of_every_op(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["ops"]) >= {
        "sample_tokens", "score_tokens", "sample_slots", "sample_from_hidden", "score_from_hidden",
        "mh_accept", "mh_advance", "kv_copy_ranges", "kv_copy_blocks", "block_table_fork",
        "block_table_extend", "block_table_commit", "block_table_rollback",
    }  # fmt: skip
    assert all(by_device["cpu"] in ("cpp", "reference") for by_device in report["ops"].values())
    assert report["packages"]["torch"]
    assert main(["doctor"]) == 0
    assert "backend of each op" in capsys.readouterr().out


@pytest.mark.measured
def test_the_doctor_says_how_a_model_is_decoded_and_in_how_many_lanes(model_path, capsys):
    assert main(["doctor", "--json", "--model", str(model_path), "--threads", "1"]) == 0
    decoding = json.loads(capsys.readouterr().out)["decoding"]
    assert decoding["attention"] in ("rows", "padded")
    assert decoding["captured"] is False
    assert decoding["step_seconds"].keys() >= {"1", "2", "16"}
    assert all(seconds > 0 for seconds in decoding["step_seconds"].values())
    assert list(decoding["plans"]) == ["1", "4", "16", "64", "1000"]
    for jobs, (slots, lanes) in decoding["plans"].items():
        assert 1 <= slots <= int(jobs)
        assert 1 <= lanes <= 10  # steps of a stage
    assert main(["doctor", "--model", str(model_path)]) == 0
    printed = capsys.readouterr().out
    assert f"decoding of {model_path} on cpu, float32" in printed
    assert "chains at once x lanes of each" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda"], "--device is cuda without --model"),
        (["--dtype", "float16"], "--dtype is float16 without --model"),
        (["--threads", "2"], "--threads is 2 without --model"),
        (["--threads", "-1", "--model", "/nowhere"], "--threads is -1; it must be at least 1"),
    ],
)
def test_the_doctor_refuses_options_that_it_would_not_follow(options, message, capsys):
    assert main(["doctor", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_doctor_refuses_a_model_that_is_not_there(capsys):
    assert main(["doctor", "--model", "/nowhere"]) == 2
    assert "--model /nowhere cannot be loaded" in capsys.readouterr().err


def test_bench_prints_its_tables_and_writes_its_results(tmp_path, capsys):
    """One small operator; tests/test_bench_results.py looks at the whole of it."""
    arguments = ["bench", "--quick", "--device", "cpu", "--ops", "kv_copy_ranges", "--out", str(tmp_path / "new")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "KV copies: kv_copy_ranges" in printed
    assert "mh_accept" not in printed
    assert json.loads((tmp_path / "new" / "ops.json").read_text())["records"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--device", "meta"], "it must be a CPU or CUDA device"),
        (["--threads", "0"], "--threads is 0"),
        (["--seconds", "-1"], "--seconds is -1"),
        (["--out", __file__], "cannot be written"),
    ],
)
def test_bad_bench_options_exit_with_2_and_name_the_option(options, message, capsys):
    assert main(["bench", "--quick", "--ops", "kv_copy_ranges", *options]) == 2
    assert message in capsys.readouterr().err


def test_bench_does_not_measure_the_reference(capsys):
    with use_backend("reference"):
        assert main(["bench", "--quick", "--device", "cpu"]) == 2
    assert "the reference would serve cpu" in capsys.readouterr().err
