"""One decode step on a device: against what the memory's bandwidth allows, what its parts take, whether it waits.

    python bench/end_to_end.py decode --model qwen2.5-7b           needs a GPU; also qwen2.5-math-7b, phi-3.5-mini
    python bench/end_to_end.py decode --model tiny --device cpu    the same in miniature, to see that it runs

The shapes have random weights (bench/shapes.py). Three runs of the driver, as users call it:

1. Plain sampling of `lanes` answers at once after a prompt of --context tokens, for each of --lanes. An event is
   recorded on the stream before each step, waiting for nothing, and the step is the median of the times between two. A
   step must read each weight but the input embedding's once, and of each lane the keys and values of its positions:

       roofline = (weight bytes + lanes * positions * KV bytes a position) / bandwidth

   bandwidth is what a copy (read and written) or a sum (read) of a buffer larger than every cache reaches in the same
   run, whichever is faster. "of roofline" is that time over the step's; "replayed" the steps from a recording.
2. Power sampling with as many lanes as the most of --lanes, under torch.profiler: the time of our kernels by a step.
   Sampling is the mass and the finishing kernel; where the LM head and the draw are one kernel, that is the model's.
   What torch's own kernels do to wipe bad rows and to look at the chains (scrub, poll) is in no part. The parts' share
   is of a step of the first run.
3. Power sampling with every synchronisation an error (torch.cuda.set_sync_debug_mode) inside of a step, from the fourth
   step on: between two looks at the chains nothing may wait. A run that waits ends with the error's text.

Where memory does not hold that many lanes at once the driver runs fewer: then the point is not measured, and says so.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict

import common
import torch
import transformers
from common import NOT_MEASURED, Progress, target
from shapes import ENTROPY, SHAPES, Subject, device_of, random_prompts, subject

# Parts of a step by the names of their kernels on a device, and of their operators on a CPU.
PARTS = {
    "sampling": r"^_(mass|finish|score)_kernel|^power_kernels::sample_tokens",
    "head and draw": r"^_head_kernel|^power_kernels::sample_from_hidden",
    "advance": r"^_mh_advance_kernel|^power_kernels::mh_advance",
    "KV copies": r"^_kv_copy_|^power_kernels::kv_copy_",
}
OVERHEAD = ("sampling", "advance", "KV copies")
TARGETS = {"roofline": 0.70, "overhead": 0.03}
WARM_STEPS = 3  # compile, record, fill caches; they may wait


# ----------------------------------------------------------------------------------------------------
# What the memory allows


def bandwidth(device: torch.device, megabytes: int | None = None) -> dict[str, float]:
    """Bytes per second of a copy (read and written) and of a sum (read), of buffers that no cache holds."""
    from power_kernels.api.bench.harness import clock_for, copy_bandwidth, rounds

    megabytes = megabytes or (1024 if device.type == "cuda" else 128)
    clock = clock_for(device)
    source = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    sample, _ = clock.prepare(source.sum, False)
    read = source.nbytes / min(rounds({"sum": sample}, clock, 0.5)["sum"])
    return {"copy": copy_bandwidth(device, clock, megabytes), "read": read}


def weight_bytes(model: torch.nn.Module) -> int:
    """Of the parameters that a step reads whole: all but the input embedding, unless the LM head is the same."""
    tables = {id(p): p for p in model.parameters()}
    tables.pop(id(model.get_input_embeddings().weight), None)
    head = model.get_output_embeddings().weight
    tables[id(head)] = head
    return sum(p.numel() * p.element_size() for p in tables.values())


def kv_bytes(model: torch.nn.Module) -> int:
    """Of one position, over all layers."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * model.dtype.itemsize


# ----------------------------------------------------------------------------------------------------
# The driver's steps


@contextmanager
def marked_steps(device: torch.device, *, error_on_sync: bool = False):
    """Yields a list that gets a mark before each step of the driver: an event on the stream, or a time on a CPU.

    error_on_sync: a step after the first WARM_STEPS that waits for the device raises RuntimeError.
    """
    from power_kernels.api.driver.run import Run

    original, marks = Run.step, []

    def step(self):
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())
        if not (error_on_sync and len(marks) > WARM_STEPS):
            return original(self)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(self)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    Run.step = step
    try:
        yield marks
    finally:
        Run.step = original


def intervals(marks: list) -> list[float]:
    """Seconds between consecutive marks, the warm ones."""
    pairs = list(zip(marks[WARM_STEPS:], marks[WARM_STEPS + 1 :], strict=False))
    if marks and isinstance(marks[0], float):
        return [stop - start for start, stop in pairs]
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]


def lanes_of(rows: int) -> int:
    """Lanes of each chain where there are `rows` in all: up to four."""
    return next(p for p in (4, 2, 1) if rows % p == 0)


class Bench:
    """Runs of one model."""

    def __init__(self, one: Subject, context: int, tokens: int):
        from power_kernels.api import PowerConfig

        self.subject, self.config, self.tokens = one, PowerConfig, tokens
        (self.prompt,) = random_prompts(one.plain.config.vocab_size, [context], seed=2)

    def plain(self, lanes: int, tokens: int | None = None) -> None:
        config = self.config(alpha=1.0, max_new_tokens=tokens or self.tokens, block_size=None, mcmc_steps=0, lanes=1)
        self.subject.sampler.generate([self.prompt] * lanes, config, eos_token_id=[], max_chains=lanes)

    def power(self, rows: int) -> None:
        """`rows` lanes in all."""
        lanes = lanes_of(rows)
        config = self.config(
            alpha=4.0, max_new_tokens=self.tokens, block_size=-(-self.tokens // 2), mcmc_steps=4, lanes=lanes
        )
        chains = rows // lanes
        self.subject.sampler.generate([self.prompt] * chains, config, eos_token_id=[], max_chains=chains)

    def short(self, slots: int, lanes: int) -> str | None:
        """Why the last run is not one of so many chains and lanes at once; None: it is."""
        return common.shortfall(asdict(self.subject.sampler.last_run), slots, lanes)

    def step(self, lanes: int, fastest: float) -> dict:
        """One row of the table. fastest: bytes per second."""
        self.plain(lanes, WARM_STEPS + 1)
        with marked_steps(self.subject.device) as marks:
            self.plain(lanes)
        if reason := self.short(lanes, 1):
            return {"lanes": lanes, "not_measured": reason}
        times, report = intervals(marks), self.subject.sampler.last_run
        if len(times) < 2:
            raise AssertionError(f"{len(marks)} steps are too few to time one")
        model = self.subject.plain
        positions = len(self.prompt) + (WARM_STEPS + len(marks)) / 2
        weights, kv = weight_bytes(model), lanes * positions * kv_bytes(model)
        seconds, bound = statistics.median(times), (weights + kv) / fastest
        quarters = statistics.quantiles(times, n=4)
        return {
            "lanes": lanes,
            "steps": len(times),
            "replayed": report.replays / report.decode_steps,
            "seconds": seconds,
            "seconds_quartiles": [quarters[0], quarters[2]],
            "weight_bytes": weights,
            "kv_bytes": kv,
            "roofline_seconds": bound,
            "of_roofline": bound / seconds,
            "tokens_per_s": lanes / seconds,
        }

    def parts(self, rows: int) -> dict:
        """Seconds of a step by part, of power sampling with `rows` lanes."""
        on_device = self.subject.device.type == "cuda"
        self.power(rows)
        activity = torch.profiler.ProfilerActivity.CUDA if on_device else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            self.power(rows)
            if on_device:
                torch.cuda.synchronize()
        if reason := self.short(rows // lanes_of(rows), lanes_of(rows)):
            return {"lanes": rows, "not_measured": reason}
        steps = self.subject.sampler.last_run.decode_steps
        micro: Counter[str] = Counter()
        for event in profile.key_averages():
            took = event.self_device_time_total if on_device else event.self_cpu_time_total
            part = next((part for part, names in PARTS.items() if re.search(names, event.key)), None)
            if part:
                micro[part] += took
        return {"lanes": rows, "steps": steps, "seconds": {part: micro[part] / steps / 1e6 for part in PARTS}}

    def waits(self, rows: int) -> str | None:
        """Run with every wait inside of a step an error; None where nothing waited, else what did, or why the run was
        none of `rows` lanes."""
        self.power(rows)
        try:
            with marked_steps(self.subject.device, error_on_sync=True) as marks:
                self.power(rows)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return str(error).splitlines()[0]
        if reason := self.short(rows // lanes_of(rows), lanes_of(rows)):
            return f"{NOT_MEASURED}: {reason}"
        if len(marks) <= WARM_STEPS:
            raise AssertionError(f"{len(marks)} steps show nothing")
        return None


# ----------------------------------------------------------------------------------------------------
# What is said of it


def table(result: dict) -> str:
    found = result["bandwidth"]
    lines = [f"bandwidth: copy {found['copy'] / 1e9:.0f} GB/s, read {found['read'] / 1e9:.0f} GB/s"]
    form = "{:>5} | {:>9} {:>17} | {:>8} | {:>10} {:>10} | {:>9} {:>11} | {:>9}"
    lines.append(
        form.format(
            "lanes", "ms a step", "quartiles", "replayed", "weights GB", "KV GB", "ms bound", "of roofline", "tokens/s"
        )
    )
    for row in result["table"]:
        if "not_measured" in row:
            lines.append(f"{row['lanes']:>5} | {NOT_MEASURED}: {row['not_measured']}")
            continue
        low, high = row["seconds_quartiles"]
        lines.append(
            form.format(
                row["lanes"],
                f"{1e3 * row['seconds']:.3f}",
                f"{1e3 * low:.3f}-{1e3 * high:.3f}",
                f"{row['replayed']:.0%}",
                f"{row['weight_bytes'] / 1e9:.3f}",
                f"{row['kv_bytes'] / 1e9:.3f}",
                f"{1e3 * row['roofline_seconds']:.3f}",
                f"{row['of_roofline']:.0%}",
                f"{row['tokens_per_s']:.0f}",
            )
        )
    if parts := result["parts"]:
        if reason := parts.get("not_measured"):
            text = f"{NOT_MEASURED}: {reason}"
        else:
            step = step_of(result)
            text = ", ".join(
                f"{part} {1e6 * s:.0f} us" + (f" ({s / step:.1%})" if step else "")
                for part, s in parts["seconds"].items()
                if s
            )
        lines.append(f"power sampling, {parts['lanes']} lanes: {text}")
    waits = result["waits"]
    if waits == "none":
        lines.append("nothing waits for the device inside of a step")
    elif waits == NOT_MEASURED:
        lines.append(f"waits inside of a step: {NOT_MEASURED} (only a CUDA device can be waited for)")
    else:
        what = "waits inside of a step" if waits.startswith(NOT_MEASURED) else "A STEP WAITS"
        lines.append(f"{what}: {waits}")
    return "\n".join(lines)


def step_of(result: dict) -> float | None:
    """Seconds of a step with as many lanes as the parts were taken with; None where it was not measured."""
    return next(row.get("seconds") for row in result["table"] if row["lanes"] == result["parts"]["lanes"])


def overhead(result: dict) -> float | None:
    """Sampling, advance and KV copies over a step; None where one of them was not measured."""
    parts = result["parts"]
    if not parts or "not_measured" in parts or (step := step_of(result)) is None:
        return None
    return sum(result["parts"]["seconds"][part] for part in OVERHEAD) / step


def verdicts(result: dict) -> list[dict]:
    """Of a GPU; a CPU has no such targets."""
    if result["machine"]["device_type"] != "cuda":
        return []
    last = result["table"][-1] if result["table"] else None
    found = []
    if last and result["shape"].startswith("qwen") and last["lanes"] == 64:
        found.append(
            target("share of the roofline, 64 lanes", last.get("of_roofline"), TARGETS["roofline"], at_most=False)
        )
    found.append(target("sampling, advance and KV copies over a step", overhead(result), TARGETS["overhead"]))
    waits = None if result["waits"].startswith(NOT_MEASURED) else int(result["waits"] != "none")
    found.append(target("waits between two looks at the chains", waits, 0))
    return found


def caveat(result: dict) -> str:
    """What the share of sampling, advance and KV copies leaves out; printed beside its verdict."""
    left_out = ["torch's kernels that wipe bad rows and look at the chains (scrub, poll) are in no part"]
    if (result["parts"] or {}).get("seconds", {}).get("head and draw"):
        left_out.insert(0, "the draw is in the LM head's kernel and counts as the model's")
    return f"     (sampling, advance and KV copies: {'; '.join(left_out)})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-7b", choices=tuple(SHAPES), help="a shape (qwen2.5-7b)")
    parser.add_argument("--device", default="cuda", help="cuda:N, or cpu (cuda)")
    parser.add_argument("--lanes", default=None, help="ascending (GPU: 1,2,4,8,16,32,64; CPU: 1,2,4)")
    parser.add_argument("--context", type=int, help="tokens of the prompt (GPU: 1536, CPU: 24)")
    parser.add_argument("--tokens", type=int, help="of each answer (GPU: 96, CPU: 12)")
    parser.add_argument("--entropy", type=float, default=ENTROPY, help=f"nats, of random weights ({ENTROPY})")
    parser.add_argument("--quick", action="store_true", help="the CPU's sizes")
    parser.add_argument("--json", metavar="OUT", help="write everything to this file as it comes")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a measured target is missed")
    arguments = parser.parse_args(argv)
    try:
        device = device_of(arguments.device)
    except RuntimeError as error:
        print(f"decode: {NOT_MEASURED}: {error}")
        return 2
    on_device = device.type == "cuda" and not arguments.quick
    arguments.lanes = arguments.lanes or ("1,2,4,8,16,32,64" if on_device else "1,2,4")
    arguments.context = arguments.context or (1536 if on_device else 24)
    arguments.tokens = arguments.tokens or (96 if on_device else 12)
    try:
        lanes = sorted({int(each) for each in arguments.lanes.split(",")})
    except ValueError:
        parser.error(f"--lanes is {arguments.lanes}; it must hold numbers")
    if lanes[0] < 1 or arguments.context < 1 or arguments.tokens < WARM_STEPS + 3:
        parser.error(f"--lanes and --context must be at least 1, --tokens at least {WARM_STEPS + 3}")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()

    say = Progress()
    say("bandwidth")
    found = bandwidth(device, 16 if arguments.quick or not on_device else None)
    say(f"{arguments.model}: weights and their scale")
    one = subject(arguments.model, device, 1, [], entropy=arguments.entropy)
    bench = Bench(one, arguments.context, arguments.tokens)
    result = {
        "suite": "decode",
        "shape": arguments.model,
        "setting": {key: value for key, value in vars(arguments).items() if key != "json"},
        "model": one.about,
        "machine": common.machine(device),
        "bandwidth": found,
        "table": [],
        "parts": None,
        "waits": NOT_MEASURED,
    }
    print(
        f"{one.about}; plain sampling after {arguments.context} tokens\n{common.machine_text(result['machine'])}\n",
        flush=True,
    )
    for each in lanes:
        say(f"a step, {each} lanes")
        result["table"].append(bench.step(each, max(found.values())))
        common.write(arguments.json, result)
    say("parts of a step")
    result["parts"] = bench.parts(lanes[-1])
    common.write(arguments.json, result)
    if device.type == "cuda":
        say("waits")
        result["waits"] = bench.waits(lanes[-1]) or "none"
    result["targets"] = verdicts(result)
    common.write(arguments.json, result)
    print(table(result))
    if result["targets"]:
        print("\n" + common.targets_text(result["targets"]))
        print(caveat(result))
    if arguments.json:
        print(f"written to {arguments.json}")
    return 1 if arguments.check and common.missed(result["targets"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
