"""`mh_advance` of Triton on answers that several warps and several blocks hold, launch by launch against C++."""

from __future__ import annotations

from collections import Counter

import pytest

import power_kernels as pk
from tests.devices import ON_CUDA
from tests.long_answers import CASES, KINDS, assert_launch, telling

EACH = 20 if ON_CUDA else 1
# A second of the interpreter each; a device makes all of them.
CHOSEN = tuple(CASES) if ON_CUDA else (
    "two blocks, sixteen lanes", "divergence by entropy, three lanes", "the published code, four lanes",
)  # fmt: skip


def by_triton(state, *arguments):
    with pk.use_backend("triton"):
        pk.mh_advance(state, *arguments)
    return state


@pytest.mark.parametrize("name", CHOSEN)
def test_triton_advances_chains_of_long_answers_as_the_other_backend_does(name):
    """H = 400, blocks of 128. Of each kind of `KINDS`, which say how long, one launch; on a device 20."""
    made = Counter()
    for launch in telling(name, EACH):
        # A GPU's log errs by up to an ulp, and theta is a sum that may cancel.
        assert_launch(launch, by_triton, theta=1e-13 if ON_CUDA else 1e-15)
        made.update(launch.kinds)
    assert all(made[kind] >= EACH for kind in KINDS.keys() - CASES[name].lacks)
