"""`python -m power_kernels.triton [--json] [--target NAME] [WORD ...]`: compile every kernel offline, print what came.

WORDs keep the configurations whose names contain them all, --target one of sm_80, sm_90, sm_100, gfx942. Needs no GPU;
must run without TRITON_INTERPRET. One row a target and configuration, from the machine code:

    regs    registers a thread (NVIDIA), vector registers a thread (AMD)
    shared  bytes of shared memory a program
    spill   bytes of stack and local memory a thread; on AMD scratch bytes, or spilled vector registers if that is more
    warps   that fit on one multiprocessor (compute unit), as registers and shared memory allow; their share of the most
    insts   machine instructions of the kernel (NVIDIA), each counted once
    loop    of these, in its hot loop: the smallest loop that holds as many loads from global memory as any
    /elem   instructions on the shortest way once around that loop, by the entries a thread takes on the way. It is the
            cheapest pass, without NaN or infinities; for the masses that is beta = 1
    loads, stores   of global memory by width in bits: 4x128 is four instructions of 16 bytes a thread
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import Configuration, configurations

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_KB = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "gfx942": 64}  # a multiprocessor


def compile_for(configuration: Configuration, target: GPUTarget):
    """The compiled kernel of one configuration.

    On AMD the pointers are taken to lie in tensors under 2 GiB, as the launcher finds them with most tensors; what this
    allows is buffer instructions in place of global ones.
    """
    names = configuration.kernel.arg_names
    signature = {name: configuration.signature.get(name, "constexpr") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i in sorted(map(names.index, configuration.aligned))}
    if target.backend == "hip":
        for name, kind in signature.items():
            if kind.startswith("*"):
                attributes.setdefault((names.index(name),), []).append(["tt.pointer_range", 32])
    source = ASTSource(configuration.kernel, signature, dict(configuration.constexprs), attributes)
    options = {"num_warps": configuration.num_warps}
    if configuration.num_stages is not None:
        options["num_stages"] = configuration.num_stages
    if configuration.maxnreg is not None and target.backend == "cuda":
        options["maxnreg"] = configuration.maxnreg
    return triton.compile(source, target=target, options=options)


# ---- NVIDIA


def _binary_tool(name: str, cubin: bytes, *flags: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *flags, file.name], capture_output=True, text=True, check=True).stdout


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_GLOBAL_LOAD = ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")


def _parse(sass: str) -> tuple[list[tuple[str, bool, str | None]], dict[str, int]]:
    """The instructions as (name, whether it is certain to be taken, label that it jumps to), and where labels are."""
    code, labels = [], {}
    for line in sass.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            predicate, name, rest = found.groups()
            target = re.search(r"\((\.L_x_\d+)\)", rest) if name.startswith("BRA") else None
            # `BRA P1, label` and `BRA.DIV` depend on something too.
            certain = predicate is None and not re.match(r"\s*!?U?P\d", rest) and "." not in name
            code.append((name, certain, target and target[1]))
    return code, labels


def hot_loop(sass: str) -> tuple[int, int, int] | None:
    """(instructions in all, in the hot loop, on the shortest way once around it) of a kernel; loops may be absent."""
    code, labels = _parse(sass)
    while code[-1][0] == "NOP":  # padding, after a jump to itself
        code.pop()
    code.pop()
    loops = [(labels[to], i) for i, (_, _, to) in enumerate(code) if to in labels and labels[to] <= i]
    loops = [(start, end) for start, end in loops if start < end]

    def loads(loop):
        return sum(name.split(".")[0] in _GLOBAL_LOAD for name, _, _ in code[loop[0] : loop[1] + 1])

    if not loops or not max(map(loads, loops)):
        return len(code), 0, 0
    most = max(map(loads, loops))
    start, end = min((loop for loop in loops if loads(loop) == most), key=lambda loop: loop[1] - loop[0])
    ways, seen = [(1, start)], set()
    while ways:
        length, i = heapq.heappop(ways)
        if i == end:
            return len(code), end - start + 1, length
        if i in seen:
            continue
        seen.add(i)
        name, certain, to = code[i]
        ahead = [] if name.startswith(("EXIT", "RET")) and certain else [i + 1]
        if to in labels:
            ahead = [labels[to]] if certain else [i + 1, labels[to]]
        for j in ahead:
            if start < j <= end:
                heapq.heappush(ways, (length + 1, j))
    return len(code), end - start + 1, 0


def _nvidia(compiled, configuration: Configuration, name: str, disassemble: bool) -> dict:
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _binary_tool("cuobjdump", cubin, "--dump-resource-usage")))
    code, loop, around = hot_loop(_binary_tool("nvdisasm", cubin, "-c")) if disassemble else (None, None, None)
    registers = int(used["REG"])
    # Four partitions of 16,384 registers, taken 8 a thread at a time; 64 warps; 1 KB of every block's memory is taken.
    warps = min(64, 4 * (16384 // (-(-registers // 8) * 8 * 32)))
    blocks = min(32, warps // configuration.num_warps, SHARED_KB[name] * 1024 // (compiled.metadata.shared + 1024))
    a_thread = configuration.elements and configuration.elements / (32 * configuration.num_warps)
    return {
        "registers": registers,
        "spill": int(used["STACK"]) + int(used["LOCAL"]),
        "warps": blocks * configuration.num_warps,
        "occupancy": blocks * configuration.num_warps / 64,
        "instructions": code,
        "loop": loop,
        "per_element": round(around / a_thread, 1) if around and a_thread else None,
        "loads": _widths(re.findall(r"\bld\.global\S*", ptx)) + _copies(ptx),
        "stores": _widths(re.findall(r"\bst\.global\S*", ptx)),
        "ex2": len(re.findall(r"\bex2\.approx", ptx)),
    }


def _widths(instructions: list[str]) -> Counter:
    bits = Counter()
    for instruction in instructions:
        vector = re.search(r"\.v(\d)", instruction)
        bits[int(re.search(r"(\d+)$", instruction)[1]) * int(vector[1] if vector else 1)] += 1
    return bits


def _copies(ptx: str) -> Counter:
    """Asynchronous copies from global to shared memory: cp.async by its bytes, a tensor's tile as 16."""
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(\w+)", ptx)
    bits = Counter(8 * int(n, 0) for n in copies)
    bits[128] += len(re.findall(r"cp\.async\.bulk\.tensor\S*\.shared\S*global", ptx))
    return +bits


# ---- AMD


def _amd(compiled, configuration: Configuration, name: str, _disassemble: bool) -> dict:
    code = compiled.asm["amdgcn"]

    def of(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", code)[1])

    registers = of("vgpr_count")
    # Four SIMDs of 512 registers a thread, taken 8 at a time; 8 waves each.
    waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
    shared = compiled.metadata.shared
    blocks = waves // configuration.num_warps
    blocks = min(blocks, SHARED_KB[name] * 1024 // shared) if shared else blocks
    return {
        "registers": registers,
        "spill": max(of("private_segment_fixed_size"), of("vgpr_spill_count")),
        "warps": blocks * configuration.num_warps,
        "occupancy": blocks * configuration.num_warps / 32,
        "instructions": None,
        "loop": None,
        "per_element": None,
        "loads": _amd_widths(code, "load"),
        "stores": _amd_widths(code, "store"),
        "ex2": len(re.findall(r"\bv_exp_f32", code)),
    }


def _amd_widths(code: str, kind: str) -> Counter:
    sizes = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "ushort": 16, "sshort": 16, "dword": 32}
    bits = Counter()
    for word, many in re.findall(rf"\b(?:global|buffer)_{kind}_([a-z]+)(?:_d16(?:_hi)?)?(?:x(\d))?\b", code):
        if word in sizes:
            bits[sizes[word] * int(many or 1)] += 1
    return bits


# ---- the report


def examine(configuration: Configuration, name: str, disassemble: bool = True) -> dict:
    """One row of the report; `error` says why a configuration did not compile."""
    row = {"target": name, "name": configuration.name, "wide": configuration.wide, "error": None}
    try:
        compiled = compile_for(configuration, TARGETS[name])
    except Exception as error:  # the report names what does not compile
        return {**row, "error": f"{type(error).__name__}: {error}"[:2000]}
    row["shared"] = compiled.metadata.shared
    look = _nvidia if TARGETS[name].backend == "cuda" else _amd
    return {**row, **look(compiled, configuration, name, disassemble)}


def _examine_one(job: tuple[int, str, bool]) -> dict:
    return examine(configurations()[job[0]], *job[1:])


def listed(quick: bool = False) -> list[tuple[int, str]]:
    """(number of the configuration, target) of all that is compiled, target by target.

    quick: float16 for sm_80 alone; elsewhere bfloat16 stands for it, whose code is the same but for one conversion.
    """
    return [
        (i, target)
        for target in TARGETS
        for i, c in enumerate(configurations())
        if (c.targets is None or target in c.targets)
        and not (quick and target != "sm_80" and "float16" in c.name.split())
    ]


def rows(targets, words=(), quick: bool = False):
    """The rows of the report in order, two compilations at a time. None comes from a cache but TRITON_CACHE_DIR's."""
    named = [all(word in c.name for word in words) for c in configurations()]
    jobs = [(i, target, not quick) for i, target in listed(quick) if target in targets and named[i]]
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(2) as pool:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        yield from pool.map(_examine_one, jobs)


def _count(bits: dict) -> str:
    return " ".join(f"{n}x{width}" for width, n in sorted(bits.items(), reverse=True)) or "-"


def _line(row: dict) -> str:
    if row["error"]:
        return f"{row['target']:7} {row['name']:36} DOES NOT COMPILE: {row['error']}"
    per = "-" if row["per_element"] is None else f"{row['per_element']:.1f}"
    return (
        f"{row['target']:7} {row['name']:36} {row['registers']:>4} {row['shared']:>6} {row['spill']:>5} "
        f"{row['warps']:>3} {row['occupancy']:>4.0%} {row['instructions'] or '-':>6} {row['loop'] or '-':>5} {per:>6}  "
        f"{_count(row['loads']):24} {_count(row['stores'])}"
    )


HEADER = (
    f"{'target':7} {'configuration':36} {'regs':>4} {'shared':>6} {'spill':>5} {'warps':>8} {'insts':>6} {'loop':>5} "
    f"{'/elem':>6}  {'loads':24} stores"
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m power_kernels.triton")
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--target", choices=TARGETS)
    quick = "half of the time: without insts, loop and /elem, and float16 for sm_80 alone"
    parser.add_argument("--quick", action="store_true", help=quick)
    chosen = parser.parse_args(arguments)
    failures = 0
    if not chosen.json:
        print(HEADER)
    for row in rows([chosen.target] if chosen.target else TARGETS, chosen.words, chosen.quick):
        failures += bool(row["error"])
        print(json.dumps(row) if chosen.json else _line(row), flush=True)
    return 1 if failures and not chosen.json else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
