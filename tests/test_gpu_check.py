"""`make gpu-check` without a GPU: what it runs, what it kills, what it says, and what it leaves behind."""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import power_kernels as pk
from bench import gpu_check, gpu_smoke, gpu_targets
from bench.gpu_check import ABSENT, FAILED, LATE, PARTLY, PASSED, REFUSED, Check, Result, Stage
from power_kernels.api.bench.options import OPS, add_arguments
from power_kernels.api.driver import captured
from power_kernels.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]


HOURS = 7200.0  # what no machine is too slow for: these tests prove nothing by the clock


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path / "out", "cpu", HOURS)


@pytest.fixture
def time_is_over(monkeypatch):
    """time_is_over(name, path): for a command with `name` in its arguments as soon as the file is there, however long
    that takes; for no other ever."""
    ends, wait = {}, subprocess.Popen.wait

    def waiting(self, timeout=None):
        path = next((path for name, path in ends.items() if name in " ".join(map(str, self.args))), None)
        if timeout is None or path is None:
            return wait(self)
        wait_until(path.exists)
        raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", waiting)
    return ends.__setitem__


def shell(text: str):
    """A stage's function: a command, and whether it succeeded."""

    def run(check: Check, seconds: float) -> Result:
        done = check.command(text.split()[0], ["sh", "-c", text], seconds)
        if done.code is None:
            return Result(LATE)
        return Result(PASSED if done.code == 0 else FAILED, [done.text.strip()])

    return run


def statuses(check: Check) -> dict[str, str]:
    """From the file, as somebody would read it afterwards."""
    return {r["stage"]: r["status"] for r in json.loads((check.out / "stages.json").read_text())}


def table(check: Check) -> dict[str, str]:
    rows = [line.split("|") for line in (check.out / "summary.md").read_text().splitlines() if line.startswith("| ")]
    return {row[1].strip(): row[2].strip() for row in rows}


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    """Of what must come about, sooner or later."""
    end = time.monotonic() + HOURS
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


# ---- stages


def test_every_stage_is_run_in_order_and_reported(check):
    order = []

    def noting(name):
        return Stage(name, 5, lambda c, s: (order.append(name), Result(PASSED, [f"{name} says this"]))[1], True)

    gpu_check.run_stages(check, tuple(map(noting, "abc")))
    assert order == list("abc")
    assert statuses(check) == dict.fromkeys("abc", PASSED)
    assert "b says this" in (check.out / "summary.md").read_text()
    assert not check.failed()


def test_a_failing_stage_is_named_and_fails_the_whole_only_if_it_must_pass(check):
    gpu_check.run_stages(check, (Stage("extra", 5, shell("echo broken; exit 3")), Stage("other", 5, shell("true"))))
    assert table(check)["extra"] == FAILED
    assert "broken" in (check.out / "summary.md").read_text()
    assert not check.failed()
    gpu_check.run_stages(check, (Stage("needed", 5, shell("exit 3"), must_pass=True),))
    assert table(check)["needed"] == FAILED
    assert check.failed()


def test_a_stage_over_its_time_is_killed_with_its_children_and_the_others_go_on(check, time_is_over):
    """What it printed until then stays."""
    note = check.out / "child"
    stuck = f"echo begun; (sh -c 'echo $PPID > {note}.part; mv {note}.part {note}'; sleep infinity) & sleep infinity"
    time_is_over("begun", note)
    stages = (Stage("stuck", 1, shell(stuck), must_pass=True), Stage("after", 58, shell("true")))
    gpu_check.run_stages(check, stages)
    assert statuses(check) == {"stuck": LATE, "after": PASSED}
    assert "begun" in (check.logs / "echo.txt").read_text()
    wait_until(lambda: not alive(int(note.read_text())))
    assert check.failed()


def test_time_left_over_goes_to_later_stages_and_never_comes_from_them(tmp_path, monkeypatch):
    """By a clock of our own, which stages move on."""
    now, given = 0.0, []
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: now))

    def taking(took):
        def run(c, seconds):
            nonlocal now
            given.append(seconds)
            now += took
            return Result(PASSED)

        return run

    check = Check(tmp_path, "cpu", 60.0)
    gpu_check.run_stages(check, (Stage("a", 10, taking(3)), Stage("b", 10, taking(49)), Stage("c", 10, taking(0))))
    assert given == [40, 47, 8]  # 60 less what b and c are owed; 57 less c's; what is left
    late = Check(tmp_path, "cpu", 0.5)
    gpu_check.run_stages(late, (Stage("a", 10, taking(0)),))
    assert statuses(late) == {"a": LATE}
    assert len(given) == 3


def test_a_stage_that_raises_is_a_failed_one_and_the_others_go_on(check):
    def broken(c, s):
        raise ValueError("unforeseen")

    gpu_check.run_stages(check, (Stage("broken", 5, broken, True), Stage("after", 5, shell("true"))))
    assert statuses(check) == {"broken": FAILED, "after": PASSED}
    assert "ValueError: unforeseen" in (check.out / "summary.md").read_text()


def test_a_killed_run_keeps_what_it_had_found_and_leaves_no_process(tmp_path):
    out = tmp_path / "out"
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from bench import gpu_check as g
g.environment = lambda check, seconds: g.Result(g.PASSED, [], {{"usable": True}})
def stuck(check, seconds):
    check.command("stuck", ["sh", "-c", "echo $$ > {out}/pid; sleep infinity"], seconds)
first = g.Stage("first", 5, lambda c, s: g.Result(g.PASSED, ["found this"]))
stages = (first, g.Stage("stuck", 60, stuck), g.Stage("last", 5, stuck))
g.main(["--out", "{out}", "--device", "cpu", "--seconds", "{HOURS}"], stages)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    wait_until(lambda: (out / "pid").exists() and (out / "pid").read_text().strip())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=HOURS) == 128 + signal.SIGTERM
    wait_until(lambda: not alive(int((out / "pid").read_text())))
    summary = (out / "summary.md").read_text()
    assert "found this" in summary
    assert "| last | not reached |" in summary


@pytest.mark.parametrize(("usable", "status", "code"), [(True, PASSED, 0), (True, FAILED, 1), (False, PASSED, 2)])
def test_the_exit_code_tells_passed_failed_and_no_device(tmp_path, monkeypatch, usable, status, code):
    monkeypatch.setattr(gpu_check, "environment", lambda c, s: Result(PASSED, [], {"usable": usable}))
    stages = (Stage("only", 5, lambda c, s: Result(status), must_pass=True),)
    assert gpu_check.main(["--out", str(tmp_path / "out"), "--device", "cpu"], stages) == code


@pytest.mark.parametrize("plan", gpu_check.PLANS)
def test_the_stages_of_a_plan_fit_nine_minutes(plan):
    assert sum(stage.seconds for stage in gpu_check.PLANS[plan]) <= gpu_check.BUDGET <= 540


def test_what_shows_mistakes_must_pass_and_figures_of_kernels_need_not():
    every = [stage for stages in gpu_check.PLANS.values() for stage in stages]
    assert len({stage.name for stage in every}) == len(every) - 1
    assert gpu_check.PLANS["smoke"] == gpu_check.STAGES[:1]  # the only one of two plans
    answers = {s.name for name, stages in gpu_check.PLANS.items() if name not in ("kernels", "smoke") for s in stages}
    assert {s.name for s in every if s.must_pass} == {"smoke", "tests", "sanitizer"} | answers
    assert {s.name for s in gpu_check.STAGES if s.must_pass} == {"smoke", "tests", "sanitizer"}


def test_a_machine_without_a_device_is_told_so(tmp_path):
    """The environment's own stage, run for real: no device, nothing else is started."""
    run = subprocess.run(
        [sys.executable, ROOT / "bench/gpu_check.py", "--out", tmp_path],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "torch sees no CUDA device" in run.stderr
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert set(environment["tools"]) == {"compute-sanitizer", "ncu", "nsys", "nvidia-smi"}
    assert len(json.loads((tmp_path / "stages.json").read_text())) == 1


@pytest.mark.parametrize(
    ("options", "ran"), [([], ["a", "b"]), (["--plan", "other"], ["c"]), (["--stages", "b"], ["b"])]
)
def test_a_plan_and_its_stages_are_chosen(tmp_path, monkeypatch, options, ran):
    order = []

    def noting(name):
        return Stage(name, 5, lambda c, s: (order.append(name), Result(PASSED))[1])

    monkeypatch.setattr(gpu_check, "PLANS", {"kernels": (noting("a"), noting("b")), "other": (noting("c"),)})
    monkeypatch.setattr(gpu_check, "environment", lambda c, s: Result(PASSED, [], {"usable": True}))
    assert gpu_check.main(["--out", str(tmp_path), "--device", "cpu", *options]) == 0
    assert order == ran
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--out", str(tmp_path), "--plan", "other", "--stages", "a"])


# ---- tools


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a shell script in the place of every NVIDIA tool; None: there is none."""

    def install(script: str | None) -> None:
        if script is None:
            monkeypatch.setattr(gpu_check, "find_tool", lambda name: None)
            return
        path = tmp_path / "tool"
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)
        monkeypatch.setattr(gpu_check, "find_tool", lambda name: str(path))

    return install


def test_a_missing_tool_is_reported_as_not_installed_and_fails_nothing(check, tool):
    tool(None)
    gpu_check.run_stages(check, tuple(s for s in gpu_check.STAGES if s.name in ("sanitizer", "ncu")))
    assert set(statuses(check).values()) == {ABSENT}
    assert "compute-sanitizer is not installed" in (check.out / "summary.md").read_text()
    assert not check.failed()


def test_tools_are_found_on_the_path(tmp_path, monkeypatch):
    made = tmp_path / "some-tool"
    made.write_text("#!/bin/sh\n")
    made.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.find_tool("some-tool") == str(made)
    assert gpu_check.find_tool("no-such-tool") is None


@pytest.mark.parametrize(
    ("printed", "code", "status"),
    [
        ("launched a\\n========= ERROR SUMMARY: 0 errors", 0, PASSED),
        ("launched a\\n========= Invalid __global__ read of size 4\\n========= ERROR SUMMARY: 3 errors", 86, FAILED),
        ("launched a\\n========= ERROR SUMMARY: 3 errors", 0, FAILED),
        ("========= ERROR SUMMARY: 0 errors", 0, FAILED),  # nothing was launched: nothing was shown
        ("launched a\\nSegmentation fault", 139, FAILED),
    ],
)
def test_memcheck_passes_only_with_launches_and_without_errors(check, tool, printed, code, status):
    tool(f'printf "{printed}\\n"; exit {code}')
    result = gpu_check.sanitize(check, "memcheck", HOURS)
    assert result.status == status
    if "Invalid" in printed:
        assert any("Invalid __global__ read" in line for line in result.lines)


def test_racecheck_counts_hazards(check, tool):
    for count, status in ((0, PASSED), (2, FAILED)):
        tool(f'echo "launched a"; echo "========= RACECHECK SUMMARY: {count} hazards displayed (0 errors, 0 warnings)"')
        assert gpu_check.sanitize(check, "racecheck", HOURS).status == status


def test_the_worse_of_the_two_tools_counts(check, tool):
    tool(
        'echo "launched a"; [ $2 = memcheck ] && echo "== ERROR SUMMARY: 0 errors" && exit 0\n'
        'echo "== RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"; exit 86'
    )
    result = gpu_check.sanitizer(check, HOURS)
    assert result.status == FAILED
    assert {tool: figures["status"] for tool, figures in result.figures.items()} == {
        "memcheck": PASSED,
        "racecheck": FAILED,
    }


RAW_PAGE = """==PROF== Connected to process 1
profiling sample_tokens bfloat16: 5 bytes by the formula, 0 flops
==PROF== Profiling "_mass_kernel": 0%....50%....100% - 3 passes
"ID","Kernel Name","Block Size","gpu__time_duration.sum","dram__bytes_read.sum","launch__registers_per_thread"
"","","","ns","byte","register/thread"
"0","_mass_kernel","(32, 1, 1)","7,200","19,447,808","128"
"1","_finish_kernel","(128, 1, 1)","4100","1,000","64"
"""


def test_a_profile_becomes_a_table_and_a_csv(check, tool, tmp_path):
    (tmp_path / "page").write_text(RAW_PAGE)
    tool(f"cat {tmp_path / 'page'}")
    result = gpu_check.ncu(check, HOURS)
    assert (result.status, result.figures) == (PASSED, {"kernels": 2})
    assert "| `_mass_kernel` | 7200 | 19447808 | not measured | not measured | not measured | 128 |" in "\n".join(
        result.lines
    )
    assert len((check.out / "ncu.csv").read_text().splitlines()) == 4


def test_counters_that_this_user_may_not_read_are_reported_and_fail_nothing(check, tool):
    tool("echo '==ERROR== ERR_NVGPUCTRPERM - this user may not access GPU performance counters'")
    gpu_check.run_stages(check, (Stage("ncu", 20, gpu_check.ncu),))
    assert statuses(check) == {"ncu": REFUSED}
    assert "bench/profile.md" in (check.out / "summary.md").read_text()
    assert not check.failed()


# ---- the first look


@pytest.mark.parametrize("group", gpu_smoke.GROUPS)
def test_every_item_of_the_first_look_is_right_on_the_host(group, monkeypatch):
    monkeypatch.setattr(captured, "recorder", captured.recorder)  # set by a group, brought back here
    rows = smoked(group)
    assert rows
    assert [row["error"] for row in rows] == [None] * len(rows), rows


def smoked(group: str) -> list[dict]:
    """What the first look says of each item of a group, run in this process."""
    out = io.StringIO()
    assert gpu_smoke.run_group(group, "cpu", after=0, seconds=HOURS, out=out) == 0
    lines = list(map(json.loads, out.getvalue().splitlines()))
    rows = [{"name": lines[0]["items"][line["item"]], **line} for line in lines if "item" in line]
    assert [row["name"] for row in rows] == lines[0]["items"]
    return rows


def test_the_first_look_launches_every_kernel():
    assert {f"{family} kernels" for family in dispatch.KERNELS.values()} < set(gpu_smoke.GROUPS)
    assert gpu_targets.without_arguments() == []


def test_an_operator_that_is_wrong_or_raises_is_an_error_with_its_place_and_the_others_go_on(monkeypatch):
    accept = pk.mh_accept_out

    def raising(*arguments):
        raise pk.BackendError("no such instruction")

    def wrong(*arguments):
        accept(*arguments)
        if pk.backend_for(torch.device("cpu")) != "reference":
            arguments[-2][1] += 1.0

    for broken, error in ((raising, "BackendError: no such instruction"), (wrong, "AssertionError: log_ratio[1] is ")):
        monkeypatch.setattr(pk, "mh_accept_out", broken)
        rows = {row["name"]: row for row in smoked("chain kernels")}
        assert rows.pop("mh_accept_out")["error"].startswith(error)
        assert all(row["error"] is None for row in rows.values())
        assert len(rows) >= 2


SMOKE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from bench import gpu_smoke as g
def right(): return {{"facts": 3}}
def wrong(): raise ValueError("is wrong")
def crashes(): os.abort()
def hangs():
    while True: time.sleep(1)
def items(*runs): return lambda device: [g.Item(f"item {{i}}", run, 0.01 if run is hangs else None) for i, run in enumerate(runs)]
def unprepared(device): raise ImportError("no module")
g._device_works = lambda device: "broken" not in sys.argv
g.GROUPS = {{"plain": items(right, wrong, right), "hard": items(right, crashes, right, hangs, wrong, right),
             "broken": items(wrong, right, wrong), "unprepared": unprepared}}
os._exit(g.main(sys.argv[1:]))
"""  # noqa: E501


def test_the_first_look_tells_of_every_item_whatever_the_others_do_to_their_process(check, tmp_path):
    """Right, wrong, crashed, hanging and killed; a device that takes no more work after an error; a group that does
    not begin. On top of the summary, and with tracebacks in smoke.json."""
    script = tmp_path / "smoke.py"
    script.write_text(SMOKE)
    stage = Stage("smoke", 60, functools.partial(gpu_check.smoke, script=script), must_pass=True)
    gpu_check.run_stages(check, (stage, Stage("after", 5, shell("true"))))
    assert statuses(check) == {"smoke": FAILED, "after": PASSED}
    found = json.loads((check.out / "smoke.json").read_text())
    assert (found["right"], found["wrong"], found["not_reached"]) == (6, 7, 0)
    by = {(row["group"], row["name"]): row for row in found["items"]}
    wrong = [("plain", 1), ("hard", 1), ("hard", 3), ("hard", 4), ("broken", 0), ("broken", 2)]
    assert {key for key, row in by.items() if row["error"]} == {(g, f"item {i}") for g, i in wrong} | {
        ("unprepared", "preparing")
    }
    assert by["plain", "item 1"]["error"] == "ValueError: is wrong"
    assert "in wrong" in by["plain", "item 1"]["trace"]
    assert by["plain", "item 2"]["facts"] == {"facts": 3}
    assert "Abort" in by["hard", "item 1"]["error"]
    assert "in hangs" in by["hard", "item 3"]["trace"]  # where it hung
    assert by["unprepared", "preparing"]["error"] == "ImportError: no module"
    top, _ = (check.out / "summary.md").read_text().split("| stage |")
    assert "Smoke: 6 of 13 right, 7 wrong, 0 not reached" in top
    assert "- plain: item 1: ValueError: is wrong" in top


def test_what_the_first_look_did_not_reach_is_told(check, monkeypatch):
    """A group killed in its second item when all the time was over, a group that ended well."""

    def killed(name, arguments, seconds, **environment):
        assert seconds <= gpu_check.SMOKE_SECONDS
        if name == "smoke-groups":
            return gpu_check.Finished(0, 1.0, "slow\nquick\n")
        slow = "slow" in arguments
        lines = [{"items": ["a", "b", "c"] if slow else ["a"]}, {"begun": 0}]
        lines += [{"item": 0, "error": None, "trace": None, "facts": {}, "seconds": 1.0}, *([{"begun": 1}] * slow)]
        arguments[-1].write_text("\n".join(map(json.dumps, lines)) + "\n")
        return gpu_check.Finished(None if slow else 0, 5.0, "")

    monkeypatch.setattr(check, "python", killed)
    result = gpu_check.smoke(check, HOURS)
    assert result.status == LATE
    assert result.figures == {"right": 2, "wrong": 0, "not_reached": 2}
    assert "- slow: b: not reached when the time was over" in result.top


# ---- the benchmarks' stage


def test_an_op_that_ends_the_process_costs_no_other_its_figures(check, monkeypatch):
    """Ops a to d; b crashes: c and d are measured by a second process. Then everything is killed in the midst of d."""
    asked = []

    def bench(name, arguments, seconds, **environment):
        if name == "benchmarks-ops":
            return gpu_check.Finished(0, 1.0, "OPS a b c d\n")
        ops, folder = arguments[arguments.index("--ops") + 1 :], arguments[arguments.index("--out") + 1]
        asked.append(ops)
        done = ops[:1] if "b" in ops else ops[: len(ops) - stop]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ops.json").write_text(json.dumps({"records": [{"op": op} for op in done]}))
        return gpu_check.Finished(1 if "b" in ops else None if stop else 0, 1.0, "a table")

    monkeypatch.setattr(check, "python", bench)
    for stop in (0, 1):
        asked.clear()
        result = gpu_check.benchmarks(check, 30)
        assert asked == [["a", "b", "c", "d"], ["c", "d"]]
        assert result.status == FAILED
        assert result.figures == {"records": 3 - stop, "broken": ["b"], "late": bool(stop)}
        assert "Ended the process: b." in result.lines[0]


# ---- whole answers


def test_the_stages_of_whole_answers_are_told_what_they_take(check, monkeypatch):
    """Every option by the suite's own parser, which ends where it finds no device."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import end_to_end

    asked = []

    def record(name, arguments, seconds, **environment):
        asked.append(list(map(str, arguments)))
        return gpu_check.Finished(2, 1.0, "not measured: torch sees no CUDA device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(check, "python", record)
    check.device = "cuda:0"
    stages = [stage for plan in ("decode", "latency", "throughput") for stage in gpu_check.PLANS[plan]]
    for stage in stages:
        result = stage.run(check, 5)
        assert result.status == FAILED
        assert "not measured" in "\n".join(result.lines)
        script, *given = asked[-1]
        assert (ROOT / script).samefile(end_to_end.__file__)
        assert end_to_end.main(given) == 2  # parsed to the end; an option that it does not know ends the process
    assert [given[given.index("--model") + 1] for given in asked] == [
        "qwen2.5-7b", "qwen2.5-math-7b", "phi-3.5-mini", "qwen2.5-7b", "qwen2.5-7b", "qwen2.5-7b",
    ]  # fmt: skip


def test_a_stage_of_whole_answers_runs_in_miniature_on_the_host(check):
    stage = gpu_check.end_to_end_stage("small", 60, "decode", "--model", "qwen2.5-7b")
    result = stage.run(check, HOURS)
    assert result.status == PASSED, result.lines
    assert any("of roofline" in line for line in result.lines)
    assert json.loads((check.out / "small.json").read_text())["shape"] == "tiny"


def test_a_stage_over_its_time_tells_what_it_missed_and_where_the_rest_is(check, monkeypatch):
    def killed(name, arguments, seconds, **environment):
        document = {
            "table": [{"lanes": 1}],
            "targets": [{"target": "as fast as light", "met": False}, {"target": "as sound", "met": None}],
        }
        Path(arguments[-1]).write_text(json.dumps(document))
        return gpu_check.Finished(None, 5.0, "[3, 5 s] the third call\n")

    monkeypatch.setattr(check, "python", killed)
    result = gpu_check.end_to_end("it", "latency")(check, 5)
    assert result.status == PARTLY
    assert result.lines[0] == "Missed: as fast as light."
    assert any("it.json" in line for line in result.lines)


@pytest.mark.parametrize(
    ("code", "table", "status", "failed"),
    [
        (0, [{}], PASSED, False),
        (1, [{}], FAILED, True),  # a crash, whatever was measured before it
        (None, [{}], PARTLY, False),
        (None, [], LATE, True),
        (None, [{"not_measured": "short of memory"}], LATE, True),
        (None, None, LATE, True),  # killed before it wrote anything
    ],
)
def test_a_plan_of_whole_answers_fails_where_a_stage_crashed_or_measured_nothing(
    check, monkeypatch, code, table, status, failed
):
    (check.out / "it.json").write_text(json.dumps({"table": [{}]}))  # of an earlier run: counts for nothing

    def ended(name, arguments, seconds, **environment):
        if table is not None:
            Path(arguments[-1]).write_text(json.dumps({"table": table}))
        return gpu_check.Finished(code, 5.0, "what it printed\n")

    monkeypatch.setattr(check, "python", ended)
    gpu_check.run_stages(check, (gpu_check.end_to_end_stage("it", 5, "latency"),))
    assert statuses(check) == {"it": status}
    assert check.failed() is failed


# ---- the tests' stage

# What conftest.py needs of torch, so that no process of these tests waits seconds for the real one.
TORCH = """
class device:
    def __init__(self, name): self.type = name.split(":")[0]
class Tensor:
    def new_empty(self): pass
def set_num_threads(count): pass
"""


@pytest.fixture
def folder(tmp_path):
    """A suite of our own under the real conftest."""
    folder = tmp_path / "suite"
    folder.mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    (folder / "torch.py").write_text(TORCH)
    return folder


def test_the_suite_is_run_a_file_a_process_and_counted_as_it_goes(check, folder, monkeypatch, time_is_over):
    """Passed, failed, skipped with its reason, a part that crashes, a part without a test, and one over its time."""
    hanging = folder / "hanging"
    (folder / "test_config.py").write_text("raise SystemError('a file for the host is left out')")
    (folder / "test_a.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('name', list('abcdef'))\n"
        "def test_passes(name, pytestconfig): assert pytestconfig.getoption('--device') == 'cpu'\n"
        "def test_fails(): assert 1 == 2, 'one is not two'\n"
        "def test_skips(): pytest.skip('for a good reason')\n"
    )
    (folder / "test_b.py").write_text("import os\ndef test_passes(): pass\ndef test_crashes(): os._exit(9)\n")
    (folder / "test_c.py").write_text(
        "import time\ndef test_passes(): pass\n"
        f"def test_hangs():\n    open({str(hanging)!r}, 'w').close()\n    while True: time.sleep(1)\n"
    )
    time_is_over("test_c.py", hanging)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)  # the three files at once
    result = gpu_check.suite(check, HOURS, folder)
    assert result.status == FAILED
    assert {k: result.figures[k] for k in ("passed", "failed", "skipped")} == {"passed": 8, "failed": 1, "skipped": 1}
    assert result.figures["broken"] == ["test_b-0of1"]
    assert result.figures["late"] == ["test_c-0of1"]
    text = "\n".join(result.lines)
    assert "test_a.py::test_fails: AssertionError: one is not two" in text
    assert "- 1: for a good reason" in text
    assert len(gpu_check.read_lines(check.out / "tests.jsonl")) == 10


def test_parts_cover_every_test_once(folder):
    """Of a file with and without the parameter that keeps tests together."""
    (folder / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', range(3))\n"
        "@pytest.mark.parametrize('name', list('abcdefgh'))\n"
        "def test_named(name, x): pass\n"
        "@pytest.mark.parametrize('x', range(9))\n"
        "def test_plain(x): pass\n"
    )
    seen = []
    for part in range(2):
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--collect-only", "--shard", f"{part}/2", folder],
            capture_output=True,
            text=True,
        )
        seen.append([line for line in run.stdout.splitlines() if "::" in line])
    found = [test for part in seen for test in part]
    assert len(found) == len(set(found)) == 33
    assert min(map(len, seen)) > 0
    for name in "abcdefgh":
        assert sum(any(f"test_named[{name}-" in test for test in part) for part in seen) == 1


def test_every_file_that_is_named_exists_and_those_of_the_host_are_left_out():
    from tests.conftest import HOST_FILES

    files = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert set(gpu_check.FIRST) | set(gpu_check.PARTS) | set(HOST_FILES) <= files
    started = {Path(file).stem for file, _ in gpu_check.parts_of(ROOT / "tests")}
    assert started == files - set(HOST_FILES)


# ---- what the stages start


def test_an_uninstalled_checkout_is_importable_with_the_driver(tmp_path):
    """A copy of the sources elsewhere: both packages come from there, and an own sitecustomize still runs."""
    copy, shim, own = tmp_path / "copy", tmp_path / "shim", tmp_path / "own"
    ignored = shutil.ignore_patterns("__pycache__", "_C*")
    for name in ("power_kernels", "python_api"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    own.mkdir()
    (own / "sitecustomize.py").write_text("import os; os.environ['OWN'] = 'ran'")
    before = gpu_check.ROOT
    gpu_check.ROOT = copy
    try:
        gpu_check.checkout(shim)
    finally:
        gpu_check.ROOT = before
    code = "import os, power_kernels, power_kernels.api.engines as engines\n"
    code += "print(power_kernels.__file__, engines.__file__, os.environ['OWN'])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (shim, copy, own)))},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == [
        str(copy / "power_kernels/__init__.py"), str(copy / "python_api/engines/__init__.py"), "ran",
    ], run.stderr  # fmt: skip


def test_the_benchmark_takes_the_options_that_it_is_given(check, monkeypatch):
    asked = []

    def record(name, arguments, seconds, **environment):
        asked.append(arguments)
        return gpu_check.Finished(0, 1.0, "OPS " + " ".join(OPS) + "\n")

    monkeypatch.setattr(check, "python", record)
    gpu_check.benchmarks(check, 30)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    script, *options = map(str, asked[1])
    given = parser.parse_args(options)
    assert (ROOT / script).exists()
    assert (given.ops, given.device, given.grid) == (list(OPS), "cpu", "default")


def test_the_profiling_guide_names_every_kernel_and_only_what_exists():
    guide = (ROOT / "bench" / "profile.md").read_text()
    filters = [re.compile(f.replace("\\|", "|")) for f in re.findall(r"`regex:(\S+)`", guide)]
    sources = "".join(path.read_text() for path in (ROOT / "power_kernels" / "triton").glob("*.py"))
    kernels = re.findall(r"^def (_\w*kernel)\(", sources, re.MULTILINE)
    assert len(kernels) >= 6
    assert [k for k in kernels if not any(f.search(k) for f in filters)] == []
    assert [f.pattern for f in filters if not any(f.search(k) for k in kernels)] == []
    phases = {"admit", "prefill", "advance", "step", "transfer", "retire", "move"}
    assert set(re.findall(r"power_kernels\.(\w+)", guide)) <= phases | set(dispatch.KERNELS) | {"api", "nvtx"}
    modes = set(re.findall(r"bench/gpu_targets\.py (\w+)", guide))
    assert modes == {"durations", "profile", "launch"}
