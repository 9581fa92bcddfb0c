"""The folder of a run.

    RUN/config.json                                  what is run, on which versions, models and data
    RUN/records/<task>/<arm>/seed-<seed>.jsonl       a record an answer (`commands/output_file.py`)
    RUN/grades/<task>/<arm>/seed-<seed>.jsonl        what graders say of them (`grade.py`)
    RUN/outputs/<task>/<arm>/seed-<seed>.json        for a judge elsewhere, in alpaca_eval's format
    RUN/table.md, table.json                         what came out (`table.py`)

A folder may grow: arms, tasks, seeds and, by a task's limit, questions may be added to it. What is there must be as it
was.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from power_kernels.api.commands.output_file import record, whole_lines
from power_kernels.api.driver.results import PowerResult
from power_kernels.api.driver.stop import before_stop
from power_kernels.api.driver.text import answer_text
from power_kernels.api.experiments.jobs import Job
from power_kernels.api.experiments.schema import Arm, Experiment, counts, selects
from power_kernels.api.experiments.tasks.task import Task
from power_kernels.errors import ArgumentError

PACKAGES = ("power-kernels", "torch", "transformers", "tokenizers", "numpy", "lm-eval")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
_TOLD = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}


class RunFolder:
    """`path`/..., which need not be there."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def records(self, task: str, arm: str, seed: int) -> Path:
        return self.path / "records" / task / arm / f"seed-{seed}.jsonl"

    def read(self, task: str, arm: str, seed: int) -> list[dict]:
        """The records that are there, in the order of prompts and chains, those of parts among them. Raises
        ArgumentError for what is none."""
        path = self.records(task, arm, seed)
        found = {}
        # The parts first: another run may take them over meanwhile, and what is not there any more is in the file then.
        for file in (*sorted(path.parent.glob(f"{path.name}.part-*")), path):
            with suppress(FileNotFoundError):
                for number, _, line in whole_lines(file):
                    try:
                        line = json.loads(line)
                        found[line["prompt_id"], line["chain_id"]] = line
                    except (ValueError, KeyError, TypeError):
                        raise ArgumentError(
                            f"--out {file} line {number} is not a record of power-kernels; take the line out, or name "
                            "another folder"
                        ) from None
        return [line for _, line in sorted(found.items())]

    def config(self) -> dict:
        """Empty where there is none. Raises ArgumentError."""
        try:
            found = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ArgumentError(f"--out {self.path} holds a config.json that cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise ArgumentError(f"--out {self.path} holds a config.json that is a {type(found).__name__}, no run's")
        return found

    def check(self, experiment: Experiment, tasks: list[Task]) -> None:
        """Raises ArgumentError where config.json says something else of an arm or a task. Of models it is not asked:
        their digests take minutes."""
        self._take(self.config(), _told(experiment, tasks))

    def add(self, experiment: Experiment, tasks: list[Task], models: dict[str, dict]) -> None:
        """Take these into config.json. Raises ArgumentError where it says something else of one of them."""
        labels = [model_label(name) for name in models]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ArgumentError(f"two models are called {twice[0]}; records tell them apart by their folders' names")
        told = _told(experiment, tasks)
        told["models"] = {model_label(name): identity for name, identity in models.items()}
        with self._changed() as config:
            self._take(config, told)
            config["seeds"] = sorted({*config.get("seeds", []), *experiment.seeds})
            if (here := versions()) not in config.setdefault("versions", []):
                config["versions"].append(here)

    def _take(self, config: dict, told: dict[str, dict[str, dict]]) -> None:
        """Raises ArgumentError for an entry that is there and says something else."""
        for key, entries in told.items():
            known = config.setdefault(key, {})
            for name, entry in entries.items():
                if known.setdefault(name, entry) != entry:
                    raise ArgumentError(
                        f"--out {self.path} holds another {key[:-1]} {name}: {_difference(known[name], entry)}; "
                        "give it another name, or name another folder"
                    )

    def answers(self, arm: Arm, task: str) -> int | None:
        """To each question with each seed; None where `equal(...)` has not been counted yet."""
        if not selects(arm):
            return arm.draws
        return self.config().get("resolved", {}).get(task, {}).get(arm.label) if counts(arm) else arm.n

    def resolve(self, task: str, arm: str, n: int) -> None:
        with self._changed() as config:
            config.setdefault("resolved", {}).setdefault(task, {})[arm] = n

    @contextmanager
    def _changed(self) -> Iterator[dict]:
        """config.json, to be changed by one process at a time, and whole at every moment."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ArgumentError(f"--out {self.path} cannot be written: {error}") from None
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            config = self.config()
            yield config
            write_whole(self.path / "config.json", json.dumps(config, indent=1, ensure_ascii=False) + "\n")
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path: Path, text: str) -> None:
    """A file that at every moment is the old one or the new one. Raises ArgumentError where it cannot be written."""
    new = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise ArgumentError(f"--out {path} cannot be written: {error}") from None


def _told(experiment: Experiment, tasks: list[Task]) -> dict[str, dict[str, dict]]:
    """Arms and tasks as config.json has them."""
    return {
        "arms": {arm.label: arm_told(experiment, arm) for arm in experiment.arms},
        "tasks": {task.name: task.recorded() for task in tasks},
    }


def arm_told(experiment: Experiment, arm: Arm) -> dict:
    """An arm as config.json has it. What changes no answer is left out, so that a run may go on with others."""
    exact = {"lanes", "early_rejection", "free_prefix", "name", "seeds"}
    told = arm.model_dump(mode="json", exclude=exact)
    drawing = experiment.drawing_arm(arm)
    if drawing is not arm:
        told["draws_as"] = drawing.model_dump(mode="json", exclude=exact | {"model"})
    return {**told, "model": model_label(experiment.model_of(arm))}


def _difference(known: dict, new: dict) -> str:
    key = next(key for key in {**known, **new} if known.get(key) != new.get(key))
    return f"{key} is {new.get(key)!r} and was {known.get(key)!r}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def model_label(name: str) -> str:
    """The name of a model: of a folder the last part, since it may lie anywhere."""
    return os.path.basename(os.path.realpath(name)) if os.path.isdir(name) else name


def model_identity(name: str, revision: str | None) -> dict:
    """What the model is, wherever it lies: the digest of the files of a folder, or the revision of the hub."""
    if not os.path.isdir(name):
        return {"revision": revision}
    digest = hashlib.sha256()
    for path in sorted(Path(name).iterdir()):
        if path.is_file() and path.suffix in _WEIGHTS | _TOLD:
            with open(path, "rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return {"sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Recorder:
    """Makes the records of one job. stop: what the text is cut at afterwards."""

    job: Job
    stop: tuple[str, ...]
    rows: list[list[int]]
    tokenizer: object

    def __call__(self, result: PowerResult, digest: str, seconds: float) -> dict:
        """`text` is what was drawn, `answer` what is graded of it: answer_tokens of the tokens, which have answer_logp.
        The token that completes a stop string is one of them, whether it was in the law or the text is cut at it.
        log_weight: the sum of the weights. cost: seconds are those since the answer before, of all that ran at once."""
        job, prompt = self.job, self.rows[result.prompt_id]
        question = job.task.questions[result.prompt_id].id
        asked = {"question": question, "task": job.task.name, "arm": job.arm.label, "seed": job.seed}
        answer = before_stop(result.text, self.stop)
        length = len(result.tokens)
        if len(answer) < len(result.text):

            def stopped(n: int) -> bool:
                text = answer_text(self.tokenizer, prompt, result.tokens[:n])
                return any(string in text for string in self.stop)

            length = bisect_left(range(length), True, key=stopped)
        line = record(result, asked, digest)
        cost = line.pop("cost")
        return {
            **line,
            "log_weight": round(float(np.sum(result.log_weights)), 4),
            "answer": answer,
            "answer_tokens": length,
            "answer_logp": round(float(np.sum(result.token_logp[:length])), 4),
            "cost": {**cost, "seconds": round(seconds, 3)},
        }
