"""bench/results/humaneval, the folder of `make experiment`: it holds together, its table follows from its records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from power_kernels.api.experiments import schema, table
from power_kernels.api.experiments.jobs import Options, jobs_of
from power_kernels.api.experiments.records import RunFolder, arm_told
from power_kernels.api.experiments.tasks import load_task

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "bench" / "results" / "humaneval"


@pytest.fixture(scope="module")
def run():
    """(experiment, its jobs): the file of the repository, as `make experiment` asks for it."""
    entries = schema.read_yaml(str(ROOT / "bench" / "experiments" / "humaneval.yaml"))
    experiment = schema.experiment({**entries, "model": "qwen2.5-coder-0.5b-instruct"})
    tasks = [load_task(spec) for spec in experiment.tasks]
    return experiment, jobs_of(experiment, tasks, Options(str(FOLDER)))


def test_the_folder_is_that_of_the_experiment_so_that_it_can_be_gone_on_from(run):
    experiment, jobs = run
    told = RunFolder(FOLDER).config()
    for arm in experiment.arms:
        if arm.label in told["arms"]:
            assert told["arms"][arm.label] == json.loads(json.dumps(arm_told(experiment, arm))), arm.label
    assert told["tasks"]["humaneval"] == json.loads(json.dumps(jobs[0].task.recorded()))
    assert list(told["models"]) == ["qwen2.5-coder-0.5b-instruct"]


def test_every_record_is_of_a_question_of_its_own_and_has_been_graded(run):
    folder, whole = RunFolder(FOLDER), []
    for job in run[1]:
        found = table.graded_records(folder, job)
        assert len({(r["prompt_id"], r["chain_id"]) for r in found}) == len(found)
        assert all(r["seed"] == job.seed and r["arm"] == job.arm.label and r["grades"] for r in found)
        whole += [job.arm.label] if len(found) == 164 else []
    assert {"plain", "low-temperature", "greedy", "power"} <= set(whole)


def test_the_table_follows_from_the_records(run):
    found = table.contents(RunFolder(FOLDER), run[1])
    assert json.loads(json.dumps(found)) == json.loads((FOLDER / "table.json").read_text())
    assert table.markdown(found) == (FOLDER / "table.md").read_text()
