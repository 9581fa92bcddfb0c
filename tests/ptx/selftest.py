"""The executor finds every fault that was planted, says nothing where there is none, and computes what PTX defines.

python -m pytest -p tests.ptx.plugin tests/ptx/selftest.py
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from tests.ptx import planted
from tests.ptx.launcher import ALL, OUTPUTS, Launcher
from tests.ptx.machine import SCHEDULES, launch

INDEPENDENT = {"independent lanes", "independent lanes, reverse"}
ONE = (SCHEDULES["in order"],)


def run(kernel, grid, *args, outputs=(), options=None, **meta):
    """Launch under every schedule; the faults that were found, by kind."""
    with pytest.MonkeyPatch.context() as patch, Launcher(**(options or {})) as launcher:
        patch.setitem(OUTPUTS, kernel.fn.__name__, dict.fromkeys(outputs, ALL))
        kernel[grid](*args, **meta)
    kinds = {}
    for f in launcher.findings.faults():
        kinds.setdefault(f.kind, []).append(f)
    return kinds


def ints(n, value=0):
    return torch.full((n,), value, dtype=torch.int32)


def without(number: int, pattern: str = r"bar\.sync"):
    """A change of PTX: the number-th instruction of a kind is taken out."""

    def change(ptx):
        at = [m.start() for m in re.finditer(rf"^\t{pattern}", ptx, re.M)][number]
        return ptx[:at] + ptx[ptx.index("\n", at) :]

    return change


def test_a_sound_kernel_is_silent_and_right():
    x, y = torch.arange(1000, dtype=torch.int32), ints(1000, -1)
    assert run(planted.sound, (8,), x, y, 1000, BLOCK=128) == {}
    assert torch.equal(y, 2 * x)


def test_an_access_past_the_end_is_out_of_bounds():
    x, y = torch.arange(100, dtype=torch.int32), ints(100)
    assert set(run(planted.past_the_end, (1,), x, y, 100, BLOCK=128)) == {"OUT_OF_BOUNDS"}
    assert "OUT_OF_BOUNDS" in run(planted.reads_past_the_end, (1,), x, y, 100, BLOCK=128)


def test_an_access_past_a_view_is_found_though_the_storage_goes_on():
    x, y = torch.arange(100, dtype=torch.int32), ints(128)
    assert set(run(planted.past_the_end, (1,), x, y[:100], 100, BLOCK=128)) == {"OUTSIDE_VIEW"}


def test_a_finding_names_the_line_of_the_kernel():
    found = run(planted.past_the_end, (1,), torch.arange(100, dtype=torch.int32), ints(100), 100, BLOCK=128)
    source = found["OUT_OF_BOUNDS"][0].source
    name, line = re.fullmatch(r"(planted\.py):(\d+)", source).groups()
    with open(planted.__file__) as file:
        assert "mask=i <= n" in file.readlines()[int(line) - 1], (name, source)


def test_a_missing_barrier_is_a_race_of_warps_that_reaches_the_result():
    x, y = ints(128), ints(128)
    assert run(planted.neighbours, (1,), x, y, 128, BARRIER=True, BLOCK=128, num_warps=4) == {}
    assert y.tolist() == [3 * (127 - i) for i in range(128)]
    found = run(planted.neighbours, (1,), ints(128), ints(128), 128, BARRIER=False, BLOCK=128, num_warps=4)
    assert {"RACE_WARPS", "RACY_STORE", "SCHEDULE_DIFFERS"} <= set(found)


def test_a_missing_barrier_in_one_warp_shows_where_its_lanes_run_by_themselves():
    assert run(planted.neighbours, (1,), ints(128), ints(128), 128, BARRIER=True, BLOCK=128, num_warps=1) == {}
    found = run(planted.neighbours, (1,), ints(128), ints(128), 128, BARRIER=False, BLOCK=128, num_warps=1)
    assert {"RACE_WARP", "SCHEDULE_DIFFERS"} <= set(found)
    assert set().union(*(f.schedules for f in found.get("RACY_STORE", []))) <= INDEPENDENT


def test_a_counter_read_by_many_is_a_race_and_harmful_only_where_many_use_it():
    y = ints(128)
    assert run(planted.counts_for_others, (1,), ints(4), y, BARRIER=True, BLOCK=128, num_warps=4) == {}
    found = run(planted.counts_for_others, (1,), ints(4), y, BARRIER=False, BLOCK=128, num_warps=4)
    assert {"RACE_WARPS", "RACY_STORE", "SCHEDULE_DIFFERS"} <= set(found)
    found = run(planted.counts_for_itself, (1,), ints(4), y, BLOCK=128, num_warps=4)
    assert "RACE_WARPS" in found
    assert not {"RACY_STORE", "RACY_ADDRESS", "RACY_BRANCH", "SCHEDULE_DIFFERS"} & set(found)


def test_a_branch_on_a_racy_value_is_found():
    found = run(planted.racy_branch, (1,), ints(4, 3), ints(128), BLOCK=128, num_warps=4)
    assert {"RACE_WARPS", "RACY_BRANCH", "SCHEDULE_DIFFERS"} <= set(found)


def test_blocks_that_write_the_same_bytes_race_unless_by_atomics():
    assert "RACE_BLOCKS" in run(planted.blocks_collide, (3,), ints(128), ATOMIC=False, BLOCK=128)
    y = ints(128)
    assert run(planted.blocks_collide, (3,), y, ATOMIC=True, BLOCK=128) == {}
    assert y.tolist() == [3] * 128


def test_outputs_are_undefined_until_written_and_must_be_written():
    y, z = ints(128), ints(128)
    assert "UNDEFINED_STORE" in run(planted.output_read_first, (1,), y, z, BLOCK=128, outputs=("y_ptr", "z_ptr"))
    assert run(planted.output_read_first, (1,), y, z, BLOCK=128, outputs=("z_ptr",)) == {}
    assert set(run(planted.one_left_out, (1,), y, 128, BLOCK=128, outputs=("y_ptr",))) == {"NOT_WRITTEN"}


def test_what_one_launch_leaves_undefined_is_undefined_for_the_next():
    y, z = ints(128), ints(128)
    with pytest.MonkeyPatch.context() as patch, Launcher() as launcher:
        patch.setitem(OUTPUTS, "one_left_out", {"y_ptr": ALL})
        planted.one_left_out[(1,)](y, 128, BLOCK=128)
        launcher.findings.clear()
        planted.sound[(1,)](y, z, 127, BLOCK=128)
        assert not launcher.findings.faults()
        planted.sound[(1,)](y, z, 128, BLOCK=128)
    assert {f.kind for f in launcher.findings.faults()} == {"UNDEFINED_STORE"}


def test_entries_that_are_marked_undefined_are_found_where_they_reach_a_result():
    x, y = torch.arange(128, dtype=torch.int32), ints(128)
    with Launcher() as launcher:
        launcher.mark_undefined(x, torch.arange(128) >= 64)
        planted.sound[(1,)](x, y, 64, BLOCK=128)
        assert not launcher.findings.faults()
        launcher.mark_undefined(x, torch.arange(128) >= 64)
        planted.sound[(1,)](x, y, 65, BLOCK=128)
    assert {f.kind for f in launcher.findings.faults()} == {"UNDEFINED_STORE"}


def test_a_vector_at_an_odd_address_is_misaligned():
    """As if the pointer had been declared aligned: the kernel is compiled for one that is."""
    x, y = torch.arange(516, dtype=torch.int32), ints(516)
    with Launcher() as launcher:
        planted.sound[(1,)](x[:512], y[:512], 512, BLOCK=512)
    (compiled,) = launcher.programs.values()
    assert any(".v4." in s.opcode for s in compiled.program.kernel.statements)
    arguments = [x[1:513], y[:512], 512]
    off = launch(compiled.program, (1,), ["x_ptr", "y_ptr", "n"], arguments, compiled.shared, ONE)
    assert "MISALIGNED" in {f.kind for f in off.findings.values()}


def test_an_integer_division_by_zero_is_found():
    x = torch.arange(1, 129, dtype=torch.int32)
    assert run(planted.divided, (1,), x, ints(128), BLOCK=128) == {}
    assert "DIVISION_BY_ZERO" in run(planted.divided, (1,), x - 5, ints(128), BLOCK=128)


def test_a_loop_without_an_end_is_given_up():
    schedule = dataclasses.replace(SCHEDULES["in order"], budget=1000)
    found = run(planted.racy_branch, (1,), ints(4, 1 << 30), ints(128), BLOCK=128, options={"schedules": [schedule]})
    assert {"HANG", "ABORTED"} <= set(found)


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
def test_scans_and_sums_are_exact_and_silent(warps):
    x, y = torch.randint(-50, 50, (512,), dtype=torch.int32), ints(512)
    assert run(planted.sums, (1,), x, y, BLOCK=512, num_warps=warps) == {}
    assert y.tolist() == (torch.cumsum(x, 0) + 1000 * x.sum()).tolist()


@pytest.mark.parametrize("warps", [2, 8])
def test_each_barrier_of_a_scan_through_shared_memory_is_needed(warps):
    x, y = torch.randint(-50, 50, (512,), dtype=torch.int32), ints(512)
    with Launcher(ONE) as launcher:
        planted.sums[(1,)](x, y, BLOCK=512, num_warps=warps)
    (compiled,) = launcher.programs.values()
    barriers = len(re.findall(r"^\tbar\.sync", compiled.ptx, re.M))
    assert barriers >= 2
    for number in range(barriers):
        found = run(planted.sums, (1,), x, y, options={"change_ptx": without(number)}, BLOCK=512, num_warps=warps)
        assert "RACE_WARPS" in found, number


def operands():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(4, 64, 64, generator=g).to(torch.float16) for _ in range(2)]


@pytest.mark.parametrize(("capability", "wait"), [(80, r"cp\.async\.wait_group"), (90, r"wgmma\.wait_group")])
def test_a_product_of_pipelined_tiles_is_right_and_a_missing_wait_is_found(capability, wait):
    a, b = operands()
    c = torch.zeros(64, 64)
    options = {"capability": capability, "schedules": ONE}
    with Launcher(**options) as launcher:
        planted.pipelined[(1,)](a, b, c, 4, M=64, K=64, num_warps=4)
    assert launcher.findings.faults() == []
    want = torch.einsum("smk,snk->mn", a.float(), b.float())
    torch.testing.assert_close(c, want, rtol=1e-5, atol=1e-4)
    (compiled,) = launcher.programs.values()
    waits = len(re.findall(rf"^\t{wait}", compiled.ptx, re.M))
    assert waits >= 1
    caught = 0
    for number in range(waits):
        changed = {**options, "change_ptx": without(number, wait)}
        caught += "ASYNC_PENDING" in run(planted.pipelined, (1,), a, b, c, 4, M=64, K=64, num_warps=4, options=changed)
    assert caught >= waits - 1  # the last wait of the pipeline may find nothing under way


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_on_tensor_cores_are_right(dtype):
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(32, 64, generator=g).to(dtype), torch.randn(64, 64, generator=g).to(dtype)
    c = torch.zeros(32, 64)
    assert run(planted.product, (1,), a, b, c, M=32, N=64, K=64, num_warps=4) == {}
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("noise", [0, 2])
def test_logarithm_exponential_and_division_of_doubles_are_numpys_to_an_ulp(noise):
    """Whatever the approximations err by that they begin with: their refinement is the compiler's."""
    g = np.random.default_rng(1)
    special = [1.0, 5e-324, 1e-310, 1.7e308, np.inf, np.nan, 0.5, 2.0, 3.0, 1 + 1e-15, 1 - 1e-16, 0.0]
    x = np.concatenate([np.exp(g.uniform(-700, 700, 500)), special])
    y = torch.zeros(3 * 512, dtype=torch.float64)
    with Launcher(ONE, noise):
        planted.doubles[(1,)](torch.from_numpy(x), y, BLOCK=512)
    log, exp, inverse = y.numpy().reshape(3, 512)
    with np.errstate(all="ignore"):
        np.testing.assert_array_max_ulp(log, np.log(x), 1)
        np.testing.assert_allclose(exp, np.exp(-x), rtol=3e-16, atol=5e-324)
        np.testing.assert_array_equal(inverse, 1 / x)


def test_sectors_are_counted_once_a_warp_instruction():
    """128 entries of 4 bytes lie in 16 sectors; every second in 32, every eighth and every ninth in one each."""
    for stride, sectors in ((1, 16), (2, 32), (8, 128), (9, 128)):
        with Launcher(ONE) as launcher:
            planted.strided[(1,)](torch.zeros(128 * 9, dtype=torch.int32), ints(128), stride, BLOCK=128)
        counts = launcher.counts["strided"]
        # torch's storages begin at multiples of 64 bytes
        assert (counts["sectors_read"], counts["sectors_written"]) == (sectors, 16), stride
