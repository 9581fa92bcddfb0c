"""What a model is like, found out before any work: what is refused, what each layer caches, what its head is.

What the configuration tells is read (`refuse`, `eos_token_ids`); the rest is tried with one token (`probe`,
`find_head`), since a configuration says little about what a model's code does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from power_kernels.api.driver.engine import UnsupportedModelError
from power_kernels.api.engines.huggingface.lm_head import LmHead
from power_kernels.api.engines.huggingface.patched_model import patched, placed_on
from power_kernels.api.engines.huggingface.ragged_attention import Probe, attached
from power_kernels.api.engines.huggingface.ragged_cache import KvLayout, RaggedLayer
from power_kernels.errors import ArgumentError

_REWINDABLE = frozenset({"full_attention", "sliding_attention", "attention"})


def refuse(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for what the configuration already tells."""
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    devices = {str(p.device) for p in model.parameters()}
    reason = None
    if model.config.is_encoder_decoder:
        reason = "is an encoder-decoder"
    elif not model.can_generate():
        reason = "is not a causal language model"
    elif kinds - _REWINDABLE:
        reason = f"has layers of type {', '.join(sorted(kinds - _REWINDABLE))}, whose state cannot be rewound"
    elif getattr(model, "_is_stateful", False):
        reason = "keeps a recurrent state, which cannot be rewound"
    elif getattr(config, "use_bidirectional_attention", None):
        reason = "attends to later positions"
    elif not model._can_set_attn_implementation():
        reason = "does not use transformers' attention interface"
    elif len(devices) != 1 or "meta" in devices:
        reason = f"has its parameters on {', '.join(sorted(devices))}; they must all be on one device"
    if reason is not None:
        raise UnsupportedModelError(f"{name} {reason}")


def refuse_autocast(device: torch.device) -> None:
    """Raise ArgumentError inside torch.autocast, which changes dtypes between the layers and their cache."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        raise ArgumentError(
            f"torch.autocast is on for {device.type!r}; the engine runs a model in the dtype it was loaded in. Load it "
            f"with dtype={torch.get_autocast_dtype(device.type)}, and make these calls outside of autocast or inside "
            f"torch.autocast({device.type!r}, enabled=False)"
        )


def configured_context(config) -> int | None:
    """The most positions of a sequence that a model's configuration allows; None where it sets no limit.

    YaRN stretches `original_max_position_embeddings` by `factor`, and publishers leave `max_position_embeddings` at the
    one or the other: the larger counts.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    schemes = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    for scheme in schemes:
        original = scheme.get("original_max_position_embeddings")
        if limit is not None and scheme.get("rope_type") == "yarn" and original:
            limit = max(limit, int(scheme.get("factor", 1.0) * original))
    return limit


def context_of(model: PreTrainedModel, asked: int | None) -> int | None:
    """The most positions of a sequence: `asked`, or what the configuration allows.

    Raises ArgumentError where the model has learned fewer positions than asked.
    """
    if asked is None:
        return configured_context(model.config)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    tables = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
    learned = [table.num_embeddings for table in tables if limit is not None and 0 <= table.num_embeddings - limit <= 2]
    if learned and asked > limit:
        raise ArgumentError(f"max_context is {asked}; {type(model).__name__} has learned {limit} positions")
    return asked


def eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = getattr(model.config.get_text_config(), "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)


class Probed(NamedTuple):
    """layout: what each layer caches. windows: of each layer, None: full attention. sinks: whether any layer has some.
    vocab_size: width of the logits."""

    layout: KvLayout
    windows: dict[int, int | None]
    sinks: bool
    vocab_size: int


def probe(model: PreTrainedModel) -> Probed:
    """One token through the model: the shape of each layer's KV, its window, the width of the logits."""
    layers = model.config.get_text_config().num_hidden_layers
    name = type(model).__name__
    try:
        output, recorder, seen = _one_token(model, model)
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{name} does not take a ragged cache: {type(error).__name__}: {error}") from error
    shapes = [layer.shape for layer in recorder.layers]
    # The last layers may do without a cache: they attend to that of an earlier one.
    own = next((i for i, shape in enumerate(shapes) if shape is None), layers)
    written = shapes[:own]
    if not written or any(shapes[own:]) or sorted(seen.windows) != list(range(layers)):
        missing = [i for i, shape in enumerate(shapes) if shape is None or i not in seen.windows]
        raise UnsupportedModelError(
            f"{name}: layers {missing} keep no keys and values of their own; what they keep cannot be rewound"
        )
    dtypes = {layer.dtype for layer in recorder.layers[:own]}
    if len(dtypes) != 1:
        raise UnsupportedModelError(f"layers cache different dtypes: {sorted(map(str, dtypes))}")
    return Probed(KvLayout(tuple(written), dtypes.pop()), seen.windows, seen.sinks, output.logits.shape[-1])


def _one_token(model: PreTrainedModel, module: torch.nn.Module):
    """(output, cache, probe) of one token through `module`, the model or its decoder."""
    device = next(model.parameters()).device
    recorder = Cache(layers=[_RecorderLayer() for _ in range(model.config.get_text_config().num_hidden_layers)])
    seen = Probe(recorder.layers)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with placed_on(device), patched(model, 1), attached(seen), torch.inference_mode():
        output = module(input_ids=token, position_ids=token, past_key_values=recorder, use_cache=True)
    return output, recorder, seen


class _RecorderLayer(RaggedLayer):
    """Keeps nothing but the shape of what its layer would cache."""

    def __init__(self):
        CacheLayerMixin.__init__(self)
        self.is_initialized = True
        self.shape, self.dtype, self._positions = None, None, 1

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.shape = tuple((states.shape[1], states.shape[-1]) for states in (key_states, value_states))
        self.dtype = key_states.dtype
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def check_windows(config, windows: dict[int, int | None]) -> None:
    """Hold the windows that layers ask for to those of the configuration, from which transformers builds
    its masks.

    The self check is shorter than any real window, so a layer that masks one but does not ask for it would
    pass.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    for layer, asked in windows.items():
        sliding = window is not None if kinds is None else kinds[layer] == "sliding_attention"
        expected = window if sliding else None
        if asked != expected:
            raise UnsupportedModelError(
                f"layer {layer} asks for a window of {asked} where the configuration means {expected}"
            )


def find_head(model: PreTrainedModel, agreed: Callable[[float], float]) -> LmHead | None:
    """The model's last layer, where the model is its decoder followed by that and nothing else; or None.

    agreed: makes every process that holds the model take the same decision.
    """
    head = LmHead.of(model)
    if head is None:
        return None
    explained = head.explains(
        lambda: _one_token(model, model)[0].logits,
        lambda: getattr(_one_token(model, model.get_decoder())[0], "last_hidden_state", None),
    )
    return head if agreed(explained) else None
