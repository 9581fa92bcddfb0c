"""What came out of a run: an accuracy an arm and task, and what it cost; table.json for programs, table.md for people.

An arm that selects is counted by the answer it takes for each question and seed, and costs what all of them cost.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import numpy as np

from power_kernels.api.experiments.grade import read_grades
from power_kernels.api.experiments.jobs import Job
from power_kernels.api.experiments.records import RunFolder, write_whole
from power_kernels.api.experiments.schema import Arm, BestOfN, Majority

BY: dict[str, Callable[[dict], float]] = {
    "logp": lambda record: record["answer_logp"],
    "logp-per-token": lambda record: record["answer_logp"] / max(record["answer_tokens"], 1),
}


def graded_records(folder: RunFolder, job: Job) -> list[dict]:
    """The records of a job, with "grades" by grader where there are any (of this answer, or they do not count)."""
    grades = {
        (line["prompt_id"], line["chain_id"]): line["grades"]
        for line in read_grades(folder, job.task.name, job.arm.label, job.seed)
    }
    asked = job.task.asked
    records = [record for record in folder.read(job.task.name, job.arm.label, job.seed) if record["prompt_id"] in asked]
    return [{**record, "grades": grades.get((record["prompt_id"], record["chain_id"]), {})} for record in records]


def taken(arm: Arm, records: list[dict], grader: str | None) -> list[dict]:
    """Of the answers to each question those that count: all, but for an arm that selects. grader: whose reading of the
    answers a majority is of."""
    if not isinstance(arm, BestOfN | Majority):
        return records
    by_question: dict[int, list[dict]] = {}
    for record in records:
        by_question.setdefault(record["prompt_id"], []).append(record)
    if isinstance(arm, BestOfN):
        return [max(answers, key=BY[arm.by]) for answers in by_question.values()]
    return [_majority(answers, grader) for answers in by_question.values()]


def _majority(answers: list[dict], grader: str | None) -> dict:
    read = [record["grades"].get(grader, {}).get("parsed") for record in answers]
    counts = Counter(parsed for parsed in read if parsed is not None)
    if not counts:
        return answers[0]
    return answers[read.index(max(counts, key=counts.get))]  # of the most frequent, the one that was seen first


def rows(folder: RunFolder, jobs: list[Job]) -> list[dict]:
    """One for each task and arm that has records."""
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.task.name, job.arm.label), []).append(job)
    found = []
    for (task, arm), of_arm in groups.items():
        graders = of_arm[0].task.graders
        seeds = {job.seed: graded_records(folder, job) for job in of_arm}
        everything = [record for records in seeds.values() for record in records]
        if not everything:
            continue
        counted = [r for records in seeds.values() for r in taken(of_arm[0].arm, records, next(iter(graders), None))]
        row = {"task": task, "arm": arm, "seeds": [seed for seed, records in seeds.items() if records]}
        row |= {"questions": len({r["prompt_id"] for r in counted}), "answers": len(counted)}
        for grader in graders:
            row.setdefault("grades", {})[grader] = _accuracy(counted, grader)
        row |= {
            "faults": sum(r["finish"] == "fault" for r in counted),
            "mean": {
                "answer_logp": float(np.mean([r["answer_logp"] for r in counted])),
                "answer_tokens": float(np.mean([r["answer_tokens"] for r in counted])),
                "tokens": float(np.mean([len(r["tokens"]) for r in counted])),
                "forwarded": sum(r["cost"]["forwarded"] for r in everything) / len(counted),
                "seconds": sum(r["cost"]["seconds"] for r in everything) / len(counted),
            },
        }
        steps = sum(r["steps"] for r in everything)
        row["acceptance"] = sum(r["accepted"] + r["unchanged"] for r in everything) / steps if steps else None
        found.append(row)
    return found


def _accuracy(records: list[dict], grader: str) -> dict | None:
    """None where an answer is not graded."""
    if not all(grader in record["grades"] for record in records):
        return None
    by_question: dict[int, list[float]] = {}
    for record in records:
        by_question.setdefault(record["prompt_id"], []).append(float(record["grades"][grader]["correct"]))
    means = np.array([np.mean(values) for values in by_question.values()])
    reasons = Counter(record["grades"][grader]["reason"] for record in records)
    return {
        "accuracy": float(means.mean()),
        "standard_error": float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None,
        "reasons": dict(sorted(reasons.items())),
    }


def write(folder: RunFolder, jobs: list[Job]) -> str:
    """Both files. Returns the text of table.md."""
    found = rows(folder, jobs)
    write_whole(folder.path / "table.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    text = markdown(found)
    write_whole(folder.path / "table.md", text)
    return text


def markdown(found: list[dict]) -> str:
    head = (
        "task", "arm", "seeds", "questions", "accuracy", "second grader", "no answer", "log p", "tokens", "forwarded",
        "seconds", "acceptance",
    )  # fmt: skip
    lines = [head, tuple("---" for _ in head)]
    for row in found:
        graded = list(row.get("grades", {}).values())
        first = graded[0] if graded else None
        mean = row["mean"]
        lines.append(
            (
                row["task"],
                row["arm"],
                str(len(row["seeds"])),
                str(row["questions"]),
                _with_error(first),
                _with_error(graded[1]) if len(graded) > 1 else "-",
                "-" if first is None else f"{first['reasons'].get('no answer', 0) / row['answers']:.3f}",
                f"{mean['answer_logp']:.1f}",
                f"{mean['answer_tokens']:.0f}",
                f"{mean['forwarded']:.0f}",
                f"{mean['seconds']:.1f}",
                "-" if row["acceptance"] is None else f"{row['acceptance']:.2f}",
            )
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _with_error(graded: dict | None) -> str:
    if graded is None:
        return "-"
    error = graded["standard_error"]
    return f"{graded['accuracy']:.3f}" + ("" if error is None else f" ± {error:.3f}")
