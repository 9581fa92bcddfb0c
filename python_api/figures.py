"""Axes, colours and captions that all plots share: of bench/, of runs and of chains. matplotlib, without a screen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's palette, which people of every colour vision tell apart.
BLUE, ORANGE, GREEN, RED, SKY, PINK, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000",
)  # fmt: skip
PALETTE = (BLUE, ORANGE, GREEN, RED, SKY, PINK, BLACK)
MARKERS = "osD^vPX"


def number(value: float, _=None) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g}"


def seconds(value: float, _=None) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= 0.999 * scale:
            return f"{value / scale:g} {unit}"
    return f"{value * 1e9:g} ns"


def size(value: float, _=None) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.999 * scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g} B"


def logarithmic(axis, formatter) -> None:
    axis.set_major_formatter(FuncFormatter(formatter))
    axis.set_minor_formatter(NullFormatter())


def times(value: float, _=None) -> str:
    return f"{value:g}x"


def ratios(axis) -> None:
    """Labels at 1, 2 and 5 of each decade: a ratio axis often spans no more than one."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    logarithmic(axis, times)


def ticks_at(axes, values: Iterable[int]) -> None:
    """A label at each measured value and nowhere else."""
    values = sorted(set(values))
    axes.set_xticks(values, [f"{v:,}" if v < 10_000 else f"{v / 1000:.0f}k" for v in values])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)


def caption(fig, machine: str, title: str) -> None:
    """machine: where it was measured, under the figure."""
    fig.suptitle(title, fontsize=13, fontweight="bold")
    fig.supxlabel(machine, fontsize=8.5, color="0.35")


def figure(panels: int, machine: str, title: str, *, width: float = 5.6, height: float = 4.4):
    fig, axes = plt.subplots(1, panels, figsize=(max(width * panels, 7.0), height), squeeze=False, layout="constrained")
    caption(fig, machine, title)
    for ax in axes[0]:
        plain(ax)
    return fig, axes[0]


def plain(ax, axis: str = "both") -> None:
    """A light grid along an axis, no box."""
    ax.grid(True, axis=axis, which="major", color="0.88", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def save(fig, folder: Path, name: str) -> Path:
    path = folder / name
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return path


class NothingToDrawError(Exception):
    """A plot has no data; the message says which."""


def draw_all(plots: Mapping[str, Callable[[], object]], folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Each plot into a file of its name. plots: what makes the figures, or raises NothingToDrawError. Returns the
    files, and why the others were not drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn, skipped = [], {}
    for name, plot in plots.items():
        try:
            drawn.append(save(plot(), folder, name))
        except NothingToDrawError as reason:
            skipped[name] = str(reason)
            (folder / name).unlink(missing_ok=True)  # of an earlier run, which would be taken for this one's
    return drawn, skipped
