"""`sample_from_hidden` and `score_from_hidden`: the LM head with what follows it, against the product alone.

Bytes: the head once, V*D*itemsize, the hidden states once, N*D*itemsize, and the arguments and results of a row.
Products: 2*N*D*V operations. Yardstick: torch.nn.functional.linear alone, which also writes the logits. Opponents: the
product followed by our operator on its logits, by the same mathematics compiled, by log_softmax; Liger's fused linear
cross entropy and cut_cross_entropy (logp of given tokens alone, no logq); FlashInfer's sampling (a token alone).

The memory of a call is told twice: what torch's allocator held at most, and how far the process's resident memory rose,
which sees whoever allocates.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

import power_kernels as pk
from power_kernels.api.bench.harness import Call, Point, Suite, Workload
from power_kernels.api.bench.logits import ALPHA, eager_sample, eager_score, log_probabilities, same_mathematics
from power_kernels.api.bench.opponents import add_compiled, add_library

SAMPLE_FORMULA = "(V + N)*D*itemsize + 48*N + 8: head and hidden states; the arguments and results of sample_tokens"
SCORE_FORMULA = "(V + N)*D*itemsize + 32*N: head and hidden states; the arguments and results of score_tokens"
SMOLLM2, QWEN_7B, LLAMA_8B, GEMMA_9B, LLAMA_70B = (
    (576, 49_152), (3584, 151_936), (4096, 128_256), (3584, 256_000), (8192, 128_256),
)  # fmt: skip
# The memory bound is stated here: the logits would take 1.9 GB, and a call takes seconds on a CPU.
LARGE = (3072, 576, 151_936)
COMPILED = ((512, *SMOLLM2), (16, *SMOLLM2), (512, *QWEN_7B), (16, *QWEN_7B))


def head_bytes(rows: int, width: int, vocab: int, itemsize: int, row_bytes: int, fixed: int = 0) -> int:
    return (vocab + rows) * width * itemsize + row_bytes * rows + fixed


def _points(op: str, sizes, dtypes) -> list[Point]:
    names = ("rows", "width", "vocab")
    return [Point(op, t, dict(zip(names, size, strict=True)), size in COMPILED) for t in dtypes for size in sizes]


def sample_points(grid: str, device: str) -> list[Point]:
    both = (torch.float32, torch.bfloat16)
    if grid == "quick":
        return _points("sample_from_hidden", [(2, 64, 4096)], both)
    if device == "cpu":
        sizes = [(rows, *SMOLLM2) for rows in (1, 16, 64)]
        if grid == "full":
            sizes += [(16, *QWEN_7B), (64, *QWEN_7B)]
        return _points("sample_from_hidden", sizes, both)
    sizes = [(rows, *QWEN_7B) for rows in (1, 4, 16, 64)]
    sizes += [(16, *model) for model in (SMOLLM2, LLAMA_8B, GEMMA_9B, LLAMA_70B)]
    return _points("sample_from_hidden", sizes, (torch.bfloat16,))


def score_points(grid: str, device: str) -> list[Point]:
    both = (torch.float32, torch.bfloat16)
    if grid == "quick":
        return _points("score_from_hidden", [(16, 64, 4096)], both)
    if device == "cpu":
        sizes = [(512, *SMOLLM2), LARGE] + ([(64, *SMOLLM2), (512, *QWEN_7B)] if grid == "full" else [])
        return _points("score_from_hidden", sizes, both)
    sizes = [(rows, *QWEN_7B) for rows in (64, 512, 3072)]
    sizes += [(512, *model) for model in (SMOLLM2, LLAMA_8B, GEMMA_9B, LLAMA_70B)] + [LARGE]
    return _points("score_from_hidden", sizes, (torch.bfloat16,))


def _inputs(point: Point, device: torch.device):
    rows, width, vocab = (point.shape[name] for name in ("rows", "width", "vocab"))
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(point.dtype)

    hidden, head = normal(rows, width, scale=1.0), normal(vocab, width, scale=3.0 / width**0.5)
    token = (torch.arange(rows, device=device) * 7919) % vocab
    alpha = torch.full((rows,), ALPHA, device=device)
    results = (*torch.empty(3, rows, device=device).unbind(), None, torch.empty(rows, dtype=torch.int32, device=device))
    return hidden, head, token, alpha, results


def build_sample(point: Point, device: torch.device) -> Workload:
    hidden, head, token, alpha, results = _inputs(point, device)
    rows, width, vocab = point.shape.values()
    seed = torch.ones(1, dtype=torch.int64, device=device)
    counter = torch.arange(4 * rows, dtype=torch.int32, device=device).view(rows, 4)
    column, uniform = alpha[:, None], torch.linspace(0.01, 0.99, rows, device=device)[:, None]
    logits = torch.empty(rows, vocab, device=device)
    workspace = torch.empty(pk.hidden_workspace_size(rows, vocab), device=device)
    arguments = (hidden, head, None, alpha, alpha, seed, counter, None, 0.0, 1.0)
    work = Workload(
        {
            "sample_from_hidden_out": lambda: pk.sample_from_hidden_out(*arguments, logits, workspace, token, *results),
            "sample_from_hidden": lambda: pk.sample_from_hidden(hidden, head, alpha, alpha, seed, counter),
            "linear alone": lambda: linear(hidden, head),
            "linear + sample_tokens": lambda: pk.sample_tokens(linear(hidden, head), alpha, alpha, seed, counter),
            "linear + eager": lambda: eager_sample(linear(hidden, head), column, column),
        },
        ours="sample_from_hidden_out",
        yardstick="linear alone",
        bytes=head_bytes(rows, width, vocab, point.dtype.itemsize, 48, 8),
        flops=2 * rows * width * vocab,
        count=rows,
        graph=frozenset({"sample_from_hidden_out", "linear alone", "linear + sample_tokens"}),
    )
    add_compiled(
        work, point, "linear + torch.compile", same_mathematics,
        lambda fast: lambda: fast(linear(hidden, head), column, column, uniform),
    )  # fmt: skip

    def flashinfer(sampling) -> Call:
        temperature = 1 / alpha
        return lambda: sampling.sampling_from_probs(sampling.softmax(linear(hidden, head), temperature=temperature))

    add_library(work, "linear + FlashInfer", "flashinfer.sampling", flashinfer, device)
    return work


def build_score(point: Point, device: torch.device) -> Workload:
    hidden, head, token, alpha, results = _inputs(point, device)
    rows, width, vocab = point.shape.values()
    column = alpha[:, None]
    workspace = torch.empty(pk.hidden_workspace_size(rows, vocab), device=device)
    work = Workload(
        {
            "score_from_hidden_out": lambda: pk.score_from_hidden_out(
                hidden, head, None, token, alpha, alpha, 0.0, 1.0, workspace, *results
            ),
            "score_from_hidden": lambda: pk.score_from_hidden(hidden, head, token, alpha, alpha),
            "linear alone": lambda: linear(hidden, head),
            "linear + score_tokens": lambda: pk.score_tokens(linear(hidden, head), token, alpha, alpha),
            "linear + eager": lambda: eager_score(linear(hidden, head), column, column, token[:, None]),
        },
        ours="score_from_hidden_out",
        yardstick="linear alone",
        bytes=head_bytes(rows, width, vocab, point.dtype.itemsize, 32),
        flops=2 * rows * width * vocab,
        count=rows,
        graph=frozenset({"score_from_hidden_out", "linear alone", "linear + score_tokens"}),
    )
    if device.type == "cpu" and (rows, width, vocab) == LARGE:
        # For its memory; the functional form, which allocates its workspace, once.
        work.contenders = {name: work.contenders[name] for name in ("score_from_hidden", "linear alone")}
        work.ours, work.once = "score_from_hidden", True
        return work
    add_compiled(
        work, point, "linear + torch.compile", log_probabilities,
        lambda fast: lambda: fast(linear(hidden, head), column, column, token[:, None]),
    )  # fmt: skip

    def liger(functional) -> Call:
        return lambda: functional.liger_fused_linear_cross_entropy(hidden, head, token, reduction="none")

    def cut(package) -> Call:
        return lambda: package.linear_cross_entropy(hidden, head, token, reduction="none")

    add_library(work, "Liger fused_linear_cross_entropy", "liger_kernel.transformers.functional", liger, device)
    add_library(work, "cut_cross_entropy", "cut_cross_entropy", cut, device)
    return work


SAMPLE = Suite(
    "sample_from_hidden",
    "Sampling from hidden states",
    "tokens",
    SAMPLE_FORMULA,
    ("sample_from_hidden_out", "sample_from_hidden", "linear alone", "linear + sample_tokens", "linear + eager"),
    sample_points,
    build_sample,
)
SCORE = Suite(
    "score_from_hidden",
    "Scoring from hidden states",
    "tokens",
    SCORE_FORMULA,
    ("score_from_hidden", "linear alone"),
    score_points,
    build_score,
)
