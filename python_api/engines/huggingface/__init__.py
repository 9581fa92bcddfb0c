"""A transformers causal LM as an engine of the driver."""

from power_kernels.api.engines.huggingface.engine import HuggingFaceEngine

__all__ = ["HuggingFaceEngine"]
