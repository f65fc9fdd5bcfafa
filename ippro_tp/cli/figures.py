"""Figures of one run, drawn from its records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import transforms
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .runs import PHASES

BEFORE, AFTER, REMOVED = "#C9CED6", "#0072B2", "#D55E00"
TITLE_PAD = 24
"""Points between a title and its axes: room for one line of legend."""
MOST_ROWS = 80
"""Rows of a figure; of more, evenly spread ones are shown."""


def draw_all(folder: Path, result: dict[str, Any]) -> list[Path]:
    """Draw the figures of a run; return their files.

    Args:
        folder: Where they go.
        result: ``results.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"summary": _summary(result), "widths": _widths(result), "scores": _scores(result)}
    if result.get("history"):
        figures["training"] = _training(result["history"], result.get("distilled", False))
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        partial = path.with_suffix(".tmp")
        figure.savefig(partial, dpi=120, bbox_inches="tight", format="png")
        plt.close(figure)
        partial.replace(path)
        paths.append(path)
    return paths


def phase_names(result: dict[str, Any]) -> dict[str, str]:
    """Return what the phases of a run are called, in their order."""
    names = {phase: name for phase, name in PHASES.items() if phase in result["quality"]}
    return names | ({"pruned": "pruned, compensated"} if result["compensation"] else {})


def _plain(axis: Axes, grid: Literal["x", "y"] = "y") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, alpha=0.25)
    axis.set_axisbelow(True)


def _legend_below_title(axis: Axes) -> None:
    """Put the legend into a line of its own: titles with long names take the whole width."""
    place = transforms.ScaledTranslation(0, 4 / 72, axis.figure.dpi_scale_trans)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), bbox_transform=axis.transAxes + place, ncols=2,
                frameon=False, fontsize=9, borderpad=0, borderaxespad=0, handletextpad=0.5)  # fmt: skip


def _summary(result: dict[str, Any]) -> Figure:
    """Quality after each phase, and what is left of MACs, parameters and latency."""
    names = phase_names(result)
    values = [100 * result["quality"][p] for p in names]
    plan = result["plan"]
    sizes = {"MACs": plan["macs_fraction"], "parameters": plan["params_fraction"]}
    times = [result["latency"][k]["median_seconds"] for k in ("unpruned", "pruned")]
    sizes["latency"] = times[1] / times[0]
    captions = [
        f"{plan['macs_before'] / 1e6:,.1f} → {plan['macs'] / 1e6:,.1f} M",
        f"{plan['params_before'] / 1e6:,.2f} → {plan['params'] / 1e6:,.2f} M",
        f"{1e3 * times[0]:,.1f} → {1e3 * times[1]:,.1f} ms",
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(max(len(names), 3), 3))
    colours = [BEFORE, REMOVED, "#E69F00", AFTER]
    shown = [colours[list(PHASES).index(p)] for p in names]
    bars = left.bar([n.replace(", ", ",\n") for n in names.values()], values, color=shown, width=0.62)
    labels = [
        f"{v:.1f}" + (f"  ({v - values[0]:+.1f})" if p != "unpruned" else "")
        for p, v in zip(names, values, strict=True)
    ]
    left.bar_label(bars, labels, padding=2)
    left.set_ylabel(f"{result['metric']} (%)")
    left.set_ylim(0, max(*values, 1) * 1.15)
    left.set_yticks([t for t in left.get_yticks() if t <= 100])
    left.set_title("Quality, phase by phase", loc="left")
    _plain(left)
    bars = right.barh(list(sizes), list(sizes.values()), color=AFTER, height=0.55)
    right.barh(list(sizes), [max(1 - v, 0) for v in sizes.values()], left=list(sizes.values()), color=BEFORE,
               height=0.55)  # fmt: skip
    for bar, value, caption in zip(bars, sizes.values(), captions, strict=True):
        middle = bar.get_y() + bar.get_height() / 2
        inside = value > 0.15
        right.text(value - 0.015 if inside else value + 0.015, middle, f"{value:.0%}", va="center",
                   ha="right" if inside else "left", color="white" if inside else "black")  # fmt: skip
        right.text(0, bar.get_y() - 0.06, caption, va="bottom", fontsize=9, color="0.3")
    right.set_xlim(0, max(1.0, *sizes.values()))
    right.set_ylim(len(sizes) - 0.55, -0.75)
    right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.set_title("What is left", loc="left")
    right.spines[["top", "right", "left"]].set_visible(False)
    right.tick_params(axis="y", length=0)
    figure.suptitle(result["title"], x=0.01, ha="left", fontsize=13)
    figure.tight_layout()
    return figure


def _rows(names: list[str]) -> list[int]:
    count = len(names)
    return (
        list(range(count))
        if count <= MOST_ROWS
        else np.linspace(0, count - 1, MOST_ROWS).round().astype(int).tolist()
    )


def _widths(result: dict[str, Any]) -> Figure:
    """Outputs of every layer before and after."""
    before, after = result["plan"]["widths_before"], result["plan"]["widths"]
    names = list(before)
    shown = _rows(names)
    figure, axis = plt.subplots(figsize=(9, 0.19 * len(shown) + 1.4))
    place = np.arange(len(shown))
    old, new = (np.array([w[names[i]] for i in shown]) for w in (before, after))
    axis.barh(place, old, color=BEFORE, height=0.78, label="unpruned")
    axis.barh(place, new, color=AFTER, height=0.78, label="pruned")
    for y, (a, b) in enumerate(zip(old, new, strict=True)):
        text = f"{b}" if a == b else f"{b} of {a}"
        axis.text(a + 0.008 * old.max(), y, text, va="center", fontsize=7, color="0.35")
    axis.set_yticks(place, [names[i] for i in shown], fontsize=7)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlim(0, old.max() * 1.1)
    axis.set_xlabel("output channels")
    axis.set_title(f"Widths: {result['title']}", loc="left", fontsize=11, pad=TITLE_PAD)
    _legend_below_title(axis)
    _plain(axis, "x")
    figure.tight_layout()
    return figure


def _scores(result: dict[str, Any]) -> Figure:
    """Scores of all channels, a row per group, kept and removed ones apart; of the last step."""
    groups = [g for g in result["plan"]["steps"][-1]["groups"] if g["scores"]]
    shown = [groups[i] for i in _rows([g["root"] for g in groups])]
    figure, axis = plt.subplots(figsize=(9, 0.22 * len(shown) + 1.5))
    everything = np.concatenate([np.asarray(g["scores"], float) for g in shown])
    positive = everything[everything > 0]
    logarithmic = positive.size > 0 and everything.min() >= 0 and positive.max() > 4 * np.median(positive)
    # Dead channels score (nearly) nothing; they stand at the left edge, not decades away from all others.
    floor = positive[positive > 1e-5 * np.median(positive)].min() / 2 if logarithmic else None
    jitter = np.random.default_rng(0)
    for y, group in enumerate(shown):
        values = np.asarray(group["scores"], float)
        if floor is not None:
            values = np.maximum(values, floor)
        gone = np.zeros(len(values), bool)
        gone[group["removed"]] = True
        height = y + jitter.uniform(-0.28, 0.28, len(values))
        axis.scatter(values[~gone], height[~gone], s=7, color=AFTER, alpha=0.5, linewidths=0)
        axis.scatter(values[gone], height[gone], s=7, color=REMOVED, alpha=0.5, linewidths=0)
    if logarithmic:
        axis.set_xscale("log")
    axis.scatter([], [], s=25, color=AFTER, label="kept")
    axis.scatter([], [], s=25, color=REMOVED, label="removed")
    labels = [f"{g['root']}  ({len(g['scores']) - len(g['removed'])}/{len(g['scores'])})" for g in shown]
    axis.set_yticks(range(len(shown)), labels, fontsize=7)
    axis.set_ylim(len(shown) - 0.3, -0.7)
    edge = "; dead channels at the left edge" if floor is not None and everything.min() < floor else ""
    axis.set_xlabel(f"score of a channel ({result['importance']}){edge}")
    title = "Scores" if len(result["plan"]["steps"]) == 1 else "Scores of the last step"
    axis.set_title(f"{title}: {result['title']}", loc="left", fontsize=11, pad=TITLE_PAD)
    _legend_below_title(axis)
    _plain(axis, "x")
    figure.tight_layout()
    return figure


def _training(history: dict[str, list[float]], distilled: bool) -> Figure:
    """Mean training loss per epoch."""
    labels = {"trained": "unpruned network", "finetuned": "fine-tuning"}
    if distilled:
        labels["finetuned"] += " (half of it the distance from the unpruned network)"
    figure, axis = plt.subplots(figsize=(6, 3.2))
    done = 0
    for name, colour in (("trained", "0.5"), ("finetuned", AFTER)):
        if name in history:
            epochs = range(done + 1, done + len(history[name]) + 1)
            axis.plot(epochs, history[name], marker="o", color=colour, label=labels[name])
            done += len(history[name])
    if len(history) > 1:
        axis.axvline(len(history["trained"]) + 0.5, color="0.6", linestyle=":", label="pruning")
    axis.set_xlabel("epoch")
    axis.set_ylabel("training loss")
    axis.margins(y=0.12)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(framealpha=0.9, edgecolor="none", fontsize=9)
    _plain(axis)
    figure.tight_layout()
    return figure
