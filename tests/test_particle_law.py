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
from tests.devices import host_only
from tests.exact_law import Space, chi_square, space
from tests.op_helpers import INTERPRETED, serving
from tests.particle_enumeration import Enumerated, enumerate_chain, log_sum
from tests.particle_operators import enumerate_operators
from tests.toys import Toy

WHOLE, UNIFORM, UNIFORM_HORIZON = SweepCut
RHOS = (0.0, 0.3, 1.0)
ALPHA = 2.0
P_VALUE = 1e-5

TOYS = {
    # 15 answers; two particles of three or four open children survive, three of four.
    "EOS": Toy(3, 3, seed=20, eos=(0,), eos_shift=-0.5),
    # Three and more rows with children, where the order along the line tells. "bb" closes beside EOS.
    "stop string": Toy(3, 4, seed=20, eos=(0,), eos_shift=-1.5, spell=(b"", b"a", b"b"), stop=("bb",)),
    "long": Toy(3, 4, seed=20, eos=(0,), eos_shift=-1.5),
    # More tokens than particles: the first position is thresholded already.
    "four tokens": Toy(4, 3, seed=20, eos=(0,), eos_shift=-0.5, spell=(b"", b"a", b"b", b"c"), stop=("ab",)),
    "impossible tokens": Toy(4, 3, seed=21, eos=(0,), impossible=0.3),
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
    *(Case("EOS", *rest) for rest in itertools.product((2, 3), SweepCut, RHOS, (0.0, 0.7))),
    Case("stop string", 2, WHOLE, 0.0, 0.7),
    Case("stop string", 3, UNIFORM, 0.3, 0.7),
    Case("stop string", 3, UNIFORM_HORIZON, 1.0),
    Case("long", 3, WHOLE, 0.0),
    Case("four tokens", 2, UNIFORM, 0.0),
    Case("four tokens", 3, WHOLE, 0.3, 0.7),
    Case("impossible tokens", 2, UNIFORM, 0.3, 0.7),
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
def test_a_start_has_not_the_power_law():
    """Else a sweep that did nothing would pass for one that corrects it: 4 % of the mass is elsewhere at first."""
    case = Case("EOS", 2, WHOLE, 0.0)
    out = case.enumerated(start=True)
    distances = [0.5 * np.abs(law - case.space.target).sum() for law in (out.start, out.start @ out.matrix)]
    assert distances[0] > 0.01
    assert distances[1] < distances[0] / 2
    assert np.abs(np.linalg.matrix_power(out.matrix, 1000) - case.space.target).max() < 1e-9
