"""NVTX ranges: named after what runs, closed whatever happens, absent and free when off."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import power_kernels as pk
from power_kernels import nvtx
from power_kernels.api import PowerConfig, PowerSampler
from power_kernels.errors import BackendError
from power_kernels.ops import dispatch
from tests.test_ops_contract import ARGUMENTS, call
from tests.toys import ToyEngine, power_toy

CONFIG = PowerConfig(alpha=2.0, temperature=0.8, max_new_tokens=5, block_size=2, mcmc_steps=2, lanes=2)


@pytest.fixture
def recorded(monkeypatch):
    """Ranges as they open and close, by a stand-in for torch's functions; on for the test, off afterwards."""
    events: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "mark", lambda name: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", events.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: events.append("pop"))
    nvtx.enable()
    yield events
    nvtx.disable()


def nested(events: list[str]) -> list[tuple[str, ...]]:
    """Every range with the ranges around it, outermost first. Each must be closed."""
    stack, found = [], []
    for event in events:
        if event == "pop":
            stack.pop()
        else:
            stack.append(event.removeprefix("power_kernels."))
            found.append(tuple(stack))
    assert stack == []
    return found


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_operator_runs_inside_one_range_of_its_kernel_s_name(recorded, name):
    arguments = ARGUMENTS[name]()
    recorded.clear()  # making arguments may run operators too
    call(name, arguments)
    kernels = [r for r in nested(recorded) if r[-1] in dispatch.KERNELS]
    assert [r[-1] for r in kernels][-1:] == [name if name in dispatch.KERNELS else f"{name}_out"]


def test_a_range_is_closed_when_its_operator_raises(recorded, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(nvtx, "_plain", fail)
    with pytest.raises(ZeroDivisionError):
        call("kv_copy_ranges", ARGUMENTS["kv_copy_ranges"]())
    monkeypatch.undo()
    assert recorded[-2:] == ["power_kernels.kv_copy_ranges", "pop"]


def test_the_driver_s_phases_hold_the_operators_they_run(recorded):
    PowerSampler(ToyEngine(power_toy())).generate([[5], [6, 7]], CONFIG, num_chains=4, max_chains=4)
    ranges = set(nested(recorded))
    assert ranges == {
        ("admit",),
        ("admit", "move"),
        ("admit", "prefill"),
        ("admit", "advance"),
        ("admit", "advance", "mh_advance"),
        ("admit", "advance", "transfer"),
        ("admit", "advance", "transfer", "kv_copy_ranges"),
        ("step",),
        ("step", "sample_tokens_out"),
        ("advance",),
        ("advance", "mh_advance"),
        ("advance", "transfer"),
        ("advance", "transfer", "kv_copy_ranges"),
        ("retire",),
    }


def test_ranges_change_no_chain_and_leave_the_engine_as_it_was(recorded):
    engine = ToyEngine(power_toy())
    before = dict(vars(engine))
    sampler = PowerSampler(engine)
    traced = [r.tokens for r in sampler.generate([[5]], CONFIG, num_chains=8)]
    assert sampler.engine is engine
    assert all(vars(engine)[name] is value for name, value in before.items() if callable(value))
    assert not set(vars(engine)) & {"step", "transfer", "prefill", "move"}
    nvtx.disable()
    assert [r.tokens for r in sampler.generate([[5]], CONFIG, num_chains=8)] == traced


def test_nothing_is_between_the_operators_and_their_dispatch_when_off(recorded):
    plain = nvtx._plain
    assert dispatch._runner is not plain
    nvtx.disable()
    nvtx.disable()  # twice is once
    assert not nvtx.enabled()
    assert dispatch._runner is plain
    engine = ToyEngine(power_toy())
    assert nvtx.traced(engine, ("step",)) is engine
    recorded.clear()
    call("mh_accept", ARGUMENTS["mh_accept"]())
    assert recorded == []


def test_a_compiled_graph_holds_the_operator_without_its_range(recorded):
    torch._dynamo.reset()

    def step(*arguments):
        pk.sample_tokens_out(*arguments)
        return arguments[7] + 1

    arguments = ARGUMENTS["sample_tokens_out"]()
    torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    assert (arguments[-1] == 0).all()


def test_switching_on_without_nvtx_is_refused_with_the_reason(monkeypatch):
    def absent(name):
        raise RuntimeError("NVTX functions not installed")

    monkeypatch.setattr(torch.cuda.nvtx, "mark", absent)
    with pytest.raises(BackendError, match=r"NVTX ranges cannot be switched on: NVTX functions not installed .*torch"):
        nvtx.enable()
    assert not nvtx.enabled()


@pytest.mark.parametrize("value", ["", "0"])
def test_the_environment_leaves_the_ranges_off(monkeypatch, value):
    monkeypatch.setenv("POWER_KERNELS_NVTX", value)
    nvtx.enable_from_environment()
    assert not nvtx.enabled()


def test_the_environment_switches_the_ranges_on_when_the_operators_are_imported():
    """In a new process, which also imports the package before torch: the operators are then registered by name."""
    code = """
import sys
import power_kernels as pk
assert "torch" not in sys.modules
import torch
torch.cuda.nvtx.mark = lambda name: None
import power_kernels.ops
print(pk.nvtx.enabled(), hasattr(torch.ops.power_kernels, "sample_tokens"))
"""
    environment = {**os.environ, "POWER_KERNELS_NVTX": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "True"]
