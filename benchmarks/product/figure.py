"""``python -m benchmarks product-figure``: accuracy against MACs, a panel for each network of a product CSV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from benchmarks.errors import UsageError

STYLES = {
    ("pro", "compensation"): ("PRO + compensation", "C0", "-", "o"),
    ("pro", "none"): ("PRO", "C0", "--", "o"),
    ("l2", "none"): ("L2 magnitude", "C7", "--", "s"),
    ("taylor", "none"): ("Taylor", "C1", "--", "^"),
    ("l2", "compensation"): ("L2 + compensation", "C7", "-", "s"),
}


HARNESS = {
    "unpruned": ("none", "none"),
    "pro / macs, coupled": ("pro", "none"),
    "pro / macs, coupled + compensation": ("pro", "compensation"),
    "l2": ("l2", "none"),
    "l2 + compensation": ("l2", "compensation"),
    "taylor": ("taylor", "none"),
}
"""Arms of ``compare``, as they are called here."""


@dataclass(frozen=True)
class FigureConfig:
    """Draw the figure of the first page."""

    rows: tuple[Path, ...] = (Path("benchmarks/results/resnet56.csv"),)
    """Files of ``product``, or of ``compare``'s report; a panel for each network."""
    out: Path = Path("docs/figures/accuracy.png")
    value: str = "among"
    """accuracy, among or agreement."""


def run(config: FigureConfig) -> None:
    """Write a PNG that can be read at a width of 800 pixels."""
    table = pd.concat([_read(path) for path in config.rows])
    table = table[(table.status == "ok") & table.scope.isin(("global", "all"))]
    if table.empty:
        raise UsageError("no finished rows to draw")
    models = list(dict.fromkeys(table.model))
    figure, panels = plt.subplots(1, len(models), figsize=(4 * len(models), 4), dpi=120, squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        rows = table[table.model == model]
        base = float(rows[rows.importance == "none"][config.value].iloc[0])
        panel.axhline(base, color="black", linewidth=1, linestyle=":", label="unpruned")
        for (importance, refit), (label, colour, line, marker) in STYLES.items():
            arm = rows[(rows.importance == importance) & (rows.refit == refit)]
            means = arm.groupby("target")[config.value].mean()
            if len(means):
                panel.plot(means.index, means.values, line, color=colour, marker=marker, label=label)
        panel.set_title(model)
        panel.set_xlabel("MACs left")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("top-1 (%)")
    handles = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out)
    plt.close(figure)
    print(config.out)


def _read(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    if "arm" not in table:
        return table
    table = table[table.arm.isin(HARNESS)]
    named = pd.DataFrame([HARNESS[arm] for arm in table.arm], columns=["importance", "refit"], index=table.index)
    figures = {"accuracy": table.pruned, "among": table.pruned, "model": table.task.str.split().str[-1]}
    return pd.concat([table[["scope", "target", "seed", "status"]], named], axis=1).assign(**figures)
