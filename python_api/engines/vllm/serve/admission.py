"""Bad power requests are refused in vLLM's front end, before they reach its engine: HTTP 400.

vLLM asks the classes of `--logits-processors` whether a request's parameters are right, in each process that takes
requests (`validate_params`). This one has nothing to do with logits: in the workers it takes on no request and leaves
every row as it is. It is of both interfaces, that of the V1 and that of the V2 model runner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from power_kernels.api.engines.vllm.serve import parameters

NAME = f"{__name__}:PowerAdmission"  # as `--logits-processors` takes it

# What this server puts where a client gives no sampling parameter; the endpoint plugin knows and says it.
_defaults: Mapping[str, Any] = {}


def set_defaults(defaults: Mapping[str, Any]) -> None:
    global _defaults
    _defaults = dict(defaults)


class PowerAdmission(V1LogitsProcessor, V2LogitsProcessor):
    @classmethod
    def validate_params(cls, sampling_params) -> None:
        parameters.check(sampling_params, _defaults)

    def __init__(self, *args):
        pass

    def add_request(self, req_idx: int, sampling_params) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits, *context):
        return logits
