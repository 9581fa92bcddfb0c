"""The chain of one request, apart from vLLM: what to ask of the model, and what the answers come to.

    asked -> the engine draws -> heard, one piece after the other -> advance -> asked and dropped, or done

An `Ask` is an ordinary request of a serving stack: the prompt and some tokens of an answer, to be continued. It ends by
itself, at its horizon, at a token that ends an answer, or where the worker sees that the proposal cannot be accepted
any more; a stop string ends it here. What it brought is handed to `mh_advance` whole, as a run of draws; the chain
decides, and says what to ask next and what has become void.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

import power_kernels as pk
from power_kernels import reference
from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.engine import Opened
from power_kernels.api.driver.requests import RequestLog
from power_kernels.api.driver.results import Counts, PowerResult, read_results
from power_kernels.api.driver.stop import StopStrings
from power_kernels.api.engines.serving.draws import Draws, draws_of, rest_of, sampled
from power_kernels.rng import as_int64
from power_kernels.state import ChainField, ChainState, LaneField, LaneStatus, Mode

_STOPPED = (Mode.DONE, Mode.FAULT)


@dataclass
class Ask:
    """One request to the model. number: another for each of a chain. opened: what it is, with the tokens and the W that
    it begins with. token, values, flags: what has been drawn since; values float32 [n, 3]: logq, weight, entropy.
    complete: whether nothing more is to come. stop_state: of the stop automaton, after all tokens."""

    number: int
    opened: Opened
    stop_state: int = 0
    token: list[int] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    flags: list[np.ndarray] = field(default_factory=list)
    complete: bool = False

    def draws(self) -> Draws:
        opened = self.opened
        values, flags = np.concatenate(self.values), np.concatenate(self.flags)
        return draws_of(opened, len(opened.tokens), opened.cumw, self.token, values, flags)


class News(NamedTuple):
    """What a chain wants now. dropped: the numbers of requests that it does not want any more."""

    asked: list[Ask]
    dropped: list[int]


class Progress(NamedTuple):
    """stage: 1, 2, ... steps: Metropolis-Hastings steps that are settled. tokens: of the current answer. log_weight: W
    of it, in nats."""

    stage: int
    steps: int
    tokens: int
    log_weight: float


class Chain:
    """prompt: token ids. eos: the tokens that end an answer. stop: the stop strings of the config, None without any.

    Same seed, same chain: what `PowerSampler` draws for the prompt and chain of these numbers.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        config: PowerConfig,
        *,
        seed: int,
        eos: Collection[int],
        stop: StopStrings | None = None,
        vocab_size: int,
        chain_id: int = 0,
        prompt_id: int = 0,
    ):
        self.config, self.law, self.seed = config, config.law, as_int64(seed)
        self.lanes = config.lanes or 1
        self.alpha = float(np.float32(config.alpha))
        self.counts = Counts()
        self._prompt, self._prompt_id, self._vocab_size = list(prompt), prompt_id, vocab_size
        self._eos = tuple(sorted(eos))
        self._stop = stop
        self._arguments = (
            torch.from_numpy(reference.length_table(self.law)),
            torch.tensor([self.seed], dtype=torch.int64),
            torch.tensor(self._eos, dtype=torch.int64),
        )
        self._stop_next = None if stop is None else torch.from_numpy(stop.table)
        self._state = ChainState.allocate(1, self.lanes, self.law)
        self._state.admit(0, self._prompt, chain_id, prompt_id)
        self._log = RequestLog(self.lanes, self.law, eos=self._eos)
        self._asks: dict[int, Ask] = {}  # by lane
        self._lane_of: dict[int, int] = {}  # by number
        self._asked = 0

    @property
    def done(self) -> bool:
        return int(self._state.field[0, ChainField.MODE]) in _STOPPED

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a request: those that end an answer, or one that is asked again where it was drawn."""
        return self._eos or (self._vocab_size - 1,)

    def start(self) -> list[Ask]:
        return self._advance([]).asked

    def heard(self, number: int, token: Sequence[int], values: np.ndarray, flags: np.ndarray, *, ended: bool) -> bool:
        """The engine has drawn more for a request. Returns whether that completes it.

        values [n, 3], flags [n]: of `power_kernels.sample_slots`. ended: the engine draws no more for it by itself.
        What has been dropped is not heard any more.
        """
        ask = self._asks[self._lane_of[number]]
        ask.token += token
        ask.values.append(values)
        ask.flags.append(flags)
        ask.complete = ended
        if self._stop is not None:
            for value in token:
                ask.stop_state = int(self._stop.table[ask.stop_state, value])
                if ask.stop_state < 0:
                    ask.complete = True
                    break
        return ask.complete

    def advance(self) -> News:
        """Hand what is complete to the chain."""
        return self._advance([ask for ask in self._asks.values() if ask.complete])

    def progress(self) -> Progress:
        state = self._state
        row = state.field[0].tolist()
        open_serials = [
            lane[LaneField.SERIAL] for lane in state.lane_field.tolist() if lane[LaneField.STATUS] != LaneStatus.IDLE
        ]
        if row[ChainField.MODE] != Mode.PROPOSE:
            open_serials = []
        return Progress(
            stage=row[ChainField.STAGE],
            steps=min(open_serials, default=row[ChainField.OPENED]) - 1,
            tokens=row[ChainField.LENGTH],
            log_weight=float(state.cumw[0, row[ChainField.LENGTH]]),
        )

    def result(self) -> PowerResult:
        """Of a chain that is done. Without a text, which is the front end's business."""
        (result,) = read_results(
            self._state, [0], alpha=self.alpha, law=self.law, can_end_early=bool(self._eos) or self.law.stops,
            eos=frozenset(self._eos), stop=self._stop, counts=[self.counts], tokenizer=None,
            prompts={self._prompt_id: self._prompt},
        )  # fmt: skip
        return result

    def _advance(self, complete: list[Ask]) -> News:
        drawn = {ask.opened.lane: ask.draws() for ask in complete}
        given = sampled(drawn, self.lanes, entropy=self.law.needs_entropy)
        pk.mh_advance(
            self._state, self.law, *self._arguments,
            given.token, given.logq, given.weight, given.status, given.entropy, self._stop_next,
        )  # fmt: skip
        opened, ended = self._log.news(self._state)
        over = {lane for lane, _ in ended}
        dropped, asked = [], []
        for lane in over:
            ask = self._forget(lane)
            if not ask.complete:
                dropped.append(ask.number)
        for ask in complete:
            draws = drawn[ask.opened.lane]
            if ask.opened.lane in over:
                continue
            if not draws.believed:
                raise RuntimeError(f"the worker rejected proposal {ask.opened.serial}, and the chain does not")
            # It has ended and its lane has not: it drew the token that ends requests, where nothing else does.
            self._forget(ask.opened.lane)
            asked.append(self._ask(rest_of(ask.opened, ask.opened.tokens + draws.token, draws.cumw), ask.stop_state))
        for one in opened:
            at = 0 if self._stop is None else int(self._state.stop_state[0, len(one.tokens)])
            asked.append(self._ask(one, at))
        return News(asked, dropped)

    def _ask(self, opened: Opened, stop_state: int) -> Ask:
        self._asked += 1
        ask = Ask(self._asked, opened, stop_state)
        self._asks[opened.lane] = ask
        self._lane_of[ask.number] = opened.lane
        return ask

    def _forget(self, lane: int) -> Ask:
        ask = self._asks.pop(lane)
        del self._lane_of[ask.number]
        return ask
