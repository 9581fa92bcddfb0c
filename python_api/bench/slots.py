"""`sample_slots`: a serving stack's whole sampler step, parameters by slot, the running W and the early rejection.

Bytes: every logit once, B*V*itemsize, and of a row its slot, position and flag, what its slot holds, and its results.
Yardstick: `sample_tokens_out` of the same rows, which is told its parameters by row and keeps no sums. Opponents:

    composed           the same step by some twenty torch operations around `sample_tokens`
    softmax, race      a stack's own step at a temperature: softmax, a token by an exponential race, which does not wait
                       for the device, log p of it from a log_softmax. No logq, no weight, no sums
    softmax, multinomial   the same with torch.multinomial
"""

from __future__ import annotations

import torch

import power_kernels as pk
from power_kernels.api.bench.harness import Point, Suite, Workload
from power_kernels.api.bench.logits import ALPHA, normal_logits, points
from power_kernels.slots import SlotField, SlotTable

FORMULA = "B*V*itemsize + 173*B: logits; slot, position, live; 11 fields, 2 exponents, 2 bounds, W twice; the results"
BASE, HORIZON = 100, 512


def step_bytes(rows: int, vocab: int, itemsize: int) -> int:
    """What a row reads besides its logits (17 + 88 + 8 + 16 + 8) and writes (8 of W, 8 + 12 + 8 + 8)."""
    return rows * (vocab * itemsize + (8 + 8 + 1) + (88 + 8 + 16 + 8) + 8 + (8 + 12 + 8))


def table_of(slots: int, device: torch.device) -> SlotTable:
    table = SlotTable.allocate(slots, device)
    for column, value in dict(ACTIVE=1, BASE=BASE, HORIZON=HORIZON, CAN_END_EARLY=1, STOP_TOKEN=2).items():
        table.field[:, SlotField[column]] = value
    table.field[:, SlotField.CHAIN_ID] = torch.arange(slots, device=device)
    table.exponent.fill_(ALPHA)
    table.bound[:, 0] = -1e9  # tested, and never rejected
    return table


def composed(table: SlotTable, log_n, logits, slot, position, live):
    """The step in torch. log_n: float64 table of log n."""
    field, (alpha, beta) = table.field[slot], table.exponent[slot].unbind(1)
    theta, bonus = table.bound[slot].unbind(1)
    t = position + 1 - field[:, SlotField.BASE]
    prompt = field[:, SlotField.PROMPT_ID] << 3
    counter = torch.stack([t, field[:, SlotField.SERIAL], field[:, SlotField.CHAIN_ID], prompt], 1).to(torch.int32)
    exclude = torch.where(t == field[:, SlotField.FIRST], field[:, SlotField.EXCLUDE], -1)
    seed = field[:, SlotField.SEED].contiguous()
    out = pk.sample_tokens(logits, alpha.contiguous(), beta.contiguous(), seed, counter, exclude)
    w = table.cumw[slot] + torch.where(live, out.weight.double(), 0.0)
    table.cumw[slot] = w
    horizon = field[:, SlotField.HORIZON]
    least = torch.where(field[:, SlotField.CAN_END_EARLY] > 0, t + 1, horizon)
    most = torch.maximum(bonus * least - log_n[least], bonus * horizon - log_n[horizon])
    rejected = live & (w + most < theta)
    stop = field[:, SlotField.STOP_TOKEN]
    token = torch.where(rejected & (stop >= 0), stop, out.token)
    values = torch.stack([out.logq, out.weight, torch.zeros_like(out.weight)], 1)
    return token, values, out.status + 8 * rejected.long()


def softmax_step(logits, column, race: bool):
    """logits [B, V], column: the inverse temperature [B, 1]. Token and its log p."""
    z = logits.float() * column
    p = torch.softmax(z, -1)
    token = (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True) if race else torch.multinomial(p, 1)
    return token, torch.log_softmax(z, -1).gather(1, token)


def build(point: Point, device: torch.device) -> Workload:
    rows, vocab = point.shape["rows"], point.shape["vocab"]
    logits = normal_logits(rows, vocab, point.dtype, device)
    ours, theirs = table_of(rows, device), table_of(rows, device)
    slot = torch.arange(rows, device=device).flip(0)
    position = torch.full((rows,), BASE + 5, device=device)
    live = torch.ones(rows, dtype=torch.bool, device=device)
    workspace = torch.empty(pk.workspace_size(rows, vocab), device=device)
    token, flags = torch.zeros(2, rows, dtype=torch.int64, device=device).unbind()
    values = torch.zeros(rows, 3, device=device)
    log_n = torch.arange(HORIZON + 2, dtype=torch.float64, device=device).clamp(min=1).log()
    alpha, seed = torch.full((rows,), ALPHA, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    counter = torch.arange(4 * rows, dtype=torch.int32, device=device).view(rows, 4)
    logp, logq, weight = torch.empty(3, rows, device=device).unbind()
    status = torch.empty(rows, dtype=torch.int32, device=device)
    sampled = (workspace, token, logp, logq, weight, None, status)
    column = alpha[:, None]

    return Workload(
        {
            "sample_slots_out": lambda: pk.sample_slots_out(
                ours, logits, slot, position, live, workspace, token, values, flags
            ),
            "sample_slots": lambda: pk.sample_slots(ours, logits, slot, position, live),
            "sample_tokens alone": lambda: pk.sample_tokens_out(logits, alpha, alpha, seed, counter, None, *sampled),
            "composed": lambda: composed(theirs, log_n, logits, slot, position, live),
            "softmax, race": lambda: softmax_step(logits, column, True),
            "softmax, multinomial": lambda: softmax_step(logits, column, False),
        },
        ours="sample_slots_out",
        yardstick="sample_tokens alone",
        bytes=step_bytes(rows, vocab, point.dtype.itemsize),
        count=rows,
        graph=frozenset({"sample_slots_out", "sample_tokens alone", "composed", "softmax, race"}),
    )


STEP = Suite(
    "sample_slots",
    "Sampling by slot",
    "tokens",
    FORMULA,
    ("sample_slots_out", "sample_slots", "sample_tokens alone", "composed", "softmax, race"),
    points("sample_slots"),
    build,
)
