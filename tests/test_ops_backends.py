"""sample_tokens, score_tokens, mh_accept and kv_copy_ranges on every backend, against float64 (DESIGN 2, 4, 5)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels.state import Status
from tests.devices import ON_CUDA, host_only
from tests.op_helpers import (
    BACKENDS,
    DTYPES,
    EPS,
    EXPONENTS,
    FLOATS,
    INF,
    INTERPRETED,
    NAN,
    accept_tolerance,
    assert_accepted_as,
    assert_quantities,
    assert_same_bits,
    assert_sample,
    assert_score,
    bits,
    counter_of_uniform,
    counters,
    draw_error,
    normal_logits,
    per_row,
    sample,
    scipy_stats,
    score,
    serving,
    strided,
    uniforms_of,
)

# numpy's, inside the interpreter and the reference, about the hostile values below
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with serving(request.param) as name:
        yield name


def slow(backend: str) -> bool:
    return backend == "triton" and INTERPRETED


def few(backend: str, rows: int, least: int = 3) -> int:
    """A program of the interpreter takes some 20 ms."""
    return least if slow(backend) else rows


# ---------------------------------------------------------------------------------------------------------------
# Values

SIZES = [
    1,  # no rest at all: log1p(0), an exclusion that leaves nothing
    2,  # the rest is one entry; nothing fills a vector
    3,  # an odd number of entries
    255,  # one short of the narrowest tile that a workspace must allow for
    256,  # exactly that tile: no masked remainder
    257,  # one entry in a second one
    999,  # a remainder that no vector width divides
    1024,  # a power of two: whole vectors, no remainder; exactly one tile where tiles are that wide
    1025,  # one entry more: the argmax may stand alone in a tile
    2048,  # exactly one tile of the C++ backend
    2049,  # a second tile of one entry there
    4097,  # tiles that several programs or loop rounds share, and one entry in the last
]
LARGE = [
    ("triton", 50257),  # GPT-2: 25 tiles, an odd remainder, rows that are never 16-byte aligned
    ("reference", 50257),
    ("cpp", 50257),
    ("cpp", 151936),  # Qwen: 75 tiles; float32 prefix sums lose the last ones
]
if ON_CUDA:
    LARGE = [("triton", 50257), ("triton", 151936)]


def check_rows(rows: int, vocab: int, dtype) -> None:
    repeats = -(-rows // len(EXPONENTS))
    alpha, beta = (torch.tensor(v).repeat(repeats)[:rows] for v in zip(*EXPONENTS, strict=True))
    z = strided(normal_logits(rows, vocab, dtype, seed=vocab))
    out = sample(z, alpha, beta, counters(rows, vocab))
    assert_sample(z, alpha, beta, counters(rows, vocab), None, out)
    scored = score(z, out.token, alpha, beta)
    assert_same_bits(scored, [getattr(out, name) for name in (*FLOATS, "status")])
    others = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(vocab))
    assert_score(z, others, alpha, beta, score(z, others, alpha, beta))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
def test_values_are_as_close_to_float64_as_torch_in_float32(backend, vocab, dtype):
    check_rows(few(backend, 32, 2), vocab, dtype)


@pytest.mark.parametrize(("name", "vocab"), LARGE)
def test_values_of_large_vocabularies_are_as_close_to_float64_as_torch(name, vocab):
    with serving(name):
        for dtype in DTYPES[:1] if slow(name) else DTYPES:
            check_rows(few(name, 8, 1), vocab, dtype)


def test_every_pair_of_exponents_gives_its_own_weight(backend):
    rows = len(EXPONENTS)
    alpha, beta = (torch.tensor(v) for v in zip(*EXPONENTS, strict=True))
    z = normal_logits(1, 300, seed=1).expand(rows, 300)
    out = sample(z, alpha, beta)
    assert_sample(z, alpha, beta, counters(rows), None, out)
    # w = LSE(alpha z) - alpha LSE(z) whatever the token when beta = alpha, and 0 when nothing is tempered
    equal = alpha == beta
    lse = torch.logsumexp(alpha[:, None].double() * z.double(), -1) - alpha * torch.logsumexp(z.double(), -1)
    torch.testing.assert_close(out.weight[equal].double(), lse[equal], rtol=1e-6, atol=1e-6)
    assert out.weight[[e == (1.0, 1.0) for e in EXPONENTS]].tolist() == [0.0]


def test_weights_are_not_positive_where_early_rejection_relies_on_it(backend):
    rows = few(backend, 600, 4)
    z = normal_logits(rows, 63, scale=8.0, seed=2)
    z[::2, 5] += 30.0  # nearly deterministic: the exact weight is tiny
    near = 1.0 + 2.0**-23  # just above 1 the two sums agree to their last bits, and rounding alone decides the sign
    for alpha, beta in ((4.0, 4.0), (4.0, 1.0), (1.7, 1.3), (1.0, 1.0), (near, near), (4.0, near)):
        assert (sample(z, alpha, beta, entropy=False).weight <= 0).all()
        assert (score(z, 5, alpha, beta, entropy=False).weight <= 0).all()


def test_a_shift_of_the_logits_changes_nothing(backend):
    z = (normal_logits(3, 2500, seed=3) * 64).round() / 64  # multiples of 2^-6 stay exact in float32 after the shift
    plain = sample(z, 4.0, 2.5)
    for shift in (1e4, -1e4):
        assert_same_bits(sample(z + shift, 4.0, 2.5), plain)


def test_nearly_deterministic_rows_keep_their_relative_digits(backend):
    gaps = torch.tensor([1.0, 20.0, 40.0, 80.0]) if slow(backend) else torch.arange(1.0, 81.0)
    z = torch.full((len(gaps), 2050), -INF)
    z[:, 2049], z[:, 7] = 3.0, 3.0 - gaps  # far apart: no vector and no tile holds both
    out = score(z, 2049, 4.0, 1.0)
    gap = gaps.double().numpy()
    truth = -np.log1p(np.exp(-gap))
    # the rounding of the exponent's argument, which grows with the gap, and a few operations
    for values, want in ((out.logp, truth), (out.logq, truth), (out.weight, 3 * truth)):
        error = np.abs(values.double().numpy() / want - 1)
        assert (error <= (gap + 4) * EPS).all(), error
    rest = np.exp(-gap)
    entropy = np.log1p(rest) + gap * rest / (1 + rest)
    assert (np.abs(out.entropy.double().numpy() / entropy - 1) <= (gap + 4) * EPS).all()


# ---------------------------------------------------------------------------------------------------------------
# Hostile rows


def hostile_rows(vocab: int) -> dict[str, torch.Tensor]:
    middle, last = vocab // 2, vocab - 1
    base = normal_logits(1, vocab, seed=vocab)[0]

    places = {"first": 0, "middle": middle, "last": last, "even": slice(0, None, 2)}

    def row(fill=None, **entries) -> torch.Tensor:
        z = base.clone() if fill is None else torch.full((vocab,), fill)
        for place, value in entries.items():
            z[places[place]] = value
        return z

    return {
        "sound": row(),
        "half -inf": row(even=-INF),
        "one finite token, first": row(-INF, first=-7.0),
        "one finite token, last": row(-INF, last=2.0),
        "all -inf": row(-INF),
        "NaN first": row(first=NAN),
        "NaN middle": row(middle=NAN),
        "NaN last": row(last=NAN),
        "all NaN": row(NAN),
        "NaN among -inf": row(-INF, last=NAN),
        "+inf first": row(first=INF),
        "+inf last": row(last=INF),
        "all +inf": row(INF),
        "+inf among -inf": row(-INF, middle=INF),
        "+inf and NaN": row(first=INF, last=NAN),
        "NaN and +inf": row(first=NAN, last=INF),
        "+inf and -inf": row(even=-INF, last=INF),
        "all tied": row(1.25),
        "tied at the maximum in every tile": row(even=50.0),
        "shifted up": row() + 1e4,
        "shifted down": row() - 1e4,
        "the range of float32": row(first=3e38, last=-3e38),
        "subnormal": row(1e-42),
        "dominant": row(middle=60.0),
    }


def expected_of_hostile(name: str, dtype, vocab: int) -> Status:
    if "NaN" in name:
        return Status.NAN
    if "+inf" in name or (dtype is torch.float16 and name == "the range of float32"):  # 3e38 is +inf there
        return Status.POS_INF
    return Status.NO_MASS if name == "all -inf" else Status.OK


@pytest.mark.parametrize(("vocab", "dtype"), [(2, torch.float32), (300, torch.float16), (4097, torch.float32)])
def test_hostile_rows_are_reported_and_spoil_no_neighbour(backend, vocab, dtype):
    names, rows = zip(*hostile_rows(vocab).items(), strict=True)
    z = strided(torch.stack(rows).to(dtype))
    words = counters(len(rows), 5)
    out = sample(z, 4.0, 2.5, words)
    want = [expected_of_hostile(name, dtype, vocab) for name in names]
    if vocab == 2:
        want[names.index("half -inf")] = Status.OK
    assert dict(zip(names, out.status.tolist(), strict=True)) == dict(zip(names, want, strict=True))
    assert_sample(z, 4.0, 2.5, words, None, out)
    scored = score(z, vocab - 1, 4.0, 2.5)
    assert_score(z, vocab - 1, 4.0, 2.5, scored)
    # the same with every bad row replaced by a sound one: the good rows must not have moved by a bit
    good = out.status == Status.OK
    clean = torch.where(good[:, None], z, torch.zeros((), dtype=dtype))
    again, rescored = sample(clean, 4.0, 2.5, words), score(clean, vocab - 1, 4.0, 2.5)
    for with_bad, without in ((out, again), (scored, rescored)):
        assert_same_bits([c[good] for c in with_bad], [c[good] for c in without])


def test_a_vocabulary_of_one_is_certain(backend):
    z = torch.tensor([[0.0], [-1e4], [5.0], [-INF], [NAN], [INF]])
    out = sample(z, 4.0, 2.5, exclude=[-1, -1, 0, 0, 0, 0])
    assert out.status.tolist() == [Status.OK] * 3 + [Status.NO_MASS, Status.NAN, Status.POS_INF]
    assert out.token.tolist() == [0, 0, 0, -1, -1, -1]
    for name in FLOATS:
        assert getattr(out, name)[:3].tolist() == [0.0] * 3, name


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7F800001, 0xFFC00000, 0xFFFFFFFF])
def test_a_nan_of_any_sign_and_payload_is_found_in_any_place(backend, payload):
    nan = torch.tensor(np.array([payload], np.uint32).view(np.int32)).view(torch.float32)
    for vocab, place in ((1, 0), (37, 36), (2100, 2099)):
        z = normal_logits(1, vocab)
        z[0, place] = nan
        assert sample(z, entropy=False).status.tolist() == [Status.NAN]


def test_an_excluded_token_is_left_out_of_the_draw_but_not_of_its_scores(backend):
    rows = few(backend, 300, 12)
    for vocab in (2, 300, 4097):
        z = normal_logits(rows, vocab, seed=7, scale=1.5)
        exclude = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(vocab))
        z[torch.arange(0, rows, 3), exclude[::3]] += 60.0  # dominant: it must not underflow the others
        z[torch.arange(1, rows, 3), exclude[1::3]] = -INF  # without mass: excludes nothing
        words = counters(rows, 8)
        out = sample(z, 4.0, 2.5, words, exclude)
        assert (out.token != exclude).all()
        assert_sample(z, 4.0, 2.5, words, exclude, out)
        assert_same_bits(score(z, out.token, 4.0, 2.5), [getattr(out, name) for name in (*FLOATS, "status")])
        if slow(backend):
            rows = 3
    plain = sample(z[1:2], 4.0, 2.5, words[1:2])
    assert_same_bits(plain, [column[1:2] for column in out])


@pytest.mark.parametrize("gap", [60.0, 1e3, 1e30])
def test_a_dominant_excluded_token_leaves_the_others_their_ratios(backend, gap):
    # Uniforms in the middle of each entry's own interval: the draw must find exactly that entry.
    z = torch.tensor([0.0, 1.0, gap, -1.0, 0.5, -INF])
    mass = np.exp(1.5 * np.array([0.0, 1.0, -INF, -1.0, 0.5, -INF]))
    cdf = np.cumsum(mass) / mass.sum()
    middle = (cdf - mass / mass.sum() / 2)[[0, 1, 3, 4]]
    out = sample(z.expand(4, 6), 4.0, 1.5, counter_of_uniform(middle), exclude=2)
    assert out.token.tolist() == [0, 1, 3, 4]


def test_an_excluded_token_with_all_the_mass_is_drawn_all_the_same(backend):
    z = torch.full((3, 2100), -INF)
    z[:, 2060] = -3.0
    z[1, 3] = -50.0  # here it is not alone
    out = sample(z, 4.0, 4.0, exclude=[2060, 2060, 3])
    assert out.token.tolist() == [2060, 3, 2060]
    assert out.status.tolist() == [Status.OK] * 3
    assert [out.logp[0].item(), out.weight[0].item(), out.entropy[0].item()] == [0.0] * 3


def test_exclusions_outside_the_vocabulary_are_bad_tokens_and_negative_ones_are_none(backend):
    z = normal_logits(1, 50).expand(6, 50)
    words = counters(1).expand(6, 4).contiguous()
    out = sample(z, counter=words, exclude=[50, 51, 2**31, 2**40 + 3, -1, -(2**40)])
    assert out.status.tolist() == [Status.BAD_TOKEN] * 4 + [Status.OK] * 2
    assert out.token[:4].tolist() == [-1] * 4
    plain = sample(z[:2], counter=words[:2])
    assert_same_bits([column[4:] for column in out], plain)


def test_scored_tokens_outside_the_vocabulary_are_reported_and_impossible_ones_have_minus_infinity(backend):
    z = normal_logits(1, 40).repeat(7, 1)
    z[:, 9] = -INF
    for alpha, beta in ((4.0, 4.0), (4.0, 1.5), (1.5, 4.0)):  # alpha - beta of each sign: no inf - inf, no +inf
        out = score(z, [40, -1, 2**32, -(2**32), 2**31, 9, 0], alpha, beta)
        assert out.status.tolist() == [Status.BAD_TOKEN] * 5 + [Status.OK] * 2
        assert [getattr(out, name)[5].item() for name in FLOATS[:3]] == [-INF] * 3
        assert_score(z, [40, -1, 2**32, -(2**32), 2**31, 9, 0], alpha, beta, out)


def test_nan_is_told_before_infinity_before_no_mass_before_a_bad_token(backend):
    z = torch.zeros(4, 3)
    z[0, 0], z[0, 1] = INF, NAN
    z[1, 0] = INF
    z[2] = -INF
    want = [Status.NAN, Status.POS_INF, Status.NO_MASS, Status.BAD_TOKEN]
    assert sample(z, exclude=3).status.tolist() == want
    assert score(z, 3).status.tolist() == want


UNSOUND = (NAN, INF, -INF, 0.0, -0.0, -1.0, -1e30)


def test_exponents_that_nobody_looked_at_are_reported_by_row(backend, monkeypatch):
    """On a device the wrappers do not look at values; here the kernels get what they would get there."""
    z = normal_logits(1, 300).repeat(2 * len(UNSOUND) + 3, 1)
    z[:, ::3] = -INF
    rows, last = z.shape[0], len(UNSOUND)
    alpha, beta = torch.full((rows,), 4.0), torch.full((rows,), 2.5)
    alpha[:last] = beta[last : 2 * last] = torch.tensor(UNSOUND)
    alpha[-2], beta[-1] = 3e38, 1e-40  # odd but sound
    words, exclude = counters(rows, 3), torch.arange(rows) - 1
    bad = torch.arange(rows) < 2 * last
    with pytest.raises(pk.ArgumentError):
        sample(z, alpha, beta, words)
    monkeypatch.setattr("power_kernels.ops.rows.check_exponents", lambda **exponents: None)
    drawn, scored = sample(z, alpha, beta, words, exclude), score(z, 1, alpha, beta)
    for out in (drawn, scored):
        assert out.status.tolist() == [Status.NAN if b else Status.OK for b in bad]
        for name in FLOATS:
            assert getattr(out, name)[bad].isnan().all(), name
            assert not getattr(out, name)[~bad].isnan().any(), name
    assert (drawn.token[bad] == -1).all()
    alpha[bad], beta[bad] = 4.0, 2.5
    for out, sound in ((drawn, sample(z, alpha, beta, words, exclude)), (scored, score(z, 1, alpha, beta))):
        assert_same_bits([c[~bad] for c in out], [c[~bad] for c in sound])
    # told like a NaN among the logits: before everything else
    z = torch.stack([torch.full((3,), INF), torch.full((3,), -INF), torch.zeros(3)])
    assert sample(z, 4.0, NAN, exclude=3).status.tolist() == [Status.NAN] * 3
    assert score(z, 3, 0.0, 4.0).status.tolist() == [Status.NAN] * 3


def test_uniforms_at_both_ends_draw_the_first_and_the_last_entry_with_mass(backend):
    z = normal_logits(1, 2100, scale=0.5)[0]  # every mass far above 2^-53 of the total
    z[:3] = z[2047:2051] = z[-2:] = -INF
    words = counter_of_uniform([0.0, 1 - 2.0**-53])
    for beta in (1.0, 2.5):
        assert sample(z.expand(2, 2100), beta, counter=words).token.tolist() == [3, 2097]
    assert sample(z.expand(2, 2100), 1.0, counter=words, exclude=[3, 2097]).token.tolist() == [4, 2096]


# ---------------------------------------------------------------------------------------------------------------
# Layout, batches, threads


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignment_change_no_bit(backend, dtype):
    rows, vocab = few(backend, 5, 2), 2049
    z = normal_logits(rows, vocab, dtype)
    plain = sample(z, 4.0, 2.5)
    tokens = plain.token
    for offset in (1, 3):  # never 16-byte aligned, whatever the row
        view = strided(z, pad=offset, offset=offset)
        assert not view.is_contiguous()
        assert_same_bits(sample(view, 4.0, 2.5), plain)
        assert_same_bits(score(view, tokens, 4.0, 2.5), score(z, tokens, 4.0, 2.5))
    overlapping = torch.as_strided(z.flatten(), (rows, vocab - 7), (5, 1), 2)  # rows that share entries
    assert_same_bits(sample(overlapping), sample(overlapping.contiguous()))
    column = z[:, 3:4]  # V = 1: its inner stride means nothing
    assert_same_bits(sample(column), sample(column.contiguous()))


@pytest.mark.parametrize("rows", [0, 1, 13])
def test_rows_that_are_one_row_expanded_give_what_copies_give(backend, rows):
    z = normal_logits(1, 257).expand(rows, 257)
    assert rows < 2 or z.stride(0) == 0
    assert_same_bits(sample(z), sample(z.contiguous()))


def test_a_batch_of_no_rows_gives_outputs_of_no_rows(backend):
    out = sample(torch.empty(0, 5), exclude=-1)
    assert [tuple(column.shape) for column in out] == [(0,)] * 6
    assert [tuple(column.shape) for column in score(torch.empty(0, 5), 0)] == [(0,)] * 5
    none = torch.empty(0, 4)
    out = pk.mh_accept(none, none, *(torch.empty(0, dtype=torch.int32),) * 2, torch.empty(0, dtype=torch.float64))
    assert [tuple(column.shape) for column in out] == [(0,)] * 3


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_row_alone_and_inside_a_batch_gives_the_same_bits(backend, dtype):
    rows, vocab = few(backend, 40, 5), 2100
    alpha, beta = (torch.tensor(v).repeat(5)[:rows] for v in zip(*EXPONENTS, strict=True))
    z, words = strided(normal_logits(rows, vocab, dtype)), counters(rows)
    exclude = torch.arange(rows) - 1
    whole = sample(z, alpha, beta, words, exclude)
    scored = score(z, whole.token, alpha, beta)
    for i in range(rows):
        one = slice(i, i + 1)
        alone = sample(z[one], alpha[one], beta[one], words[one], exclude[one])
        assert_same_bits(alone, [column[one] for column in whole])
        alone = score(z[one], whole.token[one], alpha[one], beta[one])
        assert_same_bits(alone, [column[one] for column in scored])


def test_the_entropy_is_an_extra_that_changes_no_other_bit(backend):
    z = normal_logits(3, 700)
    assert_same_bits(sample(z)._replace(entropy=None), sample(z, entropy=False))
    assert_same_bits(score(z, 5)._replace(entropy=None), score(z, 5, entropy=False))


@host_only
@pytest.mark.parametrize("shape", [(1, 151936), (33, 5000), (700, 64)])  # one row split, few rows, many rows
def test_the_number_of_threads_changes_no_bit(cpp, shape):
    z = normal_logits(*shape)
    weights, lengths = z[:, :64].contiguous(), per_row(50, shape[0], torch.int32)
    log_u = torch.zeros(shape[0], dtype=torch.float64)

    def everything():
        out = sample(z, 4.0, 2.5)
        accepted = pk.mh_accept(weights, weights.flip(0).contiguous(), lengths, lengths, log_u)
        return [*out, *score(z, out.token, 4.0, 2.5), *accepted]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(2)
        assert_same_bits(everything(), one)
    finally:
        torch.set_num_threads(before)


PAIRS = [("reference", "triton")] if ON_CUDA else [("cpp", "triton"), ("cpp", "reference")]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_backends_draw_the_same_token_unless_the_uniform_is_at_a_boundary(one, other):
    rows = few(other, 1500, 40)
    vocab = 300
    z = normal_logits(rows, vocab, scale=2.0, seed=17)
    words = counters(rows, 17)
    exclude = torch.randint(-1, vocab, (rows,), generator=torch.Generator().manual_seed(17))
    with serving(one):
        ours = sample(z, 4.0, 1.5, words, exclude, entropy=False).token
    with serving(other):
        theirs = sample(z, 4.0, 1.5, words, exclude, entropy=False).token
    uniform = uniforms_of(words)
    exact = z.double().numpy()
    for i in (ours != theirs).nonzero()[:, 0].tolist():
        for token in (ours, theirs):
            assert draw_error(exact[i], 1.5, uniform[i], int(exclude[i]), int(token[i])) < 1e-6
    # a uniform lies that close to one of 300 boundaries with probability 6e-4
    assert (ours != theirs).sum() <= max(1, 0.005 * rows)


# Rows 2^31 entries into their storage, on a file that holds two pages of data: a product of 32-bit integers wraps.


def test_logits_beyond_two_to_the_31_entries_are_found(backend, sparse):
    vocab, stride = 2100, 2**30 + 8  # the stride fits 32 bits, twice the stride does not
    z = normal_logits(3, vocab, torch.float16)
    far = torch.as_strided(sparse(2 * stride + vocab, torch.float16), (3, vocab), (stride, 1))
    far.copy_(z)
    exclude = [-1, 5, 7]
    assert_same_bits(sample(far, exclude=exclude), sample(z, exclude=exclude))
    tokens = [2099, 0, 2048]
    assert_same_bits(score(far, tokens), score(z, tokens))


def test_a_row_stride_of_more_than_32_bits_is_followed(backend, sparse):
    vocab, stride = 300, 2**31 + 3
    z = normal_logits(2, vocab, torch.bfloat16)
    far = torch.as_strided(sparse(stride + vocab, torch.bfloat16), (2, vocab), (stride, 1))
    far.copy_(z)
    assert_same_bits(sample(far, exclude=3), sample(z, exclude=3))


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_keys_and_values_beyond_two_to_the_31_entries_are_found(backend, sparse, dimension):
    shape = [3, 3, 3, 3, 5]
    far_stride = 2**30 + 16
    strides = [405, 135, 45, 15, 1]
    strides[dimension] = far_stride
    source = torch.randint(-128, 128, shape, dtype=torch.int8)
    far = torch.as_strided(sparse(2 * far_stride + 2000, torch.int8), shape, strides)
    ranges = torch.tensor([[2, 2, 1, 3], [0, 1, 0, 3]], dtype=torch.int32)
    want = torch.zeros(shape, dtype=torch.int8)
    want[:, 2, :, 1:3], want[:, 0] = source[:, 2, :, 1:3], source[:, 1]
    pk.kv_copy_ranges(far, source, ranges)
    assert torch.equal(far, want)
    back = torch.zeros(shape, dtype=torch.int8)
    pk.kv_copy_ranges(back, far, torch.tensor([[i, i, 0, 3] for i in range(3)], dtype=torch.int32))
    assert torch.equal(back, want)


# ---------------------------------------------------------------------------------------------------------------
# The law of the draw. Counters and seed are fixed; a p-value under 1e-5 fails.

REJECT = 1e-5


def chi_square(tokens, probability: np.ndarray) -> float:
    """p-value of the counts over every bin; bins expected under 5 times are pooled, impossible ones must be empty."""
    observed = np.bincount(np.asarray(tokens), minlength=len(probability))
    assert (observed[probability == 0] == 0).all(), "an impossible token was drawn"
    expected = probability * observed.sum()
    small = expected < 5
    observed = np.append(observed[~small], observed[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    keep = expected > 0
    return scipy_stats().chisquare(observed[keep], expected[keep] * (observed.sum() / expected.sum())).pvalue


def probabilities(z: torch.Tensor, beta: float, exclude: int = -1) -> np.ndarray:
    z = z.double().numpy().copy()
    if exclude >= 0:
        z[exclude] = -INF
    mass = np.exp(beta * (z - z.max()))
    return mass / mass.sum()


def serial_counters(rows: int) -> torch.Tensor:
    """Counters as a chain makes them: positions and serials count up."""
    i = torch.arange(rows, dtype=torch.int64)
    return torch.stack([i % 512, i // 512, i * 0 + 3, i * 0 + (9 << 3)], 1).to(torch.int32)


@pytest.mark.parametrize("excluded", ["nothing", "the head", "a tail token"])
@pytest.mark.parametrize(("shape", "scale"), [("flat", 0.1), ("peaked", 3.0)])
def test_draws_follow_q_over_every_bin(fast, shape, scale, excluded):
    rows, vocab, beta = 300_000, 1024, 1.5
    z = normal_logits(1, vocab, scale=scale, seed=31)[0]
    exclude = {"nothing": -1, "the head": int(z.argmax()), "a tail token": int(z.argmin())}[excluded]
    out = sample(z.expand(rows, vocab), 4.0, beta, serial_counters(rows), exclude, entropy=False)
    assert chi_square(out.token, probabilities(z, beta, exclude)) > REJECT


@host_only
def test_the_reference_follows_q_over_every_bin():
    rows, vocab = 15_000, 64
    z = normal_logits(1, vocab, scale=1.0, seed=32)[0]
    with serving("reference"):
        out = sample(z.expand(rows, vocab), 4.0, 1.5, serial_counters(rows), 3, entropy=False)
    assert chi_square(out.token, probabilities(z, 1.5, 3)) > REJECT


def test_stratified_uniforms_draw_each_equally_likely_token_once(backend):
    # Sharper than a chi-square of as many rows: every count is 1. 2100 entries, so that tiles matter.
    strata = few(backend, 700, 48)
    z = torch.full((1, 2100), -INF)
    places = torch.linspace(1, 2099, strata).long()
    z[0, places] = 2.0
    words = counter_of_uniform((np.arange(strata) + 0.5) / strata)
    out = sample(z.expand(strata, 2100), 4.0, counter=words, entropy=False)
    assert out.token.tolist() == places.tolist()


VAST, HEAD = 200_000, 123_456  # a head token 18 nats above 199,999 equal ones


def vast_row(dtype=torch.float32) -> torch.Tensor:
    z = torch.full((1, VAST), -18.0, dtype=dtype)
    z[0, HEAD] = 0.0
    return z


def test_a_tail_18_nats_below_the_head_keeps_its_mass(fast):
    # An fp32 prefix over the vocabulary absorbs each tail entry (1.5e-8 against 1). 100,000 draws expect 304 in the
    # tail: a lost tail lies 17 sigma away, 4.4 sigma (p = 1e-5) rejects.
    rows = 100_000
    tail = (VAST - 1) * math.exp(-18.0)
    out = sample(vast_row().expand(rows, VAST), 4.0, 1.0, serial_counters(rows), entropy=False)
    drawn = out.token[out.token != HEAD].numpy()
    assert scipy_stats().binomtest(len(drawn), rows, tail / (1 + tail)).pvalue > REJECT
    # and it is uniform over its places: 16 bins of some 19
    assert scipy_stats().chisquare(np.histogram(drawn, bins=16, range=(0, VAST))[0]).pvalue > REJECT
    assert len(np.unique(drawn)) > 0.99 * len(drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tail_18_nats_below_the_head_is_uniform_inside(fast, dtype):
    # Only uniforms of the tail's own share, where 24 bits resolve 50,000 values: 100 bins of 100 draws.
    rows = 10_000
    tail = (VAST - 1) * math.exp(-18.0)
    uniform = np.random.default_rng(33).random(rows)
    below = HEAD * math.exp(-18.0) / (1 + tail)
    share = tail / (1 + tail)
    place = uniform * share
    place = np.where(place < below, place, place + 1 / (1 + tail))
    out = sample(vast_row(dtype).expand(rows, VAST), 4.0, 1.0, counter_of_uniform(place), entropy=False)
    assert (out.token != HEAD).mean(dtype=torch.float64) > 0.999  # those within rounding of the head's boundaries
    drawn = out.token[out.token != HEAD].numpy()
    assert scipy_stats().chisquare(np.histogram(drawn, bins=100, range=(0, VAST))[0]).pvalue > REJECT
    # a draw is a monotone function of its uniform
    assert (np.diff(out.token.numpy()[np.argsort(place)]) >= 0).all()


def test_a_uniform_in_the_tail_draws_the_entry_that_float64_says(backend):
    # A float32 prefix over the tiles alone moves each boundary by some four entries behind the head (6e-8 / 1.5e-8).
    # What float32 masses allow is 2^-23 of the tail, far less than one entry.
    vocab, head, rows = 50257, 10_000, few(backend, 500, 10)
    mass = math.exp(-18.0)
    z = torch.full((1, vocab), -18.0)
    z[0, head] = 0.0
    total = 1.0 + (vocab - 1) * mass
    want = np.linspace(head + 1, vocab - 1, rows).astype(np.int64)
    uniform = (1.0 + (want - 1 + 0.5) * mass) / total  # the middle of each entry's own interval
    out = sample(z.expand(rows, vocab), 4.0, 1.0, counter_of_uniform(uniform), entropy=False)
    assert out.token.tolist() == want.tolist()


def test_the_tail_is_uniform_when_its_head_is_excluded(fast):
    rows = 10_000
    out = sample(vast_row().expand(rows, VAST), 4.0, 4.0, serial_counters(rows), HEAD, entropy=False)
    assert (out.token != HEAD).all()
    assert scipy_stats().chisquare(np.histogram(out.token.numpy(), bins=100, range=(0, VAST))[0]).pvalue > REJECT


# ---------------------------------------------------------------------------------------------------------------
# mh_accept


def running(weights) -> float:
    total = 0.0
    for weight in weights:
        total += float(weight)
    return total


def accept_row(cur, prop, n_cur, n_prop, log_u):
    """DESIGN 5.4 for one row, spelt out: (accept, log_ratio, status)."""
    if not (1 <= n_cur <= len(cur) and 1 <= n_prop <= len(prop)):
        return False, NAN, Status.BAD_LENGTH
    used = [*cur[:n_cur], *prop[:n_prop], log_u]
    if any(math.isnan(v) for v in used):
        return False, NAN, Status.NAN
    if any(v == INF for v in used):
        return False, NAN, Status.POS_INF
    f_cur = running(cur[:n_cur]) - math.log(n_cur)
    f_prop = running(prop[:n_prop]) - math.log(n_prop)
    if math.isnan(f_prop - f_cur):
        return False, NAN, Status.NAN
    return not f_prop < f_cur + log_u, f_prop - f_cur, Status.OK


def check_accept(cur, prop, n_cur, n_prop, log_u):
    n_cur, n_prop = (torch.as_tensor(n, dtype=torch.int32) for n in (n_cur, n_prop))
    log_u = torch.as_tensor(log_u, dtype=torch.float64)
    out = pk.mh_accept(cur, prop, n_cur, n_prop, log_u)
    columns = (cur.tolist(), prop.tolist(), n_cur.tolist(), n_prop.tolist(), log_u.tolist())
    want = [accept_row(*row) for row in zip(*columns, strict=True)]
    assert_accepted_as(out, *zip(*want, strict=True), log_u.tolist(), accept_tolerance(cur, prop))
    return out


def exactly(values: list[float]):
    """What a list must equal; on a GPU to what its logarithm of the lengths may err by."""
    return pytest.approx(values, rel=0, abs=1e-14) if ON_CUDA else values


@pytest.mark.parametrize("width", [1, 2, 7, 64, 257])  # one token; a vector; a remainder; more than one block
def test_acceptance_is_the_running_float64_sum_in_order_bit_for_bit(backend, width):
    rows = few(backend, 200, 8)
    generator = np.random.default_rng(width)
    scale = 10.0 ** generator.integers(-3, 6, (rows, width))  # so that the order of the sum shows
    cur, prop = (torch.from_numpy(-generator.random((rows, width)) * scale).float() for _ in range(2))
    n_cur, n_prop = generator.integers(1, width + 1, (2, rows))
    n_cur[0], n_prop[0] = width, 1
    # About the unused part nothing may be asked.
    for weights, lengths in ((cur, n_cur), (prop, n_prop)):
        for row, n in zip(weights, lengths, strict=True):
            row[n:] = NAN
    ratio = [accept_row(*row, 0.0)[1] for row in zip(cur.tolist(), prop.tolist(), n_cur, n_prop, strict=True)]
    log_u = np.array(ratio) + generator.permutation(np.arange(rows) % 3 - 1)  # a third below, at, and above the ratio
    out = check_accept(cur, prop, n_cur, n_prop, log_u)
    assert rows // 3 <= out.accept.sum() <= rows - rows // 3


def test_a_cancellation_that_only_the_order_of_the_sum_decides(backend):
    big = 2.0**60  # its neighbours in float64 are 256 away: 1 is absorbed by it and only by it
    rows = [
        [1.0, big, -big] + [0.0] * 13,  # in order 0, backwards 1
        [big, -big, 1.0] + [0.0] * 13,  # in order 1
        [big] + [1.0] * 14 + [-big],  # in order 0; in pairs, or by a compensated sum, up to 14
        [-0.25] * 16,
    ]
    prop = torch.tensor(rows)
    cur = torch.zeros_like(prop)
    assert [running(r) for r in rows] == [0.0, 1.0, 0.0, -4.0]
    out = check_accept(cur, prop, [16] * 4, [16] * 4, [-0.5, 0.5, 0.5, -3.0])
    assert out.log_ratio.tolist() == exactly([0.0, 1.0, 0.0, -4.0])
    assert out.accept.tolist() == [True, True, False, False]
    out = check_accept(prop, cur, [16] * 4, [16] * 4, [-0.5, -0.5, -0.5, -3.0])
    assert out.log_ratio.tolist() == exactly([0.0, -1.0, 0.0, 4.0])
    assert out.accept.tolist() == [True, False, True, True]


def test_acceptance_compares_the_proposal_with_current_plus_log_u_as_early_rejection_does(backend):
    # At 2^53 and more the two sides round differently: the ratio is -2 < log_u = -1.5, but F + log_u rounds to F - 2.
    far = 2.0**53 * 1.125
    cur, prop = torch.tensor([[far, 0.0]]), torch.tensor([[far, -2.0]])
    out = check_accept(cur, prop, [2], [2], [-1.5])
    assert out.log_ratio.tolist() == [-2.0]
    assert out.accept.tolist() == [True]


def test_acceptance_at_equality_and_one_ulp_beside_it(backend):
    cur, prop = torch.zeros(1, 1).expand(3, 1), torch.tensor([[-0.75]]).expand(3, 1)
    log_u = [-0.75, float(np.nextafter(-0.75, 0.0)), float(np.nextafter(-0.75, -1.0))]
    assert check_accept(cur, prop, [1] * 3, [1] * 3, log_u).accept.tolist() == [True, False, True]


def test_the_length_of_an_answer_enters_as_the_law_of_its_cut(backend):
    zeros = torch.zeros(2, 8)
    out = check_accept(zeros, zeros, [8, 2], [2, 8], [0.0, -1.0])
    # r = n / n': a shorter proposal is favoured
    rtol = 1e-14 if ON_CUDA else 1e-15  # two logarithms of an ulp each
    np.testing.assert_allclose(out.log_ratio.numpy(), [math.log(4), -math.log(4)], rtol=rtol)
    assert out.accept.tolist() == [True, False]


def test_bad_lengths_weights_and_uniforms_are_reported_and_not_accepted(backend):
    width = 4
    lowest = -(2**31)
    rows = [  # (current weights, proposed weights, lengths, log_u, status, accept)
        ([-1.0] * 4, [-1.0] * 4, (4, 4), -0.1, Status.OK, True),
        ([-1.0] * 4, [-1.0] * 4, (0, 4), -0.1, Status.BAD_LENGTH, False),
        ([-1.0] * 4, [-1.0] * 4, (4, 0), -0.1, Status.BAD_LENGTH, False),
        ([-1.0] * 4, [-1.0] * 4, (5, 4), -0.1, Status.BAD_LENGTH, False),
        ([-1.0] * 4, [-1.0] * 4, (4, 5), -0.1, Status.BAD_LENGTH, False),
        ([-1.0] * 4, [-1.0] * 4, (lowest, 2**31 - 1), -0.1, Status.BAD_LENGTH, False),
        ([NAN] * 4, [-1.0] * 4, (4, -1), NAN, Status.BAD_LENGTH, False),
        ([-1.0, NAN, -1.0, -1.0], [-1.0] * 4, (2, 1), -0.1, Status.NAN, False),
        ([-1.0, NAN, -1.0, -1.0], [-1.0] * 4, (1, 1), -0.1, Status.OK, True),
        ([-1.0] * 4, [-1.0, -1.0, -1.0, NAN], (1, 4), -0.1, Status.NAN, False),
        ([-1.0] * 4, [-1.0] * 4, (4, 4), NAN, Status.NAN, False),
        ([INF, -1.0, -1.0, -1.0], [-1.0] * 4, (4, 4), -0.1, Status.POS_INF, False),
        ([-1.0] * 4, [-1.0, INF, -1.0, -1.0], (4, 4), -0.1, Status.POS_INF, False),
        ([-1.0] * 4, [-1.0] * 4, (4, 4), INF, Status.POS_INF, False),
        ([INF] * 4, [NAN] * 4, (4, 4), INF, Status.NAN, False),
        ([INF, -INF, -1.0, -1.0], [-1.0] * 4, (4, 4), -0.1, Status.POS_INF, False),
        ([-1.0] * 4, [-1.0, -INF, -1.0, -1.0], (4, 4), -0.1, Status.OK, False),
        ([-INF, -1.0, -1.0, -1.0], [-1.0] * 4, (4, 4), -0.1, Status.OK, True),
        ([-INF] * 4, [-INF] * 4, (4, 4), -0.1, Status.NAN, False),
        ([-1.0] * 4, [-900.0] * 4, (4, 4), -INF, Status.OK, True),
        ([-1.0] * 4, [-1.0] * 4, (4, 4), 0.0, Status.OK, True),
        ([-1.0] * 4, [-1.0, -1.0, -1.0, -1.001], (4, 4), 0.0, Status.OK, False),
    ]
    cur, prop = (torch.tensor([r[i] for r in rows]) for i in (0, 1))
    assert cur.shape == (len(rows), width)
    lengths = [r[2] for r in rows]
    out = check_accept(cur, prop, [n for n, _ in lengths], [n for _, n in lengths], [r[3] for r in rows])
    assert out.status.tolist() == [r[4] for r in rows]
    assert out.accept.tolist() == [r[5] for r in rows]


def test_weights_of_different_widths_and_strides_are_summed_alike(backend):
    wide = strided(normal_logits(5, 9) - 9.0)
    expanded = (normal_logits(1, 3, seed=2) - 9.0).expand(5, 3)
    check_accept(wide, expanded, [9, 1, 5, 10, 2], [1, 3, 2, 3, 4], [-0.5] * 5)
    check_accept(expanded, wide, [1, 3, 2, 3, 4], [9, 1, 5, 10, 2], [-0.5] * 5)
    nothing = torch.empty(2, 0)
    assert check_accept(nothing, wide[:2], [0, 1], [1, 1], [0.0, 0.0]).status.tolist() == [Status.BAD_LENGTH] * 2


# ---------------------------------------------------------------------------------------------------------------
# kv_copy_ranges

# every size of an element; float8 only moves as bytes; a NaN payload does not survive a conversion
KV_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn, torch.float64]
LAYOUTS = ["contiguous", "heads inside", "rows outside", "odd offset"]


def random_slab(shape, dtype: torch.dtype, layout: str, seed: int) -> torch.Tensor:
    """Random bytes (NaN payloads among them) as a slab [G, rows, heads, positions, D] of the given layout."""
    groups, rows, heads, positions, dim = shape
    stored, order = {
        "contiguous": ((groups, rows, heads, positions, dim), (0, 1, 2, 3, 4)),
        "heads inside": ((groups, rows, positions, heads, dim), (0, 1, 3, 2, 4)),  # as a projection leaves them
        "rows outside": ((rows, groups, heads, positions, dim), (1, 0, 2, 3, 4)),
        "odd offset": ((groups, rows, heads, positions + 1, dim + 1), (0, 1, 2, 3, 4)),
    }[layout]
    size = math.prod(stored) * dtype.itemsize
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    slab = raw.view(dtype).view(stored).permute(order)
    if layout == "odd offset":
        slab = slab[:, :, :, 1:, 1:]
    assert tuple(slab.shape) == tuple(shape)
    return slab


def raw_bytes(slab: torch.Tensor) -> np.ndarray:
    return slab.contiguous().view(torch.uint8).numpy().copy()


def ragged_ranges(count: int, dst_rows: int, src_rows: int, positions: int, seed: int) -> list[list[int]]:
    """Random ranges, at most one a destination row; the first is empty, the second whole."""
    generator = np.random.default_rng(seed)
    ranges = []
    for row in generator.permutation(dst_rows)[:count].tolist():
        start, stop = generator.integers(0, positions + 1, 2).tolist()
        ranges.append([row, int(generator.integers(src_rows)), start, stop])  # stop < start is empty
    ranges[0][2:] = [3, 3]
    if count > 1:
        ranges[1][2:] = [0, positions]
    return ranges


def check_copy(dst: torch.Tensor, src: torch.Tensor, ranges: list[list[int]]) -> None:
    want, source = raw_bytes(dst), raw_bytes(src)
    for dst_row, src_row, start, stop in ranges:
        if start < stop:
            want[:, dst_row, :, start:stop] = source[:, src_row, :, start:stop]
    assert pk.kv_copy_ranges(dst, src, torch.tensor(ranges, dtype=torch.int32).reshape(-1, 4)) is None
    np.testing.assert_array_equal(raw_bytes(dst), want)
    np.testing.assert_array_equal(raw_bytes(src), source)


# 1: one element; 3 and 33: no alignment; 40: 16 bytes only in wide dtypes; 128: whole 16-byte accesses
@pytest.mark.parametrize("dim", [1, 3, 33, 40, 128])
@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_ragged_ranges_copy_exactly_their_bytes(backend, dtype, dim):
    small = slow(backend)
    shape = (2, 4, 2, 9, dim) if small else (4, 7, 3, 37, dim)
    other = (2, 3, 2, 12, dim) if small else (4, 5, 3, 41, dim)  # S != S', R != R'
    dst, src = random_slab(shape, dtype, "contiguous", 1), random_slab(other, dtype, "contiguous", 2)
    check_copy(dst, src, ragged_ranges(3 if small else 6, shape[1], other[1], shape[3], dim))
    check_copy(src, dst, ragged_ranges(3 if small else 5, other[1], shape[1], shape[3], dim + 1))


@pytest.mark.parametrize("dst_layout", LAYOUTS)
@pytest.mark.parametrize("src_layout", LAYOUTS)
def test_slabs_of_any_layout_are_copied_by_their_strides(backend, dst_layout, src_layout):
    for dtype, dim in ((torch.bfloat16, 8), (torch.float32, 5)):
        dst = random_slab((2, 3, 2, 7, dim), dtype, dst_layout, 3)
        src = random_slab((2, 4, 2, 6, dim), dtype, src_layout, 4)
        check_copy(dst, src, ragged_ranges(3, 3, 4, 6, dim))


def test_ranges_that_are_empty_or_absent_copy_nothing_whatever_their_rows(backend):
    dst, src = (random_slab((2, 3, 2, 5, 4), torch.float32, "contiguous", seed) for seed in (5, 6))
    check_copy(dst, src, [])
    check_copy(dst, src, [[-5, 99, 4, 4], [0, 0, 5, 2], [9, 9, 2**31 - 1, -(2**31)], [0, 0, 0, 0]])
    for shape in ((0, 3, 2, 5, 4), (2, 3, 0, 5, 4), (2, 3, 2, 5, 0)):
        check_copy(torch.zeros(shape), torch.ones(shape), [[1, 2, 0, 5]])


def test_one_destination_row_may_take_disjoint_ranges_of_several_sources(backend):
    dst, src = (random_slab((2, 3, 2, 9, 4), torch.float16, "contiguous", seed) for seed in (7, 8))
    check_copy(dst, src, [[1, 0, 0, 3], [1, 2, 3, 7], [1, 1, 8, 9], [2, 1, 0, 9]])


def test_a_source_may_be_expanded(backend):
    dst = random_slab((2, 3, 2, 5, 4), torch.float32, "contiguous", 9)
    src = random_slab((1, 2, 1, 5, 4), torch.float32, "contiguous", 10).expand(2, 2, 2, 5, 4)
    check_copy(dst, src, [[0, 1, 0, 5], [2, 0, 1, 4]])


def test_bits_that_a_conversion_would_change_survive(backend):
    patterns = [0x7F800001, 0x7FC12345, 0xFFFFFFFF, 0x80000000, 0x00000001, 0x7F800000]  # NaNs, -0, subnormal, inf
    row = torch.tensor(np.array(patterns, np.uint32).view(np.int32)).view(torch.float32)
    src = row.expand(2, 1, 1, 4, 6).contiguous()
    dst = torch.zeros(2, 1, 1, 4, 6)
    pk.kv_copy_ranges(dst, src, torch.tensor([[0, 0, 0, 4]], dtype=torch.int32))
    assert torch.equal(bits(dst), bits(src))


@host_only
def test_the_number_of_threads_changes_no_copy(cpp):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        dst = random_slab((4, 9, 4, 300, 64), torch.float32, "contiguous", 11)
        src = random_slab((4, 9, 4, 300, 64), torch.float32, "contiguous", 12)
        check_copy(dst, src, ragged_ranges(8, 9, 9, 300, 13))
    finally:
        torch.set_num_threads(before)


def test_the_quantities_of_every_token_of_a_row_sum_to_one(backend):
    vocab = 40
    z = normal_logits(1, vocab, seed=41)
    tokens = torch.arange(few(backend, vocab, vocab))
    rows = z.expand(vocab, vocab)
    out = score(rows, tokens, 4.0, 2.5)
    assert float(out.logp.double().exp().sum()) == pytest.approx(1.0, abs=vocab * EPS)
    assert float(out.logq.double().exp().sum()) == pytest.approx(1.0, abs=2.5 * vocab * EPS)
    assert_quantities(rows, tokens, 4.0, 2.5, out)
