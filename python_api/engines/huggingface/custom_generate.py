"""`model.generate(ids, custom_generate=power_sample, alpha=4.0, ...)`: power sampling behind the transformers call."""

from __future__ import annotations

import weakref

import torch

from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.sampler import PowerSampler
from power_kernels.api.engines.huggingface import HuggingFaceEngine
from power_kernels.errors import ArgumentError

# Stopping criteria that generate() adds by itself and that the chain already obeys.
_OBEYED = {"MaxLengthCriteria", "EosTokenCriteria"}

# Models that have passed the engine's self check. Engines are not kept: they hold their model, which may change.
_checked: weakref.WeakSet = weakref.WeakSet()


def power_sample(
    model,
    input_ids: torch.Tensor,
    logits_processor=None,
    stopping_criteria=None,
    generation_config=None,
    alpha: float = 4.0,
    block_size: int | None = 192,
    mcmc_steps: int = 10,
    final_steps: int = 0,
    proposal_temperature: float | None = None,
    early_rejection: bool = True,
    free_prefix: bool = True,
    lanes: int | None = None,
    cut: str = "uniform",
    compat: str | None = None,
    num_chains: int = 1,
    seed: int | None = None,
    max_chains: int = 16,
    power_results: list | None = None,
    **model_kwargs,
) -> torch.Tensor:
    """A decoding method for `transformers.GenerationMixin.generate` that draws from p(x)^alpha.

    Length and EOS come from the generation config. The parameters are those of `PowerConfig`, except
    proposal_temperature, its `temperature`: generate() keeps that name for itself.
    num_chains: answers per prompt, in consecutive rows (num_return_sequences works too, with do_sample=True, top_k=0).
    seed: None draws one from torch's generator, so that torch.manual_seed governs the call.
    power_results: a list that receives the `PowerResult` of each row.

    Returns int64 [B * num_chains, P + longest answer], right-padded, as generate() does.
    Raises ArgumentError for logits processors (the chain targets the model's own distribution: do_sample=True brings
    top_k=50 with it unless top_k=0 is passed) and for stopping criteria other than length and EOS.
    """
    if logits_processor:
        names = ", ".join(type(p).__name__ for p in logits_processor)
        raise ArgumentError(
            f"logits_processor holds {names}; power sampling draws from the model's own distribution, so none is "
            "allowed (no temperature, top_p or penalties; with do_sample=True pass top_k=0, since 50 is the default)"
        )
    others = [type(c).__name__ for c in stopping_criteria or () if type(c).__name__ not in _OBEYED]
    if others:
        raise ArgumentError(f"stopping_criteria holds {', '.join(others)}; only length and EOS are allowed")
    for name, value, only in (
        ("num_beams", generation_config.num_beams, (None, 1)),
        ("return_dict_in_generate", generation_config.return_dict_in_generate, (None, False)),
    ):
        if value not in only:
            raise ArgumentError(f"{name} is {value}; power sampling allows only {only[1]}")
    length = input_ids.shape[1]
    limit = generation_config.max_length - length
    if limit < 1:
        raise ArgumentError(
            f"max_length is {generation_config.max_length} with {length} prompt tokens; it must leave room for an "
            "answer"
        )
    config = PowerConfig(
        alpha=alpha,
        max_new_tokens=limit,
        block_size=block_size,
        mcmc_steps=mcmc_steps,
        final_steps=final_steps,
        temperature=proposal_temperature,
        early_rejection=early_rejection,
        free_prefix=free_prefix,
        lanes=lanes,
        cut=cut,
        compat=compat,
    )
    mask = model_kwargs.get("attention_mask")  # padding, the one thing in generate()'s own arguments that matters here
    mask = torch.ones_like(input_ids) if mask is None else mask
    prompts = [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]
    engine = HuggingFaceEngine(model, self_check=model not in _checked)
    _checked.add(model)
    eos = generation_config.eos_token_id
    results = PowerSampler(engine).generate(
        prompts,
        config,
        num_chains=num_chains,
        seed=int(torch.randint(2**62, ())) if seed is None else seed,
        eos_token_id=[] if eos is None else eos,
        max_chains=max_chains,
    )
    if power_results is not None:
        power_results.extend(results)
    padding = generation_config.pad_token_id
    if padding is None:
        padding = 0 if eos is None else eos if isinstance(eos, int) else eos[0]
    longest = max(len(result.tokens) for result in results)
    answers = input_ids.new_full((len(results), longest), padding)
    for row, result in zip(answers, results, strict=True):
        row[: len(result.tokens)] = torch.tensor(result.tokens, dtype=answers.dtype)
    return torch.cat([input_ids.repeat_interleave(num_chains, dim=0), answers], dim=1)
