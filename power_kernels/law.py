"""The law of a run: the constants of DESIGN section 3 and their checks, in plain Python: they need no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from .errors import ArgumentError, ArgumentTypeError

_INT32_MAX = 2**31 - 1
MAX_PARTICLES = 128
_MOST_BONUS = 1e6  # far beyond any use; with more, W has no digits left beside lambda n


def check_integer(name: str, value, least: int, most: int = _INT32_MAX) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be an int")
    if not least <= value <= most:
        raise ArgumentError(f"{name} is {value}; it must lie in [{least}, {most}]")


def check_length_bonus(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be a float")
    if not -_MOST_BONUS <= value <= _MOST_BONUS:
        raise ArgumentError(f"{name} is {value}; it must lie in [{-_MOST_BONUS:g}, {_MOST_BONUS:g}]")


def check_rho(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be a float")
    if not 0.0 <= value <= 1.0:
        raise ArgumentError(f"{name} is {value}; it must lie in [0, 1]")


class Cut(IntEnum):
    """The law of the place where a proposal leaves the answer (DESIGN 3.6), as the kernels take it."""

    UNIFORM = 0
    DIVERGENCE = 1
    DIVERGENCE_ENTROPY = 2


class SweepCut(IntEnum):
    """The law of the place where a sweep of particles begins (DESIGN 3.9)."""

    WHOLE = 0  # the whole answer
    UNIFORM = 1  # uniform over the answer's positions; the candidates' selection weights get -log n
    UNIFORM_HORIZON = 2  # uniform over all positions; a sweep that begins behind the answer changes nothing


CUTS = ("uniform", "divergence", "divergence-entropy")  # names of `Cut`, in its order
SWEEP_CUTS = ("whole", "uniform", "uniform-horizon")  # names of `SweepCut`, in its order


@dataclass(frozen=True)
class Law:
    """The constants of one run (DESIGN section 3). All are host values, fixed while a run lasts.

    max_new_tokens, block_size >= 1; mcmc_steps, final_steps >= 0. cut: one of `CUTS` (3.6). free_prefix says nothing
    under a divergence cut, whose proposals keep no token on the way. stops: stop strings close an answer as EOS does
    (3.1); a run then has a table of their automaton. length_bonus: lambda of the target p(x)^alpha e^(lambda n), nats a
    token (3.1). karan_du allows no other cut than "uniform", no early_rejection and no length_bonus.
    Raises ArgumentError for another value, ArgumentTypeError for another type.
    """

    max_new_tokens: int
    block_size: int
    mcmc_steps: int
    final_steps: int = 0
    early_rejection: bool = True
    free_prefix: bool = True
    karan_du: bool = False
    cut: str = "uniform"
    stops: bool = False
    length_bonus: float = 0.0

    def __post_init__(self) -> None:
        # The kernels index by these numbers and do not look at them.
        for name, least in (("max_new_tokens", 1), ("block_size", 1), ("mcmc_steps", 0), ("final_steps", 0)):
            check_integer(name, getattr(self, name), least)
        for name in ("early_rejection", "free_prefix", "karan_du", "stops"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ArgumentTypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be a bool")
        if not isinstance(self.cut, str):
            raise ArgumentTypeError(f"cut is {self.cut!r}, a {type(self.cut).__name__}; it must be a str")
        if self.cut not in CUTS:
            raise ArgumentError(f"cut is {self.cut!r}; allowed: {', '.join(map(repr, CUTS))}")
        check_length_bonus("length_bonus", self.length_bonus)
        if self.karan_du and self.length_bonus != 0.0:
            raise ArgumentError(f"length_bonus is {self.length_bonus} with karan_du; the published code has none: 0")
        if self.karan_du and self.diverges:
            raise ArgumentError(f"cut is {self.cut!r} with karan_du; the published code cuts uniformly")
        if self.karan_du and self.early_rejection:
            raise ArgumentError(
                "early_rejection is True with karan_du, whose test is not monotone; it must be False there"
            )

    @property
    def diverges(self) -> bool:
        """Whether a step draws the divergence position itself."""
        return self.cut != "uniform"

    @property
    def needs_entropy(self) -> bool:
        return self.cut == "divergence-entropy"

    @property
    def stages(self) -> int:
        return -(-self.max_new_tokens // self.block_size)

    @property
    def max_steps(self) -> int:
        return self.stages * self.mcmc_steps + self.final_steps

    def constants(self) -> tuple[int, ...]:
        """The law as the last arguments of the operator `mh_advance`. length_bonus is not among them: the kernels find
        it in `reference.length_table`."""
        return (
            self.max_new_tokens, self.block_size, self.mcmc_steps, self.final_steps,
            self.early_rejection, self.free_prefix, self.karan_du, self.stops, CUTS.index(self.cut),
        )  # fmt: skip

    @staticmethod
    def of_constants(*constants: int) -> Law:
        *plain, stops, cut = constants
        return Law(*plain, stops=bool(stops), cut=CUTS[cut])


@dataclass(frozen=True)
class ParticleLaw:
    """The constants of one run of particles (DESIGN 3.9). All are host values, fixed while a run lasts.

    max_new_tokens >= 1; particles: N, the most open prefixes at once, 2 to `MAX_PARTICLES`; sweeps >= 0, after the
    start. cut: a `SweepCut`. rho: open prefixes whose weight is small beside rho/N of the mass of everything die out
    (exact for any rho); 0: none do. stops, length_bonus: as in `Law`.
    Raises ArgumentError for another value, ArgumentTypeError for another type.
    """

    max_new_tokens: int
    particles: int
    sweeps: int
    cut: SweepCut = SweepCut.WHOLE
    rho: float = 0.0
    stops: bool = False
    length_bonus: float = 0.0

    def __post_init__(self) -> None:
        check_integer("max_new_tokens", self.max_new_tokens, 1)
        check_integer("particles", self.particles, 2, MAX_PARTICLES)
        check_integer("sweeps", self.sweeps, 0)
        if not isinstance(self.cut, SweepCut):
            raise ArgumentTypeError(f"cut is {self.cut!r}, a {type(self.cut).__name__}; it must be a SweepCut")
        check_rho("rho", self.rho)
        if not isinstance(self.stops, bool):
            raise ArgumentTypeError(f"stops is {self.stops!r}, a {type(self.stops).__name__}; it must be a bool")
        check_length_bonus("length_bonus", self.length_bonus)
