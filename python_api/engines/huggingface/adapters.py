"""Adapters of the PEFT library (LoRA and its kind) on a model: which of them work here, and which are active.

An adapter that changes what layers compute is part of the model. One that puts virtual tokens before the prompt is not:
they are added by `PeftModel.forward`, outside the model that decodes. PEFT is not imported; what its classes promise is
`get_base_model`, `peft_config`, `active_adapters`, and of each layer that it wrapped the attributes read below.
"""

from __future__ import annotations

from torch import nn

from power_kernels.api.driver.engine import UnsupportedModelError


def without_wrapper(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`, its adapters in place; any other model as it is.

    Raises UnsupportedModelError for adapters that live outside that model: prompt tuning, prefix tuning, p-tuning and
    others whose `is_prompt_learning` is true, and those that wait for an invocation in the prompt (aLoRA).
    """
    wrapper = _wrapper(model)
    if wrapper is None:
        return model
    for name in _names(wrapper.active_adapters):
        config = wrapper.peft_config[name]
        kind = getattr(config.peft_type, "value", config.peft_type)
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"adapter {name!r} is {kind}, which puts virtual tokens before each prompt; the engine decodes the "
                "model inside, which does not see them. Adapters inside the layers, as LoRA, work"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                f"adapter {name!r} is {kind} with alora_invocation_tokens: from which token on it counts depends on "
                "the prompt, which layers are not told here"
            )
    return model if wrapper is not model else model.get_base_model()


def _wrapper(model: nn.Module) -> nn.Module | None:
    """The PeftModel around a model: itself, or whose `generate` is calling it; or None."""
    # While PeftModel.generate runs with virtual tokens, its own method stands on the model that it calls.
    method = vars(model).get("prepare_inputs_for_generation")
    for candidate in (model, getattr(method, "__self__", None)):
        if callable(getattr(candidate, "get_base_model", None)) and hasattr(candidate, "peft_config"):
            return candidate
    return None


def _names(active) -> tuple[str, ...]:
    return (active,) if isinstance(active, str) else tuple(active)


class Adapters:
    """What adapters do to a model's layers, to be compared with what they did before. Cheap where there are none."""

    def __init__(self, model: nn.Module):
        self._layers = [
            module
            for module in model.modules()
            if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters")
        ]

    def active(self) -> tuple:
        """One entry a wrapped layer: its active adapters, whether they are off, which are merged, their scales."""
        return tuple(
            (
                _names(layer.active_adapters),
                bool(layer.disable_adapters),
                tuple(layer.merged_adapters),
                tuple(getattr(layer, "scaling", {}).items()),
            )
            for layer in self._layers
        )
