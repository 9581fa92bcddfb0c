"""PowerSampler: answers from p(x)^alpha of many prompts, many chains each.

This file checks what it is given and plans runs; `run.py` drives one. Every row of a run's batch is at its own position
and its own Metropolis-Hastings step. The law of the chain lives in `power_kernels.mh_advance`.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from numbers import Integral

import torch

from power_kernels import backend_for
from power_kernels.api.driver import captured
from power_kernels.api.driver.checks import integer, items, plain
from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.engine import CapturableEngine, Engine, ParticleEngine, ranks_of
from power_kernels.api.driver.horizons import Part, parts_of
from power_kernels.api.driver.memory import is_out_of_memory
from power_kernels.api.driver.particles.run import ParticleRun
from power_kernels.api.driver.planning import plan_particles, plan_run
from power_kernels.api.driver.progress import ProgressBar
from power_kernels.api.driver.results import PowerResult, empty_result
from power_kernels.api.driver.run import Job, Run, RunReport
from power_kernels.api.driver.stop import StopStrings
from power_kernels.api.driver.text import end_of_turn, read_prompts
from power_kernels.api.engines import engine_for
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.rng import MAX_PROMPT_ID
from power_kernels.state import MAX_LANES


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during `PowerSampler.generate`. `.results` holds the answers that had finished."""

    def __init__(self, results: list[PowerResult]):
        super().__init__(f"interrupted after {len(results)} finished answers, which are in .results")
        self.results = results


class GenerationError(RuntimeError):
    """An error in the middle of `PowerSampler.generate`, its __cause__. `.results`: the answers that had finished."""

    def __init__(self, results: list[PowerResult], error: Exception):
        super().__init__(
            f"{type(error).__name__} after {len(results)} finished answers, which are in .results: {error}"
        )
        self.results = results


class PowerSampler:
    """Draws answers from p(x)^alpha of a model.

    model: a transformers causal LM, or any `Engine`. tokenizer: needed for prompts that are strings or conversations,
        and for `.text`.
    capture: replay each decode step as one CUDA graph; None does so on every CUDA device, with an engine that can.
        Raises ArgumentError where True cannot be had. A recorded step keeps the parameters and hooks that the model had
        then: whoever replaces some while a stream is open must pass False.
    """

    def __init__(self, model, tokenizer=None, *, capture: bool | None = None):
        engine = model if isinstance(model, Engine) else engine_for(model)
        if engine is None:
            raise ArgumentTypeError(
                f"model is a {type(model).__name__}; it must be a transformers causal LM or a power_kernels.api.Engine"
            )
        self.engine: Engine = engine
        self._ranks = ranks_of(engine)
        self.tokenizer = tokenizer
        self.capture = _check_capture(capture, engine)
        self._runs: list[RunReport] = []  # of the last call
        self._stop: StopStrings | None = None  # of the last call that had any

    @property
    def last_run(self) -> RunReport | None:
        """What the last call that began to draw did so far, in how many slots and lanes; None where it had nothing to
        draw, or there was none. A call is one run, and one more for each shorter horizon of prompts that the context
        cuts (see `generate`): they are added up."""
        return RunReport.of_runs(self._runs) if self._runs else None

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Sequence[Mapping]] | torch.Tensor,
        config: PowerConfig | None = None,
        *,
        num_chains: int = 1,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        prompt_ids: Sequence[int] | None = None,
        max_chains: int | None = None,
        share: tuple[int, int] = (0, 1),
        progress: bool = False,
    ) -> list[PowerResult]:
        """One result per prompt and chain, prompt-major.

        prompts: each a string, a conversation (a list of messages, put into the tokenizer's chat template) or a list of
        token ids; or all of them an integer tensor [B, P]. A string that begins with the text of BOS, such as a chat
        template rendered before, gets no second BOS (UserWarning).
        num_chains: independent answers per prompt. seed: 64 bits; the same seed gives the same chains, whatever batch
        they run in. eos_token_id: an int or a sequence; None takes the engine's and, where a prompt is a conversation,
        the token that ends a turn in the chat template; [] or -1 runs every answer to max_new_tokens. prompt_ids: the
        prompts' identities in the random-number contract; their index in this call by default. max_chains: the most
        chains that run at once; None leaves their number to the driver, which weighs waiting chains against lanes by
        what steps take here (`planning.py`). Fewer run where memory does not hold them (RuntimeWarning where a number
        was given); the others wait for a free slot, first come, first served. share: (r, n) draws only each n-th answer
        from the r-th on, in prompt-major order. progress: show a bar. Integers may be of NumPy or tensors without
        dimensions.

        Where a prompt leaves less than max_new_tokens of the model's context, its horizon is what it leaves, whatever
        the other prompts are: its answer is drawn from p^alpha at that horizon, and one that reaches it has finish
        "context" (ContextWarning). Prompts of different horizons are drawn in separate runs, one after the other. A
        prompt that leaves nothing gets an answer of no tokens; where no prompt leaves anything, that is an
        ArgumentError.

        A chain whose logits go bad (NaN, +inf, all -inf) stops with finish "fault"; the others are not affected. A run
        that runs out of memory goes on with fewer chains at once (RuntimeWarning), which draws the same answers.
        Raises ArgumentError or ArgumentTypeError for bad input before any work, ArgumentError where not one chain fits
        into memory, GenerationInterrupted on Ctrl-C and GenerationError when anything fails after the first answer;
        the last two carry the finished answers.
        """
        everything, eos = self._jobs(prompts, num_chains, prompt_ids, eos_token_id)
        jobs = _share_of(everything, share)
        order = {(job.prompt_id, job.chain_id): i for i, job in enumerate(jobs)}
        results: list[PowerResult | None] = [None] * len(jobs)
        try:
            for result in self._stream(jobs, everything, config, seed, eos, max_chains, progress, len(jobs)):
                results[order[result.prompt_id, result.chain_id]] = result
        except KeyboardInterrupt:
            raise GenerationInterrupted([r for r in results if r is not None]) from None
        except Exception as error:
            finished = [r for r in results if r is not None]
            if not finished:
                raise
            raise GenerationError(finished, error) from error
        return results

    def stream(
        self,
        prompts,
        config: PowerConfig | None = None,
        *,
        num_chains: int = 1,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        prompt_ids: Sequence[int] | None = None,
        max_chains: int | None = None,
        skip: Collection[tuple[int, int]] = (),
        later: Collection[tuple[int, int]] = (),
        share: tuple[int, int] = (0, 1),
        progress: bool = False,
    ) -> Iterator[PowerResult]:
        """`generate`, yielding each result as soon as its chain stops. Input is checked before this returns.

        skip: (prompt id, chain id) of answers that an earlier call has drawn already; later: of those that another call
        will draw, which the bar does not count. Shares are of the others.
        """
        jobs, eos = self._jobs(prompts, num_chains, prompt_ids, eos_token_id)
        left = [job for job in jobs if (job.prompt_id, job.chain_id) not in skip]
        now = [job for job in left if (job.prompt_id, job.chain_id) not in later]
        wanted = _share_of(now, share)
        total = len(jobs) - len(left) + len(wanted)  # of the bar: what was there, and this share
        return self._stream(wanted, jobs, config, seed, eos, max_chains, progress, total)

    # -- input

    def _jobs(self, prompts, num_chains, prompt_ids, eos_token_id) -> tuple[list[Job], list[int]]:
        """Every answer that a call wants, prompt-major, and the tokens that end one."""
        rows, eos = self.read(prompts, eos_token_id)
        num_chains = integer("num_chains is", num_chains, 1)
        ids = list(range(len(rows))) if prompt_ids is None else items("prompt_ids", prompt_ids)
        ids = [integer("prompt_ids holds", i, 0, MAX_PROMPT_ID) for i in ids]
        if len(ids) != len(rows) or len(set(ids)) != len(ids):
            raise ArgumentError(f"prompt_ids is {ids}; it must hold one distinct id for each of {len(rows)} prompts")
        return [Job(row, i, k) for row, i in zip(rows, ids, strict=True) for k in range(num_chains)], eos

    def read(self, prompts, eos_token_id=None) -> tuple[list[list[int]], list[int]]:
        """The token ids of each prompt, and the tokens that end an answer, of `generate`'s arguments. Raises alike."""
        rows, conversations = read_prompts(prompts, self.tokenizer, self.engine.vocab_size)
        return rows, self._eos(eos_token_id, conversations)

    def _eos(self, eos_token_id, conversations: bool) -> list[int]:
        last = self.engine.vocab_size - 1
        eos_token_id = plain(eos_token_id)
        if eos_token_id is None:
            ids = [token for token in self.engine.eos_token_ids if token != -1]
            end = end_of_turn(self.tokenizer) if conversations else None
            return ids if end is None or end in ids or end > last else [*ids, end]
        ids = [eos_token_id] if isinstance(eos_token_id, Integral) else items("eos_token_id", eos_token_id)
        # transformers has -1 for a token that never comes.
        return [integer("eos_token_id holds", token, 0, last) for token in ids if token != -1]

    # -- the run

    def _stream(self, jobs, everything, config, seed, eos, max_chains, progress, total) -> Iterator[PowerResult]:
        """jobs: of `everything`, what this call draws. Horizons and rotary regimes follow from the whole, so that they
        do not depend on which part of the answers a process draws, or finds left."""
        config = PowerConfig() if config is None else config
        if not isinstance(config, PowerConfig):
            raise ArgumentTypeError(f"config is a {type(config).__name__}; it must be a PowerConfig")
        seed = integer("seed is", seed, -(2**63), 2**64 - 1)
        max_chains = None if max_chains is None else integer("max_chains is", max_chains, 1)
        if self._ranks is not None:
            self._ranks.check_same(answers=jobs, config=config, seed=seed, eos_token_id=eos, max_chains=max_chains)
        if config.kernel == "particles":
            if not isinstance(self.engine, ParticleEngine):
                raise ArgumentError(f"kernel is 'particles'; {type(self.engine).__name__} runs 'mh' only")
            self.engine.check_particles()
        if not jobs:
            return iter(())
        if config.lanes is not None and config.lanes > MAX_LANES and backend_for(self.engine.device) == "triton":
            raise ArgumentError(f"lanes is {config.lanes}; on {self.engine.device} it must lie in [1, {MAX_LANES}]")
        stop = self._stop_strings(config)
        parts = parts_of(jobs, everything, config, self.engine.max_context)
        bar = ProgressBar(total, total - len(jobs)) if progress else None
        return self._drawn(parts, seed, eos, stop, max_chains, bar)

    def _stop_strings(self, config: PowerConfig) -> StopStrings | None:
        """None without any."""
        if not config.stop:
            return None
        if self.tokenizer is None:
            raise ArgumentTypeError(
                f"stop is {list(config.stop)} and there is no tokenizer; pass PowerSampler(model, tokenizer)"
            )
        if self._stop is None or not self._stop.fit(self.tokenizer, config.stop):
            self._stop = StopStrings.of(self.tokenizer, config.stop, self.engine.vocab_size)
        return self._stop

    def _drawn(self, parts: list[Part], seed, eos, stop, max_chains, bar) -> Iterator[PowerResult]:
        runs = self._runs = []
        try:
            for part in parts:
                if part.config is None:
                    for job in part.jobs:
                        result = empty_result(job.prompt_id, job.chain_id, has_text=self.tokenizer is not None)
                        if bar is not None:
                            bar.finished(result)
                        yield result
                    continue
                results = self._results(part.jobs, part.max_length, part.config, seed, eos, stop, max_chains, bar, runs)
                with closing(results):
                    for result in results:
                        cut = part.cut and result.finish == "length"
                        yield replace(result, finish="context") if cut else result
        finally:
            if bar is not None:
                bar.close()

    def _results(
        self, jobs: list[Job], max_length, config, seed, eos, stop, max_chains, bar, runs
    ) -> Iterator[PowerResult]:
        """Runs until every answer is drawn: one, and another in less memory each time that memory runs out. runs: takes
        the report of them all."""
        left = {(job.prompt_id, job.chain_id): job for job in jobs}
        prompt = sum(len(job.prompt) for job in jobs) // len(jobs)
        particles = config.kernel == "particles"
        if particles:
            plan = plan_particles(self.engine, config, jobs=len(jobs), max_chains=max_chains, max_length=max_length)
        else:
            plan = plan_run(
                self.engine, config, jobs=len(jobs), max_chains=max_chains,
                max_length=max_length, length=prompt + config.max_new_tokens // 2,
            )  # fmt: skip
        report = RunReport(plan.slots, plan.lanes, captured=self.capture and not particles)
        runs.append(report)
        while left:
            given = dict(max_length=max_length, seed=seed, eos=eos, stop=stop, tokenizer=self.tokenizer, report=report)
            jobs = list(left.values())
            if particles:
                run = ParticleRun(self.engine, jobs, config, plan.slots, **given)
            else:
                run = Run(self.engine, jobs, config, plan, capture=self.capture, **given)
            try:
                for result in run.results(bar):
                    del left[result.prompt_id, result.chain_id]
                    yield result
            except Exception as error:
                smaller = plan.smaller()
                # Where several processes hold the model, the others go on and cannot know.
                if smaller is None or not is_out_of_memory(error) or self._ranks is not None:
                    raise
                message = str(error)
            else:
                break
            finally:
                self.capture = self.capture and report.captured  # a step that cannot be recorded is not tried again
            # Out of the handler, which holds the frames of the run and with them its tensors.
            del run
            gc.collect()
            if self.engine.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(
                f"out of memory with {plan.slots} chains at once in {plan.lanes} lanes each; the {len(left)} "
                f"answers that are not finished begin again with {smaller.slots} and {smaller.lanes}: {message}",
                RuntimeWarning,
                stacklevel=2,
            )
            plan = smaller
            report.slots, report.lanes, report.restarts = plan.slots, plan.lanes, report.restarts + 1


def _check_capture(capture: bool | None, engine: Engine) -> bool:
    if not isinstance(capture, bool | None):
        raise ArgumentTypeError(f"capture is {capture!r}; it must be True, False or None")
    able = captured.recorder(engine.device) is not None and isinstance(engine, CapturableEngine)
    if capture and not able:
        raise ArgumentError(
            f"capture is True with {type(engine).__name__} on {engine.device}; it needs a CUDA device and an engine "
            "that can be captured"
        )
    return able if capture is None else capture


def _share_of(jobs: list[Job], share: tuple[int, int]) -> list[Job]:
    share = items("share", share)
    if len(share) != 2:
        raise ArgumentError(f"share is {share}; it must be (r, n)")
    n = integer("share holds n =", share[1], 1)
    return jobs[integer("share holds r =", share[0], 0, n - 1) :: n]
