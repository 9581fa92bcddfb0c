"""`SlotRows` draws what `sample_tokens` draws of the same proposals, and whole chains, without any serving stack."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels.api import PowerSampler
from power_kernels.api.driver.engine import Ended, Opened
from power_kernels.api.engines.serving.proposal import Proposal, proposal_of
from power_kernels.api.engines.serving.slots import SlotRows
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.rng import as_int64
from power_kernels.slots import SlotField, SlotFlag
from power_kernels.state import Outcome, Status
from tests.devices import DEVICE, ON_CUDA, host_only
from tests.op_helpers import assert_same_bits, normal_logits
from tests.request_engine import AheadEngine, Request
from tests.test_chain_identity import CASES, PROMPTS, SEED, assert_identical, one_lane
from tests.test_proposals import PLAIN
from tests.toys import Toy

ANYTHING = [None, "3", 3.5, True, [], {}, math.nan, 10**400, -(10**400), b"\0", "a\nb", object]


def test_nothing_that_a_dict_may_hold_gets_into_a_row_unless_it_fits():
    """Every key with every kind of value: refused by name, or staged."""
    rows, messages = SlotRows(1, "cpu", rows=1, vocab=4), []
    for key in PLAIN.to_dict():
        for value in ANYTHING:
            try:
                rows.stage(0, Proposal.from_dict(PLAIN.to_dict() | {key: value}))
            except (ArgumentError, ArgumentTypeError) as error:
                messages.append((key, str(error)))
    blamed = {
        "alpha": "alpha|theta",
        "beta": "beta|theta",
        "horizon": "horizon|first",
    }  # with a value that does not fit
    for key, message in messages:
        assert re.match(rf"power_proposal\.({blamed.get(key, key)}) is ", message), message
    assert 150 <= len(messages) < len(PLAIN.to_dict()) * len(ANYTHING)


# ---- the table


def proposals(generator: np.random.Generator, slots: int, vocab: int) -> list[Proposal]:
    """One a slot, whatever may be in them, of which nothing is rejected early."""
    return [
        Proposal(
            base=int(generator.integers(1, 50)),
            first=int(generator.integers(6)),
            exclude=int(generator.integers(-1, vocab)),
            serial=int(generator.integers(-3, 40)),
            chain_id=int(generator.integers(2**31)),
            prompt_id=int(generator.integers(2**29)),
            horizon=12,
            stop_token=-1,
            seed=int(generator.integers(-(2**63), 2**63)),
            ends_early=bool(generator.integers(2)),
            alpha=float(generator.uniform(1, 6)),
            beta=float(generator.uniform(0.5, 6)),
            cumw=float(-generator.exponential()),
            theta=-math.inf,
            length_bonus=float(generator.normal()),
        )
        for _ in range(slots)
    ]


def drawn(
    rows: SlotRows, logits: torch.Tensor, slot: list[int], position: list[int], live: list[bool] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """token, values and flags of a batch, into buffers of a larger one that hold -7."""
    token, flags = (torch.full((len(slot) + 3,), -7, device=DEVICE) for _ in range(2))
    values = torch.full((len(slot) + 3, 3), -7.0, device=DEVICE)
    live = torch.tensor([True] * len(slot) if live is None else live, device=DEVICE)
    places = torch.tensor(slot, device=DEVICE), torch.tensor(position, device=DEVICE)
    rows.flush()
    rows.draw(logits.to(DEVICE), *places, live, token, values, flags)
    assert (token[-3:] == -7).all()
    assert (values[-3:] == -7).all()
    assert (flags[-3:] == -7).all()
    return token[:-3].cpu(), values[:-3].cpu(), flags[:-3].cpu()


def wanted(logits: torch.Tensor, given: list[Proposal], position: list[int]) -> pk.SampleOutput:
    """`sample_tokens` with the proposals' parameters."""
    at = [p - one.base + 1 for one, p in zip(given, position, strict=True)]
    counter = [(t, one.serial, one.chain_id, one.prompt_id << 3) for one, t in zip(given, at, strict=True)]
    counter = np.array(counter, np.int64).astype(np.uint32).view(np.int32)
    out = pk.sample_tokens(
        logits.to(DEVICE),
        torch.tensor([one.alpha for one in given], device=DEVICE),
        torch.tensor([one.beta for one in given], device=DEVICE),
        torch.tensor([as_int64(one.seed) for one in given], device=DEVICE),
        torch.from_numpy(counter).to(DEVICE),
        torch.tensor([one.exclude if t == one.first else -1 for one, t in zip(given, at, strict=True)], device=DEVICE),
        return_entropy=True,
    )
    return pk.SampleOutput(*(column.cpu() for column in out))


def test_what_was_staged_is_drawn_as_sample_tokens_draws_it():
    """40 slots, of which 29 come to be ours, some of them twice; 25 rows in any order, bitwise, six times.

    Rows that are not ours, that were dropped, or that name no slot, are left alone.
    """
    generator, slots, vocab, excluded = np.random.default_rng(3), 40, 50, 0
    rows = SlotRows(slots, DEVICE, rows=28, vocab=vocab, entropy=True)
    ours: dict[int, Proposal] = {}
    cumw = np.zeros(slots)
    for step in range(6):
        for slot in generator.permutation(slots)[:8].tolist():
            (ours[slot],) = proposals(generator, 1, vocab)
            rows.stage(slot, ours[slot])
            cumw[slot] = ours[slot].cumw
        for slot in generator.permutation(slots)[:3].tolist():
            rows.drop(slot)
            ours.pop(slot, None)
        assert np.flatnonzero(rows.on).tolist() == sorted(ours)
        batch = [-1, *generator.permutation(slots)[:25].tolist()]
        position = [ours[s].base - 1 + ours[s].first + step % 3 if s in ours else 4 for s in batch]
        live = (generator.random(26) < 0.8).tolist()
        logits = normal_logits(26, vocab, seed=step)
        token, values, flags = drawn(rows, logits, batch, position, live)
        mine = [i for i, slot in enumerate(batch) if slot in ours]
        want = wanted(logits[mine], [ours[batch[i]] for i in mine], [position[i] for i in mine])
        assert_same_bits((token[mine], *values[mine].T), (want.token, want.logq, want.weight, want.entropy))
        others = sorted(set(range(26)) - set(mine))
        assert token[others].tolist() == flags[others].tolist() == [-7] * len(others)
        assert (values[others] == -7).all()
        assert flags[mine].tolist() == [Status.OK] * len(mine)
        for i, weight in zip(mine, want.weight.tolist(), strict=True):
            cumw[batch[i]] += weight * live[i]
        np.testing.assert_array_equal(rows.table.cumw.cpu().numpy()[sorted(ours)], cumw[sorted(ours)])
        excluded += sum(ours[batch[i]].exclude >= 0 and step % 3 == 0 for i in mine)
    assert excluded >= 15
    assert 25 <= len(ours) <= 33


def test_a_slot_that_is_used_again_draws_as_if_it_had_never_been():
    one, other = proposals(np.random.default_rng(5), 2, 30)
    used, fresh = (SlotRows(3, DEVICE, rows=1, vocab=30, entropy=True) for _ in range(2))
    logits = normal_logits(1, 30)
    used.stage(2, one)
    for _ in range(3):
        drawn(used, logits, [2], [one.base + one.first])
    used.drop(2)
    drawn(used, logits, [2], [5])
    for rows in (used, fresh):
        rows.stage(2, other)
    ours, theirs = (drawn(rows, logits, [2], [other.base + 3]) for rows in (used, fresh))
    assert_same_bits(ours, theirs)
    assert_same_bits(*(tuple(tensor[2] for tensor in rows.table.tensors()) for rows in (used, fresh)))


def test_the_last_word_before_a_flush_holds():
    one, other = proposals(np.random.default_rng(6), 2, 30)
    rows = SlotRows(2, DEVICE, rows=2, vocab=30)
    logits = normal_logits(2, 30)
    rows.stage(0, one)
    rows.drop(0)
    rows.stage(1, one)
    rows.drop(1)
    rows.stage(1, other)
    token, _, _ = drawn(rows, logits, [0, 1], [9, other.base])
    want = wanted(logits[1:], [other], [other.base])
    assert token.tolist() == [-7, int(want.token)]
    assert rows.on.tolist() == [False, True]


def test_a_request_that_goes_on_is_rejected_no_more():
    rows = SlotRows(1, DEVICE, rows=1, vocab=30)
    logits = normal_logits(1, 30)
    rows.stage(0, replace(PLAIN, theta=50.0))
    token, values, flags = drawn(rows, logits, [0], [PLAIN.base + 3])
    assert (token.tolist(), flags.tolist()) == ([PLAIN.stop_token], [SlotFlag.REJECTED])
    rows.stage(0, replace(PLAIN, theta=50.0).resumed())
    again, same, flags = drawn(rows, logits, [0], [PLAIN.base + 3])
    assert flags.tolist() == [Status.OK]
    assert_same_bits((again, same), (wanted(logits, [PLAIN], [PLAIN.base + 3]).token, values))


class Pinned:
    """Stands for a tensor in pinned memory: what is copied out of it is put down in `copies`."""

    def __init__(self, tensor: torch.Tensor, copies: list):
        self.tensor, self.copies = tensor, copies

    def to(self, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        self.copies.append((self.tensor.numel(), device, non_blocking))
        return self.tensor


def test_news_go_in_one_copy_from_pinned_memory_and_nothing_goes_without_them(monkeypatch):
    """On a host that is told it is a device."""
    copies: list = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: Pinned(tensor, copies))
    rows = SlotRows(8, "cpu", rows=1, vocab=4)
    rows.device = torch.device("cuda:0")
    rows.flush()
    for slot, proposal in enumerate(proposals(np.random.default_rng(1), 5, 4)):
        rows.stage(slot, proposal)
    rows.drop(3)
    rows.flush()
    rows.flush()
    assert copies == [(5 * 136, torch.device("cuda:0"), True)]
    assert rows.table.field[:, SlotField.ACTIVE].tolist() == [1, 1, 1, 0, 1, 0, 0, 0]


@pytest.mark.skipif(not ON_CUDA, reason="the host waits for no device where there is none")
def test_no_step_waits_for_the_device():
    rows = SlotRows(8, DEVICE, rows=4, vocab=300)
    logits = normal_logits(4, 300).to(DEVICE)
    slot, position = torch.tensor([3, 1, 0, 2], device=DEVICE), torch.full((4,), 60, device=DEVICE)
    live = torch.ones(4, dtype=torch.bool, device=DEVICE)
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.zeros(4, 3, device=DEVICE), slot.clone()
    rows.draw(logits, slot, position, live, *out)  # compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in range(20):
            for number, proposal in enumerate(proposals(np.random.default_rng(step), 4, 300)):
                rows.stage(number, proposal)
            rows.drop(step % 4)
            rows.flush()
            rows.draw(logits, slot, position, live, *out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rows.on.sum() == 3


@pytest.mark.parametrize("slot", [-1, 3, 2**40])
def test_a_slot_that_there_is_not_is_refused(slot):
    rows = SlotRows(3, "cpu", rows=1, vocab=4)
    for call in (lambda: rows.stage(slot, PLAIN), lambda: rows.drop(slot)):
        with pytest.raises(ArgumentError, match=re.escape(f"slot is {slot}; it must lie in [0, 2]")):
            call()
    with pytest.raises(ArgumentTypeError, match="proposal is a dict; it must be a Proposal"):
        rows.stage(0, PLAIN.to_dict())


# ---- whole chains, drawn by slots


class SlotEngine(AheadEngine):
    """Works ahead as a serving stack does: a request gets a slot, which is free again when it ends, and each draw is a
    row of a batch, in any order. refused: draws that were rejected. awkward: those of them that showed the excluded
    token."""

    def __init__(self, toy: Toy):
        zeros = np.zeros(toy.vocab)
        super().__init__(lambda prompt, tokens: toy.table.get(tokens, zeros), toy.vocab, eos=toy.eos)
        self.refused = self.awkward = 0

    def begin(self, *, seed: int, **kwargs) -> None:
        super().begin(seed=seed, **kwargs)
        self.number = seed
        self.rows = SlotRows(40, "cpu", rows=40, vocab=self.vocab, entropy=self.entropy)
        self.free = list(range(40))
        self.given: dict[int, tuple[int, Proposal]] = {}  # by lane: its slot, and what was staged there

    def requests(self, opened: list[Opened], ended: list[Ended]) -> None:
        for lane, _ in ended:
            slot, _ = self.given.pop(lane)
            self.rows.drop(slot)
            self.free.append(slot)
        super().requests(opened, ended)
        for one in opened:
            slot = self.free.pop(int(self.random.integers(len(self.free))))
            prompt, stop_token = self.live[one.lane].prompt, self.eos_token_ids[0] if self.eos_token_ids else -1
            sent = proposal_of(one, len(prompt), self.alpha, self.beta, self.number, stop_token).to_dict()
            self.given[one.lane] = slot, Proposal.from_dict(json.loads(json.dumps(sent)))
            self.rows.stage(*self.given[one.lane])

    def draw(self, lanes: list[int], counter, exclude) -> pk.SampleOutput:
        order = self.random.permutation(len(lanes))
        asked = [self.live[lanes[i]] for i in order]
        logits = np.stack([self.logits(one.prompt, tuple(one.tokens)) for one in asked]).astype(np.float32)
        position = torch.tensor([len(one.prompt) + len(one.tokens) - 1 for one in asked])
        slot = torch.tensor([self.given[lanes[i]][0] for i in order])
        token, values, flags = (torch.full((40, *shape), -7) for shape in ((), (3,), ()))
        values = values.float()
        self.rows.flush()
        self.rows.draw(
            torch.from_numpy(logits), slot, position, torch.ones(len(lanes), dtype=torch.bool), token, values, flags
        )
        back = torch.from_numpy(np.argsort(order))
        token, values, self.flags = token[back], values[back], flags[back]
        for i, lane in enumerate(lanes):
            _, proposal = self.given[lane]
            if self.flags[i] & SlotFlag.REJECTED:
                assert token[i] == proposal.stop_token or proposal.stop_token < 0
                self.refused += 1
                self.awkward += int(token[i]) == exclude[lane]
                token[i] = self.live[lane].name.stand_in
            self.live[lane].tokens.append(int(token[i]))
        status = (self.flags & (SlotFlag.REJECTED - 1)).int()
        logq, weight, entropy = values.T
        return pk.SampleOutput(token, logp=weight, logq=logq, weight=weight, entropy=entropy, status=status)

    def rejects(self, request: Request, weight: float, i: int) -> bool:
        rejected = bool(self.flags[i] & SlotFlag.REJECTED)
        assert rejected == super().rejects(request, weight, i)
        return rejected


@host_only  # the chains that it is held to are drawn where the tests run
def test_slots_draw_the_chains_of_an_engine_that_keeps_rows():
    """8 chains of four lanes of each law of `test_chain_identity`, bitwise, 176 in all, with 600 acceptances.

    At least 230 draws are rejected at once because their chains would reject them, none that its chain lets go on. 3 of
    these show the excluded token at its place: handed over as it is, it would be kept.
    """
    refused, awkward, accepted = 0, 0, 0
    for law, case in CASES.items():
        toy = case.toy()
        engine = SlotEngine(toy)
        results = PowerSampler(engine, toy.tokenizer()).generate(
            list(PROMPTS.values()), case.make(lanes=4), num_chains=4, seed=SEED, prompt_ids=list(PROMPTS),
            max_chains=5,
        )  # fmt: skip
        assert_identical({(r.prompt_id, r.chain_id): r for r in results}, one_lane(law, chains=8))
        assert engine.resumed == 0
        assert len(engine.free) == 40
        assert not engine.rows.on.any()
        accepted += sum(r.outcomes.count(Outcome.ACCEPTED) for r in results)
        refused += engine.refused
        awkward += engine.awkward
    assert accepted >= 600
    assert refused >= 230
    assert awkward >= 3
