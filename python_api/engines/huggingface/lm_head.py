"""The last layer of a causal LM, apart from its decoder: logits = cap(scale * (hidden W^T + b)).

cap(z) = softcap * tanh(z / softcap) (Gemma 2); scale: Granite divides by `logits_scaling`, Cohere multiplies by
`logit_scale`. Whether a model is like this is not believed but tried: see `LmHead.of`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

import power_kernels
from power_kernels.api import torch_private
from power_kernels.api.engines.huggingface.patches import Patches

# Rows up to which the fused operator beats the product and `sample_tokens` after it, fp32 on a CPU (bench/findings.md).
# On a CUDA device: not measured, so not used.
FUSED_ROWS = 4


@dataclass(frozen=True)
class LmHead:
    """module: W and b. softcap: 0 for none."""

    module: nn.Linear
    scale: float
    softcap: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> LmHead | None:
        """What the model's configuration says of its head, or None where it has no linear layer at its end."""
        module = model.get_output_embeddings()
        if type(module) is not nn.Linear:
            return None
        config = model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return cls(module, scale, float(getattr(config, "final_logit_softcapping", None) or 0.0))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, V] of hidden states [rows, D], in the model's dtype."""
        return self._finish(self.module(hidden))

    def is_faster_fused(self, hidden: torch.Tensor) -> bool:
        """Whether `sample_from_hidden` is the quicker way for these rows.

        Only in fp32, where both ways round alike: elsewhere the fused logits are the more precise ones, and the law
        must not depend on how many rows there are.
        """
        module, weight = self.module, self.module.weight
        hooked = "forward" in vars(module) or torch_private.hooks_of(module)
        return (
            hidden.shape[0] <= FUSED_ROWS
            and not hooked  # somebody else's forward, which the product below would pass by
            and weight.dtype == torch.float32
            and weight.stride(1) == 1
            and power_kernels.backend_for(hidden.device) == "cpp"
        )

    def sample(self, hidden: torch.Tensor, *draw: torch.Tensor, return_entropy: bool) -> power_kernels.SampleOutput:
        """`sample_from_hidden` with this head. draw: alpha, beta, seed, counter, exclude."""
        weight, bias = self.module.weight.detach(), self.module.bias
        bias = None if bias is None else bias.detach()
        return power_kernels.sample_from_hidden(
            hidden, weight, *draw, bias=bias, softcap=self.softcap, scale=self.scale, return_entropy=return_entropy
        )

    def _finish(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def explains(self, run, decode) -> bool:
        """Whether the model is its decoder followed by this head and nothing else.

        run: calls the model on one token and gives its logits; decode: the decoder, and gives its last hidden state.
        The head is replaced meanwhile by a ramp of logits wide enough for every cap to show.
        """
        seen = []
        weight = self.module.weight
        ramp = torch.linspace(-100.0, 100.0, weight.shape[0], dtype=weight.dtype, device=weight.device)

        def ramped(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden)
            return ramp.expand(*hidden.shape[:-1], -1).clone()  # a model may change its logits in place

        patches = Patches()
        patches.add(self.module, "forward", ramped)
        with patches:
            logits = run()
        if len(seen) != 1 or seen[0].shape[-1] != weight.shape[1]:
            return False
        hidden = decode()
        if hidden is None or seen[0].shape != hidden.shape or logits.shape[-1] != weight.shape[0]:
            return False
        tolerance = {"rtol": 0.02, "atol": 0.02} if weight.dtype.itemsize < 4 else {"rtol": 1e-4, "atol": 1e-5}
        same = [(logits.reshape(-1), self._finish(ramp)), (seen[0], hidden)]
        return all(torch.allclose(got.float(), want.float(), **tolerance) for got, want in same)
