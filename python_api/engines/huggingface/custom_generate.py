"""`model.generate(ids, custom_generate=power_sample, alpha=4.0, ...)`: power sampling behind the transformers call."""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral

import torch

from power_kernels.api.driver.checks import integer
from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.sampler import PowerSampler
from power_kernels.api.driver.text import named
from power_kernels.api.engines.huggingface import HuggingFaceEngine
from power_kernels.api.engines.huggingface.adapters import Adapters
from power_kernels.api.engines.huggingface.generate_call import (
    GenerateCall,
    check_mask,
    check_model_kwargs,
    check_settings,
)
from power_kernels.api.engines.huggingface.patched_model import attention_configs
from power_kernels.errors import ArgumentError, ArgumentTypeError

# Stopping criteria that generate() adds by itself and that the chain already obeys.
_OBEYED = {"MaxLengthCriteria", "EosTokenCriteria", "StopStringCriteria"}

# Models that have passed the engine's self check: what they were like, and whether their head was known after it.
# Engines are not kept: they hold their model, which may change.
_checked: weakref.WeakKeyDictionary[torch.nn.Module, dict] = weakref.WeakKeyDictionary()


def _power_sample(
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
    stop_strings: str | Sequence[str] | None = None,
    tokenizer=None,
    length_bonus: float = 0.0,
    compat: str | None = None,
    kernel: str = "mh",
    particles: int = PowerConfig.particles,
    sweeps: int = PowerConfig.sweeps,
    sweep_cut: str = PowerConfig.sweep_cut,
    rho: float = PowerConfig.rho,
    num_chains: int = 1,
    seed: int | None = None,
    max_chains: int | None = None,
    power_results: list | None = None,
    streamer=None,
    **model_kwargs,
) -> torch.Tensor:
    """A decoding method for `transformers.GenerationMixin.generate` that draws from p(x)^alpha.

    Length and EOS come from the generation config. The parameters are those of `PowerConfig`, except
    proposal_temperature, its `temperature`, and stop_strings, its `stop`: generate() has these names for them.
    stop_strings: each closes an answer as EOS does (None takes the generation config's). They need `tokenizer`, the
    model's, and end the row with the token that completes one.
    num_chains: answers per prompt, in consecutive rows (num_return_sequences works too, with do_sample=True, top_k=0).
    seed: None draws one from torch's generator, so that torch.manual_seed governs the call.
    power_results: a list that receives the `PowerResult` of each row.
    streamer: gets the answer whole, once it is final, and its end; of one answer, as with generate() itself.

    Returns int64 [B * num_chains, P + longest answer], right-padded, as generate() does.
    Raises ArgumentError for every argument and setting of generate() that the chain does not follow
    (`generate_call.py`), naming it and what to pass instead: the target is the model's own distribution, so there are
    no logits processors (do_sample=True brings top_k=50 with it unless top_k=0 is passed), no stopping criteria but
    length, EOS and stop strings, and no inputs but token ids and their mask.
    """
    call = GenerateCall.current()
    streamer = call.streamer if streamer is None and call is not None else streamer
    with _ended(streamer):
        if call is None:  # else they were checked when generate() began
            check_model_kwargs(model_kwargs)
        check_settings(vars(generation_config))
        _check_hooks(logits_processor or (), stopping_criteria or ())
        num_chains = integer("num_chains is", num_chains, 1)
        prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
        _warn_of_two(generation_config.bos_token_id, prompts)
        if streamer is not None and len(prompts) * num_chains > 1:
            raise ArgumentError(
                f"a streamer is given with {len(prompts)} prompts and num_chains = {num_chains}; it takes one answer"
            )
        length = input_ids.shape[1]
        limit = generation_config.max_length - length
        if limit < 1:
            raise ArgumentError(
                f"max_length is {generation_config.max_length} with {length} prompt tokens; it must leave room for an "
                "answer"
            )
        stop = generation_config.stop_strings if stop_strings is None else stop_strings
        if stop and tokenizer is None:
            raise ArgumentTypeError(
                f"stop_strings is {stop!r} and there is no tokenizer; pass the model's as tokenizer"
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
            stop=stop or (),
            length_bonus=length_bonus,
            compat=compat,
            kernel=kernel,
            particles=particles,
            sweeps=sweeps,
            sweep_cut=sweep_cut,
            rho=rho,
        )
        checked, traits = _checked.setdefault(model, {}), _traits(model)
        engine = HuggingFaceEngine(model, self_check=traits not in checked)
        if checked.setdefault(traits, engine.head_known) != engine.head_known:
            engine = HuggingFaceEngine(model)  # it is the check that finds this head to be more than it seems
        eos = _list(generation_config.eos_token_id)
        results = PowerSampler(engine, tokenizer).generate(
            prompts,
            config,
            num_chains=num_chains,
            seed=int(torch.randint(2**62, (), device="cpu")) if seed is None else seed,
            eos_token_id=eos,
            max_chains=max_chains,
        )
        if streamer is not None and results[0].tokens:
            streamer.put(torch.tensor(results[0].tokens, device="cpu"))
    if power_results is not None:
        power_results.extend(results)
    # A negative id stands for none.
    padding = next((t for t in [*_list(generation_config.pad_token_id), *eos] if t >= 0), 0)
    longest = max(len(result.tokens) for result in results)
    answers = input_ids.new_full((len(results), longest), padding)
    for row, result in zip(answers, results, strict=True):
        row[: len(result.tokens)] = torch.tensor(result.tokens, dtype=answers.dtype, device=answers.device)
    return torch.cat([input_ids.repeat_interleave(num_chains, dim=0), answers], dim=1)


def _traits(model: torch.nn.Module) -> tuple:
    """What may change about a model so that the self check of before says nothing: the kinds of its layers and weights
    (quantisation replaces one or the other), where they are, the attention that they use, the active adapters."""
    layers = frozenset(map(type, model.modules()))
    tensors = (*model.parameters(), *model.buffers())
    weights = frozenset((type(tensor), tensor.dtype, tensor.device) for tensor in tensors)
    attention = tuple(config._attn_implementation for config in attention_configs(model))
    return layers, weights, attention, Adapters(model).active()


def _check_hooks(logits_processor, stopping_criteria) -> None:
    """Of those that the settings do not name: the user's own."""
    names = [type(processor).__name__ for processor in logits_processor]
    if names:
        raise ArgumentError(
            f"logits_processor holds {', '.join(names)}; power sampling draws from the model's own distribution, so "
            "none is allowed"
        )
    names = [type(c).__name__ for c in stopping_criteria if type(c).__name__ not in _OBEYED]
    if names:
        raise ArgumentError(
            f"stopping_criteria holds {', '.join(names)}; only length, EOS and stop strings are allowed"
        )


class _CheckedBeforeWork:
    """A decoding method whose call is checked as soon as generate() asks for its signature, before any other work.

    Later would be too late for a message that is right: generate() would have run another method for beams. It is also
    when the tokenizer of stop strings, which generate() does not pass on, can be had.
    """

    def __init__(self, method):
        functools.update_wrapper(self, method)

    def __call__(self, *arguments, **named):
        return self.__wrapped__(*arguments, **named)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.__wrapped__)
        call = GenerateCall.current()
        if call is not None:
            try:
                call.check(frozenset(signature.parameters))
            except ArgumentError:
                if call.streamer is not None:
                    call.streamer.end()
                raise
        return signature

    def __reduce__(self) -> str:
        return "power_sample"


power_sample = _CheckedBeforeWork(_power_sample)


@contextmanager
def _ended(streamer) -> Iterator[None]:
    """The streamer's end comes whatever happens: somebody waits for it in another thread."""
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()


def _prompts(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    """Without their padding."""
    if mask is None:
        return input_ids.tolist()
    check_mask(input_ids, mask)
    return [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]


def _warn_of_two(bos: int | None, prompts: list[list[int]]) -> None:
    twice = [i for i, prompt in enumerate(prompts) if bos is not None and prompt[:2] == [bos, bos]]
    if twice:
        warnings.warn(
            f"{named(twice)} begins with BOS twice, which no model was trained on: a text that had one was tokenized "
            "with another; add_special_tokens=False leaves that out",
            UserWarning,
            stacklevel=4,
        )


def _list(token_ids) -> list[int]:
    """Of a token id, of several or of none, as a generation config has them."""
    if isinstance(token_ids, torch.Tensor):
        token_ids = token_ids.tolist()
    return [] if token_ids is None else [token_ids] if isinstance(token_ids, Integral) else list(token_ids)
