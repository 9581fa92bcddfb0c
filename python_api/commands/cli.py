"""The command line: `power-kernels generate`, `eval`, `diagnose`, `serve`, `bench` and `doctor`.

Nothing here imports torch before a command's options have been looked at: help, and the refusal of bad input, are what
people wait for at a prompt.
"""

from __future__ import annotations

import argparse
import json
import sys

from power_kernels import __version__
from power_kernels.api.bench import options as bench_options
from power_kernels.api.commands import diagnose, generate, serve
from power_kernels.api.commands import eval as evaluate
from power_kernels.api.commands.generate import INTERRUPTED
from power_kernels.errors import ArgumentError, BackendError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 when answers are missing or bad, 2 for bad input, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if serve.wanted(argv):
            return serve.run(argv[1:])
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except (ArgumentError, BackendError) as error:
        print(f"power-kernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="power-kernels", description="Exact power sampling from p(x)^alpha.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor",
        help="which backend serves each op here, and what is missing",
        description="Which backend serves each op here, and what is missing. With --model: which attention kernel "
        "decodes it, whether steps are replayed as graphs, what a step of so many rows takes, and the lanes chosen "
        "from that.",
    )
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    generate.add_model_arguments(doctor, required=False)
    doctor.set_defaults(run=_doctor)

    bench = commands.add_parser(
        "bench",
        help="microbenchmarks of the ops on this machine, against torch and other libraries",
        description="Acceptance throughput first, then every other op, each against eager torch, torch.compile and "
        "other libraries' kernels where they are installed.",
    )
    bench_options.add_arguments(bench)
    bench.set_defaults(run=bench_options.run)

    draw = commands.add_parser(
        "generate",
        help="draw answers from a language model",
        description="Draw answers from p(x)^alpha of a transformers causal LM. With --out, the same command run again "
        "goes on where an interrupted one stopped. Started by torchrun or accelerate launch, the processes divide the "
        "answers among them, each with the whole model.",
    )
    generate.add_arguments(draw)
    draw.set_defaults(run=generate.run)

    evaluation = commands.add_parser(
        "eval",
        help="does it help: arms, tasks and seeds on a model, graded and counted",
        description="Draw the answers of several arms (plain, low-temperature, greedy, power, best-of-n, majority) to "
        "the questions of tasks, with several seeds. The same command run again goes on where an interrupted one "
        "stopped; torchrun spreads it.",
    )
    evaluate.add_arguments(evaluation)
    evaluation.set_defaults(run=evaluate.run)

    diagnosis = commands.add_parser(
        "diagnose",
        help="have chains mixed: R-hat, ESS, acceptance, and what to change",
        description="Have the chains of each prompt mixed? R-hat, ESS and the standard error of log p at the last "
        "horizon, acceptance by horizon, step and position, a verdict and what to change.",
    )
    diagnose.add_arguments(diagnosis)
    diagnosis.set_defaults(run=diagnose.run)

    server = commands.add_parser(
        "serve",
        help="vLLM's OpenAI server, with power sampling",
        description=serve.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_arguments(server)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    generate.check_model_arguments(arguments)
    generate.check_model_folder(arguments.model)
    from power_kernels.api.commands import doctor

    data = doctor.report()
    if arguments.model:
        from power_kernels.api.commands.load import load_sampler

        data["decoding"] = doctor.decoding(load_sampler(arguments), arguments.model)
    print(json.dumps(data, indent=2) if arguments.json else doctor.text(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
