"""The last chains of a run take over the rows of those that have ended, as more lanes, and stay what they are (3.8)."""

from __future__ import annotations

import pytest
import torch

from power_kernels.api import HuggingFaceEngine, PowerConfig, PowerSampler
from power_kernels.api.driver import captured, run
from power_kernels.api.driver.engine import WideningEngine
from power_kernels.api.driver.planning import Plan
from power_kernels.errors import ArgumentError
from power_kernels.law import Law
from power_kernels.state import ChainField, ChainState, LaneField, LaneStatus, Mode, Outcome
from tests import tiny_models
from tests.recorded_graph import RecordedGraphs
from tests.test_driver import Event, LatePoll
from tests.toys import Toy, ToyEngine, power_toy

SLOTS = 16


def free_up_to(most: int):
    """A step's seconds: rows cost nothing up to `most`, and beyond more than they can be worth."""
    return lambda rows: 1.0 if rows <= most else 1000.0


class FreeRows(ToyEngine):
    most_rows = 2 * SLOTS

    def run_bytes(self, *, chains, lanes, max_length):
        return 0

    def decode_seconds(self, rows, length):
        return [free_up_to(SLOTS)(count) for count in rows]


def chain(result):
    return result.prompt_id, result.chain_id, result.tokens, result.log_weights, result.outcomes, result.left


LAWS = {
    "uniform": dict(alpha=2.0, temperature=0.8, max_new_tokens=6, block_size=3, mcmc_steps=6, final_steps=9),
    "divergence": dict(
        alpha=2.0, max_new_tokens=6, block_size=3, mcmc_steps=6, final_steps=9, cut="divergence-entropy"
    ),
}


@pytest.mark.parametrize(("law", "late"), [("uniform", False), ("uniform", True), ("divergence", False)])
def test_a_thousand_chains_that_were_widened_are_those_of_one_lane(law, late, monkeypatch):
    """1024 chains in 16 calls: 16 chains in one lane each become 8 in 2 and so on, in the middle of everything.

    late: the host hears of chains that have stopped as late as from a device.
    """
    prompts, options = [[5], [6, 7, 1]], dict(num_chains=512, seed=7)
    alone = PowerSampler(ToyEngine(power_toy(6))).generate(
        prompts, PowerConfig(**LAWS[law], lanes=1), max_chains=256, **options
    )
    if late:
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(run, "Poll", LatePoll)
    sampler, got, widened = PowerSampler(FreeRows(power_toy(6))), [], 0
    for part in range(16):
        got += sampler.generate(prompts, PowerConfig(**LAWS[law]), share=(part, 16), **options)
        report = sampler.last_run
        assert (report.slots, report.lanes) == (SLOTS, 1)
        widened += report.widened
    assert sorted(map(chain, got)) == list(map(chain, alone))
    outcomes = [outcome for r in got for outcome in r.outcomes]
    least = {Outcome.REJECTED: 5000, Outcome.ACCEPTED: 4000, Outcome.UNCHANGED: 3000 if law == "uniform" else 0}
    assert all(outcomes.count(outcome) >= count for outcome, count in least.items())
    assert widened >= (16 if late else 40)
    assert sum(r.cost.voided for r in got) >= 140
    for one, other in zip(sorted(got, key=chain), alone, strict=True):
        assert (one.cost.accepted, one.cost.rejected) == (other.cost.accepted, other.cost.rejected)
        assert one.cost.proposal - one.cost.voided == other.cost.proposal


def test_rows_are_filled_while_the_last_chains_end():
    """Rows of the plan, times steps: what is free, idle or waiting counts as empty."""
    config = PowerConfig(**LAWS["uniform"])
    fixed, widening = FreeRows(power_toy(6)), FreeRows(power_toy(6))
    fixed.widen = None
    shares = []
    for engine in (fixed, widening):
        sampler = PowerSampler(engine)
        results = sampler.generate([[5]], config, num_chains=64)
        report = sampler.last_run
        drawn = sum(r.cost.extension + r.cost.proposal for r in results)
        assert (report.drawn, report.row_steps) == (drawn, SLOTS * report.decode_steps)
        assert report.filled == drawn / (SLOTS * report.decode_steps)
        shares.append(report.filled)
    assert shares[1] > shares[0]


def test_a_run_is_widened_only_by_lanes_that_have_a_step_to_open(monkeypatch):
    """No EOS and one stage, so that the steps left are known: the chain that has most of them fills all its lanes."""
    counts = {"widened": 0, "widened for the last steps": 0, "left": 0}
    widen = run.Run.widen

    def steps_left(state, chains):
        field = state.field[:chains]
        open_still = field[:, ChainField.LAST] - field[:, ChainField.OPENED] + 1
        begins = field[:, ChainField.MODE] == Mode.EXTEND
        return torch.where(begins, config.mcmc_steps, open_still).max()

    def watched(self):
        chains, lanes, left = len(self.active), self.state.lanes, steps_left(self.state, len(self.active))
        could = not self.waiting and self.plan.lanes_for(chains, lanes) > lanes
        widen(self)
        if self.state.lanes == lanes:
            assert left == 0 or not could
            counts["left"] += could
            return
        assert self.state.lanes - lanes <= left
        idle = (self.state.lane_field[:, LaneField.STATUS] == LaneStatus.IDLE).view(-1, self.state.lanes)[:chains]
        extends = self.state.field[:chains, ChainField.MODE] == Mode.EXTEND
        assert extends.any() or not idle.any(1).all()
        counts["widened"] += 1
        counts["widened for the last steps"] += bool(steps_left(self.state, chains) == 0)

    monkeypatch.setattr(run.Run, "widen", watched)
    config = PowerConfig(alpha=2.0, max_new_tokens=6, block_size=None, mcmc_steps=6, cut="divergence")
    for seed in range(16):
        PowerSampler(FreeRows(Toy(3, 6, seed=20))).generate([[5]], config, num_chains=40, seed=seed)
    least = {"widened": 20, "widened for the last steps": 5, "left": 20}
    assert all(counts[name] >= count for name, count in least.items()), counts


def test_lanes_stay_where_they_were_asked_for_or_the_engine_cannot_widen(monkeypatch):
    sampler = PowerSampler(FreeRows(power_toy(6)))
    sampler.generate([[5]], PowerConfig(**LAWS["uniform"], lanes=2), num_chains=20, max_chains=8)
    assert (sampler.last_run.slots, sampler.last_run.lanes, sampler.last_run.widened) == (8, 2, 0)
    monkeypatch.delattr(ToyEngine, "widen")
    engine = FreeRows(power_toy(6))
    assert not isinstance(engine, WideningEngine)
    sampler = PowerSampler(engine)
    sampler.generate([[5]], PowerConfig(**LAWS["uniform"]), num_chains=20)
    assert (sampler.last_run.lanes, sampler.last_run.widened) == (1, 0)


def test_a_run_that_is_widened_beyond_its_memory_goes_on_in_less_and_draws_the_same():
    class Narrow(FreeRows):
        """Has no memory for lanes while there are more than 4 chains."""

        def widen(self, chains, lanes):
            if chains > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().widen(chains, lanes)

    config, options = PowerConfig(**LAWS["uniform"]), dict(num_chains=40, seed=3)
    whole = PowerSampler(FreeRows(power_toy(6))).generate([[5]], config, **options)
    engine = Narrow(power_toy(6))
    sampler = PowerSampler(engine)
    with pytest.warns(RuntimeWarning, match="out of memory with 16 chains at once in 1 lanes each; the .* begin again"):
        got = sampler.generate([[5]], config, **options)
    assert list(map(chain, got)) == list(map(chain, whole))
    assert sampler.last_run.slots < SLOTS
    assert sampler.last_run.restarts == 1
    assert sampler.last_run.widened > 0
    assert not engine.running


def test_lanes_are_chosen_by_what_steps_take():
    plan = Plan(16, 1, most_lanes=8, seconds=lambda rows: 1.0)
    assert [plan.lanes_for(chains, 1) for chains in (16, 9, 8, 5, 4, 2, 1)] == [1, 1, 2, 3, 4, 8, 8]
    assert plan.lanes_for(4, 5) == 5  # never fewer than now
    assert Plan(16, 1, most_lanes=8, seconds=lambda rows: rows).lanes_for(1, 1) == 1
    assert Plan(16, 1).lanes_for(1, 1) == 1


def test_a_state_keeps_its_chains_and_lanes_when_it_is_widened():
    state = ChainState.allocate(4, 2, Law(3, 3, 1, cut="divergence"))
    for number, tensor in enumerate(state.tensors()):
        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + 7 * number)
    wide = state.widened(2, 3)
    assert (wide.chains, wide.lanes) == (2, 3)
    assert wide.token.data_ptr() == state.token.data_ptr()
    for name in ("lane_field", "lane_token", "lane_cumz", "lane_theta", "position", "counter", "exclude"):
        old, new = getattr(state, name).unflatten(0, (4, 2)), getattr(wide, name).unflatten(0, (2, 3))
        assert torch.equal(new[:, :2], old[:2])
        assert (new[:, 2] == (-1 if name == "exclude" else 0)).all()
    for chains, lanes in ((5, 2), (2, 1), (0, 2)):
        with pytest.raises(ArgumentError):
            state.widened(chains, lanes)


# -----------------------------------------------------------------------------------------------------------
# The Hugging Face engine


CONFIG = dict(alpha=3.0, max_new_tokens=12, block_size=6, mcmc_steps=6)
PROMPTS = [[5, 6, 7], [8], [9, 3, 11, 12, 13], [20, 21]]


@pytest.mark.parametrize("way", ["rows", "rows without memory", "padded", "replayed"])
def test_the_last_chains_of_a_real_model_are_what_they_are_alone(way, monkeypatch):
    """4 slots for 8 chains: 4 in one lane, 2 in two, 1 in four. Keys and values move with their lanes."""
    monkeypatch.setattr(HuggingFaceEngine, "decode_seconds", lambda self, rows, length: list(map(free_up_to(4), rows)))
    model = tiny_models.llama()
    graphs = RecordedGraphs()
    replayed = way == "replayed"
    if replayed:
        monkeypatch.setattr(captured, "recorder", lambda device: graphs)
    options = dict(remember=way == "rows", attention="rows" if "rows" in way else "padded", self_check=False)
    # A recording of every length would be used once: in buckets of 16, those of another layout would fit, too.
    engine = HuggingFaceEngine(model, length_multiple=16 if replayed else None, **options)
    sampler = PowerSampler(engine, capture=replayed)
    arguments = dict(num_chains=2, seed=3, eos_token_id=[])
    got = sampler.generate(PROMPTS, PowerConfig(**CONFIG), max_chains=4, **arguments)
    report = sampler.last_run
    assert (report.slots, report.lanes, report.widened) == (4, 1, 2)
    assert sum(r.cost.voided for r in got) > 0
    assert report.replays > report.decode_steps / 2 if replayed else not graphs.made
    alone = PowerSampler(HuggingFaceEngine(model, remember=False, self_check=False)).generate(
        PROMPTS, PowerConfig(**CONFIG, lanes=1), max_chains=1, **arguments
    )
    for one, other in zip(got, alone, strict=True):
        assert (one.tokens, one.outcomes, one.finish) == (other.tokens, other.outcomes, other.finish)
        assert one.log_weights == pytest.approx(other.log_weights, abs=1e-4)
    assert sum(r.accepted for r in got) >= 20


def test_an_engine_is_widened_within_its_rows():
    engine = HuggingFaceEngine(tiny_models.llama(), self_check=False)
    with pytest.raises(ArgumentError, match="no run is on"):
        engine.widen(1, 2)
    engine.begin(chains=4, lanes=2, max_length=10, alpha=2.0, beta=2.0, seed=0)
    for chains, lanes in ((3, 3), (8, 1), (0, 4)):
        with pytest.raises(ArgumentError, match="fewer chains in more lanes, 8 in all"):
            engine.widen(chains, lanes)
    rows = engine._slabs.pairs[0][0]
    rows.copy_(torch.arange(8, dtype=rows.dtype)[:, None, None, None].expand_as(rows))
    engine._held.start(0, (1, 2, 3))  # three positions of any row may have been written
    engine.widen(2, 3)
    assert rows[0, :6, 0, 0, 0].tolist() == [0, 1, 0, 2, 3, 0]
    with pytest.raises(ArgumentError, match="slots lie in"):
        engine.move(2, 0)
    engine.end()
