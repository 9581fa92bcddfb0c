"""Block tables with reference counts, and the copy of split blocks (DESIGN 5.7).

What each operator writes, entry by entry, is `reference/paged_kv.py`; the state is `block_tables.BlockTables`.
Every kernel takes the tables first, all of them: block_table i32 [R, M] with row stride table_row, length i32 [R],
refcount and free_list i32 [N], free_count i32 [1], copies i32 [R, 4], status i32 [R]; then what is asked for, and R,
M and the positions of a block. Bytes: 20 to 30 a row, 12 to 16 an entry of the rows that change.

Blocks are handed out and given back by one program of one warp: in row order, so that the same calls leave the same
tables, and without a race to think about. Rows are looked at BLOCK at a time. Where a row must be worked on by itself
(it releases blocks, or leaves a shared one), the next such row is found by a minimum over those that remain, so that
idle rows cost nothing. Sharing a parent's blocks is order-free and gets a program a row. `kv_copy_blocks` is the kernel
of kv_cache.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..block_tables import BlockStatus
from . import Configuration, kv_cache, launch, split

ROWS = {"BLOCK": 256, "num_warps": 1}
RELEASE = {"BLOCK": 256, "COLUMNS": 128, "num_warps": 1}
SHARE = {"COLUMNS": 128, "num_warps": 1}

_OK = tl.constexpr(int(BlockStatus.OK))
_OUT_OF_BLOCKS = tl.constexpr(int(BlockStatus.OUT_OF_BLOCKS))
_BAD_ROW = tl.constexpr(int(BlockStatus.BAD_ROW))
_BAD_TOKENS = tl.constexpr(int(BlockStatus.BAD_TOKENS))
_NOT_EMPTY = tl.constexpr(int(BlockStatus.NOT_EMPTY))
_EMPTY = tl.constexpr(int(BlockStatus.EMPTY))

_SIZES = ("table_row", "rows", "max_blocks", "block_size")
_POINTERS = (
    "block_table_ptr", "length_ptr", "refcount_ptr", "free_list_ptr", "free_count_ptr", "copies_ptr", "status_ptr",
    "parent_ptr", "tokens_ptr", "source_ptr",
)  # fmt: skip


@triton.jit
def _held(tokens, block_size):
    """Blocks of a row of so many tokens; no sum that could overflow."""
    return tl.where(tokens > 0, (tokens - 1) // block_size + 1, 0)


@triton.jit
def _pick(row, wanted, values):
    """The entry of a vector over rows that belongs to one row."""
    return tl.sum(tl.where(row == wanted, values, 0), 0)


@triton.jit
def _store_copy(copies_ptr, row, to, of, stop, live):
    copies_ptr += row.to(tl.int64) * 4
    tl.store(copies_ptr, to, mask=live)
    tl.store(copies_ptr + 1, of, mask=live)
    tl.store(copies_ptr + 2, 0, mask=live)
    tl.store(copies_ptr + 3, stop, mask=live)


@triton.jit
def _release(blocks_ptr, start, stop, refcount_ptr, free_list_ptr, available, COLUMNS: tl.constexpr):
    """Release entries [start, stop) of one row. Returns how many blocks are free now."""
    for first in range(start, stop, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        live = column < stop
        block = tl.load(blocks_ptr + column, mask=live, other=0)
        left = tl.load(refcount_ptr + block, mask=live, other=0) - 1
        tl.store(refcount_ptr + block, left, mask=live)
        freed = live & (left == 0)
        place = available + tl.cumsum(freed.to(tl.int32), 0) - 1
        tl.store(free_list_ptr + place, block, mask=freed)
        available += tl.sum(freed.to(tl.int32), 0)
    tl.debug_barrier()  # the next row may hold the same blocks
    return available


# ---------------------------------------------------------------------------------------------------------------
# fork


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_POINTERS)
def _fork_kernel(
    block_table_ptr, length_ptr, refcount_ptr, free_list_ptr, free_count_ptr, copies_ptr, status_ptr,
    parent_ptr, tokens_ptr,  # [R] i32
    table_row, rows, max_blocks, block_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Check every fork and hand out the blocks for those whose cut splits one."""
    available = tl.load(free_count_ptr)
    asked = available * 0
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        live = row < rows
        parent = tl.load(parent_ptr + row, mask=live, other=-1)
        tokens = tl.load(tokens_ptr + row, mask=live, other=0)
        own = tl.load(length_ptr + row, mask=live, other=0)
        named = parent >= 0
        known = named & (parent < rows) & (parent != row)
        parent = tl.where(known, parent, 0)
        whole = tl.load(length_ptr + parent, mask=known, other=0)
        status = tl.where((tokens < 0) | (tokens > whole), _BAD_TOKENS, _OK)
        status = tl.where(own != 0, _NOT_EMPTY, status)
        status = tl.where(known, status, _BAD_ROW)
        status = tl.where(named, status, _OK)
        sound = named & (status == _OK)
        full = tl.where(sound, tokens // block_size, 0)
        rest = tl.where(sound, tokens - full * block_size, 0)
        need = (rest > 0).to(tl.int32)
        end = asked + tl.cumsum(need, 0)
        take = (need > 0) & (end <= available)
        status = tl.where((need > 0) & (end > available), _OUT_OF_BLOCKS, status)
        asked += tl.sum(need, 0)
        # The last free block is the first to go.
        to = tl.load(free_list_ptr + available - end, mask=take, other=0)
        of = tl.load(block_table_ptr + parent.to(tl.int64) * table_row + full, mask=take, other=0)
        tl.store(refcount_ptr + to, 1, mask=take)
        _store_copy(copies_ptr, row, to, of, tl.where(take, rest, 0), live)
        tl.store(status_ptr + row, status, mask=live)
    tl.debug_barrier()  # every thread has read the count that changes
    tl.store(free_count_ptr, available - tl.minimum(asked, available))


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_POINTERS)
def _share_kernel(
    block_table_ptr, length_ptr, refcount_ptr, free_list_ptr, free_count_ptr, copies_ptr, status_ptr,
    parent_ptr, tokens_ptr,  # [R] i32
    table_row, rows, max_blocks, block_size,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The table of one row that was forked: its parent's full blocks, counted once more, and the one it was given."""
    row = tl.program_id(0).to(tl.int64)
    parent = tl.load(parent_ptr + row)
    if (parent >= 0) & (tl.load(status_ptr + row) == _OK):
        tokens = tl.load(tokens_ptr + row)
        full = tokens // block_size
        # No other program writes what is read here: a row that is forked into was empty, and has nothing to share.
        source = block_table_ptr + parent.to(tl.int64) * table_row
        target = block_table_ptr + row * table_row
        for first in range(0, full, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            live = column < full
            block = tl.load(source + column, mask=live, other=0)
            tl.store(target + column, block, mask=live)
            tl.atomic_add(refcount_ptr + block, 1, mask=live, sem="relaxed")
        tl.store(target + full, tl.load(copies_ptr + row * 4), mask=tokens > full * block_size)
        tl.store(length_ptr + row, tokens)


# ---------------------------------------------------------------------------------------------------------------
# extend


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_POINTERS)
def _extend_kernel(
    block_table_ptr, length_ptr, refcount_ptr, free_list_ptr, free_count_ptr, copies_ptr, status_ptr,
    tokens_ptr,  # [R] i32
    table_row, rows, max_blocks, block_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Hand out the blocks of every row that grows."""
    available = tl.load(free_count_ptr)
    asked = (available * 0).to(tl.int64)
    taken = available * 0
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        live = row < rows
        tokens = tl.load(tokens_ptr + row, mask=live, other=0)
        old = tl.load(length_ptr + row, mask=live, other=0)
        have = _held(old, block_size)
        want = _held(tokens, block_size)
        grows = live & (tokens > old)
        fits = grows & (want <= max_blocks)
        blocks = block_table_ptr + row.to(tl.int64) * table_row
        rest = tl.where(fits, old % block_size, 0)
        last = tl.load(blocks + have - 1, mask=rest > 0, other=0)
        shared = (rest > 0) & (tl.load(refcount_ptr + last, mask=rest > 0, other=0) > 1)
        # The holders of a block leave it in row order; one that is then alone keeps it.
        leaves = shared
        chosen = tl.min(tl.where(shared, row, rows), 0)
        while chosen < rows:
            block = _pick(row, chosen, last)
            holders = tl.load(refcount_ptr + block)
            tl.debug_barrier()  # every thread has counted the holders before one leaves
            tl.store(refcount_ptr + block, tl.maximum(holders - 1, 1))
            leaves &= (row != chosen) | (holders > 1)
            tl.debug_barrier()
            chosen = tl.min(tl.where(shared & (row > chosen), row, rows), 0)
        begin = have - leaves.to(tl.int32)
        need = tl.where(fits, want - begin, 0)
        end = asked + tl.cumsum(need.to(tl.int64), 0)
        served = fits & ((need == 0) | (end <= available))
        asked += tl.sum(need.to(tl.int64), 0)
        # A row that finds no block stays where it was, and then one that counted on its leaving is not alone.
        tl.atomic_add(refcount_ptr + last, 1, mask=leaves & (served == 0), sem="relaxed")
        tl.debug_barrier()
        stays = shared & (leaves == 0)
        served &= (tl.load(refcount_ptr + last, mask=stays, other=0) > 1) == 0
        place = (available - end).to(tl.int32) + need  # one beyond the first block that this row takes
        copied = served & leaves
        to = tl.load(free_list_ptr + place - 1, mask=copied, other=0)
        _store_copy(copies_ptr, row, to, tl.where(copied, last, 0), tl.where(copied, rest, 0), live)
        most = tl.max(tl.where(served, need, 0), 0)
        for i in range(0, most):
            take = served & (i < need)
            block = tl.load(free_list_ptr + place - 1 - i, mask=take, other=0)
            tl.store(blocks + begin + i, block, mask=take)
            tl.store(refcount_ptr + block, 1, mask=take)
        tl.store(length_ptr + row, tokens, mask=served)
        status = tl.where(fits, _OUT_OF_BLOCKS, _BAD_TOKENS)
        tl.store(status_ptr + row, tl.where(grows & (served == 0), status, _OK), mask=live)
        tl.debug_barrier()  # the next rows may hold the same blocks
        taken = tl.maximum(taken, tl.max(tl.where(served & (need > 0), end, 0), 0).to(tl.int32))
    tl.store(free_count_ptr, available - taken)


# ---------------------------------------------------------------------------------------------------------------
# commit


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_POINTERS)
def _commit_kernel(
    block_table_ptr, length_ptr, refcount_ptr, free_list_ptr, free_count_ptr, copies_ptr, status_ptr,
    source_ptr,  # [R] i32
    table_row, rows, max_blocks, block_size,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Release the blocks of each row that takes another, and move that one's entries over."""
    available = tl.load(free_count_ptr)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        live = row < rows
        source = tl.load(source_ptr + row, mask=live, other=-1)
        named = source >= 0
        known = named & (source < rows) & (source != row)
        moves = known & (tl.load(source_ptr + tl.where(known, source, 0), mask=known, other=0) < 0)
        tl.store(status_ptr + row, tl.where(named & (moves == 0), _BAD_ROW, _OK), mask=live)
        tl.debug_barrier()
        chosen = tl.min(tl.where(moves, row, rows), 0)
        while chosen < rows:
            taken = _pick(row, chosen, source)
            tokens = tl.load(length_ptr + taken)
            if tokens > 0:
                target = block_table_ptr + chosen.to(tl.int64) * table_row
                held = _held(tl.load(length_ptr + chosen), block_size)
                available = _release(target, 0, held, refcount_ptr, free_list_ptr, available, COLUMNS)
                entries = block_table_ptr + taken.to(tl.int64) * table_row
                count = _held(tokens, block_size)
                for start in range(0, count, COLUMNS):
                    column = start + tl.arange(0, COLUMNS)
                    block = tl.load(entries + column, mask=column < count, other=0)
                    tl.store(target + column, block, mask=column < count)
                tl.store(length_ptr + chosen, tokens)
                tl.store(length_ptr + taken, 0)
            else:
                tl.store(status_ptr + chosen, _EMPTY)
            tl.debug_barrier()
            chosen = tl.min(tl.where(moves & (row > chosen), row, rows), 0)
    tl.store(free_count_ptr, available)


# ---------------------------------------------------------------------------------------------------------------
# rollback


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_POINTERS)
def _rollback_kernel(
    block_table_ptr, length_ptr, refcount_ptr, free_list_ptr, free_count_ptr, copies_ptr, status_ptr,
    tokens_ptr,  # [R] i32
    table_row, rows, max_blocks, block_size,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Shorten rows, and release the blocks that lie beyond."""
    available = tl.load(free_count_ptr)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        live = row < rows
        tokens = tl.load(tokens_ptr + row, mask=live, other=-1)
        old = tl.load(length_ptr + row, mask=live, other=0)
        cut = (tokens >= 0) & (tokens < old)
        keep = _held(tokens, block_size)
        have = _held(old, block_size)
        tl.store(length_ptr + row, tokens, mask=cut)
        cut &= keep < have
        chosen = tl.min(tl.where(cut, row, rows), 0)
        while chosen < rows:
            blocks = block_table_ptr + chosen.to(tl.int64) * table_row
            start = _pick(row, chosen, keep)
            stop = _pick(row, chosen, have)
            available = _release(blocks, start, stop, refcount_ptr, free_list_ptr, available, COLUMNS)
            chosen = tl.min(tl.where(cut & (row > chosen), row, rows), 0)
    tl.debug_barrier()  # every thread has read the count that changes
    tl.store(free_count_ptr, available)


# ---------------------------------------------------------------------------------------------------------------
# launchers: no synchronisation, no allocation


def _launch(kernel, programs: int, arguments: tuple, meta: dict[str, int]) -> None:
    """arguments: an operator's, the tensors of its tables first and block_size last."""
    *tensors, block_size = arguments
    block_table = tensors[0]
    launch(
        kernel,
        (programs,),
        block_table.device,
        *tensors,
        block_table.stride(0),
        *block_table.shape,
        block_size,
        **meta,
    )


def _one(arguments: tuple) -> int:
    """Programs of a kernel that looks at all rows itself: none for no rows."""
    return min(len(arguments[0]), 1)


def block_table_fork(*arguments) -> None:
    """Tables, parent, tokens, block_size. See `power_kernels.block_table_fork`. Two launches."""
    _launch(_fork_kernel, _one(arguments), arguments, ROWS)
    _launch(_share_kernel, len(arguments[0]), arguments, SHARE)


def block_table_extend(*arguments) -> None:
    """Tables, tokens, block_size. See `power_kernels.block_table_extend`. One launch."""
    _launch(_extend_kernel, _one(arguments), arguments, ROWS)


def block_table_commit(*arguments) -> None:
    """Tables, source, block_size. See `power_kernels.block_table_commit`. One launch."""
    _launch(_commit_kernel, _one(arguments), arguments, RELEASE)


def block_table_rollback(*arguments) -> None:
    """Tables, tokens, block_size. See `power_kernels.block_table_rollback`. One launch."""
    _launch(_rollback_kernel, _one(arguments), arguments, RELEASE)


def kv_copy_blocks(pool: torch.Tensor, copies: torch.Tensor) -> None:
    """pool [G, N, heads, block_size, D]. See `power_kernels.kv_copy_blocks`. One launch."""
    kv_cache.kv_copy_ranges(pool, pool, copies)


def configurations() -> list[Configuration]:
    """One of each kernel: no size is a compile-time constant."""
    found = []
    for name, kernel, meta in (
        ("fork", _fork_kernel, ROWS),
        ("share", _share_kernel, SHARE),
        ("extend", _extend_kernel, ROWS),
        ("commit", _commit_kernel, RELEASE),
        ("rollback", _rollback_kernel, RELEASE),
    ):
        constexprs, warps = split(meta)
        pointers = [argument for argument in kernel.arg_names if argument.endswith("_ptr")]
        found.append(
            Configuration(
                name=f"block_table_{name}",
                kernel=kernel,
                signature={**dict.fromkeys(pointers, "*i32"), **dict.fromkeys(_SIZES, "i32")},
                constexprs=constexprs,
                num_warps=warps,
            )
        )
    return found
