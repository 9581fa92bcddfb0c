"""Graders of answers: code, mathematics, multiple choice. What they run, they run in processes with limits."""

from power_kernels.api.experiments.grading.grade import Grade

__all__ = ["Grade"]
