"""The listed configurations that the package's own tests leave out, since the interpreter is slow or wrong there:
vocabularies beyond 262,144 entries, every dtype with and without 16-byte loads and entropy, by row and by slot, groups
of particles small and large, bfloat16 heads.

    python -m pytest -p tests.ptx.plugin tests/ptx/configurations.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import power_kernels as pk
from tests import test_sample_slots as slots
from tests import test_triton_kernels as kernels
from tests import test_triton_lm_head as heads
from tests import test_triton_particles as particles
from tests.op_helpers import assert_same_bits
from tests.ptx.machine import UNCHECKED
from tests.test_triton_kernels import sampling

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# 16-byte loads, and single entries; one tile and a rest, and more tiles than a finisher of 256 has
VOCABULARIES = [(1400, 0), (1401, 2), (262_208, 0), (262_147, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocabulary", "pad"), VOCABULARIES)
def test_sampling_and_scoring_agree_with_float64_in_every_dtype(dtype, vocabulary, pad):
    rows = 2 if vocabulary < 10_000 else 1
    logits = kernels.make_logits(rows, vocabulary, dtype, seed=vocabulary, pad=pad)
    last = vocabulary - 1
    logits[-1, last] = 30.0  # of the last tile
    exclude = None if pad else [last] * rows
    counters = kernels.make_counters(rows, vocabulary)
    got, _ = kernels.check_sample(logits, 4.0, 2.5, counters, exclude)
    plain = kernels.sample(sampling, logits, 4.0, 2.5, counters, exclude, entropy=False)
    assert all(torch.equal(got[k], plain[k]) for k in plain if plain[k] is not None)
    kernels.check_score(logits, [last] * rows, 4.0, 1.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocabulary", "pad"), VOCABULARIES)
def test_sampling_by_slot_is_sampling_bit_for_bit_in_every_dtype(dtype, vocabulary, pad):
    """A token is left out of one row of two; the other row is not ours where there are many entries."""
    few = vocabulary < 10_000
    kinds = [slots.Proposal(beta=2.0), slots.Proposal(exclude=vocabulary - 1, first=0)]
    slot, position, live = slots.vectors([1, 0 if few else -1], [4, 6])
    logits = kernels.make_logits(2, vocabulary, dtype, seed=vocabulary, pad=pad)
    logits[0, -1] = 30.0  # of the last tile
    ours = slice(0, 2 if few else 1)
    with pk.use_backend("triton"):
        want = slots.sampled(slots.table_of(kinds), logits[ours], slot[ours], position[ours])
        for entropy in (False, True):
            got = pk.sample_slots(slots.table_of(kinds), logits, slot, position, live, entropy=entropy)
            last = want.entropy if entropy else torch.zeros_like(want.entropy)
            columns = [got.token, *got.values.unbind(1), got.flags.int()]
            wanted = [want.token, want.logq, want.weight, last, want.status]
            assert_same_bits([column[ours] for column in columns], wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        dict(N=3, vocab=1400, stops=0.02, rho=0.1, groups=2),
        dict(N=16, vocab=1401, pad=2, groups=1),
        dict(N=40, vocab=1400, empty=0.9, spread=3.0, groups=1),  # the large finisher
    ],
    ids=["3 particles", "16 particles", "40 particles"],
)
def test_particles_branch_as_in_float64_in_every_dtype(dtype, options):
    particles.assert_as_the_reference(particles.position(options["N"], dtype=dtype, **options))


def check_head(hidden, head, **options):
    """As test_triton_lm_head.check, with twice its room: sums in order err more than torch's in blocks."""
    z = heads.exact_logits(hidden, head, options["bias"], options["softcap"], 1.0)
    naive = hidden.float() @ head.float().T + options["bias"].float()
    naive = options["softcap"] * torch.tanh(naive / options["softcap"])
    error = 4 * np.abs(naive.double().numpy() - z).max() + 2.0**-22 * np.abs(z).max()
    drawn = heads.sample(hidden, head, 4.0, 2.5, **options)
    stored = drawn["logits"].double().numpy()
    assert np.abs(stored - z).max() <= error
    heads.check_quantities(stored, drawn["token"], drawn, 4.0, 2.5, 0.0)
    tokens = torch.arange(len(hidden)) * 7
    heads.check_quantities(z, tokens, heads.score(hidden, head, tokens, 4.0, 2.5, **options), 4.0, 2.5, error)


@pytest.mark.parametrize(("rows", "width", "vocabulary", "pad"), [(3, 200, 300, 0), (3, 100, 300, 3)])
def test_bfloat16_heads_agree_with_float64(rows, width, vocabulary, pad):
    hidden, head = heads.make(rows, width, vocabulary, torch.bfloat16, pad)
    bias = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    check_head(hidden, head, bias=bias, softcap=30.0)


def test_a_head_of_more_tiles_than_a_finisher_of_1024(ptx_launcher, monkeypatch):
    """The tiles themselves are those of any head, and are not checked again."""
    monkeypatch.setitem(ptx_launcher.schedules_of, "_head_kernel", [UNCHECKED])
    heads.check(*heads.make(1, 1, 262_300, torch.float32))
