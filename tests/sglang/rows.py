"""Our sampler on batches as SGLang makes them, in this process: every row against the float64 reference."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.auxiliary_output import CommittedTokens
from torch import nn

from power_kernels.api.driver.engine import Opened
from power_kernels.api.engines.serving.proposal import ENTROPY, KEY, Proposal, proposal_of
from power_kernels.api.engines.serving.rows import PowerRows
from power_kernels.api.engines.sglang.parameters import DRAWS
from power_kernels.api.engines.sglang.sampler import PowerSampler, PowerWorker
from power_kernels.slots import SlotFlag
from power_kernels.state import Status
from tests.stacks import seen

VOCAB, SLOTS = 333, 9
PROMPT = 5


class GreedySampler(nn.Module):
    """As SGLang's own, that divides the logits where they stand."""

    temperature = 0.5

    def forward(self, logits_output, sampling_info, *args, **kwargs):
        logits_output.next_token_logits.div_(self.temperature)
        return logits_output.next_token_logits.argmax(-1).to(torch.int32)


def proposal(k: int, *, theta: float = -np.inf, first: int = 0, exclude: int = -1) -> Proposal:
    opened = Opened(
        lane=0, request=0, tokens=[0] * first, horizon=40, serial=3 + k, chain_id=k, prompt_id=2 * k, exclude=exclude,
        cumw=0.25 * k, theta=theta, length_bonus=0.0, eos=(), stops=False,
    )  # fmt: skip
    return proposal_of(opened, PROMPT, alpha=1.5 + 0.5 * k, beta=1.0 + 0.4 * k, seed=100 - 7 * k, stop_token=7)


def request(name: str, slot: int, carried: Proposal | None, *, entropy: bool = False, drawn: int = 0):
    params = SimpleNamespace(custom_params=carried and {KEY: carried.to_dict(), ENTROPY: entropy})
    return SimpleNamespace(
        rid=name, sampling_params=params, kv=SimpleNamespace(req_pool_idx=slot), output_ids=[0] * drawn,
        customized_info=None,
    )  # fmt: skip


class Stack:
    """A scheduler's part: what it calls, in its order."""

    def __init__(self):
        self.worker = PowerWorker()
        self.sampler = PowerSampler(GreedySampler(), self.worker)

    def admit(self, requests: list) -> None:
        pool = SimpleNamespace(req_to_token=torch.zeros(SLOTS, 1))
        batch = SimpleNamespace(reqs=requests, req_to_token_pool=pool, device="cpu")
        self.worker.admit(batch, VOCAB)

    def sample(self, requests: list, positions: list[int], logits: torch.Tensor, *, pad: int = 0):
        """The tokens, and what goes along with them. pad: rows of the batch behind its requests."""
        slots = [one.kv.req_pool_idx for one in requests]
        batch = SimpleNamespace(rids=[one.rid for one in requests], req_pool_indices=torch.tensor(slots + [0] * pad))
        out = LogitsProcessorOutput(next_token_logits=logits)
        with self.sampler.drawing(batch) as drawn:
            token = self.sampler(out, None, False, [], [], torch.tensor(positions + [0] * pad))
        drawn.send_with(out)
        return token, out.auxiliary_device_output

    def consume(self, sent, requests: list, token: torch.Tensor, committed: list[bool]) -> None:
        commits = []
        for one, drawn, wanted in zip(requests, token.tolist(), committed, strict=True):
            commits.append(CommittedTokens(len(one.output_ids), (drawn,)) if wanted else None)
            if wanted:
                one.output_ids.append(drawn)
        sent.copy_to_host(torch.clone).consume(SimpleNamespace(reqs=requests), commits)


def logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_every_row_of_a_mixed_batch_is_drawn_as_its_request_asks():
    """Ours beside ordinary ones, in another order each step, some in the middle of their prompts."""
    stack = Stack()
    ours = [request(f"ours {k}", slot, proposal(k), entropy=k == 1) for k, slot in enumerate((3, 1, 8, 5))]
    ordinary = [request(f"ordinary {k}", slot, None) for k, slot in enumerate((2, 7))]
    everyone = [ours[0], ordinary[0], ours[1], ours[2], ordinary[1], ours[3]]
    stack.admit(everyone)
    generator = np.random.default_rng(0)
    with seen.seen() as rows:
        for step in range(12):
            order = [everyone[i] for i in generator.permutation(len(everyone))]
            waits = [one is ours[3] and step < 3 for one in order]  # its prompt comes in chunks
            position = [
                step if wait else PROMPT - 1 + len(one.output_ids) for one, wait in zip(order, waits, strict=True)
            ]
            given = logits(len(order), seed=step)
            greedy = given.argmax(-1)
            token, sent = stack.sample(order, position, given)
            assert token.dtype == torch.int64
            for i, one in enumerate(order):
                if one in ordinary:
                    assert token[i] == greedy[i]
            stack.consume(sent, order, token, [not wait for wait in waits])
    kinds = seen.check(rows)
    assert kinds["rows"] == 48
    assert kinds["in their prompt"] == 3
    assert kinds["with entropy"] >= 12
    seen.assert_exponents_differ(rows, 4)
    for one in ours:
        draws = one.customized_info[DRAWS]
        assert len(draws) == len(one.output_ids) == (9 if one is ours[3] else 12)
        found = [row for row in rows if row.live and row.field[4] == int(one.rid[-1]) + 3]
        assert [row.token for row in found] == one.output_ids
        np.testing.assert_array_equal([row.weight for row in found], np.float32([draw[1] for draw in draws]))
    assert all(one.customized_info is None for one in ordinary)


def test_a_batch_without_ours_goes_to_the_other_sampler_as_it_came():
    stack = Stack()
    some = [request("a", 1, None), request("b", 2, None)]
    stack.admit(some)
    assert stack.worker.rows is None  # which takes no memory before there is one of ours
    for expected in (None, PowerRows):
        given = logits(2, seed=1)
        token, sent = stack.sample(some, [4, 4], given)
        assert sent is None
        assert token.dtype == torch.int32
        torch.testing.assert_close(given, logits(2, seed=1) / GreedySampler.temperature)
        assert expected is None or isinstance(stack.worker.rows, expected)
        stack.admit([request("c", 3, proposal(0))])


def test_all_ours_leave_the_other_sampler_alone_and_padding_is_not_drawn():
    stack = Stack()
    ours = [request("a", 1, proposal(0)), request("b", 2, proposal(1))]
    stack.admit(ours)
    given = logits(5, seed=1)
    token, sent = stack.sample(ours, [PROMPT - 1] * 2, given, pad=3)
    assert token.shape == (2,)
    assert sent.values.shape == (2, 3)
    torch.testing.assert_close(given, logits(5, seed=1))


def test_a_slot_that_another_request_has_got_is_that_one_s():
    stack = Stack()
    first = request("first", 4, proposal(0))
    stack.admit([first])
    stack.sample([first], [PROMPT - 1], logits(1, seed=0))
    second = request("second", 4, proposal(2))
    stack.admit([second])
    with seen.seen() as rows:
        stack.sample([second], [PROMPT - 1], logits(1, seed=1))
        seen.check(rows)
    assert rows[0].cumw == 0.5
    third = request("third", 4, None)
    stack.admit([third])
    assert stack.sample([third], [9], logits(1, seed=2))[1] is None
    assert stack.worker.slots(["first", "second", "third"]).tolist() == [-1, -1, -1]


def test_an_ordinary_request_may_bear_the_name_of_one_of_ours_that_has_ended():
    stack = Stack()
    stack.admit([request("one", 4, proposal(0)), request("other", 2, proposal(1))])
    again = request("one", 6, None)
    stack.admit([again])
    assert stack.worker.slots(["one", "other"]).tolist() == [-1, 2]
    given = logits(1, seed=1)
    expected = given.argmax(-1)
    token, sent = stack.sample([again], [9], given)
    assert token == expected
    assert sent is None


def test_a_request_that_comes_back_rejects_nothing_any_more():
    """Retracted by SGLang: its running sum is lost, and its chain decides."""
    stack, hopeless = Stack(), proposal(1, theta=1e6)
    one = request("one", 4, hopeless)
    stack.admit([one])
    token, sent = stack.sample([one], [PROMPT - 1], logits(1, seed=0))
    assert token.item() == hopeless.stop_token
    assert sent.flags.item() & SlotFlag.REJECTED
    again = request("one", 6, hopeless, drawn=2)
    stack.admit([again])
    token, sent = stack.sample([again], [PROMPT + 1], logits(1, seed=3))
    assert not sent.flags.item() & SlotFlag.REJECTED
    assert stack.worker.slots(["one"]).tolist() == [6]


@pytest.mark.parametrize(("bad", "status"), [(np.nan, Status.NAN), (np.inf, Status.POS_INF)])
def test_a_bad_row_is_told_and_its_neighbours_are_drawn(bad, status):
    stack = Stack()
    ours = [request("a", 1, proposal(0)), request("b", 2, proposal(1)), request("c", 3, proposal(2))]
    stack.admit(ours)
    given = logits(3, seed=5)
    given[1, 17] = bad
    with seen.seen() as rows:
        token, sent = stack.sample(ours, [PROMPT - 1] * 3, given)
    assert sent.flags.tolist() == [Status.OK, status, Status.OK]
    assert token[1] == proposal(1).stop_token  # a valid one, which ends the request
    seen.check([rows[0], rows[2]])


def test_draws_that_sglang_lost_are_not_passed_over():
    stack = Stack()
    one = request("a", 1, proposal(0))
    stack.admit([one])
    token, sent = stack.sample([one], [PROMPT - 1], logits(1, seed=0))
    one.output_ids.append(3)  # committed without us
    with pytest.raises(RuntimeError, match="of which 0 draws are known"):
        stack.consume(sent, [one], token, [True])
