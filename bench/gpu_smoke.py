"""The first two minutes on a GPU: every operator and a tiny model, all that is wrong collected, nothing fatal.

    python bench/gpu_smoke.py --list
    python bench/gpu_smoke.py GROUP [--device cuda:0] [--after N] [--seconds S] [--out FILE]

A group is a process, and bench/gpu_check.py runs them side by side (`make gpu-check`, `PLAN=smoke` for this alone). Its
items are told one after the other, JSON lines written at once: their names, where one begins, and what came of it (an
error with its traceback, or facts worth knowing). An error ends the process only where the device takes no more work
from it; an item that is over its S seconds ends it, too, with the place where it hung on the screen. Whoever started
it goes on with --after N, behind the first N items.

On a CPU (`--device cpu`) the same items run on the host, smaller; recorded steps are those of tests/recorded_graph.py.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BROKEN = 3  # the exit code of a process whose device takes no more work


@dataclass(frozen=True)
class Item:
    """run() returns facts, {} at least, and raises where something is wrong. seconds: its own limit in place of S."""

    name: str
    run: Callable[[], dict]
    seconds: float | None = None


# ---- the device itself


def device_items(device: str) -> list[Item]:
    import torch

    import power_kernels as pk

    on_cuda = device != "cpu"

    def properties() -> dict:
        backend = pk.backend_for(torch.device(device))
        assert backend == ("triton" if on_cuda else backend), f"tensors on {device} go to the backend {backend}"
        if not on_cuda:
            return {"backend": backend}
        p = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        return {
            "name": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "free_gib": round(free / 2**30, 1), "total_gib": round(total / 2**30, 1), "backend": backend,
        }  # fmt: skip

    def random_words() -> dict:
        """Triton compiles and launches at all: the known answers of Random123."""
        import numpy as np

        from tests.rng_kernel import words

        counters = np.array([[0] * 4, [0xFFFFFFFF] * 4], dtype=np.uint32)
        drawn, _ = words(0, counters[:1], device)
        assert [f"{w:08x}" for w in drawn[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"], drawn
        drawn, _ = words(-1, counters[1:], device)
        assert [f"{w:08x}" for w in drawn[0]] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"], drawn
        return {}

    def bandwidth() -> dict:
        """A copy: what the kernels' traffic is compared with. Twice the bytes, the second of two calls."""
        source = torch.ones(2**28 if on_cuda else 2**20, dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        seconds = _seconds(lambda: target.copy_(source), device)
        return {"copy_gb_per_s": round(2 * source.nbytes / seconds / 1e9)}

    def matmul() -> dict:
        a, b = (torch.randn(64, 512, device=device).bfloat16() for _ in range(2))
        error = ((a @ b.T).double() - a.double() @ b.double().T).abs().max().item()
        assert error < 1.0, f"bfloat16 products of 512 terms err by {error}"
        return {"largest_error": round(error, 4)}

    def graph() -> dict:
        value, recorded = torch.zeros(4, device=device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            value.add_(1)
        for _ in range(3):
            recorded.replay()
        assert value.tolist() == [3.0] * 4, value
        return {}

    items = [Item("properties", properties), Item("random words by a kernel", random_words)]
    items += [Item("a copy", bandwidth), Item("bfloat16 products", matmul)]
    return items + ([Item("a graph", graph)] if on_cuda else [])


# ---- operators at small odd sizes: the tests' arguments


def operator_items(family: str, device: str) -> list[Item]:
    """The launches of bench/gpu_targets.py whose operator is of a family of kernels, each against the reference."""
    from bench.gpu_targets import small_arguments, without_arguments

    launches = small_arguments(device)  # before triton is imported
    from power_kernels.ops import dispatch

    def of_family(name: str) -> bool:
        return dispatch.KERNELS.get(name) == family or dispatch.KERNELS.get(f"{name}_out") == family

    def missing(name: str) -> dict:
        raise AssertionError(f"no arguments for {name} in the tests")

    items = [Item(name, functools.partial(missing, name)) for name in without_arguments() if of_family(name)]
    for case, (name, make, contract) in launches.items():
        if of_family(name):
            items.append(Item(case, functools.partial(against_reference, name, make, contract, device)))
    return items


def against_reference(name: str, make, contract, device: str) -> dict:
    """One launch, on the device and in the reference. facts: seconds with compilation, and of a launch after it."""
    import torch

    import power_kernels as pk

    ours, theirs = contract.placed(make()), make()
    with torch.inference_mode():
        begin = time.perf_counter()
        returned = contract.call(name, ours)
        _wait(device)
        first = time.perf_counter() - begin
        with pk.use_backend("reference"):
            expected = contract.call(name, theirs)
        columns = zip(getattr(returned, "_fields", ()), returned or (), expected or (), strict=False)
        wrong = difference(name, ours, theirs, tuple((label, a, b) for label, a, b in columns if a is not None))
        assert wrong is None, wrong
        others = [contract.placed(make()) for _ in range(4)]  # fresh ones: some operators write theirs
        seconds = _seconds(lambda: contract.call(name, others.pop()), device, calls=3)
    return {"first_s": round(first, 2), "again_us": round(seconds * 1e6)}


def difference(name: str, ours: tuple, theirs: tuple, outputs: tuple) -> str | None:
    """What is not as the reference says, or None: integers exactly, floats to 1e-4 of max(1, value)."""
    import torch

    schema = getattr(torch.ops.power_kernels, name).default._schema
    for declared, a, b in zip(schema.arguments, ours, theirs, strict=True):
        if isinstance(a, torch.Tensor) and declared.name != "workspace":
            outputs += ((declared.name, a, b),)
    for label, a, b in outputs:
        a = a.cpu()
        if a.is_floating_point():
            same = torch.isclose(a.double(), b.double(), rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            same = a == b
        if not bool(same.all()):
            where = int((~same).flatten().nonzero()[0])
            return f"{label}[{where}] is {a.flatten()[where].item()}; the reference has {b.flatten()[where].item()}"
    return None


# ---- operators at real sizes


def size_items(device: str) -> list[Item]:
    """Real vocabularies: many tiles a row, 16-byte loads, every dtype."""
    from bench.gpu_targets import small_arguments

    small_arguments(device)  # before triton is imported
    import torch

    from tests import test_ops_contract as contract

    vocab, hidden_vocab = (151_936, 50_257) if device != "cpu" else (5_000, 1_000)
    items = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        of = str(dtype).removeprefix("torch.")
        made = {
            f"sample_tokens, {of}, V={vocab}": ("sample_tokens", contract.sample_arguments, 8, vocab),
            f"score_tokens, {of}, V={vocab}": ("score_tokens", contract.score_arguments, 16, vocab),
            f"sample_from_hidden, {of}, V={hidden_vocab}": (
                "sample_from_hidden", contract.sample_from_hidden_arguments, 8, hidden_vocab,
            ),
            f"score_from_hidden, {of}, V={hidden_vocab}": (
                "score_from_hidden", contract.score_from_hidden_arguments, 40, hidden_vocab,
            ),
        }  # fmt: skip
        for case, (name, make, rows, size) in made.items():

            def arguments(make=make, rows=rows, size=size, dtype=dtype):
                return (*make(rows, size, dtype), True)

            items.append(Item(case, functools.partial(against_reference, name, arguments, contract, device)))

        def by_slot(dtype=dtype):
            return (*contract.slot_arguments(8, vocab, dtype), *contract.slot_outputs(8, vocab), True)

        launch = functools.partial(against_reference, "sample_slots_out", by_slot, contract, device)
        items.append(Item(f"sample_slots_out, {of}, V={vocab}", launch))
    return items


# ---- chains of long answers


def chain_items(device: str) -> list[Item]:
    from bench.gpu_targets import small_arguments

    small_arguments(device)  # before triton is imported
    import power_kernels as pk
    from power_kernels.state import ChainState
    from tests import long_answers
    from tests.devices import on_device

    def advance(state: ChainState, *arguments) -> ChainState:
        state = ChainState(*map(on_device, state.tensors()))
        pk.mh_advance(state, *map(on_device, arguments))
        return ChainState(*(tensor.cpu() for tensor in state.tensors()))

    def made(name: str) -> dict:
        launches = 0
        for launch in long_answers.telling(name, 1, backend="reference"):
            long_answers.assert_launch(launch, advance, theta=1e-13)
            launches += 1
        return {"launches": launches}

    names = list(long_answers.CASES)
    return [Item(name, functools.partial(made, name)) for name in (names if device != "cpu" else names[1:2])]


# ---- whole answers of a tiny model

PROMPTS = [[5, 6, 7], [8], [9, 3, 11, 12, 13], [20, 21]]


def answer_items(device: str) -> list[Item]:
    """A tiny Llama: every cut law as it is, with graphs the same bit for bit; its weights against a fresh forward."""
    from bench.gpu_targets import small_arguments

    small_arguments(device)  # before triton is imported
    import torch

    from power_kernels.api import HuggingFaceEngine, PowerConfig, PowerSampler
    from power_kernels.api.driver import captured
    from tests import tiny_models

    if device == "cpu":
        from tests.recorded_graph import RecordedGraphs

        captured.recorder = lambda device: RecordedGraphs()

    def config(cut: str, lanes: int) -> PowerConfig:
        return PowerConfig(
            alpha=3.0, max_new_tokens=24, block_size=8, mcmc_steps=4, final_steps=2, lanes=lanes, cut=cut
        )

    @functools.cache
    def model(dtype):
        return tiny_models.llama().to(dtype)

    @functools.cache
    def drawn(dtype, cut: str, lanes: int, capture: bool):
        # What a recorded step takes, too: another kernel, or other numbers of rows, round otherwise.
        attention = {"attention": "padded"} if device == "cpu" else {}
        engine = HuggingFaceEngine(model(dtype), remember=False, **attention)
        sampler = PowerSampler(engine, capture=capture)
        results = sampler.generate(PROMPTS, config(cut, lanes), seed=3, num_chains=2, max_chains=2)
        return results, sampler.last_run, engine

    def plain(dtype, cut: str, lanes: int) -> dict:
        results, run, engine = drawn(dtype, cut, lanes, False)
        accepted, worst = sum(r.accepted for r in results), 0.0
        for r in results:
            assert r.finish in ("eos", "length"), f"a chain ended by {r.finish}: {r.status}"
            ids = torch.tensor([PROMPTS[r.prompt_id] + r.tokens], device=device)
            with torch.inference_mode():
                logp = torch.log_softmax(model(dtype)(ids).logits[0].double(), -1)
            at = torch.arange(len(PROMPTS[r.prompt_id]) - 1, ids.shape[1] - 1, device=device)
            fresh = logp[at, ids[0, 1:][at]].cpu()
            worst = max(worst, (fresh - torch.tensor(r.token_logp).double()).abs().max().item())
        tolerance = 1e-3 if dtype == torch.float32 else 0.3
        assert worst < tolerance, f"log p of a token is {worst} nats from a fresh forward's"
        assert accepted > 0, "no step changed an answer"
        kernel = str(getattr(engine, "attention", "?"))
        return {
            "accepted": accepted,
            "decode_steps": run.decode_steps,
            "logp_error": f"{worst:.1e}",
            "attention": kernel,
        }

    def replayed(dtype, cut: str, lanes: int) -> dict:
        (plain, _, _), (replayed, run, _) = (drawn(dtype, cut, lanes, capture) for capture in (False, True))
        assert run.replays > 0, "no step was replayed"
        for k, (ours, theirs) in enumerate(zip(replayed, plain, strict=True)):
            for name in ("tokens", "outcomes", "log_weights"):
                a, b = getattr(ours, name), getattr(theirs, name)
                assert a == b, f"chain {k}: {name} are {a}; without graphs {b}"
        return {"replays": run.replays, "decode_steps": run.decode_steps}

    def as_on_the_host() -> dict:
        """float32 rounds otherwise there, so a draw may go the other way, and from there on the chain is another."""
        ours, _, _ = drawn(torch.float32, "uniform", 3, False)
        host = PowerSampler(HuggingFaceEngine(tiny_models.llama().cpu(), remember=False), capture=False)
        theirs = host.generate(PROMPTS, config("uniform", 3), seed=3, num_chains=2, max_chains=2)
        same = sum(a.tokens == b.tokens for a, b in zip(ours, theirs, strict=True))
        assert same > len(ours) / 2, f"{same} of {len(ours)} chains are those of the host"
        return {"same_chains": f"{same} of {len(ours)}"}

    items = []
    for dtype in (torch.float32, torch.bfloat16) if device != "cpu" else (torch.float32,):
        laws = (("uniform", 1), ("uniform", 3), ("divergence", 2), ("divergence-entropy", 1))
        for cut, lanes in laws if device != "cpu" else laws[1:2]:
            what = f"{str(dtype).removeprefix('torch.')}, cut {cut}, lanes {lanes}"
            items.append(Item(what, functools.partial(plain, dtype, cut, lanes)))
            items.append(Item(f"{what}, graphs", functools.partial(replayed, dtype, cut, lanes)))
    return [*items, Item("as on the host", as_on_the_host)]


GROUPS: dict[str, Callable[[str], list[Item]]] = {
    "device": device_items,
    **{
        f"{family} kernels": functools.partial(operator_items, family)
        for family in ("sampling", "scoring", "slots", "particles", "lm_head", "chain", "kv_cache", "paged_kv")
    },
    "real sizes": size_items,
    "long answers": chain_items,
    "tiny model": answer_items,
}


# ---- running them


def _wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def _seconds(call: Callable[[], object], device: str, calls: int = 10) -> float:
    """Of the quickest of `calls` calls, each waited for, after one that is not timed."""
    best = math.inf
    for i in range(calls + 1):
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        best = min(best, time.perf_counter() - begin) if i else best
    return best


def run_group(group: str, device: str, *, after: int, seconds: float, out) -> int:
    """Writes a line with the items' names, then two for each item from the `after`-th on. Returns an exit code."""

    def tell(**line) -> None:
        print(json.dumps(line, default=str), file=out, flush=True)

    def preparing() -> dict:
        raise failed

    try:
        items = GROUPS[group](device)
    except Exception as error:  # a module that does not import, say
        failed = error
        items = [Item("preparing", preparing)]
    tell(items=[item.name for item in items])
    for i, item in enumerate(items[after:], after):
        tell(begun=i)
        line = {"item": i, "error": None, "trace": None, "facts": {}}
        begin = time.monotonic()
        # A timer of its own thread, which also ends a call that never comes back from C.
        faulthandler.dump_traceback_later(item.seconds or seconds, exit=True)
        try:
            line["facts"] = item.run()
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"[:2000]
            line["trace"] = traceback.format_exc()[-6000:]
        faulthandler.cancel_dump_traceback_later()
        tell(**line, seconds=round(time.monotonic() - begin, 2))
        if line["error"] and not _device_works(device):
            return BROKEN
    return 0


def _device_works(device: str) -> bool:
    """An illegal access, say, makes every later call of its process fail."""
    try:
        _wait(device)
    except Exception:
        return False
    return True


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", nargs="?", choices=GROUPS)
    parser.add_argument("--list", action="store_true", help="print the groups, and nothing else")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--after", type=int, default=0, metavar="N", help="leave out the first N items")
    parser.add_argument("--seconds", type=float, default=60.0, help="the most that an item may take (60)")
    parser.add_argument("--out", type=Path, help="the file that JSON lines are appended to (default: the screen)")
    given = parser.parse_args(arguments)
    if given.list or given.group is None:
        print("\n".join(GROUPS))
        return 0
    sys.path.insert(0, str(ROOT))
    if given.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    faulthandler.enable()
    out = given.out.open("a") if given.out else sys.stdout
    return run_group(given.group, given.device, after=given.after, seconds=given.seconds, out=out)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a broken device may hang or abort what Python does at its end
