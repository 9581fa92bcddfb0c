"""How many chains run at once, in how many lanes each: from the answers left, the memory, and what steps cost here.

A row of a step goes to a chain that waits or to another lane of one that runs. Of P lanes the later ones are often in
vain (`lane_gain`), a chain that waits never is: so waiting chains fill the rows first, and lanes take what they leave.
When nobody waits any more, the rows of chains that have ended become lanes of those that still run (`Plan.lanes_for`).

Neither number changes any chain (DESIGN sections 3.5, 3.8), so a plan may be made anew at any time.
"""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.engine import Engine, ParticleEngine, QueueingEngine, SizedEngine, ranks_of
from power_kernels.api.driver.memory import free_bytes, is_out_of_memory
from power_kernels.errors import ArgumentError
from power_kernels.state import MAX_LANES

LANES = range(1, MAX_LANES + 1)  # what the driver chooses from

# Share of the free memory that the KV may take. The rest is for what a forward pass needs and nobody can foresee.
MOST_OF_MEMORY = 0.9

# Chains at once of an engine that cannot say what they take, where nobody says how many.
_UNSIZED_CHAINS = 16

# Plans that take at most this much longer than the fastest are as good: the one with the fewest rows is taken, and
# lanes are not changed for less.
_AS_GOOD = 1.02

# Rows whose steps are timed together, and the share of a row's cost that twice as many must save to ask for more.
_FIRST_ROWS = 16
_WORTH_ASKING = 0.05


@dataclass(frozen=True)
class Plan:
    """slots: chains at once. lanes: proposals of each that run side by side.

    most_lanes: what a chain may get when others have ended; seconds: of a step of so many rows. Without them lanes stay
    as they are.
    """

    slots: int
    lanes: int
    most_lanes: int = field(default=1, compare=False)
    seconds: Callable[[int], float] | None = field(default=None, compare=False, repr=False)

    @property
    def rows(self) -> int:
        return self.slots * self.lanes

    def smaller(self) -> Plan | None:
        """What to try when this one ran out of memory: half the slots, then half the lanes. None: there is nothing."""
        if self.slots > 1:
            return replace(self, slots=-(-self.slots // 2))
        return replace(self, lanes=self.lanes // 2) if self.lanes > 1 else None

    def lanes_for(self, chains: int, lanes: int, most: int = MAX_LANES) -> int:
        """The lanes, at least as many as now and at most `most`, that bring so many chains on soonest in the rows of
        this plan."""
        if self.seconds is None:
            return lanes
        more = [p for p in LANES if lanes < p <= min(most, self.most_lanes) and chains * p <= self.rows]
        now, best = (
            min((self.seconds(chains * p) / lane_gain(p), p) for p in some) for some in ([lanes], [lanes, *more])
        )
        return best[1] if best[0] * _AS_GOOD < now[0] else lanes


def plan_run(
    engine: Engine,
    config: PowerConfig,
    *,
    jobs: int,
    max_chains: int | None = None,
    max_length: int,
    length: int | None = None,
) -> Plan:
    """The plan of a run that has `jobs` answers to draw, at most `max_chains` at once.

    max_length: positions of the longest prompt and its answer. length: positions at which a step is typical, and timed;
    max_length by default.
    Warns where memory allows fewer lanes than were asked for, or fewer slots; raises ArgumentError where not even one
    chain with one lane fits, and what `decode_seconds` raises.
    """
    wanted = jobs if max_chains is None else min(jobs, max_chains)
    if not isinstance(engine, SizedEngine):
        lanes = config.lanes or 1
        most = engine.most_requests // lanes if isinstance(engine, QueueingEngine) else _UNSIZED_CHAINS
        return Plan(wanted if max_chains is not None else min(wanted, max(most, 1)), lanes)
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
    most_lanes = max(config.mcmc_steps, config.final_steps, 1)  # lanes beyond these wait at the end of each stage
    if config.lanes is None and most_lanes > 1:
        times = StepTimes(
            engine, max_length if length is None else length, most=_most(engine.most_rows, lambda n: fits(1, n))
        )
        plan = best_plan(times, jobs, wanted, most_lanes, fits)
    else:
        plan = _unmeasured(engine, config.lanes or 1, jobs, wanted, max_chains is not None, fits)
        if plan.lanes < (config.lanes or 1):
            warnings.warn(
                f"lanes is {config.lanes}; the free memory of {engine.device} ({_size(budget)}) holds {plan.lanes} for "
                f"each of {plan.slots} chains, so {plan.lanes} are used",
                RuntimeWarning,
                stacklevel=2,
            )
    if max_chains is not None and not fits(wanted, 1):
        warnings.warn(
            f"{wanted} chains could run at once; the free memory of {engine.device} ({_size(budget)}) holds "
            f"{_most(wanted, lambda n: fits(n, 1))}, so the others wait",
            RuntimeWarning,
            stacklevel=2,
        )
    return plan


def plan_particles(
    engine: ParticleEngine, config: PowerConfig, *, jobs: int, max_chains: int | None = None, max_length: int
) -> Plan:
    """The plan of a run of particles: as many chains at once as fill the rows that are worth it, and as fit. Warns and
    raises as `plan_run`."""
    n, budget = config.particles, _budget(engine)

    def fits(slots: int) -> bool:
        return budget is None or engine.particle_bytes(groups=slots, particles=n, max_length=max_length) <= budget

    if not fits(1):
        needed = engine.particle_bytes(groups=1, particles=n, max_length=max_length)
        raise ArgumentError(
            f"the longest prompt and max_new_tokens are {max_length} positions together, which take {_size(needed)} "
            f"for {n} particles; {_size(budget)} are free on {engine.device}. "
            "particles or max_new_tokens must be smaller"
        )
    worth = max(1, engine.most_rows // n)
    wanted = min(jobs, worth if max_chains is None else max_chains)
    slots = _most(wanted, fits)
    if max_chains is not None and slots < wanted:
        warnings.warn(
            f"{wanted} chains could run at once; the free memory of {engine.device} ({_size(budget)}) holds {slots}, "
            "so the others wait",
            RuntimeWarning,
            stacklevel=2,
        )
    return Plan(-(-jobs // -(-jobs // slots)) if max_chains is None else slots, n)


def lane_gain(lanes: int) -> float:
    """How many times fewer decode steps the proposals of a chain take in `lanes` lanes.

    A proposal that changes the state voids those after it, so with a probability a of that, P lanes that were opened
    together bring a chain on by (1 - (1-a)^P) / a steps. a = 0.25: `bench/findings.md` holds this against counts.
    """
    return (1 - 0.75**lanes) / 0.25


class StepTimes:
    """Seconds of a decode step of any number of rows, from those that an engine measures at 1, 2, 3, 4, 6, 8, ... rows.

    Between two of them time is linear. Fewer rows never take longer: where a measurement says so, it was disturbed.
    Beyond the last a row is taken to cost what it costs there. length: positions that each row reads. most: rows.
    """

    def __init__(self, engine: SizedEngine, length: int, most: int):
        self._engine, self._length, self._most = engine, length, most
        self._rows: list[int] = []
        self._seconds: list[float] = []

    def measure(self, rows: int) -> None:
        """Measure what is needed to tell about so many rows; not beyond where more rows at once save nothing."""
        most = min(1 << (rows - 1).bit_length(), self._most)
        counts = [1 << k for k in range(most.bit_length())]
        # A CPU's products of few rows take other than what their neighbours let expect.
        counts += [3 << k for k in range(most.bit_length()) if 3 << k <= _FIRST_ROWS]
        counts = sorted({count for count in counts if count < most} | {most})
        together = [count for count in counts if count <= _FIRST_ROWS] or counts
        while together and not self._ask(together):
            together = together[: len(together) // 2]
        for count in counts[len(together) :]:
            if not self._still_saves() or not self._ask([count]):
                break

    @property
    def measured(self) -> dict[int, float]:
        """Empty where not one row could be tried: then every row is taken to cost as much as the first."""
        return dict(zip(self._rows, self._seconds, strict=True))

    def __call__(self, rows: int) -> float:
        if not self._rows:
            return float(rows)
        after = bisect.bisect_left(self._rows, rows)
        if after == len(self._rows):
            return self._seconds[-1] * rows / self._rows[-1]
        if after == 0:
            return self._seconds[0]
        (low, high), (first, last) = self._rows[after - 1 : after + 1], self._seconds[after - 1 : after + 1]
        return first + (last - first) * (rows - low) / (high - low)

    def _ask(self, counts: list[int]) -> bool:
        """False where memory does not hold such steps: what cannot even be tried is not to be had."""
        try:
            seconds = self._engine.decode_seconds(counts, self._length)
        except Exception as error:
            # Where several processes hold the model, the others go on with the step and cannot know.
            if not is_out_of_memory(error) or ranks_of(self._engine) is not None:
                raise
            return False
        self._rows += counts
        self._seconds += seconds
        for i in reversed(range(len(self._seconds) - 1)):
            self._seconds[i] = min(self._seconds[i : i + 2])
        return True

    def _still_saves(self) -> bool:
        if len(self._rows) < 2:
            return False
        rows = self._rows[-1]
        before, now = self(rows // 2) / (rows // 2), self._seconds[-1] / rows
        return now < before * (1 - _WORTH_ASKING)


def best_plan(times: StepTimes, jobs: int, wanted: int, most_lanes: int, fits: Callable[[int, int], bool]) -> Plan:
    """The slots, at most `wanted`, and lanes in which `jobs` answers are drawn soonest.

    J answers in S slots take J // S rounds and one of the rest, whose rows are shared out anew. The time of a round in
    P lanes is that of a step over `lane_gain(P)`, in units that are the same for all. Measures steps.
    """
    allowed = [p for p in LANES if p == 1 or (p <= most_lanes and fits(1, p))]
    most_slots = {p: _most(wanted, lambda n, p=p: fits(n, p)) for p in allowed}
    times.measure(max(p * slots for p, slots in most_slots.items()))

    def seconds_of(plan: Plan) -> float:
        rounds, rest = divmod(jobs, plan.slots)
        total = rounds * times(plan.rows) / lane_gain(plan.lanes)
        if rest:
            lanes = plan.lanes_for(rest, plan.lanes)
            total += times(rest * lanes) / lane_gain(lanes)
        return total

    plans = [Plan(s, p, allowed[-1], times) for p in allowed for s in _slot_counts(jobs, most_slots[p])]
    seconds = {plan: seconds_of(plan) for plan in plans}
    least = min(seconds.values())
    return min((p for p in plans if seconds[p] <= least * _AS_GOOD), key=lambda p: (p.rows, seconds[p]))


def _slot_counts(jobs: int, most: int) -> set[int]:
    """The fewest slots for each number of rounds, powers of two, and the most there can be."""
    counts = {most} | {1 << k for k in range(most.bit_length())}
    slots = most
    while slots:
        rounds = -(-jobs // slots)
        slots = -(-jobs // rounds)
        counts.add(slots)
        slots -= 1
    return counts


def _unmeasured(engine: SizedEngine, lanes: int, jobs: int, wanted: int, asked: bool, fits) -> Plan:
    """The plan where the lanes are given, and so nothing needs to be timed. asked: `wanted` was asked for.

    Else as many chains as fill the rows up to which an engine is worth asking, the same in each round.
    """
    if asked:
        slots = _most(wanted, lambda n: fits(n, 1))
    else:
        slots = _most(min(wanted, max(1, engine.most_rows // lanes)), lambda n: fits(n, lanes) or n == 1)
        slots = -(-jobs // -(-jobs // slots))
    return Plan(slots, _most(lanes, lambda p: fits(slots, p)))


def _budget(engine: Engine) -> int | None:
    free = free_bytes(engine.device)
    ranks = ranks_of(engine)
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
