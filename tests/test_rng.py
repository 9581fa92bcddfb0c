"""DESIGN section 4: one random-number contract in Python, C++ and Triton, and what it promises."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels import rng
from power_kernels.ops import dispatch
from tests.devices import DEVICE, ON_CUDA, host_only

# Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),  # digits of pi
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, 2**32, 2**63 - 1, 2**64 - 1, 0x0123456789ABCDEF]


def some_counters(count: int) -> np.ndarray:
    """Counters [count, 4] over the whole range of each word, its ends included."""
    words = np.random.default_rng(7).integers(0, 2**32, size=(count, 4), dtype=np.uint64)
    words[:4] = np.array([[0] * 4, [2**32 - 1] * 4, [2**31] * 4, [2**31 - 1] * 4])
    return words.astype(np.uint32)


def signed(seed: int) -> int:
    """The same 64 bits, as int64 holds them."""
    return seed - 2**64 if seed >= 2**63 else seed


# -----------------------------------------------------------------------------------------------------------
# Python, the specification


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_python_gives_the_published_words(counter, key, words):
    assert rng.philox4x32_10(np.array(counter), key[0] | key[1] << 32).tolist() == list(words)


def test_a_batch_of_counters_gives_the_words_of_each():
    counters = some_counters(64)
    together = rng.philox4x32_10(counters.reshape(8, 8, 4), 99).reshape(-1, 4)
    assert together.dtype == np.uint32
    assert all((rng.philox4x32_10(c, 99) == w).all() for c, w in zip(counters, together, strict=True))


def test_a_negative_seed_is_the_same_64_bits():
    counters = some_counters(16)
    for seed in SEEDS:
        assert (rng.philox4x32_10(counters, seed) == rng.philox4x32_10(counters, signed(seed))).all()


@pytest.fixture
def given_words(monkeypatch):
    """Makes `rng.uniforms` see words of our choice, since no known counter gives the extremes."""

    def give(*words: int) -> list[float]:
        monkeypatch.setattr(rng, "philox4x32_10", lambda counter, seed: np.array(words, np.uint32))
        return rng.uniforms(np.zeros(4), 0).tolist()

    return give


def test_uniforms_have_53_bits_and_never_reach_one(given_words):
    full, none = 0xFFFFFFFF, 0
    assert given_words(none, none, full, full) == [0.0, 1.0 - 2.0**-53]
    assert given_words(1 << 5, none, none, 1 << 6) == [2.0**-27, 2.0**-53]  # the last bit of each half
    assert given_words((1 << 5) - 1, (1 << 6) - 1, 1 << 31, none) == [0.0, 0.5]  # bits not used, the first bit
    # The acceptance takes log(1 - u): finite at both ends.
    assert np.isfinite(np.log(1.0 - np.array(given_words(full, full, none, none)))).all()


@host_only
def test_uniforms_are_uniform():
    """Kolmogorov-Smirnov over 2^17 draws of each uniform, their order and their low bits; p > 1e-5, fixed counters."""
    from scipy import stats

    position = np.arange(2**17)
    u = rng.position_uniforms(5, position, 3, 2, 1)
    for column in (u[:, 0], u[:, 1], (u[:, 0] * 2**27) % 1.0, (u[:, 1] * 2**27) % 1.0):
        assert stats.kstest(column, "uniform").pvalue > 1e-5
    assert abs(stats.pearsonr(u[:, 0], u[:, 1]).statistic) < 5 / 2**8.5
    assert abs(stats.pearsonr(u[1:, 0], u[:-1, 0]).statistic) < 5 / 2**8.5


def test_every_position_serial_chain_prompt_stream_and_seed_has_its_own_words():
    near = (0, 1, 2, 2**16, 2**31)
    grid = itertools.product(near, near, near, (0, 1, 2, rng.MAX_PROMPT_ID), (0, 1), (0, 1, 2**32, 2**63))
    seen = [
        rng.uniforms(rng.counters(position, serial, chain, prompt, stream), seed).tobytes()
        for position, serial, chain, prompt, stream, seed in grid
    ]
    assert len(set(seen)) == len(seen) == 5**3 * 4 * 2 * 4


def test_counter_words_are_position_serial_chain_and_prompt_with_stream():
    assert rng.counters(7, 6, 5, 4, rng.STREAM_POSITION).tolist() == [7, 6, 5, 32]
    assert rng.counters(0, 6, 5, 4, rng.STREAM_STEP).tolist() == [0, 6, 5, 33]
    assert rng.counters(0, 0, 0, rng.MAX_PROMPT_ID, rng.STREAM_STEP).tolist()[3] == 2**32 - 7
    # The published code's extensions use negative serials: they are the top of the same 32 bits.
    assert rng.counters(0, -1, 0, 0, 0).tolist()[1] == 2**32 - 1
    many = rng.position_uniforms(1, np.arange(3)[:, None], np.arange(4), 5, 6)
    assert many.shape == (3, 4, 2)
    assert (many[2, 3] == rng.position_uniforms(1, 2, 3, 5, 6)).all()
    assert (rng.step_uniforms(1, 3, 5, 6) == rng.uniforms(np.array([0, 3, 5, 6 << 3 | 1]), 1)).all()


# -----------------------------------------------------------------------------------------------------------
# C++


_CPP_PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "rng.h"
int main(int argc, char** argv) {
  using namespace power_kernels;
  for (int i = 1; i + 4 < argc; i += 5) {
    uint32_t c[4];
    for (int w = 0; w < 4; ++w) c[w] = static_cast<uint32_t>(std::strtoull(argv[i + 1 + w], nullptr, 10));
    const uint64_t seed = std::strtoull(argv[i], nullptr, 10);
    const Words words = philox4x32_10({{c[0], c[1], c[2], c[3]}}, seed);
    const Uniforms u = uniforms({{c[0], c[1], c[2], c[3]}}, seed);
    std::printf("%u %u %u %u %.17g %.17g\\n", words.w[0], words.w[1], words.w[2], words.w[3], u.u0, u.u1);
  }
}
"""


@pytest.fixture(scope="module")
def cpp(tmp_path_factory):
    """A function from (seed, counter) pairs to the (words, uniforms) of csrc/rng.h, compiled on its own."""
    if ON_CUDA:
        pytest.skip("host code: part of the CPU run")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    header = Path(__file__).parents[1] / "csrc" / "rng.h"
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    if not header.exists():
        pytest.skip("csrc is not beside the tests (an installed package)")
    folder = tmp_path_factory.mktemp("rng")
    (folder / "words.cpp").write_text(_CPP_PROGRAM)
    program = folder / "words"
    subprocess.run(
        [*compiler.split(), "-std=c++20", "-O1", f"-I{header.parent}", str(folder / "words.cpp"), "-o", program],
        check=True,
    )

    def words(pairs):
        arguments = [str(word) for seed, counter in pairs for word in (seed, *counter)]
        lines = subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout.splitlines()
        rows = [line.split() for line in lines]
        return [[int(w) for w in row[:4]] for row in rows], [[float(u) for u in row[4:]] for row in rows]

    return words


def test_cpp_gives_the_published_words(cpp):
    words, _ = cpp([(key[0] | key[1] << 32, counter) for counter, key, _ in KNOWN_ANSWERS])
    assert words == [list(expected) for _, _, expected in KNOWN_ANSWERS]


def test_cpp_words_and_uniforms_are_pythons_bit_for_bit(cpp):
    counters = some_counters(64)
    words, uniforms = cpp([(seed, c) for seed in SEEDS for c in counters.tolist()])
    assert words == [row for seed in SEEDS for row in rng.philox4x32_10(counters, seed).tolist()]
    assert uniforms == [row for seed in SEEDS for row in rng.uniforms(counters, seed).tolist()]


# -----------------------------------------------------------------------------------------------------------
# Triton


@pytest.fixture(scope="module")
def triton_words():
    """A function from a seed and counters [N, 4] to the (words [N, 4], uniforms [N, 2]) of triton/rng.py."""
    pytest.importorskip("triton", reason="triton is not installed on this machine")
    from tests import rng_kernel

    def words(seed: int, counters: np.ndarray):
        return rng_kernel.words(signed(seed), counters, DEVICE)

    return words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_triton_gives_the_published_words(triton_words, counter, key, words):
    found, _ = triton_words(key[0] | key[1] << 32, np.array([counter], np.uint32))
    assert found[0].tolist() == list(words)


@pytest.mark.parametrize("seed", SEEDS)
def test_triton_words_and_uniforms_are_pythons_bit_for_bit(triton_words, seed):
    counters = some_counters(64)
    words, uniforms = triton_words(seed, counters)
    assert (words == rng.philox4x32_10(counters, seed)).all()
    assert (uniforms == rng.uniforms(counters, seed)).all()


# -----------------------------------------------------------------------------------------------------------
# What the operators draw with


SHOWN = [("triton", 512)] if ON_CUDA else [("cpp", 512), ("reference", 32), ("triton", 6)]


@pytest.mark.parametrize(("backend", "rows"), SHOWN)
def test_a_uniform_row_of_equal_logits_shows_the_token_uniform(backend, rows):
    """2^16 equal logits: the CDF is a count, exact in float32, so the token is the uniform's first 16 bits."""
    if backend == "cpp" and dispatch.EXTENSION_MISSING:
        pytest.skip(dispatch.EXTENSION_MISSING)
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed on this machine")
    vocab, seed = 2**16, 2**64 - 3
    counters = some_counters(rows)
    logits = torch.zeros(1, vocab).expand(rows, vocab)
    one = torch.ones(rows)
    with pk.use_backend(backend):
        out = pk.sample_tokens(
            logits, one, one, torch.tensor([signed(seed)]), torch.from_numpy(counters.view(np.int32))
        )
    assert out.token.tolist() == np.floor(rng.uniforms(counters, seed)[:, 0] * vocab).astype(int).tolist()
