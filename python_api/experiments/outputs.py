"""Answers in the format of alpaca_eval, whose judge is elsewhere: a list of instruction, output and generator."""

from __future__ import annotations

import json

from power_kernels.api.experiments.jobs import Job
from power_kernels.api.experiments.records import RunFolder, model_label, write_whole
from power_kernels.api.experiments.schema import Experiment
from power_kernels.api.experiments.table import counted_records, taken


def write(folder: RunFolder, experiment: Experiment, jobs: list[Job]) -> list[str]:
    """One file for each job whose task nobody grades here. Returns their paths."""
    written = []
    for job in jobs:
        if job.task.graders or not (records := counted_records(folder, job)):
            continue
        generator = f"{model_label(experiment.model_of(job.arm))}-{job.arm.label}"
        outputs = [
            {**job.task.questions[record["prompt_id"]].document, "output": record["answer"], "generator": generator}
            for record in taken(job.arm, records, None)
        ]
        path = folder.path / "outputs" / job.task.name / job.arm.label / f"seed-{job.seed}.json"
        write_whole(path, json.dumps(outputs, indent=1, ensure_ascii=False) + "\n")
        written.append(str(path))
    return written
