"""Every command and snippet of the README runs, as a reader would run it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
# Blocks that share a variable run as a whole; elsewhere each line is a command.
COMMANDS = [
    line.split("#")[0].strip()
    for kind, text in BLOCKS
    if kind == "bash" and "MODEL" not in text
    for line in text.splitlines()
]


def run(command: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TRITON_INTERPRET": "0",
        **environment,
    }
    return subprocess.run(["bash", "-ec", command], cwd=ROOT, env=environment, capture_output=True, text=True)


# Each command as it is tested: as it stands, or with what keeps the test short and the machine unchanged.
TESTED_AS = {
    "make demo": "make demo",
    "make test": "make --dry-run test",  # the command that is running now
    "power-kernels doctor": "power-kernels doctor",
    "pip install torch setuptools wheel": "pip install --dry-run torch setuptools wheel",
    "pip install --no-build-isolation '.[gguf]'": "pip install --dry-run --no-build-isolation '.[gguf]'",
    "make bench": "make --dry-run bench",
    "power-kernels bench": "power-kernels bench --quick --ops mh_accept",
    "python bench/ops.py": "python bench/ops.py --quick",
    "python bench/end_to_end.py": "python bench/end_to_end.py --quick --only ours-1",
    "python bench/end_to_end.py latency": "python bench/end_to_end.py latency --quick --lanes 1,default",
    "python bench/end_to_end.py throughput": (
        "python bench/end_to_end.py throughput --quick --prompts 3 --slots 2 --tokens 6"
    ),
    "make gpu-check OUT=results-decode PLAN=decode": "make --dry-run gpu-check OUT=results-decode PLAN=decode",
    'power-kernels doctor --model "$(python -m power_kernels.api.commands.demo_model)"': (
        'power-kernels doctor --threads 1 --model "$(python -m power_kernels.api.commands.demo_model)"'
    ),
    "python -m power_kernels.api.commands.paged_demo": "python -m power_kernels.api.commands.paged_demo --tiny",
    "make kernels-report": "python -m power_kernels.triton --quick mh_accept",
    "make gpu-check OUT=results": "make --dry-run gpu-check OUT=results",
}
PRINTED = {
    "make demo": ("plain sampling", "low temperature", "power sampling", "nats", "acceptance rate", "tokens forwarded"),
    "make test": ("-m pytest", " tests"),
    "power-kernels doctor": ("backend of each op", "sample_tokens", "missing"),
    "make bench": ("bench/ops.py", "bench/end_to_end.py"),
    "python bench/ops.py": ("decisions/s", "logsumexp", "compile", "eager", "limits"),
    "power-kernels bench": ("decisions/s", "eager"),
    "python bench/end_to_end.py": ("plain generate", "power_kernels, 1 chain"),
    "python -m power_kernels.api.commands.paged_demo": ("shared", "copied"),
    "make kernels-report": ("sm_80", "sm_90", "sm_100", "gfx942", "regs"),
    "make gpu-check OUT=results": ("bench/gpu_check.py --out",),
    "make gpu-check OUT=results-decode PLAN=decode": ("--plan decode",),
    "python bench/end_to_end.py latency": ("plain", "default lanes over 1 lane"),
    "python bench/end_to_end.py throughput": ("answers", "useful"),
    'power-kernels doctor --model "$(python -m power_kernels.api.commands.demo_model)"': (
        "attention",
        "lanes of so many",
    ),
}


def test_every_command_is_tested():
    assert sorted(COMMANDS) == sorted(TESTED_AS)
    assert {kind for kind, _ in BLOCKS} <= {"bash", "python"}


@pytest.mark.parametrize("command", TESTED_AS)
def test_the_command_runs(command):
    done = run(TESTED_AS[command], OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    for needed in PRINTED.get(command, ()):
        assert needed in done.stdout, done.stdout


def test_the_generate_blocks_run():
    one, several = [text for kind, text in BLOCKS if kind == "bash" and "MODEL" in text]
    done = run(one)
    assert done.returncode == 0, done.stderr
    assert "tokens forwarded" in done.stdout
    out = ROOT / "build" / "colours.jsonl"
    out.unlink(missing_ok=True)
    done = run(several, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["chain_id"] for line in out.read_text().splitlines()] == [0, 1]


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
