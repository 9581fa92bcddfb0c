"""Stop strings as an automaton over tokens (DESIGN 3.1): what `mh_advance` takes as `stop_next`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import ArgumentError, ArgumentTypeError
from .state import MAX_STOP_STATES

if TYPE_CHECKING:
    import numpy as np

CLOSED = -1
MOST_BYTES = 2**30  # of a table
_AT_ONCE = 2**22  # entries that are worked out at once, in 16 bytes each


def stop_automaton(stop: Sequence[bytes], vocabulary: Sequence[bytes]) -> np.ndarray:
    """The Aho-Corasick automaton of some stop strings, fed whole tokens.

    stop: at least one string of bytes, none empty. vocabulary: the bytes that each of the V >= 1 tokens adds to a text;
    b"" for a token that adds none. Returns int16 [S, V], S at most 1 + the bytes of `stop`: entry [s, v], in [-1, S),
    is the state after token v in state s, -1 where the bytes of v complete a stop string, at their end or before it.
    An answer begins in state 0: nothing before it, the prompt's text in particular, can be part of a match. A state is
    the longest end of the text so far that a stop string begins with.

    Raises ArgumentTypeError where an entry is not bytes; ArgumentError for an empty one, for more than
    `MAX_STOP_STATES` states, and for a table of more than `MOST_BYTES`.
    """
    import numpy as np  # here, so that the operators work without it

    for name, strings in (("stop", stop), ("vocabulary", vocabulary)):
        for i, string in enumerate(strings):
            if not isinstance(string, bytes):
                raise ArgumentTypeError(f"{name}[{i}] is {string!r}, a {type(string).__name__}; it must be bytes")
        if not strings:
            raise ArgumentError(f"{name} is empty; it must hold at least one entry")
    if b"" in stop:
        raise ArgumentError(f"stop[{list(stop).index(b'')}] is empty; it would close every answer at once")
    after_byte = _byte_automaton(stop)
    closed = len(after_byte) - 1
    most = min(MAX_STOP_STATES, MOST_BYTES // (2 * len(vocabulary)))
    if closed > most:
        raise ArgumentError(
            f"stop has {closed} different beginnings; with {len(vocabulary)} tokens it must have at most {most}"
        )
    lengths = np.array([len(token) for token in vocabulary])
    order = np.argsort(-lengths, kind="stable")  # the longest first, so that those with a j-th byte stand in front
    padded = np.frombuffer(b"".join(vocabulary), dtype=np.uint8)
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    table = np.empty((closed, len(vocabulary)), dtype=np.int16)
    rows = max(1, _AT_ONCE // len(vocabulary))
    for first in range(0, closed, rows):
        states = np.repeat(np.arange(first, min(first + rows, closed))[:, None], len(vocabulary), axis=1)
        for j in range(lengths.max()):
            longer = order[: np.count_nonzero(lengths > j)]
            states[:, longer] = after_byte[states[:, longer], padded[starts[longer] + j]]
        table[first : first + rows] = np.where(states == closed, CLOSED, states)
    return table


def _byte_automaton(stop: Sequence[bytes]) -> np.ndarray:
    """[S + 1, 256]: the state after a byte. The last one is that of a complete stop string, which nothing leaves."""
    import numpy as np

    children: list[dict[int, int]] = [{}]
    complete = [False]
    for string in stop:
        state = 0
        for byte in string:
            if complete[state]:
                break  # a shorter stop string ends every text that this one would
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                complete.append(False)
            state = children[state][byte]
        complete[state] = True
    # Breadth first: the state after the longest proper end that is also a beginning is known before it is needed.
    after = np.zeros((len(children), 256), dtype=np.int64)
    shorter = [0] * len(children)
    waiting = deque([0])
    while waiting:
        state = waiting.popleft()
        complete[state] |= complete[shorter[state]]
        after[state] = after[shorter[state]] if state else 0
        for byte, child in children[state].items():
            shorter[child] = int(after[state, byte])
            after[state, byte] = child
            waiting.append(child)
    # Complete states and those that only they lead to go; what is left is numbered anew, the beginning being 0.
    reached, waiting = {0: 0}, deque([0])
    while waiting:
        for state in np.unique(after[waiting.popleft()]).tolist():
            if not complete[state] and state not in reached:
                reached[state] = len(reached)
                waiting.append(state)
    number = np.full(len(children), len(reached))
    number[list(reached)] = list(reached.values())
    table = np.full((len(reached) + 1, 256), len(reached))
    table[:-1] = number[after[list(reached)]]
    return table
