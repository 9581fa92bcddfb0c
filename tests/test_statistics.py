"""Statistics of arms: against SciPy, against classic tests, and by enumeration of all that small tables can hold."""

import itertools
from math import comb, nan

import numpy as np
import pytest
from scipy import stats

from power_kernels.api.experiments import statistics
from power_kernels.errors import ArgumentError

RNG = np.random.default_rng(0)


def outcomes(chances: list[list[float]]):
    """All tables of 0 and 1 with their probabilities, for independent answers of these chances [questions, seeds]."""
    chances = np.array(chances)
    for bits in itertools.product((0, 1), repeat=chances.size):
        table = np.reshape(bits, chances.shape)
        yield table, float(np.prod(np.where(table == 1, chances, 1 - chances)))


# ---------------------------------------------------------------- accuracy


def test_the_standard_error_is_that_of_the_questions_means():
    correct = RNG.random((40, 5)) < 0.3
    found = statistics.accuracy(correct)
    assert found.value == pytest.approx(correct.mean())
    assert found.standard_error == pytest.approx(stats.sem(correct.mean(axis=1)))
    assert (found.questions, found.seeds) == (40, 5)


def test_with_one_seed_it_is_the_binomial_error():
    correct = np.array([[1]] * 30 + [[0]] * 70)
    found = statistics.accuracy(correct)
    assert found.standard_error == pytest.approx(np.sqrt(0.3 * 0.7 / 99))
    assert found.seed_error is None
    wilson = stats.binomtest(30, 100).proportion_ci(method="wilson")  # a little narrower: no t, 100 for 99
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=2e-3)
    assert found.low < wilson.low < wilson.high < found.high


def test_copies_of_a_seed_tell_nothing_new():
    correct = RNG.random((50, 1)) < 0.5
    one, many = statistics.accuracy(correct), statistics.accuracy(np.repeat(correct, 8, axis=1))
    assert (many.value, many.standard_error, many.low, many.high) == pytest.approx(
        (one.value, one.standard_error, one.low, one.high)
    )
    assert many.seed_error == 0


def test_the_error_of_the_seeds_is_unbiased_for_fixed_questions():
    chances = [[0.2] * 3, [0.9] * 3]
    expected = sum(p * statistics.accuracy(table).seed_error ** 2 for table, p in outcomes(chances))
    mean = sum(p * table.mean() for table, p in outcomes(chances))
    variance = sum(p * (table.mean() - mean) ** 2 for table, p in outcomes(chances))
    assert expected == pytest.approx(variance, rel=1e-12)


def test_the_error_of_questions_and_seeds_is_unbiased_for_drawn_questions():
    population = (0.1, 0.6, 0.9)  # chances of the questions that there are, equally likely
    worlds = [
        (table, p / len(population) ** 2)
        for chances in itertools.product(population, repeat=2)
        for table, p in outcomes([[chance] * 2 for chance in chances])
    ]
    assert sum(p for _, p in worlds) == pytest.approx(1)
    mean = sum(p * table.mean() for table, p in worlds)
    variance = sum(p * (table.mean() - mean) ** 2 for table, p in worlds)
    expected = sum(p * statistics.accuracy(table).standard_error ** 2 for table, p in worlds)
    assert mean == pytest.approx(np.mean(population))
    assert expected == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize("chance", [0.02, 0.1, 0.5, 0.8, 0.97])
def test_the_band_covers_the_truth_as_often_as_it_says(chance):
    questions = 60
    covered = 0.0
    for right in range(questions + 1):
        found = statistics.accuracy(np.arange(questions)[:, None] < right)
        assert 0 <= found.low <= found.value <= found.high <= 1
        covered += stats.binom.pmf(right, questions, chance) * (found.low <= chance <= found.high)
    assert 0.93 <= covered <= 0.99  # by all 61 tables; at .02 the t interval covers .70


@pytest.mark.parametrize("all_equal", [0, 1])
def test_a_band_does_not_vanish_where_all_answers_are_equal(all_equal):
    found = statistics.accuracy(np.full((20, 4), all_equal))
    assert found.standard_error == 0
    assert found.high - found.low > 0.1


def test_one_question_has_no_error():
    found = statistics.accuracy([[1, 0]])
    assert np.isnan(found.standard_error)
    assert (found.low, found.high) == (0, 1)


# ---------------------------------------------------------------- McNemar


def paired(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.array([1] * both + [1] * first + [0] * second + [0] * neither)
    b = np.array([1] * both + [0] * first + [1] * second + [0] * neither)
    return a[:, None], b[:, None]


@pytest.mark.parametrize(("first", "second"), [(12, 3), (3, 12), (1, 0), (7, 7), (40, 25)])
def test_with_one_seed_it_is_the_classic_test(first, second):
    found = statistics.mcnemar(*paired(20, first, second, 30))
    statistic = (first - second) ** 2 / (first + second)
    assert found.statistic == pytest.approx(statistic)
    assert found.p == pytest.approx(stats.chi2.sf(statistic, 1))
    assert found.p_exact == pytest.approx(stats.binomtest(first, first + second).pvalue)
    assert (found.only_first, found.only_second) == (first, second)
    assert found.difference == pytest.approx((first - second) / (50 + first + second))
    a, b = paired(20, first, second, 30)
    ttest = stats.ttest_rel(a[:, 0], b[:, 0])
    assert found.standard_error == pytest.approx(stats.sem((a - b)[:, 0]))
    interval = ttest.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_the_exact_p_is_the_share_of_signs():
    for _ in range(5):
        first, second = RNG.random((2, 8, 3)) < [[[0.7]], [[0.4]]]
        counts = first.sum(axis=1).astype(int) - second.sum(axis=1)
        sums = [abs(np.dot(signs, counts)) for signs in itertools.product((-1, 1), repeat=8)]
        assert statistics.mcnemar(first, second).p_exact == pytest.approx(np.mean(sums >= abs(counts.sum())))


def test_copies_of_a_seed_leave_p_as_it_is():
    first, second = paired(20, 12, 3, 30)
    one = statistics.mcnemar(first, second)
    many = statistics.mcnemar(np.repeat(first, 5, axis=1), np.repeat(second, 5, axis=1))
    assert (many.p, many.p_exact, many.standard_error) == pytest.approx((one.p, one.p_exact, one.standard_error))


def test_arms_that_never_differ_have_p_one():
    correct = RNG.random((30, 2)) < 0.5
    found = statistics.mcnemar(correct, correct)
    assert (found.difference, found.statistic, found.p, found.p_exact) == (0, 0, 1, 1)


def test_p_is_uniform_under_the_null_and_a_test_without_clusters_is_not():
    rng = np.random.default_rng(7)
    clustered, naive = [], []
    for _ in range(1000):
        # Each question suits one of the arms, neither more often: answers to a question depend on each other.
        chances = rng.random((400, 1))
        shift = rng.choice([-0.3, 0.3], size=(400, 1))
        first = rng.random((400, 4)) < np.clip(chances + shift, 0, 1)
        second = rng.random((400, 4)) < np.clip(chances - shift, 0, 1)
        found = statistics.mcnemar(first, second)
        clustered.append(found.p)
        b, c = found.only_first, found.only_second
        naive.append(stats.chi2.sf((b - c) ** 2 / (b + c), 1))
    bins = np.histogram(clustered, bins=10, range=(0, 1))[0]
    assert stats.chisquare(bins).pvalue > 1e-3  # .86
    rejected = sum(p <= 0.05 for p in clustered)
    assert stats.binomtest(rejected, 1000, 0.05).pvalue > 1e-3  # 50 of 1000
    assert np.mean(np.array(naive) <= 0.05) > 0.1  # .23


# ---------------------------------------------------------------- subsets


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_the_mean_over_all_subsets(k):
    correct = RNG.random((12, 5)) < 0.4
    subsets = list(itertools.combinations(range(5), k))
    values = np.array([np.mean([row[list(chosen)].any() for chosen in subsets]) for row in correct])
    found = statistics.pass_at_k(correct, k)
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(stats.sem(values))


def test_pass_at_k_is_unbiased():
    expected = sum(p * statistics.pass_at_k(table, 2).value for table, p in outcomes([[0.3] * 4, [0.05] * 4]))
    assert expected == pytest.approx(np.mean([1 - 0.7**2, 1 - 0.95**2]))


def test_best_of_n_is_the_mean_over_all_subsets_ties_at_equal_chance():
    correct = RNG.random((6, 5)) < 0.5
    scores = RNG.integers(0, 3, size=(6, 5))  # ties
    curve = statistics.best_of_curve(correct, scores, np.ones((6, 5)))
    for n in range(1, 6):
        for q in range(6):
            verdicts = []
            for chosen in map(list, itertools.combinations(range(5), n)):
                best = scores[q, chosen] == scores[q, chosen].max()
                verdicts.append(correct[q, chosen][best].mean())
            assert curve.values[n - 1, q] == pytest.approx(np.mean(verdicts))


def test_a_majority_of_n_is_the_mean_over_all_subsets_ties_at_equal_chance():
    truths = {"a": 1, "b": 0, "c": 1, "d": 0, None: 0}  # two spellings of the right answer vote apart
    answers = [[list(truths)[i] for i in RNG.integers(0, 5, size=6)] for _ in range(8)] + [[None] * 6]
    correct = np.array([[truths[answer] for answer in row] for row in answers])
    curve = statistics.majority_curve(answers, correct, np.ones((9, 6)))
    for n in range(1, 7):
        for q, row in enumerate(answers):
            verdicts = []
            for chosen in itertools.combinations(row, n):
                voting = [answer for answer in chosen if answer is not None]
                most = max(map(voting.count, voting), default=0)
                winners = sorted({answer for answer in voting if voting.count(answer) == most})
                verdicts.append(np.mean([truths[answer] for answer in winners]) if winners else 0)
            assert curve.values[n - 1, q] == pytest.approx(np.mean(verdicts))
    assert curve.values[0] == pytest.approx(correct.mean(axis=1))
    assert curve.values[:, -1] == pytest.approx(0)


def test_a_curve_between_two_points_is_a_coin_between_them_and_ends_where_it_ends():
    correct = RNG.random((10, 4)) < 0.5
    tokens = RNG.integers(50, 150, size=(10, 4))
    curve = statistics.best_of_curve(correct, RNG.random((10, 4)), tokens, once=30)
    assert curve.tokens == pytest.approx(30 + tokens.mean() * np.arange(1, 5))
    assert curve.values_at(curve.tokens[1]) == pytest.approx(curve.values[1])
    assert curve.values_at(curve.tokens[-1]) == pytest.approx(curve.values[-1])
    between = 0.75 * curve.tokens[1] + 0.25 * curve.tokens[2]
    assert curve.values_at(between) == pytest.approx(0.75 * curve.values[1] + 0.25 * curve.values[2])
    assert curve.at(between).value == pytest.approx(curve.values_at(between).mean())
    assert [e.value for e in curve.estimates()] == pytest.approx(curve.values.mean(axis=1))
    for outside in (curve.tokens[0] - 1, curve.tokens[-1] + 1, nan):
        with pytest.raises(ArgumentError, match="the curve is known from"):
            curve.values_at(outside)


def test_a_curve_of_one_seed_is_a_point():
    curve = statistics.best_of_curve([[1], [0]], [[0.5], [0.5]], [[10], [20]])
    assert curve.at(15.0).value == 0.5


def test_an_arm_is_compared_with_a_curve_by_question():
    first, second = RNG.random(30), RNG.random(30)
    ttest = stats.ttest_rel(first, second)
    found = statistics.difference(first, second)
    interval = ttest.confidence_interval(0.95)
    assert found == pytest.approx(((first - second).mean(), stats.sem(first - second), interval.low, interval.high))


def test_costs_are_summed_up_by_question():
    seconds = RNG.exponential(size=(20, 3))
    found = statistics.spread(seconds)
    assert found.mean == pytest.approx(seconds.mean())
    assert found.standard_error == pytest.approx(stats.sem(seconds.mean(axis=1)))
    assert (found.median, found.p90) == pytest.approx(tuple(np.quantile(seconds, [0.5, 0.9])))
    assert found.total == pytest.approx(seconds.sum())


def test_many_seeds_do_not_overflow():
    correct = np.arange(300)[None, :] < [[3], [200]]
    assert statistics.pass_at_k(correct, 100).value == pytest.approx(
        np.mean([1 - comb(297, 100) / comb(300, 100), 1.0]), rel=1e-12
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.accuracy([1, 0]), r"correct is \(2,\)"),
        (lambda: statistics.accuracy(np.empty((0, 3))), r"correct is \(0, 3\)"),
        (lambda: statistics.accuracy([[0.5]]), "0 and 1 only"),
        (lambda: statistics.accuracy([[nan]]), "finite"),
        (lambda: statistics.accuracy([[1], [0]], level=1.0), "level is 1.0"),
        (lambda: statistics.mcnemar([[1]], [[1, 0]]), "must be paired"),
        (lambda: statistics.pass_at_k([[1, 0]], 3), "k is 3"),
        (lambda: statistics.pass_at_k([[1, 0]], 0), "k is 0"),
        (lambda: statistics.best_of_curve([[1, 0]], [[1]], [[1, 1]]), "scores is"),
        (lambda: statistics.best_of_curve([[1, 0]], [[1, 2]], [[1, 0]]), "tokens is"),
        (lambda: statistics.majority_curve([["a"]], [[1, 0]], [[1, 1]]), "answers must be"),
        (lambda: statistics.majority_curve([["a", "a"]], [[1, 0]], [[1, 1]]), "both right and wrong"),
        (lambda: statistics.difference([1.0], [1.0, 2.0]), r"must be \[questions\]"),
        (lambda: statistics.difference([np.nan, 1.0], [0.0, 1.0]), r"must be \[questions\] of finite numbers"),
    ],
)
def test_tables_without_meaning_are_refused(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
