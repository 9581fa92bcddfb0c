"""Runs of draws: what `mh_advance` makes of samples [lanes, K] is what it makes of K calls with a column each.

Made-up samples, long enough that proposals end, restart and fault in the middle of their runs, on every law of
`tests/test_chain_identity.py`; and whole chains of its toys, by an engine that works ahead. Each test states the fewest
of what it must have seen.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels import reference
from power_kernels.api import PowerConfig, PowerSampler, Sampled
from power_kernels.api.driver.engine import Opened
from power_kernels.api.driver.requests import RequestLog
from power_kernels.api.driver.run import RunReport
from power_kernels.errors import ArgumentError
from power_kernels.law import Law
from power_kernels.state import ChainField, ChainState, LaneField, LaneStatus, Mode, Outcome, Status
from tests.devices import host_only
from tests.op_helpers import serving, stop_table
from tests.request_engine import AheadEngine
from tests.test_chain_identity import (
    CASES,
    LAWS,
    PROMPTS,
    SEED,
    FaultToy,
    Results,
    assert_identical,
    assert_same_state,
    copied,
    count,
    drive,
    made_up,
    one_lane,
    poisoned,
    voided_tokens,
)
from tests.toys import Toy, ToyEngine

VOCAB = 6
LONGEST = 9  # draws of a run: two more than an answer has tokens
STOPPED = torch.tensor([Mode.IDLE, Mode.DONE, Mode.FAULT])


def made_up_run(generator: np.random.Generator, state: ChainState) -> Sampled:
    """[lanes, K] samples of no model: as many as may be of each lane, and behind the last one anything."""
    columns = [made_up(generator, state, VOCAB) for _ in range(LONGEST)]
    run = {
        name: torch.stack([getattr(column, name) for column in columns], 1).contiguous()
        for name in Sampled.__dataclass_fields__
    }
    rows = len(run["status"])
    lengths = torch.from_numpy(generator.integers(LONGEST + 1, size=(rows, 1)))
    at = torch.arange(LONGEST)
    run["status"][(run["status"] == Status.PENDING) & (at < lengths)] = Status.OK
    run["status"][at == lengths] = Status.PENDING
    return Sampled(**run)


def columns_of(run: Sampled) -> list[Sampled]:
    return [
        Sampled(**{name: getattr(run, name)[:, k].contiguous() for name in Sampled.__dataclass_fields__})
        for k in range(LONGEST)
    ]


def one_by_one(advance, state: ChainState, run: Sampled, seen: Counter) -> None:
    """The run by calls of one column, as `mh_advance` says it; counts what happened to lanes that had draws left."""
    columns = columns_of(run)
    epoch, goes_on = state.lane_field[:, LaneField.EPOCH].clone(), torch.ones(len(run.status), dtype=torch.bool)
    for k, column in enumerate(columns):
        goes_on &= (state.lane_field[:, LaneField.EPOCH] == epoch) & (column.status != Status.PENDING)
        left = (columns[k + 1].status != Status.PENDING) if k + 1 < LONGEST else torch.zeros_like(goes_on)
        before = copied(state)
        column.status[~goes_on] = Status.PENDING
        advance(state, column)
        for lane in (left & goes_on & (before.lane_field[:, LaneField.STATUS] == LaneStatus.RUNNING)).nonzero():
            seen.update(happened(before, state, int(lane)))


def happened(before: ChainState, after: ChainState, lane: int) -> list[str]:
    """What a draw did to a lane that was running."""
    chain = lane // after.lanes
    was, now = before.lane_field[lane].tolist(), after.lane_field[lane].tolist()
    serial, commit = was[LaneField.SERIAL], after.commit_range[chain].tolist()
    extends = int(before.field[chain, ChainField.MODE]) == Mode.EXTEND
    found = []
    if now[LaneField.STATUS] == LaneStatus.CLOSED:
        found.append("closed")
    if now[LaneField.STATUS] == LaneStatus.FAULTED or int(after.field[chain, ChainField.MODE]) == Mode.FAULT:
        found.append("faulted")
    if commit[3] > commit[2]:
        found.append("extended" if extends else "accepted" if commit[1] == lane else "voided")
    elif now[LaneField.STATUS] == LaneStatus.IDLE or now[LaneField.SERIAL] != serial:
        found.append(Outcome(int(after.outcome[chain, serial])).name.lower())
    elif now[LaneField.EPOCH] > was[LaneField.EPOCH]:
        prefix = was[LaneField.POSITION] < was[LaneField.DIVERGENCE]
        found.append("prefix" if prefix else "walked on")
    return found


@pytest.mark.parametrize("name", LAWS)
def test_a_run_is_what_its_draws_are_one_by_one(name):
    """C++ and the reference on runs against C++ on columns, bitwise: 12 slots, 40 launches a law.

    At least five lanes with draws left meet each thing that the law allows, three a fault; where a prefix is forwarded,
    50 take a step of it.
    """
    law, lanes, ends = LAWS[name]
    generator = np.random.default_rng(17)
    common = torch.from_numpy(reference.length_table(law)), torch.tensor([-3]), torch.tensor(ends, dtype=torch.int64)
    stop_next = stop_table(law, VOCAB) if law.stops else None

    def advance(state: ChainState, drawn: Sampled) -> None:
        columns = drawn.token, drawn.logq, drawn.weight, drawn.status, drawn.entropy
        pk.mh_advance(state, law, *common, *columns, stop_next)

    slow, fast, columns = (poisoned(12, lanes, law, 99) for _ in range(3))
    seen, admitted = Counter(), 0
    with serving("cpp"):
        for _ in range(40):
            for slot in torch.isin(columns.field[:, ChainField.MODE], STOPPED).nonzero().flatten().tolist():
                for state in (slow, fast, columns):
                    state.admit(slot, [1, 2], admitted, 0)
                admitted += 1
            run = made_up_run(generator, columns)
            with pk.use_backend("reference"):
                advance(slow, run)
            advance(fast, run)
            one_by_one(advance, columns, run, seen)
            for tensor, want in zip(fast.tensors(), columns.tensors(), strict=True):
                assert tensor.numpy().tobytes() == want.numpy().tobytes()
            assert_same_state(slow, fast, theta=0.0)
    least = {"faulted": 3, **dict.fromkeys(("extended", "accepted", "rejected", "unchanged"), 5)}
    least |= {"closed": 5, "voided": 5} if lanes > 1 else {}
    least |= {} if law.diverges else {"walked on": 5}
    least |= {} if law.free_prefix else {"prefix": 50}
    assert all(seen[what] >= count for what, count in least.items()), seen
    assert admitted >= 30


def waiting_lanes(lanes: int) -> tuple[ChainState, Law, tuple]:
    """A chain that waits for the first draw of its extension."""
    law = Law(7, 7, 20)
    common = torch.from_numpy(reference.length_table(law)), torch.tensor([5]), torch.tensor([0])
    state = ChainState.allocate(1, lanes, law)
    state.admit(0, [1, 2], 0, 0)
    nothing = drawn([[0]] * lanes, [[Status.PENDING]] * lanes)
    pk.mh_advance(state, law, *common, *nothing)
    return state, law, common


def drawn(tokens: list[list[int]], status: list[list[Status]] | None = None) -> tuple[torch.Tensor, ...]:
    """token, logq, weight, status [lanes, K], all of them OK unless said."""
    token = torch.tensor(tokens)
    values = torch.full(token.shape, -0.5)
    status = torch.zeros(token.shape, dtype=torch.int32) if status is None else torch.tensor(status, dtype=torch.int32)
    return token, values, values.clone(), status


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_what_stands_behind_a_missing_draw_or_an_end_is_void(backend):
    """Tokens 3 and 4 come; the draw behind the gap does not, nor does what stands behind an EOS."""
    with serving(backend):
        state, law, common = waiting_lanes(1)
        pk.mh_advance(state, law, *common, *drawn([[3, 4, 5, 1]], [[Status.OK, Status.OK, Status.PENDING, Status.OK]]))
        assert state.lane_field[0, [LaneField.STATUS, LaneField.POSITION]].tolist() == [LaneStatus.RUNNING, 2]
        assert state.lane_token[0, :2].tolist() == [3, 4]
        pk.mh_advance(state, law, *common, *drawn([[5, 0, 1, 1]]))
    assert state.token[0, :4].tolist() == [3, 4, 5, 0]
    assert state.field[0, [ChainField.MODE, ChainField.LENGTH]].tolist() == [Mode.PROPOSE, 4]
    assert state.cost[0].tolist()[:2] == [4, 0], "a draw of the extension was taken for one of a proposal"


@pytest.mark.parametrize("backend", ["cpp", "reference", "triton"])
def test_a_run_of_one_draw_is_a_draw(backend):
    with serving(backend):
        (flat, law, common), (column, _, _) = waiting_lanes(2), waiting_lanes(2)
        pk.mh_advance(flat, law, *common, *(part.flatten() for part in drawn([[3], [3]])))
        pk.mh_advance(column, law, *common, *drawn([[3], [3]]))
    assert flat.lane_field[0, LaneField.POSITION] == 1
    assert all(torch.equal(a, b) for a, b in zip(flat.tensors(), column.tensors(), strict=True))


def test_the_triton_backend_refuses_runs_by_their_shape():
    state, law, common = waiting_lanes(2)
    before = copied(state)
    message = "sampled_token has shape [2, 3]; backend 'triton' takes one draw a lane, [2]"
    with serving("triton"), pytest.raises(ArgumentError, match=re.escape(message)):
        pk.mh_advance(state, law, *common, *drawn([[3, 4, 5]] * 2))
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before.tensors(), strict=True))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 0), "sampled_token has shape [2, 0]; it must be [2], or [2, K] for runs of K >= 1 draws"),
        ((3, 2), "sampled_token has shape [3, 2]; it must be [2], or [2, K] for runs of K >= 1 draws"),
        ((2, 3), "sampled_logq has shape [2, 2]; it must be [2, 3]"),
        ((2,), "sampled_logq has shape [2, 2]; it must be [2]"),
    ],
)
def test_runs_of_other_lanes_of_no_draws_or_of_different_lengths_are_refused(shape, message):
    state, law, common = waiting_lanes(2)
    _, *rest = drawn([[3, 4]] * 2)
    with pytest.raises(ArgumentError, match=re.escape(message)):
        pk.mh_advance(state, law, *common, torch.ones(shape, dtype=torch.int64), *rest)


def test_the_raw_operator_refuses_what_is_no_row_of_draws_a_lane():
    """C++ counts for itself: nothing is read beyond what was given."""
    state, law, common = waiting_lanes(2)
    token, logq, weight, status = drawn([[3, 4]] * 2)
    none = torch.empty(0), torch.empty(0, 0, dtype=torch.int16)
    for bad in (
        (token[:1], logq, weight, status),
        (token, logq[:, :0], weight, status),
        (token, logq, weight, status.flatten()[:3]),
    ):
        with serving("cpp"), pytest.raises(RuntimeError, match=r"draws|one shape"):
            torch.ops.power_kernels.mh_advance(*state.tensors(), *common, none[1], *bad, none[0], *law.constants())


@host_only
def test_a_run_passes_opcheck():
    state, law, common = waiting_lanes(2)
    none = torch.empty(0), torch.empty(0, 0, dtype=torch.int16)
    arguments = *state.tensors(), *common, none[1], *drawn([[3, 4]] * 2), none[0], *law.constants()
    torch.library.opcheck(torch.ops.power_kernels.mh_advance.default, arguments)


# ---- whole chains, by an engine that works ahead


def ahead(toy: Toy) -> AheadEngine:
    """toy: whose answers end where it does not know: it draws on from anything behind a stop string."""
    zeros = np.zeros(toy.vocab)
    return AheadEngine(lambda prompt, tokens: toy.table.get(tokens, zeros), toy.vocab, eos=toy.eos)


def drawn_by(
    engine: AheadEngine, toy: Toy, config: PowerConfig, slots: int, chains: int = 16
) -> tuple[Results, RunReport]:
    sampler = PowerSampler(engine, toy.tokenizer())
    results = sampler.generate(
        list(PROMPTS.values()), config, num_chains=chains // 2, seed=SEED, prompt_ids=list(PROMPTS), max_chains=slots
    )
    return {(r.prompt_id, r.chain_id): r for r in results}, sampler.last_run


@dataclass
class Ahead:
    """What the chains below did, at least. rejected, closed: requests that the engine ended by itself. void: draws that
    it handed over and no lane took."""

    chains: int = 0
    accepted: int = 0
    unchanged: int = 0
    voided: int = 0
    rejected: int = 0
    closed: int = 0
    void: int = 0


EXECUTIONS = {
    "one lane": (dict(), Ahead(352, 1200, 800, 0, 110, 280, 170)),
    "four lanes": (dict(lanes=4), Ahead(352, 1200, 800, 1400, 120, 370, 450)),
    "three lanes, prefix forwarded": (dict(lanes=3, free=False), Ahead(352, 1200, 800, 1750, 130, 380, 400)),
    "two lanes, no early rejection": (dict(lanes=2, early=False), Ahead(352, 1200, 800, 750, 0, 330, 250)),
}


@pytest.mark.parametrize("name", EXECUTIONS)
def test_an_engine_that_works_ahead_draws_the_chains_of_one_that_keeps_rows(name):
    """16 chains of each law of `test_chain_identity`, in five slots, bitwise. The least that they must do: above."""
    how, least = EXECUTIONS[name]
    seen = Ahead()
    for law, case in CASES.items():
        toy = case.toy()
        engine = ahead(toy)
        results, report = drawn_by(engine, toy, case.make(**how), 5)
        want = one_lane(law, chains=16)
        assert_identical(results, want)
        alone = one_lane(law, how.get("early", True), how.get("free", True), chains=16)
        taken = sum(r.cost.extension + r.cost.proposal for r in results.values())
        assert report.drawn == report.useful_lane_steps == taken
        assert report.lane_steps == report.row_steps == engine.answered >= taken
        assert engine.resumed == 0, f"{law}: the engine ended what its chain let go on"
        seen.chains += len(results)
        seen.accepted += count(results, Outcome.ACCEPTED)
        seen.unchanged += count(results, Outcome.UNCHANGED)
        seen.voided += voided_tokens(results, alone)
        seen.rejected += engine.rejected
        seen.closed += engine.closed
        seen.void += engine.answered - taken
        if law == "no end" and name == "one lane":  # the only test that asks for nothing but what the chain's asks
            assert engine.answered == taken, "the engine ended later than its chain"
            assert engine.rejected >= 10
    assert all(getattr(seen, f.name) >= getattr(least, f.name) for f in fields(seen)), seen


@pytest.mark.parametrize("lanes", [1, 3])
def test_bad_logits_in_a_run_stop_the_chains_that_reach_them(lanes):
    """32 chains, at least 6 of which end so, and 10 do not."""
    toy = FaultToy()
    config = PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=5, block_size=3, mcmc_steps=4)
    rows = drive(ToyEngine(toy), replace(config, lanes=1), chains=32)
    engine = ahead(toy)
    results, _ = drawn_by(engine, toy, replace(config, lanes=lanes), 5, chains=32)
    assert_identical(results, rows)
    ended = sum(r.finish == "fault" for r in results.values())
    assert 6 <= ended <= 22
    assert engine.faulted >= ended


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("cut", ["uniform", "divergence"])
def test_a_request_is_told_its_weight_and_below_what_it_is_rejected(cut, early):
    """Of an extension, of a proposal, and of one that was moved in the middle."""
    horizon, logq = 7, -3.0
    law = Law(horizon, horizon, 20, early_rejection=early, cut=cut, length_bonus=0.25)
    common = torch.from_numpy(reference.length_table(law)), torch.tensor([2]), torch.empty(0, dtype=torch.int64)
    state, log = ChainState.allocate(2, 1, law), RequestLog(2, law, eos=())
    state.admit(1, [5, 6], chain_id=3, prompt_id=4)

    def step(weights: list[float]) -> Opened:
        run = torch.full((2, max(len(weights), 1)), Status.PENDING, dtype=torch.int32)
        run[1, : len(weights)] = Status.OK
        weight = torch.zeros(run.shape)
        weight[1, : len(weights)] = torch.tensor(weights)
        pk.mh_advance(state, law, *common, torch.ones_like(run).long(), torch.full(run.shape, logq), weight, run)
        (opened,), _ = log.news(state)
        return opened

    extension = step([])
    assert (extension.cumw, extension.theta, extension.length_bonus, extension.ends_early) == (
        0,
        -math.inf,
        0.25,
        False,
    )
    weights = [-0.5 - t / 8 for t in range(horizon)]
    proposal = step(weights)
    n = len(proposal.tokens)
    assert 0 < n < horizon - 1
    assert proposal.cumw == sum(weights[:n])

    def lowest(tokens: int) -> float:
        """F(x) + log(1 - u), and for log n the most that it can be: exact but for the slack."""
        theta = float(state.lane_theta[1])
        return theta + (math.log(-math.expm1(logq) * tokens / horizon) if law.diverges else 0.0)

    def assert_just_below(theta: float, bound: float) -> None:
        assert early or theta == -math.inf
        assert not early or 0 < bound - theta <= 2e-9 * (1 + abs(bound))

    assert_just_below(proposal.theta, lowest(n))
    pk.mh_advance(
        state, law, *common, torch.full((2,), 2), torch.full((2,), logq), torch.full((2,), -0.125),
        torch.tensor([Status.PENDING, Status.OK], dtype=torch.int32),
    )  # fmt: skip
    assert log.news(state) == ([], [])
    log.forget([0, 1], 1)
    bound = lowest(n + 1)
    state.move(1, 0)
    state.retire(1)
    (moved,), ended = log.news(state)
    assert not ended
    assert (moved.lane, moved.tokens) == (0, [*proposal.tokens, 2])
    assert moved.cumw == proposal.cumw - 0.125
    assert_just_below(moved.theta, bound)


@pytest.mark.parametrize(
    ("changes", "n", "length"),
    [
        ({"length_bonus": 0.5}, 2, 9),
        ({"length_bonus": -0.5}, 2, 2),
        ({"length_bonus": -0.5, "eos": (), "stops": True}, 2, 2),
        ({"length_bonus": -0.5, "eos": ()}, 2, 9),
        ({"length_bonus": 0.0}, 9, 9),
    ],
)
def test_a_request_is_rejected_below_theta_at_the_length_that_suits_it_best(changes, n, length):
    opened = Opened(
        lane=0, request=0, tokens=[3], horizon=9, serial=1, chain_id=0, prompt_id=0, exclude=-1, cumw=-1.0, theta=-30.0,
        length_bonus=0.0, eos=(0,), stops=False,
    )._replace(**changes)  # fmt: skip
    bound = -30.0 - (opened.length_bonus * length - math.log(length))
    assert opened.rejects(n, bound + 1e-8), "half of the slack is 1.55e-8"
    assert not opened.rejects(n, bound + 2e-8)
    assert not opened._replace(theta=-math.inf).rejects(n, -1e9)
