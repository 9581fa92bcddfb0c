"""Plots of the results of bench/end_to_end.py; names begin with the suite's.

*_account.png    tokens of an answer by cause: what was forwarded, and what the exact shortcuts saved; a bar a method
*_cuts.png       share of proposals accepted, by the position where they leave the answer and by the tokens they rewrite
*_phases.png     where a decode step's time goes, by the driver's clock; a bar a method
latency.png      time of one answer over that with one lane and over plain generation, by number of lanes
quality.png      log p of answers over the forward passes one after the other, a line a method, a panel a setting
throughput.png   answers per second by method
decode.png       time of a decode step by lanes and the memory's bound, its share of the bound
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from power_kernels.api.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    RED,
    SKY,
    caption,
    figure,
    logarithmic,
    plain,
    save,
    seconds,
    ticks_at,
)  # fmt: skip

GREY = "0.62"
CAUSES = {  # of tokens that went through the model, or would have but for the memory of what had gone
    "prefill": (GREY, "prefill"),
    "extension": (BLUE, "extension"),
    "proposal": (ORANGE, "proposals"),  # results that do not tell what became of them
    "accepted": (GREEN, "proposals: accepted"),
    "rejected": (ORANGE, "proposals: rejected"),
    "voided": (RED, "proposals: voided"),
    "unsplit": ("0.82", "forwarded, cause not known"),
}
SAVED = {
    "saved_prefix": (PINK, "saved: free prefix"),
    "saved_early": (BLACK, "saved: rejected early"),
}
PHASES = {
    "forward": (BLUE, "model"),
    "sample": (ORANGE, "sampling"),
    "advance": (GREEN, "chains"),
    "transfer": (PINK, "KV copies"),
    "replay": (SKY, "replayed steps"),
    "other": (GREY, "other"),
}
REJECTED, UNCHANGED, ACCEPTED = 0, 1, 2  # entries of `outcomes`
BINS = 12


class Measured:
    """A document of a suite: runs by method, in the order in which they were written."""

    def __init__(self, path: Path):
        self.data = json.loads(path.read_text())
        self.suite, self.setting = self.data["suite"], self.data["setting"]
        self.runs: dict[str, list[dict]] = {}
        for cell in self.data.get("cells", ()):
            for method, run in cell.get("runs", {}).items():
                self.runs.setdefault(method, []).append(run)

    @property
    def machine(self) -> str:
        m = self.data["machine"]
        threads = m.get("threads")  # the oldest results tell neither threads nor date
        where = m.get("gpu") or m["cpu"] + (f", {threads} thread{'s' if threads > 1 else ''}" if threads else "")
        model = self.data.get("model", "SmolLM2-135M-Instruct, float32").split(";")[0]
        return f"{model}; {where}, torch {m['torch']}" + (f", {m['date'][:10]}" if "date" in m else "")

    @property
    def schedule(self) -> str:
        s = self.setting
        return f"T = {s['tokens']}, {s['blocks']} blocks, {s['steps']} steps, alpha {s['alpha']:g}"

    def label(self, method: str) -> str:
        return self.data.get("labels", {}).get(method, method)


def _bars(count: int, measured: Measured, title: str, width: float = 10.0):
    """A figure of `count` horizontal bars, the first on top."""
    fig, ax = plt.subplots(figsize=(width, 1.9 + 0.42 * count), layout="constrained")
    caption(fig, measured.machine, title)
    plain(ax, "x")
    ax.invert_yaxis()
    return fig, ax


# ----------------------------------------------------------------------------------------------------
# Tokens by cause


def account_of(runs: list[dict]) -> dict[str, float]:
    """Tokens of one answer by cause, the mean over the answers of all runs; what is not known is left out.

    forwarded: all that went through the model. Of the causes in CAUSES, each token counts once.
    """
    answers = sum(len(run["answers"]) for run in runs)
    found = {"forwarded": sum(run["forwarded"] for run in runs) / answers}
    if not all(run["account"] for run in runs):
        return found | {"unsplit": found["forwarded"]}
    known = [name for name in runs[0]["account"] if all(run["account"][name] is not None for run in runs)]
    found |= {name: sum(run["account"][name] for run in runs) / answers for name in known}
    if {"accepted", "rejected", "voided"} <= set(found):
        del found["proposal"]
    return found


def account(measured: Measured, folder: Path) -> Path | None:
    if not measured.runs:
        return None
    fig, ax = _bars(len(measured.runs), measured, f"Tokens of an answer by cause ({measured.schedule})")
    drawn: dict[str, object] = {}
    for y, runs in enumerate(measured.runs.values()):
        found, right = account_of(runs), 0.0
        for causes, style in ((CAUSES, {}), (SAVED, {"hatch": "////", "fill": False, "linewidth": 0})):
            for cause, (colour, text) in causes.items():
                if found.get(cause):
                    colours = {"edgecolor": colour} if style else {"color": colour}
                    bar = ax.barh(y, found[cause], left=right, height=0.62, label=text, **colours, **style)
                    drawn.setdefault(text, bar)
                    right += found[cause]
        forwarded = ax.plot([found["forwarded"]] * 2, [y - 0.4, y + 0.4], color=BLACK, linewidth=2.2, zorder=4)
        ax.text(right, y, f"  {found['forwarded']:,.0f}", va="center", fontsize=9)
    if any(account_of(runs).get("recalled") for runs in measured.runs.values()):
        note = "forwarded (solid beyond it: recalled)"
    else:
        note = "forwarded"
    drawn = {text: drawn[text] for _, text in (CAUSES | SAVED).values() if text in drawn} | {note: forwarded[0]}
    ax.set_yticks(range(len(measured.runs)), [measured.label(method) for method in measured.runs], fontsize=9)
    ax.set_xlim(0, ax.get_xlim()[1] * 1.06)
    ax.set_xlabel("tokens an answer")
    fig.legend(drawn.values(), drawn, frameon=False, fontsize=8.5, loc="outside right center")
    return save(fig, folder, f"{measured.suite}_account.png")


# ----------------------------------------------------------------------------------------------------
# Acceptance by cut


@dataclass(frozen=True)
class Bin:
    """Proposals that left the answer in [low, high): how many, how many of them were accepted."""

    low: float
    high: float
    count: int
    accepted: int

    @property
    def rate(self) -> float:
        return self.accepted / self.count

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % binomial interval of the rate, as if proposals were independent; those of a chain are not."""
        z, n, p = 1.96, self.count, self.rate
        middle, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def binned(values: list[tuple[float, bool]], most: float, bins: int = BINS) -> list[Bin]:
    """Equal bins of [0, most), the empty ones left out. values: (position, accepted)."""
    width = most / bins
    found = []
    for i in range(bins):
        inside = [accepted for x, accepted in values if i == min(int(x / width), bins - 1)]
        if inside:
            found.append(Bin(i * width, (i + 1) * width, len(inside), sum(inside)))
    return found


def proposals(measured: Measured) -> list[tuple[int, int, bool]]:
    """(position where it left the answer, horizon of its stage, accepted) of every proposal that was another answer.

    The answers ran to their horizon. Methods of one suite draw the same chains (in lanes, or as the first rows of a
    batch), so the one that took most steps is taken, that no proposal counts twice.
    """
    setting = measured.setting
    own = [m for m, runs in measured.runs.items() if any(run.get("left") and run["steps"] for run in runs)]
    if not own:
        return []
    method = max(own, key=lambda m: sum(run["steps"] for run in measured.runs[m]))
    found = []
    block = -(-setting["tokens"] // setting["blocks"])
    for run in measured.runs[method]:
        for outcomes, left in zip(run["outcomes"], run["left"], strict=True):
            for step, (outcome, position) in enumerate(zip(outcomes, left, strict=True)):
                if outcome != UNCHANGED:
                    horizon = min((step // setting["steps"] + 1) * block, setting["tokens"])
                    found.append((position, horizon, outcome == ACCEPTED))
    return found


def cuts(measured: Measured, folder: Path) -> Path | None:
    found = proposals(measured)
    if not found:
        return None
    fig, axes = plt.subplots(
        2, 2, figsize=(11, 5.2), sharex="col", sharey="row", height_ratios=(3.2, 1), layout="constrained"
    )
    changed = sum(accepted for *_, accepted in found)
    title = f"{changed:,} of {len(found):,} proposals that left the answer were accepted ({measured.schedule})"
    caption(fig, measured.machine, title)
    columns = (
        ("position where the proposal left the answer", [(left, accepted) for left, _, accepted in found]),
        ("tokens the proposal had to write again", [(horizon - left, accepted) for left, horizon, accepted in found]),
    )
    for (rate, count), (text, values) in zip(axes.T, columns, strict=True):
        bins = binned(values, measured.setting["tokens"])
        x = [(b.low + b.high) / 2 for b in bins]
        width = bins[0].high - bins[0].low
        rates = [b.rate for b in bins]
        lows, highs = zip(*(b.interval() for b in bins), strict=True)
        # Of no accepted one the rate is the interval's end, to rounding.
        below = [max(0.0, r - low) for r, low in zip(rates, lows, strict=True)]
        above = [max(0.0, high - r) for r, high in zip(rates, highs, strict=True)]
        rate.errorbar(x, rates, yerr=(below, above), fmt="o-", color=BLUE, ecolor="0.5", elinewidth=1.2, capsize=3,
                      markersize=6, linewidth=1)  # fmt: skip
        rate.axhline(changed / len(found), color=BLACK, linewidth=1, linestyle="--")
        count.bar(x, [b.count for b in bins], width=0.86 * width, color=SKY)
        count.set(xlabel=text, xlim=(0, measured.setting["tokens"]))
        for ax in (rate, count):
            plain(ax, "y")
    axes[0, 0].set(ylabel="share accepted (95 % binomial)", ylim=(-0.03, 1.03))
    axes[1, 0].set_ylabel("proposals")
    axes[1, 0].yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0, 1].text(0.98, changed / len(found) + 0.02, "all", transform=axes[0, 1].get_yaxis_transform(), ha="right")
    return save(fig, folder, f"{measured.suite}_cuts.png")


# ----------------------------------------------------------------------------------------------------
# Time by phase


def phases(measured: Measured, folder: Path) -> Path | None:
    """Shares of the decode steps' time, prefill left out; the number is milliseconds a step."""
    timed = {
        method: runs
        for method, runs in measured.runs.items()
        if all(run.get("report", {}).get("decode_steps") for run in runs)
    }
    if not timed:
        return None
    fig, ax = _bars(len(timed), measured, f"Where a decode step's time goes ({measured.schedule})")
    drawn = {}
    for y, runs in enumerate(timed.values()):
        steps = sum(run["report"]["decode_steps"] for run in runs)
        spent = {phase: sum(run["report"]["seconds"].get(phase, 0.0) for run in runs) for phase in PHASES}
        total, right = sum(spent.values()), 0.0
        for phase, (colour, text) in PHASES.items():
            if spent[phase]:
                bar = ax.barh(y, spent[phase] / total, left=right, height=0.62, color=colour, label=text)
                drawn.setdefault(text, bar)
                right += spent[phase] / total
        own = f", model {spent['forward'] / total:.1%}" if spent["forward"] else ""
        ax.text(1.01, y, f"{1e3 * total / steps:.1f} ms{own}", va="center", fontsize=9)
    ax.set_yticks(range(len(timed)), [measured.label(method) for method in timed], fontsize=9)
    ax.set(xlim=(0, 1.27), xlabel="share of a decode step (by the driver's clock)")
    ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0], ["0", "20 %", "40 %", "60 %", "80 %", "100 %"])
    fig.legend(drawn.values(), drawn, frameon=False, fontsize=8.5, loc="outside right center")
    return save(fig, folder, f"{measured.suite}_phases.png")


# ----------------------------------------------------------------------------------------------------
# Latency, quality, throughput, decode


def latency(measured: Measured, folder: Path) -> Path | None:
    """A dot a cell, a line through the medians; the default stands at the number of lanes it chose."""
    if measured.suite != "latency":
        return None
    cells = measured.data["cells"]
    short = {row["lanes"] for row in measured.data.get("table", ()) if "not_measured" in row}
    fixed = sorted(int(name) for name in measured.runs if name.isdecimal() and name not in short)
    references = [("plain", "over plain generation by the same engine")]
    if "1" in measured.runs:
        references.insert(0, ("1", "over one lane"))
    title = f"One answer sooner by prefetch lanes ({measured.schedule})"
    fig, axes = figure(len(references), measured.machine, title, width=5.4)
    for ax, (reference, text) in zip(axes, references, strict=True):
        for clock, colour, words in (("wall", BLUE, "wall time"), ("cpu", ORANGE, "processor time")):
            ratios = {
                name: [cell["runs"][name][clock] / cell["runs"][reference][clock] for cell in cells]
                for name in measured.runs
                if name != "plain" and name not in short
            }
            medians = [statistics.median(ratios[str(p)]) for p in fixed]
            ax.plot(fixed, medians, "o-", color=colour, markersize=7, label=words)
            for p in fixed:
                ax.scatter([p] * len(cells), ratios[str(p)], s=12, color=colour, alpha=0.45, zorder=3)
            if "default" in ratios:
                chosen = [cell["runs"]["default"]["report"]["lanes"] for cell in cells]
                label = "default" if clock == "wall" else None
                ax.scatter(chosen, ratios["default"], marker="D", s=58, facecolors="none", edgecolors=colour,
                           linewidths=1.6, zorder=4, label=label)  # fmt: skip
                fixed_and_chosen = {*fixed, *chosen}
            else:
                fixed_and_chosen = set(fixed)
        ax.set_xscale("log", base=2)
        ticks_at(ax, fixed_and_chosen)
        ax.set(xlabel="lanes of the chain", ylabel=f"time {text}")
        if reference == "1":
            ax.axhline(1.0, color=BLACK, linewidth=1, linestyle="--")
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=9)
    return save(fig, folder, "latency.png")


def _series(row: dict) -> tuple[str, str]:
    """(line, point) that a row of the quality suite belongs to: sweeps of N particles, schedules of as many lanes."""
    method, _, rest = row["method"].partition("-")
    if method == "particles":
        n, _, rho = rest.replace("+", "-").partition("-")
        rho = rho.partition("-rho")[2]
        return f"particles, N = {n}{rho and f', rho {rho}'}: start, then sweeps", ""
    if method == "smc":
        return "SMC", f"N = {rest}"
    if method == "mh":
        schedule, _, lanes = rest.partition("-")
        words = {"": "one proposal at a time", "default": "default lanes"}.get(lanes, f"{lanes} lanes")
        return f"Metropolis-Hastings, {words}", schedule.replace("x", " x ")
    return row["label"], ""


def _style(name: str, rank: dict[str, int]) -> dict:
    """Particles from light to dark blue with N; rank: of each line among those of its method."""
    if name.startswith("particles"):
        place = rank[name] / max(1, len(rank) - 1)
        return {"color": plt.get_cmap("Blues")(0.4 + 0.6 * place), "marker": "o"}
    if name.startswith("Metropolis"):
        return {"color": (ORANGE, RED, PINK)[rank[name] % 3], "marker": "s"}
    return {"SMC": {"color": GREEN, "marker": "^"}, "plain": {"color": GREY, "marker": "X"}}.get(
        name, {"color": BLACK, "marker": "P"}
    )


def quality(measured: Measured, folder: Path) -> Path | None:
    if measured.suite != "quality" or not measured.data["table"]:
        return None
    panels: dict[tuple, dict[str, list[dict]]] = {}
    for row in measured.data["table"]:
        panel = panels.setdefault(tuple(row["setting"].values()), {})
        panel.setdefault(_series(row)[0], []).append(row)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(5.4 * columns + 3.4, 4.6 * lines + 0.9), squeeze=False,
                             layout="constrained")  # fmt: skip
    answers = sorted({row["answers"] // len(row["logp"]["prompts"]) for row in measured.data["table"]})
    each = f"{answers[0]} to {answers[-1]}" if len(answers) > 1 else f"{answers[0]}"
    prompts = max(len(row["logp"]["prompts"]) for row in measured.data["table"])
    where = f"{prompts} prompts, {each} answers to each; bars: one standard error\n{measured.machine}"
    caption(fig, where, "More likely answers for fewer forward passes: up and to the left is better")
    names = sorted({name for panel in panels.values() for name in panel}, key=_order)
    alike = ([n for n in names if n.startswith(kind)] for kind in ("particles", "Metropolis"))
    ranks = {name: {n: i for i, n in enumerate(group)} for group in alike for name in group}
    handles = {}
    for ax, (setting, series) in zip(axes.flat, panels.items(), strict=False):
        for name in (name for name in names if name in series):
            handles[name] = _quality_line(ax, name, series[name], _style(name, ranks.get(name, {})))
        tokens, alpha, eos, bonus = setting
        ends = "EOS ends an answer" if eos else "no EOS"
        more = f", lambda {bonus:g}" if bonus else ""
        ax.set_title(f"T = {tokens}, alpha {alpha:g}, {ends}{more}", fontsize=11, loc="left")
        ax.set_xscale("log", base=2)
        low, high = ax.get_xlim()
        ax.set_xlim(min(low, 0.85), max(high, 2.5) * 1.2)
        ticks_at(ax, [k for k in (1, 2, 3, 4, 5, 8, 16, 32) if k <= ax.get_xlim()[1]])
        ax.set(xlabel="forward passes one after the other, over T", ylabel="mean log p of an answer, nats")
        plain(ax)
        _leave_out_far_below(ax, series.get("plain", []), [row for n in series if n != "plain" for row in series[n]])
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    fig.legend([handles[name] for name in names], names, frameon=False, fontsize=9, loc="outside right center")
    return save(fig, folder, "quality.png")


def _quality_line(ax, name: str, rows: list[dict], style: dict):
    """Rows in which no forward passes were counted have no place. Schedules and SMC's N are written at their points."""
    rows = [row for row in rows if row["sequential"]["value"] is not None]
    rows = sorted(rows, key=lambda row: (row["sequential"]["value"], row["mean_logp"]["value"]))
    x = [row["sequential"]["value"] / row["setting"]["tokens"] for row in rows]
    y = [row["mean_logp"]["value"] for row in rows]
    error = [row["mean_logp"]["error"] or 0.0 for row in rows]
    line = ax.errorbar(x, y, yerr=error, capsize=3, elinewidth=1.2, linewidth=1.4, markersize=7, label=name, **style)
    where = {"xytext": (-7, 5), "ha": "right"} if name.endswith("lanes") else {"xytext": (7, -12)}
    for row, at, height in zip(rows, x, y, strict=True):
        text = _series(row)[1]
        ax.annotate(text, (at, height), textcoords="offset points", fontsize=8, color=style["color"], **where)
    return line


def _leave_out_far_below(ax, far: list[dict], others: list[dict]) -> None:
    """Plain answers are so unlikely that with them nothing else could be told apart: where they lie is written."""
    if not far or not others:
        return
    values = [row["mean_logp"]["value"] for row in others]
    low, high = min(values), max(values)
    value = far[0]["mean_logp"]["value"]
    if value < low - (high - low):
        ax.set_ylim(low - 0.25 * (high - low), high + 0.12 * (high - low))
        text = f"plain: {value:.0f}, far below"
        ax.annotate(text, (1, 0), (1, 26), ha="left", fontsize=9, color="0.35", textcoords="offset points",
                    xycoords=ax.get_xaxis_transform(), arrowprops={"arrowstyle": "->", "color": GREY})  # fmt: skip


def _order(name: str) -> tuple:
    """Lines of the legend: by kind, particles by N."""
    kinds = ("particles", "SMC", "Metropolis", "low", "plain")
    kind = next(i for i, kind in enumerate(kinds) if name.startswith(kind))
    return kind, int(re.search(r"N = (\d+)", name)[1]) if kind == 0 else 0, name


def throughput(measured: Measured, folder: Path) -> Path | None:
    if measured.suite != "throughput":
        return None
    rows = [row for row in measured.data["table"] if "not_measured" not in row]
    if not rows:
        return None
    fig, ax = _bars(len(rows), measured, f"Answers per second ({measured.schedule})", width=9.0)
    plain_rate = next((row["answers_per_s"] for row in rows if row["method"] == "plain"), None)
    for y, row in enumerate(rows):
        colour = BLUE if row["method"] == "ours" else GREY
        ax.barh(y, row["answers_per_s"], height=0.62, color=colour)
        times = f" ({row['answers_per_s'] / plain_rate:.3g} x plain)" if plain_rate else ""
        ax.text(row["answers_per_s"], y, f"  {row['answers_per_s']:.3g}{times}", va="center", fontsize=9)
    ax.set_yticks(range(len(rows)), [measured.label(row["method"]) for row in rows], fontsize=9)
    ax.set_xlim(0, 1.35 * max(row["answers_per_s"] for row in rows))
    ax.set_xlabel("answers per second")
    return save(fig, folder, "throughput.png")


def decode(measured: Measured, folder: Path) -> Path | None:
    rows = [row for row in measured.data["table"] if "not_measured" not in row] if measured.suite == "decode" else []
    if not rows:
        return None
    lanes = [row["lanes"] for row in rows]
    fig, (left, right) = figure(2, measured.machine, f"A decode step, {measured.setting['context']} tokens before it")
    left.plot(lanes, [row["seconds"] for row in rows], "o-", color=BLUE, label="step")
    left.plot(
        lanes, [row["roofline_seconds"] for row in rows], ":", color="0.35", label="bytes at the measured bandwidth"
    )
    left.set(xscale="log", yscale="log", xlabel="lanes", ylabel="time of a step")
    logarithmic(left.yaxis, seconds)
    left.legend(frameon=False, fontsize=9)
    right.plot(lanes, [100 * row["of_roofline"] for row in rows], "o-", color=BLUE)
    right.set(xscale="log", xlabel="lanes", ylabel="% of the roofline", ylim=(0, 105))
    for ax in (left, right):
        ticks_at(ax, lanes)
    return save(fig, folder, f"decode_{measured.data['shape']}.png")


PLOTS = (account, cuts, phases, latency, quality, throughput, decode)


def draw(source: Path, folder: Path) -> list[Path]:
    """Every plot that the document has something for."""
    measured = Measured(source)
    folder.mkdir(parents=True, exist_ok=True)
    return [path for plot in PLOTS if (path := plot(measured, folder)) is not None]
