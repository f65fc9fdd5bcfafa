"""``lam``: does the order of Eq. 4 depend on its step size lambda, and why (Fig. 7)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from benchmarks.harness.figures import COLOURS
from benchmarks.harness.tables import github_table
from benchmarks.paper.rows import AnalysisConfig, Rows
from benchmarks.paper.scoring import (
    Statistics,
    freeze_on,
    importance_of,
    kept_channels,
    part,
    pool_size,
    projective_terms,
    statistics,
)
from benchmarks.tasks import build_task

REFERENCE = 1.0


@dataclass(frozen=True)
class LamConfig(AnalysisConfig):
    """Compare the order that Eq. 4 gives at each step size with the order at lambda = 1 (the paper's Fig. 7)."""

    step_sizes: tuple[float, ...] = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)
    """Values of lambda; 0 is the limit."""
    targets: tuple[Literal["conv", "norm"], ...] = ("conv", "norm")
    """What F is: filters, or (gamma, beta) of the BatchNorm that follows."""
    modes: tuple[Literal["eval", "train"], ...] = ("eval", "train")
    """Mode of BatchNorm while gradients are gathered."""
    images: int = 0
    """Calibration images; 0 for all that are available."""
    ratio: float = 0.5
    """Part of the channels that is removed, for the kept indices."""
    seed: int = 0
    """Seed of the calibration sample."""


def run(config: LamConfig) -> None:
    """Compute the rows that are missing; write table, CSV and figure of all rows."""
    task = build_task(config)
    images = config.images or pool_size(task)
    rows = Rows.of(config, task, "lam", images=images, seed=config.seed, ratio=config.ratio, reference=REFERENCE)
    for mode in config.modes:
        for target in config.targets:
            varied = ({"mode": mode, "target": target, "step_size": float(s)} for s in config.step_sizes)
            missing = rows.missing(varied)
            if not missing:
                continue
            state = statistics(config, task, config.out, Statistics("paper", images, config.seed, mode))

            def scores(step: float, state=state, target=target) -> list[Tensor]:
                return part(freeze_on(task, importance_of(state, target, step), "paper"))

            terms = projective_terms(importance_of(state, target), copy.deepcopy(task.model))
            terms, reference = torch.cat(list(terms.values()), 1), scores(REFERENCE)
            for row in missing:
                step = row["step_size"]
                rows.write(row, agreement(reference, scores(step), config.ratio) | breaks(terms, step))
    frame = rows.read()
    rows.publish(frame, table(frame, images, rows.common["batch_size"]), draw(frame), "lam")


def agreement(first: list[Tensor], second: list[Tensor], ratio: float) -> dict[str, float]:
    """Return how well two lists of scores per group agree.

    Returns:
        ``tau``: Kendall's tau, mean over groups; ``tau_lowest``: its minimum; ``tau_pooled``: over all channels.
        ``kept``: the part of the kept channels that both keep, when ``ratio`` of each group is removed;
        ``kept_pooled``: the same when it is removed of all channels in one ranking.
    """
    pairs = list(zip(first, second, strict=True))
    taus = [float(stats.kendalltau(a.numpy(), b.numpy()).statistic) for a, b in pairs]
    both = (torch.cat(first), torch.cat(second))
    shared = [both_keep(a, b, ratio) for a, b in pairs]
    total = sum(kept_channels(a, ratio).sum().item() for a, _ in pairs)
    pooled = both_keep(*both, ratio) / kept_channels(both[0], ratio).sum().item()
    return {
        "tau": float(np.mean(taus)),
        "tau_lowest": min(taus),
        "tau_pooled": float(stats.kendalltau(both[0].numpy(), both[1].numpy()).statistic),
        "kept": sum(shared) / total,
        "kept_pooled": pooled,
    }


def both_keep(first: Tensor, second: Tensor, ratio: float) -> int:
    """Return how many channels stay under both scores."""
    return int((kept_channels(first, ratio) & kept_channels(second, ratio)).sum())


def breaks(terms: Tensor, step_size: float) -> dict[str, float]:
    r"""Return how many channels have left the limit of small steps.

    Args:
        terms: ``(4, channels)``, see :func:`~benchmarks.paper.scoring.projective_terms`.
        step_size: lambda.

    Returns:
        ``channels``; ``crossed``: those with a negative denominator :math:`\lVert F\rVert - \lambda d`;
        ``changed``: those whose denominator has less than half or more than twice the size of its start;
        ``second_order``: those whose numerator's term in lambda squared outweighs the one in lambda.
    """
    norm, dot, grad, offset = terms
    denominator = norm - step_size * offset
    first, second = 2 * (norm * offset - dot).abs(), step_size * (grad.square() - offset.square()).abs()
    changed = (denominator.abs() < norm / 2) | (denominator.abs() > norm * 2)
    return {
        "channels": len(norm),
        "crossed": int((denominator < 0).sum()),
        "changed": int(changed.sum()),
        "second_order": int((second > first).sum()),
    }


def table(frame: pd.DataFrame, images: int, batch_size: int) -> str:
    """Return one row per way and step size."""
    frame = frame.sort_values(["mode", "target", "step_size"])
    shown = pd.DataFrame(
        {
            "BatchNorm": frame["mode"],
            "F": frame.target.map({"conv": "filter", "norm": "(gamma, beta)"}),
            "λ": frame.step_size.map("{:g}".format),
            "tau, groups": frame.tau.map("{:.3f}".format),
            "lowest": frame.tau_lowest.map("{:.3f}".format),
            "tau, pooled": frame.tau_pooled.map("{:.3f}".format),
            "kept, groups": frame.kept.map("{:.3f}".format),
            "kept, pooled": frame.kept_pooled.map("{:.3f}".format),
            "crossed": frame.crossed,
            "changed": frame.changed,
            "second order": frame.second_order,
        }
    )
    return (
        f"{github_table(shown)}\n\nAgreement with λ = {REFERENCE:g}: Kendall's tau and the part of the kept "
        "channels that both keep (chance: 0 and 0.5), within groups and over all "
        f"{frame.channels.max()} channels. Crossed: channels whose denominator ‖F‖ - λd is negative; changed: its "
        "size is more than twice or less than half of ‖F‖; second order: the numerator's term in λ² outweighs the "
        f"one in λ. Gradients of the mean cross-entropy of batches of {batch_size}, summed over {images} images."
    )


def draw(frame: pd.DataFrame) -> Figure:
    """Return tau, the kept part and the channels that have left the limit, against lambda."""
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.6))
    smallest = frame.step_size[frame.step_size > 0].min()
    zero = smallest / 10
    for number, ((mode, target), group) in enumerate(frame.groupby(["mode", "target"])):
        group = group.sort_values("step_size")
        steps = group.step_size.where(group.step_size > 0, zero)
        name = f"{'filter' if target == 'conv' else '(gamma, beta)'}, {mode} mode"
        style = {"color": COLOURS[number], "marker": "osDv"[number % 4], "markersize": 4, "linewidth": 1.5}
        axes[0].plot(steps, group.tau, label=name, **style)
        axes[1].plot(steps, group.kept, **style)
        axes[2].plot(steps, group.crossed / group.channels, **style)
        axes[2].plot(steps, group.second_order / group.channels, **(style | {"linestyle": ":", "linewidth": 1.2}))
    for axis, title, chance in zip(
        axes,
        ("Kendall's tau with λ = 1, mean over groups", "kept channels shared with λ = 1", "part of the channels"),
        (0.0, 0.5, None),
        strict=True,
    ):
        axis.set_xscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("λ")
        axis.grid(alpha=0.25)
        if chance is not None:
            axis.axhline(chance, color="0.5", linewidth=1, linestyle=(0, (1, 2)))
            axis.axvline(REFERENCE, color="0.7", linewidth=1)
        if (frame.step_size == 0).any():
            ticks = 10.0 ** np.arange(np.log10(smallest), np.log10(frame.step_size.max()) + 0.5, 2)
            axis.set_xticks([zero, *ticks], ["0", *(f"$10^{{{round(np.log10(t))}}}$" for t in ticks)])
            axis.minorticks_off()
    axes[2].text(0.03, 0.95, "solid: denominator crossed 0\ndotted: λ² outweighs λ", transform=axes[2].transAxes,
                 va="top", fontsize=8)  # fmt: skip
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.tight_layout()
    return figure
