"""The state of a paged KV cache that the `block_table_*` operators read and write (DESIGN 5.7), as plain tensors.

Keys and values lie in a pool of N blocks of `block_size` positions; row r of `block_table` names the blocks that hold
sequence r in order. Rows may share blocks. What holds between any two operators, and what they keep so:

- row r, of length[r] tokens, holds its first ceil(length[r] / block_size) entries; the others mean nothing;
- refcount[b] is the number of rows that hold block b, which they all hold at the same place;
- free_list[:free_count] names each block that is free, refcount 0, once; the last one is handed out first.

A block that is neither free nor in a row belongs to somebody else (a null block, another cache) and is never touched.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import torch

from .errors import ArgumentError, ArgumentTypeError

_INT32_MAX = 2**31 - 1


class BlockStatus(IntEnum):
    """Entries of `BlockTables.status`: what became of each row. Any but OK: nothing changed for that row.

    Only OUT_OF_BLOCKS is met on a host, where the others raise instead.
    """

    OK = 0  # done, or nothing was asked
    OUT_OF_BLOCKS = 1  # no free block is left for this row
    BAD_ROW = 2  # the row named as parent or source is out of range, the row itself, or itself a target of this commit
    BAD_TOKENS = 3  # more tokens than the parent has, or than a row of the table has room for
    NOT_EMPTY = 4  # the row to be forked into holds blocks
    EMPTY = 5  # the row to be committed holds nothing


@dataclass
class BlockTables:
    """Every tensor of the `block_table_*` operators, in the order of their schemas: R rows of at most M blocks.

    All are int32 on one device; block_table has unit inner stride, the others are contiguous. block_size: positions of
    a block, at least 1. Raises ArgumentError or ArgumentTypeError for another block_size.
    """

    block_table: torch.Tensor  # i32 [R, M]
    length: torch.Tensor  # i32 [R], tokens
    refcount: torch.Tensor  # i32 [N]
    free_list: torch.Tensor  # i32 [N], the first free_count entries
    free_count: torch.Tensor  # i32 [1]
    copies: torch.Tensor  # i32 [R, 4]: (block to write, block to read, 0, positions), what `kv_copy_blocks` has to do
    status: torch.Tensor  # i32 [R], a BlockStatus
    block_size: int

    def __post_init__(self) -> None:
        # The kernels divide by it and do not look at it.
        _check_count("block_size", self.block_size)

    @staticmethod
    def allocate(
        rows: int, max_blocks: int, num_blocks: int, block_size: int, device: torch.device | str = "cpu"
    ) -> BlockTables:
        """Empty rows and a pool of free blocks, of which block 0 is handed out first. Raises as BlockTables does."""
        for name, value in (("rows", rows), ("max_blocks", max_blocks), ("num_blocks", num_blocks)):
            _check_count(name, value)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return BlockTables(
            block_table=zeros(rows, max_blocks),
            length=zeros(rows),
            refcount=zeros(num_blocks),
            free_list=torch.arange(num_blocks - 1, -1, -1, dtype=torch.int32, device=device),
            free_count=torch.full((1,), num_blocks, dtype=torch.int32, device=device),
            copies=zeros(rows, 4),
            status=zeros(rows),
            block_size=block_size,
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self) if f.name != "block_size")


def _check_count(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be an int")
    if not 1 <= value <= _INT32_MAX:
        raise ArgumentError(f"{name} is {value}; it must lie in [1, {_INT32_MAX}]")
