"""Small Triton kernels with one fault each, and sound ones that must stay silent (selftest.py)."""

import triton
import triton.language as tl


@triton.jit
def sound(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def past_the_end(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i <= n)


@triton.jit
def reads_past_the_end(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i) * 2, mask=i < n)


@triton.jit
def neighbours(x_ptr, y_ptr, n, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Each entry is written by one thread and read by another."""
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, i * 3, mask=i < n)
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + i, tl.load(x_ptr + (BLOCK - 1 - i), mask=i < n), mask=i < n)


@triton.jit
def counts_for_others(x_ptr, y_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """A counter that thread 0 raises and every thread uses."""
    old = tl.load(x_ptr)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr, old + 1)
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, i + old)


@triton.jit
def counts_for_itself(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """The same, but only thread 0 uses what it read."""
    tl.store(x_ptr, tl.load(x_ptr) + 1)
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, i)


@triton.jit
def racy_branch(x_ptr, y_ptr, BLOCK: tl.constexpr):
    n = tl.load(x_ptr)
    tl.store(x_ptr, n + 1)
    i = tl.arange(0, BLOCK)
    while n > 0:
        tl.atomic_add(y_ptr + i, 1)
        n -= 1


@triton.jit
def blocks_collide(y_ptr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if ATOMIC:
        tl.atomic_add(y_ptr + i, 1, sem="relaxed")
    else:
        tl.store(y_ptr + i, tl.load(y_ptr + i) + 1)


@triton.jit
def output_read_first(y_ptr, z_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    z = tl.load(y_ptr + i)
    tl.store(y_ptr + i, i)
    tl.store(z_ptr + i, z)


@triton.jit
def one_left_out(y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, i, mask=i < n - 1)


@triton.jit
def sums(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.cumsum(x, 0) + tl.sum(x, 0) * 1000)


@triton.jit
def doubles(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """log, exp and division in float64, next to each other."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.log(x))
    tl.store(y_ptr + BLOCK + i, tl.exp(-x))
    tl.store(y_ptr + 2 * BLOCK + i, 1.0 / x)


@triton.jit
def product(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b.T))


@triton.jit
def pipelined(a_ptr, b_ptr, c_ptr, steps, M: tl.constexpr, K: tl.constexpr):
    """A sum of products whose operands arrive by asynchronous copies."""
    m, k = tl.arange(0, M), tl.arange(0, K)
    at = m[:, None] * K + k[None, :]
    total = tl.zeros((M, M), tl.float32)
    for step in range(steps):
        a = tl.load(a_ptr + step * M * K + at)
        b = tl.load(b_ptr + step * M * K + at)
        total = tl.dot(a, b.T, total)
    tl.store(c_ptr + m[:, None] * M + m[None, :], total)


@triton.jit
def strided(x_ptr, y_ptr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One 4-byte entry of every STRIDE: as many sectors as its entries touch."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + STRIDE * i))


@triton.jit
def divided(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, 100 // x)
