"""Graders: the verdict on hand-made answers, and programs that try to get out of their sandbox."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from power_kernels.api.experiments.grading import Grade, choice, code, published_math, sandbox
from power_kernels.api.experiments.grading import math as math_graders
from power_kernels.api.experiments.grading.workers import Workers
from power_kernels.errors import ArgumentError

LIMITS = sandbox.Limits(timeout=0.5, memory_bytes=256 << 20, file_bytes=1 << 20)
PATIENT = sandbox.Limits(timeout=20.0, memory_bytes=256 << 20, file_bytes=1 << 20)  # no clock decides these


@pytest.fixture(params=["namespaces", "guard"])
def isolation(request):
    if request.param == "namespaces" and (because := sandbox.barriers().weaker_because):
        pytest.skip(f"no namespaces here: {because}")
    return request.param


def processes_of(folder: Path) -> list[str]:
    """The processes whose command line names something in `folder`: a sandbox's name its working folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it has ended
                continue
            if f"{folder}/" in line and state != "Z":
                found.append(f"{entry.name}: {line}")
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """After each test: no process of any sandbox, and none of its folders."""
    folders = tmp_path / "sandboxes"
    folders.mkdir()
    sandbox.barriers()
    monkeypatch.setattr(tempfile, "tempdir", str(folders))
    yield
    assert processes_of(folders) == []
    assert list(folders.iterdir()) == []


def test_the_search_for_survivors_finds_one(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", f"{tmp_path}/x"])
    try:
        while not processes_of(tmp_path):  # until it has become this command
            time.sleep(0.01)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert processes_of(tmp_path) == []


# ---------------------------------------------------------------- programs

FORGED = """
import json, os
for number in range(3, 64):
    try:
        os.write(number, json.dumps({"kind": "finished", "detail": "", "token": ""}).encode())
    except OSError:
        pass
os._exit(0)
"""
FORK_BOMB = """
import os
while True:
    try:
        os.fork()
    except {error}:
        pass
"""
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
    os._exit(0)
os.wait()
"""
CHILD_REACHES_THE_END = """
import os
if os.fork() != 0:
    os.wait()
    raise ValueError("the parent does not")
"""
THREAD = """
import threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
"""

# name: (program, what the namespaces make of it, what the guard makes of it)
PROGRAMS = {
    "ends": ("x = 1", "finished", "finished"),
    "is empty": ("", "finished", "finished"),
    "is wrong": ("assert 1 + 1 == 3", "assertion", "assertion"),
    "raises": ("raise ValueError('no')", "exception", "exception"),
    "raises what prints badly": (
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E",
        "exception",
        "exception",
    ),
    "does not parse": ("def f(:\n    pass", "exception", "exception"),
    "holds a null byte": ("x = '\0'", "exception", "exception"),
    "holds half a character": ("x = '\ud800'", "exception", "exception"),
    "recurses": ("def f(): f()\nf()", "exception", "exception"),
    "sys.exit(0)": ("import sys; sys.exit(0)", "exited", "exited"),
    "exit()": ("exit()", "exited", "exited"),
    "os._exit(0)": ("import os; os._exit(0)", "ended", "ended"),
    "forges its report": (FORGED, "ended", "ended"),
    "kills itself": ("import signal; signal.raise_signal(signal.SIGKILL)", "signal", "signal"),
    "eats memory": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory", "memory"),
    "asks for much memory": ("x = bytearray(1 << 40)", "memory", "memory"),
    "reads stdin": ("input()", "exception", "exception"),
    "prints gigabytes": ("x = 'x' * (1 << 24)\nfor _ in range(128): print(x)", "finished", "finished"),
    "floods stderr": ("import sys\nfor _ in range(64): sys.stderr.write('x' * (1 << 20))", "finished", "finished"),
    "leaves a thread": (THREAD, "finished", "finished"),
    "leaves a daemon": (DAEMON, "finished", "exception"),
    "has a child that reaches the end": (CHILD_REACHES_THE_END, "exception", "exception"),
    "writes where it may": ("open('a', 'w').write('x')\nassert open('a').read() == 'x'", "finished", "finished"),
    "writes a large file": ("open('a', 'wb').write(bytes(2 << 20))", "exception", "exception"),
    "writes beside Python": ("import os; open(os.path.dirname(os.__file__) + '/x', 'w')", "exception", "exception"),
    "writes to /": ("open('/x', 'w')", "exception", "exception"),
    "removes Python": ("import os; os.remove(os.__file__)", "exception", "exception"),
    "removes a tree": ("import os, shutil; shutil.rmtree(os.path.dirname(os.__file__))", "exception", "exception"),
    "locks its folder": ("import os; os.mkdir('a'); open('a/b', 'w'); os.chmod('a', 0)", "finished", "finished"),
    "empties its folder": (
        "import os, shutil\nos.mkdir('a')\nos.chdir('a')\nos.rmdir(os.getcwd())",
        "finished",
        "finished",
    ),
    "uses asyncio": ("import asyncio\nasync def f(): return 1\nassert asyncio.run(f()) == 1", "finished", "finished"),
    "uses NumPy": ("import numpy\nassert numpy.ones((9, 9)).sum() == 81", "finished", "finished"),
    "uses a temporary file": (
        "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'')",
        "finished",
        "finished",
    ),
    "looks for the environment": (
        "import os\nassert set(os.environ) <= {'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'HOME', 'TMPDIR'}",
        "finished",
        "finished",
    ),
    "starts a program": ("import subprocess; subprocess.run(['/bin/true'], check=True)", "exception", "exception"),
    "calls the system": ("import os; assert os.system('true') == 0", "assertion", "exception"),
    "has processes": (
        "import multiprocessing as m\nm.get_context('fork').Process(target=int).start()",
        "finished",
        "exception",
    ),
    "loads a library": ("import ctypes; ctypes.CDLL('libc.so.6').getppid()", "finished", "exception"),
    "runs as main": ("assert __name__ == '__main__'", "finished", "finished"),
}
# These reach the limit of half a second.
ENDLESS = {
    "loops": "while True: pass",
    "sleeps": "import time; time.sleep(600)",
    "catches everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "ignores signals": "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except OSError: pass\nwhile True: pass",
    "waits for a lock": "import threading; threading.Lock().acquire(); l = threading.Lock(); l.acquire(); l.acquire()",
    "catches its memory's end": "while True:\n    try: x = bytearray(1 << 40)\n    except MemoryError: pass",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_end_as_they_should(name, isolation):
    program, in_namespaces, in_guard = PROGRAMS[name]
    outcome = sandbox.run(program, PATIENT, isolation=isolation)
    assert outcome.kind == (in_namespaces if isolation == "namespaces" else in_guard), outcome


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_programs_are_ended(name, isolation):
    assert sandbox.run(ENDLESS[name], LIMITS, isolation=isolation).kind == "timeout"


def test_a_fork_bomb_is_bounded_and_ended(isolation):
    program = FORK_BOMB.format(error="OSError")
    assert sandbox.run(program, LIMITS, isolation=isolation).kind == "timeout"


@pytest.mark.parametrize("isolation", ["namespaces"], indirect=True)  # the guard lets no process begin
def test_processes_without_an_end_of_their_own_die_with_the_namespace_at_the_limit(isolation):
    program = DAEMON.replace("os.wait()", "import time\nwhile True: time.sleep(1)")
    assert sandbox.run(program, LIMITS, isolation=isolation).kind == "timeout"


@pytest.mark.parametrize("isolation", ["guard"], indirect=True)
def test_the_guard_kills_what_escapes_its_hook(tmp_path, isolation):
    # This way to begin a process raises no audit event; it leaves the session, without the hook.
    child = "import os, time; os.setsid(); open('started', 'w'); time.sleep(600)"
    program = f"""
import os, time
from multiprocessing.util import spawnv_passfds
spawnv_passfds({os.fsencode(sys.executable)!r}, [b"python", b"-c", {child.encode()!r}, b"{tempfile.tempdir}/x"], [])
while not os.path.exists("started"):
    time.sleep(0.01)
"""
    outcome = sandbox.run(program, PATIENT, isolation=isolation)
    assert outcome.kind == "finished"


def test_files_outside_are_neither_written_nor_in_namespaces_seen(tmp_path, isolation):
    target = tmp_path / "outside"
    outcome = sandbox.run(f"open({str(target)!r}, 'w')", PATIENT, isolation=isolation)
    assert outcome.kind == "exception"
    assert not target.exists()
    target.write_text("secret")
    outcome = sandbox.run(f"open({str(target)!r}).read()", PATIENT, isolation=isolation)
    assert outcome.kind == ("exception" if isolation == "namespaces" else "finished")  # as the docstring says


@pytest.mark.parametrize("how", ["connect", "datagram"])
def test_no_socket_reaches_this_process(how, isolation):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        port, other = server.getsockname()[1], datagrams.getsockname()[1]
        server.settimeout(0.2)
        datagrams.settimeout(0.2)
        program = {
            "connect": f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)",
            "datagram": f"import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {other}))",
        }[how]
        assert sandbox.run(program, PATIENT, isolation=isolation).kind == "exception"
        with pytest.raises(TimeoutError):
            server.accept()
        with pytest.raises(TimeoutError):
            datagrams.recv(1)


def test_the_callers_umask_does_not_lock_the_program_out(isolation):
    before = os.umask(0o077)
    try:
        outcome = sandbox.run("open('a', 'w')", PATIENT, isolation=isolation)
    finally:
        os.umask(before)
    assert outcome.kind == "finished", outcome


def test_the_detail_names_the_line(isolation):
    outcome = sandbox.run("x = 1\nassert x == 2, 'not two'\n", PATIENT, isolation=isolation)
    assert outcome.detail == "AssertionError: not two (line 2: assert x == 2, 'not two')"


def test_barriers_say_what_is_in_force():
    found = sandbox.barriers()
    assert (found.isolation == "namespaces") == (found.weaker_because is None)
    assert ("namespace" in found.network) == (found.isolation == "namespaces")


def test_a_barrier_that_cannot_be_raised_is_an_error_and_not_a_weaker_one(monkeypatch, tmp_path):
    launcher = sandbox._LAUNCHER.read_text().replace("_SYS_MOUNT_SETATTR = 442", "_SYS_MOUNT_SETATTR = 9999")
    (tmp_path / "launcher.py").write_text(launcher)
    monkeypatch.setattr(sandbox, "_LAUNCHER", tmp_path / "launcher.py")
    with pytest.raises(sandbox.SandboxError, match=r"mount_setattr|unshare"):
        sandbox.run("open('ran', 'w')", PATIENT, isolation="namespaces")
    (tmp_path / "launcher.py").write_text("raise SystemExit(3)")
    with pytest.raises(sandbox.SandboxError, match="the launcher ended with 3"):
        sandbox.run("", PATIENT, isolation="guard")


def test_a_probe_that_breaks_out_leaves_the_guard_and_says_why(monkeypatch):
    monkeypatch.setattr(sandbox, "_PROBE", "raise AssertionError('it reached a network')")
    found = sandbox.barriers.__wrapped__()
    assert found.isolation == "guard"
    if sandbox.barriers().isolation == "namespaces":
        assert "it reached a network" in found.weaker_because


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"timeout": float("nan")}, {"memory_bytes": 1}, {"processes": 0}])
def test_limits_without_meaning_are_refused(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        sandbox.Limits(**wrong)


# ---------------------------------------------------------------- code

PROMPT = '''from typing import List


def half(x: int) -> int:
    return x // 2


def largest(xs: List[int]) -> int:
    """The largest of xs.
    >>> largest([1, 2])
    2
    """
'''
PROBLEM = {
    "task_id": "Own/0",
    "prompt": PROMPT,
    "entry_point": "largest",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 2\n    assert candidate([3]) == 3\n",
}
WHOLE = "def largest(xs: List[int]) -> int:\n    return max(xs) + 0 * half(2)\n"

# name: (grader, answer, reason, parsed)
HUMANEVAL = {
    "right": (code.grade_humaneval, "    return max(xs)\n", "passed", "    return max(xs)\n"),
    "wrong": (code.grade_humaneval, "    return min(xs)\n", "wrong", "    return min(xs)\n"),
    "raises": (code.grade_humaneval, "    return xs.max()\n", "error", "    return xs.max()\n"),
    "empty": (code.grade_humaneval, " \n\n", "no answer", None),
    "exits": (code.grade_humaneval, "    return max(xs)\nimport os\nos._exit(0)\n", "exited", ...),
    "main is not run": (
        code.grade_humaneval,
        "    return max(xs)\nif __name__ == '__main__':\n    raise ValueError\n",
        "passed",
        ...,
    ),
    "exits when called": (code.grade_humaneval, "    raise SystemExit(0)\n", "exited", ...),
    "loops": (code.grade_humaneval, "    while True: pass\n", "timeout", ...),
    "eats memory": (code.grade_humaneval, "    return [0] * (1 << 40)\n", "memory", ...),
    "chat, whole function": (code.grade_humaneval_chat, f"Sure:\n```python\n{WHOLE}```\nGood luck!", "passed", WHOLE),
    "chat, body alone": (code.grade_humaneval_chat, "```\n    return max(xs)\n```", "passed", "    return max(xs)\n"),
    "chat, corrected": (
        code.grade_humaneval_chat,
        f"```python\ndef largest(xs):\n    return 0\n```\nNo:\n```py\n{WHOLE}```\nUse:\n```python\nlargest([])\n```",
        "passed",
        WHOLE,
    ),
    "chat, cut short": (code.grade_humaneval_chat, f"~~~py\n{WHOLE}", "passed", WHOLE),
    "chat, another language": (code.grade_humaneval_chat, "```java\nint x;\n```", "no answer", None),
    "chat, no code": (code.grade_humaneval_chat, "I cannot.", "no answer", None),
    "published, the stub and more": (
        code.grade_humaneval_published,
        PROMPT + "    return max(xs)\nprint(largest(1))\n",
        "passed",
        PROMPT.partition("-> int:\n")[2].partition("-> int:\n")[2] + "    return max(xs)",
    ),
    "published, fenced": (
        code.grade_humaneval_published,
        f"Here:\n```python\n{WHOLE}```\n",
        "passed",
        "    return max(xs) + 0 * half(2)",
    ),
    "published, another function": (
        code.grade_humaneval_published,
        "def f(xs):\n    return max(xs)\n\n\nx = 1",
        "passed",
        "    return max(xs)",
    ),
    "published, no function": (code.grade_humaneval_published, "return max(xs)", "passed", "    return max(xs)"),
    "published, words": (code.grade_humaneval_published, "I cannot.", "error", "    I cannot."),
}


@pytest.mark.parametrize("name", HUMANEVAL)
def test_humaneval_verdicts(name):
    grader, answer, reason, parsed = HUMANEVAL[name]
    limit = 1.0 if reason == "timeout" else 20.0
    grade = grader(PROBLEM, answer, timeout=limit, memory_bytes=256 << 20, allow_code_execution=True)
    assert (grade.reason, grade.correct) == (reason, reason == "passed"), grade
    assert parsed is ... or grade.parsed == parsed


MBPP = {
    "task_id": 0,
    "text": "Write a function to add.",
    "test_list": ["assert add(1, 2) == 3", "assert add(pi, 0) == pi"],
    "test_setup_code": "",
    "test_imports": ["from math import pi"],
}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("def add(a, b):\n    return a + b\n", "passed"),
        ("Like this:\n```python\ndef add(a, b):\n    return a + b\n```", "passed"),
        ("def add(a, b):\n    return a - b\n", "wrong"),
        ("def sub(a, b):\n    return a - b\n", "error"),
        ("def add(a, b):\n    return a + b\nexit(0)\n", "exited"),
        ("", "no answer"),
    ],
)
def test_mbpp_verdicts(answer, reason):
    grade = code.grade_mbpp(MBPP, answer, timeout=20.0, allow_code_execution=True)
    assert (grade.reason, grade.correct) == (reason, reason == "passed"), grade


def test_code_is_not_run_unless_that_is_allowed(tmp_path):
    with pytest.raises(ArgumentError, match="allow_code_execution is False"):
        code.grade_code("pass")
    for grader in (code.grade_humaneval, code.grade_humaneval_chat, code.grade_humaneval_published):
        with pytest.raises(ArgumentError, match="allow_code_execution is False"):
            grader(PROBLEM, "    pass\n")
    with pytest.raises(ArgumentError, match="allow_code_execution is False"):
        code.grade_mbpp(MBPP, "")


# ---------------------------------------------------------------- mathematics

BOX = r"So it is \boxed{%s}."
# (the answer, the truth, the published rules' verdict, math-verify's)
MATH = [
    (BOX % "4", "4", "passed", "passed"),
    (BOX % "5", "4", "wrong", "wrong"),
    (BOX % r"\frac{1}{2}", r"\frac12", "passed", "passed"),
    (BOX % r"\dfrac{1}{2}", r"\frac{1}{2}", "passed", "passed"),
    (BOX % r"\tfrac1{72}", r"\frac{1}{72}", "passed", "passed"),
    (BOX % "1/2", r"\frac{1}{2}", "passed", "passed"),
    (BOX % "0.5", r"\frac{1}{2}", "passed", "passed"),
    (BOX % ".5", r"\frac{1}{2}", "passed", "passed"),
    (BOX % r"\frac{2}{4}", r"\frac{1}{2}", "wrong", "passed"),  # published: not reduced
    (BOX % "0.25", r"\frac{1}{4}", "passed", "passed"),  # by SymPy: one of them is no fraction
    (BOX % "0.3", r"\frac{1}{3}", "wrong", "wrong"),
    (BOX % r"3\frac{1}{2}", r"\frac{7}{2}", "passed", "passed"),  # mixed number
    (BOX % "3 1/2", "3.5", "passed", "wrong"),
    (BOX % "-3", "3", "wrong", "wrong"),
    (BOX % "- 3", "-3", "passed", "passed"),
    (BOX % "1,000,000", "1000000", "passed", "passed"),
    (BOX % r"1{,}000", "1000", "passed", "passed"),
    (BOX % r"10,\!000", "10000", "passed", "passed"),
    (BOX % "1000", "100", "wrong", "wrong"),
    (BOX % "(1,000, 2)", "(1000,2)", "passed", "wrong"),
    (BOX % "4.0", "4", "passed", "passed"),
    (BOX % "4.01", "4", "wrong", "wrong"),
    (BOX % "(1, 2)", "(1,2)", "passed", "passed"),
    (BOX % "(2, 1)", "(1,2)", "wrong", "wrong"),
    (BOX % r"(\frac{2}{4}, 0.5)", r"(\frac{2}{4},\frac{1}{2})", "passed", "passed"),
    (BOX % "(1, 2, 3)", "(1,2)", "wrong", "wrong"),
    (BOX % r"\left(1, 2\right)", "(1,2)", "passed", "passed"),
    (BOX % "[0, 1)", "[0,1)", "passed", "passed"),
    (BOX % "(0, 1)", "[0,1)", "wrong", "wrong"),
    (BOX % r"(-\infty, 2]", r"(-\infty,2]", "passed", "passed"),
    (BOX % r"(-\infty, 2)", r"(-\infty,2]", "wrong", "wrong"),
    (BOX % r"5\text{ cm}", "5", "passed", "passed"),
    (BOX % r"5 \text{ inches}", "5", "passed", "passed"),
    (BOX % "5 cm", "5", "passed", "passed"),
    (BOX % r"\frac12\text{ apples}", r"\frac{1}{2}", "passed", "passed"),
    (BOX % r"90^\circ", "90", "passed", "passed"),
    (BOX % r"90^{\circ}", "90", "passed", "passed"),
    (BOX % "90 degrees", "90", "passed", "passed"),
    (BOX % r"\$5", "5", "passed", "passed"),
    (BOX % r"50\%", "50", "passed", "passed"),
    (BOX % r"50\%", "0.5", "wrong", "passed"),
    (BOX % "x = 3", "3", "passed", "passed"),
    (BOX % r"2\sqrt3", r"2\sqrt{3}", "passed", "passed"),
    (BOX % r"\sqrt{12}", r"2\sqrt{3}", "passed", "passed"),
    (BOX % r"\sqrt{2}", r"2\sqrt{3}", "wrong", "wrong"),
    (BOX % r"2\pi", r"\pi + \pi", "passed", "passed"),
    (BOX % "(x+1)^2", "x^2+2x+1", "passed", "passed"),
    (BOX % "x^2+1", "x^2+2x+1", "wrong", "wrong"),
    (BOX % r"\text{Evelyn}", r"\text{evelyn}", "passed", "passed"),
    (BOX % r"\text{even}", r"\text{odd}", "wrong", "wrong"),
    (BOX % "E", r"\text{(E)}", "passed", "passed"),
    (r"First \boxed{1}, no: \boxed{2}.", "2", "passed", "passed"),
    (r"First \boxed{2}, no: \boxed{1}.", "2", "wrong", "wrong"),
    (BOX % r"\frac{\frac{1}{2}}{3}", r"\frac{1}{6}", "passed", "passed"),  # nested braces
    (BOX % r"\boxed{7}", "7", "passed", "passed"),  # nested boxes: the last begins within the first
    (r"It is \boxed{4", "4", "no answer", "no answer"),  # never closed
    (r"It is \boxed 4.", "4", "no answer", "passed"),
    ("The answer is 4.", "4", "no answer", "passed"),
    ("It is $\\frac{1}{2}$.", "0.5", "no answer", "passed"),
    ("I do not know.", "4", "no answer", "no answer"),
    ("", "4", "no answer", "no answer"),
    (BOX % "", "4", "wrong", "no answer"),
    (BOX % r"\frac{", "4", "no answer", "wrong"),
    (BOX % "}{", "4", "wrong", "no answer"),
    (BOX % "__import__('os')._exit(0)", "x", "wrong", "wrong"),
]


@pytest.fixture(scope="module")
def workers():
    workers = Workers(1)
    yield workers
    workers.close()
    assert workers.pids() == []


@pytest.mark.parametrize(("answer", "truth", "published", "verified"), MATH)
def test_mathematics_verdicts(answer, truth, published, verified, workers):
    grade = math_graders.grade_math_published(answer, truth, timeout=30.0, workers=workers)
    assert (grade.reason, grade.correct) == (published, published == "passed"), grade
    assert grade.parsed == published_math.last_boxed(answer)
    grade = math_graders.grade_math_verify(answer, truth, timeout=30.0, workers=workers)
    assert (grade.reason, grade.correct) == (verified, verified == "passed"), grade
    assert (grade.parsed is None) == (verified == "no answer")


def test_a_grader_that_hangs_is_killed_and_replaced(workers):
    math_graders.grade_math_published(BOX % "1", "1", timeout=30.0, workers=workers)
    (before,) = workers.pids()
    grade = math_graders.grade_math_published(BOX % "99999999!", "x", timeout=0.5, workers=workers)
    assert grade == Grade(False, "99999999!", "timeout", "0.5 s")
    assert not Path(f"/proc/{before}").exists()
    grade = math_graders.grade_math_verify(BOX % "99999999!", "7", timeout=0.5, workers=workers)
    assert (grade.correct, grade.reason) == (False, "timeout")
    assert math_graders.grade_math_published(BOX % "1", "1", timeout=30.0, workers=workers).correct
    (after,) = workers.pids()
    assert after != before


def test_a_grader_whose_process_dies_says_so(workers):
    assert math_graders.grade_math_published(BOX % "1", "1", timeout=30.0, workers=workers).correct
    (pid,) = workers.pids()
    os.kill(pid, 9)
    grade = math_graders.grade_math_published(BOX % "1", "1", timeout=30.0, workers=workers)
    assert (grade.correct, grade.reason, grade.detail) == (False, "error", "the grader died of SIGKILL")


def test_workers_end_themselves_when_their_parent_is_killed(tmp_path):
    program = """
import json, sys, threading
from power_kernels.api.experiments.grading.workers import Workers
workers = Workers(2)
for _ in range(2):
    workers.ask("published", "\\\\boxed{1}", "1", 60.0)
hanging = threading.Thread(target=workers.ask, args=("published", "\\\\boxed{99999999!}", "x", 1.0))
hanging.start()
print(json.dumps(workers.pids()), flush=True)
hanging.join()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        pids = json.loads(parent.stdout.readline())
        parent.kill()
    assert pids
    while any(Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid) for pid in pids):
        time.sleep(0.05)  # never ends if one stays


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


# ---------------------------------------------------------------- choices

# (the answer, what it states, the published parser's letter)
CHOICES = [
    ("The answer is (B).", "B", "B"),
    ("The answer is B", "B", "B"),
    ("the correct answer is option C.", "C", "C"),
    ("Answer: **A**", "A", "A"),
    ("**Answer:** (D)", "D", "D"),
    ("Final answer: $\\boxed{C}$", "C", "C"),
    ("\\boxed{\\text{D}}", "D", "D"),
    ("\\boxed{(A)}", "A", "A"),
    ("\\boxed{B) 4 eV}", "B", "B"),
    ("Answer: A. No, the answer is B.", "B", "B"),
    ("so\n(C)\n", "C", "C"),
    ("B", "B", "B"),
    ("I think A is wrong, and B too", None, "B"),
    ("The answer is a matter of taste", None, "A"),
    ("The answer is not B", None, "B"),
    ("The answer is E", None, None),
    ("The answer is Bohr's", None, None),
    ("It is a cat.", None, "A"),
    ("", None, None),
]


@pytest.mark.parametrize(("answer", "stated", "published"), CHOICES)
def test_choices_are_parsed(answer, stated, published):
    for grader, letter in ((choice.grade_choice, stated), (choice.grade_choice_published, published)):
        for truth in "ABCD":
            grade = grader(answer, truth)
            assert grade.parsed == letter
            assert grade.correct == (letter == truth)
            assert grade.reason == ("no answer" if letter is None else "passed" if letter == truth else "wrong")


def test_other_letters_can_be_chosen_and_unknown_truths_are_refused():
    assert choice.grade_choice("The answer is (F)", "F", letters="ABCDEFGHIJ").correct
    with pytest.raises(ArgumentError, match="truth_letter is 'E'"):
        choice.grade_choice("The answer is (E)", "E")
    with pytest.raises(ArgumentError, match="truth_letter is ''"):
        choice.grade_choice_published("The answer is (E)", "")
