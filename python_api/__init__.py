"""Power sampling of language models: `PowerSampler`, its engines and results. Installed as `power_kernels.api`.

The names below are imported when they are first used.
"""

from typing import TYPE_CHECKING

from power_kernels.lazy import on_demand

if TYPE_CHECKING:  # what editors and type checkers read; the table below says the same to Python
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

_HOMES = {
    "PowerConfig": "power_kernels.api.driver.config",
    "RankLostError": "power_kernels.api.driver.distributed",
    "generate_sharded": "power_kernels.api.driver.distributed",
    "Engine": "power_kernels.api.driver.engine",
    "EngineBusyError": "power_kernels.api.driver.engine",
    "Sampled": "power_kernels.api.driver.engine",
    "UnsupportedModelError": "power_kernels.api.driver.engine",
    "PowerResult": "power_kernels.api.driver.results",
    "TokenAccount": "power_kernels.api.driver.results",
    "GenerationInterrupted": "power_kernels.api.driver.sampler",
    "PowerSampler": "power_kernels.api.driver.sampler",
    "HuggingFaceEngine": "power_kernels.api.engines.huggingface",
    "power_sample": "power_kernels.api.engines.huggingface.custom_generate",
}
__getattr__, __dir__ = on_demand(globals(), _HOMES)
