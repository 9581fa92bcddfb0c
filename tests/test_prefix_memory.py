"""A run forwards no prefix twice on a CPU, and its chains do not show it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from power_kernels.api import PowerConfig, PowerSampler
from power_kernels.api.engines.huggingface import HuggingFaceEngine, prefix_memory
from power_kernels.api.engines.huggingface.lm_head import LmHead
from power_kernels.state import LaneField, LaneStatus
from tests import tiny_models

PROMPTS = [[5, 17, 40], [8], [5, 17, 40, 3, 9]]
# Peaked enough for proposals to repeat each other, flat enough for them to differ.
CONFIG = PowerConfig(alpha=3.0, max_new_tokens=24, block_size=8, mcmc_steps=6)


class Counting(HuggingFaceEngine):
    """Counts the rows that a forward pass computes for a lane that runs."""

    forwarded = 0

    def _fed(self, state, length, **options):
        self.forwarded += int((state.lane_field[:, LaneField.STATUS] == LaneStatus.RUNNING).sum())
        return super()._fed(state, length, **options)


def sample(model, config=CONFIG, *, remember: bool, prompts=PROMPTS, **options):
    engine = Counting(model, remember=remember, self_check=False)
    results = PowerSampler(engine).generate(prompts, config, **{"seed": 11, "eos_token_id": [], **options})
    return results, engine.forwarded


def chain(result):
    return result.tokens, result.log_weights, result.outcomes, result.finish


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("eos", [[], [tiny_models.EOS, 30]])
def test_chains_are_bitwise_those_without_a_memory(lanes, eos):
    """One chain at a time, so that every forward pass of one row has the same shape in both runs."""
    model = tiny_models.llama()
    config = dataclasses.replace(CONFIG, lanes=lanes)
    options = {"eos_token_id": eos, "num_chains": 2, "max_chains": 1}
    with_memory, fewer = sample(model, config, remember=True, **options)
    without, all_of_them = sample(model, config, remember=False, **options)
    recalled = sum(r.cost.recalled for r in with_memory)
    if lanes == 1:
        assert [chain(r) for r in with_memory] == [chain(r) for r in without]
        assert fewer == all_of_them - recalled
    else:  # which rows share a forward pass differs, and with it the last bits of their weights
        assert [r.tokens for r in with_memory] == [r.tokens for r in without]
        assert fewer < all_of_them
    assert sum(r.accepted for r in without) >= 12
    assert recalled >= 60


def test_the_account_counts_what_was_forwarded():
    results, forwarded = sample(tiny_models.llama(), remember=True, max_chains=1)
    for result in results:
        cost = result.cost
        assert cost.recalled > 0
        assert cost.forwarded == cost.prefill + cost.extension + cost.proposal - cost.recalled
    assert sum(r.cost.forwarded - r.cost.prefill for r in results) == forwarded
    without, _ = sample(tiny_models.llama(), remember=False, max_chains=1)
    assert [r.cost.recalled for r in without] == [0] * len(PROMPTS)
    assert [r.cost.proposal for r in without] == [r.cost.proposal for r in results]


def test_every_new_step_starts_without_a_forward_pass():
    """The token before the divergence was forwarded when the current answer was made."""
    results, _ = sample(tiny_models.llama(), remember=True, max_chains=1, prompts=PROMPTS[:1])
    (result,) = results
    opened = result.steps - result.unchanged
    assert result.cost.recalled >= opened >= 10


def test_a_full_ring_forgets_and_the_chains_stay_the_same(monkeypatch):
    model = tiny_models.llama()
    want, _ = sample(model, remember=False, max_chains=1)
    recalled = []
    for positions in (1, 0):  # a ring of one slab's positions; of a single node, since none is the least
        monkeypatch.setattr(prefix_memory, "_POSITIONS", positions)
        got, _ = sample(model, remember=True, max_chains=1)
        assert list(map(chain, got)) == list(map(chain, want))
        recalled.append(sum(r.cost.recalled for r in got))
    assert recalled[0] > recalled[1]


def test_a_batch_of_chains_in_every_slot_gives_the_same_answers():
    """Slots are refilled and moved while others run; rows of a batch round differently, tokens may not."""
    model = tiny_models.llama()
    want, _ = sample(model, remember=False, max_chains=1, num_chains=2)
    for max_chains in (2, 6):
        got, _ = sample(model, remember=True, max_chains=max_chains, num_chains=2)
        assert [r.tokens for r in got] == [r.tokens for r in want]


def test_prefixes_with_bad_logits_are_not_kept():
    model = tiny_models.llama()
    with torch.no_grad():  # feeding token 30 makes every later logit NaN
        model.get_input_embeddings().weight[30] = float("nan")
    results, _ = sample(model, remember=True, num_chains=4, max_chains=4)
    without, _ = sample(model, remember=False, num_chains=4, max_chains=4)
    assert [(r.tokens, r.finish, r.status) for r in results] == [(r.tokens, r.finish, r.status) for r in without]
    assert any(r.finish == "fault" for r in results)
    assert any(r.finish == "length" for r in results)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "phi3"])
def test_the_head_is_found_and_gives_the_models_logits(family):
    model = getattr(tiny_models, family)()
    engine = HuggingFaceEngine(model)
    head = engine._head
    assert head is not None
    assert (head.softcap > 0) == (family == "gemma2")
    assert (head.scale != 1.0) == (family in ("granite", "cohere"))
    tokens = torch.tensor([[4, 9, 33]])
    with torch.inference_mode():
        hidden = model.get_decoder()(tokens).last_hidden_state
        torch.testing.assert_close(head.logits(hidden), model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("field", "value"), [("scale", 1.01), ("softcap", 29.0), ("softcap", 0.0)])
def test_a_head_that_is_not_the_models_is_not_believed(field, value, monkeypatch):
    """The sampler then runs the whole model and keeps no prefixes."""
    model = tiny_models.gemma2()
    right = LmHead.of(model)
    monkeypatch.setattr(LmHead, "of", lambda model: dataclasses.replace(right, **{field: value}))
    engine = HuggingFaceEngine(model)
    assert engine._head is None
    (result,) = PowerSampler(engine).generate([[5, 6]], CONFIG, seed=1, eos_token_id=[])
    assert result.cost.recalled == 0


class Edited(transformers.LlamaForCausalLM):
    """Changes its logits after the head."""

    edit = staticmethod(lambda logits, position_ids: logits)

    def forward(self, input_ids=None, position_ids=None, **options):
        out = super().forward(input_ids=input_ids, position_ids=position_ids, **options)
        out.logits = self.edit(out.logits, position_ids)
        return out


def edited(edit) -> Edited:
    model = tiny_models.llama()
    model.__class__ = Edited
    model.edit = edit
    return model


FORBIDDEN = list(range(40, tiny_models.VOCAB))


def forbid(logits: torch.Tensor, position_ids) -> torch.Tensor:
    return logits.index_fill_(-1, torch.tensor(FORBIDDEN), -1e9)  # in place, as models do


def forbid_later(logits: torch.Tensor, position_ids) -> torch.Tensor:
    first = position_ids is not None and int(position_ids.max()) == 0
    return logits if first else forbid(logits, position_ids)


@pytest.mark.parametrize("edit", [forbid, forbid_later])
def test_logits_that_a_model_changes_after_its_head_are_what_is_sampled(edit):
    """In place, and where a probe of one token does not show it."""
    engine = HuggingFaceEngine(edited(edit))
    assert engine._head is None
    results = PowerSampler(engine).generate(PROMPTS, CONFIG, seed=3, eos_token_id=[])
    assert not {token for result in results for token in result.tokens} & set(FORBIDDEN)


def test_a_head_that_its_owner_changes_later_is_the_one_that_runs():
    """Its forward replaced, a hook put on it, another module in its place: in few rows and in many."""
    mask = torch.zeros(tiny_models.VOCAB)
    mask[FORBIDDEN] = -1e9

    def replaced(model):
        head = model.lm_head
        head.forward = lambda hidden: torch.nn.functional.linear(hidden, head.weight) + mask

    def hooked(model):
        model.lm_head.register_forward_hook(lambda module, given, logits: logits + mask)

    def exchanged(model):
        other = torch.nn.Linear(32, tiny_models.VOCAB)
        with torch.no_grad():
            other.weight.copy_(model.lm_head.weight)
            other.bias.copy_(mask)
        model.set_output_embeddings(other)

    for change in (replaced, hooked, exchanged):
        model = tiny_models.llama()
        engine = HuggingFaceEngine(model)
        change(model)
        for num_chains, max_chains in ((1, 1), (3, 9)):
            results = PowerSampler(engine).generate(
                PROMPTS, CONFIG, seed=3, num_chains=num_chains, max_chains=max_chains, eos_token_id=[]
            )
            drawn = {token for result in results for token in result.tokens}
            assert not drawn & set(FORBIDDEN), (change.__name__, max_chains)


def test_the_memory_takes_the_dtype_of_the_hidden_states():
    """Under another default dtype, and where the first parameter of the model has another one."""
    want, _ = sample(tiny_models.llama(), remember=True)
    torch.set_default_dtype(torch.float64)
    try:
        got, _ = sample(tiny_models.llama().float(), remember=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [len(r.tokens) for r in got] == [len(r.tokens) for r in want]
    mixed = tiny_models.llama()
    mixed.model.embed_tokens.to(torch.bfloat16)
    mixed.model.embed_tokens.register_forward_hook(lambda module, given, out: out.float())
    results, _ = sample(mixed, remember=True)
    assert sum(r.cost.recalled for r in results) > 0


class Audited(HuggingFaceEngine):
    """Knows what tokens stand in every row, and holds each node to the prefix that it was first given to."""

    checked = recalled = 0

    def begin(self, *, chains, lanes, max_length, **options):
        super().begin(chains=chains, lanes=lanes, max_length=max_length, **options)
        self.lane_tokens = torch.full((chains * lanes, max_length), -1)
        self.chain_tokens = torch.full((chains, max_length), -1)
        self.prefix: dict[int, tuple] = {}

    def prefill(self, slots, prompts):
        for slot, prompt in zip(slots, prompts, strict=True):
            self.chain_tokens[slot, : len(prompt) - 1] = torch.tensor(prompt[:-1])
        return super().prefill(slots, prompts)

    def transfer(self, commit_range, open_range):
        for target, source, ranges in (
            (self.chain_tokens, self.lane_tokens, commit_range),
            (self.lane_tokens, self.chain_tokens, open_range),
        ):
            for row, of, start, stop in ranges.tolist():
                target[row, start:stop] = source[of, start:stop].clone()
        super().transfer(commit_range, open_range)

    def move(self, source, target):
        super().move(source, target)
        lanes = self.lane_tokens.shape[0] // self.chain_tokens.shape[0]
        self.chain_tokens[target] = self.chain_tokens[source]
        for lane in range(lanes):
            self.lane_tokens[target * lanes + lane] = self.lane_tokens[source * lanes + lane]

    def step(self, state):
        rows = torch.arange(state.position.shape[0])
        drawn = super().step(state)
        recalled = self.step_report().recalled
        took_part = torch.isin(rows, torch.tensor(recalled)) if recalled else torch.ones(len(rows), dtype=torch.bool)
        took_part = took_part & (state.lane_field[:, LaneField.STATUS] == LaneStatus.RUNNING)
        self.lane_tokens[rows[took_part], state.position[took_part]] = state.input_id[took_part]
        for lane in rows[took_part].tolist():
            position = int(state.position[lane])
            node = int(self._memory._node[lane, position])
            tokens = tuple(self.lane_tokens[lane, : position + 1].tolist())
            assert node == 0 or self.prefix.setdefault(node, tokens) == tokens
            self.checked += node != 0
        self.recalled += len(recalled)
        return drawn


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("capacity", [None, 5])
def test_a_node_always_stands_for_the_same_prefix(lanes, capacity, monkeypatch):
    """Prompts that repeat, of one token, slots that are refilled and moved, lanes that are voided, a tiny ring."""
    if capacity is not None:
        monkeypatch.setattr(prefix_memory, "_MOST_BYTES", capacity * 700)
    engine = Audited(tiny_models.llama(), self_check=False)
    config = dataclasses.replace(CONFIG, lanes=lanes, max_new_tokens=16)
    prompts = [[5, 17, 40], [8], [5, 17, 40], [5, 17]]
    results = PowerSampler(engine).generate(prompts, config, num_chains=2, max_chains=3, seed=5)
    assert sum(r.accepted for r in results) >= 10
    assert engine.checked >= 300
    assert engine.recalled >= (40 if capacity is None else 1)
