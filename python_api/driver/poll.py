"""What the host knows of chains that run on a device: which have stopped, and how many tokens they were fed.

    host    launch launch ... look | launch launch ... look | ...
    device           step step ... copy to the host   step step ... copy

A look on a device starts a copy and returns what the look before it saw, so the device always has the steps between two
looks to work on while the host waits for the older copy. A chain that has stopped stays stopped: old news is true, but
of slots that were given another chain meanwhile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from power_kernels.state import CHAIN_FIELDS, ChainField, ChainState, Cost, Mode

_STOPPED = (Mode.DONE, Mode.FAULT)

# Steps between two looks on a device. A chain that stops is seen so many to twice as many steps later, and until then
# its rows are fed for nothing; a look is two copies of some KB, so it may be often.
_EVERY = 4


class Seen(NamedTuple):
    """stopped: slots whose chains have ended, ascending. fed: lane-steps of the chains that were looked at, so far."""

    stopped: list[int]
    fed: int


class Poll:
    """Looks at the chains of one run. every: steps to make between two looks."""

    def __init__(self, device: torch.device, slots: int):
        self._asynchronous = device.type == "cuda"
        self.every = _EVERY if self._asynchronous else 1
        here = dict(device="cpu", pin_memory=self._asynchronous)
        self._field = torch.zeros(slots, CHAIN_FIELDS, dtype=torch.int32, **here)
        self._cost = torch.zeros(slots, len(Cost), dtype=torch.int64, **here)
        self._tenant = [0] * slots  # how often each slot was given another chain
        self._pending: tuple[torch.cuda.Event, list[int]] | None = None  # a look under way: of which chains

    def look(self, state: ChainState, chains: int) -> Seen | None:
        """State of the first `chains` slots; None where the first look is still under way."""
        if not self._asynchronous:
            return _read(state.field, state.cost, range(chains))
        seen = None
        if self._pending is not None:
            event, tenant = self._pending
            event.synchronize()
            same = [slot for slot, number in enumerate(tenant) if number == self._tenant[slot]]
            seen = _read(self._field, self._cost, same)
        for here, there in ((self._field, state.field), (self._cost, state.cost)):
            here[:chains].copy_(there[:chains], non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(state.field.device))
        self._pending = event, self._tenant[:chains]
        return seen

    def changed(self, slot: int) -> None:
        """A slot holds another chain now, or none: what is under way about it is about the one before."""
        self._tenant[slot] += 1


def _read(field: torch.Tensor, cost: torch.Tensor, slots) -> Seen:
    modes = field[:, ChainField.MODE].tolist()
    fed = (cost[:, Cost.EXTENSION] + cost[:, Cost.PROPOSAL]).tolist()
    return Seen([slot for slot in slots if modes[slot] in _STOPPED], sum(fed[slot] for slot in slots))
