"""The C++ backend, called directly, against float64 (DESIGN sections 2, 4, 5.1, 5.2, 5.6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels import reference, rng
from power_kernels.state import Status

OPS = torch.ops.power_kernels
HAVE_CPP = torch._C._dispatch_has_kernel_for_dispatch_key("power_kernels::sample_tokens_out", "CPU")
pytestmark = [
    pytest.mark.skipif(not HAVE_CPP, reason="the C++ extension is not built"),
    pytest.mark.usefixtures("one_thread"),
]

INF = float("inf")
NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# 255..257: around one 256-wide tile; 999, 4097: a tail of a tile; 2048, 2049: one tile, and one entry more;
# 151936: the vocabulary of Qwen
VOCABULARIES = [1, 2, 3, 255, 256, 257, 999, 1024, 2048, 2049, 4097, 151936]
# integer powers, one exponential, two exponentials, exponents below 1
EXPONENTS = [(4.0, 4.0), (4.0, 1.0), (8.0, 7.0), (2.5, 1.7), (1.0, 1.0), (0.5, 0.5), (1.0, 3.0), (12.0, 12.0)]


def vector(values, rows: int, dtype) -> torch.Tensor:
    return torch.as_tensor(values, dtype=dtype).expand(rows).contiguous()


def sample(logits, alpha, beta, counter, seed=0, exclude=None, entropy=False) -> pk.SampleOutput:
    """The raw kernel with poisoned outputs and a workspace of exactly the promised size."""
    rows, vocab = logits.shape
    size = pk.workspace_size(rows, vocab)
    guarded = torch.full((size + 64,), NAN)
    guarded[size:] = 1234.5
    token = torch.full((rows,), -77)
    floats = [torch.full((rows,), NAN) for _ in range(4)]
    status = torch.full((rows,), -77, dtype=torch.int32)
    OPS.sample_tokens_out(
        logits,
        vector(alpha, rows, torch.float32),
        vector(beta, rows, torch.float32),
        torch.tensor([seed]),
        torch.as_tensor(np.asarray(counter, np.uint32).view(np.int32).reshape(rows, 4)),
        None if exclude is None else vector(exclude, rows, torch.int64),
        guarded[:size],
        token,
        *floats[:3],
        floats[3] if entropy else None,
        status,
    )
    assert (guarded[size:] == 1234.5).all()
    return pk.SampleOutput(token, *floats, status)


def score(logits, tokens, alpha, beta, entropy=False) -> pk.ScoreOutput:
    rows, vocab = logits.shape
    floats = [torch.full((rows,), NAN) for _ in range(4)]
    status = torch.full((rows,), -77, dtype=torch.int32)
    OPS.score_tokens_out(
        logits,
        vector(tokens, rows, torch.int64),
        vector(alpha, rows, torch.float32),
        vector(beta, rows, torch.float32),
        torch.full((pk.workspace_size(rows, vocab),), NAN),
        *floats[:3],
        floats[3] if entropy else None,
        status,
    )
    return pk.ScoreOutput(*floats, status)


def counter_for(u: float, seed: int) -> np.ndarray:
    """The Philox counter whose first uniform is u (Philox is a bijection for a given key)."""
    bits = int(u * 2**53)
    words = [(bits >> 26) << 5, (bits & (2**26 - 1)) << 6, 0, 0]
    mask = 0xFFFFFFFF
    k0, k1 = seed & mask, seed >> 32 & mask
    keys = [((k0 + i * 0x9E3779B9) & mask, (k1 + i * 0xBB67AE85) & mask) for i in range(10)]
    m0, m1 = 0xD2511F53, 0xCD9E8D57
    for key_0, key_1 in reversed(keys):
        y0, y1, y2, y3 = words
        c2, c0 = y1 * pow(m1, -1, 2**32) & mask, y3 * pow(m0, -1, 2**32) & mask
        words = [c0, (c2 * m1 >> 32) ^ y0 ^ key_0, c2, (c0 * m0 >> 32) ^ y2 ^ key_1]
    counter = np.array(words, np.uint32)
    assert rng.uniforms(counter, seed)[0] == bits * 2.0**-53
    return counter


def assert_draw(z: np.ndarray, beta: float, u: float, exclude: int, token: int) -> None:
    """`token` is the reference's, or u lies within 1e-6 of the boundary between the two."""
    want = reference.draw_token(z, beta, u, exclude)
    if token == want:
        return
    z = z.copy()
    if exclude >= 0:
        z[exclude] = -INF
    mass = np.exp(beta * (z - z.max()))
    cdf = np.cumsum(mass) / mass.sum()
    low, high = sorted((token, want))
    assert mass[token] > 0
    assert cdf[high - 1] - cdf[low] < 1e-6, "more than rounding lies between the two tokens"
    assert min(abs(u - cdf[low]), abs(u - cdf[high - 1])) < 1e-6


def normal_rows(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


def counters(rows: int) -> np.ndarray:
    return rng.counters(np.arange(rows) % 7, np.arange(rows), 3, 11, rng.STREAM_POSITION)


# ----------------------------------------------------------------------------------------------------
# Quantities


@pytest.mark.parametrize("shift", [0.0, 1e4])  # max and LSE - max are kept apart: a shift costs no digits
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_quantities_are_as_accurate_as_torch_in_float32(vocab, dtype, shift):
    rows = len(EXPONENTS) if vocab > 5000 else 8 * len(EXPONENTS)
    z = (normal_rows(rows, vocab) + shift).to(dtype)
    alpha, beta = (torch.tensor(v).repeat(rows // len(EXPONENTS)) for v in zip(*EXPONENTS, strict=True))
    out = sample(z, alpha, beta, counters(rows), entropy=True)
    again = score(z, out.token, alpha, beta, entropy=True)
    assert (out.status == Status.OK).all()

    exact = z.double().numpy()
    uniform = rng.uniforms(counters(rows), 0)[..., 0]
    for i in range(rows):
        assert_draw(exact[i], float(beta[i]), uniform[i], -1, int(out.token[i]))
    want = [
        reference.token_quantities(exact[i], int(out.token[i]), float(alpha[i]), float(beta[i])) for i in range(rows)
    ]
    wide, pick = z.float(), out.token[:, None]
    naive = {
        "logp": wide.log_softmax(-1).gather(1, pick)[:, 0],
        "logq": (beta[:, None] * wide).log_softmax(-1).gather(1, pick)[:, 0],
    }
    naive["weight"] = alpha * naive["logp"] - naive["logq"]
    naive["entropy"] = torch.special.entr(wide.softmax(-1)).sum(-1)
    for name, torchs in naive.items():
        truth = (
            np.array([reference.entropy(row) for row in exact])
            if name == "entropy"
            else np.array([getattr(w, name) for w in want])
        )
        ours = getattr(out, name).double().numpy()
        error, theirs = np.abs(ours - truth).max(), np.abs(torchs.double().numpy() - truth).max()
        # tol: the rounding of a float32 result and of sums of a relative error of a few 1e-7, times beta
        assert error <= theirs + 1e-7 * np.abs(truth).max() + 4e-7 * float(beta.max()), name
        assert torch.equal(getattr(again, name), getattr(out, name)), name


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_nearly_deterministic_rows_keep_their_digits(shift):
    gap = torch.arange(1.0, 81.0)
    z = torch.stack([torch.zeros_like(gap), -gap], 1) + shift
    out = score(z, 0, 4.0, 1.0)
    truth = -np.log1p(np.exp(-gap.double().numpy()))
    np.testing.assert_allclose(out.logp.double().numpy(), truth, rtol=3e-7)
    wide = torch.full((len(gap), 5000), -INF)  # the two far apart, in different tiles
    wide[:, 4999], wide[:, 3] = z[:, 0], z[:, 1]
    np.testing.assert_allclose(score(wide, 4999, 4.0, 1.0).logp.double().numpy(), truth, rtol=3e-7)


def test_exponential_is_within_two_ulp_over_its_range():
    x = -torch.cat([torch.linspace(1e-3, 87.0, 40_000), torch.logspace(-6, 0, 20_000)])
    z = torch.stack([torch.zeros_like(x), x], 1)
    out = score(z, 0, 0.5, 0.5)  # logp = -log1p(exp(x)), logq = -log1p(exp(x/2))
    for ours, factor in ((out.logp, 1.0), (out.logq, 0.5)):
        e = np.exp(factor * x.double().numpy())
        seen = np.expm1(-ours.double().numpy())
        # 2 ulp of the exponential and the rounding of the result
        assert np.abs(seen / e - 1).max() < 3 * 2.0**-23


def test_ties_of_the_maximum_leave_out_one_of_them():
    for vocab in (2, 17, 4097):
        out = score(torch.full((1, vocab), 3.0), 0, 2.0, 2.0)
        assert out.logp.item() == pytest.approx(-np.log(vocab), rel=1e-6)
        assert out.weight.item() == pytest.approx(-np.log(vocab), rel=1e-6)


def test_weight_is_never_positive_where_early_rejection_relies_on_it():
    z = normal_rows(400, 257, scale=8.0)
    z[:200, 5] += 40  # nearly deterministic: the exact value is within rounding of 0
    for alpha, beta in ((4.0, 4.0), (4.0, 1.0), (1.7, 1.3), (1.0, 1.0)):
        assert (sample(z, alpha, beta, counters(400)).weight <= 0).all()


def test_logits_that_span_the_whole_range_of_float32():
    z = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -INF], [1e-42, 0.0, -1e-42]])
    out = score(z, 0, 4.0, 4.0, entropy=True)
    np.testing.assert_allclose(out.logp.numpy(), [0.0, -np.log(2), -np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(out.entropy.numpy(), [0.0, np.log(2), np.log(3)], rtol=1e-6)


def test_every_float16_and_bfloat16_value_is_read_as_torch_reads_it():
    for dtype in (torch.float16, torch.bfloat16):
        z = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        z = z[torch.isfinite(z)]
        rows = torch.stack([z, torch.zeros_like(z)], 1)
        wide = rows.float()
        wide[wide.abs() < 2.0**-126] = 0.0  # far below what a logit can resolve
        assert torch.equal(score(rows, 0, 1.0, 1.0).logp, score(wide, 0, 1.0, 1.0).logp)


# ----------------------------------------------------------------------------------------------------
# Draws


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -1, -(2**40) + 12345])
def test_the_uniform_is_the_contracts(seed):
    # 2^15 equal entries: the token is the uniform's first 15 bits. Large words try the counter's sign bits.
    position, serial, chain = [0, 1, 2**31, 2**32 - 1, 77], [0, 2**32 - 1, 5, 6, 7], [0, 1, 2, 2**31, 4]
    words = rng.counters(position, serial, chain, 2**29 - 1, rng.STREAM_STEP)
    out = sample(torch.zeros(5, 2**15), 1.0, 1.0, words, seed=seed)
    np.testing.assert_array_equal(out.token.numpy(), np.floor(rng.uniforms(words, seed)[:, 0] * 2**15))


@pytest.mark.parametrize("beta", [1.0, 4.0, 2.7])
@pytest.mark.parametrize("vocab", [1, 2, 3, 257, 999, 4097])
def test_draws_match_the_reference_with_and_without_exclusion(vocab, beta):
    rows = 400
    z = normal_rows(rows, vocab, seed=vocab, scale=1.5)
    z[::5, : vocab // 2] = -INF
    z[1::7, vocab // 3] += 60  # a dominant entry, which exclusion must not let underflow the others
    exclude = torch.randint(-1, vocab, (rows,), generator=torch.Generator().manual_seed(1))
    exclude[1::7] = vocab // 3
    plain = sample(z, beta, beta, counters(rows))
    holed = sample(z, beta, beta, counters(rows), exclude=exclude)
    uniform = rng.uniforms(counters(rows), 0)[..., 0]
    exact = z.double().numpy()
    for i in range(rows):
        assert_draw(exact[i], beta, uniform[i], -1, int(plain.token[i]))
        assert_draw(exact[i], beta, uniform[i], int(exclude[i]), int(holed.token[i]))
    rescored = score(z, holed.token, beta, beta)  # the scores of an excluded draw are those of the full row
    for name in ("logp", "logq", "weight"):
        assert torch.equal(getattr(rescored, name), getattr(holed, name))


@pytest.mark.parametrize("beta", [1.0, 4.0, 3.3])
@pytest.mark.parametrize("vocab", [2, 257, 4097])
def test_uniforms_at_the_ends_draw_the_first_and_last_entry_with_mass(vocab, beta):
    z = normal_rows(1, vocab)
    if vocab > 2:
        z[0, 0] = z[0, 1] = z[0, -1] = z[0, -2] = -INF
    finite = torch.isfinite(z[0]).nonzero()[:, 0]
    out = sample(z, beta, beta, counter_for(0.0, seed=9), seed=9)
    assert out.token.item() == finite[0].item()
    if vocab > 2:
        out = sample(z, beta, beta, counter_for(0.0, seed=9), seed=9, exclude=int(finite[0]))
        assert out.token.item() == finite[1].item()
    z[0, finite[-1]] = z.max()  # its share is then above the 2^-53 that the largest uniform leaves
    out = sample(z, beta, beta, counter_for(1 - 2.0**-53, seed=9), seed=9)
    assert out.token.item() == finite[-1].item()


@pytest.mark.parametrize("gap", [60.0, 300.0, 1e30])
def test_a_dominant_excluded_token_leaves_the_law_of_the_others(gap):
    rows, vocab = 20_000, 5
    z = torch.tensor([0.0, 1.0, gap, -1.0, 0.5]).expand(rows, vocab)  # row stride 0
    out = sample(z, 2.0, 2.0, counters(rows), exclude=2)
    mass = np.exp(2 * np.array([0.0, 1.0, -INF, -1.0, 0.5]))
    observed = np.bincount(out.token.numpy(), minlength=vocab)
    assert observed[2] == 0
    keep = [0, 1, 3, 4]
    expected = rows * mass[keep] / mass.sum()
    chi_square = ((observed[keep] - expected) ** 2 / expected).sum()
    assert chi_square < 25.9  # p = 1e-5 at 3 degrees of freedom; the counters are fixed


def test_exclusion_corner_cases():
    z = torch.tensor([[-INF, 2.0, -INF], [0.0, 1.0, -INF], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    out = sample(z, 4.0, 4.0, counters(4), exclude=[1, 2, 3, -1])
    assert out.token[0] == 1  # nothing else has mass: it is returned
    assert out.logp[0] == 0
    assert out.status[0] == Status.OK
    plain = sample(z, 4.0, 4.0, counters(4))
    assert out.token[1] == plain.token[1]  # excluding a -inf entry excludes nothing
    assert out.status[2] == Status.BAD_TOKEN
    assert out.token[2] == -1
    assert out.status[3] == Status.OK


def test_a_tail_far_below_one_token_keeps_its_width():
    # 151,935 entries 18 nats below one: fp32 scans and 24-bit uniforms give most of them zero width.
    vocab, rows = 151_936, 64
    z = torch.full((1, vocab), -18.0)
    z[0, 70_000] = 0.0
    tail = (vocab - 1) * np.exp(-18.0)
    low = 70_000 * np.exp(-18.0) / (1 + tail)
    fractions = (np.arange(rows) + 0.5) / rows * low
    words = np.concatenate([counter_for(u, seed=4) for u in fractions])
    out = sample(z.expand(rows, vocab), 1.0, 1.0, words, seed=4)
    np.testing.assert_allclose(out.token.numpy(), (np.arange(rows) + 0.5) / rows * 70_000, rtol=2e-3, atol=2)


# ----------------------------------------------------------------------------------------------------
# Bad rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_bad_rows_are_reported_and_do_not_touch_their_neighbours(vocab, dtype):
    clean = normal_rows(12, vocab).to(dtype)
    z = clean.clone()
    ends = (0, vocab // 2, vocab - 1)
    for row, at in enumerate(ends):
        z[row, at] = NAN
        z[3 + row, at] = INF
    z[6] = NAN
    z[7] = -INF
    z[8] = INF
    z[9, 0], z[9, -1] = INF, NAN  # with V = 1 only the NaN
    z[10] = -INF
    z[10, vocab - 1] = NAN
    out = sample(z, 4.0, 4.0, counters(12), entropy=True)
    want = [Status.NAN] * 3 + [Status.POS_INF] * 3
    want += [Status.NAN, Status.NO_MASS, Status.POS_INF, Status.NAN, Status.NAN]
    assert out.status.tolist() == [*want, Status.OK]
    assert (out.token[:11] == -1).all()
    for name in ("logp", "logq", "weight", "entropy"):
        assert getattr(out, name)[:11].isnan().all(), name
    untouched = sample(clean, 4.0, 4.0, counters(12), entropy=True)
    for ours, theirs in zip(out, untouched, strict=True):
        assert torch.equal(ours[11:], theirs[11:])
    scored = score(z, 0, 4.0, 4.0, entropy=True)
    assert scored.status.tolist() == [*want, Status.OK]
    assert scored.logp[:11].isnan().all()


def test_a_nan_of_any_payload_is_found():
    patterns = [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFC00000, 0xFFFFFFFF, 0xFF800001, 0x7FC00001]
    bits = torch.tensor(np.array(patterns, np.uint32).view(np.int32))
    for vocab in (1, 40, 2500):
        for beta in (4.0, 2.2):
            z = normal_rows(len(patterns), vocab)
            z[:, vocab - 1] = bits.view(torch.float32)
            assert (sample(z, beta, beta, counters(len(patterns))).status == Status.NAN).all()


def test_scored_tokens_outside_the_vocabulary_and_without_mass():
    z = torch.tensor([[0.0, -INF, 1.0]]).expand(4, 3)
    out = score(z, [-1, 3, 1, 2], 4.0, 4.0)
    assert out.status.tolist() == [Status.BAD_TOKEN, Status.BAD_TOKEN, Status.OK, Status.OK]
    assert out.logp[:2].isnan().all()
    assert out.logp[2] == out.logq[2] == out.weight[2] == -INF


@pytest.mark.parametrize("beta", [3e38, 1e-38, 1e-40, 1e-45])
def test_sound_exponents_at_the_ends_of_float32_draw_and_score(beta):
    # A subnormal one would be 0 in the mass kernels, which flush subnormals, and 0 * -inf NaN.
    z = normal_rows(50, 3000)
    z[:, ::3] = -INF
    for exclude in (None, 7):
        out = sample(z, 4.0, beta, counters(50), exclude=exclude)
        assert (out.status == Status.OK).all()
        assert z[torch.arange(50), out.token].isfinite().all()
        assert len(out.token.unique()) > 20
        assert out.weight.isfinite().all()


# ----------------------------------------------------------------------------------------------------
# Layout, batches, threads


def assert_same_bits(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.nan_to_num(nan=-99.0), b.nan_to_num(nan=-99.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [3, 257, 4097, 151936])
def test_a_row_alone_in_a_batch_or_strided_gives_the_same_bits(vocab, dtype):
    rows = 5
    z = normal_rows(rows, vocab).to(dtype)
    words = counters(rows)
    beta = torch.tensor([4.0, 2.2, 1.0, 4.0, 0.7])
    whole = sample(z, beta, beta, words, entropy=True)
    for i in range(rows):
        alone = sample(z[i : i + 1], beta[i : i + 1], beta[i : i + 1], words[i], entropy=True)
        assert_same_bits(alone, [column[i : i + 1] for column in whole])
    # an odd row stride and a start one element off any alignment
    padded = torch.full((rows * (vocab + 3) + 1,), NAN, dtype=dtype)[1:].view(rows, vocab + 3)
    padded[:, 1 : vocab + 1] = z
    view = padded[:, 1 : vocab + 1]
    assert_same_bits(sample(view, beta, beta, words, entropy=True), whole)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_number_of_threads_changes_no_bit(rows):
    z = normal_rows(rows, 151_936)
    one = sample(z, 4.0, 2.5, counters(rows), entropy=True)
    torch.set_num_threads(2)
    assert_same_bits(sample(z, 4.0, 2.5, counters(rows), entropy=True), one)


def test_an_empty_batch_is_no_error():
    assert sample(torch.zeros(0, 5), 1.0, 1.0, np.zeros((0, 4))).token.shape == (0,)
    assert score(torch.zeros(0, 5), 0, 1.0, 1.0).logp.shape == (0,)


# ----------------------------------------------------------------------------------------------------
# kv_copy_ranges


def slabs(dtype, head_dim: int, strided: bool):
    generator = torch.Generator().manual_seed(3)

    def slab(rows: int, positions: int) -> torch.Tensor:
        middle = (positions, 3) if strided else (3, positions)
        shape = (4, rows, *middle, head_dim)
        slab = torch.randint(0, 100, shape, generator=generator).to(dtype)
        return slab.transpose(2, 3) if strided else slab

    return slab(5, 40), slab(7, 33)


RANGES = [(0, 6, 0, 33), (4, 0, 5, 6), (2, 2, 9, 9), (3, 1, 31, 20), (1, 3, 10, 33), (-5, 99, 4, 4)]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("head_dim", [1, 3, 16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64])
def test_kv_ranges_copy_what_slicing_copies(dtype, head_dim, strided):
    dst, src = slabs(dtype, head_dim, strided)
    want = dst.clone()
    for dst_row, src_row, start, stop in RANGES:
        if stop > start:
            want[:, dst_row, :, start:stop] = src[:, src_row, :, start:stop]
    OPS.kv_copy_ranges(dst, src, torch.tensor(RANGES, dtype=torch.int32))
    assert torch.equal(dst, want)


OUTSIDE = [(5, 0, 0, 1), (0, 7, 0, 1), (-1, 0, 0, 1), (0, -1, 0, 1), (0, 0, -1, 1), (0, 0, 0, 34)]


@pytest.mark.parametrize("bad", OUTSIDE)
def test_kv_ranges_outside_a_slab_raise_before_anything_is_copied(bad):
    dst, src = slabs(torch.float32, 4, False)
    before = dst.clone()
    with pytest.raises((ValueError, RuntimeError), match="range 1"):
        OPS.kv_copy_ranges(dst, src, torch.tensor([(0, 0, 0, 5), bad], dtype=torch.int32))
    assert torch.equal(dst, before)
