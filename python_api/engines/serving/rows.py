"""The requests that are ours in a worker's table of requests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from power_kernels.api.engines.serving.proposal import ENTROPY, KEY, Proposal
from power_kernels.api.engines.serving.slots import SlotRows


class PowerRows(SlotRows):
    """Of a stack's worker. slots: of its table, and rows of its largest batch. vocab: width of the logits."""

    def __init__(self, slots: int, device: torch.device, vocab: int):
        super().__init__(slots, device, rows=slots, vocab=vocab)
        self._wants_entropy = np.zeros(slots, bool)

    def add(self, slot: int, arguments: Mapping | None, *, resumed: bool) -> bool:
        """A request has come into a slot. Returns whether it is ours.

        arguments: the extra ones that it carries. resumed: it has drawn before and its weights are lost, so that it
        cannot tell any more when it is rejected: its chain will.
        """
        if not arguments or KEY not in arguments:
            self.drop(slot)
            return False
        proposal = Proposal.from_dict(arguments[KEY])
        self.stage(slot, proposal.resumed() if resumed else proposal)
        self._wants_entropy[slot] = arguments.get(ENTROPY, False)
        return True

    def draw_rows(self, slots: np.ndarray, *tensors: torch.Tensor) -> None:
        """`draw`. slots: of the rows, on the host."""
        self.entropy = bool((self._wants_entropy[slots] & self.on[slots]).any())
        self.draw(*tensors)
