"""Is what serves here what was tested: one draw in each worker, and one through the whole server, before it is open."""

from __future__ import annotations

import math

import numpy as np
import torch

from power_kernels import reference, rng

ALPHA, BETA, SEED, SERIAL = 2.0, 1.0, 20, 3
PROMPT = [3, 1, 2]
WORKER = f"{__name__}.PowerWorker"
_NEAR = 0.5  # nats, between two forward passes of a model in half precision


class PowerWorker:
    """`--worker-extension-cls`: mixed into vLLM's workers, reached by `collective_rpc`."""

    def power_self_test(self) -> str | None:
        """What is wrong with a draw on this worker's device against the float64 reference; None if nothing is."""
        from power_kernels.api.engines.serving.proposal import Proposal
        from power_kernels.api.engines.serving.slots import SlotRows

        vocab, device = self.vllm_config.model_config.get_vocab_size(), self.device
        logits = 3 * np.random.default_rng(SEED).standard_normal((1, vocab)).astype(np.float32)
        rows = SlotRows(1, device, rows=1, vocab=vocab)
        rows.stage(
            0,
            Proposal(
                base=3, first=0, exclude=-1, serial=SERIAL, chain_id=0, prompt_id=0, horizon=9, stop_token=-1,
                seed=SEED, ends_early=False, alpha=ALPHA, beta=BETA, cumw=0.0, theta=-math.inf, length_bonus=0.0,
            ),
        )  # fmt: skip
        rows.flush()
        token, flags = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        values = torch.zeros(1, 3, device=device)
        slot, live = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, dtype=torch.bool, device=device)
        rows.draw(torch.from_numpy(logits).to(device), slot, slot + 3, live, token, values, flags)

        row = logits[0].astype(np.float64)
        uniform = float(rng.position_uniforms(SEED, [1], SERIAL, 0, 0)[0, 0])
        want = reference.draw_token(row, BETA, uniform, -1)
        of = reference.token_quantities(row, want, ALPHA, BETA)
        got = int(token), *values[0, :2].tolist(), int(flags)
        if got[0] != want or got[3] or max(abs(got[1] - of.logq), abs(got[2] - of.weight)) > 1e-4:
            return (
                f"token, logq, weight, flags are {got} on {device}; the reference has {(want, of.logq, of.weight, 0)}"
            )
        return None


async def check_workers(engine_client) -> None:
    """Raises RuntimeError where a worker's draw is not the reference's."""
    for rank, wrong in enumerate(await engine_client.collective_rpc("power_self_test")):
        if wrong is not None:
            raise RuntimeError(f"the self-test of worker {rank} has failed: {wrong}")


async def check_server(engine_client) -> None:
    """An answer of one token, whose weight and log p are known: at beta = 1 both are log p of vLLM's own.

    Raises RuntimeError where they are not.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    final = RequestOutputKind.FINAL_ONLY
    asked = {"alpha": ALPHA, "temperature": 1 / BETA, "mcmc_steps": 0}
    drawn = await _last(
        engine_client,
        PROMPT,
        SamplingParams(max_tokens=1, seed=SEED, ignore_eos=True, detokenize=False, output_kind=final, extra_args=asked),
    )
    told, reason = (drawn.kv_transfer_params or {}).get("power"), drawn.outputs[0].finish_reason
    if told is None or reason != "length":
        raise RuntimeError(
            f"the self-test drew no answer (it finished with {reason!r}): power_kernels must be installed where vLLM's "
            "workers run, and VLLM_PLUGINS must name power_kernels there"
        )
    token = drawn.outputs[0].token_ids[0]
    scored = await _last(
        engine_client,
        [*PROMPT, token],
        SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True, detokenize=False, output_kind=final),
    )
    logp = scored.prompt_logprobs[-1][token].logprob
    if max(abs(told["logp"] - logp), abs(told["log_weight"] - logp)) > _NEAR:
        raise RuntimeError(
            f"the self-test drew token {token} with log p {told['logp']} and weight {told['log_weight']}; "
            f"both must be {logp}, vLLM's own log p of it"
        )


async def _last(engine_client, prompt: list[int], params):
    outputs = engine_client.generate({"prompt_token_ids": prompt}, params, "power-self-test")
    return [output async for output in outputs][-1]
