"""Power sampling on vLLM, from the caller's own process (`ServedEngine`).

    PowerSampler(VllmEngine("Qwen/Qwen3-0.6B"), tokenizer)

The draws are made in vLLM's workers (`sampler_v2.py`), whose parameters travel in `extra_args` and whose results come
back in the place of log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike

import numpy as np
import torch

from power_kernels.api.driver.engine import EngineBusyError
from power_kernels.api.engines.serving.engine import Progress, Reply, ServedEngine
from power_kernels.api.engines.serving.proposal import COLUMNS, Proposal
from power_kernels.api.engines.serving.versions import VLLM
from power_kernels.errors import ArgumentError, ArgumentTypeError


class VllmEngine(ServedEngine):
    """A model that vLLM runs (`RequestEngine`).

    model: a name or a folder, given to `vllm.LLM` with engine_args; or a `vllm.LLM`, or its `LLMEngine`, that is there,
    with no other requests running. An engine in processes of its own needs this package installed where they run.
    engine_args: vLLM's. skip_tokenizer_init is True unless given: prompts arrive as tokens.

    Raises UntestedVersionError for a vLLM that this package was not tested with, ArgumentError for a configuration
    under which draws could not be exact, RuntimeError where vLLM's workers do not have our sampler.
    """

    def __init__(self, model, **engine_args):
        VLLM.check()
        self._llm = _engine_of(model, engine_args)
        config = self._llm.vllm_config
        _check_config(config)
        self.vocab_size: int = config.model_config.get_vocab_size()
        self.max_context: int = config.model_config.max_model_len
        self.dtype: torch.dtype = config.model_config.dtype
        self.eos_token_ids: tuple[int, ...] = _eos_of(config.model_config)
        self.most_requests: int = config.scheduler_config.max_num_seqs
        self._name_of: dict[str, str] = {}  # vLLM's own for a request, by ours, which its output bears
        self._self_test(
            "vLLM's workers do not draw with power_kernels' sampler: the package must be installed where they run "
            "(its entry point is of the group vllm.general_plugins), VLLM_PLUGINS must name power_kernels where it is "
            "set at all, and on a GPU the V2 model runner must be used."
        )

    def _check_idle(self) -> None:
        if self._llm.has_unfinished_requests():
            raise EngineBusyError("vLLM has other requests that have not finished; their answers would be lost")

    def _ask(self, name: str, prompt: list[int], proposal: Proposal, *, ends: Sequence[int], pieces: bool) -> None:
        from power_kernels.api.engines.vllm.parameters import proposal_params

        params = proposal_params(proposal, ends=ends, pieces=pieces, entropy=self._entropy)
        self._name_of[name] = self._llm.add_request(name, {"prompt_token_ids": prompt}, params)

    def _abort(self, names: list[str]) -> None:
        # One that vLLM has ended bears no name any more: where a run fails, the driver may not have heard of it.
        known = [self._name_of.pop(name) for name in names if name in self._name_of]
        self._llm.abort_request(known, internal=True)

    def _replies(self) -> Iterable[tuple[str, Reply]]:
        outputs = self._llm.step()
        return [(name, self._reply(output)) for output in outputs if (name := output.request_id) in self._name_of]

    def _reply(self, output) -> Reply:
        completion = output.outputs[0]
        if output.finished:
            del self._name_of[output.request_id]
            if completion.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended a request by itself: {completion.finish_reason}")
        if completion.token_ids:
            values = np.array(completion.logprobs.logprobs, np.float32).reshape(-1, COLUMNS)
            flags = np.array(completion.logprobs.ranks[::COLUMNS])
        else:
            values, flags = np.empty((0, COLUMNS), np.float32), np.empty(0, np.int64)
        return Reply(
            token=completion.token_ids, values=values, flags=flags, prompt=len(output.prompt_token_ids),
            cached=output.num_cached_tokens or 0, finished=output.finished,
        )  # fmt: skip

    def _progress(self, name: str) -> Progress | None:
        state = self._llm.output_processor.request_states.get(self._name_of.get(name))
        if state is None or state.is_prefilling:
            return None
        return Progress(state.prompt_len, state.num_cached_tokens, state.detokenizer.num_output_tokens())


def _engine_of(model, engine_args: dict):
    """vLLM's `LLMEngine` of what `VllmEngine` was given."""
    from vllm import LLM
    from vllm.v1.engine.llm_engine import LLMEngine

    from power_kernels.api.engines.vllm import plugin

    if isinstance(model, (str, PathLike)):
        plugin.register()  # for an engine in this process, also where this package is on the path and not installed
        return LLM(model=str(model), **({"skip_tokenizer_init": True} | engine_args)).llm_engine
    engine = model.llm_engine if isinstance(model, LLM) else model
    if not isinstance(engine, LLMEngine):
        raise ArgumentTypeError(
            f"model is a {type(model).__name__}; it must be a name or a folder, a vllm.LLM, or its LLMEngine"
        )
    if engine_args:
        raise ArgumentError(f"engine_args are {engine_args} with an engine that is there; allowed: none")
    return engine


def _check_config(config) -> None:
    """Refuse, by name, what draws could not be exact under, or what was not tested."""
    from power_kernels.api.engines.vllm.parameters import UNSUITABLE

    model = config.model_config
    for name, why in (UNSUITABLE | {"watermark_config": "a watermark changes what is drawn"}).items():
        # Each is of one of the three; older versions lack some.
        value = next((getattr(of, name) for of in (config, model, config.parallel_config) if hasattr(of, name)), None)
        if value:
            raise ArgumentError(f"{name} is {value!r}; power sampling needs it off: {why}")
    if model.runner_type != "generate":
        raise ArgumentError(f"runner is {model.runner_type!r}; allowed: 'generate'")


def _eos_of(model_config) -> tuple[int, ...]:
    """The model's own end-of-sequence tokens, as its generation config has them, or else its configuration."""
    eos = model_config.try_get_generation_config().get("eos_token_id")
    if eos is None:
        eos = getattr(model_config.hf_text_config, "eos_token_id", None)
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)
