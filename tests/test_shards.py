"""A vocabulary in shards is the whole vocabulary: records, draws, scores, and two real processes (DESIGN 2, 4)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import power_kernels as pk
from power_kernels import rng
from power_kernels.ops.shards import token_uniform
from power_kernels.state import Status
from tests.devices import DEVICE, host_only
from tests.op_helpers import (
    DTYPES,
    EXPONENTS,
    INF,
    NAN,
    SEED,
    assert_sample,
    assert_score,
    counter_of_uniform,
    counters,
    normal_logits,
    per_row,
    scipy_stats,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# one shard, two, three, eight: uneven, shards of one entry among them
SPLITS = [(700,), (699, 1), (1, 350, 349), (100, 1, 99, 200, 37, 63, 150, 50)]


def offsets(sizes) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def reduced(parts):
    """What an all-reduce by maximum leaves on every rank."""
    columns = [None if parts[0][i] is None else torch.stack([p[i] for p in parts]) for i in range(6)]
    for name, column in zip(pk.SampleOutput._fields[4:], columns[4:], strict=True):  # the same on every rank
        assert column is None or column.nan_to_num(7).eq(column[:1].nan_to_num(7)).all(), name
    assert ((columns[0] >= 0).sum(0) <= 1).all(), "two shards have drawn"
    return pk.SampleOutput(*(None if c is None else c.amax(0).cpu() for c in columns))


def sample(z, sizes, alpha=4.0, beta=None, counter=None, exclude=None, *, entropy=True, seed=SEED):
    """`pk.sample_tokens` of z, split into shards of the given sizes, each with its own tensor."""
    rows = z.shape[0]
    beta = per_row(alpha if beta is None else beta, rows).to(DEVICE)
    alpha, seed = per_row(alpha, rows).to(DEVICE), torch.as_tensor(seed).reshape(-1).to(DEVICE)
    counter = (counters(rows) if counter is None else counter).to(DEVICE)
    exclude = None if exclude is None else per_row(exclude, rows, torch.int64).to(DEVICE)
    shards = [part.contiguous().to(DEVICE) for part in z.split(list(sizes), -1)]
    starts = offsets(sizes)
    records = torch.stack([pk.shard_record(s, beta, o, exclude) for s, o in zip(shards, starts, strict=True)])
    assert records.shape == (len(sizes), rows, 8)
    parts = [
        pk.sample_from_shards(records, i, s, o, alpha, beta, seed, counter, exclude, return_entropy=entropy)
        for i, (s, o) in enumerate(zip(shards, starts, strict=True))
    ]
    return reduced(parts)


def score(z, sizes, tokens, alpha=4.0, beta=None, *, entropy=True):
    rows = z.shape[0]
    beta = per_row(alpha if beta is None else beta, rows).to(DEVICE)
    alpha, tokens = per_row(alpha, rows).to(DEVICE), per_row(tokens, rows, torch.int64).to(DEVICE)
    shards = zip(z.split(list(sizes), -1), offsets(sizes), strict=True)
    records = torch.stack([pk.shard_record(s.contiguous().to(DEVICE), beta, o, tokens) for s, o in shards])
    out = pk.score_from_shards(records, tokens, alpha, beta, return_entropy=entropy)
    return pk.ScoreOutput(*(None if column is None else column.cpu() for column in out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SPLITS, ids=len)
def test_shards_combined_are_the_whole_vocabulary(sizes, dtype):
    rows = 64
    alpha, beta = (torch.tensor(v).repeat(8) for v in zip(*EXPONENTS, strict=True))
    z, words = normal_logits(rows, 700, dtype, seed=1), counters(rows, 1)
    exclude = torch.randint(-1, 700, (rows,), generator=torch.Generator().manual_seed(1))
    exclude[:8] = z[:8].argmax(-1)
    exclude[8:10] = torch.tensor([700, 2**40])
    out = sample(z, sizes, alpha, beta, words, exclude)
    assert_sample(z, alpha, beta, words, exclude, out)
    assert (out.token != exclude)[10:].all()
    assert_sample(z, alpha, beta, words, None, sample(z, sizes, alpha, beta, words))
    tokens = torch.randint(-1, 701, (rows,), generator=torch.Generator().manual_seed(2))
    assert_score(z, tokens, alpha, beta, score(z, sizes, tokens, alpha, beta))


@pytest.mark.parametrize("sizes", SPLITS, ids=len)
def test_the_same_tokens_as_of_the_whole_rows(sizes):
    rows = 400
    z, words = normal_logits(rows, 700, seed=3), counters(rows, 3)
    whole = pk.sample_tokens(z, *(per_row(b, rows) for b in (4.0, 1.0)), torch.tensor([SEED]), words)
    # a uniform lies within 1e-6 of one of 700 boundaries with probability 1.4e-3
    assert (sample(z, sizes, 4.0, 1.0, words).token != whole.token).sum() <= 2
    everywhere = {int(np.searchsorted(np.cumsum(sizes), t, "right")) for t in whole.token.tolist()}
    assert len(everywhere) >= min(len(sizes), 2), "every draw was in one shard"


@pytest.mark.parametrize("sizes", SPLITS[1:], ids=len)
def test_shards_without_mass_and_hostile_rows(sizes):
    z = normal_logits(10, 700, seed=4)
    first, last = sizes[0], 700 - sizes[-1]
    z[0, :first] = -INF  # nothing in the first shard
    z[1, last:] = -INF  # nor in the last
    z[2, first:] = -INF  # only in the first
    z[3] = -INF
    z[4, last] = NAN
    z[5, 0] = INF
    z[6, 0], z[6, last] = INF, NAN
    z[7, :] = -INF
    z[7, 699] = 3.0  # one token, and it may not be drawn
    z[8, 5] += 80.0  # dominant, and it may not be drawn
    exclude = torch.tensor([-1] * 7 + [699, 5, -1])
    words = counters(10, 4)
    out = sample(z, sizes, 4.0, 2.5, words, exclude)
    want = [Status.OK] * 3 + [Status.NO_MASS, Status.NAN, Status.POS_INF, Status.NAN] + [Status.OK] * 3
    assert out.status.tolist() == want
    assert_sample(z, 4.0, 2.5, words, exclude, out)
    assert out.token[7] == 699
    tokens = torch.tensor([0, 699, 699, 1, 1, 1, 1, 0, 5, 700])
    assert_score(z, tokens, 4.0, 2.5, score(z, sizes, tokens, 4.0, 2.5))


def test_a_shard_that_holds_only_minus_infinity_changes_nothing():
    z, words = normal_logits(6, 300, seed=5), counters(6, 5)
    padded = torch.cat([z[:, :100], torch.full((6, 20), -INF), z[:, 100:]], -1)
    plain, out = sample(z, (100, 200), 4.0, 2.5, words), sample(padded, (100, 20, 200), 4.0, 2.5, words)
    assert (out.token - 20 * (out.token >= 120)).tolist() == plain.token.tolist()
    for ours, theirs in zip(out[1:5], plain[1:5], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)


def test_nearly_deterministic_rows_keep_their_digits_across_shards():
    gaps = torch.tensor([1.0, 20.0, 40.0, 80.0])
    z = torch.full((4, 40), -INF)
    z[:, 35], z[:, 3] = 3.0, 3.0 - gaps
    out = score(z, (10, 10, 20), 35, 4.0, 1.0)
    truth = -np.log1p(np.exp(-gaps.double().numpy()))
    np.testing.assert_allclose(out.logp.double().numpy(), truth, rtol=1.2e-7)
    np.testing.assert_allclose(out.weight.double().numpy(), 3 * truth, rtol=1.2e-7)


def test_uniforms_in_the_middle_of_each_entry_draw_that_entry():
    vocab = 200
    z = normal_logits(1, vocab, scale=0.5, seed=6)
    mass = np.exp(1.5 * z.double().numpy()[0])
    cdf = np.cumsum(mass) / mass.sum()
    words = counter_of_uniform(np.append(cdf - mass / mass.sum() / 2, 1 - 2.0**-53))
    out = sample(z.expand(vocab + 1, vocab), (50, 1, 80, 69), 4.0, 1.5, words)
    assert out.token.tolist() == [*range(vocab), vocab - 1]


def test_draws_follow_the_distribution_in_every_bin():
    stats = scipy_stats()
    draws, vocab = 20_000, 60
    z = normal_logits(1, vocab, scale=1.0, seed=7)
    words = torch.zeros(draws, 4, dtype=torch.int32)
    words[:, 0] = torch.arange(draws)
    out = sample(z.expand(draws, vocab), (7, 20, 33), 4.0, 1.0, words, 30, entropy=False)
    p = torch.softmax(z[0].double(), -1).numpy()
    p[30] = 0.0
    count = np.bincount(out.token.numpy(), minlength=vocab)
    assert count[30] == 0
    kept = np.arange(vocab) != 30
    assert stats.chisquare(count[kept], draws * p[kept] / p.sum()).pvalue > 1e-5


def test_a_row_with_its_own_seed_draws_what_it_draws_alone():
    z, words = normal_logits(1, 300, scale=1.0, seed=8).repeat(5, 1), counters(1, 8).repeat(5, 1)
    seeds = torch.arange(SEED, SEED + 5)
    together = sample(z, (100, 200), counter=words, seed=seeds)
    assert len(set(together.token.tolist())) > 1, "every seed drew the same"
    alone = [int(sample(z[i : i + 1], (100, 200), counter=words[:1], seed=int(s)).token) for i, s in enumerate(seeds)]
    assert together.token.tolist() == alone


@pytest.mark.parametrize("seed", [0, SEED, -1, -(2**63), 2**63 - 1])
def test_the_uniform_is_that_of_the_random_number_contract(seed):
    words = counters(100, 8)
    ours = token_uniform(torch.tensor([seed]).to(DEVICE), words.to(DEVICE)).cpu().numpy()
    np.testing.assert_array_equal(ours, rng.uniforms(words.numpy().view(np.uint32), seed)[:, 0])


def test_exponents_that_nobody_looked_at_are_reported_by_row(monkeypatch):
    for module in ("rows", "shards"):
        monkeypatch.setattr(f"power_kernels.ops.{module}.check_exponents", lambda **exponents: None)
    z = normal_logits(4, 30, seed=9)
    alpha, beta = torch.tensor([4.0, NAN, 4.0, 4.0]), torch.tensor([4.0, 4.0, 0.0, INF])
    want = [Status.OK, Status.NAN, Status.NAN, Status.NAN]
    assert sample(z, (10, 20), alpha, beta).status.tolist() == want
    assert score(z, (10, 20), 3, alpha, beta).status.tolist() == want


def test_no_rows_and_bad_arguments():
    assert [tuple(c.shape) for c in sample(torch.empty(0, 9), (4, 5))] == [(0,)] * 6
    z, one = torch.zeros(2, 4), torch.ones(2)
    record = pk.shard_record(z, one, 0)
    records, counter, seed = torch.stack([record, record]), torch.zeros(2, 4, dtype=torch.int32), torch.tensor([1])
    with pytest.raises(pk.ArgumentError, match=r"^shard is 2; it must lie in \[0, 2\)"):
        pk.sample_from_shards(records, 2, z, 0, one, one, seed, counter)
    with pytest.raises(pk.ArgumentTypeError, match=r"^offset is 0\.5, a float"):
        pk.shard_record(z, one, 0.5)
    with pytest.raises(pk.ArgumentError, match=r"^offset is -1"):
        pk.shard_record(z, one, -1)
    with pytest.raises(pk.ArgumentTypeError, match=r"^records has dtype torch\.float32"):
        pk.score_from_shards(records.float(), torch.zeros(2, dtype=torch.int64), one, one)
    with pytest.raises(pk.ArgumentError, match=r"^records has shape \[2, 2, 7\]"):
        pk.score_from_shards(records[..., :7], torch.zeros(2, dtype=torch.int64), one, one)
    with pytest.raises(pk.ArgumentError, match=r"^logits has shape \[1, 4\]; it must be \[2, \*\]"):
        pk.sample_from_shards(records, 0, z[:1], 0, one, one, seed, counter)


# ---------------------------------------------------------------------------------------------------------------
# Two processes: each has its part of the LM head and never sees the other's

ROWS, WIDTH, VOCAB, FIRST = 20, 16, 301, 120


def whole_head():
    generator = torch.Generator().manual_seed(10)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    return hidden, torch.randn(VOCAB, WIDTH, generator=generator)


def arguments():
    exclude = torch.arange(ROWS) * 17 % VOCAB
    return per_row(4.0, ROWS), per_row(1.5, ROWS), torch.tensor([SEED]), counters(ROWS, 10), exclude


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    hidden, lm_head = whole_head()
    offset, size = (0, FIRST) if rank == 0 else (FIRST, VOCAB - FIRST)
    lm_head = lm_head[offset : offset + size].clone()
    alpha, beta, seed, counter, exclude = arguments()

    # The fused head leaves the shard's logits in its scratch.
    logits, workspace = torch.empty(ROWS, size), torch.empty(pk.hidden_workspace_size(ROWS, size))
    unused = [torch.empty(ROWS, dtype=torch.int64), *(torch.empty(ROWS) for _ in range(3)), None]
    pk.sample_from_hidden_out(
        hidden, lm_head, None, alpha, beta, seed, counter, None, 0.0, 1.0,
        logits, workspace, *unused, torch.empty(ROWS, dtype=torch.int32),
    )  # fmt: skip

    def gathered(tokens):
        records = [torch.empty(ROWS, 8, dtype=torch.float64) for _ in range(2)]
        dist.all_gather(records, pk.shard_record(logits, beta, offset, tokens))
        return torch.stack(records)

    drawn = pk.sample_from_shards(gathered(exclude), rank, logits, offset, alpha, beta, seed, counter, exclude)
    floats = torch.stack([drawn.logp, drawn.logq, drawn.weight])
    dist.all_reduce(drawn.token, dist.ReduceOp.MAX)
    dist.all_reduce(floats, dist.ReduceOp.MAX)
    scored = pk.score_from_shards(gathered(drawn.token), drawn.token, alpha, beta)
    torch.save([drawn.token, *floats, *scored[:3], drawn.status], f"{folder}/{rank}")
    dist.destroy_process_group()


@host_only
def test_two_processes_agree_with_one(tmp_path):
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "the ranks disagree"
    hidden, lm_head = whole_head()
    whole = pk.sample_from_hidden(hidden, lm_head, *arguments())
    token, logp, logq, weight, *scored, status = first
    assert token.tolist() == whole.token.tolist()
    assert status.tolist() == [Status.OK] * ROWS
    assert 0 < (token < FIRST).sum() < ROWS, "one rank drew everything"
    for ours, again, theirs in zip((logp, logq, weight), scored, whole[1:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert torch.equal(ours, again), "a score is not that of the draw"
