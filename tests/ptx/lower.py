"""Statements -> what the core executes: registers numbered, constants in registers of their own, types in opcodes."""

from __future__ import annotations

import ctypes
import re
import struct
from dataclasses import dataclass

import numpy as np

from tests.ptx.native import OPCODES, Insn
from tests.ptx.parse import Kernel, Statement

COMPARE = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
WIDTH = {kind + bits: int(bits) // 8 for kind in "busf" for bits in ("8", "16", "32", "64")} | {"bf16": 2}
SPECIAL = ("%tid.x", "%laneid", "%ntid.x", *(f"%{which}.{axis}" for which in ("ctaid", "nctaid") for axis in "xyz"))
SINK = -1  # the operand `_`
_REGISTER = re.compile(r"%(p|rs|rd|r)(\d+)$")
_ADDRESS = re.compile(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\w+))?\s*\]")


class UnsupportedError(Exception):
    """An instruction or operand that the core has no semantics for."""


@dataclass
class Program:
    kernel: Kernel
    code: ctypes.Array  # of Insn
    widths: np.ndarray  # bytes of each register
    values: np.ndarray  # u64, the first value of each register
    defined: np.ndarray  # bool, registers, then predicates
    predicates: np.ndarray
    special: dict[str, int]
    parameters: dict[int, list[int]]  # parameter -> the registers that hold it
    shared_shift: int  # shared memory is checked in granules of 1 << shift bytes, its narrowest access
    extra: np.ndarray  # registers of instructions that have more than an Insn holds

    def opcode(self, pc: int) -> str:
        return self.kernel.statements[pc].opcode


class Lowering:
    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.registers: dict = {}
        self.widths: list[int] = []
        self.values: list[int] = []
        self.fixed: list[bool] = []
        self.predicates: dict = {}
        self.predicate_values: list[int] = []
        self.fixed_predicates: list[bool] = []
        self.parameters: dict[int, list[int]] = {}
        self.shared_sizes = [4]
        self.extra: list[int] = []

    # ---- operands

    def new(self, key, width: int, value: int = 0, fixed: bool = False) -> int:
        if key not in self.registers:
            self.registers[key] = len(self.widths)
            self.widths.append(width)
            self.values.append(value & ((1 << 8 * width) - 1))
            self.fixed.append(fixed)
        return self.registers[key]

    def predicate(self, key, value: int | None = None) -> int:
        if key not in self.predicates:
            self.predicates[key] = len(self.predicates)
            self.predicate_values.append(value or 0)
            self.fixed_predicates.append(value is not None)
        return -(self.predicates[key] + 2)

    def operand(self, text: str, width: int) -> int:
        """The number of a register, or of one that holds a constant of `width` bytes (0: a predicate)."""
        if text in ("_", "tmp"):
            return SINK
        if found := _REGISTER.match(text):
            return self.predicate(text) if found[1] == "p" else self.new(text, {"rs": 2, "r": 4, "rd": 8}[found[1]])
        if text in SPECIAL:
            return self.new(text, 4, fixed=True)
        if text == "global_smem":
            return self.new(("shared memory",), 4, fixed=True)
        if text.startswith(("0f", "0d")):
            value = int(text[2:], 16)
        elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
            value = int(text, 0)
        else:
            raise UnsupportedError(f"operand {text!r}")
        if width == 0:
            return self.predicate(("constant", bool(value)), 0xFFFFFFFF if value else 0)
        return self.new(("constant", width, value), width, value, True)

    def all(self, texts, width: int) -> list[int]:
        return [self.operand(text, width) for text in texts]

    def address(self, text: str) -> tuple[int, int]:
        found = _ADDRESS.fullmatch(text)
        if not found:
            raise UnsupportedError(f"address {text!r}")
        return self.operand(found[1], 4), int(found[2] or "0", 0)

    # ---- statements: each method returns (name in opcodes.inc, destinations, sources)

    def lower(self, s: Statement) -> Insn:
        i = Insn()
        i.guard = -1
        if s.guard:
            i.guard, i.guard_neg = -(self.predicate(s.guard) + 2), s.negated
        parts = s.opcode.split(".")
        name, d, sources = getattr(self, f"_{parts[0]}", self._plain)(i, s.opcode, parts, s.operands)
        if name not in OPCODES:
            raise UnsupportedError(f"{s.opcode} {s.operands}")
        i.op, i.nd, i.ns = OPCODES[name], len(d), len(sources)
        i.d[: len(d)] = d
        i.s[: len(sources)] = sources
        return i

    def _plain(self, i, op, parts, a):
        kind, family = parts[-1], parts[0]
        width = WIDTH.get(kind, 0)
        name = op
        if family in ("add", "sub", "mul", "fma", "div"):
            name = op.replace(".rn.", ".")
        if parts[1:2] == ["lo"] or (family in ("add", "sub") and kind[0] == "u"):
            name = name[: -len(kind)] + kind.replace("u", "s").replace("b", "s")  # the lower bits have no sign
        if family == "cvt":
            return name, [self.operand(a[0], WIDTH[parts[-2]])], [self.operand(a[1], width)]
        if "wide" in parts:
            return name, [self.operand(a[0], 8)], [self.operand(x, w) for x, w in zip(a[1:], (4, 4, 8), strict=False)]
        if family in ("shl", "shr"):
            return name, [self.operand(a[0], width)], [self.operand(a[1], width), self.operand(a[2], 4)]
        return name, [self.operand(a[0], width)], self.all(a[1:], width)

    def _mov(self, i, op, parts, a):
        width = WIDTH.get(parts[-1], 0)
        half = width // 2
        if isinstance(a[0], list):
            if len(a[0]) != 2:
                raise UnsupportedError(op)
            return f"unpack.{8 * width}", self.all(a[0], half), [self.operand(a[1], width)]
        if isinstance(a[1], list):
            return f"pack.{8 * width}", [self.operand(a[0], width)], self.all(a[1], half)
        suffix = "pred" if parts[-1] == "pred" else str(8 * width)
        return f"mov.{suffix}", [self.operand(a[0], width)], [self.operand(a[1], width)]

    def _ld(self, i, op, parts, a):
        if parts[1] == "param":
            return self._parameter(parts[-1], a)
        registers = self._access(i, parts, a[1], a[0])
        return f"ld.{parts[1].split('::')[0]}", registers[1:], registers[:1]

    def _st(self, i, op, parts, a):
        return f"st.{parts[1].split('::')[0]}", [], self._access(i, parts, *a)

    def _access(self, i, parts, where, data) -> list[int]:
        """The register of the address, and those of what is loaded or stored."""
        width, data = WIDTH[parts[-1]], data if isinstance(data, list) else [data]
        base, i.imm = self.address(where)
        registers = self.all(data, max(width, 2))
        named = [r for r in registers if r >= 0]
        i.vec, i.esize, i.rsize = len(data), width, self.widths[named[0]] if named else max(width, 2)
        if parts[1].startswith("shared"):
            self.shared_sizes.append(width * len(data))
        return [base, *registers]

    def _parameter(self, kind, a):
        number, width = int(re.search(r"param_(\d+)", a[1])[1]), WIDTH[kind]
        register = self.new(("parameter", number, width), width, fixed=True)
        self.parameters.setdefault(number, []).append(register)
        target = self.operand(a[0], width)
        wider = {"s32": "cvt.s64.s32", "u32": "cvt.u64.u32"}.get(kind) if self.widths[target] == 8 else None
        return wider or f"mov.{8 * width}", [target], [register]

    def _atom(self, i, op, parts, a):
        if parts[1] != "global" or parts[-2:] != ["add", "u32"]:
            raise UnsupportedError(op)
        base, i.imm = self.address(a[1])
        return "atom.add.u32", [self.operand(a[0], 4)], [base, self.operand(a[2], 4)]

    def _cp(self, i, op, parts, a):
        if parts[1] != "async":
            raise UnsupportedError(op)
        if parts[2] in ("commit_group", "wait_group"):
            i.imm = int(a[0], 0) if a else 0
            return op, [], []
        to, i.imm = self.address(a[0])
        of, i.cmp = self.address(a[1])
        i.vec = int(a[2], 0)
        self.shared_sizes.append(i.vec)
        return "cp.async", [], [to, of, *self.all(a[3:4], 4)]

    def _bra(self, i, op, parts, a):
        i.target = self.kernel.labels[a[0]]
        return "bra", [], []

    def _ret(self, i, op, parts, a):
        return "ret", [], []

    _exit = _ret

    def _bar(self, i, op, parts, a):
        if parts[1] == "warp":
            return "bar.warp.sync", [], []
        if a != ["0"]:
            raise UnsupportedError(f"{op} {a}")
        return "bar.sync", [], []

    _barrier = _bar

    def _fence(self, i, op, parts, a):
        return "fence", [], []

    _membar = _fence

    def _shfl(self, i, op, parts, a):
        if a[4] not in ("-1", "0xffffffff"):
            raise UnsupportedError(f"{op} {a}")
        i.cmp = ("bfly", "up", "down", "idx").index(parts[2])
        return "shfl.sync", [self.operand(a[0], 4)], self.all(a[1:4], 4)

    def _redux(self, i, op, parts, a):
        return op, [self.operand(a[0], 4)], self.all([a[1], *(x for x in a[2:] if x[0] == "%")], 4)

    def _ldmatrix(self, i, op, parts, a):
        base, i.imm = self.address(a[1])
        self.shared_sizes.append(2)
        return "ldmatrix.trans" if "trans" in parts else "ldmatrix", self.all(a[0], 4), [base]

    def _stmatrix(self, i, op, parts, a):
        if "x1" not in parts or "trans" in parts:
            raise UnsupportedError(op)
        base, i.imm = self.address(a[0])
        self.shared_sizes.append(4)
        return "stmatrix", [], [base, self.operand(a[1][0], 4)]

    def _mma(self, i, op, parts, a):
        if not op.startswith("mma.sync.aligned.m16n8k16.row.col.f32"):
            raise UnsupportedError(op)
        return f"mma.m16n8k16.{parts[-2]}", self.all(a[0], 4), self.all((x for group in a[1:] for x in group), 4)

    def _wgmma(self, i, op, parts, a):
        if parts[1] == "fence":
            return "fence", [], []
        if parts[1] in ("commit_group", "wait_group"):
            i.imm = int(a[0]) if a else 0
            return f"wgmma.{parts[1]}", [], []
        shape = re.fullmatch(r"m64n(\d+)k16", parts[4])
        if not shape or parts[5] != "f32" or a[4:] != ["1", "1", "0", "0"] or isinstance(a[1], list):
            raise UnsupportedError(f"{op} {a[1:]}")
        i.cmp, i.target = int(shape[1]), len(self.extra)
        self.extra += self.all(a[0], 4)
        self.shared_sizes.append(2)
        return f"wgmma.{parts[6]}", [], [*self.all(a[1:3], 8), self.operand(a[3], 0)]

    def _setp(self, i, op, parts, a):
        if len(parts) != 3 or len(a) != 3:
            raise UnsupportedError(f"{op} {a}")
        i.cmp = COMPARE.index(parts[1])
        kind = parts[2] if parts[2] == "bf16" else parts[2].replace("b", "s")
        return f"setp.{kind}", [self.operand(a[0], 0)], self.all(a[1:], WIDTH[parts[2]])

    def _selp(self, i, op, parts, a):
        width = WIDTH[parts[-1]]
        return f"selp.{8 * width}", [self.operand(a[0], width)], [*self.all(a[1:3], width), self.operand(a[3], 0)]

    # ---- the whole

    def program(self) -> Program:
        statements = self.kernel.statements
        code = (Insn * len(statements))(*map(self.lower, statements))
        return Program(
            self.kernel,
            code,
            widths=np.array(self.widths, np.uint8),
            values=np.array(self.values, np.uint64),
            defined=np.array(self.fixed + self.fixed_predicates, bool),
            predicates=np.array(self.predicate_values or [0], np.uint32),
            special={name: self.registers[name] for name in SPECIAL if name in self.registers},
            parameters=self.parameters,
            shared_shift=min(self.shared_sizes).bit_length() - 1,
            extra=np.array(self.extra or [0], np.int32),
        )


def lower(kernel: Kernel) -> Program:
    """Raises UnsupportedError, naming the instruction, where the core has no semantics for it."""
    return Lowering(kernel).program()


def parameter_bits(kind: str, value) -> int:
    """The bits of one argument of a PTX parameter type."""
    if kind in ("f32", "f64"):
        return int.from_bytes(struct.pack("<f" if kind == "f32" else "<d", value), "little")
    return int(value) & ((1 << 8 * WIDTH[kind]) - 1)
