"""`branch_particles`: one position of a group of N particles, every row of logits read once.

Bytes: N*V logits, and what a row and the group read and write. Yardstick: torch.logsumexp of the same rows, one
normaliser of the two and no child. Contenders:

    4 EOS, stop automaton   children that close: one of 4 tokens, or those of a stop string, in some tiles of each row
    composed                what one writes first in torch: log_softmax, topk for the heavy children, cumsum and
                            searchsorted for the light ones. Nothing closes there, no reference, no place for a child
"""

from __future__ import annotations

import torch

import power_kernels as pk
from power_kernels.api.bench.harness import Point, Suite, Workload
from power_kernels.api.bench.logits import DTYPES, VOCABULARY, normal_logits

FORMULA = "N*V*itemsize + 48*(N+1) + 133: logits; weight, order, child, status of a row; the group's vectors, tally"
ALPHA = 2.0
CLOSING = 30  # tokens that complete a stop string


def position_bytes(particles: int, vocab: int, itemsize: int) -> int:
    """Of a row: 8 of weight and 4 of order, a child's 4 + 8 + 8 + 8 + 4 and the status. Of the group: alpha, reference,
    last, closing_bonus, uniform; the tally twice, candidate, candidate_logp, log_threshold."""
    rows = particles + 1
    row, group = (8 + 4) + (4 + 8 + 8 + 8 + 4) + 4, (4 + 8 + 1 + 8 + 16) + 2 * 32 + 16 + 8 + 8
    return particles * vocab * itemsize + rows * row + group


def points(grid: str, device: str) -> list[Point]:
    sizes = [(4, 32_000)] if grid == "quick" else [(8, VOCABULARY), (16, VOCABULARY), (128, VOCABULARY)]
    return [Point("branch_particles", dtype, {"particles": n, "vocab": v}) for dtype in DTYPES for n, v in sizes]


def composed(logits, log_weight, uniform):
    """Parent, token and log_weight of at most N children. logits [N, V], log_weight float64 [N], uniform [1].

    What lies below the threshold is a difference of sums here.
    """
    particles, vocab = logits.shape
    weight = log_weight[:, None] + ALPHA * torch.log_softmax(logits.float(), -1).double()
    top = weight.max()
    mass = (weight - top).exp().flatten()
    heaviest, child = mass.topk(particles)
    places = particles - torch.arange(particles, device=logits.device)
    left = mass.sum() - heaviest.cumsum(0) + heaviest
    heavy = (heaviest * places > left).long().cumprod(0).bool()
    count = heavy.sum().clamp(max=particles - 1)
    kappa = left.gather(0, count[None]) / (particles - count)
    line = mass.index_put((child,), torch.where(heavy, 0.0, heaviest)).cumsum(0)
    point = torch.arange(particles, device=logits.device) - count
    light = torch.searchsorted(line, (uniform + point) * kappa, right=True).clamp(max=line.numel() - 1)
    child = torch.where(heavy, child, light)
    chosen = torch.where(heavy, heaviest, kappa).log() + top
    return child // vocab, child % vocab, chosen


def build(point: Point, device: torch.device) -> Workload:
    particles, vocab = point.shape["particles"], point.shape["vocab"]
    rows = particles + 1
    logits = normal_logits(rows, vocab, point.dtype, device)

    def doubles(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    log_weight, uniform = doubles(1, rows), doubles(1, 2) + 0.5
    log_weight[0, :particles] = normal_logits(1, particles, torch.float64, device) / 3
    log_weight[0, -1] = float("-inf")
    order = torch.arange(rows, dtype=torch.int32, device=device)[None]
    reference, last = torch.tensor([-1], device=device), torch.tensor([False], device=device)
    before = (torch.full((1,), ALPHA, device=device), log_weight, order)
    after = (reference, last, doubles(1), uniform)
    workspace = torch.empty(pk.branch_workspace_size(rows, vocab), device=device)
    tally = doubles(1, 4).fill_(float("-inf"))
    parent, child_order, status = torch.zeros(3, 1, rows, dtype=torch.int32, device=device)
    token, candidate = torch.zeros(1, rows, dtype=torch.int64, device=device), torch.zeros(1, 2, dtype=torch.int64)
    outputs = (
        parent, token, doubles(1, rows), doubles(1, rows), child_order, candidate.to(device), doubles(1), doubles(1),
        status,
    )  # fmt: skip
    none, four = (
        torch.tensor(tokens, dtype=torch.int64, device=device) for tokens in ([], [2, 7, vocab // 2, vocab - 1])
    )
    state = torch.zeros(1, rows, dtype=torch.int16, device=device)
    stops = torch.zeros(2, vocab, dtype=torch.int16, device=device)
    stops[:, torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[:CLOSING].to(device)] = -1

    def into(eos, stop_state, stop_next):
        pk.branch_particles_out(
            logits, *before, stop_state, *after, eos, stop_next, 0.0, 0.0, workspace, tally, *outputs
        )

    return Workload(
        {
            "branch_particles_out": lambda: into(none, None, None),
            "branch_particles_out, 4 EOS": lambda: into(four, None, None),
            "branch_particles_out, stop automaton": lambda: into(none, state, stops),
            "branch_particles": lambda: pk.branch_particles(logits, *before, *after, tally, eos=none),
            "logsumexp": lambda: torch.logsumexp(logits[:particles], -1),
            "composed": lambda: composed(logits[:particles], log_weight[0, :particles], uniform[0, :1]),
        },
        ours="branch_particles_out",
        yardstick="logsumexp",
        bytes=position_bytes(particles, vocab, point.dtype.itemsize),
        count=1,
        graph=frozenset(
            {
                "branch_particles_out", "branch_particles_out, 4 EOS", "branch_particles_out, stop automaton",
                "logsumexp", "composed",
            }
        ),
    )  # fmt: skip


BRANCH = Suite(
    "branch_particles",
    "A position of particles",
    "positions",
    FORMULA,
    ("branch_particles_out", "branch_particles", "logsumexp", "composed"),
    points,
    build,
)
