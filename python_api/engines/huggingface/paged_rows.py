"""Rows of keys and values in blocks that they share: the `block_table_*` operators with what belongs to them.

A pool of blocks, the table whose rows name them, and the copies that a fork or an extension asks for. The tables live
on the device and nobody waits for them, but where the pool is smaller than rows that share nothing could need: then
every row must be seen to have found its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

import power_kernels as pk


class OutOfBlocksError(RuntimeError):
    """The pool has too few blocks for this run."""


@dataclass(frozen=True)
class KvShape:
    """Keys and values of a position: in each layer, 2 * heads * head_dim numbers."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize


@dataclass
class PagedCounts:
    """What a run moved, in tokens of KV (all layers), and the blocks it held. token_bytes: bytes of one token's KV."""

    shared: torch.Tensor  # i64: taken over by forks without a copy
    copied: torch.Tensor  # i64: copied by `kv_copy_blocks`
    slab_copied: torch.Tensor  # i64: what copies between rows of their own would have moved
    peak_blocks: torch.Tensor  # i64: most blocks in use at once
    block_size: int
    token_bytes: int
    slab_tokens: int  # positions that rows of their own would have reserved


class PagedRows:
    """rows: of the table, all empty at first. max_length: the most positions of a row. num_blocks: blocks of the pool;
    None for as many as rows that share nothing could need, so that none can be missing.

    Where vectors int32 [R] are taken, a row with a negative entry is left alone. `fork` and `extend` raise
    OutOfBlocksError when a row finds no block.
    """

    def __init__(
        self,
        shape: KvShape,
        *,
        rows: int,
        max_length: int,
        block_size: int,
        num_blocks: int | None,
        device: torch.device,
    ):
        self.rows, self.block_size, self.device = rows, block_size, device
        self._may_lack_blocks = num_blocks is not None
        blocks = blocks_of(rows, max_length, block_size) if num_blocks is None else num_blocks
        self.tables = pk.BlockTables.allocate(rows, -(-max_length // block_size), blocks, block_size, device)
        self._pools: list[torch.Tensor] = []
        self.pool = self.add_pool(2 * shape.layers, shape.heads, shape.head_dim, shape.dtype)
        self.cache = Cache(layers=[_PagedLayer(self.pool[2 * i : 2 * i + 2]) for i in range(shape.layers)])
        zeros = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(4))
        self.counts = PagedCounts(*zeros, block_size, shape.token_bytes, rows * max_length)

    def add_pool(self, groups: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Something else that is kept for each position, [groups, N, block_size, heads, dim]: it lies in the same
        blocks as keys and values and is copied when they are."""
        shape = (groups, self.tables.refcount.shape[0], self.block_size, heads, dim)
        self._pools.append(torch.zeros(shape, dtype=dtype, device=self.device))
        return self._pools[-1]

    # -- vectors

    def vector(self, rows: torch.Tensor, values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """int32 [R]: values[i] at rows[i] where chosen[i], -1 elsewhere."""
        out = torch.full((self.rows + 1,), -1, dtype=torch.int32, device=self.device)
        out[torch.where(chosen, rows, self.rows).long()] = values.to(torch.int32)
        return out[: self.rows]

    def entries(self, of: dict[int, int]) -> torch.Tensor:
        """The same, of what the host knows."""
        return torch.tensor([of.get(r, -1) for r in range(self.rows)], dtype=torch.int32, device=self.device)

    # -- operators

    def rollback(self, tokens: torch.Tensor) -> None:
        pk.block_table_rollback(self.tables, tokens)

    def commit(self, source: torch.Tensor) -> None:
        pk.block_table_commit(self.tables, source)

    def extend(self, tokens: torch.Tensor) -> None:
        pk.block_table_extend(self.tables, tokens)
        self._follow()

    def fork(self, parent: torch.Tensor, tokens: torch.Tensor) -> None:
        pk.block_table_fork(self.tables, parent, tokens)
        self._follow()
        self.counts.shared += (tokens.clamp(min=0) // self.block_size * self.block_size).sum()

    def _follow(self) -> None:
        """Copy what the tables ask for, and count."""
        for pool in self._pools:
            pk.kv_copy_blocks(pool, self.tables.copies)
        counts, blocks = self.counts, self.pool.shape[1]
        counts.copied += self.tables.copies[:, 3].sum()
        counts.peak_blocks = torch.maximum(counts.peak_blocks, blocks - self.tables.free_count[0].long())
        if self._may_lack_blocks and self.tables.status.any():
            rows = self.tables.status.nonzero()[:, 0].tolist()
            raise OutOfBlocksError(
                f"no block is left for rows {rows}; the pool has {blocks} of {self.block_size} positions"
            )

    # -- places in a pool, block * block_size + position

    def places(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """int64 [n, p], of rows [n] at positions [n, p] or [p]. Beyond a row's blocks they are of other rows, or of
        none."""
        table = self.tables.block_table[rows.long()].long()
        positions = positions.expand(len(rows), -1)
        return table.gather(1, positions // self.block_size) * self.block_size + positions % self.block_size

    def wipe(self, places: torch.Tensor, bad: torch.Tensor) -> None:
        """Zero the keys and values at `places` [n] where `bad` [n]: 0 * NaN is NaN, so what a row with bad logits wrote
        must not stay where others may read it masked."""
        slots = self.pool.flatten(1, 2)
        slots[:, places] = slots[:, places].masked_fill(bad[:, None, None], 0)


def blocks_of(rows: int, max_length: int, block_size: int) -> int:
    """Blocks that rows need which share nothing."""
    return rows * -(-max_length // block_size)


class _PagedLayer(CacheLayerMixin):
    """One layer's blocks: new states go to `write`, attention gets what lies at `read`."""

    is_sliding = False

    def __init__(self, pool: torch.Tensor):  # [2, N, block_size, heads, head_dim]
        super().__init__()
        self.is_initialized = True
        self.keys, self.values = pool.flatten(1, 2).unbind(0)  # [N * block_size, heads, head_dim]
        self.write = self.read = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """States [rows, heads, 1, dim] or [1, heads, tokens, dim]. Returns K and V, each [rows, heads, length, dim]."""
        both = []
        for slots, states in ((self.keys, key_states), (self.values, value_states)):
            slots.index_copy_(0, self.write, states.transpose(1, 2).flatten(0, 1))
            both.append(slots[self.read].transpose(1, 2))
        return tuple(both)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.read.shape[1], 0

    def get_seq_length(self) -> int:
        return 0  # rows have different lengths; positions always come as `position_ids`

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length
