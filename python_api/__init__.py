"""Power sampling of language models: `PowerSampler`, its engines and results. Installed as `power_kernels.api`."""

from power_kernels.api.config import PowerConfig
from power_kernels.api.custom_generate import power_sample
from power_kernels.api.distributed import RankLostError, generate_sharded
from power_kernels.api.engine import Engine, EngineBusyError, Sampled, UnsupportedModelError
from power_kernels.api.engines.huggingface import HuggingFaceEngine
from power_kernels.api.results import PowerResult, TokenAccount
from power_kernels.api.sampler import GenerationInterrupted, PowerSampler

__all__ = [
    "Engine",
    "EngineBusyError",
    "GenerationInterrupted",
    "HuggingFaceEngine",
    "PowerConfig",
    "PowerResult",
    "PowerSampler",
    "RankLostError",
    "Sampled",
    "TokenAccount",
    "UnsupportedModelError",
    "generate_sharded",
    "power_sample",
]
