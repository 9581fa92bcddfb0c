"""Puts our sampler beside vLLM's, in every process that vLLM starts (entry point `vllm.general_plugins`).

The V2 model runner asks its `ModelState` for a sampler by the documented hook `custom_sampler`, which is assigned here.
The V1 runner has no such hook: on a CPU, where V2 needs a compiler that is no package, its `sampler` is replaced when
the model has been loaded. A batch without a power-sampling row goes to vLLM's sampler as it came.
"""

from __future__ import annotations

import functools
import logging

from power_kernels.api.engines.serving.versions import VLLM

log = logging.getLogger(__name__)
_DONE = "_power_kernels"  # marks what was assigned: a process may load plugins twice


def register() -> None:
    """Never raises for a version that was not tested: vLLM must go on for those who do not use us."""
    reason = VLLM.refusal()
    if reason is not None:
        log.info("power_kernels draws nothing here: %s", reason)
        return
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    _assign(ModelState, "custom_sampler", _with_power_rows)
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        _assign(CPUModelRunner, "load_model", _replacing_sampler)


def _assign(owner: type, name: str, wrapper) -> None:
    before = getattr(owner, name)
    if getattr(before, _DONE, False):
        return
    after = functools.wraps(before)(wrapper(before))
    setattr(after, _DONE, True)
    setattr(owner, name, after)


def _with_power_rows(custom_sampler):
    def wrapped(self, sampler):
        custom = custom_sampler(self, sampler)
        if not is_supported(self.vllm_config):
            return custom
        from power_kernels.api.engines.vllm.sampler_v2 import PowerSamplerV2

        base, rejection_sampler = custom or (sampler, None)
        return PowerSamplerV2(base, self.device, self.max_num_reqs), rejection_sampler

    return wrapped


def _replacing_sampler(load_model):
    def wrapped(self, *args, **kwargs):
        loaded = load_model(self, *args, **kwargs)
        if is_supported(self.vllm_config):
            from power_kernels.api.engines.vllm.sampler_v1 import PowerSamplerV1

            self.sampler = PowerSamplerV1(self.sampler, self)
        return loaded

    return wrapped


def is_supported(vllm_config) -> bool:
    """Whether our sampler may stand before vLLM's. Drafts have a sampler of their own, and vLLM refuses to start where
    a custom sampler meets a watermark: with either, ordinary requests must be served as if we were not there."""
    return vllm_config.speculative_config is None and getattr(vllm_config, "watermark_config", None) is None
