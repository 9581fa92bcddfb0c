"""The chain of one served request, apart from any stack: what it makes of requests that are drawn by themselves, in
pieces and in any order, is what `PowerSampler` draws with the same seed, bit for bit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels.api import PowerConfig, PowerResult, PowerSampler
from power_kernels.api.driver.stop import StopStrings
from power_kernels.api.engines.vllm.serve.chains import Ask, Chain
from power_kernels.slots import SlotFlag
from power_kernels.state import Status
from tests.test_chain_identity import CASES, PROMPTS, SEED, FaultToy
from tests.toys import Toy, ToyEngine

SERVED = {name: case for name, case in CASES.items() if case.make().compat is None}


class Worker:
    """Draws for one chain's requests as a serving stack does, some tokens of one of them at a time.

    seen: requests that ended for each reason.
    """

    def __init__(self, toy: Toy, chain: Chain, seed: int):
        self.toy, self.chain, self.random = toy, chain, np.random.default_rng(seed)
        self.open: dict[int, Ask] = {}
        self.tokens: dict[int, list[int]] = {}
        self.weight: dict[int, float] = {}
        self.seen: Counter = Counter()

    def run(self) -> PowerResult:
        self.take(self.chain.start(), [])
        while not self.chain.done:
            number = int(self.random.choice(list(self.open)))
            complete = False
            for _ in range(self.random.integers(1, 4)):
                complete = self.draw(number)
                if complete:
                    break
            if complete:
                del self.open[number]
                if self.random.random() < 0.7:  # else another may come to its end before the chain is told
                    self.take(*self.chain.advance())
            if not self.open and not self.chain.done:
                self.take(*self.chain.advance())
        assert self.chain.advance() == ([], [])
        return self.chain.result()

    def take(self, asked: list[Ask], dropped: list[int]) -> None:
        for number in dropped:
            del self.open[number]
            self.seen["dropped"] += 1
        for ask in asked:
            assert len(ask.opened.tokens) < ask.opened.horizon
            self.open[ask.number], self.tokens[ask.number] = ask, list(ask.opened.tokens)
            self.weight[ask.number] = ask.opened.cumw
            self.seen["asked"] += 1

    def draw(self, number: int) -> bool:
        opened, tokens = self.open[number].opened, self.tokens[number]
        row = self.toy.table.get(tuple(tokens), np.zeros(self.toy.vocab))
        first = len(tokens) == len(opened.tokens)
        drawn = pk.sample_tokens(
            torch.from_numpy(row.astype(np.float32))[None],
            torch.tensor([self.chain.alpha]),
            torch.tensor([self.chain.config.beta]),
            torch.tensor([self.chain.seed]),
            torch.tensor([opened.counter(len(tokens))], dtype=torch.int32),
            torch.tensor([opened.exclude if first else -1]),
            return_entropy=True,
        )
        token, flags = int(drawn.token), int(drawn.status)
        self.weight[number] += float(drawn.weight)
        rejected = opened.rejects(len(tokens) + 1, self.weight[number])
        if rejected or flags != Status.OK:
            token, flags = self.chain.ends[0], flags | (int(SlotFlag.REJECTED) if rejected else 0)
        tokens.append(token)
        ended = token in self.chain.ends or len(tokens) == opened.horizon
        values = torch.stack([drawn.logq, drawn.weight, drawn.entropy], 1).numpy()
        complete = self.chain.heard(number, [token], values, np.array([flags]), ended=ended)
        if complete:
            reason = "rejected" if rejected else "ended" if ended else "stopped"
            self.seen[reason] += 1
            again = token in self.chain.ends and not rejected and not self.toy.eos and len(tokens) < opened.horizon
            self.seen["asked again"] += again
        return complete


def served(toy: Toy, config: PowerConfig, prompt_id: int, chain_id: int) -> tuple[PowerResult, Counter]:
    stop = StopStrings.of(toy.tokenizer(), config.stop, toy.vocab) if config.stop else None
    chain = Chain(
        PROMPTS[prompt_id], config, seed=SEED, eos=toy.eos, stop=stop, vocab_size=toy.vocab,
        chain_id=chain_id, prompt_id=prompt_id,
    )  # fmt: skip
    worker = Worker(toy, chain, seed=chain_id)
    return worker.run(), worker.seen


def of_the_law(result: PowerResult) -> PowerResult:
    """All that does not say how it was computed."""
    return replace(result, text=None, cost=None)


@pytest.mark.parametrize("lanes", [1, 3])
def test_served_chains_are_those_of_the_sampler(lanes):
    """4 chains of each law of `test_chain_identity` that may be served."""
    seen, accepted, unchanged = Counter(), 0, 0
    for case in SERVED.values():
        toy, config = case.toy(), case.make(lanes=lanes)
        sampler = PowerSampler(ToyEngine(toy), toy.tokenizer())
        want = sampler.generate(
            list(PROMPTS.values()), replace(config, lanes=1), num_chains=2, seed=SEED, prompt_ids=list(PROMPTS)
        )
        for expected in want:
            got, of_worker = served(toy, config, expected.prompt_id, expected.chain_id)
            assert of_the_law(got) == of_the_law(expected)
            seen += of_worker
            accepted += got.accepted
            unchanged += got.unchanged
    assert accepted >= 200
    assert unchanged >= 125
    least = {"rejected": 15, "asked again": 10, "stopped": 10}
    assert all(seen[what] >= count for what, count in least.items()), seen
    assert lanes == 1 or seen["dropped"] >= 75, seen


def test_bad_logits_end_the_chains_that_reach_them():
    toy = FaultToy()
    config = PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=5, block_size=3, mcmc_steps=4, lanes=1)
    want = PowerSampler(ToyEngine(toy)).generate([PROMPTS[0]], config, num_chains=16, seed=SEED)
    results = [served(toy, config, 0, k)[0] for k in range(16)]
    assert [of_the_law(r) for r in results] == [of_the_law(r) for r in want]
    assert 2 <= sum(r.finish == "fault" for r in results) <= 14


def test_progress_tells_stage_steps_and_weight():
    """It never falls, ends at what the result says, and has told every step of a chain of one lane on its way."""
    case = CASES["no end"]
    toy, config = case.toy(), case.make()
    chain = Chain(PROMPTS[0], config, seed=SEED, eos=toy.eos, vocab_size=toy.vocab)
    worker = Worker(toy, chain, seed=0)
    told = []
    take = worker.take

    def taken(asked, dropped):
        take(asked, dropped)
        told.append(chain.progress())

    worker.take = taken
    result = worker.run()
    assert [p[:2] for p in told] == sorted(p[:2] for p in told)
    assert told[-1].steps == result.steps == config.law.max_steps
    assert told[-1].stage == config.law.stages
    assert told[-1].tokens == len(result.tokens)
    np.testing.assert_allclose(told[-1].log_weight, sum(result.log_weights))
    assert len({p.steps for p in told}) > 5


def test_a_worker_that_rejects_what_the_chain_would_not_is_found_out():
    toy = CASES["no end"].toy()
    config = CASES["no end"].make()
    chain = Chain(PROMPTS[0], config, seed=SEED, eos=toy.eos, vocab_size=toy.vocab)
    (ask,) = chain.start()
    chain.heard(ask.number, [1], np.zeros((1, 3), np.float32), np.array([int(SlotFlag.REJECTED)]), ended=True)
    with pytest.raises(RuntimeError, match=r"^the worker rejected proposal 0, and the chain does not$"):
        chain.advance()
