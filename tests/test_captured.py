"""A step that is recorded and replayed makes the chain that the step itself makes.

Recordings are of operators on a CPU here (`tests/recorded_graph.py`), which know as little as a CUDA graph does;
tests/test_cuda.py does the same with real ones.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from power_kernels.api import HuggingFaceEngine, PowerConfig, PowerSampler
from power_kernels.api.driver import captured
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.state import Outcome
from tests import tiny_models
from tests.recorded_graph import LookedAtTensorError, RecordedGraph, RecordedGraphs
from tests.toys import ToyEngine, power_toy

CONFIG = PowerConfig(alpha=3.0, max_new_tokens=12, block_size=6, mcmc_steps=5, lanes=1)
PROMPTS = [[5, 6, 7], [8], [9, 3, 11, 12, 13], [20, 21]]


@pytest.fixture
def recorded(monkeypatch) -> RecordedGraphs:
    graphs = RecordedGraphs()
    monkeypatch.setattr(captured, "recorder", lambda device: graphs)
    return graphs


def chain(result):
    return result.tokens, result.log_weights, result.outcomes, result.finish, result.status


def draw(model, config=CONFIG, *, capture: bool, multiple: int = 8, prompts=PROMPTS, **options):
    # Another kernel of decode attention rounds otherwise, and so do other numbers of rows: those of a replayed step are
    # a power of two or all, so tests that compare bits run 1, 2 or 3 chains at once.
    engine = HuggingFaceEngine(model, remember=False, length_multiple=multiple, attention="padded", self_check=False)
    sampler = PowerSampler(engine, capture=capture)
    return sampler.generate(prompts, config, **{"seed": 3, "eos_token_id": [], **options}), sampler.last_run


@pytest.mark.parametrize(
    ("family", "lanes"), [("llama", 1), ("llama", 3), ("mixed_qwen2", 3), ("phi3", 1), ("gemma2", 2)]
)
def test_chains_are_bitwise_the_same_replayed_or_not(family, lanes, recorded):
    """Three slots for eight chains: rows are refilled, moved and left idle while recordings stay."""
    model = getattr(tiny_models, family)()
    config = PowerConfig(**{**vars(CONFIG), "lanes": lanes})
    options = dict(num_chains=2, max_chains=3)
    plain, plain_run = draw(model, config, capture=False, **options)
    assert not recorded.made
    assert not plain_run.captured
    replayed, run = draw(model, config, capture=True, **options)
    assert [chain(r) for r in replayed] == [chain(r) for r in plain]
    assert run.captured
    assert run.replays > 0.5 * run.decode_steps
    assert sum(r.accepted for r in plain) >= 10


def test_a_thousand_chains_with_eos_are_the_same_replayed_or_not(recorded):
    """1024 chains, an EOS that comes often, two lanes: every kind of outcome, chains that end anywhere."""
    model = tiny_models.llama()
    config = PowerConfig(alpha=1.5, max_new_tokens=6, block_size=3, mcmc_steps=3, final_steps=1, lanes=2)
    options = dict(prompts=[[5, 6], [7, 8, 9]], num_chains=512, max_chains=256, eos_token_id=list(range(12)))
    plain, _ = draw(model, config, capture=False, **options)
    replayed, run = draw(model, config, capture=True, **options)
    assert [chain(r) for r in replayed] == [chain(r) for r in plain]
    outcomes = [outcome for r in plain for outcome in r.outcomes]
    assert all(outcomes.count(outcome) > 500 for outcome in Outcome)
    assert sum(r.finish == "eos" for r in plain) > 300
    assert run.replays > 0


def test_recordings_are_few(recorded):
    """One for each rounded number of chains and each bucket of lengths, whatever the steps."""
    _, run = draw(tiny_models.llama(), capture=True, num_chains=4, max_chains=5)
    assert len(recorded.made) <= 4 * 4  # 1, 2, 4 and 5 chains; lengths up to 23 in buckets of 8, and a spare
    assert run.decode_steps > 10 * len(recorded.made)


def test_the_entropy_cut_is_the_same_replayed_or_not(recorded):
    config = PowerConfig(**{**vars(CONFIG), "cut": "divergence-entropy"})
    plain, _ = draw(tiny_models.llama(), config, capture=False, max_chains=2)
    replayed, run = draw(tiny_models.llama(), config, capture=True, max_chains=2)
    assert [chain(r) for r in replayed] == [chain(r) for r in plain]
    assert run.replays > 0


def test_a_row_with_bad_logits_faults_alone_and_leaves_nothing_behind_when_replayed(recorded):
    """A NaN in one token's embedding: chains that draw it stop, those that take their slots are what they were."""
    model = tiny_models.llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[40:46] = float("nan")
    options = dict(num_chains=3, max_chains=3)
    config = PowerConfig(**{**vars(CONFIG), "alpha": 1.0, "temperature": None})
    plain, _ = draw(model, config, capture=False, **options)
    replayed, _ = draw(model, config, capture=True, **options)
    assert [chain(r) for r in replayed] == [chain(r) for r in plain]
    faults = sum(r.finish == "fault" for r in plain)
    assert 0 < faults < len(plain)


def test_a_step_that_looks_at_a_tensor_is_run_as_it_is_and_said_so(recorded):
    """As a mixture of experts does that asks which of them are in use."""
    model = tiny_models.llama()
    plain, _ = draw(model, capture=False, max_chains=2)
    layer = model.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda module, args: bool((args[0] > 0).any()) and None)
    with pytest.warns(RuntimeWarning, match="cannot be recorded as a graph and runs as it is: aten.is_nonzero"):
        got, run = draw(model, capture=True, max_chains=2)
    assert [chain(r) for r in got] == [chain(r) for r in plain]
    assert run.replays == 0
    assert run.captured is False


def test_a_recording_notices_a_tensor_that_is_looked_at():
    value = torch.ones(3)
    with pytest.raises(LookedAtTensorError):
        RecordedGraph().capture(lambda: (value + 1).sum().item())


def test_a_recording_runs_on_the_values_of_its_own_time():
    """Otherwise the tests above would compare a step with itself."""
    value, out = torch.ones(3), torch.zeros(3)
    graph = RecordedGraph()
    graph.capture(lambda: out.copy_(value[1:2] * 2 + 1))
    graph.replay()
    assert out.tolist() == [3, 3, 3]
    value.fill_(5)
    graph.replay()
    assert out.tolist() == [11, 11, 11]


def test_capture_is_refused_where_it_cannot_be_had():
    with pytest.raises(ArgumentError, match=r"capture is True with HuggingFaceEngine on cpu; it needs a CUDA device"):
        PowerSampler(tiny_models.llama(), capture=True)
    with pytest.raises(ArgumentTypeError, match=r"capture is 1; it must be True, False or None"):
        PowerSampler(ToyEngine(power_toy()), capture=1)


def test_an_engine_that_cannot_be_captured_is_not(recorded):
    assert PowerSampler(ToyEngine(power_toy())).capture is False
    with pytest.raises(ArgumentError, match="capture is True with ToyEngine"):
        PowerSampler(ToyEngine(power_toy()), capture=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_runs_out_while_recording_is_not_taken_for_a_step_that_cannot_be_recorded(
    error, recorded, monkeypatch
):
    """The run begins again in less, and records."""
    plain, _ = draw(tiny_models.llama(), capture=False, max_chains=2)
    capture, failures = RecordedGraph.capture, []

    def fails_once(self, launch):
        if not failures:
            failures.append(error)
            try:
                raise error
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        capture(self, launch)

    monkeypatch.setattr(RecordedGraph, "capture", fails_once)
    with pytest.warns(RuntimeWarning, match="out of memory with 2 chains"):
        got, run = draw(tiny_models.llama(), capture=True, max_chains=2)
    assert [r.tokens for r in got] == [r.tokens for r in plain]
    assert (run.restarts, run.slots, run.captured) == (1, 1, True)
    assert run.replays > 0


def test_a_step_that_cannot_be_recorded_is_tried_once_a_sampler(recorded):
    model = tiny_models.llama()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: bool((args[0] > 0).any()) and None)
    sampler = PowerSampler(HuggingFaceEngine(model, remember=False, attention="padded", self_check=False), capture=True)
    with pytest.warns(RuntimeWarning, match="cannot be recorded"):
        first = sampler.generate([[5, 6]], CONFIG, seed=3, eos_token_id=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = sampler.generate([[5, 6]], CONFIG, seed=3, eos_token_id=[])
    assert [chain(r) for r in first] == [chain(r) for r in again]
    assert len(recorded.made) == 1
