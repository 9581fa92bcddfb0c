"""The tests' own way of taking host tensors to a device (tests/devices.py), shown with the host as the device."""

from __future__ import annotations

import pytest
import torch

import power_kernels as pk
from power_kernels.ops import dispatch
from tests.devices import carried, copied_to, copy_back, on_device
from tests.op_helpers import assert_same_bits, counters, normal_logits, sample, score, strided

CPU = torch.device("cpu")


def layouts() -> dict[str, torch.Tensor]:
    z = torch.arange(60.0)
    return {
        "contiguous": z.view(6, 10),
        "padded, at an odd offset": strided(z.view(6, 10), pad=3, offset=1),
        "expanded": z[:10].expand(6, 10),
        "overlapping": z.as_strided((6, 10), (5, 1), 2),
        "transposed": z.view(6, 10).t(),
        "column": z.view(6, 10)[:, 3:4],
        "empty": z.view(6, 10)[:0],
        "no dimension": z[7],
        "bytes": torch.arange(60, dtype=torch.uint8)[3:33].view(3, 10),
        "float8": torch.arange(60, dtype=torch.uint8).view(torch.float8_e4m3fn)[5:],
        "bool": z.view(6, 10) > 7,
    }


@pytest.mark.parametrize("name", layouts())
def test_a_copy_has_the_values_strides_and_misalignment_of_its_original(name):
    original = layouts()[name]
    copy = copied_to(original, CPU)
    assert (copy.shape, copy.stride(), copy.dtype) == (original.shape, original.stride(), original.dtype)
    assert torch.equal(copy.float(), original.float())
    if original.numel():
        assert copy.data_ptr() != original.data_ptr()
        assert copy.data_ptr() % 64 == original.data_ptr() % 64


def test_what_lies_between_the_rows_travels_too_and_comes_back():
    original = strided(normal_logits(4, 7), pad=3, offset=1)
    copy = copied_to(original, CPU)
    between = (original.as_strided((3, 3), (10, 1), 8), copy.as_strided((3, 3), (10, 1), copy.storage_offset() + 7))
    assert all(b.isnan().all() for b in between)
    between[1][1, 1] = 5.0  # a stray write
    copy[2, 3] = -1.0
    copy_back(original, copy)
    assert original[2, 3] == -1.0
    assert between[0][1, 1] == 5.0


def test_meta_tensors_and_what_is_no_tensor_stay_as_they_are():
    for value in (None, 3, "text", torch.zeros(2, device="meta")):
        assert on_device(value, torch.device("cuda:0")) is value
    tensor = torch.zeros(2)
    assert on_device(tensor, CPU) is tensor


@pytest.fixture
def calls():
    """Every call carried, as on a GPU; and the tensors that reached the backend."""
    seen = []

    def watched(name, device, *arguments):
        seen.extend(a.data_ptr() for a in arguments if isinstance(a, torch.Tensor))
        dispatch.serve(name, device, *arguments)

    before = dispatch.set_runner(carried(watched, CPU))
    yield seen
    dispatch.set_runner(before)


def test_carried_calls_give_the_same_bits_and_never_touch_the_originals(calls):
    z = strided(normal_logits(3, 300))
    exclude = torch.tensor([5, -1, 9])
    with pk.use_backend("triton"):
        drawn, scored = sample(z, 4.0, 2.5, exclude=exclude), score(z, 7, 4.0, 2.5)
        dst, src = torch.zeros(2, 3, 1, 6, 4)[..., 1:], torch.randn(2, 3, 1, 6, 3)
        pk.kv_copy_ranges(dst, src, torch.tensor([[1, 0, 2, 5]], dtype=torch.int32))
    carried_ones = list(calls)
    assert len(carried_ones) > 20
    assert not {z.data_ptr(), exclude.data_ptr(), dst.data_ptr(), src.data_ptr(), drawn.token.data_ptr()} & set(calls)
    before = dispatch.set_runner(dispatch.serve)
    try:
        with pk.use_backend("triton"):
            assert_same_bits(sample(z, 4.0, 2.5, exclude=exclude), drawn)
            assert_same_bits(score(z, 7, 4.0, 2.5), scored)
    finally:
        dispatch.set_runner(before)
    assert torch.equal(dst[:, 1, :, 2:5], src[:, 0, :, 2:5])
    assert dst.count_nonzero() == src[:, 0, :, 2:5].numel()


def test_other_backends_are_not_carried(calls):
    words = counters(1)
    with pk.use_backend("reference"):
        sample(torch.zeros(1, 5), counter=words)
    assert words.data_ptr() in calls
