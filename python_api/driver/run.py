"""One run of the driver: fixed slots, chains streaming through them, the active ones always in front.

    admit -> prefill -> [ forward + sample -> mh_advance -> KV ranges ]* -> result -> admit ...

A slot whose chain has stopped takes the next job where it is. When none waits any more, the slots close up, and the
chains that still run share the free rows out among them, as more lanes of each (`widen`). What stands in brackets is a
step. On a CUDA device it is recorded and replayed as one graph (`captured.py`), and the host only looks at the chains
every few steps (`poll.py`); elsewhere the same code runs as it is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch

import power_kernels as pk
from power_kernels import nvtx, reference
from power_kernels.api.driver import captured
from power_kernels.api.driver.captured import CapturedSteps
from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.engine import (
    Engine,
    EngineBusyError,
    ReportingEngine,
    RequestEngine,
    Sampled,
    StepReport,
    WideningEngine,
)
from power_kernels.api.driver.host import on_host
from power_kernels.api.driver.planning import Plan
from power_kernels.api.driver.poll import Poll
from power_kernels.api.driver.requests import RequestLog
from power_kernels.api.driver.results import Counts, PowerResult, read_results
from power_kernels.api.driver.stop import StopStrings
from power_kernels.law import Law
from power_kernels.rng import as_int64
from power_kernels.state import ChainField, ChainState, Mode, Status

PHASES = ("prefill", "forward", "sample", "advance", "transfer", "replay", "other")


@dataclass(frozen=True)
class Job:
    """One answer to draw."""

    prompt: list[int]
    prompt_id: int
    chain_id: int


@dataclass
class RunReport:
    """What a run did, up to now; or what the runs of a call did, together (`of_runs`).

    slots: chains at once. lanes: of each, as the run was planned; widened: how often its last chains got more lanes.
    captured: whether decode steps are replayed from recordings. decode_steps: how many there were. row_steps: slots
    times lanes, summed over them. lane_steps: rows that went through the model in them. A step that brought runs of
    draws counts in both as what it brought. sequential: decode steps in which a row went through the model, without
    those that were answered from memory: so many forward passes came one after the other. useful_lane_steps: rows that
    brought an extension or a proposal on, counted when their answer is finished; drawn: the tokens of these, recalled
    ones too. replays: decode steps that were replayed. restarts: how often the run began anew in less memory. seconds:
    wall-clock seconds of the host by phase, one of `PHASES`. Where a step is replayed, "replay" is the time to launch
    it; where the head and the draw are one operator, "forward" includes both.
    """

    slots: int
    lanes: int
    captured: bool
    decode_steps: int = 0
    row_steps: int = 0
    lane_steps: int = 0
    sequential: int = 0
    useful_lane_steps: int = 0
    drawn: int = 0
    widened: int = 0
    replays: int = 0
    restarts: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @staticmethod
    def of_runs(runs: Sequence[RunReport]) -> RunReport:
        """Of one run after the other: counts and seconds add up; slots and lanes are the most that any had; captured:
        whether any was."""
        ways = dict(slots=max, lanes=max, captured=any, seconds=_added)
        return RunReport(
            **{f.name: ways.get(f.name, sum)([getattr(run, f.name) for run in runs]) for f in fields(RunReport)}
        )

    @property
    def filled(self) -> float:
        """The share of `row_steps` that drew a token: a lane that waits or idles and a free slot count as empty."""
        return self.drawn / max(self.row_steps, 1)


def _added(seconds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {phase: sum(of_run[phase] for of_run in seconds) for phase in PHASES}


class Run:
    """jobs: what is left to draw, in order. max_length: positions of the call's longest prompt and its answer. eos:
    token ids. stop: the stop strings, None without any. capture: replay steps, of a CapturableEngine."""

    def __init__(
        self,
        engine: Engine,
        jobs: list[Job],
        config: PowerConfig,
        plan: Plan,
        *,
        max_length: int,
        seed: int,
        eos: list[int],
        stop: StopStrings | None,
        capture: bool,
        tokenizer,
        report: RunReport,
    ):
        self.reports = isinstance(engine, ReportingEngine)
        self.keeps_requests = isinstance(engine, RequestEngine)
        self.widens = isinstance(engine, WideningEngine)
        self.engine = nvtx.traced(engine, ("prefill", "transfer", "step", "move"))
        if nvtx.enabled():
            for phase in ("admit", "advance", "retire"):
                setattr(self, phase, nvtx.in_range(phase, getattr(self, phase)))
        self.config, self.law, self.plan, self.tokenizer = config, config.law, plan, tokenizer
        self.report, self.seconds = report, report.seconds
        self.waiting = deque(jobs)
        self.prompts = {job.prompt_id: job.prompt for job in jobs}
        self.seed = seed
        self.max_length = max_length
        self.alpha = float(torch.tensor(config.alpha, dtype=torch.float32, device="cpu"))
        self.can_end_early = bool(eos) or self.law.stops
        device = engine.device
        self.seed_tensor = torch.tensor([as_int64(seed)], dtype=torch.int64, device=device)
        self.eos_ids = frozenset(eos)
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self.length_term = torch.from_numpy(reference.length_table(self.law)).to(device)
        self.stop = stop
        self.stop_next = None if stop is None else torch.from_numpy(stop.table).to(device)
        self.capture = capture
        self.active: list[Counts] = []  # of the chain in each active slot

    def results(self, bar) -> Iterator[PowerResult]:
        """Each result as soon as its chain has stopped. bar: a ProgressBar or None."""
        self.begin()
        started = time.perf_counter()
        retired = 0 if bar is None else bar.tokens
        known = sum(self.seconds.values())
        free = list(range(self.plan.slots))
        try:
            while self.admit(free):
                self.widen()
                free = []
                while not free:
                    for _ in range(self.poll.every):
                        self.step()
                    seen = self.poll.look(self.state, len(self.active))
                    if seen is None:
                        continue
                    free = seen.stopped
                    if bar is not None:
                        bar.advance_to(retired + seen.fed)
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
            self.recordings = None  # whoever keeps an exception would keep their memory
            self.engine.end()

    def begin(self) -> None:
        config, plan = self.config, self.plan
        try:
            self.engine.begin(
                chains=plan.slots,
                lanes=plan.lanes,
                max_length=self.max_length,
                alpha=self.alpha,
                beta=config.beta,
                seed=self.seed,
                entropy=self.law.needs_entropy,
            )
            self.state = ChainState.allocate(plan.slots, plan.lanes, self.law, self.engine.device)
            self.poll = Poll(self.engine.device, plan.slots)
            self.requests = RequestLog(plan.rows, self.law, eos=self.eos_ids)
            self.new_layout()
        except EngineBusyError:
            raise
        except BaseException:
            self.engine.end()
            raise

    def new_layout(self) -> None:
        """The tensors of the state are new: forget views of the old ones and what was recorded with them."""
        self.views: dict[int, ChainState] = {}
        self.recordings = None  # first, so that its memory is free
        self.recordings = CapturedSteps(captured.recorder(self.engine.device)) if self.capture else None

    # -- a step

    def step(self) -> None:
        """Feed every lane of the active slots once."""
        report, clock = self.report, time.perf_counter
        report.decode_steps += 1
        row_steps = self.plan.rows
        if self.recordings is None:
            state = self.view(len(self.active))
            self.tell(state)
            start = clock()
            sampled = self.engine.step(state)
            seconds = forward = clock() - start
            fed = state.chains * state.lanes
            if self.reports:
                reported = self.engine.step_report()
                fed, forward = reported.fed, reported.forward_seconds
                self.count(reported)
            elif sampled.status.dim() == 2:
                fed = int((sampled.status != Status.PENDING).sum())
            if sampled.status.dim() == 2:
                row_steps = fed
            self.seconds["forward"] += forward
            self.seconds["sample"] += seconds - forward
            report.lane_steps += fed
            report.sequential += fed > 0
            self.advance(state, sampled)
        else:
            # Slots behind the active ones may be fed: their lanes are idle. So few numbers of rows are recorded.
            state = self.view(_rounded(len(self.active), self.state.chains))
            report.lane_steps += state.chains * state.lanes
            report.sequential += 1
            self.tell(state)
            start = clock()
            key = self.engine.prepare(state)
            report.replays += self.recordings.run(
                (state.chains, key), lambda: self.advance(state, self.engine.decode(state, key))
            )
            self.seconds["replay"] += clock() - start
            report.captured = self.capture = self.recordings.work
        report.row_steps += row_steps

    def count(self, reported: StepReport) -> None:
        """What a step cost, to the chains it was for."""
        for lane in reported.recalled:
            self.active[lane // self.state.lanes].recalled += 1
        for name, by_lane in (
            ("prefill", reported.prefilled),
            ("recomputed", reported.recomputed),
            ("cached", reported.cached),
            ("undelivered", reported.undelivered),
        ):
            for lane, tokens in by_lane.items():
                slot = lane // self.state.lanes
                if slot < len(self.active):  # else its chain has gone
                    setattr(self.active[slot], name, getattr(self.active[slot], name) + tokens)

    def advance(self, state: ChainState, sampled: Sampled) -> None:
        """Hand the draws to the chains, and move the KV that their decisions ask for.

        Part of every recording: nothing here looks at a tensor.
        """
        clock = time.perf_counter
        start = clock()
        pk.mh_advance(
            state, self.law, self.length_term, self.seed_tensor, self.eos,
            sampled.token, sampled.logq, sampled.weight, sampled.status, sampled.entropy, self.stop_next,
        )  # fmt: skip
        advanced = clock()
        self.engine.transfer(state.commit_range, state.open_range)
        self.seconds["advance"] += advanced - start
        self.seconds["transfer"] += clock() - advanced

    def view(self, chains: int) -> ChainState:
        """The state of the first slots; always the same tensors, as a recording needs them."""
        if chains not in self.views:
            self.views[chains] = self.state.first(chains)
        return self.views[chains]

    def tell(self, state: ChainState) -> None:
        """An engine that keeps requests hears what has changed."""
        if self.keeps_requests:
            start = time.perf_counter()
            opened, ended = self.requests.news(state)
            if opened or ended:
                self.engine.requests(opened, ended)
            self.seconds["transfer"] += time.perf_counter() - start

    # -- the slots

    def admit(self, free: list[int]) -> int:
        """Give free slots to the jobs that wait; where none does, close up. Returns how many chains are active now.

        free: ascending, active slots whose chains have stopped, or all slots when a run begins.
        """
        jobs = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
        slots, empty = free[: len(jobs)], free[len(jobs) :]
        self.forget(free)
        # Last slot first, so that the chain that moves into a free slot is one that still runs.
        for slot in reversed(empty):
            self.close_up(slot)
        if jobs:
            start = time.perf_counter()
            prefilled = self.engine.prefill(slots, [job.prompt for job in jobs])
            self.seconds["prefill"] += time.perf_counter() - start
            self.state.admit_all(
                slots, [j.prompt for j in jobs], [j.chain_id for j in jobs], [j.prompt_id for j in jobs]
            )
            for slot, tokens in zip(slots, prefilled, strict=True):
                self.active[slot : slot + 1] = [Counts(prefill=tokens)]
                self.poll.changed(slot)
            state = self.view(len(self.active))
            self.advance(state, self.nothing_sampled(state))  # opens the new chains, leaves the others as they are
        return len(self.active)

    def close_up(self, slot: int) -> None:
        """The last active chain moves into a slot whose own has stopped. Does nothing behind the active slots."""
        last = len(self.active) - 1
        if slot > last:
            return
        if slot < last:
            self.forget([last])
            self.state.move(last, slot)
            self.engine.move(last, slot)
            self.active[slot] = self.active[last]
        self.state.retire(last)
        self.active.pop()
        self.poll.changed(slot)
        self.poll.changed(last)

    def forget(self, slots: list[int]) -> None:
        """What an engine holds for the lanes of these slots has ended."""
        if self.keeps_requests:
            ended = self.requests.forget(slots, self.state.lanes)
            if ended:
                self.engine.requests([], ended)

    def widen(self) -> None:
        """Give the rows of slots that nobody waits for to the chains that still run. They stay what they are."""
        active = len(self.active)
        if self.waiting or not self.widens:
            return
        fed = active if self.recordings is None else _rounded(active, self.state.chains)
        lanes = self.state.lanes
        if self.plan.lanes_for(fed, lanes) > lanes:  # else nobody need wait for the device
            (field,) = on_host([self.state.field[:active]])
            lanes = self.plan.lanes_for(fed, lanes, most=lanes + _steps_left(field, self.law))
        if lanes == self.state.lanes:
            return
        chains = self.plan.rows // lanes
        self.forget(list(range(active)))
        self.engine.widen(chains, lanes)
        self.state = self.state.widened(chains, lanes)
        self.new_layout()
        self.report.widened += 1
        state = self.view(active)
        self.advance(state, self.nothing_sampled(state))  # opens the new lanes

    def nothing_sampled(self, state: ChainState) -> Sampled:
        rows, device = state.lane_field.shape[0], self.engine.device
        values = torch.zeros(rows, dtype=torch.float32, device=device)
        token = torch.zeros(rows, dtype=torch.int64, device=device)
        pending = torch.full((rows,), Status.PENDING, dtype=torch.int32, device=device)
        return Sampled(token, values, values, pending, entropy=values if self.law.needs_entropy else None)

    def retire(self, slots: list[int]) -> list[PowerResult]:
        """What the chains in these slots have come to. The slots stay as they are until `admit`."""
        results = read_results(
            self.state,
            slots,
            alpha=self.alpha,
            law=self.law,
            can_end_early=self.can_end_early,
            eos=self.eos_ids,
            stop=self.stop,
            counts=[self.active[slot] for slot in slots],
            tokenizer=self.tokenizer,
            prompts=self.prompts,
        )
        for cost in (result.cost for result in results):
            self.report.drawn += cost.extension + cost.proposal
            self.report.useful_lane_steps += cost.extension + cost.proposal - cost.recalled
        return results


def _steps_left(field: np.ndarray, law: Law) -> int:
    """The most Metropolis-Hastings steps that one of these chains has not opened yet.

    More new lanes than that have nothing to do unless a change voids steps that were opened, and a new layout costs a
    copy of the lanes, on a device also a step that is not replayed and a recording.
    """
    left = 0
    for row in field:
        mode = row[ChainField.MODE]
        if mode in (Mode.START, Mode.EXTEND, Mode.PROPOSE):
            stages = law.stages - row[ChainField.STAGE] + (mode == Mode.EXTEND)
            later = 0 if row[ChainField.FINAL] else stages * law.mcmc_steps + law.final_steps
            now = row[ChainField.LAST] - row[ChainField.OPENED] + 1 if mode == Mode.PROPOSE else 0
            left = max(left, int(now + later))
    return left


def _rounded(chains: int, slots: int) -> int:
    """The next power of two, or all slots."""
    return min(1 << (chains - 1).bit_length(), slots)
