"""Grades multiple choice: the published harness's way for GPQA, and one that looks for the answer's statement."""

from __future__ import annotations

import re

from power_kernels.api.experiments.grading.grade import Grade
from power_kernels.api.experiments.grading.published_math import last_boxed
from power_kernels.errors import ArgumentError

LETTERS = "ABCD"
# "the answer is (B)", "Answer: **B**", "correct option would be B"
_STATED = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+(?:is|would\s+be|should\s+be|must\s+be)|\s*[:=])*\s*(?:option|choice)?\W{0,6}?"
    r"(?<![A-Za-z])([A-Z])(?![A-Za-z'])",
    re.IGNORECASE,
)
_ALONE = re.compile(r"^\W*([A-Z])\W*$")  # a line of one letter


def grade_choice_published(answer_text: str, truth_letter: str) -> Grade:
    """The last of A, B, C, D that stands alone as a word, in whatever case: the article "a" counts as A."""
    _check(truth_letter, LETTERS)
    found = re.findall(r"\b[ABCD]\b", answer_text.upper())
    return _graded(found[-1] if found else None, truth_letter)


def grade_choice(answer_text: str, truth_letter: str, letters: str = LETTERS) -> Grade:
    r"""The letter that the answer states.

    The first of these that is there: the last `\boxed{...}` if it holds a letter; the last "answer is (B)", "Answer: B"
    or "option B"; the last line that is a letter and nothing else. Otherwise there is no answer: letters in running
    text do not count.

    Args:
        answer_text: the whole answer.
        truth_letter: the right letter.
        letters: those that can be chosen.
    """
    _check(truth_letter, letters)
    return _graded(_stated(answer_text, letters), truth_letter)


def _stated(text: str, letters: str) -> str | None:
    boxed = last_boxed(text)
    if boxed is not None:
        inside = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\b", " ", boxed)
        if (found := re.match(r"\W*([A-Za-z])(?![A-Za-z])", inside)) and found[1].upper() in letters:
            return found[1].upper()
    stated = [match[1].upper() for match in _STATED.finditer(text) if match[1].isupper()]
    alone = [match[1] for line in text.splitlines() if (match := _ALONE.match(line))]
    for found in (stated, alone):
        if found := [letter for letter in found if letter in letters]:
            return found[-1]
    return None


def _graded(letter: str | None, truth: str) -> Grade:
    if letter is None:
        return Grade(False, None, "no answer")
    return Grade(letter == truth, letter, "passed" if letter == truth else "wrong")


def _check(truth: str, letters: str) -> None:
    if len(truth) != 1 or truth not in letters:
        raise ArgumentError(f"truth_letter is {truth!r}; it must be one of {', '.join(letters)}")
