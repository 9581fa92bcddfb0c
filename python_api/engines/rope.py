"""Pin rotary schemes that look at the longest position of the batch (DESIGN section 6).

longrope and dynamic NTK choose their frequencies from max(position_ids), so one long batchmate would change
every row's p, and a growing row would read keys rotated by other frequencies than its own. For one run the
choice is made once, from the run's `max_length`: the regime belongs to the call, never to a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from power_kernels.api.engine import UnsupportedModelError

# Frequencies that depend on the configuration alone.
_FIXED = frozenset({"default", "linear", "llama3", "yarn", "proportional"})


def _original_length(module: torch.nn.Module, layer_type: str | None) -> int:
    parameters = module.config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    return int(parameters["original_max_position_embeddings"])


def _long_frequencies(module: torch.nn.Module, layer_type: str | None, device: torch.device) -> torch.Tensor:
    extra = {} if layer_type is None else {"layer_type": layer_type}
    length = _original_length(module, layer_type) + 1
    return ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=length, **extra)[0]


@dataclass
class PinnedRope:
    """The rotary modules of a model, fixed for a run. `restore` puts back what they held."""

    _saved: list[tuple[torch.nn.Module, str, Any]] = field(default_factory=list)

    @classmethod
    def pin(cls, model: torch.nn.Module, max_length: int) -> PinnedRope:
        """Fix every scheme for positions below `max_length`.

        longrope: the long factors when max_length > original_max_position_embeddings, else the short ones.
        dynamic: the original frequencies; UnsupportedModelError when max_length does not fit them.
        """
        pinned = cls()
        try:
            for module in model.modules():
                if getattr(module, "rope_type", None) is not None:
                    pinned._pin_module(module, max_length)
        except BaseException:
            pinned.restore()
            raise
        return pinned

    def _set(self, module: torch.nn.Module, name: str, value: Any) -> None:
        self._saved.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def _pin_module(self, module: torch.nn.Module, max_length: int) -> None:
        by_layer_type = isinstance(module.rope_type, dict)
        kinds = module.rope_type if by_layer_type else {None: module.rope_type}
        if _FIXED.issuperset(kinds.values()):
            return
        for layer_type, kind in kinds.items():
            if kind in _FIXED:
                continue
            prefix = "" if layer_type is None else f"{layer_type}_"
            current = getattr(module, f"{prefix}inv_freq", None)
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if kind not in ("longrope", "dynamic") or current is None or original is None:
                raise UnsupportedModelError(
                    f"{type(module).__name__} uses the rotary scheme {kind!r}, which this engine cannot fix for a run"
                )
            frequencies = original.to(current.device)
            if kind == "dynamic":
                limit = int(module.original_max_seq_len)
                if max_length > limit:
                    raise UnsupportedModelError(
                        f"dynamic rotary frequencies change beyond {limit} positions and this run needs {max_length}; "
                        "no single law holds for all of them"
                    )
            elif max_length > _original_length(module, layer_type):
                frequencies = _long_frequencies(module, layer_type, current.device)
            self._set(module, f"{prefix}inv_freq", frequencies.to(current.dtype).clone())
        # "default" is what makes the forward pass use `inv_freq` as it stands.
        self._set(module, "rope_type", dict.fromkeys(kinds, "default") if by_layer_type else "default")

    def restore(self) -> None:
        while self._saved:
            module, name, value = self._saved.pop()
            setattr(module, name, value)
