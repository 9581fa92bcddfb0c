"""Plots of a run, a folder a task: RUN/plots/<task>/...

accuracy.png       accuracy by arm with its 95 % band, and the paper's Table 1 beside it where the task is one of its
likelihood.png     log p of the answers under the base model, and log p a token (how sure the model is of them), by arm
lengths.png        tokens of the answers by arm, and how they ended
pass_at_k.png      the chance that one of k answers is right, over k
cost.png           accuracy over tokens forwarded: arms, best of n and majority curves
alpha.png, steps.png    accuracy over alpha and over steps a block, of arms that differ in nothing else
account.png        tokens forwarded for an answer by cause, and those that the exact shortcuts saved
acceptance.png     share of steps that changed the answer, by horizon, step and position

An answer's own tokens and log p are those of the part that is graded. Entropies are not recorded: how sure the model is
is told by log p a token alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from power_kernels.api.experiments import diagnostics, paper, statistics, table
from power_kernels.api.experiments.chain_plots import draw_rates
from power_kernels.api.experiments.jobs import Job
from power_kernels.api.experiments.records import RunFolder
from power_kernels.api.experiments.schema import Arm, BestOfN, LowTemperature, Majority, Plain, Power, selects
from power_kernels.api.figures import (
    BLACK,
    BLUE,
    GREEN,
    MARKERS,
    ORANGE,
    PALETTE,
    PINK,
    RED,
    SKY,
    NothingToDrawError,
    caption,
    draw_all,
    logarithmic,
    number,
    plain,
)  # fmt: skip

GREY = "0.62"
_MARKS = MARKERS[:-1]  # one less than colours, so that no two arms have both alike
FINISHES = {
    "eos": (BLUE, "end of text"),
    "stop": (GREEN, "stop string"),
    "length": (ORANGE, "max_new_tokens"),
    "context": (PINK, "the model's context"),
    "fault": (RED, "bad logits"),
}
CAUSES = {  # of tokens forwarded
    "prefill": (GREY, "prompt"),
    "extension": (BLUE, "extension"),
    "accepted": (GREEN, "proposals: accepted"),
    "rejected": (ORANGE, "proposals: rejected"),
    "voided": (RED, "proposals: voided"),
}
SAVED = {
    "recalled": (SKY, "known from before"),
    "saved_prefix": (PINK, "free prefix"),
    "saved_early": (BLACK, "rejected early"),
}


@dataclass(frozen=True)
class ArmOfRun:
    """What an arm has come to on a task.

    Args:
        arm: as the experiment has it.
        everything: its records, with "grades" by grader; all that were drawn.
        counted: those of them that count, one for each question and seed of an arm that selects.
        grader: the one that counts, None where nothing was graded.
        row: of table.json.
        questions: those of the arm that has come to most.
    """

    arm: Arm
    everything: list[dict]
    counted: list[dict]
    grader: str | None
    row: dict
    questions: int

    @property
    def label(self) -> str:
        """Its name, and what is missing, since arms of other questions cannot be compared."""
        there = self.row["questions"]
        return self.arm.label + (f" ({there} of {self.questions} questions)" if there < self.questions else "")

    def verdicts(self, records: list[dict], value: Callable[[dict], object] | None = None) -> list[list]:
        """[questions][answers], of as many answers as every question has. value: in the place of the verdict."""
        value = value or (lambda record: float(record["grades"][self.grader]["correct"]))
        by_question: dict[int, list] = {}
        for record in records:
            by_question.setdefault(record["prompt_id"], []).append(value(record))
        width = min(map(len, by_question.values()))
        return [values[:width] for values in by_question.values()]

    @property
    def accuracy(self) -> dict | None:
        return self.row["grades"].get(self.grader)


def write(folder: RunFolder, jobs: Sequence[Job]) -> tuple[list[Path], dict[str, str]]:
    """All plots of a run. Returns the files, and why the others were not drawn, by their names within RUN/plots."""
    drawn, skipped = [], {}
    config = folder.config()
    for name, arms in gather(folder, jobs).items():
        questions = arms[0].questions
        seeds = sorted({seed for arm in arms for seed in arm.row["seeds"]})
        under = f"{', '.join(config['models'])}; {name}, {questions} questions, seeds {', '.join(map(str, seeds))}"
        plots = plots_of(arms, paper.benchmark_of(config["tasks"][name]), under)
        paths, reasons = draw_all(plots, folder.path / "plots" / name)
        drawn += paths
        skipped |= {f"{name}/{plot}": reason for plot, reason in reasons.items()}
    return drawn, skipped


def told(drawn: Sequence[Path], skipped: Mapping[str, str]) -> str:
    """What to say of what `write` did."""
    folders = ", ".join(dict.fromkeys(str(path.parent) for path in drawn))
    lines = [f"{len(drawn)} plots are in {folders}"] if drawn else []
    for reason in dict.fromkeys(skipped.values()):
        lines.append(f"not drawn: {', '.join(name for name, why in skipped.items() if why == reason)} ({reason})")
    return "\n".join(lines)


def gather(folder: RunFolder, jobs: Sequence[Job]) -> dict[str, list[ArmOfRun]]:
    """By task, the arms that have records, in the order of the experiment."""
    rows = {(row["task"], row["arm"]): row for row in table.contents(folder, list(jobs))["rows"]}
    found: dict[str, list[ArmOfRun]] = {}
    for task, label in dict.fromkeys((job.task.name, job.arm.label) for job in jobs):
        if (task, label) not in rows:
            continue
        of_arm = [job for job in jobs if (job.task.name, job.arm.label) == (task, label)]
        arm, graders, row = of_arm[0].arm, of_arm[0].task.graders, rows[task, label]
        seeds = [table.graded_records(folder, job) for job in of_arm]
        counted = [r for records in seeds for r in table.taken(arm, records, next(iter(graders), None))]
        everything = [record for records in seeds for record in records]
        grader = graders[0] if graders and all(graders[0] in r["grades"] for r in everything) else None
        most = max(row["questions"] for (name, _), row in rows.items() if name == task)
        found.setdefault(task, []).append(ArmOfRun(arm, everything, counted, grader, row, most))
    return found


def plots_of(arms: Sequence[ArmOfRun], benchmark: str | None, under: str) -> Mapping[str, Callable]:
    """What draws each plot of a task, by file name. under: what is said beneath each."""
    plots = (likelihood, lengths, pass_at_k, cost, sweep_alpha, sweep_steps, account, acceptance)
    names = ("likelihood", "lengths", "pass_at_k", "cost", "alpha", "steps", "account", "acceptance")
    of_arms = {f"{name}.png": partial(plot, arms, under) for name, plot in zip(names, plots, strict=True)}
    return {"accuracy.png": partial(accuracy, arms, benchmark, under), **of_arms}


# ---------------------------------------------------------------- accuracy


def accuracy(arms: Sequence[ArmOfRun], benchmark: str | None, under: str):
    """Bars by arm, and beside them the paper's, of each of its models."""
    graded = _graded(arms)
    published = paper.TABLE_1.get(benchmark) if benchmark != "alpaca-eval" else None
    height = 1.7 + 0.36 * max(len(graded), 0 if published is None else 15)
    fig, axes = plt.subplots(
        1, 1 if published is None else 2, figsize=(8.5 if published is None else 13, height), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    caption(fig, under + ("" if published is None else f"; right: {paper.SOURCE}"), "Accuracy by arm")
    ax = axes[0, 0]
    shares = [arm.accuracy["value"] for arm in graded]
    bands = [_band(arm.accuracy) for arm in graded]
    _bars(ax, [arm.label for arm in graded], shares, [_kind_colour(arm.arm) for arm in graded], bands)
    ax.set(xlabel="share of right answers; band: 95 %, over questions and seeds")
    if published is not None:
        right = axes[0, 1]
        labels, shares, fills = [], [], []
        for model, row in published.items():
            labels += [f"{model}: {arm}" for arm in paper.ARMS]
            shares += row
            fills += [SKY, ORANGE, BLUE, GREY]
        _bars(right, labels, shares, fills, None)
        right.set(xlabel="share of right answers, as published")
        right.set_title("the paper's models", fontsize=11, loc="left")
        ax.set_title("this run", fontsize=11, loc="left")
        most = max(ax.get_xlim()[1], right.get_xlim()[1])
        ax.set_xlim(0, most)
        right.set_xlim(0, most)
        ends = max(ax.get_ylim()[0], right.get_ylim()[0])
        ax.set_ylim(ends, -0.6)
        right.set_ylim(ends, -0.6)
    return fig


def _bars(ax, labels: Sequence[str], values: Sequence[float], colours: Sequence[str], bands) -> None:
    """Horizontal, the first on top, with their values behind the end of their bands."""
    plain(ax, "x")
    y = np.arange(len(labels))
    ax.barh(y, values, 0.7, color=colours)
    ends = values
    if bands is not None:
        ends = np.array(bands)[:, 1]
        ax.errorbar(values, y, xerr=_errors(values, bands), fmt="none", ecolor="0.15", elinewidth=1.2, capsize=3)
    for row, (value, end) in enumerate(zip(values, ends, strict=True)):
        ax.text(end + 0.012, row, f"{value:.3f}", va="center", fontsize=9)
    ax.set_yticks(y, labels, fontsize=9)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_xlim(0, min(1.12, max(ends) + 0.1))
    ax.tick_params(axis="y", length=0)


# ---------------------------------------------------------------- what the answers are like


def likelihood(arms: Sequence[ArmOfRun], under: str):
    """Histograms of log p of the answers, and of log p a token."""
    fig, axes = _rows(arms, 2, under, "How likely the base model finds the answers")
    values = {arm.label: [r["answer_logp"] for r in arm.counted] for arm in arms}
    _ridges(axes[0], values, "log p of the answer, nats")
    values = {arm.label: [r["answer_logp"] / max(r["answer_tokens"], 1) for r in arm.counted] for arm in arms}
    _ridges(axes[1], values, "log p a token, nats")
    return fig


def lengths(arms: Sequence[ArmOfRun], under: str):
    """Histograms of the answers' tokens, and how they ended."""
    fig, axes = _rows(arms, 2, under, "Lengths of the answers, and how they ended")
    _ridges(
        axes[0], {arm.label: [r["answer_tokens"] for r in arm.counted] for arm in arms}, "tokens of the answer", True
    )
    shares = {arm.label: Counter(r["finish"] for r in arm.counted) for arm in arms}
    parts = {
        finish: [shares[arm.label][finish] / len(arm.counted) for arm in arms]
        for finish in FINISHES
        if any(of_arm[finish] for of_arm in shares.values())
    }
    ax = axes[1]
    _stack(ax, parts, FINISHES)
    ax.set(xlim=(0, 1), xlabel="share of the answers")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend_above(ax)
    return fig


def _rows(arms: Sequence[ArmOfRun], panels: int, under: str, title: str):
    """Panels side by side with a row an arm."""
    fig, axes = plt.subplots(
        1, panels, figsize=(6.2 * panels, 2.0 + 0.5 * len(arms)), sharey=True, layout="constrained"
    )
    caption(fig, under, title)
    for ax in np.ravel(axes):
        plain(ax, "x")
        ax.tick_params(axis="y", length=0)
    first = np.ravel(axes)[0]
    first.set_yticks(np.arange(len(arms)), [arm.label for arm in arms], fontsize=9)
    first.set_ylim(len(arms) - 0.5, -0.5)
    return fig, np.ravel(axes)


def _ridges(ax, values: Mapping[str, Sequence[float]], label: str, whole: bool = False) -> None:
    """A histogram a row, of equal area, over shared bins; a line at each median. The farthest 1 % at either end of all
    values are counted in the outermost bins. whole: of whole numbers."""
    everything = np.concatenate([np.asarray(of_row, float) for of_row in values.values()])
    low, high = np.quantile(everything, [0.01, 0.99])
    if high == low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 41)
    if whole:
        width = max(1, round((high - low) / 40))
        low, high = np.floor(low), np.floor(high)
        edges = np.arange(low - 0.5, high + width + 0.5, width)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    rows = [np.histogram(np.clip(of_row, low, high), edges)[0] / len(of_row) for of_row in values.values()]
    scale = 0.86 / max(row.max() for row in rows)
    for y, (row, of_row, colour) in enumerate(zip(rows, values.values(), _cycle(PALETTE[:-1]), strict=False)):
        floor = y + 0.43
        ax.stairs(floor - row * scale, edges, baseline=floor, fill=True, color=colour, alpha=0.75)
        middle = np.clip(np.median(of_row), low, high)
        ax.plot([middle, middle], [floor, floor - 0.86], color=BLACK, linewidth=1.3)
        right = middle > low + 0.8 * (high - low)
        ax.annotate(f"{np.median(of_row):.3g}", (middle, floor - 0.84), (-3 if right else 3, 0), fontsize=8, va="top",
                    textcoords="offset points", ha="right" if right else "left",
                    bbox=dict(facecolor="white", alpha=0.7, linewidth=0, pad=0.6))  # fmt: skip
    ax.set(xlabel=f"{label}; line: median", xlim=(edges[0], edges[-1]))


# ---------------------------------------------------------------- several answers, cost


def pass_at_k(arms: Sequence[ArmOfRun], under: str):
    """Curves with their bands, of what was drawn for each question. What an arm that selects drew counts as the answers
    of the arm that it draws as."""
    found: dict[str, np.ndarray] = {}
    for arm in _graded(arms):
        verdicts = np.array(arm.verdicts(arm.everything))
        drawn_as = arm.label.replace(arm.arm.label, arm.arm.of) if selects(arm.arm) else arm.label
        if verdicts.shape[1] > max(1, found.get(drawn_as, verdicts[:, :0]).shape[1]):
            found[drawn_as] = verdicts
    curves = {
        label: [statistics.pass_at_k(verdicts, k) for k in range(1, verdicts.shape[1] + 1)]
        for label, verdicts in found.items()
    }
    if not curves:
        raise NothingToDrawError("no arm has two answers to every question")
    fig, ax = plt.subplots(figsize=(8.5, 5), layout="constrained")
    caption(fig, under, "pass@k: the chance that one of k answers is right")
    plain(ax)
    for (label, points), colour, marker in zip(curves.items(), _cycle(PALETTE), _cycle(_MARKS), strict=False):
        k = np.arange(1, len(points) + 1)
        ax.plot(k, [p.value for p in points], color=colour, marker=marker, markersize=5, label=label)
        ax.fill_between(k, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.12, linewidth=0)
    ax.set(xlabel="k, answers", ylabel="share of questions; band: 95 % over questions")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend_right(fig, ax)
    return fig


def cost(arms: Sequence[ArmOfRun], under: str):
    """Accuracy over tokens forwarded: a point with its band an arm, and what n answers of an arm that selects buy."""
    graded = [arm for arm in _graded(arms) if arm.row["forwarded"] > 0]
    if not graded:
        raise NothingToDrawError("no arm was graded that forwarded a token")
    fig, ax = plt.subplots(figsize=(9.5, 5.6), layout="constrained")
    lines = {arm.label: curve for arm in graded if selects(arm.arm) and (curve := curve_of(arm)) is not None}
    caption(fig, under + ("; lines: with 1, 2, ... of its answers" if lines else ""), "Accuracy over cost")
    plain(ax)
    for arm, colour, marker in zip(graded, _cycle(PALETTE), _cycle(_MARKS), strict=False):
        if arm.label in lines:
            ax.plot(*lines[arm.label], color=colour, linewidth=1.2, alpha=0.7)
        value = arm.accuracy
        error = _errors([value["value"]], [_band(value)])
        ax.errorbar(arm.row["forwarded"], value["value"], error, color=colour, marker=marker, markersize=8, capsize=3,
                    elinewidth=1, linestyle="", label=arm.label)  # fmt: skip
    costs = [arm.row["forwarded"] for arm in graded]
    if max(costs) > 2.5 * min(costs):
        ax.set_xscale("log")
        ax.set_xlim(min(costs) / 1.5, max(costs) * 1.5)
        if max(costs) < 30 * min(costs):
            ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        logarithmic(ax.xaxis, number)
    ax.set(xlabel="tokens forwarded for an answer that counts, prompt included",
           ylabel="share of right answers; bars: 95 %")  # fmt: skip
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend_right(fig, ax)
    return fig


def curve_of(arm: ArmOfRun) -> np.ndarray | None:
    """What an arm that selects comes to with 1, 2, ... of its answers: [tokens forwarded, accuracy] by number, the mean
    over seeds; None where it drew one. The prompt, which answers to a question share, is counted once."""
    curves = []
    for seed in sorted({record["seed"] for record in arm.everything}):
        records = [record for record in arm.everything if record["seed"] == seed]
        verdicts = np.array(arm.verdicts(records))
        tokens = np.array(arm.verdicts(records, lambda r: max(r["cost"]["forwarded"] - r["cost"]["prefill"], 1)))
        once = sum(record["cost"]["prefill"] for record in records) / len(verdicts)
        if isinstance(arm.arm, BestOfN):
            scores = np.array(arm.verdicts(records, table.BY[arm.arm.by]))
            curves.append(statistics.best_of_curve(verdicts, scores, tokens, once))
        else:
            read = _alike(arm.verdicts(records, lambda r: r["grades"][arm.grader]["parsed"]), verdicts)
            curves.append(statistics.majority_curve(read, verdicts, tokens, once))
    width = min(len(curve.n) for curve in curves)
    if width < 2:
        return None
    return np.mean([[curve.tokens[:width], curve.values.mean(axis=1)[:width]] for curve in curves], axis=0)


def _alike(read: list[list], right: np.ndarray) -> list[list[Hashable]]:
    """Answers as they vote: the same words with another verdict are others (a task may grade more than was read)."""
    return [
        [None if answer is None else (answer, verdict) for answer, verdict in zip(*rows, strict=True)]
        for rows in zip(read, right, strict=True)
    ]


# ---------------------------------------------------------------- sweeps


def sweep_alpha(arms: Sequence[ArmOfRun], under: str):
    """Accuracy over alpha."""
    lines: dict[str, list[tuple[float, dict]]] = {}
    for arm in _whole(arms):
        if isinstance(arm.arm, Power | LowTemperature):
            lines.setdefault(_told_without(arm.arm, "alpha"), []).append((arm.arm.alpha, arm.accuracy))
    return _sweep(lines, _reference(arms), "alpha", "Accuracy over alpha", "alpha", under)


def sweep_steps(arms: Sequence[ArmOfRun], under: str):
    """Accuracy over steps a block; low temperature of the same alpha is a chain without steps."""
    power = [arm for arm in _whole(arms) if isinstance(arm.arm, Power)]
    lines: dict[str, list[tuple[float, dict]]] = {}
    for arm in power:
        lines.setdefault(_told_without(arm.arm, "mcmc_steps"), []).append((arm.arm.mcmc_steps, arm.accuracy))
    lines = {label: points for label, points in lines.items() if len({steps for steps, _ in points}) > 1}
    for arm in power:
        points = lines.get(_told_without(arm.arm, "mcmc_steps"))
        start = next((other for other in _whole(arms) if _starts(other.arm, arm.arm)), None)
        if points is not None and start is not None and 0 not in [steps for steps, _ in points]:
            points.append((0, start.accuracy))
    title = "Accuracy over Metropolis-Hastings steps"
    return _sweep(lines, _reference(arms), "mcmc_steps", title, "steps a block", under)


def _starts(start: Arm, arm: Power) -> bool:
    """Whether it is what the arm's chains do before their first step."""
    same = all(getattr(start, key, None) == getattr(arm, key) for key in ("alpha", "stop", "model"))
    return isinstance(start, LowTemperature) and same and arm.temperature is None


def _told_without(arm: Power | LowTemperature, field: str) -> str:
    """What an arm does but for one field, where it is not the default; computed alike, answers are alike."""
    skipped = {field, "kind", "name", "seeds", "draws", "lanes", "early_rejection", "free_prefix"}
    fields = arm.model_dump(exclude=skipped)
    defaults = {key: info.default for key, info in type(arm).model_fields.items()}
    told = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in fields.items()
            if value != defaults[key]]  # fmt: skip
    return arm.kind.replace("-", " ") + (f": {', '.join(told)}" if told else "")


def _reference(arms: Sequence[ArmOfRun]) -> float | None:
    return next((arm.accuracy["value"] for arm in _whole(arms) if isinstance(arm.arm, Plain)), None)


def _sweep(lines, reference: float | None, field: str, title: str, label: str, under: str):
    lines = {
        key: sorted(points, key=lambda p: p[0]) for key, points in lines.items() if len({x for x, _ in points}) > 1
    }
    if not lines:
        raise NothingToDrawError(f"no two graded arms differ in {field} alone")
    fig, ax = plt.subplots(figsize=(9, 4.8), layout="constrained")
    caption(fig, under, title)
    plain(ax)
    for (name, points), colour, marker in zip(lines.items(), _cycle(PALETTE), _cycle(_MARKS), strict=False):
        x, values = [x for x, _ in points], [v["value"] for _, v in points]
        errors = _errors(values, [_band(v) for _, v in points])
        ax.errorbar(x, values, errors, color=colour, marker=marker, markersize=6, capsize=3, elinewidth=1, label=name)
    if reference is not None:
        ax.axhline(reference, color="0.35", linestyle="--", linewidth=1.2, label="plain (alpha 1)")
    ax.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
    ax.set(xlabel=label, ylabel="share of right answers; bars: 95 %")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend_right(fig, ax)
    return fig


# ---------------------------------------------------------------- cost and steps


def account(arms: Sequence[ArmOfRun], under: str):
    """Stacked bars of tokens forwarded by cause, and of those that were saved."""
    costs = [account_of(arm.everything, len(arm.counted)) for arm in arms]
    fig, axes = _rows(arms, 2, under, "Tokens an answer that counts costs, by cause")
    for ax, causes, title in (
        (axes[0], CAUSES, "forwarded; behind the bars: over the answer's own"),
        (axes[1], SAVED, "saved by the exact shortcuts"),
    ):
        _stack(ax, {c: [of_arm.get(c, 0.0) for of_arm in costs] for c in causes if any(c in a for a in costs)}, causes)
        ax.set_xlabel(f"tokens {title}")
        ax.xaxis.set_major_locator(MaxNLocator(6))
    for y, (arm, of_arm) in enumerate(zip(arms, costs, strict=True)):
        total = sum(of_arm[cause] for cause in CAUSES)
        ratio = total / max(np.mean([r["cost"]["answer"] for r in arm.counted]), 1)
        axes[0].text(total, y, f"  {total:,.0f}, {ratio:.1f}x", va="center", fontsize=8.5)
    axes[0].set_xlim(0, max(1.0, *(sum(a[c] for c in CAUSES) for a in costs)) * 1.22)
    _legend_above(axes[0])
    if any(of_arm.get(cause) for of_arm in costs for cause in SAVED):
        _legend_above(axes[1])
    else:
        axes[1].set_xticks([])
        axes[1].text(0.5, 0.5, "nothing", transform=axes[1].transAxes, ha="center", color="0.4")
    return fig


def account_of(records: Sequence[dict], answers: int) -> dict[str, float]:
    """Tokens an answer that counts by cause, those of CAUSES and of SAVED; what is not known of all is left out. Tokens
    that were known from before are no cost: they are taken from the rejected proposals first, then from the rest."""
    found: dict[str, float] = dict.fromkeys((*CAUSES, "recalled", "saved_prefix"), 0.0)
    early = [record["cost"]["saved_early"] for record in records]
    for record in records:
        tokens = dict(record["cost"])
        tokens["rejected"] = tokens["proposal"] - tokens["accepted"] - tokens["voided"]
        known = tokens["recalled"]
        for cause in ("rejected", "voided", "accepted", "extension"):
            taken = min(known, tokens[cause])
            tokens[cause], known = tokens[cause] - taken, known - taken
        for cause in found:
            found[cause] += tokens[cause] / answers
    if None not in early:
        found["saved_early"] = sum(early) / answers
    return found


def acceptance(arms: Sequence[ArmOfRun], under: str):
    """A line an arm in each of three panels: horizon, step, position."""
    chains = {}
    for arm in arms:
        of_arm = [diagnostics.from_record(record, arm.label) for record in arm.everything if record["steps"]]
        if of_arm:
            chains[arm.label] = of_arm
    if not chains:
        raise NothingToDrawError("no arm makes Metropolis-Hastings steps")
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.6), sharey=True, layout="constrained")
    caption(fig, f"{under}; bars: 95 % of independent steps", "Steps that changed the answer")
    for ax in axes:
        plain(ax)
    for (label, of_arm), colour in zip(chains.items(), _cycle(PALETTE), strict=False):
        draw_rates(axes[0], diagnostics.by_horizon(of_arm), colour=colour, label=label)
        draw_rates(axes[1], diagnostics.by_step(of_arm), colour=colour)
        draw_rates(axes[2], diagnostics.by_position(of_arm), colour=colour)
    horizons = diagnostics.horizons_of(chain for of_arm in chains.values() for chain in of_arm)
    if len(horizons) <= 10:
        axes[0].set_xticks(horizons)
    axes[0].set(xlabel="horizon of the stage, tokens", ylabel="share of the steps")
    axes[1].set(xlabel="step among those of its horizon")
    axes[2].set(xlabel="token where the proposal left the answer", ylabel="share of the proposals that left")
    axes[0].set_ylim(bottom=0)
    fig.legend(frameon=False, loc="outside right center", fontsize=9)
    return fig


# ---------------------------------------------------------------- parts


def _graded(arms: Sequence[ArmOfRun]) -> list[ArmOfRun]:
    graded = [arm for arm in arms if arm.grader is not None and arm.accuracy is not None]
    if not graded:
        raise NothingToDrawError("no arm is graded")
    return graded


def _whole(arms: Sequence[ArmOfRun]) -> list[ArmOfRun]:
    """The graded ones that have come to all questions, so that what differs is the arm."""
    return [arm for arm in _graded(arms) if arm.row["questions"] == arm.questions]


def _band(accuracy: dict) -> tuple[float, float]:
    return accuracy["low"], accuracy["high"]


def _errors(values: Sequence[float], bands: Sequence[tuple[float, float]]) -> np.ndarray:
    """[2, values]: how far the bands reach down and up."""
    low, high = np.array(bands).T
    return np.maximum([np.asarray(values) - low, high - np.asarray(values)], 0)


def _kind_colour(arm: Arm) -> str:
    """As the paper's arms have them, beside which these stand."""
    kinds = {Plain: SKY, LowTemperature: ORANGE, Power: BLUE, BestOfN: PINK, Majority: PINK}
    return next((colour for kind, colour in kinds.items() if isinstance(arm, kind)), GREEN)


def _stack(ax, parts: Mapping[str, Sequence[float]], look: Mapping[str, tuple[str, str]]) -> None:
    """Stacked horizontal bars, a row each."""
    base = np.zeros(len(next(iter(parts.values()), ())))
    for part, values in parts.items():
        colour, label = look[part]
        if any(values):
            ax.barh(np.arange(len(values)), values, 0.62, left=base, color=colour, label=label)
            base = base + np.asarray(values)


def _legend_above(ax) -> None:
    ax.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0.1)


def _legend_right(fig, ax) -> None:
    fig.legend(*ax.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside right center")


def _cycle(values: Sequence) -> list:
    return list(values) * 8
