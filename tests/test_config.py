"""PowerConfig: what is refused, by name and value, and what awkward numbers are still accepted (DESIGN 3)."""

import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from power_kernels.api import PowerConfig
from power_kernels.errors import ArgumentError, ArgumentTypeError

NAN, INF = math.nan, math.inf

TYPES = [
    ("alpha", "4"),
    ("alpha", True),
    ("alpha", None),
    ("alpha", [4.0]),
    ("temperature", "0.25"),
    ("temperature", True),
    ("max_new_tokens", 8.0),
    ("max_new_tokens", True),
    ("max_new_tokens", None),
    ("mcmc_steps", 1.5),
    ("mcmc_steps", "10"),
    ("final_steps", 1.0),
    ("final_steps", None),
    ("block_size", 192.0),
    ("block_size", True),
    ("lanes", 2.0),
    ("lanes", True),
    ("early_rejection", 1),
    ("early_rejection", None),
    ("free_prefix", "no"),
]
VALUES = [
    ("alpha", 0.999),
    ("alpha", 0),
    ("alpha", -4.0),
    ("alpha", NAN),
    ("alpha", INF),
    ("alpha", 1e39),  # infinite in float32
    ("alpha", 10**400),  # not even a float
    ("temperature", 0.0),
    ("temperature", -0.25),
    ("temperature", NAN),
    ("temperature", INF),
    ("temperature", 1e-40),  # beta infinite in float32
    ("temperature", 1e50),  # beta 0 in float32
    ("temperature", 10**400),
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("mcmc_steps", -1),
    ("final_steps", -1),
    ("block_size", 0),
    ("block_size", -1),
    ("lanes", 0),
    ("lanes", -2),
    ("cut", "entropy"),
    ("cut", None),
    ("compat", "paper"),
    ("compat", ""),
]


@pytest.mark.parametrize(("name", "value"), TYPES)
def test_a_wrong_type_is_refused_by_name_and_value(name, value):
    with pytest.raises(ArgumentTypeError) as caught:
        PowerConfig(**{"early_rejection": False, name: value})
    assert isinstance(caught.value, TypeError)
    assert str(caught.value).startswith(f"{name} is {value!r}; it must be ")


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_a_value_out_of_range_is_refused_by_name_value_and_range(name, value):
    with pytest.raises(ArgumentError) as caught:
        PowerConfig(**{"early_rejection": False, name: value})
    assert isinstance(caught.value, ValueError)
    assert not isinstance(caught.value, ArgumentTypeError)
    message = str(caught.value)
    assert message.startswith((f"{name} is {value}; ", f"{name} is {value!r}; "))
    assert any(word in message for word in ("it must lie in", "it must be at least", "allowed: "))


@pytest.mark.parametrize("temperature", [0.24, 1.001, 2.0, 1e-3])
def test_early_rejection_needs_beta_between_one_and_alpha(temperature):
    with pytest.raises(ArgumentError, match=rf"early_rejection is True with temperature {temperature}.*\[0.25, 1\]"):
        PowerConfig(alpha=4.0, temperature=temperature)
    assert PowerConfig(alpha=4.0, temperature=temperature, early_rejection=False).beta == np.float32(1 / temperature)


@pytest.mark.parametrize("alpha", [1.0, 1, 4, 3.7, 10 / 3, 1.1, math.pi, 7.3e5, 1.0000001])
def test_the_ends_of_that_range_are_in_it_however_alpha_rounds(alpha):
    """temperature = 1/alpha means beta = alpha exactly, although 1/(1/alpha) need not."""
    for temperature in (None, 1 / alpha, 1.0, 1):
        config = PowerConfig(alpha=alpha, temperature=temperature)
        assert config.beta == (1.0 if temperature in (1.0,) else float(np.float32(alpha)))
        assert config.early_rejection


def test_an_inverse_temperature_rounds_back_to_alpha():
    """In float32, for every alpha whose double is not half way between two floats; 2000 of them."""
    for alpha in np.exp(np.random.default_rng(0).uniform(0, 6, size=2000)).tolist():
        assert PowerConfig(alpha=alpha, temperature=1 / alpha).beta == float(np.float32(alpha))


def test_alpha_one_is_allowed_and_proposes_from_the_model():
    config = PowerConfig(alpha=1.0)
    assert config.beta == 1.0


def test_compat_refuses_early_rejection_and_says_so():
    with pytest.raises(ArgumentError, match=r"early_rejection is True with compat='karan-du'.*must be False"):
        PowerConfig(compat="karan-du")
    assert PowerConfig(compat="karan-du", early_rejection=False).law.karan_du


@pytest.mark.parametrize(
    ("given", "block", "stages", "steps"),
    [
        (dict(block_size=None), 10, 1, 3),
        (dict(block_size=10), 10, 1, 3),
        (dict(block_size=11), 10, 1, 3),  # longer than the answer
        (dict(block_size=5), 5, 2, 6),
        (dict(block_size=4), 4, 3, 9),  # does not divide: a last stage of 2
        (dict(block_size=1), 1, 10, 30),
        (dict(block_size=4, mcmc_steps=0), 4, 3, 0),
        (dict(block_size=4, mcmc_steps=0, final_steps=7), 4, 3, 7),
        (dict(block_size=4, final_steps=7), 4, 3, 16),
    ],
)
def test_the_law_of_a_config_has_its_stages_and_steps(given, block, stages, steps):
    law = PowerConfig(**{"max_new_tokens": 10, "mcmc_steps": 3, **given}).law
    assert (law.block_size, law.stages, law.max_steps) == (block, stages, steps)


@pytest.mark.parametrize("cut", ["divergence", "divergence-entropy"])
def test_a_divergence_cut_reaches_the_law_and_compat_refuses_it(cut):
    assert PowerConfig(cut=cut).law.cut == cut
    with pytest.raises(ArgumentError, match=f"^cut is '{cut}' with compat='karan-du'.*allowed: 'uniform'"):
        PowerConfig(cut=cut, compat="karan-du", early_rejection=False)


def test_switches_reach_the_law_one_by_one():
    default = PowerConfig().law
    assert (default.early_rejection, default.free_prefix, default.karan_du) == (True, True, False)
    assert not PowerConfig(early_rejection=False).law.early_rejection
    assert not PowerConfig(free_prefix=False).law.free_prefix


def test_defaults_are_those_of_the_paper():
    config = PowerConfig()
    assert (config.alpha, config.max_new_tokens, config.block_size, config.mcmc_steps) == (4.0, 3072, 192, 10)
    assert (config.final_steps, config.temperature, config.beta, config.lanes) == (0, None, 4.0, None)


def test_a_config_cannot_change_after_it_was_checked():
    with pytest.raises(FrozenInstanceError):
        PowerConfig().alpha = 0.5
    assert all(field.name in PowerConfig.__doc__ for field in fields(PowerConfig))
