"""Every prefix that a run has forwarded, so that none is forwarded twice.

Proposals rewrite the same text: a step starts again from a prefix of the current answer, and often goes some way along
a proposal that was rejected, or along the answer that it replaced. What the model says after a prefix does not depend
on when it was asked, so the hidden state and the KV of each forwarded position stay in a ring, in a tree over tokens:

    node of a prefix = child[(node of the prefix without its last token, last token)]

The node of each position travels with its KV: rows of node numbers are copied by the same ranges (`KvSlabs.add_pair`).
A number is never used twice, so one that has left the ring is known by that and is no danger as a parent.

Chains are what they would be without it: a lane that is answered from here draws with the random numbers of its own
position and step. Bytes a node: the KV of one position and one hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from power_kernels.api.engines.huggingface.ragged_cache import KvLayout, KvSlabs
from power_kernels.state import ChainField, ChainState, LaneField, LaneStatus

_POSITIONS = 4  # kept for each position of a chain's slab
_MOST_BYTES = 2 << 30
_UNKNOWN = 0  # the node of a position that was written before its parent was known


def _capacity(node_bytes: int, chains: int, positions: int) -> int:
    return max(1, min(_POSITIONS * chains * positions, _MOST_BYTES // node_bytes))


class PrefixMemory:
    """The ring and the tree of one run, for slabs in host memory."""

    def __init__(self, slabs: KvSlabs, *, chains: int, hidden_size: int, dtype: torch.dtype):
        kept = list(slabs.pairs)
        node_bytes = hidden_size * dtype.itemsize + sum(lane[:, 0, :, 0].nbytes for lane, _ in kept)
        self.capacity = _capacity(node_bytes, chains, slabs.positions)
        device = kept[0][0].device
        self._hidden = torch.empty(self.capacity, hidden_size, dtype=dtype, device=device)
        # Untouched memory costs nothing, so a short run pays for what it keeps.
        self._kv = [
            (lane, lane.new_empty(self.capacity, lane.shape[0], lane.shape[2], lane.shape[4])) for lane, _ in kept
        ]
        lane_nodes, chain_nodes = slabs.add_pair(1, heads=1, dim=1, dtype=torch.int64)
        self._node = lane_nodes[0, :, 0, :, 0].numpy()  # [lanes, positions], in place
        self._lanes = lane_nodes.shape[1] // chain_nodes.shape[1]
        self._child: dict[tuple[int, int], int] = {}
        self._key: list[tuple[int, int] | None] = [None] * self.capacity
        self._next = 1
        self._prompt: list[tuple[int, ...] | None] = [None] * chain_nodes.shape[1]  # of each chain slot
        self._root = [_UNKNOWN] * chain_nodes.shape[1]  # of each chain slot: the node of its prompt's KV

    @staticmethod
    def bytes_of(layout: KvLayout, weight: torch.Tensor, *, chains: int, positions: int) -> int:
        """What the memory of such a run may come to take. weight: of the LM head [V, hidden_size]."""
        node_bytes = weight.shape[1] * weight.dtype.itemsize + layout.token_bytes
        return _capacity(node_bytes, chains, positions) * node_bytes

    def admit(self, slot: int, prompt: tuple[int, ...]) -> None:
        """A slot holds all but the last token of a prompt. Chains of one prompt share what they forward."""
        same = self._prompt.index(prompt) if prompt in self._prompt else None
        self._root[slot] = self._number() if same is None else self._root[same]
        self._prompt[slot] = prompt

    def move(self, source: int, target: int) -> None:
        self._root[target], self._prompt[target] = self._root[source], self._prompt[source]

    def widen(self, lanes: int) -> None:
        """Each slot has so many lanes from now on; their nodes have moved with their KV."""
        self._lanes = lanes

    def recall(self, state: ChainState) -> tuple[list[int], torch.Tensor]:
        """The running lanes whose next prefix is known, and its hidden state for each [n, hidden_size].

        Their rows then hold the position, as if it had been forwarded. None where fewer than half of the lanes are
        known: the others would wait for them, and one more row in their forward pass costs less.
        """
        running = (state.lane_field[:, LaneField.STATUS] == LaneStatus.RUNNING).sum()
        known = [(lane, at, self._child[key]) for lane, at, key in self._asked(state) if key in self._child]
        if 2 * len(known) < running:
            known = []
        for lane, position, node in known:
            for slab, kept in self._kv:
                slab[:, lane, :, position] = kept[node % self.capacity]
            self._node[lane, position] = node
        return [lane for lane, _, _ in known], self._hidden[[node % self.capacity for _, _, node in known]]

    def learn(self, state: ChainState, lanes: Sequence[int], hidden: torch.Tensor, good: torch.Tensor) -> None:
        """Keep what a forward pass of n lanes has just written. hidden [n, hidden_size]; good bool [n]: keep."""
        # What was written has no node until it gets one below: an old number would lie about it.
        self._node[lanes, state.position[lanes].numpy()] = _UNKNOWN
        trusted = {lane: row for row, (lane, kept) in enumerate(zip(lanes, good.tolist(), strict=True)) if kept}
        for lane, position, key in self._asked(state):
            if lane not in trusted:
                continue
            node = self._child.get(key)
            if node is None:  # two lanes may come to a prefix in the same pass
                node = self._number()
                place = node % self.capacity
                if self._key[place] is not None:
                    del self._child[self._key[place]]
                self._key[place], self._child[key] = key, node
                self._hidden[place] = hidden[trusted[lane]]
                for slab, kept in self._kv:
                    kept[place] = slab[:, lane, :, position]
            self._node[lane, position] = node

    def _asked(self, state: ChainState):
        """(lane, position, key of the node) of every running lane whose prefix up to there is known."""
        status = state.lane_field[:, LaneField.STATUS].tolist()
        base = state.field[:, ChainField.BASE].tolist()
        fed = zip(status, state.position.tolist(), state.input_id.tolist(), strict=True)
        for lane, (its_status, position, token) in enumerate(fed):
            if its_status != LaneStatus.RUNNING:
                continue
            slot = lane // self._lanes
            first = position == base[slot] - 1
            parent = self._root[slot] if first else int(self._node[lane, position - 1])
            if parent != _UNKNOWN:
                yield lane, position, (parent, token)

    def _number(self) -> int:
        self._next += 1
        return self._next - 1
