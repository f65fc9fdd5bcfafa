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
}
BEST = (
    (("l2", "taylor"), ("none",), ("best of L2 and Taylor", "C1", "--", "^")),
    (("l2", "taylor"), ("compensation",), ("the same + compensation", "C1", "-", "^")),
    (("chip", "vbp", "l2-plain"), ("none", "bn", "mean", "gram", "folding"), ("best peer", "C7", "--", "s")),
)
"""Arms that share a curve: at each target the best of them, of any scope."""
TITLES = {
    "tf_efficientnet_lite0": "EfficientNet-Lite0, ImageNet weights",
    "vit": "ViT, CIFAR-10",
    "resnet56": "ResNet-56, CIFAR-10",
    "resnet20": "ResNet-20, CIFAR-10",
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
    models: tuple[str, ...] = ()
    """Only these networks, in this order."""


def run(config: FigureConfig) -> None:
    """Write a PNG that can be read at a width of 800 pixels."""
    table = pd.concat([_read(path).assign(file=number) for number, path in enumerate(config.rows)])
    table = table[(table.status == "ok") & table.calibration.isin(("own", "none"))]
    first = table.groupby(["model", "importance", "refit", "scope", "target"]).file.transform("min")
    table = table[table.file == first]  # an arm that several files have is the first one's
    if table.empty:
        raise UsageError("no finished rows to draw")
    models = config.models or tuple(dict.fromkeys(table.model))
    figure, panels = plt.subplots(1, len(models), figsize=(3.4 * len(models), 3.6), dpi=120, squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        rows = table[table.model == model]
        base = float(rows[rows.importance == "none"][config.value].iloc[0])
        panel.axhline(base, color="black", linewidth=1, linestyle=":", label="unpruned")
        for (importance, refit), style in STYLES.items():
            arm = rows[(rows.importance == importance) & (rows.refit == refit) & (rows.scope == "global")]
            _plot(panel, arm.groupby("target")[config.value].mean(), style, base)
        for importances, refits, style in BEST:
            arms = rows[rows.importance.isin(importances) & rows.refit.isin(refits)]
            means = arms.groupby(["importance", "refit", "scope", "target"])[config.value].mean()
            _plot(panel, means.groupby("target").max(), style, base)
        panel.set_title(TITLES.get(model, model), fontsize=10)
        panel.set_xlabel("MACs left")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("top-1 (%)")
    handles = {}
    for panel in panels[0]:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out)
    plt.close(figure)
    print(config.out)


def _plot(panel: plt.Axes, means: pd.Series, style: tuple[str, str, str, str], base: float) -> None:
    """A curve from the unpruned network on."""
    label, colour, line, marker = style
    if len(means):
        means = pd.concat([means, pd.Series({1.0: base})])
        panel.plot(means.index, means.values, line, color=colour, marker=marker, label=label)


def _read(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    if "arm" not in table:
        return table
    table = table[table.arm.isin(HARNESS)]
    named = pd.DataFrame([HARNESS[arm] for arm in table.arm], columns=["importance", "refit"], index=table.index)
    figures = {"accuracy": table.pruned, "among": table.pruned, "model": table.task.str.split().str[-1]}
    table = table[["scope", "target", "seed", "status"]].assign(calibration="own")
    return pd.concat([table, named], axis=1).assign(**figures)
