"""Grades mathematics by two graders: the published harness's rules (`published_math`) and math-verify.

Both run in processes that are killed at their limit (`workers`), two of them for this process, kept from answer to
answer.
"""

from __future__ import annotations

import atexit
import functools
from dataclasses import replace

from power_kernels.api.experiments.grading.grade import Grade
from power_kernels.api.experiments.grading.published_math import last_boxed
from power_kernels.api.experiments.grading.workers import Workers
from power_kernels.errors import ArgumentError


@functools.cache
def _workers() -> Workers:
    workers = Workers(2)
    atexit.register(workers.close)
    return workers


def grade_math_published(
    answer_text: str, truth: str, *, timeout: float = 10.0, workers: Workers | None = None
) -> Grade:
    r"""The last `\boxed{...}` of an answer against the truth, by the published harness's rules.

    Args:
        answer_text: the whole answer. Without a closed box it holds no answer.
        truth: the right answer, as in MATH's `answer`.
        timeout: seconds until the grader is killed; the answer then does not count.
        workers: the processes to use; None for this process's own.
    """
    grade = _ask("published", answer_text, truth, timeout, workers)
    return grade if grade.parsed is not None else replace(grade, parsed=last_boxed(answer_text))


def grade_math_verify(answer_text: str, truth: str, *, timeout: float = 10.0, workers: Workers | None = None) -> Grade:
    r"""An answer against the truth by math-verify: the last `\boxed{...}` if one is closed, else the whole text, in
    which it also finds answers outside of boxes.

    Args:
        answer_text: the whole answer.
        truth: the right answer, LaTeX without dollars.
        timeout: seconds until the grader is killed; the answer then does not count.
        workers: the processes to use; None for this process's own.
    """
    return _ask("math_verify", answer_text, truth, timeout, workers)


def _ask(grader: str, answer: str, truth: str, timeout: float, workers: Workers | None) -> Grade:
    if not timeout > 0:
        raise ArgumentError(f"timeout is {timeout}; it must be positive")
    return Grade(**(workers or _workers()).ask(grader, answer, truth, timeout))
