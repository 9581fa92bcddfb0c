"""What `power-kernels generate` does once its options are in order: load the model, draw, keep the answers."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import warnings

from power_kernels.api.commands import output_file
from power_kernels.api.commands.generate import INCOMPLETE, INTERRUPTED, kind_of
from power_kernels.api.commands.load import load_sampler, load_tokenizer
from power_kernels.api.commands.output_file import OutputFile, digest, record
from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.distributed import RankLostError, Ranks, join
from power_kernels.api.driver.horizons import ContextWarning, context_message
from power_kernels.api.driver.memory import is_out_of_memory
from power_kernels.api.driver.text import bos_message, conversation_tokens, end_of_turn, text_tokens
from power_kernels.errors import ArgumentError


def run(arguments: argparse.Namespace, config: PowerConfig, prompts: list[dict]) -> int:
    """Returns the exit status, as `generate.run` does. prompts: what the prompts file says, a dict a line."""
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
        # What the prompts are like is said before the weights are loaded, which may take minutes.
        tokenizer, context = load_tokenizer(arguments.model)
        self.tokens = self._read(tokenizer)
        lengths = {i: len(row) for i, row in enumerate(self.tokens)}
        if message := context_message(lengths, config.max_new_tokens, context):
            self._first_says(message)
        self.sampler = load_sampler(arguments, ranks, tokenizer)
        self.eos = self._eos()
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

    def _read(self, tokenizer) -> list[list[int]]:
        rows, with_bos = [], []
        for i, prompt in enumerate(self.prompts):
            row, twice = _tokens(i, prompt, tokenizer, self.arguments.chat)
            rows.append(row)
            with_bos += [i] * twice
        if with_bos:
            self._first_says(bos_message(with_bos, tokenizer))
        return rows

    def _eos(self) -> list[int] | None:
        """The tokens that end an answer; None for the model's own. In a chat, the end of a turn is one of them."""
        if self.arguments.ignore_eos:
            return []
        tokenizer, known = self.sampler.tokenizer, list(self.sampler.engine.eos_token_ids)
        in_template = ("prompt", "messages") if self.arguments.chat else ("messages",)
        chats = any(kind_of(prompt) in in_template for prompt in self.prompts)
        end = end_of_turn(tokenizer) if chats else None
        if end is None or end in known or end >= self.sampler.engine.vocab_size:
            return None
        self._first_says(
            f"{tokenizer.convert_ids_to_tokens(end)} ends answers, too: it ends a turn in the model's chat template, "
            "and its generation config does not say so"
        )
        return [*known, end]

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ContextWarning)  # said before
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

    def _first_says(self, message: str) -> None:
        """What all processes know is said by one."""
        if self.ranks.rank == 0:
            self._say(message)

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


def _tokens(index: int, prompt: dict, tokenizer, chat: bool) -> tuple[list[int], bool]:
    """The ids of a prompt, and whether its text had BOS already, as `text_tokens` says."""
    kind = kind_of(prompt)
    if kind == "tokens":
        return prompt["tokens"], False
    if kind == "prompt" and not chat:
        try:
            return text_tokens(tokenizer, prompt["prompt"])
        except Exception as error:  # tokenizers, too, come with the model
            raise ArgumentError(f"prompt {index} is refused by the tokenizer of the model: {error}") from error
    messages = prompt["messages"] if kind == "messages" else [{"role": "user", "content": prompt["prompt"]}]
    try:
        return conversation_tokens(tokenizer, messages), False
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
