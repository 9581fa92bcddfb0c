"""DESIGN 9.1: one step leaves p^alpha as it is, shown by enumeration of every answer and every branch of the code.

No test here draws a random number. `exact_law.enumerated_matrix` replays the reference's own `propose` along every
branch of its uniforms, `exact_law.direct_matrix` is the formula on paper; pi K = pi is asked of the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from power_kernels.law import Law
from power_kernels.reference import ReferenceChain
from tests import faults
from tests.exact_law import (
    Space,
    answer_of,
    chi_square,
    compose_enumerated,
    direct_matrix,
    enumerated_matrix,
    float64_storage,
    output_law,
    pieces,
    space,
)
from tests.toys import Toy, peaked_toy, power_toy

Exact = float64_storage(ReferenceChain)


@dataclass(frozen=True)
class Case:
    toy: Toy
    alpha: float
    beta: float

    @property
    def horizon(self) -> int:
        return self.toy.horizon

    @property
    def space(self) -> Space:
        return space(self.toy, self.horizon, self.alpha, self.beta)

    def law(self, **options) -> Law:
        return Law(self.horizon, self.horizon, 1, **options)

    def direct(self, cut: str = "uniform") -> np.ndarray:
        return direct_matrix(self.toy, self.horizon, self.alpha, self.beta, cut)

    def enumerated(self, chain: type = Exact, **options) -> np.ndarray:
        law = self.law(**options)
        return enumerated_matrix(chain, self.toy, law, self.alpha, self.beta, self.space.answers)


CASES = {
    # The toy that the statistics use: 63 answers of lengths 1 to 5, most of them longer than 1.
    "power": Case(power_toy(), 2.0, 1.25),
    "power, beta = alpha": Case(power_toy(4), 2.0, 2.0),
    # Every answer has one length: the length ratio and the cap play no part.
    "no EOS": Case(Toy(3, 3, seed=1), 4.0, 1.5),
    "no EOS, beta = alpha": Case(Toy(2, 5, seed=2), 4.0, 4.0),
    # Two answers may differ in nothing but which EOS closes them.
    "two EOS": Case(Toy(4, 3, seed=3, eos=(1, 3)), 3.0, 1.5),
    "two EOS, beta = alpha": Case(Toy(4, 3, seed=3, eos=(1, 3)), 3.0, 3.0),
    # Weights near 0, so that the lengths decide, early rejection included; beta = 1 proposes from p itself.
    "peaked": Case(peaked_toy(), 1.5, 1.25),
    "beta = 1": Case(Toy(3, 4, seed=5, eos=(2,)), 2.0, 1.0),
    # -inf logits: tokens that cannot occur, at the divergence too.
    "impossible tokens": Case(Toy(4, 4, seed=6, eos=(0,), impossible=0.4), 2.0, 1.25),
    # Rows with one possible token: the proposal can never diverge there.
    "forced tokens": Case(Toy(3, 5, seed=7, eos=(0,), forced=0.4), 2.0, 1.5),
    "one answer": Case(Toy(2, 3, seed=8, eos=(1,), forced=1.0), 2.0, 2.0),
}
# Weights may be positive: exact all the same, but only without early rejection.
POSITIVE_WEIGHTS = {
    "beta > alpha": Case(power_toy(4), 1.5, 3.0),
    "beta < 1": Case(Toy(4, 3, seed=9, eos=(0,)), 2.0, 0.5),
}
ANY = CASES | POSITIVE_WEIGHTS


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def assert_invariant(case: Case, matrix: np.ndarray) -> None:
    target = case.space.target
    assert (matrix >= -1e-15).all()  # a diagonal is 1 minus the rest, and a divergence cut need not stay at all
    assert np.abs(matrix.sum(axis=1) - 1.0).max() < 1e-12
    assert np.abs(target @ matrix - target).max() < 1e-10


# ---------------------------------------------------------------------------------------------------------------
# pi K = pi


@pytest.mark.parametrize("name", ANY)
def test_uniform_cut_and_one_acceptance_leave_the_power_law_invariant(name):
    """The formula of DESIGN 3.2; detailed balance holds pair by pair."""
    matrix, target = ANY[name].direct(), ANY[name].space.target
    assert_invariant(ANY[name], matrix)
    flow = target[:, None] * matrix
    assert np.abs(flow - flow.T).max() < 1e-14


def test_early_rejection_free_prefix_and_exclusion_are_the_same_step(case):
    """What the reference does with early rejection = the formula, entry by entry; hence pi K = pi."""
    matrix = case.enumerated(early_rejection=True)
    assert_invariant(case, matrix)
    assert np.abs(matrix - case.direct()).max() < 1e-10


@pytest.mark.parametrize("name", ANY)
def test_one_final_acceptance_is_the_same_step(name):
    matrix = ANY[name].enumerated(early_rejection=False)
    assert_invariant(ANY[name], matrix)
    assert np.abs(matrix - ANY[name].direct()).max() < 1e-10


def test_early_rejection_on_and_off_give_the_same_matrix():
    """Each acceptance uniform is accepted by both or by neither, so the matrices agree beyond the 1e-10 above."""
    case = CASES["power, beta = alpha"]
    on, off = (case.enumerated(early_rejection=setting) for setting in (True, False))
    assert np.abs(on - off).max() < 1e-15


def test_float32_weights_cost_no_more_than_their_rounding():
    """The operators store logq and weights in float32: eps 6e-8 on each of a few weights of size 3."""
    case = CASES["power, beta = alpha"]
    matrix = case.enumerated(ReferenceChain)
    assert np.abs(matrix.sum(axis=1) - 1.0).max() < 1e-12
    assert np.abs(matrix - case.direct()).max() < 1e-6
    assert np.abs(case.space.target @ matrix - case.space.target).max() < 1e-7


def test_a_step_at_a_shorter_horizon_leaves_that_horizons_power_law_invariant():
    """Stages grow the horizon; each has its own pi_H."""
    toy, alpha, beta, horizon = power_toy(4), 2.0, 1.25, 2
    s = space(toy, horizon, alpha, beta)
    matrix = enumerated_matrix(Exact, toy, Law(horizon, 4, 1), alpha, beta, s.answers)
    assert np.abs(matrix - direct_matrix(toy, horizon, alpha, beta)).max() < 1e-10
    assert np.abs(s.target @ matrix - s.target).max() < 1e-10


def test_the_step_reaches_every_answer_and_tends_to_the_power_law(case):
    power = np.linalg.matrix_power(case.direct(), 5000)
    assert np.abs(power - case.space.target).max() < 1e-9


# ---------------------------------------------------------------------------------------------------------------
# Divergence cuts (3.6)


DIVERGENCE_CUTS = ("divergence", "divergence-entropy")


@pytest.mark.parametrize("cut", DIVERGENCE_CUTS)
@pytest.mark.parametrize("name", ANY)
def test_a_divergence_cut_and_one_acceptance_leave_the_power_law_invariant(name, cut):
    """The formula of DESIGN 3.6; detailed balance holds pair by pair."""
    matrix, target = ANY[name].direct(cut), ANY[name].space.target
    assert_invariant(ANY[name], matrix)
    flow = target[:, None] * matrix
    assert np.abs(flow - flow.T).max() < 1e-14


@pytest.mark.parametrize("cut", DIVERGENCE_CUTS)
def test_early_rejection_and_exclusion_are_the_step_of_a_divergence_cut(case, cut):
    """What the reference does with early rejection = the formula, entry by entry; hence pi K = pi."""
    matrix = case.enumerated(early_rejection=True, cut=cut)
    assert_invariant(case, matrix)
    assert np.abs(matrix - case.direct(cut)).max() < 1e-10


@pytest.mark.parametrize("cut", DIVERGENCE_CUTS)
@pytest.mark.parametrize("name", ANY)
def test_one_final_acceptance_is_the_step_of_a_divergence_cut(name, cut):
    matrix = ANY[name].enumerated(early_rejection=False, cut=cut)
    assert_invariant(ANY[name], matrix)
    assert np.abs(matrix - ANY[name].direct(cut)).max() < 1e-10


@pytest.mark.parametrize("cut", DIVERGENCE_CUTS)
def test_early_rejection_on_and_off_give_the_same_matrix_under_a_divergence_cut(cut):
    case = CASES["peaked"]
    on, off = (case.enumerated(early_rejection=setting, cut=cut) for setting in (True, False))
    assert np.abs(on - off).max() < 1e-15


@pytest.mark.parametrize("cut", DIVERGENCE_CUTS)
def test_a_step_of_a_divergence_cut_reaches_every_answer_and_tends_to_the_power_law(case, cut):
    power = np.linalg.matrix_power(case.direct(cut), 20000)
    assert np.abs(power - case.space.target).max() < 1e-9


@pytest.mark.parametrize("cut", DIVERGENCE_CUTS)
def test_no_proposal_of_a_divergence_cut_is_the_answer_that_it_started_from(case, cut):
    """Unless no other token can be drawn anywhere (Z = 0), and then every step is unchanged."""
    one = compose_enumerated(Exact, case.toy, case.law(cut=cut), case.alpha, case.beta)
    for x in case.space.answers:
        answer = answer_of(one, x)
        same = sum(measure for proposal, measure, _ in one.paths(answer, case.horizon) if proposal is answer)
        assert same == (1.0 if answer.cumz[-1] == 0.0 else 0.0)
    assert (len(case.space.answers) == 1) == (answer.cumz[-1] == 0.0)


def test_the_cut_laws_are_three():
    """Their matrices are far apart, so that agreement with one is not agreement with another."""
    case = CASES["power, beta = alpha"]
    uniform, *others = (case.direct(cut) for cut in ("uniform", *DIVERGENCE_CUTS))
    assert min(np.abs(uniform - other).max() for other in others) > 0.1
    assert np.abs(others[0] - others[1]).max() > 0.05


# ---------------------------------------------------------------------------------------------------------------
# A token with all the mass


class _LogqRoundedDown(Exact):
    """Holds logq a little below 0 where q = 1, as a float32 sum of such a row might, so that proposals leave there."""

    def with_token(self, answer, z, token):
        plain = super().with_token(answer, z, token)
        logq = -1e-3 if plain.logq[-1] == 0.0 else plain.logq[-1]
        return answer.append(token, logq, plain.cumw[-1] - answer.cumw[-1], self.cut_weight(z))


def test_a_token_that_alone_has_mass_is_kept_when_the_walk_leaves_it():
    """Otherwise a proposal would repeat the current answer, or hold a token that cannot occur."""
    case = CASES["forced tokens"]
    one = Exact(case.toy.logits, case.law(), alpha=case.alpha, beta=case.beta, eos=case.toy.eos)
    forced = sum(answer_of(one, x).logq.count(0.0) for x in case.space.answers)
    assert forced >= 10, "the toy has too few forced tokens"
    matrix = case.enumerated(_LogqRoundedDown)
    assert_invariant(case, matrix)
    assert np.abs(matrix - case.direct()).max() < 1e-10


def test_a_divergence_at_a_token_that_alone_has_mass_is_an_unchanged_step():
    """It holds the chain a little more often and changes nothing else: pi K = pi."""
    case = CASES["forced tokens"]
    matrix, exact = case.enumerated(_LogqRoundedDown, cut="divergence"), case.direct("divergence")
    assert_invariant(case, matrix)
    held = np.diag(matrix) - np.diag(exact)
    assert held.min() > -1e-12
    assert held.max() > 1e-4
    # Where only one token has mass the entropy is 0, so that the other cut does not go there.
    matrix = case.enumerated(_LogqRoundedDown, cut="divergence-entropy")
    assert np.abs(matrix - case.direct("divergence-entropy")).max() < 1e-10


class _LeavesNothing(Exact):
    """1 - q of every token after the first rounded to 0, so that Z = 0 for answers that begin with token 1."""

    def with_token(self, answer, z, token):
        plain = super().with_token(answer, z, token)
        if plain.tokens[0] != 1:
            return plain
        return answer.append(token, 0.0, plain.cumw[-1] - answer.cumw[-1])


def test_no_step_enters_an_answer_that_none_could_leave():
    """Z(x') = 0, which takes rounding: neither way is gone where exact arithmetic goes both, and pi K = pi."""
    case = SMALL
    matrix = case.enumerated(_LeavesNothing, cut="divergence")
    assert_invariant(case, matrix)
    stuck = np.array([x[0] == 1 for x in case.space.answers])
    assert 0 < stuck.sum() < len(stuck)
    assert (matrix[np.ix_(~stuck, stuck)] == 0).all()
    assert (matrix[np.ix_(stuck, stuck)] == np.eye(stuck.sum())).all()


# ---------------------------------------------------------------------------------------------------------------
# The published code (compat="karan-du")


def all_states(toy: Toy) -> list[tuple[int, ...]]:
    """The closed answers at every horizon: a capped proposal can leave an open answer shorter than the horizon."""
    found = {x for horizon in range(1, toy.horizon + 1) for x in toy.answers(horizon)}
    return sorted(found, key=lambda x: (len(x), x))


def test_the_published_code_is_the_exact_chain_without_eos():
    case = CASES["no EOS"]
    matrix = case.enumerated(early_rejection=False, karan_du=True)
    assert np.abs(matrix - case.direct()).max() < 1e-10
    assert_invariant(case, matrix)


def test_the_published_code_is_biased_with_eos():
    """Proposals capped at the current length leave open answers, to which p^alpha at this horizon gives nothing.

    From p^alpha itself one step moves 0.160 of the mass (total variation), ten steps 0.429, all of it to answers cut
    short; in the end every answer is.
    """
    toy, alpha, beta = power_toy(4), 2.0, 1.25
    s = space(toy, toy.horizon, alpha, beta)
    states = all_states(toy)
    target = np.array([s.target[s.index[x]] if x in s.index else 0.0 for x in states])
    matrix = enumerated_matrix(Exact, toy, Law(4, 4, 1, early_rejection=False, karan_du=True), alpha, beta, states)
    assert np.abs(matrix.sum(axis=1) - 1.0).max() < 1e-12
    distance = [0.5 * np.abs(target @ np.linalg.matrix_power(matrix, m) - target).sum() for m in (1, 10, 10000)]
    assert distance == pytest.approx([0.1605, 0.4293, 0.9988], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# The enumeration itself can tell right from wrong


SMALL = Case(power_toy(3), 2.0, 1.25)
BROKEN = {
    faults.NoLengthRatio: SMALL,
    faults.InvertedLengthRatio: SMALL,
    faults.ProposalSumMissesFirstSuffixWeight: SMALL,
    faults.CurrentSumMissesLastWeight: SMALL,
    faults.NoExclusion: SMALL,
    faults.KeepTestUsesP: SMALL,
    faults.CutMissesLastPosition: SMALL,
    faults.EarlyRejectionWithoutLengths: CASES["peaked"],
    faults.EarlyRejectionWithoutCurrentLength: CASES["peaked"],
    faults.EarlyRejectionAtHorizonLength: CASES["peaked"],
}


@pytest.mark.parametrize("fault", BROKEN, ids=lambda c: c.__name__)
def test_a_faulty_step_does_not_leave_the_power_law_invariant(fault):
    case = BROKEN[fault]
    matrix = case.enumerated(float64_storage(fault))
    assert np.abs(matrix.sum(axis=1) - 1.0).max() < 1e-12
    assert np.abs(case.space.target @ matrix - case.space.target).max() > 1e-3


BROKEN_DIVERGENCE = {
    faults.NoZRatio: SMALL,
    faults.InvertedZRatio: SMALL,
    faults.LengthForZ: SMALL,
    faults.ZMissesLastToken: SMALL,
    faults.ZMissesFirstToken: SMALL,
    faults.CutOnePositionLate: SMALL,
    faults.CutOnePositionEarly: SMALL,
    faults.UniformDivergence: SMALL,
    faults.WalkAfterDivergence: SMALL,
    faults.NoExclusion: SMALL,
    faults.ProposalSumMissesFirstSuffixWeight: SMALL,
    faults.CurrentSumMissesLastWeight: SMALL,
    faults.EarlyRejectionWithLookahead: CASES["power"],
    faults.EarlyRejectionWithoutCurrentZ: CASES["power"],
}
BROKEN_ENTROPY = {faults.ZWithoutEntropy: SMALL, faults.CutWithoutEntropy: SMALL, faults.EntropyOfNextRow: SMALL}
BROKEN_CUTS = [
    *((fault, cut, case) for fault, case in BROKEN_DIVERGENCE.items() for cut in DIVERGENCE_CUTS),
    *((fault, "divergence-entropy", case) for fault, case in BROKEN_ENTROPY.items()),
]


@pytest.mark.parametrize(("fault", "cut", "case"), BROKEN_CUTS, ids=lambda v: getattr(v, "__name__", None))
def test_a_faulty_divergence_cut_does_not_leave_the_power_law_invariant(fault, cut, case):
    matrix = case.enumerated(float64_storage(fault), cut=cut)
    assert np.abs(matrix.sum(axis=1) - 1.0).max() < 1e-12
    assert np.abs(case.space.target @ matrix - case.space.target).max() > 1e-3


@pytest.mark.parametrize("cut", DIVERGENCE_CUTS)
@pytest.mark.parametrize("change", faults.HARMLESS_TO_DIVERGENCE, ids=lambda c: c.__name__)
def test_a_harmless_change_of_a_divergence_cut_gives_the_same_matrix(change, cut):
    case = CASES["peaked"]
    assert np.abs(case.enumerated(float64_storage(change), cut=cut) - case.direct(cut)).max() < 1e-10


@pytest.mark.parametrize("change", faults.HARMLESS, ids=lambda c: c.__name__)
def test_a_harmless_change_gives_the_same_matrix(change):
    """log u for log(1 - u), and early rejections that come later than they could: not faults of the law."""
    case = CASES["peaked"]
    assert np.abs(case.enumerated(float64_storage(change)) - case.direct()).max() < 1e-10


# ---------------------------------------------------------------------------------------------------------------
# The helpers


def test_pieces_finds_steps_that_were_not_guessed():
    found = pieces(lambda u: (u >= 0.25) + (u >= 0.7), [0.25, 0.5])
    assert [value for value, _, _ in found] == [0, 1, 2]
    assert np.abs(np.array([(low, high) for _, low, high in found]) - [(0, 0.25), (0.25, 0.7), (0.7, 1)]).max() < 2e-13
    assert pieces(lambda u: "constant", [0.5]) == [("constant", 0.0, 1.0)]


def test_stages_of_no_steps_draw_from_q():
    """The extension alone, however it is cut into stages, is q; so the stage products start from the right law."""
    toy, alpha, beta = power_toy(4), 2.0, 1.25
    s = space(toy, 4, alpha, beta)
    assert math.isclose(s.proposal.sum(), 1.0, abs_tol=1e-12)
    for block in (1, 2, 3, 4):
        law = output_law(toy, Law(4, block, 0), alpha, beta)
        assert np.abs(np.array([law[x] for x in s.answers]) - s.proposal).max() < 1e-12


def test_chi_square_pools_small_cells_and_fails_an_impossible_state():
    law = {(0,): 0.5, (1,): 0.499, (2,): 0.001, (3,): 0.0}
    fair = [(0,)] * 500 + [(1,)] * 499 + [(2,)]
    assert chi_square(fair, law) > 0.99
    assert chi_square([(0,)] * 500 + [(1,)] * 490 + [(2,)] * 10, law) > 1e-5  # one pooled cell of 1 expected
    assert chi_square([(0,)] * 400 + [(1,)] * 600, law) < 1e-5
    assert chi_square([*fair, (3,)], law) == 0.0
    assert chi_square([*fair, (4,)], law) == 0.0
