"""The Triton kernels against the float64 reference: in Triton's interpreter, or compiled (`pytest --device cuda`)."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from power_kernels import reference, rng  # noqa: E402
from power_kernels.errors import ArgumentError  # noqa: E402
from power_kernels.law import Law  # noqa: E402
from power_kernels.rng import MAX_PROMPT_ID  # noqa: E402
from power_kernels.state import ChainField, ChainState, LaneStatus, Mode, Status  # noqa: E402
from power_kernels.triton import chain, kv_cache, sampling, scoring  # noqa: E402
from power_kernels.triton import rng as triton_rng  # noqa: E402
from tests.devices import DEVICE  # noqa: E402
from tests.op_helpers import stop_table  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the hostile values below
SEED = 0x299F31D0A4093822
NAN = float("nan")
INF = float("inf")


def on(values, dtype=None) -> torch.Tensor:
    tensor = values if torch.is_tensor(values) else torch.tensor(values)
    return tensor.to(device=DEVICE, dtype=dtype)


def make_logits(rows: int, vocabulary: int, dtype=torch.float32, scale=3.0, seed=0, pad=0) -> torch.Tensor:
    """Normal logits [rows, vocabulary] whose rows lie `pad` entries further apart than they are long."""
    g = torch.Generator().manual_seed(seed)
    full = torch.full((rows, vocabulary + pad), NAN)
    full[:, :vocabulary] = torch.randn(rows, vocabulary, generator=g) * scale
    return full.to(dtype).to(DEVICE)[:, :vocabulary]


def make_counters(rows: int, seed: int = 0) -> torch.Tensor:
    words = np.random.default_rng(seed).integers(0, 2**32, (rows, 4), dtype=np.uint32)
    return on(torch.from_numpy(words.view(np.int32)))


def empty(rows: int, dtype) -> torch.Tensor:
    return torch.full((rows,), NAN if dtype.is_floating_point else -77, dtype=dtype, device=DEVICE)


def sample(module, logits, alpha, beta, counter, exclude=None, entropy=True, seed=SEED):
    rows, vocabulary = logits.shape
    out = {
        "token": empty(rows, torch.int64),
        "logp": empty(rows, torch.float32),
        "logq": empty(rows, torch.float32),
        "weight": empty(rows, torch.float32),
        "entropy": empty(rows, torch.float32) if entropy else None,
        "status": empty(rows, torch.int32),
    }
    workspace = empty(rows * 4 * -(-vocabulary // 256), torch.float32)
    module.sample_tokens_out(
        logits,
        on(np.broadcast_to(alpha, rows).copy(), torch.float32),
        on(np.broadcast_to(beta, rows).copy(), torch.float32),
        on([seed], torch.int64),
        counter,
        None if exclude is None else on(exclude, torch.int64),
        workspace,
        *out.values(),
    )
    return {k: None if v is None else v.cpu() for k, v in out.items()}


def boundary_distance(row: torch.Tensor, beta: float, u: float, exclude: int, token: int) -> float:
    """How far u lies from the interval of the CDF that belongs to `token`, in float64 (0 inside)."""
    z = row.double().cpu().numpy().copy()
    if exclude >= 0:
        z[exclude] = -INF
    mass = np.exp(beta * (z - z.max()))
    cdf = np.cumsum(mass) / mass.sum()
    low = cdf[token - 1] if token else 0.0
    return max(low - u, u - cdf[token], 0.0) if mass[token] > 0 else INF


def check_sample(logits, alpha, beta, counter, exclude=None, tolerance=2e-6):
    """Quantities within `tolerance` (relative to max(1, value)) of float64; tokens equal, boundaries apart."""
    rows = logits.shape[0]
    got = sample(sampling, logits, alpha, beta, counter, exclude)
    want = sample(reference, logits, alpha, beta, counter, exclude)
    assert got["status"].tolist() == want["status"].tolist()
    u = rng.uniforms(counter.cpu().numpy().view(np.uint32), SEED)[:, 0]
    betas = np.broadcast_to(beta, rows)
    alphas = np.broadcast_to(alpha, rows)
    for i in range(rows):
        token, bad = int(got["token"][i]), int(got["status"][i]) != Status.OK
        if bad:
            assert token == -1
            assert all(torch.isnan(got[k][i]) for k in ("logp", "logq", "weight", "entropy"))
            continue
        z = logits[i].double().cpu().numpy()
        if token != int(want["token"][i]):
            left_out = -1 if exclude is None else int(exclude[i])
            assert boundary_distance(logits[i], betas[i], u[i], left_out, token) < 1e-6
        q = reference.token_quantities(z, token, float(np.float32(alphas[i])), float(np.float32(betas[i])))
        for key, value in (("logp", q.logp), ("logq", q.logq), ("weight", q.weight), ("entropy", reference.entropy(z))):
            bound = tolerance * max(abs(value), 1.0) * (max(alphas[i], betas[i]) if key == "weight" else 1.0)
            assert abs(float(got[key][i]) - value) <= bound, (key, i, float(got[key][i]), value)
    return got, want


# ---- random numbers


@triton.jit
def _philox_probe(counter_ptr, seed_ptr, word_ptr, uniform_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    seed = tl.load(seed_ptr)
    c = counter_ptr + 4 * i
    c0, c1, c2, c3 = tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3)
    w0, w1, w2, w3 = triton_rng.philox4x32_10(seed, c0, c1, c2, c3)
    tl.store(word_ptr + 4 * i, w0.to(tl.int32, bitcast=True))
    tl.store(word_ptr + 4 * i + 1, w1.to(tl.int32, bitcast=True))
    tl.store(word_ptr + 4 * i + 2, w2.to(tl.int32, bitcast=True))
    tl.store(word_ptr + 4 * i + 3, w3.to(tl.int32, bitcast=True))
    u0, u1 = triton_rng.uniforms(seed, c0, c1, c2, c3)
    tl.store(uniform_ptr + 2 * i, u0)
    tl.store(uniform_ptr + 2 * i + 1, u1)


def philox(counter: np.ndarray, seed: int):
    rows = len(counter)
    words = torch.zeros(rows, 4, dtype=torch.int32, device=DEVICE)
    uniforms = torch.zeros(rows, 2, dtype=torch.float64, device=DEVICE)
    signed = seed - 2**64 if seed >= 2**63 else seed
    _philox_probe[(1,)](on(torch.from_numpy(counter.view(np.int32))), on([signed], torch.int64), words, uniforms, rows)
    return words.cpu().numpy().view(np.uint32), uniforms.cpu().numpy()


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [  # kat_vectors of Random123, philox4x32 with 10 rounds
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            SEED,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_words(counter, seed, words):
    assert philox(np.array([counter], dtype=np.uint32), seed)[0][0].tolist() == words


def test_philox_and_its_uniforms_equal_the_contract_bitwise():
    counter = make_counters(256).cpu().numpy().view(np.uint32)
    words, uniforms = philox(counter, SEED)
    assert (words == rng.philox4x32_10(counter, SEED)).all()
    assert (uniforms == rng.uniforms(counter, SEED)).all()


# ---- sampling

# 1: no rest at all; 2, 3: fewer entries than a thread holds; 255, 999: masks; 1023-1025, 4095-4097: a tile's edge
VOCABULARIES = [1, 2, 3, 255, 256, 999, 1023, 1024, 1025, 2048, 4095, 4096, 4097]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sampling_agrees_with_float64_at_every_tile_edge(vocabulary, dtype):
    logits = make_logits(4, vocabulary, dtype, seed=vocabulary, pad=5)
    check_sample(logits, 4.0, 4.0, make_counters(4, vocabulary))


@pytest.mark.parametrize("beta", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 2.5, 0.7])
@pytest.mark.parametrize("alpha", [4.0, 2.5])
def test_every_power_branch_agrees_with_float64(alpha, beta):
    check_sample(make_logits(3, 999, seed=5), alpha, beta, make_counters(3, 5))


def test_rows_of_one_batch_may_differ_in_alpha_and_beta():
    betas = np.array([1.0, 2.0, 3.0, 4.0, 2.5, 8.0, 0.5, 1.25])
    check_sample(make_logits(8, 300), np.array([1.0, 4.0, 3.0, 4.0, 4.0, 8.0, 2.0, 2.0]), betas, make_counters(8))


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_a_shift_of_the_logits_changes_nothing(shift):
    plain = (make_logits(4, 2500).double() * 16).round() / 16  # exact in fp32 after the shift
    moved = (plain + shift).float()
    a = sample(sampling, plain.float(), 4.0, 4.0, make_counters(4))
    b = sample(sampling, moved, 4.0, 4.0, make_counters(4))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_nearly_deterministic_rows_keep_their_digits():
    logits = make_logits(3, 2100, scale=1.0)
    logits[0, 7] = 40.0  # R1 about 1e-14: lost if it were a sum minus one
    logits[1, 2099] = 60.0
    logits[2, 0] = 25.0
    got, _ = check_sample(logits, 4.0, 4.0, make_counters(3))
    for i, token in enumerate((7, 2099, 0)):
        assert int(got["token"][i]) == token
        want = reference.token_quantities(logits[i].double().cpu().numpy(), token, 4.0, 4.0)
        assert float(got["logp"][i]) == pytest.approx(want.logp, rel=1e-5)
        assert float(got["weight"][i]) == pytest.approx(want.weight, rel=1e-5)
        assert want.logp < 0.0


def test_ties_at_the_maximum_leave_exactly_one_out():
    logits = on(torch.zeros(3, 4100))
    logits[1, 1::2] = -INF
    logits[2] = -INF
    logits[2, [5, 2050, 4099]] = 3.0
    got, _ = check_sample(logits, 3.0, 3.0, make_counters(3))
    assert got["logp"].tolist() == pytest.approx([-np.log(4100), -np.log(2050), -np.log(3)], rel=1e-6)


def test_the_largest_finite_logits_overflow_nowhere():
    logits = make_logits(3, 2500)
    logits[0, 0], logits[0, 1:] = 3.4e38, -3.4e38  # differences of the tiles' maxima, too, exceed fp32
    logits[1, 2400] = 1e38
    logits[2, 3] = -3.4e38
    got, _ = check_sample(logits, 4.0, 2.5, make_counters(3), [-1, 2400, -1])
    assert int(got["token"][0]) == 0


def test_a_bad_row_is_reported_and_spoils_no_other():
    logits = make_logits(9, 2100)
    logits[0, 2099] = NAN
    logits[1, 5] = INF
    logits[2] = -INF
    logits[3, 5], logits[3, 6] = INF, NAN  # in one tile: NaN is told first
    logits[4, 5], logits[4, 2090] = INF, NAN  # in two tiles
    logits[5] = -INF
    logits[5, 2048] = -3.0  # one finite token
    logits[6, ::2] = -INF
    logits[7] = NAN
    got, _ = check_sample(logits, 4.0, 4.0, make_counters(9), exclude=[-1] * 9)
    assert got["status"].tolist() == [
        Status.NAN,
        Status.POS_INF,
        Status.NO_MASS,
        Status.NAN,
        Status.NAN,
        Status.OK,
        Status.OK,
        Status.NAN,
        Status.OK,
    ]
    assert int(got["token"][5]) == 2048
    assert float(got["logp"][5]) == float(got["weight"][5]) == float(got["entropy"][5]) == 0.0


@pytest.mark.parametrize("vocabulary", [2, 300, 4097])
@pytest.mark.parametrize("beta", [4.0, 2.5])
def test_the_excluded_token_is_never_drawn_and_the_rest_keeps_its_law(vocabulary, beta):
    rows = 8
    logits = make_logits(rows, vocabulary, pad=3)
    exclude = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    got, _ = check_sample(logits, 4.0, beta, make_counters(rows, 3), exclude)
    assert (got["token"] != exclude).all()


def test_a_dominant_excluded_token_cannot_underflow_the_rest():
    logits = make_logits(4, 4200)
    x = torch.tensor([3, 2047, 2048, 4199])
    logits[torch.arange(4), x] = 2000.0  # exp(4 * -2000) is 0 in float64, too
    got, want = check_sample(logits, 4.0, 4.0, make_counters(4), x)
    assert (got["token"] == want["token"]).all()


def test_an_excluded_token_with_all_the_mass_is_returned_itself():
    logits = on(torch.full((3, 2100), -INF))
    logits[:, 2060] = 1.0
    logits[1, 3] = -5.0
    got, _ = check_sample(logits, 4.0, 4.0, make_counters(3), torch.tensor([2060, 2060, -1]))
    assert got["token"].tolist() == [2060, 3, 2060]


def test_excluding_nothing_and_excluding_a_token_without_mass_are_the_same_bitwise():
    logits = make_logits(6, 2500)
    logits[:, 100] = -INF
    runs = [sample(sampling, logits, 4.0, 4.0, make_counters(6), e) for e in (None, [-1] * 6, [100] * 6)]
    for other in runs[1:]:
        assert all(torch.equal(runs[0][k], other[k]) for k in runs[0])


def test_an_exclusion_past_the_vocabulary_is_a_bad_token():
    got, _ = check_sample(make_logits(2, 50), 4.0, 4.0, make_counters(2), torch.tensor([50, 2**40]))
    assert got["status"].tolist() == [Status.BAD_TOKEN] * 2


def test_a_row_does_not_depend_on_the_batch_bitwise():
    logits, counter = make_logits(5, 2100, torch.bfloat16), make_counters(5)
    whole = sample(sampling, logits, 4.0, 4.0, counter)
    for i in range(5):
        alone = sample(sampling, logits[i : i + 1], 4.0, 4.0, counter[i : i + 1])
        assert all(torch.equal(whole[k][i : i + 1], alone[k]) for k in whole)


def test_tiles_shared_out_among_fewer_programs_give_the_same_bits(monkeypatch):
    logits, counter = make_logits(3, 4500), make_counters(3)
    plain = sample(sampling, logits, 4.0, 4.0, counter)
    monkeypatch.setattr(sampling, "_PROGRAMS", 5)  # 15 tiles: three a program, of five; two programs a row
    shared = sample(sampling, logits, 4.0, 4.0, counter)
    assert all(torch.equal(plain[k], shared[k]) for k in plain)


def test_leaving_entropy_out_changes_nothing_else():
    logits, counter = make_logits(3, 700), make_counters(3)
    a = sample(sampling, logits, 4.0, 4.0, counter)
    b = sample(sampling, logits, 4.0, 4.0, counter, entropy=False)
    assert b.pop("entropy") is None
    assert all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize("exclude", [-1, 4000])
def test_draws_follow_the_distribution_down_to_a_tail_18_nats_below(exclude):
    """One token 18 nats above its neighbours, and the few draws of a million that miss it.

    An fp32 scan or a 24-bit uniform gives most of the neighbours zero width.
    """
    vocabulary = 4200
    logits = make_logits(1, vocabulary, scale=0.5)
    logits[0, 2500] = 18.0 + float(logits[0].max())
    counter = make_counters(1 << 20, 11)
    u = rng.uniforms(counter.cpu().numpy().view(np.uint32), SEED)[:, 0]
    z = logits[0].double().cpu().numpy().copy()
    if exclude >= 0:
        z[exclude] = -INF
    cdf = np.cumsum(np.exp(z - z.max()))
    cdf /= cdf[-1]
    tail = np.flatnonzero((u < cdf[2499]) | (u >= cdf[2500]))
    assert len(tail) >= 5
    rows = torch.from_numpy(tail).to(DEVICE)
    got, want = check_sample(
        logits.expand(len(tail), vocabulary), 4.0, 1.0, counter[rows], torch.full((len(tail),), exclude)
    )
    assert (got["token"] == want["token"]).all()
    assert len(set(got["token"].tolist())) == len(tail)


# ---- scoring


def score(module, logits, tokens, alpha, beta, entropy=True):
    rows, vocabulary = logits.shape
    out = {k: empty(rows, torch.float32) for k in ("logp", "logq", "weight", "entropy")}
    if not entropy:
        out["entropy"] = None
    out["status"] = empty(rows, torch.int32)
    module.score_tokens_out(
        logits,
        on(tokens, torch.int64),
        on(np.broadcast_to(alpha, rows).copy(), torch.float32),
        on(np.broadcast_to(beta, rows).copy(), torch.float32),
        empty(rows * 4 * -(-vocabulary // 256), torch.float32),
        *out.values(),
    )
    return {k: None if v is None else v.cpu() for k, v in out.items()}


def check_score(logits, tokens, alpha, beta):
    got = score(scoring, logits, tokens, alpha, beta)
    want = score(reference, logits, tokens, alpha, beta)
    assert got["status"].tolist() == want["status"].tolist()
    for key in ("logp", "logq", "weight", "entropy"):
        np.testing.assert_allclose(got[key].numpy(), want[key].numpy(), rtol=1e-5, atol=1e-5, err_msg=key)
    return got


@pytest.mark.parametrize("vocabulary", [1, 3, 256, 2048, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "beta"), [(4.0, 4.0), (4.0, 1.5)])
def test_scoring_agrees_with_float64(vocabulary, dtype, alpha, beta):
    tokens = torch.randint(0, vocabulary, (5,), generator=torch.Generator().manual_seed(vocabulary))
    check_score(make_logits(5, vocabulary, dtype, pad=2), tokens, alpha, beta)


@pytest.mark.parametrize(("alpha", "beta"), [(4.0, 4.0), (4.0, 1.5), (1.5, 4.0)])
def test_scoring_reports_bad_rows_and_gives_impossible_tokens_minus_infinity(alpha, beta):
    logits = make_logits(8, 2100)
    logits[0, 3] = NAN
    logits[1, 3] = INF
    logits[2] = -INF
    logits[3, 9] = -INF
    got = check_score(logits, [0, 0, 0, 9, -1, 2100, 2**33, 5], alpha, beta)
    assert got["status"].tolist() == [1, 2, 3, 0, 4, 4, 4, 0]
    assert [float(got[k][3]) for k in ("logp", "logq", "weight")] == [-INF] * 3


def test_scoring_a_sampled_token_gives_its_quantities_bitwise():
    logits = make_logits(6, 2500)
    drawn = sample(sampling, logits, 4.0, 2.0, make_counters(6))
    scored = score(scoring, logits, drawn["token"], 4.0, 2.0)
    assert all(torch.equal(drawn[k], scored[k]) for k in scored)


# ---- acceptance


def accept(module, w_cur, w_prop, n_cur, n_prop, log_u):
    rows = len(n_cur)
    out = (
        torch.zeros(rows, dtype=torch.bool, device=DEVICE),
        empty(rows, torch.float64),
        empty(rows, torch.int32),
    )
    module.mh_accept_out(w_cur, w_prop, on(n_cur, torch.int32), on(n_prop, torch.int32), on(log_u, torch.float64), *out)
    return [o.cpu() for o in out]


def check_accept(*args):
    got, want = accept(chain, *args), accept(reference, *args)
    assert got[2].tolist() == want[2].tolist()
    assert got[0].tolist() == want[0].tolist()
    np.testing.assert_allclose(got[1].numpy(), want[1].numpy(), rtol=1e-12, atol=1e-12)
    return got


def test_acceptance_agrees_with_the_reference_for_ragged_answers():
    g = torch.Generator().manual_seed(2)
    rows = 70  # three programs, the last one with idle threads
    w_cur = -torch.rand(rows, 41, generator=g).to(DEVICE)[:, :37]
    w_prop = -torch.rand(rows, 60, generator=g).to(DEVICE)
    n_cur = torch.randint(1, 38, (rows,), generator=g)
    n_prop = torch.randint(1, 61, (rows,), generator=g)
    log_u = -20 * torch.rand(rows, generator=g, dtype=torch.float64)
    got = check_accept(w_cur, w_prop, n_cur, n_prop, log_u)
    assert 10 < int(got[0].sum()) < 60


def test_the_sum_is_the_plain_running_one_in_position_order():
    # 2**53 and ones: every other order, and every compensated sum, gives other bits
    w = torch.ones(1, 300, device=DEVICE)
    w[0, 0] = 2.0**53
    w[0, 150] = -(2.0**53)
    got = accept(chain, w, torch.zeros(1, 300, device=DEVICE), [300], [300], [0.0])
    assert float(got[1][0]) == -149.0


def test_a_bad_answer_is_reported_and_never_accepted():
    w = torch.zeros(9, 4, device=DEVICE)
    w[1, 2] = NAN
    w[2, 2] = INF
    w[3, 1], w[3, 2] = -INF, NAN
    w[8] = -INF
    n = [4, 4, 4, 4, 0, 5, 2, 2, 4]  # rows 6 and 7: the bad weight is past the end
    w[6, 3], w[7, 2] = NAN, INF
    log_u = [0.0] * 9
    for cur, prop in ((w, torch.zeros_like(w)), (torch.zeros_like(w), w), (w, w)):
        got = check_accept(cur, prop, n if cur is w else [4] * 9, n if prop is w else [4] * 9, log_u)
        assert not got[0][[1, 2, 3, 4, 5]].any()
    zeros = torch.zeros(3, 2, device=DEVICE)
    got = check_accept(zeros, zeros, [1] * 3, [2] * 3, [NAN, INF, -1.0])
    assert got[2].tolist() == [Status.NAN, Status.POS_INF, Status.OK]


def test_where_rounding_leaves_no_tile_above_the_uniform_the_last_one_with_mass_is_drawn_from():
    """An infinite mass in a record made by hand stands for the rounding: no prefix exceeds u times the sum."""
    z = torch.zeros(1, 3 * sampling.TILE, device=DEVICE)
    z[:, 2 * sampling.TILE :] = -INF
    one, counter, workspace = on([1.0]), make_counters(1), empty(3 * 4, torch.float32)
    sampling.mass_out(z, one, workspace, entropy=False)
    workspace.view(4, 3)[2, 1] = INF
    token, status = empty(1, torch.int64), empty(1, torch.int32)
    sampling.finish_out(
        z, one, one, on([SEED]), counter, None, workspace, token, *(empty(1, torch.float32) for _ in range(3)), None,
        status, width=sampling.vector_width(z), tiles=3, tiles_block=sampling.tiles_block(z.shape[1]),
        constants=sampling.FINISH,
    )  # fmt: skip
    assert status.item() == Status.OK
    assert token.item() == 2 * sampling.TILE - 1


# ---- the chain


def random_samples(state: ChainState, g: torch.Generator, eos: int, hostile: float):
    """What no model would say, in an order no model would choose: every branch of the step, often."""
    rows = state.lane_field.shape[0]

    def chance(p):
        return torch.rand(rows, generator=g) < p

    token = torch.randint(0, 50, (rows,), generator=g)
    token[chance(0.05)] = eos
    excluded = state.exclude.cpu()
    again = chance(0.2) & (excluded >= 0)
    token[again] = excluded[again]
    logq = -0.1 * torch.rand(rows, generator=g)
    logq[chance(0.1)] = 0.0
    logq[chance(0.1)] = -3.0
    logq[chance(0.02)] = -INF
    weight = -0.3 * torch.rand(rows, generator=g)
    entropy = torch.rand(rows, generator=g)
    entropy[chance(0.1)] = 0.0
    entropy[chance(0.02)] = -1e-8  # rounding
    for values, poison in ((weight, NAN), (weight, INF), (logq, NAN), (entropy, NAN), (entropy, INF)):
        values[chance(hostile / 4)] = poison
    status = torch.zeros(rows, dtype=torch.int32)
    status[chance(hostile)] = int(Status.NAN)
    status[chance(0.1)] = int(Status.PENDING)
    if state.stop_state.numel():
        token[chance(hostile / 4) & ~again] = 50  # no token of the table
    return tuple(t.to(DEVICE) for t in (token, logq, weight, status, entropy))


CASES = [  # law, lanes, positions a block
    (Law(12, 4, 3), 1, 128),
    (Law(12, 4, 3, final_steps=3), 3, 128),  # lanes that are no power of two
    (Law(12, 4, 6), 8, 4),  # several blocks to walk and to commit; more lanes than steps
    (Law(10, 6, 3, early_rejection=False), 4, 128),  # a last stage shorter than the others; closed lanes wait
    (Law(8, 8, 5, final_steps=2, free_prefix=False), 3, 4),
    (Law(12, 4, 3, karan_du=True, early_rejection=False), 2, 128),
    (Law(5, 1, 0, final_steps=6), 2, 128),  # stages without a step
    (Law(12, 4, 6, cut="divergence"), 3, 4),  # several blocks to search for the cut
    (Law(12, 4, 4, final_steps=3, cut="divergence-entropy"), 2, 128),
    (Law(12, 6, 4, early_rejection=False, cut="divergence-entropy"), 5, 4),
    (Law(12, 4, 6, stops=True), 3, 4),
    (Law(8, 4, 2, final_steps=1, length_bonus=0.7, free_prefix=False), 1, 128),
    (Law(12, 4, 6, cut="divergence", stops=True, length_bonus=-0.3), 5, 4),
]


@pytest.mark.parametrize(("law", "lanes", "block"), CASES)
def test_advancing_a_chain_is_identical_with_the_reference(law, lanes, block, monkeypatch):
    monkeypatch.setitem(chain.ADVANCE, "BLOCK", block)
    chains, base, eos = 2, 7, 49
    g = torch.Generator().manual_seed(lanes)
    ours, theirs = (ChainState.allocate(chains, lanes, law, DEVICE) for _ in range(2))
    common = (on(reference.length_table(law)), on([SEED], torch.int64), on([eos, 1000], torch.int64))
    common = (*common, on(stop_table(law, 50), torch.int16))
    constants = law.constants()
    for state in (ours, theirs):
        for c in range(chains):
            state.admit(c, [3] * (base + c), chain_id=5 + c, prompt_id=MAX_PROMPT_ID - c)
    accepted = voided = finished = 0
    for step in range(34):
        sampled = random_samples(theirs, g, eos, hostile=0.01)
        before = theirs.lane_field.clone()
        chain.mh_advance(*ours.tensors(), *common, *sampled, *constants)
        reference.mh_advance(*theirs.tensors(), *common, *sampled, *constants)
        for f in fields(ChainState):
            got, want = getattr(ours, f.name), getattr(theirs, f.name)
            if f.name in ("lane_theta", "cumz", "lane_cumz"):  # exp and log are the library's
                torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
            else:
                assert torch.equal(got, want), (f.name, step, got, want)
        moved = theirs.commit_range[:, 3] > 0
        accepted += int(moved.sum())
        held = (before.view(chains, lanes, -1)[:, :, 0] != LaneStatus.IDLE).sum(1)
        voided += int((held - 1)[moved].clamp(min=0).sum())
        for c in range(chains):  # refill
            if int(theirs.field[c, ChainField.MODE]) in (Mode.DONE, Mode.FAULT):
                finished += 1
                for state in (ours, theirs):
                    state.admit(c, [2, 11], chain_id=step, prompt_id=3)
    assert accepted >= 4
    assert finished >= 1
    assert lanes == 1 or voided >= 1


def test_more_lanes_than_are_compiled_offline_are_refused():
    law = Law(4, 4, 1)
    common = (on(reference.length_table(law)), on([SEED], torch.int64), on([1], torch.int64))
    common = (*common, on(stop_table(law, 50), torch.int16))
    for lanes in (chain.MAX_LANES, chain.MAX_LANES + 1):
        state = ChainState.allocate(2, lanes, law, DEVICE)
        sampled = (
            state.input_id,
            state.lane_theta.float(),
            state.lane_theta.float(),
            state.lane_field[:, 0].contiguous(),
            torch.empty(0, device=DEVICE),
        )
        call = (*state.tensors(), *common, *sampled, *law.constants())
        if lanes > chain.MAX_LANES:
            with pytest.raises(ArgumentError, match="state has 17 lanes a chain; backend 'triton' runs at most 16"):
                chain.mh_advance(*call)
        else:
            chain.mh_advance(*call)


# ---- KV copies


def make_slab(shape, dtype, seed, pad=0):
    """Random bytes, of which no NaN would survive a comparison by value: compare as bytes."""
    g = torch.Generator().manual_seed(seed)
    *outer, d = shape
    raw = torch.randint(0, 256, (*outer, (d + pad) * dtype.itemsize), generator=g, dtype=torch.uint8)
    return raw.to(DEVICE).view(dtype)[..., :d]


def copied(dst, src, ranges):
    """What the copy must give, as bytes; ranges outside the slabs are skipped."""
    want = dst.clone()
    for to, of, start, stop in ranges:
        if 0 <= to < dst.shape[1] and 0 <= of < src.shape[1] and 0 <= start < stop <= min(dst.shape[3], src.shape[3]):
            want[:, to, :, start:stop] = src[:, of, :, start:stop]
    return want


def same_bytes(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


RANGES = [
    (0, 2, 0, 37),
    (1, 0, 5, 6),
    (2, 1, 30, 40),  # up to the end of the shorter slab
    (3, 0, 7, 7),  # empty
    (3, 0, 9, 3),  # less than empty
    (4, 0, 0, 41),  # past the shorter slab
    (4, 0, -1, 3),
    (6, 0, 0, 3),  # rows that are not there
    (-1, 0, 0, 3),
    (4, 3, 0, 3),
    (4, -1, 0, 3),
]


@pytest.mark.parametrize(
    ("dtype", "d", "pad", "unit"),
    [
        (torch.bfloat16, 64, 0, 16),
        (torch.bfloat16, 80, 0, 16),  # not a power of two: masked
        (torch.float32, 6, 0, 8),
        (torch.float16, 6, 0, 4),
        (torch.bfloat16, 65, 0, 2),
        (torch.uint8, 33, 0, 1),
        (torch.bfloat16, 64, 8, 16),  # padded rows
        (torch.bfloat16, 64, 1, 2),
        (torch.bfloat16, 1, 3, 2),
    ],
)
def test_copies_are_exact_for_every_alignment_and_nothing_else_is_written(dtype, d, pad, unit):
    dst = make_slab((2, 6, 2, 50, d), dtype, 1, pad)
    src = make_slab((2, 3, 2, 40, d), dtype, 2, pad)
    assert kv_cache._common_unit(dst, src) == unit
    want = copied(dst, src, RANGES)
    kv_cache.kv_copy_ranges(dst, src, on(RANGES, torch.int32))
    assert same_bytes(dst, want)


def test_copies_follow_the_strides_of_any_slab():
    """Positions before heads, as many engines keep them; a view of some layers; an odd first element."""
    dst = make_slab((3, 6, 50, 2, 32), torch.bfloat16, 1).transpose(2, 3)[1:]
    src = make_slab((2, 3, 2, 40, 33), torch.bfloat16, 2)[..., 1:]
    want = copied(dst, src, RANGES)
    kv_cache.kv_copy_ranges(dst, src, on(RANGES, torch.int32))
    assert same_bytes(dst, want)


def test_copying_no_range_or_empty_slabs_does_nothing():
    dst, src = make_slab((2, 2, 1, 4, 8), torch.float16, 1), make_slab((2, 2, 1, 4, 8), torch.float16, 2)
    want = dst.clone()
    kv_cache.kv_copy_ranges(dst, src, on(torch.zeros(0, 4), torch.int32))
    kv_cache.kv_copy_ranges(dst[:, :, :0], src[:, :, :0], on([(0, 0, 0, 1)], torch.int32))
    kv_cache.kv_copy_ranges(dst[:, :, :, :0], src, on([(0, 0, 0, 1)], torch.int32))
    assert same_bytes(dst, want)
