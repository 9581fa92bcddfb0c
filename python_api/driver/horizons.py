"""Where the context ends an answer: the jobs of a call, by how many tokens each of them may become long.

A horizon belongs to the law of a chain (DESIGN section 3.1) and is one number a run. So prompts whose horizon the
model's context makes shorter than max_new_tokens are drawn in runs of their own, one for each horizon.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.run import Job
from power_kernels.api.driver.text import named
from power_kernels.errors import ArgumentError


class ContextWarning(RuntimeWarning):
    """Answers to some prompts are shorter than was asked for, since the model's context ends there."""


@dataclass(frozen=True)
class Part:
    """Jobs of one horizon, and with that of one run. config: None where the prompts leave no room for an answer.
    max_length: positions that the longest of the call's prompts of this horizon takes with its answer. cut: whether the
    context made the horizon shorter than the call's."""

    jobs: list[Job]
    config: PowerConfig | None
    max_length: int
    cut: bool


def parts_of(jobs: list[Job], everything: list[Job], config: PowerConfig, limit: int | None) -> list[Part]:
    """The jobs by horizon: max_new_tokens, or what the prompt leaves of a context of `limit` positions.

    everything: the jobs of the call, of which `jobs` are some. Warns where the context cuts answers; raises as
    `context_message` does.
    """
    most = config.max_new_tokens
    message = context_message({job.prompt_id: len(job.prompt) for job in everything}, most, limit)
    longest: dict[int, int] = {}
    for job in everything:
        horizon = _horizon(len(job.prompt), most, limit)
        longest[horizon] = max(longest.get(horizon, 0), len(job.prompt))
    by_horizon: dict[int, list[Job]] = {}
    for job in jobs:
        by_horizon.setdefault(_horizon(len(job.prompt), most, limit), []).append(job)
    if message is not None and min(by_horizon) < most:
        warnings.warn(message, ContextWarning, stacklevel=4)
    return [
        Part(
            jobs=by_horizon[h],
            config=None if h == 0 else config if h == most else replace(config, max_new_tokens=h),
            max_length=longest[h] + h,
            cut=h < most,
        )
        for h in sorted(by_horizon, reverse=True)
    ]


def context_message(lengths: Mapping[int, int], most: int, limit: int | None) -> str | None:
    """What to say of the prompts that leave less than `most` tokens of a context of `limit`, if any do.

    lengths: of the prompts, by id. Raises ArgumentError where none of them leaves any, so that there is nothing to
    draw.
    """
    horizons = {i: _horizon(length, most, limit) for i, length in lengths.items()}
    cut = [i for i, horizon in horizons.items() if horizon < most]
    if not cut:
        return None
    if not any(horizons.values()):
        shortest = min(lengths, key=lengths.get)
        raise ArgumentError(
            f"prompt {shortest} has {lengths[shortest]} tokens, which leave no room for an answer in the model's "
            f"context of {limit}" + (", and the others have no fewer" if len(lengths) > 1 else "")
        )
    return (
        f"{named(cut)} leaves less than max_new_tokens = {most} of the model's context of {limit}; its answers end "
        'there, with finish "context". Prompts that leave different numbers of tokens are drawn in separate runs, one '
        "after the other"
    )


def _horizon(length: int, most: int, limit: int | None) -> int:
    return most if limit is None else max(min(most, limit - length), 0)
