"""What a grader says of one answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grade:
    """One answer's grade.

    Args:
        correct: whether the answer counts.
        parsed: what was taken as the answer; None if none was found, or the grader was ended before it could say.
        reason: "passed"; "wrong" (an answer, not the right one; a failed assertion); "no answer"; "timeout" and
            "memory" (a limit was reached); "exited" (the program left before its end); "error" (it raised, or a
            grader did).
        detail: a few words more, such as the last line of a traceback.
    """

    correct: bool
    parsed: str | None
    reason: str
    detail: str = ""
