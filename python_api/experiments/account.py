"""What a run has cost, from its records, and what is left to pay."""

from __future__ import annotations

import time
from dataclasses import dataclass

from power_kernels.api.experiments.jobs import Job, Options
from power_kernels.api.experiments.records import RunFolder
from power_kernels.api.experiments.schema import Arm, Experiment
from power_kernels.errors import ArgumentError


@dataclass
class Spent:
    """Of the records of an arm on a task: their number, tokens forwarded, those of prompts, and seconds, in sum."""

    answers: int = 0
    forwarded: int = 0
    prefill: int = 0
    seconds: float = 0.0


class Account:
    """world: processes that share the work."""

    def __init__(self, folder: RunFolder, experiment: Experiment, jobs: list[Job], options: Options, world: int = 1):
        self.folder, self.experiment, self.jobs, self.options, self.world = folder, experiment, jobs, options, world

    def spent(self, arm: str, task: str) -> Spent:
        """Over all seeds of the experiment."""
        total = Spent()
        for seed in self.experiment.seeds:
            for record in self.folder.read(task, arm, seed):
                total.answers += 1
                total.forwarded += record["cost"]["forwarded"]
                total.prefill += record["cost"]["prefill"]
                total.seconds += record["cost"]["seconds"]
        return total

    def equal(self, arm: Arm, task: str) -> int:
        """How many answers of the arm `arm.of` cost what one of `arm.equal_to` does, in forwarded tokens, where the
        answers to a question share its prompt. At least 1. Raises ArgumentError where nobody knows yet."""
        means = {}
        for name in (arm.of, arm.equal_to):
            spent = self.spent(name, task)
            if not spent.answers:
                raise ArgumentError(
                    f"n of the arm {arm.label} is {arm.n}, and there are no records of {name} on {task} to count by; "
                    f"run that arm first, or a pilot (--pilot)"
                )
            means[name] = (spent.forwarded - spent.prefill) / spent.answers
        return max(1, round(means[arm.equal_to] / max(means[arm.of], 1e-9)))

    def wanted(self, job: Job) -> int | None:
        """Answers of a job; None where their number follows from records that are not there."""
        n = self.folder.answers(job.arm, job.task.name)
        if n is None:
            try:
                n = self.equal(job.arm, job.task.name)
            except ArgumentError:
                return None
        return n * len(job.asked(self.options))

    def there(self, job: Job) -> int:
        asked = job.asked(self.options)
        return sum(r["prompt_id"] in asked for r in self.folder.read(job.task.name, job.arm.label, job.seed))

    def rate(self, job: Job) -> Spent | None:
        """What answers like those of the job have cost: the arm's own, or those of the arm that it draws as."""
        for arm in (job.arm.label, self.experiment.drawing_arm(job.arm).label):
            spent = self.spent(arm, job.task.name)
            if spent.answers:
                return spent
        return None

    def left(self, first: int) -> str:
        """What is left of the jobs from the first-th on, in time."""
        seconds, unknown = 0.0, []
        for job in self.jobs[first:]:
            wanted, rate = self.wanted(job), self.rate(job)
            if wanted is None or rate is None:
                unknown.append(job.arm.label)
            else:
                seconds += max(0, wanted - self.there(job)) * rate.seconds / rate.answers / self.world
        if not seconds and unknown:
            return "how long it will take is known when answers are there"
        end = time.strftime("%a %H:%M", time.localtime(time.time() + seconds))
        more = f", and what is not known yet: {', '.join(dict.fromkeys(unknown))}" if unknown else ""
        return f"about {hours(seconds)} left, to {end}{more}"

    def table(self) -> str:
        """What would be run and what that would cost, a line for each arm and task."""
        lines = [("arm", "task", "seeds", "answers", "there", "tokens an answer", "tokens left", "time left")]
        sums = [0, 0.0]
        unknown = []
        groups: dict[tuple[str, str], list[Job]] = {}
        for job in self.jobs:
            groups.setdefault((job.arm.label, job.task.name), []).append(job)
        for (arm, task), jobs in groups.items():
            wanted, there = [self.wanted(job) for job in jobs], [self.there(job) for job in jobs]
            rate = self.rate(jobs[0])
            total = None if None in wanted else sum(wanted)
            if total is None or rate is None:
                unknown.append(arm)
                cost = ("?", "?", "?")
            else:
                left = sum(max(0, w - t) for w, t in zip(wanted, there, strict=True))
                tokens, seconds = (left * amount / rate.answers for amount in (rate.forwarded, rate.seconds))
                sums = [sums[0] + tokens, sums[1] + seconds / self.world]
                cost = (f"{rate.forwarded / rate.answers:.0f}", f"{tokens:.0f}", hours(seconds / self.world))
            lines.append((arm, task, str(len(jobs)), "?" if total is None else str(total), str(sum(there)), *cost))
        more = " + ?" if unknown else ""
        lines.append(("in all", "", "", "", "", "", f"{sums[0]:.0f}{more}", f"{hours(sums[1])}{more}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        if unknown:
            rows.append("?: nothing like it was drawn yet; --pilot N draws N questions of each, which count")
        return "\n".join(rows)


def hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
