"""`power-kernels eval`: arms x tasks x seeds on a model, into the folder of a run.

power-kernels eval experiment.yaml --out RUN
power-kernels eval --demo
power-kernels eval --model MODEL --task humaneval --arm plain --arm power:alpha=4,block_size=40 --seeds 0 1 2 --out RUN

Here are the options; `experiments/` does the work.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from power_kernels.api.commands import generate
from power_kernels.errors import ArgumentError

DEMO_OUT = "build/eval-demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="EXPERIMENT.yaml", help="model, tasks, arms, seeds; flags go before")
    generate.add_model_arguments(parser, required=False)
    generate.add_engine_arguments(parser)
    parser.add_argument("--max-chains", type=int, help="the most chains that run at once, in each process")
    parser.add_argument(
        "--task", action="append", metavar="[NAME=]KIND[:KEY=VALUE,...]", help="what is asked; may be repeated"
    )
    parser.add_argument(
        "--arm", action="append", metavar="[NAME=]KIND[:KEY=VALUE,...]", help="how it is answered; may be repeated"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--out", metavar="FOLDER", help="the run's; the same command goes on where it stopped")
    parser.add_argument("--only", action="append", default=[], metavar="ARM", help="run this arm; may be repeated")
    parser.add_argument("--pilot", type=int, metavar="N", help="the first N questions with the first seed; they count")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be run, and its cost by a pilot's account"
    )
    parser.add_argument("--grade", action="store_true", help="draw nothing: grade what is there, and write the table")
    parser.add_argument(
        "--allow-code-execution", action="store_true", help="code that the model wrote may be run, with limits"
    )
    parser.add_argument(
        "--official-harness", metavar="FOLDER", help="a checkout of the published code, for tasks of the kind official"
    )
    parser.add_argument(
        "--demo", action="store_true", help=f"a small model and 24 short questions, in minutes (--out {DEMO_OUT})"
    )
    parser.add_argument("--no-plots", dest="plots", action="store_false", help="a table, and no plots")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status: 0, 1 when answers are missing or bad, 130 when interrupted. Raises ArgumentError."""
    if arguments.pilot is not None and arguments.pilot < 1:
        raise ArgumentError(f"--pilot is {arguments.pilot}; it must be at least 1")
    for option in ("pilot", "dry_run", "only"):
        if arguments.grade and getattr(arguments, option):
            raise ArgumentError(
                f"--grade draws nothing and grades everything, and --{option.replace('_', '-')} is given"
            )
    if not arguments.out and not arguments.demo:
        raise ArgumentError("--out is not given; it must name the folder of the run")
    out = arguments.out or DEMO_OUT
    from power_kernels.api.experiments import schema

    experiment = schema.experiment(_demo(arguments, out) if arguments.demo else _data(arguments, schema))
    generate.check_engine_arguments(experiment)
    for arm in experiment.arms:
        generate.check_model_folder(experiment.model_of(arm))

    from power_kernels.api.experiments import jobs, run

    options = jobs.Options(
        out=out,
        quiet=arguments.quiet,
        pilot=arguments.pilot,
        only=tuple(arguments.only),
        dry_run=arguments.dry_run,
        grade=arguments.grade,
        allow_code_execution=arguments.allow_code_execution,
        graders=max(1, os.cpu_count() or 1),
        plots=arguments.plots,
    )
    return run.run(experiment, options)


def _data(arguments: argparse.Namespace, schema) -> dict:
    """The file's entries, or the flags' in their place."""
    data = schema.read_yaml(arguments.file) if arguments.file else {}
    for key in ("model", "device", "threads", "engine", "engine_arg", "max_chains", "seeds"):
        if getattr(arguments, key) is not None:
            data[key] = getattr(arguments, key)
    if arguments.dtype != "auto":
        data["dtype"] = arguments.dtype
    for option, key in (("--task", "tasks"), ("--arm", "arms")):
        if getattr(arguments, option[2:]):
            data[key] = [schema.from_flag(option, text) for text in getattr(arguments, option[2:])]
    if arguments.official_harness is not None:
        official = [task for task in data.get("tasks", []) if isinstance(task, dict) and task.get("kind") == "official"]
        if not official:
            raise ArgumentError(
                f"--official-harness is {arguments.official_harness}, and no task is of the kind official"
            )
        for task in official:
            task.setdefault("harness", arguments.official_harness)
    return data


def _demo(arguments: argparse.Namespace, out: str) -> dict:
    """The demonstration's experiment. Raises ArgumentError where another was given, too, or its model is not to be
    had."""
    for option in (
        "file",
        "model",
        "device",
        "threads",
        "engine",
        "max_chains",
        "task",
        "arm",
        "seeds",
        "official_harness",
    ):
        if getattr(arguments, option) is not None:
            raise ArgumentError(f"--demo is an experiment of its own, and {option} is {getattr(arguments, option)!r}")
    from power_kernels.api.commands import packaged_model
    from power_kernels.api.experiments import demo

    try:
        model = packaged_model.ensure_model()
    except packaged_model.ModelUnavailableError as error:
        raise ArgumentError(f"--demo has no model: {error}") from None
    return demo.experiment(str(model), demo.write_questions(Path(out)))
