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
    target = tmp_path / "site"
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--target", target, source],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return target, installed.stdout + installed.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_an_install_with_a_compiler_has_the_extension(tmp_path):
    target, _ = install(tmp_path)
    path, backend = python(SAMPLE, tmp_path, PYTHONPATH=str(target)).split()
    assert path.startswith(str(target))
    assert backend == "cpp"
    options = ["bench", "--quick", "--device", "cpu", "--ops", "mh_accept"]
    bench = f"from power_kernels.api.commands.cli import main; main({options})"
    assert "decisions/s" in python(bench, tmp_path, PYTHONPATH=str(target))


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
    path, backend = python(SAMPLE, tmp_path, PYTHONPATH=str(target)).split()
    assert path.startswith(str(target))
    assert backend == "reference"
    doctor = "from power_kernels.api.commands.cli import main; main(['doctor'])"
    assert "was not built" in python(doctor, tmp_path, PYTHONPATH=str(target))


def test_a_machine_without_triton_works_and_says_so(tmp_path):
    hide = "import sys; sys.modules['triton'] = None\n"
    python(hide + SAMPLE, tmp_path, TRITON_INTERPRET="0")
    doctor = hide + "from power_kernels.api.commands.cli import main; main(['doctor'])"
    assert "the triton backend cannot be imported" in python(doctor, tmp_path, TRITON_INTERPRET="0")
