"""A kernel that writes what power_kernels/triton/rng.py draws. Triton reads a kernel's source from its file."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from power_kernels.triton.rng import philox4x32_10, uniforms


@triton.jit
def _words_kernel(
    seed_ptr,  # i64 [1]
    counter_ptr,  # i32 [N, 4]
    word_ptr,  # i32 [N, 4]
    uniform_ptr,  # f64 [N, 2]
    N: tl.constexpr,
):
    row = tl.arange(0, N)
    seed = tl.load(seed_ptr)
    c0 = tl.load(counter_ptr + row * 4)
    c1 = tl.load(counter_ptr + row * 4 + 1)
    c2 = tl.load(counter_ptr + row * 4 + 2)
    c3 = tl.load(counter_ptr + row * 4 + 3)
    w0, w1, w2, w3 = philox4x32_10(seed, c0, c1, c2, c3)
    tl.store(word_ptr + row * 4, w0.to(tl.int32, bitcast=True))
    tl.store(word_ptr + row * 4 + 1, w1.to(tl.int32, bitcast=True))
    tl.store(word_ptr + row * 4 + 2, w2.to(tl.int32, bitcast=True))
    tl.store(word_ptr + row * 4 + 3, w3.to(tl.int32, bitcast=True))
    u0, u1 = uniforms(seed, c0, c1, c2, c3)
    tl.store(uniform_ptr + row * 2, u0)
    tl.store(uniform_ptr + row * 2 + 1, u1)


def words(seed: int, counters: np.ndarray, device: str) -> tuple[np.ndarray, np.ndarray]:
    """(words uint32 [N, 4], uniforms float64 [N, 2]) of counters uint32 [N, 4], N a power of two."""
    count = len(counters)
    word = torch.zeros(count, 4, dtype=torch.int32, device=device)
    uniform = torch.zeros(count, 2, dtype=torch.float64, device=device)
    _words_kernel[(1,)](
        torch.tensor([seed], device=device),
        torch.from_numpy(counters.view(np.int32)).to(device),
        word,
        uniform,
        N=count,
    )
    return word.cpu().numpy().view(np.uint32), uniform.cpu().numpy()
