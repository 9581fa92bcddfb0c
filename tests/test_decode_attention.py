"""Decode attention: every kernel against float64 and, in a model, against plain forward passes; each lane reads its own
length and nothing else; bits that no batchmate changes.

torch's flash attention needs a CUDA device; on a CPU its stand-in computes (`tests/flash_attention.py`).
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from power_kernels.api import PowerConfig, PowerSampler, torch_private
from power_kernels.api.engines.huggingface import HuggingFaceEngine, decode_attention
from power_kernels.api.engines.huggingface.decode_attention import FLASH, KERNELS, PADDED, ROWS, DecodeView
from power_kernels.api.engines.huggingface.ragged_cache import KvLayout
from power_kernels.errors import ArgumentError
from power_kernels.state import LaneField, LaneStatus, Status
from tests import flash_attention, tiny_models
from tests.devices import DEVICE, ON_CUDA, host_only
from tests.flash_attention import flash_by_contract
from tests.test_huggingface_engine import Script, decoded, plain_logits, prompt_of, ranges, run

CPU = torch.device("cpu")


@pytest.fixture
def flash_on_the_host():
    with flash_attention.on_the_host():
        yield


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def by_definition(query, keys, values, position, length, scale, window, softcap, sinks=None) -> torch.Tensor:
    """The module's formula, row by row and head by head, in float64. [rows, 1, heads, value dim]"""
    rows, heads = query.shape[:2]
    group = heads // keys.shape[1]
    out = torch.empty(rows, 1, heads, values.shape[-1], dtype=torch.float64)
    for r, p in enumerate(position.tolist()):
        stop = min(max(p, 0) + 1, length)
        start = 0 if window is None else max(0, stop - window)
        for h in range(heads):
            k, v = (x[r, h // group, start:stop].double().cpu() for x in (keys, values))
            score = k @ query[r, h, 0].double().cpu() * scale
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if sinks is not None:
                score = torch.cat([score, sinks[h : h + 1].double().cpu()])
            out[r, 0, h] = score.softmax(0)[: len(v)] @ v
    return out


def slabs(rows, kv_heads, positions, dim, value_dim=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        torch.randn(rows, kv_heads, positions, d, generator=generator).to(DEVICE, dtype)
        for d in (dim, value_dim or dim)
    )
    return keys, values


def queries(rows, heads, dim, dtype=torch.float32, seed=1):
    return torch.randn(rows, heads, 1, dim, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# One position; within, at and beyond a vector, a window of 5 and a block of 512.
POSITIONS = [0, 3, 4, 5, 16, 63, 511, 512, 699]
SLAB = 720


@host_only
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 16), (6, 1, 24)], ids=["grouped", "multi-head", "multi-query"]
)
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"),
    [
        (None, None, 0),
        (5, None, 0),
        (600, None, 0),
        (None, 3.0, 0),
        (5, 3.0, 0),
        (None, None, 3),
        (5, None, 3),
        (5, 3.0, 3),
    ],
)
def test_every_kernel_computes_the_formula(kernel, heads, kv_heads, dim, window, softcap, sinks, flash_on_the_host):
    rows = len(POSITIONS)
    keys, values = slabs(rows + 2, kv_heads, SLAB, dim)  # more rows than are fed
    query, position = queries(rows, heads, dim), torch.tensor(POSITIONS)
    sinks = torch.linspace(-sinks, sinks, heads) if sinks else None
    for length in (700, SLAB):
        got = DecodeView(position, length, kernel).attend(query, keys, values, 0.2, window, softcap, sinks)
        want = by_definition(query, keys, values, position, length, 0.2, window, softcap, sinks)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kernel", [ROWS, PADDED] if not ON_CUDA else [PADDED])
def test_values_may_be_narrower_than_keys(kernel):
    keys, values = slabs(3, 2, 40, 16, value_dim=8)
    query, position = queries(3, 4, 16), torch.tensor([2, 39, 11], device=DEVICE)
    got = DecodeView(position, 40, kernel).attend(query, keys, values, 0.3, None, None)
    want = by_definition(query, keys, values, position, 40, 0.3, None, None)
    torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=2e-3 if ON_CUDA else 2e-5)  # TF32 there


@host_only
@pytest.mark.parametrize("kernel", [PADDED, FLASH])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_model_decodes_alike_with_every_kernel(family, kernel, flash_on_the_host):
    """Rollbacks, commits and lanes at very different positions; test_huggingface_engine.py plays `rows`, longer."""
    build = tiny_models.FAMILIES[family]
    engine = HuggingFaceEngine(build(), attention=kernel, self_check=False)
    assert engine.attention == kernel
    script = Script(engine, build(), chains=3, lanes=2)
    script.admit([prompt_of(1, 1), prompt_of(25, 2), prompt_of(6, 3)])
    for _ in range(8):
        script.play()
    assert script.counts["compared"] >= 30


@host_only
@pytest.mark.parametrize("family", ["gpt_oss", "mixed_qwen2"])
def test_chains_are_the_same_with_every_kernel(family, flash_on_the_host):
    results = []
    for kernel in KERNELS:
        engine = HuggingFaceEngine(tiny_models.FAMILIES[family](), attention=kernel, self_check=False)
        config = PowerConfig(alpha=1.5, max_new_tokens=10, block_size=5, mcmc_steps=4, lanes=2)
        chains = PowerSampler(engine).generate(
            [[5, 6, 7], [8, 9, 10, 11]], config, num_chains=2, seed=3, eos_token_id=[]
        )
        results.append([(r.tokens, r.steps, r.accepted, r.outcomes) for r in chains])
    assert results[0] == results[1] == results[2]
    assert sum(accepted for _, _, accepted, _ in results[0]) >= 4, results[0]


@host_only
def test_the_self_check_passes_with_flash(flash_on_the_host):
    assert HuggingFaceEngine(tiny_models.mixed_qwen2(), attention=FLASH).attention == FLASH


# ---- what is read


@host_only
@pytest.mark.parametrize("kernel", [ROWS, FLASH])
@pytest.mark.parametrize("window", [None, 5])
def test_nothing_beyond_a_lane_s_own_positions_is_read(kernel, window, flash_on_the_host):
    rows = len(POSITIONS)
    keys, values = slabs(rows, 2, SLAB, 16)
    for r, p in enumerate(POSITIONS):
        for slab in (keys, values):
            slab[r, :, p + 1 :] = float("nan")
            if window is not None:
                slab[r, :, : max(0, p + 1 - window)] = float("nan")
    out = DecodeView(torch.tensor(POSITIONS), SLAB, kernel).attend(
        queries(rows, 4, 16), keys, values, 0.2, window, None
    )
    assert torch.isfinite(out).all()


@host_only
@pytest.mark.parametrize("kernel", [ROWS, FLASH])
def test_no_mask_is_made_where_the_kernel_needs_none(kernel, flash_on_the_host, monkeypatch):
    monkeypatch.setattr(DecodeView, "mask", lambda *a: pytest.fail("a mask was made"))
    keys, values = slabs(2, 2, 40, 16)
    for window in (None, 5):
        DecodeView(torch.tensor([3, 30]), 40, kernel).attend(queries(2, 4, 16), keys, values, 0.2, window, None)


class Calls(TorchDispatchMode):
    """What is launched: names and shapes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, tuple | list) else (out,)
        self.calls.append((func.name(), [tuple(x.shape) for x in outs if isinstance(x, torch.Tensor)]))
        return out


@pytest.mark.parametrize("kernel", [PADDED, pytest.param(FLASH, marks=host_only)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 3.0)])
def test_what_is_launched_does_not_depend_on_the_positions(kernel, window, softcap, flash_on_the_host):
    """As a CUDA graph needs it."""
    launched = []
    keys, values = slabs(4, 2, 40, 16)
    for positions in ([0, 0, 0], [39, 2, 17], [-4, 1000, 40]):
        query, position = queries(3, 4, 16), torch.tensor(positions, device=DEVICE)
        with Calls() as mode:
            view = DecodeView(position, 33, kernel)
            view.write_index(keys)
            view.attend(query, keys, values, 0.2, window, softcap)
        launched.append(mode.calls)
    assert len(launched[0]) > 4
    assert launched[0] == launched[1] == launched[2]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 3.0)])
def test_only_rows_looks_at_positions_on_the_host(kernel, window, softcap):
    """On meta tensors whatever reads a value raises."""

    def attend():
        keys, values = torch.ones(2, 4, 2, 40, 16, device="meta").unbind()
        view = DecodeView(torch.ones(3, dtype=torch.int64, device="meta"), 33, kernel)
        assert view.write_index(keys).shape == (6,)
        return view.attend(torch.ones(3, 4, 1, 16, device="meta"), keys, values, 0.2, window, softcap)

    if kernel == ROWS:
        with pytest.raises(NotImplementedError, match="meta"):
            attend()
    else:
        assert attend().shape == (3, 1, 4, 16)
    assert decode_attention.recordable(kernel) == (PADDED if kernel == ROWS else kernel)


@host_only
@pytest.mark.parametrize("window", [None, 5])
def test_some_lanes_of_a_slab_are_as_they_are_among_all(window, threads):
    """Neighbours that end alike, neighbours that do not, and lanes apart that end alike."""
    position = torch.tensor([9, 9, 9, 30, 9, 9, 2])
    keys, values = slabs(7, 2, 40, 16)
    query = queries(7, 4, 16)
    every = DecodeView(position, 40, ROWS)
    whole = every.attend(query, keys, values, 0.2, window, None)
    for lanes in ([0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 5], [0, 2, 4, 6], [6], [4, 5]):
        view = DecodeView(position[lanes], 40, ROWS, lanes)
        assert torch.equal(view.attend(query[lanes], keys, values, 0.2, window, None), whole[lanes])
        assert torch.equal(view.write_index(keys), every.write_index(keys).view(7, 2)[lanes].reshape(-1))
    for kernel in (PADDED, FLASH):
        with pytest.raises(ArgumentError, match=f"with the kernel '{kernel}'; only 'rows'"):
            DecodeView(position[:2], 40, kernel, [1, 2])


# ---- batchmates


@host_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 3.0)])
def test_a_row_s_bits_do_not_depend_on_the_others(window, softcap, dtype, threads):
    """Alone, among all, and with all others at the start, at the end, or where it is itself."""
    rows = len(POSITIONS)
    keys, values = slabs(rows, 3, SLAB, 32, dtype=dtype)
    query = queries(rows, 9, 32, dtype)

    def attend(positions, chosen=slice(None)):
        view = DecodeView(torch.tensor(positions)[chosen], max(positions) + 1, ROWS)
        return view.attend(query[chosen], keys[chosen], values[chosen], 0.2, window, softcap)

    together = attend(POSITIONS)
    for r, p in enumerate(POSITIONS):
        for others in (0, SLAB - 1, p):
            mates = [p if i == r else others for i in range(rows)]
            assert torch.equal(attend(mates)[r], together[r])
        assert torch.equal(attend(POSITIONS, slice(r, r + 1))[0], together[r])


@host_only
@pytest.mark.parametrize("family", ["llama", "mixed_qwen2", "gemma2"])
def test_the_logits_of_a_lane_have_the_same_bits_wherever_its_batchmates_are(family):
    engine = HuggingFaceEngine(tiny_models.FAMILIES[family](), self_check=False)
    assert engine.attention == ROWS
    lane, found = prompt_of(9, 1), []
    for mate in (prompt_of(1, 2), prompt_of(9, 3), prompt_of(90, 4)):
        state = run(engine, chains=2, lanes=1, max_length=tiny_models.CONTEXT)
        engine.prefill([0], [lane])  # each by itself: packed prompts share products of matrices
        engine.prefill([1], [mate])
        opened = [[row, row, 0, len(tokens) - 1] for row, tokens in enumerate((lane, mate))]
        engine.transfer(ranges([[0] * 4] * 2), ranges(opened))
        state.input_id.copy_(torch.tensor([lane[-1], mate[-1]]))
        state.position.copy_(torch.tensor([len(lane) - 1, len(mate) - 1]))
        found.append(decoded(engine, state))
        engine.end()
        want = plain_logits(tiny_models.FAMILIES[family](), [lane, mate], tiny_models.CONTEXT)
        torch.testing.assert_close(found[-1], want, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][1], found[2][1])


# ---- rows that do not run


@host_only
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 3.0)])
def test_a_row_that_does_not_run_sees_one_position_and_changes_no_other(kernel, window, softcap, flash_on_the_host):
    """The running rows keep their bits, all rows are written where they stand, and flash reads nothing else of idle
    rows: there is NaN."""
    rows = len(POSITIONS)
    keys, values = slabs(rows, 3, SLAB, 32)
    query, position = queries(rows, 9, 32), torch.tensor(POSITIONS)
    running = torch.arange(rows) % 3 != 2
    every = DecodeView(position, 700, kernel)
    want = every.attend(query, keys, values, 0.2, window, softcap)
    if kernel == FLASH and softcap is None:
        for slab in (keys, values):
            slab[~running, :, 1:] = float("nan")
    view = DecodeView(position, 700, kernel, running=running)
    got = view.attend(query, keys, values, 0.2, window, softcap)
    assert torch.equal(got[running], want[running])
    alone = by_definition(query, keys, values, torch.zeros(rows, dtype=torch.int64), 700, 0.2, window, softcap)
    torch.testing.assert_close(got[~running].double(), alone[~running], rtol=0, atol=2e-5)
    assert not torch.allclose(got[~running], want[~running], atol=0.1)
    assert torch.equal(view.write_index(keys), every.write_index(keys))


@host_only
@pytest.mark.parametrize("kernel", [PADDED, FLASH])
def test_on_a_device_lanes_that_do_not_run_cost_one_position_and_leave_nothing(kernel, request, monkeypatch):
    """`decode` is what a device launches. Idle lanes are fed tokens whose keys alone are infinite: no logits tell."""
    read = []
    if kernel == FLASH:
        request.getfixturevalue("flash_on_the_host")
        flash = torch_private.flash_attention_of_sequences
        monkeypatch.setattr(
            torch_private,
            "flash_attention_of_sequences",
            lambda *a, used, **k: read.append(used) or flash(*a, used=used, **k),
        )
    engine = HuggingFaceEngine(tiny_models.llama(), attention=kernel, self_check=False, remember=False)
    state = run(engine, chains=2, lanes=2)
    prompts = [prompt_of(9, 1), prompt_of(7, 2)]
    engine.prefill([0, 1], prompts)
    engine.transfer(ranges([[0] * 4] * 2), ranges([[lane, lane // 2, 0, 8 - 2 * (lane // 2)] for lane in range(4)]))
    state.input_id.copy_(torch.tensor([prompts[lane // 2][-1] for lane in range(4)]))
    state.position.copy_(torch.tensor([8, 8, 6, 6]))
    state.exclude.fill_(-1)
    every = engine.decode(state, engine.prepare(state))
    running = torch.tensor([True, False, True, False])
    state.lane_field[~running, LaneField.STATUS] = torch.tensor([int(LaneStatus.IDLE), int(LaneStatus.CLOSED)]).int()
    handles = [
        layer.self_attn.k_proj.register_forward_hook(
            lambda m, i, out: out.masked_fill_(~running[:, None, None], torch.inf)
        )
        for layer in engine.model.model.layers
    ]
    read.clear()
    some = engine.decode(state, engine.prepare(state))
    for handle in handles:
        handle.remove()
    for name in ("token", "logq", "weight", "status"):
        assert torch.equal(getattr(some, name)[running], getattr(every, name)[running])
    assert all(used.tolist() == [9, 1, 7, 1] for used in read)
    assert len(read) == (2 if kernel == FLASH else 0)
    for slab, _ in engine._slabs.pairs:
        assert torch.isfinite(slab).all()
    state.lane_field[:, LaneField.STATUS] = int(LaneStatus.RUNNING)  # and go back, behind what they wrote
    state.position[1] = 3
    assert engine.decode(state, engine.prepare(state)).status.tolist() == [Status.OK] * 4
    engine.end()


# ---- positions that nothing is to be made of


@pytest.mark.parametrize("kernel", [PADDED, ROWS, FLASH] if not ON_CUDA else [PADDED])
def test_idle_lanes_stay_within_their_rows_whatever_their_position(kernel, request):
    """Below 0, beyond `length`, beyond the slab. The lane that counts is not changed by it."""
    if kernel == FLASH:
        request.getfixturevalue("flash_on_the_host")
    keys, values = slabs(5, 2, 40, 16)
    query = queries(5, 4, 16)
    wanted = None
    for idle in (5, -1, -(2**40), 35, 39, 40, 2**40):
        view = DecodeView(torch.tensor([idle, 20, idle, idle, idle], device=DEVICE), 30, kernel)
        index = view.write_index(keys).view(5, 2)
        row_of = index // (2 * 40)
        assert row_of.tolist() == [[r, r] for r in range(5)]
        assert (index[1] - torch.tensor([80, 120], device=DEVICE)).tolist() == [20, 20]
        out = view.attend(query, keys, values, 0.2, None, None)
        assert torch.isfinite(out).all()
        wanted = out[1] if wanted is None else wanted
        torch.testing.assert_close(out[1], wanted, rtol=0, atol=1e-6)


def test_indices_beyond_int32_are_right():
    """A slab of 3 * 2**30 states: the last row's index does not fit an int32."""
    slab = torch.empty(3, 2, 2**29, 1, device="meta")
    view = DecodeView(torch.tensor([0, 5, 2**29 - 1]), 2**29)
    assert view.write_index(slab).dtype == torch.int64
    assert view.write_index(slab).tolist() == [0, 2**29, 2**30 + 5, 2**30 + 2**29 + 5, 2**31 + 2**29 - 1, 3 * 2**30 - 1]


def test_flash_refuses_slabs_whose_positions_do_not_fit_int32():
    with pytest.raises(ArgumentError, match="fewer than 2\\*\\*31"):
        decode_attention.packed(torch.empty(4, 2, 2**28, 64, device="meta"))
    most = torch.empty(4, 2, 2**28 - 1, 64, device="meta")
    assert decode_attention.packed(most).shape == (7 * (2**28 - 1), 2, 64)
    start, used, _ = DecodeView(torch.tensor([0, 1, 2, 2**28 - 2]), 2**28 - 1, FLASH)._flash_sequences(most, None)
    assert start.tolist() == [n * 2 * (2**28 - 1) for n in range(4)] + [2**31 - 8]
    assert used.tolist() == [1, 2, 3, 2**28 - 1]
    with pytest.raises(ArgumentError, match="contiguous"):
        decode_attention.packed(torch.empty(4, 2, 8, 64)[:, :, :4])


# ---- choosing


def layout(*shapes, dtype=torch.bfloat16) -> KvLayout:
    return KvLayout(tuple(shapes), dtype)


def test_what_runs_is_said_and_may_be_asked_for():
    plain = layout(((4, 64), (4, 64)))
    assert decode_attention.choose(plain, 8, CPU) == ROWS
    assert decode_attention.choose(plain, 8, CPU, PADDED) == PADDED
    with pytest.raises(ArgumentError, match="'fastest'; it must be one of 'flash', 'rows', 'padded'"):
        decode_attention.choose(plain, 8, CPU, "fastest")
    with pytest.raises(ArgumentError, match=r"\['rows'\]; it must be one of"):
        decode_attention.choose(plain, 8, CPU, ["rows"])
    with pytest.raises(ArgumentError, match="looks at positions on the host"):
        decode_attention.choose(plain, 8, torch.device("meta"), ROWS)
    # No kernel for the host: said, not replaced, since it was asked for.
    with pytest.raises(ArgumentError, match="'flash', which does not work here: NotImplementedError"):
        decode_attention.choose(plain, 8, CPU, FLASH)


@pytest.mark.parametrize(
    ("kv_heads", "threads", "kernel"), [(3, 1, ROWS), (8, 4, ROWS), (3, 2, ROWS), (2, 8, PADDED), (5, 4, PADDED)]
)
def test_rows_are_taken_one_by_one_where_their_heads_keep_the_threads_busy(kv_heads, threads, kernel, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert decode_attention.choose(layout(((kv_heads, 64), (kv_heads, 64))), 64, CPU) == kernel


def test_a_device_without_the_kernel_falls_back_and_says_why():
    nowhere = torch.device("cuda", 99)
    with pytest.warns(RuntimeWarning, match="up to the longest lane's length: .* does not work here: "):
        assert decode_attention.choose(layout(((4, 64), (4, 64))), 8, nowhere) == PADDED


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "other",
    [
        layout(((4, 64), (4, 64)), dtype=torch.float32),
        layout(((4, 64), (4, 32))),
        layout(((4, 60), (4, 60))),
        layout(((4, 64), (4, 64)), ((2, 512), (2, 512))),
    ],
    ids=["fp32", "narrow values", "odd width", "one wide layer"],
)
def test_what_flash_does_not_cover_is_padded_on_a_device(other):
    assert decode_attention.choose(other, 8, torch.device("cuda", 99)) == PADDED


@host_only
@pytest.mark.parametrize("fault", ["lengths", "one more", "starts", "nan", "sums"])
def test_the_trial_finds_a_kernel_that_does_not_do_as_it_is_told(fault):
    """Lengths ignored as an old build would, a position too many, windows ignored, garbage; with sinks also sums of
    exponentials in another order."""

    def faulty(query, key, value, cum_q, cum_k, max_q, max_k, *rest, scale=None, seqused_k=None, **others):
        if fault == "lengths":
            seqused_k = torch.full_like(seqused_k, max_k)
        elif fault == "one more":
            seqused_k = (seqused_k + 1).clamp(max=max_k)
        elif fault == "starts":
            cum_k = cum_k // (key.stride(1) // key.stride(0)) * (key.stride(1) // key.stride(0))
        out, lse, *nothing = flash_by_contract(
            query, key, value, cum_q, cum_k, max_q, max_k, *rest, scale=scale, seqused_k=seqused_k
        )
        lse = lse.t().reshape(lse.shape) if fault == "sums" else lse
        return (out * float("nan") if fault == "nan" else out, lse, *nothing)

    shapes = [((2, 16), (2, 16))]
    for dtype in (torch.float16, torch.bfloat16):
        for function, expected in ((flash_by_contract, False), (faulty, True)):
            with torch.library._scoped_library("aten", "IMPL") as library:
                library.impl("_flash_attention_forward", function, "CPU")
                trouble = decode_attention._flash_trouble(shapes, 4, dtype, CPU, sinks=fault == "sums")
            assert (trouble is not None) == expected, trouble


# ---- on a CUDA device


@pytest.mark.skipif(not ON_CUDA, reason="torch's flash attention needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(28, 4, 128), (9, 3, 64), (4, 4, 96), (8, 1, 256)])
def test_flash_is_recorded_and_replayed_at_other_positions(heads, kv_heads, dim, dtype):
    assert decode_attention.choose(layout(((kv_heads, dim), (kv_heads, dim)), dtype=dtype), heads, DEVICE) == FLASH
    rows = len(POSITIONS)
    keys, values = slabs(rows, kv_heads, SLAB, dim, dtype=dtype)
    query, position = queries(rows, heads, dim, dtype), torch.zeros(rows, dtype=torch.int64, device=DEVICE)

    def attend(window):
        return DecodeView(position, SLAB, FLASH).attend(query, keys, values, dim**-0.5, window, None)

    for window in (None, 5):
        attend(window)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(window)
        for positions in (POSITIONS, POSITIONS[::-1]):
            position.copy_(torch.tensor(positions))
            graph.replay()
            want = by_definition(query, keys, values, position, SLAB, dim**-0.5, window, None)
            torch.testing.assert_close(out.double().cpu(), want, rtol=0, atol=2e-2)


# rows, kv_heads, heads, positions of a slab row, dim. On the host the same in small.
LONG = [(2, 2, 14, 300, 16), (3, 3, 3, 300, 16)]
if ON_CUDA:
    LONG = [
        (2, 2, 14, 16_384, 64),  # so few heads that each one's positions are divided among many programs
        (1, 32, 32, 8_192, 96),  # a head of KV for each of the query's: another path of the kernel
        (520, 4, 28, 8_192, 128),  # 4.1 GiB: neither bytes nor entries of the last rows fit 32 bits
    ]


@pytest.mark.parametrize(("rows", "kv_heads", "heads", "positions", "dim"), LONG)
def test_flash_reads_long_rows_wherever_they_lie(rows, kv_heads, heads, positions, dim, flash_on_the_host):
    """The first and the last rows of the slab and one in between; what is in the others is as it comes."""
    if ON_CUDA and torch.cuda.mem_get_info(DEVICE)[0] < 3 * rows * kv_heads * positions * dim * 2:
        pytest.skip("short of memory")
    slab = torch.empty(rows, kv_heads, positions, dim, dtype=torch.bfloat16, device=DEVICE)
    looked = sorted({0, rows // 2, rows - 1, max(0, rows - 2)})
    for row in looked:
        slab[row] = torch.randn(kv_heads, positions, dim, generator=torch.Generator().manual_seed(row)).to(slab)
    query = queries(rows, heads, dim, torch.bfloat16)
    position = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    position[looked] = torch.tensor([positions - 1, positions // 2, 130, positions - 2][: len(looked)], device=DEVICE)
    for window in (None, 200):
        got = DecodeView(position, positions, FLASH).attend(query, slab, slab, dim**-0.5, window, None)[looked]
        given = query[looked], slab[looked], slab[looked], position[looked]
        want = by_definition(*given, positions, dim**-0.5, window, None)
        torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=2e-2)
