"""The bytes that a run takes, on top of the model, before it is begun."""

from __future__ import annotations

from power_kernels.api.engines.huggingface.cpu_linear import packed_bytes
from power_kernels.api.engines.huggingface.prefix_memory import PrefixMemory


def run_bytes(engine, *, chains: int, lanes: int, positions: int) -> int:
    """Of the KV of `chains` slots of `lanes` lanes, of their logits, and on a CPU of what speeds a run up."""
    rows = chains * lanes
    logits = 3 * rows * engine.vocab_size * 4  # as the model gives them, in float32, and a workspace
    total = (rows + chains) * positions * engine._layout.token_bytes + logits
    if engine.device.type == "cpu":
        total += packed_bytes(engine.model)
        if engine.remember and engine._head is not None:
            weight = engine._head.module.weight
            total += PrefixMemory.bytes_of(engine._layout, weight, chains=chains, positions=positions)
    return total


def particle_bytes(engine, *, groups: int, particles: int, positions: int) -> int:
    """Of keys and values and last hidden states of `groups` slots of so many particles, and of their logits."""
    weight = engine._head.module.weight
    rows = groups * (particles + 2)
    logits = 3 * groups * (particles + 1) * engine.vocab_size * 4
    total = rows * positions * (engine._layout.token_bytes + weight.shape[1] * weight.dtype.itemsize) + logits
    return total + (packed_bytes(engine.model) if engine.device.type == "cpu" else 0)
