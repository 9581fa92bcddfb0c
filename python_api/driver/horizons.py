"""Where the context ends an answer: the jobs of a call, by how many tokens each of them may become long.

A horizon belongs to the law of a chain (DESIGN section 3.1) and is one number a run. So prompts whose horizon the
model's context makes shorter than max_new_tokens are drawn in runs of their own, one for each horizon.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.run import Job
from power_kernels.api.driver.text import named
from power_kernels.errors import ArgumentError


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

    Raises ArgumentError where the context cuts every prompt of the call, which is then a mistake.
    """
    most = config.max_new_tokens

    def horizon(job: Job) -> int:
        return most if limit is None else max(min(most, limit - len(job.prompt)), 0)

    longest: dict[int, int] = {}
    for job in everything:
        longest[horizon(job)] = max(longest.get(horizon(job), 0), len(job.prompt))
    if most not in longest:
        job = min(everything, key=lambda job: len(job.prompt))
        raise ArgumentError(
            f"prompt {job.prompt_id} has {len(job.prompt)} tokens and max_new_tokens is {most}; together they must not "
            f"exceed the model's context of {limit}"
        )
    by_horizon: dict[int, list[Job]] = {}
    for job in jobs:
        by_horizon.setdefault(horizon(job), []).append(job)
    if cut := sorted({job.prompt_id for job in jobs if horizon(job) < most}):
        warnings.warn(
            f"{named(cut)} leaves less than max_new_tokens = {most} of the model's context of {limit}; its answers end "
            'there, with finish "context"',
            RuntimeWarning,
            stacklevel=4,
        )
    return [
        Part(
            jobs=by_horizon[h],
            config=None if h == 0 else config if h == most else replace(config, max_new_tokens=h),
            max_length=longest[h] + h,
            cut=h < most,
        )
        for h in sorted(by_horizon, reverse=True)
    ]
