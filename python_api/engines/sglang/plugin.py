"""Puts our sampler before SGLang's, in every process that SGLang starts (entry point `sglang.srt.plugins`).

Five hooks of SGLang's own registry, in the order in which a request meets them:

    GenerateReqInput.normalize_batch_and_arguments, and
    SamplingParams.verify                  refuse what could not be exact, where requests are taken in
    SamplingBatchInfo.from_schedule_batch  tells our table which slot a request has got (`PowerWorker.admit`)
    create_sampler                         puts `PowerSampler` before the sampler that SGLang has chosen
    ModelRunner.sample                     shows it the batch, and sends its results along with the tokens

A batch without a power-sampling row goes to SGLang's sampler as it came.
"""

from __future__ import annotations

import logging

from power_kernels.api.engines.serving.versions import SGLANG

log = logging.getLogger(__name__)


def register() -> None:
    """Never raises for a version that was not tested: SGLang must go on for those who do not use us."""
    reason = SGLANG.refusal()
    if reason is not None:
        log.info("power_kernels draws nothing here: %s", reason)
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    sampling = "sglang.srt.sampling"
    HookRegistry.register(
        "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments", _asked, HookType.AFTER
    )
    HookRegistry.register(f"{sampling}.sampling_params.SamplingParams.verify", _verified, HookType.AFTER)
    HookRegistry.register(
        f"{sampling}.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", _scheduled, HookType.AFTER
    )
    HookRegistry.register("sglang.srt.layers.sampler.create_sampler", _created, HookType.AFTER)
    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.sample", _sample, HookType.AROUND)


def _asked(_, request) -> None:
    from power_kernels.api.engines.sglang.parameters import check_asked

    check_asked(request)


def _verified(_, params, vocab_size) -> None:
    from power_kernels.api.engines.sglang.parameters import check_params

    check_params(params)


def _scheduled(info, cls, batch, vocab_size) -> None:
    from power_kernels.api.engines.sglang.sampler import WORKER

    WORKER.admit(batch, vocab_size)


def _created(sampler, backend=None):
    from power_kernels.api.engines.sglang.sampler import PowerSampler

    return PowerSampler(sampler)


def _sample(sample, runner, logits_output, forward_batch):
    with runner.sampler.drawing(forward_batch) as drawn:
        token = sample(runner, logits_output, forward_batch)
    drawn.send_with(logits_output)
    return token
