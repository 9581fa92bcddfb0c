"""The chains in vLLM's engine core: a scheduler that answers a client's power request with its final draw.

A power request never runs itself. Its chain asks for an extension or some proposals; each is a request of vLLM's own,
of the same client, priority, salt and adapter, which nobody outside sees and which is scheduled, preempted and cached
like any other: `schedule()` is vLLM's. What these requests draw is taken out of the step's outputs and handed to the
chain, which asks for the next ones; when it is done, the parent has one output with the whole answer.

vLLM does not promise this class to its users: `serving/versions.py` says which versions it was tested with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.request import Request, RequestStatus

from power_kernels.api.driver.results import PowerResult
from power_kernels.api.driver.stop import StopStrings
from power_kernels.api.engines.serving.proposal import proposal_of
from power_kernels.api.engines.vllm.parameters import proposal_params
from power_kernels.api.engines.vllm.serve import metrics, parameters
from power_kernels.api.engines.vllm.serve.chains import Ask, Chain
from power_kernels.api.engines.vllm.serve.stops import StopTables
from power_kernels.errors import ArgumentError

log = logging.getLogger(__name__)

STATISTICS = "power"  # the key of `kv_transfer_params` under which a client finds what its chain did


@dataclass
class _Live:
    """A power request that is on. chain: None while it waits for its stop strings. children: the numbers of the
    requests that run for it, by name. prefill, events: of its first request, as vLLM's front end wants them of any."""

    parent: Request
    wanted: parameters.PowerRequest
    stop: Future[StopStrings] | None
    chain: Chain | None = None
    children: dict[str, int] = field(default_factory=dict)
    prefill: PrefillStats | None = None
    events: list[EngineCoreEvent] = field(default_factory=list)
    told: bool = False  # the client has had an output, with prefill

    @property
    def name(self) -> str:
        return self.parent.request_id


class PowerChains:
    """Before `Scheduler` or one of its kind."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        model = self.vllm_config.model_config
        self._vocab_size: int = model.get_vocab_size()
        self._stops = StopTables(lambda: _tokenizer(model), self._vocab_size)
        self._lives: dict[str, _Live] = {}
        self._waiting: list[_Live] = []  # for stop strings
        self._owner: dict[str, _Live] = {}  # by a child's name
        self._outgoing: list[tuple[int, EngineCoreOutput]] = []  # for the clients, with the next step

    # -- what vLLM calls

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        if params is None or not parameters.is_power(params):
            super().add_request(request)
            return
        try:
            wanted = self._read(request)
            stop = self._stops.get(wanted.config.stop) if wanted.config.stop else None
        except Exception as error:
            self._refuse(request, error)
            return
        live = self._lives[request.request_id] = _Live(request, wanted, stop)
        if stop is None or stop.done():
            self._begin(live)
        else:
            self._waiting.append(live)

    def update_from_output(self, scheduler_output, model_runner_output) -> dict[int, EngineCoreOutputs]:
        result = super().update_from_output(scheduler_output, model_runner_output)
        if not self._lives and not self._outgoing:
            return result
        for live in self._heard(result):
            self._advance(live)
        ready = [live for live in self._waiting if live.stop.done()]
        for live in ready:
            self._waiting.remove(live)
            self._begin(live)
        self._send(result)
        return result

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """Of a power request its children are finished, and it is returned in their place."""
        names = (
            list(self._lives) if request_ids is None else [request_ids] if isinstance(request_ids, str) else request_ids
        )
        names = list(names)
        lives = [self._lives[name] for name in dict.fromkeys(names) if name in self._lives]
        children = {child for live in lives for child in live.children}
        for live in lives:
            metrics.CHAINS.labels("abort" if finished_status == RequestStatus.FINISHED_ABORTED else "error").inc()
            self._forget(live)
        others = None if request_ids is None else set(names) - {live.name for live in lives} | children
        finished = super().finish_requests(others, finished_status)
        for live in lives:
            live.parent.status = finished_status
            if self.finished_req_ids_dict is not None:
                self.finished_req_ids_dict[live.parent.client_index].add(live.name)
        return [request for request in finished if request.request_id not in children] + [live.parent for live in lives]

    def get_num_unfinished_requests(self) -> int:
        count = super().get_num_unfinished_requests()
        if self._pause_state == PauseState.PAUSED_ALL:
            return count
        return count + len(self._waiting) + len(self._outgoing)

    def shutdown(self) -> None:
        self._stops.close()
        super().shutdown()

    # -- a chain's way

    def _read(self, request: Request) -> parameters.PowerRequest:
        given = {
            "prompt_embeds": request.prompt_token_ids is None or request.prompt_embeds is not None,
            "multi-modal input": bool(request.mm_features),
            "streaming input": request.resumable,
            "a KV connector": self.connector is not None,
        }
        for what, there in given.items():
            if there:
                raise ArgumentError(f"a power request came with {what}, which was not tested; it must have none")
        return parameters.read(request.sampling_params, room=self.max_model_len - request.num_prompt_tokens)

    def _begin(self, live: _Live) -> None:
        wanted, parent = live.wanted, live.parent
        try:
            live.chain = Chain(
                parent.prompt_token_ids,
                wanted.config,
                seed=wanted.seed,
                eos=wanted.eos,
                stop=None if live.stop is None else live.stop.result(),
                vocab_size=self._vocab_size,
            )
            asked = live.chain.start()
        except Exception as error:
            self._fail(live, error)
            return
        for ask in asked:
            self._submit(live, ask)

    def _submit(self, live: _Live, ask: Ask) -> None:
        parent, chain, opened = live.parent, live.chain, ask.opened
        proposal = proposal_of(
            opened, parent.num_prompt_tokens, chain.alpha, chain.config.beta, chain.seed, stop_token=chain.ends[0]
        )
        params = proposal_params(proposal, ends=chain.ends, entropy=chain.law.needs_entropy)
        child = Request(
            f"{live.name}#{ask.number}",
            parent.prompt_token_ids + opened.tokens,
            params,
            None,
            client_index=parent.client_index,
            arrival_time=parent.arrival_time,
            lora_request=parent.lora_request,
            cache_salt=parent.cache_salt,
            priority=parent.priority,
            trace_headers=parent.trace_headers,
        )
        # The blocks of the prompt have been hashed with the parent.
        child._block_hasher = parent._block_hasher
        child.block_hashes = list(parent.block_hashes)
        child.update_block_hashes()
        live.children[child.request_id] = ask.number
        self._owner[child.request_id] = live
        metrics.REQUESTS.inc()
        super().add_request(child)

    def _heard(self, result: dict[int, EngineCoreOutputs]) -> list[_Live]:
        """Take the children's outputs out of a step's, and return whose requests are complete."""
        complete: dict[str, _Live] = {}
        for outputs in result.values():
            kept = []
            for output in outputs.outputs:
                live = self._owner.get(output.request_id)
                if live is None:
                    kept.append(output)
                elif live.name in self._lives and self._hear(live, output):
                    complete[live.name] = live
            outputs.outputs = kept
        return [live for live in complete.values() if live.name in self._lives]

    def _hear(self, live: _Live, output: EngineCoreOutput) -> bool:
        """Returns whether a child has all it was asked for."""
        name, reason = output.request_id, output.finish_reason
        self._note(live, output)
        if reason is not None and reason not in (FinishReason.STOP, FinishReason.LENGTH):
            del self._owner[name], live.children[name]
            self._fail(live, RuntimeError(f"vLLM ended {name} by itself: {reason}"))
            return False
        drawn, token = output.new_logprobs, output.new_token_ids
        values = np.empty((0, 3), np.float32) if drawn is None else drawn.logprobs[: len(token), :3]
        flags = np.empty(0, np.int64) if drawn is None else drawn.sampled_token_ranks[: len(token)]
        complete = live.chain.heard(live.children[name], token, values, flags, ended=reason is not None)
        if complete:
            del self._owner[name], live.children[name]
            if reason is None:  # a stop string, which vLLM does not know
                super().finish_requests(name, RequestStatus.FINISHED_ABORTED)
        return complete

    def _note(self, live: _Live, output: EngineCoreOutput) -> None:
        stats, counts = output.prefill_stats, live.chain.counts
        if stats is not None:
            # The last token of a prompt gives the first draw, and is counted with it.
            computed = max(stats.num_computed_tokens - 1, 0)
            if live.prefill is None:
                live.prefill = stats
                counts.prefill += computed
            else:
                counts.recomputed += computed
            counts.cached += stats.num_cached_tokens
        for event in output.events or ():
            if event.type == EngineCoreEventType.PREEMPTED or (not live.told and _is_new(event, live.events)):
                live.events.append(event)

    def _advance(self, live: _Live) -> None:
        chain = live.chain
        try:
            asked, dropped = chain.advance()
            done = chain.done
            result = chain.result() if done else None
        except Exception as error:
            self._fail(live, error)
            return
        names = {number: name for name, number in live.children.items()}
        for number in dropped:
            name = names[number]
            chain.counts.undelivered += 0 if (child := self.requests.get(name)) is None else child.num_output_tokens
            del self._owner[name], live.children[name]
            super().finish_requests(name, RequestStatus.FINISHED_ABORTED)
        for ask in asked:
            self._submit(live, ask)
        if done:
            self._finish(live, result)
        elif live.wanted.progress:
            self._output(live, [], None, statistics={"progress": chain.progress()._asdict()})

    def _finish(self, live: _Live, result: PowerResult) -> None:
        self._drop_children(live)
        self._forget(live)
        metrics.count(result)
        if result.finish == "fault":
            log.error("the logits of %s are bad: %s", live.name, result.status.name)
            self._output(live, [], FinishReason.ERROR)
            return
        tokens, statistics = result.tokens, statistics_of(live, result)
        if result.finish == "stop":
            # The front end looks for the string in the text, and cuts it there; it must have all tokens for that, and
            # ends the request itself. The second output ends it where the text does not show what the bytes did.
            self._output(live, tokens, None, statistics=statistics)
            self._output(live, [], FinishReason.STOP, statistics=statistics)
        elif result.finish == "eos":
            last = tokens[-1]
            reason = None if last == live.parent.sampling_params.eos_token_id else last
            self._output(live, tokens, FinishReason.STOP, stop_reason=reason, statistics=statistics)
        else:
            self._output(live, tokens, FinishReason.LENGTH, statistics=statistics)

    # -- a chain's end without an answer

    def _refuse(self, request: Request, error: Exception) -> None:
        """What admission lets through and no chain can be made of: the front end does not know all that we do."""
        log.error("power request %s is refused: %s", request.request_id, error)
        metrics.CHAINS.labels("error").inc()
        self._outgoing.append(
            (request.client_index, EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR))
        )

    def _fail(self, live: _Live, error: Exception) -> None:
        """One request's end is never the engine's."""
        log.error("power request %s has failed", live.name, exc_info=error)
        metrics.CHAINS.labels("error").inc()
        self._drop_children(live)
        self._forget(live)
        self._output(live, [], FinishReason.ERROR)

    def _drop_children(self, live: _Live) -> None:
        if live.children:
            super().finish_requests(list(live.children), RequestStatus.FINISHED_ABORTED)

    def _forget(self, live: _Live) -> None:
        for name in live.children:
            self._owner.pop(name, None)
        live.children.clear()
        self._lives.pop(live.name, None)
        if live in self._waiting:
            self._waiting.remove(live)

    # -- outputs

    def _output(
        self,
        live: _Live,
        tokens: list[int],
        reason: FinishReason | None,
        *,
        stop_reason: int | str | None = None,
        statistics: dict | None = None,
    ) -> None:
        output = EngineCoreOutput(
            live.name,
            tokens,
            finish_reason=reason,
            stop_reason=stop_reason,
            events=live.events or None,
            kv_transfer_params=None if statistics is None else {STATISTICS: statistics},
            trace_headers=live.parent.trace_headers,
            prefill_stats=None if live.told else live.prefill,
        )
        live.told, live.events = True, []
        self._outgoing.append((live.parent.client_index, output))

    def _send(self, result: dict[int, EngineCoreOutputs]) -> None:
        for client, output in self._outgoing:
            outputs = result.setdefault(client, EngineCoreOutputs())
            outputs.outputs.append(output)
            if output.finished and self.finished_req_ids_dict is not None:
                outputs.finished_requests = {*(outputs.finished_requests or ()), output.request_id}
        self._outgoing = []


class PowerScheduler(PowerChains, Scheduler):
    """What `--scheduler-cls` takes; with asynchronous scheduling, of its own kind."""

    def __new__(cls, vllm_config, *args, **kwargs):
        kind = AsyncPowerScheduler if vllm_config.scheduler_config.async_scheduling else PowerScheduler
        return object.__new__(kind)


class AsyncPowerScheduler(PowerScheduler, AsyncScheduler):
    pass


def statistics_of(live: _Live, result: PowerResult) -> dict:
    """What a client is told of its chain: plain values. log_weight: W, of p^alpha over the proposals' law; logp: of the
    answer under the model; both in nats."""
    return {
        "finish": result.finish,
        "seed": live.wanted.seed,
        "steps": result.steps,
        "accepted": result.accepted,
        "unchanged": result.unchanged,
        "logp": result.logp,
        "log_weight": float(np.sum(result.log_weights)),
        "tokens": metrics.causes(result),
    }


def _is_new(event: EngineCoreEvent, events: list[EngineCoreEvent]) -> bool:
    """The client's request is queued and scheduled once: when its first child is."""
    return all(event.type != other.type for other in events)


def _tokenizer(model_config):
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        raise ArgumentError("stop is given to a server that was started with skip_tokenizer_init; it must be empty")
    return tokenizer
