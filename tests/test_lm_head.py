"""sample_from_hidden and score_from_hidden against float64, alone, in batches, and beside their memory (DESIGN 5.3)."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels import reference
from power_kernels.reference.lm_head import head_logits
from power_kernels.state import Status
from tests.devices import host_only
from tests.op_helpers import (
    BACKENDS,
    DTYPES,
    EPS,
    EXP2_ULPS,
    EXPONENTS,
    FLOATS,
    INF,
    INTERPRETED,
    NAN,
    SEED,
    assert_same_bits,
    counter_of_uniform,
    counters,
    draw_error,
    expected_status,
    per_row,
    scipy_stats,
    serving,
    strided,
    uniforms_of,
)

# numpy's, inside the interpreter and the reference, about the hostile values below
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
REJECT = 1e-5

PLAIN = {}
GEMMA = {"softcap": 5.0, "scale": 0.75}  # a cap that bends the logits of these tests, which reach about 10


@pytest.fixture(params=BACKENDS)
def backend(request):
    with serving(request.param) as name:
        yield name


def is_slow(backend: str) -> bool:
    return backend == "triton" and INTERPRETED


def head(rows: int, width: int, vocab: int, dtype=torch.float32, *, seed=0) -> tuple[torch.Tensor, ...]:
    """hidden, lm_head, bias with logits of about 3."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    lm_head = torch.randn(vocab, width, generator=generator) * (3 / math.sqrt(width))
    return hidden.to(dtype), lm_head.to(dtype), torch.randn(vocab, generator=generator).to(dtype)


def sample(hidden, lm_head, alpha=4.0, beta=None, counter=None, exclude=None, *, entropy=True, **options):
    rows = hidden.shape[0]
    return pk.sample_from_hidden(
        hidden,
        lm_head,
        per_row(alpha, rows),
        per_row(alpha if beta is None else beta, rows),
        torch.tensor([SEED]),
        counters(rows) if counter is None else counter,
        None if exclude is None else per_row(exclude, rows, torch.int64),
        return_entropy=entropy,
        **options,
    )


def score(hidden, lm_head, tokens, alpha=4.0, beta=None, *, entropy=True, **options):
    rows = hidden.shape[0]
    beta = per_row(alpha if beta is None else beta, rows)
    tokens = per_row(tokens, rows, torch.int64)
    return pk.score_from_hidden(hidden, lm_head, tokens, per_row(alpha, rows), beta, return_entropy=entropy, **options)


def torch_logits(hidden, lm_head, bias=None, softcap=0.0, scale=1.0) -> torch.Tensor:
    """The logits as one would write them in torch, in float32."""
    z = hidden.float() @ lm_head.float().T
    z = scale * (z if bias is None else z + bias.float())
    return softcap * torch.tanh(z / softcap) if softcap else z


class Truth:
    """Float64 values of a head's rows, and how far the float32 torch expression is from them."""

    def __init__(self, hidden, lm_head, alpha, beta, bias=None, softcap=0.0, scale=1.0):
        rows = hidden.shape[0]
        self.alpha, self.beta = per_row(alpha, rows), per_row(beta, rows)
        self.z = head_logits(hidden, lm_head, bias, softcap, scale).numpy()
        self.naive = torch_logits(hidden, lm_head, bias, softcap, scale)
        finite = np.isfinite(self.z) & self.naive.isfinite().numpy()
        largest = np.abs(self.z[finite]).max(initial=0.0)
        # twice what torch errs in a logit, and one rounding of the largest
        self.logit_error = 2 * np.abs(self.naive.double().numpy() - self.z)[finite].max(initial=0.0) + EPS * largest

    def status(self, **keys) -> list[Status]:
        rows = range(len(self.z))
        return [expected_status(self.z[i], **{k: int(v[i]) for k, v in keys.items()}) for i in rows]

    def assert_quantities(self, tokens, out) -> None:
        """Each within what its logits' errors may move it, and the rounding of float32.

        The law of the operators over logits: twice the error of the float32 expression, plus one ulp of the largest
        number met on the way, beta * max(1, |value|). On top of it, a logit's error enters logp twice (the token's and
        the normaliser's), logq beta times as much, weight both.
        """
        a, b = self.alpha.double().numpy(), self.beta.double().numpy()
        good = out.status.numpy() == Status.OK
        factors = {"logp": 2.0, "logq": 2 * b, "weight": 2 * np.abs(a - b) + 2 * b}
        for name in FLOATS:
            ours = getattr(out, name)
            if ours is None:
                continue
            ours = ours.double().numpy()
            assert np.isnan(ours[~good]).all(), name
            for i in np.flatnonzero(good):
                x, z = int(tokens[i]), self.z[i]
                if name == "entropy":
                    want = reference.entropy(z)
                    factor = 2 * want  # |dH| <= sum p |log p + H| e <= 2 H e
                elif z[x] == -INF:
                    assert ours[i] == -INF
                    continue
                else:
                    want = getattr(reference.token_quantities(z, x, float(a[i]), float(b[i])), name)
                    factor = np.broadcast_to(factors[name], a.shape)[i]
                ulp = EPS * max(1.0, abs(want)) * max(1.0, b[i]) * (1 + EXP2_ULPS)
                bound = factor * self.logit_error + 2 * ulp
                assert abs(ours[i] - want) <= bound, (name, i, ours[i], want, bound)

    def assert_sample(self, counter, exclude, out) -> None:
        rows = len(self.z)
        skip = per_row(-1 if exclude is None else exclude, rows, torch.int64)
        assert out.status.tolist() == self.status(exclude=skip)
        uniform = uniforms_of(counter)
        for i in range(rows):
            if out.status[i] != Status.OK:
                assert out.token[i] == -1
                continue
            error = draw_error(self.z[i], float(self.beta[i]), uniform[i], int(skip[i]), int(out.token[i]))
            # an error e of all logits moves the CDF by at most beta * e
            assert error < 1e-6 + float(self.beta[i]) * self.logit_error, (i, error)
        self.assert_quantities(out.token, out)

    def assert_score(self, tokens, out) -> None:
        assert out.status.tolist() == self.status(token=tokens)
        self.assert_quantities(tokens, out)


# ---------------------------------------------------------------------------------------------------------------
# Values

SIZES = [
    (1, 1),  # one product, no rest
    (2, 7),  # less than any vector, both ways
    (255, 64),  # one short of a tile and of a panel of four; whole vectors
    (257, 7),  # one entry in a second tile
    (1000, 64),
    (4097, 64),  # several tiles of every backend, one entry in the last
    (300, 576),  # the width of SmolLM2
]


def check_rows(rows: int, width: int, vocab: int, dtype, options: dict) -> None:
    hidden, lm_head, bias = head(rows, width, vocab, dtype, seed=vocab)
    options = {**options, "bias": bias} if options else options
    repeats = -(-rows // len(EXPONENTS))
    alpha, beta = (torch.tensor(v).repeat(repeats)[:rows] for v in zip(*EXPONENTS, strict=True))
    truth, words = Truth(hidden, lm_head, alpha, beta, **options), counters(rows, vocab)
    truth.assert_sample(words, None, sample(hidden, lm_head, alpha, beta, words, **options))
    tokens = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(vocab))
    truth.assert_score(tokens, score(hidden, lm_head, tokens, alpha, beta, **options))


@pytest.mark.parametrize("options", [PLAIN, GEMMA], ids=["plain", "bias, cap and scale"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "width"), SIZES)
def test_values_are_as_close_to_float64_as_torch_in_float32(backend, vocab, width, dtype, options):
    if is_slow(backend) and dtype is torch.bfloat16:
        pytest.skip("products of bfloat16 are wrong in Triton's interpreter")
    check_rows(2 if is_slow(backend) else 14, width, vocab, dtype, options)


# two blocks of columns in every dtype, the last one odd; a chunk of rows, one panel and one row more
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_wide_heads_and_many_rows(cpp, dtype):
    check_rows(103, 3001, 130, dtype, GEMMA)


# the polynomial and the exponential part of tanh, their seam, where it is 1, and where its argument is its value
def test_the_cap_is_tanh_to_float32(backend):
    t = torch.tensor([0.0, 1e-30, 1e-4, 0.3, 0.6249, 0.6251, 1.0, 3.0, 9.0, 20.0, 3e38])
    hidden, lm_head = torch.ones(1, 1), torch.cat([t, -t])[:, None]
    logits = torch.empty(1, 22)
    one, status = torch.ones(1), torch.empty(1, dtype=torch.int32)
    outputs = (torch.empty(1, dtype=torch.int64), *(torch.empty(1) for _ in range(3)), None, status)
    workspace = torch.empty(pk.hidden_workspace_size(1, 22))
    pk.sample_from_hidden_out(
        hidden, lm_head, None, one, one, torch.tensor([1]), counters(1), None, 30.0, 1.0, logits, workspace, *outputs
    )
    want = 30.0 * torch.tanh(lm_head[:, 0].double() / 30.0)
    assert (((logits[0] - want) / want.abs().clamp(min=1e-38)).abs() <= 4 * EPS).all()


def test_the_scratch_holds_the_logits_that_were_sampled(fast):
    hidden, lm_head, bias = head(5, 65, 2100, seed=3)
    alpha, words, seed = per_row(4.0, 5), counters(5), torch.tensor([SEED])
    logits, workspace = torch.full((5, 2100), NAN), torch.empty(pk.hidden_workspace_size(5, 2100))
    columns = [
        torch.empty(5, dtype=torch.int64),
        *(torch.empty(5) for _ in range(4)),
        torch.empty(5, dtype=torch.int32),
    ]
    pk.sample_from_hidden_out(
        hidden, lm_head, bias, alpha, alpha, seed, words, None, 5.0, 0.75, logits, workspace, *columns
    )
    truth = Truth(hidden, lm_head, 4.0, 4.0, bias, 5.0, 0.75)
    assert np.abs(logits.double().numpy() - truth.z).max() <= truth.logit_error
    drawn = pk.sample_tokens(logits, alpha, alpha, seed, words, return_entropy=True)
    assert drawn.token.tolist() == columns[0].tolist()
    for ours, theirs in zip(columns[1:5], drawn[1:5], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4 * EPS, atol=4 * EPS)


def test_the_product_is_not_rounded_to_the_dtype_of_its_operands(backend):
    # 256 + 1 is not a bfloat16, nor is 2048 + 1 a float16: rounded logits would be tied
    for dtype, large in ((torch.bfloat16, 256.0), (torch.float16, 2048.0)):
        if is_slow(backend) and dtype is torch.bfloat16:
            continue
        hidden = torch.tensor([[large, 1.0]]).to(dtype)
        lm_head = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).to(dtype)
        out = score(hidden, lm_head, 0, 1.0, 1.0)
        assert float(out.logp) == pytest.approx(-1 - math.log1p(math.exp(-1)), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Hostile rows and tokens


def test_bad_rows_are_reported_and_spoil_no_neighbour(backend):
    hidden = torch.tensor([[1.0, 2.0], [NAN, 0.0], [INF, 0.0], [-INF, 0.0], [0.5, -1.0], [INF, 1.0]])
    lm_head = torch.tensor([[1.0, 0.5], [2.0, 0.25], [0.5, -1.0]])
    lm_head = torch.cat([lm_head, lm_head.flip(0), lm_head + 1])  # nothing is 0: no inf * 0 in the first column
    words = counters(6)
    out = sample(hidden[:, :1], lm_head[:, :1], 4.0, 2.0, words)
    want = [Status.OK, Status.NAN, Status.POS_INF, Status.NO_MASS, Status.OK, Status.POS_INF]
    assert out.status.tolist() == want
    Truth(hidden[:, :1], lm_head[:, :1], 4.0, 2.0).assert_sample(words, None, out)
    scored = score(hidden[:, :1], lm_head[:, :1], 1, 4.0, 2.0)
    assert scored.status.tolist() == want
    good = [0, 4]
    for i in good:
        alone = sample(hidden[i : i + 1, :1], lm_head[:, :1], 4.0, 2.0, words[i : i + 1])
        assert_same_bits(alone, [column[i : i + 1] for column in out])
    # inf - inf, and inf * 0
    assert sample(hidden[2:3], lm_head * torch.tensor([1.0, INF]), 4.0).status.tolist() == [Status.NAN]


def test_a_bias_of_minus_infinity_forbids_a_token_and_a_cap_makes_infinities_finite(backend):
    rows = 4 if is_slow(backend) else 60
    hidden, lm_head, bias = head(rows, 8, 9, seed=5)
    bias[[0, 3, 8]] = -INF
    words = counters(rows, 5)
    out = sample(hidden, lm_head, 1.0, counter=words, bias=bias)
    assert not set(out.token.tolist()) & {0, 3, 8}
    Truth(hidden, lm_head, 1.0, 1.0, bias).assert_sample(words, None, out)
    assert score(hidden, lm_head, 3, bias=bias).logp.tolist() == [-INF] * rows
    assert sample(hidden, lm_head, bias=torch.full((9,), -INF)).status.tolist() == [Status.NO_MASS] * rows
    bias[0], bias[3] = INF, 0.5
    assert score(hidden, lm_head, 1, bias=bias).status.tolist() == [Status.POS_INF] * rows
    Truth(hidden, lm_head, 4.0, 4.0, bias, softcap=4.0).assert_score(
        per_row(0, rows, torch.int64), score(hidden, lm_head, 0, bias=bias, softcap=4.0)
    )


def test_an_excluded_token_is_left_out_of_the_draw_but_not_of_its_scores(backend):
    rows = 4 if is_slow(backend) else 100
    hidden, lm_head, _ = head(rows, 16, 300, seed=6)
    exclude = (hidden @ lm_head.T).argmax(-1)  # the likeliest token: not drawing it shows
    exclude[1::4], exclude[2::4], exclude[3::4] = -1, 300, 7
    words = counters(rows, 6)
    out = sample(hidden, lm_head, 4.0, 2.5, words, exclude)
    assert (out.token != exclude)[out.status == Status.OK].sum() == (out.status == Status.OK).sum()
    Truth(hidden, lm_head, 4.0, 2.5).assert_sample(words, exclude, out)


def test_scored_tokens_outside_the_vocabulary_are_reported(backend):
    hidden, lm_head, _ = head(1, 4, 40)
    tokens = torch.tensor([40, -1, 2**32, -(2**32), 0, 39])
    out = score(hidden.expand(6, 4), lm_head, tokens)
    assert out.status.tolist() == [Status.BAD_TOKEN] * 4 + [Status.OK] * 2
    Truth(hidden.expand(6, 4), lm_head, 4.0, 4.0).assert_score(tokens, out)


@pytest.mark.parametrize("name", ["sample_from_hidden", "score_from_hidden"])
def test_an_empty_vocabulary_or_width_is_refused(name):
    call = sample if name == "sample_from_hidden" else lambda h, w: score(h, w, 0)
    with pytest.raises(pk.ArgumentError, match=r"^lm_head has an empty vocabulary; V must be at least 1"):
        call(torch.ones(2, 3), torch.ones(0, 3))
    with pytest.raises(pk.ArgumentError, match=r"^hidden has no columns; D must be at least 1"):
        call(torch.ones(2, 0), torch.ones(5, 0))
    with pytest.raises(pk.ArgumentError, match=r"^lm_head has shape \[5, 4\]; it must be \[\*, 3\]"):
        call(torch.ones(2, 3), torch.ones(5, 4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softcap": -1.0}, pk.ArgumentError, "softcap is -1.0; it must be finite and at least 0"),
        ({"softcap": INF}, pk.ArgumentError, "softcap is inf"),
        ({"softcap": 1e39}, pk.ArgumentError, "softcap is 1e\\+39; .* neither overflow nor underflow float32"),
        ({"softcap": 1e-46}, pk.ArgumentError, "softcap is 1e-46; .* neither overflow nor underflow float32"),
        ({"scale": -1e39}, pk.ArgumentError, "scale is -1e\\+39"),
        ({"softcap": None}, pk.ArgumentTypeError, "softcap is None, a NoneType; it must be a float"),
        ({"scale": NAN}, pk.ArgumentError, "scale is nan; it must be finite"),
        ({"scale": True}, pk.ArgumentTypeError, "scale is True, a bool"),
        ({"scale": torch.ones(())}, pk.ArgumentTypeError, "scale is .*Tensor; it must be a float"),
        ({"bias": torch.ones(5, dtype=torch.float16)}, pk.ArgumentTypeError, "bias has dtype torch.float16"),
    ],
)
def test_a_cap_a_scale_or_a_bias_out_of_range_is_refused(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        sample(torch.ones(2, 3), torch.ones(5, 3), **options)
    with pytest.raises(error, match=f"^{message}"):
        score(torch.ones(2, 3), torch.ones(5, 3), 0, **options)


# ---------------------------------------------------------------------------------------------------------------
# Batches, layouts, threads


def batch(rows: int, width: int, vocab: int, dtype):
    repeats = -(-rows // len(EXPONENTS))
    alpha, beta = (torch.tensor(v).repeat(repeats)[:rows] for v in zip(*EXPONENTS, strict=True))
    hidden, lm_head, bias = head(rows, width, vocab, dtype, seed=rows)
    tokens = torch.arange(rows) * 7 % vocab

    def run(which: slice, source=hidden, weights=lm_head):
        options = dict(bias=bias, softcap=20.0, scale=0.5)
        drawn = sample(source[which], weights, alpha[which], beta[which], counters(rows)[which], **options)
        scored = score(source[which], weights, tokens[which], alpha[which], beta[which], **options)
        return [*drawn, *scored]

    return run, hidden, lm_head


# few rows as a stream of weights, a panel of them, a panel and one row, a chunk and some, two chunks;
# one block of columns, and several of odd widths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 1701, 3333])
def test_a_row_alone_and_inside_a_batch_gives_the_same_bits(cpp, dtype, width):
    rows = 203
    run, *_ = batch(rows, width, 270, dtype)
    whole = run(slice(0, rows))
    for first, count in ((0, 1), (202, 1), (40, 2), (50, 3), (60, 4), (7, 5), (100, 7), (3, 100), (1, 202)):
        part = slice(first, first + count)
        assert_same_bits(run(part), [column[part] for column in whole])


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_row_alone_and_inside_a_batch_gives_the_same_bits_on_every_backend(backend, dtype):
    run, *_ = batch(3, 40, 270, dtype)
    whole = run(slice(0, 3))
    for i in range(3):
        assert_same_bits(run(slice(i, i + 1)), [column[i : i + 1] for column in whole])


def test_a_drawn_token_and_the_same_token_scored_have_the_same_bits(cpp):
    for dtype in DTYPES:
        hidden, lm_head, bias = head(100, 700, 2500, dtype, seed=8)
        options = dict(bias=bias, softcap=9.0, scale=2.0)
        drawn = sample(hidden, lm_head, 4.0, 2.5, **options)
        scored = score(hidden, lm_head, drawn.token, 4.0, 2.5, **options)
        assert_same_bits(scored, [getattr(drawn, name) for name in (*FLOATS, "status")])


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_strides_and_alignment_change_no_bit(backend, dtype):
    rows = 2 if is_slow(backend) else 9
    for width in (31, 64):
        run, hidden, lm_head = batch(rows, width, 150, dtype)
        plain = run(slice(0, rows))
        # never 16-byte aligned, whatever the row; NaN lies between the rows
        odd, other = (run(slice(0, rows), strided(hidden, pad, pad), strided(lm_head, pad, pad)) for pad in (1, 3))
        assert_same_bits(odd, other)
        if backend != "triton" or width == 31:  # its 16-byte loads are a launch configuration of their own
            assert_same_bits(odd, plain)
        apart = run(slice(0, rows), strided(hidden, 64 + width, 0), strided(lm_head, 64 + width, 0))
        assert_same_bits(apart, plain)


def test_the_number_of_threads_changes_no_bit(cpp):
    before = torch.get_num_threads()
    try:
        for rows, vocab in ((1, 30_000), (150, 5000)):
            run, *_ = batch(rows, 64, vocab, torch.float32)
            torch.set_num_threads(1)
            one = run(slice(0, rows))
            torch.set_num_threads(2)
            assert_same_bits(run(slice(0, rows)), one)
    finally:
        torch.set_num_threads(before)


def test_a_batch_of_no_rows_gives_outputs_of_no_rows(backend):
    hidden, lm_head, _ = head(0, 4, 7)
    assert [tuple(column.shape) for column in sample(hidden, lm_head)] == [(0,)] * 6
    assert [tuple(column.shape) for column in score(hidden, lm_head, 0)] == [(0,)] * 5


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("vocab", [1, 257, 2100])
def test_the_out_forms_write_what_the_functions_return_into_no_more_than_they_ask_for(backend, vocab, entropy):
    rows = 2 if is_slow(backend) else 5
    hidden, lm_head, bias = head(rows, 24, vocab, torch.float16, seed=vocab)
    alpha, beta, seed, words = per_row(4.0, rows), per_row(2.5, rows), torch.tensor([SEED]), counters(rows)
    exclude, tokens = torch.arange(rows) - 1, torch.arange(rows) % vocab
    size = pk.hidden_workspace_size(rows, vocab)
    workspace, scratch = torch.full((size + 64,), NAN), torch.full((rows * vocab + 64,), NAN)
    workspace[size:] = scratch[rows * vocab :] = 1234.5

    def columns(count: int) -> list:
        floats = [torch.full((rows,), NAN) for _ in range(4)]
        return [*floats[:3], floats[3] if entropy else None, torch.full((rows,), -77, dtype=torch.int32)][:count]

    logits = scratch[: rows * vocab].view(rows, vocab)
    drawn = [torch.full((rows,), -77), *columns(5)]
    assert (
        pk.sample_from_hidden_out(
            hidden, lm_head, bias, alpha, beta, seed, words, exclude, 5.0, 0.75, logits, workspace[:size], *drawn
        )
        is None
    )
    options = dict(bias=bias, softcap=5.0, scale=0.75, return_entropy=entropy)
    assert_same_bits(pk.sample_from_hidden(hidden, lm_head, alpha, beta, seed, words, exclude, **options), drawn)
    scored = columns(5)
    pk.score_from_hidden_out(hidden, lm_head, bias, tokens, alpha, beta, 5.0, 0.75, workspace[:size], *scored)
    assert_same_bits(pk.score_from_hidden(hidden, lm_head, tokens, alpha, beta, **options), scored)
    assert (workspace[size:] == 1234.5).all(), "written past the end of the workspace"
    assert (scratch[rows * vocab :] == 1234.5).all(), "written past the end of the logits"
    with pytest.raises(pk.ArgumentError, match=f"^workspace has {size - 1} elements; it must have at least {size}"):
        pk.score_from_hidden_out(hidden, lm_head, bias, tokens, alpha, beta, 5.0, 0.75, workspace[: size - 1], *scored)


def test_weights_beyond_two_to_the_31_entries_are_found(backend, tmp_path):
    stride, width = 2**30 + 8, 16  # the stride fits 32 bits, twice the stride does not
    hidden, lm_head, _ = head(3, width, 3, torch.float16)
    entries = 2 * stride + width
    with (tmp_path / "sparse").open("wb") as file:  # a file that holds three pages of data
        file.truncate(entries * 2)
    storage = torch.from_file(str(tmp_path / "sparse"), shared=False, size=entries, dtype=torch.float16)
    far = torch.as_strided(storage, (3, width), (stride, 1))
    far.copy_(lm_head)
    assert_same_bits(sample(hidden, far), sample(hidden, lm_head))
    assert_same_bits(score(hidden, far, 2), score(hidden, lm_head, 2))
    far.copy_(hidden)
    assert_same_bits(sample(far, lm_head), sample(hidden, lm_head))
    assert_same_bits(score(far, lm_head, 2), score(hidden, lm_head, 2))


# ---------------------------------------------------------------------------------------------------------------
# Memory

MEMORY = """
import sys, torch, power_kernels as pk
torch.set_num_threads(1)
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
N, D, V = map(int, sys.argv[1:])
dtype = torch.float32
hidden, lm_head, tokens = torch.randn(N, D), torch.randn(V, D), torch.arange(N)
alpha = torch.full((N,), 4.0)
pk.score_from_hidden(hidden[:1], lm_head[:64], tokens[:1], alpha[:1], alpha[:1])
before = peak()
pk.score_from_hidden(hidden, lm_head, tokens, alpha, alpha)
ours = peak() - before
hidden[:256] @ lm_head[: 1 << 16].T  # 64 MiB of logits
print(ours, peak() - before)
"""


# the logits would take 96 MiB and 1,781 MiB. Few columns: they cost time and not memory.
@host_only
@pytest.mark.parametrize("shape", [(512, 64, 49_152), (3072, 4, 151_936)])
def test_scoring_takes_less_than_64_mib_on_top_of_its_inputs(cpp, shape):
    run = subprocess.run([sys.executable, "-c", MEMORY, *map(str, shape)], capture_output=True, text=True, check=True)
    ours, logits = map(int, run.stdout.split())
    assert ours < 64 << 20
    assert logits > 40 << 20, "memory of this size does not show"


def test_the_workspace_of_3072_rows_of_qwen_is_less_than_64_mib():
    assert 4 * pk.hidden_workspace_size(3072, 151_936) < 64 << 20


# ---------------------------------------------------------------------------------------------------------------
# Statistics


def serial_counters(first: int, count: int) -> torch.Tensor:
    """Counters as a chain would use them: position, serial, chain, prompt."""
    words = torch.zeros(count, 4, dtype=torch.int32)
    words[:, 0] = torch.arange(first, first + count) % 257
    words[:, 1] = (torch.arange(first, first + count) // 257).int()
    words[:, 2] = 3
    return words


# flat: every entry alike; peaked: one with 9/10 of the mass, and a tail over five orders of magnitude
@pytest.mark.parametrize("kind", ["flat", "peaked"])
def test_draws_follow_the_distribution_in_every_bin(fast, kind):
    stats = scipy_stats()
    vocab, width, draws = 333, 8, 60_000
    hidden, lm_head, _ = head(1, width, vocab, seed=11)
    if kind == "flat":
        lm_head = torch.ones(vocab, width)
    bias = torch.zeros(vocab)
    if kind == "peaked":
        bias[200] = 9.0
    beta = 0.75
    out = sample(hidden.expand(draws, width), lm_head, 4.0, beta, serial_counters(0, draws), bias=bias, entropy=False)
    z = head_logits(hidden, lm_head, bias, 0.0, 1.0).numpy()[0]
    p = np.exp(beta * (z - z.max()))
    expected = draws * p / p.sum()
    count = np.bincount(out.token.numpy(), minlength=vocab).astype(float)
    rare = expected < 5
    observed, expected = (np.append(v[~rare], v[rare].sum()) for v in (count, expected))
    keep = expected > 0
    assert stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue > REJECT


VAST, HEAD = 200_000, 123_456


def vast_head() -> tuple[torch.Tensor, torch.Tensor]:
    """One token 18 nats above a tail of 200,000, exactly: products of small integers."""
    lm_head = torch.full((VAST, 2), -9.0)
    lm_head[HEAD] = 0.0
    return torch.ones(1, 2), lm_head


def test_a_head_18_nats_above_a_tail_of_200000_leaves_the_tail_uniform_and_its_mass_right(fast):
    stats = scipy_stats()
    hidden, lm_head = vast_head()
    batch = 128
    hidden, alpha, seed = hidden.expand(batch, 2), per_row(4.0, batch), torch.tensor([SEED])
    logits, workspace = torch.empty(batch, VAST), torch.empty(pk.hidden_workspace_size(batch, VAST))
    token, status = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.int32)
    outputs = (logits, workspace, token, *(torch.empty(batch) for _ in range(3)), None, status)
    # The mass of the tail: 3e-3 of the row, so that 40 batches expect 16 of it; 0.96; all of what may be drawn.
    for beta, exclude, batches in ((1.0, -1, 40), (0.5, -1, 20), (4.0, HEAD, 20)):
        exponent, skip = per_row(beta, batch), per_row(exclude, batch, torch.int64)
        drawn = []
        for i in range(batches):
            words = serial_counters(i * batch, batch)
            pk.sample_from_hidden_out(hidden, lm_head, None, alpha, exponent, seed, words, skip, 0.0, 1.0, *outputs)
            drawn.append(token.clone())
        tokens = torch.cat(drawn).numpy()
        tail = (VAST - 1) * math.exp(-18.0 * beta)
        tail = 1.0 if exclude == HEAD else tail / (1 + tail)
        assert stats.binomtest(int((tokens != HEAD).sum()), len(tokens), tail).pvalue > REJECT
        if tail > 0.5:
            bins = np.histogram(tokens[tokens != HEAD], bins=100, range=(0, VAST))[0]
            assert stats.chisquare(bins).pvalue > REJECT


def test_a_uniform_in_the_tail_draws_the_entry_that_float64_says(fast):
    hidden, lm_head = vast_head()
    mass = math.exp(-18.0)
    want = np.linspace(HEAD + 1, VAST - 1, 100).astype(np.int64)
    uniform = (1.0 + (want - 1 + 0.5) * mass) / (1.0 + (VAST - 1) * mass)  # the middle of each entry's own interval
    out = sample(hidden.expand(100, 2), lm_head, 4.0, 1.0, counter_of_uniform(uniform), entropy=False)
    assert out.token.tolist() == want.tolist()
