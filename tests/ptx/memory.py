"""The storages that the arguments of one launch lie in: address ranges, views, and which bytes are undefined."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

UNDEFINED, OUTSIDE = 1, 2  # flags of a granule; core/machine.hpp has a third of its own
# Each storage begins in the middle of an address range of its own, so that what misses it falls into no other.
RANGE_BITS, MIDDLE, NOWHERE = 40, 1 << 39, 4095 << 40
# Storages of gigabytes (64-bit addressing) are checked for bounds and alignment only, in place, under one schedule.
BIG = 512 << 20


class Memory:
    """tensors: the arguments with bytes, by name. outputs: names that are undefined when the launch begins.

    undefined_before(key, content): marks of the bytes that earlier launches left undefined, or None.
    """

    def __init__(
        self,
        tensors: Sequence[tuple[str, torch.Tensor]],
        outputs: Sequence[str] = (),
        undefined_before: Callable[[int, np.ndarray], np.ndarray | None] = lambda key, content: None,
    ):
        self.storages: dict[int, torch.UntypedStorage] = {}  # by address
        self.names: dict[int, list[str]] = {}
        self.items: dict[int, int] = {}  # bytes of the smallest element: what is checked as one
        for name, t in tensors:
            storage = t.untyped_storage()
            key = storage.data_ptr()
            self.storages[key] = storage
            self.names.setdefault(key, []).append(name)
            self.items[key] = min(self.items.get(key, 16), t.element_size())
        self.order = list(self.storages)
        self.big = sum(s.nbytes() for s in self.storages.values()) > BIG
        self.flags = {key: self._flags(key, tensors, outputs, undefined_before) for key in self.order}

    def _flags(self, key: int, tensors, outputs, undefined_before) -> np.ndarray:
        if self.big:
            return np.zeros(1, np.uint8)
        content = self.bytes(key)
        before = undefined_before(key, content)
        undefined = np.zeros(len(content), bool) if before is None else before.copy()
        inside = np.zeros(len(content), bool)
        for name, t in tensors:
            if t.untyped_storage().data_ptr() == key and t.numel():
                mine = covered(t)
                inside |= mine
                if name in outputs:
                    undefined |= mine
        return self._granules(key, ~inside) * OUTSIDE + self._granules(key, undefined) * UNDEFINED

    def _granules(self, key: int, marks: np.ndarray) -> np.ndarray:
        item = self.items[key]
        padded = np.zeros(-(-len(marks) // item) * item, bool)
        padded[: len(marks)] = marks
        return padded.reshape(-1, item).any(1).astype(np.uint8)

    def undefined_bytes(self, key: int, flags: Mapping[int, np.ndarray]) -> np.ndarray:
        return np.repeat(flags[key] & UNDEFINED, self.items[key])[: self.storages[key].nbytes()].astype(bool)

    def bytes(self, key: int) -> np.ndarray:
        return bytes_of(self.storages[key])

    def base(self, key: int) -> int:
        return ((self.order.index(key) + 1) << RANGE_BITS) + MIDDLE + key % 4096

    def address(self, t: torch.Tensor) -> int:
        """Where a kernel finds a tensor."""
        if t.untyped_storage().nbytes() == 0:
            return NOWHERE + t.data_ptr() % 4096
        key = t.untyped_storage().data_ptr()
        return self.base(key) + t.data_ptr() - key


def bytes_of(storage: torch.UntypedStorage) -> np.ndarray:
    """The storage itself, not a copy."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))


def covered(t: torch.Tensor) -> np.ndarray:
    """Marks of the bytes of its storage that a tensor shows."""
    item, nbytes = t.element_size(), t.untyped_storage().nbytes()
    marks = torch.zeros(nbytes // item, dtype=torch.uint8)
    marks.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(1)
    out = np.zeros(nbytes, bool)
    out[: nbytes // item * item] = np.repeat(marks.numpy().astype(bool), item)
    return out
