"""Pin rotary schemes that look at the longest position of the batch (DESIGN section 6).

longrope and dynamic NTK choose their frequencies from max(position_ids), so one long batchmate would change
every row's p, and a growing row would read keys rotated by other frequencies than its own. For one run the
choice is made once, from the run's `max_length`: the regime belongs to the call, never to a row.
"""

from __future__ import annotations

import copy

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from power_kernels.api.driver.engine import UnsupportedModelError
from power_kernels.api.engines.huggingface.patches import Patches

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
        kinds = _kinds(module)
        changes = {key: _frequencies(module, key, kind, max_length) for key, kind in kinds.items()}
        changes = {key: value for key, value in changes.items() if value is not None}
        for layer_type, frequencies in changes.items():
            patches.add(module, f"{_prefix(layer_type)}inv_freq", frequencies)
        if changes:
            # "default" is what makes the forward pass use `inv_freq` as it stands.
            patches.add(module, "rope_type", "default" if None in kinds else dict.fromkeys(kinds, "default"))


def check_rope(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Hold each pinned module to what it does by itself when the longest position is the regime's longest.

    Raises UnsupportedModelError for a module that looks at the batch in some way that pinning does not reach.
    """
    x = torch.zeros(1, 2, 1, device=device, dtype=dtype)
    for module in model.modules():
        for layer_type, kind in _kinds(module).items():
            if kind in _FIXED:
                continue
            lengths = [_limit(module, layer_type, kind)]
            lengths += [lengths[0] + 1] if kind == "longrope" else []
            extra = () if layer_type is None else (layer_type,)
            for length in lengths:
                twin = copy.deepcopy(module)  # an unpinned call leaves its frequencies behind
                own = twin(x, torch.tensor([[1, length - 1]], device=device), *extra)
                patches = Patches()
                pin_rope(module, length, patches)
                with patches:
                    held = module(x, torch.tensor([[1, 2]], device=device), *extra)
                if not all(torch.allclose(a[:, 0], b[:, 0], atol=1e-2) for a, b in zip(own, held, strict=True)):
                    raise UnsupportedModelError(
                        f"{type(module).__name__} does not keep to fixed frequencies for positions below {length}"
                    )


def _kinds(module: torch.nn.Module) -> dict[str | None, str]:
    """The scheme of each layer type (None: of all layers). Empty for a module that is not rotary."""
    kind = getattr(module, "rope_type", None)
    if kind is None:
        return {}
    return kind if isinstance(kind, dict) else {None: kind}


def _limit(module: torch.nn.Module, layer_type: str | None, kind: str) -> int:
    """The most positions for which the scheme uses its original frequencies."""
    return int(module.original_max_seq_len) if kind == "dynamic" else _original_length(module, layer_type)


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
        limit = _limit(module, layer_type, kind)
        if max_length > limit:
            raise UnsupportedModelError(
                f"dynamic rotary frequencies change beyond {limit} positions, this run needs {max_length}; "
                "no single law holds for all of them"
            )
    elif max_length > _limit(module, layer_type, kind):
        frequencies = _long_frequencies(module, layer_type, current.device)
    return frequencies.to(device=current.device, dtype=current.dtype).clone()
