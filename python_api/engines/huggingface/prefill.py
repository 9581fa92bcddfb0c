"""Prompts: what is asked of them, which slot holds which, and how they are packed into forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from power_kernels.api.engines.huggingface.ragged_attention import Segment
from power_kernels.errors import ArgumentError


def check_prompts(
    slots: Sequence[int], prompts: Sequence[Sequence[int]], *, chains: int, max_length: int, vocab_size: int
) -> None:
    """Raise ArgumentError for slots, lengths or token ids that a run of `chains` slots does not have."""
    if len(slots) != len(prompts) or len(set(slots)) != len(slots):
        raise ArgumentError(f"slots is {slots!r} for {len(prompts)} prompts; it must name one slot each, once")
    for slot, prompt in zip(slots, prompts, strict=True):
        if not 0 <= slot < chains:
            raise ArgumentError(f"slot {slot} is out of range; slots lie in [0, {chains})")
        if not 1 <= len(prompt) < max_length:
            raise ArgumentError(
                f"a prompt has {len(prompt)} tokens; it must have at least 1 and fewer than {max_length}"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocab_size:
            raise ArgumentError(f"a prompt has token ids in [{low}, {high}]; the model embeds [0, {vocab_size})")


class HeldPrompts:
    """Which prompt each chain slot of a run holds, and how far the slot's rows may have been written."""

    def __init__(self, chains: int, positions: int):
        self.steps = 0  # decode steps of this run
        self._positions = positions
        self._prompt: list[tuple[int, ...] | None] = [None] * chains
        # `base` positions at step number `at`, one more a step.
        self._written: list[tuple[int, int] | None] = [None] * chains

    def kept(self, slot: int, prompt: tuple[int, ...]) -> int:
        """How many positions of the slot already hold what this prompt needs: all or none."""
        return len(prompt) - 1 if self._prompt[slot] == prompt else 0

    def holders(self, but: Sequence[int]) -> dict[tuple[int, ...], int]:
        """The slots that hold a prompt and are not in `but`, by prompt."""
        return {held: slot for slot, held in enumerate(self._prompt) if held is not None and slot not in but}

    def start(self, slot: int, prompt: tuple[int, ...]) -> None:
        """The slot is being written: it holds nothing that may be copied until `finish`."""
        self._prompt[slot] = None
        self._written[slot] = (len(prompt), self.steps)

    def finish(self, slot: int, prompt: tuple[int, ...]) -> None:
        self._prompt[slot] = prompt

    def move(self, source: int, target: int) -> None:
        self._prompt[target], self._prompt[source] = self._prompt[source], None
        self._written[target] = self._written[source]

    def reach(self, slot: int) -> int:
        """No position of this slot's rows at or beyond this one has been written."""
        if self._written[slot] is None:
            return 0
        base, at = self._written[slot]
        return min(base + self.steps - at, self._positions)


def packed(
    prompts: Iterable[tuple[int, tuple[int, ...]]], most: int
) -> Iterator[tuple[list[int], list[int], list[Segment]]]:
    """Cut (slot, tokens) pairs into forward passes of at most `most` tokens: (tokens, positions,
    segments)."""
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    for slot, prompt in prompts:
        start = 0
        while start < len(prompt):
            stop = min(len(prompt), start + most - len(tokens))
            segments.append(Segment(slot, len(tokens), len(tokens) + stop - start, start))
            tokens += prompt[start:stop]
            positions += range(start, stop)
            start = stop
            if len(tokens) == most:
                yield tokens, positions, segments
                tokens, positions, segments = [], [], []
    if tokens:
        yield tokens, positions, segments
