"""What a power-sampling request may ask of SGLang, and the sampling parameters of a proposal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from power_kernels.api.engines.serving.proposal import ENTROPY, KEY, Proposal
from power_kernels.errors import ArgumentError

DRAWS = "power_draws"  # in a reply's meta_info: logq, weight, entropy and flags of each token

# Settings of SGLang under which draws could not be exact, or were not tested.
UNSUITABLE = {
    "speculative_algorithm": "drafts are verified by a rule that draws other tokens",
    "enable_watermark": "a watermark changes what is drawn",
    "dllm_algorithm": "the model must be autoregressive",
    "preferred_sampling_params": "they change the model's own probabilities",
    "enable_dp_attention": "it was not tested with power sampling",
    "enable_two_batch_overlap": "it was not tested with power sampling",
    "enable_pdmux": "it was not tested with power sampling",
}

_TOP_K_ALL = 1 << 30  # SGLang's own for no top-k

# What changes the distribution that tokens are drawn from, or what a request is told, and its value where it does not.
# p is the model's own. A grammar is allowed: its mask is applied before our sampler sees the logits, and p is then the
# model under that mask.
_NEUTRAL: dict[str, tuple] = {
    "temperature": (1.0,),
    "top_k": (_TOP_K_ALL, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "min_new_tokens": (0,),
    "logit_bias": (None, {}),
    "watermark": (None,),
    "n": (1,),
    "beam_width": (None, 1),
    "stop_strs": (None, [], ""),
    "stop_regex_strs": (None, [], ""),
    "ignore_eos": (False,),
}
_CHANGES_P = "it would change the model's own probabilities, whose power is drawn"
_WHY = {
    "n": "each answer is a chain of its own",
    "beam_width": "each answer is a chain of its own",
    "temperature": "the exponents of a power sample are alpha and beta",
    "stop_strs": "a stop string closes an answer in the chain; SGLang would cut the text and leave the law as it was",
    "stop_regex_strs": "SGLang would cut the text and leave the law as it was",
    "ignore_eos": "SGLang then looks at no stop token, and a rejected proposal would not end",
}
# Of the request itself: what SGLang's own sampler would do, which power-sampled rows do not pass through.
_NOT_DONE = {
    "custom_logit_processor": "it would not be called, and p would not be the model it makes",
    "return_logprob": f"the draws have their own log-probabilities, in meta_info[{DRAWS!r}]",
    "return_sampling_mask": "nothing is masked",
}
_SHOWN = {"stop_strs": "stop", "stop_regex_strs": "stop_regex"}  # as a caller wrote it


def check_exact(params) -> None:
    """Refuse what would make a proposal inexact, before any work. params: SGLang's `SamplingParams`. Raises
    ArgumentError, naming all of it."""
    wrong = [name for name, allowed in _NEUTRAL.items() if getattr(params, name) not in allowed]
    if wrong:
        first, *others = (_SHOWN.get(name, name) for name in wrong)
        beside = f" (and {', '.join(others)})" if others else ""
        raise ArgumentError(
            f"{first} is {getattr(params, wrong[0])!r} in a power request{beside}; it must be "
            f"{_NEUTRAL[wrong[0]][0]!r}: {_WHY.get(wrong[0], _CHANGES_P)}"
        )


def check_asked(request) -> None:
    """Refuse what would be left undone for a proposal. request: SGLang's `GenerateReqInput`, one or many at once, that
    it has brought into its usual form. Raises ArgumentError."""
    many = isinstance(request.sampling_params, list)
    for i, params in enumerate(request.sampling_params if many else [request.sampling_params]):
        if KEY not in (params.get("custom_params") or ()):
            continue
        for name, why in _NOT_DONE.items():
            value = getattr(request, name)
            value = value[i] if many and isinstance(value, list) else value
            if value:
                raise ArgumentError(f"{name} is {value!r} in a power request; it must be off: {why}")


def check_params(params) -> None:
    """`check_exact`, and what the proposal says, of a request that carries one; others pass. Raises ArgumentError or
    ArgumentTypeError."""
    arguments = params.custom_params
    if arguments and KEY in arguments:
        Proposal.from_dict(arguments[KEY])
        check_exact(params)


def proposal_params(proposal: Proposal, *, ends: Sequence[int], entropy: bool = False) -> dict[str, Any]:
    """The sampling parameters of a proposal. ends: the tokens that end its request, on top of the model's own, which
    SGLang cannot be told to pass over without passing over these. entropy: of every row."""
    return {
        "max_new_tokens": proposal.horizon - proposal.first,
        "temperature": 1.0,  # SGLang takes a model's own defaults for what is not said
        "top_k": -1,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(ends),
        "skip_special_tokens": False,
        "custom_params": {KEY: proposal.to_dict(), ENTROPY: entropy},
    }
