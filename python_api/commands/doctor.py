"""`power-kernels doctor`: which backend serves each operator here, what is missing, and how a model is decoded."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

import torch

import power_kernels
from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.planning import LANES, default_lanes
from power_kernels.api.driver.sampler import PowerSampler
from power_kernels.api.engines.huggingface.decode_attention import KERNELS
from power_kernels.errors import BackendError
from power_kernels.ops import dispatch

_PACKAGES = ("torch", "triton", "transformers", "numpy", "tqdm", "gguf")


def report() -> dict:
    """Everything that `doctor` prints, as plain data."""
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    failures = {device: _failure(device) for device in devices}
    return {
        "power_kernels": power_kernels.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": {device: _device_name(device) for device in devices},
        "threads": torch.get_num_threads(),
        "forced_backend": dispatch.forced_backend(),
        "ops": {
            name.removesuffix("_out"): {d: "none" if failures[d] else dispatch.backend_for(d) for d in devices}
            for name in dispatch.KERNELS
        },
        "missing": _missing() + [f"{device}: a kernel does not run: {f}" for device, f in failures.items() if f],
    }


def _failure(device: str) -> str | None:
    """Why one draw does not run on a device, or None: a GPU's kernels are compiled at their first launch."""
    try:
        alpha, seed = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        counter = torch.zeros(1, 4, dtype=torch.int32, device=device)
        out = power_kernels.sample_tokens(torch.zeros(1, 8, device=device), alpha, alpha, seed, counter)
        return None if int(out.status) == 0 else f"status {int(out.status)} for a sound row"
    except Exception as error:  # whatever a driver, a compiler or a cache directory can raise is the finding
        return f"{type(error).__name__}: {error}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    return platform.machine() if device == "cpu" else torch.cuda.get_device_name(device)


def _missing() -> list[str]:
    missing = []
    if dispatch.EXTENSION_MISSING:
        missing.append(f"C++ backend: {dispatch.EXTENSION_MISSING}. CPU tensors are served by the slow reference.")
        if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++")):
            missing.append(
                "C++ compiler: none was found; install g++ 10 or newer and reinstall with --no-build-isolation"
            )
    try:
        dispatch.check_backend("triton")
    except BackendError as error:
        missing.append(f"Triton backend: {error}. GPU tensors cannot be served.")
    if not torch.cuda.is_available():
        missing.append("GPU: torch sees none; everything runs on the CPU.")
    return missing


def decoding(sampler: PowerSampler, model: str) -> dict:
    """How a run of the Hugging Face engine decodes, as plain data: measures some steps.

    step_seconds: by rows of a step. lanes: that the driver chooses for so many chains at once, with the default
    PowerConfig.
    """
    engine = sampler.engine
    rows = [count for count in (1, 2, 4, 8, 16, 32, 64, 128, 256) if count <= engine.most_rows]
    return {
        "model": model,
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "attention": engine.attention,
        "captured": sampler.capture,
        "step_seconds": dict(zip(rows, engine.decode_seconds(rows), strict=True)),
        "lanes": {chains: default_lanes(engine, PowerConfig(), chains) for chains in rows},
    }


def _decoding_text(data: dict) -> list[str]:
    kind = "replayed as graphs" if data["captured"] else "launched one by one (graphs need a CUDA device)"
    one = data["step_seconds"][1]
    return [
        "",
        f"decoding of {data['model']} on {data['device']}, {data['dtype']}",
        f"  attention     {data['attention']}: {KERNELS[data['attention']]}",
        f"  steps         {kind}",
        f"  lanes         chosen from {', '.join(map(str, LANES))} unless --lanes says otherwise",
        "  chains or rows at once, ms a step, times one row, lanes of so many chains",
        *(
            f"    {rows:>5} {1e3 * seconds:>10.2f} {seconds / one:>8.2f} {data['lanes'][rows]:>6}"
            for rows, seconds in data["step_seconds"].items()
        ),
    ]


def text(data: dict) -> str:
    """The report for people."""
    lines = [f"power_kernels {data['power_kernels']} on Python {data['python']}, {data['threads']} threads"]
    lines += [f"  {name:<13} {version or 'not installed'}" for name, version in data["packages"].items()]
    lines += ["", "devices"]
    lines += [f"  {device:<13} {name}" for device, name in data["devices"].items()]
    forced = data["forced_backend"]
    lines += ["", "backend of each op" + (f" (forced to {forced!r})" if forced else "")]
    lines += [
        f"  {op:<20} " + ", ".join(f"{device}: {backend}" for device, backend in by_device.items())
        for op, by_device in data["ops"].items()
    ]
    lines += ["", "missing"] + [f"  {line}" for line in data["missing"] or ["nothing"]]
    if "decoding" in data:
        lines += _decoding_text(data["decoding"])
    return "\n".join(lines)
