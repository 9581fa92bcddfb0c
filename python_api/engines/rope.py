"""Pin rotary schemes that look at the longest position of the batch (DESIGN section 6).

longrope and dynamic NTK choose their frequencies from max(position_ids), so one long batchmate would change
every row's p, and a growing row would read keys rotated by other frequencies than its own. For one run the
choice is made once, from the run's `max_length`: the regime belongs to the call, never to a row.
"""

from __future__ import annotations

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from power_kernels.api.engine import UnsupportedModelError
from power_kernels.api.engines.patches import Patches

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


def pin_rope(model: torch.nn.Module, max_length: int, patches: Patches) -> None:
    """Add to `patches` what fixes every rotary module of the model for positions below `max_length`.

    longrope: the long factors when max_length > original_max_position_embeddings, else the short ones.
    dynamic: the original frequencies; UnsupportedModelError when max_length does not fit them.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            changes = {key: _frequencies(module, key, value, max_length) for key, value in kind.items()}
            fixed = dict.fromkeys(kind, "default")
        elif kind is not None:
            changes, fixed = {None: _frequencies(module, None, kind, max_length)}, "default"
        else:
            continue
        changes = {key: value for key, value in changes.items() if value is not None}
        for layer_type, frequencies in changes.items():
            patches.add(module, f"{_prefix(layer_type)}inv_freq", frequencies)
        if changes:
            # "default" is what makes the forward pass use `inv_freq` as it stands.
            patches.add(module, "rope_type", fixed)


def _prefix(layer_type: str | None) -> str:
    return "" if layer_type is None else f"{layer_type}_"


def _frequencies(module: torch.nn.Module, layer_type: str | None, kind: str, max_length: int) -> torch.Tensor | None:
    """The inverse frequencies to hold for the run, or None where they depend on the configuration alone."""
    if kind in _FIXED:
        return None
    current = getattr(module, f"{_prefix(layer_type)}inv_freq", None)
    original = getattr(module, f"{_prefix(layer_type)}original_inv_freq", None)
    if kind not in ("longrope", "dynamic") or current is None or original is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses the rotary scheme {kind!r}, which this engine cannot fix for a run"
        )
    frequencies = original
    if kind == "dynamic":
        limit = int(module.original_max_seq_len)
        if max_length > limit:
            raise UnsupportedModelError(
                f"dynamic rotary frequencies change beyond {limit} positions, this run needs {max_length}; "
                "no single law holds for all of them"
            )
    elif max_length > _original_length(module, layer_type):
        frequencies = _long_frequencies(module, layer_type, current.device)
    return frequencies.to(device=current.device, dtype=current.dtype).clone()
