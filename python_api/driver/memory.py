"""How much memory a device can still give."""

from __future__ import annotations

from pathlib import Path

import torch

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a new run may take on `device`, or None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds and does not use is there for us too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [limit for limit in (_available(), _left_to_this_group()) if limit is not None]
    return min(limits, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on a CPU. Allocators, libraries and drivers each have words of their own for
    it, and a recording that fails for it may end with another error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in _OUT_OF_MEMORY):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _available() -> int | None:
    """Linux's own estimate of what can be taken without swapping."""
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left_to_this_group(root: str = "/sys/fs/cgroup") -> int | None:
    """What a container may still take: cgroup v2, then v1. Files that it can give back (caches) count as free."""
    for most, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, taken = _read(f"{root}/{most}").strip(), _read(f"{root}/{used}").strip()
        if limit.isdigit() and taken.isdigit():
            statistics = dict(
                line.split() for line in _read(f"{root}/{Path(most).parent}/memory.stat").splitlines() if " " in line
            )
            return max(0, int(limit) - int(taken) + int(statistics.get(cache, 0)))
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
