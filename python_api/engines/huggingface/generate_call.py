"""What a call of transformers' `generate()` asks for, and the refusal of what a chain does not follow.

Power sampling draws from p(x)^alpha of the model's own distribution and feeds the model nothing but token ids. Whatever
would change either is an error that names the argument, and so is an argument that would change nothing.

`generate()` gives a custom method less than it was given itself: neither the streamer nor the assistant nor the
tokenizer of stop strings, and among the model's arguments those of the user and those it made look alike. So the
arguments are read where they are, in its frame (`GenerateCall.current`), and that is done as early as it asks for the
method's signature (`custom_generate.py`). Where there is no such frame, the method checks what it can see.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, GenerationMixin

from power_kernels.errors import ArgumentError

# Settings that change what is drawn, or what is returned, each with the value that asks for nothing; None does, too.
_REFUSED = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "token_healing": False,
    "max_time": None,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "use_mtp": False,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "assistant_ensemble_weight": None,
    "speculation_type": None,
    "return_dict_in_generate": False,
}
# The same for settings that generate() obeys with do_sample=True alone. Without it they are an error only in a call:
# many a model's generation config sets them.
_SAMPLING = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
# Settings that mean nothing without one of those above, again an error only in a call.
_IDLE = {"length_penalty": 1.0, "early_stopping": False}
# What a call may say. The last line changes how generate() would compute, and never what.
_FOLLOWED = frozenset({
    "input_ids", "inputs", "attention_mask", "max_length", "max_new_tokens", "eos_token_id", "pad_token_id",
    "bos_token_id", "do_sample", "num_return_sequences", "stop_strings",
    "use_cache", "disable_compile", "logits_to_keep", "return_dict",
})  # fmt: skip
# Among a method's model_kwargs, what generate() puts there by itself.
_PREPARED = frozenset({"position_ids", "past_key_values", "cache_position"})

_HINTS = {
    "temperature": "the temperature of the proposals is proposal_temperature",
    "max_time": "a law that depends on the clock is none",
}


@dataclass(frozen=True)
class GenerateCall:
    """A call of `generate()`, as its caller made it. arguments: by name, those of the method among them."""

    model: Any
    generation_config: GenerationConfig | None
    arguments: Mapping[str, Any]
    streamer: Any

    @classmethod
    def current(cls) -> GenerateCall | None:
        """The innermost call of this thread, None where there is none."""
        code, frame = _GENERATE, sys._getframe(1)
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        if frame is None:
            return None
        found = frame.f_locals
        _give_back_tokenizer(found["kwargs"])
        named = (
            "inputs", "assistant_model", "prefix_allowed_tokens_fn", "negative_prompt_ids",
            "negative_prompt_attention_mask", "synced_gpus",
        )  # fmt: skip
        return cls(
            model=found["self"],
            generation_config=found["generation_config"],
            arguments={**found["kwargs"], **{name: found.get(name) for name in named}},
            streamer=found.get("streamer"),
        )

    def check(self, own: frozenset[str]) -> None:
        """Raises ArgumentError naming what the chain does not follow. own: names of the method's parameters."""
        given = {name: value for name, value in self.arguments.items() if name not in own}
        settings = getattr(GenerationConfig, "_get_default_generation_params", dict)()
        for config in (self.model.generation_config, self.generation_config):
            settings.update({} if config is None else _set(config))
        check_settings({**settings, **given}, given)
        check_inputs({name: v for name, v in given.items() if name not in _REFUSED and name not in _SAMPLING})
        ids = given["inputs"] if given["inputs"] is not None else given.get("input_ids")
        check_mask(ids, given.get("attention_mask"))


_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
_EXTRACT = getattr(inspect.unwrap(GenerationMixin._extract_generation_mode_kwargs), "__code__", None)


def _give_back_tokenizer(kwargs: dict[str, Any]) -> None:
    """generate() takes the tokenizer out of its arguments before it looks at what a custom method wants, and then drops
    it. While it does, it goes back among them, as any other argument that the method names.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _GENERATE:
        if frame.f_code is _EXTRACT:
            tokenizer = frame.f_locals.get("generation_mode_kwargs", {}).get("tokenizer")
            if tokenizer is not None:
                kwargs["tokenizer"] = tokenizer
        frame = frame.f_back


def _set(config: GenerationConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if value is not None}


def check_settings(settings: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> None:
    """Raises ArgumentError naming the settings that the chain does not follow, and what to pass instead.

    settings: all that are in force. given: those among them that the call itself names.
    """
    given = {} if given is None else given
    wrong = {name: value for name, value in _REFUSED.items() if _asks(settings, name, value)}
    sampling = {
        name: value
        for name, value in _SAMPLING.items()
        if _asks(settings, name, value) and (settings.get("do_sample") or name in given)
    }
    if not wrong and not sampling:
        return
    found = [f"{name}={_shown(settings[name])}" for name in (*sampling, *wrong)]
    ways = []
    if mine := [name for name in (*sampling, *wrong) if name in given]:
        ways.append(f"leave out {', '.join(mine)}")
    if theirs := [f"{name}={value}" for name, value in sampling.items() if name not in given]:
        ways.append(f"pass do_sample=False (or {', '.join(theirs)})")
    ways += [f"pass {name}={value}" for name, value in wrong.items() if name not in given]
    hints = [_HINTS[name] for name in (*sampling, *wrong) if name in _HINTS and (name in given or name in wrong)]
    raise ArgumentError(
        f"generate() is asked for {', '.join(found)}; power sampling draws from p(x)^alpha of the model's own "
        f"distribution and follows none of it: {', '.join(ways)}{''.join(f' ({hint})' for hint in hints)}"
    )


def check_inputs(given: Mapping[str, Any], prepared: frozenset[str] = frozenset()) -> None:
    """Raises ArgumentError naming arguments that are none of the chain's. prepared: names that are nobody's wish."""
    wrong = [
        name
        for name, value in given.items()
        if name not in _FOLLOWED and name not in prepared and value is not False and _asks(given, name, _IDLE.get(name))
    ]
    if wrong:
        raise ArgumentError(
            f"generate() is given {', '.join(wrong)}, which power sampling does not follow; the model is fed the ids "
            "that attention_mask keeps, and nothing else: leave it out"
        )


def check_mask(input_ids, attention_mask) -> None:
    """Raises ArgumentError for a mask of more or fewer tokens than there are. generate() drops one that is all ones."""
    if input_ids is None or attention_mask is None or attention_mask.shape == input_ids.shape:
        return
    raise ArgumentError(
        f"attention_mask has shape {list(attention_mask.shape)}; it must be that of input_ids, {list(input_ids.shape)}"
    )


def check_model_kwargs(model_kwargs: Mapping[str, Any]) -> None:
    """`check_inputs` where nobody knows what the user gave and what generate() prepared."""
    check_inputs(model_kwargs, _PREPARED)
    past = model_kwargs.get("past_key_values")
    if past is not None and past.get_seq_length() > 0:
        raise ArgumentError("past_key_values holds a past, which power sampling does not follow: leave it out")


def _asks(settings: Mapping[str, Any], name: str, nothing: Any) -> bool:
    value = settings.get(name)
    return value is not None and (nothing is None or value != nothing)


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
