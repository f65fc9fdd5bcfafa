"""``curves``: accuracy without fine-tuning against the ratio of channels removed from every layer (Fig. 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.criteria.registry import find_criterion
from benchmarks.harness.figures import COLOURS, HIGHLIGHT
from benchmarks.harness.scores import FrozenScores
from benchmarks.harness.tables import github_table, spread
from benchmarks.paper.accuracies import Accuracies
from benchmarks.paper.rows import AnalysisConfig, Rows
from benchmarks.paper.scoring import (
    Statistics,
    arm_scores,
    freeze_on,
    importance_of,
    pool_size,
    statistics,
)
from benchmarks.tasks import build_task, defaults_of

PAPER = "paper"
MODE_NAMES = {"eval": "eval mode", "train": "train mode"}
TARGET_NAMES = {"conv": "F = filter", "norm": "F = (gamma, beta)"}


@dataclass(frozen=True)
class CurvesConfig(AnalysisConfig):
    """Uniform local ratios, no fine-tuning: Eq. 4 at many step sizes against other criteria (Fig. 5)."""

    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    """Part of the channels of every layer that is removed."""
    step_sizes: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
    """Values of lambda in Eq. 4; 0 is the limit."""
    targets: tuple[Literal["conv", "norm"], ...] = ("conv", "norm")
    """What F is in Eq. 4: filters, or (gamma, beta) of the BatchNorm that follows."""
    modes: tuple[Literal["eval", "train"], ...] = ("eval", "train")
    """Mode of BatchNorm while gradients of Eq. 4 are gathered."""
    portions: tuple[float, ...] = (1.0, 0.05)
    """Parts of the calibration images available that data-driven criteria see."""
    criteria: tuple[str, ...] = ("random", "l1", "fpgm", "taylor", "pro")
    """Other arms, as ``compare`` calls them; empty: only Eq. 4."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of random scores and of samples smaller than all images."""
    test_images: int = 0
    """A fixed random part of the test images; 0 for the task's default, -1 for all."""
    bn_images: int = 1000
    """Training images for BatchNorm re-estimation."""


def run(config: CurvesConfig) -> None:
    """Compute the rows that are missing; write table, CSV and figure of all rows."""
    task = build_task(config)
    tests = max(config.test_images or defaults_of(config.task).test_images, 0)
    rows = Rows.of(config, task, "curves", test_images=tests, bn_images=config.bn_images)
    accuracies = Accuracies(task, config.batch_size, tests, config.bn_images, config.device)
    for arm in tqdm(list(_arms(config)), desc="curves", unit="arm"):
        missing = rows.missing(arm | {"ratio": ratio} for ratio in config.ratios)
        if missing:
            scores = _scores(config, task, arm)
            for row in missing:
                rows.write(row, accuracies.at_ratio(scores, row["ratio"]))
    frame, available = rows.read(), pool_size(task)
    rows.publish(frame, table(frame, available), draw(frame, available), "curves")


def _arms(config: CurvesConfig) -> Iterator[dict]:
    for name in config.criteria:
        arm, plain = find_criterion(name), {"target": None, "mode": None, "step_size": None}
        for portion in config.portions if arm.data != "none" else (None,):
            whole = not arm.seeded or portion == 1
            for seed in config.seeds[:1] if whole else config.seeds:
                yield {"criterion": name, **plain, "portion": portion, "seed": seed}
    for portion in config.portions:
        for seed in config.seeds[:1] if portion == 1 else config.seeds:
            for mode in config.modes:
                for target in config.targets:
                    for step in config.step_sizes:
                        arm = {"criterion": PAPER, "target": target, "mode": mode, "step_size": float(step)}
                        yield arm | {"portion": portion, "seed": seed}


def _scores(config: CurvesConfig, task, arm: dict) -> FrozenScores:
    images = round((arm["portion"] or 0) * pool_size(task))
    if arm["criterion"] != PAPER:
        return arm_scores(config, task, images).scores(arm["criterion"], "none", arm["seed"])[0]
    state = statistics(config, task, config.out, Statistics("paper", images, arm["seed"], arm["mode"]))
    return freeze_on(task, importance_of(state, arm["target"], arm["step_size"]), PAPER)


def table(frame: pd.DataFrame, available: int) -> str:
    """Return the accuracies of all arms, as pruned / after BatchNorm re-estimation."""
    records = []
    for label, group in _labelled(frame, available).groupby("label", sort=False):
        record = {"criterion": label}
        for ratio in sorted(frame.ratio.unique()):
            cell = group[group.ratio == ratio]
            record[f"{ratio:g}"] = f"{spread(100 * cell.pruned)} / {spread(100 * cell.bn)}" if len(cell) else "·"
        records.append(record)
    return (
        f"{github_table(pd.DataFrame(records))}\n\nTop-1 accuracy in per cent, as pruned / BatchNorm "
        f"re-estimated, against the ratio removed from every layer. {available} images are available for "
        "calibration."
    )


def _labelled(frame: pd.DataFrame, available: int) -> pd.DataFrame:
    def label(row) -> str:
        text = row.criterion
        if text == PAPER:
            text = f"Eq. 4, {TARGET_NAMES[row.target]}, {MODE_NAMES[row['mode']]}, λ = {row.step_size:g}"
        return text if pd.isna(row.portion) else f"{text}, {round(row.portion * available)} images"

    keys = ["criterion", "portion", "mode", "target", "step_size", "seed"]
    ordered = frame.sort_values(keys, na_position="first", key=_paper_last)
    return ordered.assign(label=ordered.apply(label, axis=1))


def _paper_last(column: pd.Series) -> pd.Series:
    return column.map(lambda name: (name == PAPER, name)) if column.name == "criterion" else column


def draw(frame: pd.DataFrame, available: int) -> Figure:
    """Return a figure: a column for each way to apply Eq. 4, each arm with the most images it was given."""
    largest = frame.groupby("criterion").portion.transform("max")
    frame = frame[frame.portion.isna() | (frame.portion == largest)]
    paper, others = frame[frame.criterion == PAPER], frame[frame.criterion != PAPER]
    ways = list(dict.fromkeys(zip(paper["mode"], paper.target, strict=True))) or [("eval", "conv")]
    ways.sort()
    steps = sorted(paper.step_size.unique())
    shades = plt.colormaps["viridis"]
    size = (3.6 * len(ways) + 1.8, 6.4)
    figure, axes = plt.subplots(2, len(ways), figsize=size, squeeze=False, sharex=True, sharey="row")
    for column, (mode, target) in enumerate(ways):
        for row, phase in enumerate(("pruned", "bn")):
            axis = axes[row, column]
            for number, step in enumerate(steps):
                part = paper[(paper["mode"] == mode) & (paper.target == target) & (paper.step_size == step)]
                shade = shades(0.9 * number / max(len(steps) - 1, 1))
                _line(axis, part, phase, f"Eq. 4, λ = {step:g}", color=shade, linewidth=1, linestyle="--")
            for number, name in enumerate(dict.fromkeys(others.criterion)):
                style = {
                    "color": COLOURS[number % len(COLOURS)],
                    "linewidth": 1.6,
                    "marker": "osDv^P*"[number % 7],
                }
                if name == "pro":
                    style |= {"color": HIGHLIGHT, "linewidth": 2.8}
                if name == "random":
                    style |= {"color": "black"}
                part = others[others.criterion == name]
                _line(axis, part, phase, _with_images(name, part, available), markersize=4, **style)
            axis.grid(alpha=0.25)
        title = f"Eq. 4, {TARGET_NAMES[target]}, {MODE_NAMES[mode]}"
        axes[0, column].set_title(_with_images(title, paper, available).replace(" mode, ", " mode\n"), fontsize=10)
        axes[1, column].set_xlabel("channels removed from every layer")
    axes[0, 0].set_ylabel("top-1 (%), as pruned")
    axes[1, 0].set_ylabel("top-1 (%), BatchNorm re-estimated")
    found = {}
    for axis in axes.flat:
        found |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(found.values(), found, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    return figure


def _with_images(text: str, part: pd.DataFrame, available: int) -> str:
    portion = part.portion.max()
    return text if pd.isna(portion) else f"{text}, {round(portion * available)} images"


def _line(axis, part: pd.DataFrame, phase: str, label: str, **style) -> None:
    if not len(part):
        return
    curve = 100 * part.groupby("ratio")[phase].agg(["mean", "std"]).fillna(0.0)
    axis.plot(curve.index, curve["mean"], label=label, **style)
    if curve["std"].any():
        low, high = curve["mean"] - curve["std"], curve["mean"] + curve["std"]
        axis.fill_between(curve.index, low, high, color=style["color"], alpha=0.15, linewidth=0)
