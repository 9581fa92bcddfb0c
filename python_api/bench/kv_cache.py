"""`kv_copy_ranges`: ragged slices of every layer's K and V between two slabs [2*layers, rows, heads, positions, width].

Bytes: each moved element is read and written, 2 * groups * heads * width * itemsize a position, and 16 a range.
Opponents: a slice copy per range (all layers at once), a slice copy per layer and range, one indexed copy of all
positions, and vLLM's reshape_and_cache_flash, a launch per layer, from keys and values that were gathered beforehand
(so it moves half of what it would have to).
"""

from __future__ import annotations

import torch

import power_kernels as pk
from power_kernels.api.bench.harness import Call, Point, Suite, Workload
from power_kernels.api.bench.opponents import add_library, vllm_cache_write

FORMULA = "2*groups*heads*width*itemsize*positions + 16*ranges: every moved element read and written; the ranges"
# Qwen2.5-7B (28 layers, 4 KV heads of 128) and SmolLM2-135M (30 layers, 3 KV heads of 64)
MODELS = {"7B": (56, 4, 128), "135M": (60, 3, 64)}
BLOCK = 16  # of vLLM's cache


def copy_bytes(groups: int, heads: int, width: int, itemsize: int, positions: int, ranges: int) -> int:
    return 2 * groups * heads * width * itemsize * positions + 16 * ranges


def points(grid: str, device: str) -> list[Point]:
    seven, small = MODELS["7B"], MODELS["135M"]
    if grid == "quick":
        sizes = [(*small, 4, 128)]
    elif grid == "default" and device == "cpu":
        sizes = [(*small, 16, 128), (*seven, 1, 300), (*seven, 4, 300)]
    else:
        sizes = [(*small, 16, 128), (*seven, 1, 300), (*seven, 4, 300), (*seven, 16, 300), (*seven, 64, 300)]
    names = ("groups", "heads", "width", "rows", "suffix")
    return [Point("kv_copy_ranges", torch.bfloat16, dict(zip(names, size, strict=True))) for size in sizes]


def build(point: Point, device: torch.device) -> Workload:
    groups, heads, width, rows, suffix = point.shape.values()
    length = -(-(2 * suffix) // BLOCK) * BLOCK
    shape = (groups, rows, heads, length, width)
    src = torch.ones(shape, dtype=point.dtype, device=device)
    dst = torch.zeros(shape, dtype=point.dtype, device=device)
    # Suffixes of unequal length, `suffix` on average, from unequal cuts into another row.
    moves = []
    for row in range(rows):
        size = suffix + (suffix // 4) * ((row % 3) - 1) if rows > 2 else suffix
        start = (37 * row) % (length - size)
        moves.append((row, rows - 1 - row, start, start + size))
    ranges = torch.tensor(moves, dtype=torch.int32, device=device)
    moved = sum(stop - start for *_, start, stop in moves)
    index = [torch.tensor([i for d, s, a, b in moves for i in part(d, s, a, b)], device=device) for part in _PARTS]
    to_row, from_row, position = index

    def slices() -> None:
        for dst_row, src_row, start, stop in moves:
            dst[:, dst_row, :, start:stop] = src[:, src_row, :, start:stop]

    def layers() -> None:
        for group in range(groups):
            for dst_row, src_row, start, stop in moves:
                dst[group, dst_row, :, start:stop] = src[group, src_row, :, start:stop]

    def indexed() -> None:
        dst[:, to_row, :, position] = src[:, from_row, :, position]

    work = Workload(
        {
            "kv_copy_ranges": lambda: pk.kv_copy_ranges(dst, src, ranges),
            "a slice copy per range": slices,
            "a slice copy per layer and range": layers,
            "an indexed copy": indexed,
        },
        ours="kv_copy_ranges",
        bytes=copy_bytes(groups, heads, width, point.dtype.itemsize, moved, rows),
        count=moved,
        graph=frozenset(
            {"kv_copy_ranges", "a slice copy per range", "a slice copy per layer and range", "an indexed copy"}
        ),
    )

    def vllm(ops) -> Call:
        cache = torch.zeros(groups, rows * length // BLOCK, BLOCK, heads, width, dtype=point.dtype, device=device)
        gathered = src[:, from_row, :, position].transpose(0, 1).contiguous()  # [groups, moved, heads, width]
        return vllm_cache_write(ops, gathered, cache, to_row * length + position)

    add_library(work, "vLLM reshape_and_cache_flash, gathered before", "vllm._custom_ops", vllm, device)
    return work


_PARTS = (
    lambda dst_row, src_row, start, stop: [dst_row] * (stop - start),
    lambda dst_row, src_row, start, stop: [src_row] * (stop - start),
    lambda dst_row, src_row, start, stop: range(start, stop),
)

COPY = Suite(
    "kv_copy_ranges",
    "KV copies",
    "positions",
    FORMULA,
    ("kv_copy_ranges", "a slice copy per range", "a slice copy per layer and range", "an indexed copy"),
    points,
    build,
)
