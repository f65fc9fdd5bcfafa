"""``correlation``: how alike the scores of the criteria are (Table 4)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from benchmarks.criteria.registry import find_criterion
from benchmarks.harness.scores import FrozenScores
from benchmarks.harness.tables import github_table
from benchmarks.paper.rows import AnalysisConfig, Rows
from benchmarks.paper.scoring import arm_scores, kept_channels
from benchmarks.tasks import build_task, defaults_of

CRITERIA = (
    "random", "l1", "l2", "bn", "lamp", "fpgm", "taylor", "hessian", "ispasp", "pro", "pro-paper-lam1",
    "pro-paper-lam0.001", "pro-paper-norm-lam1",
)  # fmt: skip
MEASURES = ("pearson", "spearman", "overlap")


@dataclass(frozen=True)
class CorrelationConfig(AnalysisConfig):
    """Correlate the scores of all pairs of criteria (the paper's Table 4)."""

    criteria: tuple[str, ...] = CRITERIA
    """Arms, as ``compare`` calls them."""
    calibration_images: int = 0
    """Training images for calibration; 0 for the task's default."""
    ratio: float = 0.5
    """Part of the channels that is removed, for the overlap of what is kept."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the calibration sample; figures are means over them."""


def run(config: CorrelationConfig) -> None:
    """Compute the rows that are missing; write table, CSV and figure of all rows."""
    task = build_task(config)
    images = config.calibration_images or defaults_of(config.task).calibration_images
    for name in config.criteria:
        find_criterion(name)
    rows = Rows.of(config, task, "correlation", calibration_images=images, ratio=config.ratio)
    for seed in config.seeds:
        pairs = combinations(config.criteria, 2)
        missing = rows.missing({"first": a, "second": b, "seed": seed} for a, b in pairs)
        runner = arm_scores(config, task, images)
        for row in missing:
            first, second = (runner.scores(row[side], "none", seed)[0] for side in ("first", "second"))
            rows.write(row, similarity(first, second, config.ratio))
    frame = rows.read()
    rows.publish(frame, table(frame, config.ratio), draw(frame, config.ratio), "correlation")


def similarity(first: FrozenScores, second: FrozenScores, ratio: float) -> dict[str, float | None]:
    """Return how alike two criteria are, as the mean over groups and over all channels (``_global``).

    Returns:
        ``pearson`` and ``spearman`` of the scores, and ``overlap``: the part of the kept channels that both keep
        when ``ratio`` of them is removed. None where a criterion's scores are constant.
    """
    keys = [k for k in first.scores if first.scores[k] is not None and second.scores.get(k) is not None]
    pairs = [(first.scores[k].double(), second.scores[k].double()) for k in keys]
    values: dict[str, float | None] = {}
    both = [(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))]
    for suffix, chosen in (("", pairs), ("_global", both)):
        values[f"pearson{suffix}"] = _mean(stats.pearsonr, chosen)
        values[f"spearman{suffix}"] = _mean(stats.spearmanr, chosen)
        values[f"overlap{suffix}"] = float(np.mean([overlap(a, b, ratio) for a, b in chosen]))
    return values


def overlap(first: Tensor, second: Tensor, ratio: float) -> float:
    """Return the part of the channels kept under the first scores that is kept under the second, too."""
    kept = kept_channels(first, ratio)
    return float((kept & kept_channels(second, ratio)).sum() / kept.sum())


def _mean(correlation, pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    found = [
        float(correlation(a.numpy(), b.numpy()).statistic)
        for a, b in pairs
        if len(a.unique()) > 1 and len(b.unique()) > 1  # a constant has no correlation
    ]
    return float(np.mean(found)) if found else None


def matrix(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return the mean over seeds of ``measure`` for all pairs, ones on the diagonal."""
    names = list(dict.fromkeys([*CRITERIA, *frame["first"], *frame.second]))
    names = [name for name in names if name in {*frame["first"], *frame.second}]
    result = pd.DataFrame(np.nan, index=names, columns=names)
    for (first, second), group in frame.groupby(["first", "second"]):
        result.loc[first, second] = result.loc[second, first] = group[measure].astype(float).mean()
    for name in names:
        result.loc[name, name] = 1.0
    return result


def table(frame: pd.DataFrame, ratio: float) -> str:
    """Return one matrix per measure: above the diagonal the mean over groups, below it all channels together."""
    parts = []
    for measure in MEASURES:
        within, overall = matrix(frame, measure), matrix(frame, f"{measure}_global")
        upper = np.triu(np.ones(within.shape, bool))
        shown = within.where(upper, overall).map(lambda v: "·" if np.isnan(v) else f"{round(v, 2) + 0.0:.2f}")
        shown.insert(0, measure, shown.index)
        parts.append(github_table(shown))
    seeds = frame.seed.nunique()
    caption = (
        "Above the diagonal: mean over the groups; below: all channels together. Overlap: part of the kept "
        f"channels that both keep when {ratio:.0%} are removed (chance: {1 - ratio:g}). Mean over {seeds} "
        f"calibration sample{'s'[: seeds > 1]}."
    )
    return "\n\n".join([*parts, caption])


def draw(frame: pd.DataFrame, ratio: float) -> Figure:
    """Return heat maps of Spearman's correlation within groups and of the overlap of what is kept."""
    figure, axes = plt.subplots(1, 2, figsize=(14.5, 6.4))
    shown = (
        ("spearman", "Spearman's correlation, mean over groups", "RdBu_r", -1.0, 1.0),
        ("overlap", f"shared part of the kept channels, {ratio:.0%} removed", "viridis", 1 - ratio - 0.2, 1.0),
    )
    for axis, (measure, title, colours, low, high) in zip(axes, shown, strict=True):
        values = matrix(frame, measure)
        image = axis.imshow(values, cmap=colours, vmin=low, vmax=high)
        for (row, column), value in np.ndenumerate(values.to_numpy()):
            if not np.isnan(value):
                level = (value - low) / (high - low)
                dark = (level < 0.15 or level > 0.85) if measure == "spearman" else level < 0.6
                colour = "white" if dark else "black"
                axis.text(
                    column,
                    row,
                    f"{round(value, 2) + 0.0:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=colour,
                )
        axis.set_xticks(range(len(values)), values.columns, rotation=45, ha="right")
        axis.set_yticks(range(len(values)), values.index)
        axis.set_title(title, fontsize=11)
        figure.colorbar(image, ax=axis, fraction=0.045, pad=0.03)
    figure.tight_layout()
    return figure
