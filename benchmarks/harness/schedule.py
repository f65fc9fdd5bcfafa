"""The schedule of i-SpaSP's authors: groups are pruned one after another, front to back, each calibrated anew."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness.prune import PruneConfig, Pruned, apply, build_pruner, size, widths
from benchmarks.harness.scores import group_key, prunable_groups
from ippro_tp import Compensation

Build = Callable[[nn.Module, object], Callable]
"""``(model, pruner) -> importance``, calibrated on the model as it is then."""


def prune_front_to_back(
    model: nn.Module,
    example: Tensor,
    ignored: tuple[str, ...],
    wanted: dict[str, int],
    build: Build,
    config: PruneConfig,
    compensation: Compensation | None = None,
    between: Callable[[nn.Module], None] | None = None,
) -> Pruned:
    """Prune a copy of ``model`` to given widths, group by group in the order in which their layers run.

    Args:
        model: The unpruned network; unchanged.
        example: One input, ``[1, C, H, W]``.
        ignored: Names of layers that keep their outputs.
        wanted: Outputs of each layer after pruning, by name.
        build: Makes the importance for the next group, on the network as it is.
        config: See :class:`PruneConfig`.
        compensation: Calibrated; refits the layers after each group.
        between: Called with the network after each group, to fine-tune it.

    Raises:
        ArithmeticError: A group did not come out at its width.
    """
    model = copy.deepcopy(model)
    for root, members in _groups_in_order(model, example, ignored, config):
        channels, goal = widths(model)[root], wanted[root]
        if goal == channels:
            continue
        others = tuple(name for name in widths(model) if name not in members)
        # TP keeps int(channels * (1 - ratio)): half a channel of slack makes the rounding safe.
        ratios = {root: (channels - goal - 0.5) / channels}
        holder = _Holder()
        pruner = build_pruner(model, example, tuple({*ignored, *others}), holder, 0.0, "local", config, ratios)
        holder.importance = build(model, pruner)
        if hasattr(holder.importance, "bind"):
            holder.importance.bind(pruner)
        apply(pruner, compensation)
        if widths(model)[root] != goal:
            raise ArithmeticError(f"{root} has {widths(model)[root]} outputs where {goal} were wanted")
        model.eval().zero_grad()
        if between is not None:
            between(model)
    macs, params = size(model, example)
    return Pruned(model, macs, params, widths(model))


class _Holder:
    """An importance that is known only once its pruner is there."""

    importance: Callable | None = None

    def __call__(self, group, **kwargs) -> Tensor | None:
        """Ask it."""
        return self.importance(group)


def _groups_in_order(
    model: nn.Module, example: Tensor, ignored: tuple[str, ...], config: PruneConfig
) -> list[tuple[str, set[str]]]:
    """Return root and layers with pruned outputs of each group, in the order of the first layer to run."""
    order: dict[str, int] = {}

    def numbering(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object) -> None:
            order.setdefault(name, len(order))

        return hook

    handles = [module.register_forward_pre_hook(numbering(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    pruner = build_pruner(model, example, ignored, lambda group: None, 0.5, "local", config)
    found = []
    for group in prunable_groups(pruner):
        graph = group._DG
        members = {
            graph._module2name[dep.target.module]
            for dep, _ in group
            if dep.target.module in graph._module2name and graph.is_out_channel_pruning_fn(dep.handler)
        }
        root, _ = group_key(group)
        found.append((root, members))
    return sorted(found, key=lambda item: min(order.get(name, len(order)) for name in item[1]))
