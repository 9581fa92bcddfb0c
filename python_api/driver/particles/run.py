"""One run of particles: chains stream through fixed slots, the active ones always in front.

    admit -> prefill -> [ feed every particle -> branch_particles -> what follows -> copies ]* -> result -> admit ...

Slots are at their own positions and sweeps, side by side. A slot whose chain has stopped takes the next job where it
is; when none waits any more, the slots close up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import torch

import power_kernels as pk
from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.engine import EngineBusyError, ParticleEngine
from power_kernels.api.driver.host import on_host
from power_kernels.api.driver.particles.advance import advance
from power_kernels.api.driver.particles.results import read_results
from power_kernels.api.driver.particles.state import GroupField, ParticleState
from power_kernels.api.driver.results import PowerResult
from power_kernels.api.driver.stop import StopStrings
from power_kernels.state import Mode


class ParticleRun:
    """jobs: what is left to draw, in order. slots: chains at once. max_length: positions of the call's longest prompt
    and its answer. eos: token ids. stop: the stop strings, None without any. report: a `RunReport` to fill."""

    def __init__(
        self,
        engine: ParticleEngine,
        jobs: list,
        config: PowerConfig,
        slots: int,
        *,
        max_length: int,
        seed: int,
        eos: list[int],
        stop: StopStrings | None,
        tokenizer,
        report,
    ):
        self.engine, self.config, self.law = engine, config, config.particle_law
        self.slots, self.max_length, self.seed = slots, max_length, seed
        self.tokenizer, self.stop, self.report, self.seconds = tokenizer, stop, report, report.seconds
        self.waiting = deque(jobs)
        self.prompts = {job.prompt_id: job.prompt for job in jobs}
        self.eos_ids = frozenset(eos)
        device = engine.device
        self.alpha = torch.full((slots,), config.alpha, dtype=torch.float32, device=device)
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self.stop_next = None if stop is None else torch.from_numpy(stop.table).to(device)
        self.prefilled: list[int] = []  # prompt tokens forwarded for the chain in each active slot

    def results(self, bar) -> Iterator[PowerResult]:
        """Each result as soon as its chain has stopped. bar: a ProgressBar or None."""
        self.begin()
        started = time.perf_counter()
        known, retired = sum(self.seconds.values()), 0 if bar is None else bar.tokens
        free = list(range(self.slots))
        try:
            while self.admit(free):
                free = []
                while not free:
                    self.step()
                    (field,) = on_host([self.state.field[: len(self.prefilled)]])
                    mode = field[:, GroupField.MODE]
                    free = [slot for slot, m in enumerate(mode.tolist()) if m in (Mode.DONE, Mode.FAULT)]
                    if bar is not None:
                        bar.advance_to(retired + int(field[:, GroupField.FED].sum()))
                for result in self.retire(free):
                    retired += result.cost.extension + result.cost.proposal
                    if bar is not None:
                        bar.finished(result)
                    yielded = time.perf_counter()
                    yield result
                    started += time.perf_counter() - yielded
        finally:
            spent = sum(self.seconds.values()) - known
            self.seconds["other"] += time.perf_counter() - started - spent
            self.engine.end()

    def begin(self) -> None:
        try:
            self.engine.begin_particles(groups=self.slots, particles=self.law.particles, max_length=self.max_length)
            self.state = ParticleState.allocate(self.slots, self.law, self.engine.device)
        except EngineBusyError:
            raise
        except BaseException:
            self.engine.end()
            raise

    def step(self) -> None:
        """One position of every active slot."""
        report, clock = self.report, time.perf_counter
        state = self.state.first(len(self.prefilled))
        report.decode_steps += 1
        report.row_steps += self.slots * self.law.particles
        report.lane_steps += int(state.live.sum())
        report.sequential += bool(state.live.any())
        start = clock()
        logits = self.engine.children(state)
        fed = clock()
        branched = self.branch(state, logits)
        drawn = clock()
        state.tally.copy_(branched.tally)
        advance(state, self.law, branched, self.stop_next, self.config.alpha)
        self.seconds["forward"] += fed - start
        self.seconds["sample"] += drawn - fed
        self.seconds["advance"] += clock() - drawn
        self.copy(state)

    def branch(self, state: ParticleState, logits: torch.Tensor) -> pk.BranchOutput:
        return pk.branch_particles(
            logits, self.alpha[: state.groups], state.log_weight, state.order, state.reference, state.last,
            state.closing_bonus, state.uniform, state.tally, eos=self.eos, stop_state=self.stop_states(state),
            stop_next=self.stop_next, length_bonus=self.law.length_bonus, rho=self.law.rho,
        )  # fmt: skip

    def copy(self, state: ParticleState) -> None:
        """Make the copies that the state asks for. At once: they name rows, and chains may move to other slots."""
        start = time.perf_counter()
        self.engine.copy_particles(state)
        state.forget_copies()
        self.seconds["transfer"] += time.perf_counter() - start

    def stop_states(self, state: ParticleState) -> torch.Tensor | None:
        """The automaton's state of each row's prefix."""
        if self.stop_next is None:
            return None
        at = state.field[:, GroupField.POSITION][:, None, None].expand(*state.order.shape, 1)
        return state.stop_state.gather(2, at)[..., 0].contiguous()

    def admit(self, free: list[int]) -> int:
        """Give free slots to the jobs that wait; where none does, close up. Returns how many chains are active now."""
        jobs = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
        slots, empty = free[: len(jobs)], free[len(jobs) :]
        for slot in reversed(empty):
            self.close_up(slot)
        if jobs:
            start = time.perf_counter()
            prefilled = self.engine.prefill(slots, [job.prompt for job in jobs])
            self.seconds["prefill"] += time.perf_counter() - start
            for slot, job, tokens in zip(slots, jobs, prefilled, strict=True):
                self.state.admit(slot, job.prompt, job.chain_id, job.prompt_id, seed=self.seed)
                self.prefilled[slot : slot + 1] = [tokens]
            self.copy(self.state.first(len(self.prefilled)))
        return len(self.prefilled)

    def close_up(self, slot: int) -> None:
        """The last active chain moves into a slot whose own has stopped. Does nothing behind the active slots."""
        last = len(self.prefilled) - 1
        if slot > last:
            return
        if slot < last:
            self.state.move(last, slot)
            self.engine.move(last, slot)
            self.prefilled[slot] = self.prefilled[last]
        self.state.retire(last)
        self.prefilled.pop()

    def retire(self, slots: list[int]) -> list[PowerResult]:
        results = read_results(
            self.state, slots, law=self.law, eos=self.eos_ids, stop=self.stop, tokenizer=self.tokenizer,
            prompts=self.prompts, prefilled=[self.prefilled[slot] for slot in slots],
        )  # fmt: skip
        for cost in (result.cost for result in results):
            self.report.drawn += cost.extension + cost.proposal
            self.report.useful_lane_steps += cost.extension + cost.proposal
        return results
