"""``calibration-size``: accuracy and time against the number of calibration images (Table 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.errors import UsageError
from benchmarks.harness.cost import network_cost
from benchmarks.harness.figures import COLOURS, HIGHLIGHT
from benchmarks.harness.scores import kappa_of
from benchmarks.harness.tables import github_table, spread
from benchmarks.paper.accuracies import Accuracies
from benchmarks.paper.rows import AnalysisConfig, Rows
from benchmarks.paper.scoring import Statistics, freeze_on, gather, importance_of, pool_size
from benchmarks.tasks import Batch, Task, build_task, defaults_of
from ippro_tp import PROImportance

ESTIMATORS = {"pro": "expected", "pro-paper": "paper"}
QUESTION = (200, 5000)
"""The sizes whose difference is asked for."""


@dataclass(frozen=True)
class CalibrationSizeConfig(AnalysisConfig):
    """Global pruning at matched MACs, from few and from many calibration images (the paper's Table 5)."""

    criteria: tuple[str, ...] = ("pro", "pro-paper")
    """pro: the default, with its cost in MACs; pro-paper: Eq. 4."""
    depletion: str = "coupled"
    """Depletion of pro, as in ``compare``."""
    images: tuple[int, ...] = (50, 100, 200, 500, 1000, 2500, 5000)
    """Numbers of calibration images; those beyond what is available are left out."""
    portions: tuple[float, ...] = (0.05, 0.25, 0.5, 1.0)
    """Numbers of images as parts of what is available."""
    balanced: tuple[bool, ...] = (False, True)
    """Plain random samples; samples with the same number of images of each class (no larger than a half)."""
    targets: tuple[float, ...] = (0.75, 0.5)
    """Remaining MACs as fractions of the unpruned network's."""
    passes: int = 1
    """How often pro sees each image, under new noise."""
    draws: int = 5
    """Calibration samples per size. A smaller sample is the first part of a larger one of the same draw."""
    step_size: float = 1.0
    """Lambda of Eq. 4."""
    test_images: int = 0
    """A fixed random part of the test images; 0 for the task's default, -1 for all."""
    bn_images: int = 1000
    """Training images for BatchNorm re-estimation, the same for all rows."""


def run(config: CalibrationSizeConfig) -> None:
    """Compute the rows that are missing; write table, CSV and figure of all rows."""
    for name in config.criteria:
        if name not in ESTIMATORS:
            raise UsageError(f"--criteria {name!r} is not known here; known: {', '.join(ESTIMATORS)}")
    kappa_of(config.depletion)  # is it known at all?
    task = build_task(config)
    tests = max(config.test_images or defaults_of(config.task).test_images, 0)
    common = {"test_images": tests, "bn_images": config.bn_images, "step_size": config.step_size}
    common["pro"] = f"macs, {config.depletion}"  # rows of another ranking are not these
    common["pro"] += f", {config.passes} passes" if config.passes > 1 else ""
    rows = Rows.of(config, task, "calibration-size", **common)
    accuracies = Accuracies(task, config.batch_size, tests, config.bn_images, config.device)
    chains = [(n, b, d) for d in range(config.draws) for n in config.criteria for b in config.balanced]
    for name, balanced, draw_number in tqdm(chains, desc="calibration-size", unit="draw"):
        sizes = _sizes(config, task, balanced, draw_number)
        chain = {"criterion": name, "balanced": balanced, "draw": draw_number}
        missing = rows.missing(
            chain | {"images": size, "macs": target} for size in sizes for target in config.targets
        )
        if not missing:
            continue
        wanted = sorted({row["images"] for row in missing})
        for size, importance, seconds in _calibrated(config, task, chain, wanted):
            scores = freeze_on(task, importance, name)
            if name == "pro":
                costs = network_cost(task.model, task.example, task.ignored)
                scores = scores.ranked(1, config.depletion, costs)
            for row in (row for row in missing if row["images"] == size):
                found, accuracy = accuracies.at_macs(scores, row["macs"])
                values = {"hit": found.hit, "macs_fraction": found.macs, "seconds": seconds}
                rows.write(row, values | {phase: accuracy.get(phase) for phase in ("pruned", "bn")})
    frame = rows.read().astype({"bn": float, "pruned": float})  # empty where the MACs target was missed
    rows.publish(frame, table(frame, pool_size(task)), draw(frame), "calibration-size")


def _sizes(config: CalibrationSizeConfig, task: Task, balanced: bool, number: int) -> list[int]:
    available = pool_size(task)
    largest = available // 2 if balanced else available
    sizes = {*config.images, *(round(portion * available) for portion in config.portions)}
    # All images are the same sample in every draw.
    return sorted(s for s in sizes if s <= largest and not (s == available and number))


def _calibrated(
    config: CalibrationSizeConfig, task: Task, chain: dict, sizes: list[int]
) -> Iterator[tuple[int, PROImportance, float]]:
    """Yield the importance for each size: statistics are sums, so a larger sample only adds the rest."""
    seed, batch_size, total, spent, done = chain["draw"], config.batch_size, None, 0.0, 0
    images, labels = sample(task, seed, sizes[-1], batch_size, chain["balanced"])
    for size in sizes:
        more = [*zip(images[done:size].split(batch_size), labels[done:size].split(batch_size), strict=True)]
        more *= config.passes if chain["criterion"] == "pro" else 1
        # Each part draws noise of its own.
        what = Statistics(ESTIMATORS[chain["criterion"]], size - done, seed * 100_003 + done)
        state, seconds = gather(task, what, more, batch_size)
        part = importance_of(state, step_size=config.step_size)
        if total is None:
            total = part
        else:
            total.merge(part)
        spent, done = spent + seconds, size
        yield size, total, round(spent, 3)


def sample(task: Task, seed: int, count: int, batch_size: int, balanced: bool) -> Batch:
    """Return ``count`` calibration images and labels.

    Args:
        task: Where they come from.
        seed: Of the draw.
        count: How many.
        batch_size: Images that are read at a time.
        balanced: Whether the classes take turns, so that every first part of the sample is balanced too.

    Raises:
        UsageError: A class has too few images.
    """
    drawn = min(pool_size(task), 2 * count + 50 * task.num_classes) if balanced else count
    images, labels = (torch.cat(part) for part in zip(*task.calibration(seed, drawn, batch_size), strict=True))
    if not balanced:
        return images, labels
    order = balanced_order(labels, task.num_classes)
    if len(order) < count:
        raise UsageError(f"no balanced sample of {count} images: a class has too few; choose a smaller --images")
    return images[order[:count]], labels[order[:count]]


def balanced_order(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return indices that take the first image of each class, then the second of each, and so on.

    It ends where a class has no more images; labels that never occur are left out.
    """
    places = [(labels == c).nonzero().view(-1) for c in range(num_classes)]
    places = [place for place in places if len(place)]
    turns = min(len(place) for place in places)
    return torch.stack([place[:turns] for place in places], 1).reshape(-1)


def table(frame: pd.DataFrame, available: int) -> str:
    """Return accuracies and seconds by size, and the loss from few images at each target."""
    targets = sorted(frame.macs.unique(), reverse=True)
    records = []
    keys = ["criterion", "balanced", "images"]
    for (name, balanced, images), group in frame.groupby(keys):
        record = {"criterion": name, "sample": "balanced" if balanced else "random", "images": images}
        record |= {"draws": group.draw.nunique(), "CPU s": f"{group.seconds.mean():.1f}"}
        for target in targets:
            cell = group[group.macs == target]
            missed = int((~cell.hit).sum())
            record[f"MACs {target:g}"] = f"missed {missed} of {len(cell)}" if missed else spread(100 * cell.bn)
        records.append(record)
    lines = [
        github_table(pd.DataFrame(records)),
        "Top-1 accuracy in per cent after BatchNorm re-estimation on the same images for all rows, global "
        "ranking; mean ± standard deviation over draws. `pro` with cost term and depletion, `pro-paper` without. "
        f"CPU seconds of calibration, one process. {available} images are available.",
    ]
    lines += [line for line in (_difference(frame, target) for target in targets) if line]
    return "\n\n".join(lines)


def _difference(frame: pd.DataFrame, target: float) -> str:
    few, many = QUESTION
    part = frame[(frame.criterion == "pro") & ~frame.balanced & (frame.macs == target) & frame.hit]
    wide = part.pivot_table(index="draw", columns="images", values="bn")
    if few not in wide or many not in wide:
        return ""
    loss = 100 * (wide[many] - wide[few]).dropna()
    return (
        f"`pro` at MACs {target:g} loses {loss.mean():+.2f} points with {few} images instead of {many} "
        f"(mean of {len(loss)} draws, the largest loss {loss.max():+.2f})."
    )


def _apart(sizes: list[int]) -> list[int]:
    """Return the sizes whose labels do not run into each other on a logarithmic axis."""
    shown: list[int] = []
    for size in reversed(sizes):
        if not shown or size * 2 <= shown[-1]:
            shown.append(size)
    return shown[::-1]


def draw(frame: pd.DataFrame) -> Figure:
    """Return accuracy against the number of images, a panel per target, and the seconds."""
    targets = sorted(frame.macs.unique(), reverse=True)
    figure, axes = plt.subplots(1, len(targets) + 1, figsize=(4.0 * (len(targets) + 1), 3.7))
    hits = frame[frame.hit]
    for (name, balanced), group in hits.groupby(["criterion", "balanced"]):
        colour = HIGHLIGHT if name == "pro" else COLOURS[0]
        style = {"color": colour, "linestyle": "--" if balanced else "-", "marker": "s" if balanced else "o"}
        style |= {"markersize": 4, "linewidth": 1.6, "label": f"{name}, {'balanced' if balanced else 'random'}"}
        for axis, target in zip(axes, targets, strict=False):
            curve = 100 * group[group.macs == target].groupby("images").bn.agg(["mean", "std"])
            axis.errorbar(curve.index, curve["mean"], yerr=curve["std"].fillna(0), capsize=2, **style)
        curve = group.groupby("images").seconds.mean()
        axes[-1].plot(curve.index, curve, **style)
    for axis, title in zip(axes, [*(f"MACs {t:g}" for t in targets), "calibration"], strict=True):
        axis.set_xscale("log")
        axis.set_xticks(_apart(sorted(frame.images.unique())))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_xlabel("calibration images")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("top-1 (%), BatchNorm re-estimated")
    axes[-1].set_yscale("log")
    axes[-1].set_ylabel("CPU seconds")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.tight_layout()
    return figure
