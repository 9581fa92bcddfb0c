"""What power sampling is compared with: plain generation, the published algorithm, a loop that keeps its KV
cache.

All three are written over plain transformers and torch, without anything of power_kernels, so that a mistake
of ours cannot hide in the thing we measure against.

Notation (DESIGN 2 and 3): p the base model, q = softmax(beta * logits) the proposal, w = alpha * log p - log
q the weight of a token, n the number of tokens of an answer, W the sum of its weights.

Token account. A token is *forwarded* when the model is run on its position, padding not counted. A prompt of
P tokens and an answer of T need P + T - 1: the last token drawn is never fed. `plain_forwarded` is that
number and the denominator of every "over plain" in the benchmark. What a method forwards is counted by a hook
on the model, not by the method, and the tests hold the hook against the closed forms below.

- plain:          P + T - 1
- published:      for K blocks of b tokens and S steps a block, (S + 1) * sum_k (P + k*b - 1): every proposal
                  feeds the prompt and the kept prefix again, so where it cuts makes no difference
- KV loop:        P + T - 1 for the extension, and one token for each token proposed
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache


class ForwardCounter:
    """Counts the positions a model is run on, from outside, while the context is open.

    tokens: positions of real tokens, known when the context has closed. rows: positions computed, padding included.
    calls: forward passes.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.tokens = self.rows = self.calls = 0
        self._masked: torch.Tensor | int = 0  # stays on the model's device: reading it would wait for each pass

    def _count(self, module, args, kwargs):
        ids = kwargs.get("input_ids")
        if ids is None:
            ids = args[0] if args else kwargs["inputs_embeds"]
        batch, length = ids.shape[:2]
        mask = kwargs.get("attention_mask")
        self.calls += 1
        self.rows += batch * length
        # A two-dimensional mask spans the whole sequence; its last `length` columns are the positions fed
        # now.
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            self._masked = self._masked + mask[:, -length:].sum()
        else:
            self.tokens += batch * length

    def __enter__(self) -> ForwardCounter:
        self._handle = self.model.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *exc) -> None:
        self._handle.remove()
        self.tokens += int(self._masked)
        self._masked = 0


@dataclass
class Run:
    """The answers of one call and what they cost.

    answers: token ids of each answer. logp: sum of base log-probabilities of each, nats (empty for plain
    generation). steps: MH steps made; accepted: those that changed the answer; unchanged: those that proposed
    it again. generated: tokens drawn, kept or not. forwarded: see the module's account; forwarded_rows
    includes padding.
    """

    answers: list[list[int]]
    logp: list[float] = field(default_factory=list)
    steps: int = 0
    accepted: int = 0
    unchanged: int = 0
    generated: int = 0
    forwarded: int = 0
    forwarded_rows: int = 0


def plain_forwarded(prompt_length: int, answer_length: int) -> int:
    """What drawing one answer forwards at the least: the prompt and the answer but its last token."""
    return prompt_length + answer_length - 1


@torch.inference_mode()
def log_probability(model, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """log p(answer | prompt) in nats, by one forward pass over both."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    logp = logits.double().log_softmax(-1)
    return float(logp.gather(1, ids[0, len(prompt) :, None]).sum())


def horizons(max_new_tokens: int, block_size: int | None) -> list[int]:
    """The lengths at which the stages end (DESIGN 3.1)."""
    block_size = block_size or max_new_tokens
    return [*range(block_size, max_new_tokens, block_size), max_new_tokens]


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _pad_id(model) -> int:
    pad = model.generation_config.pad_token_id
    return 0 if pad is None else pad


def without_eos(model) -> None:
    """Makes `generate` run to the length asked for, by taking the end token from the model's configuration.

    `min_new_tokens` would do so by forbidding the token, which is another model.
    """
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None


@torch.inference_mode()
def plain(
    model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 1.0, seed: int = 0
) -> Run:
    """transformers' own sampling of one answer a prompt, all prompts in one left-padded batch."""
    torch.manual_seed(seed)
    ids, mask = _left_padded(prompts, _pad_id(model))
    with ForwardCounter(model) as count:
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=_pad_id(model),
        )
    answers = out[:, ids.shape[1] :].tolist()
    return Run(answers, generated=sum(map(len, answers)), forwarded=count.tokens, forwarded_rows=count.rows)


def _generate_scored(model, tokens: list[int], length: int, alpha: float) -> tuple[list[int], list[float], list[float]]:
    """Continues `tokens` to `length` with `generate` at temperature 1 / alpha, from nothing but the tokens.

    Returns the new tokens, their log q and their alpha * log p.
    """
    ids = torch.tensor([tokens], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1 / alpha,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - len(tokens),
        pad_token_id=_pad_id(model),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    new = out.sequences[0, len(tokens) :]
    drawn = new[:, None]
    logq = torch.stack(out.scores)[:, 0].log_softmax(-1).gather(1, drawn)[:, 0]
    logp = torch.stack(out.logits)[:, 0].log_softmax(-1).gather(1, drawn)[:, 0]
    return new.tolist(), logq.tolist(), (alpha * logp).tolist()


@torch.inference_mode()
def published(
    model,
    prompt: Sequence[int],
    *,
    alpha: float,
    max_new_tokens: int,
    block_size: int,
    mcmc_steps: int,
    eos_token_id: int | None = None,
    seed: int = 0,
) -> Run:
    """The published algorithm (Karan & Du 2025, algorithm 1; DESIGN 3.2 `compat`), one chain, as it is
    published.

    After each block, mcmc_steps times: cut the answer at a uniform place, let `generate` write the suffix
    again at temperature 1 / alpha from prompt and prefix (no cache survives), compare the suffix sums of
    alpha * log p - log q, over the length both have. A proposal never grows beyond the current length, and an
    answer with an end token stops the chain after its block. top_k is off here; the published code samples
    from generate's default of 50.
    """
    torch.manual_seed(seed)
    rand = random.Random(seed)
    start = len(prompt)
    tokens, logq, target = list(prompt), [], []
    run = Run([])
    with ForwardCounter(model) as count:
        for horizon in horizons(max_new_tokens, block_size):
            new, new_logq, new_target = _generate_scored(model, tokens, start + horizon, alpha)
            tokens, logq, target = tokens + new, logq + new_logq, target + new_target
            run.generated += len(new)
            for _ in range(mcmc_steps):
                cut = rand.randrange(len(tokens) - start)
                new, new_logq, new_target = _generate_scored(model, tokens[: start + cut], len(tokens), alpha)
                overlap = slice(cut, cut + len(new))
                log_ratio = (
                    math.fsum(new_target) - math.fsum(new_logq) - math.fsum(target[overlap]) + math.fsum(logq[overlap])
                )
                run.steps += 1
                run.generated += len(new)
                if math.log(1 - rand.random()) <= log_ratio:
                    changed = tokens[start + cut :] != new
                    run.accepted += changed
                    run.unchanged += not changed
                    tokens = tokens[: start + cut] + new
                    logq, target = logq[:cut] + new_logq, target[:cut] + new_target
            answer = tokens[start:]
            if eos_token_id is not None and eos_token_id in answer:
                end = answer.index(eos_token_id) + 1
                tokens, target = tokens[: start + end], target[:end]
                break
    run.answers, run.logp = [tokens[start:]], [math.fsum(target) / alpha]
    run.forwarded, run.forwarded_rows = count.tokens, count.rows
    return run


def _generator(seed: int, serial: int) -> torch.Generator:
    """A generator of one proposal's own. torch's CPU generator reads 32 bits of the seed it is given, no
    more."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {serial}").getrandbits(32))


def _prefix_of(cache: DynamicCache, length: int) -> DynamicCache:
    """A cache of the first `length` positions. Views only: the first update of a layer concatenates into new
    memory, so the cache it was taken from stays whole, and a rejected proposal needs no restoring."""
    prefix = DynamicCache()
    for index, layer in enumerate(cache.layers):
        prefix.update(layer.keys[:, :, :length], layer.values[:, :, :length], index)
    return prefix


@torch.inference_mode()
def kv_loop(
    model,
    prompt: Sequence[int],
    *,
    alpha: float,
    max_new_tokens: int,
    block_size: int | None,
    mcmc_steps: int,
    early_rejection: bool = False,
    eos_token_id: int | None = None,
    seed: int = 0,
) -> Run:
    """One chain of the exact step (DESIGN 3.2) that keeps the KV cache of what it has, and no other economy.

    A proposal goes on from the cache of its prefix: it forwards one token for each token it draws (the token
    before the cut is fed again, for its logits). With early_rejection it stops as soon as it cannot be
    accepted any more (DESIGN 3.3). Each proposal draws from its own generator, so that both settings make the
    same chain.
    """
    start = len(prompt)
    beta = alpha
    tokens: list[int] = []
    weights: list[float] = []
    logps: list[float] = []
    cache = DynamicCache()
    serial = 0
    run = Run([])

    def write(prefix, prefix_weights, prefix_logps, kept: DynamicCache, horizon: int, generator, floor: float | None):
        """Continues to the horizon or the end token. None as tokens when the weights fell below the floor."""
        new, new_weights, new_logps = list(prefix), list(prefix_weights), list(prefix_logps)
        total = 0.0
        for weight in new_weights:
            total += weight
        sequence = [*prompt, *new]
        feed = sequence[kept.get_seq_length() :]
        while True:
            logits = (
                model(input_ids=torch.tensor([feed]), past_key_values=kept, use_cache=True, logits_to_keep=1)
                .logits[0, -1]
                .float()
            )
            p, q = logits.log_softmax(-1), (beta * logits).log_softmax(-1)
            token = int(torch.multinomial(q.exp(), 1, generator=generator))
            run.generated += 1
            logp = float(p[token])
            new.append(token)
            new_logps.append(logp)
            # For beta = alpha no weight is positive but for rounding, which would make early rejection
            # inexact.
            new_weights.append(min(0.0, alpha * logp - float(q[token])))
            total += new_weights[-1]
            closed = len(new) >= horizon or token == eos_token_id
            if floor is not None and total - math.log(len(new) + (not closed)) < floor:
                return None, None, None
            if closed:
                return new, new_weights, new_logps
            feed = [token]

    def score(some_weights: list[float]) -> float:
        total = 0.0
        for weight in some_weights:
            total += weight
        return total - math.log(len(some_weights))

    with ForwardCounter(model) as count:
        for horizon in horizons(max_new_tokens, block_size):
            extension = _generator(seed, -horizon)
            tokens, weights, logps = write(tokens, weights, logps, cache, horizon, extension, None)
            for _ in range(mcmc_steps):
                serial += 1
                generator = _generator(seed, serial)
                cut_uniform, accept_uniform = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
                cut = int(cut_uniform * len(tokens))
                floor = score(weights) + math.log(1 - accept_uniform)
                # The token before the cut is fed again, hence one position fewer than the prefix.
                proposed_cache = _prefix_of(cache, start + cut - 1)
                new, new_weights, new_logps = write(
                    tokens[:cut],
                    weights[:cut],
                    logps[:cut],
                    proposed_cache,
                    horizon,
                    generator,
                    floor if early_rejection else None,
                )
                run.steps += 1
                if new is not None and not score(new_weights) < floor:
                    run.accepted += new != tokens
                    run.unchanged += new == tokens
                    tokens, weights, logps, cache = new, new_weights, new_logps, proposed_cache
            if tokens[-1] == eos_token_id:
                break
    run.answers, run.logp = [tokens], [math.fsum(logps)]
    run.forwarded, run.forwarded_rows = count.tokens, count.rows
    return run
