"""What the operator tests share: inputs, layouts, and the float64 truth that every backend is held to."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels import reference, rng
from power_kernels.state import Status
from tests.devices import DEVICE, ON_CUDA

# The other two serve CPU tensors: the CPU run holds them to the same laws.
BACKENDS = ("triton",) if ON_CUDA else ("cpp", "triton", "reference")
PARTICLE_BACKENDS = tuple(name for name in BACKENDS if name != "triton")
FAST = "triton" if ON_CUDA else "cpp"  # for tests of many rows, which the interpreter is too slow for
INTERPRETED = DEVICE.type == "cpu"  # what "triton" is there
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = ("logp", "logq", "weight", "entropy")
SEED = 0x1234_5678_9ABC_DEF
INF = float("inf")
NAN = float("nan")
EPS = float(torch.finfo(torch.float32).eps)
TINY = float(torch.finfo(torch.float32).tiny)
# ex2.approx of a GPU errs by up to 2 ulp (PTX ISA: 2^-22), where the exp2 of numpy and C++ errs by half a one.
EXP2_ULPS = 2 if ON_CUDA else 0

# alpha, beta: equal; beta an integer, at 1, not an integer, below 1, above alpha; nothing tempered at all
EXPONENTS = ((4.0, 4.0), (4.0, 2.0), (4.0, 1.0), (4.0, 2.5), (1.0, 1.0), (0.5, 0.5), (1.0, 3.0), (8.5, 7.0))


def scipy_stats():
    """scipy.stats, or the test is skipped: a machine that only checks a GPU may lack it."""
    return pytest.importorskip("scipy.stats")


@contextmanager
def serving(name: str):
    """Every operator from one backend; skips the test where that backend cannot run."""
    try:
        context = pk.use_backend(name)
        with context:
            yield name
    except pk.BackendError as error:
        pytest.skip(str(error))


# ---- inputs


def stop_table(law: pk.Law, vocab: int, closing: float = 1 / 12) -> torch.Tensor:
    """int16 [5, vocab], a table of which `closing` entries close an answer; [0, 0] for a law without stops."""
    if not law.stops:
        return torch.empty(0, 0, dtype=torch.int16)
    state = torch.randint(5, (5, vocab), generator=torch.Generator().manual_seed(vocab))
    state[torch.rand(5, vocab, generator=torch.Generator().manual_seed(vocab + 1)) < closing] = -1
    return state.to(torch.int16)


def normal_logits(rows: int, vocab: int, dtype=torch.float32, *, scale=3.0, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)


def strided(z: torch.Tensor, pad: int = 3, offset: int = 1) -> torch.Tensor:
    """The same rows, `pad` entries further apart than they are long, `offset` entries off the allocation's alignment.

    NaN lies between the rows: reading past one end shows.
    """
    rows, vocab = z.shape
    buffer = torch.full((offset + rows * (vocab + pad),), NAN, dtype=z.dtype)
    view = buffer[offset:].view(rows, vocab + pad)[:, :vocab]
    view.copy_(z)
    return view


def counters(rows: int, seed: int = 0) -> torch.Tensor:
    """Counters whose four words take all their bits. int32 [rows, 4]."""
    words = np.random.default_rng(seed).integers(0, 2**32, (rows, 4), dtype=np.uint32)
    return torch.from_numpy(words.view(np.int32))


def uniforms_of(counter: torch.Tensor, seed: int | np.ndarray = SEED) -> np.ndarray:
    return rng.uniforms(counter.numpy().view(np.uint32), seed)[..., 0]


def counter_of_uniform(uniform, seed: int = SEED) -> torch.Tensor:
    """Counters whose token uniform is the given one (rounded down to 53 bits). [n] -> int32 [n, 4].

    Philox is a bijection of counters for each key, so its rounds can be undone.
    """
    bits = (np.asarray(uniform, np.float64) * 2**53).astype(np.uint64)
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    words = [(bits >> np.uint64(26)) << np.uint64(5), (bits & np.uint64(2**26 - 1)) << np.uint64(6)]
    words += [np.zeros_like(bits), np.zeros_like(bits)]
    multipliers = 0xD2511F53, 0xCD9E8D57
    inverse_0, inverse_1 = (np.uint64(pow(m, -1, 2**32)) for m in multipliers)
    m0, m1 = (np.uint64(m) for m in multipliers)
    for step in reversed(range(10)):
        key_0 = np.uint64(((seed & 0xFFFFFFFF) + step * 0x9E3779B9) & 0xFFFFFFFF)
        key_1 = np.uint64((((seed >> 32) & 0xFFFFFFFF) + step * 0xBB67AE85) & 0xFFFFFFFF)
        c0, c2 = words[3] * inverse_0 & mask, words[1] * inverse_1 & mask
        words = [c0, (c2 * m1 >> half) ^ words[0] ^ key_0, c2, (c0 * m0 >> half) ^ words[2] ^ key_1]
    counter = torch.from_numpy(np.stack(words, -1).astype(np.uint32).view(np.int32))
    np.testing.assert_array_equal(uniforms_of(counter, seed), bits * 2.0**-53)
    return counter


def per_row(value, rows: int, dtype=torch.float32) -> torch.Tensor:
    return torch.as_tensor(value, dtype=dtype).expand(rows).contiguous()


def sample(logits, alpha=4.0, beta=None, counter=None, exclude=None, *, entropy=True, seed=SEED):
    """`pk.sample_tokens` with scalars spread over the rows."""
    rows = logits.shape[0]
    return pk.sample_tokens(
        logits,
        per_row(alpha, rows),
        per_row(alpha if beta is None else beta, rows),
        torch.tensor([seed]),
        counters(rows) if counter is None else counter,
        None if exclude is None else per_row(exclude, rows, torch.int64),
        return_entropy=entropy,
    )


def score(logits, tokens, alpha=4.0, beta=None, *, entropy=True):
    rows = logits.shape[0]
    beta = alpha if beta is None else beta
    tokens = per_row(tokens, rows, torch.int64)
    return pk.score_tokens(logits, tokens, per_row(alpha, rows), per_row(beta, rows), return_entropy=entropy)


# ---- the truth


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bit patterns, so that NaN equals NaN and 0 differs from -0."""
    kinds = {torch.float32: torch.int32, torch.float64: torch.int64}
    return tensor.view(kinds[tensor.dtype]) if tensor.dtype in kinds else tensor


def assert_same_bits(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(bits(a), bits(b))


def draw_error(z: np.ndarray, beta: float, uniform: float, exclude: int, token: int) -> float:
    """How far the uniform lies outside the interval of the CDF that belongs to `token`; inf if it has no mass."""
    z = np.array(z, np.float64)
    if 0 <= exclude < z.size:
        kept, z[exclude] = z[exclude], -INF
        if z.max() == -INF:
            z[exclude] = kept  # nothing else has mass: it stays
    mass = np.exp(beta * (z - z.max()))
    if not (0 <= token < z.size and mass[token] > 0):
        return INF
    cdf = np.cumsum(mass) / mass.sum()
    low = cdf[token - 1] if token else 0.0
    return max(low - uniform, uniform - cdf[token], 0.0)


def expected_status(z: np.ndarray, *, token: int | None = None, exclude: int = -1) -> Status:
    row = reference.row_status(z)
    outside = exclude >= z.size or (token is not None and not 0 <= token < z.size)
    return Status.BAD_TOKEN if row is Status.OK and outside else row


def _torch_quantities(logits, token, alpha, beta) -> dict[str, torch.Tensor]:
    """The same quantities as one would write them in torch, in float32."""
    z = logits.float()
    pick = token[:, None]
    logp = z.log_softmax(-1)
    naive = {"logp": logp.gather(1, pick)[:, 0], "entropy": torch.special.entr(logp.exp()).sum(-1)}
    naive["logq"] = (beta[:, None] * z).log_softmax(-1).gather(1, pick)[:, 0]
    naive["weight"] = alpha * naive["logp"] - naive["logq"]
    return naive


def assert_quantities(logits, token, alpha, beta, out) -> None:
    """Every row sound, and as close to float64 as twice the float32 torch expression, plus one rounding.

    The rounding: one float32 ulp of the largest number met on the way, beta * max(1, |value|).
    """
    rows, vocab = logits.shape
    exact = logits.double().numpy()
    alpha, beta = per_row(alpha, rows), per_row(beta, rows)
    naive = _torch_quantities(logits, token, alpha, beta)
    truth = {name: np.empty(rows) for name in FLOATS}
    for i, z in enumerate(exact):
        x = int(token[i])
        if z[x] == -INF:
            values = (-INF,) * 3
        else:
            q = reference.token_quantities(z, x, float(alpha[i]), float(beta[i]))
            values = (q.logp, q.logq, q.weight)
        for name, value in zip(FLOATS, (*values, reference.entropy(z)), strict=True):
            truth[name][i] = value
    for name in FLOATS:
        ours = getattr(out, name)
        if ours is None:
            continue
        ours, theirs = ours.double().numpy(), naive[name].double().numpy()
        stored = truth[name].astype(np.float32)
        truth[name] = np.where(np.isinf(stored), stored, truth[name])  # out of float32's range
        finite = np.isfinite(truth[name])
        np.testing.assert_array_equal(ours[~finite], truth[name][~finite], err_msg=name)
        if not finite.any():
            continue
        comparable = finite & np.isfinite(theirs)  # torch's 0 * -inf and inf - inf are not a standard
        error = np.abs(ours - truth[name])[finite]
        torch_error = np.abs(theirs - truth[name])[comparable].max(initial=0.0)
        ulp = EPS * np.maximum(1.0, np.abs(truth[name][finite])) * np.maximum(1.0, beta.numpy()[finite])
        ulp *= 1 + EXP2_ULPS
        assert (error <= 2 * torch_error + ulp + vocab * TINY).all(), (name, error.max(), torch_error)


def assert_sample(logits, alpha, beta, counter, exclude, out, *, seed=SEED) -> None:
    """`out` is what DESIGN 2, 4 and 5.1 say of these rows, good and bad."""
    rows = logits.shape[0]
    alpha, beta = per_row(alpha, rows), per_row(beta, rows)
    skip = per_row(-1 if exclude is None else exclude, rows, torch.int64).tolist()
    exact = logits.double().numpy()
    status = [expected_status(z, exclude=e) for z, e in zip(exact, skip, strict=True)]
    assert out.status.tolist() == status
    good = torch.tensor([s is Status.OK for s in status], dtype=torch.bool)
    assert (out.token[~good] == -1).all()
    for name in FLOATS:
        column = getattr(out, name)
        assert column is None or column[~good].isnan().all(), name
    uniform = uniforms_of(counter, seed)
    for i in good.nonzero()[:, 0].tolist():
        error = draw_error(exact[i], float(beta[i]), uniform[i], skip[i], int(out.token[i]))
        assert error < 1e-6, (i, int(out.token[i]), error)
    chosen = type(out)(*(None if column is None else column[good] for column in out))
    assert_quantities(logits[good], out.token[good], alpha[good], beta[good], chosen)


def accept_tolerance(cur: torch.Tensor, prop: torch.Tensor) -> np.ndarray:
    """How far log_ratio may lie from the reference's, [B] float64: not at all where every backend takes libm's log n.

    A GPU's is libdevice's, which errs by up to an ulp; W - log n then rounds to a neighbour.
    """
    if not ON_CUDA:
        return np.zeros(len(cur))
    largest = [np.nansum(np.where(np.isinf(w), 0.0, np.abs(w)), axis=1) for w in (cur.double().numpy(), prop.numpy())]
    return 4 * np.spacing(np.maximum(np.maximum(*largest), 8.0))


def assert_accepted_as(out, accept, log_ratio, status, log_u, tolerance: np.ndarray) -> None:
    """Decisions that lie within a tolerance that is not 0 of the boundary may go either way."""
    assert out.status.tolist() == list(status)
    ours, theirs = out.log_ratio.numpy(), np.asarray(log_ratio, np.float64)
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[~finite], theirs[~finite])  # one NaN is as good as another
    error = np.abs(ours[finite] - theirs[finite])
    assert (error <= tolerance[finite]).all(), (error, tolerance[finite])
    distance = np.abs(np.where(finite, theirs, np.inf) - np.nan_to_num(np.asarray(log_u, np.float64)))
    decided = (tolerance == 0) | (distance > tolerance)
    assert out.accept.numpy()[decided].tolist() == np.asarray(accept, bool)[decided].tolist()


def assert_score(logits, tokens, alpha, beta, out) -> None:
    rows = logits.shape[0]
    alpha, beta, tokens = per_row(alpha, rows), per_row(beta, rows), per_row(tokens, rows, torch.int64)
    exact = logits.double().numpy()
    status = [expected_status(z, token=t) for z, t in zip(exact, tokens.tolist(), strict=True)]
    assert out.status.tolist() == status
    good = torch.tensor([s is Status.OK for s in status], dtype=torch.bool)
    for name in FLOATS:
        column = getattr(out, name)
        assert column is None or column[~good].isnan().all(), name
    chosen = type(out)(*(None if column is None else column[good] for column in out))
    assert_quantities(logits[good], tokens[good], alpha[good], beta[good], chosen)
