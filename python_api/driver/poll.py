"""What the host knows of chains that run on a device: which have stopped, and how many tokens they were fed.

    host    launch launch ... look | launch launch ... look | ...
    device           step step ... copy to the host   step step ... copy

A look on a device starts a copy and returns what the look before it saw, so the device always has the steps between two
looks to work on while the host waits for the older copy. A chain that has stopped stays stopped: old news is true.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from power_kernels.state import ChainField, ChainState, Cost, Mode

_STOPPED = (Mode.DONE, Mode.FAULT)


# Steps between two looks on a device. The lanes of a chain that has stopped are harmless until it is seen.
_EVERY = 8


class Seen(NamedTuple):
    """stopped: slots whose chains have ended, ascending. fed: lane-steps of all chains looked at, so far."""

    stopped: list[int]
    fed: int


class Poll:
    """Looks at the chains of one run. every: steps to make between two looks."""

    def __init__(self, device: torch.device, slots: int):
        self._asynchronous = device.type == "cuda"
        self.every = _EVERY if self._asynchronous else 1
        self._on_host = torch.zeros(slots + 1, dtype=torch.int64, pin_memory=self._asynchronous, device="cpu")
        self._pending: tuple[torch.cuda.Event, int] | None = None  # when it is there, and for how many chains

    def look(self, state: ChainState, chains: int) -> Seen | None:
        """State of the first `chains` slots; None where the first look at them is still under way."""
        mode = state.field[:chains, ChainField.MODE].to(torch.int64)
        fed = state.cost[:chains, Cost.EXTENSION].sum() + state.cost[:chains, Cost.PROPOSAL].sum()
        news = torch.cat([mode, fed[None]])
        if not self._asynchronous:
            return _read(news)
        seen = None
        if self._pending is not None:
            event, looked_at = self._pending
            event.synchronize()
            seen = _read(self._on_host[: looked_at + 1])
        self._on_host[: chains + 1].copy_(news, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(state.field.device))
        self._pending = event, chains
        return seen

    def discard(self) -> None:
        """Slots hold other chains now: what is under way would be about those before."""
        self._pending = None


def _read(news: torch.Tensor) -> Seen:
    *modes, fed = news.tolist()
    return Seen([slot for slot, mode in enumerate(modes) if mode in _STOPPED], fed)
