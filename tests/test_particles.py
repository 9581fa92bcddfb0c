"""Particles through the driver (DESIGN 3.9): chain by chain the float64 reference's, in whatever batch they run."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels.api import HuggingFaceEngine, PowerConfig, PowerSampler
from power_kernels.api.driver.particles.run import ParticleRun
from power_kernels.api.driver.particles.state import GroupField
from power_kernels.api.driver.stop import StopStrings
from power_kernels.errors import ArgumentError
from power_kernels.reference.particle_chain import ReferenceParticles
from power_kernels.state import Mode, Outcome, Status
from tests import tiny_models
from tests.devices import DEVICE
from tests.test_stop_strings import letters_tokenizer
from tests.toys import ToyEngine, power_toy

PROMPTS = [[2, 1, 1, 2, 0, 1], [5, 4], [1], [3, 3, 2]]
SEED = 7


@functools.cache
def model():
    """Vocabulary 7; scaled so that the logits of a row spread over two nats or so."""
    return tiny_models.llama(
        vocab_size=7, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=3, bos_token_id=0, pad_token_id=None,
    )  # fmt: skip


@functools.cache
def exact():
    return copy.deepcopy(model()).double()


@functools.cache
def logits(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> np.ndarray:
    """float64 [V], of a whole forward pass."""
    with torch.inference_mode():
        return exact()(input_ids=torch.tensor([[*prompt, *tokens]], device=DEVICE)).logits[0, -1].cpu().numpy()


def config(**changes) -> PowerConfig:
    given = dict(alpha=2.0, max_new_tokens=9, kernel="particles", particles=3, sweeps=2)
    return PowerConfig(**(given | changes))


def drawn(asked: PowerConfig, *, eos=(0, 1), **call):
    given = dict(num_chains=4, seed=SEED, eos_token_id=list(eos)) | call
    return PowerSampler(HuggingFaceEngine(model()), call.pop("tokenizer", None)).generate(PROMPTS, asked, **given)


def reference(asked: PowerConfig, result, eos) -> ReferenceParticles:
    prompt = tuple(PROMPTS[result.prompt_id])
    return ReferenceParticles(
        lambda tokens: logits(prompt, tokens), asked.particle_law, alpha=asked.alpha, seed=SEED, eos=eos,
        chain_id=result.chain_id, prompt_id=result.prompt_id,
    )  # fmt: skip


@pytest.mark.parametrize("eos", [(), (0, 1)], ids=["no EOS", "EOS"])
@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({}, 8),
        (dict(sweeps=3, sweep_cut="uniform"), 12),
        (dict(rho=0.3, length_bonus=0.7), 8),
        (dict(particles=5, sweeps=0), 0),
        (dict(particles=8, sweeps=1, max_new_tokens=4), 2),
    ],
    ids=["two sweeps", "uniform cuts", "rho and lambda", "a start alone", "more particles than children"],
)
def test_chains_are_those_of_the_reference(changes, least, eos):
    """16 chains of prompts of 1 to 6 tokens, five at once: answers, sweeps, cuts and log Zhat. At least so many sweeps
    change the answer.

    float32 logits move a boundary by some 1e-6; not one of these chains comes so close to one.
    """
    asked = config(**changes)
    results = drawn(asked, eos=eos, max_chains=5)
    for result in results:
        sweeps = reference(asked, result, list(eos)).run()
        assert result.tokens == list(sweeps[-1].answer.tokens)
        assert result.token_logp == pytest.approx(sweeps[-1].answer.logp, abs=1e-5)
        assert [s.cut for s in result.sweeps] == [s.cut for s in sweeps]
        assert [s.log_total for s in result.sweeps] == pytest.approx([s.log_total for s in sweeps], abs=1e-4)
        assert [s.n for s in result.sweeps] == [len(s.answer) for s in sweeps]
        before = sweeps[0].answer
        for ours, theirs in zip(result.sweeps[1:], sweeps[1:], strict=True):
            assert ours.left == (-1 if theirs.answer.tokens == before.tokens else theirs.kept_back)
            assert ours.logp == pytest.approx(sum(theirs.answer.logp), abs=1e-4)
            before = theirs.answer
        assert result.finish == ("eos" if eos and result.tokens[-1] in eos else "length")
    assert sum(result.accepted for result in results) >= least


def test_neither_the_batch_nor_the_slots_that_chains_move_to_change_a_chain():
    """1, 3 and all 48 chains at once; three prompts of other lengths, so that slots stand at other positions."""
    asked, call = config(sweeps=1, particles=4), dict(num_chains=12)
    runs = [drawn(asked, max_chains=slots, **call) for slots in (1, 3, 48)]
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert (a.tokens, a.outcomes, a.left) == (b.tokens, b.outcomes, b.left)
            assert a.token_logp == pytest.approx(b.token_logp, abs=1e-6)
            assert [s.rows for s in a.sweeps] == [s.rows for s in b.sweeps]
    assert sum(result.accepted for result in runs[0]) >= 12


def test_stop_strings_are_part_of_the_law():
    """A stop string of the tokens 2 and 3, which the float64 reference closes answers at, too."""
    tokenizer = letters_tokenizer(7)
    asked = config(stop=('"#',), max_new_tokens=8, sweep_cut="uniform")
    results = PowerSampler(HuggingFaceEngine(model()), tokenizer).generate(
        PROMPTS, asked, num_chains=8, seed=SEED, eos_token_id=[]
    )
    table = StopStrings.of(tokenizer, asked.stop, 7).table
    for result in results:
        chain = reference(asked, result, [])
        chain.stop_next = table
        answer = chain.run()[-1].answer
        assert result.tokens == list(answer.tokens)
        stopped = table[chain.stop_state(answer.tokens[:-1]), answer.tokens[-1]] < 0
        assert result.finish == ("stop" if stopped else "length")
        assert '"#' not in result.text
    assert {"stop", "length"} == {result.finish for result in results}


def test_what_a_run_is_told_to_have_cost():
    """No EOS: a start feeds 1 row and then N, a sweep N - 1 beside the reference, whose rows cost nothing."""
    (result,) = PowerSampler(HuggingFaceEngine(model())).generate(
        PROMPTS[:1], config(particles=4, sweeps=2, max_new_tokens=9), seed=SEED, eos_token_id=[]
    )
    assert [sweep.rows for sweep in result.sweeps] == [1 + 8 * 4, 8 * 3, 8 * 3]
    cost = result.cost
    assert (cost.prefill, cost.extension, cost.proposal) == (5, 33, 48)
    assert cost.forwarded == 5 + 33 + 48
    assert cost.forks > 0
    assert cost.copied >= cost.forks  # each takes one position at least
    assert cost.candidates == 3


def test_rows_take_over_no_more_keys_and_values_than_they_lack(monkeypatch):
    """`ParticleState.same` never says more than is the same: compared with the slabs themselves after every step."""
    compared = 0

    def copy_and_compare(run, state):
        nonlocal compared
        original(run, state)
        lane, chain = run.engine._slabs.pairs[0]
        n = state.particles
        for slot in range(state.groups):
            if state.field[slot, GroupField.MODE] != Mode.PROPOSE:
                continue
            rows = [*lane[:, slot * n : (slot + 1) * n].unbind(1), *chain[:, 2 * slot : 2 * slot + 2].unbind(1)]
            for a in range(n + 2):
                for b in range(a):
                    same = int(state.same[slot, a, b])
                    assert same == state.same[slot, b, a]
                    assert torch.equal(rows[a][:, :, :same], rows[b][:, :, :same])
                    compared += same

    original = ParticleRun.copy
    monkeypatch.setattr(ParticleRun, "copy", copy_and_compare)
    drawn(config(sweep_cut="uniform"), num_chains=2, max_chains=3)
    assert compared >= 1000


def test_a_chain_whose_logits_go_bad_stops_alone():
    """The embedding of one token is NaN: chains that meet it as a particle stop, the others do not notice."""
    broken = copy.deepcopy(model())
    with torch.no_grad():
        broken.get_input_embeddings().weight[6] = torch.nan
    engine = HuggingFaceEngine(broken, self_check=False)
    asked = config(particles=2, sweeps=0, max_new_tokens=3)
    results = PowerSampler(engine).generate(PROMPTS, asked, num_chains=16, seed=SEED, eos_token_id=[])
    whole = PowerSampler(HuggingFaceEngine(model())).generate(PROMPTS, asked, num_chains=16, seed=SEED, eos_token_id=[])
    faults = [result.finish == "fault" for result in results]
    assert 2 <= sum(faults) <= len(results) - 8
    for result, sound, fault in zip(results, whole, faults, strict=True):
        if fault:
            assert result.status is Status.NAN
            assert result.tokens == []
        else:
            assert result.tokens == sound.tokens


def test_each_sweep_is_a_step():
    results = drawn(config(sweeps=3))
    for result in results:
        assert result.steps == len(result.left) == len(result.step_logp) == 3
        assert all((o is Outcome.ACCEPTED) == (left >= 0) for o, left in zip(result.outcomes, result.left, strict=True))
        assert result.step_logp[-1] == pytest.approx(result.logp, abs=1e-9)
        assert len(result.sweeps) == 4
        assert result.sweeps[0].left == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kernel="other"), "kernel is 'other'; allowed: 'mh', 'particles'"),
        (dict(particles=1), r"particles is 1; it must lie in \[2, 128\]"),
        (dict(particles=129), r"particles is 129; it must lie in \[2, 128\]"),
        (dict(sweeps=-1), "sweeps is -1"),
        (dict(sweep_cut="any"), "sweep_cut is 'any'; allowed: 'whole', 'uniform'"),
        (dict(rho=1.5), r"rho is 1.5; it must lie in \[0, 1\]"),
        (dict(mcmc_steps=3), "mcmc_steps is 3 with kernel='particles', where it has no effect; it must be 10"),
        (dict(lanes=2), "lanes is 2 with kernel='particles'"),
        (dict(temperature=0.5), "temperature is 0.5 with kernel='particles'"),
        (dict(kernel="mh", particles=16, sweeps=4), "sweeps is 4 with kernel='mh'"),
        (dict(kernel="mh", particles=8, sweeps=1), "particles is 8 with kernel='mh'"),
    ],
)
def test_what_is_wrong_is_said_when_the_configuration_is_made(changes, message):
    with pytest.raises(ArgumentError, match=message):
        config(**changes)


def test_an_engine_that_cannot_is_refused_before_work():
    engine = ToyEngine(power_toy())
    with pytest.raises(ArgumentError, match="kernel is 'particles'; ToyEngine runs 'mh' only"):
        PowerSampler(engine).generate(PROMPTS, config())


def test_transformers_generate_takes_particles():
    from power_kernels.api import power_sample

    results: list = []
    ids = torch.tensor([PROMPTS[0]], device=DEVICE)
    out = model().generate(
        ids, custom_generate=power_sample, max_new_tokens=9, alpha=2.0, kernel="particles", particles=3, sweeps=2,
        seed=SEED, power_results=results, do_sample=False,
    )  # fmt: skip
    (direct,) = PowerSampler(HuggingFaceEngine(model())).generate(PROMPTS[:1], config(), seed=SEED)
    assert out[0, len(PROMPTS[0]) :].tolist() == direct.tokens
    assert len(results[0].sweeps) == 3


def test_select_candidate_is_metropolised():
    """P(the kept candidate is taken) = min(1, (G - g_r) / (G - g_k)), by counting uniforms."""
    uniform = (torch.arange(1000, dtype=torch.float64, device=DEVICE) + 0.5) / 1000
    for others, kept, ref in ((5.0, 2.0, 4.0), (5.0, 5.0, 0.5), (1e-9, 1e-9, 1.0), (3.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        tally = torch.tensor([[others, kept, ref, others + ref]], dtype=torch.float64, device=DEVICE).log()
        moved = pk.select_candidate(tally.expand(1000, 4).contiguous(), uniform)
        expected = 0.0 if others == 0.0 else min(1.0, others / max(others - kept + ref, 1e-300))
        assert float(moved.double().mean()) == pytest.approx(expected, abs=1e-3)
