"""One plausible mistake each, planted in the reference of particles: what the tests of the law must tell from it.

Each is a function of a pytest.MonkeyPatch.
"""

from __future__ import annotations

import math

from power_kernels import rng
from power_kernels.particles import Tally
from power_kernels.reference import particle_chain, particles
from power_kernels.reference.particle_chain import ReferenceParticles


def _closing_bonus_times(patch, factor: float) -> None:
    plain = particle_chain.branch
    patch.setattr(
        particle_chain,
        "branch",
        lambda children, tally, closing_bonus, rho, uniform: plain(
            children, tally, factor * closing_bonus, rho, uniform
        ),
    )


def no_length_ratio(patch) -> None:
    """An answer cut uniformly without its 1/n."""
    _closing_bonus_times(patch, 0.0)


def length_ratio_twice(patch) -> None:
    _closing_bonus_times(patch, 2.0)


def reference_may_die(patch) -> None:
    """The draw is that of a start, whether the reference survives or not."""
    plain = particles._drawn
    patch.setattr(
        particles,
        "_drawn",
        lambda light, order, log_threshold, places, by_floor, must, u: plain(
            light, order, log_threshold, places, by_floor, None, u
        ),
    )


def reference_takes_the_first_point(patch) -> None:
    """V is uniform on [0, 1), not on the reference's piece of the line."""
    plain = particles._drawn

    def drawn(light, order, log_threshold, places, by_floor, must, u):
        if must is not None:
            start = light[order].ravel()[: order.index(must[0]) * light.shape[1] + must[1]].sum()
            u = (u * math.exp(log_threshold) - start) / light[must]
        return plain(light, order, log_threshold, places, by_floor, must, u)

    patch.setattr(particles, "_drawn", drawn)


def candidates_forgotten(patch) -> None:
    """Of the candidates only those of the last position at which any closed."""
    plain = particles._close

    def close(children, tally, closing_bonus, u):
        if (children.closes & (children.log_weight > -math.inf)).any():
            tally[Tally.OTHERS] = tally[Tally.KEPT] = -math.inf
        return plain(children, tally, closing_bonus, u)

    patch.setattr(particles, "_close", close)


def old_weight_kept(patch) -> None:
    """A child that was drawn keeps its weight, as if it had survived for certain."""
    plain = particles._survivors

    def survivors(weight, *rest):
        drawn, log_threshold = plain(weight, *rest)
        return [(row, token, float(weight[row, token])) for row, token, _ in drawn], log_threshold

    patch.setattr(particles, "_survivors", survivors)


def bonus_misses_the_closing_token(patch) -> None:
    """lambda of the token that closes an answer before the horizon. (At the horizon, too, it would cancel.)"""
    plain = ReferenceParticles.children

    def children(self, rows, weights, order, reference, last):
        found = plain(self, rows, weights, order, reference, last)
        if not last:
            found.log_weight[found.closes] -= self.law.length_bonus
        return found

    patch.setattr(ReferenceParticles, "children", children)


def drawn_along_rows(patch) -> None:
    """The line follows the rows that the particles are in, and not their prefixes."""
    plain = particles._drawn
    patch.setattr(
        particles,
        "_drawn",
        lambda light, order, *rest: plain(light, list(range(len(order))), *rest),
    )


def sweep_repeats_the_start(patch) -> None:
    """Every sweep has the start's uniforms. Each sweep alone has its law, the pair of answers does not."""
    plain = rng.particle_uniforms
    patch.setattr(rng, "particle_uniforms", lambda seed, position, sweep, *ids: plain(seed, position, 0, *ids))
