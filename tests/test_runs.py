"""Runs of draws: what `mh_advance` makes of samples [lanes, K] is what it makes of K calls with a column each.

Made-up samples, long enough that proposals end, restart and fault in the middle of their runs, on every law of
`tests/test_chain_identity.py`; and whole chains of its toys, by an engine that works ahead. Each test states the fewest
of what it must have seen.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels import reference
from power_kernels.api import Sampled
from power_kernels.errors import ArgumentError
from power_kernels.law import Law
from power_kernels.state import ChainField, ChainState, LaneField, LaneStatus, Mode, Outcome, Status
from tests.devices import host_only
from tests.op_helpers import serving, stop_table
from tests.test_chain_identity import LAWS, assert_same_state, copied, made_up, poisoned

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
