"""One of the processes of test_tensor_parallel.py: RANK=r WORLD_SIZE=n python -m tests.tensor_parallel_worker DIRECTORY

Writes what it saw to DIRECTORY/r.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from power_kernels import SampleOutput
from power_kernels.api import PowerConfig, PowerSampler
from power_kernels.api.driver import planning
from power_kernels.api.engines.huggingface import HuggingFaceEngine
from power_kernels.api.engines.huggingface.tensor_parallel import TensorParallelGroup
from tests import tiny_models

VOCAB = 96  # a multiple of the number of processes, as older releases of transformers ask for
SEED = 5
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [5, 6, 7]]
CONFIG = PowerConfig(alpha=3.0, max_new_tokens=12, block_size=4, mcmc_steps=4, lanes=2)
ENTROPY = dataclasses.replace(CONFIG, cut="divergence-entropy")


def build(family: str):
    return tiny_models.FAMILIES[family](vocab_size=VOCAB)


def answers(model, **changes) -> list:
    """What every process must agree on to the bit: tokens, weights, what became of every step, and what it cost."""
    call = {"prompts": PROMPTS, "config": CONFIG, "num_chains": 2, "seed": SEED, "max_chains": 4, **changes}
    found = PowerSampler(model).generate(**call)
    return [[r.tokens, r.log_weights, list(map(int, r.outcomes)), r.cost.forwarded, r.finish] for r in found]


def refusal(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main(directory: Path) -> dict:
    distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous",
        rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
    )  # fmt: skip
    rank, seen = distributed.get_rank(), {}

    def load(family: str, plan="auto"):
        config = DistributedConfig(tp_plan=plan)
        return AutoModelForCausalLM.from_pretrained(directory / family, distributed_config=config).eval()

    for family in ("llama", "qwen2"):
        model = load(family)
        engine = HuggingFaceEngine(model)
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[0]])).logits
        seen[family] = {
            "answers": answers(engine),
            "without memory": answers(HuggingFaceEngine(model, remember=False)),
            "cut by entropy": answers(engine, config=ENTROPY),
            "logits": logits.tolist(),
            "heads": [shape[0] for shape in engine._layout.shapes()],
            "ranks": [engine.ranks.rank, engine.ranks.size],
        }
    seen["compiled"] = answers(HuggingFaceEngine(model, compile="eager"))

    # A rank whose logits are not those of the other: what it would draw, and what comes of it.
    own_logits, own_draw, draws = engine._logits, engine._draw_here, []
    noise = 0.5 * rank * torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))

    def recorded(*args):
        mine = own_draw(*args)
        draws.append(mine.token.tolist())
        return mine

    engine._logits, engine._draw_here = lambda output: own_logits(output) + noise, recorded
    seen["disturbed"], seen["disturbed draws"] = answers(engine), draws
    engine._logits, engine._draw_here = own_logits, own_draw

    values = [
        torch.full((3,), 2**40 + rank), torch.full((3,), 0.5 + rank), torch.tensor([-torch.inf, torch.nan, rank]),
        torch.full((3,), 1e-40 * (1 + rank)), None, torch.full((3,), rank, dtype=torch.int32),
    ]  # fmt: skip
    one_row = [x if x is None else torch.full((1,), rank, dtype=x.dtype) for x in values]
    one_row[4] = torch.full((1,), float(rank))
    for name, sent in (("drawn", values), ("drawn alone", one_row)):
        arrived = engine.ranks.drawn(SampleOutput(*sent))
        seen[name] = [None if x is None else [str(x.dtype), x.tolist()] for x in arrived]

    changed = {
        "seed": {"seed": SEED + rank},
        "answers": {"prompts": [[5, 6 + rank]]},
        "config": {"config": PowerConfig(alpha=3.0, max_new_tokens=12, block_size=4, mcmc_steps=4 + rank)},
        "eos_token_id": {"eos_token_id": [2 + rank]},
    }
    seen["refused"] = {name: refusal(answers, engine, **call) for name, call in changed.items()}
    run = {"chains": 2, "lanes": 1, "max_length": 20, "alpha": 2.0, "beta": 2.0, "seed": 1}
    seen["refused"]["max_length"] = refusal(engine.begin, **{**run, "max_length": 20 + rank})
    engine.begin(**run)
    seen["refused"]["prompts"] = refusal(engine.prefill, [0], [[3, 4 + rank]])
    engine.end()
    seen["after the refusals"] = answers(engine)

    # Each process has its own clock and its own memory; the plan is one.
    enough = 1 + int(engine.run_bytes(chains=2, lanes=1, max_length=17) / planning.MOST_OF_MEMORY)
    planning.free_bytes = lambda device: enough if rank == 1 else 4 * enough
    plan = planning.plan_run(engine, PowerConfig(max_new_tokens=12), jobs=4, max_chains=4, max_length=17)
    seen["plan"] = [plan.slots, plan.lanes, engine.decode_seconds([1, 2], 17)]
    seen["plan fits"] = engine.run_bytes(chains=plan.slots, lanes=plan.lanes, max_length=17) <= enough

    seen["refused"]["ungathered"] = refusal(HuggingFaceEngine, load("llama", {"lm_head": "colwise"}))
    seen["refused"]["heads"] = refusal(HuggingFaceEngine, load("one head"))
    other = build("llama")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("fsdp",))
    norm = other.model.norm
    norm.weight = torch.nn.Parameter(distribute_tensor(norm.weight.detach(), mesh, [Replicate()]))
    seen["refused"]["fsdp"] = refusal(TensorParallelGroup.of, other)
    distributed.destroy_process_group()
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    (where / f"{os.environ['RANK']}.json").write_text(json.dumps(main(where)))
