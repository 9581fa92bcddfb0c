"""Attention over KV slabs whose rows stand at different positions, as a registered transformers function.

    out[b, h] = softmax(scale * q[b, h] K[b, h / group]^T + mask[b]) V[b, h / group]

or with one more logit a head in the softmax, a sink (`decode_attention.py`).

Decoding, one query a row: `decode_attention.py`, with the kernel that the view names.

Prefill, prompts packed one behind the other in one row of tokens, no padding: each segment attends to its
own chain row.

Masks are built once a forward pass and shared by all layers with the same window. Position j is visible to
a query at position i iff i - window < j <= i.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers import AttentionInterface

from power_kernels.api.driver.engine import UnsupportedModelError
from power_kernels.api.engines.huggingface.decode_attention import DecodeView as DecodeView
from power_kernels.api.engines.huggingface.decode_attention import attention, write_index

NAME = "power_kernels"

# What transformers hands to every attention function and what changes nothing here.
_HARMLESS = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
        "return_dict", "output_router_logits", "position_embeddings", "past_key_values", "logits_to_keep", "layer_idx",
    }
)  # fmt: skip

_active = threading.local()


@contextmanager
def attached(view) -> Iterator[None]:
    """Make `view` the one that the registered function reads, in this thread, for one forward pass."""
    previous = getattr(_active, "view", None)
    _active.view = view
    try:
        yield
    finally:
        _active.view = previous


@dataclass(frozen=True)
class Segment:
    """Tokens [first, last) of a packed pass: positions [start, start + last - first) of chain row `slot`."""

    slot: int
    first: int
    last: int
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.last - self.first


class PrefillView:
    """Tokens of several prompts behind each other, written to chain rows. position: int64 [tokens]."""

    of_chains = True

    def __init__(self, segments: list[Segment], position: torch.Tensor):
        self.segments, self.position = segments, position
        slots = torch.tensor([s.slot for s in segments], device=position.device)
        counts = torch.tensor([s.last - s.first for s in segments], device=position.device)
        self._rows = slots.repeat_interleave(counts, output_size=position.shape[0])
        self._index: dict[int, torch.Tensor] = {}
        self._masks: dict[tuple, torch.Tensor] = {}

    def write_index(self, slab: torch.Tensor) -> torch.Tensor:
        heads = slab.shape[1]
        if heads not in self._index:
            self._index[heads] = write_index(self._rows, self.position, slab, by_row=False)
        return self._index[heads]

    def mask(self, segment: Segment, window: int | None, dtype: torch.dtype, group: int) -> torch.Tensor:
        """Additive, [group * tokens, stop]: the segment's queries, once for each query head of a KV head."""
        key = (segment.slot, window, dtype, group)
        if key not in self._masks:
            device = self.position.device
            column = torch.arange(segment.stop, device=device)
            row = torch.arange(segment.start, segment.stop, device=device)[:, None]
            hidden = column > row
            if window is not None:
                hidden |= column <= row - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
            self._masks[key] = mask.repeat(group, 1)
        return self._masks[key]

    def attend(self, query, keys, values, scale: float, window: int | None, softcap: float | None, sinks=None):
        _, heads, tokens, _ = query.shape
        out = query.new_empty(1, tokens, heads, values.shape[-1])
        for segment in self.segments:
            part = self._attend_segment(
                query[:, :, segment.first : segment.last],
                keys[segment.slot : segment.slot + 1, :, : segment.stop],
                values[segment.slot : segment.slot + 1, :, : segment.stop],
                segment, scale, window, softcap, sinks,
            )  # fmt: skip
            out[:, segment.first : segment.last] = part.transpose(1, 2)
        return out

    def _attend_segment(self, query, keys, values, segment: Segment, scale, window, softcap, sinks):
        _, heads, tokens, dim = query.shape
        kv_heads, group = keys.shape[1], heads // keys.shape[1]
        if window is not None and window >= segment.stop:
            window = None
        if softcap is None and sinks is None and window is None and segment.start == 0:
            return functional.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=scale, enable_gqa=group > 1
            )
        # The group's query heads as further queries of their KV head: nothing is repeated.
        query = query.reshape(1, kv_heads, group * tokens, dim)
        mask = self.mask(segment, window, query.dtype, group)
        if sinks is not None:
            sinks = sinks.reshape(kv_heads, group, 1).repeat_interleave(tokens, dim=1)
        out = attention(query, keys, values, mask, scale, softcap, sinks)
        return out.reshape(1, heads, tokens, values.shape[-1])


@dataclass
class Probe:
    """Records what each layer asks for, and refuses what the views above do not compute.

    layers: the cache's layers, whose `keys` and `values` are what `update` last returned. Attention must get just
    these, or those of an earlier layer (Gemma 3n): the views read slabs, not what a model makes of them afterwards
    (DeepSeek's compressed KV, for one).
    """

    layers: list
    windows: dict[int, int | None] = field(default_factory=dict)
    sinks: bool = False  # whether any layer has some

    def attend(
        self, module, query, keys, values, attention_mask, dropout, sliding_window, softcap, is_causal, sinks, others
    ):
        name, layer = type(module).__name__, getattr(module, "layer_idx", None)
        unknown = sorted(k for k, v in others.items() if v is not None and k not in _HARMLESS)
        reason = None
        if not isinstance(layer, int) or layer in self.windows:
            reason = f"calls attention for layer {layer!r}, not once for each layer index"
        elif not any(_same(keys, of.keys) and _same(values, of.values) for of in self.layers[: layer + 1]):
            reason = "attends to something else than the keys and values it caches"
        elif attention_mask is not None:
            reason = "builds an attention mask of its own"
        elif unknown:
            reason = f"passes {', '.join(unknown)} to its attention function"
        elif dropout:
            reason = "applies dropout while evaluating"
        elif is_causal is False or getattr(module, "is_causal", True) is False:
            reason = "has attention that is not causal"
        elif query.shape[1] % keys.shape[1] or keys.shape[1] != values.shape[1]:
            reason = f"has {query.shape[1]} query, {keys.shape[1]} key and {values.shape[1]} value heads"
        elif sinks is not None and sinks.shape != query.shape[1:2]:
            reason = f"passes sinks of shape {tuple(sinks.shape)} for {query.shape[1]} query heads"
        elif not all(isinstance(x, int | float | None) for x in (sliding_window, softcap)):
            reason = f"passes sliding_window={sliding_window!r}, softcap={softcap!r}"
        if reason is not None:
            raise UnsupportedModelError(f"{name} {reason}, which this engine does not know how to compute")
        self.windows[layer] = sliding_window
        self.sinks = self.sinks or sinks is not None
        # The probe feeds one token, whose attention is its own value (but for a sink, which is not looked at here).
        return values.repeat_interleave(query.shape[1] // values.shape[1], dim=1).transpose(1, 2)


def _same(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    return b is not None and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [rows, heads, 1, dim] decoding, [1, heads, tokens, dim] prefill
    key: torch.Tensor,  # the layer's slab [R, kv_heads, S, dim]
    value: torch.Tensor,  # [R, kv_heads, S, value dim]
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,  # [heads]: transformers' name for attention sinks
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The function registered as "power_kernels". Returns ([rows, tokens, heads, value dim], None)."""
    view = getattr(_active, "view", None)
    if view is None:
        raise RuntimeError(
            f"the attention implementation {NAME!r} works only inside a forward pass of HuggingFaceEngine"
        )
    if isinstance(view, Probe):
        out = view.attend(
            module, query, key, value, attention_mask, dropout, sliding_window, softcap, is_causal, s_aux, kwargs
        )
        return out.contiguous(), None
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} passed an attention mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return view.attend(query, key, value, scale, sliding_window, softcap, s_aux), None


AttentionInterface.register(NAME, ragged_attention)
