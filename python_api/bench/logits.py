"""`sample_tokens` and `score_tokens`: rows of logits, read once.

Bytes: every logit once, B*V*itemsize, and the arguments and results of a row. Yardstick: torch.logsumexp of the same
tensor, one normaliser of the two and no token. Opponents:

    torch.compile   the same mathematics: both normalisers, a token by inverse CDF, logp, logq, weight
    eager           log_softmax, softmax, multinomial, gather: what one writes first
    eager, race     the token by an exponential race, which does not wait for the device as multinomial does
    FlashInfer      its softmax at the proposal's temperature and sampling_from_probs: a token and no log-probability
    vLLM            gumbel_sample, then compute_token_logprobs of the drawn token: logp alone, no logq, no weight
    Liger           its cross entropy of given tokens: logp alone
"""

from __future__ import annotations

import torch

import power_kernels as pk
from power_kernels.api.bench.harness import Call, Point, Suite, Workload
from power_kernels.api.bench.opponents import add_compiled, add_library

ALPHA, ODD_BETA = 4.0, 3.7  # powers of one exponential; a second exponential
VOCABULARY = 151_936  # Qwen2.5
VOCABULARIES = (32_000, 49_152, 128_256, VOCABULARY, 256_000)  # Llama 2, SmolLM2, Llama 3, Qwen2.5, Gemma 2
DTYPES = (torch.float32, torch.bfloat16)
COMPILED_ROWS = {"cpu": (1, 16), "cuda": (1, 64)}

SAMPLE_FORMULA = "B*V*itemsize + 48*B + 8: logits; alpha, beta, counter; token, logp, logq, weight, status; the seed"
SCORE_FORMULA = "B*V*itemsize + 32*B: logits; token, alpha, beta; logp, logq, weight, status"


def sample_bytes(rows: int, vocab: int, itemsize: int) -> int:
    return rows * (vocab * itemsize + (4 + 4 + 16) + (8 + 4 + 4 + 4 + 4)) + 8


def score_bytes(rows: int, vocab: int, itemsize: int) -> int:
    return rows * (vocab * itemsize + (8 + 4 + 4) + (4 + 4 + 4 + 4))


def points(op: str):
    def of(grid: str, device: str) -> list[Point]:
        if grid == "quick":
            sizes = [(1, VOCABULARY), (4, 32_000)]
        else:
            small = grid == "default" and device == "cpu"
            rows = (1, 4, 16, 64) if small else (1, 4, 16, 64, 256, 1024)
            middle = 16 if small else 64
            sizes = [(r, VOCABULARY) for r in rows] + [(middle, v) for v in VOCABULARIES if v != VOCABULARY]
        compiled = () if grid == "quick" else COMPILED_ROWS[device]
        return [
            Point(op, dtype, {"rows": r, "vocab": v}, v == VOCABULARY and r in compiled)
            for dtype in DTYPES
            for r, v in sizes
        ]

    return of


def normal_logits(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, vocab, generator=generator, device=device).mul_(3).to(dtype)


def log_probabilities(logits, alpha, beta, token):
    """logp, logq and weight of given tokens. logits [B, V]; alpha, beta, token [B, 1]."""
    z = logits.float()
    tempered = beta * z
    logp = z.gather(1, token) - z.logsumexp(-1, keepdim=True)
    logq = tempered.gather(1, token) - tempered.logsumexp(-1, keepdim=True)
    return logp, logq, alpha * logp - logq


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


def eager_sample(logits, alpha, beta):
    z = logits.float()
    logp = torch.log_softmax(z, -1)
    q = torch.softmax(beta * z, -1)
    token = torch.multinomial(q, 1)
    logp, logq = logp.gather(1, token), q.gather(1, token).log()
    return token, logp, logq, alpha * logp - logq


def eager_race(logits, alpha, beta):
    z = logits.float()
    q = torch.softmax(beta * z, -1)
    token = (q / torch.empty_like(q).exponential_()).argmax(-1, keepdim=True)
    logp = z.gather(1, token) - z.logsumexp(-1, keepdim=True)
    logq = q.gather(1, token).log()
    return token, logp, logq, alpha * logp - logq


def eager_score(logits, alpha, beta, token):
    z = logits.float()
    logp = torch.log_softmax(z, -1).gather(1, token)
    logq = torch.log_softmax(beta * z, -1).gather(1, token)
    return logp, logq, alpha * logp - logq


def build_sample(point: Point, device: torch.device) -> Workload:
    rows, vocab = point.shape["rows"], point.shape["vocab"]
    logits = normal_logits(rows, vocab, point.dtype, device)
    alpha, odd = (torch.full((rows,), value, device=device) for value in (ALPHA, ODD_BETA))
    column, uniform = alpha[:, None], torch.linspace(0.01, 0.99, rows, device=device)[:, None]
    seed = torch.ones(1, dtype=torch.int64, device=device)
    counter = torch.arange(4 * rows, dtype=torch.int32, device=device).view(rows, 4)
    workspace = torch.empty(pk.workspace_size(rows, vocab), device=device)
    token = torch.zeros(rows, dtype=torch.int64, device=device)
    logp, logq, weight = torch.empty(3, rows, device=device).unbind()
    status = torch.empty(rows, dtype=torch.int32, device=device)

    def sample_out(beta) -> Call:
        outputs = (token, logp, logq, weight, None, status)
        return lambda: pk.sample_tokens_out(logits, alpha, beta, seed, counter, None, workspace, *outputs)

    work = Workload(
        {
            "sample_tokens_out": sample_out(alpha),
            "sample_tokens_out, beta 3.7": sample_out(odd),
            "sample_tokens": lambda: pk.sample_tokens(logits, alpha, alpha, seed, counter),
            "torch.logsumexp": lambda: torch.logsumexp(logits, -1),
            "eager": lambda: eager_sample(logits, column, column),
            "eager, race": lambda: eager_race(logits, column, column),
        },
        ours="sample_tokens_out",
        yardstick="torch.logsumexp",
        bytes=sample_bytes(rows, vocab, point.dtype.itemsize),
        count=rows,
        graph=frozenset({"sample_tokens_out", "sample_tokens_out, beta 3.7", "torch.logsumexp", "eager, race"}),
    )
    arguments = (logits, column, column, uniform)
    add_compiled(work, point, "torch.compile", same_mathematics, lambda fast: lambda: fast(*arguments))
    temperature = 1 / alpha

    def flashinfer(sampling) -> Call:
        return lambda: sampling.sampling_from_probs(sampling.softmax(logits, temperature=temperature))

    def vllm(gumbel) -> Call:
        from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

        rows_of = torch.arange(rows, dtype=torch.int32, device=device)
        seeds = torch.zeros(rows, dtype=torch.int64, device=device)

        def run():
            drawn = gumbel.gumbel_sample(logits, rows_of, temperature, seeds, seeds, True, False)
            return drawn, compute_token_logprobs(logits, drawn[:, None])

        return run

    add_library(work, "FlashInfer softmax + sampling_from_probs", "flashinfer.sampling", flashinfer, device)
    add_library(work, "vLLM gumbel_sample + logprobs", "vllm.v1.worker.gpu.sample.gumbel", vllm, device)
    return work


def build_score(point: Point, device: torch.device) -> Workload:
    rows, vocab = point.shape["rows"], point.shape["vocab"]
    logits = normal_logits(rows, vocab, point.dtype, device)
    alpha, odd = (torch.full((rows,), value, device=device) for value in (ALPHA, ODD_BETA))
    column = alpha[:, None]
    token = (torch.arange(rows, device=device) * 7919) % vocab
    workspace = torch.empty(pk.workspace_size(rows, vocab), device=device)
    logp, logq, weight = torch.empty(3, rows, device=device).unbind()
    status = torch.empty(rows, dtype=torch.int32, device=device)

    def score_out(beta) -> Call:
        return lambda: pk.score_tokens_out(logits, token, alpha, beta, workspace, logp, logq, weight, None, status)

    work = Workload(
        {
            "score_tokens_out": score_out(alpha),
            "score_tokens_out, beta 3.7": score_out(odd),
            "score_tokens": lambda: pk.score_tokens(logits, token, alpha, alpha),
            "torch.logsumexp": lambda: torch.logsumexp(logits, -1),
            "eager": lambda: eager_score(logits, column, column, token[:, None]),
        },
        ours="score_tokens_out",
        yardstick="torch.logsumexp",
        bytes=score_bytes(rows, vocab, point.dtype.itemsize),
        count=rows,
        graph=frozenset({"score_tokens_out", "score_tokens_out, beta 3.7", "torch.logsumexp", "eager"}),
    )
    arguments = (logits, column, column, token[:, None])
    add_compiled(work, point, "torch.compile", log_probabilities, lambda fast: lambda: fast(*arguments))

    def vllm(logprob) -> Call:
        return lambda: logprob.compute_token_logprobs(logits, token[:, None])

    def liger(functional) -> Call:
        scratch = logits.clone()  # it writes its gradient where its input was
        return lambda: functional.liger_cross_entropy(scratch, token, reduction="none")

    add_library(work, "vLLM compute_token_logprobs", "vllm.v1.worker.gpu.sample.logprob", vllm, device)
    add_library(work, "Liger cross_entropy", "liger_kernel.transformers.functional", liger, device)
    return work


SAMPLE = Suite(
    "sample_tokens",
    "Sampling",
    "tokens",
    SAMPLE_FORMULA,
    ("sample_tokens_out", "sample_tokens", "torch.logsumexp", "eager", "eager, race"),
    points("sample_tokens"),
    build_sample,
)
SCORE = Suite(
    "score_tokens",
    "Scoring",
    "tokens",
    SCORE_FORMULA,
    ("score_tokens_out", "score_tokens", "torch.logsumexp", "eager"),
    points("score_tokens"),
    build_score,
)
