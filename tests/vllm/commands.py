"""`power-kernels generate`, `eval` and `doctor` with vLLM, each in a process of its own (`make test-vllm`)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.vllm import tiny

GIVEN = dict(
    enforce_eager="true", block_size=tiny.BLOCK, kv_cache_memory_bytes=64 << 20, max_model_len=512,
    gpu_memory_utilization=0.1, max_num_seqs=8,
)  # fmt: skip
ENGINE = ["--engine", "vllm", "--dtype", "float32", *(f"--engine-arg={key}={value}" for key, value in GIVEN.items())]


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


def test_generate_draws_what_it_draws_without_vllm_and_goes_on_where_it_stopped(folder, tmp_path):
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


def test_eval_runs_an_arm_on_vllm(folder, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a0b", "answer": "c"}\n{"prompt": "c2d", "answer": "a"}\n')
    done = command(
        "eval", "--model", str(folder), *ENGINE,
        "--task", f"few=file:data={tmp_path}/questions.jsonl,grader=exact,max_new_tokens=12",
        "--arm", "plain", "--arm", "power:alpha=2,block_size=6,mcmc_steps=2", "--out", str(tmp_path / "run"),
        "--no-plots", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| few | power |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device is cpu with --engine vllm"),
        (["--engine-arg", "enforce_eager"], "--engine-arg is enforce_eager; it must be KEY=VALUE"),
        (["--engine-arg", "no_such_thing=3"], "cannot be loaded by vLLM"),
    ],
)
def test_what_is_wrong_is_said(folder, arguments, message):
    done = command("generate", "--model", str(folder), "--prompt", "a0b", *ENGINE, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_doctor_says_which_vllm_is_there():
    done = command("doctor")
    assert "vLLM (--engine vllm): 0.32.0, sample_slots on cpu by cpp" in done.stdout


def test_doctor_says_what_was_tested_where_vllm_is_another(monkeypatch):
    from power_kernels.api.commands import doctor
    from power_kernels.api.engines.vllm import versions

    monkeypatch.setattr(versions, "installed", lambda: "0.99.2")
    assert "vLLM is 0.99.2; tested: 0.31, 0.32, 0.33." in doctor.text(doctor.report())
