"""Benchmarks as the published harness asks them (github.com/aakaran/reasoning-with-sampling).

Its prompts are read from a checkout: string literals of its modules, by their syntax and without running them. What
the harness chose, and where this package cannot follow it, is recorded with the run.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from pathlib import Path

from power_kernels.api.experiments.schema import Official
from power_kernels.api.experiments.tasks.code import HUMANEVAL_FIELDS, humaneval_data
from power_kernels.api.experiments.tasks.files import asked, read_entries
from power_kernels.api.experiments.tasks.task import Question, Task
from power_kernels.errors import ArgumentError

MAX_NEW_TOKENS = 3072
_CONSTANTS = "llm_experiments/constants.py"
_HUMANEVAL = "llm_experiments/power_samp_he.py"
_MATH500 = "llm_experiments/data/MATH500.json"
_GPQA_FIELDS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_TEMPLATED = ("qwen_math_grpo", "phi", "phi_grpo", "tulu")  # MATH500 alone is asked of them in the chat template
# What the harness does and this package does not: (what, why).
DIFFERENCES = [
    "top_k is 50 in all arms of the harness (transformers' default); here nothing is cut from the tail",
    "the harness ends the power arm at tokenizer.eos_token alone, the others at the generation config's list; here all "
    "end alike",
    "the harness re-encodes the rendered chat template, which puts special tokens in front twice for some tokenizers; "
    "here the template is encoded once",
    "GPQA's letters are drawn from random.seed(0) together with the chain there; here by each question's own text",
    "AlpacaEval: the harness's temperature is 0.5 in proposals and target, so its target is p^2; alpha says what it is "
    "here",
]


def official(spec: Official) -> Task:
    """Raises ArgumentError."""
    questions, graders, facts = _BENCHMARKS[spec.benchmark](spec)
    return Task(
        name=spec.label,
        questions=questions,
        stop=spec.stop or (),
        max_new_tokens=spec.max_new_tokens or MAX_NEW_TOKENS,
        graders=graders,
        limit=spec.limit,
        facts={
            "kind": spec.kind,
            "benchmark": spec.benchmark,
            "family": spec.family,
            **facts,
            "differences": DIFFERENCES,
        },
    )


def _math500(spec: Official):
    text, facts = _literals(spec, _CONSTANTS, ("PROMPT", "COT"))
    sha256, entries = read_entries(Path(spec.harness) / _MATH500, ("prompt", "answer", "id"))
    chat = spec.family in _TEMPLATED
    questions = [
        Question(e["id"], asked(text["PROMPT"] + e["prompt"] + text["COT"], chat), {"answer": e["answer"]})
        for e in entries
    ]
    return questions, ("math_published", "math_verify"), {**facts, "chat": chat, "data_sha256": sha256}


def _humaneval(spec: Official):
    sha256, problems = read_entries(spec.data or humaneval_data(), HUMANEVAL_FIELDS)
    facts = {}
    if spec.family in ("phi", "phi_grpo"):
        parts, facts = _instruction(spec)
    questions = []
    for problem in problems:
        text = problem["prompt"]
        if facts:
            text = _filled(parts, problem)
        questions.append(Question(problem["task_id"], {"prompt": text}, problem))
    return questions, ("humaneval_published",), {**facts, "chat": False, "data_sha256": sha256}


def _gpqa(spec: Official):
    text, facts = _literals(spec, _CONSTANTS, ("GPQA_QUERY_TEMPLATE",))
    sha256, entries = read_entries(spec.data, _GPQA_FIELDS)
    questions = []
    for i, entry in enumerate(entries):
        order = random.Random(hashlib.sha256(entry["Question"].encode()).digest())
        choices = [entry[key] for key in _GPQA_FIELDS[2:]]
        order.shuffle(choices)
        place = order.randrange(4)
        choices.insert(place, entry["Correct Answer"])
        letters = dict(zip("ABCD", choices, strict=True))
        prompt = text["GPQA_QUERY_TEMPLATE"].format(Question=entry["Question"], **letters)
        questions.append(Question(str(entry.get("Record ID", i)), {"prompt": prompt}, {"answer": "ABCD"[place]}))
    return questions, ("choice_published", "choice"), {**facts, "chat": False, "data_sha256": sha256}


def _alpaca(spec: Official):
    sha256, entries = read_entries(spec.data, ("instruction",))
    questions = [
        Question(str(i), {"prompt": e["instruction"]}, {k: e[k] for k in ("instruction", "dataset") if k in e})
        for i, e in enumerate(entries)
    ]
    return questions, (), {"chat": False, "data_sha256": sha256}


_BENCHMARKS = {"math500": _math500, "humaneval": _humaneval, "gpqa": _gpqa, "alpaca-eval": _alpaca}


# -- the harness's strings


def _module(spec: Official, name: str) -> tuple[ast.Module, dict]:
    path = Path(spec.harness) / name
    try:
        source = path.read_bytes()
        return ast.parse(source), {f"{name} sha256": hashlib.sha256(source).hexdigest()}
    except (OSError, SyntaxError, ValueError) as error:
        raise ArgumentError(f"harness {spec.harness} holds no {name} that can be read: {error}") from None


def _literals(spec: Official, name: str, wanted: tuple[str, ...]) -> tuple[dict[str, str], dict]:
    """Strings that a module of the harness gives names to, and the module's digest."""
    tree, digest = _module(spec, name)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.update({target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)})
    for key in wanted:
        if key not in found:
            raise ArgumentError(f"harness {spec.harness}: {name} gives the name {key} to no string")
    return found, digest


def _instruction(spec: Official) -> tuple[list[str | None], dict]:
    """The pieces of HumanEval's instruction, an f-string: text, or None where a field of the problem comes."""
    tree, digest = _module(spec, _HUMANEVAL)
    for node in ast.walk(tree):
        named = isinstance(node, ast.Assign) and any(getattr(t, "id", None) == "input_text" for t in node.targets)
        if named and isinstance(node.value, ast.JoinedStr):
            parts = [piece.value if isinstance(piece, ast.Constant) else None for piece in node.value.values]
            if parts.count(None) == 3:
                return parts, digest
    raise ArgumentError(f"harness {spec.harness}: {_HUMANEVAL} holds no instruction of three fields")


def _filled(parts: list[str | None], problem: dict) -> str:
    """With the signature, the docstring's lines without their indentation, and the stub."""
    stub = problem["prompt"]
    signature = re.search(rf"def\s+({re.escape(problem['entry_point'])}.*?):\s*\n", stub)
    docstring = re.search(r"(?:\"\"\"|''')(.*?)(?:\"\"\"|''')", stub, re.DOTALL)
    if signature is None or docstring is None:
        raise ArgumentError(f"data: the prompt of {problem['task_id']} has no signature and docstring")
    fields = iter([signature[1], "\n".join(line.strip() for line in docstring[1].split("\n")), stub])
    return "".join(next(fields) if part is None else part for part in parts)
