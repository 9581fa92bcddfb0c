"""Plots of whole answers: what is summed, binned and bounded before it is drawn, and that all is drawn."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import end_to_end_plots as plots
import plots as command

ACCOUNT = {
    "prefill": 10, "extension": 8, "proposal": 20, "accepted": 9, "rejected": 7, "voided": 4, "recalled": 5,
    "saved_prefix": 6, "saved_early": 3,
}  # fmt: skip


def run(**changes) -> dict:
    """A chain of 8 tokens in 2 blocks of 2 steps, as a suite writes it."""
    seconds = {
        "prefill": 0.5,
        "forward": 1.8,
        "sample": 0.1,
        "advance": 0.05,
        "transfer": 0.05,
        "replay": 0,
        "other": 0,
    }
    values = {
        "cpu": 2.0, "wall": 2.5, "forwarded": 33, "answers": [[1] * 8], "logp": [-3.0], "steps": 4, "accepted": 1,
        "unchanged": 1, "account": ACCOUNT, "outcomes": [[0, 2, 1, 0]], "left": [[3, 0, -1, 7]],
        "report": {"decode_steps": 20, "lanes": 1, "seconds": seconds},
    }  # fmt: skip
    return {**values, **changes}


def measured(tmp_path, suite: str, runs: dict, **more) -> plots.Measured:
    document = {
        "suite": suite,
        "setting": {"tokens": 8, "blocks": 2, "steps": 2, "alpha": 4.0, "context": 24},
        "machine": {"cpu": "a CPU", "threads": 1, "torch": "2.0", "date": "2026-01-01"},
        "cells": [{"runs": runs}],
        **more,
    }
    path = tmp_path / f"{suite}.json"
    path.write_text(json.dumps(document))
    return plots.Measured(path)


def test_the_causes_of_tokens_add_up_to_what_was_forwarded_and_recalled():
    two = plots.account_of([run(), run(forwarded=35, account={**ACCOUNT, "recalled": 3})])
    assert two["forwarded"] == 34
    assert sum(two.get(cause, 0) for cause in plots.CAUSES) == two["forwarded"] + two["recalled"]
    assert plots.account_of([run(account={}, answers=[[1], [2]])]) == {"forwarded": 16.5, "unsplit": 16.5}
    unknown = plots.account_of([run(account={**ACCOUNT, "saved_early": None})])
    assert "saved_early" not in unknown
    older = {name: value for name, value in ACCOUNT.items() if name not in ("accepted", "rejected", "voided")}
    assert plots.account_of([run(account=older)])["proposal"] == 20


def test_proposals_are_counted_once_with_the_horizon_of_their_stage(tmp_path):
    """Steps 0 and 1 end at 4, 2 and 3 at 8; step 2 left nothing. Any number of lanes is the same chain: one counts."""
    found = plots.proposals(measured(tmp_path, "latency", {"plain": run(left=[[]], steps=0), "1": run(), "2": run()}))
    assert found == [(3, 4, False), (0, 4, True), (7, 8, False)]


def test_a_batch_holds_the_single_chains_so_only_its_proposals_count(tmp_path):
    """ours-1 is the first row of ours-16: three proposals that left the answer in each of its two rows, not nine."""
    batch = run(steps=8, outcomes=[[0, 2, 1, 0], [2, 2, 2, 1]], left=[[3, 0, -1, 7], [1, 2, 5, -1]])
    found = plots.proposals(measured(tmp_path, "cost", {"ours-1": run(), "lanes-1": run(), "ours-16": batch}))
    assert found == [(3, 4, False), (0, 4, True), (7, 8, False), (1, 4, True), (2, 4, True), (5, 8, True)]


def test_bins_hold_every_proposal_and_their_intervals_are_wilsons():
    values = [(0, True), (1, False), (7, True), (8, True)]  # 8 of 8: the whole answer is written again
    bins = plots.binned(values, most=8, bins=4)
    assert [(b.low, b.high, b.count, b.accepted) for b in bins] == [(0, 2, 2, 1), (6, 8, 2, 2)]
    assert sum(b.count for b in bins) == len(values)
    # Wilson's interval of 0 and of 5 of 10, from his formula by hand.
    for accepted, expected in ((0, (0.0, 0.2775)), (5, (0.2366, 0.7634))):
        assert plots.Bin(0, 1, 10, accepted).interval() == pytest.approx(expected, abs=2e-4)


KEPT = {
    # Older than the places of proposals and the driver's report: the account alone.
    "end_to_end": ["cost_account.png"],
    "end_to_end_one_chain": ["cost_account.png", "cost_cuts.png", "cost_phases.png"],
    "latency": ["latency_account.png", "latency_cuts.png", "latency_phases.png", "latency.png"],
    "throughput": ["throughput_account.png", "throughput_cuts.png", "throughput_phases.png", "throughput.png"],
}


@pytest.mark.parametrize("name", KEPT)
def test_the_kept_results_of_whole_answers_are_drawn(tmp_path, name):
    source = Path(command.__file__).parent / "results" / "cpu" / f"{name}.json"
    assert [path.name for path in command.draw(source, tmp_path)] == KEPT[name]


def test_what_was_not_measured_is_not_drawn(tmp_path):
    reason = {"not_measured": "memory did not hold it"}
    step = {"lanes": 1, "seconds": 1e-3, "roofline_seconds": 1e-3, "of_roofline": 1.0}
    table = [step, {"lanes": 64, **reason}]
    found = measured(tmp_path, "decode", {}, table=table, shape="tiny", cells=[])
    assert plots.decode(found, tmp_path).exists()
    found.data["table"] = table[1:]
    assert plots.decode(found, tmp_path) is None
    ours, plain = {"method": "ours", **reason}, {"method": "plain", "answers_per_s": 2.0}
    found = measured(tmp_path, "throughput", {}, table=[plain, ours])
    assert plots.throughput(found, tmp_path).exists()
    found = measured(tmp_path, "latency", {"plain": run(), "1": run(), "8": run()}, table=[{"lanes": "8", **reason}])
    assert plots.latency(found, tmp_path).exists()


def quality_row(method: str, sweeps: int | None, forwards: float | None, tokens: int = 64, **changes) -> dict:
    def mean(value):
        return {"value": value, "error": value and 0.5, "prompts": {"0": value} if value else {}}

    setting = {"tokens": tokens, "alpha": 4.0, "eos": False, "length_bonus": 0.0} | changes
    of = {"setting": setting, "method": method, "sweeps": sweeps, "label": method, "answers": 2}
    return of | {"sequential": mean(forwards), "logp": mean(-30.0), "mean_logp": mean(-31.0)}


def test_every_setting_of_the_quality_suite_has_a_panel_and_every_method_a_line(tmp_path, monkeypatch):
    rows = [
        quality_row(method, sweeps, forwards, tokens, eos=eos)
        for tokens, eos in ((64, False), (128, False), (64, True), (128, True))
        for method, sweeps, forwards in (
            ("plain", None, 64), ("mh-8x10", None, 700), ("mh-8x10-4", None, 400), ("particles-16+1", 0, 64),
            ("particles-16+1", 1, 127), ("particles-4+0", 0, 64),
            ("particles-16+0-rho0.1", 0, 40), ("smc-16", None, 64), ("mh-4x5", None, None),
        )
    ]  # fmt: skip
    found = measured(tmp_path, "quality", {}, table=rows)
    kept = []
    monkeypatch.setattr(plots, "save", lambda fig, folder, name: kept.append((fig, name)))
    plots.quality(found, tmp_path)
    ((fig, name),) = kept
    assert name == "quality.png"
    shown = [ax for ax in fig.axes if ax.get_visible()]
    assert [ax.get_title(loc="left") for ax in shown] == [
        "T = 64, alpha 4, no EOS", "T = 128, alpha 4, no EOS", "T = 64, alpha 4, EOS ends an answer",
        "T = 128, alpha 4, EOS ends an answer",
    ]  # fmt: skip
    lines = {line.get_label(): line.lines[0].get_xdata() for line in shown[0].containers}
    assert list(lines) == [
        "particles, N = 4: start, then sweeps", "particles, N = 16, rho 0.1: start, then sweeps",
        "particles, N = 16: start, then sweeps", "SMC",
        "Metropolis-Hastings, 4 lanes", "Metropolis-Hastings, one proposal at a time", "plain",
    ]  # fmt: skip
    assert list(lines["particles, N = 16: start, then sweeps"]) == [1, 127 / 64]
    assert list(lines["Metropolis-Hastings, one proposal at a time"]) == [700 / 64]  # without what was not counted
    found.data["table"] = []
    assert plots.quality(found, tmp_path) is None


def test_plain_answers_far_below_the_others_do_not_squeeze_them(tmp_path, monkeypatch):
    rows = [quality_row("plain", None, 64), quality_row("mh-8x10", None, 700), quality_row("smc-16", None, 64)]
    for row, nats in zip(rows, (-200.0, -40.0, -35.0), strict=True):
        row["mean_logp"]["value"] = nats
    kept = []
    monkeypatch.setattr(plots, "save", lambda fig, folder, name: kept.append(fig))
    plots.quality(measured(tmp_path, "quality", {}, table=rows), tmp_path)
    rows[0]["mean_logp"]["value"] = -44.0
    plots.quality(measured(tmp_path, "quality", {}, table=rows), tmp_path)
    far, near = (fig.axes[0] for fig in kept)
    assert far.get_ylim()[0] > -50
    assert "plain: -200, far below" in [text.get_text() for text in far.texts]
    assert near.get_ylim()[0] < -44
    assert not any("far below" in text.get_text() for text in near.texts)


def test_everything_that_was_measured_is_drawn(tmp_path):
    rows = [
        {"method": "plain", "answers_per_s": 2.0},
        {"method": "ours", "answers_per_s": 0.5},
    ]
    steps = [
        {"lanes": lanes, "seconds": 1e-3 * lanes, "roofline_seconds": 1e-3, "of_roofline": 1 / lanes}
        for lanes in (1, 2)
    ]
    expected = {
        "latency": ["latency_account.png", "latency_cuts.png", "latency_phases.png", "latency.png"],
        "quality": ["quality.png"],
        "throughput": ["throughput_account.png", "throughput_cuts.png", "throughput_phases.png", "throughput.png"],
        "cost": ["cost_account.png", "cost_cuts.png", "cost_phases.png"],
        "decode": ["decode_tiny.png"],
    }
    one = {
        "latency": {"plain": run(), "1": run(), "2": run(), "default": run()},
        "throughput": {"plain": run(account={}, report={}, outcomes=[], left=[]), "ours": run()},
        "cost": {"plain-1": run(account={}, report={}, outcomes=[], left=[]), "ours-1": run()},
        "quality": {},
        "decode": {},
    }
    quality = [quality_row("plain", None, 64), quality_row("mh-8x10", None, 700)]
    more = {
        "throughput": {"table": rows},
        "quality": {"table": quality, "cells": []},
        "decode": {"table": steps, "shape": "tiny", "cells": []},
    }
    for suite, names in expected.items():
        measured(tmp_path, suite, one[suite], **more.get(suite, {}))
        drawn = command.draw(tmp_path / f"{suite}.json", tmp_path / "out")
        assert [path.name for path in drawn] == names
        assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in drawn)
