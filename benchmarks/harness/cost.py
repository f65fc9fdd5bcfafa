"""The cost axis: the package's cost of a channel, for the groups of any pruner and so for every arm."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from benchmarks.harness.prune import build_pruner
from benchmarks.harness.scores import GroupKey, group_key, prunable_groups
from ippro_tp.calibration.work import measure_work
from ippro_tp.graph.cost import group_cost as record_cost
from ippro_tp.graph.groups import read_group


def network_cost(
    model: nn.Module, example: Tensor, ignored: tuple[str, ...], unit: str = "macs"
) -> dict[GroupKey, float]:
    """Return :func:`group_cost` of ``model``, which is left as it is.

    Args:
        model: The unpruned network.
        example: One input, ``[1, C, H, W]``.
        ignored: Names of layers that keep their outputs.
        unit: ``"macs"`` or ``"params"``.
    """
    return group_cost(build_pruner(copy.deepcopy(model), example, ignored, lambda group: None), example, unit)


def group_cost(pruner, example: Tensor, unit: str = "macs") -> dict[GroupKey, float]:
    """Return for each group of ``pruner`` the cost of one channel, summed over its producers and consumers.

    Args:
        pruner: A TP pruner over the unpruned network.
        example: One input, ``[1, C, H, W]``.
        unit: ``"macs"`` or ``"params"``.
    """
    groups = list(prunable_groups(pruner))
    records = [read_group(group) for group in groups]
    layers = {layer.name for r in records for layer in (*r.producers, *r.consumers, *r.others)}
    work = measure_work(pruner.model, (example,), {}, layers)
    costs = (record_cost(record, pruner.model, work, unit) for record in records)
    return {group_key(group): cost for group, cost in zip(groups, costs, strict=True)}
