"""How many chains run at once, in how many lanes each: what the machine decodes cheaply and what its memory holds.

Neither number changes any chain (DESIGN sections 3.5, 3.8), so a plan may be made anew at any time.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.engine import Engine, SizedEngine
from power_kernels.api.driver.memory import free_bytes, is_out_of_memory
from power_kernels.errors import ArgumentError

LANES = (1, 2, 4, 8, 16)  # what the driver chooses from

# Share of the free memory that the KV may take. The rest is for what a forward pass needs and nobody can foresee.
MOST_OF_MEMORY = 0.9


@dataclass(frozen=True)
class Plan:
    """slots: chains at once. lanes: proposals of each that run side by side."""

    slots: int
    lanes: int

    def smaller(self) -> Plan | None:
        """What to try when this one ran out of memory: half the slots, then half the lanes. None: there is nothing."""
        if self.slots > 1:
            return Plan(-(-self.slots // 2), self.lanes)
        return Plan(1, self.lanes // 2) if self.lanes > 1 else None


def plan_run(engine: Engine, config: PowerConfig, *, chains: int, max_length: int) -> Plan:
    """The plan of a run that would like `chains` slots.

    Warns where memory allows fewer lanes than were asked for, or fewer slots; raises ArgumentError where not even one
    chain with one lane fits.
    """
    if not isinstance(engine, SizedEngine):
        return Plan(chains, config.lanes or 1)
    budget = _budget(engine)

    def fits(slots: int, lanes: int) -> bool:
        return budget is None or engine.run_bytes(chains=slots, lanes=lanes, max_length=max_length) <= budget

    if not fits(1, 1):
        needed = engine.run_bytes(chains=1, lanes=1, max_length=max_length)
        raise ArgumentError(
            f"the longest prompt and max_new_tokens are {max_length} positions together, whose keys and values take "
            f"{_size(needed)} for one chain; {_size(budget)} are free on {engine.device}. "
            "max_new_tokens must be smaller"
        )
    slots = _most(chains, lambda n: fits(n, 1))
    if config.lanes is None:
        lanes = default_lanes(engine, config, slots, most=_most(max(LANES), lambda p: fits(slots, p)))
    else:
        lanes = _most(config.lanes, lambda p: fits(slots, p))
        if lanes < config.lanes:
            warnings.warn(
                f"lanes is {config.lanes}; the free memory of {engine.device} ({_size(budget)}) holds {lanes} for each "
                f"of {slots} chains, so {lanes} are used",
                RuntimeWarning,
                stacklevel=2,
            )
    if slots < chains:
        warnings.warn(
            f"{chains} chains could run at once; the free memory of {engine.device} ({_size(budget)}) holds {slots}, "
            "so the others wait",
            RuntimeWarning,
            stacklevel=2,
        )
    return Plan(slots, lanes)


def lane_gain(lanes: int) -> float:
    """How many times fewer decode steps the proposals of a chain take in `lanes` lanes.

    A proposal that changes the state voids those after it, so with a probability a of that, P lanes that were opened
    together bring a chain on by (1 - (1-a)^P) / a steps. a = 0.25: `bench/findings.md` holds this against counts.
    """
    return (1 - 0.75**lanes) / 0.25


def default_lanes(engine: SizedEngine, config: PowerConfig, slots: int, most: int = max(LANES)) -> int:
    """The lanes whose proposals are decided soonest: least seconds of a step at slots * P rows, over `lane_gain(P)`.

    At most `most`, and not more than a stage has steps, since lanes wait at its end. Measures steps, and raises as
    `decode_seconds` does.
    """
    most = min(most, max(config.mcmc_steps, config.final_steps))
    allowed = [p for p in LANES if p == 1 or (p <= most and slots * p <= engine.most_rows)]
    if len(allowed) == 1:
        return 1
    try:
        seconds = engine.decode_seconds([slots * p for p in allowed])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return 1  # what cannot even be tried is not to be had
    return min(zip(allowed, seconds, strict=True), key=lambda choice: choice[1] / lane_gain(choice[0]))[0]


def _budget(engine: Engine) -> int | None:
    free = free_bytes(engine.device)
    ranks = getattr(engine, "ranks", None)
    if ranks is not None and free is not None:
        free = ranks.least(free)  # of several processes that hold one model: they must plan alike
    return None if free is None else int(free * MOST_OF_MEMORY)


def _most(wanted: int, fits) -> int:
    """The largest n in [1, wanted] that fits; 1 fits."""
    low, high = 1, wanted
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
