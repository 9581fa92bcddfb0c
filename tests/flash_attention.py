"""A CPU kernel for torch's flash attention, which has none: by its contract to the letter, in float64.

What is tested with it is the description of the slab, lengths and windows that the operator gets, through torch's
dispatcher and schema, and what the engine does around it.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch


def flash_by_contract(
    query,  # [sum of queries, heads, dim]
    key,  # [T, kv_heads, dim], any strides but the last
    value,
    cum_seq_q,  # int32 [N + 1]
    cum_seq_k,  # int32 [N + 1]: where sequence n starts
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    seqused_k=None,  # int32 [N]: how many positions of sequence n there are
    alibi_slopes=None,
    block_table=None,
    num_splits=None,
):
    sequences = cum_seq_q.shape[0] - 1
    assert cum_seq_k.shape == (sequences + 1,)
    assert seqused_k.shape == (sequences,)
    for index in (cum_seq_q, cum_seq_k, seqused_k):
        assert index.dtype == torch.int32
        assert index.is_contiguous()
    assert (query.stride(-1), key.stride(-1), value.stride(-1)) == (1, 1, 1)
    assert key.shape == value.shape
    assert (dropout_p, is_causal, return_debug_mask) == (0.0, False, False)
    assert cum_seq_q.tolist() == list(range(sequences + 1))
    assert max_q == 1
    assert int(seqused_k.min()) >= 1
    assert int(seqused_k.max()) <= max_k
    group = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[1], sequences)
    for n in range(sequences):
        seen = slice(int(cum_seq_k[n]), int(cum_seq_k[n]) + int(seqused_k[n]))
        k, v = (x[seen].double().repeat_interleave(group, 1) for x in (key, value))
        score = torch.einsum("hd,khd->hk", query[n].double(), k) * scale
        lse[:, n] = score.logsumexp(-1)
        out[n] = torch.einsum("hk,khd->hd", score.softmax(-1), v).to(out.dtype)
    nothing = query.new_empty(0)
    return out, lse, nothing, nothing, nothing


@contextmanager
def on_the_host():
    """While it lasts, the operator works on CPU tensors."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash_by_contract, "CPU")
        yield
