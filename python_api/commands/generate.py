"""`power-kernels generate`: answers to a file of prompts, in one process or in several.

power-kernels generate --model MODEL --prompts prompts.jsonl --out results.jsonl
torchrun --nproc-per-node 8 -m power_kernels.api.commands.cli generate --model MODEL ...
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from power_kernels.api.commands import output_file
from power_kernels.api.commands.output_file import OutputFile, digest, record
from power_kernels.api.driver.config import CUTS, PowerConfig
from power_kernels.api.driver.distributed import RankLostError, Ranks, join, launched
from power_kernels.api.driver.engine import UnsupportedModelError
from power_kernels.api.driver.memory import is_out_of_memory
from power_kernels.api.driver.sampler import PowerSampler
from power_kernels.errors import ArgumentError

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


def check_model_arguments(arguments: argparse.Namespace) -> None:
    """What can be said of `add_model_arguments` before a model is loaded. Raises ArgumentError."""
    if arguments.threads is not None and arguments.threads < 1:
        raise ArgumentError(f"--threads is {arguments.threads}; it must be at least 1")
    if arguments.model is None:  # `doctor` alone
        given = {"--device": arguments.device, "--threads": arguments.threads}
        given["--dtype"] = None if arguments.dtype == "auto" else arguments.dtype
        for option, value in given.items():
            if value is not None:
                raise ArgumentError(f"{option} is {value} without --model, which it is about")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    source.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help='one JSON object a line with "prompt" (text), "messages" (a chat) or "tokens", and optionally "id"',
    )
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    parser.add_argument(
        "--out",
        metavar="FILE.jsonl",
        help="write results here as they finish, put into the order of the prompts at the end (default: print them)",
    )
    parser.add_argument("--num-chains", type=int, default=1, help="independent answers per prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-chains", type=int, default=16, help="chains that run at once, in each process")
    parser.add_argument("--alpha", type=float, default=4.0)
    parser.add_argument("--max-new-tokens", type=int, default=3072)
    parser.add_argument("--block-size", type=int, default=192, help="0: one stage of max-new-tokens")
    parser.add_argument("--mcmc-steps", type=int, default=10)
    parser.add_argument("--final-steps", type=int, default=0)
    parser.add_argument("--temperature", type=float, help="of the proposals (default: 1/alpha)")
    parser.add_argument("--lanes", type=int, help="proposals of a chain decoded at once (default: what pays here)")
    parser.add_argument("--cut", choices=CUTS, default="uniform", help="the law of where a proposal leaves the answer")
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
    # What needs no model is looked at before one is loaded.
    check_model_arguments(arguments)
    for option, value in (("--num-chains", arguments.num_chains), ("--max-chains", arguments.max_chains)):
        if value < 1:
            raise ArgumentError(f"{option} is {value}; it must be at least 1")
    if not -(2**63) <= arguments.seed < 2**64:
        raise ArgumentError(f"--seed is {arguments.seed}; it must have 64 bits")
    config = _config(arguments)
    prompts = _read_prompts(arguments)
    if launched() > 1 and not arguments.out:
        raise ArgumentError(f"--out is not given; {launched()} processes need a file to bring their answers together")
    try:
        with join() as ranks:
            return _Command(arguments, config, prompts, ranks).run()
    except RankLostError as error:
        print(f"power-kernels: {error}", file=sys.stderr)
        if arguments.out:
            print(f"What is finished is in {arguments.out} and beside it; run the same command again", file=sys.stderr)
        return INCOMPLETE


class _Command:
    """One process's part of the run."""

    def __init__(self, arguments: argparse.Namespace, config: PowerConfig, prompts: list[dict], ranks: Ranks):
        self.arguments, self.config, self.prompts, self.ranks = arguments, config, prompts, ranks
        self.sampler = load_sampler(arguments, ranks)
        tokenizer = self.sampler.tokenizer
        self.tokens = [_tokens(i, prompt, tokenizer, arguments.chat) for i, prompt in enumerate(prompts)]
        self.eos = [] if arguments.ignore_eos else None
        # Lanes and the exact shortcuts change what is computed and never the answer: a run may go on with others.
        exact = {"lanes", "early_rejection", "free_prefix"}
        everything = {
            "model": arguments.model,
            "dtype": str(self.sampler.engine.dtype),
            "config": {name: value for name, value in dataclasses.asdict(config).items() if name not in exact},
            "seed": arguments.seed,
            "eos": self.eos,
        }
        self.digests = {
            (i, k): digest(**everything, tokens=row, prompt_id=i, chain_id=k)
            for i, row in enumerate(self.tokens)
            for k in range(arguments.num_chains)
        }
        self.output: output_file.RecordFile | None = None
        self.finished: set[tuple[int, int]] = set()
        self.drawn = self.faults = 0

    def run(self) -> int:
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            if self.arguments.out:
                self._open()
            self._draw()
            return self._finish()
        except KeyboardInterrupt:
            if self.ranks.rank == 0:
                self._say(f"\ninterrupted: {self._there()}")
            return INTERRUPTED
        except Exception as error:
            if is_out_of_memory(error):
                device = self.sampler.engine.device
                self._say(f"power-kernels: out of memory on {device}: {error}\n{self._there()}. {self._advice()}")
            elif isinstance(error, OSError):
                self._say(f"power-kernels: --out {self.arguments.out} cannot be written: {error}\n{self._there()}")
            else:
                raise
            return INCOMPLETE
        finally:
            signal.signal(signal.SIGTERM, previous)
            if self.output:
                self.output.close()

    def _open(self) -> None:
        """Rank 0 looks at what is there and tells the others, so that all divide the same answers."""
        path, rank = self.arguments.out, self.ranks.rank
        work = digest(digests=list(self.digests.values()))
        if rank == 0:
            self.output = OutputFile(path, self.digests)
            self.faults = self.output.faults
            self.ranks.broadcast((work, self.output.identity, self.output.finished))
            self.finished = self.output.finished
            return
        first_work, identity, self.finished = self.ranks.broadcast(None)
        if work != first_work:
            raise ArgumentError(f"rank {rank} has another model, configuration, seed or other prompts than rank 0")
        if not os.path.exists(path) or os.stat(path).st_ino != identity:
            raise ArgumentError(f"--out {path} of rank {rank} is not rank 0's; put it where all machines see it")
        self.output = output_file.part(path, rank)

    def _draw(self) -> None:
        results = self.sampler.stream(
            self.tokens,
            self.config,
            num_chains=self.arguments.num_chains,
            seed=self.arguments.seed,
            eos_token_id=self.eos,
            max_chains=self.arguments.max_chains,
            skip=self.finished,
            share=(self.ranks.rank, self.ranks.world),
            progress=not self.arguments.quiet and self.ranks.rank == 0,
        )
        for result in results:
            key = result.prompt_id, result.chain_id
            line = record(result, self.prompts[result.prompt_id], self.digests[key])
            if self.output:
                self.output.write(line)
            else:
                _show(line)
            self.drawn += 1
            self.faults += result.finish == "fault"

    def _finish(self) -> int:
        if self.ranks.rank > 0:
            self.output.close()  # before rank 0 hears that it is finished
        drawn, faults = map(sum, zip(*self.ranks.gather((self.drawn, self.faults)), strict=True))
        missing = 0
        if self.ranks.rank > 0:
            return 0  # the first process speaks for all
        if self.output:
            missing = self.output.finish()
            self._say(f"{drawn} answers written to {self.arguments.out}, {len(self.finished)} were there")
        if missing:
            self._say(f"{missing} answers of other processes are not to be seen here; run the same command again")
        if faults:
            self._say(f"{faults} answers stopped at bad logits; see their status")
        return INCOMPLETE if faults or missing else 0

    def _say(self, message: str) -> None:
        print(message, file=sys.stderr)

    def _there(self) -> str:
        total = len(self.digests)
        if not self.output:
            return f"{self.drawn} of {total} answers are above"
        where = f"in {self.arguments.out}; the same command goes on from there"
        if self.ranks.rank > 0:
            return f"What is finished is {where}"
        return f"{self.output.count()} of {total} answers are {where}"

    def _advice(self) -> str:
        report = self.sampler.last_run
        if report is None or report.slots * report.lanes == 1:
            return "Not one chain fits; use a device with more memory or a smaller dtype"
        return (
            f"Fewer --max-chains (now {report.slots}) or --lanes (now {report.lanes}) take less, for the same answers"
        )


def _interrupt(signum, frame) -> None:
    raise KeyboardInterrupt


def _config(arguments: argparse.Namespace) -> PowerConfig:
    return PowerConfig(
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
        lines = Path(arguments.prompts).read_text(encoding="utf-8").split("\n")  # JSON may hold other line breaks
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
        kinds = {"prompt": str, "messages": list, "tokens": list}
        given = [k for k, kind in kinds.items() if isinstance(prompt, dict) and isinstance(prompt.get(k), kind)]
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


def _is_unicode(text: str) -> bool:
    """False where a half of a surrogate pair stands alone: JSON and command lines can hold it, UTF-8 and models not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _device(given: str | None, ranks: Ranks) -> str:
    device = given or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cuda" or ranks.world == 1:
        return device
    if ranks.local_rank >= torch.cuda.device_count():
        raise ArgumentError(
            f"process {ranks.local_rank} of this machine has no GPU among the {torch.cuda.device_count()} that are "
            "visible; start one process a GPU (--nproc-per-node), or name a --device"
        )
    return f"cuda:{ranks.local_rank}"


def load_sampler(arguments: argparse.Namespace, ranks: Ranks | None = None) -> PowerSampler:
    """The model and the tokenizer of `add_model_arguments`. Raises ArgumentError."""
    model, tokenizer = _load(arguments, _device(arguments.device, ranks or Ranks()))
    try:
        return PowerSampler(model, tokenizer)
    except UnsupportedModelError as error:
        raise ArgumentError(f"--model {arguments.model}: {error}") from error


def _load(arguments: argparse.Namespace, device: str):
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # kernels are launched on the current one
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
        try:
            return tokenizer(prompt["prompt"]).input_ids
        except Exception as error:  # tokenizers, too, come with the model
            raise ArgumentError(f"prompt {index} is refused by the tokenizer of the model: {error}") from error
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
