"""`POST /v1/power/completions`: answers with what their chains did, and what they do while they run.

A plugin of vLLM's server (entry point `vllm.endpoint_plugins`), which has it check itself before it is open, and has
admission know the defaults of its sampling parameters. The chains are in the engine core, as for every other route.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
import uuid
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from power_kernels.api.driver.text import conversation_tokens, text_tokens
from power_kernels.api.engines.serving.versions import VLLM
from power_kernels.api.engines.vllm.serve import admission, parameters, selftest
from power_kernels.api.engines.vllm.serve.parameters import PowerParameters
from power_kernels.errors import ArgumentError

log = logging.getLogger(__name__)

PATH = "/v1/power/completions"
MOST_CHOICES = 64


class Body(PowerParameters):
    """What may be posted. One of prompt and messages. temperature is that of the proposals."""

    model: str | None = None
    prompt: str | list[int] | None = None
    messages: list[dict] | None = None
    max_tokens: int | None = None
    n: int = 1
    seed: int | None = None
    stop: str | list[str] = ()
    stop_token_ids: list[int] = ()
    ignore_eos: bool = False
    stream: bool = False


class PowerEndpoint:
    name = "power_kernels"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.post(PATH)(power_completions)

    async def init_state(self, engine_client, state, args) -> None:
        defaults = engine_client.model_config.get_diff_sampling_param()
        admission.set_defaults(defaults)
        state.power_engine, state.power_names = engine_client, args.served_model_name or [args.model]
        if args.worker_extension_cls == selftest.WORKER:
            await selftest.check_workers(engine_client)
        await selftest.check_server(engine_client)
        print(f"power-kernels: the self-test on vLLM {VLLM.installed()} has passed", file=sys.stderr, flush=True)


async def power_completions(request: Request) -> Response:
    state = request.app.state
    engine = state.power_engine
    try:
        body = _read(await request.body())
        if body.model is not None and body.model not in state.power_names:
            raise ArgumentError(f"model is {body.model!r}; allowed: {', '.join(map(repr, state.power_names))}")
        prompt = _prompt(body, engine)
        chains = Chains(engine, prompt, body)
    except ArgumentError as error:
        return _refused(str(error))
    events = chains.events()
    try:
        first = await _unless_gone(request, anext(events))
        if body.stream:
            return StreamingResponse(_sent(chains, first, events), media_type="text/event-stream")
        await _unless_gone(request, _exhausted(events))
    except VLLMValidationError as error:
        return _refused(str(error))
    except ConnectionResetError:
        return Response(status_code=499)
    finally:
        if not body.stream:
            await events.aclose()
    return JSONResponse(chains.response())


class Chains:
    """The answers of one post: n requests to vLLM, of the seeds that follow each other."""

    def __init__(self, engine, prompt: list[int], body: Body):
        self._engine, self._prompt, self._body = engine, prompt, body
        self._head = {
            "id": f"power-{uuid.uuid4().hex}",
            "object": "power.completion",
            "created": int(time.time()),
            "model": body.model,
        }
        self._choices: dict[int, dict] = {}
        self._cached = 0
        self._params = [self._params_of(index) for index in range(body.n)]
        parameters.check(self._params[0], {})

    async def events(self) -> AsyncIterator[tuple[str, dict]]:
        """(event, data): "progress" of a chain, "completion" of one that is done. Cancelled, its requests are, too."""
        told: asyncio.Queue = asyncio.Queue()
        tasks = [asyncio.create_task(self._run(index, told)) for index in range(self._body.n)]
        try:
            while len(self._choices) < self._body.n:
                event, data = await told.get()
                if event == "error":
                    raise data
                yield event, data
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def response(self) -> dict:
        choices = [self._choices[index] for index in sorted(self._choices)]
        completion, forwarded = (
            sum(len(choice["token_ids"]) for choice in choices),
            sum(_forwarded(choice["power"]["tokens"]) for choice in choices),
        )
        usage = {
            "prompt_tokens": len(self._prompt),
            "completion_tokens": completion,
            "total_tokens": len(self._prompt) + completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
            "completion_tokens_details": {"forwarded_tokens": forwarded},
        }
        return self._head | {"choices": choices, "usage": usage}

    def _params_of(self, index: int) -> SamplingParams:
        body = self._body
        keys = parameters.KEYS
        asked = {key: getattr(body, key) for key in keys if key in body.model_fields_set or key == "alpha"}
        try:
            return SamplingParams(
                max_tokens=body.max_tokens,
                seed=None if body.seed is None else body.seed + index,
                stop=body.stop if isinstance(body.stop, str) else list(body.stop),
                stop_token_ids=list(body.stop_token_ids),
                ignore_eos=body.ignore_eos,
                output_kind=RequestOutputKind.CUMULATIVE if body.stream else RequestOutputKind.FINAL_ONLY,
                extra_args=asked | {"progress": body.stream},
            )
        except ValueError as error:
            raise ArgumentError(str(error)) from error

    async def _run(self, index: int, told: asyncio.Queue) -> None:
        name = f"{self._head['id']}-{index}"
        try:
            output = None
            async for output in self._engine.generate({"prompt_token_ids": self._prompt}, self._params[index], name):
                news = (output.kv_transfer_params or {}).get("power", {})
                if "progress" in news and not output.finished:
                    await told.put(("progress", {"index": index, **news["progress"]}))
            answer = output.outputs[0]
            if answer.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"the request finished with {answer.finish_reason!r}; the server's log says why")
            self._cached += output.num_cached_tokens or 0
            self._choices[index] = {
                "index": index,
                "text": answer.text,
                "token_ids": list(answer.token_ids),
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
                "power": output.kv_transfer_params["power"],
            }
            await told.put(("completion", self._choices[index]))
        except Exception as error:
            await told.put(("error", error))


async def _sent(chains: Chains, first: tuple[str, dict], events: AsyncIterator) -> AsyncIterator[str]:
    """Server-sent events. An error in the middle is one, too."""
    try:
        yield _event(*first)
        async for event, data in events:
            yield _event(event, data)
        yield _event("usage", {"usage": chains.response()["usage"]})
    except Exception as error:
        log.exception("a stream of chains has failed")
        yield _event("error", {"error": {"message": str(error)}})
    finally:
        await events.aclose()
    yield "data: [DONE]\n\n"


def _event(name: str, data: dict) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _forwarded(tokens: dict[str, int]) -> int:
    return sum(tokens[cause] for cause in ("prefill", "recomputed", "extension", "accepted", "rejected", "voided"))


def _read(raw: bytes) -> Body:
    try:
        body = Body.model_validate_json(raw or b"{}")
    except ValidationError as error:
        raise ArgumentError("; ".join(map(parameters.said, error.errors()))) from None
    if (body.prompt is None) == (body.messages is None):
        raise ArgumentError("one of prompt and messages must be given")
    if not 1 <= body.n <= MOST_CHOICES:
        raise ArgumentError(f"n is {body.n}; it must lie in [1, {MOST_CHOICES}]")
    return body


def _prompt(body: Body, engine) -> list[int]:
    if isinstance(body.prompt, list):
        return body.prompt
    tokenizer = engine.renderer.get_tokenizer()
    if body.messages is None:
        return text_tokens(tokenizer, body.prompt)[0]
    try:
        return conversation_tokens(tokenizer, body.messages)
    except Exception as error:  # templates are programs that come with a model
        raise ArgumentError(f"messages do not fit the chat template of the model: {error}") from error


def _refused(message: str) -> JSONResponse:
    """As vLLM's own routes say it."""
    error = {"message": message, "type": "BadRequestError", "param": message.split(" ")[0], "code": 400}
    return JSONResponse({"error": error}, status_code=400)


async def _exhausted(events: AsyncIterator) -> None:
    async for _ in events:
        pass


async def _unless_gone(request: Request, work):
    """What `work` comes to. Raises ConnectionResetError, and cancels it, when the client has gone away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ConnectionResetError("the client has gone away")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
