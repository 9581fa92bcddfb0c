"""`power-kernels eval`: what is drawn, where it is kept, going on after a kill, several processes, refusals.

The model is a Markov chain in the shape of a Llama, so that answers are identical bit for bit in every batch.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from power_kernels.api.commands.cli import main
from power_kernels.api.commands.generate import INTERRUPTED
from power_kernels.api.driver.stop import before_stop
from power_kernels.api.experiments import records as run_records
from power_kernels.api.experiments import schema, table
from power_kernels.api.experiments.records import RunFolder
from tests.commands import EOS, VOCAB, command, environment, free_port, joined, markov_model, records, save, start
from tests.test_stop_strings import letters_tokenizer
from tests.tiny_models import llama

PROBLEMS = [
    {"task_id": f"Tiny/{i}", "prompt": prompt, "entry_point": "f", "canonical_solution": "", "test": ""}
    for i, prompt in enumerate(["w5 w6", "w7", "w8 w9 w10", "w11"])
]
LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment")
    save(markov_model(), path / "model")
    (path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    (path / "experiment.yaml").write_text(experiment(path))
    return path


def experiment(path: Path) -> str:
    return f"""
model: {path / "model"}
device: cpu
max_chains: 3
seeds: [4, 5]
tasks:
  - {{kind: humaneval, data: {path / "problems.jsonl"}, max_new_tokens: {LENGTH}, stop: [" w3", " w9 w1"]}}
arms:
  - {{kind: plain, stop: text}}
  - {{kind: greedy, stop: none}}
  - {{kind: power, name: mh, alpha: 3, block_size: 6, mcmc_steps: 2, stop: text}}
  - {{kind: best-of-n, of: plain, n: equal(mh), by: logp-per-token}}
"""


FILES = [
    "best-of-n/seed-4",
    "best-of-n/seed-5",
    "greedy/seed-4",
    "mh/seed-4",
    "mh/seed-5",
    "plain/seed-4",
    "plain/seed-5",
]


def arguments(folder, out, *more):
    return ["eval", str(folder / "experiment.yaml"), "--out", str(out), "--quiet", "--no-plots", *more]


def everything(out: Path) -> dict[str, list[bytes]]:
    """The lines of each file, without what depends on how they were computed."""
    found = sorted((out / "records").rglob("*"))
    return {str(path.relative_to(out / "records" / "humaneval")): records(path) for path in found if path.is_file()}


def read(out: Path, arm: str, seed: int) -> list[dict]:
    path = out / "records" / "humaneval" / arm / f"seed-{seed}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(folder):
    out = folder / "undisturbed"
    assert main(arguments(folder, out)) == 0
    return out


def test_every_arm_and_seed_has_a_file_with_every_question_in_order(undisturbed):
    assert sorted(everything(undisturbed)) == [f"{name}.jsonl" for name in FILES]
    n = json.loads((undisturbed / "config.json").read_text())["resolved"]["humaneval"]["best-of-n"]
    assert n > 1
    for name in FILES:
        arm, seed = name.split("/seed-")
        lines = read(undisturbed, arm, int(seed))
        chains = range(n if arm == "best-of-n" else 1)
        assert [(r["prompt_id"], r["chain_id"]) for r in lines] == [(i, k) for i in range(4) for k in chains]
        for r in lines:
            asked = {"question": f"Tiny/{r['prompt_id']}", "task": "humaneval", "arm": arm, "seed": int(seed)}
            assert {key: r[key] for key in asked} == asked
            assert len(r["trace"]["logp"]) == r["steps"]
            assert r["cost"]["seconds"] >= 0
    assert {r["steps"] for r in read(undisturbed, "plain", 4)} == {0}
    assert all(r["steps"] >= 2 for r in read(undisturbed, "mh", 4))


def test_the_first_answers_of_n_are_the_arm_s_own(undisturbed):
    of_n = [r for r in read(undisturbed, "best-of-n", 5) if r["chain_id"] == 0]
    assert [r["tokens"] for r in of_n] == [r["tokens"] for r in read(undisturbed, "plain", 5)]


def test_as_many_answers_are_drawn_as_cost_the_tokens_of_the_other_arm(undisturbed):
    """A prompt that several chains share is forwarded once: what counts is behind it."""

    def mean(arm):
        costs = [r["cost"] for seed in (4, 5) for r in read(undisturbed, arm, seed)]
        return sum(cost["forwarded"] - cost["prefill"] for cost in costs) / len(costs)

    n = json.loads((undisturbed / "config.json").read_text())["resolved"]["humaneval"]["best-of-n"]
    assert n == round(mean("mh") / mean("plain"))


def test_greedy_takes_the_likeliest_token(undisturbed):
    best = markov_model().lm_head.weight.T[:, :VOCAB]
    for r in read(undisturbed, "greedy", 4):
        previous = int(PROBLEMS[r["prompt_id"]]["prompt"].split()[-1][1:])
        normed = torch.nn.functional.rms_norm(torch.eye(VOCAB)[previous], (VOCAB,))
        for token in r["tokens"]:
            normed = torch.nn.functional.rms_norm(torch.eye(VOCAB)[previous], (VOCAB,))
            assert int((normed @ best).argmax()) == token
            previous = token
        assert len(r["tokens"]) == LENGTH or r["tokens"][-1] == EOS
        assert r["answer"] == r["text"]  # stop: none


def test_an_answer_that_is_cut_afterwards_says_how_many_tokens_it_has_and_how_likely_they_are(undisturbed):
    cut = 0
    for r in [r for seed in (4, 5) for arm in ("plain", "mh") for r in read(undisturbed, arm, seed)]:
        assert r["answer"] == before_stop(r["text"], (" w3", " w9 w1"))
        words = [f" w{token}" for token in r["tokens"] if token != EOS]
        assert r["text"] == "".join(words)
        if len(r["answer"]) < len(r["text"]):
            cut += 1
            ends = "".join(words[: r["answer_tokens"]]), "".join(words[: r["answer_tokens"] - 1])
            assert [any(string in text for string in (" w3", " w9 w1")) for text in ends] == [True, False]
            assert (r["answer_logp"] > r["logp"]) == (r["answer_tokens"] < len(r["tokens"]))
        else:
            assert (r["answer_tokens"], r["answer_logp"]) == (len(r["tokens"]), r["logp"])
    assert cut >= 3


def test_a_run_that_is_whole_draws_nothing_and_one_may_grow(folder, undisturbed, tmp_path, capsys):
    before, out = everything(undisturbed), tmp_path / "run"
    shutil.copytree(undisturbed, out)
    assert main(arguments(folder, out)) == 0
    assert capsys.readouterr().err.count("\n0 answers written") == len(FILES)
    assert everything(out) == before
    assert main(arguments(folder, out, "--seeds", "4", "5", "6", "--only", "plain")) == 0
    grown = everything(out)
    assert len(grown.pop("plain/seed-6.jsonl")) == len(PROBLEMS)
    assert grown == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--arm", "mh=power:alpha=2,block_size=6,mcmc_steps=2,stop=text"], "another arm mh: alpha is 2.0 and was 3.0"),
        (["--task", "humaneval:data={problems},max_new_tokens=13"], "another task humaneval: stop is"),
    ],
)
def test_a_folder_of_another_experiment_is_refused_and_left_alone(folder, undisturbed, changed, message, capsys):
    before, config = everything(undisturbed), (undisturbed / "config.json").read_bytes()
    changed = [part.format(problems=folder / "problems.jsonl") for part in changed]
    assert main(arguments(folder, undisturbed, *changed)) == 2
    assert message in capsys.readouterr().err
    assert (everything(undisturbed), (undisturbed / "config.json").read_bytes()) == (before, config)


def test_a_pilot_counts_and_a_dry_run_tells_its_cost(folder, undisturbed, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(folder, out, "--dry-run")) == 0
    assert "--pilot N" in capsys.readouterr().out
    assert not out.exists()
    assert main(arguments(folder, out, "--pilot", "2")) == 0
    whole = everything(undisturbed)
    assert everything(out) == {f"{a}/seed-4.jsonl": whole[f"{a}/seed-4.jsonl"][:2] for a in ("plain", "greedy", "mh")}
    capsys.readouterr()
    assert main(arguments(folder, out, "--dry-run")) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    pilot = [r["cost"]["forwarded"] for r in read(out, "mh", 4)]
    assert lines["mh"][1:6] == ["humaneval", "2", "8", "2", f"{sum(pilot) / 2:.0f}"]
    assert int(lines["mh"][6]) == 6 * sum(pilot) / 2
    assert main(arguments(folder, out)) == 0
    assert everything(out).keys() == whole.keys()
    for name in ("plain/seed-5.jsonl", "greedy/seed-4.jsonl", "mh/seed-4.jsonl"):
        assert everything(out)[name] == whole[name]


@pytest.mark.parametrize("moment", ["before the first answer", "in the middle of a line", "after a line"])
def test_a_run_that_is_killed_goes_on_and_ends_identical(folder, undisturbed, tmp_path, moment):
    out, log = tmp_path / "run", tmp_path / "log"
    number = signal.SIGTERM if moment == "after a line" else signal.SIGKILL
    process = start(command, arguments(folder, out), moment, number, log=log)
    assert joined(process) == (INTERRUPTED if number == signal.SIGTERM else -number), log.read_text()
    assert main(arguments(folder, out)) == 0
    assert everything(out) == everything(undisturbed)
    assert (out / "config.json").read_bytes() == (undisturbed / "config.json").read_bytes()


def test_two_processes_draw_what_one_draws_one_of_them_killed_on_the_way(folder, undisturbed, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"

    def run(*moment):
        port = free_port()
        processes = []
        for rank in range(2):
            killed = moment if rank == 1 else ()
            told = environment(rank, 2, port)
            processes.append(start(command, arguments(folder, out), *killed, log=log, environment=told))
        return [joined(process) for process in processes]

    assert run("after a line", signal.SIGKILL) == [1, -signal.SIGKILL], log.read_text()
    assert run() == [0, 0], log.read_text()
    assert everything(out) == everything(undisturbed)


def test_grades_and_dry_runs_are_of_the_folder_s_own_questions(folder, undisturbed, tmp_path, capsys):
    """Other questions of the same name would be graded by other truths."""
    out, others = tmp_path / "run", tmp_path / "others.jsonl"
    shutil.copytree(undisturbed, out)
    before = everything(out)
    others.write_text("".join(json.dumps({**problem, "test": "x"}) + "\n" for problem in PROBLEMS[:2]))
    task = ["--task", f'humaneval:data={others},max_new_tokens={LENGTH},stop=[" w3"," w9 w1"]']
    for more in (["--grade", "--allow-code-execution"], ["--dry-run"], []):
        assert main(arguments(folder, out, *task, *more)) == 2
        assert "holds another task humaneval: questions is 2 and was 4" in capsys.readouterr().err
    assert everything(out) == before
    assert not (out / "grades").exists()
    assert main(arguments(folder, tmp_path / "nothing", "--grade", "--allow-code-execution")) == 2
    assert f"--out {tmp_path / 'nothing'} holds no run to --grade" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("records/humaneval/plain/seed-4.jsonl", "nonsense\n", "seed-4.jsonl line 1 is not a record of power-kernels"),
        ("records/humaneval/plain/seed-4.jsonl", "[3]\n", "seed-4.jsonl line 1 is not a record of power-kernels"),
        ("grades/humaneval/plain/seed-4.jsonl", "{", "seed-4.jsonl does not hold grades of power-kernels"),
        ("grades/humaneval/plain/seed-4.jsonl", '{"a": 1}\n', "seed-4.jsonl does not hold grades of power-kernels"),
        ("config.json", "[1]", "holds a config.json that is a list"),
    ],
)
def test_a_file_of_something_else_in_the_folder_is_named(folder, undisturbed, tmp_path, file, content, message, capsys):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    (out / file).parent.mkdir(parents=True, exist_ok=True)
    (out / file).write_text(content)
    assert main(arguments(folder, out, "--grade", "--allow-code-execution")) == 2
    assert message in capsys.readouterr().err


def test_records_are_found_while_another_run_takes_over_parts(undisturbed, tmp_path, monkeypatch):
    """Just before its part is read, and just before the file is."""
    lines = (undisturbed / "records" / "humaneval" / "mh" / "seed-4.jsonl").read_text().splitlines(keepends=True)
    path = RunFolder(tmp_path).records("humaneval", "mh", 4)
    path.parent.mkdir(parents=True)
    whole_lines = run_records.whole_lines

    def moved_before(name):
        path.write_text("".join(lines[:2]))
        part = path.with_name(f"{path.name}.part-1")
        part.write_text("".join(lines[2:]))

        def read(file):
            if file.name == name and part.exists():
                path.write_text("".join(lines))
                part.unlink()
            return whole_lines(file)

        monkeypatch.setattr(run_records, "whole_lines", read)
        return [
            json.dumps(record, ensure_ascii=False) + "\n" for record in RunFolder(tmp_path).read("humaneval", "mh", 4)
        ]

    assert len(lines) == 4
    assert moved_before(f"{path.name}.part-1") == lines
    assert moved_before(path.name) == lines


def test_of_n_answers_that_are_not_all_there_none_is_taken(folder, undisturbed, tmp_path):
    """The best of fewer is another arm."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    path = out / "records" / "humaneval" / "best-of-n" / "seed-5.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert main(arguments(folder, out, "--grade", "--allow-code-execution")) == 0
    rows = {row["arm"]: row for row in json.loads((out / "table.json").read_text())["rows"]}
    assert (rows["best-of-n"]["answers"], rows["plain"]["answers"]) == (7, 8)


def test_arms_meet_on_the_seeds_and_places_that_both_have():
    """First differs from second with seed 1 alone, where second has one answer more with seed 0."""
    first = {0: {(0, 0): 1.0, (1, 0): 1.0}, 1: {(0, 0): 0.0, (1, 0): 1.0}}
    second = {0: {(0, 0): 1.0, (0, 1): 1.0, (1, 0): 0.0}, 1: {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.0}, 2: {(0, 0): 1.0}}
    arms = schema.experiment({**GOOD, "arms": ["greedy", "plain"]}).arms
    (found,) = table._comparisons({("t", "greedy"): (arms[0], first), ("t", "plain"): (arms[1], second)})
    assert (found["questions"], found["seeds"], found["only_first"], found["only_second"]) == (2, 2, 2, 0)


def test_a_disk_that_is_full_is_said_and_leaves_no_half_a_file(folder, undisturbed, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    table_before = (out / "table.json").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("power_kernels.api.experiments.records.os.fsync", full)
    assert main(arguments(folder, out, "--grade", "--allow-code-execution")) == 2
    assert "cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert (out / "table.json").read_bytes() == table_before
    assert not list(out.rglob("*.tmp-*"))


# -- what is refused, before a model is loaded

GOOD = {"model": "m", "tasks": ["humaneval"], "arms": ["plain"]}
REFUSED = [
    ({"arms": []}, "arms is []; it must not be empty"),
    ({"arms": "plain"}, "arms is 'plain'; it must be a list"),
    ({"arms": ["nonsense"]}, "arms[0].kind is 'nonsense'; allowed: 'plain', 'low-temperature', 'greedy', 'power'"),
    ({"arms": [{"name": "x"}]}, "arms[0].kind is not given"),
    ({"arms": [{"kind": "plain", "alpha": 4}]}, "arms[0].alpha is not known; allowed: name, seeds, model, stop, draws"),
    ({"arms": [{"kind": "plain", "stop": "never"}]}, "arms[0].stop is 'never'; allowed: 'law', 'text' or 'none'"),
    ({"arms": [{"kind": "greedy", "draws": 2}]}, "arms[0].draws is 2; allowed: 1"),
    ({"arms": [{"kind": "plain", "draws": 0}]}, "arms[0].draws is 0; it must be at least 1"),
    ({"arms": [{"kind": "power", "alpha": "much"}]}, "arms[0].alpha is 'much'; it must be a number"),
    ({"arms": [{"kind": "power", "mcmc_steps": 0}]}, "arms[0]: mcmc_steps and final_steps are 0"),
    ({"arms": [{"kind": "power", "mcmc_steps": 1.5}]}, "arms[0].mcmc_steps is 1.5; it must be an integer"),
    ({"arms": [{"kind": "power", "blocks": 2, "block_size": 8}]}, "arms[0]: blocks is 2 beside block_size 8"),
    ({"arms": ["plain", "plain"]}, "arms holds plain twice"),
    ({"arms": ["plain", {"kind": "best-of-n", "of": "mh", "n": 4}]}, "of of the arm best-of-n is mh; allowed: plain"),
    ({"arms": ["plain", {"kind": "best-of-n", "of": "plain", "n": 1}]}, "arms[1].n is 1; it must be an integer of at"),
    ({"arms": ["plain", {"kind": "best-of-n", "of": "plain", "n": True}]}, "arms[1].n is True; it must be an integer"),
    ({"arms": ["plain", {"kind": "majority", "of": "plain", "n": "all"}]}, "arms[1].n is 'all'; it must be an integer"),
    ({"arms": ["greedy", {"kind": "majority", "of": "greedy", "n": 2}]}, "whose answers are all the same"),
    ({"arms": [{"kind": "plain", "draws": 2}, {"kind": "majority", "of": "plain", "n": 2}]}, "which has no effect"),
    ({"arms": [{"kind": "plain", "name": "../x"}]}, "arms[0].name is '../x'; it may hold letters"),
    ({"tasks": [3]}, "tasks[0] is 3; it must be a mapping, or the name of a kind"),
    ({"tasks": [{"kind": "humaneval", "limit": 0}]}, "tasks[0].limit is 0; it must be at least 1"),
    ({"tasks": [{"kind": "humaneval", "stop": "x"}]}, "tasks[0].stop is 'x'; it must be a list"),
    ({"tasks": [{"kind": "humaneval", "stop": [""]}]}, "tasks[0].stop is ['']; a stop string must not be empty"),
    ({"tasks": [{"kind": "humaneval", "chat": "perhaps"}]}, "tasks[0].chat is 'perhaps'; it must be true or false"),
    ({"tasks": [{"kind": "file", "data": "x"}]}, "tasks[0].grader is not given"),
    ({"seeds": [1, 1]}, "seeds holds 1 twice"),
    ({"seeds": [2**64]}, "seeds[0] is 18446744073709551616; it must be below"),
    ({"threads": 0}, "threads is 0; it must be at least 1"),
    ({"dtype": "int8"}, "dtype is 'int8'; allowed: 'auto', "),
    ({"modle": "m"}, "modle is not known; allowed: model, device, "),
    ({"model": 3}, "model is 3; it must be text"),
    ({"threads": float("inf")}, "threads is inf; it must be an integer"),
    ({"arms": [{"kind": "plain", "name": "\ud800"}]}, "arms[0].name is '\\ud800'; it holds half of a surrogate pair"),
    ({"arms": [{"kind": "plain", 3: 4}]}, "arms[0][3] is 3; keys must be text"),
    ({"arms": ["plain", {"kind": "majority", "of": "plain", "n": "equal(plain)"}]}, "its own arm, which is one answer"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_bad_value_is_named_with_what_is_allowed(change, message):
    with pytest.raises(schema.ArgumentError) as refused:
        schema.experiment({**GOOD, **change})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arm", "power:alpha=0.5"], "arm power: alpha is 0.5; it must lie in"),
        (["--arm", "power:blocks=5"], "arm power: blocks is 5; it must divide the task's max_new_tokens, 12"),
        (["--arm", "power:compat=karan-du,early_rejection=true"], "early_rejection is True with compat='karan-du'"),
        (["--arm", "power:alpha"], "--arm power:alpha holds 'alpha'"),
        (["--arm", "plain", "--only", "mh"], "--only mh is no arm; allowed: plain"),
        (["--arm", "plain", "--pilot", "0"], "--pilot is 0; it must be at least 1"),
        (["--arm", "plain:model=/nowhere"], "--model /nowhere cannot be loaded"),
        (["--task", "humaneval:data=/nowhere.jsonl"], "data /nowhere.jsonl cannot be read"),
        (["--task", "humaneval:data={model}/config.json"], "model/config.json cannot be read: Expecting"),
    ],
)
def test_flags_are_refused_before_a_model_is_loaded(folder, tmp_path, flags, message, capsys):
    flags = [flag.format(model=folder / "model") for flag in flags]
    flags = [*flags, *([] if "--arm" in flags else ["--arm", "plain:stop=none"])]
    if "--task" not in flags:
        flags += ["--task", f"humaneval:data={folder / 'problems.jsonl'},max_new_tokens=12,stop=[]"]
    flags += ["--model", str(folder / "model"), "--out", str(tmp_path / "run")]
    assert main(["eval", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("arms: [plain]\narms: [greedy]", "arms"),
        ("arms:\n  - {kind: power, alpha: 4, block_size: 40, alpha: 2}", "alpha"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path, text, key, capsys):
    """YAML's loaders keep the last one and say nothing."""
    (tmp_path / "twice.yaml").write_text(f"model: m\n{text}\n")
    assert main(["eval", str(tmp_path / "twice.yaml"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"{key} is there twice" in said
    assert "twice.yaml" in said


def test_a_tokenizer_that_the_law_s_stop_strings_cannot_be_had_with_is_refused_before_weights(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(folder, out, "--arm", "plain")) == 2
    said = capsys.readouterr().err
    assert "stop is given with a tokenizer whose decoder is" in said
    assert "[1/" not in said
    assert not out.exists()


STOP = ["Za", *map(chr, range(ord("I"), ord("Y")))]


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A model whose tokens have bytes, as stop strings in the law need them."""
    path = tmp_path_factory.mktemp("letters")
    llama().save_pretrained(path / "model")
    letters_tokenizer().save_pretrained(path / "model")
    lines = [{"prompt": prompt, "answer": "x"} for prompt in ("a", "bc", "d", "ef", "gh", "i")]
    (path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_stop_strings_in_the_law_and_a_cut_afterwards_are_the_same_without_steps_and_not_with_them(letters, tmp_path):
    power = {"kind": "power", "alpha": 2, "block_size": 12, "mcmc_steps": 8}
    experiment = {
        "model": str(letters / "model"), "device": "cpu", "seeds": [1],
        "tasks": [{"kind": "file", "name": "q", "data": str(letters / "questions.jsonl"), "grader": "exact",
                   "stop": STOP, "max_new_tokens": 24}],
        "arms": [{**arm, "name": f"{arm['kind']}-{stop}", "stop": stop}
                 for arm in ({"kind": "plain"}, power) for stop in ("law", "text")],
    }  # fmt: skip
    (tmp_path / "experiment.yaml").write_text(json.dumps(experiment))  # which is YAML, too
    assert (
        main(["eval", str(tmp_path / "experiment.yaml"), "--out", str(tmp_path / "run"), "--quiet", "--no-plots"]) == 0
    )

    def drawn(arm):
        path = tmp_path / "run" / "records" / "q" / arm / "seed-1.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    law, text = drawn("plain-law"), drawn("plain-text")
    assert [r["answer"] for r in law] == [r["answer"] for r in text]
    assert sum(r["finish"] == "stop" for r in law) >= 3
    assert sum(len(r["tokens"]) for r in law) < sum(len(r["tokens"]) for r in text)
    assert [r["answer"] for r in drawn("power-law")] != [r["answer"] for r in drawn("power-text")]
    for r in [*law, *text, *drawn("power-law"), *drawn("power-text")]:
        assert not any(string in r["answer"] for string in STOP)


def test_an_arm_may_have_a_model_of_its_own(folder, letters, tmp_path, capsys):
    """As a checkpoint after reinforcement learning beside its base."""
    out = tmp_path / "run"
    command = [
        "eval",
        "--model",
        str(folder / "model"),
        "--device",
        "cpu",
        "--out",
        str(out),
        "--arm",
        "plain:stop=none",
    ]
    command += ["--task", f"humaneval:data={folder / 'problems.jsonl'},max_new_tokens=6"]
    assert main([*command, "--arm", f"other=plain:stop=none,model={letters / 'model'}"]) == 2
    assert "two models are called model" in capsys.readouterr().err
    shutil.copytree(letters / "model", tmp_path / "rl")
    assert main([*command, "--arm", f"other=plain:stop=none,model={tmp_path / 'rl'}"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert {arm: told["model"] for arm, told in config["arms"].items()} == {"plain": "model", "other": "rl"}
    assert config["models"]["model"]["sha256"] != config["models"]["rl"]["sha256"]
    plain, other = read(out, "plain", 0), read(out, "other", 0)
    assert all(word.startswith("w") for r in plain for word in r["text"].split())
    assert not any(r["text"].startswith(" w") for r in other)


def test_the_experiments_of_the_repository_and_its_pages_are_sound():
    import yaml

    root = Path(__file__).parent.parent
    blocks = re.findall(r"^```yaml\n(.*?)^```", (root / "docs" / "experiments.md").read_text(), re.M | re.S)
    files = sorted((root / "bench" / "experiments").glob("*.yaml"))
    assert len(blocks) == 2
    assert files
    for text in [*blocks, *(file.read_text() for file in files)]:
        told = yaml.safe_load(text)
        found = schema.experiment({**told, "tasks": told["tasks"] or ["humaneval"]})  # the flags' turn
        for arm in found.arms:
            found.drawing_arm(arm).config(3200, ())
