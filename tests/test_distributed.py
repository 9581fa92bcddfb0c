"""Several processes draw what one draws: the division, the list that comes back, and ranks that die, stall or differ.

Each test starts real processes that meet over gloo, with the environment that torchrun gives.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from power_kernels.api import PowerConfig, PowerSampler
from power_kernels.api.commands import load
from power_kernels.api.driver.distributed import RankLostError, Ranks, generate_sharded, join
from power_kernels.errors import ArgumentError, ArgumentTypeError
from tests.commands import command, environment, free_port, joined, markov_model, save, start
from tests.toys import ToyEngine, power_toy

CONFIG = PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=5, block_size=2, mcmc_steps=3, final_steps=2, lanes=1)
PROMPTS = [[5], [6, 7], [8]]
# 3 prompts of 5 chains: 2 and 3 ranks get shares of different sizes. Ids that are not in order, as a caller may choose.
WORK = dict(num_chains=5, seed=3, prompt_ids=[7, 3, 4], max_chains=4)


def sampler() -> PowerSampler:
    return PowerSampler(ToyEngine(power_toy()))


def expected():
    return sampler().generate(PROMPTS, CONFIG, **WORK)


def run(target, folder, ranks, *arguments, kill=None):
    """Exit statuses and what each rank returned. target(rank, *arguments) runs in each."""
    port = free_port()
    processes = [
        start(
            answered,
            target,
            str(folder / f"{rank}.pickle"),
            rank,
            *arguments,
            log=folder / "log",
            environment=environment(rank, ranks, port),
        )
        for rank in range(ranks)
    ]
    if kill is not None:
        kill(processes)
    statuses = [joined(process) for process in processes]
    paths = [folder / f"{rank}.pickle" for rank in range(ranks)]
    answers = [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]
    return statuses, answers


def answered(target, path, rank, *arguments) -> int:
    answer = target(rank, *arguments)
    with open(path, "wb") as file:
        pickle.dump(answer, file)
    return 0


# -----------------------------------------------------------------------------------------------------------
# The division


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 40])  # one, fewer than chains, coprime to them, more than answers
def test_shares_hold_every_answer_once_and_differ_by_one_at_most(ranks):
    shares = [sampler().generate(PROMPTS, CONFIG, **WORK, share=(r, ranks)) for r in range(ranks)]
    drawn = [(result.prompt_id, result.chain_id) for share in shares for result in share]
    assert sorted(drawn) == sorted((i, k) for i in WORK["prompt_ids"] for k in range(5))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    # A prompt's chains are spread as evenly.
    for i in WORK["prompt_ids"]:
        counts = [sum(result.prompt_id == i for result in share) for share in shares]
        assert max(counts) - min(counts) <= 1


def test_what_is_left_is_what_is_divided():
    """Answers that are there do not count: with all of rank 0's drawn before, the rest is divided anew."""
    skip = {(i, k) for n, (i, k) in enumerate((i, k) for i in (7, 3, 4) for k in range(5)) if n % 2 == 0}
    sizes = [len(list(sampler().stream(PROMPTS, CONFIG, **WORK, skip=skip, share=(r, 2)))) for r in range(2)]
    assert sizes == [4, 3]


@pytest.mark.parametrize(
    ("share", "error", "message"),
    [
        ((2, 2), ArgumentError, r"share holds r = 2; it must lie in \[0, 1\]"),
        ((-1, 2), ArgumentError, r"share holds r = -1"),
        ((0, 0), ArgumentError, r"share holds n = 0; it must be at least 1"),
        ((0,), ArgumentError, r"share is \[0\]; it must be \(r, n\)"),
        ((0, 1.0), ArgumentTypeError, r"share holds n = 1.0; it must be an integer"),
        (1, ArgumentTypeError, r"share is a int; it must be a list"),
    ],
)
def test_a_share_that_is_none_is_refused(share, error, message):
    for call in (sampler().generate, sampler().stream):
        with pytest.raises(error, match=message):
            call(PROMPTS, CONFIG, share=share)


# -----------------------------------------------------------------------------------------------------------
# generate_sharded


def sharded(rank, group):
    """group: made by the caller, or by the call from the environment."""
    if group:
        dist.init_process_group("gloo")
    results = [generate_sharded(sampler(), PROMPTS, CONFIG, **WORK) for _ in range(2)]
    assert results[0] == results[1]
    assert dist.is_initialized() == group  # as it was found
    if group:
        dist.barrier()  # the caller's group still works
        dist.destroy_process_group()
    return results[0]


@pytest.mark.parametrize(("ranks", "group"), [(2, True), (3, False)])
def test_every_rank_gets_the_list_that_one_process_draws(tmp_path, ranks, group):
    statuses, lists = run(sharded, tmp_path, ranks, group)
    assert statuses == [0] * ranks, (tmp_path / "log").read_text()
    assert len(lists[0]) == 15
    for results in lists:
        for result, alone in zip(results, expected(), strict=True):
            # All but what it cost: a prompt that several chains of a rank share is prefilled for one of them.
            assert {**vars(result), "cost": None} == {**vars(alone), "cost": None}


def test_alone_it_is_generate():
    assert generate_sharded(sampler(), PROMPTS, CONFIG, **WORK) == expected()
    ids = torch.tensor(WORK["prompt_ids"])
    assert generate_sharded(sampler(), PROMPTS, CONFIG, **{**WORK, "prompt_ids": ids}) == expected()


def differing(rank, what):
    prompts = PROMPTS
    if what == "prompts":  # of the same shape, as of a data set that the caller has divided
        prompts = [[5], [6]] if rank == 0 else [[6], [7]]
    elif what == "tensors":
        prompts = torch.full((600, 2), 5)
        prompts[300, 1] += rank  # in the middle, which the printed form of a tensor leaves out
    try:
        generate_sharded(sampler(), prompts, CONFIG, seed=rank if what == "seed" else 0, num_chains=2)
    except ArgumentError as error:
        return str(error)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("seed", "the ranks were given different configs, seeds, num_chains or options"),
        ("prompts", "the ranks were given different prompts; each must be given the whole list"),
        ("tensors", "the ranks were given different prompts; each must be given the whole list"),
    ],
)
def test_ranks_with_different_work_are_told_so(tmp_path, what, message):
    assert run(differing, tmp_path, 2, what) == ([0, 0], [message] * 2)


# -----------------------------------------------------------------------------------------------------------
# Ranks that do not come


def deserted(rank, how):
    """Rank 1 of 3 does not come back from its share. What the others see: at once, not when their patience ends, but
    for the one that stalls, which no rank but a patient one could tell from one at work."""

    class Failing(ToyEngine):
        def step(self, state):
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises":
                raise ZeroDivisionError
            time.sleep(7200)

    engine = (Failing if rank == 1 else ToyEngine)(power_toy())
    patience = timedelta(seconds=2 if how == "stalls" else 7200)
    try:
        generate_sharded(PowerSampler(engine), PROMPTS, CONFIG, patience=patience)
    except RankLostError as error:
        return str(error)


@pytest.mark.parametrize("how", ["dies", "raises", "stalls"])
def test_a_rank_that_does_not_come_is_noticed(tmp_path, how):
    def kill(processes):
        if how == "stalls":
            for rank in (0, 2):
                joined(processes[rank])
            processes[1].kill()

    statuses, seen = run(deserted, tmp_path, 3, how, kill=kill)
    assert statuses == [0, 1 if how == "raises" else -signal.SIGKILL, 0], (tmp_path / "log").read_text()
    for message in (seen[0], seen[2]):
        assert message.startswith("another process of this run stopped, as its own output should explain, or")


def waiting(rank, path):
    try:
        with join() as ranks:
            if rank == 0:
                with open(path, "w") as file:
                    file.write("here")
                ranks.gather(None)
            time.sleep(7200)
    except KeyboardInterrupt:
        return "interrupted"


def test_a_rank_that_waits_can_be_interrupted(tmp_path):
    def kill(processes):
        while not (tmp_path / "here").exists() and processes[0].is_alive():
            time.sleep(0.01)
        time.sleep(0.2)  # most likely it waits by now; before, it is as easily interrupted
        os.kill(processes[0].pid, signal.SIGINT)
        assert joined(processes[0]) == 0  # rank 1 comes in two hours
        processes[1].kill()

    _, (seen, _) = run(waiting, tmp_path, 2, str(tmp_path / "here"), kill=kill)
    assert seen == "interrupted"


def test_a_world_without_an_address_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match=r"WORLD_SIZE is 2, but .*; start with torchrun"), join():
        pass


@pytest.mark.parametrize("value", ["", "two", "0", "-1"])
def test_a_world_size_that_is_no_number_is_named(monkeypatch, capsys, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    assert command(["generate", "--model", "/nowhere", "--prompt", "w5"]) == 2
    assert f"WORLD_SIZE is {value!r} in the environment; it must be an integer" in capsys.readouterr().err


# -----------------------------------------------------------------------------------------------------------
# The command (what is killed is in test_interrupts.py)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save(markov_model(), tmp_path_factory.mktemp("model"))


def words(model_path, out, *more):
    base = ["generate", "--model", model_path, "--prompt", "w5 w6", "--prompt", "w7"]
    small = ["--max-new-tokens", "12", "--block-size", "6", "--mcmc-steps", "2", "--lanes", "1"]
    return [*base, *small, *(["--out", str(out)] if out else []), *more]


def commands(folder, *lines):
    """Exit statuses and outputs of one rank per line."""
    port = free_port()
    logs = [folder / f"log-{rank}" for rank in range(len(lines))]
    processes = [
        start(command, line, log=log, environment=environment(rank, len(lines), port))
        for rank, (line, log) in enumerate(zip(lines, logs, strict=True))
    ]
    return [joined(process) for process in processes], [log.read_text() for log in logs]


def test_only_rank_0_shows_a_bar_and_it_is_of_its_share(model_path, tmp_path):
    statuses, logs = commands(tmp_path, *[words(model_path, tmp_path / "out", "--num-chains", "3")] * 2)
    assert statuses == [0, 0], logs
    assert "3/3" in logs[0]
    assert "answer" not in logs[1]


def test_ranks_with_other_prompts_or_another_file_are_refused(model_path, tmp_path):
    out = tmp_path / "out"
    statuses, logs = commands(tmp_path, words(model_path, out), words(model_path, out, "--seed", "1"))
    assert statuses == [1, 2]
    assert "rank 1 has another model, configuration, seed or other prompts than rank 0" in logs[1]
    assert "another process of this run stopped" in logs[0]
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "out").touch()
    statuses, logs = commands(other, words(model_path, out), words(model_path, other / "out"))
    assert statuses == [1, 2]
    assert "is not rank 0's; put it where all machines see it" in logs[1]


def test_a_file_that_another_run_writes_ends_every_rank(model_path, tmp_path):
    from power_kernels.api.commands.output_file import RecordFile

    holder = RecordFile(tmp_path / "out")
    statuses, logs = commands(tmp_path, *[words(model_path, tmp_path / "out")] * 2)
    holder.close()
    assert statuses == [2, 1]
    assert "is being written by another process" in logs[0]


def test_several_processes_need_a_file(model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(words(model_path, None)) == 2
    assert "--out is not given; 2 processes need a file" in capsys.readouterr().err


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks = [Ranks(rank, 4, local_rank=rank % 2) for rank in range(4)]  # 2 machines of 2 GPUs
    assert [load._device(None, r) for r in ranks] == ["cuda:0", "cuda:1"] * 2
    assert [load._device("cuda", r) for r in ranks] == ["cuda:0", "cuda:1"] * 2
    assert load._device("cpu", ranks[1]) == "cpu"
    assert load._device("cuda:1", ranks[0]) == "cuda:1"
    assert load._device(None, Ranks()) == "cuda"
    with pytest.raises(ArgumentError, match="process 2 of this machine has no GPU among the 2"):
        load._device(None, Ranks(2, 3, local_rank=2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load._device(None, ranks[1]) == "cpu"
