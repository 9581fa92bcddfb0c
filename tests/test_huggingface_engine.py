"""The transformers engine against plain forward passes of the untouched model (DESIGN section 6).

`Script` plays what `mh_advance` decides: it feeds lanes, opens them at earlier divergences, commits them, admits, moves
and drops chains, at random, and knows which tokens every row stands for. After each step the logits of all fed rows
are compared with a full forward pass over those tokens.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import power_kernels as pk
from power_kernels.api import PowerConfig, PowerSampler
from power_kernels.api.driver.engine import Engine, UnsupportedModelError
from power_kernels.api.engines.huggingface import HuggingFaceEngine, lm_head
from power_kernels.api.engines.huggingface.decode_attention import FLASH, PADDED, ROWS
from power_kernels.api.engines.huggingface.length_bound import LengthBound
from power_kernels.api.engines.huggingface.patches import Patches
from power_kernels.api.engines.huggingface.ragged_cache import KvLayout, KvSlabs
from power_kernels.api.engines.huggingface.rope import pin_rope
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.law import Law
from power_kernels.state import ChainField, ChainState, LaneField, LaneStatus, Mode, Status
from tests import flash_attention, tiny_models
from tests.devices import DEVICE, ON_CUDA

MAX_LENGTH = 32  # five windows; below the longrope threshold
TOLERANCE = 1e-4  # of the largest logit


def run(engine: HuggingFaceEngine, chains: int, lanes: int, max_length: int = MAX_LENGTH) -> ChainState:
    engine.begin(chains=chains, lanes=lanes, max_length=max_length, alpha=2.0, beta=2.0, seed=7)
    law = Law(max_new_tokens=max_length, block_size=8, mcmc_steps=1)
    state = ChainState.allocate(chains, lanes, law, DEVICE)
    state.lane_field[:, LaneField.STATUS] = int(LaneStatus.RUNNING)  # or they need not be fed
    return state


def ranges(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def plain_logits(model, sequences: list[list[int]], max_length: int) -> torch.Tensor:
    """Logits after each sequence. All are padded on the right to max_length, which chooses a rotary regime."""
    ids = torch.tensor([tokens + [0] * (max_length - len(tokens)) for tokens in sequences], device=DEVICE)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.stack([logits[i, len(tokens) - 1] for i, tokens in enumerate(sequences)])


def decoded(engine, state) -> torch.Tensor:
    """The logits [rows, V] that the engine would sample from."""
    return engine._logits(engine._fed(state, engine.prepare(state)))


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error <= tolerance, f"relative error {error:.2g}"


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, tiny_models.VOCAB), k=length)


class Script:
    """Chains and lanes as token lists, played on an engine."""

    def __init__(self, engine, reference, *, chains, lanes, max_length=MAX_LENGTH, seed=0, tolerance=TOLERANCE):
        self.engine, self.reference, self.max_length = engine, reference, max_length
        self.tolerance = tolerance
        self.state = run(engine, chains, lanes, max_length)
        self.lanes, self.random = lanes, random.Random(seed)
        self.active = 0
        self.chain: list[list[int]] = [[] for _ in range(chains)]  # all but the last token have K and V
        self.base = [0] * chains
        rows = chains * lanes
        self.fed: list[list[int]] = [[] for _ in range(rows)]  # what each lane's row holds, all with K and V
        self.valid = [0] * rows
        self.div = [0] * rows
        self.running = [False] * rows
        self.counts = dict.fromkeys(("compared", "open", "commit", "rollback"), 0)

    def token(self) -> int:
        return self.random.randrange(3, tiny_models.VOCAB)

    def admit(self, prompts: list[list[int]]) -> list[int]:
        slots = list(range(self.active, self.active + len(prompts)))
        forwarded = self.engine.prefill(slots, prompts)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.chain[slot], self.base[slot] = list(prompt), len(prompt)
            for lane in self.lanes_of(slot):
                self.fed[lane], self.valid[lane], self.running[lane] = [], 0, False
        self.active += len(prompts)
        return forwarded

    def lanes_of(self, slot: int) -> range:
        return range(slot * self.lanes, (slot + 1) * self.lanes)

    def drop(self, slot: int) -> None:
        """End a chain; the last active one takes its slot."""
        self.active -= 1
        if slot == self.active:
            return
        self.engine.move(self.active, slot)
        self.chain[slot], self.base[slot] = self.chain[self.active], self.base[self.active]
        for target, source in zip(self.lanes_of(slot), self.lanes_of(self.active), strict=True):
            for values in (self.fed, self.valid, self.div, self.running):
                values[target] = values[source]

    def play(self) -> None:
        """One round: some lanes commit, some open, then all are fed and compared."""
        commits = [[c, 0, 0, 0] for c in range(self.active)]
        opens = [[lane, lane // self.lanes, 0, 0] for lane in range(self.active * self.lanes)]
        for slot in range(self.active):
            ready = [x for x in self.lanes_of(slot) if self.running[x] and len(self.fed[x]) >= self.div[x]]
            longest = max(ready, key=lambda lane: len(self.fed[lane]), default=None)
            if ready and self.random.random() < 0.3:
                commits[slot] = self.commit(slot, self.random.choice([longest, *ready]))
            for lane in self.lanes_of(slot):
                full = len(self.fed[lane]) >= self.max_length
                if not self.running[lane] or full or self.random.random() < 0.2:
                    opens[lane] = self.open(slot, lane)
        self.engine.transfer(ranges(commits), ranges(opens))
        self.feed()

    def commit(self, slot: int, lane: int) -> list[int]:
        tokens, div, length = self.fed[lane], self.div[lane], len(self.chain[slot])
        self.chain[slot] = [*tokens, self.token()][: self.max_length]
        for other in self.lanes_of(slot):
            self.valid[other] = min(self.valid[other], div)
            self.running[other] = False
        self.valid[lane] = len(self.chain[slot]) - 1
        self.counts["commit"] += 1
        return [slot, lane, min(div, length - 1), len(self.chain[slot]) - 1]

    def open(self, slot: int, lane: int) -> list[int]:
        div = self.random.randint(self.base[slot], len(self.chain[slot]))
        start, stop = self.valid[lane], div - 1
        self.counts["open"] += 1
        self.counts["rollback"] += len(self.fed[lane]) > stop
        self.fed[lane], self.div[lane], self.running[lane] = self.chain[slot][:stop], div, True
        self.valid[lane] = stop
        return [lane, slot, start, max(start, stop)]

    def feed(self) -> None:
        rows = range(self.active * self.lanes)
        for lane in rows:
            held = len(self.fed[lane])
            if self.running[lane]:
                token = self.chain[lane // self.lanes][held] if held < self.div[lane] else self.token()
                self.fed[lane].append(token)
                self.state.input_id[lane], self.state.position[lane] = token, held
            else:  # an idle lane is fed where nothing is trusted
                self.state.input_id[lane], self.state.position[lane] = 0, self.valid[lane]
        logits = decoded(self.engine, self.state.first(self.active))
        assert logits.shape == (len(rows), self.engine.vocab_size)
        compared = [lane for lane in rows if self.running[lane]]
        want = plain_logits(self.reference, [self.fed[lane] for lane in compared], self.max_length)
        assert_close(logits[compared], want, self.tolerance)
        self.counts["compared"] += len(compared)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_ragged_rows_have_the_logits_of_plain_forward_passes(family):
    """Rollbacks, commits, reused and moved slots, a shrinking batch: whatever happened, a row is its own tokens."""
    build = tiny_models.FAMILIES[family]
    script = Script(HuggingFaceEngine(build()), build(), chains=3, lanes=2)
    # Prompts of one token (nothing to prefill), shorter and longer than a window.
    script.admit([prompt_of(1, 1), prompt_of(4, 2), prompt_of(13, 3)])
    for _ in range(14):
        script.play()
    script.drop(0)  # the last slot moves to the first, the batch is smaller
    for _ in range(4):
        script.play()
    script.admit([prompt_of(9, 4)])  # a slot that held another chain
    for _ in range(8):
        script.play()
    script.engine.end()
    counts = script.counts
    assert counts["compared"] >= 120
    assert counts["rollback"] >= 10
    assert counts["commit"] >= 8
    assert max(map(len, script.chain)) > 2 * tiny_models.WINDOW


@pytest.mark.parametrize("max_length", [tiny_models.LONGROPE_ORIGINAL, tiny_models.LONGROPE_ORIGINAL + 1])
def test_longrope_regime_is_that_of_the_run(max_length):
    """The frequencies follow max_length, not the longest row: here all rows are short."""
    model, reference = tiny_models.phi3(), tiny_models.phi3()
    engine = HuggingFaceEngine(model)
    short, long = (
        plain_logits(reference, [prompt_of(5, 1)], n)
        for n in (tiny_models.LONGROPE_ORIGINAL, tiny_models.LONGROPE_ORIGINAL + 1)
    )
    assert (short - long).abs().max() > 0.01 * short.abs().max()
    script = Script(engine, reference, chains=2, lanes=1, max_length=max_length)
    script.admit([prompt_of(5, 1), prompt_of(8, 2)])
    for _ in range(6):
        script.play()


def test_dynamic_rope_is_held_at_the_original_frequencies():
    model, reference = tiny_models.dynamic_llama(), tiny_models.dynamic_llama()
    plain_logits(model, [prompt_of(5, 1)], tiny_models.CONTEXT + 8)  # leaves grown frequencies behind
    rope = model.model.rotary_emb
    grown = rope.inv_freq
    assert not torch.equal(grown, rope.original_inv_freq)
    script = Script(HuggingFaceEngine(model), reference, chains=2, lanes=1)
    script.admit([prompt_of(5, 1), prompt_of(8, 2)])
    for _ in range(4):
        script.play()
    assert rope.inv_freq is grown
    assert rope.rope_type == "dynamic"
    with pytest.raises(UnsupportedModelError, match="change beyond 96 positions"):
        pin_rope(model, tiny_models.CONTEXT + 1, Patches())


def test_rotary_schemes_that_are_not_known_are_refused():
    model = tiny_models.llama()
    model.model.rotary_emb.rope_type = "spiral"
    with pytest.raises(UnsupportedModelError, match="'spiral'"):
        HuggingFaceEngine(model)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3"])
def test_prefill_does_not_depend_on_the_chunk(family):
    """Chunks of one token, chunks that cut prompts anywhere, one chunk for all."""
    prompts = [prompt_of(n, n) for n in (1, 2, 7, 12, 17)]
    held = []
    for chunk in (1, 3, 8, 1000):
        engine = HuggingFaceEngine(tiny_models.FAMILIES[family](), prefill_chunk=chunk, self_check=False)
        run(engine, chains=6, lanes=1)
        assert engine.prefill([5, 0, 3, 1, 2], prompts) == [len(p) - 1 for p in prompts]
        held.append(engine._slabs.pairs[0][1].clone())
        assert not held[-1][:, 4].any()  # the slot that was not named
        for slot, prompt in zip([5, 0, 3, 1, 2], prompts, strict=True):
            assert not held[-1][:, slot, :, len(prompt) - 1 :].any()
    for other in held[1:]:
        assert_close(other, held[0])


def test_a_prompt_held_by_another_slot_is_copied():
    engine = HuggingFaceEngine(tiny_models.llama())
    script = Script(engine, tiny_models.llama(), chains=6, lanes=1)
    first, second = prompt_of(6, 1), prompt_of(4, 2)
    assert script.admit([first, second, first]) == [5, 3, 0]  # twice in one call
    for _ in range(5):
        script.play()
    assert script.admit([second]) == [0]  # from a slot that has gone on since
    for _ in range(3):
        script.play()
    script.active = 0
    assert script.admit([second, first]) == [0, 0]  # both slots admitted, their prompts held elsewhere
    script.play()
    script.active = 1
    assert script.admit([first]) == [0]  # its own slot holds it
    for _ in range(3):
        script.play()


def test_prompts_that_change_places_are_forwarded():
    """Both holders are overwritten by the same call."""
    engine = HuggingFaceEngine(tiny_models.llama())
    script = Script(engine, tiny_models.llama(), chains=2, lanes=1)
    first, second = prompt_of(6, 1), prompt_of(4, 2)
    assert script.admit([first, second]) == [5, 3]
    script.play()
    script.active = 0
    assert script.admit([second, first]) == [3, 5]
    for _ in range(3):
        script.play()


def test_a_forgotten_prompt_is_forwarded_again():
    engine = HuggingFaceEngine(tiny_models.llama())
    run(engine, chains=1, lanes=1)
    assert engine.prefill([0], [prompt_of(6, 1)]) == [5]
    assert engine.prefill([0], [prompt_of(4, 2)]) == [3]
    assert engine.prefill([0], [prompt_of(6, 1)]) == [5]


BAD = 3  # a token whose embedding is NaN


def poisoned_llama(token: int = BAD):
    model = tiny_models.llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    return model


@pytest.mark.skipif(ON_CUDA, reason="on a device every lane is fed: the host does not know which of them run")
@pytest.mark.parametrize("family", ["llama", "mixed_qwen2", "gemma2"])
def test_lanes_that_do_not_run_are_not_fed_and_change_nothing(family, monkeypatch):
    """Six lanes at six positions, of which two or one run: these get the bits of a pass of them alone, and nobody
    else's KV is written."""
    engine = HuggingFaceEngine(getattr(tiny_models, family)(), attention="rows", remember=False)
    state = run(engine, chains=3, lanes=2)
    prompts = [prompt_of(5 + slot, slot) for slot in range(3)]
    engine.prefill([0, 1, 2], prompts)
    fills = [[lane, lane // 2, 0, 4 + lane // 2] for lane in range(6)]
    engine.transfer(ranges([[0] * 4] * 3), ranges(fills))
    state.input_id.copy_(torch.tensor([prompts[lane // 2][-1] for lane in range(6)]))
    state.position.copy_(torch.tensor([4 + lane // 2 for lane in range(6)]))
    state.exclude.fill_(-1)
    state.counter.copy_(torch.arange(24).view(6, 4))
    rows = []
    output = engine._output
    monkeypatch.setattr(engine, "_output", lambda view, *given: rows.append(view.rows) or output(view, *given))
    kv = [lane for lane, _ in engine._slabs.pairs]
    drawn = {}
    for running in ([1, 4], [4]):
        before = [slab.clone() for slab in kv]
        state.lane_field[:, LaneField.STATUS] = int(LaneStatus.IDLE)
        state.lane_field[running, LaneField.STATUS] = int(LaneStatus.RUNNING)
        out = engine.step(state)
        assert engine.step_report().fed == len(running)
        assert [lane for lane in range(6) if out.status[lane] != Status.PENDING] == running
        drawn[len(running)] = [(int(out.token[lane]), float(out.weight[lane])) for lane in running]
        idle = [lane for lane in range(6) if lane not in running]
        assert all(torch.equal(slab[:, idle], old[:, idle]) for slab, old in zip(kv, before, strict=True))
    assert rows == [2, 1]
    token, weight = drawn[2][1]
    assert drawn[1] == [(token, pytest.approx(weight, abs=1e-4))]
    engine.end()


# How a step is taken: as a CPU does, or as a device does, which feeds all lanes and looks at none.
WAYS = [(ROWS, "step"), (PADDED, "step"), (PADDED, "decode"), (FLASH, "decode")]


@pytest.fixture(params=WAYS, ids=["-".join(way) for way in WAYS])
def way(request):
    """(kernel, what an engine's `step` is)"""
    kernel, step = request.param
    if ON_CUDA:
        if step == "step":
            pytest.skip("a device decodes")
        yield PADDED if kernel == PADDED else None, HuggingFaceEngine.step
    elif step == "step":
        yield kernel, HuggingFaceEngine.step
    else:
        with flash_attention.on_the_host():
            yield kernel, lambda engine, state: engine.decode(state, engine.prepare(state))


def test_bad_rows_are_reported_and_leave_nothing_behind(way):
    """A NaN stays in its row, and what it wrote cannot reach the lane's next proposal, chain or tenant."""
    model = poisoned_llama()
    kernel, step_of = way
    engine = HuggingFaceEngine(model, attention=kernel)
    state = run(engine, chains=2, lanes=1)
    prompts = [prompt_of(5, 1), prompt_of(7, 2)]
    prompts = [[t if t != BAD else 4 for t in prompt] for prompt in prompts]
    engine.prefill([0, 1], prompts)
    nothing = ranges([[0] * 4] * 2)
    engine.transfer(nothing, ranges([[0, 0, 0, 4], [1, 1, 0, 6]]))

    def step(tokens, positions):
        state.input_id.copy_(torch.tensor(tokens))
        state.position.copy_(torch.tensor(positions))
        state.exclude.fill_(-1)
        drawn = step_of(engine, state)
        for slab, _ in engine._slabs.pairs:
            assert torch.isfinite(slab[:, drawn.status == Status.OK]).all()
            for lane, position in enumerate(positions):
                assert torch.isfinite(slab[:, lane, :, position]).all()
        return drawn

    step([prompts[0][4], prompts[1][6]], [4, 6])
    drawn = step([BAD, 11], [5, 7])
    assert drawn.status.tolist() == [Status.NAN, Status.OK]
    assert drawn.token[0] == -1
    assert torch.isnan(drawn.weight[0])
    assert torch.isfinite(drawn.weight[1])
    # The lane goes back before the bad position: its garbage is masked and finite.
    assert step([12, 13], [4, 8]).status.tolist() == [Status.OK, Status.OK]
    state.position.copy_(torch.tensor([5, 9]))
    logits = decoded(engine, state)
    assert_close(logits, plain_logits(model, [[*prompts[0][:4], 12, 12], [*prompts[1], 11, 13, 13]], MAX_LENGTH))
    # A bad prompt fills a chain row and then a lane row with NaN; the next tenant sees none of it, whether it is
    # admitted to the slot or moved there. The bad one is the longer, or it would be overwritten anyway.
    bad = [4, 5, BAD, *range(6, 23)]
    rest = [*prompts[1], 11, 13, 13]
    for moved in (False, True):
        engine.prefill([0], [bad])
        engine.transfer(nothing, ranges([[0, 0, 0, 19], [1, 1, 0, 0]]))
        assert step([22, 14], [19, 10]).status.tolist() == [Status.NAN, Status.OK]
        if moved:
            engine.move(1, 0)
            want = [*rest, 14]
        else:
            engine.prefill([0], [[4, 5, 6]])
            engine.transfer(nothing, ranges([[0, 0, 0, 2], [1, 1, 0, 0]]))
            want = [4, 5, 6]
        state.input_id.copy_(torch.tensor([want[-1], 14]))
        state.position.copy_(torch.tensor([len(want) - 1, 25]))  # a batchmate far ahead: all columns are read
        assert_close(decoded(engine, state)[:1], plain_logits(model, [want], MAX_LENGTH))


def test_faults_end_the_same_chains_with_every_kernel(way, monkeypatch):
    """Whole runs in which some chains draw a token whose embedding is NaN: they fault, in every way of decoding at the
    same tokens, and the others are what `rows` draws."""
    model = poisoned_llama(22)
    config = PowerConfig(alpha=1.5, max_new_tokens=12, block_size=6, mcmc_steps=4, lanes=2)
    kernel, step_of = way

    def drawn(engine):
        results = PowerSampler(engine).generate(
            [[5, 6, 7], [8, 9, 10, 11]], config, num_chains=4, seed=3, eos_token_id=[], max_chains=3
        )
        return [(r.tokens, r.steps, r.accepted, r.finish) for r in results]

    want = drawn(HuggingFaceEngine(model, attention=None if ON_CUDA else ROWS, self_check=False))
    monkeypatch.setattr(HuggingFaceEngine, "step", step_of)
    got = drawn(HuggingFaceEngine(model, attention=kernel, self_check=False, remember=False))
    assert got == want
    finishes = [finish for *_, finish in want]
    assert 2 <= finishes.count("fault") <= 6, finishes
    assert sum(accepted for _, _, accepted, finish in want if finish != "fault") >= 3


def test_a_move_takes_every_position_written():
    """A lane that never went back has written the most that its slot can have."""
    engine, reference = HuggingFaceEngine(tiny_models.llama()), tiny_models.llama()
    state = run(engine, chains=2, lanes=1)
    tokens = prompt_of(4, 1)
    engine.prefill([0, 1], [prompt_of(3, 2), tokens])
    engine.transfer(ranges([[0] * 4] * 2), ranges([[0, 0, 0, 2], [1, 1, 0, 3]]))
    for position in range(3, 12):
        if position == 9:
            engine.move(1, 0)
        state.input_id.fill_(tokens[-1])
        state.position.fill_(position)
        logits = decoded(engine, state)[1 if position < 9 else 0]
        assert_close(logits[None], plain_logits(reference, [tokens], MAX_LENGTH))
        tokens.append(position)


@pytest.mark.parametrize("fused_rows", [0, 4])
def test_step_draws_from_the_logits_with_the_state_s_counters(fused_rows, monkeypatch):
    monkeypatch.setattr(lm_head, "FUSED_ROWS", fused_rows)
    engine = HuggingFaceEngine(tiny_models.llama())
    assert isinstance(engine, Engine)
    state = run(engine, chains=2, lanes=2)
    prompts = [prompt_of(5, 1), prompt_of(7, 2)]
    engine.prefill([0, 1], prompts)
    opens = [[lane, lane // 2, 0, len(prompts[lane // 2]) - 1] for lane in range(4)]
    engine.transfer(ranges([[0] * 4] * 2), ranges(opens))
    state.input_id.copy_(torch.tensor([prompts[lane // 2][-1] for lane in range(4)]))
    state.position.copy_(torch.tensor([len(prompts[lane // 2]) - 1 for lane in range(4)]))
    state.counter.copy_(torch.arange(16, dtype=torch.int32).view(4, 4))
    state.exclude.copy_(torch.tensor([-1, 5, -1, 9]))
    logits = decoded(engine, state)
    rate = torch.full((4,), 2.0, device=DEVICE)
    seed = torch.tensor([7], device=DEVICE)
    want = pk.sample_tokens(logits.clone(), rate, rate, seed, state.counter, state.exclude)
    got = engine.step(state)
    for name in ("token", "logq", "weight", "status"):
        # the fused operator sums its products in another order
        tolerance = 1e-5 if fused_rows else 0.0
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=tolerance, atol=tolerance)
    assert not got.weight.is_inference()  # what the driver gets may be changed in place
    fewer = engine.step(state.first(1))
    assert fewer.token.tolist() == got.token[:2].tolist()


def test_in_bfloat16_a_draw_does_not_depend_on_how_many_rows_are_drawn():
    """Hidden states and weights whose products are exact in float32 in any order: the logits are rounded to bfloat16
    alike however many rows there are, and so are the draws. (In float32 few rows take the fused operator, which rounds
    the same; in bfloat16 it would not round at all.)"""
    model = tiny_models.llama().to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight.copy_(torch.randint(-100, 101, weight.shape, generator=generator))
    engine = HuggingFaceEngine(model, self_check=False)
    rows = 2 * lm_head.FUSED_ROWS + 1
    hidden = torch.randint(-100, 101, (rows, weight.shape[1]), generator=generator).to(DEVICE, torch.bfloat16) / 2048
    state = run(engine, chains=rows, lanes=1)
    state.exclude.fill_(-1)
    state.counter.copy_(torch.arange(4 * rows, dtype=torch.int32).view(rows, 4))
    every = engine._draw(state, slice(0, rows), hidden)
    assert len(every.token.unique()) > 2
    for count in (1, 2, lm_head.FUSED_ROWS, lm_head.FUSED_ROWS + 1):
        some = engine._draw(state, slice(0, count), hidden[:count])
        for name in ("token", "logq", "weight"):
            assert torch.equal(getattr(some, name), getattr(every, name)[:count])


def test_half_precision_goes_through_the_fused_attention():
    model = tiny_models.mixed_qwen2().to(torch.bfloat16)
    script = Script(HuggingFaceEngine(model), model, chains=2, lanes=2, tolerance=0.05)
    script.admit([prompt_of(3, 1), prompt_of(10, 2)])
    for _ in range(10):
        script.play()


# -- what the engine does to the model


def model_state(model) -> list:
    rope = model.model.rotary_emb
    return [
        model.config._attn_implementation,
        [module.training for module in model.modules()],
        rope.rope_type,
        rope.inv_freq.tolist(),
    ]


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_the_model_is_changed_only_during_a_forward_pass(family):
    model, reference = (tiny_models.FAMILIES[family](attention_dropout=p) for p in (0.5, 0.0))
    model.train()
    model.model.layers[0].mlp.eval()  # a mixture, to be put back as it was
    before = model_state(model)
    ids = torch.tensor([prompt_of(6, 1)], device=DEVICE)
    script = Script(HuggingFaceEngine(model), reference, chains=1, lanes=1)
    assert model_state(model) == before
    script.admit([prompt_of(6, 1)])
    assert model_state(model) == before
    script.play()
    assert model_state(model) == before
    with torch.no_grad():  # the owner may train it between two steps
        assert (model(ids).logits - reference(ids).logits).abs().max() > TOLERANCE
    assert model_state(model) == before

    def fail(*args):
        raise RuntimeError("broken")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        script.feed()
    assert model_state(model) == before
    handle.remove()
    script.engine.end()
    script.engine.end()
    assert model_state(model) == before


def test_two_runs_on_one_model_do_not_meet():
    model, reference = tiny_models.phi3(), tiny_models.phi3()
    long = tiny_models.LONGROPE_ORIGINAL + 10
    scripts = [
        Script(HuggingFaceEngine(model), reference, chains=1, lanes=1, max_length=n, seed=n) for n in (MAX_LENGTH, long)
    ]
    for script in scripts:
        script.admit([prompt_of(5, script.max_length)])
    for _ in range(5):
        for script in scripts:
            script.play()


def test_eos_and_limits_come_from_the_model():
    model = tiny_models.llama()
    model.generation_config.eos_token_id = [5, 9]
    engine = HuggingFaceEngine(model)
    assert engine.eos_token_ids == (5, 9)
    assert engine.max_context == tiny_models.CONTEXT
    assert engine.vocab_size == tiny_models.VOCAB
    assert engine.device == DEVICE
    model.generation_config.eos_token_id = None
    assert HuggingFaceEngine(model).eos_token_ids == (tiny_models.EOS,)
    model.config.eos_token_id = None
    assert HuggingFaceEngine(model).eos_token_ids == ()


# -- refusals


REASONS = {
    "mamba": "has layers of type linear_attention, whose state cannot be rewound",
    "recurrent_gemma": "has layers of type linear_attention, whose state cannot be rewound",
    "qwen3_next": "has layers of type linear_attention, whose state cannot be rewound",
    "qwen3_5": "has layers of type linear_attention, whose state cannot be rewound",
    "lfm2": "has layers of type conv, whose state cannot be rewound",
    "llama4": "has layers of type chunked_attention, whose state cannot be rewound",
    "deepseek_v3": "attends to something else than the keys and values it caches",
    "t5": "is an encoder-decoder",
    "bloom": "does not use transformers' attention interface",
}


@pytest.mark.parametrize("family", tiny_models.UNSUPPORTED)
def test_what_cannot_be_rewound_is_refused_for_the_reason_that_the_documentation_gives(family):
    model = tiny_models.UNSUPPORTED[family]()
    before = model.config._attn_implementation
    name = re.sub("For[A-Z].*", "", type(model).__name__)
    with pytest.raises(UnsupportedModelError, match=f"{name}.* {REASONS[family]}"):
        HuggingFaceEngine(model, self_check=False)
    assert model.config._attn_implementation == before
    assert f"| {REASONS[family]} |" in (Path(__file__).parents[1] / "docs" / "models.md").read_text()


def test_rotary_modules_that_look_at_the_batch_themselves_are_refused():
    with pytest.raises(UnsupportedModelError, match="PhimoeRotaryEmbedding does not keep to fixed frequencies"):
        HuggingFaceEngine(tiny_models.phimoe())


def test_the_self_check_finds_attention_that_is_not_the_registered_one():
    """A model whose own attention function adds something that the interface's arguments do not tell."""

    def biased(module, query, key, value, attention_mask, **kwargs):
        bias = torch.arange(key.shape[2]) * 0.5
        return sdpa_attention_forward(module, query + bias.mean(), key, value * 1.1, attention_mask, **kwargs)

    AttentionInterface.register("biased_for_test", biased)
    model = tiny_models.llama()
    model.set_attn_implementation("biased_for_test")
    with pytest.raises(UnsupportedModelError, match="relative error"):
        HuggingFaceEngine(model)
    HuggingFaceEngine(model, self_check=False)


@pytest.mark.parametrize("asked", [1, 8, 9])
def test_the_self_check_is_as_long_as_ever_where_the_owner_allows_short_runs_only(asked):
    engine = HuggingFaceEngine(tiny_models.llama(), max_context=asked)
    assert engine.max_context == asked
    assert engine._slabs is None
    AttentionInterface.register(
        "double_for_test",
        lambda module, query, key, value, mask, **rest: sdpa_attention_forward(
            module, query, key, 2 * value, mask, **rest
        ),
    )
    model = tiny_models.llama(attn_implementation="double_for_test")
    with pytest.raises(UnsupportedModelError, match="relative error"):
        HuggingFaceEngine(model, max_context=asked)


def test_a_model_whose_context_is_too_short_for_the_self_check_is_not_taken_for_checked():
    model = tiny_models.llama(max_position_embeddings=8)
    with pytest.raises(UnsupportedModelError, match="a context of 8 positions; the self check takes 9"):
        HuggingFaceEngine(model)
    assert HuggingFaceEngine(model, self_check=False).max_context == 8


def test_a_window_the_layers_do_not_ask_for_is_refused():
    """Windows are longer than the self check, so the configuration has to agree with what layers ask for."""
    model = tiny_models.mixed_qwen2()
    model.model.layers[2].self_attn.sliding_window = None
    with pytest.raises(UnsupportedModelError, match="layer 2 asks for a window of None"):
        HuggingFaceEngine(model)


def test_arguments_are_checked_before_any_work():
    with pytest.raises(ArgumentTypeError, match="PreTrainedModel"):
        HuggingFaceEngine(torch.nn.Linear(2, 2))
    model = tiny_models.llama()
    for name in ("prefill_chunk", "length_multiple", "max_context"):
        with pytest.raises(ArgumentError, match=f"{name} is 0; it must be at least 1"):
            HuggingFaceEngine(model, **{name: 0})
        for value in (True, 64.0, "64"):
            with pytest.raises(ArgumentTypeError, match=f"{name} is {value!r}; it must be an integer"):
                HuggingFaceEngine(model, **{name: value})
    numbers = HuggingFaceEngine(
        model, prefill_chunk=np.int32(7), length_multiple=torch.tensor(8), max_context=np.int64(64)
    )
    assert (numbers.prefill_chunk, numbers.length_multiple, numbers.max_context) == (7, 8, 64)
    assert all(type(n) is int for n in (numbers.prefill_chunk, numbers.length_multiple, numbers.max_context))
    numbers.begin(chains=np.int64(2), lanes=np.int8(1), max_length=np.int64(64), alpha=2.0, beta=2.0, seed=0)
    numbers.end()
    engine = HuggingFaceEngine(model)
    with pytest.raises(ArgumentError, match="begin"):
        engine.prefill([0], [[1, 2]])
    good = {"chains": 2, "lanes": 1, "max_length": 20, "alpha": 2.0, "beta": 2.0, "seed": 0}
    for name, value in (
        ("chains", 0),
        ("chains", True),
        ("lanes", 0),
        ("lanes", 1.0),
        ("max_length", 0),
        ("alpha", 0.0),
        ("beta", float("nan")),
    ):
        with pytest.raises(ArgumentError, match=name):
            engine.begin(**{**good, name: value})
    with pytest.raises(ArgumentError, match="context is 96"):
        engine.begin(**{**good, "max_length": 97})
    engine.begin(**good)

    def forbidden(*args):
        raise AssertionError("work was done")

    handle = model.register_forward_pre_hook(forbidden)
    model.model.register_forward_pre_hook(forbidden)
    for slots, prompts in (
        ([0], [[]]),
        ([0], [list(range(20))]),
        ([0], [[1, -1]]),
        ([0], [[1, tiny_models.VOCAB]]),
        ([2], [[1, 2]]),
        ([-1], [[1, 2]]),
        ([0, 0], [[1, 2], [3, 4]]),
        ([0], [[1, 2], [3, 4]]),
        ([0, 1], [[1, 2], [tiny_models.VOCAB]]),
    ):
        with pytest.raises(ArgumentError):
            engine.prefill(slots, prompts)
    with pytest.raises(ArgumentError, match="source"):
        engine.move(2, 0)
    if not ON_CUDA:  # looking at positions would wait for the device
        state = ChainState.allocate(2, 1, Law(max_new_tokens=8, block_size=8, mcmc_steps=1))
        state.position[1] = 20
        with pytest.raises(ArgumentError, match="positions span"):
            engine.step(state)
    handle.remove()


# -- parts


def test_layers_of_different_shapes_have_slabs_of_their_own():
    layout = KvLayout((((2, 4), (2, 4)), ((1, 8), (1, 8)), ((2, 4), (2, 8))), torch.float32)
    slabs = KvSlabs(layout, chains=2, lanes=2, positions=5, device=torch.device("cpu"))
    assert sorted(tuple(lane.shape) for lane, _ in slabs.pairs) == [
        (1, 4, 2, 5, 8), (2, 4, 1, 5, 8), (3, 4, 2, 5, 4),
    ]  # fmt: skip
    for index in range(3):
        for value, view in enumerate(slabs.layer(index, of_chains=False)):
            view.fill_(10 * index + value + 1)
    slabs.commit(torch.tensor([[1, 2, 1, 3]], dtype=torch.int32))
    for index in range(3):
        for value, view in enumerate(slabs.layer(index, of_chains=True)):
            assert view[1, :, 1:3].unique().tolist() == [10 * index + value + 1]
            assert view.count_nonzero() == view[1, :, 1:3].numel()


class Copying(LengthBound):
    """Copies at once, and uses what it copied when a device would."""

    def __init__(self):
        super().__init__(torch.device("meta"))
        self._asynchronous = True
        self._value = torch.zeros((), dtype=torch.int64)

    def _start_copy(self, longest):
        self._value.copy_(longest)

    def _wait(self):
        pass


@pytest.mark.parametrize("left", [Mode.IDLE, Mode.DONE, Mode.FAULT])
def test_a_long_chain_that_has_ended_is_not_read_any_more(left):
    """Its length stays in its slot, and the position of a lane that idles is what it last knew."""
    state = ChainState.allocate(2, 2, Law(max_new_tokens=2000, block_size=8, mcmc_steps=1))
    for chain, base in enumerate((1000, 10)):
        state.field[chain, ChainField.MODE] = Mode.PROPOSE
        state.field[chain, ChainField.BASE] = base
        state.field[chain, ChainField.LENGTH] = 20
        state.position[2 * chain : 2 * chain + 2] = base + 19
    bound = Copying()
    bound.admit(1000)
    assert max(bound.of(state) for _ in range(100)) >= 1020
    state.field[0, ChainField.MODE] = left
    claimed = [bound.of(state) for _ in range(40)]
    assert min(claimed) >= 30
    assert max(claimed[-5:]) <= 30 + 2 * 16


@pytest.mark.parametrize("seed", range(3))
def test_the_host_s_bound_is_never_below_the_longest_position(seed):
    """Answers grow by at most one a step and chains end at any time; what is copied is used 16 steps later."""
    rng = np.random.default_rng(seed)
    state = ChainState.allocate(4, 2, Law(max_new_tokens=64, block_size=8, mcmc_steps=1))
    bound, tight = Copying(), 0
    base, length = np.full(4, 10), np.zeros(4, int)
    bound.admit(10)
    for _ in range(600):
        for c in range(4):
            if rng.random() < 0.02:  # a chain ends, another takes its slot
                base[c], length[c] = rng.integers(1, 80), 0
                bound.admit(int(base[c]))
        position = base[:, None] + rng.integers(0, length[:, None] + 1, (4, 2)) - 1
        state.position.copy_(torch.from_numpy(position.reshape(-1)))
        state.field[:, pk.state.ChainField.BASE] = torch.from_numpy(base)
        state.field[:, pk.state.ChainField.LENGTH] = torch.from_numpy(length)
        state.field[:, pk.state.ChainField.MODE] = pk.state.Mode.PROPOSE
        claimed = bound.of(state)
        assert claimed >= position.max() + 1
        tight += claimed <= (base + length).max() + 2 * 16
        length = np.minimum(length + rng.integers(0, 2, 4), 64)
    assert tight > 100


@pytest.mark.parametrize("attention", [PADDED, FLASH])
@pytest.mark.parametrize("family", ["llama", "mixed_qwen2", "gemma2", "phi3"])
def test_nothing_in_a_step_waits_for_a_device(family, attention):
    """On meta tensors whatever reads a value raises: `.item()`, boolean indexing, copies to the host."""
    engine = HuggingFaceEngine(tiny_models.FAMILIES[family]())
    engine.attention = attention
    engine.length_multiple = 64
    engine.model.to("meta")
    engine.device = torch.device("meta")
    engine.begin(chains=2, lanes=2, max_length=70, alpha=2.0, beta=2.0, seed=0)
    assert engine._slabs.positions == 128
    assert engine.prefill([0, 1], [prompt_of(5, 1), prompt_of(9, 2)]) == [4, 8]
    state = ChainState.allocate(2, 2, Law(max_new_tokens=8, block_size=8, mcmc_steps=1), "meta")
    for _ in range(20):
        engine.transfer(state.commit_range, state.open_range)
        drawn = engine.step(state.first(2))
        assert drawn.token.shape == (4,)
    engine.move(1, 0)


def test_a_model_whose_own_logits_are_not_finite_is_refused_for_that():
    """And not for how it decodes."""
    model = tiny_models.llama()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"^LlamaForCausalLM gives logits that are not finite, by itself"):
        HuggingFaceEngine(model)
