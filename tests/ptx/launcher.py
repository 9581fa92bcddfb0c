"""In place of Triton's launch on a GPU: compile as the launcher asks, for an NVIDIA target, and execute on CPU tensors.

Triton's own binder decides types, alignment and constants, as on a GPU. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
from triton.runtime.jit import JITFunction

from power_kernels.ops import dispatch
from tests import triton_requests
from tests.ptx.findings import Findings
from tests.ptx.lower import Program, lower
from tests.ptx.machine import SCHEDULES, Schedule, launch
from tests.ptx.memory import bytes_of
from tests.ptx.parse import parse

ALL, SOME = True, False
_SCORED = {"logp_ptr": ALL, "logq_ptr": ALL, "weight_ptr": ALL, "entropy_ptr": ALL, "status_ptr": ALL}
# Arguments that a kernel writes and never reads, or reads only what it wrote: undefined when it starts. ALL must be
# written; workspaces have more room than every launch needs.
OUTPUTS: dict[str, dict[str, bool]] = {
    "_mass_kernel": {"work_ptr": SOME},
    "_finish_kernel": {"token_ptr": ALL, **_SCORED},
    "_slot_mass_kernel": {"work_ptr": SOME},
    "_branch_mass_kernel": {"work_ptr": SOME, "split_ptr": SOME},
    "_branch_kernel": dict.fromkeys(
        (
            "parent_ptr",
            "token_ptr",
            "child_log_weight_ptr",
            "logp_ptr",
            "child_order_ptr",
            "candidate_ptr",
            "candidate_logp_ptr",
            "log_threshold_ptr",
            "status_ptr",
        ),
        ALL,
    ),
    "_select_kernel": {"moved_ptr": ALL},
    "_score_kernel": _SCORED,
    "_head_kernel": {"work_ptr": SOME, "given_ptr": SOME, "logits_ptr": ALL},
    "_mh_accept_kernel": {"accept_ptr": ALL, "log_ratio_ptr": ALL, "status_ptr": ALL},
    "_mh_advance_kernel": dict.fromkeys(
        ("input_id_ptr", "position_ptr", "counter_ptr", "exclude_ptr", "commit_range_ptr", "open_range_ptr"), ALL
    ),
    "_fork_kernel": {"copies_ptr": ALL, "status_ptr": ALL},
    "_extend_kernel": {"copies_ptr": ALL, "status_ptr": ALL},
    "_commit_kernel": {"status_ptr": ALL},
}


@dataclass
class Compiled:
    program: Program
    shared: int  # bytes of shared memory
    ptx: str
    request: str  # tests/triton_requests.py: what was asked for
    hits: np.ndarray  # how often a warp executed each instruction


def _run_operator(name: str, device: torch.device, *args) -> None:
    """As `dispatch.serve`, which lets no CPU tensor through to Triton without the interpreter."""
    if dispatch.forced_backend() == "triton":
        dispatch._kernel("triton", name)(*args)
    else:
        dispatch.serve(name, device, *args)


class Launcher:
    """Install it with `with`: every launch of a Triton kernel on CPU tensors is executed, and its findings are kept;
    `use_backend("triton")` serves CPU tensors.

    noise: last places that ex2.approx, div.full and rcp.approx may err by. change_ptx: what is done to every PTX text
    before it is executed.
    """

    def __init__(
        self,
        schedules: Sequence[Schedule] = tuple(SCHEDULES.values()),
        noise: int = 0,
        capability: int = 80,
        change_ptx: Callable[[str], str] = lambda ptx: ptx,
    ):
        self.schedules = schedules
        self.schedules_of: dict[str, Sequence[Schedule]] = {}  # kernels that have others
        self.noise = noise
        self.driver = triton_requests.Driver(capability)
        self.change_ptx = change_ptx
        self.findings = Findings()
        self.programs: dict[tuple, Compiled] = {}
        self.counts: dict[str, Counter] = {}  # of each kernel: native.COUNTS, launches, blocks
        self.seconds = Counter()
        # Storages in which bytes are still undefined: content and marks when last seen. The storage is held, so that
        # nothing else comes to lie there.
        self._undefined: dict[int, tuple[np.ndarray, np.ndarray, torch.UntypedStorage]] = {}

    def __enter__(self) -> Launcher:
        self._replaced = JITFunction.run
        triton.runtime.driver.set_active(self.driver)
        JITFunction.run = lambda function, *args, grid, warmup, **kwargs: self.run(function, args, grid, kwargs)
        self._dispatched = dispatch.set_runner(_run_operator)
        return self

    def __exit__(self, *_):
        JITFunction.run = self._replaced
        dispatch.set_runner(self._dispatched)

    def compiled(self, function: JITFunction, args, kwargs) -> tuple[Compiled, dict]:
        """The program of a launch, and its arguments by name."""
        bound, options, signature, constexprs, attributes = triton_requests.bind(function, args, kwargs)
        asked = triton_requests.request(function, options, signature, constexprs, attributes)
        name = (function.cache_key, asked)
        if name not in self.programs:
            began = time.perf_counter()
            # Written as power_kernels.triton writes them, so that what one has compiled is in the other's cache.
            attributes = {path: found for path, found in sorted(attributes.items()) if found}
            source = function.ASTSource(function, signature, constexprs, attributes)
            kernel = triton.compile(source, target=self.driver.target, options=options.__dict__)
            ptx = self.change_ptx(kernel.asm["ptx"])
            program = lower(parse(ptx))
            hits = np.zeros(len(program.code), np.uint64)
            self.programs[name] = Compiled(program, kernel.metadata.shared, ptx, asked, hits)
            self.seconds["compile"] += time.perf_counter() - began
        return self.programs[name], {n: bound[n] for n in signature if signature[n] != "constexpr"}

    def run(self, function: JITFunction, args, grid, kwargs) -> None:
        compiled, passed = self.compiled(function, args, kwargs)
        began = time.perf_counter()
        if callable(grid):
            grid = grid(passed)
        name = function.fn.__name__
        names, arguments = list(passed), list(passed.values())
        outputs = OUTPUTS.get(name, {})
        result = launch(
            compiled.program,
            grid,
            names,
            arguments,
            compiled.shared,
            self.schedules_of.get(name, self.schedules),
            outputs,
            self._undefined_before,
            self.noise,
        )
        self._remember(arguments, result.left_undefined)
        self.findings.add(result.findings.values())
        compiled.hits += result.hits
        kept = self.counts.setdefault(name, Counter())
        kept.update(result.counts, launches=1, blocks=int(np.prod(grid)))
        self.seconds["run"] += time.perf_counter() - began

    def mark_undefined(self, tensor: torch.Tensor, marks: torch.Tensor) -> None:
        """From now on the marked entries of a contiguous tensor count as never written."""
        storage = tensor.untyped_storage()
        undefined = marks.contiguous().view(-1).repeat_interleave(tensor.element_size()).numpy()
        self._undefined[storage.data_ptr()] = (bytes_of(storage).copy(), undefined, storage)

    def forget_undefined(self) -> None:
        self._undefined.clear()

    def _undefined_before(self, key: int, content: np.ndarray) -> np.ndarray | None:
        before, undefined, _ = self._undefined.get(key, (content, None, None))
        # What something else than a kernel has changed since is defined.
        return undefined & (content == before) if undefined is not None and len(before) == len(content) else None

    def _remember(self, arguments, left_undefined) -> None:
        storages = {a.untyped_storage().data_ptr(): a for a in arguments if isinstance(a, torch.Tensor)}
        self._undefined = {key: kept for key, kept in self._undefined.items() if key in storages}
        for key, undefined in left_undefined.items():
            self._undefined.pop(key, None)
            if undefined.any():
                storage = storages[key].untyped_storage()
                self._undefined[key] = (bytes_of(storage).copy(), undefined, storage)

    def configurations(self) -> tuple[set[str], set[str]]:
        """Names of the configurations listed for the target that were executed, and of those that were not."""
        key = triton_requests.key
        asked = {key(json.loads(compiled.request)) for compiled in self.programs.values()}
        names = triton_requests.listed(self.driver.target.arch)
        ran = {name for line, name in names.items() if key(json.loads(line)) in asked}
        return ran, set(names.values()) - ran
