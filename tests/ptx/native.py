"""The C++ core (core/): built when it is first asked for, and the structures that it shares with Python."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).parent / "core"
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fwrapv", "-std=c++17", "-shared", "-fPIC")
COMPILER = os.environ.get("CXX", "g++")


class Insn(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint16),
        *((name, ctypes.c_uint8) for name in ("nd", "ns")),
        ("guard", ctypes.c_int32),
        *((name, ctypes.c_uint8) for name in ("guard_neg", "vec", "esize", "rsize")),
        *((name, ctypes.c_int32) for name in ("cmp", "target")),
        ("imm", ctypes.c_int64),
        ("d", ctypes.c_int32 * 4),
        ("s", ctypes.c_int32 * 14),
    )


class Buffer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("base", "size")),
        *((name, ctypes.c_void_p) for name in ("host", "shadow", "flags")),
        ("shift", ctypes.c_uint8),
    )


class Event(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "pc", "pc2", "block", "tid", "tid2", "buffer", "same_value")),
        *((name, ctypes.c_int64) for name in ("offset", "count")),
    )


class Options(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("order", "independent", "yield_percent", "block_order")),
        *((name, ctypes.c_int32) for name in ("noise", "check", "eager_copies", "salt")),
        *((name, ctypes.c_uint64) for name in ("seed", "budget")),
    )


COUNTS = (
    "instructions",
    "aborted",
    "barriers",
    "sectors_read",
    "sectors_written",
    "shared_passes",
    "conflicts",
)


SECTOR = 32  # bytes


class Totals(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in COUNTS)


class Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("code", "extra")),
        *((name, ctypes.c_int32) for name in ("n_code", "n_regs", "n_preds", "n_warps")),
        *((name, ctypes.c_int32) for name in ("shared_size", "shared_shift", "n_buffers")),
        *((name, ctypes.c_int32) for name in ("tid_register", "laneid_register")),
        ("ctaid_registers", ctypes.c_int32 * 3),
        ("grid", ctypes.c_int32 * 3),
        *((name, ctypes.c_void_p) for name in ("registers", "widths", "predicates", "undefined", "buffers")),
    )


def _listed(name: str, pattern: str) -> list[str]:
    """What an X-macro file lists, in order."""
    text = (SOURCES / name).read_text()
    return re.findall(pattern, "\n".join(line for line in text.splitlines() if not line.startswith("//")))


OPCODES = {name: number for number, name in enumerate(_listed("opcodes.inc", r'X\(\w+, "([^"]+)"\)'))}
KINDS = ["", *_listed("kinds.inc", r"X\((\w+)\)")]


def why_not() -> str | None:
    """Why the core cannot be built here, or None."""
    return None if shutil.which(COMPILER) else f"no C++ compiler: {COMPILER!r} is not found (CXX names another)"


def _processor() -> str:
    """What -march=native stands for."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.machine()


@functools.cache
def core() -> ctypes.CDLL:
    """The library, under build/ptx by a digest of its sources, flags, compiler and processor."""
    sources = sorted(SOURCES.iterdir())
    digest = hashlib.sha256(" ".join([*FLAGS, COMPILER, _processor()]).encode())
    for path in sources:
        digest.update(path.read_bytes())
    library = ROOT / "build" / "ptx" / f"core-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / "core.so"
            subprocess.run([COMPILER, *FLAGS, "-o", built, SOURCES / "schedule.cpp"], check=True)
            built.replace(library)  # at once, whoever else builds it now
    found = ctypes.CDLL(str(library))
    for which, kind in enumerate((Insn, Buffer, Event, Options, Totals, Launch)):
        assert found.sizes(which) == ctypes.sizeof(kind), kind
    found.execute.argtypes = [
        ctypes.POINTER(Launch),
        ctypes.POINTER(Options),
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.POINTER(Totals),
        ctypes.c_void_p,
    ]
    return found


def shadow_size() -> int:
    """Bytes of core/machine.hpp's Shadow, one for each granule of a buffer."""
    return core().sizes(6)
