"""sample_slots: the draw of sample_tokens by slot, the running W of a proposal and its early rejection (DESIGN 5.8)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels import SlotField, SlotFlag, SlotTable
from power_kernels.reference import Answer, ReferenceChain
from power_kernels.slots import SLOT_FIELDS, SlotBound
from power_kernels.state import Status
from tests.devices import host_only
from tests.op_helpers import (
    BACKENDS,
    DTYPES,
    INF,
    INTERPRETED,
    NAN,
    SEED,
    assert_same_bits,
    bits,
    normal_logits,
    serving,
    strided,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with serving(request.param) as name:
        yield name


def slow(backend: str) -> bool:
    return backend == "triton" and INTERPRETED


# ---- tables


@dataclass
class Proposal:
    """What a slot holds. None of the defaults is 0 or another's."""

    base: int = 5
    first: int = 2
    exclude: int = -1
    serial: int = 3
    chain_id: int = 7
    prompt_id: int = 9
    horizon: int = 40
    stop_token: int = 1
    can_end_early: int = 1
    seed: int = SEED
    active: int = 1
    alpha: float = 4.0
    beta: float = 2.5
    theta: float = -INF
    length_bonus: float = 0.0
    cumw: float = -0.25


def table_of(proposals: list[Proposal]) -> SlotTable:
    table = SlotTable.allocate(len(proposals))
    for slot, p in enumerate(proposals):
        for column in SlotField:
            table.field[slot, column] = getattr(p, column.name.lower())
        table.exponent[slot] = torch.tensor([p.alpha, p.beta])
        table.bound[slot] = torch.tensor([p.theta, p.length_bonus])
        table.cumw[slot] = p.cumw
    return table


def clone(table: SlotTable) -> SlotTable:
    return SlotTable(*(tensor.clone() for tensor in table.tensors()))


def vectors(slots, positions, live=None) -> tuple[torch.Tensor, ...]:
    slot, position = torch.tensor(slots, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64)
    live = torch.ones(len(slot), dtype=torch.bool) if live is None else torch.tensor(live, dtype=torch.bool)
    return slot, position, live


def sampled(table: SlotTable, logits, slot, position) -> pk.SampleOutput:
    """`sample_tokens` of the same rows, all ours, with the arguments that the docstring says."""
    of = {column: table.field[slot, column] for column in SlotField}
    t = position + 1 - of[SlotField.BASE]
    words = [t, of[SlotField.SERIAL], of[SlotField.CHAIN_ID], of[SlotField.PROMPT_ID] << 3]
    alpha, beta = table.exponent[slot].unbind(1)
    exclude = torch.where(t == of[SlotField.FIRST], of[SlotField.EXCLUDE], -1)
    return pk.sample_tokens(
        logits, alpha.contiguous(), beta.contiguous(), of[SlotField.SEED], torch.stack(words, 1).int(), exclude,
        return_entropy=True,
    )  # fmt: skip


def test_a_new_table_has_no_slot_that_is_ours(backend):
    table = SlotTable.allocate(3)
    assert table.field.shape == (3, SLOT_FIELDS)
    assert not table.field[:, SlotField.ACTIVE].any()
    before = clone(table)
    out = pk.sample_slots(table, normal_logits(3, 20), *vectors([0, 1, 2], [4, 5, 6]))
    assert out.token.tolist() == [-1] * 3
    assert out.values.isnan().all()
    assert out.flags.tolist() == [0] * 3
    assert_same_bits(table.tensors(), before.tensors())


# ---- the draw


def proposals_of_many_kinds(count: int) -> list[Proposal]:
    generator = np.random.default_rng(3)
    word = lambda: int(generator.integers(2**28))  # noqa: E731
    exponents = ((4.0, 4.0), (4.0, 2.0), (4.0, 1.0), (4.0, 2.5), (1.0, 1.0), (8.5, 7.0))
    return [
        Proposal(
            base=int(generator.integers(1, 9)), first=int(generator.integers(3)),
            exclude=int(generator.integers(-1, 9)), serial=word(), chain_id=word(), prompt_id=word(),
            seed=int(generator.integers(-(2**63), 2**63 - 1)),
            alpha=exponents[i % 6][0], beta=exponents[i % 6][1], cumw=-float(generator.random()),
        )
        for i in range(count)
    ]  # fmt: skip


# less than a tile and odd, more than one of any backend
@pytest.mark.parametrize(("vocab", "dtype"), [(13, torch.float32), *((2100, dtype) for dtype in DTYPES)])
@pytest.mark.parametrize("entropy", [True, False])
def test_draws_are_those_of_sample_tokens_bit_for_bit(backend, vocab, dtype, entropy):
    rows = 6
    table = table_of(proposals_of_many_kinds(9))
    slot, _, live = vectors([7, 2, 0, 8, 3, 5], [0] * rows)
    position = table.field[slot, SlotField.BASE] - 1 + torch.tensor([0, 1, 2, 0, 1, 2])  # at and off FIRST
    logits = strided(normal_logits(rows, vocab, dtype, seed=vocab))
    logits[1, ::2] = -INF
    plain = sampled(table, logits, slot, position)
    cumw = table.cumw.clone()
    out = pk.sample_slots(table, logits, slot, position, live, entropy=entropy)
    assert out.flags.tolist() == [Status.OK] * rows
    last = plain.entropy if entropy else torch.zeros(rows)
    assert_same_bits([out.token, *out.values.unbind(1)], [plain.token, plain.logq, plain.weight, last])
    cumw[slot] += plain.weight.double()
    assert_same_bits([table.cumw], [cumw])


def test_a_token_that_is_excluded_is_so_at_its_own_position_alone(backend):
    """One logit has nearly all the mass: it is drawn wherever it may be."""
    p = Proposal(base=5, first=2, exclude=4)
    logits = torch.zeros(4, 30)
    logits[:, 4] = 60.0
    table = table_of([p] * 4)
    out = pk.sample_slots(table, logits, *vectors([0, 1, 2, 3], [4, 5, 6, 7]))  # answer positions 0, 1, 2, 3
    assert [token == 4 for token in out.token.tolist()] == [True, True, False, True]


def test_a_row_draws_the_same_in_any_batch_and_slot(backend):
    kinds = proposals_of_many_kinds(4)
    logits = normal_logits(4, 2100, seed=5)
    positions = [p.base + 1 for p in kinds]
    together = pk.sample_slots(table_of(kinds), logits, *vectors([0, 1, 2, 3], positions), entropy=True)
    for row, p in enumerate(kinds):
        table = table_of([Proposal(), Proposal(), p])
        alone = pk.sample_slots(table, logits[row : row + 1], *vectors([2], positions[row : row + 1]), entropy=True)
        assert_same_bits(alone, [column[row : row + 1] for column in together])


# ---- W, rejection, what is emitted


def expected(table: SlotTable, logits, slot, position, live, plain: pk.SampleOutput):
    """(token, flags, cumw) by the words of the docstring, one row after the other, from what was drawn."""
    tokens, flags, cumw = [], [], table.cumw.clone()
    for row in range(len(slot)):
        s = int(slot[row])
        f = {column.name: int(table.field[s, column]) for column in SlotField}
        theta, bonus = table.bound[s].tolist()
        status, stop, drawn = int(plain.status[row]), f["STOP_TOKEN"], int(plain.token[row])
        if status != Status.OK:
            tokens.append(max(stop, 0))
            flags.append(status)
            continue
        rejected = False
        if live[row]:
            cumw[s] += float(plain.weight[row])
            n = int(position[row]) + 2 - f["BASE"]

            def term(n: int, bonus: float = bonus) -> float:
                return bonus * n - math.log(max(n, 1))

            most = max(term(n if f["CAN_END_EARLY"] else f["HORIZON"]), term(f["HORIZON"]))
            rejected = float(cumw[s]) + most < theta
        tokens.append(stop if rejected and stop >= 0 else drawn)
        flags.append(SlotFlag.REJECTED if rejected else 0)
    return tokens, flags, cumw


def near(w: float, ulps: int) -> float:
    """A threshold that far from w."""
    return w + ulps * float(np.spacing(abs(w)))


@pytest.mark.parametrize("vocab", [1, 37])
def test_the_sum_the_rejection_and_the_emitted_token_are_as_the_words_say(backend, vocab):
    kinds = [
        Proposal(theta=theta, length_bonus=bonus, horizon=horizon, can_end_early=early, stop_token=stop, cumw=cumw)
        for theta in (-INF, -4.0, 0.0, INF)
        for bonus in (-0.7, 0.0, 0.7)
        for horizon in (3, 40)  # 3: the cap is reached at answer position 2
        for early in (0, 1)
        for stop in (-1, 0, 900)
        for cumw in (-0.5, -3.0)
    ]
    kinds = kinds[:: 23 if slow(backend) else 1]
    table = table_of(kinds)
    rows = len(kinds)
    slot, position, _ = vectors(range(rows), [4 + row % 3 for row in range(rows)])
    live = torch.arange(rows) % 5 != 0
    logits = normal_logits(rows, vocab, seed=1)
    plain, before = sampled(table, logits, slot, position), clone(table)
    tokens, flags, cumw = expected(before, logits, slot, position, live, plain)
    out = pk.sample_slots(table, logits, slot, position, live)
    assert out.token.tolist() == tokens
    assert out.flags.tolist() == flags
    assert_same_bits([table.cumw], [cumw])
    assert 0.1 < np.mean([flag == SlotFlag.REJECTED for flag in flags]) < 0.9
    assert_same_bits([out.values[:, 0], out.values[:, 1]], [plain.logq, plain.weight])  # of the drawn token
    assert_same_bits([table.field, table.exponent, table.bound], [before.field, before.exponent, before.bound])


def test_a_threshold_is_met_to_the_last_bit_where_no_length_counts(backend):
    """n = HORIZON = 1 and lambda = 0: both terms are 0 whatever the logarithm, and W alone is compared."""
    logits = normal_logits(3, 37, seed=2)[:1].expand(3, 37)
    kinds = [Proposal(horizon=1, beta=4.0)] * 3
    table = table_of(kinds)
    position = torch.full((3,), 4)
    w = float(table.cumw[0] + sampled(table, logits, torch.arange(3), position).weight[0].double())
    table.bound[:, SlotBound.THETA] = torch.tensor([near(w, -1), w, near(w, 1)], dtype=torch.float64)
    out = pk.sample_slots(table, logits, torch.arange(3), position, torch.ones(3, dtype=torch.bool))
    assert out.flags.tolist() == [0, 0, SlotFlag.REJECTED]


def test_rows_that_are_not_live_are_drawn_and_touch_nothing_of_the_table(backend):
    kinds = [Proposal(theta=INF), Proposal(theta=INF)]
    table, logits = table_of(kinds), normal_logits(2, 50)
    before = clone(table)
    slot, position, live = vectors([0, 1], [4, 4], [False, True])
    plain = sampled(table, logits, slot, position)
    out = pk.sample_slots(table, logits, slot, position, live)
    assert out.flags.tolist() == [0, SlotFlag.REJECTED]
    assert out.token.tolist() == [plain.token[0].item(), kinds[1].stop_token]
    assert bits(table.cumw[0]) == bits(before.cumw[0])
    assert bits(table.cumw[1]) != bits(before.cumw[1])


def test_a_position_inside_the_prompt_is_drawn_with_the_word_of_its_negative_answer_position(backend):
    """What a chunk of a prompt draws is thrown away by the stack, and must only be harmless."""
    table, logits = table_of([Proposal(base=100)]), normal_logits(1, 50)
    slot, position, live = vectors([0], [31], [False])
    out = pk.sample_slots(table, logits, slot, position, live)
    assert out.token.tolist() == sampled(table, logits, slot, position).token.tolist()


def test_bad_rows_are_reported_feed_a_sound_token_and_leave_the_sum(backend):
    nan, inf, none = normal_logits(3, 40).unbind(0)
    nan[39], inf[0], none[:] = NAN, INF, -INF
    sound = normal_logits(1, 40, seed=9)[0]
    given = [
        (nan, Proposal(stop_token=6), Status.NAN),
        (inf, Proposal(stop_token=-1), Status.POS_INF),
        (none, Proposal(stop_token=0), Status.NO_MASS),
        (sound, Proposal(alpha=0.0), Status.NAN),
        (sound, Proposal(alpha=NAN), Status.NAN),
        (sound, Proposal(beta=-1.0), Status.NAN),
        (sound, Proposal(beta=INF), Status.NAN),
        (sound, Proposal(first=0, exclude=40, stop_token=-5), Status.BAD_TOKEN),
        (sound, Proposal(first=0, exclude=2**40), Status.BAD_TOKEN),
        (sound, Proposal(first=0, exclude=-7), Status.OK),
    ]
    logits = torch.stack([row for row, _, _ in given])
    kinds = [replace(p, theta=INF) for _, p, _ in given]  # each would be rejected
    for entropy in (True, False):
        table = table_of(kinds)
        slot, position, live = vectors(range(len(kinds)), [4] * len(kinds))
        out = pk.sample_slots(table, logits, slot, position, live, entropy=entropy)
        want = [int(status) for _, _, status in given]
        assert out.flags.tolist() == [*want[:-1], SlotFlag.REJECTED]
        assert out.token.tolist() == [max(p.stop_token, 0) for p in kinds]
        assert out.values[:-1, :2].isnan().all()
        assert out.values[:-1, 2].isnan().all() if entropy else (out.values[:, 2] == 0).all()
        assert out.values[-1].isfinite().all()
        assert (table.cumw[:-1] == kinds[0].cumw).all()
        assert table.cumw[-1] != kinds[0].cumw


def test_a_bad_row_spoils_no_other(backend):
    kinds = proposals_of_many_kinds(3)
    logits = normal_logits(3, 300)
    arguments = vectors([0, 1, 2], [p.base for p in kinds])
    clean = pk.sample_slots(table_of(kinds), logits, *arguments, entropy=True)
    logits[1] = NAN
    spoilt = pk.sample_slots(table_of(kinds), logits, *arguments, entropy=True)
    for row in (0, 2):
        assert_same_bits([c[row] for c in spoilt], [c[row] for c in clean])


def test_numbers_that_are_none_reject_nothing(backend):
    kinds = [
        Proposal(theta=NAN), Proposal(cumw=NAN, theta=0.0), Proposal(cumw=NAN, theta=INF),
        Proposal(length_bonus=NAN, theta=INF), Proposal(cumw=INF, theta=INF), Proposal(cumw=-INF, theta=-INF),
        Proposal(length_bonus=INF, theta=0.0), Proposal(length_bonus=-INF, theta=-INF),
    ]  # fmt: skip
    table = table_of(kinds)
    rows = len(kinds)
    out = pk.sample_slots(table, normal_logits(rows, 40), *vectors(range(rows), [4] * rows))
    assert out.flags.tolist() == [0] * rows
    assert table.cumw.isnan().tolist() == [math.isnan(p.cumw) for p in kinds]


def test_lengths_that_are_none_count_as_one(backend):
    """A horizon of 0 or less, and a live row before its answer."""
    kinds = [
        Proposal(horizon=h, can_end_early=e, base=b, theta=INF) for h in (0, -9, 1) for e in (0, 1) for b in (5, 50)
    ]
    table, rows = table_of(kinds), len(kinds)
    slot, position, live = vectors(range(rows), [4] * rows)
    logits = normal_logits(rows, 40)
    plain = sampled(table, logits, slot, position)
    table.bound[:, SlotBound.THETA] = table.cumw + plain.weight.double()  # both terms 0: not below
    assert pk.sample_slots(clone(table), logits, slot, position, live).flags.tolist() == [0] * rows
    table.bound[:, SlotBound.THETA] += 1e-6
    rejected = pk.sample_slots(table, logits, slot, position, live).flags.tolist()
    assert rejected == [SlotFlag.REJECTED] * rows


# ---- rows and buffers


def test_rows_that_are_not_ours_leave_their_outputs_and_the_table(backend):
    kinds = [Proposal(), replace(Proposal(), active=0), Proposal()]
    table = table_of(kinds)
    before = clone(table)
    slots = [-1, 3, 2**40, -(2**63), 1, 2]
    logits = normal_logits(6, 70)
    logits[:5] = NAN  # nobody looks
    slot, position, live = vectors(slots, [4] * 6)
    out = pk.sample_slots(table, logits, slot, position, live, entropy=True)
    assert out.token.tolist()[:5] == [-1] * 5
    assert out.flags.tolist() == [0] * 6
    assert out.values[:5].isnan().all()
    assert out.values[5].isfinite().all()
    assert_same_bits([table.cumw[:2]], [before.cumw[:2]])
    assert table.cumw[2] != before.cumw[2]


def test_two_rows_may_name_one_slot_that_is_not_ours_or_not_live(backend):
    table = table_of([replace(Proposal(), active=0), Proposal()])
    slot, position, live = vectors([0, 0, -1, -1, 1, 1], [4] * 6, [True, True, True, True, True, False])
    out = pk.sample_slots(table, normal_logits(6, 30), slot, position, live)
    assert (out.token >= 0).tolist() == [False] * 4 + [True] * 2


def strided_outputs(rows: int) -> tuple[torch.Tensor, ...]:
    """Columns of wider tensors of `rows` rows, and the tensors: token, values, flags, then what they lie in."""
    token, flags = torch.full((rows, 3), -77), torch.full((2 * rows,), -77)
    values = torch.full((rows, 9), NAN)
    return token[:, 1], values[:, 1::3], flags[::2], token, values, flags


@pytest.mark.parametrize("transposed", [False, True])
def test_the_out_form_writes_any_strides_and_leaves_rows_behind_the_batch(backend, transposed):
    rows, most, vocab = 3, 5, 300
    kinds = proposals_of_many_kinds(4)
    logits, arguments = normal_logits(rows, vocab), vectors([3, -1, 0], [kinds[3].base, 0, kinds[0].base])
    want = pk.sample_slots(table_of(kinds), logits, *arguments, entropy=True)
    token, values, flags, *whole = strided_outputs(most)
    if transposed:
        values = torch.full((3, most), NAN).T
    workspace = torch.full((pk.workspace_size(most, vocab) + 1,), NAN)[1:]
    table = table_of(kinds)
    pk.sample_slots_out(table, logits, *arguments, workspace, token, values, flags, entropy=True)
    ours = torch.tensor([True, False, True])
    assert_same_bits([token[:3][ours], values[:3][ours], flags[:3][ours]], [column[ours] for column in want])
    untouched = torch.tensor([False, True, False, True, True])
    assert (token[untouched] == -77).all()
    assert values[untouched].isnan().all()
    assert (flags[untouched] == -77).all()
    assert (whole[0] == -77).sum() == most * 3 - 2, "written beside its column"
    assert transposed or whole[1].isfinite().sum() == 2 * 3
    assert (whole[2] == -77).sum() == 2 * most - 2


@host_only
@pytest.mark.parametrize("entropy", [True, False])
def test_a_step_is_two_launches_whatever_its_rows_hold(monkeypatch, entropy):
    from power_kernels.triton import slots

    launches = []
    monkeypatch.setattr(slots, "launch", lambda kernel, grid, *_, **__: launches.append((kernel.fn.__name__, grid)))
    table, rows, vocab = table_of(proposals_of_many_kinds(5)), 4, 2100
    arguments = vectors([0, -1, 3, 4], [5, 5, 5, 5], [True, True, False, True])
    out = torch.zeros(pk.workspace_size(rows, vocab)), torch.zeros(9).long(), torch.zeros(9, 3), torch.zeros(9).long()
    with pk.use_backend("triton"):
        pk.sample_slots_out(table, normal_logits(rows, vocab), *arguments, *out, entropy=entropy)
    assert launches == [("_slot_mass_kernel", (rows * 3,)), ("_slot_finish_kernel", (rows,))]


def test_an_empty_batch_writes_nothing(backend):
    table = table_of([Proposal()])
    before = clone(table)
    out = pk.sample_slots(table, torch.empty(0, 5), *vectors([], [], []))
    assert [tuple(column.shape) for column in out] == [(0,), (0, 3), (0,)]
    assert_same_bits(table.tensors(), before.tensors())


@host_only
def test_two_live_rows_of_one_slot_are_refused_on_a_host(backend):
    table = table_of([Proposal()] * 3)
    before = clone(table)
    with pytest.raises(pk.ArgumentError, match=r"^slot has 2 live rows of slot 1; a slot must have one at most"):
        pk.sample_slots(table, normal_logits(3, 30), *vectors([1, 0, 1], [4, 4, 4]))
    assert_same_bits(table.tensors(), before.tensors())


@pytest.mark.parametrize(
    ("slots", "error"), [(0, pk.ArgumentError), (2.0, pk.ArgumentTypeError), (True, pk.ArgumentTypeError)]
)
def test_a_table_has_at_least_one_slot(slots, error):
    with pytest.raises(error, match=r"^slots is"):
        SlotTable.allocate(slots)


# ---- the chain decides


class RandomWalk(ReferenceChain):
    """A chain's own bound, for proposals made of given weights that run to the cap `length`."""

    def __init__(self, length: int, bonus: float, can_end: bool):
        law = pk.Law(length, length, mcmc_steps=1, final_steps=0, length_bonus=bonus)
        super().__init__(lambda tokens: None, law, alpha=4.0, eos=(0,) if can_end else ())
        self.cap = length

    def gives_up(self, weights: list[float], theta: float) -> bool:
        """Whether the chain rejects a proposal of these weights, none of whose tokens ends an answer."""
        proposal = Answer(tokens=(1,) * len(weights), cumw=tuple(accumulate(weights, initial=0.0)))
        return self.rejects(Answer(), proposal, len(weights) == self.cap, theta, self.cap)


def test_what_is_rejected_here_the_chain_rejects_as_well(backend):
    """Walks whose threshold lies within a few slacks of where the bound here or the chain's own decides.

    The weights are sample_slots' own, position after position; the chain is asked at the position where it rejects.
    """
    walks, length = (6, 4) if slow(backend) else (1200, 12)
    laws = [(bonus, can_end) for bonus in (-0.5, 0.0, 0.4) for can_end in (False, True)]
    chains = [RandomWalk(length, bonus, can_end) for bonus, can_end in laws]
    p = Proposal(alpha=4.0, beta=4.0, horizon=length, stop_token=-1)
    kinds = [replace(p, serial=i, length_bonus=laws[i % 6][0], can_end_early=int(laws[i % 6][1])) for i in range(walks)]
    # First without a threshold, to learn the weights; then with one near W + most at some position of its own walk.
    drawn, _ = weights_of(length, kinds)
    generator = np.random.default_rng(11)
    thetas = []
    for i, walk in enumerate(drawn):
        at, term = int(generator.integers(1, length + 1)), chains[i % 6].length_term
        nearest = (at, min(at + 1, length)) if laws[i % 6][1] else (length,)
        most = p.cumw + sum(walk[:at]) + max(term[int(generator.choice(nearest))], term[length])
        thetas.append(
            most + float(generator.choice([-1.0, 1.0])) * float(generator.choice([0, 1e-16, 1e-9, 1e-6, 0.1]))
        )
    slackened = [replace(k, theta=theta - 1e-9 * (1 + abs(theta))) for k, theta in zip(kinds, thetas, strict=True)]
    again, flags = weights_of(length, slackened)
    assert again == drawn, "a threshold changed a draw"
    rejected = 0
    for i, (walk, theta, seen) in enumerate(zip(drawn, thetas, flags, strict=True)):
        if SlotFlag.REJECTED in seen:
            rejected += 1
            n = seen.index(SlotFlag.REJECTED) + 1
            assert chains[i % 6].gives_up([p.cumw + walk[0], *walk[1:n]], theta), (i, n, theta)
    assert rejected > walks / 4


def weights_of(length: int, kinds: list[Proposal]) -> tuple[list, list]:
    """weights and flags, each [walks][length], of all positions of an answer in turn."""
    table, walks = table_of(kinds), len(kinds)
    weights, flags = [], []
    for t in range(length):
        logits = normal_logits(walks, 11, scale=0.7, seed=t)
        out = pk.sample_slots(table, logits, *vectors(range(walks), [kinds[0].base - 1 + t] * walks))
        weights.append(out.values[:, 1].double().tolist())
        flags.append(out.flags.tolist())
    return [list(w) for w in zip(*weights, strict=True)], [list(f) for f in zip(*flags, strict=True)]
