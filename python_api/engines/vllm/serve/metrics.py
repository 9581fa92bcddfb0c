"""What the chains did, in vLLM's own /metrics.

The engine core, where the chains are, is another process than the one that answers /metrics; `power-kernels serve` has
them share prometheus_client's files (`PROMETHEUS_MULTIPROC_DIR`).
"""

from __future__ import annotations

from prometheus_client import Counter

from power_kernels.api.driver.results import PowerResult
from power_kernels.state import Outcome

CHAINS = Counter(
    "power_kernels_chains",
    "Chains, by how they ended: eos, stop, length, fault, abort, error.",
    ["finish"],
)
STEPS = Counter("power_kernels_steps", "Metropolis-Hastings steps of chains that have ended, by outcome.", ["outcome"])
TOKENS = Counter(
    "power_kernels_tokens",
    "Tokens of chains, by cause. Forwarded: prefill (of prompts), recomputed (of prompts and answers, by "
    "later requests of a chain), extension, and proposals: accepted, rejected, voided. Not forwarded: cached (found in "
    "the prefix cache), saved_prefix (kept by a proposal). answer: of the answers themselves.",
    ["cause"],
)
REQUESTS = Counter("power_kernels_requests", "Requests of chains to the model: extensions and proposals.")


def count(result: PowerResult) -> None:
    CHAINS.labels(result.finish).inc()
    for outcome in Outcome:
        STEPS.labels(outcome.name.lower()).inc(sum(one is outcome for one in result.outcomes))
    for cause, tokens in causes(result).items():
        TOKENS.labels(cause).inc(tokens)


def causes(result: PowerResult) -> dict[str, int]:
    cost = result.cost
    return {
        "prefill": cost.prefill,
        "recomputed": cost.recomputed,
        "extension": cost.extension,
        "accepted": cost.accepted,
        "rejected": cost.rejected,
        "voided": cost.voided,
        "cached": cost.cached,
        "saved_prefix": cost.saved_prefix,
        "answer": cost.answer,
    }
