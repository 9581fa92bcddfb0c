"""What `commands/hub.py` writes, loaded by Hugging Face's `kernels` library beside the installed package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from power_kernels.api.commands import hub
from power_kernels.errors import ArgumentError
from power_kernels.ops import dispatch

pytest.importorskip("kernels")
ROOT = Path(__file__).parent.parent

# Each program loads the copy and the installed package in its own order, and both draw.
LOAD = """
import sys
from pathlib import Path
from kernels import get_kernel, get_local_kernel
"""
DRAW = """
import torch

torch.manual_seed(0)
rows = 5
logits, alpha = torch.randn(rows, 999), torch.full((rows,), 4.0)
counter = torch.zeros(rows, 4, dtype=torch.int32)
counter[:, 0] = torch.arange(rows)
weights, lengths = torch.randn(2, 3, 7), torch.tensor([7, 3, 5], dtype=torch.int32)

def drawn(package):
    out = package.sample_tokens(logits, alpha, alpha, torch.tensor([11]), counter)
    scored = package.score_tokens(logits, out.token, alpha, alpha)
    accepted = package.mh_accept(*weights, lengths, lengths.flip(0), torch.full((3,), -0.1, dtype=torch.float64))
    return [t.tolist() for t in (out.token, out.logq, scored.weight, accepted.accept, accepted.log_ratio)]

assert copy is not installed and copy.__version__ == installed.__version__
assert drawn(copy) == drawn(installed), (drawn(copy), drawn(installed))
ours, theirs = installed.ops.dispatch, copy.ops.dispatch
assert ours.NAMESPACE == "power_kernels" and theirs.NAMESPACE == copy.__name__
assert not [name for name in sys.modules if name.startswith(copy.__name__ + ".api")]
for of in (ours, theirs):
    for name, schema in of.SCHEMAS.items():
        operator = getattr(getattr(torch.ops, of.NAMESPACE), name).default
        cpu = torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CPU")
        assert cpu == (name in of.KERNELS and of.EXTENSION_MISSING is None), name
shape = theirs.OPS.score_tokens(*(t.to("meta") for t in (logits, torch.zeros(rows).long(), alpha, alpha)), False)[0]
assert shape.is_meta and shape.shape == (rows,), shape
print(copy.__name__, copy.backend_for("cpu"), Path(copy.__file__).parent.name)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub")
    hub.emit(out)
    return out


def loaded(code: str, argument: Path | str, **environment: str) -> list[str]:
    """(module, backend on CPU, variant) of the copy that a program loaded, without a network."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD + code + DRAW, argument],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0", **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def metadata(variant: Path) -> dict:
    return json.loads((variant / "metadata.json").read_text())


def test_beside_the_package_imported_first_the_library_takes_the_variant_with_cpp_kernels(tree):
    module, backend, variant = loaded(
        "import power_kernels as installed\ncopy = get_local_kernel(Path(sys.argv[1]))\n", tree
    )
    if dispatch.EXTENSION_MISSING:
        assert (backend, variant) == ("reference", "torch-cpu")
    else:
        assert (backend, variant) == ("cpp", next(tree.glob("build/torch-stable-abi*")).name)
    assert module == metadata(tree / "build" / variant)["id"]


def test_before_the_package_under_a_name_of_a_hub_and_without_numpy(tree):
    """numpy is not among what the library lets a kernel depend on."""
    if dispatch.EXTENSION_MISSING:
        pytest.skip(dispatch.EXTENSION_MISSING)
    code = """
sys.modules["numpy"] = None
copy = get_kernel("someone/power-kernels", version=1, trust_remote_code=True)
for family in set(copy.ops.dispatch.KERNELS.values()):
    copy.ops.dispatch._family("triton", family)
assert "power_kernels" not in sys.modules, "an import is not relative"
import power_kernels as installed
"""
    _, backend, _ = loaded(code, "", LOCAL_KERNELS=f"someone/power-kernels={tree}")
    assert backend == "cpp"


def test_the_variant_without_cpp_kernels_is_served_by_the_reference(tree):
    code = """
copy = get_local_kernel(Path(sys.argv[1]))
copy.reference.sample_tokens_out
assert "power_kernels" not in sys.modules, "an import is not relative"
import power_kernels as installed
"""
    module, backend, variant = loaded(
        code + "installed.ops.dispatch._chosen = 'reference'\n", tree / "build" / "torch-cpu"
    )
    assert (module, backend, variant) == (metadata(tree / "build/torch-cpu")["id"], "reference", "torch-cpu")


def test_the_variants_differ_in_their_id_and_none_holds_the_driver(tree):
    variants = sorted(tree.glob("build/*"))
    assert {"torch-cpu", "torch-cuda", "torch-rocm"} <= {variant.name for variant in variants}
    assert len({metadata(variant)["id"] for variant in variants}) == len(variants)
    for variant in variants:
        assert not (variant / "api").exists()
        assert ("stable-abi" in variant.name) == bool(list(variant.glob("_C*.so")))
        assert metadata(variant)["backend"]["type"] in variant.name.split("-")


def test_the_variant_is_named_after_the_abi_that_the_extension_is_built_for():
    major, minor = re.search(r'"TORCH_TARGET_VERSION", "0x(..)(..)0{12}"', (ROOT / "setup.py").read_text()).groups()
    assert f"{int(major, 16)}{int(minor, 16)}" == hub.STABLE_ABI


def test_a_folder_that_cannot_be_written_is_refused(tree, tmp_path, capsys):
    with pytest.raises(ArgumentError, match="build is there already"):
        hub.emit(tree)
    (tmp_path / "file").write_text("")
    assert hub.main([str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
