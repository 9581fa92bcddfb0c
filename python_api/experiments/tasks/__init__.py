"""Questions: what is asked, where an answer ends, and what its grader is told."""

from __future__ import annotations

from power_kernels.api.experiments.schema import TaskSpec
from power_kernels.api.experiments.tasks import code, lm_eval, official, own_file
from power_kernels.api.experiments.tasks.task import Task

_LOADERS = {
    "humaneval": code.humaneval,
    "mbpp": code.mbpp,
    "lm-eval": lm_eval.load,
    "file": own_file.own_file,
    "alpaca-eval": own_file.alpaca_eval,
    "official": official.official,
}


def load_task(spec: TaskSpec) -> Task:
    """Raises ArgumentError."""
    return _LOADERS[spec.kind](spec)
