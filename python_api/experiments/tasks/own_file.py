"""Questions of one's own, and those of AlpacaEval 2, which somebody else grades."""

from __future__ import annotations

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
        if (text is None) == (messages is None) or not (text or messages):
            raise ArgumentError(f"data {spec.data} entry {number} must hold one of prompt (text) and messages (a chat)")
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
