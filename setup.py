"""Builds the optional C++ backend. Everything else about the package is in pyproject.toml.

The extension uses torch's stable ABI and no Python API: one build serves every torch >= 2.11. It needs the
headers of torch and a C++20 compiler. Where either is missing the pure package is installed instead, and the
reference implementation serves the operators on CPU.
"""

import importlib.util
import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup


def announce(message: str) -> None:
    print(f"power_kernels: {message}", file=sys.stderr, flush=True)


def extensions() -> list[Extension]:
    if os.environ.get("POWER_KERNELS_PURE", "0") == "1":
        announce("POWER_KERNELS_PURE=1: building without the C++ backend")
        return []
    # Only torch's files matter. Importing it takes seconds, and may fail for reasons of its own.
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        announce(
            "torch is not in the build environment: building without the C++ backend. "
            "For the C++ backend install torch first, then use `pip install --no-build-isolation`."
        )
        return []
    torch_root = Path(next(iter(spec.submodule_search_locations)))
    announce(f"building the C++ backend against {torch_root} (a failure here still gives a working install)")
    flags = [
        "-std=c++20",
        "-O3",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",  # GCC's own AVX-512 header
        "-fno-math-errno",
        "-fno-trapping-math",
        # The chain's float64 sums must round as the reference's do; kernels ask for fma where they want it.
        "-ffp-contract=off",
    ]
    return [
        Extension(
            "power_kernels._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            include_dirs=[str(torch_root / "include")],
            library_dirs=[str(torch_root / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
            extra_compile_args=flags,
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ]


setup(ext_modules=extensions(), options={"bdist_wheel": {"py_limited_api": "cp311"}})
