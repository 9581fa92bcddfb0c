"""Paged KV in plain Python and torch: the specification of what every backend writes, entry by entry (DESIGN 5.7)."""

from __future__ import annotations

import torch

from ..block_tables import BlockStatus


class _Tables:
    """The state on the host, as lists."""

    def __init__(self, block_table, length, refcount, free_list, free_count, copies, status, block_size):
        self.tensors = (block_table, length, refcount, free_list, free_count, copies, status)
        self.table, self.length, self.refcount, free, (available,) = (t.tolist() for t in self.tensors[:5])
        self.free, self.void = free[:available], free[available:]  # free is a stack: its end is taken first
        self.max_blocks, self.block_size = block_table.shape[1], block_size
        self.rows = range(len(self.length))

    def held(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def take(self) -> int:
        block = self.free.pop()
        self.void.insert(0, block)
        self.refcount[block] = 1
        return block

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.refcount[block] -= 1
            if self.refcount[block] == 0:
                self.free.append(block)
                self.void.pop(0)

    def write(self, copies=None, status=None) -> None:
        available = len(self.free)
        values = (self.table, self.length, self.refcount, self.free + self.void, [available], copies, status)
        for tensor, value in zip(self.tensors, values, strict=True):
            if value is not None:
                tensor.copy_(torch.tensor(value, dtype=torch.int32, device="cpu").view(tensor.shape))


def block_table_fork(
    block_table, length, refcount, free_list, free_count, copies, status, parent, tokens, block_size
) -> None:
    """See `power_kernels.block_table_fork`."""
    t = _Tables(block_table, length, refcount, free_list, free_count, copies, status, block_size)
    parents, counts, before = parent.tolist(), tokens.tolist(), list(t.length)
    to_copy, found = [[0] * 4 for _ in t.rows], [BlockStatus.OK for _ in t.rows]
    asked, available = 0, len(t.free)
    for r, (p, n) in enumerate(zip(parents, counts, strict=True)):
        if p < 0:
            continue
        if p not in t.rows or p == r:
            found[r] = BlockStatus.BAD_ROW
        elif before[r]:
            found[r] = BlockStatus.NOT_EMPTY
        elif not 0 <= n <= before[p]:
            found[r] = BlockStatus.BAD_TOKENS
        else:
            full, split = divmod(n, block_size)
            asked += split > 0
            if split > 0 and asked > available:
                found[r] = BlockStatus.OUT_OF_BLOCKS
                continue
            t.table[r][:full] = t.table[p][:full]
            for block in t.table[p][:full]:
                t.refcount[block] += 1
            if split:
                t.table[r][full] = t.take()
                to_copy[r] = [t.table[r][full], t.table[p][full], 0, split]
            t.length[r] = n
    t.write(to_copy, found)


def block_table_extend(
    block_table, length, refcount, free_list, free_count, copies, status, tokens, block_size
) -> None:
    """See `power_kernels.block_table_extend`."""
    t = _Tables(block_table, length, refcount, free_list, free_count, copies, status, block_size)
    to_copy, found = [[0] * 4 for _ in t.rows], [BlockStatus.OK for _ in t.rows]
    asked, available = 0, len(t.free)
    for r, n in enumerate(tokens.tolist()):
        old = t.length[r]
        if n <= old:
            continue
        have, want, split = t.held(old), t.held(n), old % block_size
        if want > t.max_blocks:
            found[r] = BlockStatus.BAD_TOKENS
            continue
        last = t.table[r][have - 1] if split else None
        shared = split > 0 and t.refcount[last] > 1
        first = have - shared
        asked += want - first
        if want > first and asked > available:
            found[r] = BlockStatus.OUT_OF_BLOCKS
            continue
        t.table[r][first:want] = [t.take() for _ in range(first, want)]
        if shared:
            t.release([last])  # others hold it
            to_copy[r] = [t.table[r][first], last, 0, split]
        t.length[r] = n
    t.write(to_copy, found)


def block_table_commit(
    block_table, length, refcount, free_list, free_count, copies, status, source, block_size
) -> None:
    """See `power_kernels.block_table_commit`."""
    t = _Tables(block_table, length, refcount, free_list, free_count, copies, status, block_size)
    sources, found = source.tolist(), [BlockStatus.OK for _ in t.rows]
    for r, s in enumerate(sources):
        if s < 0:
            continue
        if s not in t.rows or s == r or sources[s] >= 0:
            found[r] = BlockStatus.BAD_ROW
        elif t.length[s] == 0:
            found[r] = BlockStatus.EMPTY
        else:
            t.release(t.table[r][: t.held(t.length[r])])
            have = t.held(t.length[s])
            t.table[r][:have] = t.table[s][:have]
            t.length[r], t.length[s] = t.length[s], 0
    t.write(status=found)


def block_table_rollback(
    block_table, length, refcount, free_list, free_count, copies, status, tokens, block_size
) -> None:
    """See `power_kernels.block_table_rollback`."""
    t = _Tables(block_table, length, refcount, free_list, free_count, copies, status, block_size)
    for r, n in enumerate(tokens.tolist()):
        if 0 <= n < t.length[r]:
            t.release(t.table[r][t.held(n) : t.held(t.length[r])])
            t.length[r] = n
    t.write()


def kv_copy_blocks(pool: torch.Tensor, copies: torch.Tensor) -> None:
    """pool [G, N, heads, block_size, D]. See `power_kernels.kv_copy_blocks`."""
    for to, of, start, stop in copies.tolist():
        if stop > start:
            pool[:, to, :, start:stop] = pool[:, of, :, start:stop]
