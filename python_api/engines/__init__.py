"""Engines: what runs the model for the driver. See `power_kernels.api.driver.engine` for the protocol."""

from __future__ import annotations


def engine_for(model):
    """The engine of a model that is none itself: of a torch module, which must be a transformers causal LM.

    None for anything else. Raises as `HuggingFaceEngine` does.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        return None
    from power_kernels.api.engines.huggingface import HuggingFaceEngine

    return HuggingFaceEngine(model)
