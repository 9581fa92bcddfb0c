"""SGLang: our sampler in its schedulers (`plugin.py`) and the driver over its requests (`SglangEngine`). See
docs/sglang.md."""

from typing import TYPE_CHECKING

from power_kernels.lazy import on_demand

if TYPE_CHECKING:
    from power_kernels.api.engines.serving.versions import UntestedVersionError
    from power_kernels.api.engines.sglang.engine import SglangEngine

__all__ = ["SglangEngine", "UntestedVersionError"]

_HOMES = {  # on demand: SGLang's processes import this package for its plugin
    "SglangEngine": "power_kernels.api.engines.sglang.engine",
    "UntestedVersionError": "power_kernels.api.engines.serving.versions",
}
__getattr__, __dir__ = on_demand(globals(), _HOMES)
