"""DESIGN 9.2: many chains against the exactly computed law of where they must be, and faults that this must catch.

Every test is Pearson's chi-square over all answers that can occur (cells that expect fewer than 5 are pooled, an answer
that cannot occur fails outright), fails at p < 1e-5, and has fixed seeds: it passes or fails for good. Unless it says
otherwise the toy is the one with power, V = 3, H = 5, alpha = 2, beta = 1.25, whose 63 answers spread their mass.
The laws are products of `direct_matrix`, which `test_law_enumeration.py` ties to the reference's own code.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels import reference
from power_kernels.law import CUTS, Law
from power_kernels.ops import dispatch
from power_kernels.reference import Answer, ReferenceChain
from power_kernels.state import ChainField, ChainState, LaneField, Mode, Outcome, Status
from tests import faults
from tests.devices import DEVICE, ON_CUDA, host_only
from tests.exact_law import Run, answer_of, chi_square, direct_matrix, output_law, simulate, space
from tests.toys import Toy, peaked_toy, power_toy

P_VALUE = 1e-5
CHAINS = 32768
ALPHA, BETA = 2.0, 1.25
POWER, PEAKED = power_toy(), peaked_toy()
PEAKED_EXPONENTS = (1.5, 1.25)


@host_only
def test_the_toy_with_power_is_the_design_s():
    logits = np.random.default_rng(20).normal(size=(63, 3))[:31]  # a prefix never holds an EOS: 31 of them
    logits[:, 0] -= 1.5
    assert (np.stack(list(POWER.table.values()))[:31] == logits.astype(np.float32)).all()


# ---------------------------------------------------------------------------------------------------------------
# Samples of the law, and the law


class Sample:
    """(draws, law, runs) of one experiment made by a chain class."""

    def __init__(self, draws: list[Hashable], law: dict, runs: list[Run]):
        self.p_value = chi_square(draws, law)
        self.outcomes = [outcome for run in runs for outcome in run.outcomes]

    def share(self, outcome: Outcome) -> float:
        return self.outcomes.count(outcome) / len(self.outcomes)


def whole_runs(chain, law: Law, chains: int, seed: int, toy: Toy = POWER, exponents=(ALPHA, BETA)) -> Sample:
    alpha, beta = exponents
    runs = simulate(chain, toy, law, alpha=alpha, beta=beta, seed=seed, chains=chains)
    return Sample([run.answer.tokens for run in runs], output_law(toy, law, alpha, beta), runs)


def one_stage(steps: int, **options) -> Law:
    return Law(POWER.horizon, POWER.horizon, steps, **options)


def first_two_answers(chain, chains: int, seed: int) -> Sample:
    """The pair (extension, answer after one step): its joint law shows what the marginal laws may hide."""
    runs = simulate(chain, POWER, one_stage(1), alpha=ALPHA, beta=BETA, seed=seed, chains=chains)
    return joint_sample(runs, "uniform")


def joint_sample(runs: list[Run], cut: str) -> Sample:
    s, matrix = space(POWER, POWER.horizon, ALPHA, BETA), direct_matrix(POWER, POWER.horizon, ALPHA, BETA, cut)
    law = {(x, y): s.proposal[i] * matrix[i, j] for i, x in enumerate(s.answers) for j, y in enumerate(s.answers)}
    return Sample([(run.path[0].tokens, run.path[1].tokens) for run in runs], law, runs)


@functools.cache
def ten_steps(cut: str) -> list[Run]:
    """32,768 chains of ten steps from q, seed 110."""
    return simulate(ReferenceChain, POWER, one_stage(10, cut=cut), alpha=ALPHA, beta=BETA, seed=110, chains=CHAINS)


def from_the_power_law(chain, steps: int, chains: int, seed: int) -> Sample:
    s = space(POWER, POWER.horizon, ALPHA, BETA)
    drawn = np.random.default_rng(seed).choice(len(s.answers), size=chains, p=s.target)
    starts = [s.answers[i] for i in drawn]
    law = one_stage(steps)
    runs = simulate(chain, POWER, law, alpha=ALPHA, beta=BETA, seed=seed, chains=chains, starts=starts)
    return Sample([run.answer.tokens for run in runs], dict(zip(s.answers, s.target, strict=True)), runs)


# ---------------------------------------------------------------------------------------------------------------
# The reference


STAGES = {
    "stages of 2, the last of 1": Law(5, 2, 2),
    "stages of 3 with final steps": Law(5, 3, 1, final_steps=2),
}


@host_only
@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("cut", CUTS)
def test_m_steps_from_q_have_the_law_q_k_to_the_m(cut, steps):
    """32,768 chains, one stage, the same for every m; p < 1e-5 fails; seed 110.

    For m = 1, 2, 10 p = .33, .55, .71 under the uniform cut, .52, .021, .28 under "divergence" and .65, .025, .30
    under "divergence-entropy".
    """
    runs = ten_steps(cut)
    law = output_law(POWER, one_stage(steps, cut=cut), ALPHA, BETA)
    sample = Sample([run.path[steps].tokens for run in runs], law, runs)
    assert sample.p_value >= P_VALUE
    assert min(sample.share(outcome) for outcome in (Outcome.ACCEPTED, Outcome.REJECTED)) > 0.1
    # Every kind of step was seen; no step of a divergence cut is idle.
    assert sample.share(Outcome.UNCHANGED) > 0.1 if cut == "uniform" else sample.share(Outcome.UNCHANGED) == 0.0


@host_only
@pytest.mark.parametrize("cut", CUTS)
def test_an_answer_and_the_next_have_the_joint_law_q_k(cut):
    """32,768 pairs over 63 x 63 cells; p < 1e-5 fails (.78, .69, .76); seed 110."""
    assert joint_sample(ten_steps(cut), cut).p_value >= P_VALUE


@host_only
@pytest.mark.parametrize("name", STAGES)
def test_stages_have_the_law_of_the_product_of_their_matrices(name):
    """32,768 chains with the stop at EOS and the final steps; p < 1e-5 fails; seed 130."""
    assert whole_runs(ReferenceChain, STAGES[name], CHAINS, seed=130).p_value >= P_VALUE


@host_only
def test_sixteen_steps_keep_the_power_law():
    """32,768 chains from exact draws of p^alpha; p < 1e-5 fails; seed 140."""
    assert from_the_power_law(ReferenceChain, 16, CHAINS, seed=140).p_value >= P_VALUE


@host_only
def test_steps_with_weights_near_zero_have_their_law():
    """32,768 chains of 4 steps on the peaked toy, where early rejection decides late; p < 1e-5 fails; seed 150."""
    sample = whole_runs(ReferenceChain, Law(4, 4, 4), CHAINS, 150, PEAKED, PEAKED_EXPONENTS)
    assert sample.p_value >= P_VALUE


@host_only
@pytest.mark.parametrize("cut", ["divergence", "divergence-entropy"])
def test_steps_of_a_divergence_cut_with_weights_near_zero_have_their_law(cut):
    """8,192 chains in two stages with a final step on the peaked toy, where Z spans decades; p < 1e-5 fails (.87, .87);
    seed 155."""
    sample = whole_runs(ReferenceChain, Law(4, 2, 2, final_steps=1, cut=cut), 8192, 155, PEAKED, PEAKED_EXPONENTS)
    assert sample.p_value >= P_VALUE


@host_only
@pytest.mark.parametrize("law", [one_stage(5), Law(5, 2, 2, final_steps=2), one_stage(3, early_rejection=False)])
def test_the_simulation_is_the_plain_reference_chain(law):
    """256 chains, each with the same answer, sums and outcomes as a `ReferenceChain` that computes everything."""
    runs = simulate(ReferenceChain, POWER, law, alpha=ALPHA, beta=BETA, seed=2**63 + 5, chains=256)
    for chain_id, run in enumerate(runs):
        plain = ReferenceChain(
            POWER.logits, law, alpha=ALPHA, beta=BETA, seed=2**63 + 5, eos=POWER.eos, chain_id=chain_id
        )
        assert plain.run() == run.answer
        assert plain.outcomes == run.outcomes
    assert sum(run.outcomes.count(Outcome.ACCEPTED) for run in runs) > 100


# ---------------------------------------------------------------------------------------------------------------
# The kernels


def advance_until_done(
    toy: Toy, law: Law, chains: int, lanes: int, seed: int, alpha: float, beta: float, starts: list | None = None
):
    """The final state of chains driven by sample_tokens and mh_advance, logits looked up by the lanes' tokens.

    starts: closed answers at the last horizon, from which each chain makes `mcmc_steps` steps.
    """
    width = toy.vocab + 1  # a prefix is a number in this base, its tokens plus one
    table = torch.zeros(width**toy.horizon, toy.vocab)  # filled on the host, then moved
    for prefix, row in toy.table.items():
        if len(prefix) < toy.horizon:
            table[sum((v + 1) * width**t for t, v in enumerate(prefix))] = torch.from_numpy(row).float()
    state = ChainState.allocate(chains, lanes, law, DEVICE)
    state.field[:, ChainField.MODE] = Mode.START
    state.field[:, ChainField.BASE] = 1
    if starts is not None:
        one = ReferenceChain(toy.logits, law, alpha=alpha, beta=beta)
        answers = {x: answer_of(one, x) for x in set(starts)}
        hold(state, law, [answers[x] for x in starts])
    rows = chains * lanes
    with torch.device(DEVICE):
        table = table.to(DEVICE)
        state.field[:, ChainField.CHAIN_ID] = torch.arange(chains, dtype=torch.int32)
        length_term = torch.from_numpy(reference.length_table(law)).to(DEVICE)
        key, eos = torch.tensor([seed]), torch.tensor(toy.eos)
        exponents = torch.full((rows,), alpha), torch.full((rows,), beta)
        place = torch.arange(toy.horizon)
        status = torch.full((rows,), int(Status.PENDING), dtype=torch.int32)
        sampled = (torch.zeros(rows, dtype=torch.int64), *torch.zeros(2, rows), status, torch.zeros(rows))
    while not (state.field[:, ChainField.MODE] >= Mode.DONE).all():
        pk.mh_advance(state, law, length_term, key, eos, *sampled)
        lane = state.lane_field.long()
        divergence, position = lane[:, LaneField.DIVERGENCE, None], lane[:, LaneField.POSITION, None]
        own = state.lane_token[:, : toy.horizon]
        kept = state.token[:, : toy.horizon].repeat_interleave(lanes, dim=0)
        tokens = torch.where(place < divergence, kept, own).long() + 1
        code = torch.where(place < position, tokens * width**place, 0).sum(dim=1)
        # A lane that waits, closed at the horizon, is beyond the table; its sample is not used.
        logits = table[torch.where(position[:, 0] < toy.horizon, code, 0)]
        out = pk.sample_tokens(logits, *exponents, key, state.counter, state.exclude, return_entropy=law.needs_entropy)
        sampled = (out.token, out.logq, out.weight, out.status, out.entropy)
    assert (state.field[:, ChainField.MODE] == Mode.DONE).all()
    return state


def hold(state: ChainState, law: Law, answers: list[Answer]) -> None:
    """Let each chain hold an answer that is closed at the last horizon, its first step still to be opened."""
    for f, value in {
        ChainField.MODE: Mode.PROPOSE,
        ChainField.OPENED: 1,
        ChainField.LAST: law.mcmc_steps,
        ChainField.HORIZON: law.max_new_tokens,
        ChainField.STAGE: law.stages,
    }.items():
        state.field[:, f] = value
    state.field[:, ChainField.LENGTH] = torch.tensor([len(x) for x in answers], dtype=torch.int32)
    for name in ("token", "logq", "cumw", "cumz"):
        rows = [(x.tokens if name == "token" else getattr(x, name)) for x in answers]
        tensor = getattr(state, name)
        padded = [[*row, *[0] * (tensor.shape[1] - len(row))] for row in rows]
        tensor.copy_(torch.tensor(padded, dtype=tensor.dtype))


def answers_of(state: ChainState) -> list[tuple[int, ...]]:
    lengths = state.field[:, ChainField.LENGTH].tolist()
    return [tuple(row[:n]) for row, n in zip(state.token.tolist(), lengths, strict=True)]


@pytest.mark.parametrize(
    ("law", "lanes"),
    [
        (one_stage(2), 1),
        (one_stage(10), 3),
        (Law(5, 2, 2, final_steps=1), 2),
        (one_stage(10, early_rejection=False), 1),
        (one_stage(10, cut="divergence"), 3),
        (Law(5, 2, 2, final_steps=1, cut="divergence-entropy"), 2),
    ],
    ids=[
        "2 steps",
        "10 steps, 3 lanes",
        "stages, 2 lanes",
        "10 steps, no early rejection",
        "10 steps, divergence, 3 lanes",
        "stages, entropy, 2 lanes",
    ],
)
def test_chains_of_the_kernels_have_the_law_of_the_product_of_matrices(law, lanes):
    """32,768 chains of sample_tokens and mh_advance, C++ or Triton on a GPU; p < 1e-5 fails; seed 160."""
    if dispatch.EXTENSION_MISSING and not ON_CUDA:
        pytest.skip(dispatch.EXTENSION_MISSING)
    with pk.use_backend("triton" if ON_CUDA else "cpp"):
        state = advance_until_done(POWER, law, CHAINS, lanes, 160, ALPHA, BETA)
    assert chi_square(answers_of(state), output_law(POWER, law, ALPHA, BETA)) >= P_VALUE
    assert (state.outcome == Outcome.ACCEPTED).sum() > CHAINS / 4


@pytest.mark.parametrize("cut", ["divergence", "divergence-entropy"])
def test_sixteen_steps_of_the_kernels_keep_the_power_law_under_a_divergence_cut(cut):
    """32,768 chains on two lanes from exact draws of p^alpha; p < 1e-5 fails; seed 170."""
    if dispatch.EXTENSION_MISSING and not ON_CUDA:
        pytest.skip(dispatch.EXTENSION_MISSING)
    s, law = space(POWER, POWER.horizon, ALPHA, BETA), one_stage(16, cut=cut)
    drawn = np.random.default_rng(170).choice(len(s.answers), size=CHAINS, p=s.target)
    with pk.use_backend("triton" if ON_CUDA else "cpp"):
        state = advance_until_done(POWER, law, CHAINS, 2, 170, ALPHA, BETA, [s.answers[i] for i in drawn])
    assert chi_square(answers_of(state), dict(zip(s.answers, s.target, strict=True))) >= P_VALUE
    assert (state.outcome == Outcome.ACCEPTED).sum() > 8 * CHAINS
    assert chi_square([s.answers[i] for i in drawn], dict(zip(s.answers, s.target, strict=True))) >= P_VALUE


# ---------------------------------------------------------------------------------------------------------------
# Faults


def _ten_steps(chain, chains, seed):
    return whole_runs(chain, one_stage(10), chains, seed)


def _stages(chain, chains, seed):
    return whole_runs(chain, Law(5, 2, 2, final_steps=1), chains, seed)


def _peaked(chain, chains, seed):
    return whole_runs(chain, Law(4, 4, 10), chains, seed, PEAKED, PEAKED_EXPONENTS)


# The experiment that shows each fault best, and the fewest chains (a power of two) that put p below 1e-9 there.
CAUGHT = {
    faults.NoLengthRatio: (_ten_steps, 1024),
    faults.InvertedLengthRatio: (_ten_steps, 512),
    faults.ProposalSumMissesFirstSuffixWeight: (_ten_steps, 256),
    faults.CurrentSumMissesLastWeight: (_ten_steps, 512),
    faults.NoExclusion: (_ten_steps, 1024),
    faults.WeightOfExcludedRow: (_stages, 1024),
    # The same draw and the same acceptance; only later steps keep the token too often, most of all where q is near 1.
    faults.LogqOfExcludedRow: (_peaked, 256),
    faults.EarlyRejectionWithoutCurrentLength: (_ten_steps, 1024),
    # On the toy with power an open proposal is never as improbable as a longer current answer: no chain differs.
    faults.EarlyRejectionWithoutLengths: (_peaked, 8192),
    faults.EarlyRejectionAtHorizonLength: (_peaked, 8192),
    faults.SerialsRestartEachStage: (_stages, 2048),
    # The answer's law hardly moves; that it depends on the one before shows at once.
    faults.FirstProposalSharesExtensionSerial: (first_two_answers, 2048),
    faults.ProposalCappedAtCurrentLength: (_ten_steps, 256),
    faults.KeepTestUsesP: (_peaked, 4096),
    faults.AcceptanceSharesCutUniform: (_ten_steps, 1024),
    faults.TokenSharesKeepUniform: (_ten_steps, 512),
    faults.CutMissesLastPosition: (first_two_answers, 2048),
}


def _entropy_ten_steps(chain, chains, seed):
    return whole_runs(chain, one_stage(10, cut="divergence-entropy"), chains, seed)


def _entropy_peaked(chain, chains, seed):
    return whole_runs(chain, Law(4, 4, 10, cut="divergence-entropy"), chains, seed, PEAKED, PEAKED_EXPONENTS)


# Of the divergence cuts. The others of `faults` move these laws too little; the enumeration catches them.
CAUGHT |= {
    faults.NoZRatio: (_entropy_peaked, 256),
    faults.InvertedZRatio: (_entropy_peaked, 256),
    faults.LengthForZ: (_entropy_peaked, 256),
    faults.ZMissesLastToken: (_entropy_ten_steps, 512),
    faults.ZMissesFirstToken: (_entropy_peaked, 512),
    faults.EntropyOfNextRow: (_entropy_peaked, 512),
    faults.CutOnePositionLate: (_entropy_peaked, 256),
    faults.CutOnePositionEarly: (_entropy_ten_steps, 512),
    faults.UniformDivergence: (_entropy_peaked, 2048),
    faults.WalkAfterDivergence: (_entropy_peaked, 1024),
    faults.EarlyRejectionWithLookahead: (_entropy_peaked, 2048),
}


@functools.cache
def _without_fault(experiment, chains: int) -> float:
    return experiment(ReferenceChain, chains, 31).p_value


@host_only
@pytest.mark.parametrize("fault", CAUGHT, ids=lambda c: c.__name__)
def test_a_fault_is_rejected(fault):
    """p < 1e-5 with the fault, p >= 1e-5 without it in the same experiment; seed 31."""
    experiment, chains = CAUGHT[fault]
    assert experiment(fault, chains, 31).p_value < P_VALUE
    assert _without_fault(experiment, chains) >= P_VALUE


@host_only
@pytest.mark.parametrize("change", faults.HARMLESS, ids=lambda c: c.__name__)
def test_a_harmless_change_is_not_rejected(change):
    """2,048 chains each on the peaked toy; p < 1e-5 fails; seed 31."""
    assert _peaked(change, 2048, 31).p_value >= P_VALUE
