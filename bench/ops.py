"""Microbenchmarks of the operators on the CPU, against what one would write without them.

    python bench/ops.py [--threads 1] [--rows 1 16 64] [--dtypes float32 bfloat16] [--json FILE]
    pytest bench/ops.py --benchmark-only

`sample_tokens` reads each logit from memory once: B*V*itemsize bytes, plus 16 bytes per tile of workspace. It is
compared with

    logsumexp   torch.logsumexp of the same tensor: one normaliser, no token. The yardstick for "one pass".
    compile     torch.compile of the same mathematics: both normalisers, a token by inverse CDF, logp, logq, weight
    eager       log_softmax, softmax, multinomial, gather

All contenders run in one process, in rounds that take each of them in turn, so that a noisy machine hurts all
alike. Ratios are of medians over rounds; the minimum stands beside them. With one thread the clock is the process's
own processor time, which other people's programs do not lengthen; with more it is the wall. Memory is the peak that
torch's allocator held on top of the inputs. Every bandwidth is also given as a share of a measured copy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler reports each start and stop

import pytest
import torch

import power_kernels as pk

VOCABULARY = 151_936  # Qwen2.5
OPS = torch.ops.power_kernels
Contenders = dict[str, Callable[[], object]]


# ----------------------------------------------------------------------------------------------------
# What is compared


def same_mathematics(logits, alpha, beta, uniform):
    """Token by inverse CDF of softmax(beta z), logp, logq, weight. logits [B, V]; the others [B, 1]."""
    z = logits.float()
    logp = z - z.logsumexp(-1, keepdim=True)
    tempered = beta * z
    logq = tempered - tempered.logsumexp(-1, keepdim=True)
    cdf = logq.exp().cumsum(-1)
    token = (cdf > uniform * cdf[:, -1:]).to(torch.uint8).argmax(-1, keepdim=True)
    logp, logq = logp.gather(1, token), logq.gather(1, token)
    return token, logp, logq, alpha * logp - logq


def eager(logits, alpha, beta):
    z = logits.float()
    logp = torch.log_softmax(z, -1)
    q = torch.softmax(beta * z, -1)
    token = torch.multinomial(q, 1)
    logp, logq = logp.gather(1, token), q.gather(1, token).log()
    return token, logp, logq, alpha * logp - logq


def sampling_contenders(rows: int, dtype: torch.dtype, compiled: Callable) -> Contenders:
    logits = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0)).mul_(3).to(dtype)
    seed = torch.tensor([1])
    counter = torch.arange(4 * rows, dtype=torch.int32).view(rows, 4)
    alpha, odd = torch.full((rows,), 4.0), torch.full((rows,), 3.7)
    column, uniform = alpha[:, None], torch.linspace(0.01, 0.99, rows)[:, None]
    workspace = torch.empty(pk.workspace_size(rows, VOCABULARY))
    token = torch.zeros(rows, dtype=torch.int64)
    logp, logq, weight = torch.empty(3, rows).unbind()
    status = torch.empty(rows, dtype=torch.int32)

    def sample_out(beta):
        outputs = (token, logp, logq, weight, None, status)
        return lambda: OPS.sample_tokens_out(logits, alpha, beta, seed, counter, None, workspace, *outputs)

    return {
        "logsumexp": lambda: torch.logsumexp(logits, -1),
        "sample_tokens_out": sample_out(alpha),
        "sample_tokens_out, beta 3.7": sample_out(odd),
        "sample_tokens": lambda: pk.sample_tokens(logits, alpha, alpha, seed, counter),
        "score_tokens_out": lambda: OPS.score_tokens_out(
            logits, token, alpha, alpha, workspace, logp, logq, weight, None, status
        ),
        "score_tokens": lambda: pk.score_tokens(logits, token, alpha, alpha),
        "compile": lambda: compiled(logits, column, column, uniform),
        "eager": lambda: eager(logits, column, column),
    }


def compiled_mathematics() -> Callable:
    torch._dynamo.config.cache_size_limit = 64  # one specialised graph a shape: the best case for torch.compile
    return torch.compile(same_mathematics, dynamic=False)


# Qwen2.5-7B: 28 layers, 4 KV heads, 128 wide, bf16; a transition moves about one suffix
KV_SHAPE = (56, 4, 4, 512, 128)


def kv_contenders() -> tuple[Contenders, int]:
    groups, rows, heads, _, width = KV_SHAPE
    dst, src = torch.zeros(KV_SHAPE, dtype=torch.bfloat16), torch.ones(KV_SHAPE, dtype=torch.bfloat16)
    ranges = torch.tensor([(i, rows - 1 - i, 64 + 17 * i, 256 + 31 * i) for i in range(rows)], dtype=torch.int32)
    plan = ranges.tolist()

    def slices():
        for dst_row, src_row, start, stop in plan:
            dst[:, dst_row, :, start:stop] = src[:, src_row, :, start:stop]

    def layers():
        for group in range(groups):
            for dst_row, src_row, start, stop in plan:
                dst[group, dst_row, :, start:stop] = src[group, src_row, :, start:stop]

    moved = sum(stop - start for *_, start, stop in plan)
    contenders = {
        "kv_copy_ranges": lambda: pk.kv_copy_ranges(dst, src, ranges),
        "a slice copy per row": slices,
        "a slice copy per layer and row": layers,
    }
    return contenders, 2 * groups * heads * width * src.element_size() * moved


def accept_contenders(rows: int = 4096, length: int = 512) -> Contenders:
    generator = torch.Generator().manual_seed(0)
    current, proposal = -torch.rand(2, rows, length, generator=generator)
    lengths = torch.randint(1, length + 1, (2, rows), generator=generator).to(torch.int32)
    log_u = torch.rand(rows, generator=generator, dtype=torch.float64).log()
    position = torch.arange(length)

    def eager_accept():
        def score(weights, n):
            return weights.double().masked_fill(position >= n[:, None], 0.0).sum(-1) - n.double().log()

        return score(proposal, lengths[1]) - score(current, lengths[0]) >= log_u

    return {
        "mh_accept": lambda: pk.mh_accept(current, proposal, lengths[0], lengths[1], log_u),
        "eager": eager_accept,
    }


# ----------------------------------------------------------------------------------------------------
# Measuring


def interleaved(contenders: Contenders, seconds: float = 2.0, least: float = 1e-3) -> dict[str, tuple[float, float]]:
    """(median, minimum) seconds of each contender, taken in turn. Short ones are repeated to `least` seconds."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats = {}
    for name, run in contenders.items():
        run()
        start = clock()
        run()
        repeats[name] = max(1, round(least / max(clock() - start, 1e-9)))
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < 7 or time.perf_counter() - begin < seconds:
        rounds.append([])
        for name, run in contenders.items():
            start = clock()
            for _ in range(repeats[name]):
                run()
            rounds[-1].append((clock() - start) / repeats[name])
    return {n: (statistics.median(t), min(t)) for n, t in zip(contenders, zip(*rounds, strict=True), strict=True)}


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch's CPU allocator held during `run` on top of what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.ones(32 * 1024 * 1024)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, seconds=0.5)["copy"][1]
    return 2 * source.numel() * source.element_size() / seconds


def machine(threads: int) -> str:
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {len(names)} CPUs, {torch.backends.cpu.get_cpu_capability()}, "
        f"threads {threads} ({'processor' if threads == 1 else 'wall'} time); "
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"power_kernels {pk.__version__} on backend {pk.backend_for('cpu')}"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]

    def pad(line: list[str]) -> str:
        first, *others = (c.rjust(w) for c, w in zip(line, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others])

    return "\n".join(map(pad, lines))


def sampling_table(rows: int, dtype: torch.dtype, compiled: Callable, copy: float) -> dict:
    contenders = sampling_contenders(rows, dtype, compiled)
    times = interleaved(contenders)
    read = rows * VOCABULARY * dtype.itemsize
    lines, record = [], {}
    for name, (median, best) in times.items():
        memory = peak_bytes(contenders[name])
        record[name] = {"median_s": median, "min_s": best, "peak_bytes": memory}
        lines.append(
            [
                name,
                f"{median * 1e6:.0f}",
                f"{best * 1e6:.0f}",
                f"{median / times['logsumexp'][0]:.2f}",
                f"{median / times['sample_tokens_out'][0]:.1f}",
                f"{median / times['sample_tokens'][0]:.1f}",
                f"{read / best / 1e9:.1f}",
                f"{100 * read / best / copy:.0f}%",
                f"{memory / 1024:.0f}",
            ]
        )
    print(f"\n{dtype}, {rows} x {VOCABULARY}: {read / 1e6:.1f} MB = rows * V * {dtype.itemsize} bytes to read once")
    header = ["", "median us", "min us", "/logsumexp", "/sample_out", "/sample", "GB/s", "of copy", "peak KiB"]
    print(table(header, lines))
    return record


def plain_table(title: str, contenders: Contenders, rate: Callable[[float], str]) -> dict:
    times = interleaved(contenders)
    first = next(iter(times.values()))[0]
    lines = [
        [name, f"{median * 1e6:.0f}", f"{best * 1e6:.0f}", f"{median / first:.1f}", rate(best),
         f"{peak_bytes(contenders[name]) / 1024:.0f}"]
        for name, (median, best) in times.items()
    ]  # fmt: skip
    print(f"\n{title}")
    print(table(["", "median us", "min us", "ratio", "rate", "peak KiB"], lines))
    return {name: {"median_s": median, "min_s": best} for name, (median, best) in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine(args.threads))
    if pk.backend_for("cpu") != "cpp":
        raise SystemExit("the C++ backend is not built: nothing to measure")
    copy = copy_bandwidth()
    print(f"measured copy: {copy / 1e9:.1f} GB/s (read + written). alpha = beta = 4 unless a beta is named")

    record = {"machine": machine(args.threads), "copy_bytes_per_s": copy}
    compiled = compiled_mathematics()
    for dtype in args.dtypes:
        for rows in args.rows:
            record[f"sample {dtype} {rows}"] = sampling_table(rows, getattr(torch, dtype), compiled, copy)
    kv, moved = kv_contenders()
    title = f"KV copies, slab {list(KV_SHAPE)} bf16: {moved / 1e6:.1f} MB read + written, 4 ranges"
    share = "{:.1f} GB/s, {:.0f}% of copy"
    record["kv"] = plain_table(title, kv, lambda s: share.format(moved / s / 1e9, 100 * moved / s / copy))
    rows = 4096
    title = f"mh_accept, {rows} pairs of answers of up to 512 tokens"
    decisions = "{:.2f} M decisions/s"
    record["mh_accept"] = plain_table(title, accept_contenders(rows), lambda s: decisions.format(rows / s / 1e6))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1))


# ----------------------------------------------------------------------------------------------------
# pytest-benchmark


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def compiled():
    return compiled_mathematics()


SAMPLING = ("logsumexp", "sample_tokens_out", "sample_tokens", "score_tokens", "compile", "eager")


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("rows", [1, 16, 64])  # decoding one chain; a batch; as many lanes as fit a GPU's wave
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sampling(benchmark, compiled, dtype, rows, name):
    benchmark.group = f"{dtype} {rows} x {VOCABULARY}"
    benchmark(sampling_contenders(rows, dtype, compiled)[name])


@pytest.mark.parametrize("name", ["kv_copy_ranges", "a slice copy per row", "a slice copy per layer and row"])
def test_kv_copy(benchmark, name):
    benchmark.group = "kv"
    benchmark(kv_contenders()[0][name])


@pytest.mark.parametrize("name", ["mh_accept", "eager"])
def test_accept(benchmark, name):
    benchmark.group = "mh_accept"
    benchmark(accept_contenders()[name])


@pytest.mark.parametrize("rows", [1, 16])
def test_no_temporary_of_the_size_of_the_logits(compiled, rows):
    contenders = sampling_contenders(rows, torch.float32, compiled)
    logits = rows * VOCABULARY * 4
    assert peak_bytes(contenders["sample_tokens_out"]) == 0
    # the workspace: 16 bytes for each 256 logits
    assert peak_bytes(contenders["sample_tokens"]) < logits / 256 * 4 + 4096 * rows
    assert peak_bytes(contenders["eager"]) > logits


if __name__ == "__main__":
    main()
