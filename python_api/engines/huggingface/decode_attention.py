"""Decode attention: one query a row, against KV slabs whose rows end at different positions.

    out[r, h] = softmax(scale * q[r, h] K[r, h / group, a_r : b_r]^T) V[r, h / group, a_r : b_r]
    b_r = position[r] + 1,  a_r = max(0, b_r - window), or 0

With attention sinks (gpt-oss) each head has one more logit s[h] in its softmax, whose value is nothing:

    out[r, h] = sum_j exp(z_j) V_j / (exp(s[h]) + sum_j exp(z_j)),  z the scaled scores

q [rows, heads, 1, dim], K and V [R, kv_heads, S, dim], heads = kv_heads * group. The group of query heads that share a
KV head are handled as that head's queries, so KV is read once and never repeated. Bytes a layer that must be read:
2 * sum_r (b_r - a_r) * kv_heads * dim * itemsize.

Three ways to compute it:

    flash    torch's flash attention for sequences of different lengths, told each row's own (a_r, b_r) in device
             tensors: nothing is masked, nothing read beyond them, nothing looked at by the host. The slab is described
             to it as it lies. CUDA, fp16 and bf16.
    rows     one call of scaled-dot-product attention a row, with just that row's positions, or for neighbours that end
             alike. On a CPU, where the host may look at the positions. A row's bits depend on that row alone.
    padded   one call for all rows up to the longest, the rest masked. Everything else.

A soft cap on the scores and sinks are in no library kernel used here: `rows` and `padded` compute them from matrix
products. Where `flash` runs, layers with a soft cap take `padded`; with sinks, what flash gives without them is
multiplied by sigmoid(LSE(z) - s), the share that the sink leaves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch.nn import functional

from power_kernels.api import torch_private
from power_kernels.errors import ArgumentError

FLASH, ROWS, PADDED = "flash", "rows", "padded"
KERNELS = {
    FLASH: "torch's flash attention, each lane's own length",
    ROWS: "scaled-dot-product attention lane by lane, each lane's own length",
    PADDED: "scaled-dot-product attention up to the longest lane's length",
}

_HALF = (torch.float16, torch.bfloat16)
_FLASH_DIM, _FLASH_DIM_MULTIPLE = 256, 8
_INT32_POSITIONS = 2**31  # flash attention counts positions of the packed slab in int32
# `rows` makes kv_heads tasks a call. Where these keep fewer of the threads busy than this, one padded call is better.
_LEAST_BUSY = 0.7
# Relative root mean square. Rounding of fp16 and bf16 outputs gives 1e-3 and 6e-3, one position too many or too few of
# seven 0.3.
_TRIAL_TOLERANCE = 3e-2


class DecodeView:
    """One token for each of the first `rows` lanes, or of those in `lanes`: where it is written and what it sees.

    position: int64 [rows]. Only memory of the row itself is touched whatever they are: below 0 they are taken for 0,
    beyond the slab for its end, and beyond `length` only the `length` first positions are seen.
    length: above all positions that matter; what `padded` reads, and what sizes the work of `flash`.
    kernel: of `KERNELS`. `rows` looks at the positions on the host once, here; the others never do, and what they
        launch depends on rows and length alone.
    lanes: the slab rows that the tokens belong to, ascending; None: the first ones. Only with the kernel `rows`.
    running: bool [rows]; None: all. A row that does not run is written at its position like any other, but sees the
        first position of its slab row alone: nobody looks at what comes out, and reading its past would cost as much as
        that of a row that counts.
    """

    of_chains = False

    def __init__(
        self,
        position: torch.Tensor,
        length: int,
        kernel: str = PADDED,
        lanes: Sequence[int] | None = None,
        running: torch.Tensor | None = None,
    ):
        self.position, self.length, self.rows = position.clamp(min=0), length, position.shape[0]
        # The last position that each row sees.
        self._last = self.position if running is None else self.position * running
        self.kernel, self._lanes = kernel, range(self.rows) if lanes is None else lanes
        if kernel == ROWS:
            self._runs = _runs(self._lanes, [min(p + 1, length) for p in self._last.tolist()])
        elif lanes is not None:
            raise ArgumentError(f"lanes are given with the kernel {kernel!r}; only {ROWS!r} takes them")
        self._index: dict[tuple, torch.Tensor] = {}
        self._masks: dict[tuple, torch.Tensor] = {}
        self._sequences: dict[tuple, tuple] = {}

    def write_index(self, slab: torch.Tensor) -> torch.Tensor:
        """Where the rows' new states go in a slab [R, heads, S, dim] seen as [R * heads * S, dim]: int64."""
        _, heads, positions, _ = slab.shape
        key = (heads, positions)
        if key not in self._index:
            lanes = self._lanes
            if isinstance(lanes, range):
                rows = torch.arange(self.rows, device=self.position.device)
            else:
                rows = torch.tensor(lanes, device=self.position.device)
            self._index[key] = write_index(rows, self.position.clamp(max=positions - 1), slab, by_row=True)
        return self._index[key]

    def attend(
        self,
        query,
        keys,
        values,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[rows, 1, heads, value dim]. sinks: [heads], or None."""
        rows, heads, _, dim = query.shape
        if self.kernel == FLASH and softcap is None:
            return self._flash(query, keys, values, scale, window, sinks)
        kv_heads = keys.shape[1]
        query = query.reshape(rows, kv_heads, heads // kv_heads, dim)
        sinks = None if sinks is None else sinks.reshape(kv_heads, heads // kv_heads, 1)
        compute = self._by_rows if self.kernel == ROWS else self._padded
        out = compute(query, keys, values, scale, window, softcap, sinks)
        return out.reshape(rows, 1, heads, values.shape[-1])

    def _flash(self, query, keys, values, scale, window, sinks) -> torch.Tensor:
        start, used, queries = self._flash_sequences(keys, window)
        longest = self.length if window is None else min(self.length, window)
        out, lse = torch_private.flash_attention_of_sequences(
            query.squeeze(2).contiguous(), packed(keys), packed(values),
            queries=queries, start=start, used=used, longest=longest, scale=scale,
        )  # fmt: skip
        if sinks is not None:
            out = (out * torch.sigmoid(lse.t() - sinks.float())[..., None]).to(out.dtype)
        return out[:, None]

    def _flash_sequences(self, slab: torch.Tensor, window: int | None) -> tuple[torch.Tensor, ...]:
        """(start [rows + 1], used [rows], queries [rows + 1]), int32: row r has query r and sees positions [start[r],
        start[r] + used[r]) of the packed slab. A window moves the start, so that the kernel needs to know of none."""
        _, heads, positions, _ = slab.shape
        key = (heads, positions, window)
        if key not in self._sequences:
            stop = (self._last + 1).clamp(max=self.length)
            queries = torch.arange(self.rows + 1, device=self.position.device)
            start = queries * (heads * positions)
            if window is not None:
                first = (stop - window).clamp(min=0)
                stop = stop - first
                start = torch.cat([start[:-1] + first, start[-1:]])
            self._sequences[key] = tuple(x.to(torch.int32) for x in (start, stop, queries))
        return self._sequences[key]

    def _by_rows(self, query, keys, values, scale, window, softcap, sinks) -> torch.Tensor:
        parts = []
        for first, last, lane, stop in self._runs:
            lanes = slice(lane, lane + last - first)
            seen = slice(0 if window is None else max(0, stop - window), stop)
            parts.append(
                attention(query[first:last], keys[lanes, :, seen], values[lanes, :, seen], None, scale, softcap, sinks)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _padded(self, query, keys, values, scale, window, softcap, sinks) -> torch.Tensor:
        mask = self.mask(window, query.dtype)
        seen = slice(self.rows), slice(None), slice(self.length)
        return attention(query, keys[seen], values[seen], mask, scale, softcap, sinks)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive, [rows, 1, 1, length]; the same one for all layers with this window."""
        key = (window, dtype)
        if key not in self._masks:
            last = self._last.clamp(max=self.length - 1)[:, None]  # a row that sees nothing would be NaN
            column = torch.arange(self.length, device=last.device)
            hidden = column > last
            if window is not None:
                hidden |= column <= last - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=last.device)
            self._masks[key] = mask.masked_fill_(hidden, -math.inf)[:, None, None]
        return self._masks[key]


def _runs(lanes: Sequence[int], stops: list[int]) -> list[tuple[int, int, int, int]]:
    """(first, last, lane, stop) of the tokens [first, last) that one call takes: neighbours in the slab, the first of
    them its row `lane`, that stop at the same position.

    On one thread the library handles each row and head of a call alike, however many there are. On more it deals them
    out, and which thread gets a row may change its last bits, so each row has a call to itself.
    """
    runs: list[tuple[int, int, int, int]] = []
    alone = torch.get_num_threads() > 1
    for row, (lane, stop) in enumerate(zip(lanes, stops, strict=True)):
        if runs and not alone and runs[-1][3] == stop and lanes[row - 1] + 1 == lane:
            runs[-1] = (runs[-1][0], row + 1, runs[-1][2], stop)
        else:
            runs.append((row, row + 1, lane, stop))
    return runs


def write_index(rows: torch.Tensor, positions: torch.Tensor, slab: torch.Tensor, by_row: bool) -> torch.Tensor:
    """Where new states go in `slab` [R, heads, S, dim] seen as [R * heads * S, dim].

    States come as [rows, heads, 1, dim] (by_row) or [1, heads, tokens, dim]; the result has their order.
    """
    heads, length = slab.shape[1], slab.shape[2]
    head = torch.arange(heads, device=rows.device)
    if by_row:
        return ((rows[:, None] * heads + head) * length + positions[:, None]).reshape(-1)
    return ((rows * heads + head[:, None]) * length + positions).reshape(-1)


def packed(slab: torch.Tensor) -> torch.Tensor:
    """A slab [R, heads, S, dim] as packed KV [T, heads, dim] in which row r starts at r * heads * S: a view whose
    entries overlap, since the positions of a row's first head are followed by those of its next."""
    rows, heads, positions, dim = slab.shape
    if not slab.is_contiguous() or rows * heads * positions >= _INT32_POSITIONS:
        raise ArgumentError(
            f"flash attention needs a contiguous slab of fewer than 2**31 positions; this one has {tuple(slab.shape)}"
        )
    total = ((rows - 1) * heads + 1) * positions
    return slab.as_strided((total, heads, dim), (dim, positions * dim, 1))


def attention(
    query,
    keys,
    values,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[batch, kv_heads, queries, dim] against [batch, kv_heads, length, dim]; mask is added to the scores.

    sinks: of each query, [kv_heads, queries, 1].
    """
    if softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = torch.matmul(query, keys.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    # Rows of half-precision weights are normalised in float32, as transformers' eager attention does.
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=dtype)[..., : keys.shape[2]]
    return torch.matmul(weights.to(values.dtype), values)


# ----------------------------------------------------------------------------------------------------
# Choosing


def choose(layout, heads: int, device: torch.device, asked: str | None = None, *, sinks: bool = False) -> str:
    """The kernel of `KERNELS` that decodes with this KV (`ragged_cache.KvLayout`) of a model with `heads` query heads.

    Where `flash` looks possible it is tried, on this device and these shapes, against `padded`; if it fails, `padded`
    is chosen and a RuntimeWarning says why. asked: take this one. sinks: the model has some.

    Raises ArgumentError where `asked` is unknown, cannot run here or fails the trial.
    """
    if asked is not None and asked not in tuple(KERNELS):
        raise ArgumentError(f"attention is {asked!r}; it must be one of {', '.join(map(repr, KERNELS))}")
    shapes = dict.fromkeys(layout.layers)
    if asked == FLASH or (asked is None and device.type == "cuda" and layout.dtype in _HALF and _flash_fits(shapes)):
        trouble = _flash_trouble(shapes, heads, layout.dtype, device, sinks)
        if trouble is None:
            return FLASH
        if asked is not None:
            raise ArgumentError(f"attention is {asked!r}, which does not work here: {trouble}")
        warnings.warn(
            f"decoding reads KV up to the longest lane's length: {KERNELS[FLASH]} does not work here: {trouble}",
            RuntimeWarning,
            stacklevel=3,
        )
        return PADDED
    if asked == ROWS and device.type != "cpu":
        raise ArgumentError(f"attention is {asked!r}, which looks at positions on the host; the model is on {device}")
    if asked is not None:
        return asked
    fewest = min(key[0] for key, _ in shapes)
    return ROWS if device.type == "cpu" and _rows_fill(fewest, torch.get_num_threads()) else PADDED


def recordable(kernel: str) -> str:
    """The kernel for a step that is recorded and replayed: `kernel`, or `padded` where that would look at the host."""
    return PADDED if kernel == ROWS else kernel


def _flash_fits(shapes) -> bool:
    dims = {(key[1], value[1]) for key, value in shapes}
    return all(k == v and k <= _FLASH_DIM and k % _FLASH_DIM_MULTIPLE == 0 for k, v in dims)


def _rows_fill(kv_heads: int, threads: int) -> bool:
    rounds = -(-kv_heads // threads)
    return kv_heads >= _LEAST_BUSY * threads * rounds


def _flash_trouble(shapes, heads: int, dtype: torch.dtype, device: torch.device, sinks: bool = False) -> str | None:
    """Why `flash` cannot be used for KV of these shapes, or None. Ragged rows, with and without a window."""
    stops = [1, 7, 300, 128]  # one position; less than, more than and just a tile of the kernel
    length = max(stops)
    try:
        position = torch.tensor(stops, device=device) - 1
        for (kv_heads, dim), _ in shapes:
            generator = torch.Generator(device).manual_seed(0)

            def normal(*shape, generator=generator):
                return torch.randn(*shape, generator=generator, device=device).to(dtype)

            keys, values = normal(2, len(stops) + 1, kv_heads, length + 20, dim).unbind()
            query = normal(len(stops), max(1, heads // kv_heads) * kv_heads, 1, dim)
            sink = normal(query.shape[1]) if sinks else None
            for window in (None, 5):
                got, want = (
                    DecodeView(position, length, kernel).attend(query, keys, values, dim**-0.5, window, None, sink)
                    for kernel in (FLASH, PADDED)
                )
                error = ((got - want).double().square().mean() / want.double().square().mean()).sqrt().item()
                if not error <= _TRIAL_TOLERANCE:
                    return f"it differs from scaled-dot-product attention by {error:.2g} (relative, window {window})"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # builds and devices without the kernel raise as many types as there are reasons
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return None
