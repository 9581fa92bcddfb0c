"""`mh_advance` on compiled code: long answers, and that it reads nothing which the state calls stale.

python -m pytest -p tests.ptx.plugin tests/ptx/chains.py
"""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from power_kernels import reference
from power_kernels.law import Law
from power_kernels.state import ChainField, ChainState, LaneField, LaneStatus, Mode
from power_kernels.triton import chain
from tests.long_answers import CASES, KINDS, assert_launch, telling
from tests.op_helpers import stop_table
from tests.test_long_answers import by_triton
from tests.test_triton_kernels import random_samples

EACH = 3  # launches of each kind


@pytest.mark.parametrize("name", CASES)
def test_long_answers_advance_as_in_the_other_backend(name):
    """H = 400, up to 16 lanes, commits and searches over several warps and several blocks of 128 positions."""
    launches = list(telling(name, EACH))
    for launch in launches:
        assert_launch(launch, by_triton, theta=1e-15)
    shown = [kind for launch in launches for kind in launch.kinds]
    assert all(shown.count(kind) >= EACH for kind in KINDS.keys() - CASES[name].lacks)


def stale(state: ChainState, law: Law) -> dict[str, torch.Tensor]:
    """Marks of the entries that hold nothing by the state's own account (state.ChainState)."""
    field, lane = state.field, state.lane_field
    at = torch.arange(law.max_new_tokens + 1)
    started, length = field[:, ChainField.MODE, None] != Mode.START, field[:, ChainField.LENGTH, None]
    # A faulted lane, too, feeds its last token while it waits.
    open_lane = lane[:, LaneField.STATUS, None] != LaneStatus.IDLE
    first, position = lane[:, LaneField.DIVERGENCE, None], lane[:, LaneField.POSITION, None]
    proposing = (field[:, ChainField.MODE] == Mode.PROPOSE).repeat_interleave(state.lanes)
    theta = open_lane[:, 0] & proposing
    counted = torch.zeros(state.forwarded.shape, dtype=torch.bool)
    for row in theta.nonzero()[:, 0].tolist():
        counted[row // state.lanes, int(lane[row, LaneField.SERIAL])] = True
    chain_tokens, chain_sums = started & (at < length), started & (at <= length)
    lane_tokens = open_lane & (at >= first) & (at < position)
    lane_sums = open_lane & (at > first) & (at <= position)
    valid = {
        **dict.fromkeys(("token", "logq"), chain_tokens),
        **dict.fromkeys(("cumw", "cumz", "stop_state"), chain_sums),
        **dict.fromkeys(("lane_token", "lane_logq"), lane_tokens),
        **dict.fromkeys(("lane_cumw", "lane_cumz", "lane_stop_state"), lane_sums),
        "lane_theta": theta,
        "forwarded": counted,
        "left": torch.zeros(state.left.shape, dtype=torch.bool),
        **dict.fromkeys(("step_weight", "step_logq"), torch.zeros(state.step_logq.shape, dtype=torch.bool)),
    }
    return {name: ~marks for name, marks in valid.items() if getattr(state, name).numel()}


LAWS = [
    (Law(12, 4, 3), 1),
    (Law(12, 4, 3, final_steps=3), 3),
    (Law(12, 4, 6), 8),
    (Law(8, 8, 5, final_steps=2, free_prefix=False), 3),
    (Law(12, 4, 3, karan_du=True, early_rejection=False), 2),
    (Law(5, 1, 0, final_steps=6), 2),
    (Law(12, 4, 6, cut="divergence"), 3),
    (Law(12, 6, 4, early_rejection=False, cut="divergence-entropy"), 5),
    (Law(12, 4, 6, early_rejection=False), 16),
    (Law(12, 4, 6, stops=True), 8),
    (Law(12, 4, 6, cut="divergence", stops=True, length_bonus=0.7), 3),
    (Law(12, 6, 4, free_prefix=False, length_bonus=-0.3), 1),
]


@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize(("law", "lanes"), LAWS)
def test_nothing_is_read_that_the_state_calls_stale(law, lanes, block, monkeypatch, ptx_launcher):
    """Stale entries count as never written before every launch; a value of theirs that reaches an address, a branch or
    a store is a finding. The reference agrees, launch by launch."""
    monkeypatch.setitem(chain.ADVANCE, "BLOCK", block)
    g, eos = torch.Generator().manual_seed(lanes + block), 49
    ours, theirs = (ChainState.allocate(2, lanes, law) for _ in range(2))
    fixed = (
        torch.tensor(reference.length_table(law)),
        torch.tensor([12345678901]),
        torch.tensor([eos, 1000]),
        stop_table(law, 50),
    )
    commits = 0
    for step in range(40):
        for slot in range(2):
            if int(theirs.field[slot, ChainField.MODE]) in (Mode.IDLE, Mode.DONE, Mode.FAULT):
                for state in (ours, theirs):
                    state.admit(slot, [3] * (7 + slot), chain_id=step, prompt_id=5)
        token, *rest = random_samples(theirs, g, eos, hostile=0.003)
        if step % 3 == 0:  # lanes that are given the token they leave out walk on
            token = torch.where(theirs.exclude >= 0, theirs.exclude, token)
        ptx_launcher.forget_undefined()
        for name, marks in stale(ours, law).items():
            ptx_launcher.mark_undefined(getattr(ours, name), marks)
        chain.mh_advance(*ours.tensors(), *fixed, token, *rest, *law.constants())
        reference.mh_advance(*theirs.tensors(), *fixed, token, *rest, *law.constants())
        for f in fields(ChainState):
            got, want = getattr(ours, f.name), getattr(theirs, f.name)
            if f.name in ("lane_theta", "cumz", "lane_cumz"):  # exp and log are the library's
                torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
                got.copy_(want)
            else:
                assert torch.equal(got, want), (f.name, step)
        commits += int((theirs.commit_range[:, 3] > 0).sum())
    assert commits >= 3
