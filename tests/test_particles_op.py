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
        columns = "alpha log_weight order reference last closing_bonus uniform tally".split()
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
    kinds = [random.integers(5, size=groups) for _ in range(1)][0]
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
    masses that are a little off: these move the point at which a light reference is found, and with it all others."""
    random = torch.Generator().manual_seed(0)
    rows, vocab = case.logits.shape
    differs = torch.zeros(case.groups, dtype=torch.bool)
    for step in (-MARGIN, MARGIN):
        noise = torch.randn(rows, -(-vocab // 256), dtype=torch.float64, generator=random) * MARGIN
        logits = case.logits.double() + noise.repeat_interleave(256, 1)[:, :vocab]
        for changes in ({"uniform": (case.uniform + step).clamp(0.0, BELOW_ONE)}, {"logits": logits}):
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
