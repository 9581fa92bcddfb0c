"""How many chains and lanes a run gets: from memory, from what steps cost, and from running out of memory."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from power_kernels.api import HuggingFaceEngine, PowerConfig, PowerSampler
from power_kernels.api.commands import doctor
from power_kernels.api.driver import captured, memory, planning, run
from power_kernels.api.driver.planning import Plan, StepTimes, lane_gain, plan_run
from power_kernels.api.driver.sampler import GenerationError
from power_kernels.api.engines.huggingface import step_timing
from power_kernels.errors import ArgumentError
from tests import tiny_models
from tests.devices import ON_CUDA
from tests.recorded_graph import RecordedGraph, RecordedGraphs
from tests.toys import Toy, ToyEngine, power_toy

CONFIG = PowerConfig(alpha=2.0, max_new_tokens=32, block_size=8, mcmc_steps=20)


class Sized(ToyEngine):
    """100 bytes a row of 10 positions; a step's seconds are given."""

    most_rows = 16

    def __init__(self, seconds=lambda rows: 1.0, toy: Toy | None = None):
        super().__init__(power_toy() if toy is None else toy)
        self.seconds = seconds
        self.asked: list[int] = []

    def run_bytes(self, *, chains, lanes, max_length):
        return chains * (1 + lanes) * max_length * 10

    def decode_seconds(self, rows, length):
        self.asked += rows
        return [self.seconds(r) for r in rows]


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that are free."""

    def have(count):
        monkeypatch.setattr(planning, "free_bytes", lambda device: count)

    have(None)
    return have


def plan(engine, config=CONFIG, *, jobs=1, max_length=10, **options) -> Plan:
    return plan_run(engine, config, jobs=jobs, max_length=max_length, **options)


def silent(*args, **kwargs) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return plan(*args, **kwargs)


def test_lanes_are_taken_while_rows_cost_nothing(free):
    assert silent(Sized()) == Plan(1, 13)  # three more would save less than 2 %


def test_one_lane_where_every_row_costs_as_much_as_the_first(free):
    assert silent(Sized(lambda rows: rows)) == Plan(1, 1)


def test_lanes_stop_where_rows_begin_to_cost(free):
    """Free up to 8 rows, three times the time beyond: one chain takes 8 lanes, two take 4 each."""
    engine = Sized(lambda rows: 1.0 if rows <= 8 else 3.0)
    assert silent(engine) == Plan(1, 8)
    assert silent(engine, jobs=2) == Plan(2, 4)
    assert silent(engine, jobs=8) == Plan(8, 1)


def test_chains_that_wait_fill_the_rows_before_lanes_do(free):
    engine = Sized(lambda rows: 1.0 if rows <= 16 else rows / 16)
    assert silent(engine, jobs=16) == Plan(16, 1)
    assert silent(engine, jobs=160) == Plan(16, 1)
    assert silent(engine, jobs=160, max_chains=4) == Plan(4, 4)


def test_rows_beyond_what_the_engine_finds_worth_asking_are_not_measured(free):
    engine = Sized(lambda rows: 1 + rows / 100)
    silent(engine, jobs=4)
    assert engine.asked == [1, 2, 3, 4, 6, 8, 12, 16]
    engine = Sized(lambda rows: 1 + rows / 100)
    assert silent(engine, PowerConfig(max_new_tokens=8, mcmc_steps=2), jobs=3, max_chains=1) == Plan(1, 2)
    assert engine.asked == [1, 2]


def test_more_rows_are_measured_only_while_more_at_once_save_time(free):
    """Each row costs its own time from 64 on, so 128 are the last to be tried."""
    engine = Sized(lambda rows: max(1.0, rows / 64))
    engine.most_rows = 1024
    assert silent(engine, jobs=1024) == Plan(64, 1)
    assert engine.asked == [1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128]


def test_a_measurement_that_was_disturbed_does_not_make_fewer_rows_dear():
    times = StepTimes(Sized(lambda rows: {1: 5.0, 2: 1.0, 3: 1.25, 4: 1.5}[rows]), 10, most=4)
    times.measure(4)
    assert [times(rows) for rows in (1, 2, 3, 4, 8)] == [1.0, 1.0, 1.25, 1.5, 3.0]


def test_steps_are_timed_at_the_typical_position_of_the_run(free):
    seen = []

    class Engine(Sized):
        def decode_seconds(self, rows, length):
            seen.append(length)
            return super().decode_seconds(rows, length)

    PowerSampler(Engine()).generate([[5] * 3, [5] * 5], PowerConfig(max_new_tokens=5, block_size=5, mcmc_steps=2))
    assert seen == [4 + 5 // 2]


def test_no_more_lanes_than_a_stage_has_steps(free):
    assert silent(Sized(), PowerConfig(max_new_tokens=8, mcmc_steps=5)) == Plan(1, 5)
    assert silent(Sized(), PowerConfig(max_new_tokens=8, mcmc_steps=1, final_steps=9)) == Plan(1, 9)


def test_nothing_is_measured_where_lanes_are_given_or_idle(free):
    engine = Sized()
    assert silent(engine, PowerConfig(max_new_tokens=8, lanes=3)) == Plan(1, 3)
    assert silent(engine, PowerConfig(max_new_tokens=8, mcmc_steps=0)) == Plan(1, 1)
    assert silent(engine, PowerConfig(max_new_tokens=8, mcmc_steps=0), jobs=20) == Plan(10, 1)  # not 16 and 4
    assert silent(engine, PowerConfig(max_new_tokens=8, lanes=3), jobs=20) == Plan(5, 3)
    assert silent(engine, PowerConfig(max_new_tokens=8, lanes=3), jobs=20, max_chains=18) == Plan(18, 3)
    assert engine.asked == []


def test_an_engine_that_cannot_say_what_it_takes_gets_one_lane(free):
    assert silent(ToyEngine(power_toy()), jobs=5) == Plan(5, 1)
    assert silent(ToyEngine(power_toy()), jobs=50) == Plan(16, 1)
    assert silent(ToyEngine(power_toy()), jobs=50, max_chains=20) == Plan(20, 1)


def test_an_engine_that_lets_requests_wait_gets_as_many_chains_as_it_works_on(free):
    engine = ToyEngine(power_toy())
    engine.most_requests = 40
    assert silent(engine, jobs=50) == Plan(40, 1)
    assert silent(engine, jobs=5) == Plan(5, 1)
    assert silent(engine, PowerConfig(max_new_tokens=8, lanes=3), jobs=50) == Plan(13, 3)
    assert silent(engine, PowerConfig(max_new_tokens=8, lanes=64), jobs=50) == Plan(1, 64)
    assert silent(engine, jobs=50, max_chains=45) == Plan(45, 1)


def test_more_lanes_are_worth_less_each(free):
    gains = [lane_gain(p) for p in range(1, 40)]
    assert gains[0] == pytest.approx(1.0)
    assert gains[1] == pytest.approx(1.75)  # of two proposals the second is in vain in a quarter of the cases (3.5)
    steps = [b - a for a, b in itertools.pairwise(gains)]
    assert all(later == pytest.approx(0.75 * earlier) for earlier, later in itertools.pairwise(steps))


def test_lanes_that_nobody_asked_for_shrink_to_the_memory_in_silence(free):
    """And no step is tried that would not fit."""
    free(650)  # 0.9 of it: 585 bytes, four rows and a chain's own
    engine = Sized()
    assert silent(engine) == Plan(1, 4)
    assert max(engine.asked) == 4


def test_chains_that_nobody_asked_for_shrink_to_the_memory_in_silence(free):
    free(1200)  # 1080 bytes: five chains of two rows
    assert silent(Sized(lambda rows: 1 + rows), jobs=100) == Plan(5, 1)
    assert silent(Sized(), PowerConfig(max_new_tokens=8, lanes=3), jobs=100) == Plan(2, 3)


def test_steps_that_cannot_be_tried_for_want_of_memory_mean_one_lane(free):
    def seconds(rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert silent(Sized(seconds)) == Plan(1, 1)


def test_nothing_counts_as_measured_where_not_one_row_could_be_tried(free, monkeypatch):
    def seconds(rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    made = silent(Sized(seconds), jobs=4)
    assert made == Plan(1, 1)  # every row is taken to cost as much as the first, so that more at once bring nothing
    assert made.seconds.measured == {}
    engine = HuggingFaceEngine(tiny_models.llama(), self_check=False)
    monkeypatch.setattr(engine, "decode_seconds", lambda rows, length: seconds(rows))
    data = doctor.decoding(PowerSampler(engine), "a model")
    assert data["step_seconds"] == {}
    printed = "\n".join(doctor._decoding_text(data))
    assert "positions each: none could be timed, there is no memory for one" in printed
    assert "1000.00" not in printed


def test_a_rank_that_has_no_memory_for_a_step_stops(free):
    """The others go on with that step, and would wait for it in all that comes after."""

    class Ranks:
        def check_same(self, **given):
            pass

        def least(self, value):
            return value

    def seconds(rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = Sized(seconds)
    engine.ranks = None
    assert silent(engine) == Plan(1, 1)
    engine.ranks = Ranks()
    with pytest.raises(torch.OutOfMemoryError):
        plan(engine)


def test_steps_are_tried_as_far_as_memory_goes(free):
    def seconds(rows):
        if rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    assert silent(Sized(seconds)) == Plan(1, 3)


def test_lanes_that_were_asked_for_shrink_with_a_warning(free):
    free(650)
    with pytest.warns(RuntimeWarning, match=r"lanes is 8; the free memory of cpu .* holds 4 for each of 1 chains"):
        assert plan(Sized(), PowerConfig(max_new_tokens=8, lanes=8)) == Plan(1, 4)


def test_chains_that_do_not_fit_wait_with_a_warning(free):
    free(1200)  # 1080 bytes: five chains of two rows
    with pytest.warns(RuntimeWarning, match=r"9 chains could run at once; .* holds 5, so the others wait"):
        assert plan(Sized(lambda rows: 1 + rows), jobs=9, max_chains=9) == Plan(5, 1)


# -----------------------------------------------------------------------------------------------------------
# Against the best of all pairs


@dataclass(frozen=True)
class Model:
    """Seconds of a step by what it reads and computes, and what a run holds."""

    weights: float = 15.2e9  # bytes: Qwen2.5-7B in 16 bits
    token: float = 57_344  # bytes of a position's KV
    bandwidth: float = 3.0e12  # of an H100, bytes a second
    flops: float = 700e12
    memory: float | None = 64.8e9  # bytes that the weights leave

    def seconds(self, rows: int, length: int) -> float:
        read = self.weights + rows * length * self.token
        return max(read / self.bandwidth, rows * self.weights / self.flops)


class Modelled(Sized):
    most_rows = 1024

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def run_bytes(self, *, chains, lanes, max_length):
        return int(chains * (1 + lanes) * max_length * self.model.token)

    def decode_seconds(self, rows, length):
        self.asked += rows
        return [self.model.seconds(r, length) for r in rows]


def seconds_of_all(jobs: int, slots: int, lanes: int, seconds) -> float:
    """Seconds to draw all answers, per step that one lane would take for one: full rounds, and the rest in as many
    lanes of the same rows as are best."""
    rounds, rest = divmod(jobs, slots)
    last = (
        [seconds(rest * p) / lane_gain(p) for p in range(lanes, slots * lanes // rest + 1) if p <= 16] if rest else [0]
    )
    return rounds * seconds(slots * lanes) / lane_gain(lanes) + min(last)


@pytest.mark.parametrize("jobs", [1, 4, 16, 64, 1000])
@pytest.mark.parametrize(
    "model", [Model(), Model(memory=None), Model(flops=20e12), Model(token=458_752, memory=120e9)],
    ids=["7B", "7B in any memory", "7B on a slow processor", "7B without grouped heads"],
)  # fmt: skip
def test_the_plan_is_within_a_twentieth_of_the_best_of_all_pairs(model, jobs, free):
    free(None if model.memory is None else int(model.memory))
    config = PowerConfig(max_new_tokens=3072)
    engine, length = Modelled(model), 128 + 3072 // 2
    got = silent(engine, config, jobs=jobs, max_length=3200, length=length)
    assert len(engine.asked) <= 14  # 1, 2, 3, 4, 6, 8, 12, 16, 32, ... rows

    def seconds(rows):
        return model.seconds(rows, length)

    def fits(slots, lanes):
        return (
            model.memory is None or engine.run_bytes(chains=slots, lanes=lanes, max_length=3200) <= 0.9 * model.memory
        )

    best = min(
        seconds_of_all(jobs, slots, lanes, seconds)
        for slots in range(1, jobs + 1)
        for lanes in range(1, config.mcmc_steps + 1)
        if fits(slots, lanes)
    )
    assert fits(got.slots, got.lanes)
    assert seconds_of_all(jobs, got.slots, got.lanes, seconds) <= 1.05 * best


def test_a_run_that_cannot_hold_one_chain_is_refused_before_it_begins(free):
    free(200)
    engine = Sized()
    engine.max_context = None
    with pytest.raises(ArgumentError, match=r"are 37 positions together, .* max_new_tokens must be smaller"):
        PowerSampler(engine).generate([[5] * 5], CONFIG)
    assert not engine.running


def test_what_is_free_is_some_of_what_there_is():
    count = memory.free_bytes(torch.device("cpu"))
    assert 2**20 < count < 2**50
    assert memory.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_is_asked_for_its_own_limit(tmp_path: Path, version):
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    cache = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / names[0]).write_text("1000\n")
    (folder / names[1]).write_text("700\n")
    (folder / "memory.stat").write_text(f"anon 500\n{cache} 200\n")
    assert memory._left_to_this_group(str(tmp_path)) == 500
    (folder / names[0]).write_text("max\n")
    assert memory._left_to_this_group(str(tmp_path)) is None


@pytest.mark.skipif(ON_CUDA, reason="counts host memory")
def test_the_hugging_face_engine_takes_no_more_than_it_said():
    """KV, the ring of past positions and reordered weights; what the tiny model's steps take beside is in the slack."""
    engine = HuggingFaceEngine(tiny_models.llama(), self_check=False)
    said = engine.run_bytes(chains=3, lanes=2, max_length=40)
    engine.begin(chains=3, lanes=2, max_length=40, alpha=2.0, beta=2.0, seed=0)
    slabs = sum(lane.nbytes + chain.nbytes for lane, chain in engine._slabs.pairs)
    ring = sum(kept.nbytes for _, kept in engine._memory._kv) + engine._memory._hidden.nbytes
    engine.end()
    assert slabs + ring <= said <= 2 * (slabs + ring) + 2**20


@pytest.mark.measured
def test_steps_are_measured_once():
    engine = HuggingFaceEngine(tiny_models.llama(), self_check=False)
    first = engine.decode_seconds([1, 4], 100)
    assert all(seconds > 0 for seconds in first)
    assert engine.decode_seconds([4, 1], 96) == engine.decode_seconds([4, 1], 111) == first[::-1]
    assert engine.decode_seconds([1, 4], 60) != first  # other rows are another measurement
    assert engine._slabs is None
    assert HuggingFaceEngine(engine.model, self_check=False).decode_seconds([1, 4], 100) == first
    assert HuggingFaceEngine(tiny_models.llama(), self_check=False).decode_seconds([1, 4], 100) != first


@pytest.mark.measured
def test_recorded_steps_are_timed_when_they_are_replayed(monkeypatch):
    """A recording takes ten seconds of this clock, a replay an eighth of one and nothing else any."""
    now = [0.0]

    class Slow(RecordedGraph):
        def capture(self, launch):
            super().capture(launch)
            now[0] += 10.0

        def replay(self):
            super().replay()
            now[0] += 0.125

    monkeypatch.setattr(captured, "recorder", lambda device: SimpleNamespace(new=Slow))
    monkeypatch.setattr(step_timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    engine = HuggingFaceEngine(tiny_models.llama(), attention="padded", self_check=False)
    assert engine.decode_seconds([1, 4], 64) == [0.125, 0.125]


@pytest.mark.measured
def test_steps_that_cannot_be_recorded_are_timed_as_they_are(monkeypatch):
    monkeypatch.setattr(captured, "recorder", lambda device: RecordedGraphs())
    model = tiny_models.llama()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: bool((args[0] > 0).any()) and None)
    engine = HuggingFaceEngine(model, attention="padded", self_check=False)
    with pytest.warns(RuntimeWarning, match="cannot be recorded as a graph and runs as it is"):
        assert all(seconds > 0 for seconds in engine.decode_seconds([1, 4], 64))


@pytest.mark.measured
def test_no_step_is_timed_at_more_positions_than_it_was_asked_for():
    """Dynamic rotary frequencies change beyond the context, which a run may use up."""
    engine = HuggingFaceEngine(tiny_models.dynamic_llama(), max_context=2 * tiny_models.CONTEXT, self_check=False)
    assert engine.decode_seconds([1], tiny_models.CONTEXT - 1)[0] > 0


@pytest.mark.measured
@pytest.mark.parametrize("limit", [tiny_models.CONTEXT, None])
def test_lengths_that_are_about_the_same_are_timed_once(limit, monkeypatch):
    """Also where a model sets no limit to its context."""
    begun = []
    engine = HuggingFaceEngine(tiny_models.llama(), self_check=False)
    engine.max_context = limit
    begin = engine.begin
    monkeypatch.setattr(engine, "begin", lambda **sizes: begun.append(sizes["max_length"]) or begin(**sizes))
    times = {length: tuple(engine.decode_seconds([1], length)) for length in range(1, tiny_models.CONTEXT + 1)}
    assert begun == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96]
    assert all(times[length] == times[max(b for b in begun if b <= length)] for length in times)


# -----------------------------------------------------------------------------------------------------------
# Running out of memory


@pytest.mark.parametrize("part", ["share", "skip", "restart"])
def test_a_part_of_the_answers_is_drawn_as_the_whole_is_where_the_rotary_regime_depends_on_the_longest(
    part, monkeypatch
):
    """Phi-3's longrope: the short prompt alone would stay below the length at which the factors change."""
    limit = tiny_models.LONGROPE_ORIGINAL
    prompts = [[7 + i % 50 for i in range(limit - 2)], [5, 6, 7]]
    config = PowerConfig(alpha=2.0, max_new_tokens=8, block_size=4, mcmc_steps=4, lanes=2)
    sampler = PowerSampler(HuggingFaceEngine(tiny_models.phi3(), self_check=False))
    arguments = dict(seed=3, eos_token_id=[], max_chains=1)
    whole = sampler.generate(prompts, config, **arguments)
    if part == "share":
        (second,) = sampler.generate(prompts, config, share=(1, 2), **arguments)
    elif part == "skip":
        (second,) = sampler.stream(prompts, config, skip={(0, 0)}, **arguments)
    else:
        step = run.Run.step

        def failing(self):
            if not self.waiting and not self.report.restarts:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step(self)

        monkeypatch.setattr(run.Run, "step", failing)
        with pytest.warns(RuntimeWarning, match="out of memory"):
            second = sampler.generate(prompts, config, **arguments)[1]
    assert second.tokens == whole[1].tokens
    assert second.log_weights == pytest.approx(whole[1].log_weights, abs=1e-4)
    (other,) = sampler.generate(prompts[1:], config, prompt_ids=[1], **arguments)
    assert other.log_weights != pytest.approx(whole[1].log_weights, abs=1e-2)  # or this shows nothing


class Failing(Sized):
    """Has no memory for a step of more than `most` rows, from its step number `after` on."""

    def __init__(self, most: int, after: int = 0, error: Exception | None = None):
        super().__init__()
        self.most, self.after, self.steps = most, after, 0
        self.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate") if error is None else error

    def step(self, state):
        self.steps += 1
        if state.lane_field.shape[0] > self.most and self.steps > self.after:
            raise self.error
        return super().step(state)


def chain(result):
    return result.prompt_id, result.chain_id, result.tokens, result.log_weights, result.outcomes, result.finish


TOY_CONFIG = PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=5, block_size=2, mcmc_steps=3, lanes=2)
CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [None, CPU_ERROR, MemoryError("no")])
def test_a_run_that_runs_out_of_memory_goes_on_in_less_and_draws_the_same(error, free):
    """Room for 3 rows: 8 chains in 2 lanes become 4, 2, 1. Answers that were finished by then are not drawn again."""
    whole = PowerSampler(Sized()).generate([[5]], TOY_CONFIG, num_chains=20, max_chains=8)
    engine = Failing(most=3, after=30, error=error)
    sampler = PowerSampler(engine)
    with pytest.warns(RuntimeWarning, match="out of memory with") as warned:
        seen = list(sampler.stream([[5]], TOY_CONFIG, num_chains=20, max_chains=8))
    assert sorted(map(chain, seen)) == list(map(chain, whole))
    assert len(warned) == 3 == sampler.last_run.restarts
    assert (sampler.last_run.slots, sampler.last_run.lanes) == (1, 2)
    assert f"the {20} answers" not in str(warned[0].message)  # some had finished in the first 30 steps
    assert not engine.running


def test_finished_answers_come_with_the_error_when_nothing_is_left_to_give_up(free):
    engine = Failing(most=0, after=60)
    with pytest.warns(RuntimeWarning), pytest.raises(GenerationError, match="OutOfMemoryError after") as caught:
        PowerSampler(engine).generate([[5]], TOY_CONFIG, num_chains=20, max_chains=2)
    assert 0 < len(caught.value.results) < 20
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert not engine.running


def test_another_error_is_not_taken_for_a_lack_of_memory(free):
    engine = Failing(most=0, error=RuntimeError("device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        PowerSampler(engine).generate([[5]], TOY_CONFIG, num_chains=20, max_chains=8)
    assert engine.steps == 1


# -----------------------------------------------------------------------------------------------------------
# The report


def test_the_report_says_what_the_run_did(free):
    engine = ToyEngine(power_toy())
    sampler = PowerSampler(engine)
    assert sampler.last_run is None
    results = sampler.generate([[5], [6]], TOY_CONFIG, num_chains=10, max_chains=4)
    report = sampler.last_run
    assert (report.slots, report.lanes, report.captured, report.replays, report.restarts) == (4, 2, False, 0, 0)
    assert report.useful_lane_steps == sum(r.cost.extension + r.cost.proposal for r in results) == engine.forwarded
    assert report.useful_lane_steps <= report.lane_steps <= 8 * report.decode_steps
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert report.seconds["forward"] > 0 < report.seconds["advance"]


def test_a_batch_of_many_chains_wastes_few_rows(free):
    """64 chains through 16 slots of one lane: rows of chains that stopped are refilled at once, or fed no more."""
    sampler = PowerSampler(ToyEngine(power_toy()))
    config = PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=5, block_size=2, mcmc_steps=3, lanes=1)
    sampler.generate([[5]], config, num_chains=64, max_chains=16)
    assert sampler.last_run.useful_lane_steps == sampler.last_run.lane_steps
