"""Power sampling on a paged cache: the chains are those of the engine with rows of their own (DESIGN 5.7, 6)."""

from __future__ import annotations

import pytest
import torch

import power_kernels as pk
from power_kernels.api import PowerConfig, PowerSampler, UnsupportedModelError
from power_kernels.api.commands import paged_demo
from power_kernels.api.engines.huggingface.paged import PagedEngine
from power_kernels.api.engines.huggingface.paged_rows import OutOfBlocksError
from power_kernels.api.engines.huggingface.ragged_attention import NAME
from tests import tiny_models
from tests.devices import DEVICE
from tests.test_paged_kv import audit

# One token, a prompt twice (the second shares the first one's blocks), one that ends inside a block of 3 and of 16.
PROMPTS = [[5, 6, 7, 8, 9], [3], [5, 6, 7, 8, 9], list(range(20, 43))]
RUN = {"num_chains": 2, "seed": 1, "eos_token_id": [2], "max_chains": 3}  # 8 chains in 3 slots: chains move and refill


def config(**changes) -> PowerConfig:
    return PowerConfig(
        **{"alpha": 2.0, "temperature": 0.7, "max_new_tokens": 24, "block_size": 12, "mcmc_steps": 6, **changes}
    )


class AuditedEngine(PagedEngine):
    """Looks at every block after every call."""

    def prefill(self, slots, prompts):
        forwarded = super().prefill(slots, prompts)
        audit(self.kv.tables)
        return forwarded

    def transfer(self, commit_range, open_range):
        super().transfer(commit_range, open_range)
        audit(self.kv.tables)

    def move(self, source, target):
        super().move(source, target)
        audit(self.kv.tables)

    def _forward(self, module, view, input_ids, position_ids, write, read):
        audit(self.kv.tables)
        assert (self.kv.tables.refcount[write // self.block_size] == 1).all(), "a block is written while it is shared"
        return super()._forward(module, view, input_ids, position_ids, write, read)


@pytest.fixture(scope="module")
def model():
    return tiny_models.llama().to(DEVICE)


def summary(results) -> list:
    fields = ("prompt_id", "chain_id", "tokens", "steps", "accepted", "unchanged", "outcomes", "finish")
    return [tuple(getattr(result, field) for field in fields) for result in results]


# blocks of 1: nothing is ever split; 3: no power of two; 16: whole prompts inside one block
@pytest.mark.parametrize(("lanes", "block_size"), [(1, 3), (3, 1), (3, 3), (3, 16)])
def test_chains_on_shared_blocks_are_those_on_rows_of_their_own(model, lanes, block_size):
    run = config(lanes=lanes)
    slabs = PowerSampler(model).generate(PROMPTS, run, **RUN)
    engine = AuditedEngine(model, block_size=block_size)
    paged = PowerSampler(engine).generate(PROMPTS, run, **RUN)
    assert summary(paged) == summary(slabs)
    for ours, theirs in zip(paged, slabs, strict=True):
        assert ours.log_weights == pytest.approx(theirs.log_weights, abs=1e-4)
    assert sum(r.accepted for r in paged) >= 10
    counts = engine.counts
    assert counts.shared > 0
    assert (counts.copied == 0) == (block_size == 1)
    # a fork copies less than one block, so blocks longer than the answers save nothing
    assert block_size == 16 or counts.copied < counts.slab_copied


@pytest.mark.parametrize("changes", [{"free_prefix": False}, {"early_rejection": False}, {"final_steps": 3}])
def test_the_other_forms_of_the_law_need_nothing_else(model, changes):
    run = config(lanes=2, **changes)
    slabs = PowerSampler(model).generate(PROMPTS[:2], run, **RUN)
    paged = PowerSampler(AuditedEngine(model, block_size=4)).generate(PROMPTS[:2], run, **RUN)
    assert summary(paged) == summary(slabs)
    assert sum(r.accepted for r in paged) >= 3


def test_a_pool_of_fewer_blocks_than_rows_could_need_is_enough_where_rows_share(model):
    run = config(lanes=3, block_size=None)
    whole = AuditedEngine(model, block_size=3)
    want = PowerSampler(whole).generate(PROMPTS[3:], run, **RUN)
    enough = int(whole.counts.peak_blocks)
    assert enough * 3 < whole.counts.slab_tokens
    small = AuditedEngine(model, block_size=3, num_blocks=enough)
    assert summary(PowerSampler(small).generate(PROMPTS[3:], run, **RUN)) == summary(want)


def test_a_pool_that_is_too_small_is_an_error_that_leaves_model_and_engine_ready(model):
    before = model.config._attn_implementation
    engine = PagedEngine(model, block_size=4, num_blocks=9)
    with pytest.raises(OutOfBlocksError, match=r"no block is left for rows \[.*\]; the pool has 9 of 4 positions"):
        PowerSampler(engine).generate(PROMPTS, config(), **RUN)
    assert model.config._attn_implementation == before != NAME
    assert engine.kv is None
    engine.num_blocks = None
    assert len(PowerSampler(engine).generate(PROMPTS[:1], config(mcmc_steps=1), seed=1)) == 1


def test_a_row_with_bad_logits_does_not_spoil_those_that_share_its_blocks(model):
    """A token whose embedding is NaN stops the chains that feed it, and no other, as with rows of their own."""
    weights = model.get_input_embeddings().weight
    kept = weights[68].clone()
    with torch.no_grad():
        weights[68] = float("nan")
    try:
        slabs = PowerSampler(model).generate(PROMPTS, config(lanes=2), **RUN)
        paged = PowerSampler(AuditedEngine(model, block_size=3)).generate(PROMPTS, config(lanes=2), **RUN)
    finally:
        with torch.no_grad():
            weights[68] = kept
    finishes = [r.finish for r in paged]
    assert "fault" in finishes
    assert any(r.finish != "fault" and r.accepted for r in paged)
    assert summary(paged) == summary(slabs)


def test_what_a_bad_row_wrote_is_gone_before_another_row_reads_its_block_masked(model):
    """A masked NaN spoils all the same: 0 * NaN is NaN. The row goes back before the bad position, its batchmate is
    ahead, so that the whole block is read."""
    weights = model.get_input_embeddings().weight
    kept = weights[68].clone()
    engine = PagedEngine(model, block_size=8)
    engine.begin(chains=1, lanes=2, max_length=16, alpha=2.0, beta=2.0, seed=0)
    state = pk.ChainState.allocate(1, 2, pk.Law(max_new_tokens=8, block_size=8, mcmc_steps=1), DEVICE)
    state.exclude.fill_(-1)

    def step(tokens, positions):
        state.input_id.copy_(torch.tensor(tokens))
        state.position.copy_(torch.tensor(positions))
        return engine.step(state).status.tolist()

    try:
        with torch.no_grad():
            weights[68] = float("nan")
        engine.prefill([0], [[5, 6]])
        nothing = torch.zeros(1, 4, dtype=torch.int32, device=DEVICE)
        opens = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 1]], dtype=torch.int32, device=DEVICE)
        engine.transfer(nothing, opens)
        assert step([6, 6], [1, 1]) == [pk.Status.OK] * 2
        assert step([68, 7], [2, 2]) == [pk.Status.NAN, pk.Status.OK]
        assert torch.isfinite(engine.kv.pool).all()
        assert step([6, 8], [1, 3]) == [pk.Status.OK] * 2
    finally:
        engine.end()
        with torch.no_grad():
            weights[68] = kept


@pytest.mark.parametrize("name", ["mistral", "mixed_qwen2", "gemma2", "phi3", "dynamic_llama"])
def test_models_that_the_example_does_not_compute_are_refused(name):
    with pytest.raises(UnsupportedModelError, match=r"this example takes llama, qwen2, qwen3 with full attention"):
        PagedEngine(tiny_models.FAMILIES[name]())


def test_the_demonstration_draws_the_same_chains_and_counts(capsys):
    arguments = ["--tiny", "--check", "--alpha", "1.5", "--max-new-tokens", "24", "--kv-block", "4"]
    assert paged_demo.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "the same chains on rows of their own: yes" in printed
    assert "forks shared" in printed
    assert "saved" in printed


def test_the_demonstration_says_when_chains_differ_and_when_blocks_run_out(capsys, monkeypatch):
    short = ["--tiny", "--max-new-tokens", "6", "--block-size", "6", "--steps", "1"]
    assert paged_demo.main([*short, "--kv-blocks", "3"]) == 1
    assert "no block is left" in capsys.readouterr().err
    monkeypatch.setattr(paged_demo, "same_chains", lambda ours, theirs: False)
    assert paged_demo.main([*short, "--check"]) == 1
    assert "rows of their own: NO" in capsys.readouterr().out


def test_chains_that_differ_in_one_step_are_not_the_same(model):
    results = PowerSampler(model).generate(PROMPTS[:1], config(mcmc_steps=2), num_chains=2, seed=1)
    assert paged_demo.same_chains(results, results)
    assert not paged_demo.same_chains(results, results[::-1])


def test_an_engine_keeps_the_past_of_one_run(model):
    engine = PagedEngine(model)
    assert isinstance(engine, pk.api.Engine)
    stream = PowerSampler(engine).stream(PROMPTS[:1], config(mcmc_steps=1), num_chains=2, seed=1)
    next(stream)
    with pytest.raises(pk.api.EngineBusyError):
        PowerSampler(engine).generate(PROMPTS[:1], config(mcmc_steps=1), seed=1)
    assert len(list(stream)) == 1
    assert engine.kv is None
