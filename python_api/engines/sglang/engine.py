"""Power sampling on SGLang, from the caller's own process (`ServedEngine`).

    PowerSampler(SglangEngine("Qwen/Qwen3-0.6B"), tokenizer)

The draws are made in SGLang's schedulers (`sampler.py`), whose parameters travel in `custom_params` and whose results
come back in `meta_info`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from os import PathLike

import numpy as np

from power_kernels.api.driver.engine import EngineBusyError
from power_kernels.api.engines.serving.engine import Reply, ServedEngine
from power_kernels.api.engines.serving.proposal import COLUMNS, Proposal
from power_kernels.api.engines.serving.versions import SGLANG
from power_kernels.errors import ArgumentError, ArgumentTypeError


class SglangEngine(ServedEngine):
    """A model that SGLang runs (`RequestEngine`).

    model: a name or a folder, given to `sglang.Engine` with engine_args; or a `sglang.Engine` that is there, with no
    other requests running. SGLang starts processes of its own, in which this package must be installed, and which run
    the caller's main module again: a script starts it under `if __name__ == "__main__":`.
    engine_args: SGLang's. skip_tokenizer_init is True unless given: prompts arrive as tokens.

    Not for use inside of an event loop that runs. SGLang's processes end with the program, or by `close()`: which ends,
    as SGLang does it, all child processes of the program, those of another engine included.

    Raises UntestedVersionError for a SGLang that this package was not tested with, ArgumentError for a configuration
    under which draws could not be exact, RuntimeError where SGLang's processes do not have our sampler.
    """

    _replies_to_aborted = True

    def __init__(self, model, **engine_args):
        SGLANG.check()
        self._engine = _engine_of(model, engine_args)
        try:
            self._set_up()
        except BaseException:
            if self._engine is not model:
                self._engine.shutdown()
            raise

    def _set_up(self) -> None:
        _check_arguments(self._engine.server_args)
        self._manager = self._engine.tokenizer_manager
        config = self._manager.model_config
        self.vocab_size = config.vocab_size
        self.max_context = self._manager.max_req_input_len
        self.dtype = config.dtype
        self.eos_token_ids = tuple(sorted(config.hf_eos_token_id or ()))
        state = self._engine.get_server_info()["internal_states"]
        self.most_requests = sum(one["effective_max_running_requests_per_dp"] for one in state)
        self._inbox: list[tuple[str, dict | Exception]] = []
        self._news = asyncio.Event()  # something is in the inbox
        self._listeners: dict[str, asyncio.Task] = {}  # by the request's name
        self._received: dict[str, int] = {}  # tokens, by the name of a request that its listener has begun with
        self._self_test(_NOT_OURS)

    def close(self) -> None:
        """End SGLang's processes, and all others that this program has started."""
        try:
            self.end()
        finally:
            self._engine.shutdown()

    def _check_idle(self) -> None:
        self._run(self._settled())
        if self._manager.rid_to_state:
            raise EngineBusyError("SGLang has other requests that have not finished")

    def _ask(self, name: str, prompt: list[int], proposal: Proposal, *, ends: Sequence[int], pieces: bool) -> None:
        from sglang.srt.managers.io_struct import GenerateReqInput

        from power_kernels.api.engines.sglang.parameters import proposal_params

        params = proposal_params(proposal, ends=ends, entropy=self._entropy)
        request = GenerateReqInput(input_ids=prompt, sampling_params=params, rid=name, stream=pieces)
        task = self._engine.loop.create_task(self._listen(name, request))
        task.add_done_callback(lambda _: self._listeners.pop(name))
        self._listeners[name] = task

    def _abort(self, names: list[str]) -> None:
        for name in names:
            state = self._manager.rid_to_state.get(name)
            if state is not None and state.dispatched:
                self._manager.abort_request(name)
            elif name in self._listeners and (state is not None or name not in self._received):
                self._listeners[name].cancel()  # SGLang has not been asked yet, and is not any more
            # else it has ended, and its last reply is on its way

    def _replies(self) -> Iterable[tuple[str, Reply]]:
        if not self._inbox:
            self._news.clear()
            self._run(self._news.wait())
        inbox, self._inbox = self._inbox, []
        return [(name, self._reply(name, out)) for name, out in inbox]

    def _reply(self, name: str, out: dict | Exception) -> Reply:
        from power_kernels.api.engines.sglang.parameters import DRAWS

        if isinstance(out, Exception):
            raise out
        told, known = out["meta_info"], self._received[name]
        token, draws = out.get("output_ids", []), told.get(DRAWS, [])
        if not self._manager.incremental_streaming_output:  # else a streamed request's are the new ones alone
            token, draws = token[known:], draws[known:]
        self._received[name] = known + len(token)
        finish = told["finish_reason"]
        if finish is not None:
            del self._received[name]
            if finish["type"] == "abort":
                if name in self._lane_of:
                    raise RuntimeError(f"SGLang ended a request by itself: {finish}")
                draws = np.zeros((len(token), COLUMNS + 1))  # not told where it was waiting
        if len(token) != len(draws):
            raise RuntimeError(f"{_NOT_OURS} {len(token)} tokens came with {len(draws)} draws")
        draws = np.array(draws, np.float64).reshape(-1, COLUMNS + 1)
        return Reply(
            token=token, values=draws[:, :COLUMNS].astype(np.float32), flags=draws[:, COLUMNS].astype(np.int64),
            prompt=told.get("prompt_tokens", 0), cached=told.get("cached_tokens", 0), finished=finish is not None,
        )  # fmt: skip

    # -- in SGLang's event loop

    def _run(self, waiting):
        return self._engine.loop.run_until_complete(waiting)

    async def _listen(self, name: str, request) -> None:
        """Send a request and put what comes of it into the inbox."""
        self._received[name] = 0
        try:
            async for out in self._manager.generate_request(request):
                self._inbox.append((name, out))
                self._news.set()
        except Exception as error:  # of whatever kind, it belongs to the caller
            self._inbox.append((name, error))
            self._news.set()

    async def _settled(self) -> None:
        """Until all that was aborted has ended."""
        await asyncio.gather(*self._listeners.values(), return_exceptions=True)
        self._inbox.clear()
        self._received.clear()


_NOT_OURS = (
    "SGLang's processes do not draw with power_kernels' sampler: the package must be installed where they run (its "
    "entry point is of the group sglang.srt.plugins), and SGLANG_PLUGINS, where it is set, must name power_kernels."
)


def _engine_of(model, engine_args: dict):
    """The `sglang.Engine` of what `SglangEngine` was given."""
    from sglang.srt.entrypoints.engine import Engine

    if isinstance(model, (str, PathLike)):
        return Engine(model_path=str(model), **({"skip_tokenizer_init": True} | engine_args))
    if not isinstance(model, Engine):
        raise ArgumentTypeError(f"model is a {type(model).__name__}; it must be a name or a folder, or a sglang.Engine")
    if engine_args:
        raise ArgumentError(f"engine_args are {engine_args} with an engine that is there; allowed: none")
    return model


def _check_arguments(arguments) -> None:
    """Refuse, by name, what draws could not be exact under, or what was not tested. arguments: `ServerArgs`."""
    from power_kernels.api.engines.sglang.parameters import UNSUITABLE

    for name, why in UNSUITABLE.items():
        value = getattr(arguments, name)
        if value:
            raise ArgumentError(f"{name} is {value!r}; power sampling needs it off: {why}")
    if arguments.disaggregation_mode != "null":
        raise ArgumentError(f"disaggregation_mode is {arguments.disaggregation_mode!r}; allowed: 'null'")
    if arguments.pp_size != 1:
        raise ArgumentError(f"pp_size is {arguments.pp_size}; allowed: 1")
