"""Statistics of arms on questions: arrays [questions, seeds], 1 for a right answer and 0 for another.

Questions are a sample, and the answers to one question depend on each other, so a question is a cluster. With x_qs the
verdicts, m_q the mean of question q over its S seeds and m the mean of the Q means,

    accuracy           m
    standard error     sqrt(sum_q (m_q - m)^2 / (Q (Q - 1)))           over questions and seeds together
    error of seeds     sqrt(sum_q v_q / S) / Q, v_q = sum_s (x_qs - m_q)^2 / (S - 1)     the questions held fixed
    band               Wilson's interval for n' = m (1 - m) / error^2 answers, at most Q S of them, with the t quantile
                       of Q - 1; n' = Q where no two means differ. It stays within [0, 1] and does not vanish at the
                       ends (Wilson 1927; Korn & Graubard 1998 for n').

Two arms meet on the same questions. With d_q the difference of their means,

    McNemar, clustered (sum_q d_q)^2 / sum_q d_q^2, chi-square with one degree (Durkalski et al. 2003, Statistics in
                       Medicine 22:2417); with one seed McNemar's (b - c)^2 / (b + c)
    exact              the share of the 2^Q signs of the d_q under which the sum is at least as large in size; with one
                       seed McNemar's exact (binomial) test. It asks that the arms can be exchanged within a question.

What is drawn n times out of S answers (pass@k, best of n, majority) is the mean over all subsets of n: no random draws,
no bias (Chen et al. 2021 for pass@k).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from power_kernels.errors import ArgumentError


@dataclass(frozen=True)
class Estimate:
    """A mean over questions.

    Args:
        value: the mean.
        standard_error: over questions and seeds; NaN with one question.
        low, high: its band.
        seed_error: the part of the seeds, the questions held fixed; None where it is not known (one seed).
        questions, seeds: how many there were.
    """

    value: float
    standard_error: float
    low: float
    high: float
    seed_error: float | None
    questions: int
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """The first arm against the second, on the same questions.

    Args:
        difference: of the accuracies, first minus second.
        standard_error: of the difference, clustered by question; NaN with one question.
        low, high: a band for it, by t with questions - 1 degrees.
        statistic, p: clustered McNemar; 0 and 1 where the arms never differ.
        p_exact: over all signs of the questions' differences.
        only_first, only_second: answers (question and seed) that only one of the arms has right.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    statistic: float
    p: float
    p_exact: float
    only_first: int
    only_second: int
    questions: int
    seeds: int


@dataclass(frozen=True)
class Spread:
    """A cost an answer, such as tokens forwarded or seconds: mean with its standard error (clustered by question),
    median, 90th percentile, sum."""

    mean: float
    standard_error: float
    median: float
    p90: float
    total: float


def accuracy(correct: np.ndarray, level: float = 0.95) -> Estimate:
    """The share of right answers; as well of parsed ones, or of any other yes and no.

    Args:
        correct: [questions, seeds] of 0 and 1.
        level: of the band.
    """
    correct = _verdicts("correct", correct)
    seeds = correct.shape[1]
    error = None
    if seeds > 1:
        error = float(np.sqrt(np.sum(correct.var(axis=1, ddof=1) / seeds)) / len(correct))
    return estimate(correct.mean(axis=1), seeds, level, error)


def estimate(values: np.ndarray, seeds: int, level: float = 0.95, seed_error: float | None = None) -> Estimate:
    """The mean of what each question has, between 0 and 1, with its error and band.

    Args:
        values: [questions] in [0, 1].
        seeds: answers that each value was made of.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise ArgumentError(f"values is {values.shape}; it must be [questions], not empty, each between 0 and 1")
    count, mean = len(values), float(values.mean())
    if count == 1:
        return Estimate(mean, float("nan"), 0.0, 1.0, seed_error, 1, seeds)
    error = float(values.std(ddof=1) / np.sqrt(count))
    effective = min(mean * (1 - mean) / error**2, count * seeds) if values.std() > 0 else count
    low, high = wilson(mean, effective, _t_quantile(level, count - 1))
    return Estimate(mean, error, low, high, seed_error, count, seeds)


def mcnemar(first: np.ndarray, second: np.ndarray, level: float = 0.95) -> Comparison:
    """Whether two arms answer equally well, paired by question and seed.

    Args:
        first, second: [questions, seeds] of 0 and 1.
        level: of the difference's band.
    """
    first, second = _verdicts("first", first), _verdicts("second", second)
    if first.shape != second.shape:
        raise ArgumentError(f"first is {first.shape} and second is {second.shape}; they must be paired")
    counts = np.rint((first - second).sum(axis=1)).astype(np.int64)
    difference, error, low, high = _difference(counts / first.shape[1], level)
    squares = int((counts**2).sum())
    statistic = float(counts.sum() ** 2 / squares) if squares else 0.0
    return Comparison(
        difference=difference,
        standard_error=error,
        low=low,
        high=high,
        statistic=statistic,
        p=_chi_square_tail(statistic),
        p_exact=_signs_tail(counts),
        only_first=int(((first == 1) & (second == 0)).sum()),
        only_second=int(((first == 0) & (second == 1)).sum()),
        questions=first.shape[0],
        seeds=first.shape[1],
    )


def difference(first: np.ndarray, second: np.ndarray, level: float = 0.95) -> tuple[float, float, float, float]:
    """The mean of first - second over questions, its standard error, and the ends of its band.

    Args:
        first, second: [questions], such as the means of an arm and a curve's values at its cost (`Curve.values_at`).
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    sound = first.ndim == 1 and first.shape == second.shape and len(first) > 0
    if not sound or not np.isfinite(first - second).all():
        raise ArgumentError(
            f"first is {first.shape} and second is {second.shape}; they must be [questions] of finite numbers"
        )
    return _difference(first - second, level)


def pass_at_k(correct: np.ndarray, k: int, level: float = 0.95) -> Estimate:
    """The chance that one of k answers is right: the mean over questions of 1 - C(S - c, k) / C(S, k), for c right
    ones of S (Chen et al. 2021).

    Args:
        correct: [questions, seeds] of 0 and 1.
        k: from 1 to the number of seeds.
    """
    correct = _verdicts("correct", correct)
    seeds = correct.shape[1]
    _check_n("k", k, seeds)
    chances = np.array([1 - comb(seeds - right, k) / comb(seeds, k) for right in range(seeds + 1)])
    return estimate(chances[np.rint(correct.sum(axis=1)).astype(int)], seeds, level)


# ---------------------------------------------------------------- at equal cost


@dataclass(frozen=True)
class Curve:
    """Accuracy over cost, as the number n of answers to choose from grows.

    Args:
        n: [points], from 1 to the number of seeds.
        tokens: [points], tokens forwarded for one question.
        values: [points, questions], the chance that the chosen answer is right.
    """

    n: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    def values_at(self, tokens: float) -> np.ndarray:
        """[questions], the chances at a cost between two points: those of whoever draws n or n + 1 answers, by a coin
        that makes the mean cost the given one. Raises ArgumentError outside of the curve, which knows nothing there."""
        if not self.tokens[0] <= tokens <= self.tokens[-1]:
            raise ArgumentError(
                f"tokens is {tokens:g}; the curve is known from {self.tokens[0]:g} to {self.tokens[-1]:g}"
            )
        above = min(int(np.searchsorted(self.tokens, tokens, side="right")), len(self.tokens) - 1)
        if above == 0:
            return self.values[0]
        left, right = self.tokens[above - 1], self.tokens[above]
        share = (tokens - left) / (right - left)
        return (1 - share) * self.values[above - 1] + share * self.values[above]

    def at(self, tokens: float, level: float = 0.95) -> Estimate:
        """The accuracy at a cost, with its band over questions."""
        return estimate(self.values_at(tokens), int(self.n[-1]), level)

    def estimates(self, level: float = 0.95) -> list[Estimate]:
        """The accuracy at each point."""
        return [estimate(values, int(self.n[-1]), level) for values in self.values]


def best_of_curve(correct: np.ndarray, scores: np.ndarray, tokens: np.ndarray, once: float = 0.0) -> Curve:
    """Best of n by score: the mean over all subsets of n answers of the verdict on the one with the highest score;
    answers of equal score are chosen with equal chance.

    Args:
        correct: [questions, seeds] of 0 and 1.
        scores: [questions, seeds], such as log p of the answers (nats).
        tokens: [questions, seeds], forwarded for each answer.
        once: tokens a question costs whatever n is, such as its prompt's where the answers share it.
    """
    correct = _verdicts("correct", correct)
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != correct.shape or np.isnan(scores).any():
        raise ArgumentError(f"scores is {scores.shape}; it must be {correct.shape} without NaN")
    seeds = correct.shape[1]
    weights = np.array(
        [[comb(seeds - rank, n - 1) / comb(seeds, n) for rank in range(1, seeds + 1)] for n in _ns(seeds)]
    )
    ranked = np.empty_like(correct)
    for row, right, score in zip(ranked, correct, scores, strict=True):
        order = np.argsort(-score, kind="stable")
        _, tied = np.unique(-score[order], return_inverse=True)
        row[:] = (np.bincount(tied, weights=right[order]) / np.bincount(tied))[tied]
    return Curve(_ns(seeds), _costs(tokens, correct.shape, once), np.clip(weights @ ranked.T, 0, 1))


def majority_curve(
    answers: Sequence[Sequence[Hashable | None]], correct: np.ndarray, tokens: np.ndarray, once: float = 0.0
) -> Curve:
    """Majority vote of n: the mean over all subsets of n answers of the verdict on the most frequent one; of several
    that are equally frequent each is chosen with equal chance. An answer None does not vote; where none votes the
    question is not answered.

    Args:
        answers: [questions, seeds], what was parsed. Equal ones must have equal verdicts.
        correct: [questions, seeds] of 0 and 1.
        tokens: [questions, seeds], forwarded for each answer.
        once: tokens a question costs whatever n is, such as its prompt's where the answers share it.
    """
    correct = _verdicts("correct", correct)
    seeds = correct.shape[1]
    if len(answers) != len(correct) or any(len(row) != seeds for row in answers):
        raise ArgumentError(f"answers must be {correct.shape}, as correct is")
    values = np.empty((seeds, len(correct)))
    for q, row in enumerate(answers):
        votes: dict[Hashable, int] = {}
        right: dict[Hashable, float] = {}
        for answer, verdict in zip(row, correct[q], strict=True):
            if answer is not None:
                votes[answer] = votes.get(answer, 0) + 1
                if right.setdefault(answer, verdict) != verdict:
                    raise ArgumentError(f"answers of question {q}: {answer!r} is both right and wrong")
        values[:, q] = [_majority(votes, right, seeds, n) for n in range(1, seeds + 1)]
    return Curve(_ns(seeds), _costs(tokens, correct.shape, once), np.clip(values, 0, 1))


def spread(values: np.ndarray) -> Spread:
    """What answers cost.

    Args:
        values: [questions, seeds], tokens forwarded or seconds of each answer.
    """
    values = _matrix("values", values)
    means = values.mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else float("nan")
    return Spread(
        mean=float(means.mean()),
        standard_error=float(error),
        median=float(np.median(values)),
        p90=float(np.quantile(values, 0.9)),
        total=float(values.sum()),
    )


# ---------------------------------------------------------------- parts


def _majority(votes: dict[Hashable, int], right: dict[Hashable, float], seeds: int, n: int) -> float:
    """The chance over subsets of n, by counting: for each right answer and each number t of its votes, the subsets in
    which no other has more than t, by how many have t as well."""
    silent = seeds - sum(votes.values())
    total = 0.0
    for answer, most in votes.items():
        if not right[answer]:
            continue
        for t in range(1, min(most, n) + 1):
            # ways[ties][size]: choices of `size` other answers, none with more than t votes, `ties` with exactly t
            ways = {0: [comb(silent, size) for size in range(n - t + 1)]}
            for other, count in votes.items():
                if other == answer:
                    continue
                grown: dict[int, list[int]] = {}
                for ties, sizes in ways.items():
                    for took in range(min(t, count) + 1):
                        after = grown.setdefault(ties + (took == t), [0] * (n - t + 1))
                        for size in range(n - t + 1 - took):
                            after[size + took] += sizes[size] * comb(count, took)
                ways = grown
            total += comb(most, t) * sum(sizes[n - t] / (1 + ties) for ties, sizes in ways.items())
    return total / comb(seeds, n)


def _signs_tail(counts: np.ndarray) -> float:
    """P(|sum of +-d_q| >= |sum of d_q|) over equally likely signs."""
    chances = np.ones(1)  # of the sums from -reach to reach
    for size, many in zip(*np.unique(np.abs(counts[counts != 0]), return_counts=True), strict=True):
        signs = np.zeros(2 * int(size * many) + 1)
        signs[:: 2 * size] = [comb(int(many), plus) / 2 ** int(many) for plus in range(many + 1)]
        chances = np.convolve(chances, signs)
    reach = len(chances) // 2
    sums = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(chances[sums >= abs(int(counts.sum()))].sum()))


def _difference(differences: np.ndarray, level: float) -> tuple[float, float, float, float]:
    count, mean = len(differences), float(differences.mean())
    if count == 1:
        return mean, float("nan"), -1.0, 1.0
    error = float(differences.std(ddof=1) / np.sqrt(count))
    half = _t_quantile(level, count - 1) * error
    return mean, error, max(-1.0, mean - half), min(1.0, mean + half)


def wilson(mean: float, count: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval of a share of `count` answers. quantile: of the normal distribution or of t."""
    shrink = quantile**2 / count
    centre = (mean + shrink / 2) / (1 + shrink)
    half = quantile * np.sqrt(mean * (1 - mean) / count + shrink / (4 * count)) / (1 + shrink)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def _t_quantile(level: float, degrees: int) -> float:
    from scipy import special

    if not 0 < level < 1:
        raise ArgumentError(f"level is {level}; it must lie between 0 and 1")
    return float(special.stdtrit(degrees, (1 + level) / 2))


def _chi_square_tail(statistic: float) -> float:
    from scipy import special

    return float(special.chdtrc(1, statistic))


def _ns(seeds: int) -> np.ndarray:
    return np.arange(1, seeds + 1)


def _costs(tokens: np.ndarray, shape: tuple[int, ...], once: float) -> np.ndarray:
    tokens = _matrix("tokens", tokens)
    if tokens.shape != shape or not (tokens > 0).all() or not once >= 0:
        raise ArgumentError(f"tokens is {tokens.shape}; it must be {shape} of positive numbers, and once at least 0")
    return once + _ns(shape[1]) * tokens.mean()


def _check_n(name: str, n: int, seeds: int) -> None:
    if not 1 <= n <= seeds:
        raise ArgumentError(f"{name} is {n}; with {seeds} seeds it must lie in [1, {seeds}]")


def _matrix(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ArgumentError(f"{name} is {values.shape}; it must be [questions, seeds], not empty, of finite numbers")
    return values


def _verdicts(name: str, values: np.ndarray) -> np.ndarray:
    values = _matrix(name, values)
    if not np.isin(values, (0, 1)).all():
        raise ArgumentError(f"{name} must hold 0 and 1 only")
    return values
