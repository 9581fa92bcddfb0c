"""Rows 2^31 entries into their storage (DESIGN 5): a 32-bit product of a row and its stride wraps, and a 32-bit stride
cannot hold the number at all. test_ops_backends.py has the same for the products of logits and caches.

On the host the storage is a sparse file, of which only the touched pages exist; on a device it is allocated, unfilled.
"""

from __future__ import annotations

import pytest
import torch

import power_kernels as pk
from tests.devices import DEVICE, ON_CUDA, on_device
from tests.op_helpers import BACKENDS, assert_same_bits, normal_logits, sample, score, serving
from tests.test_ops_contract import slot_arguments, slot_outputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, inside the interpreter


@pytest.fixture(params=BACKENDS)
def backend(request):
    with serving(request.param) as name:
        yield name


@pytest.fixture
def sparse(sparse):
    return (lambda entries, dtype: torch.empty(entries, dtype=dtype, device=DEVICE)) if ON_CUDA else sparse


def spread(rows: torch.Tensor, storage, stride: int) -> torch.Tensor:
    """The same rows, `stride` entries apart."""
    far = torch.as_strided(storage((len(rows) - 1) * stride + rows.shape[1], rows.dtype), rows.shape, (stride, 1))
    far.copy_(rows)
    return far


# 2^30 + 8: the stride fits 32 bits, twice the stride does not. 2^31 + 16: the stride itself does not fit; a multiple of
# 16 bytes, so that the vectors of the aligned kernels must be found too.
@pytest.mark.parametrize("stride", [2**30 + 8, 2**31 + 16])
def test_weights_of_far_rows_are_summed(backend, sparse, stride):
    generator = torch.Generator().manual_seed(stride % 1000)
    cur, prop = (-torch.rand(3, n, generator=generator).to(DEVICE) for n in (9, 13))
    lengths = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ((9, 1, 7), (13, 2, 8)))
    near = (cur, prop, *lengths, torch.tensor([-1.0, 0.0, -3.0], dtype=torch.float64, device=DEVICE))
    want = pk.mh_accept(*near)
    assert want.status.tolist() == [0, 0, 0]
    assert_same_bits(pk.mh_accept(spread(cur, sparse, stride), *near[1:]), want)
    assert_same_bits(pk.mh_accept(cur, spread(prop, sparse, stride), *near[2:]), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_rows_further_apart_than_32_bits_are_read_and_read_again(backend, sparse, dtype):
    """With exclusion, so that every read of the finisher is far too: the excluded tile, the drawn tile, one logit."""
    z = normal_logits(2, 2096, dtype)  # rows of whole 16 bytes
    far = spread(z, sparse, 2**31 + 16)
    assert_same_bits(sample(far, 4.0, 2.5, exclude=[2095, 3]), sample(z, 4.0, 2.5, exclude=[2095, 3]))
    assert_same_bits(score(far, [2095, 7]), score(z, [2095, 7]))


def test_logits_and_outputs_of_slots_further_apart_than_32_bits_are_found(backend, sparse):
    near, again = ([on_device(a) for a in slot_arguments(2, 2096)] for _ in range(2))
    want = pk.sample_slots(pk.SlotTable(*near[:4]), *near[4:], entropy=True)
    workspace, token, values, flags = (on_device(output) for output in slot_outputs(2, 2096))
    far, values = spread(again[4], sparse, 2**31 + 16), spread(values, sparse, 2**31 + 16)
    outputs = workspace, token, values, flags
    pk.sample_slots_out(pk.SlotTable(*again[:4]), far, *again[5:], *outputs, entropy=True)
    assert_same_bits([token, values, flags], want)


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_caches_whose_strides_take_64_bits_are_copied(backend, sparse, dimension):
    shape, strides = [2, 2, 2, 2, 16], [128, 64, 32, 16, 1]  # rows of 16 bytes: the aligned kernel
    strides[dimension] = 2**31 + 16
    source = torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)
    far = torch.as_strided(sparse(2**31 + 16 + 256, torch.int8), shape, strides)
    far.zero_()
    ranges = torch.tensor([[1, 0, 0, 2], [0, 1, 1, 2]], dtype=torch.int32, device=DEVICE)
    want = torch.zeros_like(source)
    want[:, 1], want[:, 0, :, 1:] = source[:, 0], source[:, 1, :, 1:]
    pk.kv_copy_ranges(far, source, ranges)
    assert torch.equal(far, want)
    back = torch.zeros_like(source)
    pk.kv_copy_ranges(back, far, torch.tensor([[i, i, 0, 2] for i in range(2)], dtype=torch.int32, device=DEVICE))
    assert torch.equal(back, want)


def test_an_acceptance_alone_and_inside_a_batch_has_the_same_bits(backend):
    """40 rows: more than one program of 32, and lanes of different lengths beside each other."""
    rows, width = 40, 21
    generator = torch.Generator().manual_seed(0)
    weights = [-3 * torch.rand(rows, width, generator=generator).to(DEVICE) for _ in range(2)]
    lengths = [torch.randint(1, width + 1, (rows,), generator=generator).to(DEVICE, torch.int32) for _ in range(2)]
    log_u = torch.rand(rows, generator=generator, dtype=torch.float64).log().to(DEVICE)
    arguments = (*weights, *lengths, log_u)
    whole = pk.mh_accept(*arguments)
    assert 5 <= int(whole.accept.sum()) <= rows - 5
    for i in range(rows):
        alone = pk.mh_accept(*(argument[i : i + 1] for argument in arguments))
        assert_same_bits(alone, [column[i : i + 1] for column in whole])
