"""mh_accept and mh_advance: the law of DESIGN section 3 (5.4, 5.5)."""

from __future__ import annotations

from operator import is_
from typing import NamedTuple

import torch

from ..errors import ArgumentError, ArgumentTypeError
from ..law import Law
from ..state import CHAIN_FIELDS, LANE_FIELDS, MAX_STOP_STATES, ChainState, Cost
from .checks import check_rows, check_seed, check_tensor, check_vectors
from .dispatch import OPS, define_functional, define_kernel, run

_STATE_ARGUMENTS = ", ".join(
    f"Tensor({chr(ord('a') + i)}!) {name}" for i, name in enumerate(ChainState.__dataclass_fields__)
)


class AcceptOutput(NamedTuple):
    """accept bool [B]; log_ratio float64 [B] in nats; status int32 [B]."""

    accept: torch.Tensor
    log_ratio: torch.Tensor
    status: torch.Tensor


def _check_accept(weights_cur, weights_prop, len_cur, len_prop, log_u) -> None:
    check_tensor("weights_cur", weights_cur, dtypes=(torch.float32,), shape=(None, None))
    rows = (weights_cur.shape[0],)
    check_tensor("weights_prop", weights_prop, dtypes=(torch.float32,), shape=(*rows, None), like=weights_cur)
    check_rows("weights_cur", weights_cur)
    check_rows("weights_prop", weights_prop)
    check_vectors(
        weights_cur,
        len_cur=(len_cur, torch.int32, rows),
        len_prop=(len_prop, torch.int32, rows),
        log_u=(log_u, torch.float64, rows),
    )


def mh_accept(
    weights_cur: torch.Tensor,
    weights_prop: torch.Tensor,
    len_cur: torch.Tensor,
    len_prop: torch.Tensor,
    log_u: torch.Tensor,
) -> AcceptOutput:
    """Accept or reject whole answers (DESIGN 3.2, 5.4), for stacks that keep their own chains.

    weights_cur, weights_prop: float32 [B, T] and [B, T'], the per-token weights of the current and the proposed answer
    (shared prefix included), of which the first len_cur and len_prop (int32 [B]) are read. log_u: float64 [B].
    With F = sum of the weights (running float64, in order) - log n: log_ratio = F' - F, accept = log_u <= log_ratio.
    For a length term (DESIGN 3.1) add lambda to each weight.
    Returns accept bool [B], log_ratio float64 [B], status int32 [B]: NAN or POS_INF for a bad weight, BAD_LENGTH for a
    length outside [1, T]; such a row is not accepted. Errors: as `sample_tokens`.
    """
    _check_accept(weights_cur, weights_prop, len_cur, len_prop, log_u)
    return AcceptOutput(*OPS.mh_accept(weights_cur, weights_prop, len_cur, len_prop, log_u))


def mh_accept_out(weights_cur, weights_prop, len_cur, len_prop, log_u, accept, log_ratio, status) -> None:
    """`mh_accept` into preallocated tensors."""
    _check_accept(weights_cur, weights_prop, len_cur, len_prop, log_u)
    rows = (weights_cur.shape[0],)
    check_vectors(
        weights_cur,
        accept=(accept, torch.bool, rows),
        log_ratio=(log_ratio, torch.float64, rows),
        status=(status, torch.int32, rows),
    )
    args = (weights_cur, weights_prop, len_cur, len_prop, log_u, accept, log_ratio, status)
    run("mh_accept_out", weights_cur.device, *args)


def _mh_accept_fake(weights_cur, weights_prop, len_cur, len_prop, log_u):
    rows = weights_cur.shape[0]
    return (
        weights_cur.new_empty(rows, dtype=torch.bool),
        weights_cur.new_empty(rows, dtype=torch.float64),
        weights_cur.new_empty(rows, dtype=torch.int32),
    )


def _mh_accept(weights_cur, weights_prop, len_cur, len_prop, log_u):
    out = _mh_accept_fake(weights_cur, weights_prop, len_cur, len_prop, log_u)
    args = (weights_cur, weights_prop, len_cur, len_prop, log_u, *out)
    run("mh_accept_out", weights_cur.device, *args)
    return out


define_kernel(
    "mh_accept_out",
    "chain",
    "(Tensor weights_cur, Tensor weights_prop, Tensor len_cur, Tensor len_prop, Tensor log_u, "
    "Tensor(a!) accept, Tensor(b!) log_ratio, Tensor(c!) status) -> ()",
)
define_functional(
    "mh_accept",
    "(Tensor weights_cur, Tensor weights_prop, Tensor len_cur, Tensor len_prop, Tensor log_u) "
    "-> (Tensor, Tensor, Tensor)",
    _mh_accept,
    _mh_accept_fake,
)


def mh_advance(
    state: ChainState,
    law: Law,
    length_term: torch.Tensor,
    seed: torch.Tensor,
    eos: torch.Tensor,
    sampled_token: torch.Tensor,
    sampled_logq: torch.Tensor,
    sampled_weight: torch.Tensor,
    sampled_status: torch.Tensor,
    sampled_entropy: torch.Tensor | None = None,
    stop_next: torch.Tensor | None = None,
) -> None:
    """One decode step of the whole law of DESIGN section 3 for every lane of every chain, in one launch (5.5); or K.

    state: `ChainState` of C chains with P lanes each, updated in place: what was sampled is appended, proposals are
    rejected early, committed or kept waiting, the next cuts are drawn and walked, stages end and begin; then what
    comes next is written: `input_id`, `position`, `counter`, `exclude` for the next forward, and the KV ranges to copy
    before it, first `commit_range` (lane -> chain), then `open_range` (chain -> lane).
    length_term: float64 [H + 2], `reference.length_table(law)`. seed: int64 [1], or [C] where each chain has its own.
    eos: int64 [E], E may be 0.
    sampled_token int64, sampled_logq and sampled_weight float32, sampled_status int32, all [C*P], as `sample_tokens`
    returned them for what was written last; Status.PENDING leaves a lane as it is. sampled_entropy: float32 [C*P],
    nats, of the same rows, for the cut law "divergence-entropy"; the others do not read it, and None will do.
    Runs: the samples may all be [C*P, K] instead, row l being the next K draws of lane l, one after the other, with
    Status.PENDING behind the last one that is there. A lane takes them as long as its LaneField.EPOCH is what it was
    when the call began; the rest is void, whatever it holds: the lane runs something else, or nothing. What comes of it
    is what comes of K calls with a column each, in which lanes whose EPOCH has changed, or that had no draw the time
    before, are PENDING. (So the KV ranges are those of the last column only: who keeps rows of keys and values gives
    one draw at a time.) A chain costs as many steps as its longest run has draws.
    stop_next: int16 [S, V], for a law with stops: the stop strings' automaton (3.1), which begins in state 0. Entry
    [s, v], in [-1, S), is its state after token v in state s, -1 where v completes a stop string (`stop_automaton`). A
    token outside [0, V) is a fault (Status.BAD_TOKEN).
    A bad status stops its chain (Mode.FAULT) when, and only when, the serial chain would have reached it; so does a
    status OK with a weight, logq or entropy that is NaN (as Status.NAN) or a weight or entropy of +inf (as
    Status.POS_INF). Errors: as `sample_tokens`; the triton backend raises ArgumentError for more than 16 lanes a chain,
    and for runs of more than one draw.

    The tensors of the state, length_term, seed, eos and stop_next are checked when one of them, or the law, is another
    than in the last call with this `ChainState`: put new tensors into its fields, and do not resize or retype those
    that are there.
    """
    for name, value, kind in (("state", state, ChainState), ("law", law, Law)):
        if not isinstance(value, kind):
            raise ArgumentTypeError(f"{name} is a {type(value).__name__}; it must be a {kind.__name__}")
    run_tensors = (*state.tensors(), length_term, seed, eos, stop_next)
    compiling = torch.compiler.is_compiling()
    checked = None if compiling else state.checked
    if checked is None or checked.law != law or not all(map(is_, checked.tensors, run_tensors)):
        checked = _check_run(state, law, run_tensors)
        if not compiling:
            state.checked = checked
    like = state.field
    drawn = _drawn_shape(sampled_token, state.lane_field.shape[0])
    if sampled_entropy is None:
        if law.needs_entropy:
            raise ArgumentTypeError(
                f"sampled_entropy is a NoneType; it must be a torch.Tensor, which the cut law {law.cut!r} reads"
            )
        sampled_entropy = checked.no_entropy
    else:
        check_vectors(like, sampled_entropy=(sampled_entropy, torch.float32, drawn))
    check_vectors(
        like,
        sampled_token=(sampled_token, torch.int64, drawn),
        sampled_logq=(sampled_logq, torch.float32, drawn),
        sampled_weight=(sampled_weight, torch.float32, drawn),
        sampled_status=(sampled_status, torch.int32, drawn),
    )
    run(
        "mh_advance", like.device, *run_tensors[:-1], checked.no_stops if stop_next is None else stop_next,
        sampled_token, sampled_logq, sampled_weight, sampled_status, sampled_entropy, *checked.constants,
    )  # fmt: skip


def _drawn_shape(sampled_token, rows: int) -> tuple[int, ...]:
    """Of everything that was sampled: [rows], or [rows, K] where sampled_token has two dimensions."""
    if not isinstance(sampled_token, torch.Tensor) or sampled_token.dim() != 2:
        return (rows,)
    given, draws = sampled_token.shape
    if given != rows or draws < 1:
        raise ArgumentError(
            f"sampled_token has shape {[given, draws]}; it must be [{rows}], or [{rows}, K] for runs of K >= 1 draws"
        )
    return rows, draws


class _CheckedRun(NamedTuple):
    """What stays the same from step to step, found sound; `ChainState.checked` remembers it."""

    law: Law
    tensors: tuple[torch.Tensor | None, ...]  # of the state, then length_term, seed, eos, stop_next
    constants: tuple[int, ...]  # of the law
    no_entropy: torch.Tensor  # float32 [0], for a law that does not read it
    no_stops: torch.Tensor  # int16 [0, 0], for a law without stop strings


def _check_run(state: ChainState, law: Law, tensors: tuple[torch.Tensor | None, ...]) -> _CheckedRun:
    check_tensor("field", state.field, shape=(None, CHAIN_FIELDS))
    check_tensor("lane_field", state.lane_field, shape=(None, LANE_FIELDS))
    chains, rows = state.chains, state.lane_field.shape[0]
    if not 1 <= chains <= rows or rows % chains:
        raise ArgumentError(f"state has {rows} lanes for {chains} chains; every chain must have as many")
    width = law.max_new_tokens + 1
    per_chain, per_lane, by_serial = (chains, width), (rows, width), (chains, law.max_steps + 1)
    z_width = width if law.diverges else 0
    a_width = width if law.stops else 0
    by_step = (chains, law.max_steps + 2)
    shapes = {
        "field": (torch.int32, (chains, CHAIN_FIELDS)),
        "token": (torch.int32, per_chain),
        "logq": (torch.float32, per_chain),
        "cumw": (torch.float64, per_chain),
        "cumz": (torch.float64, (chains, z_width)),
        "stop_state": (torch.int16, (chains, a_width)),
        "outcome": (torch.int8, by_serial),
        "left": (torch.int32, by_serial),
        "forwarded": (torch.int32, by_serial),
        "step_weight": (torch.float64, by_step),
        "step_logq": (torch.float64, by_step),
        "cost": (torch.int64, (chains, len(Cost))),
        "lane_field": (torch.int32, (rows, LANE_FIELDS)),
        "lane_token": (torch.int32, per_lane),
        "lane_logq": (torch.float32, per_lane),
        "lane_cumw": (torch.float64, per_lane),
        "lane_cumz": (torch.float64, (rows, z_width)),
        "lane_stop_state": (torch.int16, (rows, a_width)),
        "lane_theta": (torch.float64, (rows,)),
        "input_id": (torch.int64, (rows,)),
        "position": (torch.int64, (rows,)),
        "counter": (torch.int32, (rows, 4)),
        "exclude": (torch.int64, (rows,)),
        "commit_range": (torch.int32, (chains, 4)),
        "open_range": (torch.int32, (rows, 4)),
        "length_term": (torch.float64, (law.max_new_tokens + 2,)),
        "seed": (torch.int64, (None,)),
        "eos": (torch.int64, (None,)),
    }
    *given, stop_next = tensors
    vectors = {name: (tensor, *want) for (name, want), tensor in zip(shapes.items(), given, strict=True)}
    check_vectors(state.field, **vectors)
    check_seed(state.field, given[-2], chains)
    _check_stop_next(state, law, stop_next)
    device = state.field.device
    no_entropy = torch.empty(0, dtype=torch.float32, device=device)
    no_stops = torch.empty(0, 0, dtype=torch.int16, device=device)
    return _CheckedRun(law, tensors, law.constants(), no_entropy, no_stops)


def _check_stop_next(state: ChainState, law: Law, stop_next: torch.Tensor | None) -> None:
    if not law.stops:
        if stop_next is not None:
            raise ArgumentError("stop_next is given for a law without stops, which does not read it; it must be None")
        return
    if stop_next is None:
        raise ArgumentTypeError("stop_next is a NoneType; it must be a torch.Tensor, which a law with stops reads")
    check_vectors(state.field, stop_next=(stop_next, torch.int16, (None, None)))
    if not 1 <= stop_next.shape[0] <= MAX_STOP_STATES:
        raise ArgumentError(f"stop_next has {stop_next.shape[0]} rows; it must have 1 to {MAX_STOP_STATES}")
    if stop_next.shape[1] < 1:
        raise ArgumentError("stop_next has no columns; it must have one for each token of the vocabulary")


define_kernel(
    "mh_advance",
    "chain",
    f"({_STATE_ARGUMENTS}, Tensor length_term, Tensor seed, Tensor eos, Tensor stop_next, Tensor sampled_token, "
    "Tensor sampled_logq, Tensor sampled_weight, Tensor sampled_status, Tensor sampled_entropy, "
    "int max_new_tokens, int block_size, int mcmc_steps, int final_steps, bool early_rejection, bool free_prefix, "
    "bool karan_du, bool stops, int cut) -> ()",
)
