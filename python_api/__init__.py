"""Power sampling of language models: `PowerSampler`, its engines and results. Installed as `power_kernels.api`."""

from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.distributed import RankLostError, generate_sharded
from power_kernels.api.driver.engine import Engine, EngineBusyError, Sampled, UnsupportedModelError
from power_kernels.api.driver.results import PowerResult, TokenAccount
from power_kernels.api.driver.sampler import GenerationInterrupted, PowerSampler
from power_kernels.api.engines.huggingface import HuggingFaceEngine
from power_kernels.api.engines.huggingface.custom_generate import power_sample

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
