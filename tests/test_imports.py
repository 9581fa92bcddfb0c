"""What importing the package loads: nothing heavy before it is needed, everything once torch is there."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest
import torch

import power_kernels
import power_kernels.api

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "triton", "transformers", "scipy", "matplotlib", "tokenizers"}

# Everything that is answered at once: (the command line, its exit status, a part of what it says).
ANSWERED = [
    ("--help", 0, "COMMAND"),
    ("--version", 0, power_kernels.__version__),
    ("generate --help", 0, "--no-free-prefix"),
    ("serve --help", 0, "vllm_xargs"),
    ("serve", 2, "MODEL"),
    ("serve /nowhere --port 1", 2, "vLLM is not installed; tested: 0.31"),
    ("bench --help", 0, "mh_advance"),
    ("doctor --help", 0, "--json"),
    ("nonsense", 2, "invalid choice"),
    ("generate --model x", 2, "--prompt"),
    ("generate --model x --prompt y --nonsense 1", 2, "unrecognized arguments: --nonsense 1"),
    ("generate --model x --prompt y --alpha 0.5", 2, "alpha is 0.5; it must lie in [1, 1e+37]"),
    ("generate --model x --prompt y --alpha 4 --temperature 2", 2, "early_rejection is True with temperature 2.0"),
    ("generate --model x --prompt y --lanes 0", 2, "lanes is 0; it must be at least 1"),
    ("generate --model x --prompt y --num-chains 0", 2, "--num-chains is 0; it must be at least 1"),
    ("generate --model x --prompt y --threads 0", 2, "--threads is 0; it must be at least 1"),
    ("generate --model x --prompt y --out /", 2, "--out / cannot be written"),
    ("generate --model x --prompts /nowhere.jsonl", 2, "--prompts /nowhere.jsonl cannot be read"),
    ("generate --model /nowhere --prompt y", 2, "--model /nowhere cannot be loaded"),
    ("bench --ops nonsense", 2, "invalid choice: 'nonsense'"),
    ("bench --threads 0", 2, "--threads is 0; it must be at least 1"),
    ("bench --seconds -1", 2, "--seconds is -1.0; it must not be negative"),
    ("bench --out /dev/null/results", 2, "--out /dev/null/results cannot be written"),
    ("eval --help", 0, "--dry-run"),
    ("eval", 2, "--out is not given"),
    ("eval --out run", 2, "model is not given"),
    ("eval --out run --grade --pilot 3", 2, "--grade draws nothing and grades everything, and --pilot is given"),
    ("eval --demo --model x", 2, "--demo is an experiment of its own, and model is 'x'"),
    (
        "eval --out run --model x --task humaneval --arm power:alpha=no",
        2,
        "arms[0].alpha is False; it must be a number",
    ),
    ("eval --out run --model x --task humaneval:colour=red --arm plain", 2, "tasks[0].colour is not known"),
    ("eval --out run --model /nowhere --task humaneval --arm plain", 2, "--model /nowhere cannot be loaded"),
    ("eval /nowhere.yaml --out run", 2, "/nowhere.yaml cannot be read"),
    ("diagnose --help", 0, "--discard"),
    ("diagnose /nowhere.jsonl", 2, "/nowhere.jsonl cannot be read"),
    ("diagnose README.md --discard 1", 2, "--discard is 1.0; it must lie in [0, 1)"),
    ("doctor --dtype float16", 2, "--dtype is float16 without --model"),
    ("doctor --model /nowhere", 2, "--model /nowhere cannot be loaded"),
]

# A process of its own, as this one holds torch: runs every command line, says what it answered and what is loaded.
COMMANDS = """
import contextlib, io, json, sys
from power_kernels.api.commands.cli import main

answers = []
for line in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(line.split())
        except SystemExit as end:
            status = end.code
    answers.append((line, status, said.getvalue()))
print(json.dumps([answers, sorted(name for name in sys.modules if "." not in name)]))
"""


def fresh(code: str, *arguments: str) -> str:
    """What a new process prints."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_help_and_the_refusal_of_bad_input_import_nothing_heavy():
    answers, loaded = json.loads(fresh(COMMANDS, json.dumps([line for line, _, _ in ANSWERED])))
    for (line, status, part), (_, found, said) in zip(ANSWERED, answers, strict=True):
        assert found == status, f"{line}: {said}"
        assert part in said, line
    assert not HEAVY & set(loaded)


def test_names_are_listed_before_they_are_loaded_and_configurations_need_no_torch():
    code = """
import sys, power_kernels, power_kernels.api
from power_kernels import Law, ArgumentError
from power_kernels.api import PowerConfig
assert PowerConfig(max_new_tokens=4, block_size=None).law == Law(4, 4, 10)
print(all(set(package.__all__) <= set(dir(package)) for package in (power_kernels, power_kernels.api)))
print("torch" in sys.modules)
"""
    assert fresh(code).split() == ["True", "False"]


# Runs with numpy hidden, which torch does without, too.
WITHOUT_NUMPY = """
import os, sys
os.environ["TRITON_INTERPRET"] = "0"  # Triton's interpreter needs numpy, its compiler does not
sys.modules["numpy"] = None
import warnings
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
import torch
import power_kernels as pk

z, one = torch.tensor([[0.0, 5.0, -9.0]]), torch.ones(1)
counter = torch.zeros(1, 4, dtype=torch.int32)

def draw():
    return pk.sample_tokens(z, one, one, torch.tensor([0]), counter).token.tolist()

for family in set(pk.ops.dispatch.KERNELS.values()):
    pk.ops.dispatch._family("triton", family)
if pk.backend_for("cpu") == "cpp":
    assert draw() == [1]
try:
    with pk.use_backend("reference"):
        draw()
except pk.BackendError as error:
    print(error)
"""


def test_only_the_reference_needs_numpy_and_it_says_so():
    assert re.match("the reference backend cannot be imported: .*numpy", fresh(WITHOUT_NUMPY))


def test_everything_is_loaded_and_registered_at_once_where_torch_is_there():
    """As here: conftest.py imports torch first. test_nvtx.py imports the operators before torch, in a new process."""
    assert set(power_kernels.__all__) <= set(vars(power_kernels))
    assert torch.ops.power_kernels.sample_tokens
    assert torch.ops.power_kernels.mh_advance


@pytest.mark.parametrize("package", [power_kernels, power_kernels.api])
def test_editors_and_python_are_told_the_same_names(package):
    """The imports that only type checkers read against the table, and against what the table gives."""
    told = {}
    for node in ast.walk(ast.parse(Path(package.__file__).read_text())):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            for statement in node.body:
                told.update({alias.name: imported_from(statement, package.__name__) for alias in statement.names})
    assert sorted(told) == sorted(package.__all__)
    for name, module in told.items():
        home = package._HOMES[name]
        assert home == (f"{module}.{name}" if module == package.__name__ else module), name
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_a_name_of_the_package_is_imported_from_where_it_is_defined():
    """Packages collect names for their users; of modules each name has one home."""
    homes, imported = {}, 0
    for file in (file for folder in ("power_kernels", "python_api", "tests", "bench") for file in files(folder)):
        package = ".".join(file.relative_to(ROOT).parts[:-1])
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            module = imported_from(node, package)
            if not module.startswith("power_kernels."):
                continue
            path = module.replace("power_kernels.api.", "python_api.").replace(".", "/") + ".py"
            if not (ROOT / path).exists():
                continue
            if path not in homes:
                homes[path] = set(defined(ast.parse((ROOT / path).read_text()).body))
            for alias in node.names:
                assert alias.name in homes[path], f"{file}: {alias.name} is not defined in {path}"
                imported += 1
    assert imported > 300


def imported_from(node: ast.ImportFrom, package: str) -> str:
    """The module that an import in a file of `package` names; imports within power_kernels are relative."""
    return resolve_name("." * node.level + (node.module or ""), package)


def files(name: str) -> list[Path]:
    return [path for path in (ROOT / name).rglob("*.py") if "api" not in path.relative_to(ROOT).parts]  # a link


def defined(body) -> Iterator[str]:
    """The names that statements define, but for imports."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
        elif isinstance(node, ast.If | ast.Try):
            yield from defined(node.body + node.orelse)
