"""A model is as its owner left it outside a forward pass, whatever interrupts one."""

import pytest

from power_kernels.api import EngineBusyError, HuggingFaceEngine, PowerConfig, PowerSampler
from power_kernels.api.engines.huggingface.patches import Patches
from tests.tiny_models import llama


class Owner:
    inherited = "class"

    def __init__(self):
        self.own = "mine"


class Interrupting(Owner):
    """Raises once, at the n-th assignment or deletion from now on: Ctrl-C at that point."""

    countdown = 0

    def __setattr__(self, name, value):
        if Interrupting.countdown:
            Interrupting.countdown -= 1
            if Interrupting.countdown == 0:
                raise KeyboardInterrupt
        super().__setattr__(name, value)


def patched(owner):
    patches = Patches()
    patches.add(owner, "own", "patched")
    patches.add(owner, "inherited", "patched")
    return patches


def test_values_hold_inside_and_are_put_back_as_they_were():
    owner = Owner()
    with pytest.raises(ZeroDivisionError), patched(owner):
        assert (owner.own, owner.inherited) == ("patched", "patched")
        raise ZeroDivisionError
    assert vars(owner) == {"own": "mine"}  # the inherited value is uncovered, not copied


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupt_at_any_assignment_loses_nothing(at):
    owner = Interrupting()
    patches = patched(owner)
    Interrupting.countdown = at
    with pytest.raises(KeyboardInterrupt), patches:
        pass
    patches.restore()  # what the engine's end() does
    assert vars(owner) == {"own": "mine"}


def test_an_engine_refuses_a_second_run_and_goes_on_with_the_first():
    engine = HuggingFaceEngine(llama(), self_check=False)
    config = PowerConfig(max_new_tokens=8, block_size=4, mcmc_steps=2)
    arguments = {"num_chains": 3, "max_chains": 1, "seed": 3}
    alone = PowerSampler(engine).generate([[1, 2]], config, **arguments)
    stream = PowerSampler(engine).stream([[1, 2]], config, **arguments)
    first = next(stream)
    with pytest.raises(EngineBusyError, match="exhaust its stream"):
        PowerSampler(engine).generate([[5, 6]], config)
    assert [r.tokens for r in (first, *stream)] == [r.tokens for r in alone]
    assert PowerSampler(engine).generate([[5, 6]], config)
