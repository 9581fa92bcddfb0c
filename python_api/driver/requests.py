"""Which lane asks for what, as lists on the host, for engines that keep requests (`RequestEngine`).

A request is a lane and the EPOCH under which it runs. What an engine holds is compared with what the lanes say now:
those that run under another EPOCH, or do not run, have ended; those that run and are not held have been opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from power_kernels.api.driver.engine import THETA_SLACK, Ended, Opened
from power_kernels.api.driver.host import on_host
from power_kernels.law import Law
from power_kernels.state import ChainField, ChainState, LaneField, LaneStatus, Mode

_NONE = -1  # the EPOCH of a lane that has no request


class _Host(NamedTuple):
    """What `news` reads of a state, as arrays."""

    field: np.ndarray
    lane_field: np.ndarray
    token: np.ndarray
    cumw: np.ndarray
    cumz: np.ndarray
    lane_theta: np.ndarray


class RequestLog:
    """The requests of one run that its engine holds.

    rows: lanes of all slots. eos: the tokens that end an answer.
    """

    def __init__(self, rows: int, law: Law, *, eos: Iterable[int]):
        self._law, self._eos = law, tuple(sorted(eos))
        self._epoch = np.full(rows, _NONE, np.int64)  # of the request that the engine holds for each lane
        self._request = np.zeros(rows, np.int64)  # and its number
        self._opened = 0

    def news(self, state: ChainState) -> tuple[list[Opened], list[Ended]]:
        """What the engine must be told before it steps on this state, that of the first slots."""
        host = _Host(*on_host([getattr(state, name) for name in _Host._fields]))
        runs = host.lane_field[:, LaneField.STATUS] == LaneStatus.RUNNING
        now, held = np.where(runs, host.lane_field[:, LaneField.EPOCH], _NONE), self._epoch[: len(runs)]
        changed = now != held
        ended = self._ended(changed & (held != _NONE))
        opened = [self._open(state, host, lane) for lane in np.flatnonzero(changed & runs).tolist()]
        held[:] = now
        return opened, ended

    def forget(self, slots: list[int], lanes: int) -> list[Ended]:
        """What slots of so many lanes held has ended, whatever the state says of them."""
        mine = np.zeros(len(self._epoch), bool)
        for slot in slots:
            mine[slot * lanes : (slot + 1) * lanes] = True
        mine &= self._epoch != _NONE
        ended = self._ended(mine)
        self._epoch[mine] = _NONE
        return ended

    def _ended(self, lanes: np.ndarray) -> list[Ended]:
        return [Ended(lane, int(self._request[lane])) for lane in np.flatnonzero(lanes).tolist()]

    def _open(self, state: ChainState, host: _Host, lane: int) -> Opened:
        chain = lane // state.lanes
        of_chain, of_lane = host.field[chain].tolist(), host.lane_field[lane].tolist()
        position, divergence = of_lane[LaneField.POSITION], of_lane[LaneField.DIVERGENCE]
        tokens = host.token[chain, : min(position, divergence)].tolist()
        own = position > divergence  # it was moved in the middle
        if own:
            tokens += state.lane_token[lane, divergence:position].tolist()
        proposal = of_chain[ChainField.MODE] == Mode.PROPOSE
        capped = self._law.karan_du and proposal
        horizon, theta = of_chain[ChainField.LENGTH if capped else ChainField.HORIZON], -math.inf
        if position < divergence:  # a forwarded prefix: the chain's token takes the place of each one drawn
            horizon = position + 1
        elif self._law.early_rejection and proposal:
            theta = float(host.lane_theta[lane])
            if self._law.diverges:
                z = float(state.lane_cumz[lane, position] if own else host.cumz[chain, position])
                # The chain's test has log Z in the place of log n. Z only grows, and log n is at most log horizon.
                theta += (math.log(z) if z > 0 else -math.inf) - math.log(horizon)
            theta -= THETA_SLACK * (1 + abs(theta))
        self._request[lane] = self._opened
        self._opened += 1
        return Opened(
            lane,
            self._opened - 1,
            tokens,
            horizon=horizon,
            serial=of_lane[LaneField.SERIAL],
            chain_id=of_chain[ChainField.CHAIN_ID],
            prompt_id=of_chain[ChainField.PROMPT_ID],
            exclude=of_lane[LaneField.EXCLUDE] if position == divergence else -1,
            cumw=float(state.lane_cumw[lane, position] if own else host.cumw[chain, position]),
            theta=theta,
            length_bonus=float(self._law.length_bonus),
            eos=self._eos,
            stops=self._law.stops,
        )
