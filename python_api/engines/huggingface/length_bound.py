"""How far attention may have to read, known on the host without waiting for a device."""

from __future__ import annotations

import torch

from power_kernels.state import ChainField, ChainState, Mode

# Steps between two looks at the longest position on a device; the bound in between grows by one a step.
_LOOK_EVERY = 16


class LengthBound:
    """Above the longest position of a step, known on the host without waiting for the device.

    With M = max(position + 1, BASE + LENGTH) over chains that have not stopped and their lanes, one step raises M by at
    most one: a lane that runs moves on by one, and a lane that opens starts inside its chain's answer. So the bound is
    an old M plus the steps since. M is copied every _LOOK_EVERY steps, and used as many steps later, when it has long
    been there: at a fixed step, for what is launched must not depend on how fast the copy was. On a CPU looking is free
    and there is no bound.
    """

    def __init__(self, device: torch.device):
        self.bound = 0
        self._since = 0  # steps since the copy in flight was started
        self._on_host = device.type == "cpu"
        self._asynchronous = device.type == "cuda"
        self._value = torch.zeros((), dtype=torch.int64, pin_memory=self._asynchronous, device="cpu")
        self._in_flight = False

    def admit(self, prompt_length: int) -> None:
        self.bound = max(self.bound, prompt_length)
        self._in_flight = False  # a copy on its way does not know this prompt

    def of(self, state: ChainState) -> int | None:
        """The bound for the step that feeds `state`, or None where the exact value is free to read."""
        if self._on_host:
            return None
        if self._asynchronous and self._since >= _LOOK_EVERY:
            if self._in_flight:
                self._wait()
                self.bound = min(self.bound, int(self._value) + self._since)
            self._start_copy(_longest(state))
            self._in_flight, self._since = True, 0
        bound = self.bound
        self.bound += 1
        self._since += 1
        return bound

    def _start_copy(self, longest: torch.Tensor) -> None:
        self._value.copy_(longest, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(longest.device))  # the model's device need not be the current one

    def _wait(self) -> None:
        self._event.synchronize()


def _longest(state: ChainState) -> torch.Tensor:
    """M of a state. What a slot keeps of a chain that has stopped is read by nobody."""
    mode, answers = state.field[:, ChainField.MODE], state.field[:, ChainField.BASE] + state.field[:, ChainField.LENGTH]
    runs = (mode >= Mode.START) & (mode <= Mode.PROPOSE)
    lanes = state.position.unflatten(0, (state.chains, state.lanes)).amax(1) + 1
    return (torch.maximum(lanes, answers) * runs).max()
