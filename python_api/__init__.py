"""Power sampling of language models: `PowerSampler`, its engines and results. Installed as `power_kernels.api`.

The names below are imported when they are first used.
"""

from typing import TYPE_CHECKING

from power_kernels.lazy import on_demand

if TYPE_CHECKING:  # what editors and type checkers read; the table below says the same to Python
    from power_kernels.api.driver.config import PowerConfig
    from power_kernels.api.driver.distributed import RankLostError, generate_sharded
    from power_kernels.api.driver.engine import (
        CapturableEngine,
        Ended,
        Engine,
        EngineBusyError,
        Opened,
        ParticleEngine,
        QueueingEngine,
        ReportingEngine,
        RequestEngine,
        Sampled,
        SharedEngine,
        SizedEngine,
        StepReport,
        UnsupportedModelError,
        WideningEngine,
    )
    from power_kernels.api.driver.horizons import ContextWarning
    from power_kernels.api.driver.results import PowerResult, SweepResult, TokenAccount
    from power_kernels.api.driver.run import RunReport
    from power_kernels.api.driver.sampler import GenerationError, GenerationInterrupted, PowerSampler
    from power_kernels.api.engines.huggingface import HuggingFaceEngine
    from power_kernels.api.engines.huggingface.custom_generate import power_sample
    from power_kernels.api.engines.sglang import SglangEngine
    from power_kernels.api.engines.vllm import VllmEngine

__all__ = [
    "CapturableEngine",
    "ContextWarning",
    "Ended",
    "Engine",
    "EngineBusyError",
    "GenerationError",
    "GenerationInterrupted",
    "HuggingFaceEngine",
    "Opened",
    "ParticleEngine",
    "PowerConfig",
    "PowerResult",
    "PowerSampler",
    "QueueingEngine",
    "RankLostError",
    "ReportingEngine",
    "RequestEngine",
    "RunReport",
    "Sampled",
    "SglangEngine",
    "SharedEngine",
    "SizedEngine",
    "StepReport",
    "SweepResult",
    "TokenAccount",
    "UnsupportedModelError",
    "VllmEngine",
    "WideningEngine",
    "generate_sharded",
    "power_sample",
]

_HOMES = {
    "PowerConfig": "power_kernels.api.driver.config",
    "RankLostError": "power_kernels.api.driver.distributed",
    "generate_sharded": "power_kernels.api.driver.distributed",
    "CapturableEngine": "power_kernels.api.driver.engine",
    "Ended": "power_kernels.api.driver.engine",
    "Engine": "power_kernels.api.driver.engine",
    "EngineBusyError": "power_kernels.api.driver.engine",
    "Opened": "power_kernels.api.driver.engine",
    "ParticleEngine": "power_kernels.api.driver.engine",
    "QueueingEngine": "power_kernels.api.driver.engine",
    "ReportingEngine": "power_kernels.api.driver.engine",
    "RequestEngine": "power_kernels.api.driver.engine",
    "Sampled": "power_kernels.api.driver.engine",
    "SharedEngine": "power_kernels.api.driver.engine",
    "SizedEngine": "power_kernels.api.driver.engine",
    "StepReport": "power_kernels.api.driver.engine",
    "UnsupportedModelError": "power_kernels.api.driver.engine",
    "WideningEngine": "power_kernels.api.driver.engine",
    "ContextWarning": "power_kernels.api.driver.horizons",
    "PowerResult": "power_kernels.api.driver.results",
    "SweepResult": "power_kernels.api.driver.results",
    "TokenAccount": "power_kernels.api.driver.results",
    "RunReport": "power_kernels.api.driver.run",
    "GenerationError": "power_kernels.api.driver.sampler",
    "GenerationInterrupted": "power_kernels.api.driver.sampler",
    "PowerSampler": "power_kernels.api.driver.sampler",
    "HuggingFaceEngine": "power_kernels.api.engines.huggingface",
    "SglangEngine": "power_kernels.api.engines.sglang",
    "VllmEngine": "power_kernels.api.engines.vllm",
    "power_sample": "power_kernels.api.engines.huggingface.custom_generate",
}
__getattr__, __dir__ = on_demand(globals(), _HOMES)
