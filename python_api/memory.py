"""How much memory a device can still give."""

from __future__ import annotations

from pathlib import Path

import torch


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
    """Whether torch, on a GPU or on a CPU, could not allocate. A CPU's allocator has no exception of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


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
