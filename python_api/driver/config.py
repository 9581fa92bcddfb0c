"""PowerConfig: what to sample, checked when it is made (DESIGN section 3)."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, fields

import numpy as np

from power_kernels.api.driver.checks import integer, items, number, switch
from power_kernels.errors import ArgumentError, ArgumentTypeError
from power_kernels.law import (
    CUTS,
    MAX_PARTICLES,
    SWEEP_CUTS,
    Law,
    ParticleLaw,
    SweepCut,
    check_length_bonus,
    check_rho,
)

COMPAT = (None, "karan-du")
KERNELS = ("mh", "particles")
SWEEP_BEGINNINGS = ("whole", "uniform")
_ONLY_MH = (
    "block_size", "mcmc_steps", "final_steps", "temperature", "cut", "early_rejection", "free_prefix", "lanes",
    "compat",
)  # fmt: skip
_ONLY_PARTICLES = ("particles", "sweeps", "sweep_cut", "rho")
_LARGEST = 1e37  # the exponents are used in float32, and so are their inverses


@dataclass(frozen=True)
class PowerConfig:
    """Metropolis-Hastings or particles towards p(x)^alpha.

    kernel: "mh", proposals one after the other; "particles", many open answers side by side, weighed and resampled at
        each token (section 3.9): a start and then sweeps over its answer, each of which leaves the target invariant.
    alpha: the power, >= 1. Used in float32, as temperature is.
    max_new_tokens: the last horizon H. Longer answers are cut there.
    block_size: tokens a stage grows the answer by; None is one stage of max_new_tokens.
    mcmc_steps: Metropolis-Hastings steps after each stage. final_steps: more of them at the last horizon.
    temperature: of the proposals, 1/beta; None is 1/alpha.
    cut: the law of the place where a proposal leaves the answer (exact, section 3.6). "uniform": cut anywhere, and
        leave where the suffix first differs. "divergence": leave at a token with probability proportional to 1 - q of
        it, so that no step repeats the answer where another is possible. "divergence-entropy": that times the entropy
        of the token's row, a cut that prefers the places where the model was undecided. free_prefix says nothing under
        the last two.
    early_rejection: reject a proposal as soon as it cannot be accepted (exact, section 3.3). Needs 1 <= beta <= alpha.
    stop: stop strings, one or several. Each closes an answer as EOS does (exact, section 3.1): the token that completes
        one is the answer's last, whatever else it holds, and `.text` ends before the string. The prompt's text is no
        part of a match. The name of a special token, which has no text, means the token, too. Needs a tokenizer. A text
        that is cut at a string afterwards has another law: what was sharpened is the answer and what followed it.
    length_bonus: lambda of the target p(x)^alpha e^(lambda n), in nats a token (section 3.1). Where answers can end
        early, p^alpha prefers short ones; a positive lambda makes up for that.
    free_prefix: keep the tokens a proposal repeats without forwarding them (exact, section 3.4).
    lanes: proposals of one chain that run side by side (exact, section 3.5). None: the driver chooses; the chains are
        the same for any number.
    compat: "karan-du" reproduces the algorithm of the paper's published code (suffix sums over the overlap, proposals
        capped at the current length, no cut-law ratio). It does not leave p(x)^alpha invariant when answers can end
        early, and early rejection does not apply to it.
    particles: the most open answers at once, N. It should grow with the answer's length. sweeps: after the start, whose
        own law only tends to the target as N grows. sweep_cut: where a sweep begins. "whole": at the beginning of the
        answer; "uniform": at any place of it, as a proposal does. rho: in [0, 1]; open answers that weigh little beside
        rho/N of everything die out (exact for any rho, wise up to .1), so that a chain whose answers have ended stops.

    Of the others only alpha, max_new_tokens, stop and length_bonus mean something to particles, and these four nothing
    to "mh": what would have no effect must have its default.

    Raises ArgumentError (ArgumentTypeError for a wrong type) naming the field, its value and what is allowed.
    """

    alpha: float = 4.0
    max_new_tokens: int = 3072
    block_size: int | None = 192
    mcmc_steps: int = 10
    final_steps: int = 0
    temperature: float | None = None
    cut: str = "uniform"
    stop: str | Sequence[str] = ()
    length_bonus: float = 0.0
    early_rejection: bool = True
    free_prefix: bool = True
    lanes: int | None = None
    compat: str | None = None
    kernel: str = "mh"
    particles: int = 16
    sweeps: int = 1
    sweep_cut: str = "whole"
    rho: float = 0.0

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ArgumentError(f"kernel is {self.kernel!r}; allowed: {', '.join(map(repr, KERNELS))}")
        self._refuse_what_has_no_effect()
        self._set("alpha", number("alpha", self.alpha))
        if not 1 <= self.alpha <= _LARGEST:
            raise ArgumentError(f"alpha is {self.alpha}; it must lie in [1, {_LARGEST:g}]")
        if self.temperature is not None:
            self._set("temperature", number("temperature", self.temperature))
            if not 1 / _LARGEST <= self.temperature <= _LARGEST:
                raise ArgumentError(
                    f"temperature is {self.temperature}; it must lie in [{1 / _LARGEST:g}, {_LARGEST:g}], or be None"
                )
        for name, least in (("max_new_tokens", 1), ("mcmc_steps", 0), ("final_steps", 0)):
            self._set(name, integer(f"{name} is", getattr(self, name), least))
        for name in ("block_size", "lanes"):
            if getattr(self, name) is not None:
                self._set(name, integer(f"{name} is", getattr(self, name), 1))
        self._set("particles", integer("particles is", self.particles, 2, MAX_PARTICLES))
        self._set("sweeps", integer("sweeps is", self.sweeps, 0))
        if self.sweep_cut not in SWEEP_BEGINNINGS:
            raise ArgumentError(f"sweep_cut is {self.sweep_cut!r}; allowed: {', '.join(map(repr, SWEEP_BEGINNINGS))}")
        self._set("rho", number("rho", self.rho))
        check_rho("rho", self.rho)
        for name in ("early_rejection", "free_prefix"):
            self._set(name, switch(name, getattr(self, name)))
        self._set("stop", _stop_strings(self.stop))
        self._set("length_bonus", number("length_bonus", self.length_bonus))
        check_length_bonus("length_bonus", self.length_bonus)
        if self.length_bonus != 0.0 and self.compat is not None:
            raise ArgumentError(
                f"length_bonus is {self.length_bonus} with compat={self.compat!r}, which has none; it must be 0 there"
            )
        if self.cut not in CUTS:
            raise ArgumentError(f"cut is {self.cut!r}; allowed: {', '.join(map(repr, CUTS))}")
        if self.compat not in COMPAT:
            raise ArgumentError(f"compat is {self.compat!r}; allowed: {', '.join(map(repr, COMPAT))}")
        if self.compat is not None and self.cut != "uniform":
            raise ArgumentError(
                f"cut is {self.cut!r} with compat={self.compat!r}, which cuts uniformly; allowed: 'uniform'"
            )
        if self.early_rejection and self.compat is not None:
            raise ArgumentError(
                f"early_rejection is True with compat={self.compat!r}, whose test is not monotone; "
                "it must be False there"
            )
        if self.early_rejection and not 1 <= self.beta <= float(np.float32(self.alpha)):
            raise ArgumentError(
                f"early_rejection is True with temperature {self.temperature} (beta = {self.beta:g}); it needs "
                f"1 <= beta <= alpha = {self.alpha:g}, that is a temperature in [{1 / self.alpha:g}, 1]"
            )

    def _refuse_what_has_no_effect(self) -> None:
        names = _ONLY_MH if self.kernel == "particles" else _ONLY_PARTICLES
        for f in fields(self):
            if f.name in names and getattr(self, f.name) != f.default:
                raise ArgumentError(
                    f"{f.name} is {getattr(self, f.name)!r} with kernel={self.kernel!r}, where it has no effect; "
                    f"it must be {f.default!r}"
                )

    def _set(self, name: str, value) -> None:
        """Put Python's own number in the place of NumPy's or torch's, so that equal configs are equal in every way."""
        object.__setattr__(self, name, value)

    @property
    def beta(self) -> float:
        """The proposals' exponent, 1/temperature, as float32 holds it."""
        return float(np.float32(self.alpha if self.temperature is None else 1.0 / self.temperature))

    @property
    def particle_law(self) -> ParticleLaw:
        return ParticleLaw(
            max_new_tokens=self.max_new_tokens,
            particles=self.particles,
            sweeps=self.sweeps,
            cut=SweepCut(SWEEP_CUTS.index(self.sweep_cut)),
            rho=self.rho,
            stops=bool(self.stop),
            length_bonus=self.length_bonus,
        )

    @property
    def law(self) -> Law:
        return Law(
            max_new_tokens=self.max_new_tokens,
            block_size=min(self.block_size or self.max_new_tokens, self.max_new_tokens),
            mcmc_steps=self.mcmc_steps,
            final_steps=self.final_steps,
            early_rejection=self.early_rejection,
            free_prefix=self.free_prefix,
            karan_du=self.compat == "karan-du",
            cut=self.cut,
            stops=bool(self.stop),
            length_bonus=self.length_bonus,
        )


def _stop_strings(stop) -> tuple[str, ...]:
    if isinstance(stop, Set):
        stop = sorted(stop, key=repr)  # sets have another order in each process
    strings = (stop,) if isinstance(stop, str) else tuple(items("stop", stop))
    for i, string in enumerate(strings):
        if not isinstance(string, str):
            raise ArgumentTypeError(f"stop[{i}] is {string!r}, a {type(string).__name__}; it must be a str")
        if not string:
            raise ArgumentError(f"stop[{i}] is empty; it would close every answer at once")
        try:
            string.encode()
        except UnicodeEncodeError:
            raise ArgumentError(
                f"stop[{i}] is {string!r}, which holds half of a surrogate pair and is no text"
            ) from None
    return tuple(dict.fromkeys(strings))
