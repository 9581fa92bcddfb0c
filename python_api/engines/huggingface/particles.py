"""Particles on a transformers model: what a run of them keeps beside keys and values (DESIGN 3.9, 6).

The reference of a sweep is an answer that went through the model before, so that its row is not fed again: its last
hidden states are kept, one a position, in slabs that follow every copy of keys and values.
"""

from __future__ import annotations

import torch

from power_kernels.api.engines.huggingface.ragged_cache import KvSlabs


class HiddenStates:
    """Last hidden states [D] by row and position, of lanes and of chain rows, and the logits of a step.

    groups, particles: slots and lanes of each. hidden_size: D.
    """

    def __init__(self, slabs: KvSlabs, *, groups: int, particles: int, hidden_size: int, dtype: torch.dtype):
        lane, chain = slabs.add_pair(1, heads=1, dim=hidden_size, dtype=dtype)
        self._lane, self._chain = lane[0, :, 0], chain[0, :, 0]  # [rows, positions, D]
        self._groups, self._particles, self._chain_rows = groups, particles, slabs.chain_rows

    def put(self, lanes: torch.Tensor, position: torch.Tensor, hidden: torch.Tensor) -> None:
        """Keep what a forward pass gave for lanes [n] at positions [n]; hidden [n, D]."""
        self._lane[lanes, position] = hidden

    def of_references(self, answer_row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """[G, D]: of each slot's current answer at a position, before there is one of no meaning."""
        groups = answer_row.shape[0]
        row = torch.arange(groups, device=answer_row.device) * self._chain_rows + answer_row
        return self._chain[row, position]
