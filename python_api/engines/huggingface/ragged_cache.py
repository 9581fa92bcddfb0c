"""KV slabs whose rows stand at different positions, as a transformers cache (DESIGN section 6).

    lanes   [G, chains * P, heads, S, head_dim]   what decoding reads and writes, one row a lane
    chains  [G, chains,     heads, S, head_dim]   the accepted state, written by prefill and by commits

G = 2 * layers, K and V of layer l at 2*l and 2*l + 1, when all layers agree on heads and head_dim;
otherwise there is one such pair of slabs for each shape. A layer's cache is a view. Nothing is cropped,
cloned or moved while decoding: a forward pass writes each row at that row's own position, and whatever lies
beyond it is masked until it is written again.

Masked garbage must be finite, for 0 * NaN is NaN: slabs start as zeros, and `scrub_lanes` wipes what a bad row
wrote.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

import power_kernels


@dataclass(frozen=True)
class KvLayout:
    """What each layer caches: ((key heads, key dim), (value heads, value dim)) a layer, all of one dtype."""

    layers: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    dtype: torch.dtype

    def shapes(self) -> list[tuple[int, int]]:
        """(heads, dim) of each cached tensor, K and V of layer 0, K and V of layer 1, ..."""
        return [shape for layer in self.layers for shape in layer]

    @property
    def token_bytes(self) -> int:
        """Of one position of one row, all layers."""
        return sum(heads * dim for heads, dim in self.shapes()) * self.dtype.itemsize


class KvSlabs:
    """The memory of one run: a pair of slabs for each distinct (heads, dim), and each layer's views of
    them. chain_rows: rows that a chain has in its slab, of which the first takes its prompt."""

    def __init__(
        self, layout: KvLayout, *, chains: int, lanes: int, positions: int, device: torch.device, chain_rows: int = 1
    ):
        shapes = layout.shapes()
        self.lanes, self.positions, self.chain_rows = lanes, positions, chain_rows
        self._chains, self._device = chains, device
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # (lane slab, chain slab)
        self._zeros: list[torch.Tensor] = []
        self._lane_views: list[torch.Tensor] = [None] * len(shapes)
        self._chain_views: list[torch.Tensor] = [None] * len(shapes)
        for heads, dim in dict.fromkeys(shapes):
            members = [i for i, shape in enumerate(shapes) if shape == (heads, dim)]
            pair = self.add_pair(len(members), heads=heads, dim=dim, dtype=layout.dtype)
            for place, i in enumerate(members):
                self._lane_views[i], self._chain_views[i] = pair[0][place], pair[1][place]

    def add_pair(self, members: int, *, heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A (lane slab, chain slab) [members, rows, heads, S, dim] of zeros whose rows follow every copy of a range."""
        lane, chain = (
            torch.zeros(members, rows, heads, self.positions, dim, dtype=dtype, device=self._device)
            for rows in (self._chains * self.lanes, self._chains * self.chain_rows)
        )
        self.pairs.append((lane, chain))
        # A slab of zeros that takes no memory: the source of every device-side wipe.
        self._zeros.append(torch.zeros(dim, dtype=dtype, device=self._device).expand(lane.shape))
        return lane, chain

    def layer(self, index: int, *, of_chains: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of one layer, each [rows, heads, S, dim], views."""
        views = self._chain_views if of_chains else self._lane_views
        return views[2 * index], views[2 * index + 1]

    def commit(self, ranges: torch.Tensor) -> None:
        for lane, chain in self.pairs:
            power_kernels.kv_copy_ranges(chain, lane, ranges)

    def open(self, ranges: torch.Tensor) -> None:
        for lane, chain in self.pairs:
            power_kernels.kv_copy_ranges(lane, chain, ranges)

    def keep(self, from_lane: torch.Tensor, from_chain: torch.Tensor) -> None:
        """Into chain rows, from lanes and from other chain rows. Ranges as in `commit`."""
        for lane, chain in self.pairs:
            power_kernels.kv_copy_ranges(chain, lane, from_lane)
            power_kernels.kv_copy_ranges(chain, chain, from_chain)

    def fork(self, from_lane: torch.Tensor, from_chain: torch.Tensor) -> None:
        """Into lanes, from other lanes and from chain rows. No lane that is copied from is written."""
        for lane, chain in self.pairs:
            power_kernels.kv_copy_ranges(lane, lane, from_lane)
            power_kernels.kv_copy_ranges(lane, chain, from_chain)

    def scrub_lanes(self, ranges: torch.Tensor) -> None:
        """Zero positions of lanes. ranges: int32 [L, 4], rows (lane, lane, start, stop)."""
        for (lane, _), zeros in zip(self.pairs, self._zeros, strict=True):
            power_kernels.kv_copy_ranges(lane, zeros, ranges)

    def rows(self, slot: int) -> tuple[slice, slice]:
        """The rows of a chain slot: in the lane slabs, in the chain slabs."""
        return tuple(slice(slot * rows, (slot + 1) * rows) for rows in (self.lanes, self.chain_rows))

    def clear(self, slot: int, *, lanes_stop: int, chain_start: int = 0, chain_stop: int) -> None:
        """Zero positions [0, lanes_stop) of a slot's lanes and [chain_start, chain_stop) of its chain."""
        lane_rows, chain_row = self.rows(slot)
        for lane, chain in self.pairs:
            lane[:, lane_rows, :, :lanes_stop].zero_()
            chain[:, chain_row, :, chain_start:chain_stop].zero_()

    def widen(self, chains: int, lanes: int, stop: int) -> None:
        """Lanes [c * P, (c + 1) * P) of the first slots become [c * lanes, c * lanes + P), positions [0, stop); the
        others of `chains` slots become zero."""
        for lane, _ in self.pairs:
            # From the last row on, so that none is written before it was read: rows only move up.
            for row in reversed(range(chains * lanes)):
                slot, place = divmod(row, lanes)
                if place >= self.lanes:
                    continue
                source = slot * self.lanes + place
                if source != row:
                    lane[:, row, :, :stop].copy_(lane[:, source, :, :stop])
            for slot in range(chains):
                lane[:, slot * lanes + self.lanes : (slot + 1) * lanes, :, :stop].zero_()
        self.lanes = lanes

    def copy_chain(self, source: int, target: int, stop: int) -> None:
        """Give chain `target` the positions [0, stop) of chain `source`'s prompt."""
        to, of = target * self.chain_rows, source * self.chain_rows
        for _, chain in self.pairs:
            chain[:, to, :, :stop].copy_(chain[:, of, :, :stop])

    def move(self, source: int, target: int, stop: int) -> None:
        """Give slot `target`, lanes included, the positions [0, stop) of slot `source`."""
        for slabs, (source_rows, target_rows) in zip(
            zip(*self.pairs, strict=True), zip(self.rows(source), self.rows(target), strict=True), strict=True
        ):
            for slab in slabs:
                slab[:, target_rows, :, :stop].copy_(slab[:, source_rows, :, :stop])


class RaggedCache(Cache):
    """The slabs as a transformers cache. `view` says where the current forward pass writes and what it
    reads."""

    def __init__(self, slabs: KvSlabs, layers: int):
        super().__init__(layers=[RaggedLayer(slabs, index) for index in range(layers)])

    def attach(self, view) -> None:
        for layer in self.layers:
            layer.view = view


class RaggedLayer(CacheLayerMixin):
    """One layer's K and V. `update` writes at each row's own position and returns the slab, never a copy."""

    is_sliding = False  # sliding layers keep every position too: a rollback may go back beyond the window

    def __init__(self, slabs: KvSlabs, index: int):
        super().__init__()
        self.is_initialized = True
        self.view = None
        self._stores = {}
        for of_chains in (False, True):
            keys, values = slabs.layer(index, of_chains=of_chains)
            flat = [slab.view(-1, slab.shape[-1]) for slab in (keys, values)]
            self._stores[of_chains] = (keys, values, *flat)
        self.keys, self.values = self._stores[False][:2]
        self._positions = slabs.positions

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        view = self.view
        keys, values, flat_keys, flat_values = self._stores[view.of_chains]
        flat_keys.index_copy_(0, view.write_index(keys), key_states.reshape(-1, key_states.shape[-1]))
        flat_values.index_copy_(0, view.write_index(values), value_states.reshape(-1, value_states.shape[-1]))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._positions, 0

    def get_seq_length(self) -> int:
        # Rows have different lengths, so there is no such number; positions always come as `position_ids`.
        return 0

    def get_max_length(self) -> int:
        return self._positions

    get_max_cache_shape = get_max_length
