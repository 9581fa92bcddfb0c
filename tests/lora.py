"""A PeftModel with LoRA on it, by hand: what the engine reads of PEFT's classes, and no more.

PEFT is no dependency. Where it is installed the tests take its own classes as well.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoModelForCausalLM


class LoraLinear(nn.Module):
    """W x + scaling * B A x of the active adapters."""

    def __init__(self, base: nn.Linear, names: tuple[str, ...]):
        super().__init__()
        self.base_layer, self.disable_adapters, self.merged_adapters = base, False, []
        self.active_adapters, self.scaling = list(names[:1]), dict.fromkeys(names, 2.0)
        self.lora_A = nn.ModuleDict({name: nn.Linear(base.in_features, 2, bias=False) for name in names})
        self.lora_B = nn.ModuleDict({name: nn.Linear(2, base.out_features, bias=False) for name in names})

    def forward(self, x):
        out = self.base_layer(x)
        for name in [] if self.disable_adapters else self.active_adapters:
            out = out + self.scaling[name] * self.lora_B[name](self.lora_A[name](x))
        return out


class HandMadePeftModel(nn.Module):
    def __init__(self, model, names=("first", "second"), **config):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        self.peft_config = {
            name: SimpleNamespace(**{"peft_type": "LORA", "is_prompt_learning": False, **config}) for name in names
        }
        self.layers = []
        for layer in model.model.layers:
            for name in ("q_proj", "v_proj"):
                self.layers.append(LoraLinear(getattr(layer.self_attn, name), names))
                setattr(layer.self_attn, name, self.layers[-1])

    @property
    def active_adapters(self):
        return self.layers[0].active_adapters

    def get_base_model(self):
        return self.base_model.model

    def set_adapter(self, name):
        for layer in self.layers:
            layer.active_adapters = [name]

    @contextmanager
    def disable_adapter(self):
        for layer in self.layers:
            layer.disable_adapters = True
        yield
        for layer in self.layers:
            layer.disable_adapters = False

    def forward(self, *args, **kwargs):
        return self.base_model.model(*args, **kwargs)


def hand_made(model):
    return _wide(HandMadePeftModel(model))


def save(wrapped: HandMadePeftModel, base: str, path: Path) -> str:
    """The first adapter in a folder of its own, as PEFT writes it: no model, and no tokenizer."""
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    torch.save({n: p for n, p in wrapped.named_parameters() if "lora_" in n}, path / "adapter_model.bin")
    return str(path)


def load(path: str, **options):
    """`from_pretrained` as PEFT helps it: of such a folder the base, with the adapter in its layers."""
    config = Path(path) / "adapter_config.json"
    if not config.exists():
        return AutoModelForCausalLM.from_pretrained(path, **options)
    base = json.loads(config.read_text())["base_model_name_or_path"]
    wrapped = HandMadePeftModel(AutoModelForCausalLM.from_pretrained(base, **options))
    wrapped.load_state_dict(torch.load(Path(path) / "adapter_model.bin"), strict=False)
    return wrapped.get_base_model().eval()


def of_peft(model):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config, adapter_name="first")
    wrapped.add_adapter("second", config)
    return _wide(wrapped)


def _wide(wrapped):
    """Adapters that change the logits by much, each in its own way."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.empty_like(parameter).normal_(0.0, 0.5, generator=generator))
    return wrapped.eval()
