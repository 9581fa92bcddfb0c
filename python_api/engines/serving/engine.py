"""The driver's engine over a stack that serves requests: every extension and every proposal is one of them.

A lane that starts is a request whose prompt is the chain's prompt and the answer so far; the stack's prefix cache finds
what it has of them. The draws are made in the stack's workers (`power_kernels.sample_slots`). A request that its worker
rejects early, or that meets EOS, ends by itself; one that an acceptance made void is aborted. Which proposals are
accepted is decided here, by the same `mh_advance` as elsewhere, on the CPU: what a worker decides saves work and
nothing else. How a stack is asked, and how it answers, is left to `VllmEngine` and `SglangEngine`.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from power_kernels.api.driver.engine import Ended, EngineBusyError, Opened, Sampled, StepReport
from power_kernels.api.engines.serving.draws import Draws, draws_of, rest_of, sampled
from power_kernels.api.engines.serving.proposal import Proposal, proposal_of
from power_kernels.rng import as_int64
from power_kernels.state import ChainState, Status


@dataclass(frozen=True)
class Reply:
    """What a stack has said of a request since its last reply.

    token, values float32 [n, 3], flags int64 [n]: of `power_kernels.sample_slots`. prompt: tokens of the request's
    prompt, 0 where an aborted request's are not told; cached: those that a prefix cache had. finished: no more will
    come.
    """

    token: Sequence[int]
    values: np.ndarray
    flags: np.ndarray
    prompt: int
    cached: int
    finished: bool


@dataclass(frozen=True)
class Progress:
    """What a stack has said in all of a request that is on. prompt, cached: as in `Reply`. drawn: tokens."""

    prompt: int
    cached: int
    drawn: int


@dataclass
class _Request:
    """What a lane has asked of the stack.

    tokens: of the answer, those that were delivered included; cumw: the running sum of their weights. arrived:
    something of it has come. ended: the stack has nothing more to say of it.
    """

    opened: Opened
    name: str
    tokens: list[int]
    cumw: float
    arrived: bool = False
    ended: bool = False


@dataclass
class _Leaving:
    """A request that was aborted and of which a last reply comes. lane: that it was of. arrived: as in `_Request`."""

    lane: int
    arrived: bool


@dataclass
class _Account:
    """Tokens by lane, of the last step."""

    prefilled: Counter = field(default_factory=Counter)
    recomputed: Counter = field(default_factory=Counter)
    cached: Counter = field(default_factory=Counter)
    undelivered: Counter = field(default_factory=Counter)
    drawn: int = 0
    forward_seconds: float = 0.0

    def move(self, source: int, target: int, lanes: int) -> None:
        """What was counted for a slot's lanes goes with its chain."""
        for counts in (self.prefilled, self.recomputed, self.cached, self.undelivered):
            for lane in range(lanes):
                counts[target * lanes + lane] = counts.pop(source * lanes + lane, 0)


class ServedEngine(ABC):
    """A `RequestEngine` over a stack. Who inherits sets vocab_size, max_context, dtype, eos_token_ids and
    most_requests, and says how to ask, to abort and to listen."""

    device = torch.device("cpu")  # of the chains: the stack's processes have the model
    vocab_size: int
    max_context: int
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    most_requests: int
    _replies_to_aborted = False  # whether a last reply comes of a request that was aborted; else `_progress` is asked
    _running = False
    _named = 0

    # -- the stack

    @abstractmethod
    def _check_idle(self) -> None:
        """Raise EngineBusyError where the stack has other requests, whose answers would be lost."""

    @abstractmethod
    def _ask(self, name: str, prompt: list[int], proposal: Proposal, *, ends: Sequence[int], pieces: bool) -> None:
        """Start a request. ends: the tokens that end it. pieces: its draws are wanted as they are made, not the whole
        at its end. Entropies where `self._entropy` says so."""

    @abstractmethod
    def _abort(self, names: list[str]) -> None:
        """End these requests, of which nothing more is wanted."""

    @abstractmethod
    def _replies(self) -> Iterable[tuple[str, Reply]]:
        """Let the stack work, and return what it has said since, by the request's name; possibly nothing yet."""

    def _progress(self, name: str) -> Progress | None:
        """Of a request that is about to be aborted; None where nothing is known of it yet."""
        return None

    # -- the protocol

    def begin(
        self, *, chains: int, lanes: int, max_length: int, alpha: float, beta: float, seed: int, entropy: bool = False
    ) -> None:
        if self._running:
            raise EngineBusyError("a run of this engine is on; exhaust that stream or close() it first")
        self._check_idle()
        self._running = True
        self._lanes, self._alpha, self._beta, self._entropy = lanes, alpha, beta, entropy
        self._seed = as_int64(seed)
        self._prompts: dict[int, list[int]] = {}
        self._live: dict[int, _Request] = {}  # by lane
        self._lane_of: dict[str, int] = {}  # by the request's name
        self._leaving: dict[str, _Leaving] = {}  # by the request's name
        self._runs: dict[int, Draws] = {}  # what has arrived and was not delivered
        self._fresh: set[int] = set()  # slots of whose prompt nothing has gone through the model
        self._account = _Account()
        self._report: StepReport | None = None

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> list[int]:
        for slot, prompt in zip(slots, prompts, strict=True):
            self._prompts[slot] = list(prompt)
            self._fresh.add(slot)
            self._leave_uncounted(slot)  # of the chain that had the slot
        return [0] * len(slots)  # a request's reply tells what went through the model (`step_report`)

    def transfer(self, commit_range: torch.Tensor, open_range: torch.Tensor) -> None:
        return

    def move(self, source: int, target: int) -> None:
        self._prompts[target] = self._prompts.pop(source)
        self._account.move(source, target, self._lanes)
        self._leave_uncounted(target)
        for leaving in self._leaving.values():
            if leaving.lane // self._lanes == source:
                leaving.lane += (target - source) * self._lanes
        self._fresh.discard(target)
        if source in self._fresh:
            self._fresh.remove(source)
            self._fresh.add(target)

    def requests(self, opened: list[Opened], ended: list[Ended]) -> None:
        self._forget([lane for lane, _ in ended])
        for one in opened:
            self._submit(one.lane, one)

    def step(self, state: ChainState) -> Sampled:
        while self._live and not self._runs:
            for lane, request in list(self._live.items()):
                if request.ended:
                    self._go_on(lane, request)
            start = time.perf_counter()
            replies = self._replies()
            self._account.forward_seconds += time.perf_counter() - start
            self._receive(replies)
        runs, self._runs = self._runs, {}
        self._account.drawn += sum(len(run.token) for run in runs.values())
        self._report, self._account = self._reported(), _Account()
        return sampled(runs, state.chains * state.lanes, entropy=self._entropy)

    def step_report(self) -> StepReport:
        return self._report

    def end(self) -> None:
        if self._running:
            self._forget(list(self._live))
            self._running = False

    # -- requests

    def _submit(self, lane: int, opened: Opened) -> None:
        """Ask for the rest of a lane's answer."""
        prompt = self._prompts[lane // self._lanes]
        ends = opened.eos or (self.vocab_size - 1,)  # a request needs a token that ends it
        proposal = proposal_of(opened, len(prompt), self._alpha, self._beta, self._seed, stop_token=ends[0])
        self._named += 1
        name = f"power-{self._named:012d}"  # none begins with another: SGLang aborts all that begin with a name
        self._lane_of[name] = lane
        self._live[lane] = _Request(opened, name, opened.tokens, opened.cumw)
        self._ask(name, prompt + opened.tokens, proposal, ends=ends, pieces=opened.stops)

    def _go_on(self, lane: int, request: _Request) -> None:
        """A request has ended and its lane has not: it drew the token that ends requests, where nothing else does."""
        del self._live[lane]
        rest = rest_of(request.opened, request.tokens, request.cumw)
        self._submit(lane, rest._replace(theta=-math.inf))

    def _forget(self, lanes: list[int]) -> None:
        abort = []
        for lane in lanes:
            request = self._live.pop(lane)
            self._runs.pop(lane, None)
            if not request.ended:
                del self._lane_of[request.name]
                if self._replies_to_aborted:
                    self._leaving[request.name] = _Leaving(lane, request.arrived)
                else:
                    self._note_undelivered(lane, request)
                abort.append(request.name)
        if abort:
            self._abort(abort)

    # -- replies

    def _receive(self, replies: Iterable[tuple[str, Reply]]) -> None:
        for name, reply in replies:
            if name in self._leaving:
                self._note_leaving(name, reply)
            lane = self._lane_of.get(name)
            if lane is None:
                continue  # it was aborted when this was on its way
            request = self._live[lane]
            if not request.arrived:
                request.arrived = True
                self._note_prompt(lane, reply.prompt, reply.cached)
            if reply.finished:
                request.ended = True
                del self._lane_of[name]
            if len(reply.token):
                self._take(lane, request, reply)

    def _take(self, lane: int, request: _Request, reply: Reply) -> None:
        """What a request has drawn since its last reply, for the lane."""
        draws = draws_of(request.opened, len(request.tokens), request.cumw, reply.token, reply.values, reply.flags)
        if draws.token:
            self._runs[lane] = draws
            request.tokens = request.tokens + draws.token
            request.cumw = draws.cumw

    # -- what it cost

    def _note_prompt(self, lane: int, prompt: int, cached: int) -> None:
        """Of a request's prompt, `cached` tokens were in the prefix cache; of the others the last one gave its first
        draw, and is counted with it."""
        slot = lane // self._lanes
        where = self._account.prefilled if slot in self._fresh else self._account.recomputed
        self._fresh.discard(slot)
        where[lane] += prompt - cached - 1
        self._account.cached[lane] += cached

    def _note_undelivered(self, lane: int, request: _Request) -> None:
        """What the stack has said of a request that is about to be aborted: its tokens were drawn in vain."""
        progress = self._progress(request.name)
        if progress is None:
            return
        if not request.arrived:
            self._note_prompt(lane, progress.prompt, progress.cached)
        delivered = len(request.tokens) - len(request.opened.tokens)
        self._account.undelivered[lane] += max(0, progress.drawn - delivered)

    def _note_leaving(self, name: str, reply: Reply) -> None:
        """What a request drew in vain, as a reply says that was on its way when it was aborted."""
        leaving = self._leaving[name]
        if len(reply.token) and reply.prompt and not leaving.arrived:
            leaving.arrived = True
            self._note_prompt(leaving.lane, reply.prompt, reply.cached)
        self._account.undelivered[leaving.lane] += len(reply.token)
        if reply.finished:
            del self._leaving[name]

    def _leave_uncounted(self, slot: int) -> None:
        """What still comes of requests of this slot would be counted for another chain."""
        for name in [name for name, leaving in self._leaving.items() if leaving.lane // self._lanes == slot]:
            del self._leaving[name]

    def _reported(self) -> StepReport:
        account = self._account
        return StepReport(
            fed=account.drawn,
            recalled=(),
            forward_seconds=account.forward_seconds,
            prefilled=account.prefilled,
            recomputed=account.recomputed,
            cached=account.cached,
            undelivered=account.undelivered,
        )

    # -- is it ours

    def _self_test(self, advice: str) -> None:
        """One draw from p itself: its weight is 0, and its flags are 0, which a stack's own sampler does not answer.

        Raises RuntimeError, with advice, where the workers do not have our sampler.
        """
        self.begin(chains=1, lanes=1, max_length=2, alpha=1.0, beta=1.0, seed=0)
        try:
            self.prefill([0], [[0]])
            self.requests([_FIRST_DRAW], [])
            while not self._runs and not self._live[0].ended:
                self._receive(self._replies())
            run = self._runs.get(0)
        finally:
            self.end()
        if run is None or run.status[0] != Status.OK or not abs(run.values[0, 1]) < 1e-3:
            raise RuntimeError(f"{advice} One draw gave {run}")


_FIRST_DRAW = Opened(
    lane=0, request=0, tokens=[], horizon=1, serial=0, chain_id=0, prompt_id=0, exclude=-1,
    cumw=0.0, theta=-math.inf, length_bonus=0.0, eos=(), stops=False,
)  # fmt: skip
