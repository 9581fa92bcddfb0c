"""A small ragged batch with a commit and a rollback, held to plain forward passes of the untouched model.

It finds what neither the configuration nor the probe can tell: attention that is not the registered one, positions or
masks of a model's own, a head that does more than its last layer.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from power_kernels.api.driver.engine import UnsupportedModelError
from power_kernels.api.engines.huggingface.decode_attention import DecodeView
from power_kernels.api.engines.huggingface.inspection import configured_context
from power_kernels.api.engines.huggingface.patched_model import patched, placed_on

# Root mean square error of the logits, relative to that of the centred logits. A wrong mask or position gives more than
# a half; rounding through the layers stays well below these.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}


def self_check(engine) -> None:
    """Compare ragged decoding, a commit and a rollback with plain forward passes; a few tokens each."""
    limit = min(engine._input_vocab, engine.vocab_size)
    ids = torch.randint(0, limit, (24,), generator=torch.Generator().manual_seed(0), device="cpu").tolist()
    short, long = ids[:3], ids[3:9]
    # What each row has been fed when it is looked at: then row 0 goes back to its prompt and takes
    # another way.
    after = [[*short, ids[9], ids[10]], [*long, ids[11], ids[12]]]
    again = [[*short, ids[9], ids[13]], [*long, ids[11], ids[12], ids[14]]]
    max_length = max(map(len, again))
    asked, own = engine.max_context, configured_context(engine.model.config)
    if own is not None and max(own, asked) < max_length:
        raise UnsupportedModelError(
            f"{type(engine.model).__name__} has a context of {max(own, asked)} positions; the self check takes "
            f"{max_length}. self_check=False goes without it"
        )

    def transfer(*ranges: list[tuple[int, int, int, int]]) -> None:
        engine.transfer(*(torch.tensor(rows, dtype=torch.int32, device=engine.device) for rows in ranges))

    try:
        got = []
        engine.max_context = None  # what the owner allows to a run may be less than the model is able to
        engine.begin(chains=2, lanes=1, max_length=max_length, alpha=1.0, beta=1.0, seed=0)
        engine.prefill([0, 1], [short, long])
        nothing = [(0, 0, 0, 0)] * 2
        transfer(nothing, [(0, 0, 0, len(short) - 1), (1, 1, 0, len(long) - 1)])
        for fed in range(3):
            at = [len(short) - 1 + fed, len(long) - 1 + fed]
            logits = decode_rows(engine, [after[r][at[r]] for r in range(2)], at)
            got += [(after[r][: at[r] + 1], logits[r]) for r in range(2)]
        transfer([(0, 0, len(short) - 1, len(short) + 1), (1, 1, len(long) - 1, len(long) + 1)], nothing)
        engine._slabs.clear(0, lanes_stop=max_length, chain_start=max_length, chain_stop=max_length)
        transfer(nothing, [(0, 0, 0, len(short) + 1), (1, 1, 0, 0)])
        at = [len(short) + 1, len(long) + 2]
        logits = decode_rows(engine, [again[r][at[r]] for r in range(2)], at)
        got += [(again[r][: at[r] + 1], logits[r]) for r in range(2)]
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(engine.model).__name__} failed the self check: {type(error).__name__}: {error}"
        ) from error
    finally:
        engine.end()
        engine.max_context = asked
    _compare(engine, got, max_length)


def compute_dtype(model: PreTrainedModel, cached: torch.dtype) -> torch.dtype:
    """The coarsest dtype that a model computes in: what its parameters have, its cache, its quantisation names.

    Products with quantised weights are in half precision at best, whatever dtype the parameters that were left alone
    have, and which kernel computes them depends on the number of rows.
    """
    dtypes = [model.dtype, cached]
    quantisation = getattr(model.config, "quantization_config", None)
    if quantisation is not None:
        named = quantisation if isinstance(quantisation, dict) else vars(quantisation)
        of_products = named.get("bnb_4bit_compute_dtype") or torch.float16
        dtypes += [torch.float16, getattr(torch, of_products) if isinstance(of_products, str) else of_products]
    known = [dtype if dtype in _TOLERANCE else torch.bfloat16 for dtype in dtypes]
    return max(known, key=_TOLERANCE.get)


def _compare(engine, got: list[tuple[list[int], torch.Tensor]], max_length: int) -> None:
    plain: dict[tuple[int, ...], torch.Tensor] = {}
    errors = []
    with placed_on(engine.device), patched(engine.model, max_length, attention=False), torch.inference_mode():
        for tokens, _ in sorted(got, key=lambda pair: -len(pair[0])):
            if not any(known[: len(tokens)] == tuple(tokens) for known in plain):
                full = torch.tensor([tokens], device=engine.device)
                plain[tuple(tokens)] = engine.model(input_ids=full, use_cache=False).logits[0]
    for tokens, logits in got:
        whole = next(known for known in plain if known[: len(tokens)] == tuple(tokens))
        reference = plain[whole][len(tokens) - 1].double()
        scale = (reference - reference.mean()).square().mean().sqrt()
        errors.append(((logits.double() - reference).square().mean().sqrt() / scale).item())
    # The median: in half precision one expert's tie may go the other way in one row of a mixture.
    errors.sort()
    dtype = compute_dtype(engine.model, engine._layout.dtype)
    worst = errors[-1] if dtype in (torch.float32, torch.float64) else errors[len(errors) // 2]
    tolerance = _TOLERANCE[dtype]
    if not engine._agreed(worst) <= tolerance:
        if not all(logits.isfinite().all() for logits in plain.values()):
            raise UnsupportedModelError(
                f"{type(engine.model).__name__} gives logits that are not finite, by itself, too: its weights are "
                f"broken, or {dtype} is too narrow for it"
            )
        _refuse_rows_that_depend_on_others(engine, tolerance)
        raise UnsupportedModelError(
            f"{type(engine.model).__name__} decodes differently through the ragged cache than by itself: "
            f"relative error {worst:.2g}, allowed {tolerance:.2g} for {dtype}. It uses "
            f"attn_implementation={engine.model.config._attn_implementation!r}; 'eager' is the plainest"
        )


def decode_rows(engine, tokens: list[int], positions: list[int]) -> torch.Tensor:
    """The logits [rows, V] of one decode step of the run that is on, a token a lane."""
    position = torch.tensor(positions, device=engine.device)
    view = DecodeView(position, max(positions) + 1, engine.attention)
    ids = torch.tensor(tokens, device=engine.device)[:, None]
    return engine._logits(engine._output(view, ids, position[:, None]))


def _refuse_rows_that_depend_on_others(engine, tolerance: float) -> None:
    """The reason that some models cannot pass, ragged cache or not: the same row has other logits in another batch.

    Dynamic quantisation does that where one scale is taken from the activations of the whole batch.
    """
    limit = min(engine._input_vocab, engine.vocab_size)
    ids = torch.randint(0, limit, (8, 6), generator=torch.Generator().manual_seed(1), device="cpu").to(engine.device)
    with placed_on(engine.device), patched(engine.model, ids.shape[1], attention=False), torch.inference_mode():
        alone = engine.model(input_ids=ids[:1], use_cache=False).logits[0].double()
        among = engine.model(input_ids=ids, use_cache=False).logits[0].double()
    scale = (alone - alone.mean(-1, keepdim=True)).square().mean().sqrt()
    difference = ((among - alone).square().mean().sqrt() / scale).item()
    if engine._agreed(difference) > tolerance:
        raise UnsupportedModelError(
            f"{type(engine.model).__name__}: a row's logits depend on its batchmates (relative difference "
            f"{difference:.2g} alone and among eight rows, allowed {tolerance:.2g}), as with dynamic quantisation "
            "whose scale is taken from the whole batch. There is then no p(x) of one answer to sample from; quantise "
            "weights only, or activations by row"
        )
