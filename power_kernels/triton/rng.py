"""Philox4x32-10 and its two 53-bit uniforms inside kernels (DESIGN section 4; the contract is power_kernels/rng.py).

    words    = philox4x32_10(counter = (c0, c1, c2, c3), key = (seed low, seed high))
    uniform0 = ((w0 >> 5) * 2**26 + (w1 >> 6)) * 2**-53        uniform1 the same of w2, w3

Every function takes scalars or vectors of counters. `tl.philox` selects Philox4x64 when its counters have 64 bits, so
the words are cast here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32_10(seed, c0, c1, c2, c3):
    """The four uint32 words of one block. seed: 64-bit integer; counters: integer tensors, taken modulo 2**32."""
    return tl.philox(
        seed,
        c0.to(tl.uint32),
        c1.to(tl.uint32),
        c2.to(tl.uint32),
        c3.to(tl.uint32),
    )


@triton.jit
def _uniform(high, low):
    # Both halves and their sum are exact in float64: 27 + 26 bits.
    return ((high >> 5).to(tl.float64) * 67108864.0 + (low >> 6).to(tl.float64)) * 1.1102230246251565e-16


@triton.jit
def uniforms(seed, c0, c1, c2, c3):
    """The two uniforms of one block, float64 in [0, 1)."""
    w0, w1, w2, w3 = philox4x32_10(seed, c0, c1, c2, c3)
    return _uniform(w0, w1), _uniform(w2, w3)
