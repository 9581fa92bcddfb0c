"""Diagnostics of chains: ArviZ's own figures, and the right verdict on toys whose truth is known."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("arviz_stats")
pytest.importorskip("matplotlib")
from arviz_stats.base import array_stats

from power_kernels.api import PowerConfig, PowerSampler
from power_kernels.api.commands.cli import main
from power_kernels.api.commands.output_file import record
from power_kernels.api.experiments import chain_plots, diagnostics
from power_kernels.api.experiments.diagnostics import Chain, diagnose, figures
from power_kernels.errors import ArgumentError
from tests.toys import Toy, ToyEngine, power_toy

MIXING = dict(alpha=2.0, temperature=0.8, max_new_tokens=5, block_size=2, mcmc_steps=4)


def trapped_toy(last: list[list[float]]) -> Toy:
    """Two branches, by the first token. In each, tokens 2 at positions 1 and 2 are drawn rarely and weigh much, since
    nearly one answer follows: a chain finds them one after the other, and a fresh proposal of the other branch has
    neither. last: logits of the last row behind them in each branch."""
    toy = Toy(3, 8, seed=1)
    for prefix in toy.table:
        found = next((i for i, token in enumerate(prefix[1:]) if token != 2), len(prefix) - 1)
        if not prefix:
            row = [0.2, 0, -30]
        elif found >= 2:
            row = last[prefix[0]] if len(prefix) == 7 else [20, 0, 0]
        elif found < len(prefix) - 1:
            row = [0, -1, -1] if found else [0, 0, 0]
        else:
            row = [0, -1.2, -0.75] if found else [0, 0, -0.57]
        toy.table[prefix] = np.float32(row).astype(np.float64)
    return toy


def records(toy: Toy, chains: int, prompts: int = 1, **config) -> list[dict]:
    asked = [[5 + i] for i in range(prompts)]
    out = PowerSampler(ToyEngine(toy)).generate(asked, PowerConfig(**config), num_chains=chains, seed=3)
    return [record(result, {}, "") for result in out]


def drawn(toy: Toy, chains: int, **config) -> list[Chain]:
    return [diagnostics.from_record(line, str(line["chain_id"])) for line in records(toy, chains, **config)]


@pytest.fixture(scope="module")
def mixed():
    return drawn(power_toy(), 4, **MIXING, final_steps=1500)


def trapped(last):
    return drawn(trapped_toy([*last, [0, 0, 0]]), 8, alpha=4.0, max_new_tokens=8, block_size=None, mcmc_steps=2000)


def test_the_figures_are_arviz_s_own_of_the_steps_at_the_last_horizon(mixed):
    """Stages of 2, 4 and 5 tokens: chains that ended early have 1,500 steps at 5, the others 4 more."""
    assert diagnostics.horizons_of(mixed) == [2, 4, 5]
    assert {len(chain.at(5)) for chain in mixed} == {1500, 1504}
    found = diagnose(mixed)
    assert (found.horizon, found.chains, found.steps) == (5, 4, 1500)
    for name in ("logp", "weight"):
        draws = np.array([getattr(chain, name)[-1500:] for chain in mixed])
        of = getattr(found, name)
        assert of.rhat == array_stats.rhat(draws, method="rank")
        assert of.ess_bulk == array_stats.ess(draws, method="bulk")
        assert of.ess_tail == array_stats.ess(draws, method="tail", prob=(0.05, 0.95))
        assert of.mcse == array_stats.mcse(draws, method="mean")
        assert (of.mean, of.sd) == (draws.mean(), draws.std())
    assert found.accepted + found.unchanged + found.rejected == 6000


def test_chains_that_walk_over_the_whole_target_are_called_mixed(mixed):
    """The truth by enumeration: the mean of log p under p^alpha, within four of the reported standard errors."""
    toy = power_toy()
    logp = np.array([toy.logp(answer) for answer in toy.answers(5)])
    mass = np.exp(2 * (logp - logp.max()))
    found = diagnose(mixed)
    assert found.verdict == "mixed", found.reason
    assert abs(found.logp.mean - (mass * logp).sum() / mass.sum()) < 4 * found.logp.mcse
    assert not found.advice


def test_few_steps_of_the_same_chains_are_too_few_to_say():
    found = diagnose(drawn(power_toy(), 4, **MIXING))
    assert found.verdict == "too few steps"
    assert any("final_steps" in line for line in found.advice)
    assert any("block_size=None" in line for line in found.advice)


def test_chains_that_hardly_ever_leave_one_of_two_modes_have_not_mixed():
    chains = trapped([[0.1, 0, -1], [1.5, 1.3, 0]])
    found = diagnose(chains, discard=0.5)
    assert found.moved == 8
    assert found.accepted > 0.05 * 8000
    first = [
        outcome == "A"
        for c in chains
        for outcome, left in zip(c.outcome[1000:], c.left[1000:], strict=True)
        if not left
    ]
    assert len(first) > 400
    assert sum(first) <= 2  # of those that would lead into the other branch
    assert found.verdict == "not mixed"
    assert found.logp.rhat > 1.1
    assert any("alpha" in line for line in found.advice)


def test_chains_whose_proposals_are_never_accepted_are_stuck():
    chains = trapped([[20, 0, 0], [20, 0, 0]])
    found = diagnose(chains, discard=0.5)
    assert found.verdict == "stuck", found
    assert found.accepted < 0.01 * 8000
    assert len({round(float(chain.logp[-1]), 2) for chain in chains}) == 2  # at two answers
    assert any("alpha" in line for line in found.advice)
    assert any("divergence" in line for line in found.advice)  # half of the steps proposed the answer they had


def made(logp, outcome: str = "", horizon=None, left=None, fault: bool = False) -> Chain:
    steps = len(logp)
    return Chain(
        "made",
        np.array(logp, float),
        2 * np.array(logp, float),
        outcome or "A" * steps,
        np.array(left if left is not None else [0] * steps),
        np.array(horizon if horizon is not None else [8] * steps),
        fault,
    )


def test_steps_of_different_horizons_are_not_pooled():
    """Each stage mixes at a level of its own: pooled, they would look like chains that drift."""
    generator = np.random.default_rng(0)
    chains = [
        made(
            np.concatenate([generator.normal(-50, 1, 500), generator.normal(0, 1, 500)]), horizon=[4] * 500 + [8] * 500
        )
        for _ in range(4)
    ]
    for horizon, mean in ((None, 0), (8, 0), (4, -50)):
        found = diagnose(chains, horizon)
        assert (found.steps, found.horizon, found.verdict) == (500, horizon or 8, "mixed")
        assert found.logp.mean == pytest.approx(mean, abs=0.2)
    assert figures(np.array([chain.logp for chain in chains])).rhat > 1.5


def test_chains_without_steps_at_the_horizon_and_faulted_ones_are_counted_and_left_out():
    generator = np.random.default_rng(1)
    good = [made(generator.normal(size=400)) for _ in range(4)]
    found = diagnose([*good, made([0.0] * 9, horizon=[4] * 9), made(generator.normal(size=400), fault=True)])
    assert (found.chains, found.elsewhere, found.verdict) == (4, 2, "mixed")
    assert "2 more chains" in found.reason
    nothing = diagnose([made([])])
    assert (nothing.verdict, nothing.logp) == ("no steps", None)


def test_one_answer_one_chain_and_chance():
    same = [made([-1.0] * 100, "U" * 100, left=[-1] * 100) for _ in range(4)]
    assert diagnose(same).verdict == "one answer"
    assert diagnose(same[:1]).verdict == "too few chains"
    assert diagnose([made([-1.0] * 100, "R" * 100)]).verdict == "stuck"
    generator = np.random.default_rng(2)
    assert diagnose([made(generator.normal(size=400))]).verdict == "too few chains"
    # Ten independent draws a chain: R-hat is above its threshold by chance alone, which says nothing.
    found = [diagnose([made(generator.normal(size=10)) for _ in range(4)]) for _ in range(200)]
    assert sum(d.logp.rhat > diagnostics.RHAT for d in found) > 100
    assert {d.verdict for d in found} == {"too few steps"}
    assert diagnose([made([-1.0 - i] * 200, "R" * 200) for i in range(4)]).verdict == "stuck"
    assert diagnose([made([-1.0 - i, -2.0]) for i in range(4)]).verdict == "too few steps"  # ArviZ needs four


def test_the_chance_of_a_large_rhat_by_chance_is_what_it_says():
    generator = np.random.default_rng(3)
    bound = diagnostics._rhat_by_chance(4, 20)
    values = [array_stats.rhat(generator.normal(size=(4, 20)), method="split") for _ in range(4000)]
    assert np.mean(np.array(values) > bound) < 5 * diagnostics.BY_CHANCE
    assert np.mean(np.array(values) > 1 + (bound - 1) / 2) > 5 * diagnostics.BY_CHANCE


def test_rates_hold_every_step_once():
    chains = [
        made([0] * 5, "RUAAR", horizon=[4, 4, 8, 8, 8], left=[3, -1, 0, 7, 2]),
        made([0] * 2, "AR", horizon=[4, 4], left=[1, 1]),
    ]
    rates = [(r.low, r.accepted, r.unchanged, r.rejected) for r in diagnostics.by_horizon(chains)]
    assert rates == [(4, 1, 1, 2), (8, 2, 0, 1)]
    steps = [(r.low, r.high, r.accepted, r.unchanged, r.rejected) for r in diagnostics.by_step(chains)]
    assert steps == [(0, 1, 2, 0, 1), (1, 2, 1, 1, 1), (2, 3, 0, 0, 1)]
    places = [(r.low, r.high, r.accepted, r.rejected) for r in diagnostics.by_position(chains, bins=4)]
    assert places == [(0, 2, 2, 1), (2, 4, 0, 2), (6, 8, 1, 0)]
    assert diagnostics.by_position(chains, bins=4)[0].interval() == pytest.approx((0.2077, 0.9385), abs=1e-4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("diagnose") / "results.jsonl"
    lines = records(power_toy(), 4, prompts=2, **MIXING, final_steps=600)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_command_tells_verdicts_figures_and_acceptance(results, capsys):
    assert main(["diagnose", str(results)]) == 0
    told = capsys.readouterr().out
    assert "2 prompts, 4 chains each" in told
    assert "Steps of different horizons have different targets" in told
    assert "verdict: " in told
    assert "left at token" in told
    assert main(["diagnose", str(results), "--json", "--horizon", "4", "--discard", "0.25"]) == 0
    found = json.loads(capsys.readouterr().out)[str(results)]
    assert {d["horizon"] for d in found["prompts"].values()} == {4}
    assert {d["steps"] for d in found["prompts"].values()} == {3}
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert sum(rate["accepted"] for rate in found["acceptance"]["horizon"]) == sum(line["accepted"] for line in lines)
    assert not math.isnan(found["prompts"]["0"]["logp"]["mean"])


@pytest.mark.parametrize(
    ("lines", "more", "said"),
    [
        ("no json\n", (), "line 1 is not a record"),
        ('{"prompt_id": 0, "chain_id": 0, "finish": "eos"}\n', (), "has no trace"),
        ("", (), "no chain there has made a step"),
        (None, ("--horizon", "3"), "--horizon is 3, where no step was made; allowed: 2, 4, 5"),
        (None, ("--discard", "1"), "--discard is 1.0"),
    ],
)
def test_what_cannot_be_diagnosed_is_said(results, tmp_path, capsys, lines, more, said):
    path = results
    if lines is not None:
        path = tmp_path / "bad.jsonl"
        path.write_text(lines)
    assert main(["diagnose", str(path), *more]) == 2
    assert said in capsys.readouterr().err


def test_figures_of_nothing_are_refused():
    with pytest.raises(ArgumentError, match="draws"):
        figures(np.zeros((2, 0)))


def test_the_plots_are_drawn_and_what_has_no_data_says_so(results, tmp_path, capsys):
    assert main(["diagnose", str(results), "--plots", str(tmp_path)]) == 0
    names = ["traces.png", "ranks.png", "autocorrelation.png", "acceptance.png"]
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 10_000
        assert name in capsys.readouterr().err or name != names[0]
    few = [made([-1.0 - i] * 5, "RRRUR") for i in range(2)]
    drawn, skipped = chain_plots.draw("few", {"0": few}, {"0": diagnose(few)}, tmp_path)
    assert [path.name for path in drawn] == ["traces.png", "acceptance.png"]
    assert "20 steps" in skipped["ranks.png"]
    assert "changed" in skipped["autocorrelation.png"]
    assert not (tmp_path / "ranks.png").exists()  # of the chains before
