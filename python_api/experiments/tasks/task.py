"""What every task gives: its questions and how their answers end and are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Question:
    """id: the data's own. prompt: {"prompt": text} or {"messages": conversation}. document: what the grader is told."""

    id: str
    prompt: dict
    document: dict


@dataclass(frozen=True)
class Task:
    """name: of its records. questions: all of them, in the order of their prompt ids; the first `limit` are asked.
    stop: strings that end an answer. graders: how answers are graded (`grade.py`), the one that counts first; none
    where somebody else does. facts: choices that are recorded with the run. scorer: makes what the grader "lm-eval"
    asks."""

    name: str
    questions: list[Question]
    stop: tuple[str, ...]
    max_new_tokens: int
    graders: tuple[str, ...]
    limit: int | None = None
    facts: dict = field(default_factory=dict)
    scorer: Callable[[], Callable] | None = None

    @property
    def asked(self) -> range:
        return range(len(self.questions) if self.limit is None else min(self.limit, len(self.questions)))

    def recorded(self) -> dict:
        """What the run's folder says of the task: another task of this name must say the same."""
        questions = [{"id": q.id, "prompt": q.prompt, "document": q.document} for q in self.questions]
        return {
            "questions": len(self.questions),
            "questions_sha256": hashlib.sha256(json.dumps(questions, sort_keys=True).encode()).hexdigest(),
            "stop": list(self.stop),
            "max_new_tokens": self.max_new_tokens,
            "graders": list(self.graders),
            **self.facts,
        }
