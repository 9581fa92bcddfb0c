"""One launch of a lowered kernel on CPU tensors, under several schedules: what was found, what was counted."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.ptx import native
from tests.ptx.findings import Finding, Findings, current_test
from tests.ptx.lower import Program, parameter_bits
from tests.ptx.memory import Memory, covered

_ORDERS = {"in order": 0, "reverse": 1, "random": 2}
_MOST_EVENTS = 4096
_TWO_SIDED = ("BARRIER_MISMATCH", "DIVERGENT_SYNC", "ASYNC_PENDING")  # and every RACE: findings of two instructions


@dataclass(frozen=True)
class Schedule:
    """An order of execution that CUDA allows."""

    name: str
    order: str = "in order"  # of warps, and of lanes that run by themselves
    blocks: str = "in order"
    independent: bool = False  # lanes run by themselves between collectives, not in lockstep
    yield_percent: int = 0  # chance to switch warps after a memory operation, in random order
    eager: bool = False  # cp.async writes when issued, not when waited for
    salt: int = 0  # of the random order
    budget: int = 1 << 28  # instructions that a warp may take
    check: bool = True  # races and undefined values; without, only bounds and alignment

    def options(self, noise: int) -> native.Options:
        return native.Options(
            order=_ORDERS[self.order],
            independent=self.independent,
            yield_percent=self.yield_percent,
            block_order=_ORDERS[self.blocks],
            noise=noise,
            check=self.check,
            eager_copies=self.eager,
            salt=self.salt,
            seed=1,
            budget=self.budget,
        )


SCHEDULES = {
    s.name: s
    for s in (
        Schedule("in order"),
        Schedule("reverse", order="reverse", blocks="reverse", eager=True),
        Schedule("random", order="random", blocks="random", yield_percent=20, salt=1),
        Schedule("random often", order="random", blocks="random", yield_percent=100, salt=2, eager=True),
        Schedule("independent lanes", order="random", blocks="random", independent=True, yield_percent=30, salt=3),
        Schedule("independent lanes, reverse", order="reverse", blocks="reverse", independent=True),
    )
}
UNCHECKED = Schedule("in order, unchecked", check=False)


@dataclass
class Result:
    findings: Findings = field(default_factory=Findings)
    counts: Counter = field(default_factory=Counter)  # native.COUNTS, over all schedules
    hits: np.ndarray | None = None  # how often a warp executed each instruction
    left_undefined: dict[int, np.ndarray] = field(default_factory=dict)  # storage -> marks of bytes


def _registers(program: Program, grid: Sequence[int], memory: Memory, arguments: Sequence[Any]) -> np.ndarray:
    """The first value of every register: constants, parameters, sizes of the launch."""
    values = program.values.copy()
    for number, registers in program.parameters.items():
        value = arguments[number] if number < len(arguments) else 0  # Triton's scratch pointers, unused
        value = memory.address(value) if isinstance(value, torch.Tensor) else value
        bits = parameter_bits(program.kernel.parameters[number], value)
        for r in registers:
            values[r] = bits & ((1 << 8 * int(program.widths[r])) - 1)
    sizes = dict(zip(("%nctaid.x", "%nctaid.y", "%nctaid.z"), grid, strict=True))
    for name, value in {**sizes, "%ntid.x": program.kernel.threads}.items():
        if name in program.special:
            values[program.special[name]] = value
    return values


def _execute(program: Program, grid, memory: Memory, arguments, shared: int, options, host, flags):
    """Run every block. host: the bytes of each storage to work on; flags the same. Returns events, totals, hits."""
    values = _registers(program, grid, memory, arguments)
    undefined = np.append(np.where(program.defined, 0, 0xFFFFFFFF), 0).astype(np.uint32)
    shadows = [np.zeros((len(flags[key]) + 4) * native.shadow_size(), np.uint8) for key in memory.order]
    buffers = (native.Buffer * max(len(memory.order), 1))()
    for k, key in enumerate(memory.order):
        buffers[k] = native.Buffer(
            base=memory.base(key),
            size=memory.storages[key].nbytes(),
            host=host[key].ctypes.data,
            shadow=shadows[k].ctypes.data,
            flags=flags[key].ctypes.data,
            shift=memory.items[key].bit_length() - 1,
        )
    special = program.special
    launch = native.Launch(
        code=ctypes.addressof(program.code),
        extra=program.extra.ctypes.data,
        n_code=len(program.code),
        n_regs=len(program.widths),
        n_preds=len(program.predicates),
        n_warps=program.kernel.threads // 32,
        shared_size=shared,
        shared_shift=program.shared_shift,
        n_buffers=len(memory.order),
        tid_register=special.get("%tid.x", -1),
        laneid_register=special.get("%laneid", -1),
        ctaid_registers=tuple(special.get(f"%ctaid.{axis}", -1) for axis in "xyz"),
        grid=grid,
        registers=values.ctypes.data,
        widths=program.widths.ctypes.data,
        predicates=program.predicates.ctypes.data,
        undefined=undefined.ctypes.data,
        buffers=ctypes.addressof(buffers),
    )
    events, totals = (native.Event * _MOST_EVENTS)(), native.Totals()
    hits = np.zeros(len(program.code), np.uint32)
    n = native.core().execute(launch, options, ctypes.addressof(events), _MOST_EVENTS, totals, hits.ctypes.data)
    return events[:n], totals, hits


def _finding(program: Program, memory: Memory, e, schedule: str) -> Finding:
    kind = native.KINDS[e.kind]
    two = kind.startswith("RACE") or kind in _TWO_SIDED
    against = f" against {'block' if kind == 'RACE_BLOCKS' else 'thread'} {e.tid2}" if two else ""
    return Finding(
        kind,
        program.kernel.name,
        buffer={-1: "-", 0: "shared"}.get(e.buffer) or "/".join(memory.names[memory.order[e.buffer - 1]]),
        source=program.kernel.source(e.pc),
        other_source=program.kernel.source(e.pc2) if two else "",
        opcode=program.opcode(e.pc) + (f" | {program.opcode(e.pc2)}" if two else ""),
        detail=f"block {e.block} thread {e.tid}{against}, byte {e.offset}, first in {current_test()}",
        same_value=None if e.same_value < 0 else bool(e.same_value),
        count=e.count,
        schedules={schedule},
    )


def launch(
    program: Program,
    grid: Sequence[int],
    names: Sequence[str],
    arguments: Sequence[Any],
    shared: int,
    schedules: Sequence[Schedule],
    outputs: Mapping[str, bool] = {},
    undefined_before=lambda key, content: None,
    noise: int = 0,
) -> Result:
    """Run under every schedule: the first on the tensors themselves, the others on copies that must come out the same.

    outputs: arguments that are undefined when it begins -> whether every byte of them must be written.
    noise: last places that approximate instructions may err by.
    """
    tensors = [
        (n, a)
        for n, a in zip(names, arguments, strict=True)
        if isinstance(a, torch.Tensor) and a.untyped_storage().nbytes()
    ]
    memory = Memory(tensors, tuple(outputs), undefined_before)
    grid = (*grid, 1, 1, 1)[:3]
    if memory.big:  # in place, under one schedule
        schedules = [UNCHECKED]
    name, result = program.kernel.name, Result(hits=np.zeros(len(program.code), np.uint64))
    start = {} if memory.big else {key: memory.bytes(key).copy() for key in memory.order}
    for k, schedule in enumerate(schedules):
        host = {key: start[key].copy() if k else memory.bytes(key) for key in memory.order}
        flags = {key: memory.flags[key].copy() for key in memory.order}
        options = schedule.options(noise)
        events, totals, hits = _execute(program, grid, memory, arguments, shared, options, host, flags)
        result.hits += hits
        result.counts.update({count: getattr(totals, count) for count in native.COUNTS})
        result.findings.add(_finding(program, memory, e, schedule.name) for e in events)
        if totals.aborted:
            result.findings.add([Finding("ABORTED", name, schedules={schedule.name})])
        if not schedule.check:
            continue
        if k == 0:
            result.left_undefined = {key: memory.undefined_bytes(key, flags) for key in memory.order}
            result.findings.add(_not_written(name, tensors, outputs, result.left_undefined, schedule.name))
        else:
            result.findings.add(_different(name, memory, host, schedule.name))
    return result


def _not_written(kernel: str, tensors, outputs, undefined, schedule: str):
    for name, t in tensors:
        if outputs.get(name) and t.numel():
            left = int((undefined[t.untyped_storage().data_ptr()] & covered(t)).sum())
            if left:
                detail = f"{left} bytes of {t.numel() * t.element_size()}, first in {current_test()}"
                yield Finding("NOT_WRITTEN", kernel, name, detail=detail, schedules={schedule})


def _different(kernel: str, memory: Memory, host, schedule: str):
    for key in memory.order:
        differ = np.flatnonzero(host[key] != memory.bytes(key))
        if len(differ):
            detail = f"{len(differ)} bytes, first byte {differ[0]}, first in {current_test()}"
            yield Finding("SCHEDULE_DIFFERS", kernel, "/".join(memory.names[key]), detail=detail, schedules={schedule})
