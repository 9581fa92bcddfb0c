"""Plots of `power-kernels diagnose`, for chains that were drawn alike.

traces.png           log p of the answer over the steps, a line a chain, a panel a prompt; what is not pooled is grey
ranks.png            ranks of log p among the pooled steps, by chain: flat where all chains see the same
autocorrelation.png  of log p, by chain
acceptance.png       share of steps that changed the answer, by horizon, step and position

Of many prompts the four with the largest R-hat have panels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from power_kernels.api.experiments import diagnostics
from power_kernels.api.experiments.diagnostics import Chain, Diagnosis, Rate
from power_kernels.api.figures import BLUE, PALETTE, NothingToDrawError, caption, draw_all, plain

PANELS = 4
RANK_BINS = 20
LINES = 12  # chains a panel


def draw(
    name: str, prompts: Mapping[str, Sequence[Chain]], found: Mapping[str, Diagnosis], folder: Path
) -> tuple[list[Path], dict[str, str]]:
    """Every plot there are data for. name: what the chains are of, under each figure. Returns the files, and why others
    were not drawn."""
    shown = [prompt for prompt in sorted(found, key=lambda p: -found[p].rhat) if found[prompt].steps][:PANELS]
    panels = {prompt: (prompts[prompt], found[prompt]) for prompt in found if prompt in shown}
    chains = [chain for of_prompt in prompts.values() for chain in of_prompt]
    plots = {
        "traces.png": lambda: traces(panels, name),
        "ranks.png": lambda: ranks(panels, name),
        "autocorrelation.png": lambda: autocorrelation(panels, name),
        "acceptance.png": lambda: acceptance(chains, name),
    }
    return draw_all(plots, folder)


def traces(panels: Mapping[str, tuple[Sequence[Chain], Diagnosis]], name: str):
    """log p of the answer after each step, of chains by prompt."""
    fig, axes = _panels(panels, name, "log p of the answer after every step", height=2.7)
    for ax, (prompt, (chains, found)) in zip(axes, panels.items(), strict=True):
        longest = max(chains, key=lambda chain: len(chain.horizon))
        starts = np.flatnonzero(np.diff(longest.horizon, prepend=-1))
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(longest.horizon)], strict=True)):
            if longest.horizon[start] != found.horizon:
                ax.axvspan(start + 0.5, stop + 0.5, color=("0.94", "0.88")[number % 2], linewidth=0)
        for chain, colour in zip(chains[:LINES], _colours(), strict=False):
            steps = np.arange(1, len(chain.logp) + 1)
            ax.plot(steps, chain.logp, color=colour, linewidth=0.9, alpha=0.85, drawstyle="steps-post")
        ax.set(xlabel="step", ylabel="log p, nats", xlim=(0.5, len(longest.horizon) + 0.5))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _title(ax, prompt, found)
    return fig


def ranks(panels: Mapping[str, tuple[Sequence[Chain], Diagnosis]], name: str):
    """Histograms of the ranks of log p among all pooled steps, a row a chain; the dashed line is what equal chains
    have."""
    panels = {prompt: panel for prompt, panel in panels.items() if panel[1].steps >= RANK_BINS and panel[1].chains > 1}
    if not panels:
        raise NothingToDrawError(f"no prompt has two chains with {RANK_BINS} steps at one horizon")
    fig, axes = _panels(panels, name, "Ranks of log p by chain: flat where chains have mixed", height=3.0)
    for ax, (prompt, (chains, found)) in zip(axes, panels.items(), strict=True):
        draws = pooled(chains, found)
        # Answers come again and again: equal values are ranked in random order, or equal chains would look unequal.
        order = np.lexsort((np.random.default_rng(0).random(draws.size), draws.ravel()))
        of_chain = (np.argsort(order) + 1).reshape(draws.shape)[:LINES]
        edges = np.linspace(0.5, draws.size + 0.5, RANK_BINS + 1)
        counts = np.array([np.histogram(row, edges)[0] for row in of_chain]) / (draws.shape[1] / RANK_BINS)
        scale = 0.9 / max(2.0, counts.max())
        for row, (heights, colour) in enumerate(zip(counts, _colours(), strict=False)):
            floor = len(counts) - 1 - row
            width = edges[1] - edges[0]
            ax.bar(edges[:-1], heights * scale, width * 0.94, bottom=floor, align="edge", color=colour, linewidth=0)
            ax.plot([edges[0], edges[-1]], [floor + scale] * 2, color="0.25", linewidth=0.8, linestyle="--")
        ax.set_yticks(np.arange(len(counts)) + 0.02, _names(chains, found)[:LINES][::-1], fontsize=8)
        ax.set(xlabel="rank among all pooled steps", ylabel="chain", xlim=(edges[0], edges[-1]), ylim=(0, len(counts)))
        ax.grid(False)
        ax.tick_params(axis="y", length=0)
        _title(ax, prompt, found)
    return fig


def autocorrelation(panels: Mapping[str, tuple[Sequence[Chain], Diagnosis]], name: str):
    """Of log p at the pooled steps, a line a chain that moved."""
    panels = {
        prompt: (chains, found)
        for prompt, (chains, found) in panels.items()
        if found.steps >= RANK_BINS and any(np.ptp(row) for row in pooled(chains, found))
    }
    if not panels:
        raise NothingToDrawError(f"no prompt has a chain whose log p changed within {RANK_BINS} steps at one horizon")
    from arviz_stats.base import array_stats

    fig, axes = _panels(panels, name, "Autocorrelation of log p", height=2.5)
    for ax, (prompt, (chains, found)) in zip(axes, panels.items(), strict=True):
        lags = min(found.steps // 2, 100)
        for row, colour in zip(pooled(chains, found)[:LINES], _colours(), strict=False):
            if np.ptp(row):
                ax.plot(np.asarray(array_stats.autocorr(row))[: lags + 1], color=colour, linewidth=1.2, alpha=0.85)
        band = 1.96 / np.sqrt(found.steps)
        ax.axhspan(-band, band, color="0.93", linewidth=0)
        ax.axhline(0, color="0.4", linewidth=0.8)
        ax.set(xlabel="lag, steps", ylabel="autocorrelation", xlim=(0, lags))
        ax.set_ylim(min(-0.15, ax.get_ylim()[0]), 1.03)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _title(ax, prompt, found)
    return fig


def acceptance(chains: Sequence[Chain], name: str):
    """The share of steps that changed the answer, by horizon, step and position, with Wilson's 95 %."""
    by_horizon = diagnostics.by_horizon(chains)
    if not by_horizon:
        raise NothingToDrawError("no Metropolis-Hastings step was made")
    panels = [
        ("horizon, tokens", by_horizon, True),
        ("step among those of its horizon", diagnostics.by_step(chains), False),
        ("token where the proposal left the answer", diagnostics.by_position(chains), False),
    ]
    fig, axes = plt.subplots(1, 3, figsize=(13.5, 3.9), sharey=True, layout="constrained")
    caption(fig, f"{name}; bars: 95 % of independent steps", "Steps that changed the answer")
    for ax, (label, rates, categories) in zip(axes, panels, strict=True):
        plain(ax)
        ax.set(xlabel=label)
        draw_rates(ax, rates, categories)
    axes[0].set_ylabel("share of the steps")
    axes[2].set_ylabel("share of the proposals that left")
    axes[0].set_ylim(bottom=0)
    return fig


def draw_rates(
    ax, rates: Sequence[Rate], categories: bool = False, colour: str = BLUE, label: str | None = None
) -> None:
    """Shares with their intervals; over the bins' middles, or one beside the other."""
    if not rates:
        ax.text(0.5, 0.5, "no proposal left the answer", transform=ax.transAxes, ha="center", color="0.4")
        return
    x = np.arange(len(rates)) if categories else np.array([(rate.low + rate.high - 1) / 2 for rate in rates])
    share = np.array([rate.share for rate in rates])
    ends = np.array([rate.interval() for rate in rates]).T
    errors = np.maximum([share - ends[0], ends[1] - share], 0)
    ax.errorbar(x, share, errors, color=colour, marker="o", markersize=5, linewidth=1.4, capsize=2.5, elinewidth=1,
                label=label, linestyle="" if categories else "-")  # fmt: skip
    if categories:
        every = max(1, len(rates) // 16)
        ax.set_xticks(x[::every], [str(rate.low) for rate in rates][::every])
        ax.set_xlim(-0.6, len(rates) - 0.4)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def pooled(chains: Sequence[Chain], found: Diagnosis) -> np.ndarray:
    """log p [chains, steps] of what the diagnosis is of."""
    return np.array([chain.logp[chain.at(found.horizon)[-found.steps :]] for chain in _taken(chains, found)])


def _taken(chains: Sequence[Chain], found: Diagnosis) -> list[Chain]:
    return [chain for chain in chains if not chain.fault and len(chain.at(found.horizon))]


def _names(chains: Sequence[Chain], found: Diagnosis) -> list[str]:
    return [chain.name for chain in _taken(chains, found)]


def _colours() -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(LINES)]


def _panels(panels: Mapping, name: str, title: str, height: float):
    if not panels:
        raise NothingToDrawError("no Metropolis-Hastings step was made")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(6.8 * columns + 0.2 * (columns == 1), height * rows + 0.8),
                             squeeze=False, layout="constrained")  # fmt: skip
    caption(fig, name, title)
    for ax in axes.flat:
        plain(ax)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    return fig, axes.flat[: len(panels)]


def _title(ax, prompt: str, found: Diagnosis) -> None:
    rhat = f", R-hat {found.rhat:.3f}" if 0 < found.rhat < float("inf") else ""
    prompt = prompt if len(prompt) <= 28 else prompt[:27] + "…"
    ax.set_title(f"prompt {prompt}: {found.verdict}{rhat} (horizon {found.horizon})", fontsize=10, loc="left")
