"""What `branch_particles` and `select_candidate` pass on from position to position (DESIGN 3.9), as plain tensors.

G groups, one a prompt and chain; N particles a group. A group has R = N + 1 rows: [0, N) hold particles, row N holds
the reference of a conditional sweep, the current answer, whose child survives at every position. A row is a place, also
for the keys and values of its particle: a child that takes its parent's row needs nothing copied.

The enum below names columns; csrc/state.h mirrors it (an extension built from another is not loaded).
"""

from __future__ import annotations

from enum import IntEnum


class Tally(IntEnum):
    """Columns of `tally` float64 [G, 4]: what a group's closed answers, its candidates, add up to, in nats.

    A selection weight is a weight with the closing bonus. -inf: none so far.
    """

    OTHERS = 0  # log of the sum of the selection weights of all candidates but the reference
    KEPT = 1  # selection weight of the candidate that was kept, drawn from those in proportion to theirs
    REFERENCE = 2  # selection weight of the reference, once it has closed
    MASS = 3  # log of the sum of the weights of all candidates, without the closing bonus: log Zhat at the end
