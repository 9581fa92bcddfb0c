"""What torch may assume of every operator: schemas, fakes, compilation, preallocated outputs (DESIGN 5)."""

from __future__ import annotations

import pytest
import torch

import power_kernels as pk
from power_kernels import reference
from power_kernels.ops import dispatch
from power_kernels.state import Status
from tests.devices import on_device
from tests.op_helpers import (
    BACKENDS,
    DTYPES,
    NAN,
    SEED,
    assert_same_bits,
    counters,
    normal_logits,
    per_row,
    serving,
    stop_table,
    strided,
)

NAMESPACE = torch.ops.power_kernels
# Reads all there is.
LAW = pk.Law(max_new_tokens=6, block_size=3, mcmc_steps=2, final_steps=1, cut="divergence-entropy", stops=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with serving(request.param) as name:
        yield name


# ---- arguments of every operator. Each returns fresh tensors, since some operators write theirs.


def sample_arguments(rows=3, vocab=300, dtype=torch.float32, exclude=True, own_seeds=False):
    return (
        normal_logits(rows, vocab, dtype, seed=vocab),
        per_row(4.0, rows),
        per_row(2.5, rows),
        torch.arange(SEED, SEED + rows) if own_seeds else torch.tensor([SEED]),
        counters(rows),
        torch.arange(rows) - 1 if exclude else None,
    )


def score_arguments(rows=3, vocab=300, dtype=torch.float32):
    return (normal_logits(rows, vocab, dtype), torch.arange(rows) % vocab, per_row(4.0, rows), per_row(2.5, rows))


def head_tensors(rows: int, vocab: int, dtype) -> tuple:
    """hidden, lm_head, bias: rows of 37 columns, so that no vector divides them; logits of about 3."""
    return (
        normal_logits(rows, 37, dtype, scale=1.0, seed=vocab),
        normal_logits(vocab, 37, dtype, scale=0.5, seed=vocab + 1),
        normal_logits(1, vocab, dtype, seed=vocab + 2)[0],
    )


def sample_from_hidden_arguments(rows=3, vocab=300, dtype=torch.float32, exclude=True, own_seeds=False):
    rest = sample_arguments(rows, 1, exclude=exclude, own_seeds=own_seeds)[1:]
    return (*head_tensors(rows, vocab, dtype), *rest, 20.0, 0.75)


def score_from_hidden_arguments(rows=3, vocab=300, dtype=torch.float32):
    return (*head_tensors(rows, vocab, dtype), *score_arguments(rows, vocab)[1:], 20.0, 0.75)


def sample_from_hidden_outputs(rows=3, vocab=300, entropy=True) -> tuple:
    _, *columns = sample_outputs(rows, vocab, entropy)
    workspace = torch.full((pk.hidden_workspace_size(rows, vocab),), NAN)
    return (torch.full((rows, vocab), NAN), workspace, *columns)


def score_from_hidden_outputs(rows=3, vocab=300, entropy=True) -> tuple:
    _, workspace, _, *columns = sample_from_hidden_outputs(rows, vocab, entropy)
    return (workspace, *columns)


def slot_table(slots=4) -> pk.SlotTable:
    """Slots of which all but the first are active; the proposal of slot 1 cannot be accepted any more."""
    table = pk.SlotTable.allocate(slots)
    for column, value in (("ACTIVE", 1), ("BASE", 3), ("FIRST", 2), ("EXCLUDE", 0), ("HORIZON", 9), ("SEED", SEED)):
        table.field[:, pk.SlotField[column]] = value
    table.field[:, pk.SlotField.SERIAL] = torch.arange(slots)
    table.field[0, pk.SlotField.ACTIVE] = 0
    table.exponent[:] = torch.tensor([4.0, 2.5])
    table.bound[1:2, 0] = 0.0
    return table


def slot_arguments(rows=3, vocab=300, dtype=torch.float32):
    """Rows of slots 1, 2, ..., one of them at FIRST, the last still in its prompt."""
    live = torch.arange(rows) < max(rows - 1, 1)
    vectors = torch.arange(1, rows + 1), 3 + torch.arange(rows), live
    return (*slot_table(rows + 1).tensors(), normal_logits(rows, vocab, dtype, seed=vocab), *vectors)


def slot_outputs(rows=3, vocab=300) -> tuple:
    workspace = torch.full((pk.workspace_size(rows, vocab),), NAN)
    return workspace, torch.full((rows,), -77), torch.full((rows, 3), NAN), torch.full((rows,), -77)


def slot_columns(rows: int) -> tuple:
    """token, values and flags as a stack has them: columns of tensors for its largest batch."""
    return torch.full((rows, 2), -77)[:, 1], torch.full((rows, 7), NAN)[:, ::3], torch.full((2 * rows,), -77)[::2]


def accept_arguments(rows=3, width=7):
    weights = -normal_logits(2 * rows, width).abs()
    lengths = torch.arange(1, rows + 1, dtype=torch.int32)
    return weights[:rows], weights[rows:], lengths, lengths.flip(0), per_row(-0.5, rows, torch.float64)


def copy_arguments(dtype=torch.float32):
    dst, src = torch.zeros(2, 3, 2, 5, 4, dtype=dtype), torch.arange(400.0).view(2, 5, 2, 5, 4).to(dtype)
    return dst, src, torch.tensor([[0, 4, 1, 5], [2, 0, 3, 3]], dtype=torch.int32)


def float_outputs(rows: int, entropy: bool) -> list[torch.Tensor | None]:
    columns = [torch.full((rows,), NAN) for _ in range(4)]
    return columns if entropy else [*columns[:3], None]


def sample_outputs(rows=3, vocab=300, entropy=True) -> tuple:
    workspace = torch.full((pk.workspace_size(rows, vocab),), NAN)
    status = torch.full((rows,), -77, dtype=torch.int32)
    return (workspace, torch.full((rows,), -77), *float_outputs(rows, entropy), status)


def score_outputs(rows=3, vocab=300, entropy=True) -> tuple:
    workspace, _, *columns = sample_outputs(rows, vocab, entropy)
    return (workspace, *columns)


def accept_outputs(rows=3) -> tuple:
    ratio = torch.full((rows,), NAN, dtype=torch.float64)
    return torch.zeros(rows, dtype=torch.bool), ratio, torch.full((rows,), -77, dtype=torch.int32)


def running_state(chains=2, lanes=2) -> pk.ChainState:
    """Chains that have been admitted and advanced once, so that their lanes wait for a token."""
    state = pk.ChainState.allocate(chains, lanes, LAW)
    for chain in range(chains):
        state.admit(chain, [5, 6, 7], chain_id=chain, prompt_id=1)
    pk.mh_advance(state, LAW, *advance_constants(), *sampled(state, Status.PENDING))
    return state


def advance_constants() -> tuple:
    return torch.from_numpy(reference.length_table(LAW)), torch.tensor([SEED]), torch.tensor([0, 9])


def sampled(state: pk.ChainState, status: Status = Status.OK) -> tuple:
    rows = state.lane_field.shape[0]
    token, logq = torch.arange(rows) + 1, per_row(-0.7, rows)
    status = per_row(int(status), rows, torch.int32)
    return token, logq, per_row(-0.3, rows), status, per_row(0.9, rows), stop_table(LAW, 40)


def advance_arguments() -> tuple:
    state = running_state()
    *drawn, stop_next = sampled(state)
    return (*state.tensors(), *advance_constants(), stop_next, *drawn, *LAW.constants())


def block_tables() -> pk.BlockTables:
    """Rows 0 and 3 hold 3 and 2 blocks of 3 positions, rows 1 and 2 are empty."""
    tables = pk.BlockTables.allocate(rows=4, max_blocks=5, num_blocks=12, block_size=3)
    pk.block_table_extend(tables, torch.tensor([7, 0, 0, 5], dtype=torch.int32))
    return tables


def table_arguments(*vectors: list[int]) -> tuple:
    tables = block_tables()
    return (*tables.tensors(), *(torch.tensor(v, dtype=torch.int32) for v in vectors), tables.block_size)


def pool_arguments(dtype=torch.float32):
    pool = torch.arange(2 * 12 * 3 * 2 * 4.0).view(2, 12, 3, 2, 4).to(dtype)
    return pool, torch.tensor([[5, 1, 0, 2], [7, 3, 1, 2]], dtype=torch.int32)


def branch_arguments(groups=2, particles=2, vocab=300, dtype=torch.float32, stops=True):
    """Rows of which each group's last but one is empty; a reference in the first group, which has closing children."""
    rows = particles + 1
    log_weight = normal_logits(groups, rows).double()
    log_weight[:, -2] = float("-inf")
    state = (torch.arange(groups * rows) % 5).view(groups, rows).to(torch.int16)
    return (
        normal_logits(groups * rows, vocab, dtype, seed=vocab),
        per_row(2.0, groups),
        log_weight,
        torch.arange(rows, dtype=torch.int32).flip(0).repeat(groups, 1),
        state if stops else None,
        torch.arange(groups) - 1,
        torch.zeros(groups, dtype=torch.bool),
        per_row(-0.5, groups, torch.float64),
        torch.rand(groups, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(vocab)),
        torch.tensor([5, vocab - 1]),
        stop_table(LAW, vocab) if stops else None,
        0.25,
        0.1,
    )


def branch_tally(groups=2) -> torch.Tensor:
    return torch.tensor([[-1.0, -2.0, -3.0, -1.5]], dtype=torch.float64).repeat(groups, 1)


def branch_outputs(groups=2, particles=2, vocab=300) -> tuple:
    """workspace, tally and the others in the order of the schema of the out form."""
    shape, float64 = (groups, particles + 1), dict(dtype=torch.float64)
    return (
        torch.full((pk.branch_workspace_size(groups * (particles + 1), vocab),), NAN),
        branch_tally(groups),
        torch.full(shape, -77, dtype=torch.int32),
        torch.full(shape, -77),
        torch.full(shape, NAN, **float64),
        torch.full(shape, NAN, **float64),
        torch.full(shape, -77, dtype=torch.int32),
        torch.full((groups, 2), -77),
        torch.full((groups,), NAN, **float64),
        torch.full((groups,), NAN, **float64),
        torch.full(shape, -77, dtype=torch.int32),
    )


def in_order_of_the_results(outputs: tuple) -> list[torch.Tensor]:
    """`branch_outputs` as `BranchOutput` has them."""
    _, tally, *others = outputs
    return [*others[:-2], tally, *others[-2:]]


def selection_arguments(groups=3) -> tuple:
    return branch_tally(groups), torch.linspace(0.1, 0.9, groups, dtype=torch.float64)


ARGUMENTS = {
    "sample_tokens": lambda: (*sample_arguments(), True),
    "sample_tokens_out": lambda: (*sample_arguments(), *sample_outputs()),
    "score_tokens": lambda: (*score_arguments(), True),
    "score_tokens_out": lambda: (*score_arguments(), *score_outputs()),
    "sample_slots_out": lambda: (*slot_arguments(), *slot_outputs(), True),
    "sample_from_hidden": lambda: (*sample_from_hidden_arguments(), True),
    "sample_from_hidden_out": lambda: (*sample_from_hidden_arguments(), *sample_from_hidden_outputs()),
    "score_from_hidden": lambda: (*score_from_hidden_arguments(), True),
    "score_from_hidden_out": lambda: (*score_from_hidden_arguments(), *score_from_hidden_outputs()),
    "branch_particles": lambda: (*branch_arguments(), branch_tally()),
    "branch_particles_out": lambda: (*branch_arguments(), *branch_outputs()),
    "select_candidate_out": lambda: (*selection_arguments(), torch.zeros(3, dtype=torch.bool)),
    "mh_accept": accept_arguments,
    "mh_accept_out": lambda: (*accept_arguments(), *accept_outputs()),
    "mh_advance": advance_arguments,
    "kv_copy_ranges": copy_arguments,
    "block_table_fork": lambda: table_arguments([-1, 0, 3, -1], [0, 7, 4, 0]),
    "block_table_extend": lambda: table_arguments([9, -1, 2, 15]),
    "block_table_commit": lambda: table_arguments([3, -1, -1, -1]),
    "block_table_rollback": lambda: table_arguments([4, 9, -1, 0]),
    "kv_copy_blocks": pool_arguments,
}


def call(name: str, arguments: tuple):
    """The public function of operator `name`, with the arguments of its schema."""
    if name == "mh_advance":
        state, constants = arguments[: len(pk.ChainState.__dataclass_fields__)], len(LAW.constants())
        length_term, seed, eos, stop_next, *drawn = arguments[len(state) : -constants]
        return pk.mh_advance(pk.ChainState(*state), LAW, length_term, seed, eos, *drawn, stop_next)
    if name.startswith("block_table_"):
        tables, vectors = pk.BlockTables(*arguments[:7], arguments[-1]), arguments[7:-1]
        return getattr(pk, name)(tables, *vectors)
    if name == "sample_slots_out":
        return pk.sample_slots_out(pk.SlotTable(*arguments[:4]), *arguments[4:-1], entropy=arguments[-1])
    if name == "branch_particles":
        logits, alpha, log_weight, order, stop_state, *vectors, eos, stop_next, length_bonus, rho, tally = arguments
        stops = dict(stop_state=stop_state, stop_next=stop_next)
        options = dict(eos=eos, length_bonus=length_bonus, rho=rho, **stops)
        return pk.branch_particles(logits, alpha, log_weight, order, *vectors, tally, **options)
    if name in ("sample_tokens", "score_tokens"):
        return getattr(pk, name)(*arguments[:-1], return_entropy=arguments[-1])
    if name in ("sample_from_hidden", "score_from_hidden"):
        hidden, lm_head, bias, *rest, softcap, scale, entropy = arguments
        options = dict(bias=bias, softcap=softcap, scale=scale, return_entropy=entropy)
        return getattr(pk, name)(hidden, lm_head, *rest, **options)
    return getattr(pk, name)(*arguments)


OTHER_ARGUMENTS = {
    "no exclusion, no entropy": ("sample_tokens", lambda: (*sample_arguments(exclude=False), False)),
    "no exclusion, no entropy, out": (
        "sample_tokens_out",
        lambda: (*sample_arguments(exclude=False), *sample_outputs(entropy=False)),
    ),
    "own seeds": ("sample_tokens", lambda: (*sample_arguments(own_seeds=True), True)),
    "own seeds, out": ("sample_tokens_out", lambda: (*sample_arguments(own_seeds=True), *sample_outputs())),
    "own seeds, hidden": ("sample_from_hidden", lambda: (*sample_from_hidden_arguments(own_seeds=True), True)),
    "one row of one entry": ("sample_tokens", lambda: (*sample_arguments(1, 1), True)),
    "no rows": ("sample_tokens", lambda: (*sample_arguments(0), True)),
    "bfloat16": ("sample_tokens", lambda: (*sample_arguments(dtype=torch.bfloat16), True)),
    "strided rows": ("score_tokens", lambda: (strided(score_arguments()[0]), *score_arguments()[1:], True)),
    "score, no entropy": ("score_tokens", lambda: (*score_arguments(), False)),
    "score, no rows": ("score_tokens", lambda: (*score_arguments(0), True)),
    "slots, no entropy": ("sample_slots_out", lambda: (*slot_arguments(1, 1), *slot_outputs(1, 1), False)),
    "slots, no rows": ("sample_slots_out", lambda: (*slot_arguments(0), *slot_outputs(0), True)),
    "slots, columns of wider and longer tensors": (
        "sample_slots_out",
        lambda: (*slot_arguments(dtype=torch.bfloat16), slot_outputs()[0], *slot_columns(5), True),
    ),
    "hidden, no exclusion, no entropy": (
        "sample_from_hidden",
        lambda: (*sample_from_hidden_arguments(exclude=False), False),
    ),
    "hidden, no bias": (
        "score_from_hidden_out",
        lambda: (
            *head_tensors(3, 300, torch.float16)[:2],
            None,
            *score_from_hidden_arguments()[3:],
            *score_from_hidden_outputs(entropy=False),
        ),
    ),
    "hidden, no rows": ("sample_from_hidden", lambda: (*sample_from_hidden_arguments(0), True)),
    "particles, no stop automaton": (
        "branch_particles",
        lambda: (*branch_arguments(dtype=torch.bfloat16, stops=False), branch_tally()),
    ),
    "particles, no groups": ("branch_particles", lambda: (*branch_arguments(0), branch_tally(0))),
    "particles, no groups, out": ("branch_particles_out", lambda: (*branch_arguments(0), *branch_outputs(0))),
    "no selections": ("select_candidate_out", lambda: (*selection_arguments(0), torch.zeros(0, dtype=torch.bool))),
    "no answers": ("mh_accept", lambda: accept_arguments(0)),
    "bfloat16 slabs": ("kv_copy_ranges", lambda: copy_arguments(torch.bfloat16)),
}


@pytest.mark.parametrize("name", ["sample_tokens", "sample_from_hidden"])
def test_a_row_with_its_own_seed_draws_what_it_draws_alone(backend, name):
    """Four rows with the same counter, so that nothing but the seed tells them apart."""
    rows = 4
    head, vectors = {"sample_tokens": (0, 1), "sample_from_hidden": (2, 3)}[name]
    arguments = list((sample_arguments if head == 0 else sample_from_hidden_arguments)(rows, own_seeds=True))
    arguments[0][:] = arguments[0][0]
    arguments[vectors + 1].fill_(0.1)  # many tokens are likely
    at = vectors + 3  # alpha, beta, seed, counter, exclude
    arguments[at][:] = arguments[at][0]
    arguments[at + 1] = None
    together = call(name, (*arguments, True))
    assert len(set(together.token.tolist())) > 1, "every seed drew the same"
    for row in range(rows):
        one = slice(row, row + 1)
        alone = [
            a[one] if isinstance(a, torch.Tensor) and i in (0, *range(vectors, at + 1)) else a
            for i, a in enumerate(arguments)
        ]
        assert_same_bits(call(name, (*alone, True)), [column[one] for column in together])


def test_every_operator_of_the_namespace_is_tested_here():
    assert set(ARGUMENTS) == set(dispatch.SCHEMAS)


def test_what_writes_its_arguments_returns_nothing_and_what_returns_writes_nothing():
    for name in dispatch.SCHEMAS:
        schema = getattr(NAMESPACE, name).default._schema
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        assert writes == (len(schema.returns) == 0), name
        assert writes == (name in dispatch.KERNELS), name


def placed(arguments: tuple) -> tuple:
    """The same arguments where the tests run: what the dispatcher chooses by."""
    return tuple(on_device(a) for a in arguments)


def opcheck(name: str, arguments: tuple) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # It takes NaN for a difference, and empty rows have it; below, compiled branch_particles is compared bit by bit.
    if name != "branch_particles":
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(NAMESPACE, name).default, placed(arguments), test_utils=checks)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_operators_pass_opcheck(name):
    opcheck(name, ARGUMENTS[name]())


@pytest.mark.parametrize("case", OTHER_ARGUMENTS)
def test_operators_pass_opcheck_with_other_arguments(case):
    name, arguments = OTHER_ARGUMENTS[case]
    opcheck(name, arguments())


# ---- fakes


@pytest.mark.parametrize(
    "name",
    ["sample_tokens", "score_tokens", "sample_from_hidden", "score_from_hidden", "branch_particles", "mh_accept"],
)
def test_fakes_promise_the_shapes_dtypes_and_strides_that_come(backend, name):
    arguments = ARGUMENTS[name]()
    real = getattr(NAMESPACE, name)(*arguments)
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    promised = getattr(NAMESPACE, name)(*on_meta)
    assert len(real) == len(promised)
    for got, fake in zip(real, promised, strict=True):
        assert fake.device.type == "meta"
        assert (got.shape, got.dtype, got.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_public_functions_take_tensors_without_data():
    logits, *rest = (a.to("meta") for a in sample_arguments())
    out = pk.sample_tokens(logits, *rest, return_entropy=True)
    assert [c.shape for c in out] == [(3,)] * 6
    assert out.token.dtype == torch.int64
    assert pk.sample_tokens(logits, *rest).entropy is None
    assert pk.score_tokens(*(a.to("meta") for a in score_arguments())).logp.shape == (3,)
    table, rest = pk.SlotTable.allocate(4, "meta"), [a.to("meta") for a in slot_arguments()[4:]]
    assert [c.shape for c in pk.sample_slots(table, *rest)] == [(3,), (3, 3), (3,)]
    assert pk.mh_accept(*(a.to("meta") for a in accept_arguments())).accept.dtype == torch.bool
    assert pk.kv_copy_ranges(*(a.to("meta") for a in copy_arguments())) is None


def test_shapes_may_be_symbolic():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(a) for a in sample_arguments(5)]
    with mode:
        out = NAMESPACE.sample_tokens(*fakes, True)
    assert all(column.shape == fakes[0].shape[:1] for column in out)


# ---- preallocated outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [True, False])
def test_sample_tokens_out_writes_what_sample_tokens_returns(backend, dtype, entropy):
    rows, vocab = 3, 2100
    arguments = sample_arguments(rows, vocab, dtype)
    workspace, *columns = sample_outputs(rows, vocab, entropy)
    assert pk.sample_tokens_out(*arguments, workspace, *columns) is None
    assert_same_bits(pk.sample_tokens(*arguments, return_entropy=entropy), columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [True, False])
def test_score_tokens_out_writes_what_score_tokens_returns(backend, dtype, entropy):
    arguments = score_arguments(3, 2100, dtype)
    workspace, *columns = score_outputs(3, 2100, entropy)
    assert pk.score_tokens_out(*arguments, workspace, *columns) is None
    assert_same_bits(pk.score_tokens(*arguments, return_entropy=entropy), columns)


@pytest.mark.parametrize("entropy", [True, False])
def test_sample_slots_out_writes_what_sample_slots_returns(backend, entropy):
    arguments, once = slot_arguments(3, 2100), slot_arguments(3, 2100)
    workspace, *columns = slot_outputs(3, 2100)
    table, rest = pk.SlotTable(*arguments[:4]), arguments[4:]
    assert pk.sample_slots_out(table, *rest, workspace, *columns, entropy=entropy) is None
    assert columns[2].tolist() == [pk.SlotFlag.REJECTED, 0, 0]
    assert_same_bits(pk.sample_slots(pk.SlotTable(*once[:4]), *once[4:], entropy=entropy), columns)
    assert_same_bits(once, arguments)
    assert not torch.equal(table.cumw, slot_table().cumw), "no sum was advanced"


@pytest.mark.parametrize("dtype", DTYPES)
def test_branch_particles_out_writes_what_branch_particles_returns(backend, dtype):
    arguments, outputs = branch_arguments(2, 3, 2100, dtype), branch_outputs(2, 3, 2100)
    assert pk.branch_particles_out(*arguments, *outputs) is None
    want = call("branch_particles", (*arguments, branch_tally()))
    assert_same_bits(want, in_order_of_the_results(outputs))
    assert not torch.equal(want.tally, branch_tally()), "nothing has closed"


def test_select_candidate_out_writes_what_select_candidate_returns(backend):
    moved = torch.zeros(3, dtype=torch.bool)
    assert pk.select_candidate_out(*selection_arguments(), moved) is None
    assert torch.equal(pk.select_candidate(*selection_arguments()), moved)


def test_mh_accept_out_writes_what_mh_accept_returns(backend):
    columns = accept_outputs()
    assert pk.mh_accept_out(*accept_arguments(), *columns) is None
    assert_same_bits(pk.mh_accept(*accept_arguments()), columns)


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name != "mh_advance"])
def test_arguments_that_are_not_outputs_are_left_as_they_were(backend, name):
    arguments = ARGUMENTS[name]()
    before = [a.clone() if isinstance(a, torch.Tensor) else None for a in arguments]
    call(name, arguments)
    schema = getattr(NAMESPACE, name).default._schema
    for declared, old, new in zip(schema.arguments, before, arguments, strict=True):
        if old is not None and not (declared.alias_info and declared.alias_info.is_write):
            assert_same_bits([old], [new])


# tiles of 256 and of 2048: one entry, one tile of either and one entry more, several
@pytest.mark.parametrize("vocab", [1, 256, 257, 2048, 2049, 4500])
def test_a_workspace_of_exactly_the_promised_size_is_enough_and_its_contents_do_not_matter(backend, vocab):
    rows = 2
    size = pk.workspace_size(rows, vocab)
    assert size == rows * 4 * -(-vocab // 256)
    branching = pk.branch_workspace_size(rows + 1, vocab)
    results = []
    for fill in (NAN, float("inf"), 0.0):
        guarded = torch.full((size + 64,), fill)
        guarded[size:] = 1234.5
        _, *columns = sample_outputs(rows, vocab)
        pk.sample_tokens_out(*sample_arguments(rows, vocab), guarded[:size], *columns)
        _, *scored = score_outputs(rows, vocab)
        pk.score_tokens_out(*score_arguments(rows, vocab), guarded[:size], *scored)
        _, *by_slot = slot_outputs(rows, vocab)
        table, *rest = pk.SlotTable(*slot_arguments(rows, vocab)[:4]), *slot_arguments(rows, vocab)[4:]
        pk.sample_slots_out(table, *rest, guarded[:size], *by_slot, entropy=True)
        whole = torch.full((branching + 64,), fill)
        whole[branching:] = 1234.5
        _, *branched = branch_outputs(1, rows, vocab)
        pk.branch_particles_out(*branch_arguments(1, rows, vocab), whole[:branching], *branched)
        assert (guarded[size:] == 1234.5).all(), "written past its end"
        assert (whole[branching:] == 1234.5).all(), "written past its end"
        results.append([*columns, *scored, *by_slot, *branched])
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_a_larger_workspace_at_an_odd_offset_serves_as_well(backend):
    rows, vocab = 3, 2100
    arguments = sample_arguments(rows, vocab)
    _, *columns = sample_outputs(rows, vocab)
    workspace = torch.full((2 * pk.workspace_size(rows, vocab) + 1,), NAN)[1:]  # 4-byte aligned, no more
    pk.sample_tokens_out(*arguments, workspace, *columns)
    assert_same_bits(pk.sample_tokens(*arguments, return_entropy=True), columns)
    workspace = torch.full((2 * pk.branch_workspace_size(6, vocab) + 1,), NAN)[1:]
    arguments, (_, *columns) = branch_arguments(vocab=vocab), branch_outputs(vocab=vocab)
    pk.branch_particles_out(*arguments, workspace, *columns)
    assert_same_bits(call("branch_particles", (*arguments, branch_tally())), in_order_of_the_results((None, *columns)))


def test_one_workspace_serves_batches_of_every_size_in_turn(backend):
    workspace = torch.full((pk.workspace_size(4, 2100),), NAN)
    for rows, vocab in ((4, 2100), (1, 2100), (3, 300), (0, 300), (4, 2100)):
        arguments = sample_arguments(rows, vocab)
        _, *columns = sample_outputs(rows, vocab)
        pk.sample_tokens_out(*arguments, workspace, *columns)
        assert_same_bits(pk.sample_tokens(*arguments, return_entropy=True), columns)


# ---- compilation


def whole_step(logits, alpha, beta, seed, counter, exclude, cur, prop, n_cur, n_prop, log_u, dst, src, ranges):
    drawn = pk.sample_tokens(logits, alpha, beta, seed, counter, exclude, return_entropy=True)
    scored = pk.score_tokens(logits, drawn.token, alpha, beta)
    verdict = pk.mh_accept(cur, prop, n_cur, n_prop, log_u)
    pk.kv_copy_ranges(dst, src, ranges)
    return drawn.token, drawn.weight, drawn.entropy, scored.logp, verdict.accept


def between_others(logits, *rest):
    *outputs, accept = whole_step(logits + 1.0, *rest)
    return *(column + 1 for column in outputs), ~accept, rest[-3].sum()  # the slab after the copy


# inductor runs `whole_step` alone: between other operations it would wait for a C++ compiler
@pytest.mark.parametrize(
    ("function", "compiler", "dynamic"),
    [(between_others, "aot_eager", False), (between_others, "aot_eager", True), (whole_step, "inductor", False)],
)
def test_operators_compile_into_one_graph_and_give_the_same_bits(function, compiler, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (3, 5) if dynamic else (3,):
        eager, once = (placed((*sample_arguments(rows), *accept_arguments(rows), *copy_arguments())) for _ in range(2))
        want = function(*eager)
        assert_same_bits(compiled(*once), want)
        assert torch.equal(once[-3], eager[-3]), "the copy was lost"


def into_outputs(arguments, outputs):
    pk.sample_tokens_out(*arguments, *outputs)
    return outputs[1] + 1


def test_the_out_forms_compile_into_one_graph_and_keep_their_writes():
    torch._dynamo.reset()
    compiled = torch.compile(into_outputs, fullgraph=True, backend="aot_eager")
    eager, once = placed(sample_outputs()), placed(sample_outputs())
    want = into_outputs(placed(sample_arguments()), eager)
    assert torch.equal(compiled(placed(sample_arguments()), once), want)
    assert_same_bits(once[1:], eager[1:])


@pytest.mark.parametrize("into", [False, True])
def test_sample_slots_compiles_into_one_graph_and_keeps_its_writes(into, monkeypatch):
    monkeypatch.undo()  # torch.compile cannot trace what poisons new memory

    def step(tensors, arguments, outputs):
        if into:
            pk.sample_slots_out(pk.SlotTable(*tensors), *arguments, *outputs, entropy=True)
            return outputs[1] + 1
        return pk.sample_slots(pk.SlotTable(*tensors), *arguments, entropy=True)

    torch._dynamo.reset()
    eager, once = ((placed(slot_arguments()), placed(slot_outputs())) for _ in range(2))
    want = step(eager[0][:4], eager[0][4:], eager[1])
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(once[0][:4], once[0][4:], once[1])
    assert_same_bits([got] if into else got, [want] if into else want)
    assert_same_bits(once[0], eager[0])  # the table's sums
    assert_same_bits(once[1][1:], eager[1][1:])
    assert into == bool((once[1][1] != -77).all())


@pytest.mark.parametrize("into", [False, True])
def test_branch_particles_compiles_into_one_graph_and_keeps_its_writes(into, monkeypatch):
    monkeypatch.undo()  # torch.compile cannot trace what poisons new memory

    def step(arguments, outputs):
        if into:
            pk.branch_particles_out(*arguments, *outputs)
            return outputs[2] + 1
        return tuple(call("branch_particles", (*arguments, outputs[1])))

    torch._dynamo.reset()
    eager, once = (placed(branch_outputs()) for _ in range(2))
    want = step(placed(branch_arguments()), eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(placed(branch_arguments()), once)
    assert_same_bits([got] if into else got, [want] if into else want)
    assert_same_bits(once[1:], eager[1:])
    assert into == bool((once[2] != -77).all())


def test_mh_advance_compiles_into_one_graph_and_keeps_its_writes():
    def advance(tensors, length_term, seed, eos, *drawn):
        pk.mh_advance(pk.ChainState(*tensors), LAW, length_term, seed, eos, *drawn)

    torch._dynamo.reset()
    eager, once = (pk.ChainState(*placed(running_state().tensors())) for _ in range(2))
    rest = placed((*advance_constants(), *sampled(eager)))
    advance(eager.tensors(), *rest)
    torch.compile(advance, fullgraph=True, backend="aot_eager")(once.tensors(), *rest)
    assert_same_bits(once.tensors(), eager.tensors())
    assert not torch.equal(once.position.cpu(), running_state().position), "nothing was advanced"


# ---- dispatch


def test_the_backend_of_a_device_and_of_a_block(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", None)
    assert pk.backend_for("cuda") == "triton"
    assert pk.backend_for("meta") == "reference"
    assert pk.backend_for("cpu") == ("reference" if dispatch.EXTENSION_MISSING else "cpp")
    with pk.use_backend("reference"):
        assert pk.backend_for("cuda") == "reference"
        with pk.use_backend("triton"):
            assert pk.backend_for("cpu") == "triton"
        assert pk.backend_for("cpu") == "reference"
    assert dispatch._chosen is None


def test_a_block_ends_its_backend_even_when_it_raises(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", None)
    with pytest.raises(ZeroDivisionError), pk.use_backend("reference"):
        1 / 0  # noqa: B018
    assert dispatch._chosen is None


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_backend_that_is_asked_for_is_the_one_that_runs(monkeypatch, name):
    ran = []
    kernel = name if name in dispatch.KERNELS else name + "_out"
    module, original = dispatch._family("reference", dispatch.KERNELS[kernel]), dispatch._kernel("reference", kernel)
    monkeypatch.setattr(module, kernel, lambda *args: (ran.append(kernel), original(*args))[1])
    arguments = ARGUMENTS[name]()
    with pk.use_backend("reference"):
        call(name, arguments)
    assert ran == [kernel]
