"""PTX text of one kernel -> statements: what an assembler sees, each with the source lines that it comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass
class Statement:
    opcode: str
    operands: list[str | list[str]]  # {...} is a list
    guard: str | None = None
    negated: bool = False
    where: tuple[tuple[int, int, int], ...] = ()  # (file, line, column), from the innermost function out


@dataclass
class Kernel:
    name: str
    parameters: list[str]  # PTX types in order
    threads: int
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)

    def source(self, pc: int) -> str:
        """file:line of a statement, from the innermost function out; Triton's own library is left out."""
        lines = [f"{self.files.get(at[0], '?').rsplit('/', 1)[-1]}:{at[1]}" for at in self.statements[pc].where]
        return " < ".join([line for line in lines if not line.startswith("standard.py")] or lines)


_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:,\s*function_name\s+\S+,\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)")
_DEEPEST = 8  # calls within calls that a statement's lines follow


def _operands(text: str) -> list[str | list[str]]:
    """Split at commas outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{") - (c in "]}")
        if c == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    stripped = [part.strip() for part in parts if part.strip()]
    return [[p.strip() for p in part[1:-1].split(",")] if part.startswith("{") else part for part in stripped]


def _body(kernel: Kernel, text: str) -> None:
    where, inside_asm, chains = (), False, {}
    for line in text.splitlines():
        if "begin inline asm" in line:
            inside_asm = True  # LLVM counts lines on within it; what came before it is the source's
        elif "end inline asm" in line:
            inside_asm = False
        if (found := _LOC.search(line)) and not inside_asm:
            here = tuple(map(int, found.group(1, 2, 3)))
            where = (here,)
            if found[4]:  # the caller's own chain is that of the last .loc that named it
                caller = tuple(map(int, found.group(4, 5, 6)))
                where += chains.get(caller, (caller,))
            chains[here] = where[:_DEEPEST]
            continue
        line = line.split("//")[0].strip()
        if line.startswith("{ .reg"):  # a scope of inline assembly
            line = line.strip("{} ").split(";", 1)[1].strip()
        if not line or line.startswith("."):
            continue
        if label := re.fullmatch(r"(\$\w+):", line):
            kernel.labels[label[1]] = len(kernel.statements)
            continue
        assert line.endswith(";"), line
        for text in filter(None, map(str.strip, line.split(";"))):
            negated, guard, opcode, operands = _STATEMENT.fullmatch(text).groups()
            kernel.statements.append(Statement(opcode, _operands(operands), guard, negated == "!", where))


def parse(ptx: str) -> Kernel:
    """The one kernel of a PTX text as Triton writes it."""
    name = re.search(r"\.entry\s+(\w+)\(", ptx)[1]
    declared, _, rest = ptx.partition(f".entry {name}(")[2].partition(")")
    attributes, _, body = rest.partition("{\n")
    kernel = Kernel(
        name,
        parameters=re.findall(r"\.param\s+\.(\w+)", declared),
        threads=int(re.search(r"\.reqntid\s+(\d+)", attributes)[1]),
        files={int(number): path for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)},
    )
    _body(kernel, body[: re.search(r"^\}", body, re.M).start()])
    return kernel
