"""What only a device can show (`pytest --device cuda`): the dispatcher's choice, values that nobody looks at, graphs,
streams, and steps that never wait."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import power_kernels as pk
from power_kernels import nvtx, reference
from power_kernels.api import HuggingFaceEngine, PowerConfig, PowerSampler
from power_kernels.api.driver import captured
from power_kernels.api.driver.poll import Poll
from power_kernels.api.engines.huggingface.decode_attention import FLASH, DecodeView
from power_kernels.errors import ArgumentTypeError
from power_kernels.law import Law
from power_kernels.ops import dispatch
from power_kernels.state import ChainField, Mode, Outcome, Status
from tests import tiny_models
from tests.devices import DEVICE, ON_CUDA, on_device
from tests.op_helpers import FLOATS, INF, NAN, SEED, assert_same_bits, counters, normal_logits, per_row, sample
from tests.test_decode_attention import by_definition
from tests.test_ops_contract import ARGUMENTS, call, placed

pytestmark = pytest.mark.skipif(not ON_CUDA, reason="shows what only a device can: pytest --device cuda")

KERNELS = [name for name in ARGUMENTS if name in dispatch.KERNELS]


def written(name: str, arguments: tuple) -> list:
    """What the operator writes, workspaces left out: their contents are the kernel's own."""
    schema = getattr(torch.ops.power_kernels, name).default._schema
    outputs = []
    for declared, argument in zip(schema.arguments, arguments, strict=True):
        if declared.alias_info is not None and declared.alias_info.is_write and declared.name != "workspace":
            outputs.append(argument)
    return outputs


def assert_equal_bits(ours, theirs) -> None:
    """Of every dtype, also of those that `assert_same_bits` compares by value."""
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@contextmanager
def never_waiting():
    """An error for every call of torch that waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- dispatch and values


@pytest.mark.parametrize("name", KERNELS)
def test_the_dispatcher_gives_tensors_on_the_device_to_the_triton_kernels(name):
    """Bitwise what the triton backend gives when asked for by name with host tensors."""
    assert pk.backend_for(DEVICE) == "triton"
    theirs, ours = ARGUMENTS[name](), placed(ARGUMENTS[name]())
    with pk.use_backend("triton"):
        call(name, theirs)
    call(name, ours)
    assert_equal_bits([a.cpu() if a is not None else None for a in written(name, ours)], written(name, theirs))


def test_exponents_are_reported_by_row_without_being_looked_at():
    bad = torch.tensor([4.0, NAN, 0.0, -1.0, INF, 4.0])
    z, words = normal_logits(6, 300), counters(6)
    z, alpha, beta, seed, words, tokens = placed(
        (z, bad, per_row(2.0, 6), torch.tensor([SEED]), words, per_row(3, 6, torch.int64))
    )
    with never_waiting():
        out = pk.sample_tokens(z, alpha, beta, seed, words)
        scored = pk.score_tokens(z, tokens, beta, alpha)
    for one in (out, scored):
        assert one.status.tolist() == [Status.OK, *[Status.NAN] * 4, Status.OK]
        for name in FLOATS[:3]:
            assert getattr(one, name).isnan().tolist() == [False, *[True] * 4, False]
    assert (out.token[1:5] == -1).all()


def test_ranges_outside_the_slabs_are_skipped_without_being_looked_at():
    dst, src = torch.zeros(2, 3, 2, 5, 4, device=DEVICE), torch.ones(2, 5, 2, 5, 4, device=DEVICE)
    bad = [[-1, 0, 0, 1], [3, 0, 0, 1], [0, -1, 0, 1], [0, 5, 0, 1], [0, 0, -1, 1], [0, 0, 0, 6], [0, 0, 5, 6]]
    bad += [[0, 0, -(2**31), 2**31 - 1], [2**31 - 1, 0, 0, 1], [-(2**31), 0, 0, 1]]
    ranges = torch.tensor([*bad, [1, 0, 2, 4]], dtype=torch.int32, device=DEVICE)
    with never_waiting():
        pk.kv_copy_ranges(dst, src, ranges)
    assert (dst[:, 1, :, 2:4] == 1).all()
    assert dst.sum() == 2 * 2 * 2 * 4


@pytest.mark.parametrize("name", KERNELS)
def test_an_argument_left_on_the_host_is_refused_by_name(name):
    arguments = list(placed(ARGUMENTS[name]()))
    last = max(i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor))
    arguments[last] = arguments[last].cpu()
    with pytest.raises(ArgumentTypeError, match=r"is on cpu; it must be on cuda:"):
        call(name, tuple(arguments))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device only")
def test_tensors_on_a_device_that_is_not_the_current_one_are_served_there():
    z = normal_logits(3, 700)
    with pk.use_backend("triton"):
        here = sample(z)
    with torch.cuda.device(0):
        one = torch.device("cuda:1")
        there = pk.sample_tokens(
            z.to(one), per_row(4.0, 3).to(one), per_row(4.0, 3).to(one), torch.tensor([SEED], device=one),
            counters(3).to(one), return_entropy=True,
        )  # fmt: skip
    assert_same_bits([c.cpu() for c in there], here)


# ---- preallocated forms: no wait, no allocation, graphs


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_neither_waits_nor_allocates(name):
    arguments, warm = placed(ARGUMENTS[name]()), placed(ARGUMENTS[name]())
    call(name, warm)  # compiles
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with never_waiting():
        call(name, arguments)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert_equal_bits(written(name, arguments), written(name, warm))


@pytest.mark.parametrize("name", KERNELS)
def test_a_captured_kernel_replays_what_it_does_eagerly(name):
    eager, captured = placed(ARGUMENTS[name]()), placed(ARGUMENTS[name]())
    call(name, eager)  # compiles, too
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in captured]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(name, captured)
    for _ in range(2):  # from the same start each time
        for a, start in zip(captured, before, strict=True):
            if isinstance(a, torch.Tensor):
                a.copy_(start)
        with never_waiting():
            graph.replay()
        torch.cuda.synchronize()
        assert_equal_bits(written(name, captured), written(name, eager))


CHAINS, LANES, VOCAB, BASE = 6, 3, 2100, 4
LAW = Law(max_new_tokens=9, block_size=4, mcmc_steps=4, final_steps=3)


class Decoding:
    """Chains on made-up logits: sample, advance, copy KV. Every tensor stays where it is, as a graph needs."""

    def __init__(self):
        rows, positions = CHAINS * LANES, BASE + LAW.max_new_tokens
        self.state = pk.ChainState.allocate(CHAINS, LANES, LAW, DEVICE)
        for chain in range(CHAINS):
            self.state.admit(chain, [5] * BASE, chain_id=chain, prompt_id=0)
        self.chain_kv = torch.zeros(4, CHAINS, 2, positions, 8, dtype=torch.float16, device=DEVICE)
        self.lane_kv = torch.zeros(4, rows, 2, positions, 8, dtype=torch.float16, device=DEVICE)
        self.logits = torch.zeros(rows, VOCAB, device=DEVICE)
        self.alpha, self.seed = per_row(2.0, rows).to(DEVICE), torch.tensor([SEED], device=DEVICE)
        self.length_term = torch.from_numpy(reference.length_table(LAW)).to(DEVICE)
        self.eos = torch.tensor([1, 2], device=DEVICE)
        self.workspace = torch.zeros(pk.workspace_size(rows, VOCAB), device=DEVICE)
        self.token = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        self.logp, self.logq, self.weight = torch.zeros(3, rows, device=DEVICE).unbind()
        self.status = torch.full((rows,), int(Status.PENDING), dtype=torch.int32, device=DEVICE)
        self.advance()  # opens the chains

    def advance(self) -> None:
        state = self.state
        pk.mh_advance(
            state, LAW, self.length_term, self.seed, self.eos, self.token, self.logq, self.weight, self.status
        )  # fmt: skip
        pk.kv_copy_ranges(self.chain_kv, self.lane_kv, state.commit_range)
        pk.kv_copy_ranges(self.lane_kv, self.chain_kv, state.open_range)

    def step(self) -> None:
        pk.sample_tokens_out(
            self.logits, self.alpha, self.alpha, self.seed, self.state.counter, self.state.exclude, self.workspace,
            self.token, self.logp, self.logq, self.weight, None, self.status,
        )  # fmt: skip
        self.advance()

    def tensors(self) -> list[torch.Tensor]:
        return [*self.state.tensors(), self.chain_kv, self.lane_kv, self.token, self.weight]


def test_whole_decode_steps_in_one_graph_are_the_eager_ones_bit_for_bit():
    """60 replays of one graph; at least 6 acceptances and 2 finished chains, or it shows nothing."""
    eager, replayed = Decoding(), Decoding()
    eager.step()
    replayed.step()  # compiled, and in the same state again
    start = [t.clone() for t in replayed.tensors()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    assert_equal_bits(replayed.tensors(), start)  # capturing ran nothing
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        logits = torch.randn(CHAINS * LANES, VOCAB, generator=generator) * 2
        logits[:, :3] += 4.0  # two of them end an answer
        marks = torch.randn(eager.lane_kv.shape, generator=generator).half()
        for one in (eager, replayed):
            one.logits.copy_(logits)
            one.lane_kv.copy_(marks)  # what a forward pass would have written
        eager.step()
        with never_waiting():
            graph.replay()
        torch.cuda.synchronize()
        for ours, theirs in zip(replayed.tensors(), eager.tensors(), strict=True):
            assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)), step
    assert int((eager.state.outcome == Outcome.ACCEPTED).sum()) >= 6
    assert int((eager.state.field[:, ChainField.MODE] == Mode.DONE).sum()) >= 2


# ---- streams


def test_streams_side_by_side_do_not_meet():
    """Every stream its own workspace: 4 streams, 20 rounds, bitwise the results of one stream."""
    batches = [normal_logits(64, 5000, torch.bfloat16, seed=i) for i in range(4)]
    with pk.use_backend("triton"):
        want = [sample(z) for z in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    inputs = [on_device(z) for z in batches]
    fixed = placed((per_row(4.0, 64), per_row(4.0, 64), torch.tensor([SEED]), counters(64)))
    torch.cuda.synchronize()
    outs = []
    for _ in range(20):
        for stream, z in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                outs.append(pk.sample_tokens(z, *fixed, return_entropy=True))
    torch.cuda.synchronize()
    for i, out in enumerate(outs):
        assert_same_bits([c.cpu() for c in out], want[i % 4])


def test_work_goes_to_the_stream_that_is_current():
    """A kernel on another stream waits for that stream's work, not for the default one's."""
    stream = torch.cuda.Stream()
    z = torch.full((8, 3000), -INF, device=DEVICE)
    fixed = placed((per_row(4.0, 8), per_row(4.0, 8), torch.tensor([SEED]), counters(8)))
    pk.sample_tokens(z, *fixed)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # some 10 ms, so that a launch elsewhere would read -inf
        z[:, 7] = 0.0
        out = pk.sample_tokens(z, *fixed)
    torch.cuda.synchronize()
    assert out.token.tolist() == [7] * 8


# ---- the engine, the driver, ranges


def test_a_step_of_the_engine_and_of_the_chains_never_waits():
    """Also not for the longest position, which is looked at every 16 steps: 40 steps."""
    engine = HuggingFaceEngine(tiny_models.llama())
    law = Law(max_new_tokens=64, block_size=16, mcmc_steps=2)
    engine.begin(chains=2, lanes=2, max_length=80, alpha=2.0, beta=2.0, seed=SEED)
    state = pk.ChainState.allocate(2, 2, law, DEVICE)
    engine.prefill([0, 1], [[4, 5, 6], [7, 8, 9, 10]])
    length_term = torch.from_numpy(reference.length_table(law)).to(DEVICE)
    seed, eos = torch.tensor([SEED], device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for slot, prompt in enumerate([[4, 5, 6], [7, 8, 9, 10]]):
        state.admit(slot, prompt, chain_id=slot, prompt_id=0)
    pending = torch.full((4,), int(Status.PENDING), dtype=torch.int32, device=DEVICE)
    zeros = torch.zeros(4, device=DEVICE)
    pk.mh_advance(
        state, law, length_term, seed, eos, torch.zeros(4, dtype=torch.int64, device=DEVICE), zeros, zeros, pending
    )

    def step():
        engine.transfer(state.commit_range, state.open_range)
        drawn = engine.step(state)
        pk.mh_advance(state, law, length_term, seed, eos, drawn.token, drawn.logq, drawn.weight, drawn.status)

    for _ in range(3):  # compiles, fills caches
        step()
    with never_waiting():
        for _ in range(40):
            step()
    assert int(state.field[:, ChainField.LENGTH].min()) >= 16
    engine.end()


def waits_for_nothing(function):
    """An error for every wait inside, but for those on an event, which is what a look at the chains is."""

    def checked(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lanes", [1, 3])
def test_replayed_runs_make_the_chains_of_steps_that_run_as_they_are(dtype, lanes, monkeypatch):
    """24 chains through 2 slots, bit for bit. Nothing between two looks waits for the device: not the host's part of a
    step, not the replay, not the look."""
    model = tiny_models.llama().to(dtype)
    config = PowerConfig(alpha=2.0, max_new_tokens=24, block_size=8, mcmc_steps=4, lanes=lanes)
    arguments = dict(num_chains=12, seed=3, max_chains=2)
    plain = PowerSampler(model, capture=False).generate([[4, 5, 6], [7, 8]], config, **arguments)
    for owner, name in ((captured._CudaGraph, "replay"), (HuggingFaceEngine, "prepare"), (Poll, "look")):
        monkeypatch.setattr(owner, name, waits_for_nothing(getattr(owner, name)))
    sampler = PowerSampler(model)
    assert sampler.capture
    replayed = sampler.generate([[4, 5, 6], [7, 8]], config, **arguments)
    run = sampler.last_run
    assert run.replays > 0.5 * run.decode_steps
    assert sum(r.accepted for r in plain) > 20
    for ours, theirs in zip(replayed, plain, strict=True):
        assert (ours.tokens, ours.log_weights, ours.outcomes) == (theirs.tokens, theirs.log_weights, theirs.outcomes)


def test_a_step_that_cannot_be_recorded_runs_as_it_is_and_leaves_the_device_as_it_was():
    """A model that waits for its device: the same chains, and afterwards streams, allocator and generator are sound."""
    model = tiny_models.llama()
    config = PowerConfig(alpha=2.0, max_new_tokens=16, block_size=8, mcmc_steps=3, lanes=1)
    arguments = dict(seed=3, max_chains=2)
    plain = PowerSampler(model, capture=False).generate([[4, 5, 6], [7, 8]], config, **arguments)
    stream = torch.cuda.current_stream()
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: args[0].sum().item() and None)
    sampler = PowerSampler(model)
    with pytest.warns(RuntimeWarning, match="cannot be recorded"):
        waiting = sampler.generate([[4, 5, 6], [7, 8]], config, **arguments)
    hook.remove()
    assert not sampler.capture
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    torch.rand(8, device=DEVICE)
    again = PowerSampler(model)
    replayed = again.generate([[4, 5, 6], [7, 8]], config, **arguments)
    assert again.last_run.replays > 0
    for chains in (waiting, replayed):
        assert [(r.tokens, r.log_weights) for r in chains] == [(r.tokens, r.log_weights) for r in plain]


@pytest.mark.measured
def test_lanes_are_measured_on_recorded_steps_and_a_run_closed_early_leaves_the_engine_free():
    engine = HuggingFaceEngine(tiny_models.llama())
    assert all(seconds > 0 for seconds in engine.decode_seconds([1, 2, 64], 200))
    sampler = PowerSampler(engine)
    config = PowerConfig(alpha=2.0, max_new_tokens=16, block_size=8, mcmc_steps=8)
    stream = sampler.stream([[4, 5, 6]], config, num_chains=6, max_chains=2, seed=1)
    next(stream)
    stream.close()
    assert len(sampler.generate([[4, 5, 6]], config, seed=1)) == 1


def test_the_driver_gives_the_same_chains_whatever_the_slots():
    """Toy-sized: the model's own logits must not depend on the batch, so weights are compared to 1e-4 nats."""
    config = PowerConfig(alpha=2.0, max_new_tokens=12, block_size=6, mcmc_steps=3)
    sampler = PowerSampler(tiny_models.llama())
    one, many = (
        sampler.generate([[4, 5, 6], [7, 8]], config, num_chains=8, seed=3, max_chains=slots) for slots in (1, 16)
    )
    same = [a.tokens == b.tokens for a, b in zip(one, many, strict=True)]
    assert sum(same) >= 15  # a draw at a boundary of float32 logits may go the other way
    for a, b, equal in zip(one, many, same, strict=True):
        if equal:
            assert a.log_weights == pytest.approx(b.log_weights, abs=1e-4)


def test_ranges_can_be_switched_on_where_torch_has_nvtx():
    arguments = placed(ARGUMENTS["mh_accept"]())
    plain = call("mh_accept", arguments)
    nvtx.enable()
    try:
        assert_equal_bits(call("mh_accept", arguments), plain)
    finally:
        nvtx.disable()


# ---- flash attention at sizes that the trial of `decode_attention.choose` does not have


def relative_errors(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Root mean square of each row and head. Rounding gives up to 6e-3, one part of sixteen left out 0.25."""
    return ((got.double().cpu() - want).square().mean(-1) / want.square().mean(-1)).sqrt()


@pytest.mark.parametrize("sinks", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1500])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(28, 4, 128), (32, 32, 96)], ids=["grouped", "multi-head"])
def test_flash_is_right_over_thousands_of_positions_and_several_splits(heads, kv_heads, dim, window, sinks):
    """Two to four rows leave most of the device idle, so the kernel splits each row's keys and joins the parts."""
    positions = [4095, 6143, 17, 4096]
    keys, values = (
        torch.randn(
            2, len(positions), kv_heads, 6144, dim, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE
        )
        .bfloat16()
        .unbind()
    )
    query = torch.randn(len(positions), heads, 1, dim, device=DEVICE).bfloat16()
    sink = None if sinks is None else torch.linspace(-sinks, sinks, heads, device=DEVICE)
    for rows in (2, 4):
        position = torch.tensor(positions[:rows], device=DEVICE)
        view = DecodeView(position, 6144, FLASH)
        got = view.attend(query[:rows], keys, values, dim**-0.5, window, None, sink)
        want = by_definition(query[:rows], keys, values, position, 6144, dim**-0.5, window, None, sink)
        assert relative_errors(got, want).max() < 2e-2


def test_flash_reads_slabs_of_more_than_2_31_entries():
    """520 rows of 8,192 positions: the last rows lie beyond what int32 counts, in bytes and in entries."""
    rows, heads, kv_heads, positions, dim = 520, 28, 4, 8192, 128
    assert rows * kv_heads * positions * dim > 2**31
    if torch.cuda.mem_get_info(DEVICE)[0] < 12 << 30:
        pytest.skip("12 GiB are not free")
    keys, values = (torch.empty(rows, kv_heads, positions, dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    for seed, slab in enumerate((keys, values)):
        slab.normal_(generator=torch.Generator(DEVICE).manual_seed(seed))
    query = torch.randn(rows, heads, 1, dim, device=DEVICE).bfloat16()
    position = torch.arange(rows, device=DEVICE) * 7 % positions
    position[-1], position[0] = positions - 1, 5000
    got = DecodeView(position, positions, FLASH).attend(query, keys, values, dim**-0.5, None, None)
    chosen = [0, 1, 255, 511, 512, rows - 1]  # row 512 is the first whose first entry is the 2**31st or later
    want = by_definition(
        query[chosen], keys[chosen], values[chosen], position[chosen], positions, dim**-0.5, None, None
    )
    assert relative_errors(got[chosen], want).max() < 2e-2
