"""Engines that keep requests and no KV rows, as a serving stack does, written from what `driver/engine.py` says.

A request is a prompt and the tokens of an answer so far; its next token is drawn from what the whole of it gives. The
requests know nothing of ranges, positions or other lanes, and some are not ready when they are asked (PENDING).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import power_kernels as pk
from power_kernels.api.driver.engine import Ended, EngineBusyError, Opened, Sampled
from power_kernels.rng import as_int64
from power_kernels.state import LaneField, LaneStatus, Status
from tests.devices import DEVICE

Logits = Callable[[tuple[int, ...], tuple[int, ...]], np.ndarray]  # (prompt, tokens of the answer) -> [V]


@dataclass
class Request:
    """prompt, tokens: what the next token is drawn after. name: what it was opened as. weight: their W, if it is
    summed."""

    prompt: tuple[int, ...]
    tokens: list[int]
    name: object
    weight: float | None = None


class RequestKeeper:
    """What both engines below do alike. late: share of the answers that are not there when they are asked for.

    answered: tokens drawn, of all runs. pauses: answers that were PENDING.
    """

    def __init__(self, logits: Logits, vocab: int, *, eos: tuple[int, ...] = (), late: float = 0.3):
        self.logits, self.late = logits, late
        self.device = DEVICE
        self.vocab_size = 16  # prompts may hold any token, answers only the first `vocab`
        self.vocab = vocab
        self.max_context = None
        self.eos_token_ids = eos
        self.answered = self.pauses = 0
        self.running = False

    def begin(
        self, *, chains: int, lanes: int, max_length: int, alpha: float, beta: float, seed: int, entropy: bool = False
    ) -> None:
        if self.running:
            raise EngineBusyError("a run of this engine is on")
        self.running = True
        self.lanes, self.alpha, self.beta, self.entropy = lanes, alpha, beta, entropy
        self.seed = torch.tensor([as_int64(seed)], device=self.device)
        self.prompts: dict[int, tuple[int, ...]] = {}  # by slot
        self.live: dict[int, Request] = {}  # by lane
        self.random = np.random.default_rng(0)

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> list[int]:
        for slot, prompt in zip(slots, prompts, strict=True):
            self.prompts[slot] = tuple(prompt)
        return [len(prompt) - 1 for prompt in prompts]

    def transfer(self, commit_range: torch.Tensor, open_range: torch.Tensor) -> None:
        pass

    def move(self, source: int, target: int) -> None:
        self.prompts[target] = self.prompts.pop(source)

    def widen(self, chains: int, lanes: int) -> None:
        self.lanes = lanes

    def end(self) -> None:
        self.running = False

    def lanes_of(self, slot: int) -> range:
        return range(slot * self.lanes, (slot + 1) * self.lanes)

    def answer(self, rows: int, counter: dict[int, Sequence[int]], exclude: dict[int, int]) -> Sampled:
        """Draw for those of the requests that are ready, of all whose random numbers are given, by lane."""
        ready = [lane for lane in sorted(counter) if self.random.random() >= self.late]
        self.pauses += len(counter) - len(ready)
        self.answered += len(ready)
        token = torch.full((rows,), -1)
        logq, weight, entropy = (torch.full((rows,), float("nan")) for _ in range(3))
        status = torch.full((rows,), Status.PENDING, dtype=torch.int32)
        if ready:
            drawn = self.draw(ready, counter, exclude)
            token[ready], logq[ready], weight[ready] = drawn.token.cpu(), drawn.logq.cpu(), drawn.weight.cpu()
            status[ready] = drawn.status.cpu()
            if self.entropy:
                entropy[ready] = drawn.entropy.cpu()
        parts = [part.to(self.device) for part in (token, logq, weight, status)]
        return Sampled(*parts, entropy=entropy.to(self.device) if self.entropy else None)

    def draw(self, lanes: list[int], counter: dict[int, Sequence[int]], exclude: dict[int, int]) -> pk.SampleOutput:
        """The next token of each of these lanes' requests, which is appended to it."""
        asked = [self.live[lane] for lane in lanes]
        logits = np.stack([self.logits(request.prompt, tuple(request.tokens)) for request in asked])
        drawn = pk.sample_tokens(
            torch.from_numpy(logits.astype(np.float32)).to(self.device),
            torch.full((len(lanes),), self.alpha, device=self.device),
            torch.full((len(lanes),), self.beta, device=self.device),
            self.seed,
            torch.tensor([counter[lane] for lane in lanes], dtype=torch.int32, device=self.device),
            torch.tensor([exclude[lane] for lane in lanes], device=self.device),
            return_entropy=self.entropy,
        )
        for request, new in zip(asked, drawn.token.tolist(), strict=True):
            request.tokens.append(new)
        return drawn


class ToldEngine(RequestKeeper):
    """Is told which requests end and which begin (`RequestEngine`), and never looks at the state."""

    def begin(self, **kwargs) -> None:
        super().begin(**kwargs)
        self.names: set[int] = set()

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> list[int]:
        assert not any(lane in self.live for slot in slots for lane in self.lanes_of(slot)), "a request lives on"
        return super().prefill(slots, prompts)

    def move(self, source: int, target: int) -> None:
        both = (*self.lanes_of(source), *self.lanes_of(target))
        assert not any(lane in self.live for lane in both), "a request lives on"
        super().move(source, target)

    def widen(self, chains: int, lanes: int) -> None:
        assert not self.live, "a request lives on"
        super().widen(chains, lanes)

    def requests(self, opened: list[Opened], ended: list[Ended]) -> None:
        for lane, number in ended:
            assert self.live.pop(lane).name.request == number
        for one in opened:
            assert one.lane not in self.live, "a lane has two requests"
            assert one.request not in self.names, "two requests have one name"
            assert len(one.tokens) < one.horizon
            self.names.add(one.request)
            self.live[one.lane] = Request(self.prompts[one.lane // self.lanes], list(one.tokens), one)

    def step(self, state: pk.ChainState) -> Sampled:
        return self.answer(state.chains * state.lanes, *self.arguments(self.live))

    def arguments(self, lanes: Iterable[int]) -> tuple[dict[int, Sequence[int]], dict[int, int]]:
        """counter and exclude of the next draw of each lane's request."""
        counter, exclude = {}, {}
        for lane in lanes:
            request = self.live[lane]
            position = len(request.tokens)
            assert position < request.name.horizon, "more is asked than was said"
            counter[lane] = request.name.counter(position)
            exclude[lane] = request.name.exclude if position == len(request.name.tokens) else -1
        return counter, exclude


class AheadEngine(ToldEngine):
    """Draws each request by itself, up to some length or its end, and hands over what it has drawn: runs.

    A request ends at its horizon, at an EOS token, or where `Opened` says that its chain will reject it, as a serving
    stack ends it in the process that samples. resumed: requests that were asked for more after they had ended.
    rejected, closed, faulted: requests that ended so before their horizon. longest: draws of a run.
    """

    def __init__(self, *args, longest: int = 6, **kwargs):
        super().__init__(*args, **kwargs)
        self.device = torch.device("cpu")
        self.longest = longest
        self.resumed = self.rejected = self.closed = self.faulted = 0

    def begin(self, **kwargs) -> None:
        super().begin(**kwargs)
        self.done: set[int] = set()  # numbers of the requests that have ended

    def step(self, state: pk.ChainState) -> Sampled:
        left = {
            lane: int(self.random.integers(1, self.longest + 1))
            for lane in sorted(self.live)
            if self.random.random() >= self.late
        }
        self.pauses += len(self.live) - len(left)
        self.resumed += sum(self.live[lane].name.request in self.done for lane in left)
        runs: list[tuple[list[int], pk.SampleOutput]] = []  # the k-th draws of the lanes that have one
        while left:
            lanes = list(left)
            drawn = self.draw(lanes, *self.arguments(lanes))
            runs.append((lanes, drawn))
            self.answered += len(lanes)
            for i, lane in enumerate(lanes):
                left[lane] -= 1
                if self.ends(self.live[lane], drawn, i) or left[lane] == 0:
                    del left[lane]
        return self.packed(state.chains * state.lanes, runs)

    def ends(self, request: Request, drawn: pk.SampleOutput, i: int) -> bool:
        """Whether its last token, draw i of these, ends a request."""
        opened, n = request.name, len(request.tokens)
        closed, faulted = request.tokens[-1] in self.eos_token_ids, int(drawn.status[i]) != Status.OK
        rejected = self.rejects(request, float(drawn.weight[i]), i)
        ends = faulted or closed or rejected or n == opened.horizon
        if ends:
            self.done.add(opened.request)
            self.faulted += faulted
            self.closed += closed and n < opened.horizon
            self.rejected += rejected and not closed and n < opened.horizon
        return ends

    def rejects(self, request: Request, weight: float, i: int) -> bool:
        """Whether its chain will reject a request. weight: of its last token, which was draw i of a batch."""
        opened = request.name
        request.weight = (opened.cumw if request.weight is None else request.weight) + weight
        return opened.rejects(len(request.tokens), request.weight)

    def packed(self, rows: int, runs: list[tuple[list[int], pk.SampleOutput]]) -> Sampled:
        shape = rows, max(len(runs), 1)
        token = torch.full(shape, -1)
        logq, weight, entropy = (torch.full(shape, float("nan")) for _ in range(3))
        status = torch.full(shape, Status.PENDING, dtype=torch.int32)
        for k, (lanes, drawn) in enumerate(runs):
            token[lanes, k], logq[lanes, k], weight[lanes, k] = drawn.token, drawn.logq, drawn.weight
            status[lanes, k] = drawn.status
            if self.entropy:
                entropy[lanes, k] = drawn.entropy
        return Sampled(token, logq, weight, status, entropy=entropy if self.entropy else None)


class LookingEngine(RequestKeeper):
    """Looks at STATUS, EPOCH and POSITION of every lane; where a request starts from, it looks at the tokens."""

    def step(self, state: pk.ChainState) -> Sampled:
        counter, exclude = {}, {}
        for lane, of_lane in enumerate(state.lane_field.tolist()):
            if of_lane[LaneField.STATUS] != LaneStatus.RUNNING:
                continue
            name = self.name(of_lane)
            if lane not in self.live or self.live[lane].name != name:
                self.live[lane] = Request(
                    self.prompts[lane // self.lanes],
                    tokens_before(state, lane, of_lane[LaneField.POSITION], of_lane[LaneField.DIVERGENCE]),
                    name,
                )
            counter[lane], exclude[lane] = state.counter[lane].tolist(), int(state.exclude[lane])
        return self.answer(state.chains * state.lanes, counter, exclude)

    def name(self, of_lane: list[int]) -> object:
        """What a lane's request is known by, from its row of `lane_field`."""
        return of_lane[LaneField.EPOCH]

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> list[int]:
        self.forget(*slots)
        return super().prefill(slots, prompts)

    def move(self, source: int, target: int) -> None:
        self.forget(source, target)
        super().move(source, target)

    def widen(self, chains: int, lanes: int) -> None:
        self.live.clear()
        super().widen(chains, lanes)

    def forget(self, *slots: int) -> None:
        for slot in slots:
            for lane in self.lanes_of(slot):
                self.live.pop(lane, None)


def tokens_before(state: pk.ChainState, lane: int, position: int, divergence: int) -> list[int]:
    """The first `position` tokens of a lane's answer."""
    shared = state.token[lane // state.lanes, : min(position, divergence)].tolist()
    return shared + state.lane_token[lane, divergence:position].tolist()


class SerialWatchingEngine(LookingEngine):
    """Takes another SERIAL or DIVERGENCE for the sign that a lane starts again: wrong, as a test shows."""

    def name(self, of_lane: list[int]) -> object:
        return of_lane[LaneField.SERIAL], of_lane[LaneField.DIVERGENCE]
