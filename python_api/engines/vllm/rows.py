"""The requests that are ours in a worker's table of requests."""

from __future__ import annotations

import numpy as np
import torch

from power_kernels.api.engines.serving.proposal import KEY, Proposal
from power_kernels.api.engines.serving.slots import SlotRows
from power_kernels.api.engines.vllm.parameters import ENTROPY


class PowerRows(SlotRows):
    """Of a worker of vLLM. slots: of its table, and rows of its largest batch. vocab: width of the logits."""

    def __init__(self, slots: int, device: torch.device, vocab: int):
        super().__init__(slots, device, rows=slots, vocab=vocab)
        self._wants_entropy = np.zeros(slots, bool)

    def add(self, slot: int, params, *, resumed: bool) -> bool:
        """A request has come into a slot. Returns whether it is ours.

        params: its sampling parameters. resumed: it has drawn before and its weights are lost, so that it cannot tell
        any more when it is rejected: its chain will.
        """
        arguments = params.extra_args or {}
        if KEY not in arguments:
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
