"""The microbenchmarks measure what they say: the bytes of their formulas, the same work by every contender, all of it
counted."""

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels.api.bench import attention, chain, kv_cache, lm_head, logits, paged_kv, particles, slots
from power_kernels.api.bench.harness import Point
from power_kernels.api.bench.opponents import add_library
from power_kernels.api.bench.options import GRIDS, OPS
from power_kernels.api.bench.run import SUITES
from power_kernels.slots import SlotField
from power_kernels.state import Cost

CPU = torch.device("cpu")
INT32, INT64, FLOAT64 = torch.int32, torch.int64, torch.float64


def nbytes(*tensors: tuple) -> int:
    """Of tensors given as (dtype, sizes...)."""
    return sum(torch.empty(shape, dtype=dtype).nbytes for dtype, *shape in tensors)


# ---- byte formulas, against the tensors that go in and come out


def test_bytes_of_mh_accept():
    b, t = 3, 5
    weights = [(torch.float32, b, t)] * 2
    rows = [(INT32, b), (INT32, b), (FLOAT64, b), (torch.bool, b), (FLOAT64, b), (INT32, b)]
    assert chain.accept_bytes(b, t) == nbytes(*weights, *rows) == 8 * b * t + 29 * b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_sampling_and_scoring(dtype):
    b, v, d = 3, 7, 4
    exponents, seed, counter = [(torch.float32, b)] * 2, (INT64, 1), (INT32, b, 4)
    results = [(torch.float32, b)] * 3 + [(INT32, b)]
    token, logit, head = (INT64, b), (dtype, b, v), [(dtype, v, d), (dtype, b, d)]
    item = dtype.itemsize
    assert logits.sample_bytes(b, v, item) == nbytes(logit, *exponents, seed, counter, token, *results)
    assert logits.score_bytes(b, v, item) == nbytes(logit, *exponents, token, *results)
    assert lm_head.head_bytes(b, d, v, item, 48, 8) == nbytes(*head, *exponents, seed, counter, token, *results)
    assert lm_head.head_bytes(b, d, v, item, 32) == nbytes(*head, *exponents, token, *results)


def test_bytes_of_a_step_by_slot():
    b, v = 3, 7
    vectors = [(INT64, b), (INT64, b), (torch.bool, b)]
    read = [(INT64, b, len(SlotField)), (torch.float32, b, 2), (FLOAT64, b, 2), (FLOAT64, b)]
    written = [(FLOAT64, b), (INT64, b), (torch.float32, b, 3), (INT64, b)]
    want = nbytes((torch.bfloat16, b, v), *vectors, *read, *written)
    assert slots.step_bytes(b, v, 2) == want == 2 * b * v + 173 * b


def test_bytes_of_a_position_of_particles():
    n, v = 4, 7
    rows = [(FLOAT64, n + 1), (INT32, n + 1)]
    group = [(torch.float32,), (INT64,), (torch.bool,), (FLOAT64,), (FLOAT64, 2), (FLOAT64, 4)]
    children = [(INT32, n + 1), (INT64, n + 1), (FLOAT64, n + 1), (FLOAT64, n + 1), (INT32, n + 1), (INT32, n + 1)]
    written = [(INT64, 2), (FLOAT64,), (FLOAT64, 4), (FLOAT64,)]
    want = nbytes((torch.bfloat16, n, v), *rows, *group, *children, *written)
    assert particles.position_bytes(n, v, 2) == want == 2 * n * v + 48 * (n + 1) + 133


def test_bytes_of_copies():
    """2 groups of 3 heads of 8 bf16: a position is 96 bytes, read and written; a range or copy is 16."""
    assert kv_cache.copy_bytes(2, 3, 8, 2, positions=5, ranges=4) == 5 * 2 * 96 + 4 * 16
    assert paged_kv.copy_bytes(2, 3, 8, 2, positions=5, copies=4) == 5 * 2 * 96 + 4 * 16
    point = Point("kv_copy_ranges", torch.bfloat16, dict(groups=2, heads=3, width=8, rows=5, suffix=16))
    work = kv_cache.build(point, CPU)
    assert work.bytes == work.count * 2 * 96 + 5 * 16


def test_bytes_of_decode_attention():
    """Lanes of 1 and 5 positions, 4 heads over 2 of 8 bf16: a position is 64 bytes, query and result 64 a lane each."""
    assert attention.attention_bytes(3, 4, 2, 8, 2, [1, 5]) == 3 * (6 * 64 + 2 * 128) + 16
    shape = dict(layers=3, heads=4, kv_heads=2, width=8, rows=2, shortest=1, mean=3, longest=5)
    work = attention.build(Point("decode_attention", torch.bfloat16, shape), CPU)
    assert (work.bytes, work.count) == (3 * (6 * 64 + 2 * 128) + 16, 6)
    for point in attention.points("full", "cpu") + attention.points("default", "cuda"):
        lengths = attention.lane_lengths(*(point.shape[name] for name in ("rows", "shortest", "longest")))
        assert sum(lengths) // len(lengths) == point.shape["mean"]


def test_bytes_of_mh_advance():
    """By hand: a lane 64 of fields, 20 sampled, 16 appended, 16 read, 56 emitted; a chain 128 of fields, 16 of plan."""
    assert chain.advance_bytes(1, 1) == chain.STEPS * (64 + 20 + 16 + 16 + 56 + 144)
    assert chain.advance_bytes(3, 2) == chain.STEPS * 3 * (2 * 172 + 144)


def test_bytes_of_a_cycle_of_block_tables():
    """Two chains of two blocks, cut at 8 and 24: the first shares none and is committed, the second shares one."""
    assert paged_kv.cuts(2, 32) == [8, 23]
    first = 16 * 2 + 32 + 16 * 2
    second = (12 + 16) + 32 + (12 + 16)
    assert paged_kv.tables_bytes(2, 32) == first + second


# ---- contenders do the same work


def outputs(suite, shape: dict, dtype, names) -> tuple[dict, object]:
    work = suite.build(Point(suite.op, dtype, shape), CPU)
    return {name: work.contenders[name]() for name in names}, work


def test_contenders_of_mh_accept_decide_alike():
    out, _ = outputs(chain.ACCEPT, dict(rows=64, tokens=37), torch.float32, ("mh_accept", "eager", "eager, cumsum"))
    ours = out.pop("mh_accept")
    assert 0 < int(ours.accept.sum()) < 64
    for accept, log_ratio in out.values():
        torch.testing.assert_close(log_ratio, ours.log_ratio, rtol=0, atol=1e-9)
        assert torch.equal(accept, ours.accept)


def test_contenders_of_scoring_agree():
    """Among them the mathematics that torch.compile is given. float32: 1e-4 nats of sums over 1000 entries."""
    point = Point("score_tokens", torch.float32, dict(rows=3, vocab=1000))
    work = logits.SCORE.build(point, CPU)
    ours, eager = work.contenders["score_tokens"](), work.contenders["eager"]()
    z = logits.normal_logits(3, 1000, torch.float32, CPU)
    four = torch.full((3, 1), logits.ALPHA)
    token = ((torch.arange(3) * 7919) % 1000)[:, None]
    for other in (eager, logits.log_probabilities(z, four, four, token)):
        for mine, theirs in zip(ours[:3], other, strict=True):
            torch.testing.assert_close(mine, theirs[:, 0], rtol=0, atol=1e-4)


def test_contenders_of_sampling_return_the_quantities_of_their_token():
    z = logits.normal_logits(4, 1000, torch.float32, CPU)
    four, uniform = torch.full((4, 1), logits.ALPHA), torch.linspace(0.01, 0.99, 4)[:, None]
    torch.manual_seed(0)
    for token, *quantities in (
        logits.same_mathematics(z, four, four, uniform),
        logits.eager_sample(z, four, four),
        logits.eager_race(z, four, four),
    ):
        exact = pk.score_tokens(z, token[:, 0], four[:, 0], four[:, 0])
        for mine, theirs in zip(exact[:3], quantities, strict=True):
            torch.testing.assert_close(mine, theirs[:, 0], rtol=0, atol=1e-4)


def test_contenders_of_a_step_by_slot_agree():
    """The composed step draws, sums and rejects as the operator does, where the bound decides for some rows."""
    z, rows = logits.normal_logits(6, 1000, torch.float32, CPU), torch.arange(6)
    tables = [slots.table_of(6, CPU) for _ in range(2)]
    for table in tables:
        table.bound[::2, 0] = 0.0
        table.bound[1, 1] = 0.5
    arguments = (z, rows, torch.full((6,), slots.BASE + 5), rows < 5)
    ours = pk.sample_slots(tables[0], *arguments)
    log_n = torch.arange(slots.HORIZON + 2, dtype=torch.float64).clamp(min=1).log()
    token, values, flags = slots.composed(tables[1], log_n, *arguments)
    assert torch.equal(ours.flags, flags)
    assert flags.tolist() == [8, 0, 8, 0, 8, 0]
    assert torch.equal(ours.token, token)
    assert torch.equal(ours.values, values)
    assert torch.equal(tables[0].cumw, tables[1].cumw)
    drawn, logp = slots.softmax_step(z, torch.ones(6, 1), race=True)
    torch.testing.assert_close(logp, z.log_softmax(-1).gather(1, drawn))


def test_contenders_of_a_position_of_particles_agree():
    """The composed draw finds the same children, in another order, with the same weights."""
    names = ("branch_particles", "composed")
    out, _ = outputs(particles.BRANCH, dict(particles=8, vocab=3000), torch.float32, names)
    ours, (parent, token, weight) = out["branch_particles"], out["composed"]
    taken = ours.token[0] >= 0
    mine = sorted(zip(*(c[0][taken].tolist() for c in (ours.parent, ours.token, ours.log_weight)), strict=True))
    theirs = sorted(zip(parent.tolist(), token.tolist(), weight.tolist(), strict=True))
    assert len(mine) == 8
    assert [child[:2] for child in mine] == [child[:2] for child in theirs]
    np.testing.assert_allclose([child[2] for child in mine], [child[2] for child in theirs], rtol=0, atol=1e-5)


def test_contenders_of_the_lm_head_agree():
    names = ("score_from_hidden", "linear + score_tokens", "linear + eager")
    out, _ = outputs(lm_head.SCORE, dict(rows=5, width=16, vocab=300), torch.float32, names)
    ours = out["score_from_hidden"]
    for name in names[1:]:
        for mine, theirs in zip(ours[:3], out[name][:3], strict=True):
            torch.testing.assert_close(mine, theirs.view(-1), rtol=0, atol=1e-4)


def test_contenders_of_decode_attention_agree():
    """Five lanes from 3 to 70 positions, three layers with KV of their own."""
    shape = dict(layers=3, heads=6, kv_heads=2, width=16, rows=5, shortest=3, mean=36, longest=70)
    out, _ = outputs(attention.DECODE, shape, torch.float32, attention.DECODE.core)
    ours = out.pop("decode_attention")
    assert len(ours) == 3
    assert not torch.allclose(ours[0], ours[1])
    for other in out.values():
        for mine, theirs in zip(ours, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("suite", "shape", "written"),
    [
        (kv_cache.COPY, dict(groups=2, heads=3, width=8, rows=5, suffix=16), "dst"),
        (paged_kv.COPY, dict(groups=2, heads=3, width=8, copies=5), "pool"),
    ],
    ids=["kv_copy_ranges", "kv_copy_blocks"],
)
def test_copies_write_the_same_positions(suite, shape, written, monkeypatch):
    """Each contender starts from what was there before; sources hold distinct numbers."""
    made = []
    ones = torch.ones

    def numbered(*size, **options):
        made.append(ones(*size, **options))
        return made[-1].copy_(torch.arange(made[-1].numel()).view(made[-1].shape) % 251)

    monkeypatch.setattr(torch, "ones", numbered)
    results = []
    for name in suite.core:
        made.clear()
        zeros = []
        with monkeypatch.context() as patch:
            plain = torch.zeros
            patch.setattr(torch, "zeros", lambda *a, **o: zeros.append(plain(*a, **o)) or zeros[-1])  # noqa: B023
            work = suite.build(Point(suite.op, torch.bfloat16, shape), CPU)
        target = (zeros if written == "dst" else made)[0]
        before = target.clone()
        work.contenders[name]()
        assert not torch.equal(target, before), name
        results.append(target.clone())
    assert all(torch.equal(r, results[0]) for r in results)


# ---- all of it is counted


def test_every_call_of_mh_advance_moves_every_lane():
    """One lane a chain, none waits: a launch forwards one token a chain."""
    state, advance, unchecked = chain.running_chains(5, 1, CPU)
    for call in (advance, unchecked):
        before = state.cost[:, : Cost.SAVED_PREFIX].sum()
        call()
        assert int(state.cost[:, : Cost.SAVED_PREFIX].sum() - before) == chain.STEPS * 5
    assert (state.outcome == 2).any()
    assert (state.outcome[:, 1:100] == 0).any()


def test_opponents_of_mh_advance_run_the_same_chain():
    """The vectorised step and the loop on the host, on the same numbers: the same inputs after every call."""
    chains = 6
    steps = chain.sampled_steps(chains, CPU)
    uniforms = list(torch.rand(chain.STEPS, 2, chains, dtype=FLOAT64, generator=torch.Generator().manual_seed(3)))
    state = chain.vectorised_state(chains, CPU)
    loop = chain.host_loop(chains, steps, uniforms, CPU)
    for _ in range(200):
        for (token, logq, weight, _), uniform in zip(steps, uniforms, strict=True):
            chain.vectorised_step(state, token, logq, weight, uniform)
        assert torch.equal(loop()[-1], state["input"])
    assert int(state["steps"].sum()) > 30
    changed = (state["token"] != chain.vectorised_state(chains, CPU)["token"]).any(1)
    assert int(changed.sum()) >= 3  # proposals were accepted, not only rejected


def test_a_cycle_of_block_tables_ends_where_it_began_and_shares_on_the_way():
    work = paged_kv.TABLES.build(Point("block_table_fork", INT32, dict(chains=4, tokens=64)), CPU)
    work.contenders[work.ours]()
    work.check()
    pool = paged_kv.HostPool(4, 64)
    before = len(pool.free)
    forked, copies = pool.cycle(paged_kv.cuts(4, 64))
    assert len(pool.free) == before
    assert all(len(row) == 4 for row in forked)
    assert [stop for *_, stop in copies] == [cut % paged_kv.BLOCK for cut in paged_kv.cuts(4, 64)]
    assert sorted(b for row in pool.rows for b in row) == [b for b, n in enumerate(pool.count) if n == 1]


# ---- grids


def test_grids_hold_the_sizes_of_real_models():
    assert tuple(suite.op for suite in SUITES) == OPS  # the option's names, known without torch
    points = [p for suite in SUITES for device in ("cpu", "cuda") for p in suite.points("full", device)]
    assert {p.shape["vocab"] for p in points if p.op == "sample_tokens"} == set(logits.VOCABULARIES)
    assert {p.shape["width"] for p in points if "width" in p.shape and "vocab" in p.shape} >= {576, 3584, 4096, 8192}
    assert {p.shape["rows"] for p in points if p.op == "score_tokens"} == {1, 4, 16, 64, 256, 1024}
    assert max(p.shape["tokens"] for p in points if p.op == "mh_accept") == 3072


@pytest.mark.parametrize("grid", GRIDS)
def test_every_suite_has_points_in_every_grid_and_compiles_none_of_the_quick(grid):
    for suite in SUITES:
        for device in ("cpu", "cuda"):
            points = suite.points(grid, device)
            assert points
            assert len({str(p) for p in points}) == len(points)
            assert grid != "quick" or not any(p.compiled for p in points)


def test_a_library_that_is_not_there_is_reported():
    work = logits.SCORE.build(Point("score_tokens", torch.float32, dict(rows=1, vocab=10)), CPU)
    assert "needs a CUDA device" in work.missing["Liger cross_entropy"]
    add_library(work, "nobody", "a_package_that_nobody_has", lambda module: None, torch.device("cuda"))
    add_library(work, "changed", "math", lambda module: module.no_such_function, torch.device("cuda"))
    assert work.missing["nobody"] == "not installed"
    assert "AttributeError" in work.missing["changed"]
    assert not {"nobody", "changed"} & set(work.contenders)
