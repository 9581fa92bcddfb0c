"""Block tables with reference counts, and the copy of split blocks, on every backend (DESIGN 5.7)."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import power_kernels as pk
from power_kernels.block_tables import BlockStatus, BlockTables
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.ops import paged_kv as family
from tests.devices import host_only
from tests.op_helpers import BACKENDS, serving

OK, OUT = BlockStatus.OK, BlockStatus.OUT_OF_BLOCKS


@pytest.fixture(params=BACKENDS)
def backend(request):
    with serving(request.param) as name:
        yield name


def int32(values) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32)


def audit(tables: BlockTables) -> None:
    """Every block is accounted for: counted as often as rows hold it, or in the free list once."""
    held = Counter()
    for row, tokens in zip(tables.block_table.tolist(), tables.length.tolist(), strict=True):
        blocks = row[: math.ceil(tokens / tables.block_size)]
        assert len(set(blocks)) == len(blocks), "a row holds a block twice"
        held.update(blocks)
    counts = tables.refcount.tolist()
    assert counts == [held[block] for block in range(len(counts))], "a reference count is wrong"
    free = tables.free_list[: int(tables.free_count)].tolist()
    assert sorted(free) == [b for b, count in enumerate(counts) if count == 0], "a block leaked or is free twice"


# ---------------------------------------------------------------------------------------------------------------
# what each operator does


def test_a_fork_shares_full_blocks_and_copies_the_split_one(backend):
    tables = BlockTables.allocate(rows=3, max_blocks=4, num_blocks=8, block_size=3)
    pk.block_table_extend(tables, int32([8, 0, 0]))
    assert tables.block_table[0, :3].tolist() == [0, 1, 2]
    pk.block_table_fork(tables, int32([-1, 0, 0]), int32([0, 7, 6]))
    assert tables.status.tolist() == [OK] * 3
    assert tables.length.tolist() == [8, 7, 6]
    assert tables.block_table[1, :3].tolist() == [0, 1, 3]  # 7 tokens: two full blocks and one position
    assert tables.block_table[2, :2].tolist() == [0, 1]  # 6 tokens: nothing is split
    assert tables.copies.tolist() == [[0] * 4, [3, 2, 0, 1], [0] * 4]
    assert tables.refcount.tolist() == [3, 3, 1, 1, 0, 0, 0, 0]
    audit(tables)


def test_a_commit_swaps_without_a_copy_and_frees_what_only_the_old_answer_held(backend):
    tables = BlockTables.allocate(rows=2, max_blocks=4, num_blocks=8, block_size=3)
    pk.block_table_extend(tables, int32([8, 0]))
    pk.block_table_fork(tables, int32([-1, 0]), int32([0, 4]))
    pk.block_table_extend(tables, int32([-1, 11]))
    proposal = tables.block_table[1].tolist()
    assert proposal == [0, 3, 4, 5]
    pk.block_table_commit(tables, int32([1, -1]))
    assert tables.status.tolist() == [OK] * 2
    assert tables.block_table[0].tolist() == proposal
    assert tables.length.tolist() == [11, 0]
    assert tables.refcount.tolist() == [1, 0, 0, 1, 1, 1, 0, 0]
    audit(tables)


def test_a_rollback_keeps_the_prefix_to_the_token(backend):
    tables = BlockTables.allocate(rows=4, max_blocks=4, num_blocks=8, block_size=3)
    pk.block_table_extend(tables, int32([8, 5, 3, 3]))
    pk.block_table_rollback(tables, int32([4, 0, 3, -1]))
    assert tables.length.tolist() == [4, 0, 3, 3]
    assert tables.block_table[0, :2].tolist() == [0, 1]
    assert tables.refcount.tolist() == [1, 1, 0, 0, 0, 1, 1, 0]
    audit(tables)
    pk.block_table_rollback(tables, int32([2**31 - 1, 9, 4, -(2**31)]))  # no row has as many
    assert tables.length.tolist() == [4, 0, 3, 3]


def test_rows_that_go_on_inside_a_shared_block_leave_it_in_order_and_the_last_holder_keeps_it(backend):
    tables = BlockTables.allocate(rows=3, max_blocks=4, num_blocks=8, block_size=4)
    pk.block_table_extend(tables, int32([8, 0, 0]))
    pk.block_table_fork(tables, int32([-1, 0, 0]), int32([0, 8, 8]))
    pk.block_table_rollback(tables, int32([0, 6, 7]))  # both end inside block 1, which they share
    assert tables.refcount.tolist()[:3] == [2, 2, 0]
    pk.block_table_extend(tables, int32([-1, 7, 9]))
    assert tables.block_table[1, :2].tolist() == [0, 2]
    assert tables.block_table[2, :3].tolist() == [0, 1, 3]
    assert tables.copies.tolist() == [[0] * 4, [2, 1, 0, 2], [0] * 4]
    assert tables.refcount.tolist() == [2, 1, 1, 1, 0, 0, 0, 0]
    audit(tables)


def test_room_that_a_row_has_to_itself_costs_no_block(backend):
    tables = BlockTables.allocate(rows=1, max_blocks=2, num_blocks=1, block_size=4)
    for tokens in (1, 2, 4, 3, -1, -(2**31)):
        pk.block_table_extend(tables, int32([tokens]))
        assert tables.status.tolist() == [OK]
        assert not tables.copies.any()
    assert tables.length.tolist() == [4]
    audit(tables)


def test_blocks_go_out_in_row_order_until_a_row_finds_too_few(backend):
    tables = BlockTables.allocate(rows=5, max_blocks=4, num_blocks=5, block_size=2)
    pk.block_table_extend(tables, int32([3, 0, 0, 0, 0]))
    before = [tensor.clone() for tensor in tables.tensors()]
    # 4, 3 + 1 blocks and none at all: row 2 does not fit, so row 3 is not served either; row 0 grows in what it has
    pk.block_table_extend(tables, int32([4, 3, 7, 1, 0]))
    assert tables.status.tolist() == [OK, OK, OUT, OUT, OK]
    assert tables.length.tolist() == [4, 3, 0, 0, 0]
    assert torch.equal(tables.block_table[2:], before[0][2:])
    audit(tables)
    # one block is left: the first fork that splits a block gets it, the second does not, the third needs none
    pk.block_table_fork(tables, int32([-1, -1, 0, 1, 0]), int32([0, 0, 3, 3, 2]))
    assert tables.status.tolist() == [OK, OK, OK, OUT, OK]
    assert tables.length.tolist() == [4, 3, 3, 0, 2]
    assert tables.copies[3].tolist() == [0] * 4
    audit(tables)
    assert int(tables.free_count) == 0


def test_a_row_out_of_blocks_leaves_the_shared_block_it_could_not_copy(backend):
    tables = BlockTables.allocate(rows=2, max_blocks=2, num_blocks=1, block_size=4)
    pk.block_table_extend(tables, int32([4, 0]))
    pk.block_table_fork(tables, int32([-1, 0]), int32([0, 4]))
    pk.block_table_rollback(tables, int32([-1, 1]))
    pk.block_table_extend(tables, int32([-1, 2]))
    assert tables.status.tolist() == [OK, OUT]
    assert tables.refcount.tolist() == [2]
    assert not tables.copies.any()
    audit(tables)


def test_a_row_keeps_a_shared_block_only_if_the_others_could_leave_it(backend):
    """Rows 1, 2 and 3 end inside block 0. One block is free: row 1 gets it; row 2 finds none, so row 3 is not alone."""
    tables = BlockTables.allocate(rows=5, max_blocks=2, num_blocks=2, block_size=4)
    pk.block_table_extend(tables, int32([4, 0, 0, 0, 0]))
    pk.block_table_fork(tables, int32([-1, 0, 0, 0, -1]), int32([0, 4, 4, 4, 0]))
    pk.block_table_rollback(tables, int32([0, 1, 2, 3, 0]))
    before = tables.block_table[2:].clone()
    pk.block_table_extend(tables, int32([-1, 3, 3, 4, -1]))
    assert tables.status.tolist() == [OK, OK, OUT, OUT, OK]
    assert tables.length.tolist() == [0, 3, 2, 3, 0]
    assert tables.refcount.tolist() == [2, 1]
    assert tables.copies[1].tolist() == [1, 0, 0, 1]
    assert torch.equal(tables.block_table[2:], before)
    audit(tables)
    pk.block_table_rollback(tables, int32([-1, 0, -1, -1, -1]))
    pk.block_table_extend(tables, int32([-1, -1, 3, 4, -1]))
    assert tables.status.tolist() == [OK] * 5
    assert tables.block_table[3, 0] == 0
    audit(tables)


def test_blocks_that_are_neither_free_nor_in_a_row_are_never_touched(backend):
    """An engine's null block, or blocks that it keeps for another cache."""
    tables = BlockTables.allocate(rows=2, max_blocks=4, num_blocks=6, block_size=2)
    tables.free_count.fill_(4)  # blocks 5, 4, 3, 2 are free; 1 and 0 are the engine's
    tables.refcount[:2] = 1
    pk.block_table_extend(tables, int32([5, 2]))
    assert tables.block_table[0, :3].tolist() == [2, 3, 4]
    pk.block_table_rollback(tables, int32([0, 0]))
    assert sorted(tables.free_list[:4].tolist()) == [2, 3, 4, 5]
    assert tables.refcount.tolist() == [1, 1, 0, 0, 0, 0]


def test_no_row_is_no_work(backend):
    tables = BlockTables.allocate(rows=2, max_blocks=3, num_blocks=4, block_size=2)
    pk.block_table_extend(tables, int32([3, 0]))
    names = ("block_table", "length", "copies", "status")
    nothing = BlockTables(**{k: v[:0] if k in names else v for k, v in vars(tables).items()})
    before = [tensor.clone() for tensor in tables.tensors()]
    for operator, vectors in OPERATORS.items():
        getattr(pk, operator)(nothing, *[int32([])] * vectors)
    for new, old in zip(tables.tensors(), before, strict=True):
        assert torch.equal(new, old)


# ---------------------------------------------------------------------------------------------------------------
# every backend writes the same tables, entry by entry, for good and for bad arguments

OPERATORS = {"block_table_fork": 2, "block_table_extend": 1, "block_table_commit": 1, "block_table_rollback": 1}


FIELDS = [name for name in BlockTables.__dataclass_fields__ if name != "block_size"]


def kernel(backend: str, name: str, tables: BlockTables, *vectors: torch.Tensor) -> None:
    """The operator as a device runs it: nobody has looked at the values."""
    with serving(backend):
        family.run(name, tables.length.device, *tables.tensors(), *vectors, tables.block_size)


def in_lockstep(backend: str, tables: BlockTables, calls) -> Counter:
    """Make the same calls on the reference and on a backend. Returns how often each status came, by operator."""
    other = BlockTables(*(tensor.clone() for tensor in tables.tensors()), tables.block_size)
    seen = Counter()
    for name, *vectors in calls(tables):
        kernel("reference", name, tables, *vectors)
        kernel(backend, name, other, *vectors)
        for field, want, got in zip(FIELDS, tables.tensors(), other.tensors(), strict=True):
            assert torch.equal(want, got), (name, field, vectors)
        if name != "block_table_rollback":
            seen.update((name[12:], BlockStatus(s).name) for s in tables.status.tolist())
    audit(tables)
    return seen


def random_calls(generator: np.random.Generator, steps: int):
    """Arguments in and out of range, for rows that are in the state they ask for and that are not."""

    def calls(tables: BlockTables):
        rows, most = tables.length.shape[0], tables.block_table.shape[1] * tables.block_size
        for _ in range(steps):
            length = tables.length.numpy()
            name = generator.choice(list(OPERATORS), p=[0.35, 0.3, 0.1, 0.25])
            some = generator.random(rows) < 0.6
            named = np.where(some, generator.integers(-1, rows + 1, rows), -1)
            if name == "block_table_fork":
                whole = length[np.clip(named, 0, rows - 1)]
                yield name, int32(named), int32(generator.integers(-1, whole + 2))
            elif name == "block_table_commit":
                yield name, int32(np.where(generator.random(rows) < 0.6, named, -1))
            elif name == "block_table_rollback":
                yield name, int32(np.where(some, generator.integers(-1, most + 2, rows), -1))
            else:
                near = length + generator.integers(0, tables.block_size + 2, rows)
                far = generator.integers(-1, most + 2, rows)
                yield name, int32(far if generator.random() < 0.3 else near)

    return calls


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_every_backend_writes_what_the_reference_writes(backend):
    generator = np.random.default_rng(0)
    seen = Counter()
    rounds, least = (40, 5) if backend == "cpp" else (10, 2)
    for _ in range(rounds):
        rows, max_blocks, blocks = (int(generator.integers(1, high)) for high in (9, 7, 24))
        block_size = int(generator.choice([1, 2, 3, 5, 16]))
        seen += in_lockstep(
            backend, BlockTables.allocate(rows, max_blocks, blocks, block_size), random_calls(generator, 30)
        )
    for status in (("fork", "OUT_OF_BLOCKS"), ("fork", "BAD_ROW"), ("fork", "BAD_TOKENS"), ("fork", "NOT_EMPTY"),
                   ("extend", "OUT_OF_BLOCKS"), ("extend", "BAD_TOKENS"), ("commit", "BAD_ROW"), ("commit", "EMPTY"),
                   ("fork", "OK"), ("extend", "OK"), ("commit", "OK")):  # fmt: skip
        assert seen[status] >= least, (status, seen)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_more_rows_and_longer_rows_than_one_pass_of_a_kernel(backend):
    """Triton looks at 256 rows and 128 entries of a row at a time; sums over rows run on from pass to pass."""
    rows, max_blocks = 600, 300
    tables = BlockTables.allocate(rows, max_blocks, num_blocks=3000, block_size=2)
    r = np.arange(rows)
    empty = r % 4 > 0
    deep = r % 100 == 0

    def calls(_):
        yield "block_table_extend", int32(np.where(empty, 0, np.where(deep, 599, 3 + r % 3)))
        yield "block_table_fork", int32(np.where(empty, r // 100 * 100, -1)), int32(np.where(empty, 1 + r % 280, 0))
        yield "block_table_rollback", int32(np.where(r % 8 == 3, 257 + r % 5, np.where(r % 8 == 5, 2, -1)))
        yield "block_table_extend", int32(np.where(empty, tables.length.numpy() + 1 + r % 3, -1))
        yield "block_table_commit", int32(np.where(r % 8 == 0, r + 3, -1))
        yield "block_table_extend", int32(tables.length.numpy() + 5)
        yield "block_table_rollback", int32(np.where(r % 3 == 0, 0, -1))

    seen = in_lockstep(backend, tables, calls)
    assert seen["extend", "OUT_OF_BLOCKS"] > 50
    assert seen["fork", "OK"] == rows
    assert seen["commit", "OK"] == rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_near_the_end_of_int32_are_no_trouble(backend):
    end = 2**31 - 1
    tables = BlockTables.allocate(rows=3, max_blocks=2, num_blocks=4, block_size=4)
    kernel(backend, "block_table_extend", tables, int32([5, end, -end]))
    assert tables.status.tolist() == [OK, BlockStatus.BAD_TOKENS, OK]
    kernel(backend, "block_table_fork", tables, int32([-1, end, 0]), int32([0, 0, end]))
    assert tables.status.tolist() == [OK, BlockStatus.BAD_ROW, BlockStatus.BAD_TOKENS]
    kernel(backend, "block_table_fork", tables, int32([-end, 0, -1]), int32([0, -end, 0]))
    assert tables.status.tolist() == [OK, BlockStatus.BAD_TOKENS, OK]
    kernel(backend, "block_table_commit", tables, int32([-1, end, -end]))
    assert tables.status.tolist() == [OK, BlockStatus.BAD_ROW, OK]
    kernel(backend, "block_table_rollback", tables, int32([end, 0, -end]))
    assert tables.length.tolist() == [5, 0, 0]
    audit(tables)
    huge = BlockTables.allocate(rows=2, max_blocks=2, num_blocks=4, block_size=end)
    kernel(backend, "block_table_extend", huge, int32([end, 1]))
    kernel(backend, "block_table_rollback", huge, int32([end - 1, 0]))
    assert huge.length.tolist() == [end - 1, 0]
    audit(huge)


# ---------------------------------------------------------------------------------------------------------------
# kv_copy_blocks


def random_pool(shape, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().copy()


def check_blocks(pool: torch.Tensor, copies: list[list[int]], layout: str) -> None:
    want = raw_bytes(pool)
    for to, of, start, stop in copies:
        if start < stop and layout == "NHD":
            want[:, to, start:stop] = want[:, of, start:stop]
        elif start < stop:
            want[:, to, :, start:stop] = want[:, of, :, start:stop]
    assert pk.kv_copy_blocks(pool, int32(copies).view(-1, 4), layout) is None
    np.testing.assert_array_equal(raw_bytes(pool), want)


# 16 x 64 halves: 16-byte accesses; 5 positions: no power of two; 3 and 7: no alignment; 1: the smallest block
@pytest.mark.parametrize(("block_size", "heads", "dim"), [(16, 2, 64), (5, 3, 8), (4, 1, 3), (3, 2, 7), (1, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.float64])
@pytest.mark.parametrize("layout", family.LAYOUTS)
def test_beginnings_of_blocks_are_copied_for_all_layers_byte_by_byte(backend, layout, dtype, block_size, heads, dim):
    inner = (block_size, heads) if layout == "NHD" else (heads, block_size)
    pool = random_pool((4, 7, *inner, dim), dtype)
    split = max(1, block_size - 1)
    check_blocks(pool, [[5, 1, 0, split], [0, 0, 0, 0], [2, 1, 0, 1], [3, 6, 0, block_size], [9, -4, 2, 2]], layout)


def test_a_layers_cache_of_either_engine_is_a_pool(backend):
    """K and V before the blocks, after the blocks, or all layers in one tensor; NHD and HND."""
    blocks, block_size, heads, dim = 5, 4, 2, 8
    copies = [[4, 0, 0, 3], [2, 3, 0, 1]]
    for layout, inner in (("NHD", (block_size, heads)), ("HND", (heads, block_size))):
        check_blocks(random_pool((2, blocks, *inner, dim), torch.float16), copies, layout)
        stored = random_pool((blocks, 2, *inner, dim), torch.float16)
        check_blocks(stored.transpose(0, 1), copies, layout)
        every_layer = random_pool((3, 2, blocks, *inner, dim), torch.float16)
        check_blocks(every_layer.flatten(0, 1), copies, layout)
        fused = random_pool((2, blocks, *inner, 2 * dim), torch.float16)  # K and V side by side in the inner dimension
        check_blocks(fused[..., dim:], copies, layout)


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_blocks_beyond_two_to_the_31_entries_are_found(backend, sparse, dimension):
    strides = [135, 45, 15, 5, 1]
    strides[dimension] = 2**30 + 16  # fits 32 bits; twice as much does not
    far = torch.as_strided(sparse(2 * strides[dimension] + 1000, torch.int8), (3, 3, 3, 3, 5), strides)
    far.copy_(torch.randint(-128, 128, far.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0)))
    check_blocks(far, [[2, 0, 0, 3], [1, 0, 0, 2]], "NHD")


def test_a_table_beyond_two_to_the_31_entries_is_followed(backend, sparse):
    stride = 2**30 + 8
    near = BlockTables.allocate(rows=3, max_blocks=4, num_blocks=9, block_size=2)
    tensors = [tensor.clone() for tensor in near.tensors()]
    tensors[0] = torch.as_strided(sparse(2 * stride + 4, torch.int32), (3, 4), (stride, 1))
    far = BlockTables(*tensors, near.block_size)
    for tables in (near, far):
        pk.block_table_extend(tables, int32([0, 0, 5]))
        pk.block_table_fork(tables, int32([2, -1, -1]), int32([5, 0, 0]))
        pk.block_table_fork(tables, int32([-1, 2, -1]), int32([0, 4, 0]))
        pk.block_table_rollback(tables, int32([-1, 3, 1]))
        pk.block_table_extend(tables, int32([7, 4, 4]))
        pk.block_table_commit(tables, int32([-1, 2, -1]))
        audit(tables)
    for a, b in zip(near.tensors(), far.tensors(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------------
# bad arguments on a host; tests/test_ops_errors.py has those of types, dtypes, shapes, strides and devices


def filled() -> BlockTables:
    """Row 0 holds 5 tokens of at most 8, row 1 is empty, row 2 holds 2."""
    tables = BlockTables.allocate(rows=3, max_blocks=2, num_blocks=9, block_size=4)
    pk.block_table_extend(tables, int32([5, 0, 2]))
    return tables


@host_only  # elsewhere nobody looks at values: they are reported by row
@pytest.mark.parametrize(
    ("operator", "vectors", "message"),
    [
        ("fork", ([-1, 3, -1], [0, 0, 0]), "parent[1] is 3; it must be another row of [0, 3)"),
        ("fork", ([-1, 1, -1], [0, 0, 0]), "parent[1] is 1; it must be another row"),
        ("fork", ([2, -1, -1], [1, 0, 0]), "row 0 holds 5 tokens; a row to fork into must be empty"),
        ("fork", ([-1, 0, -1], [0, 6, 0]), "tokens[1] is 6; it must lie in [0, 5], what row 0 holds"),
        ("fork", ([-1, 0, -1], [0, -1, 0]), "tokens[1] is -1; it must lie in [0, 5]"),
        ("extend", ([9, 0, 0],), "tokens[0] is 9; a row of the table has room for 8"),
        ("commit", ([3, -1, -1],), "source[0] is 3; it must be another row of [0, 3)"),
        ("commit", ([-1, -1, 2],), "source[2] is 2; it must be another row"),
        ("commit", ([1, -1, -1],), "source[0] is 1; row 1 holds no tokens"),
        ("commit", ([2, 2, -1],), "source[1] is 2; row 0 takes it in the same call"),
        ("commit", ([2, -1, 0],), "source[0] is 2; row 2 takes row 0 in the same call"),
    ],
)
def test_values_out_of_range_are_refused_by_row_and_change_nothing(backend, operator, vectors, message):
    tables = filled()
    before = [tensor.clone() for tensor in tables.tensors()]
    with pytest.raises(ArgumentError, match=re.escape(message)):
        getattr(pk, f"block_table_{operator}")(tables, *map(int32, vectors))
    for new, old in zip(tables.tensors(), before, strict=True):
        assert torch.equal(new, old)


@host_only
@pytest.mark.parametrize("bad", [[7, 0, 0, 1], [0, 7, 0, 1], [-1, 0, 0, 1], [0, -1, 0, 1], [0, 1, -1, 1], [0, 1, 0, 4]])
def test_a_copy_outside_the_pool_is_refused_before_anything_is_copied(backend, bad):
    pool = random_pool((2, 7, 3, 2, 4), torch.int8)
    before = pool.clone()
    message = f"copies[1] is {bad}; blocks must lie in [0, 7), positions in [0, 3]"
    with pytest.raises(ArgumentError, match=re.escape(message)):
        pk.kv_copy_blocks(pool, int32([[0, 1, 0, 3], bad]))
    assert torch.equal(pool, before)


def test_a_layout_is_one_of_two():
    with pytest.raises(ArgumentError, match=r"layout is 'NDH'; allowed: NHD, HND"):
        pk.kv_copy_blocks(torch.zeros(2, 3, 4, 2, 8), int32([[0, 1, 0, 1]]), "NDH")


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_state_of_another_type_is_refused(operator):
    with pytest.raises(ArgumentTypeError, match="tables is a tuple; it must be a BlockTables"):
        getattr(pk, operator)(filled().tensors(), *[int32([0])] * OPERATORS[operator])


@pytest.mark.parametrize("name", ["rows", "max_blocks", "num_blocks", "block_size"])
def test_a_state_of_no_rows_or_blocks_is_not_allocated(name):
    sizes = dict(rows=2, max_blocks=2, num_blocks=2, block_size=2)
    for value, error in ((0, ArgumentError), (-1, ArgumentError), (2**31, ArgumentError), (1.0, ArgumentTypeError),
                         (True, ArgumentTypeError)):  # fmt: skip
        with pytest.raises(error, match=rf"^{name} is {value}"):
            BlockTables.allocate(**{**sizes, name: value})


# ---------------------------------------------------------------------------------------------------------------
# what a CUDA graph and a compiler may assume


class Recorder(TorchDispatchMode):
    """The torch operators that run."""

    def __init__(self):
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ran.append(str(function))
        return function(*args, **(kwargs or {}))


def test_on_a_device_an_operator_is_its_launches_and_nothing_else(monkeypatch):
    """No allocation, no copy, no look at a value: what a CUDA graph captures is all there is."""
    with serving("triton"):
        from power_kernels.triton import kv_cache, paged_kv
    launches = []
    for module in (paged_kv, kv_cache):
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **meta: launches.append(kernel.__name__))
    tables, on_meta = filled(), BlockTables(*(t.to("meta") for t in filled().tensors()), block_size=4)
    vectors = [int32([-1] * 3)] * 2
    kernels = {"block_table_fork": ["_fork_kernel", "_share_kernel"]}
    for operator, count in OPERATORS.items():
        launches.clear()
        with Recorder() as recorder:
            getattr(paged_kv, operator)(*tables.tensors(), *vectors[:count], tables.block_size)
        assert recorder.ran == []
        assert launches == kernels.get(operator, [f"_{operator[12:]}_kernel"])
        elsewhere = [vector.to("meta") for vector in vectors[:count]]
        with Recorder() as recorder:
            getattr(pk, operator)(on_meta, *elsewhere)
        assert recorder.ran == [f"power_kernels.{operator}.default"]
    launches.clear()
    pool = torch.zeros(2, 4, 2, 3, 8)
    with Recorder() as recorder:
        paged_kv.kv_copy_blocks(pool, tables.copies)
    assert set(recorder.ran) <= {"aten.as_strided.default", "aten.view.dtype", "aten.detach.default"}  # views
    assert launches == ["_kv_copy_kernel"]


def one_step(tables: BlockTables, pool, parent, cut, tokens, source):
    pk.block_table_fork(tables, parent, cut)
    pk.kv_copy_blocks(pool, tables.copies)
    pk.block_table_extend(tables, tokens)
    pk.kv_copy_blocks(pool, tables.copies, "NHD")
    pk.block_table_commit(tables, source)
    pk.block_table_rollback(tables, tokens - 3)
    return tables.length * 2


@host_only
def test_a_step_compiles_into_one_graph_and_keeps_its_writes():
    torch._dynamo.reset()
    compiled = torch.compile(one_step, fullgraph=True, backend="aot_eager")
    vectors = [int32(v) for v in ([-1, 0, -1], [0, 3, 0], [8, 6, 5], [1, -1, -1])]
    results = []
    for step in (one_step, compiled):
        tables, pool = filled(), random_pool((2, 9, 4, 2, 4), torch.int32)
        results.append((*tables.tensors(), pool, step(tables, pool, *vectors)))
    for eager, once in zip(*results, strict=True):
        assert torch.equal(eager, once)
    assert results[0][1].tolist() == [5, 0, 2], "nothing was done"
