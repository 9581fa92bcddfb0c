"""Attention over KV slabs whose rows stand at different positions, as a registered transformers function.

    out[b, h] = softmax(scale * q[b, h] K[b, h / group]^T + mask[b]) V[b, h / group]

Decoding, one query a row: the `group` query heads that share a KV head are that head's queries, [rows,
kv_heads, group, dim] against [rows, kv_heads, length, dim], so the KV of a row is read once and never
repeated. `length` is the longest active position, not the slab. Bytes a layer: 2 * rows * kv_heads * length
* dim * itemsize.

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

from power_kernels.api.engine import UnsupportedModelError

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


def _write_index(rows: torch.Tensor, positions: torch.Tensor, slab: torch.Tensor, by_row: bool) -> torch.Tensor:
    """Where the new states go in `slab` [R, heads, S, dim] seen as [R * heads * S, dim].

    States come as [rows, heads, 1, dim] (by_row) or [1, heads, tokens, dim]; the result has their order.
    """
    heads, length = slab.shape[1], slab.shape[2]
    head = torch.arange(heads, device=rows.device)
    if by_row:
        return ((rows[:, None] * heads + head) * length + positions[:, None]).reshape(-1)
    return ((rows * heads + head[:, None]) * length + positions).reshape(-1)


class DecodeView:
    """One token for each of the first `rows` lanes. position: int64 [rows], all below `length`."""

    of_chains = False

    def __init__(self, position: torch.Tensor, length: int):
        self.position, self.length, self.rows = position, length, position.shape[0]
        self._index: dict[int, torch.Tensor] = {}
        self._masks: dict[tuple, torch.Tensor] = {}

    def write_index(self, slab: torch.Tensor) -> torch.Tensor:
        heads = slab.shape[1]
        if heads not in self._index:
            rows = torch.arange(self.rows, device=slab.device)
            self._index[heads] = _write_index(rows, self.position, slab, by_row=True)
        return self._index[heads]

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive, [rows, 1, 1, length]."""
        key = (window, dtype)
        if key not in self._masks:
            column = torch.arange(self.length, device=self.position.device)
            hidden = column > self.position[:, None]
            if window is not None:
                hidden |= column <= self.position[:, None] - window
            mask = torch.zeros(self.rows, self.length, dtype=dtype, device=self.position.device)
            self._masks[key] = mask.masked_fill_(hidden, -math.inf)[:, None, None]
        return self._masks[key]

    def attend(self, query, keys, values, scale: float, window: int | None, softcap: float | None):
        rows, heads, _, dim = query.shape
        kv_heads, group = keys.shape[1], heads // keys.shape[1]
        out = _attention(
            query.reshape(rows, kv_heads, group, dim),
            keys[:rows, :, : self.length],
            values[:rows, :, : self.length],
            self.mask(window, query.dtype),
            scale,
            softcap,
        )
        return out.reshape(rows, 1, heads, values.shape[-1])


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
            self._index[heads] = _write_index(self._rows, self.position, slab, by_row=False)
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

    def attend(self, query, keys, values, scale: float, window: int | None, softcap: float | None):
        _, heads, tokens, _ = query.shape
        out = query.new_empty(1, tokens, heads, values.shape[-1])
        for segment in self.segments:
            part = self._attend_segment(
                query[:, :, segment.first : segment.last],
                keys[segment.slot : segment.slot + 1, :, : segment.stop],
                values[segment.slot : segment.slot + 1, :, : segment.stop],
                segment, scale, window, softcap,
            )  # fmt: skip
            out[:, segment.first : segment.last] = part.transpose(1, 2)
        return out

    def _attend_segment(self, query, keys, values, segment: Segment, scale, window, softcap):
        _, heads, tokens, dim = query.shape
        kv_heads, group = keys.shape[1], heads // keys.shape[1]
        if window is not None and window >= segment.stop:
            window = None
        if softcap is None and window is None and segment.start == 0:
            return functional.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=scale, enable_gqa=group > 1
            )
        # The group's query heads as further queries of their KV head: nothing is repeated.
        query = query.reshape(1, kv_heads, group * tokens, dim)
        mask = self.mask(segment, window, query.dtype, group)
        out = _attention(query, keys, values, mask, scale, softcap)
        return out.reshape(1, heads, tokens, values.shape[-1])


def _attention(query, keys, values, mask: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """[batch, kv_heads, queries, dim] against [batch, kv_heads, length, dim]; mask is added to the scores."""
    if softcap is None:
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = torch.tanh(torch.matmul(query, keys.transpose(2, 3)) * (scale / softcap)) * softcap + mask
    # Rows of half-precision weights are normalised in float32, as transformers' eager attention does.
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.matmul(scores.softmax(dim=-1, dtype=dtype).to(values.dtype), values)


@dataclass
class Probe:
    """Records what each layer asks for, and refuses what the views above do not compute.

    layers: the cache's layers, whose `keys` and `values` are what `update` last returned. Attention must get just
    these: the views read slabs, not what a model makes of them afterwards (DeepSeek's compressed KV, for one).
    """

    layers: list
    windows: dict[int, int | None] = field(default_factory=dict)

    def attend(self, module, query, keys, values, attention_mask, dropout, sliding_window, softcap, is_causal, others):
        name, layer = type(module).__name__, getattr(module, "layer_idx", None)
        unknown = sorted(k for k, v in others.items() if v is not None and k not in _HARMLESS)
        reason = None
        if not isinstance(layer, int) or layer in self.windows:
            reason = f"calls attention for layer {layer!r}, not once for each layer index"
        elif not (_same(keys, self.layers[layer].keys) and _same(values, self.layers[layer].values)):
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
        elif not all(isinstance(x, int | float | None) for x in (sliding_window, softcap)):
            reason = f"passes sliding_window={sliding_window!r}, softcap={softcap!r}"
        if reason is not None:
            raise UnsupportedModelError(f"{name} {reason}, which this engine does not know how to compute")
        self.windows[layer] = sliding_window
        # The probe feeds one token, whose attention is its own value.
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
            module, query, key, value, attention_mask, dropout, sliding_window, softcap, is_causal, kwargs
        )
        return out.contiguous(), None
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} passed an attention mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return view.attend(query, key, value, scale, sliding_window, softcap), None


AttentionInterface.register(NAME, ragged_attention)
