"""Paged KV: block_table_fork, _extend, _commit, _rollback and the copy of the blocks that a cut splits (DESIGN 5.7).

A proposal is a row of its own that shares its chain's past:

    fork      the proposal takes the first `tokens` tokens of its chain: full blocks shared, the split one copied
    extend    room for tokens to come, in blocks that no other row holds
    commit    the chain's row becomes the proposal's, its old blocks are released
    rollback  the proposal goes back to `tokens` tokens, 0 to give everything back

fork and extend name the block copies that the cache needs in `tables.copies`: run `kv_copy_blocks` right after each,
before anything else is written. Every operator works on all rows in one call, in place, and decides on the device;
the tables that come out are the same on every backend.
"""

from __future__ import annotations

import torch

from ..block_tables import BlockTables
from ..errors import ArgumentError, ArgumentTypeError
from .checks import check_rows, check_tensor, check_vectors
from .dispatch import define_kernel, run


def block_table_fork(tables: BlockTables, parent: torch.Tensor, tokens: torch.Tensor) -> None:
    """Give empty rows the beginning of other rows (DESIGN 5.7).

    parent, tokens: int32 [R]. Row r with parent[r] >= 0 takes the first tokens[r] tokens of row parent[r]: it shares
    the tokens[r] // block_size full blocks, and takes a block of its own for the tokens[r] % block_size positions
    that remain, whose copy is in `tables.copies[r]` (for every other row the copy is empty). parent[r] < 0 leaves row
    r alone. All forks start from the rows as they were before the call; blocks are handed out in the order of rows,
    and once a row finds none left, those after it that need one find none either.
    Writes `tables.status`, a BlockStatus a row: OUT_OF_BLOCKS, and on a device also BAD_ROW, NOT_EMPTY and BAD_TOKENS,
    change nothing for their row. Two launches, no allocation, no wait for the device.
    Errors: as `sample_tokens`; on a host ArgumentError also for a parent outside the table or the row itself, tokens
    outside [0, length[parent[r]]], or a row that is not empty.
    """
    rows = _check(tables, parent=parent, tokens=tokens)
    if _on_host(tables):
        length = tables.length.tolist()
        for r, (p, n) in enumerate(zip(parent.tolist(), tokens.tolist(), strict=True)):
            if p < 0:
                continue
            if p >= rows or p == r:
                raise ArgumentError(f"parent[{r}] is {p}; it must be another row of [0, {rows}), or negative for none")
            if length[r]:
                raise ArgumentError(f"row {r} holds {length[r]} tokens; a row to fork into must be empty")
            if not 0 <= n <= length[p]:
                raise ArgumentError(f"tokens[{r}] is {n}; it must lie in [0, {length[p]}], what row {p} holds")
    _run("block_table_fork", tables, parent, tokens)


def block_table_extend(tables: BlockTables, tokens: torch.Tensor) -> None:
    """Make room: row r grows to tokens[r] tokens, in blocks that no other row holds (DESIGN 5.7).

    tokens: int32 [R]; a row that has as many, or a negative number, is left alone. Afterwards positions
    [old length, tokens[r]) may be written. Where the old length lies inside a block that other rows hold too (after a
    rollback), the row takes a block of its own instead, and `tables.copies[r]` names what it must copy; for every
    other row the copy is empty. Rows are served in order: the last holder of a block that the others have left keeps
    it, and once a row does not fit, those after it that need a block do not either.
    Writes `tables.status`, a BlockStatus a row: OUT_OF_BLOCKS, and on a device also BAD_TOKENS, change nothing for
    their row. One launch, no allocation, no wait for the device.
    Errors: as `sample_tokens`; on a host ArgumentError also for more tokens than M blocks hold.
    """
    _check(tables, tokens=tokens)
    most = tables.block_table.shape[1] * tables.block_size
    if _on_host(tables):
        for r, n in enumerate(tokens.tolist()):
            if n > most:
                raise ArgumentError(f"tokens[{r}] is {n}; a row of the table has room for {most}")
    _run("block_table_extend", tables, tokens)


def block_table_commit(tables: BlockTables, source: torch.Tensor) -> None:
    """Rows become other rows, which end empty (DESIGN 5.7).

    source: int32 [R]. Row r with source[r] >= 0 releases its blocks (those that no row holds any more become free)
    and takes all of row source[r], which is empty afterwards. source[r] < 0 leaves row r alone. Nothing is copied and
    no block is needed.
    Writes `tables.status`, a BlockStatus a row: on a device BAD_ROW and EMPTY change nothing for their row; of two
    rows that name one source the later is EMPTY. One launch, no allocation, no wait for the device.
    Errors: as `sample_tokens`; on a host ArgumentError also for a source outside the table, the row itself, a row that
    takes another in this call, one that is empty or named twice.
    """
    rows = _check(tables, source=source)
    if _on_host(tables):
        length, sources = tables.length.tolist(), source.tolist()
        taken: dict[int, int] = {}
        for r, s in enumerate(sources):
            if s < 0:
                continue
            if s >= rows or s == r:
                raise ArgumentError(f"source[{r}] is {s}; it must be another row of [0, {rows}), or negative for none")
            if sources[s] >= 0:
                raise ArgumentError(f"source[{r}] is {s}; row {s} takes row {sources[s]} in the same call")
            if s in taken:
                raise ArgumentError(f"source[{r}] is {s}; row {taken[s]} takes it in the same call")
            if length[s] == 0:
                raise ArgumentError(f"source[{r}] is {s}; row {s} holds no tokens")
            taken[s] = r
    _run("block_table_commit", tables, source)


def block_table_rollback(tables: BlockTables, tokens: torch.Tensor) -> None:
    """Cut rows back to their first tokens[r] tokens (DESIGN 5.7).

    tokens: int32 [R]; a row that has no more, or a negative number, is left alone; 0 empties the row. Blocks beyond
    are released, and become free when no row holds them any more. Any number is allowed, so there is nothing to
    report. One launch, no allocation, no wait for the device. Errors: as `sample_tokens`.
    """
    _check(tables, tokens=tokens)
    _run("block_table_rollback", tables, tokens)


LAYOUTS = ("NHD", "HND")


def kv_copy_blocks(pool: torch.Tensor, copies: torch.Tensor, layout: str = "NHD") -> None:
    """Copy the beginnings of blocks to other blocks of the same pool, for all layers in one launch (DESIGN 5.7).

    pool: [G, N, block_size, heads, D] (layout "NHD") or [G, N, heads, block_size, D] ("HND"), G = K and V of any
    number of layers, any dtype, unit inner stride, any other strides. A layer's cache of the shape
    [2, N, block_size, heads, D] is a pool; one of [N, 2, block_size, heads, D] is one after `.transpose(0, 1)`.
    copies: int32 [C, 4], as `BlockTables.copies`: rows (block to write, block to read, start, stop), positions of a
    block; stop <= start copies nothing. No block may be written by two copies, or written by one and read by another:
    that is not checked. A copy outside the pool raises ArgumentError on the CPU and is skipped on a device.
    Errors: as `sample_tokens`, and ArgumentError for another layout.
    """
    if layout not in LAYOUTS:
        raise ArgumentError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
    check_tensor("pool", pool, shape=(None,) * 5)
    check_vectors(pool, copies=(copies, torch.int32, (None, 4)))
    check_rows("pool", pool)
    slab = pool if layout == "HND" else pool.transpose(2, 3)
    if _is_host(copies):
        blocks, positions = slab.shape[1], slab.shape[3]
        for i, (to, of, start, stop) in enumerate(copies.tolist()):
            inside = 0 <= to < blocks and 0 <= of < blocks and start >= 0 and stop <= positions
            if start < stop and not inside:
                raise ArgumentError(
                    f"copies[{i}] is {[to, of, start, stop]}; blocks must lie in [0, {blocks}), positions in "
                    f"[0, {positions}]"
                )
    run("kv_copy_blocks", pool.device, slab, copies)


def _is_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _on_host(tables: BlockTables) -> bool:
    return _is_host(tables.block_table)


def _check(tables: BlockTables, **vectors: torch.Tensor) -> int:
    """Check the state and further int32 [R] arguments. Returns R."""
    if not isinstance(tables, BlockTables):
        raise ArgumentTypeError(f"tables is a {type(tables).__name__}; it must be a BlockTables")
    table, int32 = tables.block_table, torch.int32
    check_tensor("block_table", table, dtypes=(int32,), shape=(None, None))
    check_rows("block_table", table)
    rows = table.shape[0]
    check_vectors(table, length=(tables.length, int32, (rows,)), refcount=(tables.refcount, int32, (None,)))
    check_vectors(
        table,
        free_list=(tables.free_list, int32, (tables.refcount.shape[0],)),
        free_count=(tables.free_count, int32, (1,)),
        copies=(tables.copies, int32, (rows, 4)),
        status=(tables.status, int32, (rows,)),
        **{name: (value, int32, (rows,)) for name, value in vectors.items()},
    )
    return rows


def _run(name: str, tables: BlockTables, *vectors: torch.Tensor) -> None:
    run(name, tables.block_table.device, *tables.tensors(), *vectors, tables.block_size)


_TABLES = (
    "Tensor(a!) block_table, Tensor(b!) length, Tensor(c!) refcount, Tensor(d!) free_list, Tensor(e!) free_count, "
    "Tensor(f!) copies, Tensor(g!) status"
)
for _name, _vectors in (
    ("block_table_fork", "Tensor parent, Tensor tokens"),
    ("block_table_extend", "Tensor tokens"),
    ("block_table_commit", "Tensor source"),
    ("block_table_rollback", "Tensor tokens"),
):
    define_kernel(_name, "paged_kv", f"({_TABLES}, {_vectors}, int block_size) -> ()")
define_kernel("kv_copy_blocks", "paged_kv", "(Tensor(a!) pool, Tensor copies) -> ()")
