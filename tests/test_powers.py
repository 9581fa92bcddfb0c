"""Integer beta: the kernels take powers of exp(z - m) up to 16 and a second exponential beyond (DESIGN 5)."""

from __future__ import annotations

import pytest
import torch

from tests.op_helpers import BACKENDS, assert_sample, assert_score, counters, normal_logits, sample, score, serving

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, inside the interpreter


@pytest.fixture(params=BACKENDS)
def backend(request):
    with serving(request.param) as name:
        yield name


def test_every_integer_beta_to_17_is_that_power(backend):
    """One row an exponent: every pattern of bits that squaring takes apart, the last power, the first beyond. Logits
    so flat that all of the tile counts in the sum of the highest power, which a wrong factor anywhere would change."""
    beta = torch.arange(1.0, 18.0)
    z, words = normal_logits(17, 300, scale=0.3), counters(17)
    out = sample(z, beta, beta, words)
    assert_sample(z, beta, beta, words, None, out)
    assert_score(z, out.token, beta, beta, score(z, out.token, beta, beta))
    assert_score(z, out.token, 17.0, beta, score(z, out.token, 17.0, beta))
