"""Questions: what is asked, where an answer ends, and what its grader is told."""

from __future__ import annotations

from power_kernels.api.experiments.schema import TaskSpec
from power_kernels.api.experiments.tasks import humaneval
from power_kernels.api.experiments.tasks.task import Task

_LOADERS = {"humaneval": humaneval.load}


def load_task(spec: TaskSpec) -> Task:
    """Raises ArgumentError."""
    return _LOADERS[spec.kind](spec)
