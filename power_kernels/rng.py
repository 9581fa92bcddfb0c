"""The random-number contract (DESIGN section 4): counter-based Philox4x32-10, no state anywhere.

    key      = (seed & 0xffffffff, seed >> 32)
    counter  = (position, serial, chain_id, prompt_id << 3 | stream)
    words    = philox4x32_10(counter, key)                       # four uint32
    uniform0 = ((w0 >> 5) * 2**26 + (w1 >> 6)) * 2**-53          # 53 bits, in [0, 1)
    uniform1 = ((w2 >> 5) * 2**26 + (w3 >> 6)) * 2**-53

Position stream: uniform0 draws the token at that answer-relative position, uniform1 decides whether a proposal
keeps the current token there. Step stream (position 0): uniform0 draws the cut, uniform1 the acceptance, through
log(1 - uniform1) so that it is never log 0. Serial 0 is the extension; proposals are 1, 2, ... over the whole chain.

Particles (DESIGN 3.9) take the sweep in the place of the serial, 0 for the start. Particle stream: uniform0 draws the
survivors at that position, uniform1 the candidate that is kept. Sweep stream (position 0): uniform0 draws the cut,
uniform1 the selection.

The C++ backend (csrc/rng.h) and the Triton one (triton/rng.py) produce the same words; tests hold all three to the
Random123 known-answer vectors. Only the functions need numpy: the operators that take the constants work without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

STREAM_BITS = 3
STREAM_POSITION = 0
STREAM_STEP = 1
STREAM_PARTICLES = 2
STREAM_SWEEP = 3

MAX_PROMPT_ID = (1 << (32 - STREAM_BITS)) - 1

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_KEY_MASK = (1 << 64) - 1


def as_int64(seed: int) -> int:
    """The 64 bits of a seed as an int64 tensor holds them."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def philox4x32_10(counter: np.ndarray, seed: int | np.ndarray) -> np.ndarray:
    """Ten rounds of Philox4x32.

    counter: integers [..., 4], each word taken modulo 2**32. seed: 64-bit key (low word first), or an int64 array of
    keys that broadcasts with counter[..., 0].
    Returns uint32 [..., 4].
    """
    import numpy as np

    multiplier_0, multiplier_1, weyl_0, weyl_1, low, half = map(np.uint64, (*_MULTIPLIERS, *_WEYL, _MASK, 32))
    c = np.asarray(counter).astype(np.int64).astype(np.uint64) & low
    c0, c1, c2, c3 = (c[..., i] for i in range(4))
    key = np.uint64(seed & _KEY_MASK) if isinstance(seed, int) else seed.astype(np.uint64)
    key_0, key_1 = key & low, key >> half
    for _ in range(10):
        product_0 = c0 * multiplier_0
        product_1 = c2 * multiplier_1
        c0, c1, c2, c3 = (
            (product_1 >> half) ^ c1 ^ key_0,
            product_1 & low,
            (product_0 >> half) ^ c3 ^ key_1,
            product_0 & low,
        )
        key_0 = (key_0 + weyl_0) & low
        key_1 = (key_1 + weyl_1) & low
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniforms(counter: np.ndarray, seed: int | np.ndarray) -> np.ndarray:
    """The two uniforms of each block. counter, seed: as `philox4x32_10`. Returns float64 [..., 2] in [0, 1)."""
    import numpy as np

    words = philox4x32_10(counter, seed).astype(np.float64)
    high = np.floor(words[..., 0::2] / 32.0)
    low = np.floor(words[..., 1::2] / 64.0)
    return (high * 67108864.0 + low) * 2.0**-53


def counters(position, serial, chain_id, prompt_id, stream: int) -> np.ndarray:
    """Counter words for broadcastable integer arguments. Returns int64 [..., 4]."""
    import numpy as np

    words = np.broadcast_arrays(
        np.asarray(position, np.int64),
        np.asarray(serial, np.int64),
        np.asarray(chain_id, np.int64),
        (np.asarray(prompt_id, np.int64) << STREAM_BITS) | stream,
    )
    return np.stack(words, axis=-1) & _MASK


def position_uniforms(seed: int, position, serial, chain_id, prompt_id) -> np.ndarray:
    """(token uniform, keep uniform) of answer positions. Returns float64 [..., 2]."""
    return uniforms(counters(position, serial, chain_id, prompt_id, STREAM_POSITION), seed)


def step_uniforms(seed: int, serial, chain_id, prompt_id) -> np.ndarray:
    """(cut uniform, acceptance uniform) of Metropolis-Hastings steps. Returns float64 [..., 2]."""
    return uniforms(counters(0, serial, chain_id, prompt_id, STREAM_STEP), seed)


def particle_uniforms(seed: int, position, sweep, chain_id, prompt_id) -> np.ndarray:
    """(survivors' uniform, candidate's uniform) of answer positions. Returns float64 [..., 2]."""
    return uniforms(counters(position, sweep, chain_id, prompt_id, STREAM_PARTICLES), seed)


def sweep_uniforms(seed: int, sweep, chain_id, prompt_id) -> np.ndarray:
    """(cut uniform, selection uniform) of sweeps. Returns float64 [..., 2]."""
    return uniforms(counters(0, sweep, chain_id, prompt_id, STREAM_SWEEP), seed)
