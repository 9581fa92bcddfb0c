"""Runs an experiment: every arm on every task with every seed, a file each, one after the other.

What is drawn first is what is needed first: a seed of all arms before the next seed, and the arms whose number of
answers follows from another arm's cost last.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import replace

from power_kernels.api.commands.drawing import Drawing, answer_digests, ends_of_answers, prompt_rows
from power_kernels.api.commands.generate import INCOMPLETE, INTERRUPTED
from power_kernels.api.commands.load import load_sampler, load_tokenizer, revision
from power_kernels.api.driver.distributed import RankLostError, Ranks, join
from power_kernels.api.driver.horizons import context_message
from power_kernels.api.driver.stop import token_bytes
from power_kernels.api.experiments import grade, outputs, table
from power_kernels.api.experiments.account import Account
from power_kernels.api.experiments.jobs import Job, Options, jobs_of
from power_kernels.api.experiments.records import Recorder, RunFolder, model_identity
from power_kernels.api.experiments.schema import Experiment, counts
from power_kernels.api.experiments.tasks import load_task
from power_kernels.api.experiments.tasks.task import Task
from power_kernels.errors import ArgumentError


def run(experiment: Experiment, options: Options) -> int:
    """Returns the exit status: 0, 1 when answers stopped at bad logits or are missing, 130 when interrupted.

    Raises ArgumentError before a model is loaded.
    """
    tasks = [load_task(spec) for spec in experiment.tasks]
    check(experiment, tasks)
    for name in options.only:
        if name not in [arm.label for arm in experiment.arms]:
            raise ArgumentError(f"--only {name} is no arm; allowed: {', '.join(arm.label for arm in experiment.arms)}")
    folder = RunFolder(options.out)
    if options.grade and not folder.config():
        raise ArgumentError(f"--out {options.out} holds no run to --grade: it has no config.json")
    folder.check(experiment, tasks)
    jobs = jobs_of(experiment, tasks, options)
    if options.dry_run:
        print(Account(folder, experiment, jobs, options).table())
        return 0
    if options.grade:
        report(experiment, tasks, folder, options)
        return 0
    try:
        with join() as ranks:
            status = _Run(experiment, jobs, options, folder, ranks).run(tasks)
            if ranks.rank == 0 and status != INTERRUPTED:
                report(experiment, tasks, folder, options)
            return status
    except RankLostError as error:
        print(
            f"power-kernels: {error}\nWhat is finished is in {options.out}; run the same command again",
            file=sys.stderr,
        )
        return INCOMPLETE


def report(experiment: Experiment, tasks: list[Task], folder: RunFolder, options: Options) -> None:
    """Grade what is there, of all arms and seeds, write the table and draw the plots. Raises ArgumentError where
    grading was asked for and is not allowed."""
    jobs = jobs_of(experiment, tasks, replace(options, only=(), pilot=None))
    left = [job for job in jobs if grade.runs_code(job) and not options.allow_code_execution and not options.grade]
    if left:
        print(
            "not graded, since that would run what the model wrote: the same command with --grade and "
            "--allow-code-execution does it, in processes with limits",
            file=sys.stderr,
        )
    grade.grade_run(
        folder,
        [job for job in jobs if job not in left],
        allow_code_execution=options.allow_code_execution,
        workers=options.graders,
    )
    for path in outputs.write(folder, experiment, jobs):
        print(f"for alpaca_eval: {path}", file=sys.stderr)
    print(table.write(folder, jobs), end="")
    if options.plots:
        from power_kernels.api.experiments import plots

        print(plots.told(*plots.write(folder, jobs)), file=sys.stderr)


def check(experiment: Experiment, tasks: list[Task]) -> None:
    """What an arm asks for, on every task. Raises ArgumentError."""
    for arm in experiment.arms:
        drawing = experiment.drawing_arm(arm)
        for task in tasks:
            drawing.config(task.max_new_tokens, task.stop)
        if drawing.stop == "text" and not any(task.stop for task in tasks):
            raise ArgumentError(
                f"arm {arm.label}: stop is 'text', and no task has stop strings; allowed: 'law', 'none'"
            )


class _Run:
    """One process's part of the run."""

    def __init__(self, experiment: Experiment, jobs: list[Job], options: Options, folder: RunFolder, ranks: Ranks):
        self.experiment, self.jobs, self.options, self.folder, self.ranks = experiment, jobs, options, folder, ranks
        self.account = Account(folder, experiment, jobs, options, ranks.world)
        self.loaded: _Loaded | None = None
        self.identities: dict[str, dict] = {}

    def run(self, tasks: list[Task]) -> int:
        for name in dict.fromkeys(self.experiment.model_of(job.arm) for job in self.jobs):
            self._check_tokenizer(name)  # what can be refused early is: weights may take minutes
            identity = model_identity(name, revision(name)) if self.ranks.rank == 0 else None
            self.identities[name] = self.ranks.broadcast(identity)
        if self.ranks.rank == 0:
            self.folder.add(self.experiment, tasks, self.identities)
        status = 0
        for number, job in enumerate(self.jobs):
            drawing = self._drawing(job)
            self._say(f"[{number + 1}/{len(self.jobs)}] {job.name}; {self.account.left(number)}")
            of_job = drawing.run()
            status = max(status, of_job)
            if of_job == INTERRUPTED or drawing.failed:
                break
        return status

    def _check_tokenizer(self, name: str) -> None:
        """Raises ArgumentError for one that the stop strings of an arm cannot be had with."""
        tokenizer, _ = load_tokenizer(name)
        of_model = (job for job in self.jobs if self.experiment.model_of(job.arm) == name)
        if any(job.task.stop and self.experiment.drawing_arm(job.arm).stop == "law" for job in of_model):
            token_bytes(tokenizer, len(tokenizer))

    def _drawing(self, job: Job) -> Drawing:
        task, arm, name = job.task, self.experiment.drawing_arm(job.arm), self.experiment.model_of(job.arm)
        config = arm.config(task.max_new_tokens, task.stop)
        n = self._answers(job)
        if self.loaded is None or self.loaded.name != name:
            self.loaded = None  # one model at a time
            gc.collect()
            self.loaded = _Loaded(name, self.experiment, self.ranks, self._say)
        sampler = self.loaded.sampler
        rows, eos = self.loaded.read(task)
        digests = answer_digests(
            rows, n, config, model=self.identities[name], dtype=str(sampler.engine.dtype), seed=job.seed, eos=eos
        )
        return Drawing(
            sampler,
            self.ranks,
            rows,
            config,
            num_chains=n,
            seed=job.seed,
            eos=eos,
            digests=digests,
            line=Recorder(job, task.stop if arm.stop == "text" else (), rows, sampler.tokenizer),
            out=str(self.folder.records(task.name, job.arm.label, job.seed)),
            max_chains=self.experiment.max_chains,
            only=job.asked(self.options),
            progress=not self.options.quiet,
        )

    def _answers(self, job: Job) -> int:
        """To each question. What another arm's cost comes to is settled once for the whole run."""
        task, arm = job.task.name, job.arm
        if not counts(arm):
            return self.folder.answers(arm, task)
        n = None
        if self.ranks.rank == 0:
            n = self.folder.answers(arm, task)
            if n is None:
                n = self.account.equal(arm, task)
                self.folder.resolve(task, arm.label, n)
        return self.ranks.broadcast(n)

    def _say(self, message: str) -> None:
        """What all processes know is said by one."""
        if self.ranks.rank == 0:
            print(message, file=sys.stderr, flush=True)


class _Loaded:
    """A model, and the tasks as its tokenizer reads them."""

    def __init__(self, name: str, experiment: Experiment, ranks: Ranks, say: Callable[[str], None]):
        self.name, self.say = name, say
        tokenizer, self.context = load_tokenizer(name)
        told = experiment.model_dump(include={"device", "dtype", "threads", "engine", "engine_arg"})
        self.sampler = load_sampler(argparse.Namespace(model=name, **told), ranks, tokenizer)
        self.tasks: dict[str, tuple[list[list[int]], list[int] | None]] = {}

    def read(self, task: Task) -> tuple[list[list[int]], list[int] | None]:
        """The token ids of each question, and the tokens that end an answer."""
        if task.name not in self.tasks:
            prompts = [question.prompt for question in task.questions]
            rows = prompt_rows(prompts, self.sampler.tokenizer, False, self.say)
            if message := context_message(dict(enumerate(map(len, rows))), task.max_new_tokens, self.context):
                self.say(message)
            self.tasks[task.name] = rows, ends_of_answers(self.sampler, prompts, False, self.say)
        return self.tasks[task.name]
