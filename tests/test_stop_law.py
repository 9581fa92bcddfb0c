"""Stop strings and the length term (DESIGN 3.1, 9.1): the automaton, and pi K = pi by enumeration.

What is exact here is asked of the reference's own `propose`, branch by branch (`exact_law.enumerated_matrix`), and of
the formula on paper (`exact_law.direct_matrix`), which look for stop strings in the text and know no automaton.
"""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import power_kernels as pk
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.law import CUTS, Law
from power_kernels.reference import ReferenceChain
from tests import faults
from tests.exact_law import Space, chi_square, direct_matrix, enumerated_matrix, float64_storage, output_law, simulate
from tests.exact_law import space as space_of
from tests.toys import Toy, split_characters_toy, straddling_toy

Exact = float64_storage(ReferenceChain)
BONUSES = (-0.3, 0.0, 0.7)


# ---------------------------------------------------------------------------------------------------------------
# The automaton

STOPS = (
    (b"ab",),
    (b"ab", b"ba"),
    (b"aab", b"ab", b"b"),  # one string within another
    (b"aaa", b"aab", b"ba"),
    (b"abab", b"bab"),  # a failed match goes on as a shorter one
    ("\xe9".encode(), b"\xa9\xc3"),
)


def first_match(text: bytes, stop) -> int | None:
    """The bytes of `text` up to the end of the first stop string that is complete."""
    return next((n for n in range(len(text) + 1) if any(text[:n].endswith(string) for string in stop)), None)


@pytest.mark.parametrize("stop", STOPS)
def test_the_automaton_closes_with_the_token_that_completes_a_string_and_with_no_other(stop):
    """Every text of up to four tokens of one, two and no bytes: 6,000 walks."""
    vocabulary = [b"a", b"b", b"", b"ab", b"ba", b"\xc3", b"\xa9", b"\xa9\xc3b"]
    table = pk.stop_automaton(stop, vocabulary)
    assert table.dtype == np.int16
    assert table.shape == (len(table), len(vocabulary))
    assert len(table) <= 1 + sum(map(len, stop))
    assert table.min() >= -1
    assert table.max() < len(table)
    for tokens in itertools.product(range(len(vocabulary)), repeat=4):
        state, text = 0, b""
        for token in tokens:
            state, text = table[state, token], text + vocabulary[token]
            assert (state < 0) == (first_match(text, stop) is not None), (stop, text)
            if state < 0:
                break


@settings(max_examples=200, deadline=None)
@given(
    stop=st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=5),
    vocabulary=st.lists(st.binary(max_size=4), min_size=1, max_size=12),
    data=st.data(),
)
def test_the_automaton_of_any_strings_closes_where_one_is_complete(stop, vocabulary, data):
    # Bytes of few kinds, so that strings overlap.
    few = bytes.maketrans(bytes(range(256)), bytes(byte % 3 for byte in range(256)))
    stop, vocabulary = [s.translate(few) for s in stop], [s.translate(few) for s in vocabulary]
    table = pk.stop_automaton(stop, vocabulary)
    state, text = 0, b""
    for token in data.draw(st.lists(st.integers(0, len(vocabulary) - 1), max_size=12)):
        state, text = table[state, token], text + vocabulary[token]
        assert (state < 0) == (first_match(text, stop) is not None)
        if state < 0:
            break


@pytest.mark.parametrize(
    ("stop", "vocabulary", "error", "message"),
    [
        ([], [b"a"], ArgumentError, "stop is empty; it must hold at least one entry"),
        ([b"a"], [], ArgumentError, "vocabulary is empty; it must hold at least one entry"),
        ([b"a", b""], [b"a"], ArgumentError, "stop[1] is empty; it would close every answer at once"),
        (["a"], [b"a"], ArgumentTypeError, "stop[0] is 'a', a str; it must be bytes"),
        ([b"a"], [b"a", None], ArgumentTypeError, "vocabulary[1] is None, a NoneType; it must be bytes"),
        ([bytes(20000), bytes([1]) * 20000], [b"a"], ArgumentError, "stop has 39999 different beginnings"),
        ([bytes(3000)], [b"a"] * 200_000, ArgumentError, "stop has 3000 different beginnings; with 200000 tokens it"),
    ],
)
def test_an_automaton_that_cannot_be_is_refused(stop, vocabulary, error, message):
    with pytest.raises(error) as caught:
        pk.stop_automaton(stop, vocabulary)
    assert str(caught.value).startswith(message)


def test_a_large_automaton_takes_little_more_memory_than_its_table():
    """1,000 states of 20,000 tokens; worked out at once they took seven times their table. And no state is lost."""
    vocabulary = [bytes([97 + i % 3]) for i in range(20_000)]
    tracemalloc.start()
    try:
        table = pk.stop_automaton([b"abc" * 333], vocabulary)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert table.shape == (999, 20_000)
    assert peak < 4 * table.nbytes
    assert [table[s, s % 3] for s in range(999)] == [*range(1, 999), -1]


# ---------------------------------------------------------------------------------------------------------------
# pi K = pi


@dataclass(frozen=True)
class Case:
    toy: Toy
    horizon: int
    alpha: float = 2.0
    beta: float = 1.25

    def space(self, bonus: float) -> Space:
        return space_of(self.toy, self.horizon, self.alpha, self.beta, bonus)

    def direct(self, cut: str, bonus: float) -> np.ndarray:
        return direct_matrix(self.toy, self.horizon, self.alpha, self.beta, cut, bonus)

    def enumerated(self, cut: str, bonus: float, *, chain: type = Exact, early: bool = True) -> np.ndarray:
        law = Law(
            self.horizon, self.horizon, 1, cut=cut, stops=bool(self.toy.stop), length_bonus=bonus, early_rejection=early
        )
        return enumerated_matrix(chain, self.toy, law, self.alpha, self.beta, self.space(bonus).answers)


CASES = {
    # Strings of one token, of several, overlapping, and inside a token; a token without bytes.
    "straddling": Case(straddling_toy(), 3),
    # Bytes that are no whole character, across tokens, and an EOS as well.
    "split characters, beta = alpha": Case(split_characters_toy(), 3, 2.0, 2.0),
    # Weights near 0, so that the length term decides, early rejection included.
    "peaked": Case(straddling_toy(seed=9, scale=3.0), 3),
}
LONGER = Case(straddling_toy(), 4)


def test_a_step_over_four_tokens_leaves_the_power_law_with_stop_strings_invariant():
    check_step(LONGER, "uniform", 0.7)


@pytest.mark.parametrize("bonus", BONUSES)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", CASES)
def test_a_step_leaves_the_power_law_with_stop_strings_and_length_term_invariant(name, cut, bonus):
    check_step(CASES[name], cut, bonus)


def check_step(case: Case, cut: str, bonus: float) -> None:
    """The reference with early rejection = without it = the formula, entry by entry, and pi K = pi to 1e-10."""
    s = case.space(bonus)
    stopped = [x for x in s.answers if case.toy.ends(x) and x[-1] not in case.toy.eos]
    assert len(stopped) >= 5
    assert len({len(x) for x in stopped}) >= 2  # a string that ends within the horizon, and one that ends before it
    on, off, paper = case.enumerated(cut, bonus), case.enumerated(cut, bonus, early=False), case.direct(cut, bonus)
    assert np.abs(on.sum(axis=1) - 1.0).max() < 1e-12
    assert np.abs(s.target @ on - s.target).max() < 1e-10
    assert np.abs(on - off).max() < 1e-15
    assert np.abs(on - paper).max() < 1e-10
    flow = s.target[:, None] * paper
    assert np.abs(flow - flow.T).max() < 1e-14


FAULTS = [
    *((faults.BonusMissesClosingToken, cut, 0.7, "straddling") for cut in CUTS),
    *((faults.EarlyRejectionAtNextTokenOnly, cut, 0.7, "peaked") for cut in CUTS),
    *((faults.AutomatonNotRewound, cut, 0.0, "straddling") for cut in CUTS),
    *((faults.StopMatchedInPrompt, cut, 0.0, "straddling") for cut in CUTS),
]


@pytest.mark.parametrize(("fault", "cut", "bonus", "name"), FAULTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_mistake_with_stop_strings_or_the_length_term_moves_the_power_law(fault, cut, bonus, name):
    case = CASES[name]
    target = case.space(bonus).target
    matrix = case.enumerated(cut, bonus, chain=float64_storage(fault))
    assert np.abs(target @ matrix - target).max() > 1e-3


def test_the_three_length_terms_are_far_apart():
    short, plain, long = (LONGER.space(bonus) for bonus in BONUSES)
    lengths = np.array([len(x) for x in plain.answers])
    means = [float(s.target @ lengths) for s in (short, plain, long)]
    assert means[0] + 0.1 < means[1] < means[2] - 0.1


def test_chains_with_stop_strings_and_stages_have_their_computed_law():
    """8,192 chains of three stages and final steps against q K1^m K2^m ..., reject at p < 1e-5."""
    toy, law = straddling_toy(), Law(5, 2, 2, final_steps=2, stops=True, length_bonus=0.4)
    expected = output_law(toy, law, 2.0, 1.25)
    runs = simulate(ReferenceChain, toy, law, alpha=2.0, beta=1.25, seed=11, chains=8192)
    assert chi_square([run.answer.tokens for run in runs], expected) > 1e-5
    # The test would notice another target.
    other = output_law(toy, Law(5, 2, 2, final_steps=2, stops=True), 2.0, 1.25)
    assert chi_square([run.answer.tokens for run in runs], other) < 1e-5
