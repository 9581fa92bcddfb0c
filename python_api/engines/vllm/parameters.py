"""What a power-sampling request may ask of vLLM, and the sampling parameters of a proposal."""

from __future__ import annotations

from collections.abc import Sequence

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from power_kernels.api.engines.serving.proposal import KEY, Proposal
from power_kernels.errors import ArgumentError

ENTROPY = "power_entropy"  # beside the proposal in `SamplingParams.extra_args`: whether entropies are wanted
COLUMNS = 3  # of a reply: logq, weight, entropy

# What changes the distribution that tokens are drawn from, and its value where it does not. p is the model's own.
_NEUTRAL = {
    "n": (1,),
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
    "stop": (None, []),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "trace_decode_token_ids": (None,),
    "logprob_token_ids": (None,),
    "prompt_logprobs": (None,),
}
_WHY = {
    "n": "each answer is a chain of its own",
    "temperature": "the exponents of a power sample are alpha and beta",
    "stop": "a stop string closes an answer in the chain; vLLM would cut the text and leave the law as it was",
    "prompt_logprobs": "its columns carry the weights of a power sample",
    "logprob_token_ids": "its columns carry the weights of a power sample",
}


def check_exact(params: SamplingParams) -> None:
    """Refuse what would make a power sample inexact, before any work. Raises ArgumentError, naming all of it.

    `structured_outputs` is allowed: the mask is applied to the logits before our sampler sees them, and p is then the
    masked model.
    """
    wrong = [name for name, allowed in _NEUTRAL.items() if getattr(params, name, allowed[0]) not in allowed]
    if wrong:
        name = wrong[0]
        why = _WHY.get(name, "it would change the model's own probabilities, whose power is drawn")
        others = f" (and {', '.join(wrong[1:])})" if wrong[1:] else ""
        raise ArgumentError(
            f"{name} is {getattr(params, name)!r} in a power-sampling request{others}; "
            f"it must be {_NEUTRAL[name][0]!r}: {why}"
        )


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
