"""The operators in the layout of Hugging Face's `kernels` library: `python -m power_kernels.api.commands.hub OUT`.

    OUT/build/torch-cpu, torch-cuda, torch-rocm          Python and Triton
    OUT/build/torch-stable-abi211-cpu-x86_64-linux       and the C++ kernels, where the extension was built

A variant is this package without the driver, file by file, and a metadata.json. The library imports it under the `id`
that stands there; imports within the package are relative and operators are registered under its name, so that it runs
beside the installed package and beside other versions of itself. Where two variants serve a CPU, the library takes the
one with C++ kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import sys
from pathlib import Path

import power_kernels
from power_kernels.errors import ArgumentError

PACKAGE = Path(power_kernels.__file__).parent
NAME = "power-kernels"
VERSION = 1  # what `get_kernel` is asked for; raised when a call of the version before would no longer work
STABLE_ABI = "211"  # torch's, as TORCH_TARGET_VERSION in setup.py


def emit(out: Path) -> list[Path]:
    """Writes every variant that can be had from this package into `out`/build, which must not be there yet.

    Returns the variants' folders. Raises ArgumentError where `out` cannot be written.
    """
    build = out / "build"
    if build.exists():
        raise ArgumentError(f"{build} is there already; name a folder without it")
    variants = {f"torch-{backend}": (backend, False) for backend in ("cpu", "cuda", "rocm")}
    if any(PACKAGE.glob("_C*.so")):
        machine = f"{platform.machine()}-{platform.system().lower()}"
        variants[f"torch-stable-abi{STABLE_ABI}-cpu-{machine}"] = ("cpu", True)
    try:
        for variant, (backend, extension) in variants.items():
            _write(build / variant, backend, extension)
    except OSError as error:
        raise ArgumentError(f"{build} cannot be written: {error}") from error
    return [build / variant for variant in variants]


def _write(folder: Path, backend: str, extension: bool) -> None:
    left_out = {"__pycache__"} if extension else {"__pycache__", *(path.name for path in PACKAGE.glob("_C*.so"))}

    def ignore(directory: str, names: list[str]) -> set[str]:
        return left_out | {"api"} if Path(directory) == PACKAGE else left_out

    shutil.copytree(PACKAGE, folder, ignore=ignore)
    # Two variants, or two versions, of one process must not share an id.
    contents = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        contents.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    metadata = {
        "id": f"_{NAME.replace('-', '_')}_{backend}_{contents.hexdigest()[:12]}",
        "name": NAME,
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],  # numpy, which the reference backend needs, is not among what the library allows here
        "backend": {"type": backend},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m power_kernels.api.commands.hub",
        description="Write the operators in the layout of Hugging Face's kernels library.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write build/ into")
    try:
        variants = emit(parser.parse_args(argv).out)
    except ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, variants)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
