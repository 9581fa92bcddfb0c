"""Engines that keep requests draw the chains of an engine that keeps KV rows (DESIGN 6), whatever becomes of lanes.

`tests/request_engine.py` has two, one that is told what ends and begins and one that looks at `LaneField.EPOCH`. An
engine that watches SERIAL and DIVERGENCE instead draws other chains, and a test shows that it does.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from power_kernels.api import HuggingFaceEngine, PowerConfig, PowerSampler
from power_kernels.api.driver import host
from power_kernels.api.driver.engine import Ended, Opened, RequestEngine, StepReport
from power_kernels.law import Law
from power_kernels.state import ChainState, LaneField, LaneStatus, Outcome, Status
from tests import tiny_models
from tests.devices import DEVICE
from tests.request_engine import LookingEngine, RequestKeeper, SerialWatchingEngine, ToldEngine
from tests.toys import Toy, ToyEngine, power_toy

PROMPTS = [[5], [6, 7, 1]]
SEED = 7


@dataclass(frozen=True)
class Case:
    """128 chains of a law, in how many slots. lanes: None for one that become more as the last chains end."""

    toy: Toy
    config: dict = field(hash=False)
    lanes: int | None
    slots: int


def moving_toy() -> Toy:
    """No end, and answers so long that proposals leave them at many places."""
    return Toy(3, 8, seed=5)


POWER = dict(alpha=2.0, temperature=0.8, max_new_tokens=5)
MOVING = {**POWER, "max_new_tokens": 8, "block_size": None, "mcmc_steps": 12}
CASES = {
    "one lane": Case(power_toy(), {**POWER, "block_size": 2, "mcmc_steps": 3, "final_steps": 3}, 1, 16),
    "many restarts, two lanes": Case(moving_toy(), MOVING, 2, 32),
    "many restarts, three lanes": Case(moving_toy(), MOVING, 3, 7),
    "many restarts, eight lanes": Case(moving_toy(), {**MOVING, "block_size": 3, "mcmc_steps": 6}, 8, 16),
    "many restarts, ever more lanes": Case(moving_toy(), {**MOVING, "block_size": 3}, None, 32),
    "ends, five lanes, few slots": Case(
        Toy(5, 5, seed=3, eos=(0, 3), eos_shift=-2.5), {**POWER, "block_size": 2, "mcmc_steps": 6}, 5, 3
    ),
    "no early rejection, six lanes": Case(
        power_toy(), {**POWER, "block_size": 3, "mcmc_steps": 8, "early_rejection": False}, 6, 16
    ),
    "prefix forwarded, four lanes": Case(
        moving_toy(), {**MOVING, "free_prefix": False}, 4, 16
    ),
    "tokens that are alone, four lanes": Case(
        Toy(5, 5, seed=12, eos=(0,), impossible=0.33, forced=0.33), {**POWER, "block_size": 3, "mcmc_steps": 8}, 4, 16
    ),
    "divergence, seven lanes": Case(moving_toy(), {**MOVING, "cut": "divergence"}, 7, 16),
    "divergence by entropy, three lanes": Case(
        power_toy(), {**POWER, "block_size": 2, "mcmc_steps": 5, "final_steps": 3, "cut": "divergence-entropy"}, 3, 11
    ),
}  # fmt: skip
CHAINS = 128  # of each


@functools.cache
def expected(name: str) -> list[tuple]:
    """The chains of an engine with KV rows, on one lane."""
    case = CASES[name]
    return list(map(summary, draw(ToyEngine(case.toy), {**case.config, "lanes": 1}, 64)))


def draw(engine, config: dict, slots: int) -> list:
    config = PowerConfig(**config)
    return PowerSampler(engine).generate(
        PROMPTS, config, num_chains=CHAINS // len(PROMPTS), seed=SEED, max_chains=slots
    )


def summary(r) -> tuple:
    return r.tokens, r.outcomes, r.left, r.log_weights, r.token_logp, r.finish, r.status


@dataclass
class Counts:
    """What the chains of a run did, at least or exactly.

    restarts: times that a lane which had answered started again under the same SERIAL and DIVERGENCE. empty: those of
    them that had nothing to copy. voided: tokens of lanes that another's acceptance made void. ended: chains that ended
    with an EOS. moves: of a chain to another slot. widened: times that lanes became more. pauses: answers that were not
    there when they were asked for.
    """

    chains: int = 0
    restarts: int = 0
    empty: int = 0
    accepted: int = 0
    voided: int = 0
    ended: int = 0
    moves: int = 0
    widened: int = 0
    pauses: int = 0

    def reach(self, least: Counts) -> bool:
        return all(getattr(self, one.name) >= getattr(least, one.name) for one in fields(self))


def counting(engine: type[RequestKeeper], counts: Counts) -> type[RequestKeeper]:
    """The engine, with a witness that looks at what no engine has to look at."""
    columns = [LaneField.EPOCH, LaneField.SERIAL, LaneField.DIVERGENCE]

    class Counting(engine):
        # Rows cost nothing up to 32, and beyond more than they can be worth: the driver keeps that many.
        most_rows = 32

        def run_bytes(self, *, chains, lanes, max_length):
            return 0

        def decode_seconds(self, rows, length):
            return [1.0 if count <= 32 else 1000.0 for count in rows]

        def begin(self, **kwargs):
            super().begin(**kwargs)
            self.had: dict[int, list[int]] = {}  # by lane, once it has answered

        def prefill(self, slots, prompts):
            self.no_longer(slots)
            return super().prefill(slots, prompts)

        def move(self, source, target):
            self.no_longer([source, target])
            super().move(source, target)
            counts.moves += 1

        def widen(self, chains, lanes):
            self.had = {}
            super().widen(chains, lanes)
            counts.widened += 1

        def no_longer(self, slots):
            self.had = {lane: had for lane, had in self.had.items() if lane // self.lanes not in slots}

        def step(self, state):
            has = state.lane_field[:, columns].tolist()
            runs = (state.lane_field[:, LaneField.STATUS] == LaneStatus.RUNNING).tolist()
            prefix = (state.lane_field[:, LaneField.POSITION] < state.lane_field[:, LaneField.DIVERGENCE]).tolist()
            ranges = state.open_range.tolist()
            for lane, had in list(self.had.items()):
                if lane < len(has) and runs[lane] and has[lane][0] != had[0]:
                    del self.had[lane]
                    if has[lane][1:] == had[1:]:
                        counts.restarts += 1
                        counts.empty += ranges[lane][3] <= ranges[lane][2]
            sampled = super().step(state)
            answered = (sampled.status != Status.PENDING).tolist()
            self.had |= {lane: has[lane] for lane in range(len(has)) if answered[lane] and not prefix[lane]}
            return sampled

    return Counting


def run(engine: type[RequestKeeper], name: str, counts: Counts) -> list[tuple]:
    """The chains of a case, drawn by an engine that keeps requests."""
    case = CASES[name]
    toy = case.toy
    zeros = np.zeros(toy.vocab)  # after what is no open answer: only a wrong engine asks
    keeper = counting(engine, counts)(lambda prompt, tokens: toy.table.get(tokens, zeros), toy.vocab, eos=toy.eos)
    results = draw(keeper, {**case.config, "lanes": case.lanes}, case.slots)
    assert keeper.answered == sum(r.cost.extension + r.cost.proposal for r in results)
    counts.chains += len(results)
    counts.accepted += sum(r.outcomes.count(Outcome.ACCEPTED) for r in results)
    counts.voided += sum(r.cost.voided for r in results)
    counts.ended += sum(r.finish == "eos" for r in results)
    counts.pauses += keeper.pauses
    return list(map(summary, results))


LEAST = Counts(
    chains=1408, restarts=650, empty=570, accepted=8900, voided=38000, ended=400, moves=130, widened=6, pauses=38000
)


@pytest.mark.parametrize("engine", [ToldEngine, LookingEngine])
def test_an_engine_that_keeps_requests_draws_the_chains_of_one_that_keeps_rows(engine):
    """1,408 chains, bitwise; the least that they must do is `LEAST`."""
    assert isinstance(ToldEngine(None, 3), RequestEngine)
    assert not isinstance(LookingEngine(None, 3), RequestEngine)
    counts = Counts()
    for name in CASES:
        assert run(engine, name, counts) == expected(name), name
    assert counts.reach(LEAST), counts


def test_an_engine_that_watches_serial_and_divergence_draws_other_chains():
    """At least 15 of 128, in one of the cases that the right engines draw bitwise. It had 70 chances or more."""
    counts = Counts()
    got = run(SerialWatchingEngine, "many restarts, two lanes", counts)
    assert counts.restarts >= 70
    assert sum(a != b for a, b in zip(got, expected("many restarts, two lanes"), strict=True)) >= 15


class CountingEngine(ToldEngine):
    """Says of each request that 5 tokens before its first draw went through the model and 3 were known, and of each
    that ends that 2 were drawn in vain."""

    def begin(self, **kwargs) -> None:
        super().begin(**kwargs)
        self.opened: Counter = Counter()  # by (prompt id, chain id)
        self.ended: Counter = Counter()
        self.news: list[dict[int, int]] = [{}, {}, {}]
        self.chain_of: dict[int, tuple[int, int]] = {}

    def requests(self, opened: list[Opened], ended: list[Ended]) -> None:
        super().requests(opened, ended)
        prefilled, recomputed, vain = self.news
        for lane, number in ended:
            self.ended[self.chain_of[number]] += 1
            vain[lane] = vain.get(lane, 0) + 2
        for one in opened:
            chain = self.chain_of[one.request] = one.prompt_id, one.chain_id
            where = recomputed if self.opened[chain] else prefilled
            where[one.lane] = where.get(one.lane, 0) + 5
            self.opened[chain] += 1

    def move(self, source: int, target: int) -> None:
        super().move(source, target)
        for news in self.news:
            for i in range(self.lanes):
                news[target * self.lanes + i] = news.pop(source * self.lanes + i, 0)

    def step_report(self) -> StepReport:
        prefilled, recomputed, vain = self.news
        self.news = [{}, {}, {}]
        cached = dict.fromkeys((*prefilled, *recomputed), 3)
        return StepReport(0, (), 0.0, prefilled=prefilled, recomputed=recomputed, cached=cached, undelivered=vain)


def test_what_requests_cost_is_counted_for_the_chains_they_were_of():
    toy = moving_toy()
    engine = CountingEngine(lambda prompt, tokens: toy.logits(tokens), toy.vocab, late=0.0)
    config = PowerConfig(**MOVING, lanes=2)
    results = PowerSampler(engine).generate(PROMPTS, config, num_chains=6, seed=SEED, max_chains=4)
    plain = PowerSampler(ToyEngine(toy)).generate(PROMPTS, replace(config, lanes=2), num_chains=6, seed=SEED)
    assert sum(engine.opened.values()) >= 100
    for result, other in zip(results, plain, strict=True):
        chain, cost = (result.prompt_id, result.chain_id), result.cost
        assert cost.prefill == len(PROMPTS[result.prompt_id]) - 1 + 5
        assert cost.recomputed == 5 * (engine.opened[chain] - 1)
        assert cost.cached >= 3
        in_vain = cost.proposal - other.cost.proposal
        # What ends with the chain itself is nobody's.
        assert 2 * engine.ended[chain] - 4 <= in_vain <= 2 * engine.ended[chain]
        assert cost.voided == other.cost.voided + in_vain
        assert cost.forwarded == cost.prefill + cost.recomputed + cost.extension + cost.proposal


def test_the_engine_of_the_documentation_draws_the_chains_of_one_that_keeps_rows(capsys):
    """128 chains, bitwise; and its page runs."""
    page = (Path(__file__).parent.parent / "docs" / "engines.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    names = {}
    exec(compile(snippet, "docs/engines.md", "exec"), names)
    assert len(re.findall(r"nats, \d of 8 steps accepted", capsys.readouterr().out)) == 2
    case = CASES["ends, five lanes, few slots"]

    def model(tokens: list[int]) -> torch.Tensor:
        (prompt,) = [prompt for prompt in PROMPTS if tokens[: len(prompt)] == prompt]
        return torch.from_numpy(case.toy.logits(tokens[len(prompt) :])).float()

    engine = names["ListEngine"](model, 16, case.toy.eos)
    got = list(map(summary, draw(engine, {**case.config, "lanes": case.lanes}, case.slots)))
    assert got == expected("ends, five lanes, few slots")


def test_requests_of_a_transformers_model_draw_the_chains_of_its_engine():
    """64 chains of three lanes. A request's logits come from a forward pass over all of its tokens, rounded otherwise.

    At least 100 acceptances, and 100 tokens of lanes that they made void.
    """
    model = tiny_models.llama(vocab_size=4, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                              num_attention_heads=2, num_key_value_heads=1, eos_token_id=3, bos_token_id=0,
                              pad_token_id=None)  # fmt: skip

    @functools.cache
    def logits(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.tensor([[*prompt, *tokens]], device=DEVICE), use_cache=False).logits[0, -1].cpu().numpy()

    config = PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=6, block_size=3, mcmc_steps=6, lanes=3)
    given = dict(num_chains=32, seed=SEED, max_chains=8)
    prompts = [[2, 1, 0], [1]]
    rows = PowerSampler(HuggingFaceEngine(model, self_check=False)).generate(prompts, config, **given)
    asked = PowerSampler(ToldEngine(logits, 4, eos=(3,))).generate(prompts, config, **given)
    for one, other in zip(asked, rows, strict=True):
        assert (one.tokens, one.outcomes, one.left) == (other.tokens, other.outcomes, other.left)
        np.testing.assert_allclose(one.log_weights, other.log_weights, atol=1e-5)
    assert sum(r.accepted for r in rows) >= 100
    assert sum(r.cost.voided for r in rows) >= 100


def test_what_a_device_holds_comes_to_the_host_in_one_copy_as_it_is():
    """Every kind of tensor of a state, a byte among words, one without entries and one that is not contiguous."""
    state = ChainState.allocate(2, 3, Law(4, 4, 2))
    tensors = [state.outcome, state.field, state.cumw, state.cumz, state.cost, state.logq, state.token.t()]
    for tensor in tensors:
        tensor.copy_(torch.randint(-9, 9, tensor.shape))
    for got, want in zip(host.in_one_copy(tensors), tensors, strict=True):
        assert got.dtype == want.numpy().dtype
        assert got.tolist() == want.tolist()
