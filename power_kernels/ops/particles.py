"""branch_particles and select_candidate: a position and the selection of discrete particle Gibbs (DESIGN 3.9, 5.9)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..errors import ArgumentError
from ..law import MAX_PARTICLES, check_length_bonus, check_rho
from ..particles import Tally
from .checks import check_exponents, check_logits, check_vectors
from .dispatch import OPS, define_functional, define_kernel, run
from .rows import check_workspace, new_workspace, workspace_size


class BranchOutput(NamedTuple):
    """What `branch_particles` returns: the rows of each group after one position.

    parent int32, token int64, log_weight and logp float64, all [G, R]: where a row's particle comes from, the token
    that it got, its weight and that token's log-probability under the model, in nats; -1, -1, -inf and NaN where the
    row is empty. order int32 [G, R]: the rows that are taken, in the lexicographic order of their prefixes, then the
    others. candidate int64 [G, 2]: parent and token of the closing child that is kept from now on, and its logp,
    candidate_logp float64 [G]; -1, -1 and NaN where the kept one stays. tally float64 [G, 4]: the new one (`Tally`).
    log_threshold float64 [G]: log kappa, -inf where every open child survived. status int32 [G, R], a `Status` a row.
    """

    parent: torch.Tensor
    token: torch.Tensor
    log_weight: torch.Tensor
    logp: torch.Tensor
    order: torch.Tensor
    candidate: torch.Tensor
    candidate_logp: torch.Tensor
    tally: torch.Tensor
    log_threshold: torch.Tensor
    status: torch.Tensor


def branch_particles(
    logits: torch.Tensor,
    alpha: torch.Tensor,
    log_weight: torch.Tensor,
    order: torch.Tensor,
    reference: torch.Tensor,
    last: torch.Tensor,
    closing_bonus: torch.Tensor,
    uniform: torch.Tensor,
    tally: torch.Tensor,
    *,
    eos: torch.Tensor,
    stop_state: torch.Tensor | None = None,
    stop_next: torch.Tensor | None = None,
    length_bonus: float = 0.0,
    rho: float = 0.0,
) -> BranchOutput:
    """Weigh every child of every particle, keep a candidate of those that close, and at most N of the others (DESIGN
    3.9). G groups of R = N + 1 rows; row N is the reference's.

    logits: float32, float16 or bfloat16 [G * R, V], unit inner stride, any row stride; a group's rows together. Rows
        whose log_weight is -inf hold no particle, and are not read.
    alpha: float32 [G], finite and positive. log_weight: float64 [G, R] in nats.
    order: int32 [G, R]: each of the R rows once, those with a particle in the lexicographic order of their prefixes;
        what `branch_particles` returned at the position before. It decides which children survive together, which must
        not depend on the rows that they are in.
    reference: int64 [G]: the reference's next token, -1 for none. Its particle is in row N, and the child survives; or
        it closes, and its weight goes to Tally.REFERENCE.
    last: bool [G]: every child closes, which the horizon does.
    closing_bonus: float64 [G], nats: what the selection weight of a closing child gets on top of its weight; -log n
        where the cut law asks for it.
    uniform: float64 [G, 2] in [0, 1): of the survivors' draw, and of the candidate's.
    tally: float64 [G, 4], see `Tally`; all -inf before the first position.
    eos: int64 [E], the tokens that close a prefix. stop_next: int16 [S, V], the stop automaton (`stop_automaton`), and
        stop_state: int16 [G, R], its state a row; both or neither.
    length_bonus: lambda, nats a token. rho in [0, 1]: particles whose weight is small beside rho/N of the mass of
        everything die out.

    A child's weight is omega p(v)^alpha e^lambda. Open children of at least kappa survive with their weight; the others
    in a systematic draw with probability omega/kappa and weight kappa. kappa is where these probabilities add up to N,
    or rho/N of the mass of all open children and candidates, if that is more.
    Child rows: the reference's is row N; of a particle's children the first, heavy ones first, takes its parent's row;
    the others take the rows in which no particle has a child.

    A group with a row that is bad (`Status`; BAD_TOKEN for a reference beyond the vocabulary, without a particle, or
    impossible) gets no children, no candidate, its old tally, and NaN for log_threshold. Others are not affected.
    A group's result does not depend on the batch it is in.

    Raises ArgumentError for a shape, stride or value, ArgumentTypeError for a dtype, device or type. Values of tensors
    are looked at on a host only.
    """
    _check(
        logits, alpha, log_weight, order, reference, last, closing_bonus, uniform, tally, eos, stop_state, stop_next,
        length_bonus, rho,
    )  # fmt: skip
    return BranchOutput(
        *OPS.branch_particles(
            logits, alpha, log_weight, order, stop_state, reference, last, closing_bonus, uniform, eos, stop_next,
            float(length_bonus), float(rho), tally,
        )
    )  # fmt: skip


def branch_particles_out(
    logits, alpha, log_weight, order, stop_state, reference, last, closing_bonus, uniform, eos, stop_next,
    length_bonus, rho, workspace, tally, parent, token, child_log_weight, logp, child_order, candidate, candidate_logp,
    log_threshold, status,
) -> None:  # fmt: skip
    """`branch_particles` into preallocated tensors, `tally` in place: no allocation, no wait, safe inside a CUDA graph.

    workspace: float32, contiguous, at least `branch_workspace_size(G * R, V)` elements. Outputs: those of
    `BranchOutput`; none of them may share memory with an input but tally.
    """
    _check(
        logits, alpha, log_weight, order, reference, last, closing_bonus, uniform, tally, eos, stop_state, stop_next,
        length_bonus, rho,
    )  # fmt: skip
    groups, rows = log_weight.shape
    check_workspace(logits, workspace, branch_workspace_size(*logits.shape))
    check_vectors(
        logits,
        parent=(parent, torch.int32, (groups, rows)),
        token=(token, torch.int64, (groups, rows)),
        child_log_weight=(child_log_weight, torch.float64, (groups, rows)),
        logp=(logp, torch.float64, (groups, rows)),
        child_order=(child_order, torch.int32, (groups, rows)),
        candidate=(candidate, torch.int64, (groups, 2)),
        candidate_logp=(candidate_logp, torch.float64, (groups,)),
        log_threshold=(log_threshold, torch.float64, (groups,)),
        status=(status, torch.int32, (groups, rows)),
    )
    run(
        "branch_particles_out", logits.device,
        logits, alpha, log_weight, order, stop_state, reference, last, closing_bonus, uniform, eos, stop_next,
        float(length_bonus), float(rho), workspace, tally, parent, token, child_log_weight, logp, child_order,
        candidate, candidate_logp, log_threshold, status,
    )  # fmt: skip


def branch_workspace_size(rows: int, vocab: int) -> int:
    """float32 elements of workspace that `branch_particles_out` needs on any backend; rows: G * R."""
    return 2 * workspace_size(rows, vocab)


def select_candidate(tally: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The selection that ends a sweep (DESIGN 3.9): whether the kept candidate takes the reference's place.

    tally: float64 [G, 4] of the last position (`Tally`). uniform: float64 [G] in [0, 1).
    Returns bool [G]. With g a candidate's selection weight, r the reference and G their sum, the kept one k was drawn
    with probability g_k / (G - g_r). Metropolised Gibbs sampling takes it with probability
    min(1, (G - g_r) / (G - g_k)), which leaves the selection weights invariant. Without a reference the kept candidate
    is taken; without a candidate nothing is.

    Raises ArgumentError for a shape or a value, ArgumentTypeError for a dtype or device.
    """
    moved = (
        tally.new_empty(tally.shape[0], dtype=torch.bool) if isinstance(tally, torch.Tensor) and tally.dim() else None
    )
    select_candidate_out(tally, uniform, moved)
    return moved


def select_candidate_out(tally: torch.Tensor, uniform: torch.Tensor, moved: torch.Tensor) -> None:
    """`select_candidate` into moved, bool [G]: no allocation, no wait, safe inside a CUDA graph."""
    check_vectors(tally, tally=(tally, torch.float64, (None, len(Tally))))
    groups = (tally.shape[0],)
    check_vectors(tally, uniform=(uniform, torch.float64, groups), moved=(moved, torch.bool, groups))
    run("select_candidate_out", tally.device, tally, uniform, moved)


def _check(
    logits, alpha, log_weight, order, reference, last, closing_bonus, uniform, tally, eos, stop_state, stop_next,
    length_bonus, rho,
) -> None:  # fmt: skip
    check_logits(logits)
    check_vectors(logits, log_weight=(log_weight, torch.float64, (None, None)))
    groups, rows = log_weight.shape
    if not 3 <= rows <= MAX_PARTICLES + 1:
        raise ArgumentError(
            f"log_weight has {rows} rows a group; it must have N + 1, for N in [2, {MAX_PARTICLES}] particles"
        )
    if logits.shape[0] != groups * rows:
        raise ArgumentError(f"logits has {logits.shape[0]} rows; it must have {groups} * {rows}, as log_weight has")
    check_vectors(
        logits,
        alpha=(alpha, torch.float32, (groups,)),
        order=(order, torch.int32, (groups, rows)),
        reference=(reference, torch.int64, (groups,)),
        last=(last, torch.bool, (groups,)),
        closing_bonus=(closing_bonus, torch.float64, (groups,)),
        uniform=(uniform, torch.float64, (groups, 2)),
        tally=(tally, torch.float64, (groups, len(Tally))),
        eos=(eos, torch.int64, (None,)),
    )
    if (stop_state is None) != (stop_next is None):
        given, missing = ("stop_next", "stop_state") if stop_state is None else ("stop_state", "stop_next")
        raise ArgumentError(f"{missing} is None and {given} is not; both or neither must be given")
    if stop_next is not None:
        check_vectors(
            logits,
            stop_next=(stop_next, torch.int16, (None, logits.shape[1])),
            stop_state=(stop_state, torch.int16, (groups, rows)),
        )
    check_length_bonus("length_bonus", length_bonus)
    check_rho("rho", rho)
    check_exponents(alpha=alpha)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        for group, named in enumerate(order.tolist()):
            if sorted(named) != list(range(rows)):
                raise ArgumentError(f"order[{group}] is {named}; it must name each of {rows} rows once")
        outside = [u for u in uniform.flatten().tolist() if not 0.0 <= u < 1.0]
        if outside:
            raise ArgumentError(f"uniform has the entry {outside[0]}; all must lie in [0, 1)")
        if stop_next is not None:
            wrong = [s for s in stop_state.flatten().tolist() if not 0 <= s < stop_next.shape[0]]
            if wrong:
                raise ArgumentError(f"stop_state has the entry {wrong[0]}; all must lie in [0, {stop_next.shape[0]})")
        if not all(math.isfinite(b) for b in closing_bonus.tolist()):
            raise ArgumentError(f"closing_bonus is {closing_bonus.tolist()}; all must be finite")


def _outputs(log_weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    groups, rows = log_weight.shape

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return log_weight.new_empty(shape, dtype=dtype)

    return (
        new(groups, rows, dtype=torch.int32),
        new(groups, rows, dtype=torch.int64),
        new(groups, rows, dtype=torch.float64),
        new(groups, rows, dtype=torch.float64),
        new(groups, rows, dtype=torch.int32),
        new(groups, 2, dtype=torch.int64),
        new(groups, dtype=torch.float64),
    )


def _branch_particles(
    logits, alpha, log_weight, order, stop_state, reference, last, closing_bonus, uniform, eos, stop_next,
    length_bonus, rho, tally,
):  # fmt: skip
    parent, token, child_log_weight, logp, child_order, candidate, candidate_logp = _outputs(log_weight)
    log_threshold, status = torch.empty_like(candidate_logp), torch.empty_like(parent)
    tally = tally.clone()
    workspace = new_workspace(logits, branch_workspace_size(*logits.shape))
    run(
        "branch_particles_out", logits.device,
        logits, alpha, log_weight, order, stop_state, reference, last, closing_bonus, uniform, eos, stop_next,
        length_bonus, rho, workspace, tally, parent, token, child_log_weight, logp, child_order,
        candidate, candidate_logp, log_threshold, status,
    )  # fmt: skip
    return (
        parent, token, child_log_weight, logp, child_order, candidate, candidate_logp, tally, log_threshold, status,
    )  # fmt: skip


def _branch_particles_fake(
    logits, alpha, log_weight, order, stop_state, reference, last, closing_bonus, uniform, eos, stop_next,
    length_bonus, rho, tally,
):  # fmt: skip
    *rows, candidate_logp = _outputs(log_weight)
    return (
        *rows, candidate_logp, torch.empty_like(tally), torch.empty_like(candidate_logp), torch.empty_like(rows[0]),
    )  # fmt: skip


_INPUTS = (
    "Tensor logits, Tensor alpha, Tensor log_weight, Tensor order, Tensor? stop_state, Tensor reference, Tensor last, "
    "Tensor closing_bonus, Tensor uniform, Tensor eos, Tensor? stop_next, float length_bonus, float rho, "
)
define_kernel(
    "branch_particles_out",
    "particles",
    f"({_INPUTS}Tensor(a!) workspace, Tensor(b!) tally, Tensor(c!) parent, Tensor(d!) token, "
    "Tensor(e!) child_log_weight, Tensor(f!) logp, Tensor(g!) child_order, Tensor(h!) candidate, "
    "Tensor(i!) candidate_logp, Tensor(j!) log_threshold, Tensor(k!) status) -> ()",
)
define_functional(
    "branch_particles",
    f"({_INPUTS}Tensor tally) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _branch_particles,
    _branch_particles_fake,
)
define_kernel("select_candidate_out", "particles", "(Tensor tally, Tensor uniform, Tensor(a!) moved) -> ()")
