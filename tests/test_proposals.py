"""What travels with a request of a serving stack: whatever it is, it is refused by name before it reaches a kernel."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from power_kernels.api.driver.engine import Opened
from power_kernels.api.engines.serving.proposal import Proposal, proposal_of
from power_kernels.errors import ArgumentError, ArgumentTypeError

PLAIN = Proposal(
    base=7, first=2, exclude=5, serial=3, chain_id=1, prompt_id=4, horizon=9, stop_token=0, seed=2**64 - 1,
    ends_early=True, alpha=4.0, beta=2.5, cumw=-1.25, theta=-30.0, length_bonus=0.5,
)  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"theta": -math.inf}, {"cumw": -math.inf, "theta": -math.inf, "seed": -1}])
def test_a_proposal_survives_json(changes):
    proposal = replace(PLAIN, **changes)
    text = json.dumps(proposal.to_dict(), allow_nan=False)
    assert Proposal.from_dict(json.loads(text)) == proposal


def test_a_proposal_is_what_the_driver_has_opened():
    opened = Opened(
        lane=1, request=9, tokens=[3, 4], horizon=9, serial=3, chain_id=1, prompt_id=4, exclude=5, cumw=-1.25,
        theta=-30.0, length_bonus=0.5, eos=(0,), stops=False,
    )  # fmt: skip
    assert proposal_of(opened, 7, 4.0, 2.5, 2**64 - 1, 0) == PLAIN
    assert proposal_of(opened, 7, 4.0, 2.5, 2**64 - 1).stop_token == -1


HOSTILE = [
    ({"base": 0}, ArgumentError, "base is 0; it must lie in [1, 2147483647]"),
    ({"base": 2**31}, ArgumentError, "base is 2147483648; it must lie in [1, 2147483647]"),
    ({"first": -1}, ArgumentError, "first is -1; it must lie in [0, 2147483647]"),
    ({"first": 9}, ArgumentError, "first is 9 with horizon 9; it must be below that"),
    ({"exclude": -2}, ArgumentError, "exclude is -2; it must lie in [-1, 2147483647]"),
    ({"serial": 2**31}, ArgumentError, "serial is 2147483648; it must lie in [-2147483648, 2147483647]"),
    ({"prompt_id": 2**29}, ArgumentError, "prompt_id is 536870912; it must lie in [0, 536870911]"),
    ({"chain_id": 1.0}, ArgumentTypeError, "chain_id is 1.0, a float; it must be an int"),
    ({"horizon": "9"}, ArgumentTypeError, "horizon is '9', a str; it must be an int"),
    ({"stop_token": None}, ArgumentTypeError, "stop_token is None, a NoneType; it must be an int"),
    ({"seed": 2**64}, ArgumentError, "seed is 18446744073709551616; it must lie in [-9223372036854775808, "),
    ({"ends_early": 1}, ArgumentTypeError, "ends_early is 1; it must be True or False"),
    ({"alpha": 0.0}, ArgumentError, "alpha is 0.0; it must lie in [1e-37, 1e+37]"),
    ({"alpha": math.inf}, ArgumentError, "alpha is inf; it must lie in [1e-37, 1e+37]"),
    ({"beta": math.nan}, ArgumentError, "beta is nan; it must lie in [1e-37, 1e+37]"),
    ({"beta": "2"}, ArgumentTypeError, "beta is '2', a str; it must be a float"),
    ({"beta": 0.5}, ArgumentError, "theta is -30.0 with alpha 4.0 and beta 0.5; it must be -inf there, since nothing"),
    ({"beta": 4.5}, ArgumentError, "theta is -30.0 with alpha 4.0 and beta 4.5; it must be -inf there, since nothing"),
    ({"cumw": math.inf}, ArgumentError, "cumw is inf; it must lie in [-1e+300, 1e+300], or be -inf"),
    ({"theta": math.nan}, ArgumentError, "theta is nan; it must lie in [-1e+300, 1e+300], or be -inf"),
    ({"theta": True}, ArgumentTypeError, "theta is True, a bool; it must be a float"),
    ({"length_bonus": 2e6}, ArgumentError, "length_bonus is 2000000.0; it must lie in [-1e+06, 1e+06]"),
    ({"length_bonus": None}, ArgumentTypeError, "length_bonus is None, a NoneType; it must be a float"),
]


@pytest.mark.parametrize(("changes", "error", "message"), HOSTILE)
def test_a_dict_with_a_wrong_value_is_refused_by_its_key(changes, error, message):
    with pytest.raises(error, match="^" + re.escape(f"power_proposal.{message}")) as caught:
        Proposal.from_dict(PLAIN.to_dict() | changes)
    assert type(caught.value) is error


def test_what_is_no_dict_of_a_proposal_is_refused():
    for value in (None, [], "{}", 3, PLAIN):
        with pytest.raises(ArgumentTypeError, match=f"^power_proposal is a {type(value).__name__}; it must be a dict"):
            Proposal.from_dict(value)
    with pytest.raises(ArgumentError, match=re.escape("power_proposal has the key 'temperature'; allowed: base, ")):
        Proposal.from_dict(PLAIN.to_dict() | {"temperature": 1.0})
    for key in PLAIN.to_dict():
        short = {name: value for name, value in PLAIN.to_dict().items() if name != key}
        with pytest.raises(ArgumentError, match=f"^of this request has no '{key}'; it must have base, first"):
            Proposal.from_dict(short, "of this request")
