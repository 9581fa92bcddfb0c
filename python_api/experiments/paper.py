"""The paper's Table 1 as data, to be set beside a run's own.

Karan and Du (2025), "Reasoning with Sampling: Your Base Model is Smarter Than You Think", arXiv:2510.14901, Table 1:
alpha 4, 10 steps a block, 16 blocks of 192 tokens, 3072 new tokens. Shares of right answers; of AlpacaEval 2 the
length-controlled win rate in percent, which no run here has.
"""

from __future__ import annotations

SOURCE = "Karan & Du 2025 (arXiv:2510.14901), Table 1: alpha 4, 16 blocks of 192 tokens, 10 steps"
ARMS = ("base", "low temperature", "power", "GRPO")
TABLE_1 = {  # by benchmark and model, in the order of ARMS
    "math500": {
        "Qwen2.5-Math-7B": (0.496, 0.690, 0.748, 0.785),
        "Qwen2.5-7B": (0.498, 0.628, 0.706, 0.740),
        "Phi-3.5-mini": (0.400, 0.478, 0.508, 0.406),
    },
    "humaneval": {
        "Qwen2.5-Math-7B": (0.329, 0.512, 0.573, 0.537),
        "Qwen2.5-7B": (0.329, 0.524, 0.622, 0.561),
        "Phi-3.5-mini": (0.213, 0.585, 0.732, 0.134),
    },
    "gpqa": {
        "Qwen2.5-Math-7B": (0.278, 0.353, 0.389, 0.399),
        "Qwen2.5-7B": (0.278, 0.303, 0.318, 0.354),
        "Phi-3.5-mini": (0.273, 0.293, 0.364, 0.359),
    },
    "alpaca-eval": {
        "Qwen2.5-Math-7B": (1.61, 2.09, 2.88, 2.38),
        "Qwen2.5-7B": (7.05, 5.29, 8.59, 7.62),
        "Phi-3.5-mini": (14.82, 18.15, 17.65, 16.74),
    },
}


def benchmark_of(facts: dict) -> str | None:
    """Which of Table 1's a task is, by what config.json has of it; None for another."""
    if facts.get("benchmark") in TABLE_1:
        return facts["benchmark"]
    told = f"{facts.get('kind')} {facts.get('task', '')}"
    return next((benchmark for benchmark in TABLE_1 if benchmark in told), None)
