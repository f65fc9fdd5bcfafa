"""A step of Torch-Pruning's pruner: whose it is, and the groups that it would leave whole."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor

from ..estimators.ranking import unit_scores
from .groups import groups_of


def running_pruner(graph: Any) -> Any | None:
    """The pruner of ``graph`` whose step is asking for scores, ``None`` outside of one.

    Torch-Pruning calls an importance with a group alone, and a group knows its graph but not its pruner. So the
    calls that lead here are searched for a method of a pruner that has this graph.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if isinstance(owner, tp.pruner.BasePruner) and getattr(owner, "DG", None) is graph:
                return owner
        frame = frame.f_back
    return None


def ranks_everything(pruner: Any) -> bool:
    """Whether a pruner ranks all of its groups against each other, under one ratio."""
    return bool(pruner.global_pruning and not pruner.isomorphic and not pruner.pruning_ratio_dict)


@dataclass(frozen=True, eq=False)
class Asked:
    """A group as a step ranks it.

    Attributes:
        key: name of its root.
        scores: ``(width,)`` on the CPU, in the order of the group that asks.
        tied: ``(width,)`` int64, the number of the unit of each channel, where some only go together.
    """

    key: str
    scores: Tensor
    tied: Tensor | None = None


def keep_the_best(pruner: Any, ask: Callable[[Any], Asked | None]) -> dict[str, Tensor]:
    """Other scores where a global step would remove more of a group than ``max_pruning_ratio`` of its units.

    Torch-Pruning looks at ``max_pruning_ratio`` before a step only, and skips a group that it would remove as a
    whole. So the best units of each group, as many as the ratio leaves, are raised above all that may go; then
    others go in their place. A ratio of 1 leaves no unit: where a group would be skipped there is a warning.

    Args:
        pruner: for which :func:`ranks_everything`; inside its step, or before.
        ask: gives the scores of a group; ``None`` if it has none.

    Returns:
        ``(width,)`` scores by key, for all groups, or for none where no group is at risk.
    """
    places, heads = [], []
    for group in groups_of(pruner):
        if pruner._check_pruning_ratio(group) and (asked := ask(group)) is not None:
            whole_heads = _whole_heads(pruner, group)
            one = _places(pruner, group, asked)
            ranked_only = whole_heads and not pruner.prune_head_dims  # its places are counted, and stay
            places.append(replace(one, kept=0) if ranked_only else one)
            if whole_heads:
                heads.append(_heads(pruner, group, asked, whole_heads))
    ratio = pruner.per_step_pruning_ratio[min(pruner.current_step, pruner.iterative_steps)]
    initial = pruner._scope_initial_channels.get("DEFAULT_SCOPE", sum(len(one.counted) for one in places))
    found = _raised(places, initial, ratio, pruner.max_pruning_ratio)
    if heads and not pruner.prune_head_dims:
        ratio = pruner.per_step_head_pruning_ratio[min(pruner.current_step, pruner.iterative_steps)]
        found |= _raised(heads, pruner.initial_total_heads, ratio, pruner.max_pruning_ratio)
    return found


@dataclass(frozen=True, eq=False)
class _Scope:
    """A group in one ranking: what is counted of it, what goes together, how many units have to stay."""

    key: str
    scores: Tensor
    counted: Tensor
    unit: Tensor
    kept: int


def _places(pruner: Any, group: Any, asked: Asked) -> _Scope:
    """Channels, or places of convolution groups and heads; Torch-Pruning counts tied positions one by one."""
    width = len(asked.scores)
    parts = pruner._get_channel_groups(group)
    place = torch.arange(width) % (width // parts)
    counted = unit_scores(asked.scores, place)
    unit = place if asked.tied is None else asked.tied
    units = int(unit.max()) + 1
    root = group[0][0]
    out = pruner.DG.is_out_channel_pruning_fn(root.handler)
    now = (pruner.DG.get_out_channels if out else pruner.DG.get_in_channels)(root.target.module)
    initial = (pruner.layer_init_out_ch if out else pruner.layer_init_in_ch).get(root.target.module, now)
    kept = math.ceil((1 - pruner.max_pruning_ratio) * units * initial / now - 1e-9)
    if pruner.round_to:  # it rounds channels down to a multiple
        kept = max(kept, math.ceil(pruner.round_to * units / width))
    return _Scope(asked.key, asked.scores, counted, unit, min(max(kept, 1), units))


def _whole_heads(pruner: Any, group: Any) -> int:
    """How many heads of a group are ranked as wholes; 0 if none."""
    attention, layers = pruner._is_atten_group(group)
    if not attention or not pruner.prune_num_heads or pruner.get_target_head_pruning_ratio(layers[0]) <= 0:
        return 0
    return int(max(pruner.num_heads[layer] for layer in layers))


def _heads(pruner: Any, group: Any, asked: Asked, heads: int) -> _Scope:
    unit = torch.arange(len(asked.scores)) // (len(asked.scores) // heads)
    kept = math.ceil((1 - pruner.max_pruning_ratio) * heads - 1e-9)
    return _Scope(asked.key, asked.scores, unit_scores(asked.scores, unit), unit, max(kept, 1))


def _raised(groups: Sequence[_Scope], initial: int, ratio: float, largest: float) -> dict[str, Tensor]:
    """Scores with the best units of each group above all others, if a group is at risk."""
    if not groups:
        return {}
    ranked = torch.cat([group.counted for group in groups]).sort().values
    removed = len(ranked) - int(initial * (1 - ratio))
    if not 0 < removed < len(ranked):
        return {}
    by_unit = [unit_scores(group.scores, group.unit) for group in groups]
    staying = [int((found > ranked[removed - 1]).sum()) for found in by_unit]
    if largest >= 1:
        whole = [group.key for group, count in zip(groups, staying, strict=True) if count < min(group.kept, 1)]
        if whole:
            warnings.warn(
                f"all channels of {len(whole)} groups ({whole[0]!r} is one) rank lowest in this step, and "
                "Torch-Pruning leaves such groups whole. With max_pruning_ratio=0.9, say, they are pruned that "
                "far.",
                RuntimeWarning,
                stacklevel=6,
            )
        return {}
    if all(count >= group.kept for group, count in zip(groups, staying, strict=True)):
        return {}
    best = [found.topk(group.kept).indices for found, group in zip(by_unit, groups, strict=True)]
    # Raised scores keep their order, and differ: Torch-Pruning removes all of equal score.
    order = (
        torch.cat([found[own] for found, own in zip(by_unit, best, strict=True)]).argsort(stable=True).argsort()
    )
    top = ranked[-1].clamp_min(0) + (ranked[-1] <= 0)
    values = (top * (1 + (order + 1) / len(order))).split([len(own) for own in best])
    found = {}
    for group, own, value, scores in zip(groups, best, values, by_unit, strict=True):
        raised = torch.full_like(scores, -torch.inf).index_copy(0, own, value.to(scores))[group.unit]
        found[group.key] = torch.where(raised > 0, raised, group.scores)
    return found
