"""What came out of a run: an accuracy an arm and task, and what it cost; table.json for programs, table.md for people.

An arm that selects is counted by the answer it takes for each question and seed, and costs what all of them cost.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from power_kernels.api.experiments import statistics
from power_kernels.api.experiments.grade import read_grades
from power_kernels.api.experiments.jobs import Job
from power_kernels.api.experiments.records import RunFolder, write_whole
from power_kernels.api.experiments.schema import Arm, BestOfN, LowTemperature, Plain, selects

BY: dict[str, Callable[[dict], float]] = {
    "logp": lambda record: record["answer_logp"],
    "logp-per-token": lambda record: record["answer_logp"] / max(record["answer_tokens"], 1),
}


def graded_records(folder: RunFolder, job: Job) -> list[dict]:
    """The records of a job that count (`counted_records`), with "grades" by grader where there are any."""
    grades = {
        (line["prompt_id"], line["chain_id"]): line["grades"]
        for line in read_grades(folder, job.task.name, job.arm.label, job.seed)
    }
    records = counted_records(folder, job)
    return [{**record, "grades": grades.get((record["prompt_id"], record["chain_id"]), {})} for record in records]


def counted_records(folder: RunFolder, job: Job) -> list[dict]:
    """The records of the questions that are asked; of an arm that selects, of those that have all their answers: the
    best of fewer is another arm."""
    asked = job.task.asked
    records = [record for record in folder.read(job.task.name, job.arm.label, job.seed) if record["prompt_id"] in asked]
    if not selects(job.arm):
        return records
    there, n = Counter(record["prompt_id"] for record in records), folder.answers(job.arm, job.task.name)
    return [record for record in records if there[record["prompt_id"]] == n]


def taken(arm: Arm, records: list[dict], grader: str | None) -> list[dict]:
    """Of the answers to each question those that count: all, but for an arm that selects. It takes one that stopped at
    bad logits, which is the likelier the earlier it did, only where all are such. grader: whose reading of the answers
    a majority is of."""
    if not selects(arm):
        return records
    by_question: dict[int, list[dict]] = {}
    for record in records:
        by_question.setdefault(record["prompt_id"], []).append(record)
    of_each = [[a for a in answers if a["finish"] != "fault"] or answers for answers in by_question.values()]
    if isinstance(arm, BestOfN):
        return [max(answers, key=BY[arm.by]) for answers in of_each]
    return [_majority(answers, grader) for answers in of_each]


def _majority(answers: list[dict], grader: str | None) -> dict:
    read = [record["grades"].get(grader, {}).get("parsed") for record in answers]
    counts = Counter(parsed for parsed in read if parsed is not None)
    if not counts:
        return answers[0]
    return answers[read.index(max(counts, key=counts.get))]  # of the most frequent, the one that was seen first


def contents(folder: RunFolder, jobs: list[Job]) -> dict:
    """What table.json holds. rows: one for each task and arm that has records. comparisons: each arm against plain and
    low temperature, on the questions and seeds that both have."""
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.task.name, job.arm.label), []).append(job)
    rows, verdicts = [], {}
    for (task, label), of_arm in groups.items():
        arm, graders = of_arm[0].arm, of_arm[0].task.graders
        seeds = {job.seed: graded_records(folder, job) for job in of_arm}
        everything = [record for records in seeds.values() for record in records]
        if not everything:
            continue
        counted = [record for records in seeds.values() for record in taken(arm, records, next(iter(graders), None))]
        row = {"task": task, "arm": label, "seeds": [seed for seed, records in seeds.items() if records]}
        row |= {"questions": len({r["prompt_id"] for r in counted}), "answers": len(counted)}
        row |= {"grades": {}, "pass_at_k": {}, **_cost(counted, everything)}
        for grader in graders:
            if all(grader in record["grades"] for record in counted):
                row["grades"][grader] = _grades(counted, grader)
        if row["grades"] and next(iter(row["grades"])) == graders[0]:
            verdicts[task, label] = arm, _by_question(counted, graders[0])
            row["pass_at_k"] = _pass_at_k([list(of.values()) for of in verdicts[task, label][1].values()])
        rows.append(row)
    return {"rows": rows, "comparisons": _comparisons(verdicts)}


def _cost(counted: list[dict], everything: list[dict]) -> dict:
    """Of one answer that counts, what the others cost that were drawn for it included."""
    steps = sum(r["steps"] for r in everything)
    return {
        "faults": sum(r["finish"] == "fault" for r in counted),
        "acceptance": sum(r["accepted"] + r["unchanged"] for r in everything) / steps if steps else None,
        "answer_logp": float(np.mean([r["answer_logp"] for r in counted])),
        "answer_tokens": float(np.mean([r["answer_tokens"] for r in counted])),
        "tokens": float(np.mean([len(r["tokens"]) for r in counted])),
        "forwarded": sum(r["cost"]["forwarded"] for r in everything) / len(counted),
        "seconds": sum(r["cost"]["seconds"] for r in everything) / len(counted),
    }


Verdicts = dict[int, dict[tuple[int, int], float]]


def _by_question(counted: list[dict], grader: str) -> Verdicts:
    """The verdicts on each question, by seed and by place among the answers with that seed."""
    found: Verdicts = {}
    for record in counted:
        of = found.setdefault(record["prompt_id"], {})
        place = sum(seed == record["seed"] for seed, _ in of)
        of[record["seed"], place] = float(record["grades"][grader]["correct"])
    return found


def _grades(counted: list[dict], grader: str) -> dict:
    """Questions that not all seeds have come to count with those that have."""
    verdicts = [list(of.values()) for of in _by_question(counted, grader).values()]
    width = min(map(len, verdicts))
    if width == max(map(len, verdicts)):
        estimate = statistics.accuracy(np.array(verdicts))
    else:
        estimate = statistics.estimate(np.array([np.mean(values) for values in verdicts]), width)
    reasons = Counter(record["grades"][grader]["reason"] for record in counted)
    unread = sum(record["grades"][grader]["parsed"] is None for record in counted)
    return {**_told(estimate), "reasons": dict(sorted(reasons.items())), "read": 1 - unread / len(counted)}


def _pass_at_k(verdicts: list[list[float]]) -> dict[str, dict]:
    """For k = 1, 2, 4, ... and all, where there are several answers to each question."""
    width = min(map(len, verdicts))
    if width < 2:
        return {}
    correct = np.array([values[:width] for values in verdicts])
    powers = [2**i for i in range(width.bit_length()) if 2**i < width]
    return {str(k): _told(statistics.pass_at_k(correct, k)) for k in (*powers, width)}


def _comparisons(verdicts: dict[tuple[str, str], tuple[Arm, Verdicts]]) -> list[dict]:
    found = []
    for (task, label), (_, of_arm) in verdicts.items():
        for (task2, label2), (other, of_other) in verdicts.items():
            if task != task2 or label == label2 or not isinstance(other, Plain | LowTemperature):
                continue
            both = {i: sorted(of_arm[i].keys() & of_other[i].keys()) for i in sorted(of_arm.keys() & of_other.keys())}
            both = {i: places for i, places in both.items() if places}
            told = any(c["task"] == task and (c["arm"], c["against"]) == (label2, label) for c in found)
            if not both or told:
                continue
            width = min(map(len, both.values()))
            first, second = (
                np.array([[of[i][place] for place in places[:width]] for i, places in both.items()])
                for of in (of_arm, of_other)
            )
            compared = _told(statistics.mcnemar(first, second))
            found.append({"task": task, "arm": label, "against": label2, **compared})
    return found


def _told(figures) -> dict:
    """A dataclass of figures as JSON has them: NaN is null."""
    return {key: None if value != value else value for key, value in asdict(figures).items()}


def write(folder: RunFolder, jobs: list[Job]) -> str:
    """Both files. Returns the text of table.md."""
    found = contents(folder, jobs)
    write_whole(folder.path / "table.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    text = markdown(found)
    write_whole(folder.path / "table.md", text)
    return text


def markdown(found: dict) -> str:
    lines = [
        ("task", "arm", "seeds", "questions", "accuracy", "second grader", "read", "log p", "tokens", "forwarded",
         "seconds", "acceptance")
    ]  # fmt: skip
    for row in found["rows"]:
        graded = list(row["grades"].values())
        lines.append(
            (
                row["task"],
                row["arm"],
                str(len(row["seeds"])),
                str(row["questions"]),
                _accuracy(graded[0]) if graded else "-",
                _accuracy(graded[1]) if len(graded) > 1 else "-",
                f"{graded[0]['read']:.3f}" if graded else "-",
                f"{row['answer_logp']:.1f}",
                f"{row['answer_tokens']:.0f}",
                f"{row['forwarded']:.0f}",
                f"{row['seconds']:.1f}",
                "-" if row["acceptance"] is None else f"{row['acceptance']:.2f}",
            )
        )
    text = _markdown_table(lines) if found["rows"] else "no answers yet\n"
    if found["comparisons"]:
        lines = [("task", "arm", "against", "questions", "seeds", "difference", "only it", "only the other", "p")]
        for c in found["comparisons"]:
            difference = _with_error(f"{c['difference']:+.3f}", c["standard_error"])
            only = (str(c["only_first"]), str(c["only_second"]))
            place = (c["task"], c["arm"], c["against"], str(c["questions"]), str(c["seeds"]))
            lines.append((*place, difference, *only, f"{c['p']:.3g}"))
        text += "\n" + _markdown_table(lines)
    return text


def _markdown_table(lines: list[tuple[str, ...]]) -> str:
    """The first line is the head."""
    lines = [lines[0], ("---",) * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _accuracy(graded: dict) -> str:
    return _with_error(f"{graded['value']:.3f}", graded["standard_error"])


def _with_error(value: str, error: float | None) -> str:
    """error: None where one question says nothing of it."""
    return value if error is None else f"{value} ± {error:.3f}"
