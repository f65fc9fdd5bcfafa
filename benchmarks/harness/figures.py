"""Figures of the report: accuracy against MACs."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from benchmarks.harness.cells import UNPRUNED

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#8C6D31", "#7F7F7F")
"""Okabe and Ito's colour-blind-safe palette without yellow and without vermilion (PRO's own); two greys."""
HIGHLIGHT = "#D55E00"
COMPENSATED, RECOVERED = " + compensation", " + recovery"
"""What the report appends to the name of an arm that was compensated, or compensated and recovered."""
COMPENSATED_STYLE = {"linestyle": "-.", "marker": "*", "markersize": 11}
RECOVERED_STYLE = {"linestyle": "-", "marker": "D", "markersize": 7}
MARKERS = "ovsPXD^<>ph*"
DASHES = ("-", "--", ":")
PANELS = {
    "pruned": "as pruned",
    "bn": "BatchNorm re-estimated",
    "finetuned": "fine-tuned",
    "scratch": "from scratch",
}


def draw_curves(cells: pd.DataFrame, directory: Path) -> list[Path]:
    """Draw one figure per task: a row per scope, a column per phase; return the files."""
    paths = []
    for task, part in cells.groupby("task", sort=False):
        path = directory / f"accuracy_{task.replace(' ', '_').replace('/', '_')}.png"
        _draw(part, task, path)
        paths.append(path)
    return paths


def _draw(part: pd.DataFrame, task: str, path: Path) -> None:
    base, pruned = part[part.criterion == UNPRUNED], part[part.criterion != UNPRUNED]
    scopes = list(dict.fromkeys(pruned.scope)) or ["all"]
    phases = [phase for phase in PANELS if part[phase].notna().any()] or ["pruned"]
    size = (5.2 * len(phases) + 2, 3.9 * len(scopes))
    figure, axes = plt.subplots(len(scopes), len(phases), figsize=size, squeeze=False, sharex=True, sharey="col")
    styles = arm_styles(list(dict.fromkeys(pruned.arm)))
    for row, scope in zip(axes, scopes, strict=True):
        for axis, phase in zip(row, phases, strict=True):
            shown = pruned[(pruned.scope == scope) & pruned.hit]
            for arm, style in styles.items():
                _curve(axis, shown[shown.arm == arm], phase, arm, style)
            if base[phase].notna().any():
                axis.axhline(base[phase].mean(), color="0.6", linewidth=1, linestyle=(0, (1, 2)))
            axis.set_title(f"{scope}, {PANELS[phase]}", fontsize=11)
            axis.grid(alpha=0.25)
            axis.set_xlabel("remaining MACs (fraction)")
        row[0].set_ylabel("top-1 accuracy (%)")
    axes[0, 0].set_xlim(axes[0, 0].get_xlim()[::-1])
    handles, labels = _legend(axes)
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(f"{task}: mean over seeds, band = one standard deviation, dots = unpruned", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def arm_styles(arms: list[str]) -> dict[str, dict]:
    """Return line styles: PRO's default in vermilion and thick, PRO's other arms thin in the same colour.

    Compensated arms have the colour of the arm that they compensate, a star and dashes with dots; recovered ones a
    diamond and no dashes.
    """
    styles, others, variants = {}, 0, 0
    for arm in sorted(arms, key=lambda arm: (RECOVERED in arm, COMPENSATED in arm)):
        plain = arm.replace(COMPENSATED, "").replace(RECOVERED, "")
        more = RECOVERED_STYLE if RECOVERED in arm else COMPENSATED_STYLE
        if plain != arm and plain in styles:
            styles[arm] = styles[plain] | more
            continue
        if arm.split(" ")[0] == "pro":
            dash = "-" if arm == "pro" else "--"
            styles[arm] = {"color": HIGHLIGHT, "linewidth": 3, "linestyle": dash, "marker": "o", "zorder": 5}
            styles[arm] |= more if plain != arm else {}
        elif arm.startswith("pro-"):
            styles[arm] = {
                "color": HIGHLIGHT,
                "linewidth": 1,
                "linestyle": ":",
                "marker": MARKERS[variants % 12],
            }
            variants += 1
        else:
            dash = DASHES[others // len(COLOURS) % len(DASHES)]
            styles[arm] = {"color": COLOURS[others % len(COLOURS)], "linewidth": 1.4, "linestyle": dash}
            styles[arm]["marker"] = MARKERS[others % 12]
            others += 1
    return styles


def _curve(axis, cells: pd.DataFrame, phase: str, arm: str, style: dict) -> None:
    if not cells[phase].notna().any():
        return
    curve = cells.groupby("target").agg(macs=("macs_fraction", "mean"), mean=(phase, "mean"), std=(phase, "std"))
    curve = curve.fillna({"std": 0.0}).sort_values("macs")
    axis.plot(curve.macs, curve["mean"], label=arm, **{"markersize": 5, **style})
    shade = 0.2 if arm.split(" ")[0] == "pro" else 0.07
    low, high = curve["mean"] - curve["std"], curve["mean"] + curve["std"]
    axis.fill_between(curve.macs, low, high, color=style["color"], alpha=shade, linewidth=0)


def _legend(axes) -> tuple[list, list[str]]:
    found: dict[str, object] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    order = sorted(found, key=lambda arm: (not arm.startswith("pro"), arm))
    return [found[arm] for arm in order], order
