"""Killed at any moment and started again, the command ends with the file of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from power_kernels.api.commands.generate import INTERRUPTED
from tests.commands import command, environment, free_port, joined, keys, markov_model, records, save, start

# In order: an answer begun, half written, whole; then the last answer is there and the file is put in order.
ALONE = [
    "before the first answer",
    "in the middle of a line",
    "after a line",
    "before the new file is in place",
    "when the new file is in place",
]
PROMPTS = [{"id": "one", "prompt": "w5 w6 w7"}, {"tokens": [8, 9]}, {"prompt": "w4", "level": 3}, {"tokens": [11] * 9}]
WANTED = [(i, k) for i in range(len(PROMPTS)) for k in range(2)]
# Slots for 3 of 8 answers: some run, some wait, and they finish in another order than the prompts'.
OPTIONS = "--max-new-tokens 12 --block-size 6 --mcmc-steps 2 --num-chains 2 --seed 5 --max-chains 3 --lanes 2 --quiet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("command")
    save(markov_model(), path / "model")
    (path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    return path


def arguments(folder, out, *more):
    base = ["generate", "--model", str(folder / "model"), "--prompts", str(folder / "prompts.jsonl"), "--out", str(out)]
    return [*base, *OPTIONS.split(), *more]


@pytest.fixture(scope="module")
def undisturbed(folder):
    out = folder / "undisturbed.jsonl"
    process = start(command, arguments(folder, out), log=folder / "undisturbed.log")
    assert joined(process) == 0, (folder / "undisturbed.log").read_text()
    assert keys(out) == WANTED
    return records(out)


def run(folder, out, log, *moment, ranks=1, rank=None):
    """Exit statuses of a run. moment, number: when and how `rank` is killed (every one where rank is None)."""
    port = free_port()
    processes = [
        start(
            command,
            arguments(folder, out),
            *(moment if rank in (None, r) else ()),
            log=log,
            environment=environment(r, ranks, port) if ranks > 1 else None,
        )
        for r in range(ranks)
    ]
    return [joined(process) for process in processes]


def finished(out):
    """Answers in the file and its parts; several processes may each have kept a copy while one was put in place."""
    return {key for path in out.parent.glob(out.name + "*") if path.suffix != ".tmp" for key in keys(path)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_killed_at_every_moment_in_turn_a_run_loses_nothing_and_ends_identical(folder, undisturbed, tmp_path, number):
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    kept = set()
    for moment in ALONE:
        status = run(folder, out, log, moment, number)
        assert status == [-number if number == signal.SIGKILL else INTERRUPTED], log.read_text()
        assert finished(out) >= kept, moment
        kept = finished(out)
        if moment == "after a line":
            assert len(kept) == 1
    assert kept == set(WANTED)
    assert run(folder, out, log) == [0]
    assert records(out) == undisturbed
    assert sorted(os.listdir(tmp_path)) == ["log", "out.jsonl"]
    if number != signal.SIGKILL:
        assert f"interrupted: 1 of 8 answers are in {out}; the same command goes on from there" in log.read_text()


def test_runs_of_several_processes_killed_anywhere_go_on_with_any_number(folder, undisturbed, tmp_path):
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    # 3 processes; one of them dies with an answer finished, and the others say so instead of waiting for it.
    assert run(folder, out, log, "after a line", signal.SIGKILL, ranks=3, rank=1) == [1, -signal.SIGKILL, 1]
    assert log.read_text().count("another process of this run stopped") == 2
    assert {path.name for path in tmp_path.glob("out*")} == {"out.jsonl", "out.jsonl.part-1", "out.jsonl.part-2"}
    kept = finished(out)
    assert 6 <= len(kept) < 8  # ranks 0 and 2 drew their 3 and 2, rank 1 the first of its 3
    # 2 processes, killed while the parts of 3 are taken over
    assert run(folder, out, log, "when the first part is gone", signal.SIGKILL, ranks=2, rank=0)[0] == -signal.SIGKILL
    assert finished(out) >= kept
    # 2 processes; one is killed in a line
    assert run(folder, out, log, "in the middle of a line", signal.SIGTERM, ranks=2, rank=1)[1] == INTERRUPTED
    assert run(folder, out, log) == [0]
    assert records(out) == undisturbed
    assert sorted(os.listdir(tmp_path)) == ["log", "out.jsonl"]


def test_undisturbed_runs_of_2_and_3_processes_are_those_of_one(folder, undisturbed, tmp_path):
    for ranks in (2, 3):
        out, log = tmp_path / f"{ranks}.jsonl", tmp_path / f"{ranks}.log"
        assert run(folder, out, log, ranks=ranks) == [0] * ranks, log.read_text()
        assert records(out) == undisturbed
        assert log.read_text().count("8 answers written") == 1  # rank 0 speaks for all
        assert f"8 answers written to {out}, 0 were there" in log.read_text()


def test_a_process_that_waits_for_another_can_be_ended(folder, tmp_path):
    out, log, port = tmp_path / "out.jsonl", tmp_path / "log", free_port()
    waiting, stopped = [
        start(
            command,
            arguments(folder, out),
            *(("after a line", signal.SIGSTOP) if rank == 1 else ()),
            log=log,
            environment=environment(rank, 2, port),
        )
        for rank in range(2)
    ]
    try:
        wait_for(lambda: len(keys(out)) == 4 and len(finished(out)) == 5)  # its share, and what the other one wrote
        waiting.terminate()
        assert joined(waiting) == INTERRUPTED  # although the stopped process never answers
    finally:
        stopped.kill()  # nothing else ends a stopped process
    assert f"interrupted: 5 of 8 answers are in {out}" in log.read_text()


def wait_for(condition, seconds=1200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_torchrun_ends_the_ranks_when_one_is_killed_and_the_run_goes_on(folder, tmp_path):
    """The real command, from outside: one answer at a time and 20 times the steps, so that it is caught at work."""
    whole, out, log = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", tmp_path / "log"
    longer = ["--max-chains", "1", "--mcmc-steps", "40"]
    alone = start(command, arguments(folder, whole, *longer), log=log)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    line = [*launcher, str(free_port()), "-m", "power_kernels.api.commands.cli", *arguments(folder, out, *longer)]
    torchrun = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: keys(out.with_name("out.jsonl.part-1")) or torchrun.poll() is not None)
    os.kill(worker(torchrun.pid, rank=1), signal.SIGKILL)
    printed, _ = torchrun.communicate(timeout=1200)
    assert torchrun.returncode == 1, printed
    # Rank 0 by torchrun's SIGTERM, or, where it has drawn its share already, since the other is gone.
    assert "interrupted: " in printed or "run the same command again" in printed, printed
    assert 1 <= len(finished(out)) < 8
    again = start(command, arguments(folder, out, *longer), log=log)
    assert [joined(alone), joined(again)] == [0, 0], log.read_text()
    assert keys(out) == WANTED
    assert records(out) == records(whole)
    assert sorted(os.listdir(tmp_path)) == ["log", "out.jsonl", "whole.jsonl"]


def worker(launcher: int, rank: int) -> int:
    """The process of a rank, by its environment."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")
