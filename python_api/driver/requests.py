"""Which lane asks for what, as lists on the host, for engines that keep requests (`RequestEngine`).

A request is a lane and the EPOCH under which it runs. What an engine holds is compared with what the lanes say now:
those that run under another EPOCH, or do not run, have ended; those that run and are not held have been opened.
"""

from __future__ import annotations

import numpy as np

from power_kernels.api.driver.engine import Ended, Opened
from power_kernels.api.driver.host import on_host
from power_kernels.state import ChainField, ChainState, LaneField, LaneStatus

_NONE = -1  # the EPOCH of a lane that has no request


class RequestLog:
    """The requests of one run that its engine holds. rows: lanes of all slots."""

    def __init__(self, rows: int):
        self._epoch = np.full(rows, _NONE, np.int64)  # of the request that the engine holds for each lane
        self._request = np.zeros(rows, np.int64)  # and its number
        self._opened = 0

    def news(self, state: ChainState) -> tuple[list[Opened], list[Ended]]:
        """What the engine must be told before it steps on this state, that of the first slots."""
        field, lane_field, token = on_host([state.field, state.lane_field, state.token])
        runs = lane_field[:, LaneField.STATUS] == LaneStatus.RUNNING
        now, held = np.where(runs, lane_field[:, LaneField.EPOCH], _NONE), self._epoch[: len(runs)]
        changed = now != held
        ended = self._ended(changed & (held != _NONE))
        opened = []
        for lane in np.flatnonzero(changed & runs).tolist():
            chain, of_lane = lane // state.lanes, lane_field[lane].tolist()
            position, divergence = of_lane[LaneField.POSITION], of_lane[LaneField.DIVERGENCE]
            tokens = token[chain, : min(position, divergence)].tolist()
            if position > divergence:  # it was moved in the middle
                tokens += state.lane_token[lane, divergence:position].tolist()
            self._request[lane] = self._opened
            self._opened += 1
            opened.append(
                Opened(
                    lane,
                    self._opened - 1,
                    tokens,
                    horizon=int(field[chain, ChainField.HORIZON]),
                    serial=of_lane[LaneField.SERIAL],
                    chain_id=int(field[chain, ChainField.CHAIN_ID]),
                    prompt_id=int(field[chain, ChainField.PROMPT_ID]),
                    exclude=of_lane[LaneField.EXCLUDE] if position == divergence else -1,
                )
            )
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
