"""What Torch-Pruning's next step will rank in a group, and how many of that it will keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from ..records import GroupRecord


@dataclass(frozen=True, eq=False)
class Ties:
    """Which positions of a group can only be removed together, and how many such units will stay.

    Attributes:
        unit: ``(width,)`` int64, the unit of each position.
        units: how many there are.
        kept: the number that Torch-Pruning will keep; ``None`` if that is not known beforehand.
    """

    unit: Tensor
    units: int
    kept: int | None


def ties_of(pruner: Any | None, group: Any, record: GroupRecord, positions: Tensor) -> list[Ties]:
    """The units that Torch-Pruning will rank: channels, channels at one place of each convolution group, or heads.

    Where it ranks both head dimensions and heads there are two entries. Scores for them can be added: its mean
    over heads is blind to a difference between heads, and the other way round.

    Args:
        pruner: the pruner that will ask; ``None`` if it is not known, and then no size is.
        group: the ``torch_pruning`` group that is asked for.
        record: the full group, as it was calibrated.
        positions: ``(len(group[0].idxs),)`` where in ``record`` each asked channel stands.
    """
    # Torch-Pruning numbers tied channels as they stand in the group that asks.
    if record.tied is not None:
        unit = torch.unique(record.tied, return_inverse=True)[1]
        alone = pruner is not None and not pruner.global_pruning and not pruner.isomorphic
        kept = _kept(pruner, group, record.width) if alone else None
        return [Ties(unit, record.units, None if kept is None else kept * record.units // record.width or None)]
    place = torch.arange(record.width)
    if positions.numel() == record.width:
        place[positions] = torch.arange(record.width)
    if pruner is None:
        size = record.width // channel_groups(record, group._DG)
        return [Ties(place % size, size, None)]
    size = record.width // pruner._get_channel_groups(group)
    alone = not pruner.global_pruning and not pruner.isomorphic
    dims = Ties(place % size, size, _kept(pruner, group, size) if alone else None)
    attention, layers = pruner._is_atten_group(group)
    if not attention or not pruner.prune_num_heads:
        return [dims]
    ratio = pruner.get_target_head_pruning_ratio(layers[0])
    if ratio <= 0:
        return [dims]
    heads = max(pruner.num_heads[layer] for layer in layers)
    kept = heads - math.ceil(ratio * heads)
    # Under grouped-query attention heads are ranked within each key-value head.
    alone = alone and min(pruner.num_heads[layer] for layer in layers) == heads
    by_head = Ties(place // (record.width // heads), heads, kept if alone and 0 < kept < heads else None)
    return [dims, by_head] if pruner.prune_head_dims else [by_head]


def channel_groups(record: GroupRecord, graph: Any) -> int:
    """Into how many parts Torch-Pruning ties the channels of a group, as far as the layers themselves tell."""
    parts = [1]
    for side, layers in (("out", record.producers), ("in", record.consumers)):
        for layer in layers:
            module = graph.model.get_submodule(layer.name)
            if isinstance(module, _ConvNd) and module.groups == module.out_channels:
                continue  # depthwise: nothing is tied
            pruner = graph.get_pruner_of_module(module)
            count = pruner.get_out_channel_groups if side == "out" else pruner.get_in_channel_groups
            parts.append(count(module))
    return max(parts)


def units_of(pruner: Any | None, graph: Any, record: GroupRecord) -> Tensor | None:
    """``(width,)`` int64, which channels of a full group get one rank; ``None`` where each has its own.

    Channels that only go together are one unit, and so are those at one place of each head or convolution group.
    Where a pruner ranks whole heads all are one: what a head is worth is not for the ranking of its places to
    change.

    Args:
        pruner: the pruner that will ask, if it is known: heads and groups may be its user's.
        graph: the dependency graph.
        record: the group.
    """
    if pruner is None:
        parts = channel_groups(record, graph)
    else:
        sides = ((record.producers, pruner.out_channel_groups), (record.consumers, pruner.in_channel_groups))
        named = [(graph.model.get_submodule(layer.name), given) for layers, given in sides for layer in layers]
        if pruner.prune_num_heads and any(module in pruner.num_heads for module, _ in named):
            return torch.zeros(record.width, dtype=torch.long)
        parts = max([1, *(given.get(module, 1) for module, given in named)])
    if record.tied is None:
        return torch.arange(record.width) % (record.width // parts) if parts > 1 else None
    # Heads divide what is tied, not the positions: a query, its key and its value stand at one place.
    together: Tensor = torch.unique(record.tied, return_inverse=True)[1]
    return together % (record.units // parts) if parts > 1 and record.units % parts == 0 else together


def _kept(pruner: Any, group: Any, units: int) -> int | None:
    """How many units the pruner's present step keeps, or else its next: ``None`` if neither removes any.

    Inside ``step()`` the pruner already counts the step; a call before it means the step to come.
    """
    for step in (pruner.current_step, pruner.current_step + 1):
        if step <= pruner.iterative_steps:
            kept = _kept_at(pruner, group, units, step)
            if 0 < kept < units:
                return kept
    return None


def _kept_at(pruner: Any, group: Any, units: int, step: int) -> int:
    """The number of units that ``BasePruner._prune`` keeps of a group that is ranked alone.

    ``max_pruning_ratio`` caps ratios of ``pruning_ratio_dict`` only, and ``round_to`` counts all channels while
    what is removed is counted in units: both as Torch-Pruning 1.6 does.
    """
    scope, ratio = pruner.DG._module2name[group[0][0].source.module], pruner.per_step_pruning_ratio[step]
    for dep, _ in group:
        sides = ((dep.source.module, dep.trigger), (dep.target.module, dep.handler))
        own = [m for m, fn in sides if m in pruner._layer_to_scope and pruner.DG.is_out_channel_pruning_fn(fn)]
        if own:
            scope = pruner._layer_to_scope[own[0]][0]
            ratio = pruner.get_target_pruning_ratio(own[0], step=step)
            break
    removed = units - int(pruner._scope_initial_channels.get(scope, units) * (1 - ratio))
    if removed > 0 and pruner.round_to:
        root = group[0][0]
        out = pruner.DG.is_out_channel_pruning_fn(root.handler)
        channels = (pruner.DG.get_out_channels if out else pruner.DG.get_in_channels)(root.target.module)
        removed = pruner._round_to(removed, channels, pruner.round_to)
    return units - max(removed, 0)
