"""branch_particles and select_candidate on every backend, against float64 (DESIGN 3.9, 5.9)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels.ops.particles import BranchOutput, _outputs
from power_kernels.particles import Tally
from power_kernels.reference import particles as reference
from power_kernels.state import Status
from tests.op_helpers import DTYPES, INF, INTERPRETED, NAN, assert_same_bits, serving, strided
from tests.op_helpers import PARTICLE_BACKENDS as BACKENDS

# numpy's, inside the interpreter and the reference, about the hostile values below
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BELOW_ONE = 1 - 2**-53
SIZES = (1, 2, 3, 7, 64, 255, 256, 257, 2047, 2048, 2049, 4096, 4097, 5000)
# How far a uniform may lie from a boundary for backends to differ: the tile masses are float32.
MARGIN = 1e-6


@pytest.fixture(params=BACKENDS)
def backend(request):
    with serving(request.param) as name:
        yield name


def slow(backend: str) -> bool:
    return backend == "triton" and INTERPRETED


@dataclass
class Position:
    """The arguments of `branch_particles`: G groups of R rows."""

    logits: torch.Tensor
    alpha: torch.Tensor
    log_weight: torch.Tensor
    order: torch.Tensor
    reference: torch.Tensor
    last: torch.Tensor
    closing_bonus: torch.Tensor
    uniform: torch.Tensor
    tally: torch.Tensor
    eos: torch.Tensor
    stop_state: torch.Tensor | None = None
    stop_next: torch.Tensor | None = None
    length_bonus: float = 0.0
    rho: float = 0.0

    @property
    def groups(self) -> int:
        return self.log_weight.shape[0]

    @property
    def rows(self) -> int:
        return self.log_weight.shape[1]

    def branch(self, **changes) -> pk.BranchOutput:
        return pk.branch_particles(**{**vars(self), **changes})

    def some(self, groups: list[int]) -> Position:
        """These groups alone."""
        columns = ("alpha", "log_weight", "order", "reference", "last", "closing_bonus", "uniform", "tally")
        own = {name: getattr(self, name)[groups] for name in columns}
        if self.stop_state is not None:
            own["stop_state"] = self.stop_state[groups]
        vocab = self.logits.shape[1]
        return replace(self, logits=self.logits.view(self.groups, -1, vocab)[groups].reshape(-1, vocab), **own)


def position(groups: int, particles: int, vocab: int, seed: int = 0, scale: float = 3.0, **changes) -> Position:
    """Rows of normal logits, weights a nat apart, no reference, nothing closed yet."""
    random = torch.Generator().manual_seed(seed)
    rows = particles + 1
    log_weight = torch.randn(groups, rows, dtype=torch.float64, generator=random)
    log_weight[:, -1] = -INF
    plain = Position(
        logits=torch.randn(groups * rows, vocab, generator=random) * scale,
        alpha=torch.full((groups,), 2.0),
        log_weight=log_weight,
        order=torch.arange(rows, dtype=torch.int32).repeat(groups, 1),
        reference=torch.full((groups,), -1),
        last=torch.zeros(groups, dtype=torch.bool),
        closing_bonus=torch.zeros(groups, dtype=torch.float64),
        uniform=torch.rand(groups, 2, dtype=torch.float64, generator=random),
        tally=torch.full((groups, len(Tally)), -INF, dtype=torch.float64),
        eos=torch.empty(0, dtype=torch.int64),
    )
    return replace(plain, **changes)


def fuzzed(seed: int, most_particles: int = 128, most_vocab: int = 5000) -> Position:
    """Anything that a position may be, and much that it should not be."""
    random = np.random.default_rng(seed)

    def one(*values):
        return values[random.integers(len(values))]

    groups, rows = one(1, 2, 3), min(one(2, 3, 4, 8, 16, 128), most_particles) + 1
    vocab = one(*(v for v in SIZES if v <= most_vocab))
    logits = random.normal(size=(groups * rows, vocab)) * one(0.1, 1.0, 5.0, 30.0)
    if one(True, False):
        keep = random.random(logits.shape) < one(0.01, 0.5, 0.9)
        keep[np.arange(len(keep)), random.integers(vocab, size=len(keep))] = True
        logits[~keep] = -INF
    if seed % 7 == 0:
        logits[random.integers(len(logits)), random.integers(vocab)] = one(NAN, INF)
        logits[random.integers(len(logits))] = -INF
    log_weight = random.normal(size=(groups, rows)) * one(0.0, 1.0, 30.0, 1000.0)
    log_weight[random.random(log_weight.shape) < one(0.0, 0.2, 0.9)] = -INF
    log_weight[:, -1] = np.where(random.random(groups) < 0.3, -INF, random.normal(size=groups))
    eos = torch.tensor([-5, vocab, *random.integers(vocab, size=4), *random.integers(vocab, size=1).repeat(2)])
    stops = 4 if one(True, False) else 0
    stop_next = torch.from_numpy(random.integers(-1, 4, size=(4, vocab)).astype(np.int16))
    if one(True, False):
        stop_next[:, : vocab // 2 + 1] = 0
    tally = random.normal(size=(groups, 4)) * 3 - one(0.0, 10.0, INF)
    tally[:, Tally.OTHERS] = np.logaddexp(tally[:, Tally.OTHERS], tally[:, Tally.KEPT])
    reference = random.integers(vocab, size=groups)
    likely = logits.reshape(groups, rows, vocab)[:, -1].argmax(1)
    kinds = random.integers(5, size=groups)
    reference = np.choose(kinds, [reference, likely, np.full(groups, -1), likely, reference])
    if seed % 11 == 0:
        reference[0] = one(vocab, eos[2], -3)
    return Position(
        logits=torch.from_numpy(logits).to(one(*DTYPES)),
        alpha=torch.from_numpy(random.choice([0.5, 1.0, 2.0, 2.5, 4.0], size=groups).astype(np.float32)),
        log_weight=torch.from_numpy(log_weight),
        order=torch.from_numpy(np.stack([random.permutation(rows) for _ in range(groups)]).astype(np.int32)),
        reference=torch.from_numpy(reference.astype(np.int64)),
        last=torch.from_numpy(random.random(groups) < 0.1),
        closing_bonus=torch.from_numpy(random.normal(size=groups) * one(0.0, 1.0)),
        uniform=torch.from_numpy(random.choice([0.0, BELOW_ONE, *random.random(18)], size=(groups, 2))),
        tally=torch.from_numpy(tally),
        eos=eos[: one(0, 3, 8)],
        stop_state=torch.from_numpy(random.integers(4, size=(groups, rows)).astype(np.int16)) if stops else None,
        stop_next=stop_next if stops else None,
        length_bonus=one(0.0, 0.7, -2.0),
        rho=one(0.0, 0.1, 1.0),
    )


def reference_of(case: Position, **changes) -> pk.BranchOutput:
    """Not through `pk.branch_particles`, which takes no float64 logits."""
    inputs = {**vars(case), **changes}
    out = BranchOutput(
        *_outputs(case.log_weight), inputs.pop("tally").clone(), torch.empty(case.groups, dtype=torch.float64),
        torch.empty(case.groups, case.rows, dtype=torch.int32),
    )  # fmt: skip
    names = ("parent", "token", "child_log_weight", "logp", "child_order", *BranchOutput._fields[5:])
    reference.branch_particles_out(**inputs, workspace=None, **dict(zip(names, out, strict=True)))
    return out


def near_a_boundary(case: Position, truth: pk.BranchOutput) -> list[bool]:
    """Of each group, whether other children would have come of a uniform that is a little larger or smaller, or of tile
    masses that are a little off. A light reference's uniform only says where in its part of the line its point lies;
    all other points follow that one, and so it is moved by as much as moves them by the margin."""
    random = torch.Generator().manual_seed(0)
    rows, vocab = case.logits.shape
    differs = torch.zeros(case.groups, dtype=torch.bool)
    noise = torch.randn(rows, -(-vocab // 256), dtype=torch.float64, generator=random)
    noise = noise.repeat_interleave(256, 1)[:, :vocab]
    share = case.log_weight[:, -1] + case.length_bonus + case.alpha * truth.logp[:, -1] - truth.log_threshold
    scale = torch.ones_like(case.uniform)
    scale[:, 0] = share.exp().nan_to_num(1.0).clamp(MARGIN, 1.0)
    for step in (-MARGIN, MARGIN):
        uniform = (case.uniform + step / scale).clamp(0.0, BELOW_ONE)
        for changes in ({"uniform": uniform}, {"logits": case.logits.double() + step * noise}):
            moved = reference_of(case, **changes)
            for name in ("parent", "token", "candidate"):
                differs |= (getattr(moved, name) != getattr(truth, name)).any(1)
    return differs.tolist()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    """Closer than float32 logits allow; the same infinities and NaN."""
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-6, atol=1e-5, err_msg=name)


def assert_sound(case: Position, out: pk.BranchOutput) -> None:
    """What holds whatever the uniforms are."""
    taken = out.token >= 0
    assert (taken.sum(1) < case.rows).all(), "more survivors than particles"
    assert (out.log_weight[~taken] == -INF).all()
    assert out.log_weight[taken].isfinite().all()
    assert out.logp[~taken].isnan().all()
    assert out.logp[taken].isfinite().all()
    assert torch.equal(taken, out.parent >= 0)
    for g in range(case.groups):
        children = list(zip(out.parent[g][taken[g]].tolist(), out.token[g][taken[g]].tolist(), strict=True))
        assert len(set(children)) == len(children), "a child survives once"
        assert out.order[g].sort().values.tolist() == list(range(case.rows))
        sound = out.status[g].eq(int(Status.OK)).all()
        wanted = int(case.reference[g])
        if wanted >= 0 and sound:
            survives = (int(out.parent[g, -1]), int(out.token[g, -1])) == (case.rows - 1, wanted)
            closes = wanted in case.eos.tolist() or bool(case.last[g])
            if case.stop_next is not None:
                closes |= int(case.stop_next[int(case.stop_state[g, -1]), wanted]) < 0
            assert survives != closes, "the reference survives, or it closes"


def assert_as_reference(case: Position, out: pk.BranchOutput) -> int:
    """Returns how many groups could be compared child by child."""
    assert_sound(case, out)
    truth = reference_of(case)
    assert torch.equal(out.status, truth.status)
    assert_close(out.log_threshold, truth.log_threshold, "log_threshold")
    steady = [Tally.OTHERS, Tally.REFERENCE, Tally.MASS]
    assert_close(out.tally[:, steady], truth.tally[:, steady], "tally")
    compared = 0
    for g, excluded in enumerate(near_a_boundary(case, truth)):
        if excluded:
            continue
        compared += 1
        for name in ("parent", "token", "order", "candidate"):
            assert getattr(out, name)[g].tolist() == getattr(truth, name)[g].tolist(), (name, g)
        for name in ("log_weight", "logp", "candidate_logp", "tally"):
            assert_close(getattr(out, name)[g], getattr(truth, name)[g], name)
    return compared


# ---- against the reference


@pytest.mark.parametrize("part", range(4))
def test_anything_comes_out_as_the_reference_has_it(backend, part):
    compared = groups = 0
    few = dict(most_particles=8, most_vocab=300) if slow(backend) else {}
    for seed in range(part, 12 if slow(backend) else 160, 4):
        case = fuzzed(seed, **few)
        groups += case.groups
        compared += assert_as_reference(case, case.branch())
    assert compared > 0.7 * groups


@pytest.mark.parametrize("vocab", SIZES)
def test_vocabularies_of_any_size_and_rows_of_any_stride(backend, vocab):
    case = position(2, 4, vocab, seed=vocab, eos=torch.tensor([0, vocab - 1]))
    case.logits = strided(case.logits)
    assert_as_reference(case, case.branch())


def hostile() -> dict[str, Position]:
    """Each: 3 or 4 particles in rows 0 and 1 or more, 40 children."""
    cases = {}
    cases["weights 1000 nats apart"] = far = position(1, 4, 40)
    far.log_weight[0, :4] = torch.tensor([-2000.0, 0.0, -1000.0, 1000.0])
    cases["weights 1000 nats apart, a reference without mass"] = replace(
        far, reference=torch.tensor([3]), log_weight=torch.tensor([[-2000.0, 0.0, -1000.0, 1000.0, -3000.0]]).double()
    )
    cases["mass on fewer children than particles, to the last bit"] = few = position(1, 4, 40, scale=0.0)
    few.logits[:, 1:] = -40.0
    few.log_weight[0, 2:] = -INF
    cases["children without any mass"] = none = position(1, 4, 40, scale=0.0, reference=torch.tensor([3]))
    none.logits[:, 2:] = -600.0
    none.log_weight[0] = torch.tensor([0.0, -INF, -INF, -INF, -500.0])
    cases["one child possible"] = one = position(1, 4, 40)
    one.logits[:, 1:] = -INF
    one.log_weight[0, 1:] = -INF
    cases["ties"] = ties = position(1, 4, 64, scale=0.0)
    ties.log_weight[:, :4] = 0.0
    ties.order = torch.tensor([[2, 0, 4, 1, 3]], dtype=torch.int32)
    cases["ties of heavy children"] = heavy = replace(ties, logits=ties.logits.clone())
    heavy.logits[0:2, 7] = 60.0
    heavy.log_weight = torch.tensor([[0.0, 0.0, -70.0, -70.0, -INF]]).double()
    cases["nothing opens"] = replace(position(1, 4, 40), eos=torch.arange(40))
    cases["only the reference opens"] = only = position(1, 4, 40, eos=torch.arange(1, 40), reference=torch.tensor([0]))
    only.log_weight[0] = torch.tensor([-INF, -INF, -INF, -INF, 0.5])
    cases["the reference closes alone"] = alone = replace(only, eos=torch.tensor([5]), reference=torch.tensor([5]))
    alone.tally = torch.full_like(alone.tally, -INF)
    cases["all closes, at the horizon"] = replace(position(1, 4, 40), last=torch.ones(1, dtype=torch.bool))
    cases["what closes outweighs what is open by far"] = closing = position(1, 4, 40, eos=torch.tensor([3]))
    closing.logits[:, 3] = 900.0
    return cases


HOSTILE = tuple(hostile())


@pytest.mark.parametrize("rho", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_positions_come_out_as_the_reference_has_them(backend, name, rho):
    case = replace(hostile()[name], rho=rho, uniform=torch.tensor([[0.37, 0.61]]).double())
    assert assert_as_reference(case, case.branch()) == 1


def test_of_equally_heavy_children_the_first_in_the_order_comes_first(backend):
    """The order is that of the prefixes. Both keep their rows, the third takes the first that is free."""
    out = hostile()["ties of heavy children"].branch()
    assert out.token[0, :2].tolist() == [7, 7]
    assert out.parent[0, :2].tolist() == [0, 1]


@pytest.mark.parametrize("u", [0.0, BELOW_ONE])
def test_uniforms_at_their_ends(backend, u):
    """Never too many, never one without mass, whatever is rounded."""
    for seed in range(3 if slow(backend) else 30):
        case = fuzzed(1000 + 7 * seed + 1, 8, 300)
        case.uniform.fill_(u)
        out = case.branch()
        assert_sound(case, out)
        assert torch.equal(out.status, reference_of(case).status)


# ---- exactness


def repeated(case: Position, uniforms: torch.Tensor) -> Position:
    """A case of one group, once a uniform of the survivors' draw."""
    many = case.some([0] * len(uniforms))
    return replace(many, uniform=torch.stack([uniforms, torch.full_like(uniforms, 0.5)], 1))


def survivors(case: Position, uniforms: torch.Tensor) -> list[dict]:
    """{(parent, token): (log_weight, logp)} of each uniform."""
    out = repeated(case, uniforms).branch()
    columns = [column.tolist() for column in (out.parent, out.token, out.log_weight, out.logp)]
    return [
        {(p, t): (w, logp) for p, t, w, logp in zip(*row, strict=True) if t >= 0} for row in zip(*columns, strict=True)
    ]


def outcomes(case: Position, guesses: np.ndarray) -> list[tuple[float, dict]]:
    """(probability, survivors) of all values of the uniform. guesses: where the survivors change, to 1e-5."""
    guesses = np.unique(guesses.round(6))
    guesses = torch.from_numpy(guesses[(guesses > 3e-5) & (guesses < 1 - 3e-5)])
    assert guesses.diff().min() > 3e-5, "boundaries too close to be told apart"
    low, high = guesses - 1e-5, guesses + 1e-5
    below, above = survivors(case, low), survivors(case, high)
    at_ends = survivors(case, torch.tensor([0.0, BELOW_ONE], dtype=torch.float64))
    before, after = [at_ends[0], *above], [*below, at_ends[1]]
    assert [set(s) for s in before] == [set(s) for s in after], "a boundary was not guessed"
    for _ in range(36):
        middle = (low + high) / 2
        is_below = torch.tensor([set(a) == set(b) for a, b in zip(survivors(case, middle), below, strict=True)])
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    cuts = [0.0, *high.tolist(), 1.0]
    return [(b - a, s) for a, b, s in zip(cuts[:-1], cuts[1:], before, strict=True)]


def probability(cells: list[tuple[float, dict]], *children) -> float:
    """That all of these survive."""
    return math.fsum(length for length, survive in cells if all(c in survive for c in children))


TOKENS = (0, 1, 2, 700, 2047, 2048, 2099)  # in two tiles, or in three


def spread_out() -> Position:
    """5 particles, of which one is the reference's, with 7 possible children each; few are heavy."""
    case = position(1, 4, 2100, alpha=torch.ones(1))
    random = torch.Generator().manual_seed(4)
    case.logits.fill_(-INF)
    case.logits[:, list(TOKENS)] = torch.randn(5, len(TOKENS), generator=random) * 1.5
    case.log_weight = torch.randn(1, 5, dtype=torch.float64, generator=random)
    case.order = torch.tensor([[3, 1, 4, 0, 2]], dtype=torch.int32)
    return case


def light_line(case: Position, log_threshold: float) -> tuple[list, np.ndarray]:
    """The children along the line, and the line in units of kappa, without the heavy ones, from 0."""
    z = case.logits.double().log_softmax(1)
    children = [(row, token) for row in case.order[0].tolist() for token in TOKENS]
    weight = np.array([float(case.log_weight[0, row] + z[row, token]) for row, token in children])
    share = np.exp(weight - log_threshold)
    share[share > 1] = 0.0
    return children, np.concatenate([[0.0], np.cumsum(share)])


def test_weights_are_those_of_the_draw_to_the_last_digits(backend):
    """Probability times weight, summed over all values of the uniform, is the child's own weight, to 1e-12, however the
    tile masses were rounded: with their error of 1e-8 the estimate of Z would be off by as much."""
    case = spread_out()
    first = case.branch()
    children, line = light_line(case, float(first.log_threshold))
    cells = outcomes(case, line % 1.0)
    light = [c for c, share in zip(children, np.diff(line), strict=True) if share > 0]
    assert len(light) > 25
    assert len(cells) > 20
    for child in children:
        weight, logp = next(s[child] for _, s in cells if child in s)
        own = float(case.log_weight[0, child[0]]) + logp
        assert probability(cells, child) * math.exp(weight) == pytest.approx(math.exp(own), rel=1e-12)
        if child not in light:
            assert probability(cells, child) == 1.0
    total = math.fsum(length * math.exp(w) for length, s in cells for w, _ in s.values())
    assert total == pytest.approx(float(case.log_weight[0].exp().sum()), rel=1e-6)


@pytest.mark.parametrize("token", [700, 2099])
def test_with_a_reference_others_survive_as_they_do_where_it_is_drawn(backend, token):
    """The conditional draw: P(child survives, given the reference) of the draw without one, to 1e-12."""
    case = spread_out()
    children, line = light_line(case, float(case.branch().log_threshold))
    plain = outcomes(case, line % 1.0)
    own = children.index((4, token))
    start, share = line[own], line[own + 1] - line[own]
    assert share > 0.03, "a light one, and not too rare"
    turns = np.concatenate([(line - start) % 1.0, (line - start) % 1.0 + 1.0])
    given = replace(case, reference=torch.tensor([token]))
    cells = outcomes(given, turns / share)
    assert all((4, token) in s for _, s in cells)
    sure = probability(plain, (4, token))
    shared = 0
    for child in children:
        joint = probability(plain, child, (4, token)) / sure
        shared += 0 < joint < 1
        assert probability(cells, child) == pytest.approx(joint, abs=1e-12)
    assert shared > 1


# ---- batches, threads, rows that are bad or empty


def sections(out: pk.BranchOutput, groups: list[int]) -> list[torch.Tensor]:
    return [column[groups] for column in out]


def test_a_group_comes_out_the_same_bits_in_any_batch(backend):
    plain = replace(position(4, 8, 5000, seed=1, eos=torch.tensor([7, 4999])), rho=0.1)
    plain.reference[2] = 9
    plain.log_weight[2, -1] = 0.0
    for case in (fuzzed(12, 8, 300), plain):
        together = case.branch()
        for g in range(case.groups):
            assert_same_bits(case.some([g]).branch(), sections(together, [g]))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="threads are the C++ backend's")
def test_the_number_of_threads_changes_no_bit(cpp, one_thread):
    case = position(3, 16, 9000, seed=2, eos=torch.tensor([7, 4999]))
    alone = case.branch()
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert_same_bits(case.branch(), alone)


def test_empty_rows_are_not_read(backend):
    case = position(2, 4, 300)
    case.log_weight[0, 1] = -INF
    clean = case.branch()
    case.logits[1] = NAN
    case.logits[-1] = INF  # of the reference, of which there is none
    assert_same_bits(case.branch(), clean)
    assert clean.status.eq(int(Status.OK)).all()


BAD = {
    "NaN": (lambda case: case.logits[1].fill_(NAN), 1, Status.NAN),
    "one NaN": (lambda case: case.logits[1, 299:].fill_(NAN), 1, Status.NAN),
    "+inf": (lambda case: case.logits[1, 7:8].fill_(INF), 1, Status.POS_INF),
    "nothing possible": (lambda case: case.logits[1].fill_(-INF), 1, Status.NO_MASS),
    "weight NaN": (lambda case: case.log_weight[0, 1:2].fill_(NAN), 1, Status.NAN),
    "weight +inf": (lambda case: case.log_weight[0, 1:2].fill_(INF), 1, Status.NAN),
    "reference beyond the vocabulary": (lambda case: case.reference[:1].fill_(300), 4, Status.BAD_TOKEN),
    "impossible reference": (lambda case: case.logits[4, 5:6].fill_(-INF), 4, Status.BAD_TOKEN),
    "reference without a particle": (lambda case: case.log_weight[0, 4:].fill_(-INF), 4, Status.BAD_TOKEN),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_takes_its_group_out_and_no_other(backend, name):
    case = position(2, 4, 300, reference=torch.tensor([5, -1]), tally=torch.randn(2, 4, dtype=torch.float64))
    case.log_weight[:, 4] = 0.0
    sound = case.branch()
    spoil, row, status = BAD[name]
    spoil(case)
    out = case.branch()
    assert out.status[0].tolist() == [int(status) if i == row else 0 for i in range(5)]
    assert out.parent[0].tolist() == out.token[0].tolist() == [-1] * 5
    assert out.candidate[0].tolist() == [-1, -1]
    assert out.order[0].tolist() == list(range(5))
    assert out.log_weight[0].tolist() == [-INF] * 5
    assert out.logp[0].isnan().all()
    assert out.candidate_logp[0].isnan()
    assert out.log_threshold[0].isnan()
    assert torch.equal(out.tally[0], case.tally[0])
    assert_same_bits(sections(out, [1]), sections(sound, [1]))
    assert sound.status.eq(int(Status.OK)).all()


def test_an_unsound_alpha_is_reported_where_nobody_looked_at_it(backend):
    for alpha in (NAN, INF, 0.0, -1.0):
        case = position(2, 4, 300)
        case.alpha[0] = alpha
        out = pk.BranchOutput(
            *torch.ops.power_kernels.branch_particles(
                case.logits, case.alpha, case.log_weight, case.order, None, case.reference, case.last,
                case.closing_bonus, case.uniform, case.eos, None, 0.0, 0.0, case.tally,
            )
        )  # fmt: skip
        assert out.status[0].tolist() == [int(Status.NAN)] * 4 + [int(Status.OK)]  # the last row is empty
        assert out.log_threshold[0].isnan()
        assert (out.token[1] >= 0).any()


# ---- the selection


def test_the_kept_candidate_is_taken_by_the_metropolised_rule(backend):
    random = np.random.default_rng(5)
    others, reference_weight = random.normal(size=(2, 400))
    kept = others + np.log(random.random(400))
    tally = torch.from_numpy(np.stack([others, kept, reference_weight, others], 1))
    uniform = torch.from_numpy(random.random(400))
    moved = pk.select_candidate(tally, uniform).numpy()
    odds = np.exp(others) / (np.exp(others) + np.exp(reference_weight) - np.exp(kept))
    clear = abs(uniform.numpy() - odds) > 1e-9
    assert clear.sum() > 390
    np.testing.assert_array_equal(moved[clear], (uniform.numpy() < odds)[clear])
    assert 50 < moved.sum() < 350


def test_selection_without_a_candidate_or_a_reference(backend):
    tally = torch.tensor(
        [[-INF, -INF, 0.5, 0.5], [-INF, -INF, -INF, -INF], [1000.0, 999.0, -INF, 0.0], [-900.0, -900.0, -1700.0, 0.0]]
    )
    for u in (0.0, 0.5, BELOW_ONE):
        moved = pk.select_candidate(tally.double(), torch.full((4,), u, dtype=torch.float64))
        assert moved.tolist() == [False, False, True, True]
