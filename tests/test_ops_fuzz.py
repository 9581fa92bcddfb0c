"""Any shape, stride, dtype and pattern of values: a backend does what the reference does, or raises the same error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")  # a machine that only checks a GPU may lack it
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import power_kernels as pk
from power_kernels.errors import ArgumentError
from power_kernels.state import Status
from tests.op_helpers import (
    BACKENDS,
    DTYPES,
    FLOATS,
    INF,
    INTERPRETED,
    NAN,
    SEED,
    accept_tolerance,
    assert_accepted_as,
    assert_same_bits,
    assert_sample,
    assert_score,
    serving,
)
from tests.test_sample_slots import sampled

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EXAMPLES = {"cpp": 400, "triton": 25 if INTERPRETED else 100, "reference": 40}  # 20 ms a row there, or a compilation


def slow(backend: str) -> bool:
    return backend == "triton" and INTERPRETED


def fuzz(backend: str, factor: float = 1.0):
    """The same examples on every machine; a failing one prints what reproduces it."""
    return settings(
        max_examples=max(1, int(EXAMPLES[backend] * factor)),
        deadline=None,
        derandomize=True,
        print_blob=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )


def on_every_backend(factor: float = 1.0):
    """Parametrises a test of one drawn argument over the backends, each with its own number of examples."""

    def decorate(test):
        @pytest.mark.parametrize("backend", BACKENDS)
        def run(backend):
            @fuzz(backend, factor)
            @given(data=st.data())
            def examples(data):
                test(backend, data)

            with serving(backend):
                examples()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


# ---- what is drawn

# around a vector, a thread's share, the narrowest tile, the tiles of both backends
EDGES = [1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097]
PATTERNS = ["normal", "wide", "tied", "flat", "peaked", "holes", "alone", "shifted", "huge", "tiny", "integers"]
FLAWS = ["none", "none", "none", "none", "nan", "+inf", "both", "no mass"]


def row_of(pattern: str, vocab: int, rng: np.random.Generator) -> np.ndarray:
    z = rng.normal(0, 2, vocab)
    place = rng.integers(vocab)
    match pattern:
        case "wide":
            z *= 40
        case "tied":
            z = np.round(z)
        case "flat":
            z[:] = z[0]
        case "peaked":
            z[place] += rng.choice([5.0, 18.0, 40.0, 80.0, 200.0])
        case "holes":
            z[rng.random(vocab) < rng.random()] = -INF
            z[place] = rng.normal()
        case "alone":
            z[:] = -INF
            z[place] = rng.normal()
        case "shifted":
            z += rng.choice([-1e4, 1e4])
        case "huge":
            z *= 10.0 ** rng.integers(2, 5)
        case "tiny":
            z *= 1e-40
        case "integers":
            z = rng.integers(-8, 9, vocab).astype(float)
    return z


def flawed(z: np.ndarray, flaw: str, rng: np.random.Generator) -> np.ndarray:
    if flaw == "no mass":
        z[:] = -INF
    if flaw in ("+inf", "both"):
        z[rng.integers(len(z))] = INF
    if flaw in ("nan", "both"):
        z[rng.integers(len(z))] = NAN
    return z


def draw_logits(data, backend: str) -> torch.Tensor:
    vocab = data.draw(st.one_of(st.sampled_from(EDGES), st.integers(1, 700)), "vocab")
    rows = data.draw(st.integers(0, 3 if slow(backend) else 9), "rows")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    kinds = st.tuples(st.sampled_from(PATTERNS), st.sampled_from(FLAWS))
    kinds = data.draw(st.lists(kinds, min_size=rows, max_size=rows), "rows of")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "values"))
    z = [flawed(row_of(pattern, vocab, rng), flaw, rng) for pattern, flaw in kinds]
    z = torch.from_numpy(np.array(z).reshape(rows, vocab)).to(dtype)
    layout = data.draw(st.sampled_from(["contiguous", "padded", "expanded"]), "layout")
    if layout == "contiguous" or rows == 0:
        return z
    if layout == "expanded":
        return z[:1].expand(rows, vocab)
    pad, offset = data.draw(st.integers(1, 9), "pad"), data.draw(st.integers(0, 9), "offset")
    buffer = torch.full((offset + rows * (vocab + pad),), NAN, dtype=dtype)
    view = buffer[offset:].view(rows, vocab + pad)[:, :vocab]
    view.copy_(z)
    return view


def draw_vector(data, rows: int, values: st.SearchStrategy, dtype: torch.dtype, label: str) -> torch.Tensor:
    return torch.tensor(data.draw(st.lists(values, min_size=rows, max_size=rows), label), dtype=dtype)


EXPONENT = st.one_of(st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]), st.floats(0.125, 10.0, width=32))
BAD_EXPONENT = st.sampled_from([0.0, -1.0, NAN, INF])
WORD = st.integers(-(2**31), 2**31 - 1)


def draw_exponents(data, rows: int) -> list[torch.Tensor]:
    """alpha and beta, equal half of the time; now and then one of them is bad in one row."""
    alpha = draw_vector(data, rows, EXPONENT, torch.float32, "alpha")
    equal = data.draw(st.booleans(), "beta = alpha")
    beta = alpha.clone() if equal else draw_vector(data, rows, EXPONENT, torch.float32, "beta")
    if rows and data.draw(st.integers(0, 19), "spoil") == 0:
        spoilt = data.draw(st.sampled_from([alpha, beta]))
        spoilt[data.draw(st.integers(0, rows - 1))] = data.draw(BAD_EXPONENT)
    return [alpha, beta]


def token_in_or_near(vocab: int) -> st.SearchStrategy:
    return st.one_of(st.integers(0, vocab - 1), st.sampled_from([-1, 0, vocab - 1, vocab, 2**31, 2**40, -(2**40)]))


def result_or_error(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except ArgumentError as error:
        return error


def check_errors(ours, theirs) -> bool:
    """True if both are errors, and the same one; fails if only one is."""
    failed = isinstance(ours, ArgumentError), isinstance(theirs, ArgumentError)
    assert failed[0] == failed[1], (ours, theirs)
    if all(failed):
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
    return failed[0]


def draw_seeds(data, rows: int) -> torch.Tensor:
    """One seed for all rows, or one a row."""
    many = rows if data.draw(st.booleans(), "own seeds") else 1
    seeds = st.sampled_from([SEED, 0, -1, -(2**63), 2**63 - 1])
    return torch.tensor(data.draw(st.lists(seeds, min_size=many, max_size=many), "seed"), dtype=torch.int64)


# ---- the laws


@on_every_backend()
def test_samples_are_the_references(backend, data):
    z = draw_logits(data, backend)
    rows, vocab = z.shape
    alpha, beta = draw_exponents(data, rows)
    counter = draw_vector(data, 4 * rows, WORD, torch.int32, "counter").view(rows, 4)
    exclude = draw_vector(data, rows, token_in_or_near(vocab), torch.int64, "exclude")
    exclude = exclude if data.draw(st.booleans(), "excluding") else None
    seed = draw_seeds(data, rows)
    arguments = (z, alpha, beta, seed, counter, exclude)
    entropy = data.draw(st.booleans(), "entropy")
    ours = result_or_error(pk.sample_tokens, *arguments, return_entropy=entropy)
    with pk.use_backend("reference"):
        theirs = result_or_error(pk.sample_tokens, *arguments, return_entropy=entropy)
    if check_errors(ours, theirs):
        return
    assert ours.status.tolist() == theirs.status.tolist()
    assert_sample(z, alpha, beta, counter, exclude, ours, seed=seed.numpy())
    good = (ours.status == Status.OK).nonzero()[:, 0].tolist()
    if good:  # alone, contiguous, and asked for the entropy or not: the same bits
        row = slice(data.draw(st.sampled_from(good), "row"), None)
        row = slice(row.start, row.start + 1)
        alone = pk.sample_tokens(
            z[row].contiguous(),
            alpha[row],
            beta[row],
            seed[row] if len(seed) == rows else seed,
            counter[row],
            None if exclude is None else exclude[row],
            return_entropy=entropy,
        )
        assert_same_bits(alone, [None if column is None else column[row] for column in ours])


def draw_table(data, slots: int, vocab: int) -> pk.SlotTable:
    """Any values of any column but the positions, which stay about the answer's beginning."""
    table, anything, small = pk.SlotTable.allocate(slots), st.integers(-(2**63), 2**63 - 1), st.integers(-3, 6)
    columns = dict.fromkeys(pk.SlotField, st.one_of(small, anything)) | {
        pk.SlotField.ACTIVE: st.sampled_from([0, 1, 1, 1, -7]),
        pk.SlotField.BASE: small,
        pk.SlotField.FIRST: small,
        pk.SlotField.EXCLUDE: token_in_or_near(vocab),
    }
    for column, values in columns.items():
        table.field[:, column] = draw_vector(data, slots, values, torch.int64, column.name)
    odd = st.sampled_from([0.0, -INF, INF, NAN])
    for target, values, label in (
        (table.exponent[:, 0], EXPONENT, "alpha"),
        (table.exponent[:, 1], EXPONENT, "beta"),
        (table.bound[:, 0], st.one_of(st.floats(-60.0, 5.0), odd), "theta"),
        (table.bound[:, 1], st.one_of(st.floats(-2.0, 2.0), odd), "lambda"),
        (table.cumw, st.one_of(st.floats(-50.0, 0.0), odd), "W"),
    ):
        target.copy_(draw_vector(data, slots, values, target.dtype, label))
    return table


@on_every_backend(0.5)
def test_steps_by_slot_draw_as_sampling_does_and_decide_by_their_own_weights(backend, data):
    z = draw_logits(data, backend)
    rows, vocab = z.shape
    slots = rows + 2
    table = draw_table(data, slots, vocab)
    slot = torch.tensor(data.draw(st.permutations(range(slots)), "slots")[:rows], dtype=torch.int64)
    outside = draw_vector(data, rows, st.sampled_from([0, 0, 0, -1, slots, -(2**63), 2**40]), torch.int64, "outside")
    position = draw_vector(data, rows, st.integers(-2, 9), torch.int64, "position")
    live = draw_vector(data, rows, st.booleans(), torch.bool, "live")
    entropy = data.draw(st.booleans(), "entropy")
    field, sums = table.field[slot], table.cumw.clone()
    plain = sampled(table, z, slot, position)
    out = pk.sample_slots(table, z, torch.where(outside == 0, slot, outside), position, live, entropy=entropy)
    mine = (outside == 0) & (field[:, pk.SlotField.ACTIVE] != 0)
    assert (out.token[~mine] == -1).all()
    assert out.values[~mine].isnan().all()
    assert torch.equal((out.flags & 7)[mine], plain.status[mine].long())
    last = plain.entropy if entropy else torch.zeros(rows)
    values = [out.values[:, 0][mine], out.values[:, 1][mine], out.values[:, 2][mine]]
    assert_same_bits(values, [plain.logq[mine], plain.weight[mine], last[mine]])
    for row in mine.nonzero()[:, 0].tolist():
        s, good = int(slot[row]), plain.status[row] == Status.OK
        stop, horizon, early = (
            int(field[row, c]) for c in (pk.SlotField.STOP_TOKEN, pk.SlotField.HORIZON, pk.SlotField.CAN_END_EARLY)
        )
        rejected = bool(out.flags[row] & pk.SlotFlag.REJECTED)
        if good and live[row]:
            sums[s] += plain.weight[row].double()
            n = int(position[row]) + 2 - int(field[row, pk.SlotField.BASE])
            theta, bonus = table.bound[s].tolist()
            terms = [bonus * max(m, 1) - math.log(max(m, 1)) for m in (n if early else horizon, horizon)]
            gaps = [float(sums[s]) + term - theta for term in terms]
            if not any(abs(gap) < 1e-9 * (1 + abs(theta)) for gap in gaps):  # a rounding away
                assert rejected == all(float(sums[s]) + term < theta for term in terms)
        else:
            assert not rejected
        drawn = int(plain.token[row])
        assert int(out.token[row]) == (max(stop, 0) if not good else stop if rejected and stop >= 0 else drawn)
    assert_same_bits([table.cumw], [sums])


@on_every_backend()
def test_scores_are_the_references(backend, data):
    z = draw_logits(data, backend)
    rows, vocab = z.shape
    alpha, beta = draw_exponents(data, rows)
    tokens = draw_vector(data, rows, token_in_or_near(vocab), torch.int64, "tokens")
    entropy = data.draw(st.booleans(), "entropy")
    ours = result_or_error(pk.score_tokens, z, tokens, alpha, beta, return_entropy=entropy)
    with pk.use_backend("reference"):
        theirs = result_or_error(pk.score_tokens, z, tokens, alpha, beta, return_entropy=entropy)
    if check_errors(ours, theirs):
        return
    assert ours.status.tolist() == theirs.status.tolist()
    assert_score(z, tokens, alpha, beta, ours)
    for name in FLOATS[:3]:  # infinities and NaN stand in the same places
        a, b = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(torch.isnan(a), torch.isnan(b))
        assert torch.equal(a == -INF, b == -INF)


@on_every_backend(0.3)
def test_heads_draw_and_score_what_the_reference_does_alone_and_in_a_batch(backend, data):
    # Products of small integers are exact in every dtype and order, so that the logits are the reference's.
    rows = data.draw(st.integers(0, 2 if backend == "triton" else 9), "rows")
    width = data.draw(st.sampled_from([1, 2, 15, 16, 17, 33, 64]), "width")
    vocab = data.draw(st.one_of(st.sampled_from(EDGES[:17]), st.integers(1, 300)), "vocab")
    exact = (torch.float32, torch.float16) if backend == "triton" else DTYPES  # the interpreter's bfloat16 is not
    dtype = data.draw(st.sampled_from(exact), "dtype")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "values"))
    pad = data.draw(st.integers(0, 3), "pad")

    def integers(*shape) -> torch.Tensor:
        padded = torch.full((*shape[:-1], shape[-1] + pad), NAN, dtype=dtype)
        padded[..., : shape[-1]] = torch.from_numpy(rng.integers(-3, 4, shape))
        return padded[..., : shape[-1]]

    hidden, lm_head = integers(rows, width), integers(vocab, width)
    bias = torch.from_numpy(rng.integers(-5, 6, vocab)).to(dtype) if data.draw(st.booleans(), "bias") else None
    if bias is not None and data.draw(st.booleans(), "forbidden"):
        bias[rng.random(vocab) < 0.5] = -INF
    scale = data.draw(st.sampled_from([1.0, 0.5, 0.0625]), "scale")
    z = hidden.float() @ lm_head.float().T
    z = scale * (z if bias is None else z + bias.float())
    alpha, beta = draw_exponents(data, rows)
    counter = draw_vector(data, 4 * rows, WORD, torch.int32, "counter").view(rows, 4)
    exclude = draw_vector(data, rows, token_in_or_near(vocab), torch.int64, "exclude")
    head = dict(bias=bias, scale=scale, return_entropy=True)
    seed = draw_seeds(data, rows)

    def both(part: slice):
        arguments = (alpha[part], beta[part])
        seeds = seed[part] if len(seed) == rows else seed
        drawn = pk.sample_from_hidden(hidden[part], lm_head, *arguments, seeds, counter[part], exclude[part], **head)
        return drawn, pk.score_from_hidden(hidden[part], lm_head, exclude[part], *arguments, **head)

    ours = result_or_error(both, slice(0, rows))
    with pk.use_backend("reference"):
        theirs = result_or_error(both, slice(0, rows))
    if check_errors(ours, theirs):
        return
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.status.tolist() == other.status.tolist()
    assert_sample(z, alpha, beta, counter, exclude, ours[0], seed=seed.numpy())
    assert_score(z, exclude, alpha, beta, ours[1])
    if rows:
        row = data.draw(st.integers(0, rows - 1), "row")
        part = slice(row, row + 1)
        for alone, whole in zip(both(part), ours, strict=True):
            assert_same_bits(alone, [column[part] for column in whole])


@on_every_backend()
def test_acceptances_are_the_references_bit_for_bit(backend, data):
    rows = data.draw(st.integers(0, 3 if slow(backend) else 8), "rows")
    widths = data.draw(st.tuples(*[st.integers(0, 70)] * 2), "widths")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "values"))
    weights = []
    for width in widths:
        values = -rng.random((rows, width)) * 10.0 ** rng.integers(-3, 7)
        rate = data.draw(st.sampled_from([0.0, 0.0, 0.02]), "flaws")
        where = rng.random((rows, width)) < rate
        values[where] = rng.choice([NAN, INF, -INF, 0.0], where.sum())
        pad = data.draw(st.integers(0, 3), "pad")
        padded = torch.full((rows, width + pad), NAN)
        padded[:, :width] = torch.from_numpy(values)
        weights.append(padded[:, :width])
    lengths = [
        draw_vector(data, rows, st.one_of(st.integers(1, max(1, w)), st.integers(-1, w + 1)), torch.int32, "lengths")
        for w in widths
    ]
    log_u = st.one_of(st.floats(-50, 0), st.sampled_from([0.0, -INF, NAN, INF]))
    log_u = draw_vector(data, rows, log_u, torch.float64, "log u")
    with pk.use_backend("reference"):
        theirs = pk.mh_accept(*weights, *lengths, log_u)
        if data.draw(st.booleans(), "at the boundary"):
            log_u = torch.where(theirs.status == Status.OK, theirs.log_ratio, log_u)
            theirs = pk.mh_accept(*weights, *lengths, log_u)
    ours = pk.mh_accept(*weights, *lengths, log_u)
    want = theirs.accept.tolist(), theirs.log_ratio.tolist(), theirs.status.tolist()
    assert_accepted_as(ours, *want, log_u, accept_tolerance(*weights))


SLAB_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e5m2, torch.float64, torch.bool]


def draw_slab(data, shape, dtype: torch.dtype, rng) -> torch.Tensor:
    """A slab of random bytes in any order of its outer dimensions, with any padding behind them and any offset."""
    order = data.draw(st.permutations(range(4)), "order")
    pads = data.draw(st.tuples(*[st.sampled_from([0, 0, 1, 4])] * 5), "pads")
    offset = data.draw(st.sampled_from([0, 0, 1, 3, 8]), "offset")
    outer = [shape[i] + pads[i] for i in order]
    stored = [*outer, shape[4] + pads[4]]
    size = offset + math.prod(stored)
    raw = torch.from_numpy(rng.integers(0, 2 if dtype is torch.bool else 256, size * dtype.itemsize, dtype=np.uint8))
    slab = raw.view(dtype)[offset:].view(stored).permute(*np.argsort(order).tolist(), 4)
    return slab[tuple(slice(0, n) for n in shape)]


def raw_bytes(slab: torch.Tensor) -> np.ndarray:
    return slab.contiguous().view(torch.uint8).numpy().copy()


@on_every_backend()
def test_copies_are_exactly_the_ranges(backend, data):
    size = st.integers(1, 2 if slow(backend) else 4)
    groups, heads, dst_rows, src_rows = (data.draw(size) for _ in range(4))
    positions = data.draw(st.tuples(*[st.integers(1, 40)] * 2), "positions")
    dim = data.draw(st.sampled_from([1, 2, 3, 5, 8, 16, 17, 64]), "head dimension")
    dtype = data.draw(st.sampled_from(SLAB_DTYPES), "dtype")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "values"))
    dst = draw_slab(data, (groups, dst_rows, heads, positions[0], dim), dtype, rng)
    src = draw_slab(data, (groups, src_rows, heads, positions[1], dim), dtype, rng)
    ranges = []
    for row in data.draw(st.lists(st.integers(0, dst_rows - 1), max_size=3, unique=True), "destinations"):
        place = st.integers(0, min(positions))
        ranges.append([row, data.draw(st.integers(0, src_rows - 1)), data.draw(place), data.draw(place)])
    if data.draw(st.integers(0, 9), "spoil") == 0:  # a place that may be anything
        entry = data.draw(st.integers(0, 3), "entry")
        wild = [0, 0, 0, 1]
        wild[entry] = data.draw(WORD, "anything")
        ranges.append(wild)
    before, source, want = raw_bytes(dst), raw_bytes(src), raw_bytes(dst)
    inside = True
    for dst_row, src_row, start, stop in ranges:
        if start >= stop:
            continue
        inside &= 0 <= dst_row < dst_rows and 0 <= src_row < src_rows and start >= 0 and stop <= min(positions)
        if inside:
            want[:, dst_row, :, start:stop] = source[:, src_row, :, start:stop]
    if len({r[0] for r in ranges if r[2] < r[3]}) < sum(r[2] < r[3] for r in ranges):
        return  # two ranges write one row: not allowed, not checked
    error = result_or_error(pk.kv_copy_ranges, dst, src, torch.tensor(ranges, dtype=torch.int32).view(-1, 4))
    if inside:
        assert error is None, error
        np.testing.assert_array_equal(raw_bytes(dst), want)
    else:
        assert isinstance(error, ArgumentError)
        assert str(error).startswith("ranges[")
        np.testing.assert_array_equal(raw_bytes(dst), before)
    np.testing.assert_array_equal(raw_bytes(src), source)


@on_every_backend(0.4)
def test_a_misfitting_size_dtype_or_stride_raises_the_same_typed_error_whatever_the_backend(backend, data):
    rows, vocab = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
    z = torch.zeros(rows, vocab)
    arguments = {
        "logits": z,
        "alpha": torch.ones(rows),
        "beta": torch.ones(rows),
        "seed": torch.zeros(1, dtype=torch.int64),
        "counter": torch.zeros(rows, 4, dtype=torch.int32),
        "exclude": torch.full((rows,), -1),
    }
    name = data.draw(st.sampled_from(list(arguments)), "argument")
    value = arguments[name]
    damage = data.draw(st.sampled_from(["dtype", "shape", "longer", "stride", "device"]), "damage")
    arguments[name] = {
        "dtype": lambda: value.to(torch.complex64),
        "shape": lambda: value[None],
        "longer": lambda: torch.cat([value] * (rows + 1)),
        "stride": lambda: torch.stack([value, value], -1)[..., 0],
        "device": lambda: value.to("meta"),
    }[damage]()
    ours = result_or_error(pk.sample_tokens, **arguments)
    with pk.use_backend("reference"):
        theirs = result_or_error(pk.sample_tokens, **arguments)
    if not check_errors(ours, theirs):  # a stride of one entry means nothing
        assert damage == "stride"
        assert value.shape[-1] == 1 or value.numel() == 1
