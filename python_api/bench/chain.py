"""Acceptance throughput: Metropolis-Hastings decisions per second (`mh_accept`), lanes advanced per second
(`mh_advance`).

`mh_accept` over B pairs of answers of T tokens reads 2*B*T weights of 4 bytes and 16 bytes a row (two lengths, log u),
and writes 13 (accept, log_ratio, status). Opponents: the masked float64 sums one would write in torch, the same with a
running sum (`cumsum`, the order that early rejection needs), and torch.compile of the first. They check nothing.

`mh_advance` does for every lane what follows a forward pass: append, early rejection, acceptance test, commit, the next
cut, the free prefix, what the next step is given. No library has it. Opponents: a vectorised torch step for one lane a
chain that appends, tests, commits and cuts anew (no free prefix, no random numbers by counter, no KV ranges; it selects
with masks, so nothing waits for the device), the same compiled, and a loop over chains on the host, as published
samplers have it. One call makes `STEPS` decode steps with another set of sampled tokens each. The bytes are those that
every lane must move in a step; walks and commits come on top, so GB/s are a lower bound: the operator is bound by
latency.
"""

from __future__ import annotations

import math

import torch

import power_kernels as pk
from power_kernels import reference
from power_kernels.api.bench.harness import Call, Point, Suite, Workload
from power_kernels.api.bench.opponents import add_compiled
from power_kernels.state import CHAIN_FIELDS, LANE_FIELDS, ChainField, Mode

# ----------------------------------------------------------------------------------------------------
# mh_accept

ACCEPT_FORMULA = "8*B*T + 29*B: both answers' weights; lengths, log u; accept, log_ratio, status"


def accept_bytes(rows: int, tokens: int) -> int:
    return rows * (2 * 4 * tokens + 4 + 4 + 8 + 1 + 8 + 4)


def accept_points(grid: str, device: str) -> list[Point]:
    if grid == "quick":
        sizes = [(1, 64), (64, 512), (1024, 512)]
    elif grid == "default" and device == "cpu":
        sizes = [(rows, tokens) for rows in (1, 64, 1024, 4096) for tokens in (64, 512, 3072)]
    else:
        sizes = [(rows, tokens) for rows in (1, 16, 64, 256, 1024, 4096) for tokens in (64, 256, 1024, 3072)]
    compiled = set() if grid == "quick" else {(64, 512), (4096, 512), (64, 1024), (4096, 1024), (4096, 3072)}
    return [
        Point("mh_accept", torch.float32, {"rows": rows, "tokens": tokens}, (rows, tokens) in compiled)
        for rows, tokens in sizes
    ]


def eager_accept(current, proposal, len_current, len_proposal, log_u, position):
    def score(weights, n):
        return weights.double().masked_fill(position >= n[:, None], 0.0).sum(-1) - n.double().log()

    ratio = score(proposal, len_proposal) - score(current, len_current)
    return ratio >= log_u, ratio


def cumsum_accept(current, proposal, len_current, len_proposal, log_u, position):
    def score(weights, n):
        total = weights.cumsum(-1, dtype=torch.float64).gather(1, n[:, None].long() - 1)[:, 0]
        return total - n.double().log()

    ratio = score(proposal, len_proposal) - score(current, len_current)
    return ratio >= log_u, ratio


def build_accept(point: Point, device: torch.device) -> Workload:
    rows, tokens = point.shape["rows"], point.shape["tokens"]
    generator = torch.Generator().manual_seed(0)
    current, proposal = (-torch.rand(2, rows, tokens, generator=generator)).to(device).unbind()
    length = torch.full((rows,), tokens, dtype=torch.int32, device=device)
    log_u = torch.rand(rows, generator=generator, dtype=torch.float64).log().to(device)
    accept = torch.empty(rows, dtype=torch.bool, device=device)
    log_ratio = torch.empty(rows, dtype=torch.float64, device=device)
    status = torch.empty(rows, dtype=torch.int32, device=device)
    answers = (current, proposal, length, length, log_u)
    torch_arguments = (*answers, torch.arange(tokens, device=device))
    contenders: dict[str, Call] = {
        "mh_accept_out": lambda: pk.mh_accept_out(*answers, accept, log_ratio, status),
        "mh_accept_out, unchecked": lambda: torch.ops.power_kernels.mh_accept_out(*answers, accept, log_ratio, status),
        "mh_accept": lambda: pk.mh_accept(*answers),
        "eager": lambda: eager_accept(*torch_arguments),
        "eager, cumsum": lambda: cumsum_accept(*torch_arguments),
    }
    work = Workload(
        contenders,
        ours="mh_accept_out",
        bytes=accept_bytes(rows, tokens),
        count=rows,
        graph=frozenset(contenders),
    )
    add_compiled(work, point, "torch.compile", eager_accept, lambda fast: lambda: fast(*torch_arguments))
    return work


ACCEPT = Suite(
    "mh_accept",
    "Acceptance throughput",
    "decisions",
    ACCEPT_FORMULA,
    ("mh_accept_out", "mh_accept", "eager", "eager, cumsum"),
    accept_points,
    build_accept,
)

# ----------------------------------------------------------------------------------------------------
# mh_advance

STEPS = 8  # decode steps a call
LENGTH = 512  # tokens of an answer
ADVANCE_FORMULA = "a lane: 64 + 32 fields read and written, 20 sampled, 16 appended, 16 read, 80 emitted; times 8 steps"
VOCABULARY = 151_936


def advance_bytes(chains: int, lanes: int) -> int:
    """Of `STEPS` steps. A lane: its fields read and written; token, logq, weight and status sampled; token, logq and
    running sum appended, the sum before and theta read; input, position, counter, exclude, KV range written. A chain:
    its fields read and written and its KV range written."""
    lane = 2 * 4 * LANE_FIELDS + (8 + 4 + 4 + 4) + (4 + 4 + 8) + (8 + 8) + (8 + 8 + 16 + 8 + 16)
    chain = 2 * 4 * CHAIN_FIELDS + 16
    return STEPS * chains * (lanes * lane + chain)


def advance_points(grid: str, device: str) -> list[Point]:
    if grid == "quick":
        sizes = [(16, 1)]
    elif grid == "default" and device == "cpu":
        sizes = [(1, 1), (16, 1), (256, 1), (64, 4)]
    else:
        sizes = [(1, 1), (16, 1), (64, 1), (256, 1), (1024, 1), (64, 4), (32, 8)]
    return [
        Point("mh_advance", torch.float32, {"chains": chains, "lanes": lanes}, chains == 256) for chains, lanes in sizes
    ]


def sampled_steps(rows: int, device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    """What `STEPS` forward passes might have sampled: token, logq, weight, status of every lane."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(STEPS):
        token = torch.randint(VOCABULARY, (rows,), generator=generator)
        logq, weight = -torch.rand(2, rows, generator=generator) * torch.tensor([[1.0], [0.5]])
        status = torch.zeros(rows, dtype=torch.int32)
        steps.append(tuple(t.to(device) for t in (token, logq, weight, status)))
    return steps


def running_chains(chains: int, lanes: int, device: torch.device) -> tuple[pk.ChainState, Call, Call]:
    """Chains past their extension, in the middle of proposals that never run out, and the calls that advance them."""
    law = pk.Law(max_new_tokens=LENGTH, block_size=LENGTH, mcmc_steps=1 << 20 if chains < 64 else 1 << 16)
    state = pk.ChainState.allocate(chains, lanes, law, device)
    for chain in range(chains):
        state.admit(chain, [1], chain, 0)
    length_term = torch.from_numpy(reference.length_table(law)).to(device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    eos = torch.zeros(0, dtype=torch.int64, device=device)
    steps = sampled_steps(chains * lanes, device)

    def advance() -> None:
        for sampled in steps:
            pk.mh_advance(state, law, length_term, seed, eos, *sampled)

    constants, no_entropy = law.constants(), torch.zeros(0, device=device)
    no_stops = torch.zeros(0, 0, dtype=torch.int16, device=device)

    def unchecked() -> None:
        for token, logq, weight, status in steps:
            torch.ops.power_kernels.mh_advance(
                *state.tensors(), length_term, seed, eos, no_stops, token, logq, weight, status, no_entropy, *constants
            )

    for _ in range(2 * LENGTH // STEPS):
        advance()
    return state, advance, unchecked


def vectorised_step(state: dict[str, torch.Tensor], token, logq, weight, uniform) -> None:
    """One lane a chain, no token ends an answer: append, test, commit, cut anew. uniform: [2, C]."""
    row, pos, log_n = state["row"], state["pos"], math.log(LENGTH)
    total = state["lane_cumw"][row, pos] + weight
    state["lane_token"][row, pos] = token
    state["lane_logq"][row, pos] = logq
    state["lane_cumw"][row, pos + 1] = total
    rejected = total - log_n < state["theta"]
    over = rejected | (pos + 1 == LENGTH)
    own = (over & ~rejected)[:, None] & (state["column"] >= state["div"][:, None])
    torch.where(own[:, :-1], state["lane_token"], state["token"], out=state["token"])
    torch.where(own[:, :-1], state["lane_logq"], state["logq"], out=state["logq"])
    torch.where(own, state["lane_cumw"], state["cumw"], out=state["cumw"])
    cut = (uniform[0] * LENGTH).long()
    threshold = state["cumw"][:, -1] - log_n + torch.log1p(-uniform[1])
    state["theta"].copy_(torch.where(over, threshold, state["theta"]))
    state["div"].copy_(torch.where(over, cut, state["div"]))
    state["pos"].copy_(torch.where(over, cut, pos + 1))
    state["lane_cumw"][row, state["pos"]] = torch.where(over, state["cumw"][row, cut], total)
    before = state["token"][row, (cut - 1).clamp(min=0)]
    state["input"].copy_(torch.where(over, before, token))
    state["steps"].add_(over)


def vectorised_state(chains: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Chains and proposals of `vectorised_step`, every proposal at its cut."""
    generator = torch.Generator().manual_seed(2)
    weights = -0.5 * torch.rand(chains, LENGTH, generator=generator)
    cumw = torch.zeros(chains, LENGTH + 1, dtype=torch.float64)
    cumw[:, 1:] = weights.double().cumsum(-1)
    cut = torch.randint(LENGTH, (chains,), generator=generator)
    token = torch.randint(VOCABULARY, (chains, LENGTH), generator=generator)
    log_u = torch.rand(chains, generator=generator, dtype=torch.float64).log()
    state = {
        "row": torch.arange(chains),
        "column": torch.arange(LENGTH + 1),
        "token": token,
        "logq": torch.zeros(chains, LENGTH),
        "cumw": cumw,
        "lane_token": token.clone(),
        "lane_logq": torch.zeros(chains, LENGTH),
        "lane_cumw": cumw.clone(),
        "theta": cumw[:, -1] - math.log(LENGTH) + log_u,
        "div": cut,
        "pos": cut.clone(),
        "input": torch.zeros(chains, dtype=torch.int64),
        "steps": torch.zeros(chains, dtype=torch.int64),
    }
    return {name: tensor.to(device) for name, tensor in state.items()}


def host_loop(chains: int, steps, uniforms, device: torch.device) -> Call:
    """The same in Python, a chain after the other, lists on the host."""
    state = vectorised_state(chains, torch.device("cpu"))
    token, cumw, div = state["token"].tolist(), state["cumw"].tolist(), state["div"].tolist()
    theta, log_n = state["theta"].tolist(), math.log(LENGTH)
    own = [([], [cumw[c][div[c]]]) for c in range(chains)]

    def step(sampled, uniform) -> torch.Tensor:
        following = []
        drawn = zip(*(t.tolist() for t in (*sampled, *uniform)), strict=True)
        for c, (new, _, weight, _, cut, u) in enumerate(drawn):
            tokens, sums = own[c]
            tokens.append(new)
            sums.append(sums[-1] + weight)
            rejected = sums[-1] - log_n < theta[c]
            if rejected or div[c] + len(tokens) == LENGTH:
                if not rejected:
                    token[c][div[c] :] = tokens
                    cumw[c][div[c] :] = sums
                div[c] = int(cut * LENGTH)
                theta[c] = cumw[c][-1] - log_n + math.log1p(-u)
                own[c] = ([], [cumw[c][div[c]]])
                new = token[c][max(div[c] - 1, 0)]
            following.append(new)
        return torch.tensor(following, device=device)

    return lambda: [step(sampled, uniform) for sampled, uniform in zip(steps, uniforms, strict=True)]


def build_advance(point: Point, device: torch.device) -> Workload:
    chains, lanes = point.shape["chains"], point.shape["lanes"]
    state, advance, unchecked = running_chains(chains, lanes, device)
    work = Workload(
        {"mh_advance": advance, "mh_advance, unchecked": unchecked},
        ours="mh_advance",
        bytes=advance_bytes(chains, lanes),
        count=STEPS * chains * lanes,
        graph=frozenset({"mh_advance", "mh_advance, unchecked", "vectorised torch"}),
    )

    def still_running() -> None:
        modes = set(state.field[:, ChainField.MODE].tolist())
        if modes != {Mode.PROPOSE}:
            raise RuntimeError(f"chains are in modes {modes} after the benchmark: not every step advanced them")

    if lanes == 1:
        steps = sampled_steps(chains, device)
        generator = torch.Generator().manual_seed(3)
        uniforms = list(torch.rand(STEPS, 2, chains, generator=generator, dtype=torch.float64).to(device))

        def vectorised(step) -> Call:
            mine = vectorised_state(chains, device)

            def run() -> None:
                for (token, logq, weight, _), uniform in zip(steps, uniforms, strict=True):
                    step(mine, token, logq, weight, uniform)

            return run

        work.contenders["vectorised torch"] = vectorised(vectorised_step)
        work.contenders["loop on the host"] = host_loop(chains, steps, uniforms, device)
        add_compiled(work, point, "vectorised torch.compile", vectorised_step, vectorised)
    else:
        reason = "written for one lane a chain"
        work.missing |= dict.fromkeys(("vectorised torch", "loop on the host", "vectorised torch.compile"), reason)
    work.check = still_running
    return work


ADVANCE = Suite(
    "mh_advance", "Lanes advanced", "lanes", ADVANCE_FORMULA, ("mh_advance",), advance_points, build_advance
)
