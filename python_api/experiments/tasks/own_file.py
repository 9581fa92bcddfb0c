"""Questions of one's own, and those of AlpacaEval 2, which somebody else grades."""

from __future__ import annotations

from power_kernels.api.experiments.grading.choice import LETTERS
from power_kernels.api.experiments.schema import AlpacaEval, File
from power_kernels.api.experiments.tasks.files import asked, read_entries
from power_kernels.api.experiments.tasks.task import Question, Task
from power_kernels.errors import ArgumentError

MAX_NEW_TOKENS = 512
ALPACA_MAX_NEW_TOKENS = 2048
GRADERS = {
    "exact": ("exact",),
    "math": ("math_published", "math_verify"),
    "choice": ("choice",),
    "code": ("code",),
}
# How an answer must end so that its grader finds it.
INSTRUCTIONS = {
    "math": "\n\nReason step by step, and give the final answer in \\boxed{}.",
    "choice": '\n\nReason step by step, and end with a line that says "Answer:" and one letter.',
    "code": "\n\nAnswer with one fenced block of Python code.",
}


def own_file(spec: File) -> Task:
    """Raises ArgumentError."""
    needed = "test" if spec.grader == "code" else "answer"
    sha256, entries = read_entries(spec.data, (needed,))
    words = INSTRUCTIONS[spec.grader] if spec.instruct else ""
    questions = []
    for number, entry in enumerate(entries, 1):
        text, messages = entry.get("prompt"), entry.get("messages")
        sound = isinstance(text, str) if messages is None else text is None and _is_chat(messages, ends_in_text=words)
        if not sound or not (text or messages):
            raise ArgumentError(
                f"data {spec.data} entry {number} must hold one of prompt (text) and messages (a list of objects with "
                f"role and content{', the last of which is text' if words else ''})"
            )
        if spec.grader == "choice":
            check_letter(f"data {spec.data} entry {number}", entry["answer"])
        if messages is None:
            prompt = asked(text + words, spec.chat)
        elif not words:
            prompt = {"messages": messages}
        else:
            prompt = {"messages": [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + words}]}
        document = {needed: entry[needed], **({"pattern": spec.pattern} if spec.pattern else {})}
        questions.append(Question(str(entry.get("id", number - 1)), prompt, document))
    return Task(
        name=spec.label,
        questions=questions,
        stop=spec.stop or (),
        max_new_tokens=spec.max_new_tokens or MAX_NEW_TOKENS,
        graders=GRADERS[spec.grader],
        limit=spec.limit,
        facts={"kind": spec.kind, "chat": spec.chat, "instruct": spec.instruct, "data_sha256": sha256},
    )


def check_letter(where: str, answer: str) -> None:
    """Raises ArgumentError."""
    if len(answer) != 1 or answer not in LETTERS:
        raise ArgumentError(
            f"{where} has the answer {answer!r}; of grader choice it must be one of {', '.join(LETTERS)}"
        )


def _is_chat(messages, ends_in_text) -> bool:
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and m.keys() >= {"role", "content"} for m in messages
    ):
        return False
    return not ends_in_text or (bool(messages) and isinstance(messages[-1]["content"], str))


def alpaca_eval(spec: AlpacaEval) -> Task:
    """Raises ArgumentError."""
    sha256, entries = read_entries(spec.data, ("instruction",))
    questions = [
        Question(
            str(i),
            asked(entry["instruction"], spec.chat),
            {k: entry[k] for k in ("instruction", "dataset") if k in entry},
        )
        for i, entry in enumerate(entries)
    ]
    return Task(
        name=spec.label,
        questions=questions,
        stop=spec.stop or (),
        max_new_tokens=spec.max_new_tokens or ALPACA_MAX_NEW_TOKENS,
        graders=(),
        limit=spec.limit,
        facts={"kind": spec.kind, "chat": spec.chat, "data_sha256": sha256},
    )
