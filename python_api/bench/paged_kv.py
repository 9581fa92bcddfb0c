"""Paged KV: `block_table_*` over a cycle of proposals, and `kv_copy_blocks`, the copy of the blocks that a cut splits.

A cycle, on R chains whose answers hold `tokens` tokens: every chain forks a proposal at its own cut, which grows to the
full length; every second one is committed and the others are rolled back to nothing. Afterwards each table holds what
it held before, so that a cycle can be repeated. Opponents: the same bookkeeping on the host, Python lists with
reference counts as serving engines keep them, whose tables are then sent to the device; and the price of not sharing:
a copy of every prefix in a contiguous cache (`kv_copy_ranges`, one layer pair of a 7B).

The bytes of a cycle: a fork reads and writes an entry of 4 bytes and a reference count (read and written) a full block
of the prefix; a new block takes one of the free list, a count and an entry; a release the same.

`kv_copy_blocks` reads and writes 2*groups*heads*width*itemsize bytes a position, and 16 a copy. Opponents: a slice copy
per block, an indexed copy, and vLLM's reshape_and_cache_flash from keys and values that were gathered beforehand.
"""

from __future__ import annotations

import torch

import power_kernels as pk
from power_kernels.api.bench.harness import Call, Point, Suite, Workload
from power_kernels.api.bench.kv_cache import MODELS
from power_kernels.api.bench.opponents import add_library, vllm_cache_write

BLOCK = 16  # positions of a block, vLLM's default

TABLES_FORMULA = "12 a shared block (entry read and written, count), 16 a block taken or released, 8 a row and operator"
COPY_FORMULA = "2*groups*heads*width*itemsize*positions + 16*copies: every moved element read and written; the copies"


def cuts(rows: int, tokens: int) -> list[int]:
    """Where the proposals are forked: spread over the answer, nearly all inside a block."""
    return [1 + (tokens - 2) * (2 * r + 1) // (2 * rows) for r in range(rows)]


def tables_bytes(rows: int, tokens: int) -> int:
    """Of one cycle of `rows` chains: fork, extend, commit of every second, rollback of the others."""
    blocks, total = -(-tokens // BLOCK), 0
    for row, cut in enumerate(cuts(rows, tokens)):
        shared = cut // BLOCK
        total += 12 * shared + 16 * (blocks - shared)  # fork and extend
        total += 8 * 4  # the rows' arguments and lengths
        # A committed chain releases its old row and moves the new one; a rolled-back proposal releases its own.
        total += 16 * blocks if row % 2 == 0 else 12 * shared + 16 * (blocks - shared)
    return total


def copy_bytes(groups: int, heads: int, width: int, itemsize: int, positions: int, copies: int) -> int:
    return 2 * groups * heads * width * itemsize * positions + 16 * copies


def tables_points(grid: str, device: str) -> list[Point]:
    if grid == "quick":
        sizes = [(4, 64)]
    elif grid == "default" and device == "cpu":
        sizes = [(1, 512), (16, 512), (64, 3072)]
    else:
        sizes = [(1, 512), (16, 512), (64, 512), (64, 3072), (256, 3072)]
    return [Point("block_table_fork", torch.int32, {"chains": r, "tokens": t}) for r, t in sizes]


class HostPool:
    """Block tables with reference counts in Python lists."""

    def __init__(self, chains: int, tokens: int):
        self.per_row = -(-tokens // BLOCK)
        self.free = list(range(2 * chains * self.per_row))[::-1]
        self.count = [0] * len(self.free)
        self.rows = [[self.take() for _ in range(self.per_row)] for _ in range(chains)]

    def take(self) -> int:
        block = self.free.pop()
        self.count[block] = 1
        return block

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.count[block] -= 1
            if not self.count[block]:
                self.free.append(block)

    def cycle(self, where: list[int]) -> tuple[list[list[int]], list[list[int]]]:
        """(tables of the proposals, copies); afterwards every second chain has its proposal's row."""
        forked, copies = [], []
        for row, cut in zip(self.rows, where, strict=True):
            shared, split = divmod(cut, BLOCK)
            blocks = row[:shared]
            for block in blocks:
                self.count[block] += 1
            blocks += [self.take() for _ in range(self.per_row - shared)]
            copies.append([blocks[shared], row[shared], 0, split])
            forked.append(blocks)
        for i, blocks in enumerate(forked):
            if i % 2 == 0:
                self.release(self.rows[i])
                self.rows[i] = blocks
            else:
                self.release(blocks)
        return forked, copies


def build_tables(point: Point, device: torch.device) -> Workload:
    chains, tokens = point.shape["chains"], point.shape["tokens"]
    per_row = -(-tokens // BLOCK)
    tables = pk.BlockTables.allocate(2 * chains, per_row, 2 * chains * per_row, BLOCK, device)
    where = cuts(chains, tokens)

    def vector(of_chains: list[int], of_proposals: list[int]) -> torch.Tensor:
        return torch.tensor(of_chains + of_proposals, dtype=torch.int32, device=device)

    none = [-1] * chains
    full = [tokens] * chains
    pk.block_table_extend(tables, vector(full, none))
    parent, cut = vector(none, list(range(chains))), vector([0] * chains, where)
    grow = vector(none, full)
    source = vector([chains + i if i % 2 == 0 else -1 for i in range(chains)], none)
    empty = vector(none, [0] * chains)

    def cycle() -> None:
        pk.block_table_fork(tables, parent, cut)
        pk.block_table_extend(tables, grow)
        pk.block_table_commit(tables, source)
        pk.block_table_rollback(tables, empty)

    def check() -> None:
        found = tables.length.tolist()
        if found != full + [0] * chains or int(tables.free_count) != chains * per_row:
            raise RuntimeError(f"the tables do not hold what they held: lengths {found}, free {int(tables.free_count)}")

    pool = HostPool(chains, tokens)

    def host() -> torch.Tensor:
        forked, _ = pool.cycle(where)
        return torch.tensor(forked, dtype=torch.int32).to(device)

    _, heads, width = MODELS["7B"]
    slab = torch.zeros(2, 2, chains, heads, tokens, width, dtype=torch.bfloat16, device=device)
    prefixes = torch.tensor([(i, i, 0, cut) for i, cut in enumerate(where)], dtype=torch.int32, device=device)
    return Workload(
        {
            "block_table_*, a cycle": cycle,
            "lists on the host": host,
            "contiguous, one layer": lambda: pk.kv_copy_ranges(slab[0], slab[1], prefixes),
        },
        ours="block_table_*, a cycle",
        bytes=tables_bytes(chains, tokens),
        count=chains,
        graph=frozenset({"block_table_*, a cycle", "contiguous, one layer"}),
        check=check,
    )


def copy_points(grid: str, device: str) -> list[Point]:
    seven, small = MODELS["7B"], MODELS["135M"]
    if grid == "quick":
        sizes = [(*small, 4)]
    elif grid == "default" and device == "cpu":
        sizes = [(*small, 16), (*seven, 16)]
    else:
        sizes = [(*small, 16), (*seven, 1), (*seven, 16), (*seven, 64)]
    names = ("groups", "heads", "width", "copies")
    return [Point("kv_copy_blocks", torch.bfloat16, dict(zip(names, size, strict=True))) for size in sizes]


def build_copy(point: Point, device: torch.device) -> Workload:
    groups, heads, width, copies = point.shape.values()
    pool = torch.ones(groups, 4 * copies, BLOCK, heads, width, dtype=point.dtype, device=device)  # NHD
    splits = [(2 * i, 2 * copies + i, 0, 1 + (5 * i) % (BLOCK - 1)) for i in range(copies)]
    moved = sum(stop for *_, stop in splits)
    ranges = torch.tensor(splits, dtype=torch.int32, device=device)
    cells = [(to, of, position) for to, of, _, stop in splits for position in range(stop)]
    to_block, from_block, position = torch.tensor(cells, device=device).T.contiguous()

    def slices() -> None:
        for to, of, start, stop in splits:
            pool[:, to, start:stop] = pool[:, of, start:stop]

    def indexed() -> None:
        pool[:, to_block, position] = pool[:, from_block, position]

    work = Workload(
        {
            "kv_copy_blocks": lambda: pk.kv_copy_blocks(pool, ranges),
            "a slice copy per block": slices,
            "an indexed copy": indexed,
        },
        ours="kv_copy_blocks",
        bytes=copy_bytes(groups, heads, width, point.dtype.itemsize, moved, copies),
        count=copies,
        graph=frozenset({"kv_copy_blocks", "a slice copy per block", "an indexed copy"}),
    )

    def vllm(ops) -> Call:
        gathered = pool[:, from_block, position].contiguous()  # [groups, moved, heads, width]
        return vllm_cache_write(ops, gathered, pool, to_block * BLOCK + position)

    add_library(work, "vLLM reshape_and_cache_flash, gathered before", "vllm._custom_ops", vllm, device)
    return work


TABLES = Suite(
    "block_table_fork",
    "Paged KV: fork, extend, commit or rollback",
    "proposals",
    TABLES_FORMULA,
    ("block_table_*, a cycle", "lists on the host"),
    tables_points,
    build_tables,
)
COPY = Suite(
    "kv_copy_blocks",
    "Paged KV: the blocks that a cut splits",
    "copies",
    COPY_FORMULA,
    ("kv_copy_blocks", "a slice copy per block", "an indexed copy"),
    copy_points,
    build_copy,
)
