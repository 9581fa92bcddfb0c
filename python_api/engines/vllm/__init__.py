"""vLLM: our sampler in its workers (`plugin.py`) and the driver over its requests (`VllmEngine`). See docs/vllm.md."""

from typing import TYPE_CHECKING

from power_kernels.lazy import on_demand

if TYPE_CHECKING:
    from power_kernels.api.engines.serving.versions import UntestedVersionError
    from power_kernels.api.engines.vllm.engine import VllmEngine

__all__ = ["UntestedVersionError", "VllmEngine"]

_HOMES = {  # on demand: vLLM's processes import this package for its plugin
    "VllmEngine": "power_kernels.api.engines.vllm.engine",
    "UntestedVersionError": "power_kernels.api.engines.serving.versions",
}
__getattr__, __dir__ = on_demand(globals(), _HOMES)
