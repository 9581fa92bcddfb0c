"""Every operator: schema, validation, fake, dispatch (DESIGN section 5).

    CUDA, ROCm -> power_kernels.triton     CPU -> csrc (power_kernels._C)     anything else -> reference_ops

The dispatcher chooses by device. A machine without the C++ extension serves the CPU from the reference, and
`power-kernels doctor` says so. `use_backend` names a backend explicitly; what cannot run raises `BackendError`.

The `*_out` functions allocate nothing, never wait for the device, and are safe inside a CUDA graph. The functional
ones check their arguments, allocate and call them. Shapes, dtypes and strides are checked on every device; values
(alpha, beta, ranges) only where the tensors are on the host, since looking at them elsewhere would wait for the device:
there the kernels report bad exponents by row, as Status.NAN, and skip bad ranges.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from power_kernels import reference_ops
from power_kernels.errors import ArgumentError, ArgumentTypeError, BackendError
from power_kernels.state import (
    CHAIN_FIELDS,
    LANE_FIELDS,
    ChainField,
    ChainState,
    Cost,
    LaneField,
    LaneStatus,
    Law,
    Mode,
    Outcome,
    Status,
)

LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST_TILE = 256  # no backend's tile of the vocabulary is narrower, which bounds the workspace
TILE_VALUES = 4  # max, rest at 1, rest at beta, entropy partial

_STATE_ARGUMENTS = ", ".join(
    f"Tensor({chr(ord('a') + i)}!) {name}" for i, name in enumerate(ChainState.__dataclass_fields__)
)

SCHEMAS = {
    "sample_tokens": "(Tensor logits, Tensor alpha, Tensor beta, Tensor seed, Tensor counter, Tensor? exclude, "
    "bool return_entropy) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "sample_tokens_out": "(Tensor logits, Tensor alpha, Tensor beta, Tensor seed, Tensor counter, Tensor? exclude, "
    "Tensor(a!) workspace, Tensor(b!) token, Tensor(c!) logp, Tensor(d!) logq, Tensor(e!) weight, "
    "Tensor(f!)? entropy, Tensor(g!) status) -> ()",
    "score_tokens": "(Tensor logits, Tensor tokens, Tensor alpha, Tensor beta, bool return_entropy) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "score_tokens_out": "(Tensor logits, Tensor tokens, Tensor alpha, Tensor beta, Tensor(a!) workspace, "
    "Tensor(b!) logp, Tensor(c!) logq, Tensor(d!) weight, Tensor(e!)? entropy, Tensor(f!) status) -> ()",
    "mh_accept": "(Tensor weights_cur, Tensor weights_prop, Tensor len_cur, Tensor len_prop, Tensor log_u) "
    "-> (Tensor, Tensor, Tensor)",
    "mh_accept_out": "(Tensor weights_cur, Tensor weights_prop, Tensor len_cur, Tensor len_prop, Tensor log_u, "
    "Tensor(a!) accept, Tensor(b!) log_ratio, Tensor(c!) status) -> ()",
    "mh_advance": f"({_STATE_ARGUMENTS}, Tensor log_n, Tensor seed, Tensor eos, Tensor sampled_token, "
    "Tensor sampled_logq, Tensor sampled_weight, Tensor sampled_status, int max_new_tokens, int block_size, "
    "int mcmc_steps, int final_steps, bool early_rejection, bool free_prefix, bool karan_du) -> ()",
    "kv_copy_ranges": "(Tensor(a!) dst, Tensor src, Tensor ranges) -> ()",
}

# What a backend implements; the functional forms are built on these.
KERNELS = ("sample_tokens_out", "score_tokens_out", "mh_accept_out", "mh_advance", "kv_copy_ranges")

_TRITON_MODULE = {
    "sample_tokens_out": "sampling",
    "score_tokens_out": "scoring",
    "mh_accept_out": "chain",
    "mh_advance": "chain",
    "kv_copy_ranges": "kv_cache",
}

_LIBRARY = torch.library.Library("power_kernels", "DEF")
for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema)


# ---------------------------------------------------------------------------------------------------------------
# Backends


def _load_extension() -> str | None:
    """Load csrc's CPU kernels. Returns why not, or None."""
    paths = sorted(Path(__file__).parent.glob("_C*.so"))
    if not paths:
        return "power_kernels._C was not built (no C++ compiler, or torch was missing from the build environment)"
    try:
        # Read, not asked: loading the file would already register its kernels, which would then write other columns.
        if state_layout().encode() + b"\0" not in paths[0].read_bytes():
            return f"{paths[0].name} was built from other sources than this package; build it again"
        torch.ops.load_library(paths[0])
    except (OSError, RuntimeError) as error:
        return f"{paths[0].name} does not load with torch {torch.__version__}: {error}"
    return None


def state_layout() -> str:
    """The columns and codes that Python and C++ must agree on, as the string that csrc/chain.cpp compiles in."""
    enums = (ChainField, LaneField, Mode, LaneStatus, Outcome, Cost, Status)
    parts = [f"{enum.__name__}:" + "".join(f",{m.name}={m.value}" for m in enum) for enum in enums]
    return ";".join([*parts, f"pitch={CHAIN_FIELDS},{LANE_FIELDS}"])


@functools.cache
def _triton_kernel(name: str):
    try:
        module = importlib.import_module(f"power_kernels.triton.{_TRITON_MODULE[name]}")
    except ImportError as error:
        raise BackendError(f"the triton backend cannot be imported: {error}") from error
    return getattr(module, name)


for _name in KERNELS:
    _LIBRARY.impl(_name, getattr(reference_ops, _name), "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, (lambda name: lambda *args: _triton_kernel(name)(*args))(_name), "CUDA")

EXTENSION_MISSING = _load_extension()

BACKENDS = ("cpp", "triton", "reference")
_chosen: str | None = None


def check_backend(name: str) -> None:
    """Raises BackendError, saying why, when a backend cannot run here; ArgumentError when there is no such backend."""
    if name not in BACKENDS:
        raise ArgumentError(f"backend is {name!r}; allowed: {', '.join(BACKENDS)}")
    if name == "cpp" and EXTENSION_MISSING:
        raise BackendError(f"backend 'cpp' cannot run: {EXTENSION_MISSING}")
    if name == "triton":
        _triton_kernel("sample_tokens_out")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator from one backend, whatever the device: 'cpp', 'triton' or 'reference'.

    The choice is the process's, not the thread's: blocks in several threads at once end each other's.
    Triton on CPU tensors needs TRITON_INTERPRET=1 before triton is imported. Raises BackendError when `name` cannot
    run. The environment variable POWER_KERNELS_BACKEND does the same for a whole process.
    """
    global _chosen
    check_backend(name)
    previous, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = previous


def forced_backend() -> str | None:
    """The backend that `use_backend` or POWER_KERNELS_BACKEND names now."""
    return _chosen


def backend_for(device: torch.device | str) -> str:
    """The backend that serves tensors of `device` now."""
    if _chosen is not None:
        return _chosen
    kind = torch.device(device).type
    if kind == "cuda":
        return "triton"
    return "cpp" if kind == "cpu" and not EXTENSION_MISSING else "reference"


def _run(name: str, device: torch.device, *args) -> None:
    if _chosen is None:
        getattr(torch.ops.power_kernels, name)(*args)
    elif _chosen == "cpp":
        if device.type != "cpu":
            raise BackendError(f"backend 'cpp' serves CPU tensors only, got {device}")
        getattr(torch.ops.power_kernels, name)(*args)
    elif _chosen == "triton":
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendError("backend 'triton' runs on CPU tensors only under TRITON_INTERPRET=1")
        _triton_kernel(name)(*args)
    else:
        getattr(reference_ops, name)(*args)


# ---------------------------------------------------------------------------------------------------------------
# Validation


def _check_tensor(name: str, value, *, dtypes=None, shape=None, like: torch.Tensor | None = None) -> None:
    """shape: a tuple whose None entries match anything."""
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
    if value.layout != torch.strided:
        raise ArgumentTypeError(f"{name} has layout {value.layout}; it must be torch.strided")
    if dtypes is not None and value.dtype not in dtypes:
        allowed = ", ".join(str(d) for d in dtypes)
        raise ArgumentTypeError(f"{name} has dtype {value.dtype}; allowed: {allowed}")
    if like is not None and value.device != like.device:
        raise ArgumentTypeError(f"{name} is on {value.device}; it must be on {like.device} like the first argument")
    if shape is not None:
        fits = value.dim() == len(shape) and all(
            want is None or got == want for got, want in zip(value.shape, shape, strict=True)
        )
        if not fits:
            want = ", ".join("*" if s is None else str(s) for s in shape)
            raise ArgumentError(f"{name} has shape {list(value.shape)}; it must be [{want}]")


def _check_rows(name: str, value: torch.Tensor) -> None:
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ArgumentError(f"{name} has inner stride {value.stride(-1)}; it must be 1 (call .contiguous())")


def _check_vector(name: str, value: torch.Tensor) -> None:
    if value.numel() > 1 and not value.is_contiguous():
        raise ArgumentError(f"{name} has strides {list(value.stride())}; it must be contiguous")


def _check_flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be a bool")


def _check_logits(logits) -> None:
    _check_tensor("logits", logits, dtypes=LOGIT_DTYPES, shape=(None, None))
    if logits.shape[1] < 1:
        raise ArgumentError("logits has an empty vocabulary; V must be at least 1")
    _check_rows("logits", logits)


def _check_vectors(like: torch.Tensor, **vectors: tuple) -> None:
    """name=(tensor, dtype or dtypes, shape)."""
    for name, (value, dtypes, shape) in vectors.items():
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        _check_tensor(name, value, dtypes=dtypes, shape=shape, like=like)
        _check_vector(name, value)


def _check_exponents(**exponents: torch.Tensor) -> None:
    for name, values in exponents.items():
        if values.device.type != "cpu" or torch.compiler.is_compiling():
            continue
        for row, value in enumerate(values.tolist()):
            if not 0.0 < value < math.inf:
                raise ArgumentError(f"{name}[{row}] is {value}; it must be finite and positive")


# ---------------------------------------------------------------------------------------------------------------
# sample_tokens


class SampleOutput(NamedTuple):
    """One row per row of logits. token int64; logp, logq, weight, entropy float32 in nats; status int32."""

    token: torch.Tensor
    logp: torch.Tensor
    logq: torch.Tensor
    weight: torch.Tensor
    entropy: torch.Tensor | None
    status: torch.Tensor


def workspace_size(rows: int, vocab: int) -> int:
    """float32 elements of workspace that the `_out` forms of sampling and scoring need on any backend."""
    return rows * -(-vocab // SMALLEST_TILE) * TILE_VALUES


def _check_sample(logits, alpha, beta, seed, counter, exclude) -> None:
    _check_logits(logits)
    rows = (logits.shape[0],)
    _check_vectors(
        logits,
        alpha=(alpha, torch.float32, rows),
        beta=(beta, torch.float32, rows),
        seed=(seed, torch.int64, (1,)),
        counter=(counter, torch.int32, (*rows, 4)),
    )
    if exclude is not None:
        _check_vectors(logits, exclude=(exclude, torch.int64, rows))
    _check_exponents(alpha=alpha, beta=beta)


def sample_tokens(
    logits: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    seed: torch.Tensor,
    counter: torch.Tensor,
    exclude: torch.Tensor | None = None,
    *,
    return_entropy: bool = False,
) -> SampleOutput:
    """Draw one token a row from q = softmax(beta * logits), with its log-probabilities (DESIGN 2, 4, 5.1).

    logits: float32, float16 or bfloat16 [B, V], unit inner stride, any row stride; -inf entries are never drawn.
    alpha, beta: float32 [B], finite and positive; where they are on a device and so are not looked at beforehand, a row
        with others has Status.NAN. seed: int64 [1].
    counter: int32 [B, 4], the Philox counter of each row (`power_kernels.rng`): its first uniform draws the token.
    exclude: int64 [B] or None: a token that may not be drawn (-1: none); q is renormalised for the draw, while logq and
        weight are those of the full row. It is returned all the same when nothing else has mass.

    Returns token int64 [B]; logp = log softmax(z)[token], logq = log softmax(beta z)[token],
    weight = alpha*logp - logq (<= 0 whenever 1 <= beta <= alpha), and the entropy of softmax(z) if asked for, float32
    [B] in nats; status int32 [B], a `power_kernels.Status`. A bad row has token -1 and NaN quantities; the others are
    not affected. A row's result does not depend on the batch it is in.

    Raises ArgumentError for a shape, stride or value, ArgumentTypeError for a dtype or device.
    """
    _check_sample(logits, alpha, beta, seed, counter, exclude)
    _check_flag("return_entropy", return_entropy)
    out = torch.ops.power_kernels.sample_tokens(logits, alpha, beta, seed, counter, exclude, return_entropy)
    token, logp, logq, weight, entropy, status = out
    return SampleOutput(token, logp, logq, weight, entropy if return_entropy else None, status)


def sample_tokens_out(
    logits, alpha, beta, seed, counter, exclude, workspace, token, logp, logq, weight, entropy, status
) -> None:
    """`sample_tokens` into preallocated tensors: no allocation, no wait, safe inside a CUDA graph.

    workspace: float32, contiguous, at least `workspace_size(B, V)` elements. exclude and entropy may be None.
    """
    _check_sample(logits, alpha, beta, seed, counter, exclude)
    _check_vectors(logits, token=(token, torch.int64, (logits.shape[0],)))
    _check_outputs(logits, workspace, dict(logp=logp, logq=logq, weight=weight), entropy, status)
    _run(
        "sample_tokens_out", logits.device,
        logits, alpha, beta, seed, counter, exclude, workspace, token, logp, logq, weight, entropy, status,
    )  # fmt: skip


def _check_outputs(logits, workspace, floats, entropy, status) -> None:
    rows = (logits.shape[0],)
    _check_vectors(logits, workspace=(workspace, torch.float32, (None,)), status=(status, torch.int32, rows))
    need = workspace_size(*logits.shape)
    if workspace.numel() < need:
        raise ArgumentError(f"workspace has {workspace.numel()} elements; it must have at least {need}")
    _check_vectors(logits, **{name: (value, torch.float32, rows) for name, value in floats.items()})
    if entropy is not None:
        _check_vectors(logits, entropy=(entropy, torch.float32, rows))


def _row_outputs(logits: torch.Tensor, floats: int, return_entropy: bool):
    rows = logits.shape[0]
    values = [logits.new_empty(rows, dtype=torch.float32) for _ in range(floats)]
    entropy = logits.new_empty(rows if return_entropy else 0, dtype=torch.float32)
    return (*values, entropy, logits.new_empty(rows, dtype=torch.int32))


def _workspace(logits: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(workspace_size(*logits.shape), dtype=torch.float32)


def _sample_tokens(logits, alpha, beta, seed, counter, exclude, return_entropy):
    token = logits.new_empty(logits.shape[0], dtype=torch.int64)
    logp, logq, weight, entropy, status = _row_outputs(logits, 3, return_entropy)
    _run(
        "sample_tokens_out", logits.device,
        logits, alpha, beta, seed, counter, exclude, _workspace(logits),
        token, logp, logq, weight, entropy if return_entropy else None, status,
    )  # fmt: skip
    return token, logp, logq, weight, entropy, status


def _sample_tokens_fake(logits, alpha, beta, seed, counter, exclude, return_entropy):
    return (logits.new_empty(logits.shape[0], dtype=torch.int64), *_row_outputs(logits, 3, return_entropy))


# ---------------------------------------------------------------------------------------------------------------
# score_tokens


class ScoreOutput(NamedTuple):
    """One row per row of logits: logp, logq, weight, entropy float32 in nats; status int32."""

    logp: torch.Tensor
    logq: torch.Tensor
    weight: torch.Tensor
    entropy: torch.Tensor | None
    status: torch.Tensor


def _check_score(logits, tokens, alpha, beta) -> None:
    _check_logits(logits)
    rows = (logits.shape[0],)
    _check_vectors(
        logits,
        tokens=(tokens, torch.int64, rows),
        alpha=(alpha, torch.float32, rows),
        beta=(beta, torch.float32, rows),
    )
    _check_exponents(alpha=alpha, beta=beta)


def score_tokens(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    *,
    return_entropy: bool = False,
) -> ScoreOutput:
    """logp, logq and weight of given tokens (DESIGN 2, 5.2).

    logits: float32, float16 or bfloat16 [N, V], unit inner stride. tokens: int64 [N]. alpha, beta: float32 [N].
    Returns float32 [N] in nats and status int32 [N]; a token outside [0, V) is Status.BAD_TOKEN, a token whose logit
    is -inf has logp = logq = weight = -inf. Errors: as `sample_tokens`.
    """
    _check_score(logits, tokens, alpha, beta)
    _check_flag("return_entropy", return_entropy)
    out = torch.ops.power_kernels.score_tokens(logits, tokens, alpha, beta, return_entropy)
    logp, logq, weight, entropy, status = out
    return ScoreOutput(logp, logq, weight, entropy if return_entropy else None, status)


def score_tokens_out(logits, tokens, alpha, beta, workspace, logp, logq, weight, entropy, status) -> None:
    """`score_tokens` into preallocated tensors; see `sample_tokens_out`."""
    _check_score(logits, tokens, alpha, beta)
    _check_outputs(logits, workspace, dict(logp=logp, logq=logq, weight=weight), entropy, status)
    args = (logits, tokens, alpha, beta, workspace, logp, logq, weight, entropy, status)
    _run("score_tokens_out", logits.device, *args)


def _score_tokens(logits, tokens, alpha, beta, return_entropy):
    logp, logq, weight, entropy, status = _row_outputs(logits, 3, return_entropy)
    _run(
        "score_tokens_out", logits.device,
        logits, tokens, alpha, beta, _workspace(logits),
        logp, logq, weight, entropy if return_entropy else None, status,
    )  # fmt: skip
    return logp, logq, weight, entropy, status


def _score_tokens_fake(logits, tokens, alpha, beta, return_entropy):
    return _row_outputs(logits, 3, return_entropy)


# ---------------------------------------------------------------------------------------------------------------
# mh_accept


class AcceptOutput(NamedTuple):
    """accept bool [B]; log_ratio float64 [B] in nats; status int32 [B]."""

    accept: torch.Tensor
    log_ratio: torch.Tensor
    status: torch.Tensor


def _check_accept(weights_cur, weights_prop, len_cur, len_prop, log_u) -> None:
    _check_tensor("weights_cur", weights_cur, dtypes=(torch.float32,), shape=(None, None))
    rows = (weights_cur.shape[0],)
    _check_tensor("weights_prop", weights_prop, dtypes=(torch.float32,), shape=(*rows, None), like=weights_cur)
    _check_rows("weights_cur", weights_cur)
    _check_rows("weights_prop", weights_prop)
    _check_vectors(
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
    Returns accept bool [B], log_ratio float64 [B], status int32 [B]: NAN or POS_INF for a bad weight, BAD_LENGTH for a
    length outside [1, T]; such a row is not accepted. Errors: as `sample_tokens`.
    """
    _check_accept(weights_cur, weights_prop, len_cur, len_prop, log_u)
    return AcceptOutput(*torch.ops.power_kernels.mh_accept(weights_cur, weights_prop, len_cur, len_prop, log_u))


def mh_accept_out(weights_cur, weights_prop, len_cur, len_prop, log_u, accept, log_ratio, status) -> None:
    """`mh_accept` into preallocated tensors."""
    _check_accept(weights_cur, weights_prop, len_cur, len_prop, log_u)
    rows = (weights_cur.shape[0],)
    _check_vectors(
        weights_cur,
        accept=(accept, torch.bool, rows),
        log_ratio=(log_ratio, torch.float64, rows),
        status=(status, torch.int32, rows),
    )
    args = (weights_cur, weights_prop, len_cur, len_prop, log_u, accept, log_ratio, status)
    _run("mh_accept_out", weights_cur.device, *args)


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
    _run("mh_accept_out", weights_cur.device, *args)
    return out


# ---------------------------------------------------------------------------------------------------------------
# mh_advance


def mh_advance(
    state: ChainState,
    law: Law,
    log_n: torch.Tensor,
    seed: torch.Tensor,
    eos: torch.Tensor,
    sampled_token: torch.Tensor,
    sampled_logq: torch.Tensor,
    sampled_weight: torch.Tensor,
    sampled_status: torch.Tensor,
) -> None:
    """One decode step of the whole law of DESIGN section 3 for every lane of every chain, in one launch (5.5).

    state: `ChainState` of C chains with P lanes each, updated in place: what was sampled is appended, proposals are
    rejected early, committed or kept waiting, the next cuts are drawn and walked, stages end and begin; then the plan
    is written: `input_id`, `position`, `counter`, `exclude` for the next forward, and the KV ranges to copy before it,
    first `commit_range` (lane -> chain), then `open_range` (chain -> lane).
    log_n: float64 [H + 2], `reference.log_table(H)`. seed: int64 [1]. eos: int64 [E], E may be 0.
    sampled_token int64, sampled_logq and sampled_weight float32, sampled_status int32, all [C*P], as `sample_tokens`
    returned them for the last plan; Status.PENDING leaves a lane as it is. A bad status stops its chain (Mode.FAULT)
    when, and only when, the serial chain would have reached it; so does a status OK with a weight or logq that is NaN
    (as Status.NAN) or a weight of +inf (as Status.POS_INF). Errors: as `sample_tokens`; the triton backend raises
    ArgumentError for more than 16 lanes a chain.
    """
    for name, value, kind in (("state", state, ChainState), ("law", law, Law)):
        if not isinstance(value, kind):
            raise ArgumentTypeError(f"{name} is a {type(value).__name__}; it must be a {kind.__name__}")
    _check_tensor("field", state.field, shape=(None, CHAIN_FIELDS))
    _check_tensor("lane_field", state.lane_field, shape=(None, LANE_FIELDS))
    chains, rows = state.chains, state.lane_field.shape[0]
    if chains < 1 or rows % chains:
        raise ArgumentError(f"state has {rows} lanes for {chains} chains; every chain must have as many")
    width = law.max_new_tokens + 1
    per_chain, per_lane = (chains, width), (rows, width)
    shapes = {
        "field": (torch.int32, (chains, CHAIN_FIELDS)),
        "token": (torch.int32, per_chain),
        "logq": (torch.float32, per_chain),
        "cumw": (torch.float64, per_chain),
        "outcome": (torch.int8, (chains, law.max_steps + 1)),
        "cost": (torch.int64, (chains, len(Cost))),
        "lane_field": (torch.int32, (rows, LANE_FIELDS)),
        "lane_token": (torch.int32, per_lane),
        "lane_logq": (torch.float32, per_lane),
        "lane_cumw": (torch.float64, per_lane),
        "lane_theta": (torch.float64, (rows,)),
        "input_id": (torch.int64, (rows,)),
        "position": (torch.int64, (rows,)),
        "counter": (torch.int32, (rows, 4)),
        "exclude": (torch.int64, (rows,)),
        "commit_range": (torch.int32, (chains, 4)),
        "open_range": (torch.int32, (rows, 4)),
    }
    like = state.field
    _check_vectors(like, **{name: (getattr(state, name), *want) for name, want in shapes.items()})
    _check_vectors(
        like,
        log_n=(log_n, torch.float64, (law.max_new_tokens + 2,)),
        seed=(seed, torch.int64, (1,)),
        eos=(eos, torch.int64, (None,)),
        sampled_token=(sampled_token, torch.int64, (rows,)),
        sampled_logq=(sampled_logq, torch.float32, (rows,)),
        sampled_weight=(sampled_weight, torch.float32, (rows,)),
        sampled_status=(sampled_status, torch.int32, (rows,)),
    )
    _run(
        "mh_advance", like.device,
        *state.tensors(), log_n, seed, eos, sampled_token, sampled_logq, sampled_weight, sampled_status,
        law.max_new_tokens, law.block_size, law.mcmc_steps, law.final_steps,
        law.early_rejection, law.free_prefix, law.karan_du,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# kv_copy_ranges


def kv_copy_ranges(dst: torch.Tensor, src: torch.Tensor, ranges: torch.Tensor) -> None:
    """Copy ragged slices of every layer's K and V between two slabs, in one launch (DESIGN 5.6, 6).

    dst [G, R, heads, S, D] and src [G, R', heads, S', D], G = 2 * layers, of one dtype, unit inner stride, not sharing
    memory. ranges: int32 [N, 4], rows (dst_row, src_row, start, stop): for every g and head,
    dst[g, dst_row, :, start:stop] = src[g, src_row, :, start:stop]; stop <= start copies nothing. No two ranges may
    write the same positions. Neither that, nor that the slabs do not overlap in memory, is checked. A range outside the
    slabs raises ArgumentError on the CPU and is skipped on a device.
    Errors: as `sample_tokens`.
    """
    _check_tensor("dst", dst, shape=(None,) * 5)
    _check_tensor(
        "src", src, dtypes=(dst.dtype,), shape=(dst.shape[0], None, dst.shape[2], None, dst.shape[4]), like=dst
    )
    _check_vectors(dst, ranges=(ranges, torch.int32, (None, 4)))
    for name, slab in (("dst", dst), ("src", src)):
        _check_rows(name, slab)
    if ranges.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ranges(dst, src, ranges)
    _run("kv_copy_ranges", dst.device, dst, src, ranges)


def _check_ranges(dst: torch.Tensor, src: torch.Tensor, ranges: torch.Tensor) -> None:
    for i, (dst_row, src_row, start, stop) in enumerate(ranges.tolist()):
        if stop <= start:
            continue
        inside = (
            0 <= dst_row < dst.shape[1]
            and 0 <= src_row < src.shape[1]
            and start >= 0
            and stop <= min(dst.shape[3], src.shape[3])
        )
        if not inside:
            raise ArgumentError(
                f"ranges[{i}] is {[dst_row, src_row, start, stop]}; rows must lie in [0, {dst.shape[1]}) and "
                f"[0, {src.shape[1]}), positions in [0, {min(dst.shape[3], src.shape[3])}]"
            )


# ---------------------------------------------------------------------------------------------------------------
# Registration of the functional forms and the fakes

_FUNCTIONAL = {
    "sample_tokens": (_sample_tokens, _sample_tokens_fake),
    "score_tokens": (_score_tokens, _score_tokens_fake),
    "mh_accept": (_mh_accept, _mh_accept_fake),
}
for _name, (_implementation, _fake) in _FUNCTIONAL.items():
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"power_kernels::{_name}", _fake)
for _name in KERNELS:  # they return nothing and only write their arguments
    torch.library.register_fake(f"power_kernels::{_name}", lambda *args: None)

if _environment := os.environ.get("POWER_KERNELS_BACKEND"):
    check_backend(_environment)
    _chosen = _environment
