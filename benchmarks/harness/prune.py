"""Pruning a fresh copy of a network with Torch-Pruning, at a ratio."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.harness.scores import GroupKey, prunable_groups
from ippro_tp import Compensation, attention_heads, update_attention
from ippro_tp.calibration.losses import main_output
from ippro_tp.compensation.step import CompensationReport
from ippro_tp.pruning.counter import count

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class PruneConfig:
    """How Torch-Pruning is used; the same for all arms."""

    max_pruning_ratio: float = 0.9
    """Largest ratio per layer and overall."""
    round_to: int = 0
    """Widths are multiples of this; 0 for any width."""


@dataclass
class Pruned:
    """A pruned network, its size, and which channels of each group's root went."""

    model: nn.Module
    macs: float
    params: float
    widths: dict[str, int]
    removed: dict[GroupKey, list[int]] = field(default_factory=dict)
    compensation: CompensationReport | None = None


def build_pruner(
    model: nn.Module,
    example: Tensor,
    ignored: tuple[str, ...],
    importance: Callable,
    ratio: float = 0.5,
    scope: str = "local",
    config: PruneConfig | None = None,
    ratios: dict[str, float] | None = None,
) -> tp.pruner.BasePruner:
    """Return a pruner over ``model`` itself, with its own dictionaries (TP's defaults are shared).

    Args:
        model: The network; it is pruned in place by :func:`apply`.
        example: One input, ``[1, C, H, W]``.
        ignored: Names of layers that keep their outputs.
        importance: A TP importance.
        ratio: Fraction of channels to remove.
        scope: ``"local"`` or ``"global"``.
        config: See :class:`PruneConfig`.
        ratios: Ratios of single layers, by name.
    """
    config = config or PruneConfig()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters")
        return tp.pruner.BasePruner(
            model,
            (example,),
            importance=importance,
            global_pruning=scope == "global",
            pruning_ratio=ratio,
            pruning_ratio_dict={model.get_submodule(name): value for name, value in (ratios or {}).items()},
            max_pruning_ratio=config.max_pruning_ratio,
            round_to=config.round_to or None,
            ignored_layers=[model.get_submodule(name) for name in ignored],
            in_channel_groups={},
            out_channel_groups={},
            num_heads=attention_heads(model),
            channel_groups={},
        )


def apply(pruner: tp.pruner.BasePruner, compensation: Compensation | None = None) -> CompensationReport | None:
    """Remove the channels, with or without compensation: the only place where ``step`` is called."""
    report = None
    if compensation is None:
        pruner.step()
    else:
        report = compensation.step(pruner)
    update_attention(pruner)
    return report


def size(model: nn.Module, example: Tensor) -> tuple[float, float]:
    """Return MACs and parameters, as the package counts them."""
    counts = count(model, example)
    return counts.macs, counts.params


def widths(model: nn.Module) -> dict[str, int]:
    """Return the number of outputs of each convolution and Linear layer."""
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear))
    return {name: m.out_features if isinstance(m, nn.Linear) else m.out_channels for name, m in layers}


def staggered_ratios(pruner: tp.pruner.BasePruner, ratio: float, largest: float) -> dict[str, float]:
    """Return ratios per root layer that remove ``ratio`` of the channels on average, in single channels.

    A uniform local ratio removes a channel of *every* layer at a time, so that the MACs of a net with narrow
    layers fall in large steps. Here group number ``g`` rounds ``ratio * channels`` up or down by the ``g``-th
    term of the golden-ratio sequence. It knows nothing of the scores: all arms get the same widths.
    """
    ratios = {}
    for number, group in enumerate(prunable_groups(pruner)):
        module = group[0].dep.target.module
        channels = len(group[0].idxs) // pruner._get_channel_groups(group)
        wanted = math.floor(channels * ratio + (number + 1) * GOLDEN % 1)
        removed = min(wanted, math.floor(channels * largest), channels - 1)
        # TP keeps int(channels * (1 - ratio)): half a channel of slack makes the rounding safe.
        ratios[pruner.DG._module2name[module]] = max(removed - 0.5, 0) / channels
    return ratios


def prune(
    model: nn.Module,
    example: Tensor,
    ignored: tuple[str, ...],
    importance: Callable,
    ratio: float,
    scope: str,
    config: PruneConfig,
    stagger: bool = False,
    compensation: Compensation | None = None,
    ratios: dict[str, float] | None = None,
) -> Pruned:
    """Prune a copy of ``model`` and check that the result runs.

    Args:
        model: The unpruned network; unchanged.
        example: One input, ``[1, C, H, W]``.
        ignored: Names of layers that keep their outputs.
        importance: A TP importance, usually frozen scores.
        ratio: Fraction of channels to remove.
        scope: ``"local"`` or ``"global"``.
        config: See :class:`PruneConfig`.
        compensation: Calibrated on ``model``; folds removed channels into the layers that read them.
        stagger: In the local scope, round each group's ratio by :func:`staggered_ratios`.
        ratios: Ratios of single groups, by the name of their root layer.
    """
    model = copy.deepcopy(model)
    importance = importance.for_scope(scope) if hasattr(importance, "for_scope") else importance
    pruner = build_pruner(model, example, ignored, importance, ratio, scope, config, ratios)
    if stagger:
        ratios = staggered_ratios(pruner, ratio, config.max_pruning_ratio)
        pruner = build_pruner(model, example, ignored, importance, ratio, scope, config, ratios)
    if hasattr(importance, "bind"):
        importance.bind(pruner)
    report = apply(pruner, compensation)
    model.eval().zero_grad()
    macs, params = size(model, example)
    with torch.no_grad():
        outputs = main_output(model(example))
    if not outputs.isfinite().all():
        raise ArithmeticError(f"the network pruned at ratio {ratio} returns values that are not finite")
    removed = {(name, is_out): list(idxs) for name, is_out, idxs in pruner.pruning_history()}
    return Pruned(model, macs, params, widths(model), removed, report)
