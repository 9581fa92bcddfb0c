"""PowerSampler: what it refuses, what it returns, and what it leaves behind."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from power_kernels import rng
from power_kernels.api import EngineBusyError, GenerationInterrupted, PowerConfig, PowerSampler
from power_kernels.api.driver import results as reading
from power_kernels.api.driver import run
from power_kernels.api.driver.host import in_one_copy
from power_kernels.api.driver.poll import Poll
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.reference import ReferenceChain
from power_kernels.state import ChainField, ChainState, Cost, LaneField, LaneStatus, Mode, Outcome, Status
from tests.toys import Toy, ToyEngine, power_toy

CONFIG = PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=5, block_size=2, mcmc_steps=3, final_steps=2)


def endless_toy() -> Toy:
    """Any token may follow any other: none ends an answer, unless a call says so."""
    return Toy(3, 5, seed=3)


class WatchedEngine(ToyEngine):
    """Counts the calls that begin and end a run, and raises when asked to."""

    def __init__(self, toy: Toy | None = None, *, raise_at: int = -1, error: type[BaseException] = KeyboardInterrupt):
        super().__init__(power_toy() if toy is None else toy)
        self.begun = self.ended = self.steps = 0
        self.raise_at, self.error = raise_at, error

    def begin(self, **kwargs):
        super().begin(**kwargs)
        self.begun += 1
        self.seed_given = kwargs["seed"]

    def step(self, state):
        self.steps += 1
        if self.steps == self.raise_at:
            raise self.error
        return super().step(state)

    def end(self):
        super().end()
        self.ended += 1


class FakeTokenizer:
    """A letter is a token: a = 0, b = 1, ..."""

    def __call__(self, text):
        return SimpleNamespace(input_ids=[ord(c) - ord("a") for c in text])

    def decode(self, tokens, skip_special_tokens):
        return "".join(chr(ord("a") + t) for t in tokens if not (skip_special_tokens and t == 0))


class Mapping(dict):
    """What a tokenizer returns for a batch: iterating it gives its keys."""


def summary(result):
    return result.tokens, result.log_weights, result.outcomes, result.finish, result.token_logp


# -----------------------------------------------------------------------------------------------------------
# What is refused

TYPES = {
    "a string for the list": (dict(prompts="abc"), r"prompts is a str; it must be a list"),
    "bytes for the list": (dict(prompts=b"abc"), r"prompts is a bytes; it must be a list"),
    "a tokenizer's mapping": (dict(prompts=Mapping(input_ids=[[1]])), r"prompts is a Mapping; it must be a list"),
    "a number for the list": (dict(prompts=3), r"prompts is a int; it must be a list"),
    "nothing for the list": (dict(prompts=None), r"prompts is a NoneType; it must be a list"),
    "a prompt that is a number": (dict(prompts=[[1], 5]), r"prompts\[1\] is a int; it must be a list"),
    "a prompt that is a tensor's number": (dict(prompts=[torch.tensor(5)]), r"prompts\[0\] is a int; it must be"),
    "bytes for a prompt": (dict(prompts=[b"ab"]), r"prompts\[0\] is a bytes; it must be a list"),
    "a string without a tokenizer": (dict(prompts=[[1], "ab"]), r"prompts\[1\] is a string and there is no tokenizer"),
    "a bool among the tokens": (dict(prompts=[[1, True]]), r"prompts\[0\] holds token id True; it must be an integer"),
    "a float among the tokens": (dict(prompts=[[1, 2.0]]), r"prompts\[0\] holds token id 2.0; it must be an integer"),
    "a list among the tokens": (dict(prompts=[[[1], [2]]]), r"prompts\[0\] holds token id \[1\]; it must be an"),
    "a float tensor": (dict(prompts=torch.zeros(1, 2)), r"prompts is a torch.float32 tensor of shape \[1, 2\]"),
    "a flat tensor": (dict(prompts=torch.tensor([1, 2])), r"prompts is a torch.int64 tensor of shape \[2\]"),
    "a config that is a dict": (dict(config={"alpha": 2.0}), r"config is a dict; it must be a PowerConfig"),
    "a config class": (dict(config=PowerConfig), r"config is a type; it must be a PowerConfig"),
    "num_chains a float": (dict(num_chains=2.0), r"num_chains is 2.0; it must be an integer"),
    "num_chains a bool": (dict(num_chains=True), r"num_chains is True; it must be an integer"),
    "seed a string": (dict(seed="0"), r"seed is '0'; it must be an integer"),
    "seed missing": (dict(seed=None), r"seed is None; it must be an integer"),
    "max_chains a float": (dict(max_chains=16.0), r"max_chains is 16.0; it must be an integer"),
    "prompt_ids a number": (dict(prompt_ids=0), r"prompt_ids is a int; it must be a list"),
    "a name among prompt_ids": (dict(prompt_ids=["a", 1]), r"prompt_ids holds 'a'; it must be an integer"),
    "a bool among prompt_ids": (dict(prompt_ids=[0, True]), r"prompt_ids holds True; it must be an integer"),
    "eos a float": (dict(eos_token_id=0.0), r"eos_token_id is a float; it must be a list"),
    "eos a bool": (dict(eos_token_id=True), r"eos_token_id holds True; it must be an integer"),
    "eos a string": (dict(eos_token_id="</s>"), r"eos_token_id is a str; it must be a list"),
}
VALUES = {
    "no prompt": (dict(prompts=[]), r"prompts is empty; it must hold at least one"),
    "no row": (dict(prompts=torch.zeros(0, 3, dtype=torch.int64)), r"prompts is empty"),
    "an empty prompt": (dict(prompts=[[1], []]), r"prompts\[1\] is empty; a prompt needs at least one token"),
    "empty rows": (dict(prompts=torch.zeros(2, 0, dtype=torch.int64)), r"prompts\[0\] is empty"),
    "a token past the vocabulary": (dict(prompts=[[1], [2, 16]]), r"prompts\[1\] holds token id 16; .*\[0, 15\]"),
    "a negative token": (dict(prompts=[[-1]]), r"prompts\[0\] holds token id -1; it must lie in \[0, 15\]"),
    "no chain": (dict(num_chains=0), r"num_chains is 0; it must be at least 1"),
    "fewer than no chain": (dict(num_chains=-2), r"num_chains is -2; it must be at least 1"),
    "a seed of 65 bits": (dict(seed=2**64), rf"seed is {2**64}; it must lie in \[{-(2**63)}, {2**64 - 1}\]"),
    "a seed below int64": (dict(seed=-(2**63) - 1), rf"seed is {-(2**63) - 1}; it must lie in"),
    "no slot": (dict(max_chains=0), r"max_chains is 0; it must be at least 1"),
    "too few prompt_ids": (dict(prompt_ids=[0]), r"prompt_ids is \[0\]; it must hold one distinct id for each of 2"),
    "the same id twice": (dict(prompt_ids=[4, 4]), r"prompt_ids is \[4, 4\]; it must hold one distinct id"),
    "an id past 29 bits": (dict(prompt_ids=[0, 2**29]), r"prompt_ids holds 536870912; it must lie in \[0, 536870911\]"),
    "a negative id": (dict(prompt_ids=[0, -1]), r"prompt_ids holds -1; it must lie in"),
    "eos past the vocabulary": (dict(eos_token_id=16), r"eos_token_id holds 16; it must lie in \[0, 15\]"),
    "a negative eos": (dict(eos_token_id=[0, -2]), r"eos_token_id holds -2; it must lie in \[0, 15\]"),
    "more than the context": (
        dict(prompts=[[1] * 9, [1] * 8]),
        r"prompt 1 has 8 tokens, which leave no room for an answer in the model's context of 8, and the others",
    ),
}


def refused(call: str, kind: type[Exception], given: dict, message: str) -> Exception:
    """What the call raises; the engine must not have been touched, and must still work."""
    engine = WatchedEngine()
    engine.max_context = 8
    sampler = PowerSampler(engine)
    arguments = {"prompts": [[1], [2, 3]], "config": CONFIG, **given}
    with pytest.raises(kind, match=message) as caught:
        getattr(sampler, call)(**arguments)  # `stream` raises before its first result is asked for
    assert engine.begun == engine.steps == 0
    assert len(sampler.generate([[1], [2, 3]], CONFIG)) == 2
    return caught.value


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize("name", TYPES)
def test_an_argument_of_the_wrong_type_is_refused_by_name_before_any_work(name, call):
    assert isinstance(refused(call, ArgumentTypeError, *TYPES[name]), TypeError)


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_is_not_allowed_is_refused_by_name_before_any_work(name, call):
    error = refused(call, ArgumentError, *VALUES[name])
    assert not isinstance(error, ArgumentTypeError)


def test_a_prompt_that_just_fits_the_context_is_taken():
    engine = WatchedEngine(endless_toy())
    engine.max_context = 8
    (result,) = PowerSampler(engine).generate([[1] * 3], CONFIG)
    assert len(result.tokens) == 5


@pytest.mark.parametrize("model", [None, "gpt2", ToyEngine, object(), torch.nn.Linear(2, 2)])
def test_a_model_that_is_neither_an_engine_nor_a_transformers_model_is_refused(model):
    name = type(model).__name__
    with pytest.raises(ArgumentTypeError, match=rf"model is a {name}; it must be a transformers"):
        PowerSampler(model)


# -----------------------------------------------------------------------------------------------------------
# What comes back


def test_results_are_prompt_major_whatever_order_they_finish_in():
    sampler = PowerSampler(WatchedEngine())
    results = sampler.generate([[5], [6, 7], [8]], CONFIG, num_chains=4, max_chains=5)
    assert [(r.prompt_id, r.chain_id) for r in results] == [(p, k) for p in range(3) for k in range(4)]
    stream = sampler.stream([[5], [6, 7], [8]], CONFIG, num_chains=4, max_chains=5)
    finished = [(r.prompt_id, r.chain_id) for r in stream]
    assert sorted(finished) == [(p, k) for p in range(3) for k in range(4)]
    assert finished != sorted(finished)  # they did finish in another order, or the test shows nothing


def test_logp_and_weights_are_those_of_a_teacher_forced_rescoring():
    """float64 over the toy's own table, to what float32 weights hold."""
    toy = power_toy()
    results = PowerSampler(ToyEngine(toy)).generate([[5]], CONFIG, num_chains=200, max_chains=64)
    assert sum(r.accepted for r in results) > 200
    for r in results:
        assert r.logp == pytest.approx(toy.logp(tuple(r.tokens)), abs=2e-6)
        assert r.logp == pytest.approx(sum(r.token_logp))
        assert len(r.tokens) == len(r.token_logp) == len(r.log_weights) == r.cost.answer
        for t, token in enumerate(r.tokens):
            z = toy.logits(tuple(r.tokens[:t]))
            logp = z[token] - np.logaddexp.reduce(z)
            logq = CONFIG.beta * z[token] - np.logaddexp.reduce(CONFIG.beta * z)
            assert r.token_logp[t] == pytest.approx(logp, abs=2e-6)
            assert r.log_weights[t] == pytest.approx(2.0 * logp - logq, abs=2e-6)
            assert r.log_weights[t] <= 0


def test_steps_and_finish_follow_the_schedule_and_the_answer():
    results = PowerSampler(ToyEngine(power_toy())).generate([[5]], CONFIG, num_chains=200, max_chains=64)
    for r in results:
        assert r.status is Status.OK
        assert r.finish == ("eos" if r.tokens[-1] == 0 else "length")
        assert 0 not in r.tokens[:-1]
        assert len(r.tokens) == 5 or r.finish == "eos"
        assert r.steps == len(r.outcomes)
        assert r.steps in (3 + 2, 6 + 2, 9 + 2)  # it may end with any stage, then come the final steps
        assert (r.accepted, r.unchanged) == (
            r.outcomes.count(Outcome.ACCEPTED),
            r.outcomes.count(Outcome.UNCHANGED),
        )
        assert r.acceptance_rate == (r.accepted + r.unchanged) / r.steps
    assert {r.steps for r in results} == {5, 8, 11}
    assert {r.finish for r in results} == {"eos", "length"}


def test_without_steps_there_is_no_acceptance_rate_and_the_answer_is_a_proposal():
    config = PowerConfig(alpha=2.0, max_new_tokens=5, mcmc_steps=0)
    (result,) = PowerSampler(ToyEngine(power_toy())).generate([[5]], config)
    assert (result.steps, result.accepted, result.cost.proposal) == (0, 0, 0)
    assert np.isnan(result.acceptance_rate)


def test_the_account_of_an_answer():
    prompt = [5, 6, 7, 8]
    results = PowerSampler(ToyEngine(endless_toy())).generate([prompt], CONFIG, num_chains=50)
    for r in results:
        cost = r.cost
        assert cost.prefill == 3
        assert cost.extension == cost.answer == 5
        assert cost.forwarded == 3 + 5 + cost.proposal
        assert cost.ratio == cost.forwarded / 5
        assert cost.saved_early is not None
    assert sum(r.cost.saved_early for r in results) > 0
    assert sum(r.cost.saved_prefix for r in results) > 0
    ended = PowerSampler(ToyEngine(power_toy())).generate([prompt], CONFIG, num_chains=2)
    assert all(r.cost.saved_early is None for r in ended)  # nobody knows where a rejected proposal would have ended


def test_eos_is_the_engines_unless_given():
    class Ending(ToyEngine):
        eos_token_ids = (0,)

        def __init__(self):
            super().__init__(endless_toy())
            self.eos_token_ids = (1,)

    def last(eos):
        results = PowerSampler(Ending()).generate([[5]], CONFIG, num_chains=60, eos_token_id=eos)
        for r in results:
            assert r.finish == ("length" if r.tokens[-1] not in ends[str(eos)] else "eos")
            assert not set(r.tokens[:-1]) & set(ends[str(eos)])
        return {r.tokens[-1] for r in results if r.finish == "eos"}

    ends = {"None": [1], "2": [2], "[0, 2]": [0, 2], "[]": []}
    assert last(None) == {1}
    assert last(2) == {2}
    assert last([0, 2]) == {0, 2}
    assert last([]) == set()


def test_prompts_of_every_kind_are_the_same_prompts():
    """Lists, tuples, tensors, arrays and strings; 3 prompts of one length."""
    tokens = [[1, 2], [3, 1], [15, 0]]
    expected = [summary(r) for r in PowerSampler(WatchedEngine()).generate(tokens, CONFIG, num_chains=3)]
    kinds = [
        torch.tensor(tokens),
        torch.tensor(tokens, dtype=torch.int32),
        [torch.tensor(row) for row in tokens],
        tuple(map(tuple, tokens)),
        np.array(tokens),
        (row for row in tokens),
        ["bc", "db", "pa"],
        ["bc", [3, 1], torch.tensor([15, 0])],
    ]
    for prompts in kinds:
        sampler = PowerSampler(WatchedEngine(), FakeTokenizer())
        assert [summary(r) for r in sampler.generate(prompts, CONFIG, num_chains=3)] == expected


def test_text_is_decoded_without_special_tokens_and_none_without_a_tokenizer():
    with_text = PowerSampler(WatchedEngine(), FakeTokenizer()).generate(["b"], CONFIG, num_chains=30)
    assert {r.finish for r in with_text} == {"eos", "length"}
    for r in with_text:
        assert r.text == "".join(chr(ord("a") + t) for t in r.tokens if t != 0)
    assert PowerSampler(WatchedEngine()).generate([[1]], CONFIG)[0].text is None


# -----------------------------------------------------------------------------------------------------------
# Random numbers


def test_a_chain_is_its_seed_prompt_id_and_number_and_nothing_else():
    sampler = PowerSampler(ToyEngine(power_toy()))

    def chains(prompts, **given):
        results = sampler.generate(prompts, CONFIG, **given)
        return {(r.prompt_id, r.chain_id): summary(r) for r in results}

    first = chains([[5], [6]], num_chains=20, seed=1)
    assert chains([[5], [6]], num_chains=20, seed=1) == first
    other = chains([[5], [6]], num_chains=20, seed=2)
    # 40 answers of about 60 that can occur: some coincide, most do not.
    assert sum(first[key] != other[key] for key in first) > 20
    assert len({str(value) for key, value in first.items() if key[0] == 0}) > 10
    assert sum(first[0, k] != first[1, k] for k in range(20)) > 10  # the toy does not read the prompt: only ids differ
    fewer = chains([[6]], num_chains=3, seed=1, prompt_ids=[1])
    assert fewer == {key: value for key, value in first.items() if key in fewer}


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)])
def test_all_64_bits_of_the_seed_reach_the_chain(seed):
    """Against the reference chain; negative seeds are the same 64 bits."""
    toy, ids = power_toy(), [rng.MAX_PROMPT_ID]
    results = PowerSampler(ToyEngine(toy)).generate([[5]], CONFIG, num_chains=4, seed=seed, prompt_ids=ids)
    for r in results:
        chain = ReferenceChain(
            toy.logits,
            CONFIG.law,
            alpha=CONFIG.alpha,
            beta=CONFIG.beta,
            seed=seed % 2**64,
            eos=toy.eos,
            chain_id=r.chain_id,
            prompt_id=rng.MAX_PROMPT_ID,
        )
        assert r.tokens == list(chain.run().tokens)
        assert r.outcomes == chain.outcomes


# -----------------------------------------------------------------------------------------------------------
# Ends of a run


def test_an_interrupt_carries_the_finished_answers_and_ends_the_engine():
    whole = PowerSampler(WatchedEngine()).generate([[5], [6]], CONFIG, num_chains=10, max_chains=4)
    engine = WatchedEngine(raise_at=60)
    with pytest.raises(GenerationInterrupted) as caught:
        PowerSampler(engine).generate([[5], [6]], CONFIG, num_chains=10, max_chains=4)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert engine.begun == engine.ended == 1
    finished = caught.value.results
    assert 4 <= len(finished) < 20
    assert f"{len(finished)} finished" in str(caught.value)
    ids = [(r.prompt_id, r.chain_id) for r in finished]
    assert ids == sorted(ids)
    expected = {(r.prompt_id, r.chain_id): summary(r) for r in whole}
    assert all(summary(r) == expected[r.prompt_id, r.chain_id] for r in finished)


def test_an_interrupt_before_anything_finished_carries_nothing():
    engine = WatchedEngine(raise_at=1)
    with pytest.raises(GenerationInterrupted) as caught:
        PowerSampler(engine).generate([[5]], CONFIG)
    assert caught.value.results == []
    assert engine.ended == 1


def test_an_interrupted_begin_is_ended_too():
    class Slow(WatchedEngine):
        def begin(self, **kwargs):
            super().begin(**kwargs)
            raise KeyboardInterrupt

    engine = Slow()
    with pytest.raises(GenerationInterrupted):
        PowerSampler(engine).generate([[5]], CONFIG)
    assert engine.ended == 1


def test_another_error_of_the_engine_passes_through_and_ends_the_run():
    engine = WatchedEngine(raise_at=7, error=torch.OutOfMemoryError)
    sampler = PowerSampler(engine)
    with pytest.raises(torch.OutOfMemoryError):
        sampler.generate([[5]], CONFIG)
    assert engine.ended == 1
    assert len(sampler.generate([[5]], CONFIG)) == 1  # and the sampler can be used again


class LatePoll(Poll):
    """As on a device, where the host knows what a look before the last one saw, up to fifteen steps ago."""

    def __init__(self, device, slots):
        super().__init__(device, slots)
        self._asynchronous, self.every = True, 8


class Event:
    """Of a device that has always just finished."""

    def record(self, stream):
        pass

    def synchronize(self):
        pass


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_host_that_hears_late_of_chains_that_stopped_draws_the_same(lanes, monkeypatch):
    """Slots of stopped chains are stepped on, refilled and moved into while older looks are under way."""
    config = PowerConfig(**{**vars(CONFIG), "lanes": lanes})
    arguments = dict(num_chains=40, max_chains=7)
    whole = PowerSampler(WatchedEngine()).generate([[5], [6]], config, **arguments)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(run, "Poll", LatePoll)
    sampler = PowerSampler(WatchedEngine())
    late = sampler.generate([[5], [6]], config, **arguments)
    assert list(map(summary, late)) == list(map(summary, whole))
    assert [r.cost for r in late] == [r.cost for r in whole]
    assert sampler.last_run.lane_steps > sampler.last_run.useful_lane_steps  # chains that stopped were fed meanwhile


@pytest.mark.parametrize("cut", ["uniform", "divergence"])
@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_a_chain_that_goes_on_has_a_lane_that_runs(lanes, cut):
    """Lanes that are closed or faulted wait for a lower one, and the lowest does not wait: so no step draws nothing."""
    waited = []

    class Watching(ToyEngine):
        def step(self, state):
            running, going = LaneStatus.RUNNING, (Mode.EXTEND, Mode.PROPOSE)
            statuses = state.lane_field[:, LaneField.STATUS].unflatten(0, (state.chains, lanes)).tolist()
            for mode, mine in zip(state.field[:, ChainField.MODE].tolist(), statuses, strict=True):
                assert mode in going
                assert running in mine
                waited.append(any(status not in (running, LaneStatus.IDLE) for status in mine))
            return super().step(state)

    config = PowerConfig(alpha=2.0, max_new_tokens=5, block_size=2, mcmc_steps=7, final_steps=3, lanes=lanes, cut=cut)
    PowerSampler(Watching(power_toy())).generate([[5], [6, 7]], config, num_chains=128, max_chains=16)
    assert sum(waited) > (200 if lanes > 1 else -1)


def test_results_that_are_read_in_one_copy_are_those_of_a_state_at_hand(monkeypatch):
    """As they are read from a device; 40 chains, of every length."""
    arguments = dict(prompts=[[5], [6]], config=CONFIG, num_chains=20, max_chains=7)
    at_hand = PowerSampler(WatchedEngine()).generate(**arguments)
    copied = []
    monkeypatch.setattr(reading, "on_host", lambda tensors: copied.append(len(tensors)) or in_one_copy(tensors))
    assert PowerSampler(WatchedEngine()).generate(**arguments) == at_hand
    assert copied
    assert {len(r.tokens) for r in at_hand} == {1, 2, 3, 4, 5}


def test_a_look_that_is_under_way_is_news_of_the_slots_that_kept_their_chains(monkeypatch):
    """Three chains, the first slot given to another after the look: it has stopped then, as far as the look knows."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    state = ChainState.allocate(3, 1, CONFIG.law)
    state.field[:, ChainField.MODE] = torch.tensor([Mode.DONE, Mode.FAULT, Mode.PROPOSE])
    state.cost[:, Cost.PROPOSAL] = torch.tensor([100, 10, 1])
    poll = LatePoll(torch.device("cpu"), 3)
    assert poll.look(state, 3) is None
    poll.changed(0)
    assert poll.look(state, 3) == ([1], 11)
    assert poll.look(state, 3) == ([0, 1], 111)


def test_stream_yields_an_answer_as_soon_as_its_chain_stops():
    engine = WatchedEngine()
    seen = []
    stream = PowerSampler(engine).stream([[5], [6]], CONFIG, num_chains=10, max_chains=4)
    assert engine.begun == 0
    for _ in stream:
        seen.append(engine.steps)
    assert len(seen) == 20
    assert seen[0] < seen[9] < seen[19]
    assert engine.begun == engine.ended == 1


def test_closing_a_stream_early_ends_the_engine_and_frees_the_sampler():
    engine = WatchedEngine()
    sampler = PowerSampler(engine)
    stream = sampler.stream([[5]], CONFIG, num_chains=10, max_chains=2)
    next(stream)
    assert engine.ended == 0
    with pytest.raises(EngineBusyError):  # it would write over the first one's past
        PowerSampler(engine).generate([[5]], CONFIG)
    assert engine.ended == 0  # the first run goes on
    next(stream)
    stream.close()
    assert engine.ended == engine.begun == 1
    assert len(sampler.generate([[5]], CONFIG)) == 1


def test_skipped_answers_are_not_drawn_and_the_others_are_unchanged():
    whole = {
        (r.prompt_id, r.chain_id): summary(r)
        for r in PowerSampler(WatchedEngine()).generate([[5], [6]], CONFIG, num_chains=4)
    }
    skip = {(0, 1), (1, 0), (1, 3)}
    rest = list(PowerSampler(WatchedEngine()).stream([[5], [6]], CONFIG, num_chains=4, skip=skip))
    assert {(r.prompt_id, r.chain_id) for r in rest} == set(whole) - skip
    assert all(summary(r) == whole[r.prompt_id, r.chain_id] for r in rest)
    engine = WatchedEngine()
    assert list(PowerSampler(engine).stream([[5]], CONFIG, skip={(0, 0)})) == []
    assert engine.begun == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_fault_in_one_row_leaves_the_others_as_they_are_without_it(bad):
    """The logits of one chain of twelve go bad from its 4th token on; lanes, refills and all else stay."""

    class Spoiling(WatchedEngine):
        def logits(self, state):
            logits = super().logits(state)
            rows = (state.counter[:, 2] == 5) & (state.counter[:, 0] >= 3)
            logits[rows.cpu().numpy()] = bad
            return logits

    config = PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=5, block_size=3, mcmc_steps=3, lanes=2)
    arguments = dict(num_chains=12, max_chains=4)
    toy = endless_toy()
    whole = PowerSampler(WatchedEngine(toy)).generate([[5]], config, **arguments)
    spoiled = PowerSampler(Spoiling(toy)).generate([[5]], config, **arguments)
    for before, after in zip(whole, spoiled, strict=True):
        if after.chain_id == 5:
            status = {"nan": Status.NAN, "inf": Status.POS_INF, "-inf": Status.NO_MASS}[str(bad)]
            assert (after.finish, after.status) == ("fault", status)
            assert len(after.tokens) == len(after.token_logp) == 3  # the last good state: the first stage's answer
            assert after.outcomes == before.outcomes[:3]
        else:
            assert summary(after) == summary(before)
