"""The model that a command's options name, loaded and ready to sample from."""

from __future__ import annotations

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from power_kernels.api.driver.distributed import Ranks
from power_kernels.api.driver.engine import UnsupportedModelError
from power_kernels.api.driver.sampler import PowerSampler
from power_kernels.api.engines.huggingface.inspection import configured_context
from power_kernels.errors import ArgumentError


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
    enough to look at the prompts. Raises ArgumentError."""
    try:
        return AutoTokenizer.from_pretrained(name), configured_context(AutoConfig.from_pretrained(name))
    except Exception as error:  # hubs, files and formats fail in as many ways as there are
        raise ArgumentError(f"--model {name} cannot be loaded: {error}") from error


def load_sampler(arguments: argparse.Namespace, ranks: Ranks | None = None, tokenizer=None) -> PowerSampler:
    """The model of `generate.add_model_arguments`, and its tokenizer unless it is there. Raises ArgumentError."""
    if tokenizer is None:
        tokenizer, _ = load_tokenizer(arguments.model)
    model = _load(arguments, _device(arguments.device, ranks or Ranks()))
    try:
        return PowerSampler(model, tokenizer)
    except UnsupportedModelError as error:
        raise ArgumentError(f"--model {arguments.model}: {error}") from error


def _model(name: str, dtype: str, device: str):
    if _is_quantised(name):  # whose loader packs the weights where they are to stay; `.to` is refused afterwards
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map={"": device})
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)


def _is_quantised(name: str) -> bool:
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):  # a directory of an adapter, or nothing at all: the model's loader will tell
        return False
    parts = config, config.get_text_config()
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
