"""Sampling and scoring of a vocabulary that is split over tensor-parallel ranks (DESIGN 2, 4, 5.3).

Each rank holds the logits of its own shard, [B, Vs]: what `sample_from_hidden_out` leaves in its scratch, or any
engine's. Shards hold consecutive parts of the vocabulary, in the order of their ranks.

    1. every rank    record = shard_record(logits, beta, ...)           float64 [B, 8]
    2. all-gather    records [S, B, 8], 64 bytes a row and rank
    3. sampling      sample_from_shards(records, rank, logits, ...)     on every rank
                     all-reduce (maximum) of token and of logp, logq, weight: the rank that owns a row's draw has them,
                     the others -1 and -inf
       scoring       score_from_shards(records, ...)                    on every rank; nothing to reduce

With one mass M_s a shard (relative to the largest maximum), the uniform u falls into the first shard whose prefix sum
exceeds u * sum M; the rest of u, (u * sum M - prefix) / M_s, draws there from the CDF of the shard alone. In float64
that is the draw of the whole vocabulary: the same token as `sample_tokens` unless u lies within 1e-6 of a boundary of
the CDF, and its quantities to float32 rounding.

Written in torch's operations, so that they run on any device that has float64, wait for none and can be captured in a
CUDA graph; not bound to a backend. They read the shard's logits twice, some rows at a time. torch may add a row's
float64 masses in another order when it stands in another batch: the results are equal there as stated above.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentError, ArgumentTypeError
from ..state import Status
from .checks import check_exponents, check_flag, check_logits, check_tensor, check_vectors
from .rows import check_sampling, check_scoring
from .sampling import SampleOutput
from .scoring import ScoreOutput

# The columns of a record, all of one shard.
_MAX = 0  # the largest logit; NaN if one is NaN, else +inf if one is
_REST = 1  # sum exp(z - max) without one argmax
_REST_BETA = 2  # sum exp(beta (z - max)) without it
_MOMENT = 3  # sum exp(z - max) (z - max)
_DRAW_MAX = 4  # the largest logit but the excluded one
_DRAW_MASS = 5  # sum exp(beta (z - draw max)) without the excluded one
_TOKEN = 6  # the logit of the excluded or the scored token, -inf in the shards that do not hold it
_SIZE = 7  # entries of the shard
SHARD_FIELDS = 8

_ENTRIES = 1 << 22  # float64 entries of a temporary: 32 MiB


def _check_offset(offset) -> None:
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise ArgumentTypeError(f"offset is {offset!r}, a {type(offset).__name__}; it must be an int")
    if offset < 0:
        raise ArgumentError(f"offset is {offset}; it must be at least 0")


def _row_blocks(logits: torch.Tensor):
    rows, width = logits.shape
    size = max(1, _ENTRIES // width)
    return (slice(first, first + size) for first in range(0, rows, size))


def _shifted(z: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """z - top, where a row without mass stays -inf."""
    return z - torch.where(top == -torch.inf, 0.0, top)[:, None]


def _local(tokens: torch.Tensor, offset: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each token in the shard [rows, 1], clamped into it, and whether it lies there [rows]."""
    column = tokens - offset
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


def shard_record(
    logits: torch.Tensor, beta: torch.Tensor, offset: int, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """What one shard of the vocabulary must tell the others: float64 [B, 8].

    logits: float32, float16 or bfloat16 [B, Vs], unit inner stride: the shard's entries [offset, offset + Vs) of the
        vocabulary. beta: float32 [B].
    tokens: int64 [B] or None. For sampling: the token that may not be drawn (-1: none), as `exclude` of
        `sample_tokens`; for scoring: the tokens. Ids of the whole vocabulary.
    Errors: as `sample_tokens`.
    """
    check_logits(logits)
    rows, width = logits.shape
    check_vectors(logits, beta=(beta, torch.float32, (rows,)))
    if tokens is not None:
        check_vectors(logits, tokens=(tokens, torch.int64, (rows,)))
    check_exponents(beta=beta)
    _check_offset(offset)
    if tokens is None:
        tokens = torch.full((rows,), -1, dtype=torch.int64, device=logits.device)
    record = logits.new_empty((rows, SHARD_FIELDS), dtype=torch.float64)
    for block in _row_blocks(logits):
        z, b, out = logits[block].double(), beta[block].double()[:, None], record[block]
        top, argmax = z.max(-1)  # NaN if there is one
        x = _shifted(z, top)
        mass, tempered = x.exp(), (b * x).exp()
        out[:, _MAX] = top
        out[:, _MOMENT] = torch.where(mass > 0, mass * x, 0.0).sum(-1)
        column, inside = _local(tokens[block], offset, width)
        out[:, _TOKEN] = torch.where(inside, z.gather(1, column)[:, 0], -torch.inf)
        out[:, _REST] = mass.scatter_(1, argmax[:, None], 0.0).sum(-1)
        out[:, _REST_BETA] = tempered.scatter_(1, argmax[:, None], 0.0).sum(-1)
        kept = _without(z, column, inside)
        out[:, _DRAW_MAX] = kept.max(-1).values
        out[:, _DRAW_MASS] = (b * _shifted(kept, out[:, _DRAW_MAX])).exp().sum(-1)
        out[:, _SIZE] = width
    return record


def _without(z: torch.Tensor, column: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """The rows, in place, without the entry `column` of those rows where it lies inside."""
    entry = torch.where(inside[:, None], -torch.inf, z.gather(1, column))
    return z.scatter_(1, column, entry)


class _Whole:
    """The rows of the whole vocabulary, from the records of its shards. Everything float64 [B]."""

    def __init__(self, records: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor):
        self.alpha, self.beta = alpha.double(), beta.double()
        tops = records[..., _MAX]
        self.top, first = tops.max(0)
        self.vocab = records[..., _SIZE].sum(0)
        shift = torch.where(tops == -torch.inf, -torch.inf, tops - self.top)
        # Only the first shard that attains the maximum leaves its argmax out.
        shard = torch.arange(len(records), device=records.device)[:, None]
        argmax = ((tops != -torch.inf) & (shard != first)).double()
        scale = shift.exp()
        finite = torch.where(scale > 0, shift, 0.0)
        inner = argmax + records[..., _REST]
        rest = (scale * inner).sum(0)
        self.norm = torch.log1p(rest)
        self.norm_beta = torch.log1p(((self.beta * shift).exp() * (argmax + records[..., _REST_BETA])).sum(0))
        moment = (scale * (records[..., _MOMENT] + finite * inner)).sum(0)
        self.entropy = self.norm - moment / (1.0 + rest)

    def status(self, tokens: torch.Tensor | None, least: int) -> torch.Tensor:
        """int32 [B]. tokens below `least` or beyond the vocabulary are bad."""
        sound = (self.alpha > 0) & self.alpha.isfinite() & (self.beta > 0) & self.beta.isfinite()
        status = torch.full_like(self.top, int(Status.OK), dtype=torch.int32)
        if tokens is not None:
            bad = (tokens < least) | (tokens >= self.vocab)
            status = torch.where(bad, int(Status.BAD_TOKEN), status)
        status = torch.where(self.top == -torch.inf, int(Status.NO_MASS), status)
        status = torch.where(self.top == torch.inf, int(Status.POS_INF), status)
        return torch.where(self.top.isnan() | ~sound, int(Status.NAN), status).to(torch.int32)

    def quantities(self, z: torch.Tensor, status: torch.Tensor) -> list[torch.Tensor]:
        """logp, logq, weight float32 [B] of tokens whose logits are z; NaN where the status is not OK."""
        gap = z - self.top
        logp, logq = gap - self.norm, self.beta * gap - self.norm_beta
        weight = self.norm_beta - self.beta * self.norm
        weight = torch.where(self.alpha == self.beta, weight, weight + (self.alpha - self.beta) * logp)
        clamped = (self.beta >= 1.0) & (self.beta <= self.alpha)
        weight = torch.where(clamped, weight.clamp(max=0.0), weight)
        columns = (torch.where(z == -torch.inf, -torch.inf, column) for column in (logp, logq, weight))
        return [torch.where(status == int(Status.OK), column, torch.nan).float() for column in columns]


def _check_records(records) -> None:
    check_tensor("records", records, dtypes=(torch.float64,), shape=(None, None, SHARD_FIELDS))
    if len(records) < 1:
        raise ArgumentError("records has no shards; there must be at least 1")


def score_from_shards(
    records: torch.Tensor,
    tokens: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    *,
    return_entropy: bool = False,
) -> ScoreOutput:
    """`score_tokens` of a split vocabulary, from the records of all its shards: the same on every rank.

    records: float64 [S, B, 8], `shard_record` of every shard with these tokens. tokens: int64 [B], ids of the whole
    vocabulary. alpha, beta, the outputs and the errors: as `score_tokens`.
    """
    _check_records(records)
    check_scoring(records, records.shape[1], tokens, alpha, beta)
    check_flag("return_entropy", return_entropy)
    whole = _Whole(records, alpha, beta)
    status = whole.status(tokens, 0)
    logp, logq, weight = whole.quantities(records[..., _TOKEN].max(0).values, status)
    entropy = torch.where(status == int(Status.OK), whole.entropy, torch.nan).float() if return_entropy else None
    return ScoreOutput(logp, logq, weight, entropy, status)


def sample_from_shards(
    records: torch.Tensor,
    shard: int,
    logits: torch.Tensor,
    offset: int,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    seed: torch.Tensor,
    counter: torch.Tensor,
    exclude: torch.Tensor | None = None,
    *,
    return_entropy: bool = False,
) -> SampleOutput:
    """`sample_tokens` of a split vocabulary, as far as this shard knows the answer.

    records: float64 [S, B, 8], `shard_record` of every shard in the order of the vocabulary, with `exclude` as its
    tokens. shard: the index of this one; logits, offset: those that its record was made of. The rest: as
    `sample_tokens`; alpha, beta, seed, counter and exclude must be the same on every rank.

    In the shard that holds the drawn token of a row: token (its id in the whole vocabulary), logp, logq and weight. In
    the others token -1 and -inf. So the maximum over the ranks is the answer. Entropy and status are the same on every
    rank, and a bad row has token -1 and NaN on all of them.
    """
    _check_records(records)
    check_logits(logits)
    rows, width = logits.shape
    check_tensor("logits", logits, shape=(records.shape[1], None), like=records)
    check_sampling(records, rows, alpha, beta, seed, counter, exclude)
    check_flag("return_entropy", return_entropy)
    _check_offset(offset)
    if isinstance(shard, bool) or not isinstance(shard, int):
        raise ArgumentTypeError(f"shard is {shard!r}, a {type(shard).__name__}; it must be an int")
    if not 0 <= shard < len(records):
        raise ArgumentError(f"shard is {shard}; it must lie in [0, {len(records)})")

    whole = _Whole(records, alpha, beta)
    status = whole.status(exclude, -(2**63))
    # What may be drawn: every shard's mass without the excluded token, relative to the largest that is left.
    tops = records[..., _DRAW_MAX]
    top = tops.max(0).values
    alone = top == -torch.inf  # nothing but the excluded token has mass: it is returned all the same
    shift = torch.where(tops == -torch.inf, -torch.inf, tops - torch.where(alone, 0.0, top))
    mass = (whole.beta * shift).exp() * records[..., _DRAW_MASS]
    cdf = mass.cumsum(0)
    target = token_uniform(seed, counter) * cdf[-1]
    # The first shard that exceeds the target; where rounding leaves none, the last with mass.
    index = torch.arange(len(records), device=records.device)[:, None]
    last = torch.where(mass > 0, index, 0).max(0).values
    owner = torch.where((cdf > target) & (mass > 0), index, last).min(0).values
    mine = (owner == shard) & ~alone
    before = cdf[shard] - mass[shard]
    fraction = torch.where(mine, (target - before) / mass[shard], 0.0)

    columns = torch.empty((rows,), dtype=torch.int64, device=logits.device)
    chosen = torch.empty((rows,), dtype=torch.float64, device=logits.device)
    absent = torch.full_like(columns, -1)
    excluded = absent if exclude is None else exclude
    for block in _row_blocks(logits):
        z = logits[block].double()
        column, inside = _local(excluded[block], offset, width)
        inside = inside & (z.gather(1, column)[:, 0] > -torch.inf)
        own = inside & alone[block]
        kept = _without(z.clone(), column, inside)
        entries = (whole.beta[block, None] * _shifted(kept, records[shard, block, _DRAW_MAX])).exp()
        sums = entries.cumsum(-1)
        above = (sums > fraction[block, None] * sums[:, -1:]) & (entries > 0)
        found = torch.where(above.any(-1), above.int().argmax(-1), _last(entries > 0))
        found = torch.where(own, column[:, 0], found)
        columns[block] = found
        chosen[block] = z.gather(1, found[:, None])[:, 0]
        mine[block] |= own
    mine &= status == int(Status.OK)
    token = torch.where(mine, columns + offset, absent)
    values = whole.quantities(torch.where(mine, chosen, -torch.inf), status)
    entropy = torch.where(status == int(Status.OK), whole.entropy, torch.nan).float() if return_entropy else None
    return SampleOutput(token, *values, entropy, status)


def _last(flags: torch.Tensor) -> torch.Tensor:
    """Index of the last true entry of each row; 0 where there is none."""
    index = torch.arange(flags.shape[-1], device=flags.device)
    return torch.where(flags, index, 0).max(-1).values


def token_uniform(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """The first uniform of each Philox block (DESIGN 4), in tensor operations. float64 [B]; bits: `power_kernels.rng`.

    seed: int64 [1] or [B]. counter: int32 [B, 4].
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = (counter.long() & low).unbind(-1)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        # Products of two 32-bit words wrap in int64; shifting and masking still give their two halves.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return ((c0 >> 5).double() * 67108864.0 + (c1 >> 6).double()) * 2.0**-53
