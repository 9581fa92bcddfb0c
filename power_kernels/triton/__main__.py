"""`python -m power_kernels.triton [--json] [WORD]`: compile every kernel offline and print what came of it.

WORD keeps the configurations whose name contains it. Needs no GPU; must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from power_kernels.triton import Configuration, configurations

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The machine code is looked at for one target; the others need only compile, so one dtype and flag set will do.
EXAMINED = "sm_90"
_ELSEWHERE = re.compile(r"bfloat16 entropy=True|unit=16B row=256B|mh_accept|lanes=8 early=True free=True")


def compile_for(configuration: Configuration, target: GPUTarget):
    """The compiled kernel of one configuration."""
    names = configuration.kernel.arg_names
    signature = {name: configuration.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in configuration.aligned}
    source = ASTSource(configuration.kernel, signature, dict(configuration.constexprs), attributes)
    return triton.compile(source, target=target, options={"num_warps": configuration.num_warps})


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "shared": int(found["SHARED"]),
        "local": int(found["LOCAL"]),
    }


def examine(configuration: Configuration, name: str) -> dict:
    """One row of the report: registers, stack and local bytes a thread, accesses to global memory in the PTX."""
    row = {"target": name, "name": configuration.name, "wide": configuration.wide, "error": None}
    try:
        compiled = compile_for(configuration, TARGETS[name])
    except Exception as error:  # the report names what does not compile
        return {**row, "error": f"{type(error).__name__}: {error}"[:2000]}
    if name == EXAMINED:
        ptx = compiled.asm["ptx"]
        row.update(_resources(compiled.asm["cubin"]))
        row["loads"] = Counter(re.findall(r"\bld\.global\S*", ptx))
        row["stores"] = Counter(re.findall(r"\bst\.global\S*", ptx))
    return row


def main(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    words = [a for a in arguments if not a.startswith("-")]
    failures = 0
    for target in TARGETS:
        for configuration in configurations():
            if not all(word in configuration.name for word in words):
                continue
            if target != EXAMINED and not _ELSEWHERE.search(configuration.name):
                continue
            row = examine(configuration, target)
            failures += bool(row["error"])
            if as_json:
                print(json.dumps(row), flush=True)
            elif row["error"]:
                print(f"{target:8}{row['name']}: {row['error']}")
            elif target != EXAMINED:
                print(f"{target:8}{row['name']}: compiles")
            else:
                loads = ", ".join(f"{n} {load[3:]}" for load, n in row["loads"].items())
                print(
                    f"{target:8}{row['name']}: {row['registers']} registers, {row['stack']} B stack, "
                    f"{row['local']} B local, {row['shared']} B shared; {loads}"
                )
    return 1 if failures and not as_json else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
