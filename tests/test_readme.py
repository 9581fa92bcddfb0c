"""Every command and snippet of the README runs, as a reader would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [line.split("#")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def run(command: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TRITON_INTERPRET": "0",
        **environment,
    }
    return subprocess.run(["bash", "-ec", command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_commands_are_the_ones_tested_here():
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert any(c.startswith("power-kernels doctor") for c in COMMANDS)
    assert any(c.startswith("power-kernels generate") for c in COMMANDS)
    assert {kind for kind, _ in BLOCKS} <= {"bash", "python", "text"}


def test_python_snippets_run_in_order():
    """As one program: a later snippet uses what an earlier one made."""
    snippets = [text for kind, text in BLOCKS if kind == "python"]
    assert len(snippets) == 3
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + "\n".join(snippets)],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"nats, \d+ of \d+ steps accepted", done.stdout)) == 2
    assert "The capital of France is" in done.stdout
    assert "tensor([" in done.stdout


@pytest.mark.parametrize(
    "block", [text for kind, text in BLOCKS if kind == "bash" and "power-kernels" in text], ids=lambda text: text[:20]
)
def test_power_kernels_commands_run(block):
    done = run(block)
    assert done.returncode == 0, done.stderr
    assert "backend of each op" in done.stdout or "tokens forwarded" in done.stdout


def test_make_demo_prints_three_ways_side_by_side():
    done = run("make --always-make --dry-run demo && make demo", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout.lower()
    for needed in ("plain", "low temperature", "power", "nats", "accept", "token"):
        assert needed in printed


def test_make_test_runs_the_whole_suite():
    """The command that is running now; here only that it would run every test file."""
    done = run("make --dry-run test")
    assert re.search(r"-m pytest .*\btests$", done.stdout.strip().splitlines()[-1]), done.stdout
