"""``magnitude``: how far criteria follow the size of the weights (Fig. 2), also where it means nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.criteria.registry import find_criterion
from benchmarks.harness.figures import HIGHLIGHT
from benchmarks.harness.prune import build_pruner
from benchmarks.harness.scores import FrozenScores, GroupKey, group_key, prunable_groups
from benchmarks.harness.tables import github_table, spread
from benchmarks.paper.rescale import KINDS, output_difference, rescaled
from benchmarks.paper.rows import AnalysisConfig, Rows
from benchmarks.paper.scoring import arm_scores, kept_channels
from benchmarks.tasks import Task, build_task, defaults_of
from ippro_tp.graph.groups import read_group
from ippro_tp.layers import is_channel_norm

CRITERIA = (
    "l1", "l2", "bn", "lamp", "fpgm", "taylor", "hessian", "ispasp", "pro", "pro-paper-lam1", "pro-paper-lam0.001",
)  # fmt: skip
ORIGINAL = "none"
MEASURES = ("filter", "norm")


@dataclass(frozen=True)
class MagnitudeConfig(AnalysisConfig):
    """Norms of pruned and kept filters (the paper's Fig. 2), and scores before and after a rescaling."""

    criteria: tuple[str, ...] = CRITERIA
    """Arms, as ``compare`` calls them."""
    calibration_images: int = 0
    """Training images for calibration; 0 for the task's default."""
    ratio: float = 0.5
    """Part of the channels of each layer that counts as pruned."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the factors of the rescaling; the calibration sample is always that of seed 0."""


def run(config: MagnitudeConfig) -> None:
    """Compute the rows that are missing; write table, CSV and figure of all rows."""
    task = build_task(config)
    images = config.calibration_images or defaults_of(config.task).calibration_images
    rows = Rows.of(config, task, "magnitude", calibration_images=images, ratio=config.ratio)
    for name in config.criteria:
        find_criterion(name)
    before: dict[str, FrozenScores] = {}

    def original(name: str) -> FrozenScores:
        if name not in before:
            before[name] = arm_scores(config, task, images).scores(name, "none", 0)[0]
        return before[name]

    norms = channel_norms(task)
    for row in rows.missing({"rescaled": ORIGINAL, "criterion": n, "factors": 0} for n in config.criteria):
        rows.write(row, norm_statistics(original(row["criterion"]), norms, config.ratio))
    for kind in KINDS:
        for seed in config.seeds:
            missing = rows.missing({"rescaled": kind, "criterion": n, "factors": seed} for n in config.criteria)
            if not missing:
                continue
            model = rescaled(task, kind, seed)
            runner = arm_scores(config, dataclasses.replace(task, model=model), images)
            change = {"outputs": output_difference(task, model)}
            for row in tqdm(missing, desc=f"rescaled {kind}, {seed}", unit="criterion"):
                after = runner.scores(row["criterion"], "none", 0)[0]
                rows.write(row, invariance(original(row["criterion"]), after) | change)
    frame = rows.read()
    frame["criterion"] = pd.Categorical(frame.criterion, list(dict.fromkeys([*CRITERIA, *frame.criterion])))
    rows.publish(frame.drop(columns="norms"), table(frame, config.ratio), draw(frame), "magnitude")


def channel_norms(task: Task) -> dict[str, dict[GroupKey, Tensor]]:
    """Return the L2 norms of each group's channels, over all layers that write the channel.

    Returns:
        ``"filter"``: of the rows of convolutions and Linear layers; ``"norm"``: of (gamma, beta), for groups
        that have any.
    """
    pruner = build_pruner(task.model, task.example, task.ignored, lambda group: None)
    found: dict[str, dict[GroupKey, Tensor]] = {measure: {} for measure in MEASURES}
    for group in prunable_groups(pruner):
        record = read_group(group)
        for measure in MEASURES:
            squares = torch.zeros(record.width)
            for layer in record.producers:
                module = task.model.get_submodule(layer.name)
                if is_channel_norm(module) == (measure == "norm"):
                    squares.index_add_(0, layer.root, _row_squares(module)[layer.index])
            if squares.any():
                found[measure][group_key(group)] = squares.sqrt()
    return found


def _row_squares(module: nn.Module) -> Tensor:
    weight = module.weight.detach().cpu()
    if weight.ndim == 1:
        return weight.square() + module.bias.detach().cpu().square()
    return weight.flatten(1).square().sum(1)


def norm_statistics(scores: FrozenScores, norms: dict[str, dict[GroupKey, Tensor]], ratio: float) -> dict:
    """Return how the norms of pruned and kept channels differ, each norm relative to the mean of its group.

    Returns:
        For each measure: ``*_ratio``, mean norm of the pruned over mean norm of the kept channels; ``*_auc``,
        the probability that a pruned channel has the smaller norm of a pruned and a kept one; and under
        ``norms`` the norms themselves.
    """
    values: dict = {"norms": {}}
    for measure, groups in norms.items():
        kept, pruned = [], []
        for key, norm in groups.items():
            if scores.scores.get(key) is not None:
                mask = kept_channels(scores.scores[key], ratio)
                relative = (norm / norm.mean()).double()
                kept.append(relative[mask])
                pruned.append(relative[~mask])
        if not kept:
            continue
        high, low = torch.cat(kept).numpy(), torch.cat(pruned).numpy()
        values[f"{measure}_ratio"] = float(low.mean() / high.mean())
        wins = stats.mannwhitneyu(high, low).statistic
        values[f"{measure}_auc"] = float(wins / (len(high) * len(low)))
        values["norms"][measure] = {"kept": np.round(high, 4).tolist(), "pruned": np.round(low, 4).tolist()}
    return values


def invariance(before: FrozenScores, after: FrozenScores) -> dict[str, float]:
    """Return how much scores changed: Spearman's correlation and the largest relative change of a score.

    Returns:
        ``spearman``: mean over groups; ``spearman_lowest``; ``spearman_pooled``: over all channels; ``change``:
        the largest over groups of (largest change / largest score).
    """
    pairs = [(s, after.scores[k]) for k, s in before.scores.items() if s is not None]
    each = [float(stats.spearmanr(a.numpy(), b.numpy()).statistic) for a, b in pairs]
    pooled = stats.spearmanr(*(torch.cat(side).numpy() for side in zip(*pairs, strict=True))).statistic
    change = max(float((b.double() - a.double()).abs().max() / a.double().abs().max()) for a, b in pairs)
    return {
        "spearman": float(np.mean(each)),
        "spearman_lowest": min(each),
        "spearman_pooled": float(pooled),
        "change": change,
    }


def table(frame: pd.DataFrame, ratio: float) -> str:
    """Return one table for the rescalings and one for the norms."""
    changed, norms = [], []
    for name, group in frame.groupby("criterion", observed=True):
        record = {"criterion": name}
        for kind in KINDS:
            part = group[group.rescaled == kind]
            record |= {
                f"{kind}, groups": spread(part.spearman, "{:.3f}"),
                f"{kind}, pooled": spread(part.spearman_pooled, "{:.3f}"),
                f"{kind}, change": f"{part.change.max():.1g}" if len(part) else "·",
            }
        changed.append(record)
        part = group[group.rescaled == ORIGINAL]
        record = {"criterion": name}
        for measure, title in (("filter", "‖filter‖"), ("norm", "‖(gamma, beta)‖")):
            if f"{measure}_auc" in part:
                record[f"{title}: pruned / kept"] = spread(part[f"{measure}_ratio"], "{:.2f}")
                record[f"{title}: AUC"] = spread(part[f"{measure}_auc"], "{:.2f}")
        norms.append(record)
    return (
        f"{github_table(pd.DataFrame(changed))}\n\nScores before and after a rescaling by 10^U(-2, 2) per channel "
        f"that leaves the outputs as they are (largest relative change {frame.outputs.max():.0e}): Spearman's "
        "correlation within groups and over all channels, and the largest change of a score relative to the "
        f"largest score of its group.\n\n{github_table(pd.DataFrame(norms))}\n\nNorms, relative to the mean of "
        f"the group, of the {ratio:.0%} of each group that is pruned and of the rest: ratio of the means, and the "
        "probability that of a pruned and a kept channel the pruned one has the smaller norm (1: the criterion is "
        "the norm; 0.5: it has nothing to do with it)."
    )


def draw(frame: pd.DataFrame) -> Figure:
    """Return distributions of the norms of kept and pruned filters, and the correlations after rescaling."""
    original = frame[frame.rescaled == ORIGINAL].set_index("criterion").sort_index()
    names = list(original.index)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 0.38 * len(names) + 1.6), sharey=True)
    for place, name in enumerate(names):
        for side, offset, colour in (("kept", 0.17, "#0072B2"), ("pruned", -0.17, HIGHLIGHT)):
            style = {"facecolor": colour, "alpha": 0.65, "linewidth": 0.6}
            left.boxplot(
                [original.norms[name]["filter"][side]],
                positions=[place + offset],
                orientation="horizontal",
                widths=0.28,
                manage_ticks=False,
                showfliers=False,
                patch_artist=True,
                boxprops=style,
                medianprops={"color": "black"},
            )
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("norm of the filter / mean of its group")
    left.set_title("kept (blue) and pruned (orange) filters", fontsize=10)
    looks = ({"marker": "o", "color": "black"}, {"marker": "s", "color": "#009E73", "fillstyle": "none"})
    for kind, look, width in zip(KINDS, looks, (5, 9), strict=True):
        part = frame[frame.rescaled == kind].groupby("criterion", observed=True).spearman.mean()
        places = part.reindex(names)
        right.plot(places, range(len(names)), linestyle="", label=kind, markersize=width, **look)
    right.set_xlabel("Spearman's correlation of scores before and after rescaling")
    right.set_title("rescaling that leaves the function as it is", fontsize=10)
    right.axvline(1, color="0.6", linewidth=1, linestyle=(0, (1, 2)))
    right.legend(loc="center left", frameon=False, fontsize=9)
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.25)
    figure.tight_layout()
    return figure
