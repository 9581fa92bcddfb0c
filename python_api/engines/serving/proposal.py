"""What a request of a serving stack carries so that the worker draws as the chain asks: a proposal, or an extension.

The driver's side makes it of what it was told (`proposal_of`) and sends it along as a dict of plain values; the
worker's side reads it (`Proposal.from_dict`) and puts it into its table of slots (`SlotRows.stage`). Between them lies
whatever the stack puts there, HTTP included: nothing of the dict is trusted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np

from power_kernels.api.driver.engine import Opened
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.law import check_integer, check_length_bonus
from power_kernels.rng import MAX_PROMPT_ID

KEY = "power_proposal"  # under which the dict travels among a request's extra arguments
ENTROPY = "power_entropy"  # beside it: whether entropies are wanted
COLUMNS = 3  # of a reply: logq, weight, entropy

_MOST = 2**31 - 1
_INTEGERS = {  # least and most
    "base": (1, _MOST),
    "first": (0, _MOST),
    "exclude": (-1, _MOST),
    "serial": (-(2**31), _MOST),
    "chain_id": (0, _MOST),
    "prompt_id": (0, MAX_PROMPT_ID),
    "horizon": (1, _MOST),
    "stop_token": (-1, _MOST),
    "seed": (-(2**63), 2**64 - 1),
}
_LARGEST = 1e37  # exponents are used in float32, and so are their inverses
_OR_MINUS_INFINITY = ("cumw", "theta")  # a dict has None for it
_FARTHEST = 1e300  # from 0, and far beyond any sum of weights


@dataclass(frozen=True)
class Proposal:
    """Integers, floats and a bool; checked when made. `power_kernels.SlotTable` says what a worker does with them.

    base: length of the prompt. first: tokens of the answer that the request begins with. exclude: the token that may
    not be drawn at answer position `first`, -1 for none. serial, chain_id, prompt_id, seed: of its random numbers.
    horizon: the answer's length at most. stop_token: what the worker shows, so that the stack ends the request, where
    the chain will reject it or its logits are bad; -1 for none. ends_early: whether an EOS token or a stop string may
    end the answer before its horizon. alpha, beta: the exponents. cumw, theta, length_bonus: as `Opened` says; theta is
    -inf where the worker rejects nothing, which it may only do with 1 <= beta <= alpha.

    Raises ArgumentError or ArgumentTypeError, which name the field, its value and what is allowed.
    """

    base: int
    first: int
    exclude: int
    serial: int
    chain_id: int
    prompt_id: int
    horizon: int
    stop_token: int
    seed: int
    ends_early: bool
    alpha: float
    beta: float
    cumw: float
    theta: float
    length_bonus: float

    def __post_init__(self) -> None:
        for name, (least, most) in _INTEGERS.items():
            check_integer(name, getattr(self, name), least, most)
        if self.first >= self.horizon:
            raise ArgumentError(f"first is {self.first} with horizon {self.horizon}; it must be below that")
        if not isinstance(self.ends_early, bool):
            raise ArgumentTypeError(f"ends_early is {self.ends_early!r}; it must be True or False")
        for name in ("alpha", "beta", "cumw", "theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ArgumentTypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be a float")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not 1 / _LARGEST <= value <= _LARGEST:
                raise ArgumentError(f"{name} is {value}; it must lie in [{1 / _LARGEST:g}, {_LARGEST:g}]")
        for name in _OR_MINUS_INFINITY:
            value = getattr(self, name)
            if value != -math.inf and not -_FARTHEST <= value <= _FARTHEST:
                raise ArgumentError(f"{name} is {value}; it must lie in [{-_FARTHEST:g}, {_FARTHEST:g}], or be -inf")
        check_length_bonus("length_bonus", self.length_bonus)
        if self.theta > -math.inf and not 1 <= np.float32(self.beta) <= np.float32(self.alpha):
            raise ArgumentError(
                f"theta is {self.theta} with alpha {self.alpha} and beta {self.beta}; it must be -inf there, since "
                "nothing is rejected early without 1 <= beta <= alpha"
            )

    def resumed(self) -> Proposal:
        """The same without early rejection: for a request that its chain asks to go on although it has ended."""
        return replace(self, theta=-math.inf)

    def to_dict(self) -> dict[str, int | float | None]:
        """Plain values that any encoding keeps. -inf is None."""
        return {name: None if value == -math.inf else value for name, value in vars(self).items()}

    @staticmethod
    def from_dict(value, name: str = KEY) -> Proposal:
        """What `to_dict` gave. name: of the dict, for errors, which say what of it is wrong as `Proposal` does."""
        if not isinstance(value, dict):
            raise ArgumentTypeError(f"{name} is a {type(value).__name__}; it must be a dict")
        if unknown := [key for key in value if key not in _NAMES]:
            raise ArgumentError(f"{name} has the key {unknown[0]!r}; allowed: {', '.join(_NAMES)}")
        if missing := [key for key in _NAMES if key not in value]:
            raise ArgumentError(f"{name} has no {missing[0]!r}; it must have {', '.join(_NAMES)}")
        given = {key: -math.inf if key in _OR_MINUS_INFINITY and one is None else one for key, one in value.items()}
        try:
            return Proposal(**given)
        except (ArgumentError, ArgumentTypeError) as error:
            raise type(error)(f"{name}.{error}") from None


_NAMES = tuple(f.name for f in fields(Proposal))


def proposal_of(
    opened: Opened, prompt_length: int, alpha: float, beta: float, seed: int, stop_token: int = -1
) -> Proposal:
    """What the request that the driver has opened carries. prompt_length: of its slot's prompt. alpha, beta, seed: of
    the run (`Engine.begin`). stop_token: one at which the stack ends a request, -1 for none."""
    return Proposal(
        base=prompt_length,
        first=len(opened.tokens),
        exclude=opened.exclude,
        serial=opened.serial,
        chain_id=opened.chain_id,
        prompt_id=opened.prompt_id,
        horizon=opened.horizon,
        stop_token=stop_token,
        seed=seed,
        ends_early=opened.ends_early,
        alpha=alpha,
        beta=beta,
        cumw=opened.cumw,
        theta=opened.theta,
        length_bonus=opened.length_bonus,
    )
