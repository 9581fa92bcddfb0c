"""The files that a run makes, in the order in which it makes them."""

from __future__ import annotations

from dataclasses import dataclass

from power_kernels.api.experiments.schema import Arm, Experiment, counts
from power_kernels.api.experiments.tasks.task import Task


@dataclass(frozen=True)
class Options:
    """What is not part of the experiment. pilot: only so many questions of each task, with the first seed. only: the
    arms to run now. grade: draw nothing. allow_code_execution: answers may be run to be graded. graders: at once.
    plots: draw them."""

    out: str
    quiet: bool = False
    pilot: int | None = None
    only: tuple[str, ...] = ()
    dry_run: bool = False
    grade: bool = False
    allow_code_execution: bool = False
    graders: int = 2
    plots: bool = True


@dataclass(frozen=True)
class Job:
    """One file of records."""

    task: Task
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.label} on {self.task.name}, seed {self.seed}"

    def asked(self, options: Options) -> range:
        """The prompt ids of the questions that are asked now."""
        return self.task.asked[: options.pilot]


def jobs_of(experiment: Experiment, tasks: list[Task], options: Options) -> list[Job]:
    models = [experiment.model]
    for arm in experiment.arms:
        if experiment.model_of(arm) not in models:
            models.append(experiment.model_of(arm))
    arms = [arm for arm in experiment.arms if not options.only or arm.label in options.only]
    jobs = []
    for number, seed in enumerate(experiment.seeds[: 1 if options.pilot else None]):
        of_seed = [arm for arm in arms if arm.seeds is None or number < arm.seeds]
        jobs += [Job(task, arm, seed) for task in tasks for arm in of_seed]
    if options.pilot:  # which is what they are counted by
        jobs = [job for job in jobs if not counts(job.arm)]
    waits = [counts(job.arm) for job in jobs]
    order = sorted(range(len(jobs)), key=lambda i: (waits[i], models.index(experiment.model_of(jobs[i].arm)), i))
    return [jobs[i] for i in order]
