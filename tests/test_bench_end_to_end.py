"""The suites of bench/end_to_end.py in miniature: what they time, what they make of it, what they say without a GPU."""

import importlib
import json
import math
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import common  # noqa: E402
import decode  # noqa: E402
import end_to_end  # noqa: E402
import latency  # noqa: E402
import opponents  # noqa: E402
import shapes  # noqa: E402
import throughput  # noqa: E402

from power_kernels.api import PowerConfig  # noqa: E402
from power_kernels.api.driver.run import Run  # noqa: E402

CPU = torch.device("cpu")
# Next-token entropy of the tiny model: at 3 of at most 5.3 nats its proposals leave the answer, and some are accepted.
NATS = "3.0"


@pytest.fixture(scope="module")
def tiny():
    return shapes.subject("tiny", CPU, 1, [], entropy=float(NATS))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """suite -> what it wrote in its run with the tiny model. 24 tokens in 3 blocks of 4 steps: 12 steps a chain."""
    folder = tmp_path_factory.mktemp("suites")
    sizes = ["--tokens", "24", "--blocks", "3", "--steps", "4"]
    options = {
        "latency": ["--quick", *sizes, "--entropy", NATS],
        "throughput": ["--quick", *sizes, "--entropy", NATS],
        "decode": [],
    }
    documents = {}
    for suite, more in options.items():
        path = folder / f"{suite}.json"
        assert end_to_end.main([suite, "--model", "tiny", "--device", "cpu", *more, "--json", str(path)]) == 0
        documents[suite] = json.loads(path.read_text())
    return folder, documents


# ---- the command


def test_every_suite_explains_itself(capsys):
    for suite in end_to_end.SUITES:
        with pytest.raises(SystemExit, match="0"):
            end_to_end.main([suite, "--help"])
        assert "--quick" in capsys.readouterr().out
    assert end_to_end.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(suite in said for suite in end_to_end.SUITES)


def test_an_unknown_suite_is_named_and_none_is_the_costs(monkeypatch, capsys):
    assert end_to_end.main(["speed"]) == 2
    assert "no suite 'speed'" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(importlib.import_module("cost"), "main", lambda given: asked.append(given) or 0)
    assert end_to_end.main(["--quick", "--only", "ours-1"]) == 0
    assert end_to_end.main(["cost"]) == 0
    assert asked == [["--quick", "--only", "ours-1"], []]


@pytest.mark.parametrize("suite", ["latency", "quality", "throughput", "decode"])
def test_without_a_gpu_nothing_is_measured_and_it_is_said(suite, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "out.json"
    assert end_to_end.main([suite, "--model", "qwen2.5-7b", "--device", "cuda", "--json", str(path)]) == 2
    assert capsys.readouterr().out == f"{suite}: not measured: torch sees no CUDA device\n"
    assert not path.exists()


# ---- models of the right shape, with a realistic next token


@pytest.mark.parametrize(
    ("name", "parameters", "kv"),
    [
        # As published: 7.62 and 3.82 G parameters; 28 layers of 4 heads of 128 and 32 of 32 heads of 96, in bf16.
        ("qwen2.5-7b", 7_615_616_512, 57_344),
        ("qwen2.5-math-7b", 7_615_616_512, 57_344),
        ("phi-3.5-mini", 3_821_079_552, 393_216),
    ],
)
def test_shapes_have_the_size_of_the_published_models(name, parameters, kv):
    model = shapes.random_model(name, "meta", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert decode.kv_bytes(model) == kv
    embedding = model.get_input_embeddings().weight.numel()
    assert decode.weight_bytes(model) == 2 * (parameters - embedding)
    assert model.config.max_position_embeddings >= 3072 + 160  # the paper's answer behind the longest prompt


def test_a_tied_embedding_is_read_by_the_head():
    config = shapes._qwen2(
        vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert decode.weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters())


def test_entropies_are_those_of_the_next_tokens(tiny):
    """No scale: every token alike. A great one: one token. Between them the entropy along what is sampled."""
    model, weight = tiny.plain, tiny.plain.get_decoder().norm.weight
    before, prompts = weight.detach().clone(), torch.tensor([[3, 4, 5], [6, 7, 8]])
    try:
        for scale, nats in ((0.0, math.log(model.config.vocab_size)), (1e6, 0.0)):
            weight.data.copy_(before * scale)
            values = shapes.sampled_entropies(model, prompts, 4)
            torch.testing.assert_close(values, torch.full((2, 4), nats), rtol=0, atol=1e-3)
    finally:
        weight.data.copy_(before)
    first = model(prompts).logits[:, -1].double().softmax(-1)
    entropy = -(first * first.log()).sum(-1)
    torch.testing.assert_close(shapes.sampled_entropies(model, prompts, 1)[:, 0].double(), entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("target", [0.4, 2.0])
def test_random_weights_are_scaled_to_the_entropy_asked_for(target):
    """From either side: the search begins where the last one ended."""
    model = shapes.random_model("tiny", CPU, torch.float32)
    found = shapes.calibrate(model, target, prompts=4, tokens=32)
    assert abs(found.mean - target) <= 0.1 * target
    again = shapes.calibrate(model, 1.0, prompts=4, tokens=32)  # from a scale that is not one
    assert abs(again.mean - 1.0) <= 0.1
    assert 0 <= again.low <= again.median <= again.high <= math.log(model.config.vocab_size) + 1e-4


def test_an_entropy_that_no_scale_gives_is_refused():
    model = shapes.random_model("tiny", CPU, torch.float32)
    with pytest.raises(ValueError, match="no scale of the final norm"):
        shapes.calibrate(model, 6.0, prompts=2, tokens=8)  # 199 tokens: at most 5.3 nats


def test_prompts_are_different_and_as_many_as_promised():
    assert len(set(common.many_questions(64))) == 64
    assert common.many_questions(3) == common.many_questions(64)[:3]


# ---- what was not run as it was asked for


@pytest.fixture
def short_of_memory(tiny, monkeypatch):
    """Memory for two chains of one lane, whatever is asked for."""
    monkeypatch.setattr(tiny.sampler.engine, "run_bytes", lambda *, chains, lanes, max_length: chains * lanes)
    monkeypatch.setattr("power_kernels.api.driver.planning._budget", lambda engine: 2)
    return tiny


def test_a_call_that_ran_otherwise_than_asked_is_told():
    report = {"slots": 4, "lanes": 2, "restarts": 0}
    assert common.shortfall(report, 4, 2) is None
    assert common.shortfall(report, 4, None) is None
    assert "did not hold 4 x 4 lanes at once (4 x 2 lanes ran)" in common.shortfall(report, 4, 4)
    assert common.shortfall(report, 8, None) is None  # the driver's choice
    assert "4 x 2 lanes ran" in common.shortfall({**report, "restarts": 1}, 8, None)
    assert "ran out of memory" in common.shortfall({**report, "restarts": 1}, 4, 2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_step_of_fewer_lanes_is_not_measured(short_of_memory):
    bench = decode.Bench(short_of_memory, context=6, tokens=8)
    table = [bench.step(rows, 1e9) for rows in (2, 4)]
    assert table[0]["seconds"] > 0
    assert table[1] == {"lanes": 4, "not_measured": "memory did not hold 4 x 1 lanes at once (2 x 1 lanes ran)"}
    parts = bench.parts(4)
    assert "1 x 2 lanes ran" in parts["not_measured"]
    result = {
        "machine": {"device_type": "cuda"}, "bandwidth": {"copy": 1e9, "read": 1e9}, "waits": "not measured: why",
        "table": [table[0], {**table[1], "lanes": 64}], "parts": {**parts, "lanes": 64}, "shape": "qwen2.5-7b",
    }  # fmt: skip
    found = decode.verdicts(result)
    assert [item["met"] for item in found] == [None, None, None]
    assert not common.missed(found)
    said = decode.table(result)
    assert "64 | not measured: memory did not hold" in said
    assert "STEP WAITS" not in said


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_throughput_of_fewer_slots_is_not_measured(short_of_memory, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(throughput, "subject", lambda *a, **k: short_of_memory)
    monkeypatch.setattr(short_of_memory, "prompts", [[3, 4, 5], [6, 7], [8, 9]])
    sizes = ["--tokens", "4", "--blocks", "1", "--steps", "1", "--slots", "3", "--lanes", "1", "--only", "plain,ours"]
    path = tmp_path / "out.json"
    assert throughput.main(["--model", "tiny", "--device", "cpu", *sizes, "--check", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "2 slots, 1 lane" in said
    assert "not measured: memory did not hold 3 x 1 lanes at once (2 x 1 lanes ran)" in said
    document = json.loads(path.read_text())
    assert {item["met"] for item in document["targets"]} == {None}
    assert document["table"][0]["answers_per_s"] > 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_latency_of_fewer_lanes_is_not_measured(short_of_memory, monkeypatch, capsys):
    monkeypatch.setattr(latency, "subject", lambda *a, **k: short_of_memory)
    more = ["--tokens", "4", "--blocks", "1", "--steps", "1", "--lanes", "2,4", "--seconds", "0"]
    assert latency.main(["--model", "tiny", "--device", "cpu", *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r" +4 \| not measured: memory did not hold 1 x 4 lanes at once", line) for line in lines)
    assert any(re.match(r" +2 \| +\d", line) for line in lines)


# ---- latency


def test_latency_rows_are_medians_of_ratios_within_cells(written):
    document = written[1]["latency"]
    cells, rows = document["cells"], {row["lanes"]: row for row in document["table"]}
    assert list(rows) == ["plain", "1", "2", "4", "8", "default"]
    assert [(cell["prompt"], cell["seed"]) for cell in cells] == [(0, 0), (1, 0)]
    for lanes in ("1", "4", "default"):
        for reference, name in (("1", "wall_over_one"), ("plain", "wall_over_plain")):
            ratios = [cell["runs"][lanes]["wall"] / cell["runs"][reference]["wall"] for cell in cells]
            assert rows[lanes][name]["median"] == statistics.median(ratios)
            assert [rows[lanes][name][k] for k in ("low", "high")] == [min(ratios), max(ratios)]
    assert rows["plain"]["chosen"] == {"1": 2}
    assert rows["4"]["chosen"] == {"4": 2}


def test_latency_counts_the_cells_that_took_another_course(written):
    """The tiny model's logits hardly depend on the rows: of 2 cells at 4 other numbers of lanes one may differ."""
    document = written[1]["latency"]
    differ = {row["lanes"]: row["differ"] for row in document["table"]}
    assert differ.pop("plain") is None
    assert differ.pop("1") == 0
    assert sum(differ.values()) <= 1
    run = common.Timed(1, 1, 1, [[1, 2]], [0.0], outcomes=[[2, 0]], left=[[0, 1]])
    for change in ({"answers": [[1, 3]]}, {"outcomes": [[2, 2]]}, {"left": [[0, 0]]}):
        assert latency.differs(run, common.Timed(**{**vars(run), **change}))
    assert not latency.differs(run, common.Timed(**{**vars(run), "cpu": 2, "wall": 3, "forwarded": 9}))


def test_lanes_trade_steps_for_tokens(written):
    """8 lanes take fewer steps than 1, draw no fewer tokens and fill less of them, over 2 chains of 12 steps."""
    rows = {row["lanes"]: row for row in written[1]["latency"]["table"]}
    one, eight = rows["1"], rows["8"]
    assert eight["decode_steps"]["median"] < one["decode_steps"]["median"]
    assert eight["forwarded"]["median"] >= one["forwarded"]["median"]
    assert eight["filled"]["median"] < one["filled"]["median"] == 1.0
    assert max(row["useful"]["high"] for row in rows.values()) <= 1.0
    assert one["changed"] > 0


def test_a_killed_run_keeps_the_cell_it_was_in(tiny, monkeypatch, tmp_path):
    """Interrupted in the third call, the second number of lanes: plain sampling and the first are in the file."""
    monkeypatch.setattr(latency, "subject", lambda *a, **k: tiny)
    calls, call = [], latency.Bench._run

    def interrupted(self, config, prompt, seed):
        calls.append(config)
        if len(calls) == 3 + 3:  # three of them warm up
            raise KeyboardInterrupt
        return call(self, config, prompt, seed)

    monkeypatch.setattr(latency.Bench, "_run", interrupted)
    path = tmp_path / "out.json"
    more = ["--tokens", "4", "--blocks", "1", "--steps", "1", "--lanes", "1,2", "--json", str(path)]
    with pytest.raises(KeyboardInterrupt):
        latency.main(["--model", "tiny", "--device", "cpu", *more])
    document = json.loads(path.read_text())
    assert document["cells"] == document["table"] == []
    assert len(document["unfinished"]) == 2
    assert len(document["unfinished"]["plain"]["answers"][0]) == 4


def test_no_cell_is_begun_when_the_time_is_over(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(latency, "subject", lambda *a, **k: tiny)
    path = tmp_path / "out.json"
    more = ["--tokens", "4", "--blocks", "1", "--steps", "1", "--lanes", "2,default", "--seconds", "0"]
    assert latency.main(["--model", "tiny", "--device", "cpu", "--seeds", "3", *more, "--json", str(path)]) == 0
    assert len(json.loads(path.read_text())["cells"]) == 1


def test_a_ratio_to_what_did_not_run_is_not_measured(tiny, monkeypatch, capsys):
    monkeypatch.setattr(latency, "subject", lambda *a, **k: tiny)
    more = ["--tokens", "4", "--blocks", "1", "--steps", "1", "--lanes", "2,default", "--seconds", "0"]
    assert latency.main(["--model", "tiny", "--device", "cpu", *more, "--check"]) == 0  # and not missed
    assert "default lanes over 1 lane: not measured (at most 0.7)" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--lanes", "0"], ["--lanes", "many"], ["--blocks", "9", "--tokens", "8"]])
def test_latency_refuses_what_it_cannot_run(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        latency.main(["--model", "tiny", "--device", "cpu", *options])
    assert "error" in capsys.readouterr().err


# ---- throughput


def test_throughput_counts_every_answer_and_token(written):
    document = written[1]["throughput"]
    (cell,), rows = document["cells"], {row["method"]: row for row in document["table"]}
    assert list(rows) == ["plain", "engine", "ours", "published"]
    for method, row in rows.items():
        run = cell["runs"][method]
        assert row["answers"] == len(run["answers"]) == (1 if method == "published" else 6)
        assert row["answers_per_s"] == row["answers"] / run["wall"]
        assert row["tokens_per_s"] == pytest.approx(24 * row["answers_per_s"])
    assert rows["plain"]["over_plain"] == pytest.approx(1.0)
    plain = sum(opponents.plain_forwarded(length, 24) for length in document["prompt_lengths"])
    assert rows["plain"]["forwarded_per_answer"] * 6 == rows["engine"]["forwarded_per_answer"] * 6 == plain
    assert rows["published"]["forwarded_per_answer"] == 5 * sum(8 + 8 * k - 1 for k in (1, 2, 3))
    assert document["cells"][0]["runs"]["ours"]["steps"] == 6 * 12


def test_the_account_of_a_run_adds_up(written):
    """Each proposal token was accepted, rejected or voided, and each that was not recalled was forwarded."""
    for suite in ("latency", "throughput"):
        for cell in written[1][suite]["cells"]:
            for run in cell["runs"].values():
                if a := run["account"]:
                    assert a["accepted"] + a["rejected"] + a["voided"] == a["proposal"]
                    assert a["prefill"] + a["extension"] + a["proposal"] - a["recalled"] == run["forwarded"]
    ours = written[1]["throughput"]["cells"][0]["runs"]["ours"]
    assert min(ours["account"]["accepted"], ours["account"]["rejected"]) > 0


def test_fractions_of_a_run():
    seconds = {"prefill": 9.0, "forward": 8.0, "sample": 1.0, "advance": 0.5, "transfer": 0.25, "other": 0.25}
    assert common.driver_fraction(seconds) == pytest.approx(0.2)
    assert common.driver_fraction({**seconds, "replay": 1.0}) is None
    assert common.useful_fraction({"lane_steps": 200, "useful_lane_steps": 190}) == 0.95
    assert common.useful_fraction({"lane_steps": 0, "useful_lane_steps": 0}) is None
    assert common.filled_fraction({"row_steps": 400, "filled": 0.75}) == 0.75
    assert common.filled_fraction({}) is None


def test_throughput_targets_are_those_of_the_device():
    ours = {"method": "ours", "filled": 0.91, "driver": None, "answers_per_s": 60.0}
    published = {"method": "published", "answers_per_s": 1.0}
    on_cpu, on_gpu = (throughput.verdicts([ours, published], kind) for kind in ("cpu", "cuda"))
    assert [item["met"] for item in on_cpu] == [False, None]
    assert [item["met"] for item in on_gpu] == [False, None, True]
    assert "not measured" in common.targets_text(on_gpu)
    assert not common.missed(
        on_gpu[1:]
    )  # replayed steps have no driver's share, which --check must not hold against them
    assert common.missed(on_gpu)


# ---- decode


def test_a_step_is_held_against_its_bytes(written):
    document = written[1]["decode"]
    fastest = max(document["bandwidth"].values())
    model = shapes.random_model("tiny", "meta", torch.float32)
    assert [row["lanes"] for row in document["table"]] == [1, 2, 4]
    for row in document["table"]:
        steps = 12  # each answer has as many tokens
        positions = 24 + (decode.WARM_STEPS + steps) / 2
        assert row["weight_bytes"] == decode.weight_bytes(model)
        assert row["kv_bytes"] == row["lanes"] * positions * 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, width, float32
        assert row["of_roofline"] == (row["weight_bytes"] + row["kv_bytes"]) / fastest / row["seconds"]
    assert document["parts"]["lanes"] == 4
    assert document["parts"]["seconds"]["advance"] > 0
    assert 0 < decode.overhead(document) < 1
    assert document["waits"] == "not measured"


def test_marks_are_taken_before_every_step_and_taken_away(tiny):
    original = Run.step
    with decode.marked_steps(CPU) as marks:
        tiny.sampler.generate([[3, 4, 5]], PowerConfig(alpha=1.0, max_new_tokens=8, block_size=None, mcmc_steps=0))
    assert Run.step is original
    assert len(marks) == tiny.sampler.last_run.decode_steps == 8
    assert len(decode.intervals(marks)) == 8 - decode.WARM_STEPS - 1
    assert min(decode.intervals(marks)) > 0


def test_steps_on_a_device_are_timed_by_events_that_nothing_waits_for(tiny, monkeypatch):
    """torch.cuda replaced by what notes its calls: one event a step, and one wait when all is over."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")
            self.at = log.count("event")

        def elapsed_time(self, end):
            return 250.0 * (end.at - self.at)  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: log.append("wait"))
    with decode.marked_steps(torch.device("cuda", 0)) as marks:
        tiny.sampler.generate([[3, 4, 5]], PowerConfig(alpha=1.0, max_new_tokens=8, block_size=None, mcmc_steps=0))
    assert log == ["event"] * 8
    assert decode.intervals(marks) == [0.25] * (8 - decode.WARM_STEPS - 1)
    assert log[-1] == "wait"
    log.clear()
    common.timed(lambda: log.append("call") or opponents.Run([]), device="cuda:0")
    assert log == ["wait", "call", "wait"]


def test_the_parts_of_a_step_are_told_by_the_names_of_kernels_that_exist():
    sources = Path(decode.__file__).resolve().parents[1] / "power_kernels" / "triton"
    kernels = re.findall(r"^def (_\w*kernel)\(", "".join(p.read_text() for p in sources.glob("*.py")), re.MULTILINE)
    parts = {k: [part for part, names in decode.PARTS.items() if re.search(names, k)] for k in kernels}
    assert all(len(found) <= 1 for found in parts.values())
    of_a_step = {"_mass_kernel": "sampling", "_finish_kernel": "sampling", "_head_kernel": "head and draw",
                 "_mh_advance_kernel": "advance", "_kv_copy_kernel": "KV copies"}  # fmt: skip
    assert {kernel: parts.get(kernel) for kernel in of_a_step} == {k: [part] for k, part in of_a_step.items()}


@pytest.mark.parametrize("bad_step", [decode.WARM_STEPS, decode.WARM_STEPS + 1, None])
def test_a_wait_inside_of_a_warm_step_is_found(tiny, monkeypatch, bad_step):
    """torch.cuda replaced by a mode that a step of the engine looks at: `bad_step` of a run waits, counted from one."""
    mode, seen = ["default"], []

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda new: mode.__setitem__(0, new))
    engine, bench = tiny.sampler.engine, decode.Bench(tiny, context=6, tokens=8)
    step = engine.step

    def waiting(state):
        seen.append(mode[0])
        if len(seen) == bad_step and mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        return step(state)

    bench.power = lambda rows: (seen.clear(), decode.Bench.power(bench, rows))
    monkeypatch.setattr(engine, "step", waiting)
    found = bench.waits(2)
    late = bad_step is not None and bad_step > decode.WARM_STEPS
    assert found == ("called a synchronizing CUDA operation" if late else None)
    assert seen[: decode.WARM_STEPS] == ["default"] * decode.WARM_STEPS
    assert set(seen[decode.WARM_STEPS :]) == {"error"}
    assert mode == ["default"]


def test_decode_targets_are_those_of_the_7b_at_64_lanes():
    row = {"lanes": 64, "of_roofline": 0.72, "seconds": 1e-2}
    parts = {"lanes": 64, "seconds": {"sampling": 2e-4, "head and draw": 1e-3, "advance": 1e-5, "KV copies": 8e-5}}
    result = {
        "machine": {"device_type": "cuda"},
        "table": [row],
        "parts": parts,
        "shape": "qwen2.5-7b",
        "waits": "none",
    }
    assert [(item["value"], item["met"]) for item in decode.verdicts(result)] == [
        (0.72, True),
        (pytest.approx(0.029), True),
        (0, True),
    ]
    assert "counts as the model's" in decode.caveat(result)
    apart = {**parts, "seconds": {**parts["seconds"], "head and draw": 0.0}}
    for other in (None, apart, {"lanes": 64, "not_measured": "why"}):
        assert "counts as the model's" not in decode.caveat(result | {"parts": other})
    result |= {"shape": "phi-3.5-mini", "waits": "called a synchronizing CUDA operation"}
    assert [item["met"] for item in decode.verdicts(result)] == [True, False]
    assert decode.verdicts(result | {"machine": {"device_type": "cpu"}}) == []
