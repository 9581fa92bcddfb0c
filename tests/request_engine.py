"""Engines that keep requests and no KV rows, as a serving stack does, written from what `driver/engine.py` says.

A request is a prompt and the tokens of an answer so far; its next token is drawn from what the whole of it gives. The
requests know nothing of ranges, positions or other lanes, and some are not ready when they are asked (PENDING).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """prompt, tokens: what the next token is drawn after. name: what it was opened as."""

    prompt: tuple[int, ...]
    tokens: list[int]
    name: object


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
            asked = [self.live[lane] for lane in ready]
            logits = np.stack([self.logits(request.prompt, tuple(request.tokens)) for request in asked])
            drawn = pk.sample_tokens(
                torch.from_numpy(logits.astype(np.float32)).to(self.device),
                torch.full((len(ready),), self.alpha, device=self.device),
                torch.full((len(ready),), self.beta, device=self.device),
                self.seed,
                torch.tensor([counter[lane] for lane in ready], dtype=torch.int32, device=self.device),
                torch.tensor([exclude[lane] for lane in ready], device=self.device),
                return_entropy=self.entropy,
            )
            token[ready], logq[ready], weight[ready] = drawn.token.cpu(), drawn.logq.cpu(), drawn.weight.cpu()
            status[ready] = drawn.status.cpu()
            if self.entropy:
                entropy[ready] = drawn.entropy.cpu()
            for request, new in zip(asked, drawn.token.tolist(), strict=True):
                request.tokens.append(new)
        parts = [part.to(self.device) for part in (token, logq, weight, status)]
        return Sampled(*parts, entropy=entropy.to(self.device) if self.entropy else None)


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
        counter, exclude = {}, {}
        for lane, request in self.live.items():
            position = len(request.tokens)
            assert position < request.name.horizon, "more is asked than was said"
            counter[lane] = request.name.counter(position)
            exclude[lane] = request.name.exclude if position == len(request.name.tokens) else -1
        return self.answer(state.chains * state.lanes, counter, exclude)


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
