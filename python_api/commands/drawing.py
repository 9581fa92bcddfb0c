"""Answers drawn into one place: what `power-kernels generate` and `power-kernels eval` do with a model that is loaded.

A `Drawing` is one list of prompts, one configuration and one seed. With a file it is resumed at the answer, divided
over the processes of a launcher, and ends in the order of the prompts (`output_file.py`).
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from power_kernels.api.commands import output_file
from power_kernels.api.commands.generate import INCOMPLETE, INTERRUPTED, kind_of
from power_kernels.api.commands.output_file import OutputFile, digest
from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.distributed import Ranks
from power_kernels.api.driver.horizons import ContextWarning
from power_kernels.api.driver.memory import is_out_of_memory
from power_kernels.api.driver.results import PowerResult
from power_kernels.api.driver.sampler import PowerSampler
from power_kernels.api.driver.text import bos_message, conversation_tokens, end_of_turn, text_tokens
from power_kernels.errors import ArgumentError

Line = Callable[[PowerResult, str, float], dict]


@dataclass
class Drawing:
    """One process's part of the answers to `rows`.

    rows: token ids of each prompt. config, num_chains, seed, eos, max_chains: as `PowerSampler.stream` has them.
    digests: what each wanted answer depends on, by (prompt id, chain id), in prompt-major order (`answer_digests`).
    line: the record of a result, of its digest and of the seconds since the result before. out: the file; None shows
    each record with `show`. only: the prompts to draw now; None draws all.

    After `run`: drawn, faults (of this process), missing (answers of other processes that are not to be seen), failed
    (an error ended it; what was finished is kept).
    """

    sampler: PowerSampler
    ranks: Ranks
    rows: list[list[int]]
    config: PowerConfig
    num_chains: int
    seed: int
    eos: list[int] | None
    digests: Mapping[tuple[int, int], str]
    line: Line
    out: str | None = None
    show: Callable[[dict], None] | None = None
    max_chains: int | None = None
    only: Collection[int] | None = None
    progress: bool = True
    output: output_file.RecordFile | None = field(default=None, init=False)
    finished: set[tuple[int, int]] = field(default_factory=set, init=False)
    drawn: int = field(default=0, init=False)
    faults: int = field(default=0, init=False)
    failed: bool = field(default=False, init=False)

    def run(self) -> int:
        """Returns the exit status: 0, 1 when an answer stopped at bad logits or is missing, 130 when interrupted."""
        with interruptible():
            return self._run()

    def _run(self) -> int:
        try:
            if self.out:
                self._open()
            self._draw()
            return self._finish()
        except KeyboardInterrupt:
            if self.ranks.rank == 0:
                _say(f"\ninterrupted: {self._there()}")
            return INTERRUPTED
        except Exception as error:
            if is_out_of_memory(error):
                device = self.sampler.engine.device
                _say(f"power-kernels: out of memory on {device}: {error}\n{self._there()}. {self._advice()}")
            elif isinstance(error, OSError):
                _say(f"power-kernels: --out {self.out} cannot be written: {error}\n{self._there()}")
            else:
                raise
            self.failed = True
            return INCOMPLETE
        finally:
            if self.output:
                self.output.close()

    def _open(self) -> None:
        """Rank 0 looks at what is there and tells the others, so that all divide the same answers."""
        path, rank = self.out, self.ranks.rank
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
        later = set() if self.only is None else {key for key in self.digests if key[0] not in self.only}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ContextWarning)  # said before
            results = self.sampler.stream(
                self.rows,
                self.config,
                num_chains=self.num_chains,
                seed=self.seed,
                eos_token_id=self.eos,
                max_chains=self.max_chains,
                skip=self.finished,
                later=later,
                share=(self.ranks.rank, self.ranks.world),
                progress=self.progress and self.ranks.rank == 0,
            )
        before = time.monotonic()
        for result in results:
            now = time.monotonic()
            line = self.line(result, self.digests[result.prompt_id, result.chain_id], now - before)
            before = now
            if self.output:
                self.output.write(line)
            else:
                self.show(line)
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
            if self.only is not None:
                missing -= sum(1 for key in self.digests if key[0] not in self.only and key not in self.finished)
            _say(f"{drawn} answers written to {self.out}, {len(self.finished)} were there")
        if missing:
            _say(f"{missing} answers of other processes are not to be seen here; run the same command again")
        if faults:
            _say(f"{faults} answers stopped at bad logits; see their status")
        return INCOMPLETE if faults or missing else 0

    def _there(self) -> str:
        total = len(self.digests)
        if not self.output:
            return f"{self.drawn} of {total} answers are above"
        where = f"in {self.out}; the same command goes on from there"
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


def answer_digests(
    rows: list[list[int]], num_chains: int, config: PowerConfig, **everything
) -> dict[tuple[int, int], str]:
    """By (prompt id, chain id), in prompt-major order. everything: what else an answer depends on, but its tokens."""
    # Lanes and the exact shortcuts change what is computed and never the answer: a run may go on with others.
    exact = {"lanes", "early_rejection", "free_prefix"}
    # What came later says nothing at its default: files that were begun before go on.
    later = {
        "stop": (),
        "length_bonus": 0.0,
        "kernel": "mh",
        "particles": PowerConfig.particles,
        "sweeps": PowerConfig.sweeps,
        "sweep_cut": PowerConfig.sweep_cut,
        "rho": PowerConfig.rho,
    }
    told = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in exact and (name not in later or value != later[name])
    }
    return {
        (i, k): digest(**everything, config=told, tokens=row, prompt_id=i, chain_id=k)
        for i, row in enumerate(rows)
        for k in range(num_chains)
    }


def prompt_rows(prompts: list[dict], tokenizer, chat: bool, say: Callable[[str], None]) -> list[list[int]]:
    """The token ids of each prompt, a line of a prompts file. chat: texts go into the chat template, too."""
    rows, with_bos = [], []
    for i, prompt in enumerate(prompts):
        row, twice = prompt_tokens(i, prompt, tokenizer, chat)
        rows.append(row)
        with_bos += [i] * twice
    if with_bos:
        say(bos_message(with_bos, tokenizer))
    return rows


def prompt_tokens(index: int, prompt: dict, tokenizer, chat: bool) -> tuple[list[int], bool]:
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


def ends_of_answers(
    sampler: PowerSampler, prompts: list[dict], chat: bool, say: Callable[[str], None]
) -> list[int] | None:
    """The tokens that end an answer; None for the model's own. In a chat, the end of a turn is one of them."""
    tokenizer, known = sampler.tokenizer, list(sampler.engine.eos_token_ids)
    in_template = ("prompt", "messages") if chat else ("messages",)
    chats = any(kind_of(prompt) in in_template for prompt in prompts)
    end = end_of_turn(tokenizer) if chats else None
    if end is None or end in known or end >= sampler.engine.vocab_size:
        return None
    say(
        f"{tokenizer.convert_ids_to_tokens(end)} ends answers, too: it ends a turn in the model's chat template, "
        "and its generation config does not say so"
    )
    return [*known, end]


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM is a Ctrl-C here."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(signum, frame) -> None:
    raise KeyboardInterrupt


def _say(message: str) -> None:
    print(message, file=sys.stderr)
