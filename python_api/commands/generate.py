"""`power-kernels generate`: answers to a file of prompts, in one process or in several.

power-kernels generate --model MODEL --prompts prompts.jsonl --out results.jsonl
torchrun --nproc-per-node 8 -m power_kernels.api.commands.cli generate --model MODEL ...

Here are the options, and what can be said of them without torch, whose import takes seconds. `answers.py` does the
work.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path

from power_kernels.api.driver.config import KERNELS, SWEEP_BEGINNINGS, PowerConfig
from power_kernels.api.driver.launcher import from_environment
from power_kernels.errors import ArgumentError
from power_kernels.law import CUTS

ENGINES = ("huggingface", "vllm", "sglang")
INCOMPLETE = 1
INTERRUPTED = 130  # what a shell reports for SIGINT


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--model", required=required, metavar="NAME_OR_PATH", help="anything from_pretrained takes")
    parser.add_argument(
        "--device",
        help="cpu, cuda, cuda:1, ... (default: cuda if there is one; of several, each process takes its own)",
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"])
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """What runs the model."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="what runs the model (default: huggingface); vllm (docs/vllm.md) and sglang (docs/sglang.md) need those",
    )
    parser.add_argument(
        "--engine-arg",
        action="append",
        metavar="KEY=VALUE",
        help="an argument of vllm.LLM or of sglang.Engine, its value in JSON or else a text; may be repeated",
    )


def check_engine_arguments(arguments: argparse.Namespace) -> None:
    """What can be said of `add_engine_arguments` without the engine. Raises ArgumentError."""
    if arguments.engine in (None, "huggingface"):
        if arguments.engine_arg:
            raise ArgumentError(
                f"--engine-arg is {arguments.engine_arg[0]} and --engine is neither vllm nor sglang, which it is for"
            )
        return
    for option, value in (("--device", arguments.device), ("--threads", arguments.threads)):
        if value is not None:
            raise ArgumentError(
                f"{option} is {value} with --engine {arguments.engine}, which has its own ways: "
                "CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS, --engine-arg"
            )
    engine_arguments(arguments.engine_arg or ())


def engine_arguments(texts: Iterable[str]) -> dict:
    """The arguments of a serving stack that are given as KEY=VALUE. Raises ArgumentError."""
    given = {}
    for text in texts:
        key, is_one, value = text.partition("=")
        if not is_one or not key.isidentifier() or key in given:
            raise ArgumentError(f"--engine-arg is {text}; it must be KEY=VALUE, with another KEY each time")
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    return given


def check_model_arguments(arguments: argparse.Namespace) -> None:
    """What can be said of `add_model_arguments` before torch is imported. Raises ArgumentError."""
    if arguments.threads is not None and arguments.threads < 1:
        raise ArgumentError(f"--threads is {arguments.threads}; it must be at least 1")
    if arguments.model is None:  # `doctor` alone
        given = {"--device": arguments.device, "--threads": arguments.threads}
        given["--dtype"] = None if arguments.dtype == "auto" else arguments.dtype
        for option, value in given.items():
            if value is not None:
                raise ArgumentError(f"{option} is {value} without --model, which it is about")


def check_model_folder(name: str | None) -> None:
    """Refuses the path of a folder that is not there. Names of the hub, which are no such paths, pass."""
    if name is not None and name.startswith(("/", "./", "../")) and not os.path.exists(name):
        raise ArgumentError(f"--model {name} cannot be loaded: there is no such folder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, required=True)
    add_engine_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    source.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help='one JSON object a line with "prompt" (text), "messages" (a chat) or "tokens"; '
        "other keys are repeated in the results",
    )
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    parser.add_argument(
        "--out",
        metavar="FILE.jsonl",
        help="write results here as they finish, put into the order of the prompts at the end (default: print them)",
    )
    parser.add_argument("--num-chains", type=int, default=1, help="independent answers per prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-chains", type=int, help="the most chains that run at once, in each process (default: what pays here)"
    )
    parser.add_argument("--alpha", type=float, default=4.0)
    parser.add_argument("--max-new-tokens", type=int, default=3072)
    parser.add_argument("--block-size", type=int, default=192, help="0: one stage of max-new-tokens")
    parser.add_argument("--mcmc-steps", type=int, default=10)
    parser.add_argument("--final-steps", type=int, default=0)
    parser.add_argument("--temperature", type=float, help="of the proposals (default: 1/alpha)")
    parser.add_argument("--lanes", type=int, help="proposals of a chain decoded at once (default: what pays here)")
    parser.add_argument("--cut", choices=CUTS, default="uniform", help="the law of where a proposal leaves the answer")
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="a string that ends an answer, as EOS does; may be repeated"
    )
    parser.add_argument(
        "--length-bonus", type=float, default=0.0, help="lambda of p(x)^alpha e^(lambda n), in nats a token"
    )
    parser.add_argument(
        "--kernel", choices=KERNELS, default="mh", help="proposals one after the other, or particles side by side"
    )
    parser.add_argument("--particles", type=int, default=PowerConfig.particles, help="the most open answers at once")
    parser.add_argument("--sweeps", type=int, default=PowerConfig.sweeps, help="sweeps of particles after their start")
    parser.add_argument("--sweep-cut", choices=SWEEP_BEGINNINGS, default="whole", help="where a sweep begins")
    parser.add_argument(
        "--rho", type=float, default=0.0, help="particles that weigh little beside rho/N of everything die out"
    )
    parser.add_argument("--no-early-rejection", dest="early_rejection", action="store_false")
    parser.add_argument("--no-free-prefix", dest="free_prefix", action="store_false")
    parser.add_argument(
        "--compat", choices=["karan-du"], help="the published code's algorithm, not exact and without early rejection"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="run every answer to max-new-tokens")
    parser.add_argument("--quiet", action="store_true", help="no progress bar (it shows the first process's share)")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status: 0, 1 when an answer stopped at bad logits or is missing, 130 when interrupted.

    Raises ArgumentError for bad input.
    """
    # What needs no model is looked at before torch is imported.
    check_model_arguments(arguments)
    check_engine_arguments(arguments)
    for option, value in (("--num-chains", arguments.num_chains), ("--max-chains", arguments.max_chains)):
        if value is not None and value < 1:
            raise ArgumentError(f"{option} is {value}; it must be at least 1")
    if arguments.out and os.path.isdir(arguments.out):
        raise ArgumentError(f"--out {arguments.out} cannot be written: it is a folder")
    if not -(2**63) <= arguments.seed < 2**64:
        raise ArgumentError(f"--seed is {arguments.seed}; it must have 64 bits")
    config = _config(arguments)
    prompts = _read_prompts(arguments)
    world = from_environment("WORLD_SIZE", 1, least=1)
    if world > 1 and not arguments.out:
        raise ArgumentError(f"--out is not given; {world} processes need a file to bring their answers together")
    check_model_folder(arguments.model)

    from power_kernels.api.commands import answers

    return answers.run(arguments, config, prompts)


def _config(arguments: argparse.Namespace) -> PowerConfig:
    return PowerConfig(
        kernel=arguments.kernel,
        particles=arguments.particles,
        sweeps=arguments.sweeps,
        sweep_cut=arguments.sweep_cut,
        rho=arguments.rho,
        alpha=arguments.alpha,
        max_new_tokens=arguments.max_new_tokens,
        block_size=arguments.block_size or None,
        mcmc_steps=arguments.mcmc_steps,
        final_steps=arguments.final_steps,
        temperature=arguments.temperature,
        early_rejection=arguments.early_rejection and arguments.compat is None,
        free_prefix=arguments.free_prefix,
        lanes=arguments.lanes,
        cut=arguments.cut,
        stop=arguments.stop or (),
        length_bonus=arguments.length_bonus,
        compat=arguments.compat,
    )


def _read_prompts(arguments: argparse.Namespace) -> list[dict]:
    if arguments.prompt:
        for text in arguments.prompt:
            if not text:
                raise ArgumentError("--prompt is empty; a prompt needs at least one token")
            if not _is_unicode(text):
                raise ArgumentError(f"--prompt {text!r} is not UTF-8 text")
        return [{"prompt": text} for text in arguments.prompt]
    try:
        lines = Path(arguments.prompts).read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other line breaks
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--prompts {arguments.prompts} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"--prompts {arguments.prompts} line {number} is not JSON: {error}") from None
        given = _kinds(prompt) if isinstance(prompt, dict) else []
        if len(given) != 1 or not prompt[given[0]]:
            raise ArgumentError(
                f"--prompts {arguments.prompts} line {number} must be an object with one of prompt (text), messages "
                "(list) and tokens (list), not empty"
            )
        if given == ["tokens"] and not all(type(token) is int and token >= 0 for token in prompt["tokens"]):
            raise ArgumentError(f"--prompts {arguments.prompts} line {number} holds tokens that are not token ids")
        if not _is_unicode(json.dumps(prompt, ensure_ascii=False)):
            raise ArgumentError(
                f"--prompts {arguments.prompts} line {number} holds half of a surrogate pair (\\ud800 to \\udfff), "
                "which is no character"
            )
        prompts.append(prompt)
    if not prompts:
        raise ArgumentError(f"--prompts {arguments.prompts} holds no prompts")
    return prompts


def kind_of(prompt: dict) -> str:
    """Which key of a line of the prompts file holds the prompt: "prompt" (text), "messages" or "tokens"."""
    return _kinds(prompt)[0]


def _kinds(prompt: dict) -> list[str]:
    kinds = {"prompt": str, "messages": list, "tokens": list}
    return [key for key, kind in kinds.items() if isinstance(prompt.get(key), kind)]


def _is_unicode(text: str) -> bool:
    """False where a half of a surrogate pair stands alone: JSON and command lines can hold it, UTF-8 and models not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
