"""`power-kernels generate`, `eval` and `doctor` with SGLang, and its page, each in a process of its own
(`make test-sglang`)."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sglang.engines import GIVEN
from tests.stacks import tiny

_ARGUMENTS = {key: json.dumps(value).strip('"') for key, value in GIVEN.items() if key != "dtype"}
ENGINE = [
    "--engine",
    "sglang",
    "--dtype",
    "float32",
    *(f"--engine-arg={key}={value}" for key, value in _ARGUMENTS.items()),
]


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "power_kernels.api.commands.cli", *arguments], capture_output=True, text=True
    )


def generated(folder, path, *arguments: str) -> list[dict]:
    done = command(
        "generate", "--model", str(folder), "--prompts", str(path.parent / "prompts.jsonl"), "--out", str(path),
        "--max-new-tokens", "24", "--block-size", "12", "--mcmc-steps", "3", "--alpha", "2", "--seed", "5",
        "--num-chains", "2", "--stop", "ab", "--quiet", *arguments,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate_draws_what_it_draws_without_sglang_and_goes_on_where_it_stopped(folder, tmp_path):
    prompts = "".join(json.dumps({"tokens": prompt}) + "\n" for prompt in tiny.prompts(4))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    theirs = generated(folder, tmp_path / "theirs.jsonl", "--dtype", "float32")
    out = tmp_path / "ours.jsonl"
    ours = generated(folder, out, *ENGINE)
    assert len(ours) == 8
    for a, b in zip(ours, theirs, strict=True):
        assert [a[key] for key in ("prompt_id", "chain_id", "tokens", "text", "finish")] == [
            b[key] for key in ("prompt_id", "chain_id", "tokens", "text", "finish")
        ]
    assert sum(line["cost"]["cached"] for line in ours) > 0
    whole = out.read_text()
    out.write_text("".join(whole.splitlines(keepends=True)[:5]))
    again = generated(folder, out, *ENGINE)
    assert [line["tokens"] for line in again] == [line["tokens"] for line in ours]


def test_eval_runs_an_arm_on_sglang(folder, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a0b", "answer": "c"}\n{"prompt": "c2d", "answer": "a"}\n')
    done = command(
        "eval", "--model", str(folder), *ENGINE,
        "--task", f"few=file:data={tmp_path}/questions.jsonl,grader=exact,max_new_tokens=12",
        "--arm", "plain", "--arm", "power:alpha=2,block_size=6,mcmc_steps=2", "--out", str(tmp_path / "run"),
        "--no-plots", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| few | power |" in done.stdout


def page(kind: str) -> list[str]:
    """The blocks of docs/sglang.md."""
    text = (Path(__file__).parents[2] / "docs" / "sglang.md").read_text()
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


def test_the_lines_of_the_page_run(folder, tmp_path):
    (text,) = page("python")
    given = ", ".join(f"{key}={value!r}" for key, value in GIVEN.items())
    for there, here in (
        ('"Qwen/Qwen3-0.6B"', repr(str(folder))), ("context_length=4096", given), ("block_size=64", "block_size=8"),
        ("The capital of France is", "a0b c2d"), ("Water boils at", "b1c"), ("max_new_tokens=256", "max_new_tokens=16"),
    ):  # fmt: skip
        assert text.count(there) == 1, there
        text = text.replace(there, here)
    (tmp_path / "lines.py").write_text(text)
    done = subprocess.run([sys.executable, str(tmp_path / "lines.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"-[\d.]+ nats, \d+ of \d+ steps accepted: '", done.stdout)) == 4


def test_the_command_of_the_page_runs(folder):
    (line,) = [line for text in page("bash") for line in text.splitlines() if line.startswith("power-kernels generate")]
    arguments = shlex.split(line)[1:]
    at = arguments.index("--engine-arg")
    arguments[at : at + 2] = ENGINE[2:]
    arguments[arguments.index("--model") + 1] = str(folder)
    arguments[arguments.index("--prompt") + 1] = "a0b"
    done = command(*arguments, "--max-new-tokens", "12", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "tokens forwarded" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device is cpu with --engine sglang"),
        (["--engine-arg", "page_size"], "--engine-arg is page_size; it must be KEY=VALUE"),
        (["--engine-arg", "no_such_thing=3"], "cannot be loaded with --engine sglang"),
    ],
)
def test_what_is_wrong_is_said(folder, arguments, message):
    done = command("generate", "--model", str(folder), "--prompt", "a0b", *ENGINE, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_doctor_says_which_sglang_is_there():
    done = command("doctor")
    assert "SGLang (--engine sglang): 0.5.23, sample_slots on cpu by cpp" in done.stdout
