"""Plots of a run: each of them drawn from a folder, what it is drawn of, and what is said where there is nothing."""

import json

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("lm_eval")
from power_kernels.api.commands.cli import main
from power_kernels.api.experiments import paper, plots, schema
from power_kernels.api.experiments.jobs import Job, Options, jobs_of
from power_kernels.api.experiments.records import RunFolder
from power_kernels.api.experiments.tasks.task import Question, Task
from power_kernels.api.figures import NothingToDrawError

HORIZON, BLOCK, QUESTIONS = 160, 40, 30
ARMS = [
    {"kind": "plain"},
    {"kind": "low-temperature", "alpha": 4},
    {"kind": "low-temperature", "name": "low-temperature-2", "alpha": 2},
    {"kind": "greedy"},
    {"kind": "power", "alpha": 4, "block_size": BLOCK, "mcmc_steps": 10},
    {"kind": "power", "name": "power-2", "alpha": 2, "block_size": BLOCK, "mcmc_steps": 10},
    {"kind": "power", "name": "power-4-steps", "alpha": 4, "block_size": BLOCK, "mcmc_steps": 4},
    {"kind": "best-of-n", "of": "plain", "n": 6},
    {"kind": "majority", "of": "plain", "n": 6},
]
CHANCE = {"plain": 0.4, "low-temperature": 0.5, "greedy": 0.48, "power": 0.6}


def drawn_record(generator, arm, question: int, chain: int, seed: int) -> tuple[dict, bool]:
    """As a run writes it, and whether its answer is right."""
    steps = getattr(arm, "mcmc_steps", 0)
    alpha = getattr(arm, "alpha", 1.0)
    n = int(generator.integers(20, HORIZON + 1))
    stages = -(-n // BLOCK) if steps else 0
    outcome = "".join(generator.choice(list("RUA"), p=(0.6, 0.2, 0.2), size=stages * steps))
    horizon = [BLOCK * (stage + 1) for stage in range(stages) for _ in range(steps)]
    left = [-1 if o == "U" else int(generator.integers(0, min(h, n))) for o, h in zip(outcome, horizon, strict=True)]
    logp = -n * generator.gamma(4, 0.1 / alpha)
    proposal = 60 * stages * steps // 4
    cost = {
        "prefill": 130 if chain == 0 else 0, "extension": n, "proposal": proposal, "accepted": proposal // 5,
        "voided": proposal // 8, "recalled": proposal // 10, "saved_prefix": proposal // 6,
        "saved_early": None, "answer": n,
    }  # fmt: skip
    cost["forwarded"] = cost["prefill"] + n + proposal - cost["recalled"]
    right = bool(generator.random() < CHANCE.get(arm.kind, 0.4))
    record = {
        "prompt_id": question, "chain_id": chain, "question": f"Q/{question}", "seed": seed, "tokens": [0] * n,
        "logp": logp, "answer": str(right), "answer_tokens": n, "answer_logp": logp,
        "finish": "length" if n == HORIZON else str(generator.choice(["eos", "stop"])),
        "steps": len(outcome), "accepted": outcome.count("A"), "unchanged": outcome.count("U"),
        "trace": {"logp": [logp] * len(outcome), "weight": [logp] * len(outcome), "outcome": outcome, "left": left,
                  "horizon": horizon},
        "cost": {**cost, "seconds": 1.0},
    }  # fmt: skip
    return record, right


def made(path, arms=ARMS, seeds=(0, 1), graded: bool = True) -> tuple[RunFolder, list[Job]]:
    """The folder of a run that nobody ran."""
    data = {"model": "a/model", "tasks": ["humaneval"], "arms": list(arms), "seeds": list(seeds)}
    experiment = schema.experiment(data)
    questions = [Question(f"Q/{i}", {"prompt": "x"}, {}) for i in range(QUESTIONS)]
    task = Task("humaneval", questions, (), HORIZON, ("exact",), facts={"kind": "humaneval"})
    folder, jobs = RunFolder(path), jobs_of(experiment, [task], Options(str(path)))
    generator = np.random.default_rng(0)
    for job in jobs:
        answers = job.arm.n if schema.selects(job.arm) else job.arm.draws
        lines = [
            drawn_record(generator, job.arm, question, chain, job.seed)
            for question in range(QUESTIONS)
            for chain in range(answers)
        ]
        records = folder.records(task.name, job.arm.label, job.seed)
        grades = path / "grades" / task.name / job.arm.label / records.name
        for file, text in (
            (records, [record for record, _ in lines]),
            (grades, [grade_line(record, right) for record, right in lines]),
        ):
            if graded or file is records:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("".join(json.dumps(line) + "\n" for line in text))
    told = {"models": {"a/model": {}}, "tasks": {task.name: task.recorded()}, "seeds": list(seeds)}
    told["arms"] = {arm.label: {} for arm in experiment.arms}
    (path / "config.json").write_text(json.dumps(told))
    return folder, jobs


def grade_line(record: dict, right: bool) -> dict:
    grade = {"correct": right, "parsed": str(right), "reason": "passed" if right else "wrong", "digest": ""}
    return {"prompt_id": record["prompt_id"], "chain_id": record["chain_id"], "grades": {"exact": grade}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("run"))


def test_every_plot_of_a_run_is_drawn(run):
    folder, jobs = run
    drawn, skipped = plots.write(folder, jobs)
    names = ["accuracy", "likelihood", "lengths", "pass_at_k", "cost", "alpha", "steps", "account", "acceptance"]
    assert [path.relative_to(folder.path).as_posix() for path in drawn] == [f"plots/humaneval/{n}.png" for n in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in drawn)
    assert not skipped


def arms_of(run) -> dict[str, plots.ArmOfRun]:
    return {arm.label: arm for arm in plots.gather(*run)["humaneval"]}


def test_the_causes_of_tokens_add_up_to_what_was_forwarded(run):
    for arm in arms_of(run).values():
        found = plots.account_of(arm.everything, len(arm.counted))
        assert sum(found[cause] for cause in plots.CAUSES) == pytest.approx(arm.row["forwarded"])
        assert "saved_early" not in found  # not known
    cost = {
        "prefill": 10, "extension": 8, "proposal": 20, "accepted": 9, "voided": 4, "recalled": 9, "saved_prefix": 6,
        "saved_early": 3,
    }  # fmt: skip
    found = plots.account_of([{"cost": cost}], 1)
    assert found == {
        "prefill": 10, "extension": 8, "accepted": 9, "rejected": 0, "voided": 2, "recalled": 9, "saved_prefix": 6,
        "saved_early": 3,
    }  # fmt: skip


def test_the_line_of_an_arm_that_selects_ends_where_the_arm_is(run):
    """With all its answers: best of n by log p without ties, in accuracy and in tokens."""
    arms = arms_of(run)
    tokens, accuracy = plots.curve_of(arms["best-of-n"])
    assert len(tokens) == 6
    assert accuracy[-1] == pytest.approx(arms["best-of-n"].accuracy["value"])
    assert tokens[-1] == pytest.approx(arms["best-of-n"].row["forwarded"])
    assert plots.curve_of(arms["majority"])[1][0] == pytest.approx(
        np.mean([r["grades"]["exact"]["correct"] for r in arms["majority"].everything])
    )


def lines_of(figure, label: str) -> tuple[list[float], list[float]]:
    """x and y of what has a label in the legend."""
    (ax,) = figure.axes
    handle = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))[label]
    line = handle[0] if isinstance(handle, tuple) else handle
    return list(line.get_xdata()), list(line.get_ydata())


def test_sweeps_are_over_arms_that_differ_in_one_thing(run):
    arms = arms_of(run)
    value = {name: arm.accuracy["value"] for name, arm in arms.items()}
    figure = plots.sweep_alpha(list(arms.values()), "")
    assert lines_of(figure, "power: block_size 40") == ([2, 4], [value["power-2"], value["power"]])
    assert lines_of(figure, "low temperature") == ([2, 4], [value["low-temperature-2"], value["low-temperature"]])
    figure = plots.sweep_steps(list(arms.values()), "")
    steps = [value["low-temperature"], value["power-4-steps"], value["power"]]
    assert lines_of(figure, "power: block_size 40") == ([0, 4, 10], steps)
    few = [arms[name] for name in ("plain", "low-temperature", "power")]
    for plot, field in ((plots.sweep_alpha, "alpha"), (plots.sweep_steps, "mcmc_steps")):
        with pytest.raises(NothingToDrawError, match=f"no two graded arms differ in {field} alone"):
            plot(few, "")


def test_pass_at_k_is_of_all_answers_that_were_drawn_alike(run):
    arms = arms_of(run)
    figure = plots.pass_at_k(list(arms.values()), "")
    k, chance = lines_of(figure, "plain")
    drawn = [r["grades"]["exact"]["correct"] for r in arms["best-of-n"].everything]
    assert k == list(range(1, 13))  # two seeds of six
    assert chance[0] == pytest.approx(np.mean(drawn))
    assert lines_of(figure, "power")[0] == [1, 2]


def test_an_arm_that_has_not_come_to_all_questions_says_so_and_is_in_no_sweep(tmp_path):
    folder, jobs = made(tmp_path, ARMS[:3], seeds=(0,))
    for kind in ("records", "grades"):
        path = tmp_path / kind / "humaneval" / "low-temperature" / "seed-0.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:7]))
    (arms,) = plots.gather(folder, jobs).values()
    assert [arm.label for arm in arms] == ["plain", "low-temperature (7 of 30 questions)", "low-temperature-2"]
    with pytest.raises(NothingToDrawError, match="no two graded arms"):
        plots.sweep_alpha(arms, "")


def test_what_a_run_has_no_data_for_is_not_drawn_and_said(tmp_path):
    folder, jobs = made(tmp_path, [{"kind": "plain"}], seeds=(0,), graded=False)
    stale = tmp_path / "plots" / "humaneval" / "cost.png"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier run")
    drawn, skipped = plots.write(folder, jobs)
    assert [path.stem for path in drawn] == ["likelihood", "lengths", "account"]
    assert not stale.exists()
    said = plots.told(drawn, skipped).splitlines()
    assert said[0].startswith("3 plots are in ")
    graded = "humaneval/accuracy.png, humaneval/pass_at_k.png, humaneval/cost.png, humaneval/alpha.png"
    assert said[1] == f"not drawn: {graded}, humaneval/steps.png (no arm is graded)"
    assert said[2] == "not drawn: humaneval/acceptance.png (no arm makes Metropolis-Hastings steps)"
    assert plots.told([], {}) == ""


def test_the_paper_s_figures_stand_beside_its_benchmarks_alone(run):
    assert paper.TABLE_1["math500"]["Qwen2.5-Math-7B"] == (0.496, 0.690, 0.748, 0.785)
    assert {len(row) for rows in paper.TABLE_1.values() for row in rows.values()} == {len(paper.ARMS)}
    assert paper.benchmark_of({"kind": "official", "benchmark": "gpqa"}) == "gpqa"
    assert paper.benchmark_of({"kind": "lm-eval", "task": "minerva_math500"}) == "math500"
    assert paper.benchmark_of({"kind": "lm-eval", "task": "gpqa_diamond_cot_zeroshot"}) == "gpqa"
    assert paper.benchmark_of({"kind": "humaneval", "chat": True}) == "humaneval"
    assert paper.benchmark_of({"kind": "file"}) is None
    arms = list(arms_of(run).values())
    assert len(plots.accuracy(arms, "humaneval", "").axes) == 2
    assert len(plots.accuracy(arms, None, "").axes) == 1
    assert len(plots.accuracy(arms, "alpaca-eval", "").axes) == 1  # a win rate, which is no share of right answers


def test_the_seeds_of_an_arm_are_the_chains_that_a_diagnosis_compares(run, capsys):
    folder, _ = run
    pytest.importorskip("arviz_stats")
    assert main(["diagnose", str(folder.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(found) == ["power on humaneval", "power-2 on humaneval", "power-4-steps on humaneval"]
    assert {d["chains"] + d["elsewhere"] for d in found["power on humaneval"]["prompts"].values()} == {2}
    assert len(found["power on humaneval"]["prompts"]) == QUESTIONS
