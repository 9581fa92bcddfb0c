"""The operator library: registration, backends, dispatch (DESIGN section 5).

    CUDA, ROCm -> power_kernels.triton     CPU -> csrc (power_kernels._C)     anything else -> reference

The dispatcher chooses by device. A machine without the C++ extension serves the CPU from the reference, and
`power-kernels doctor` says so. `use_backend` names a backend explicitly; what cannot run raises `BackendError`.
Each family of operators has one file of this package, and one of the same name in each backend.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..block_tables import BlockStatus
from ..errors import ArgumentError, BackendError
from ..law import Cut
from ..particles import Tally
from ..slots import SLOT_FIELDS, SlotBound, SlotField, SlotFlag
from ..state import (
    CHAIN_FIELDS,
    LANE_FIELDS,
    ChainField,
    ChainState,
    Cost,
    LaneField,
    LaneStatus,
    Mode,
    Outcome,
    Status,
)

SCHEMAS: dict[str, str] = {}
KERNELS: dict[str, str] = {}  # what a backend implements, and its family; the functional forms are built on these

PACKAGE = Path(__file__).parents[1]
PACKAGE_NAME = __package__.rpartition(".")[0]

# The operators are registered under the package's name, so that a copy under another name (python_api/commands/hub.py)
# has its own beside these.
NAMESPACE = PACKAGE_NAME.replace(".", "_")
OPS = getattr(torch.ops, NAMESPACE)
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define_kernel(name: str, family: str, schema: str) -> None:
    """An operator that every backend implements under this name, in its file `family`.

    It returns nothing and only writes its arguments.
    """
    SCHEMAS[name], KERNELS[name] = schema, family
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, lambda *args: _kernel("reference", name)(*args), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, lambda *args: _kernel("triton", name)(*args), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: None)


def define_functional(name: str, schema: str, implementation: Callable, fake: Callable) -> None:
    """An operator that allocates its results and calls a kernel, the same for every backend."""
    SCHEMAS[name] = schema
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)


REGISTER = "power_kernels_register"  # the function of csrc/register.cpp


def _load_extension() -> str | None:
    """Load csrc's CPU kernels. Returns why not, or None."""
    paths = sorted(PACKAGE.glob("_C*.so"))
    if not paths:
        return f"{PACKAGE_NAME}._C was not built (no C++ compiler, or torch was missing from the build environment)"
    try:
        # The file is read before it is loaded: kernels of other sources would write other columns, and those that it
        # lacks would be served by the reference without a word.
        contents = paths[0].read_bytes()
        if any(text.encode() + b"\0" not in contents for text in (state_layout(), REGISTER, *KERNELS)):
            return f"{paths[0].name} was built from other sources than this package; build it again"
        register = getattr(ctypes.CDLL(paths[0]), REGISTER)
        register.restype = ctypes.c_char_p
        if (error := register(NAMESPACE.encode())) is not None:
            raise OSError(error.decode())
    except OSError as error:
        return f"{paths[0].name} does not load with torch {torch.__version__}: {error}"
    return None


def state_layout() -> str:
    """What Python and C++ must agree on (columns, codes, tensors), as the string that csrc/chain.cpp compiles in."""
    enums = (
        ChainField,
        LaneField,
        Mode,
        LaneStatus,
        Outcome,
        Cost,
        Cut,
        Status,
        BlockStatus,
        SlotField,
        SlotBound,
        SlotFlag,
        Tally,
    )
    parts = [f"{enum.__name__}:" + "".join(f",{m.name}={m.value}" for m in enum) for enum in enums]
    tensors = "tensors:" + "".join(f",{name}" for name in ChainState.__dataclass_fields__)
    return ";".join([*parts, tensors, f"pitch={CHAIN_FIELDS},{LANE_FIELDS},{SLOT_FIELDS}"])


@functools.cache
def _family(backend: str, family: str):
    """A file of the 'triton' or 'reference' backend, imported at its first call: one needs triton, the other numpy."""
    try:
        return importlib.import_module(f"{PACKAGE_NAME}.{backend}.{family}")
    except ImportError as error:
        raise BackendError(f"the {backend} backend cannot be imported: {error}") from error


def _kernel(backend: str, name: str) -> Callable:
    return getattr(_family(backend, KERNELS[name]), name)


EXTENSION_MISSING: str | None = f"{__package__} is not imported yet"


def load_extension() -> None:
    """Load csrc's kernels, once every family has been defined."""
    global EXTENSION_MISSING
    EXTENSION_MISSING = _load_extension()


def choose_from_environment() -> None:
    """Let POWER_KERNELS_BACKEND name the backend of the whole process."""
    global _chosen
    if name := os.environ.get("POWER_KERNELS_BACKEND"):
        check_backend(name)
        _chosen = name


BACKENDS = ("cpp", "triton", "reference")
_chosen: str | None = None


def check_backend(name: str) -> None:
    """Raises BackendError, saying why, when a backend cannot run here; ArgumentError when there is no such backend."""
    if name not in BACKENDS:
        raise ArgumentError(f"backend is {name!r}; allowed: {', '.join(BACKENDS)}")
    if name == "cpp" and EXTENSION_MISSING:
        raise BackendError(f"backend 'cpp' cannot run: {EXTENSION_MISSING}")
    if name != "cpp":
        _family(name, "sampling")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator from one backend, whatever the device: 'cpp', 'triton' or 'reference'.

    The choice is the process's, not the thread's: blocks in several threads at once end each other's.
    Triton on CPU tensors needs TRITON_INTERPRET=1 before triton is imported. Raises BackendError when `name` cannot
    run. The environment variable POWER_KERNELS_BACKEND does the same for a whole process.
    """
    global _chosen
    check_backend(name)
    previous, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = previous


def forced_backend() -> str | None:
    """The backend that `use_backend` or POWER_KERNELS_BACKEND names now."""
    return _chosen


def backend_for(device: torch.device | str) -> str:
    """The backend that serves tensors of `device` now."""
    if _chosen is not None:
        return _chosen
    kind = torch.device(device).type
    if kind == "cuda":
        return "triton"
    return "cpp" if kind == "cpu" and not EXTENSION_MISSING else "reference"


def serve(name: str, device: torch.device, *args) -> None:
    """Call a kernel on the backend that serves `device` now."""
    if _chosen is None:
        getattr(OPS, name)(*args)
    elif _chosen == "cpp":
        if device.type != "cpu":
            raise BackendError(f"backend 'cpp' serves CPU tensors only, got {device}")
        getattr(OPS, name)(*args)
    elif _chosen == "triton":
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendError("backend 'triton' runs on CPU tensors only under TRITON_INTERPRET=1")
        _kernel("triton", name)(*args)
    else:
        _kernel("reference", name)(*args)


Runner = Callable[..., None]
_runner: Runner = serve


def run(name: str, device: torch.device, *args) -> None:
    """What every family calls: `serve`, unless `set_runner` named another."""
    _runner(name, device, *args)


def set_runner(runner: Runner) -> Runner:
    """Make `run` call `runner(name, device, *args)`, which may end in `serve`. Returns what it called until now."""
    global _runner
    previous, _runner = _runner, runner
    return previous
