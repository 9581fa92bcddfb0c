"""Tasks of lm-eval: its documents, contexts and stop strings; and its scores, asked for in a process of their own."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import multiprocessing
from pathlib import Path

from power_kernels.api.experiments.schema import LmEval
from power_kernels.api.experiments.tasks.files import asked
from power_kernels.api.experiments.tasks.own_file import INSTRUCTIONS, check_letter
from power_kernels.api.experiments.tasks.task import Question, Task
from power_kernels.errors import ArgumentError

FEWSHOT_SEED = 1234  # lm-eval's own default
MAX_NEW_TOKENS = 256  # lm-eval's, where a task does not say
STARTING = 300.0  # seconds that a scorer may take to load its task
_GRADERS = {
    "lm-eval": ("lm-eval",),
    "math": ("math_published", "math_verify"),
    "choice": ("choice",),
    "humaneval": ("humaneval",),
    "mbpp": ("mbpp",),
}
# How documents name the right answer, the question and its choices, by the tasks that are known here.
_ANSWERS = ("answer", "Answer", "target")
_QUESTIONS = ("problem", "Problem", "question", "Question")
_CHOICES = ("choice1", "choice2", "choice3", "choice4")


def load(spec: LmEval) -> Task:
    """Raises ArgumentError."""
    task = task_of(spec.task, spec.include_path)
    if task.OUTPUT_TYPE != "generate_until":
        raise ArgumentError(
            f"task {spec.task} of lm-eval is of the kind {task.OUTPUT_TYPE}, which asks for no text; allowed: "
            "generate_until"
        )
    if getattr(task, "UNSAFE_CODE", False) and spec.grader == "lm-eval":
        raise ArgumentError(
            f"task {spec.task} of lm-eval runs code when it scores; name a grader that keeps it in: humaneval or mbpp"
        )
    instances = requests(task, spec.chat)
    kwargs = instances[0].args[1]
    questions = [
        Question(str(i), _prompt(spec, instance), _document(spec, instance)) for i, instance in enumerate(instances)
    ]
    own = () if spec.clean else stop_strings(kwargs)  # which are of the task's own words
    return Task(
        name=spec.label,
        questions=questions,
        stop=spec.stop if spec.stop is not None else own,
        max_new_tokens=spec.max_new_tokens or max_new_tokens(kwargs),
        graders=_GRADERS[spec.grader],
        limit=spec.limit,
        facts={
            "kind": spec.kind,
            "task": spec.task,
            "chat": spec.chat,
            "version": str(task.VERSION),
            "clean": spec.clean,
            "num_fewshot": 0 if spec.clean else task.config.num_fewshot or 0,
            "data_sha256": _sha256([instance.doc for instance in instances]),
        },
        scorer=lambda: Scorer(spec.task, spec.include_path),
    )


def task_of(name: str, include_path: str | None):
    """The task object. Raises ArgumentError where lm-eval has none of this name, or cannot have its data."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ArgumentError(f"task {name} needs lm-eval ({error}): pip install 'power-kernels[eval]'") from None
    if include_path is not None and not Path(include_path).is_dir():
        raise ArgumentError(f"include_path is {include_path}, which is no folder")
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if name not in manager.all_subtasks:
        raise ArgumentError(
            f"task is {name}; {include_path or 'lm-eval'} has no task of this name (groups and tags must be taken "
            "apart)"
        )
    try:
        with _quiet():
            return manager.load(name)["tasks"][name]
    except Exception as error:  # hubs, files and the tasks' own programs fail in as many ways as there are
        raise ArgumentError(f"task {name} of lm-eval cannot be loaded: {type(error).__name__}: {error}") from error


def requests(task, chat: bool) -> list:
    """An Instance for each document. chat: its context is a conversation, a list of messages."""
    task.set_fewshot_seed(FEWSHOT_SEED)
    with _quiet():
        task.build_all_requests(
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            chat_template=(lambda messages, add_generation_prompt: list(messages)) if chat else None,
        )
    return task.instances


def stop_strings(kwargs: dict) -> tuple[str, ...]:
    until = kwargs.get("until") or ()
    return (until,) if isinstance(until, str) else tuple(dict.fromkeys(string for string in until if string))


def max_new_tokens(kwargs: dict) -> int:
    """Of the names that lm-eval's models know."""
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        if kwargs.get(name):
            return int(kwargs[name])
    return MAX_NEW_TOKENS


def _prompt(spec: LmEval, instance) -> dict:
    if spec.clean:
        text = _field(spec, instance.doc, "question", _QUESTIONS)
        if spec.grader == "choice":
            choices = [_field(spec, instance.doc, "choices", (key,)) for key in _CHOICES]
            text += "\n" + "".join(f"\n({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True))
        return asked(text + INSTRUCTIONS[spec.grader], spec.chat)
    context = instance.args[0]
    if not spec.chat:
        return {"prompt": context}
    if context[-1]["role"] != "user":
        raise ArgumentError(
            f"task {spec.task} of lm-eval begins answers itself (gen_prefix), which chat cannot do here"
        )
    return {"messages": context}


def _document(spec: LmEval, instance) -> dict:
    doc = dict(instance.doc)
    if spec.grader == "lm-eval":
        return {"number": instance.metadata[1], "sha256": _sha256(doc)}
    if spec.grader in ("math", "choice"):
        answer = _field(spec, doc, "answer", _ANSWERS)
        if spec.grader == "choice":
            check_letter(f"a document of {spec.task}", answer.strip("() "))
        # GSM8K gives its reasoning before; GPQA puts the letter into brackets.
        return {"answer": answer.strip("() ") if spec.grader == "choice" else answer.rpartition("####")[2].strip()}
    return doc


def _field(spec: LmEval, doc: dict, what: str, names: tuple[str, ...]) -> str:
    for name in names:
        if name in doc:
            return str(doc[name])
    raise ArgumentError(
        f"grader is {spec.grader!r}, and a document of {spec.task} has no {what} ({', '.join(names)}), but "
        f"{', '.join(doc)}"
    )


def _sha256(documents) -> str:
    return hashlib.sha256(json.dumps(documents, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def _quiet():
    """Without the progress bars and advice of lm-eval; errors come as exceptions."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


class Scorer:
    """lm-eval's scores of answers to one task, from a process that is killed where it takes too long."""

    def __init__(self, name: str, include_path: str | None):
        self.name, self.include_path = name, include_path
        self.process = self.pipe = None

    def __call__(self, number: int, answer: str, timeout: float) -> tuple[str, dict[str, float]] | None:
        """`scores` of an answer to the number-th document; None where time ran out. Raises RuntimeError with what the
        task said where it failed."""
        if self.process is None:
            self._start()
        self.pipe.send((number, answer))
        try:
            if not self.pipe.poll(timeout):
                self.close()
                return None
            said = self.pipe.recv()
        except EOFError:
            self.close()
            raise RuntimeError(f"the process that scores {self.name} died") from None
        if isinstance(said, str):
            raise RuntimeError(said)
        return said

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_score, args=(theirs, self.name, self.include_path), daemon=True)
        self.process.start()
        theirs.close()
        if not self.pipe.poll(STARTING) or self.pipe.recv() != "ready":
            self.close()
            raise RuntimeError(f"task {self.name} could not be loaded to score answers")

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = self.pipe = None


def _score(pipe, name: str, include_path: str | None) -> None:
    task = task_of(name, include_path)
    requests(task, False)
    instances = {instance.metadata[1]: instance for instance in task.instances}
    pipe.send("ready")
    while True:
        number, answer = pipe.recv()
        try:
            pipe.send(scores(task, instances[number], answer))
        except Exception as error:  # tasks bring programs of their own
            pipe.send(f"{type(error).__name__}: {error}")


def scores(task, instance, answer: str) -> tuple[str, dict[str, float]]:
    """What lm-eval makes of one answer: what its first filter takes for it, and its metrics as its results name
    them."""
    read, found = None, {}
    for ensemble in task._filters:
        instance.resps, instance.filtered_resps = [answer], {}
        ensemble.apply([instance])
        filtered = instance.filtered_resps[ensemble.name]
        read = filtered if read is None else read
        metrics = task.process_results(instance.doc, [filtered])
        found.update({f"{metric},{ensemble.name}": float(value) for metric, value in metrics.items()})
    return read if isinstance(read, str) else json.dumps(read), found
