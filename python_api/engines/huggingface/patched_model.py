"""What is different on a model during a forward pass of the engine, and only then."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import PreTrainedModel

from power_kernels.api.engines.huggingface.cpu_linear import speed_up
from power_kernels.api.engines.huggingface.patches import Patches
from power_kernels.api.engines.huggingface.ragged_attention import NAME
from power_kernels.api.engines.huggingface.rope import pin_rope


def patched(model: PreTrainedModel, max_length: int, *, attention: bool = True) -> Patches:
    """No module in training, and rotary frequencies that fit positions below max_length whatever the batch; with
    `attention` also the registered attention function and the fast linear layers of a CPU."""
    patches = Patches()
    for module in model.modules():
        if module.training:
            patches.add(module, "training", False)
    pin_rope(model.get_decoder(), max_length, patches)  # what looks at pictures has rotary modules of its own
    if attention:
        speed_up(model, patches)
        for config in attention_configs(model):
            patches.add(config, "_attn_implementation_internal", NAME)
    return patches


def placed_on(device: torch.device) -> AbstractContextManager:
    """Tensors that a model makes without saying where lie on its own device, whatever default the caller has set."""
    default = torch.get_default_device()
    return nullcontext() if default.type in ("cpu", device.type) else torch.device(device)


def attention_configs(model: PreTrainedModel) -> list:
    """Every configuration object that a module of the model reads its attention implementation from."""
    configs = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    return list(configs.values())
