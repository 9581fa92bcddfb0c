"""bench/quality.py: means over the selection against enumeration, plain SMC, cells that are kept, what must hold."""

import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import end_to_end  # noqa: E402
import quality  # noqa: E402
import selection  # noqa: E402
import shapes  # noqa: E402
import smc  # noqa: E402

from power_kernels.api import HuggingFaceEngine, PowerConfig, PowerSampler  # noqa: E402
from power_kernels.api.driver.particles.run import ParticleRun  # noqa: E402
from power_kernels.particles import Tally  # noqa: E402
from power_kernels.reference.particles import moves  # noqa: E402
from tests import tiny_models  # noqa: E402

PROMPT, ALPHA, BONUS = [5, 9, 7], 2.0, 0.4
VOCAB = tiny_models.VOCAB
EOS = 96  # the second likeliest first token, p = 0.11


@pytest.fixture(scope="module")
def model():
    return tiny_models.llama(eos_token_id=EOS)


@pytest.fixture(scope="module")
def sampler(model):
    return PowerSampler(HuggingFaceEngine(model))


@pytest.fixture(scope="module")
def answers(model) -> dict[tuple[int, ...], float]:
    """log p of every answer of at most two tokens, by forward passes of the model."""
    with torch.inference_mode():
        first = model(torch.tensor([PROMPT])).logits[0, -1].double().log_softmax(-1)
        prompts = torch.tensor([[*PROMPT, v] for v in range(VOCAB)])
        second = model(prompts).logits[:, -1].double().log_softmax(-1)
    found = {(EOS,): float(first[EOS])}
    for v in range(VOCAB):
        if v != EOS:
            found |= {(v, w): float(first[v] + second[v, w]) for w in range(VOCAB)}
    return found


def mass(logp: float, length: int) -> float:
    return math.exp(ALPHA * logp + BONUS * length)


# ---- means over the selection


def test_the_mean_over_the_selection_is_the_one_by_enumeration(sampler, answers):
    """As many particles as prefixes, so every answer is a candidate: the start's mean is that of p^alpha e^(lambda n),
    and a sweep's follows from Metropolised Gibbs sampling by hand, given the answer that the start drew."""
    config = PowerConfig(
        kernel="particles", particles=VOCAB, sweeps=1, alpha=ALPHA, max_new_tokens=2, length_bonus=BONUS
    )
    with selection.watched() as sweeps:
        (result,) = sampler.generate([PROMPT], config, eos_token_id=EOS)
    total = sum(mass(logp, len(x)) for x, logp in answers.items())
    pi = {x: mass(logp, len(x)) / total for x, logp in answers.items()}
    start, sweep = (s.candidates for s in sweeps)
    assert start.mean()[0] == pytest.approx(sum(pi[x] * logp for x, logp in answers.items()), abs=1e-4)
    assert start.mean()[1] == pytest.approx(sum(pi[x] * len(x) for x in answers), abs=1e-4)

    before = next(x for x, logp in answers.items() if abs(logp - result.sweeps[0].logp) < 1e-5)
    away = {x: p / (1 - pi[before]) * min(1, (1 - pi[before]) / (1 - p)) for x, p in pi.items() if x != before}
    after = away | {before: 1 - sum(away.values())}
    assert sweep.mean()[0] == pytest.approx(sum(p * answers[x] for x, p in after.items()), abs=1e-4)
    assert sweep.reference[1:] == pytest.approx((answers[before], len(before)), abs=1e-5)
    # One forward pass a token; the first row of a sweep is known.
    assert [s.sequential for s in sweeps] == [2, 1]
    assert sampler.last_run.sequential == 3


def test_the_probabilities_of_the_selection_are_those_of_the_operator():
    """Each candidate is kept in proportion to its weight, and moves as the reference's `moves` does over uniforms."""
    weights, reference = torch.tensor([-1.0, -2.0, 0.5, -0.2], dtype=torch.float64), -0.4
    found = selection.Candidates()
    found.add(weights[:2], torch.zeros(2, dtype=torch.float64), 3)
    found.add(weights[2:], torch.ones(2, dtype=torch.float64), 4)
    assert found.probabilities()[0] == pytest.approx(weights.softmax(0))
    found.reference = (reference, -7.0, 2)
    p, stays = found.probabilities()
    uniforms, kept = (np.arange(4000) + 0.5) / 4000, weights.softmax(0)
    for k in range(4):
        tally = [0.0] * len(Tally)
        tally[Tally.OTHERS], tally[Tally.KEPT] = float(weights.logsumexp(0)), float(weights[k])
        tally[Tally.REFERENCE] = reference
        moved = statistics.fmean(moves(tally, u) for u in uniforms)
        assert float(p[k]) == pytest.approx(float(kept[k]) * moved, abs=3e-4)
    assert stays == pytest.approx(1 - float(p.sum()))
    assert found.mean()[0] == pytest.approx(float(p[2:].sum()) - 7.0 * stays)


def test_a_candidate_that_weighs_nothing_is_forgotten():
    found = selection.Candidates()
    found.add(torch.tensor([-500.0, -3.0]).double(), torch.tensor([-1.0, -2.0]).double(), 1)
    found.add(torch.tensor([0.0]).double(), torch.tensor([-5.0]).double(), 2)
    assert found.logp.tolist() == [-2.0, -5.0]
    assert found.length.tolist() == [1, 2]


def test_the_two_means_of_log_p_agree(sampler):
    """The mean over the selection less the answer's own log p has mean 0: 40 chains of the start and two sweeps."""
    bench = quality.Bench(shapes.Subject("", "", torch.device("cpu"), None, sampler, [PROMPT], None))
    setting = quality.Setting(4, 1.5, True, 0.5)
    chains = [points for _, points in bench.answers(quality.Method("particles-3+2"), setting, 0, list(range(40)))]
    for of_sweep in zip(*chains, strict=True):
        for own, mean in (("logp", "mean_logp"), ("length", "mean_length")):
            gaps = [getattr(p, own) - getattr(p, mean) for p in of_sweep]
            assert abs(statistics.fmean(gaps)) <= 3 * statistics.stdev(gaps) / math.sqrt(len(gaps))
        assert statistics.pstdev(p.logp for p in of_sweep) > 0.1


# ---- plain SMC


def test_resampling_keeps_the_mass_and_rounds_the_shares():
    random = np.random.default_rng(0)
    weight = np.log([0.5, 0.3, 0.15, 0.05]) - 2
    for _ in range(20):
        ancestor, after = smc.resampled(weight, 8, random, always=True)
        counts = np.bincount(ancestor, minlength=4)
        assert np.all(np.abs(counts - 8 * np.array([0.5, 0.3, 0.15, 0.05])) < 1)
        assert np.exp(after).sum() == pytest.approx(math.exp(-2))
    # (sum w)^2 / sum w^2 is 2.74: enough for N = 5, not for 6.
    assert smc.resampled(weight, 5, random, always=False)[0].tolist() == [0, 1, 2, 3]
    assert len(smc.resampled(weight, 6, random, always=False)[0]) == 6


def test_no_row_that_is_copied_from_is_written():
    lane = np.array([3, 3, 1, 3, 1])
    row = smc.placed(lane, 6)
    assert row.tolist() == [3, 0, 1, 2, 4]
    assert all(lane[list(row).index(r)] == r for r in set(lane.tolist()))


def test_plain_smc_estimates_the_normalising_constant(model, sampler, answers):
    """E Zhat = Z, with answers that end at different lengths, over 100 runs of 8 particles; log p is the model's."""
    config = PowerConfig(kernel="particles", particles=8, sweeps=0, alpha=ALPHA, max_new_tokens=2, length_bonus=BONUS)
    total = sum(mass(logp, len(x)) for x, logp in answers.items())
    ratios, ends = [], set()
    for chain in range(100):
        with selection.watched(smc.smc) as sweeps:
            (result,) = sampler.generate([PROMPT], config, eos_token_id=EOS, prompt_ids=[chain])
        assert result.logp == pytest.approx(answers[tuple(result.tokens)], abs=1e-4)
        assert len(sweeps[0].candidates.logp) >= 8  # of two positions
        ratios.append(math.exp(result.sweeps[0].log_total) / total)
        ends.add(result.finish)
    assert abs(statistics.fmean(ratios) - 1) <= 3 * statistics.stdev(ratios) / math.sqrt(len(ratios))
    assert statistics.stdev(ratios) < 0.5
    assert ends == {"eos", "length"}


def test_long_answers_of_plain_smc_have_the_log_p_of_the_model(model, sampler):
    """Twelve tokens with forks and resampling: the keys and values of every row are those of its prefix."""
    config = PowerConfig(kernel="particles", particles=6, sweeps=0, alpha=ALPHA, max_new_tokens=12)
    with selection.watched(smc.smc):
        (result,) = sampler.generate([PROMPT], config, eos_token_id=[])
    assert result.cost.forks > 6
    ids = torch.tensor([[*PROMPT, *result.tokens]])
    with torch.inference_mode():
        logp = model(ids).logits[0, len(PROMPT) - 1 : -1].double().log_softmax(-1)
    assert result.token_logp == pytest.approx(logp.gather(1, ids[0, len(PROMPT) :, None])[:, 0].tolist(), abs=1e-4)


def test_only_one_chain_is_watched_and_the_driver_is_as_before(sampler):
    original = ParticleRun.branch
    config = PowerConfig(kernel="particles", particles=2, sweeps=0, alpha=ALPHA, max_new_tokens=2)
    with pytest.raises(ValueError, match="2 chains at once"), selection.watched():
        sampler.generate([PROMPT], config, num_chains=2, max_chains=2, eos_token_id=[])
    assert ParticleRun.branch is original


# ---- cells


@pytest.fixture(scope="module")
def tiny():
    return shapes.subject("tiny", torch.device("cpu"), 3, [], entropy=3.0)


@pytest.fixture
def quick(tiny, monkeypatch, tmp_path):
    """Runs the command in miniature; returns its document."""
    monkeypatch.setattr(quality, "subject", lambda *a, **k: tiny)

    def run(*more: str, name: str = "quality.json") -> dict:
        path = tmp_path / name
        base = ["--model", "tiny", "--device", "cpu", "--quick", "--json", str(path)]
        assert end_to_end.main(["quality", *base, *more]) == 0
        return json.loads(path.read_text())

    return run


def test_forward_passes_are_counted_of_answers_that_were_drawn_alone(tiny):
    """With one lane a forward pass is a row; what the chain remembers is none. 24 tokens, 12 steps."""
    bench, setting = quality.Bench(tiny), quality.Setting(24, 4.0, False, 0.0)
    beside = dict(bench.answers(quality.Method("mh-3x4"), setting, 0, [0, 1, 2]))
    for answer in range(3):
        ((_, (alone,)),) = bench.answers(quality.Method("mh-3x4"), setting, 0, [answer])
        report = tiny.sampler.last_run
        assert alone.sequential == alone.rows == report.sequential == report.lane_steps
        assert 24 < alone.sequential < report.decode_steps
        ((_, (lanes,)),) = bench.answers(quality.Method("mh-3x4-4"), setting, 0, [answer])
        assert lanes.sequential < alone.sequential <= lanes.rows
        assert (beside[answer][0].sequential, beside[answer][0].rows) == (None, None)
        assert beside[answer][0].logp == pytest.approx(alone.logp, abs=1e-3)


def test_rows_are_means_over_prompts_of_means_over_answers(quick):
    document = quick("--only", "plain,particles-4+1,smc-4,mh-2x2-2")
    labels = [row["label"] for row in document["table"]]
    particles = ["particles, N = 4, start", "particles, N = 4, 1 sweep"]
    assert labels == ["plain", *particles, "SMC, N = 4", "MH 2 x 2, 2 lanes"]
    assert len(document["cells"]) == 4 * 2 * 2
    row = document["table"][2]
    of = {
        p: [c["points"][1] for c in document["cells"] if (c["method"], c["prompt"]) == ("particles-4+1", p)]
        for p in (0, 1)
    }
    means = [statistics.fmean(point["mean_logp"] for point in of[p]) for p in of]
    assert row["mean_logp"]["value"] == pytest.approx(statistics.fmean(means))
    errors = [statistics.variance([point["mean_logp"] for point in of[p]]) / 2 for p in of]
    assert row["mean_logp"]["error"] == pytest.approx(math.sqrt(sum(errors)) / 2)
    assert (document["table"][1]["sequential"]["value"], row["sequential"]["value"]) == (8, 15)
    assert document["table"][1]["rows"]["value"] == 1 + 7 * 4  # 199 children of the empty prefix


def test_answers_side_by_side_count_for_log_p_alone(quick):
    every = quick("--only", "plain,mh-2x2,particles-2+0", "--answers", "3", name="every.json")["table"]
    some = quick("--only", "plain,mh-2x2,particles-2+0", "--answers", "3", "--alone", "1")
    assert [row["answers"] for row in some["table"]] == [6, 6, 6]
    for one, other in zip(every, some["table"], strict=True):
        assert other["logp"]["value"] == pytest.approx(one["logp"]["value"], abs=1e-3)
    counted = [c["points"][0]["sequential"] is not None for c in some["cells"] if c["method"] != "particles-2+0"]
    assert (sum(counted), len(counted)) == (4, 12)
    assert all(row["sequential"]["value"] for row in some["table"])
    none = quick("--only", "plain", "--alone", "0", name="none.json")
    assert none["table"][0]["sequential"]["value"] is None


def test_an_interrupted_run_goes_on_and_more_options_add_to_the_file(quick, monkeypatch, tmp_path):
    whole = quick("--only", "particles-2+0,mh-2x2-2", name="whole.json")
    calls, answers = [], quality.Bench.answers

    def interrupted(self, method, setting, prompt, wanted):
        calls.append((method.name, prompt, *wanted))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answers(self, method, setting, prompt, wanted)

    monkeypatch.setattr(quality.Bench, "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick("--only", "particles-2+0,mh-2x2-2")
    assert len(json.loads((tmp_path / "quality.json").read_text())["cells"]) == 3
    document = quick("--only", "particles-2+0,mh-2x2-2")
    assert len(calls) == 3 + 1 + 5  # the fourth again
    assert document["table"] == whole["table"]
    more = quick("--only", "plain", "--alpha", "2")
    assert more["cells"][:8] == document["cells"]
    assert len(more["cells"]) == 12
    assert quick("--only", "plain", "--alpha", "2", "--seconds", "0")["cells"] == more["cells"]


def test_what_another_command_wrote_meanwhile_is_kept(tiny, tmp_path):
    path, setting = tmp_path / "quality.json", {"tokens": 8, "alpha": 4.0, "eos": False, "length_bonus": 0.0}
    point = dict(sweeps=None, sequential=8, rows=8, length=8, logp=-1.0, mean_logp=-1.0, mean_length=8)
    both = [quality.Kept(str(path), tiny) for _ in range(2)]
    for answer, kept in enumerate(both):
        cell = {"method": "plain", "prompt": 0, "answer": answer, **setting, "points": [point]}
        kept.cells[quality.key(cell)] = cell
        kept.write(quality.argparse.Namespace(json=None), {})
    assert len(json.loads(path.read_text())["cells"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quality.json"]


def test_the_wall_clock_runs_both_in_alternating_order(quick, monkeypatch):
    order, timed = [], quality.timed

    def noted(call, sampler, device):
        out = timed(call, sampler, device)
        order.append(sampler.last_run.slots * sampler.last_run.lanes if out.report["sequential"] == 15 else "mh")
        return out

    monkeypatch.setattr(quality, "timed", noted)
    document = quick("--clock", "--pairs", "1")
    assert order[2:] == ["mh", 16]  # after a pair that nothing counts
    assert [(cell["tokens"], cell["pair"]) for cell in document["clock"]] == [(8, 0)]
    runs = document["clock"][0]["runs"]
    assert quality.clock_ratio(document["clock"]) == runs["particles-16+1"]["wall"] / runs["mh-8x10-default"]["wall"]
    assert document["targets"][-1]["value"] is None  # that is of T = 128
    order.clear()
    bench, setting = quality.Bench(quality.subject()), quality.Setting(8, 4.0, False, 0.0)
    quality.clock_cell(bench, setting, 1, lambda text: None)
    assert order == [16, "mh"]


# ---- what must hold, what is refused


def cells(method: str, tokens: int, logp: dict[int, float], sweeps: int | None = None, forwards: int = 0) -> list[dict]:
    """Two answers a prompt, a nat apart."""
    return [
        {
            "method": method, "prompt": prompt, "answer": answer, "tokens": tokens, "alpha": 4.0, "eos": False,
            "length_bonus": 0.0, "points": [quality.asdict(quality.Point(
                sweeps, forwards, 30 * tokens, tokens, 0.0, value + answer - 0.5, tokens
            ))],
        }
        for prompt, value in logp.items() for answer in (0, 1)
    ]  # fmt: skip


def test_targets_compare_with_metropolis_hastings_of_the_same_length():
    found = [
        *cells("mh-8x10", 64, {0: -35.0, 1: -20.0}),
        *cells("mh-8x10", 128, {0: -70.0, 1: -50.0, 2: -60.0}),
        *cells("particles-16+2", 64, {0: -31.0, 1: -19.0}, 1, forwards=130),
        *cells("particles-32+0", 64, {0: -32.0, 1: -18.5}, 0, forwards=70),
        *cells("particles-32+0", 128, {0: -59.0, 1: -41.0, 2: -50.0}, 0),
    ]
    verdicts = quality.verdicts(quality.rows_of(found), [])
    assert [item["value"] for item in verdicts] == [30, 130 / 64, 2.5, 70 / 64, 2.25, 2, None]
    assert [item["met"] for item in verdicts] == [True, True, True, False, False, True, None]
    assert "(standard error 0.50)" in verdicts[2]["target"]
    assert [item["value"] for item in quality.verdicts(quality.rows_of(found[:4]), [])] == [None] * 7


def test_methods_are_what_their_names_say():
    setting = quality.Setting(20, 4.0, True, 0.5)
    config = quality.Method("mh-3x5-2").config(setting)
    assert (config.block_size, config.mcmc_steps, config.lanes, config.length_bonus) == (7, 5, 2, 0.5)
    assert quality.Method("mh-3x5-default").config(setting).lanes is None
    config = quality.Method("particles-8+3").config(setting)
    assert (config.kernel, config.particles, config.sweeps, config.alpha) == ("particles", 8, 3, 4.0)
    assert (config.rho, quality.Method("particles-8+3-rho0.1").config(setting).rho) == (0.0, 0.1)
    assert quality.Method("particles-8+1-rho0.1").label(1) == "particles, N = 8, rho 0.1, 1 sweep"
    assert (quality.Method("smc-8").config(setting).sweeps, quality.Method("plain").config(setting).alpha) == (0, 1.0)
    assert quality.Method("cold").config(setting).beta == 4.0
    assert all(quality.Method(name).config(setting) for name in quality.METHODS.split(","))


@pytest.mark.parametrize(
    "options",
    [
        ["--only", "mh-8"], ["--only", "particles-1+0"], ["--only", "particles-8+0-rho2"], ["--eos", "maybe"],
        ["--eos", "on"], ["--tokens", "0"], ["--prompts", "4"], ["--alone", "-1"],
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused(options, tiny, monkeypatch, capsys):
    monkeypatch.setattr(quality, "subject", lambda *a, **k: tiny)
    with pytest.raises(SystemExit, match="2"):
        quality.main(["--model", "tiny", "--device", "cpu", *options])
    assert "error" in capsys.readouterr().err


def test_a_file_of_something_else_is_not_written_over(tiny, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(quality, "subject", lambda *a, **k: tiny)
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"suite": "latency"}))
    with pytest.raises(SystemExit, match="2"):
        quality.main(["--model", "tiny", "--device", "cpu", "--json", str(path)])
    assert "is not a result of this suite" in capsys.readouterr().err
    assert json.loads(path.read_text()) == {"suite": "latency"}
