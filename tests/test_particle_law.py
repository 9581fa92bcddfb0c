"""DESIGN 3.9, 9.1: a sweep of particles leaves p^alpha e^(lambda n) as it is, and a start is unbiased, by enumeration.

The reference chain and the operators are replayed along every branch of their uniforms (`particle_enumeration`,
`particle_operators`), so that the matrix K of a sweep is that of the code; pi K = pi is asked of it.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest

from power_kernels.law import ParticleLaw, SweepCut
from power_kernels.reference import particles
from power_kernels.reference.particle_chain import ReferenceParticles
from tests import particle_faults as faults
from tests.devices import ON_CUDA, host_only
from tests.exact_law import Space, chi_square, space
from tests.op_helpers import BACKENDS, INTERPRETED, serving
from tests.particle_enumeration import Enumerated, enumerate_chain
from tests.particle_operators import enumerate_operators
from tests.toys import Toy

WHOLE, UNIFORM, UNIFORM_HORIZON = SweepCut
ALPHA = 2.0
P_VALUE = 1e-5

TOYS = {
    # Two particles of four open prefixes survive, or three, and fewer where rho lets them die. 15 answers.
    "EOS": Toy(3, 3, seed=22, eos=(0,), eos_shift=0.5, scale=0.5),
    "rare EOS": Toy(3, 3, seed=20, eos=(0,), eos_shift=-0.5),
    # Three rows with children, twice: the order along the line tells.
    "no EOS": Toy(2, 4, seed=26, scale=0.7),
    "stop string": Toy(3, 4, seed=20, eos=(0,), eos_shift=-1.5, spell=(b"", b"a", b"b"), stop=("bb",)),
    # More tokens than particles: the first position is thresholded already.
    "four tokens": Toy(4, 3, seed=20, eos=(0,), eos_shift=-0.5, spell=(b"", b"a", b"b", b"c"), stop=("ab",)),
    "impossible tokens": Toy(4, 3, seed=21, eos=(0,), impossible=0.3),
    # As small as can be, for Triton's interpreter: one heavy token of three open ones, two possible tokens after it.
    "two tokens": Toy(4, 2, seed=147, eos=(0,), impossible=0.5),
}


@dataclass(frozen=True)
class Case:
    toy: str
    particles: int
    cut: SweepCut
    rho: float
    length_bonus: float = 0.0

    @property
    def law(self) -> ParticleLaw:
        horizon = TOYS[self.toy].horizon
        return ParticleLaw(horizon, self.particles, 1, self.cut, self.rho, length_bonus=self.length_bonus)

    @property
    def space(self) -> Space:
        toy = TOYS[self.toy]
        return space(toy, toy.horizon, ALPHA, ALPHA, self.length_bonus)

    @property
    def gamma(self) -> np.ndarray:
        """p^alpha e^(lambda n), not normalised."""
        return np.exp(ALPHA * self.space.logp + self.length_bonus * np.array([len(x) for x in self.space.answers]))

    def enumerated(self, **options) -> Enumerated:
        return enumerate_chain(TOYS[self.toy], self.law, ALPHA, self.space, **options)

    def __str__(self) -> str:
        return f"{self.toy}-N{self.particles}-{self.cut.name}-rho{self.rho}-lambda{self.length_bonus}"


def assert_invariant(matrix: np.ndarray, target: np.ndarray) -> None:
    assert (matrix >= 0).all()
    assert np.abs(matrix.sum(axis=1) - 1.0).max() < 1e-12
    assert np.abs(target @ matrix - target).max() < 1e-12


# ---------------------------------------------------------------------------------------------------------------
# The reference chain

CASES = [
    *(Case("EOS", *rest) for rest in itertools.product((2, 3), SweepCut, (0.0, 0.3, 1.0), (0.0, 0.7))),
    *(Case("no EOS", 3, *rest) for rest in itertools.product(SweepCut, (0.0, 0.9, 1.0))),
    Case("rare EOS", 2, UNIFORM, 0.0, 0.7),
    Case("stop string", 2, WHOLE, 0.0, 0.7),
    Case("stop string", 3, UNIFORM, 0.3, 0.7),
    Case("four tokens", 2, UNIFORM, 1.0),
    Case("four tokens", 3, WHOLE, 0.3, 0.7),
    Case("impossible tokens", 2, UNIFORM_HORIZON, 0.3, 0.7),
]


@host_only
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sweep_leaves_the_power_law_invariant(case):
    assert_invariant(case.enumerated().matrix, case.space.target)


@host_only
@pytest.mark.parametrize("case", [c for c in CASES if c.cut is WHOLE], ids=str)
def test_the_sum_of_a_start_is_unbiased_for_every_answer(case):
    """E[Zhat 1{x}] = gamma(x), relative to it; hence E Zhat = Z."""
    out = case.enumerated(start=True, sweep=False)
    assert abs(out.start.sum() - 1.0) < 1e-12
    assert np.abs(out.weighed / case.gamma - 1.0).max() < 1e-12


@host_only
@pytest.mark.parametrize(("toy", "rhos"), [("EOS", (0.0, 0.3, 1.0)), ("no EOS", (0.0, 0.9, 1.0))])
@pytest.mark.parametrize("count", [2, 3])
def test_every_rho_is_another_sweep(toy, rhos, count):
    """Or the floor of the threshold would go unseen."""
    matrices = [Case(toy, count, WHOLE, rho).enumerated().matrix for rho in rhos]
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(matrices, 2)) > 0.02


@host_only
def test_a_start_has_another_law_and_sweeps_tend_to_the_power_law():
    """A sweep that did nothing would leave the power law invariant, too."""
    case = Case("no EOS", 3, WHOLE, 1.0)
    out, target = case.enumerated(start=True), case.space.target
    distances = [0.5 * np.abs(law - target).sum() for law in (out.start, out.start @ out.matrix)]
    assert distances[0] > 0.01
    assert distances[1] < 0.5 * distances[0]
    assert np.abs(np.linalg.matrix_power(out.matrix, 1000) - target).max() < 1e-9


# ---------------------------------------------------------------------------------------------------------------
# The operators

OPERATOR_CASES = [
    Case("EOS", 2, WHOLE, 0.0, 0.7),
    Case("EOS", 2, UNIFORM, 0.3),
    Case("EOS", 3, UNIFORM, 1.0, 0.7),
    Case("EOS", 3, UNIFORM_HORIZON, 0.3),
    Case("no EOS", 3, WHOLE, 0.0),
    Case("no EOS", 3, UNIFORM, 0.9),
    Case("stop string", 3, UNIFORM, 0.3, 0.7),
    Case("four tokens", 2, WHOLE, 0.0, 0.7),
    Case("impossible tokens", 2, UNIFORM_HORIZON, 0.3, 0.7),
]
# A group takes the interpreter .3 s.
INTERPRETED_CASES = [Case("two tokens", 2, WHOLE, 0.0, 0.7)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about the NaN of rows without a particle
@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in BACKENDS
        for case in (INTERPRETED_CASES if INTERPRETED and name == "triton" else OPERATOR_CASES + INTERPRETED_CASES)
    ],
    ids=str,
)
def test_a_sweep_of_the_operators_leaves_the_power_law_invariant(name, case):
    """To 1e-12 with float32 masses as with float64 ones: pi and gamma are of the weights that the operator gives."""
    interpreted, exact = INTERPRETED and name == "triton", name == "reference"
    error = 1e-12 if exact else 4e-6 if ON_CUDA else 1e-6  # of float32 masses; a GPU's exp2 is further from the truth
    with serving(name):
        out, weight = enumerate_operators(
            TOYS[case.toy], case.law, ALPHA, case.space,
            margin=max(error, 1e-9), error=error, ends=not interpreted,
        )  # fmt: skip
    gamma = np.exp([weight[x] for x in case.space.answers])
    assert np.abs(gamma / case.gamma - 1.0).max() < error
    assert_invariant(out.matrix, gamma / gamma.sum())
    assert abs(out.start.sum() - 1.0) < 1e-12
    assert np.abs(out.weighed / gamma - 1.0).max() < 1e-12


@host_only
def test_the_chain_and_the_operators_are_the_same_kernel():
    """Entry by entry, from two enumerations: the operators' leaves out how a chain puts positions together."""
    case = Case("no EOS", 3, UNIFORM, 0.3, 0.7)
    chain = case.enumerated(start=True)
    with serving("reference"):
        operators, _ = enumerate_operators(TOYS[case.toy], case.law, ALPHA, case.space, margin=1e-9, error=1e-12)
    assert np.abs(chain.matrix - operators.matrix).max() < 1e-12
    assert np.abs(chain.start - operators.start).max() < 1e-12


# ---------------------------------------------------------------------------------------------------------------
# The enumeration itself can tell right from wrong

RARE = Case("rare EOS", 2, UNIFORM, 0.0, 0.7)
FAULTS = {
    faults.no_length_ratio: RARE,
    faults.length_ratio_twice: RARE,
    faults.reference_may_die: RARE,
    faults.reference_takes_the_first_point: RARE,
    faults.candidates_forgotten: RARE,
    faults.old_weight_kept: RARE,
    faults.bonus_misses_the_closing_token: RARE,
    faults.drawn_along_rows: Case("no EOS", 3, WHOLE, 0.0),
}


@host_only
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_faulty_sweep_does_not_leave_the_power_law_invariant(fault, monkeypatch):
    case = FAULTS[fault]
    assert case in CASES  # where the sweep without the fault leaves it invariant
    fault(monkeypatch)
    matrix = case.enumerated(trusted=False).matrix
    assert np.abs(matrix.sum(axis=1) - 1.0).max() < 1e-12
    assert np.abs(case.space.target @ matrix - case.space.target).max() > 1e-3


@host_only
@pytest.mark.parametrize("fault", [f for f in FAULTS if f not in (faults.no_length_ratio, faults.length_ratio_twice)])
def test_the_law_on_paper_refuses_a_fault_at_once(fault, monkeypatch):
    """Every position is compared with `Position`, but the weight of a child comes from the code."""
    fault(monkeypatch)
    if fault is faults.bonus_misses_the_closing_token:
        case = FAULTS[fault]
        assert np.abs(case.enumerated(start=True, sweep=False).weighed / case.gamma - 1.0).max() > 0.1
    else:
        with pytest.raises(AssertionError):
            FAULTS[fault].enumerated()


# ---------------------------------------------------------------------------------------------------------------
# Runs with their own random numbers

RUNS = 2048
STATISTICS = Case("EOS", 2, UNIFORM, 1.0, 0.7)


@functools.cache
def exact_laws() -> tuple[dict, dict, dict]:
    """Of the start's answer, of the answer after one sweep, and of the two together."""
    out, answers = STATISTICS.enumerated(start=True), STATISTICS.space.answers
    joint = out.start[:, None] * out.matrix
    pairs = {(x, y): joint[i, j] for i, x in enumerate(answers) for j, y in enumerate(answers)}
    return dict(zip(answers, out.start, strict=True)), dict(zip(answers, joint.sum(0), strict=True)), pairs


def runs(seed: int) -> list[tuple]:
    """The answers of `RUNS` chains, after the start and after a sweep."""
    toy, law = TOYS[STATISTICS.toy], STATISTICS.law
    found = []
    for chain_id in range(RUNS):
        one = ReferenceParticles(toy.logits, law, alpha=ALPHA, seed=seed, eos=toy.eos, chain_id=chain_id)
        found.append(tuple(done.answer.tokens for done in one.run()))
    return found


@host_only
def test_runs_have_their_law_after_the_start_and_after_a_sweep():
    """2,048 chains; p < 1e-5 fails (.67, .05, .19); seed 210."""
    start, after, pairs = exact_laws()
    found = runs(210)
    assert chi_square([x for x, _ in found], start) >= P_VALUE
    assert chi_square([y for _, y in found], after) >= P_VALUE
    assert chi_square(found, pairs) >= P_VALUE
    assert sum(x != y for x, y in found) > RUNS / 4


@host_only
def test_a_sweep_with_the_uniforms_of_the_start_is_rejected(monkeypatch):
    faults.sweep_repeats_the_start(monkeypatch)
    assert chi_square(runs(210), exact_laws()[2]) < P_VALUE


# ---------------------------------------------------------------------------------------------------------------
# The threshold

N, VOCAB = 4, 7
ROWS = list(range(N + 1))


def log_masses(kind: str, seed: int) -> np.ndarray:
    """[N + 1, VOCAB], -inf where there is no child."""
    generator = np.random.default_rng(seed)
    normal, place = generator.normal(size=(N + 1, VOCAB)), generator.permutation((N + 1) * VOCAB).reshape(N + 1, VOCAB)
    return {
        "narrow": normal,
        "wide": 100.0 * normal,
        "all equal": np.zeros_like(normal),
        "two levels": np.where(place < 6, 3.0, 0.0),
        "one, and a tail of 1e-300": np.where(place < 1, 0.0, -690.0 + normal),
        "as many as there are places, and a tail of 1e-300": np.where(place < N, normal, -690.0),
        "a tail whose mass is 0": np.where(place < N + 2, normal, -2000.0),
        "one fewer than places": np.where(place < N - 1, normal, -np.inf),
        "as many as places": np.where(place < N, normal, -np.inf),
        "one more than places": np.where(place < N + 1, normal, -np.inf),
        "one child": np.where(place < 1, normal, -np.inf),
        "far from 0": -5000.0 + normal,
    }[kind]


KINDS = (
    "narrow", "wide", "all equal", "two levels", "one, and a tail of 1e-300",
    "as many as there are places, and a tail of 1e-300", "a tail whose mass is 0", "one fewer than places",
    "as many as places", "one more than places", "one child", "far from 0",
)  # fmt: skip


@host_only
@pytest.mark.parametrize("kind", KINDS)
def test_the_inclusions_add_up_to_the_number_of_particles(kind):
    for seed in range(50):
        weight = log_masses(kind, seed)
        top = weight.max()
        heavy, log_kappa = particles._threshold(np.exp(weight - top), top, -math.inf)
        children = np.isfinite(weight).sum()
        if children < N:
            assert log_kappa == -math.inf
            assert len(heavy) == children
            continue
        assert len(heavy) < N
        assert abs(np.minimum(1.0, np.exp(weight - log_kappa)).sum() - N) < 1e-12 * N
        assert [weight[c] for c in heavy] == sorted((weight[c] for c in heavy), reverse=True)
        light = np.ones_like(weight, bool)
        for child in heavy:
            assert weight[child] >= log_kappa - 1e-14 * abs(log_kappa)
            light[child] = False
        assert (weight[light] <= log_kappa + 1e-14 * abs(log_kappa)).all()


@host_only
@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_no_more_survive_than_there_are_places_and_each_has_its_weight_or_the_threshold(kind, rho):
    """With and without a reference, which survives whatever its weight; at both ends of the uniform's range."""
    for seed in range(10):
        weight = log_masses(kind, seed)
        order = np.random.default_rng(seed).permutation(N + 1).tolist()
        possible = [tuple(map(int, c)) for c in np.argwhere(weight > -np.inf)]
        least = min(possible, key=lambda c: weight[c])
        for reference in (None, possible[0], possible[-1], least):
            for log_mass, u in itertools.product((-math.inf, weight.max()), (0.0, 2.0**-53, 0.4, 1.0 - 2.0**-53)):
                found, log_kappa = particles._survivors(weight, reference, order, log_mass, rho, u)
                children = [(row, token) for row, token, _ in found]
                assert len(set(children)) == len(children) <= N
                assert reference is None or reference in children
                assert set(children) <= set(possible)
                for row, token, w in found:
                    assert w in (weight[row, token], log_kappa)
                    larger = max(weight[row, token], log_kappa)
                    assert abs(w - larger) <= 1e-14 * max(abs(larger), 1.0)
