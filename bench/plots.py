"""Plots of results, as a person would want to read them.

    python bench/plots.py bench/results/cpu/ops.json bench/plots/cpu          of bench/ops.py: below
    python bench/plots.py bench/results/cpu/latency.json bench/plots/cpu      of end_to_end.py: end_to_end_plots.py

acceptance.png    decisions per second over rows, one line an answer length, ours and eager torch
roofline.png      bandwidth over the bytes of a call, under the measured copy; the LM head under copy and best product
speedup.png       how many times faster than each opponent, a panel an operator
rows.png          time over rows, vocabulary 151,936, with the lower bound that the copy bandwidth sets
vocabulary.png    time over the vocabulary at one number of rows, the same
lm_head.png       time over that of the product alone, and the memory a call needs
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import end_to_end_plots
import matplotlib.pyplot as plt

from power_kernels.api.figures import (
    BLACK,
    BLUE,
    MARKERS,
    ORANGE,
    PALETTE,
    caption,
    figure,
    logarithmic,
    number,
    plain,
    ratios,
    save,
    seconds,
    size,
    ticks_at,
    times,
)  # fmt: skip

LATENCY_BOUND = ("mh_advance", "block_table_fork")  # their bytes say nothing of their time
QWEN = 151_936


class Results:
    """The records that were run, and what is known of the machine."""

    def __init__(self, path: Path):
        data = json.loads(path.read_text())
        if data.get("schema") != 1:
            raise SystemExit(f"{path} is not a result of this version of bench/ops.py")
        self.records = [r for r in data["records"] if r["median_s"] is not None]
        self.environment = data["environment"]
        self.copy = data["copy_bytes_per_s"]

    def where(self, **conditions) -> list[dict]:
        """Records whose fields or sizes equal the given values."""
        return [
            r for r in self.records if all({**r, **r["shape"]}.get(name) == value for name, value in conditions.items())
        ]

    @property
    def ops(self) -> list[str]:
        return list(dict.fromkeys(r["op"] for r in self.records))

    @property
    def machine(self) -> str:
        e = self.environment
        threads = f", {e['threads']} thread{'s' if e['threads'] > 1 else ''}" if e["device_type"] == "cpu" else ""
        return f"{e['device']}{threads}, torch {e['torch']}, {e['date'][:10]}"


# ----------------------------------------------------------------------------------------------------
# Plots. Each returns None where the results have nothing to show.


# Of the contenders of mh_accept: line style, label.
ACCEPT_STYLES = {
    "mh_accept_out": ("-", "mh_accept"),
    "eager": ("--", "eager torch"),
    "torch.compile": (":", "torch.compile (at some sizes)"),
}


def acceptance(results: Results, folder: Path) -> Path | None:
    """Decisions per second over rows, by answer length."""
    ours = results.where(contender="mh_accept_out")
    lengths = sorted({r["shape"]["tokens"] for r in ours})
    if not lengths:
        return None
    fig, (ax,) = figure(
        1, results.machine, "Acceptance throughput: Metropolis-Hastings decisions per second", width=7.5
    )
    for colour, marker, tokens in zip(PALETTE, MARKERS, lengths, strict=False):
        for contender, (style, _) in ACCEPT_STYLES.items():
            label = f"{tokens:,} tokens" if style == "-" else None
            records = results.where(op="mh_accept", contender=contender, tokens=tokens)
            line = sorted((r["shape"]["rows"], r["per_s"]) for r in records)
            if not line:
                continue
            ax.plot(*zip(*line, strict=True), style, color=colour, marker=marker, markersize=6, label=label,
                    alpha=1.0 if style == "-" else 0.55)  # fmt: skip
    for style, label in ACCEPT_STYLES.values():
        ax.plot([], [], style, color="0.3", alpha=1.0 if style == "-" else 0.55, label=label)
    ax.set(xscale="log", yscale="log", xlabel="pairs of answers in a call", ylabel="decisions per second")
    ticks_at(ax, (r["shape"]["rows"] for r in ours))
    logarithmic(ax.yaxis, number)
    ax.legend(frameon=False, fontsize=9)
    return save(fig, folder, "acceptance.png")


def roofline(results: Results, folder: Path) -> Path | None:
    """Bandwidth over bytes for what memory bounds; operations per second over intensity for the LM head."""
    ours = [r for r in results.records if r["ours"]]
    moving = [r for r in ours if not r["flops"] and r["op"] not in LATENCY_BOUND]
    multiplying = [r for r in ours if r["flops"]]
    panels = [p for p in ((moving, _bandwidth_panel), (multiplying, _product_panel)) if p[0]]
    if not panels:
        return None
    fig, axes = figure(
        len(panels), results.machine, "What the hardware allows, and what is reached", width=6.6, height=5.4
    )
    for ax, (records, draw_panel) in zip(axes, panels, strict=True):
        draw_panel(ax, results, records)
        ax.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    return save(fig, folder, "roofline.png")


def _scatter(ax, records: list[dict], x, y) -> None:
    """A colour and marker an operator, hollow for half precision."""
    for colour, marker, op in zip(PALETTE, MARKERS, dict.fromkeys(r["op"] for r in records), strict=False):
        for dtype in ("float32", "bfloat16"):
            mine = [r for r in records if r["op"] == op and r["dtype"] == dtype]
            if mine:
                ax.scatter(
                    [x(r) for r in mine], [y(r) for r in mine], marker=marker, s=48, linewidths=1.5, zorder=3,
                    edgecolors=colour, facecolors=colour if dtype == "float32" else "none", label=f"{op}, {dtype}",
                )  # fmt: skip
    ax.set(xscale="log", yscale="log")


def _bandwidth_panel(ax, results: Results, records: list[dict]) -> None:
    _scatter(ax, records, lambda r: r["bytes"], lambda r: r["gb_per_s"])
    copy = results.copy / 1e9
    ax.axhline(copy, color=BLACK, linewidth=1.2, linestyle="--")
    ax.text(ax.get_xlim()[0] * 1.3, copy * 1.08, f"measured copy, {copy:.3g} GB/s", fontsize=9)
    ax.set(xlabel="bytes of a call, by the operator's formula", ylabel="GB/s", title="bound by memory")
    logarithmic(ax.xaxis, size)
    logarithmic(ax.yaxis, number)


def _product_panel(ax, results: Results, records: list[dict]) -> None:
    _scatter(ax, records, lambda r: r["flops"] / r["bytes"], lambda r: r["tflop_per_s"] * 1e12)
    low, high = ax.get_xlim()
    for dtype, style in (("float32", "--"), ("bfloat16", ":")):
        products = results.where(contender="linear alone", dtype=dtype)
        if products:
            peak = 1e12 * max(r["tflop_per_s"] for r in products)
            knee = peak / results.copy
            ax.plot([low, knee, high], [low * results.copy, peak, peak], color=BLACK, linewidth=1.2, linestyle=style,
                    label=f"copy bandwidth, best product: {dtype}")  # fmt: skip
    ax.set_xlim(low, high)
    ax.set(xlabel="operations per byte", ylabel="operations per second", title="the LM head")
    logarithmic(ax.xaxis, number)
    logarithmic(ax.yaxis, number)


def speedup(results: Results, folder: Path) -> Path | None:
    """How many times longer each opponent takes, a dot a shape, a panel an operator."""
    ops = results.ops
    if not ops:
        return None
    columns = min(3, len(ops))
    lines = -(-len(ops) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 2.9 * lines + 0.9), squeeze=False,
                             layout="constrained")  # fmt: skip
    caption(fig, results.machine, "Time of each opponent over ours, a dot a shape (right of the line: ours is faster)")
    for ax, op in zip(axes.flat, ops, strict=False):
        records = results.where(op=op)
        family = next(r["contender"] for r in records if r["ours"]).removesuffix("_out")
        names = [n for n in dict.fromkeys(r["contender"] for r in records) if not n.startswith(family)]
        for row, name in enumerate(reversed(names)):
            for bf16, colour, shift in ((False, BLUE, 0.13), (True, ORANGE, -0.13)):
                mine = [r for r in records if r["contender"] == name and (r["dtype"] == "bfloat16") == bf16]
                values = [r["over_ours"] for r in mine]
                ax.scatter(values, [row + shift] * len(values), color=colour, s=30, alpha=0.8, edgecolors="none",
                           marker="D" if bf16 else "o")  # fmt: skip
        ax.axvline(1.0, color=BLACK, linewidth=1.2)
        ax.set_xscale("log")
        ax.set_yticks(range(len(names)), [n.replace(", gathered before", "*") for n in reversed(names)], fontsize=9)
        ax.set_ylim(-0.6, len(names) - 0.4)
        low, high = ax.get_xlim()
        ax.set_xlim(min(low, 0.7), max(high, 1.5))
        if max(ax.get_xlim()) / min(ax.get_xlim()) < 100:
            ratios(ax.xaxis)
        else:
            logarithmic(ax.xaxis, times)
        ax.set_title(op, fontsize=11, loc="left")
        plain(ax, "x")
    for ax in axes.flat[len(ops) :]:
        ax.set_visible(False)
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=BLUE, label="float32 or int32"),
        plt.Line2D([], [], marker="D", linestyle="", color=ORANGE, label="bfloat16"),
    ]
    fig.legend(handles=handles, frameon=False, loc="outside lower right", ncols=2, fontsize=9)
    return save(fig, folder, "speedup.png")


def _scaling(results: Results, folder: Path, axis: str, name: str, title: str, label: str, **fixed) -> Path | None:
    """Time over one size, ours against the opponents and the bound of the copy bandwidth, a panel a dtype."""
    records = results.where(op="sample_tokens", **fixed)
    if len({r["shape"][axis] for r in records}) < 2:
        return None
    dtypes = list(dict.fromkeys(r["dtype"] for r in records))
    fig, axes = figure(len(dtypes), results.machine, title)
    drawn = [c for c in dict.fromkeys(r["contender"] for r in records) if c not in ("sample_tokens",)]
    for ax, dtype in zip(axes, dtypes, strict=True):
        mine = [r for r in records if r["dtype"] == dtype]
        for colour, marker, contender in zip(PALETTE, MARKERS, drawn, strict=False):
            line = sorted((r["shape"][axis], r["median_s"]) for r in mine if r["contender"] == contender)
            if line:
                ax.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=5.5, label=contender)
        bound = sorted({(r["shape"][axis], r["bytes"] / results.copy) for r in mine})
        ax.plot(*zip(*bound, strict=True), color="0.35", linestyle=":", label="bytes at the copy bandwidth")
        ax.set(xscale="log", yscale="log", xlabel=label, ylabel="time of a call", title=dtype)
        ticks_at(ax, (r["shape"][axis] for r in mine))
        if axis == "vocab":  # 128k and 152k stand close
            ax.tick_params(axis="x", rotation=45)
        logarithmic(ax.yaxis, seconds)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, frameon=False, fontsize=9, loc="outside right center")
    return save(fig, folder, name)


def rows(results: Results, folder: Path) -> Path | None:
    """sample_tokens over rows."""
    title = f"sample_tokens over rows, vocabulary {QWEN:,}"
    return _scaling(results, folder, "rows", "rows.png", title, "rows", vocab=QWEN)


def vocabulary(results: Results, folder: Path) -> Path | None:
    """sample_tokens over the vocabulary, at the number of rows that was run with most vocabularies."""
    by_rows: dict[int, set[int]] = {}
    for r in results.where(op="sample_tokens"):
        by_rows.setdefault(r["shape"]["rows"], set()).add(r["shape"]["vocab"])
    if not by_rows:
        return None
    most = max(by_rows, key=lambda n: len(by_rows[n]))
    title = f"sample_tokens over the vocabulary, {most} row{'s' if most > 1 else ''}"
    return _scaling(results, folder, "vocab", "vocabulary.png", title, "vocabulary", rows=most)


def _either(name: str) -> str:
    """One name for the forms of a contender that samples and that scores."""
    return re.sub(r"\b(sample|score)_", "sample/score_", name)


def lm_head(results: Results, folder: Path) -> Path | None:
    """The fused LM head and its opponents over the product alone; the memory of a call."""
    records = [r for r in results.records if r["op"].endswith("_from_hidden")]
    points = list(dict.fromkeys((r["op"], r["dtype"], *r["shape"].values()) for r in records))
    if not points:
        return None
    fig, (left, right) = figure(
        2, results.machine, "The LM head fused, against the product alone", width=6.4, height=1.8 + 0.42 * len(points)
    )
    names = [n for n in dict.fromkeys(r["contender"] for r in records) if not n.endswith("_out")]
    shown: dict[str, str] = {}
    for name in names:  # the two operators share colours
        shown.setdefault(_either(name), PALETTE[len(shown) % len(PALETTE)])
    for y, (op, dtype, *shape) in enumerate(reversed(points)):
        for r in records:
            if (r["op"], r["dtype"], *r["shape"].values()) != (op, dtype, *shape) or r["contender"] not in names:
                continue
            key = _either(r["contender"])
            style = dict(color=shown[key], marker=MARKERS[list(shown).index(key) % len(MARKERS)], s=42, zorder=3)
            left.scatter(r["over_yardstick"], y, **style)
            right.scatter(max(r["peak_bytes"], r["resident_bytes"] or 0, 1e4), y, **style)
    texts = [f"{op.split('_')[0]} {dtype}\n{r:,} x {d:,} x {v:,}" for op, dtype, r, d, v in reversed(points)]
    left.set_yticks(range(len(points)), texts, fontsize=8)
    right.set_yticks(range(len(points)), [""] * len(points))
    left.axvline(1.0, color=BLACK, linewidth=1)
    left.set(xscale="log", xlabel="time over F.linear alone", ylabel="rows x width x vocabulary")
    ratios(left.xaxis)
    right.axvline(64 * 2**20, color=BLACK, linewidth=1, linestyle="--")
    right.set_ylim(left.get_ylim())
    right.text(64 * 2**20, left.get_ylim()[1], "64 MiB", fontsize=8.5, ha="center", va="bottom")
    right.set(xscale="log", xlabel="memory of a call on top of its inputs")
    logarithmic(right.xaxis, size)
    handles = [
        plt.Line2D([], [], marker=MARKERS[i % len(MARKERS)], linestyle="", color=c, label=n)
        for i, (n, c) in enumerate(shown.items())
    ]
    fig.legend(handles=handles, frameon=False, fontsize=9, loc="outside right center")
    return save(fig, folder, "lm_head.png")


PLOTS = (acceptance, roofline, speedup, rows, vocabulary, lm_head)


def draw(source: Path, folder: Path) -> list[Path]:
    """Every plot that the results have something for."""
    folder.mkdir(parents=True, exist_ok=True)
    if "suite" in json.loads(source.read_text()):
        return end_to_end_plots.draw(source, folder)
    results = Results(source)
    return [path for plot in PLOTS if (path := plot(results, folder)) is not None]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    parser.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    for source in arguments.results:
        for path in draw(source, arguments.out):
            print(path)
