"""Grades the records of a run, and keeps the grades beside them.

    RUN/grades/<task>/<arm>/seed-<seed>.jsonl        a line a record, in its order: what each grader says

Grading can be done again at any time, with other graders: what a grader said of the same answer is kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from power_kernels.api.experiments.grading import choice, code, math
from power_kernels.api.experiments.grading.grade import Grade
from power_kernels.api.experiments.grading.sandbox import SandboxError
from power_kernels.api.experiments.jobs import Job
from power_kernels.api.experiments.records import RunFolder, write_whole
from power_kernels.api.experiments.tasks.task import Question
from power_kernels.errors import ArgumentError

RUNS_CODE = ("humaneval", "humaneval_chat", "humaneval_published", "mbpp", "code")
LM_EVAL_TIMEOUT = 30.0
_NOTHING = ("", "[invalid]")  # what lm-eval's filters give where they find no answer
_ONE_AT_A_TIME = threading.Lock()


def runs_code(job: Job) -> bool:
    """Whether grading the job's answers runs them."""
    return bool(set(job.task.graders) & set(RUNS_CODE))


def grade_run(folder: RunFolder, jobs: list[Job], *, allow_code_execution: bool, workers: int) -> None:
    """Raises ArgumentError where answers would have to be run and may not be, or cannot be kept in here."""
    for job in jobs:
        if runs_code(job) and not allow_code_execution:
            raise ArgumentError(
                f"--allow-code-execution is not given, and the grader {job.task.graders[0]} runs what the model wrote, "
                "in a process with limits"
            )
    scorers = {job.task.name: job.task.scorer() for job in jobs if job.task.scorer is not None}
    try:
        with ThreadPoolExecutor(workers) as pool:
            for job in jobs:
                _grade_job(folder, job, scorers.get(job.task.name), pool)
    except SandboxError as error:
        raise ArgumentError(f"--allow-code-execution: programs cannot be kept in here: {error}") from None
    finally:
        for scorer in scorers.values():
            scorer.close()


def _grade_job(folder: RunFolder, job: Job, scorer, pool: ThreadPoolExecutor) -> None:
    task, arm, seed = job.task, job.arm.label, job.seed
    records = folder.read(task.name, arm, seed)
    if not records or not task.graders:
        return
    known = {
        (line["prompt_id"], line["chain_id"]): line["grades"] for line in read_grades(folder, task.name, arm, seed)
    }

    def graded(record: dict) -> dict:
        place = {key: record[key] for key in ("prompt_id", "chain_id")}
        question, answer = task.questions[record["prompt_id"]], record["answer"]
        said, before = {}, known.get(tuple(place.values()), {})
        for grader in task.graders:
            digest = _digest(grader, question, answer)
            said[grader] = before.get(grader)
            if said[grader] is None or said[grader]["digest"] != digest:
                said[grader] = {**asdict(grade(grader, question, answer, scorer)), "digest": digest}
        return {**place, "grades": said}

    lines = list(pool.map(graded, records))
    path = grades_path(folder, task.name, arm, seed)
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    right = sum(line["grades"][task.graders[0]]["correct"] for line in lines)
    print(f"{job.name}: {right} of {len(lines)} answers are right ({task.graders[0]})", file=sys.stderr)


def grades_path(folder: RunFolder, task: str, arm: str, seed: int) -> Path:
    return folder.path / "grades" / task / arm / f"seed-{seed}.jsonl"


def read_grades(folder: RunFolder, task: str, arm: str, seed: int) -> list[dict]:
    """Of a whole file; none where nothing was graded. Raises ArgumentError."""
    path = grades_path(folder, task, arm, seed)
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        for line in lines:
            line["prompt_id"], line["chain_id"], line["grades"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise ArgumentError(
            f"--out {path} does not hold grades of power-kernels; remove it, and --grade makes it anew"
        ) from None
    return lines


def grade(grader: str, question: Question, answer: str, scorer=None) -> Grade:
    """What a grader, by its name, says of an answer. Running code must have been allowed before. scorer: the task's,
    for "lm-eval"."""
    if grader == "lm-eval":
        return _lm_eval(question, answer, scorer)
    return _GRADERS[grader](question, answer)


def _digest(grader: str, question: Question, answer: str) -> str:
    what = json.dumps([grader, question.document, answer], sort_keys=True, default=str)
    return hashlib.sha256(what.encode()).hexdigest()[:16]


# -- the graders, by name


def _exact(question: Question, answer: str) -> Grade:
    pattern = question.document.get("pattern")
    found = answer.strip()
    if pattern is not None:
        matches = [match[match.lastindex or 0] for match in re.finditer(pattern, answer)]
        found = matches[-1].strip() if matches else ""
    if not found:
        return Grade(False, None, "no answer")
    right = found == question.document["answer"].strip()
    return Grade(right, found, "passed" if right else "wrong")


def _truth(grader: Callable[[str, str], Grade]) -> Callable[[Question, str], Grade]:
    """A grader of an answer and the right one."""
    return lambda question, answer: grader(answer, question.document["answer"])


def _code(grader: Callable[..., Grade]) -> Callable[[Question, str], Grade]:
    """A grader of a problem and what was written for it."""
    return lambda question, answer: grader(question.document, answer, allow_code_execution=True)


def _published_humaneval(problem: dict, answer: str, **allowed) -> Grade:
    """It looks for the function in the whole text."""
    return code.grade_humaneval_published(problem, problem["prompt"] + answer, **allowed)


def _with_test(document: dict, answer: str, **allowed) -> Grade:
    """MBPP's way, of one test that is a program."""
    return code.grade_mbpp({"test_list": [document["test"]]}, answer, **allowed)


def _lm_eval(question: Question, answer: str, scorer) -> Grade:
    """Right where the first of the task's metrics is 1. parsed: what its first filter takes for the answer."""
    try:
        with _ONE_AT_A_TIME:
            said = scorer(question.document["number"], answer, LM_EVAL_TIMEOUT)
    except RuntimeError as error:
        return Grade(False, None, "error", str(error)[:200])
    if said is None:
        return Grade(False, None, "timeout", f"{LM_EVAL_TIMEOUT:g} s")
    parsed, metrics = said
    first = next(iter(metrics.values()))
    if first not in (0.0, 1.0):
        return Grade(False, parsed, "error", f"the task's first metric is {first}, neither 0 nor 1")
    if parsed in _NOTHING:
        return Grade(False, None, "no answer", json.dumps(metrics))
    return Grade(first == 1.0, parsed, "passed" if first == 1.0 else "wrong", json.dumps(metrics))


_GRADERS: dict[str, Callable[[Question, str], Grade]] = {
    "exact": _exact,
    "math_published": _truth(math.grade_math_published),
    "math_verify": _truth(math.grade_math_verify),
    "choice": _truth(choice.grade_choice),
    "choice_published": _truth(choice.grade_choice_published),
    "humaneval": _code(code.grade_humaneval),
    "humaneval_chat": _code(code.grade_humaneval_chat),
    "humaneval_published": _code(_published_humaneval),
    "mbpp": _code(code.grade_mbpp),
    "code": _code(_with_test),
}
