"""What a power-sampling step costs vLLM beside its own, on a CPU: python bench/vllm_step.py, where vLLM is installed.

A model of 2 layers and 151,936 words decodes 16 requests of one kind at a time; kinds take turns, so that a machine
that is busy otherwise is so for all. Of each: the median step, and the median time in the sampler. Then the host's work
for a proposal, without vLLM's `add_request` and `step`, in whole chains. All of it is processor time of the one thread
that does it. Ratios hold within one run only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_PLUGINS="power_kernels", VLLM_LOGGING_LEVEL="CRITICAL", TORCHDYNAMO_DISABLE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
)  # fmt: skip
sys.path.insert(0, str(Path(__file__).parent.parent))

VOCAB, ROWS, PROMPT = 151_936, 16, 32
ROUNDS, STEPS = 5, 30


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="a file for the figures")
    arguments = parser.parse_args(argv)
    from tests.stacks import tiny
    from tests.vllm import engines

    with tempfile.TemporaryDirectory() as folder:
        tiny.save(Path(folder), vocab=VOCAB)
        engine = engines.engine(folder, max_num_seqs=ROWS)
        figures = {"steps_ms": steps(engine), "proposal_ms": proposals(engine)}
        engines.shut_down(engine)
    power = figures["steps_ms"]["power"]
    for kind, of in figures["steps_ms"].items():
        print(
            f"{kind:<24} {of['step']:7.2f} ms a step, {of['sampler']:6.2f} in the sampler; power is "
            f"{power['step'] / of['step']:.2f} and {power['sampler'] / of['sampler']:.2f} of it"
        )
    of = figures["proposal_ms"]
    print(f"host, a request of {of['requests']}: {of['host']:.3f} ms, and {of['add_request']:.3f} in add_request")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def steps(engine) -> dict[str, dict[str, float]]:
    """Median ms of a step in which all rows decode, and in the sampler, by kind of request."""
    from tests.vllm import engines, mixed

    kinds = {
        "plain": lambda k: mixed.plain(None, temperature=1.0, seed=None, max_tokens=STEPS),
        "plain, two logprobs": lambda k: mixed.plain(
            2, temperature=1.0, seed=None, max_tokens=STEPS, flat_logprobs=True
        ),
        "power": lambda k: mixed.power_params([0] * PROMPT, k % 8, tokens=STEPS),
    }
    llm, sampler = engine._llm, Timed(engines.runner(engine).sampler)
    engines.runner(engine).sampler = sampler
    found = {kind: ([], []) for kind in kinds}
    for _ in range(ROUNDS):
        for kind, params in kinds.items():
            for k in range(ROWS):
                prompt = [1000 * k + i for i in range(PROMPT)]
                llm.add_request(f"{kind} {k}", {"prompt_token_ids": prompt}, params(k))
            while llm.has_unfinished_requests():
                start = time.thread_time()
                llm.step()
                taken = time.thread_time() - start
                if sampler.rows == ROWS:
                    found[kind][0].append(taken)
                    found[kind][1].append(sampler.seconds)
                sampler.rows = 0
    engines.runner(engine).sampler = sampler.of
    return {
        kind: {"step": 1e3 * statistics.median(of_step), "sampler": 1e3 * statistics.median(of_sampler)}
        for kind, (of_step, of_sampler) in found.items()
    }


class Timed:
    """A sampler. rows, seconds: of its last call."""

    def __init__(self, of):
        self.of, self.rows, self.seconds = of, 0, 0.0

    def __getattr__(self, name: str):
        return getattr(self.of, name)

    def __call__(self, logits, *rest, **options):
        start = time.thread_time()
        output = self.of(logits, *rest, **options)
        self.rows, self.seconds = len(logits), time.thread_time() - start
        return output


def proposals(engine) -> dict[str, float]:
    """ms a request in whole chains: of the driver and the engine's host side, and in vLLM's `add_request`."""
    from power_kernels.api import PowerConfig, PowerSampler

    llm, seconds, calls = engine._llm, defaultdict(float), defaultdict(int)
    for name in ("add_request", "step", "abort_request"):
        setattr(llm, name, timed(getattr(llm, name), name, seconds, calls))
    prompts = [[1000 * k + i for i in range(PROMPT)] for k in range(ROWS)]
    config = PowerConfig(alpha=2.0, max_new_tokens=48, block_size=16, mcmc_steps=8, lanes=1)
    PowerSampler(engine).generate(prompts, config, seed=0)
    seconds.clear()
    calls.clear()
    start = time.thread_time()
    PowerSampler(engine).generate(prompts, config, seed=1)
    host = time.thread_time() - start - sum(seconds.values())
    for name in ("add_request", "step", "abort_request"):
        delattr(llm, name)
    count = calls["add_request"]
    return {"requests": count, "host": 1e3 * host / count, "add_request": 1e3 * seconds["add_request"] / count}


def timed(function, name: str, seconds: dict, calls: dict):
    def call(*arguments, **options):
        start = time.thread_time()
        result = function(*arguments, **options)
        seconds[name] += time.thread_time() - start
        calls[name] += 1
        return result

    return call


if __name__ == "__main__":
    sys.exit(main())
