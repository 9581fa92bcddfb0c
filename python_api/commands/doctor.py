"""`power-kernels doctor`: which backend serves each operator here, what is missing, and how a model is decoded."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil

import torch

import power_kernels
from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.planning import plan_run
from power_kernels.api.driver.sampler import PowerSampler
from power_kernels.api.engines.huggingface.decode_attention import KERNELS
from power_kernels.api.engines.serving.versions import SGLANG, VLLM
from power_kernels.api.experiments.grading import sandbox
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
        "sandbox": _sandbox(),
        "stacks": {
            stack.name: {"version": stack.installed(), "refused_because": stack.refusal()} for stack in (VLLM, SGLANG)
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


def _sandbox() -> dict:
    """What keeps a program in that a model wrote (`power-kernels eval --allow-code-execution`)."""
    try:
        return dataclasses.asdict(sandbox.barriers())
    except sandbox.SandboxError as error:
        return {"isolation": "none", "weaker_because": f"{error}; no such program is run"}


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


_JOBS = (1, 4, 16, 64, 1000)  # answers to draw, that a plan is shown for
_TOKENS = 512  # of each


def decoding(sampler: PowerSampler, model: str) -> dict:
    """How a run of the Hugging Face engine decodes, as plain data: measures some steps.

    tokens: of the answers that are planned for, fewer where the model's context is shorter. positions: that each row of
    a timed step reads. step_seconds: by rows of a step, empty where memory does not hold one row. plans: (chains at
    once, lanes of each) that the driver chooses for so many answers, with the default PowerConfig.
    """
    engine = sampler.engine
    limit = engine.max_context or _TOKENS + 64
    tokens = min(_TOKENS, max(1, limit // 2))
    prompt = min(64, limit - tokens)
    positions = prompt + tokens // 2
    config = PowerConfig(max_new_tokens=tokens)
    plans = {jobs: plan_run(engine, config, jobs=jobs, max_length=prompt + tokens, length=positions) for jobs in _JOBS}
    return {
        "model": model,
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "attention": engine.attention,
        "captured": sampler.capture,
        "tokens": tokens,
        "positions": positions,
        "step_seconds": plans[_JOBS[-1]].seconds.measured,
        "plans": {jobs: (plan.slots, plan.lanes) for jobs, plan in plans.items()},
    }


def _decoding_text(data: dict) -> list[str]:
    kind = "replayed as graphs" if data["captured"] else "launched one by one (graphs need a CUDA device)"
    one = data["step_seconds"].get(1)
    return [
        "",
        f"decoding of {data['model']} on {data['device']}, {data['dtype']}",
        f"  attention     {data['attention']}: {KERNELS[data['attention']]}",
        f"  steps         {kind}",
        f"  rows of a step that read {data['positions']} positions each: "
        + ("none could be timed, there is no memory for one" if one is None else "ms, times one row, ms a row"),
        *(
            f"    {rows:>5} {1e3 * seconds:>10.2f} {seconds / one:>8.2f} {1e3 * seconds / rows:>10.2f}"
            for rows, seconds in data["step_seconds"].items()
        ),
        f"  answers of {data['tokens']} tokens to draw: chains at once x lanes of each, where --max-chains and --lanes",
        "  do not say otherwise",
        *(f"    {jobs:>5} {slots:>10} x {lanes}" for jobs, (slots, lanes) in data["plans"].items()),
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
    held = data["sandbox"]
    lines += ["", f"programs that a model wrote (eval --allow-code-execution): {held['isolation']}"]
    lines += [f"  {barrier:<13} {held[barrier]}" for barrier in ("network", "files", "processes") if barrier in held]
    lines += [f"  weaker, since {held['weaker_because']}"] if held["weaker_because"] else []
    served = ", ".join(f"{device} by {backend}" for device, backend in data["ops"]["sample_slots"].items())
    lines += [""]
    lines += [
        f"{name} (--engine {name.lower()}): "
        + (stack["refused_because"] or f"{stack['version']}, sample_slots on {served}")
        for name, stack in data["stacks"].items()
    ]
    lines += ["", "missing"] + [f"  {line}" for line in data["missing"] or ["nothing"]]
    if "decoding" in data:
        lines += _decoding_text(data["decoding"])
    return "\n".join(lines)
