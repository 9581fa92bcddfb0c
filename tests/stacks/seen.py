"""What the sampler of an engine in this process saw and answered, against the float64 reference."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from power_kernels import rng
from power_kernels.api.engines.serving.rows import PowerRows
from power_kernels.reference import rows as reference
from power_kernels.slots import SlotBound, SlotField, SlotFlag
from power_kernels.state import Status


@dataclass
class Row:
    """A row that was ours in one step: its slot's parameters before, what it was given and what it answered."""

    field: dict[SlotField, int]
    alpha: float
    beta: float
    theta: float
    length_bonus: float
    cumw: float
    logits: np.ndarray  # float64
    position: int
    live: bool
    entropy_wanted: bool
    token: int
    logq: float
    weight: float
    entropy: float
    flags: int

    @property
    def answer_position(self) -> int:
        return self.position + 1 - self.field[SlotField.BASE]


@contextlib.contextmanager
def seen():
    """Rows, in the order they were drawn in, of all steps while this is open."""
    rows: list[Row] = []
    draw = PowerRows.draw

    def recorded(self, logits, slots, position, live, token, values, flags):
        field, exponent, bound, cumw = (t.clone() for t in self.table.tensors())
        draw(self, logits, slots, position, live, token, values, flags)
        for i, slot in enumerate(slots.tolist()):
            if not self.on[slot]:
                continue
            quantities = values[i].tolist()
            rows.append(
                Row(
                    field={column: int(field[slot, column]) for column in SlotField},
                    alpha=float(exponent[slot, 0]), beta=float(exponent[slot, 1]),
                    theta=float(bound[slot, SlotBound.THETA]),
                    length_bonus=float(bound[slot, SlotBound.LENGTH_BONUS]),
                    cumw=float(cumw[slot]),
                    logits=logits[i].double().numpy().copy(), position=int(position[i]), live=bool(live[i]),
                    entropy_wanted=self.entropy, token=int(token[i]), logq=quantities[0], weight=quantities[1],
                    entropy=quantities[2], flags=int(flags[i]),
                )
            )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PowerRows, "draw", recorded)
        yield rows


def check(rows: list[Row]) -> Counter:
    """Every row against the reference on the logits that it was given. Returns how many there were of each kind."""
    kinds: Counter = Counter()
    for row in rows:
        t, field = row.answer_position, row.field
        exclude = field[SlotField.EXCLUDE] if t == field[SlotField.FIRST] else -1
        kinds["rows"] += 1
        if not row.live:
            kinds["in their prompt"] += 1
            continue
        words = [t, field[SlotField.SERIAL], field[SlotField.CHAIN_ID], field[SlotField.PROMPT_ID]]
        uniform = rng.position_uniforms(field[SlotField.SEED], [words[0]], *words[1:])[0, 0]
        token = reference.draw_token(row.logits, row.beta, float(uniform), exclude)
        of = reference.token_quantities(row.logits, token, row.alpha, row.beta)
        assert row.flags & ~SlotFlag.REJECTED == Status.OK
        np.testing.assert_allclose([row.logq, row.weight], [of.logq, of.weight], atol=3e-6, rtol=1e-6)
        if row.entropy_wanted:
            np.testing.assert_allclose(row.entropy, reference.entropy(row.logits), atol=1e-5)
            kinds["with entropy"] += 1
        total = row.cumw + np.float64(np.float32(row.weight))
        n, horizon = t + 1, field[SlotField.HORIZON]
        least = n if field[SlotField.CAN_END_EARLY] else horizon
        most = max(row.length_bonus * k - np.log(k) for k in (least, horizon))
        rejected = bool(row.flags & SlotFlag.REJECTED)
        if abs(total + most - row.theta) > 1e-6:
            assert rejected == (total + most < row.theta)
        assert row.token == (field[SlotField.STOP_TOKEN] if rejected else token)
        kinds["rejected"] += rejected
        kinds["excluded"] += exclude >= 0
    return kinds


def assert_exponents_differ(rows: list[Row], count: int) -> None:
    assert len({(row.alpha, row.beta, row.field[SlotField.SEED]) for row in rows}) >= count
