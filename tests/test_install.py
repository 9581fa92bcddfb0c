"""A machine without a compiler or without Triton still gets a working package, which says what is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SAMPLE = """
import torch, power_kernels as pk
z, alpha = torch.tensor([[0.0, 1.0, -float("inf")]]), torch.tensor([4.0])
out = pk.sample_tokens(z, alpha, alpha, torch.tensor([0]), torch.zeros(1, 4, dtype=torch.int32))
assert int(out.token) in (0, 1) and int(out.status) == 0
print(pk.__file__, pk.backend_for("cpu"))
"""
COMMAND = """
from power_kernels.api.commands.cli import main
main({options})
"""


def python(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(tmp_path: Path, **environment: str) -> tuple[Path, str]:
    """A plain install, not an editable one: (its directory, what pip printed)."""
    source = tmp_path / "source"  # a copy, so that the build leaves nothing behind in the checkout
    for folder in ("csrc", "power_kernels", "python_api"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # What is tested is the way from the source to an import, so the extension is compiled as quickly as can be.
    unoptimised = tmp_path / "c++"
    unoptimised.write_text('#!/bin/bash\nexec c++ "${@/#-O3/-O0}"\n')
    unoptimised.chmod(0o755)
    target = tmp_path / "site"
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--target", target, source],
        env={**os.environ, "CXX": str(unoptimised), **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return target, installed.stdout + installed.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_an_install_with_a_compiler_has_the_extension(tmp_path):
    target, _ = install(tmp_path)
    options = ["bench", "--quick", "--device", "cpu", "--ops", "mh_accept"]
    said = python(SAMPLE + COMMAND.format(options=options), tmp_path, PYTHONPATH=str(target))
    path, backend = said.splitlines()[0].split()
    assert path.startswith(str(target))
    assert backend == "cpp"
    assert "decisions/s" in said


@pytest.mark.parametrize("reason", ["no compiler", "no torch in the build environment"])
def test_an_install_without_the_extension_works_and_says_so(tmp_path, reason):
    if reason == "no compiler":
        broken = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), "/nonexistent/compiler")
    else:
        # The build runs in this environment; a finder that hides torch stands for one that lacks it.
        hidden = tmp_path / "hidden"
        hidden.mkdir()
        (hidden / "sitecustomize.py").write_text(
            "import importlib.util as u\nfind = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        )
        broken = {"PYTHONPATH": str(hidden)}
    target, said = install(tmp_path, **broken)
    if reason == "no compiler":
        assert "a failure here still gives a working install" in said
    else:
        assert "building without the C++ backend" in said
    assert not list((target / "power_kernels").glob("_C*"))
    said = python(SAMPLE + COMMAND.format(options=["doctor"]), tmp_path, PYTHONPATH=str(target))
    path, backend = said.splitlines()[0].split()
    assert path.startswith(str(target))
    assert backend == "reference"
    assert "was not built" in said


def test_a_machine_without_triton_works_and_says_so(tmp_path):
    hide = "import sys; sys.modules['triton'] = None\n"
    said = python(hide + SAMPLE + COMMAND.format(options=["doctor"]), tmp_path, TRITON_INTERPRET="0")
    assert "the triton backend cannot be imported" in said
