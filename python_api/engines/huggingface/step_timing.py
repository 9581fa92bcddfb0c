"""What a decode step takes on this machine, by its rows and the positions that they read, for the driver's plan.

Measured once for a model, a number of rows and a length; lengths are rounded down, four to an octave, so that no step
is longer than the run that it is timed for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from power_kernels.api.driver import captured
from power_kernels.api.engines.huggingface import decode_attention
from power_kernels.api.engines.huggingface.adapters import Adapters
from power_kernels.api.engines.huggingface.decode_attention import DecodeView

_ROUNDS = 4
_ENOUGH_SECONDS = 1.5  # after so long no further round is begun

_measured: WeakKeyDictionary[PreTrainedModel, dict] = WeakKeyDictionary()


def known_times(engine) -> dict[tuple[int, int], float]:
    """Seconds by rows and rounded length, shared by all engines that decode the same model alike."""
    adapters = Adapters(engine.model).active()
    alike = engine.device, engine.dtype, engine.attention, engine.compile, torch.get_num_threads(), adapters
    return _measured.setdefault(engine.model, {}).setdefault(alike, {})


def decode_seconds(engine, known: dict[tuple[int, int], float], rows: Sequence[int], length: int) -> list[float]:
    """Seconds of the forward pass of a step of each number of rows, the least of some; replayed where the driver
    replays its steps. What is not in `known` is measured and put there."""
    length = rounded(length)
    new = sorted({count for count in rows if (count, length) not in known})
    if new:
        engine.begin(chains=1, lanes=new[-1], max_length=length, alpha=1.0, beta=1.0, seed=0)
        try:
            steps = [_step(engine, count, length) for count in new]
            rounds, spent = [], 0.0
            while len(rounds) < _ROUNDS and spent < _ENOUGH_SECONDS:
                # In turns, so that what else the machine does meets all of them.
                rounds.append([_elapsed(step, engine.device) for step in steps])
                spent = engine._agreed(spent + sum(rounds[-1]))
            for count, seconds in zip(new, zip(*rounds, strict=True), strict=True):
                known[count, length] = engine._agreed(min(seconds))
        finally:
            engine.end()
    return [known[count, length] for count in rows]


def rounded(length: int) -> int:
    """The nearest of four lengths to an octave that is not above `length`."""
    step = 1 << max(0, length.bit_length() - 3)
    return length // step * step


def _step(engine, rows: int, length: int) -> Callable[[], None]:
    """A forward pass of so many rows at the end of their slabs, run until it is what the driver repeats: a recording,
    where it would record it."""
    position = torch.full((rows, 1), length - 1, device=engine.device)
    tokens = torch.zeros_like(position)
    graphs = captured.recorder(engine.device)
    kernel = engine.attention if graphs is None else decode_attention.recordable(engine.attention)

    def step() -> None:
        engine._logits(engine._output(DecodeView(position[:, 0], length, kernel), tokens, position))

    if graphs is None:
        step()
        return step
    steps = captured.CapturedSteps(graphs)
    while not steps.run(rows, step) and steps.work:
        pass
    return lambda: steps.run(rows, step)


def _elapsed(step: Callable[[], None], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start
