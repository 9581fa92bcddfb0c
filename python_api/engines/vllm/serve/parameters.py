"""What a client of the server may ask for: flat keys beside vLLM's own parameters (`vllm_xargs` of its routes).

    extra_body={"vllm_xargs": {"alpha": 4, "mcmc_steps": 10, "block_size": 192}}

They arrive as `SamplingParams.extra_args`. A request with "alpha" is a power-sampling request. How long the answer may
be, what ends it and the seed are vLLM's own: max_tokens, stop, stop_token_ids, ignore_eos and seed.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.engines.serving.proposal import KEY
from power_kernels.api.engines.vllm.parameters import NEUTRAL, check_neutral
from power_kernels.errors import ArgumentError
from power_kernels.state import MAX_LANES

if TYPE_CHECKING:
    from vllm import SamplingParams

MAX_STEPS = 100_000  # of one chain, whose state has a row for each
MAX_STOP_BYTES = 256  # of a request's stop strings; their table has a row for each, as wide as the vocabulary

_DEFAULTS = PowerConfig()


class PowerParameters(BaseModel):
    """Names and defaults are `PowerConfig`'s. temperature: of the proposals, 1 / alpha unless given. progress: tell
    what the chain does while it runs (1), as `POST /v1/power/completions` asks for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: float
    block_size: int = _DEFAULTS.block_size
    mcmc_steps: int = _DEFAULTS.mcmc_steps
    final_steps: int = _DEFAULTS.final_steps
    temperature: float | None = None
    cut: str = _DEFAULTS.cut
    length_bonus: float = _DEFAULTS.length_bonus
    early_rejection: bool = True
    lanes: int = 1
    progress: bool = False


KEYS = tuple(PowerParameters.model_fields)


class PowerRequest(NamedTuple):
    """What was asked for, in our words."""

    config: PowerConfig
    seed: int
    eos: tuple[int, ...]
    progress: bool


def is_power(params: SamplingParams) -> bool:
    return bool(params.extra_args) and "alpha" in params.extra_args


def check(params: SamplingParams, defaults: Mapping[str, Any]) -> None:
    """Refuse a request before any work. Raises ArgumentError, which names the argument, its value and what is allowed.

    defaults: the sampling parameters that the server puts where a client gives none, of the model's own generation
    config. A power request with these is one without any.
    """
    given = params.extra_args or {}
    if KEY in given:
        raise ArgumentError(f"{KEY} is given; it is the server's own, and no client may send it")
    if not is_power(params):
        ours = [key for key in KEYS if key in given]
        if ours:
            raise ArgumentError(f"{ours[0]} is {given[ours[0]]!r} without alpha, which makes a request a power request")
        return
    check_neutral(params, _NEUTRAL, _WHY, defaults)
    config = config_of(params, params.max_tokens or 1)
    if params.max_tokens is not None:
        check_size(config)


def read(params: SamplingParams, *, room: int) -> PowerRequest:
    """room: positions that the prompt leaves of the model's context, at least 1."""
    config = config_of(params, min(params.max_tokens or room, room))
    check_size(config)
    eos = set(params.stop_token_ids or ())
    if params.eos_token_id is not None:
        eos.add(params.eos_token_id)
    seed = secrets.randbits(63) if params.seed is None else params.seed
    return PowerRequest(config, seed, tuple(sorted(eos)), _given(params).progress)


def config_of(params: SamplingParams, max_new_tokens: int) -> PowerConfig:
    given = _given(params)
    if not 1 <= given.lanes <= MAX_LANES:
        raise ArgumentError(f"lanes is {given.lanes}; it must lie in [1, {MAX_LANES}]")
    stop = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
    size = sum(len(string.encode(errors="replace")) for string in stop)
    if size > MAX_STOP_BYTES:
        raise ArgumentError(f"stop holds {size} bytes; it must hold at most {MAX_STOP_BYTES} in a power request")
    return PowerConfig(**given.model_dump(exclude={"progress"}), max_new_tokens=max_new_tokens, stop=stop)


def check_size(config: PowerConfig) -> None:
    steps = config.law.max_steps
    if steps > MAX_STEPS:
        raise ArgumentError(
            f"mcmc_steps is {config.mcmc_steps} with block_size {config.block_size}, final_steps {config.final_steps} "
            f"and max_tokens {config.max_new_tokens}: {steps} steps; it must come to at most {MAX_STEPS}"
        )


def _given(params: SamplingParams) -> PowerParameters:
    try:
        return PowerParameters.model_validate(params.extra_args)
    except ValidationError as error:
        raise ArgumentError("; ".join(map(said, error.errors()))) from None


def said(error: dict) -> str:
    """One of pydantic's findings in our words."""
    name, value = ".".join(map(str, error["loc"])), error["input"]
    if error["type"] == "extra_forbidden":
        return f"{name} is {value!r} in a power request; allowed: {', '.join(KEYS)}"
    if error["type"] == "missing":
        return f"{name} is not given; a power request must have it"
    expected = error["msg"].removeprefix("Input should be ").removeprefix("a ")
    return f"{name} is {value!r}; it must be {expected}"


# Beside what changes p: what has no meaning for a whole chain.
_NEUTRAL = NEUTRAL | {"logprobs": (None,), "prompt_logprob_token_ids": (None,), "structured_outputs": (None,)}
_WHY = {
    "temperature": "the exponents of a power sample are alpha and, of its proposals, 1 / vllm_xargs['temperature']",
    "logprobs": "/v1/power/completions has log p of the answer",
    "prompt_logprobs": "a power request draws answers and scores no prompts",
    "structured_outputs": "a grammar's state is its request's, and a chain goes from request to request",
}
