"""`power-kernels serve` over HTTP, with the `openai` package (`make test-vllm`)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from power_kernels.api.engines.vllm.serve import server
from power_kernels.errors import ArgumentError
from tests.stacks import tiny
from tests.vllm import serving

ASKED = serving.ASKED | dict(block_size=12, mcmc_steps=3)
TOKENS = 24
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class Server:
    def __init__(self, port: int):
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def completion(self, prompt, *, xargs=ASKED, timeout=600, **more):
        extra = {"vllm_xargs": xargs, "ignore_eos": True, "return_token_ids": True} | more.pop("extra_body", {})
        return self.client.completions.create(
            model="tiny", prompt=prompt, extra_body=extra, timeout=timeout, **(dict(max_tokens=TOKENS, seed=1) | more)
        )

    def ordinary(self, prompt, seed: int):
        return self.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=TOKENS, temperature=0.7, seed=seed,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip

    def power(self, **body):
        """(status, text) of POST /v1/power/completions."""
        request = urllib.request.Request(
            f"{self.url}/v1/power/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        """By name and labels; the engine's own labels are left out."""
        with urllib.request.urlopen(f"{self.url}/metrics") as reply:
            lines = reply.read().decode().splitlines()
        found = {}
        for line in lines:
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                found[name.replace('{engine="0",model_name="tiny"}', "")] = float(value)
        return found

    def idle(self) -> bool:
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        now = self.metrics()
        return not any(now[name] for name in names)

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 300
        while not self.idle():
            assert time.monotonic() < deadline, "requests or blocks are held"
            time.sleep(0.2)


def arguments(folder, port: int) -> list[str]:
    return [
        str(folder), "--port", str(port), "--host", "127.0.0.1", "--served-model-name", "tiny", "--dtype", "float32",
        "--enforce-eager", "--block-size", str(tiny.BLOCK), "--kv-cache-memory-bytes", str(64 << 20),
        "--max-model-len", "512", "--gpu-memory-utilization", "0.1", "--max-num-batched-tokens", "256",
        "--max-num-seqs", "32", "--chat-template", TEMPLATE, "--enable-prompt-tokens-details",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k not in ("VLLM_PLUGINS", "VLLM_ENABLE_V1_MULTIPROCESSING")}
    said = tmp_path_factory.mktemp("server") / "log"
    with open(said, "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "power_kernels.api.commands.cli", "serve", *arguments(folder, port)],
            stdout=log, stderr=subprocess.STDOUT, env=environment | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        )  # fmt: skip
    made = Server(port)
    try:
        deadline = time.monotonic() + 900
        while True:
            assert process.poll() is None, said.read_text()[-4000:]
            assert time.monotonic() < deadline, said.read_text()[-4000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{made.url}/health")
                break
            time.sleep(0.5)
        made.said = said
        yield made
        assert process.poll() is None, said.read_text()[-4000:]
    finally:
        process.terminate()
        process.wait(300)


@pytest.fixture(scope="module")
def here(huggingface):
    """What `PowerSampler` draws on the Hugging Face engine, once for each request."""
    known, lock = {}, threading.Lock()

    def drawn(prompt, seed, **asked):
        key = (tuple(prompt), seed, json.dumps(asked))
        with lock:
            if key not in known:
                given = ASKED | dict(max_tokens=TOKENS) | asked
                known[key] = serving.drawn_here(huggingface, list(prompt), seed=seed, **given)
            return known[key]

    return drawn


def test_the_commands_and_the_snippet_of_the_page_run(served):
    """With this server and its model in the place of the page's."""
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    page = page.replace("localhost:8000", f"127.0.0.1:{served.port}").replace("Qwen/Qwen3-0.6B", "tiny")
    start, curl = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    assert start.split()[:2] == ["power-kernels", "serve"]
    assert set(re.findall(r"--[a-z-]+", start)) <= set(arguments("", 0))
    done = subprocess.run(["bash", "-ec", curl], capture_output=True, text=True, timeout=600)
    assert json.loads(done.stdout)["kv_transfer_params"]["power"]["steps"] == 10
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=600)
    assert re.search(r"completion_tokens=\d+, prompt_tokens=\d+, .*'steps': \d+", done.stdout), done.stderr


def test_it_says_which_vllm_it_is_and_which_were_tested(served):
    said = served.said.read_text()
    assert "power-kernels: the self-test on vLLM" in said
    assert re.search(r"power-kernels: vLLM \d+\.\d+\.\S+; tested: \d+\.\d+, ", said), said[:400]


def test_answers_are_the_samplers_with_n_usage_and_seed(served, here):
    prompt = tiny.prompts(1)[0]
    reply = served.completion(prompt, n=2, seed=5)
    for index, choice in enumerate(reply.choices):  # vLLM gives each choice the next seed
        expected = here(prompt, 5 + index)
        assert choice.token_ids == expected.tokens
        assert choice.text == expected.text
        assert choice.finish_reason == "length"
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 2 * TOKENS)
    assert usage.prompt_tokens_details.cached_tokens <= len(prompt)


def test_a_stream_has_the_text_when_it_is_final(served, here):
    prompt = tiny.prompts(2)[1]
    events = list(served.completion(prompt, seed=6, stream=True, stream_options={"include_usage": True}))
    texts = [choice.text for event in events for choice in event.choices if choice.text]
    assert texts == [here(prompt, 6).text]
    assert events[-1].usage.completion_tokens == TOKENS


def test_stop_strings_and_stop_tokens_end_an_answer(served, here):
    prompts, reasons = tiny.prompts(8), Counter()
    for i, prompt in enumerate(prompts):
        choice = served.completion(
            prompt, seed=i, stop=["ab", "c1"], extra_body={"stop_token_ids": tiny.EOS[:4]}
        ).choices[0]
        expected = here(prompt, i, stop=("ab", "c1"), eos=tiny.EOS[:4])
        assert choice.token_ids == expected.tokens
        reasons[expected.finish] += 1
        if expected.finish == "stop":
            assert choice.text == expected.text
            assert choice.stop_reason in ("ab", "c1")
        if expected.finish == "eos":
            assert choice.stop_reason == expected.tokens[-1]
        assert choice.finish_reason == ("length" if expected.finish == "length" else "stop")
    assert reasons["stop"] >= 2, reasons


def test_a_conversation_is_answered(served, here):
    reply = served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a0a"}], max_tokens=TOKENS, seed=3,
        extra_body={"vllm_xargs": ASKED, "ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    assert reply.choices[0].token_ids == here(reply.prompt_token_ids, 3).tokens
    assert reply.choices[0].message.content == here(reply.prompt_token_ids, 3).text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(xargs=ASKED | {"alpha": 0.5}), "alpha is 0.5; it must lie in [1, 1e+37]"),
        (dict(xargs=ASKED | {"mcmc": 3}), "mcmc is 3 in a power request; allowed: alpha"),
        (dict(xargs={"mcmc_steps": 3}), "mcmc_steps is 3 without alpha"),
        (dict(temperature=0.5), "temperature is 0.5 in a power request; it must be 1.0"),
        (dict(extra_body={"top_k": 5}), "top_k is 5 in a power request; it must be 0"),
        (dict(presence_penalty=0.5), "presence_penalty is 0.5 in a power request"),
        (dict(logit_bias={"3": 1}), "logit_bias is {3: 1.0} in a power request"),
        (dict(logprobs=1), "logprobs is 1 in a power request"),
        (dict(extra_body={"structured_outputs": {"regex": "a"}}), "structured_outputs is"),
    ],
)
def test_bad_parameters_get_400_and_the_name_of_the_argument(served, wrong, message):
    with pytest.raises(openai.BadRequestError) as caught:
        served.completion([3, 4], **wrong)
    assert message in str(caught.value)
    with pytest.raises(openai.APIError) as caught:  # vLLM begins a stream before it looks, and ends it with the error
        list(served.completion([3, 4], stream=True, **wrong))
    assert message in str(caught.value)
    assert caught.value.body["code"] == 400


def test_the_endpoint_tells_what_the_chains_did(served, here):
    prompt = tiny.prompts(1)[0]
    body = dict(prompt=prompt, n=2, seed=5, max_tokens=TOKENS, ignore_eos=True, **ASKED)
    status, text = served.power(**body)
    reply = json.loads(text)
    assert status == 200
    for index, choice in enumerate(reply["choices"]):
        expected, told = here(prompt, 5 + index), choice["power"]
        assert choice["token_ids"] == expected.tokens
        assert (told["steps"], told["accepted"], told["unchanged"]) == (
            expected.steps, expected.accepted, expected.unchanged,
        )  # fmt: skip
        assert told["seed"] == 5 + index
        assert abs(told["logp"] - expected.logp) < 1e-3
    assert reply["usage"]["completion_tokens"] == 2 * TOKENS
    status, text = served.power(**body, stream=True)
    events = [part.split("\n") for part in text.strip().split("\n\n")]
    names = [lines[0].removeprefix("event: ") for lines in events[:-1]]
    assert events[-1] == ["data: [DONE]"]
    assert names[-1] == "usage"
    assert names.count("completion") == 2
    progress = [json.loads(lines[1].removeprefix("data: ")) for lines in events[:-1] if lines[0] == "event: progress"]
    of_one = [event for event in progress if event["index"] == 0]
    assert [e["steps"] for e in of_one] == sorted(e["steps"] for e in of_one)
    assert len(of_one) >= 4
    assert all(event.keys() == {"index", "stage", "steps", "tokens", "log_weight"} for event in of_one)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (dict(prompt=[3], alpha=0.5), "alpha is 0.5"),
        (dict(prompt=[3]), "alpha is not given; a power request must have it"),
        (dict(alpha=4), "one of prompt and messages must be given"),
        (dict(prompt=[3], alpha=4, colour="red"), "colour is 'red' in a power request"),
        (dict(prompt=[3], alpha=4, n=0), "n is 0; it must lie in [1, 64]"),
        (dict(prompt=[3], alpha=4, model="other"), "model is 'other'; allowed: 'tiny'"),
        (dict(prompt=[10**6], alpha=4), "1000000"),
        (dict(prompt=[3] * 600, alpha=4, stream=True), "512"),
    ],
)
def test_the_endpoint_refuses_bad_bodies(served, body, message):
    status, text = served.power(**body)
    assert status == 400
    assert message in json.loads(text)["error"]["message"]


def test_metrics_have_steps_by_outcome_and_tokens_by_cause_and_all_of_vllm_s(served):
    prompt = tiny.prompts(1)[0]
    before = served.metrics()
    told = served.completion(prompt, seed=77).kv_transfer_params["power"]
    after = served.metrics()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    steps = {name: more(f'power_kernels_steps_total{{outcome="{name}"}}') for name in ("accepted", "unchanged")}
    assert steps == {"accepted": told["accepted"], "unchanged": told["unchanged"]}
    assert more('power_kernels_steps_total{outcome="rejected"}') == told["steps"] - sum(steps.values())
    for cause, tokens in told["tokens"].items():
        assert more(f'power_kernels_tokens_total{{cause="{cause}"}}') == tokens
    assert more('power_kernels_chains_total{finish="length"}') == 1
    assert more("vllm:generation_tokens_total") == TOKENS
    assert more("vllm:prompt_tokens_total") == len(prompt)
    kinds = {name.split("{")[0] for name in after}
    assert {"vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:e2e_request_latency_seconds_count"} <= kinds
    sums = [name for name in after if name.startswith(("vllm:request_queue_time", "vllm:request_prefill_time"))]
    assert all(after[name] < 1e5 for name in sums if name.endswith("_sum"))  # of requests with no events: the epoch


def test_a_client_that_goes_away_ends_its_chains(served):
    prompt = tiny.prompts(1)[0]
    long = ASKED | dict(mcmc_steps=400, lanes=4)
    for stream in (False, True):
        with pytest.raises(openai.APITimeoutError):
            list(served.completion(prompt, xargs=long, max_tokens=200, n=2, stream=stream, timeout=1.0))
        served.wait_until_idle()
    body = dict(prompt=prompt, max_tokens=200, stream=False, **long)
    request = urllib.request.Request(
        f"{served.url}/v1/power/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(request, timeout=1.0)
    served.wait_until_idle()


def test_ordinary_answers_beside_32_chains_are_what_they_are_alone(served, here):
    prompts = tiny.prompts(8)
    alone = [served.ordinary(prompts[i % 8], i).choices[0].token_ids for i in range(16)]
    with ThreadPoolExecutor(48) as pool:
        power = [pool.submit(served.completion, prompts[i % 8], seed=i) for i in range(32)]
        ordinary = [pool.submit(served.ordinary, prompts[i % 8], i) for i in range(16)]
        assert [one.result().choices[0].token_ids for one in ordinary] == alone
        for i, one in enumerate(power):
            assert one.result().choices[0].token_ids == here(prompts[i % 8], i).tokens
    served.wait_until_idle()


def test_two_hundred_requests_cancels_and_bad_ones_leave_nothing(served, here):
    """16 at a time. At least 15 of each kind, and no answer is wrong."""
    prompts, done, lock = tiny.prompts(4), Counter(), threading.Lock()
    alone = {i: served.ordinary(prompts[i], i).choices[0].token_ids for i in range(4)}

    def one(number: int) -> None:
        chance = random.Random(number)
        i, kind = chance.randrange(4), chance.choice(["power", "power", "lanes", "stop", "ordinary", "cancel", "bad"])
        if kind == "ordinary":
            assert served.ordinary(prompts[i], i).choices[0].token_ids == alone[i]
        elif kind == "bad":
            with pytest.raises(openai.BadRequestError):
                served.completion(prompts[i], xargs=ASKED | {"block_size": 0})
        elif kind == "cancel":
            slow = ASKED | dict(mcmc_steps=300, lanes=chance.choice([1, 3]))
            with pytest.raises(openai.APITimeoutError):
                served.completion(prompts[i], xargs=slow, max_tokens=200, timeout=chance.uniform(0.05, 0.6))
        else:
            asked = {"lanes": 3} if kind == "lanes" else {}
            stop = ("ab", "c1") if kind == "stop" else ()
            got = served.completion(prompts[i], xargs=ASKED | asked, seed=i, stop=list(stop)).choices[0]
            assert got.token_ids == here(prompts[i], i, stop=stop).tokens
        with lock:
            done[kind] += 1

    with ThreadPoolExecutor(16) as pool:
        for result in [pool.submit(one, number) for number in range(200)]:
            result.result()
    assert sum(done.values()) == 200
    assert min(done.values()) >= 15, done
    served.wait_until_idle()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--scheduler-cls", "mine.Scheduler"], "--scheduler-cls is 'mine.Scheduler' in power-kernels serve"),
        (["--logits-processors", "mine:One"], "--logits-processors is ['mine:One'] in power-kernels serve"),
        (["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'], "--speculative-config is"),
    ],
)
def test_what_cannot_be_beside_the_chains_is_refused_at_the_start(folder, monkeypatch, given, message):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    with pytest.raises(ArgumentError) as caught:
        server.serve([str(folder), *given])
    assert message in str(caught.value)


def test_the_users_plugins_are_loaded_beside_ours(monkeypatch):
    assert server.plugins("a,b") == ["a", "b", "power_kernels"]
    assert server.plugins("power_kernels,a") == ["power_kernels", "a"]
    assert "power_kernels" in server.plugins(None)
