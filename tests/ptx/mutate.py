"""Takes out every barrier and every wait of the shipped kernels, one at a time: the checker must notice.

    python -m tests.ptx.mutate [WORD ...]       cases whose names contain a word

Each barrier of each compiled configuration must be reached, and its absence noticed, in one of its cases, or NEEDLESS
says why it guards nothing.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["POWER_KERNELS_TEST_DEVICE"] = "cpu"

import torch

import power_kernels as pk
from power_kernels import reference
from power_kernels.law import Law
from power_kernels.state import ChainField, ChainState, Mode
from power_kernels.triton import chain, lm_head, sampling, scoring
from tests import long_answers
from tests import test_triton_kernels as kernels
from tests import test_triton_lm_head as heads
from tests.op_helpers import stop_table
from tests.ptx.launcher import Compiled, Launcher
from tests.ptx.machine import SCHEDULES

BARRIER = r"bar\.sync"
WAIT = rf"{BARRIER}|cp\.async\.wait_group|wgmma\.wait_group"
# What happens before what is decided by barriers, not by the order that was run: one schedule shows most.
WARPS = ("in order",)
LANES = (*WARPS, "independent lanes")  # where the barriers of one warp order its lanes


@dataclass(frozen=True)
class Case:
    kernel: str
    work: Callable[[], None]
    schedules: tuple[str, ...] = WARPS
    pattern: str = BARRIER
    capability: int = 80


# ---- what the kernels are given to do: every barrier must be reached, and matter


def finish(dtype, vocabulary, pad):
    def work():
        logits = kernels.make_logits(2, vocabulary, dtype, seed=4, pad=pad)
        logits[0, 7] = 20.0
        kernels.sample(sampling, logits, 4.0, 2.5, kernels.make_counters(2), [7, -1])
        width, tiles = sampling.vector_width(logits), sampling.tile_count(vocabulary)
        lose(logits[:1], width, tiles, sampling.tiles_block(vocabulary), sampling.FINISH)

    return work


def lose(logits, width: int, tiles: int, tiles_block: int, constants: dict) -> None:
    """Finish from records whose masses no uniform reaches, as rounding could make them: one is infinite. In the first
    tile it leaves no tile above the uniform, in the last no entry of that tile."""
    one, floats = torch.ones(1), [torch.empty(1) for _ in range(3)]
    for infinite in (0, -1):
        records = torch.ones(4, tiles)
        records[0] = logits.float().max()
        records[2, infinite] = float("inf")
        sampling.finish_out(
            logits, one, one, torch.tensor([7]), kernels.make_counters(1), None, records.view(-1),
            torch.empty(1, dtype=torch.int64), *floats, None, torch.empty(1, dtype=torch.int32), width=width,
            tiles=tiles, tiles_block=tiles_block, constants=constants,
        )  # fmt: skip


def score(dtype, vocabulary):
    def work():
        kernels.score(scoring, kernels.make_logits(2, vocabulary, dtype, seed=4), [3, 5], 4.0, 2.5)

    return work


def head(dtype, scored: bool, pad: int = 0):
    def work():
        for width in (330, 362):  # the loop over D ends in either of its buffers
            hidden, weights = heads.make(3, width, 300, dtype, pad)
            if scored:
                heads.score(hidden, weights, [3, 5, 299])
            else:
                heads.sample(hidden, weights)

    return work


def head_finish():
    head(F32, False)()
    hidden, weights = heads.make(3, 330, 300)
    heads.sample(hidden, weights, exclude=[3, -1, 299])
    lose(torch.randn(1, 300), 1, 2, lm_head.tiles_block(300), lm_head.FINISH)


def advance(lanes: int, *laws: Law, launches: int = 60):
    """Chains on samples that no model would give, replaced as they end; often lanes keep the token they leave out."""

    def work():
        for law in laws:
            g = torch.Generator().manual_seed(lanes)
            state = ChainState.allocate(2, lanes, law)
            fixed = torch.tensor(reference.length_table(law)), torch.tensor([7]), torch.tensor([49, 1000])
            fixed = (*fixed, stop_table(law, 50))
            for _ in range(launches):
                for slot in range(2):
                    if int(state.field[slot, ChainField.MODE]) in (Mode.IDLE, Mode.DONE, Mode.FAULT):
                        state.admit(slot, [3] * (7 + slot), chain_id=5, prompt_id=9)
                token, *rest = kernels.random_samples(state, g, 49, hostile=0.01)
                if torch.rand((), generator=g) < 0.5:
                    token = torch.where(state.exclude >= 0, state.exclude, token)
                chain.mh_advance(*state.tensors(), *fixed, token, *rest, *law.constants())

    return work


def long_advance(name: str):
    """Launches of every kind on answers that several warps and blocks hold."""
    launches = []

    def work():
        launches.extend(() if launches else long_answers.telling(name, 1))
        for launch in launches:
            state = long_answers.copied(launch.before)
            law, length_term, seed, eos, *drawn, stop_next = launch.arguments
            fixed = (length_term, seed, eos, stop_table(law, 0) if stop_next is None else stop_next)
            chain.mh_advance(*state.tensors(), *fixed, *drawn, *law.constants())

    return work


BLOCK_TABLE_TESTS = (
    "test_rows_that_go_on_inside_a_shared_block_leave_it_in_order_and_the_last_holder_keeps_it",
    "test_a_row_keeps_a_shared_block_only_if_the_others_could_leave_it",
    "test_a_row_out_of_blocks_leaves_the_shared_block_it_could_not_copy",
    "test_a_commit_swaps_without_a_copy_and_frees_what_only_the_old_answer_held",
    "test_more_rows_and_longer_rows_than_one_pass_of_a_kernel",
    "test_a_fork_shares_full_blocks_and_copies_the_split_one",
    "test_every_backend_writes_what_the_reference_writes",
    "test_a_rollback_keeps_the_prefix_to_the_token",
)


def blocks():
    """The package's own tests of block tables; an assertion that fails is what a changed kernel may do. And what they
    lack: rows that find nothing to take over, and a block held by rows of one pass of 256 and of the next."""
    from tests import test_paged_kv as tests
    from tests.test_paged_kv import BlockTables, int32, kernel

    tables = BlockTables.allocate(rows=4, max_blocks=4, num_blocks=16, block_size=4)
    kernel("triton", "block_table_extend", tables, int32([5, 6, 7, 0]))
    kernel("triton", "block_table_commit", tables, int32([2, 2, -1, 2]))

    rows, shared = 300, 40
    tables = BlockTables.allocate(rows, max_blocks=2, num_blocks=700, block_size=4)
    first = torch.arange(rows, dtype=torch.int32)
    first[256 : 256 + shared] = torch.arange(shared).roll(20)  # another lane's
    tables.block_table[:, 0] = first
    tables.length.fill_(2)
    tables.refcount.copy_(torch.bincount(first, minlength=700))
    free = torch.nonzero(tables.refcount == 0)[:, 0]
    tables.free_list[: len(free)] = free
    tables.free_count.fill_(len(free))
    kernel("triton", "block_table_extend", tables, torch.full((rows,), 6, dtype=torch.int32))

    for name in BLOCK_TABLE_TESTS:
        test = getattr(tests, name)
        with suppress(AssertionError):
            getattr(test, "__wrapped__", test)("triton")


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = {
    **{
        f"finish {str(dtype)[6:]} {vocabulary}+{pad}": Case("_finish_kernel", finish(dtype, vocabulary, pad))
        for dtype in (F32, F16, BF16)
        for vocabulary, pad in ((3000, 0), (3001, 2))
    },
    **{f"score {str(dtype)[6:]}": Case("_score_kernel", score(dtype, 3000)) for dtype in (F32, F16, BF16)},
    **{
        f"head sm_{capability} {str(dtype)[6:]} {'score' if scored else 'sample'} pad {pad}": Case(
            "_head_kernel", head(dtype, scored, pad), ("in order",), WAIT, capability
        )
        for capability in (80, 90)
        for dtype, pad in ((F32, 0), (F16, 0), (F16, 3), (BF16, 0))
        for scored in (False, True)
    },
    "head_given": Case("_score_kernel", head(F32, True)),
    "head_finish": Case("_finish_kernel", head_finish),
    "advance, one lane": Case(
        "_mh_advance_kernel",
        advance(1, Law(12, 4, 3), Law(5, 1, 0, final_steps=6), Law(12, 4, 3, cut="divergence")),
    ),
    "advance, three lanes": Case(
        "_mh_advance_kernel",
        advance(3, Law(12, 4, 3, final_steps=3), Law(12, 4, 6, cut="divergence"), Law(8, 8, 5, free_prefix=False)),
    ),
    "advance, sixteen lanes": Case(
        "_mh_advance_kernel", advance(16, Law(12, 4, 6, early_rejection=False), Law(12, 4, 6, cut="divergence"))
    ),
    **{f"advance, long: {name}": Case("_mh_advance_kernel", long_advance(name)) for name in long_answers.CASES},
    **{
        f"block_table {name}": Case(f"_{name}_kernel", blocks, LANES)
        for name in ("fork", "extend", "commit", "rollback")
    },
}


# ---- mutants

# (kernel, opcode, Python line) -> at most how many barriers of that line guard nothing, and why.
NEEDLESS = {
    ("_head_kernel", "bar.sync", "h = tl.load(hidden, mask=inside & live[:, None], other=0.0)"): (
        4,
        "fp32, ahead of the loop: nobody has read the second stage's buffers, which are filled behind it",
    ),
    ("_head_kernel", "bar.sync", "for start in range(0, D * VEC, BLOCK_K):"): (
        2,
        "fp32 on sm_90, behind the loop: all reads are ordered by the loop's own barriers, and each warp writes next "
        "only where its own last copies have landed, which all its threads have waited for",
    ),
    ("_extend_kernel", "bar.sync", "tl.debug_barrier()  # the next rows may hold the same blocks"): (
        1,
        "the minimum at the head of the next pass, which Triton does not promise, has barriers before anything is "
        "written; what was read behind the last atomic operation is ordered by them",
    ),
}


@dataclass
class Place:
    """One barrier or wait of one compiled configuration, over all cases that execute it."""

    kernel: str
    opcode: str
    line: str  # the Python line of the kernel that it comes from, as text
    where: str  # file:line, from the innermost function out
    at: int  # in the PTX text
    pc: int
    reached: bool = False
    caught: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.opcode, self.line

    @property
    def needless(self) -> bool:
        return self.reached and not self.caught and self.key in NEEDLESS

    def problem(self) -> str | None:
        if self.caught or self.needless:
            return None
        found = "taken out, and nothing was found" if self.reached else "not reached"
        return f"{self.kernel}, {self.opcode} at {self.where}: {self.line}: {found}"


def places(compiled: Compiled, pattern: str) -> list[Place]:
    kernel = compiled.program.kernel
    texts = [m.start() for m in re.finditer(rf"^\t(?:{pattern})", compiled.ptx, re.M)]
    numbers = [pc for pc, s in enumerate(kernel.statements) if re.match(pattern, s.opcode)]
    found = []
    for at, pc in zip(texts, numbers, strict=True):
        number, line, _ = kernel.statements[pc].where[-1]
        text = Path(kernel.files[number]).read_text().splitlines()[line - 1].strip()
        found.append(Place(kernel.name, kernel.statements[pc].opcode, text, kernel.source(pc), at, pc))
    return found


def faults(launcher: Launcher, kernel: str) -> dict:
    return {f.key: f for f in launcher.findings.faults() if f.kernel == kernel}


class Noticed(BaseException):
    """Enough was seen; no test may take it for a failure of its own."""


class Watched(Launcher):
    """Stops at the first fault of a kernel that is not among those known. known: None to go on in any case."""

    def __init__(self, case: Case, known=None, **options):
        super().__init__([SCHEDULES[s] for s in case.schedules], capability=case.capability, **options)
        self.kernel, self.known = case.kernel, known

    def run(self, function, args, grid, kwargs):
        super().run(function, args, grid, kwargs)
        if self.known is not None and faults(self, self.kernel).keys() - self.known:
            raise Noticed


def executed(case: Case, **options) -> Launcher:
    launcher = Watched(case, **options)
    with suppress(Noticed), launcher, pk.use_backend("triton"):
        case.work()
    return launcher


def run_case(case: Case, known: dict[tuple[str, int], Place]) -> tuple[int, list[str]]:
    """Mutants that were made, and what is found in the kernel as it is. known: places by PTX text and statement."""
    whole = executed(case)
    before, tried = faults(whole, case.kernel), 0
    for compiled in whole.programs.values():
        if compiled.program.kernel.name != case.kernel:
            continue
        for fresh in places(compiled, case.pattern):
            place = known.setdefault((compiled.ptx, fresh.pc), fresh)
            if place.caught or not compiled.hits[place.pc]:
                continue
            place.reached = True

            def without(ptx, at=place.at, text=compiled.ptx):
                return ptx[:at] + ptx[ptx.index("\n", at) :] if ptx == text else ptx

            mutant = executed(case, known=before.keys(), change_ptx=without)
            place.caught = bool(faults(mutant, case.kernel).keys() - before.keys())
            tried += 1
    return tried, [f"in the kernel as it is: {f}" for f in before.values()]


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    known: dict[tuple[str, int], Place] = {}
    problems = []
    for name, case in CASES.items():
        if all(word in name for word in words):
            began = time.perf_counter()
            tried, found = run_case(case, known)
            problems += found
            print(f"{name}: {tried} mutants, {time.perf_counter() - began:.0f} s", flush=True)
    problems += [problem for place in known.values() if (problem := place.problem())]
    for key, (most, reason) in NEEDLESS.items():
        many = sum(place.needless for place in known.values() if place.key == key)
        if many:
            print(f"{', '.join(key)}: {many} guard nothing. {reason}")
        if many > most:
            problems.append(f"{', '.join(key)}: {many} guard nothing, not {most}")
    caught, needless = (sum(getattr(place, what) for place in known.values()) for what in ("caught", "needless"))
    print(*problems, sep="\n")
    print(
        f"{caught} of {len(known)} barriers and waits are noticed when taken out, {needless} guard nothing; "
        f"{len(problems)} problems"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
