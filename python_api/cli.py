"""The command line: `power-kernels generate`, `bench` and `doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from pathlib import Path

from power_kernels import __version__
from power_kernels.api.bench import run as bench_run
from power_kernels.errors import ArgumentError, BackendError

INTERRUPTED = 130  # what a shell reports for SIGINT


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 when an answer stopped at bad logits, 2 for bad input, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ArgumentError, BackendError) as error:
        print(f"power-kernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted before the first answer", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="power-kernels", description="Exact power sampling from p(x)^alpha.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="which backend serves each op here, and what is missing")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    doctor.set_defaults(run=_doctor)

    bench = commands.add_parser(
        "bench",
        help="microbenchmarks of the ops on this machine, against torch and other libraries",
        description="Acceptance throughput first, then every other op, each against eager torch, torch.compile and "
        "other libraries' kernels where they are installed.",
    )
    bench_run.add_arguments(bench)
    bench.set_defaults(run=bench_run.run)

    generate = commands.add_parser(
        "generate",
        help="draw answers from a language model",
        description="Draw answers from p(x)^alpha of a transformers causal LM. With --out, the same command run again "
        "goes on where an interrupted one stopped.",
    )
    generate.set_defaults(run=_generate)
    generate.add_argument("--model", required=True, metavar="NAME_OR_PATH", help="anything from_pretrained takes")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    source.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help='one JSON object a line with "prompt" (text), "messages" (a chat) or "tokens", and optionally "id"',
    )
    generate.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    generate.add_argument("--out", metavar="FILE.jsonl", help="write results here as they finish (default: print them)")
    generate.add_argument("--num-chains", type=int, default=1, help="independent answers per prompt")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--max-chains", type=int, default=16, help="chains that run at once")
    generate.add_argument("--alpha", type=float, default=4.0)
    generate.add_argument("--max-new-tokens", type=int, default=3072)
    generate.add_argument("--block-size", type=int, default=192, help="0: one stage of max-new-tokens")
    generate.add_argument("--mcmc-steps", type=int, default=10)
    generate.add_argument("--final-steps", type=int, default=0)
    generate.add_argument("--temperature", type=float, help="of the proposals (default: 1/alpha)")
    generate.add_argument("--lanes", type=int, default=1)
    generate.add_argument("--no-early-rejection", dest="early_rejection", action="store_false")
    generate.add_argument("--no-free-prefix", dest="free_prefix", action="store_false")
    generate.add_argument(
        "--compat", choices=["karan-du"], help="the published code's algorithm, not exact and without early rejection"
    )
    generate.add_argument("--ignore-eos", action="store_true", help="run every answer to max-new-tokens")
    generate.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    generate.add_argument("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"])
    generate.add_argument("--threads", type=int, help="torch threads on the CPU")
    generate.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from power_kernels.api import doctor

    data = doctor.report()
    print(json.dumps(data, indent=2) if arguments.json else doctor.text(data))
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from power_kernels.api.config import PowerConfig
    from power_kernels.api.engine import UnsupportedModelError
    from power_kernels.api.output_file import OutputFile, digest, record
    from power_kernels.api.sampler import PowerSampler

    # What needs no model is looked at before one is loaded.
    config = PowerConfig(
        alpha=arguments.alpha,
        max_new_tokens=arguments.max_new_tokens,
        block_size=arguments.block_size or None,
        mcmc_steps=arguments.mcmc_steps,
        final_steps=arguments.final_steps,
        temperature=arguments.temperature,
        early_rejection=arguments.early_rejection and arguments.compat is None,
        free_prefix=arguments.free_prefix,
        lanes=arguments.lanes,
        compat=arguments.compat,
    )
    prompts = _read_prompts(arguments)
    model, tokenizer = _load(arguments)
    try:
        sampler = PowerSampler(model, tokenizer)
    except UnsupportedModelError as error:
        raise ArgumentError(f"--model {arguments.model}: {error}") from error
    tokens = [_tokens(i, prompt, tokenizer, arguments.chat) for i, prompt in enumerate(prompts)]
    eos = [] if arguments.ignore_eos else None
    # Lanes and the exact shortcuts change what is computed and never the answer: a run may go on with others.
    exact = {"lanes", "early_rejection", "free_prefix"}
    run = {
        "model": arguments.model,
        "dtype": str(model.dtype),
        "config": {name: value for name, value in dataclasses.asdict(config).items() if name not in exact},
        "seed": arguments.seed,
        "eos": eos,
    }
    digests = {
        (i, k): digest(**run, tokens=row, prompt_id=i, chain_id=k)
        for i, row in enumerate(tokens)
        for k in range(arguments.num_chains)
    }
    output = OutputFile(arguments.out, digests) if arguments.out else None
    drawn = 0
    faults = output.faults if output else 0
    skipped = output.finished if output else set()
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        results = sampler.stream(
            tokens,
            config,
            num_chains=arguments.num_chains,
            seed=arguments.seed,
            eos_token_id=eos,
            max_chains=arguments.max_chains,
            skip=skipped,
            progress=not arguments.quiet,
        )
        for result in results:
            key = result.prompt_id, result.chain_id
            line = record(result, prompts[result.prompt_id], digests[key])
            if output:
                output.write(line)
            else:
                _show(line)
            drawn += 1
            faults += result.finish == "fault"
    except KeyboardInterrupt:
        there = output.count() if output else drawn
        where = f"in {arguments.out}; the same command goes on from there" if output else "above"
        print(f"\ninterrupted: {there} of {len(digests)} answers are {where}", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, previous)
        if output:
            output.close()
    if output:
        print(f"{drawn} answers written to {arguments.out}, {len(skipped)} were there", file=sys.stderr)
    if faults:
        print(f"{faults} answers stopped at bad logits; see their status", file=sys.stderr)
    return 1 if faults else 0


def _interrupt(signum, frame) -> None:
    raise KeyboardInterrupt


def _read_prompts(arguments: argparse.Namespace) -> list[dict]:
    if arguments.prompt:
        return [{"prompt": text} for text in arguments.prompt]
    try:
        lines = Path(arguments.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--prompts {arguments.prompts} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)
        except ValueError as error:
            raise ArgumentError(f"--prompts {arguments.prompts} line {number} is not JSON: {error}") from None
        kinds = {"prompt": str, "messages": list, "tokens": list}
        given = [k for k, kind in kinds.items() if isinstance(prompt, dict) and isinstance(prompt.get(k), kind)]
        if len(given) != 1 or not prompt[given[0]]:
            raise ArgumentError(
                f"--prompts {arguments.prompts} line {number} must be an object with one of prompt (text), messages "
                "(list) and tokens (list), not empty"
            )
        prompts.append(prompt)
    if not prompts:
        raise ArgumentError(f"--prompts {arguments.prompts} holds no prompts")
    return prompts


def _load(arguments: argparse.Namespace):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # hubs, files, formats and devices fail in as many ways as there are
        raise ArgumentError(f"--model {arguments.model} cannot be loaded on {device}: {error}") from error
    return model, tokenizer


def _tokens(index: int, prompt: dict, tokenizer, chat: bool) -> list[int]:
    if "tokens" in prompt:
        return prompt["tokens"]
    if "messages" not in prompt and not chat:
        return tokenizer(prompt["prompt"]).input_ids
    messages = prompt["messages"] if "messages" in prompt else [{"role": "user", "content": prompt["prompt"]}]
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids
    except Exception as error:  # templates are programs that come with the model
        raise ArgumentError(f"prompt {index} does not fit the chat template of the model: {error}") from error


def _show(line: dict) -> None:
    cost, steps = line["cost"], line["steps"]
    print(
        f"--- prompt {line['prompt_id']}, chain {line['chain_id']}: logp {line['logp']:.2f} nats, accepted "
        f"{line['accepted']} of {steps} steps ({line['unchanged']} unchanged), {cost['forwarded']} tokens forwarded "
        f"for {cost['answer']} ({line['finish']})"
    )
    print(line["text"], flush=True)


if __name__ == "__main__":
    sys.exit(main())
