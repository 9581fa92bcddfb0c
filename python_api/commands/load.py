"""The model that a command's options name, loaded and ready to sample from."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    cached_file,
    find_adapter_config_file,
    is_peft_available,
)

from power_kernels.api.commands.generate import engine_arguments
from power_kernels.api.driver.distributed import Ranks
from power_kernels.api.driver.engine import UnsupportedModelError
from power_kernels.api.driver.sampler import PowerSampler
from power_kernels.api.engines.huggingface.inspection import configured_context
from power_kernels.api.engines.serving.versions import UntestedVersionError
from power_kernels.errors import ArgumentError

# What a tokenizer may be kept in: one of these is there, whatever its kind.
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# By `--engine`: the engine's name in `power_kernels.api`, and the arguments that say how many GPUs it takes.
_STACKS = {
    "vllm": ("VllmEngine", ("tensor_parallel_size", "pipeline_parallel_size")),
    "sglang": ("SglangEngine", ("tp_size", "dp_size")),
}
# `cached_file` returns None for what is not there.
_IF_THERE = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}


def _device(given: str | None, ranks: Ranks) -> str:
    device = given or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cuda" or ranks.world == 1:
        return device
    if ranks.local_rank >= torch.cuda.device_count():
        raise ArgumentError(
            f"process {ranks.local_rank} of this machine has no GPU among the {torch.cuda.device_count()} that are "
            "visible; start one process a GPU (--nproc-per-node), or name a --device"
        )
    return f"cuda:{ranks.local_rank}"


def load_tokenizer(name: str):
    """The tokenizer of `--model`, and the context of its model, None without a limit: little beside its weights, and
    enough to look at the prompts. An adapter without a tokenizer of its own has its base's. Raises ArgumentError.

    A configuration that is not to be had is left to the loader of the model.
    """
    try:
        base = _base_of(name)
        config = _config(base or name)
        if base is None:
            tokenizer = AutoTokenizer.from_pretrained(name)
        else:  # its folder does not say of which kind the tokenizer's files are: the base's configuration does
            tokenizer = AutoTokenizer.from_pretrained(name if _has_tokenizer(name) else base, config=config)
        return tokenizer, None if config is None else configured_context(config)
    except Exception as error:  # hubs, files and formats fail in as many ways as there are
        raise ArgumentError(f"--model {name} cannot be loaded: {error}") from error


def revision(name: str) -> str | None:
    """The hub's revision of a model that is not a folder; None where it is not to be had."""
    return getattr(_config(_base_of(name) or name), "_commit_hash", None)


def _config(name: str) -> PreTrainedConfig | None:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError):  # the model's loader will tell
        return None


def _base_of(name: str) -> str | None:
    """The model that an adapter of the PEFT library is for; None where `name` is no adapter alone, but a model."""
    if cached_file(name, CONFIG_NAME, **_IF_THERE) is not None:
        return None
    path = find_adapter_config_file(name)
    if path is None:
        return None
    base = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ArgumentError(f"{ADAPTER_CONFIG_NAME} does not name the model that it adapts (base_model_name_or_path)")
    if not is_peft_available():
        raise ArgumentError(f"it is an adapter of {base}, which needs PEFT: pip install peft")
    return base


def _has_tokenizer(name: str) -> bool:
    return any(cached_file(name, file, **_IF_THERE) is not None for file in _TOKENIZER_FILES)


def load_sampler(arguments: argparse.Namespace, ranks: Ranks | None = None, tokenizer=None) -> PowerSampler:
    """The model of `generate.add_model_arguments`, in the engine of `generate.add_engine_arguments` where the command
    has them, and its tokenizer unless it is there. Raises ArgumentError."""
    if tokenizer is None:
        tokenizer, _ = load_tokenizer(arguments.model)
    if vars(arguments).get("engine") in _STACKS:
        return PowerSampler(_served(arguments, ranks or Ranks()), tokenizer)
    model = _load(arguments, _device(arguments.device, ranks or Ranks()))
    try:
        return PowerSampler(model, tokenizer)
    except UnsupportedModelError as error:
        raise ArgumentError(f"--model {arguments.model}: {error}") from error


def _served(arguments: argparse.Namespace, ranks: Ranks):
    """The engine over a serving stack."""
    import power_kernels.api

    name, parallel = _STACKS[arguments.engine]
    given = {"dtype": arguments.dtype} | engine_arguments(arguments.engine_arg or ())
    if ranks.world > 1:
        _take_own_gpus(math.prod(given.get(size, 1) for size in parallel), ranks)
    try:
        return getattr(power_kernels.api, name)(arguments.model, **given)
    except UntestedVersionError as error:
        raise ArgumentError(f"--engine is {arguments.engine}: {error}") from error
    except Exception as error:  # a stack refuses what it is given in as many ways as there are
        raise ArgumentError(
            f"--model {arguments.model} cannot be loaded with --engine {arguments.engine}: {error}"
        ) from error


def _take_own_gpus(wanted: int, ranks: Ranks) -> None:
    """Each process has a stack's processes of its own: of the GPUs that are visible it takes as many as they need."""
    if not torch.cuda.device_count():
        return
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    mine = names[ranks.local_rank * wanted : (ranks.local_rank + 1) * wanted]
    if len(mine) < wanted:
        raise ArgumentError(
            f"process {ranks.local_rank} of this machine needs {wanted} GPUs of its own, and {len(names)} are visible; "
            "start fewer processes (--nproc-per-node)"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)


def _model(name: str, dtype: str, device: str):
    if _is_quantised(name):  # whose loader packs the weights where they are to stay; `.to` is refused afterwards
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map={"": device})
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)


def _is_quantised(name: str) -> bool:
    config = _config(_base_of(name) or name)
    parts = () if config is None else (config, config.get_text_config())
    return any(getattr(part, "quantization_config", None) is not None for part in parts)


def _load(arguments: argparse.Namespace, device: str):
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # kernels are launched on the current one
        return _model(arguments.model, arguments.dtype, device).eval()
    except Exception as error:  # hubs, files, formats and devices fail in as many ways as there are
        raise ArgumentError(f"--model {arguments.model} cannot be loaded on {device}: {error}") from error
