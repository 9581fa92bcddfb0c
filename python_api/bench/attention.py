"""`decode_attention`: one query a lane against KV slabs [rows, kv_heads, longest, width], each lane of its own length.

Bytes: each lane's own K and V, 2 * rows * mean * kv_heads * width * itemsize a layer, queries and results, positions.
What reads up to the longest lane instead reads longest / mean times the KV, and repeating it for every query head costs
two more passes over heads / kv_heads times that.

Ours is the kernel that the Hugging Face engine takes on the device. Opponents: one padded and masked call of
scaled-dot-product attention with the query heads of a KV head as its queries, nothing repeated; the same with KV
repeated for every query head, as transformers does with a mask; flash-attn's flash_attn_with_kvcache.

A call goes through `layers` slabs, so that more is read than caches hold.
"""

from __future__ import annotations

import random

import torch
from torch.nn.functional import scaled_dot_product_attention

from power_kernels.api.bench.harness import Call, Point, Suite, Workload
from power_kernels.api.bench.opponents import add_library
from power_kernels.api.engines.huggingface.decode_attention import PADDED, DecodeView, choose
from power_kernels.api.engines.huggingface.ragged_cache import KvLayout

FORMULA = (
    "layers*(2*rows*mean*kv_heads*width + 2*rows*heads*width)*itemsize + 8*rows: each lane's own KV, queries, results; "
    "padded reads longest/mean times the KV"
)
# Heads, KV heads, width of SmolLM2-135M and Qwen2.5-7B
SMALL, SEVEN = (9, 3, 64), (28, 4, 128)
# Rows, shortest, longest: lanes of many prompts, lanes that go together, many short ones
UNEQUAL, EQUAL, SHORT = (16, 64, 3072), (16, 600, 600), (64, 100, 500)


def attention_bytes(layers: int, heads: int, kv_heads: int, width: int, itemsize: int, lengths: list[int]) -> int:
    rows = len(lengths)
    return layers * 2 * (sum(lengths) * kv_heads + rows * heads) * width * itemsize + 8 * rows


def lane_lengths(rows: int, shortest: int, longest: int) -> list[int]:
    """Evenly from shortest to longest, in a fixed order."""
    lengths = [shortest + (longest - shortest) * i // max(1, rows - 1) for i in range(rows)]
    random.Random(0).shuffle(lengths)
    return lengths


def points(grid: str, device: str) -> list[Point]:
    if grid == "quick":
        sizes, dtypes = [(2, *SMALL, 4, 16, 200)], (torch.float32,)
    elif device == "cpu":
        sizes = [(4, *SMALL, *UNEQUAL), (8, *SMALL, *EQUAL), (4, *SMALL, *SHORT), (1, *SEVEN, *UNEQUAL)]
        sizes += [(2, *SEVEN, *EQUAL), (1, *SEVEN, 32, 64, 3072)] if grid == "full" else []
        dtypes = (torch.float32, torch.bfloat16) if grid == "full" else (torch.float32,)
    else:
        sizes = [(4, *SEVEN, rows, 64, 3072) for rows in (1, 4, 16, 64, 256)]
        sizes += [(4, *SEVEN, 64, 1568, 1568), (8, *SMALL, *UNEQUAL)]
        dtypes = (torch.bfloat16,)
    return [_point(dtype, *size) for size in sizes for dtype in dtypes]


def _point(dtype, layers, heads, kv_heads, width, rows, shortest, longest) -> Point:
    shape = dict(layers=layers, heads=heads, kv_heads=kv_heads, width=width, rows=rows)
    lengths = lane_lengths(rows, shortest, longest)
    return Point(
        "decode_attention", dtype, {**shape, "shortest": shortest, "mean": sum(lengths) // rows, "longest": longest}
    )


def build(point: Point, device: torch.device) -> Workload:
    layers, heads, kv_heads, width, rows, shortest, _, longest = point.shape.values()
    group, scale = heads // kv_heads, width**-0.5
    lengths = lane_lengths(rows, shortest, longest)
    longest = max(lengths)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(point.dtype)

    slabs = [normal(2, rows, kv_heads, longest, width).unbind() for _ in range(layers)]
    query = normal(rows, heads, 1, width)
    position = torch.tensor(lengths, device=device) - 1
    kernel = choose(KvLayout((((kv_heads, width),) * 2,), point.dtype), heads, device)

    def through_view(kernel: str) -> Call:
        def run() -> list[torch.Tensor]:
            view = DecodeView(position, longest, kernel)
            return [view.attend(query, keys, values, scale, None, None) for keys, values in slabs]

        return run

    def repeated() -> list[torch.Tensor]:
        mask = DecodeView(position, longest).mask(None, point.dtype)
        outs = []
        for keys, values in slabs:
            k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (keys, values))
            outs.append(scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale).transpose(1, 2))
        return outs

    work = Workload(
        {"decode_attention": through_view(kernel), "padded": through_view(PADDED), "repeated KV": repeated},
        ours="decode_attention",
        yardstick="padded",
        bytes=attention_bytes(layers, heads, kv_heads, width, point.dtype.itemsize, lengths),
        flops=4 * layers * sum(lengths) * heads * width,
        count=rows * layers,
        graph=frozenset({"decode_attention", "padded", "repeated KV"}),
    )

    def flash_attn(package) -> Call:
        used = (position + 1).to(torch.int32)
        asked = query.transpose(1, 2)
        caches = [(keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in slabs]
        return lambda: [
            package.flash_attn_with_kvcache(asked, k, v, cache_seqlens=used, softmax_scale=scale) for k, v in caches
        ]

    add_library(work, "flash-attn with_kvcache", "flash_attn", flash_attn, device)
    return work


DECODE = Suite(
    "decode_attention",
    "Decode attention over lanes of unequal length",
    "lanes",
    FORMULA,
    ("decode_attention", "padded", "repeated KV"),
    points,
    build,
)
