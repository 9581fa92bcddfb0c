"""Power sampling on vLLM, from the caller's own process: every extension and every proposal is an ordinary request.

    PowerSampler(VllmEngine("Qwen/Qwen3-0.6B"), tokenizer)

A lane that starts is a request whose prompt is the chain's prompt and the answer so far; vLLM's prefix cache finds what
it has of them. The draws are made in vLLM's workers (`sampler_v2.py`), whose parameters travel in `extra_args` and
whose results come back in the place of log-probabilities. A request that its worker rejects early, or that meets EOS,
ends by itself; one that an acceptance made void is aborted. Which proposals are accepted is decided here, by the same
`mh_advance` as elsewhere, on the CPU: what a worker decides saves work and nothing else.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from os import PathLike

import numpy as np
import torch

from power_kernels.api.driver.engine import Ended, EngineBusyError, Opened, Sampled, StepReport
from power_kernels.api.engines.serving.draws import Draws, draws_of, rest_of, sampled
from power_kernels.api.engines.serving.proposal import proposal_of
from power_kernels.api.engines.vllm import versions
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.rng import as_int64
from power_kernels.state import ChainState, Status


@dataclass
class _Request:
    """What a lane has asked of vLLM.

    tokens: of the answer, those that were delivered included; cumw: the running sum of their weights. names: vLLM's own
    for the request, and ours, which its output bears. arrived: something of it has come. ended: vLLM has nothing more
    to say of it.
    """

    opened: Opened
    tokens: list[int]
    cumw: float
    names: tuple[str, str]
    arrived: bool = False
    ended: bool = False


@dataclass
class _Account:
    """Tokens by lane, of the last step."""

    prefilled: Counter = field(default_factory=Counter)
    recomputed: Counter = field(default_factory=Counter)
    cached: Counter = field(default_factory=Counter)
    undelivered: Counter = field(default_factory=Counter)
    drawn: int = 0
    forward_seconds: float = 0.0

    def move(self, source: int, target: int, lanes: int) -> None:
        """What was counted for a slot's lanes goes with its chain."""
        for counts in (self.prefilled, self.recomputed, self.cached, self.undelivered):
            for lane in range(lanes):
                counts[target * lanes + lane] = counts.pop(source * lanes + lane, 0)


class VllmEngine:
    """A model that vLLM runs (`RequestEngine`).

    model: a name or a folder, given to `vllm.LLM` with engine_args; or a `vllm.LLM`, or its `LLMEngine`, that is there,
    with no other requests running. An engine in processes of its own needs this package installed where they run.
    engine_args: vLLM's. skip_tokenizer_init is True unless given: prompts arrive as tokens.

    Raises UntestedVersionError for a vLLM that this package was not tested with, ArgumentError for a configuration
    under which draws could not be exact, RuntimeError where vLLM's workers do not have our sampler.
    """

    device = torch.device("cpu")  # of the chains: vLLM's processes have the model

    def __init__(self, model, **engine_args):
        versions.check()
        self._llm = _engine_of(model, engine_args)
        config = self._llm.vllm_config
        _check_config(config)
        self.vocab_size: int = config.model_config.get_vocab_size()
        self.max_context: int = config.model_config.max_model_len
        self.dtype: torch.dtype = config.model_config.dtype
        self.eos_token_ids: tuple[int, ...] = _eos_of(config.model_config)
        self.most_requests: int = config.scheduler_config.max_num_seqs
        self._running = False
        self._named = 0
        self._self_test()

    # -- the protocol

    def begin(
        self, *, chains: int, lanes: int, max_length: int, alpha: float, beta: float, seed: int, entropy: bool = False
    ) -> None:
        if self._running:
            raise EngineBusyError("a run of this engine is on; exhaust that stream or close() it first")
        if self._llm.has_unfinished_requests():
            raise EngineBusyError("vLLM has other requests that have not finished; their answers would be lost")
        self._running = True
        self._lanes, self._alpha, self._beta, self._entropy = lanes, alpha, beta, entropy
        self._seed = as_int64(seed)
        self._prompts: dict[int, list[int]] = {}
        self._live: dict[int, _Request] = {}  # by lane
        self._lane_of: dict[str, int] = {}  # by the name that outputs bear
        self._runs: dict[int, Draws] = {}  # what has arrived and was not delivered
        self._fresh: set[int] = set()  # slots of whose prompt nothing has gone through the model
        self._account = _Account()
        self._report: StepReport | None = None

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> list[int]:
        for slot, prompt in zip(slots, prompts, strict=True):
            self._prompts[slot] = list(prompt)
            self._fresh.add(slot)
        return [0] * len(slots)  # a request's reply tells what went through the model (`step_report`)

    def transfer(self, commit_range: torch.Tensor, open_range: torch.Tensor) -> None:
        pass

    def move(self, source: int, target: int) -> None:
        self._prompts[target] = self._prompts.pop(source)
        self._account.move(source, target, self._lanes)
        self._fresh.discard(target)
        if source in self._fresh:
            self._fresh.remove(source)
            self._fresh.add(target)

    def requests(self, opened: list[Opened], ended: list[Ended]) -> None:
        self._forget([lane for lane, _ in ended])
        for one in opened:
            self._submit(one.lane, one)

    def step(self, state: ChainState) -> Sampled:
        while self._live and not self._runs:
            for lane, request in list(self._live.items()):
                if request.ended:
                    self._go_on(lane, request)
            start = time.perf_counter()
            outputs = self._llm.step()
            self._account.forward_seconds += time.perf_counter() - start
            self._receive(outputs)
        runs, self._runs = self._runs, {}
        self._account.drawn += sum(len(run.token) for run in runs.values())
        self._report, self._account = self._reported(), _Account()
        return sampled(runs, state.chains * state.lanes, entropy=self._entropy)

    def step_report(self) -> StepReport:
        return self._report

    def end(self) -> None:
        if self._running:
            self._forget(list(self._live))
            self._running = False

    # -- requests

    def _submit(self, lane: int, opened: Opened) -> None:
        """Ask for the rest of a lane's answer."""
        from power_kernels.api.engines.vllm.parameters import proposal_params

        prompt = self._prompts[lane // self._lanes]
        ends = opened.eos or (self.vocab_size - 1,)  # a request needs a token that ends it
        proposal = proposal_of(opened, len(prompt), self._alpha, self._beta, self._seed, stop_token=ends[0])
        params = proposal_params(proposal, ends=ends, pieces=opened.stops, entropy=self._entropy)
        given = self._name()
        name = self._llm.add_request(given, {"prompt_token_ids": prompt + opened.tokens}, params)
        self._lane_of[given] = lane
        self._live[lane] = _Request(opened, opened.tokens, opened.cumw, (name, given))

    def _name(self) -> str:
        self._named += 1
        return f"power-{self._named}"

    def _go_on(self, lane: int, request: _Request) -> None:
        """A request has ended and its lane has not: it drew the token that ends requests, where nothing else does."""
        del self._live[lane]
        rest = rest_of(request.opened, request.tokens, request.cumw)
        self._submit(lane, rest._replace(theta=-math.inf))

    def _forget(self, lanes: list[int]) -> None:
        abort = []
        for lane in lanes:
            request = self._live.pop(lane)
            self._runs.pop(lane, None)
            if not request.ended:
                name, given = request.names
                del self._lane_of[given]
                self._note_undelivered(lane, request, name)
                abort.append(name)
        if abort:
            self._llm.abort_request(abort, internal=True)

    # -- replies

    def _receive(self, outputs) -> None:
        for output in outputs:
            lane = self._lane_of.get(output.request_id)
            if lane is None:
                continue  # it was aborted when this was on its way
            request, completion = self._live[lane], output.outputs[0]
            if not request.arrived:
                request.arrived = True
                self._note_prompt(lane, len(output.prompt_token_ids), output.num_cached_tokens or 0)
            if output.finished:
                request.ended = True
                del self._lane_of[output.request_id]
                if completion.finish_reason not in ("stop", "length"):
                    raise RuntimeError(f"vLLM ended a request by itself: {completion.finish_reason}")
            if completion.token_ids:
                self._take(lane, request, completion)

    def _take(self, lane: int, request: _Request, completion) -> None:
        """What a request has drawn since its last reply, for the lane."""
        from power_kernels.api.engines.vllm.parameters import COLUMNS

        values = np.array(completion.logprobs.logprobs, np.float32).reshape(-1, COLUMNS)
        flags = np.array(completion.logprobs.ranks[::COLUMNS])
        draws = draws_of(request.opened, len(request.tokens), request.cumw, completion.token_ids, values, flags)
        if draws.token:
            self._runs[lane] = draws
            request.tokens = request.tokens + draws.token
            request.cumw = draws.cumw

    # -- what it cost

    def _note_prompt(self, lane: int, prompt: int, cached: int) -> None:
        """Of a request's prompt, `cached` tokens were in the prefix cache; of the others the last one gave its first
        draw, and is counted with it."""
        slot = lane // self._lanes
        where = self._account.prefilled if slot in self._fresh else self._account.recomputed
        self._fresh.discard(slot)
        where[lane] += prompt - cached - 1
        self._account.cached[lane] += cached

    def _note_undelivered(self, lane: int, request: _Request, name: str) -> None:
        """What vLLM has said of a request that is about to be aborted: its tokens were drawn in vain."""
        state = self._llm.output_processor.request_states.get(name)
        if state is None or state.is_prefilling:
            return
        if not request.arrived:
            self._note_prompt(lane, state.prompt_len, state.num_cached_tokens)
        delivered = len(request.tokens) - len(request.opened.tokens)
        self._account.undelivered[lane] += max(0, state.detokenizer.num_output_tokens() - delivered)

    def _reported(self) -> StepReport:
        account = self._account
        return StepReport(
            fed=account.drawn,
            recalled=(),
            forward_seconds=account.forward_seconds,
            prefilled=account.prefilled,
            recomputed=account.recomputed,
            cached=account.cached,
            undelivered=account.undelivered,
        )

    # -- is it ours

    def _self_test(self) -> None:
        """One draw from p itself: its weight is 0, and its flags are 0, where vLLM's own reply has a rank."""
        self.begin(chains=1, lanes=1, max_length=2, alpha=1.0, beta=1.0, seed=0)
        try:
            self.prefill([0], [[0]])
            self.requests([_FIRST_DRAW], [])
            while not self._runs:
                self._receive(self._llm.step())
            run = self._runs[0]
        finally:
            self.end()
        if run.status[0] != Status.OK or not abs(run.values[0, 1]) < 1e-3:
            raise RuntimeError(
                "vLLM's workers do not draw with power_kernels' sampler: the package must be installed where they run "
                "(its entry point is of the group vllm.general_plugins), VLLM_PLUGINS must name power_kernels where it "
                f"is set at all, and on a GPU the V2 model runner must be used. One draw gave {run}"
            )


_FIRST_DRAW = Opened(
    lane=0, request=0, tokens=[], horizon=1, serial=0, chain_id=0, prompt_id=0, exclude=-1,
    cumw=0.0, theta=-math.inf, length_bonus=0.0, eos=(), stops=False,
)  # fmt: skip


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
