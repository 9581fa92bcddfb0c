"""What a power-sampling request may ask of vLLM, and the sampling parameters of a proposal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from power_kernels.api.engines.serving.proposal import COLUMNS, ENTROPY, KEY, Proposal
from power_kernels.errors import ArgumentError

# Settings of vLLM under which draws could not be exact, or were not tested.
UNSUITABLE = {
    "speculative_config": "drafts are verified by a rule that draws other tokens",
    "logits_processors": "they change the model's own probabilities",
    "enable_trace_replay": "it puts other tokens for those drawn",
    "return_sampling_mask": "there is no mask: p is the whole row",
    "enable_batch_sharded_sampling": "it was not tested with power sampling",
}

# What changes the distribution that tokens are drawn from, or takes the columns of a reply, and its value where it does
# not. p is the model's own.
NEUTRAL: dict[str, tuple] = {
    "temperature": (1.0,),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "min_tokens": (0,),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "trace_decode_token_ids": (None,),
    "logprob_token_ids": (None,),
    "prompt_logprobs": (None,),
}
_CHANGES_P = "it would change the model's own probabilities, whose power is drawn"

# Of a request that is one proposal; a chain of the server has `n` and `stop` (`serve/parameters.py`).
_PROPOSAL_NEUTRAL = NEUTRAL | {"n": (1,), "stop": (None, [])}
_PROPOSAL_WHY = {
    "n": "each answer is a chain of its own",
    "temperature": "the exponents of a power sample are alpha and beta",
    "stop": "a stop string closes an answer in the chain; vLLM would cut the text and leave the law as it was",
    "prompt_logprobs": "its columns carry the weights of a power sample",
    "logprob_token_ids": "its columns carry the weights of a power sample",
}


def check_neutral(
    params: SamplingParams, neutral: Mapping[str, tuple], why: Mapping[str, str], defaults: Mapping[str, Any]
) -> None:
    """Raises ArgumentError for a parameter that is none of its neutral values, and not the one that `defaults` has for
    requests which say nothing. Names all of them; why: reasons, where there is a better one."""
    wrong = []
    for name, allowed in neutral.items():
        value = getattr(params, name, allowed[0])
        if value not in allowed and not (name in defaults and value == defaults[name]):
            wrong.append(name)
    if wrong:
        name = wrong[0]
        others = f" (and {', '.join(wrong[1:])})" if wrong[1:] else ""
        raise ArgumentError(
            f"{name} is {getattr(params, name)!r} in a power request{others}; it must be {neutral[name][0]!r}: "
            f"{why.get(name, _CHANGES_P)}"
        )


def check_exact(params: SamplingParams) -> None:
    """Refuse what would make a proposal inexact, before any work: for those who send requests with a `Proposal` of
    their own. Raises ArgumentError, naming all of it.

    `structured_outputs` is allowed: the mask is applied to the logits before our sampler sees them, and p is then the
    masked model.
    """
    check_neutral(params, _PROPOSAL_NEUTRAL, _PROPOSAL_WHY, {})


def proposal_params(
    proposal: Proposal, *, ends: Sequence[int], pieces: bool = False, entropy: bool = False
) -> SamplingParams:
    """The sampling parameters of a proposal. ends: the tokens that end its request. pieces: deliver tokens as they are
    drawn, not the whole at its end. entropy: of every row."""
    return SamplingParams(
        max_tokens=proposal.horizon - proposal.first,
        ignore_eos=True,  # the model's own, which need not be this answer's
        stop_token_ids=list(ends),
        logprobs=COLUMNS - 1,  # one more comes: that of the token
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if pieces else RequestOutputKind.FINAL_ONLY,
        extra_args={KEY: proposal.to_dict(), ENTROPY: entropy},
        skip_clone=True,
    )
