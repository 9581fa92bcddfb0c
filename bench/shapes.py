"""Models to measure on: SmolLM2-135M, which is real, and the shapes of larger ones with random weights.

A shape is a transformers configuration, so that sizes, attention and rotary scheme are those of the published model;
the weights are drawn as transformers initialises them, on the device, and nothing is downloaded. The time of a step
does not depend on the values of weights. The course of a chain does: what is accepted, rejected early or kept for
nothing follows from the next-token distributions. Random weights give logits of a standard deviation of about one,
nearly uniform over the vocabulary, where 0.3 to 1.5 nats at temperature 1 are usual for real models. So the weight of
the final norm, which multiplies all logits alike (unlike the LM head it is never tied to the embedding), is scaled
until the mean entropy of the next token along sequences that the scaled model samples by itself is ENTROPY nats:
bisection in the logarithm of the scale (`calibrate`). The quantiles are reported. Entropies differ from place to place
as they do in real text, but neighbouring places know nothing of each other: acceptance rates are this model's own and
are printed beside every figure that depends on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import opponents
import torch
import transformers
from transformers import DynamicCache

# Nats, the mean at temperature 1 that the random models are scaled to. `python bench/shapes.py` measures a real one:
# SmolLM2-135M-Instruct has 2.3 nats on this folder's questions, much, as small models have that follow their own tail.
ENTROPY = 0.7
SMOLLM2 = "smollm2"


def _qwen2(**changes) -> transformers.PretrainedConfig:
    return transformers.Qwen2Config(
        **{
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": False,
            **changes,
        }
    )


def _phi3_mini() -> transformers.PretrainedConfig:
    """The factors of longrope are of the right number and regime; their values change no cost."""
    pairs = 3072 // 32 // 2
    return transformers.Phi3Config(
        vocab_size=32_064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=131_072,
        original_max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        sliding_window=262_144,
        tie_word_embeddings=False,
        pad_token_id=32_000,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0 + i / pairs for i in range(pairs)],
            "long_factor": [64.0 ** (i / (pairs - 1)) for i in range(pairs)],
            "original_max_position_embeddings": 4096,
            "factor": 131_072 / 4096,
        },
    )


def _tiny() -> transformers.PretrainedConfig:
    """For tests: every path in milliseconds on a CPU."""
    return _qwen2(
        vocab_size=199,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )


SHAPES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "qwen2.5-7b": _qwen2,
    "qwen2.5-math-7b": lambda: _qwen2(
        max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "phi-3.5-mini": _phi3_mini,
    "tiny": _tiny,
}
MODELS = (SMOLLM2, *SHAPES)


@dataclass(frozen=True)
class Entropy:
    """Nats of the next token at temperature 1 along sampled answers: mean and quantiles; scale of the final norm."""

    mean: float
    low: float  # 10 %
    median: float
    high: float  # 90 %
    scale: float
    tokens: int

    @staticmethod
    def of(values: torch.Tensor, scale: float) -> Entropy:
        low, median, high = values.flatten().quantile(torch.tensor([0.1, 0.5, 0.9], device=values.device)).tolist()
        return Entropy(float(values.mean()), low, median, high, scale, values.numel())

    def __str__(self) -> str:
        return (
            f"next-token entropy {self.mean:.2f} nats (10 % {self.low:.2f}, median {self.median:.2f}, 90 % "
            f"{self.high:.2f}) over {self.tokens} sampled tokens, final norm scaled by {self.scale:.3g}"
        )


@torch.inference_mode()
def sampled_entropies(model, prompts: torch.Tensor, tokens: int, seed: int = 0) -> torch.Tensor:
    """float32 [B, tokens]: entropy in nats of each next token of answers sampled at temperature 1.

    prompts: int64 [B, N], on the model's device.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    cache, feed, found = DynamicCache(), prompts, []
    for _ in range(tokens):
        logits = model(input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        logp = logits.log_softmax(-1)
        p = logp.exp()
        found.append(-(p * logp).sum(-1))
        feed = torch.multinomial(p, 1, generator=generator)
    return torch.stack(found, 1)


def calibrate(
    model, target: float = ENTROPY, *, prompts: int = 16, tokens: int = 64, tolerance: float = 0.1, seed: int = 0
) -> Entropy:
    """Scale the final norm so that the mean entropy of sampled answers is `target` nats, to `tolerance` of it.

    The first quarter of each answer is left out: it still depends on the prompt, which nobody sampled. Raises
    ValueError for a target that the model does not reach at any scale.
    """
    weight = model.get_decoder().norm.weight
    original = weight.detach().clone()
    start = random_prompts(model.config.vocab_size, [8] * prompts, seed)
    ids = torch.tensor(start, device=model.device)

    def at(scale: float) -> Entropy:
        with torch.no_grad():
            weight.copy_(original.float() * scale)
        return Entropy.of(sampled_entropies(model, ids, tokens, seed)[:, tokens // 4 :], scale)

    low = high = 1.0  # the entropy is above the target at `low` and below it at `high`
    found = at(1.0)
    factor = 2.0 if found.mean > target else 0.5
    while (found.mean - target) * (factor - 1) > 0 and 2**-20 < low <= high < 2**20:
        low, high = (high, high * factor) if factor > 1 else (low * factor, low)
        found = at(high if factor > 1 else low)
    for _ in range(20):
        if abs(found.mean - target) <= tolerance * target:
            return found
        middle = (low * high) ** 0.5
        found = at(middle)
        low, high = (middle, high) if found.mean > target else (low, middle)
    raise ValueError(f"no scale of the final norm gives a mean entropy of {target} nats; the last: {found}")


def random_prompts(vocab_size: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def random_model(name: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
    """A model of SHAPES with random weights, made on the device, in evaluation mode, without an end token."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(SHAPES[name](), dtype=dtype)
    opponents.without_eos(model)
    return model.eval()


@dataclass
class Subject:
    """A model to measure. plain: what the opponents run. sampler: a PowerSampler, on a model of its own where both
    fit easily (on a CPU). about: a line for people. entropy: None where the weights are real."""

    name: str
    about: str
    device: torch.device
    plain: torch.nn.Module
    sampler: object
    prompts: list[list[int]]
    entropy: Entropy | None


def subject(
    name: str, device: torch.device, prompts: int, questions: list[str], *, entropy: float = ENTROPY
) -> Subject:
    """The model `name` of MODELS with `prompts` prompts: of SmolLM2 the questions, as chats; of a shape random tokens,
    96 to 159 of them (a tiny one: 8 to 15)."""
    from power_kernels.api import PowerSampler
    from power_kernels.api.commands import packaged_model

    if name == SMOLLM2:
        directory = packaged_model.ensure_model()
        load = transformers.AutoModelForCausalLM.from_pretrained
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        plain = load(directory, dtype=dtype).eval().to(device)
        opponents.without_eos(plain)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        rows = [packaged_model.chat_prompt(tokenizer, question) for question in questions[:prompts]]
        own = load(directory, dtype=dtype).eval().to(device) if device.type == "cpu" else plain
        about = f"SmolLM2-135M-Instruct, {str(dtype).removeprefix('torch.')}"
        return Subject(name, about, device, plain, PowerSampler(own), rows, None)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    begin = time.perf_counter()
    model = random_model(name, device, dtype)
    small = name == "tiny"
    found = calibrate(model, entropy, prompts=4 if small else 16, tokens=32 if small else 64)
    count = sum(p.numel() for p in model.parameters())
    about = (
        f"{name}, random weights, {count / 1e9:.2f} G parameters, {str(dtype).removeprefix('torch.')}; {found}; "
        f"made in {time.perf_counter() - begin:.0f} s"
    )
    lengths = [(8 + i % 8) if small else (96 + 23 * i % 64) for i in range(prompts)]
    rows = random_prompts(model.config.vocab_size, lengths, seed=1)
    return Subject(name, about, device, model, PowerSampler(model), rows, found)


def device_of(name: str | None) -> torch.device:
    """The device that is asked for, a GPU where there is one otherwise. Raises RuntimeError where it is not there."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def main() -> None:
    """What real text has: SmolLM2 on the questions of this folder."""
    from common import QUESTIONS

    torch.set_num_threads(1)
    one = subject(SMOLLM2, torch.device("cpu"), len(QUESTIONS), QUESTIONS)
    values = [sampled_entropies(one.plain, torch.tensor([prompt]), 64, seed) for seed, prompt in enumerate(one.prompts)]
    print(f"{one.about}: {Entropy.of(torch.cat(values), 1.0)}")


if __name__ == "__main__":
    main()
