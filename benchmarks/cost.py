"""What a channel of each group costs: the MACs or parameters that go away with it.

Dividing a score by the cost is the Lagrangian of "least loss for the MACs saved": a score that behaves like a
loss increase (degree 2 in the weights) is divided by the cost, one that behaves like its root (degree 1) by
the cost's root.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.scores import GroupKey, group_key, prunable_groups

Sizes = dict[nn.Module, int]
"""Positions (pixels, tokens) of each leaf module's output, per image."""


def output_positions(model: nn.Module, example: Tensor) -> Sizes:
    """Run one forward pass and return for each leaf module the number of positions of its output."""
    sizes: Sizes = {}

    def note(module: nn.Module, _inputs, output) -> None:
        if isinstance(output, Tensor):
            channel_last = isinstance(module, nn.Linear | nn.LayerNorm)
            shape = output.shape[1:-1] if channel_last else output.shape[2:]
            sizes[module] = sizes.get(module, 0) + int(torch.Size(shape).numel())

    hooks = [m.register_forward_hook(note) for m in model.modules() if not any(m.children())]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes


def weights_per_channel(module: nn.Module, is_output: bool) -> int:
    """Return the number of weights (without bias) that one output or input channel of ``module`` owns."""
    if isinstance(module, nn.Linear):
        return module.in_features if is_output else module.out_features
    if isinstance(module, nn.modules.conv._ConvNd):
        kernel = module.weight[0, 0].numel()
        if module.groups == module.in_channels == module.out_channels:
            return kernel if is_output else 0
        return kernel * (module.in_channels if is_output else module.out_channels) // module.groups
    return 0


def channel_cost(module: nn.Module, is_output: bool, positions: int, unit: str) -> float:
    """Return the ``macs`` or ``params`` of one channel of ``module``, as TP's counter counts them."""
    weights = weights_per_channel(module, is_output)
    bias = int(is_output and getattr(module, "bias", None) is not None)
    if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
        scale = int(module.weight is not None)
        return (1 + scale) * positions if unit == "macs" else scale + bias
    return (weights + bias) * positions if unit == "macs" else weights + bias


def group_cost(pruner, example: Tensor, unit: str = "macs") -> dict[GroupKey, float]:
    """Return for each group of ``pruner`` the cost of one channel, summed over its producers and consumers.

    Args:
        pruner: A TP pruner over the unpruned network.
        example: One input, ``[1, C, H, W]``.
        unit: ``"macs"`` or ``"params"``.
    """
    positions = output_positions(pruner.model, example)
    costs: dict[GroupKey, float] = {}
    for group in prunable_groups(pruner):
        total = 0.0
        for dep, idxs in group:
            module = dep.target.module
            if isinstance(module, nn.Module) and module in positions:
                is_output = pruner.DG.is_out_channel_pruning_fn(dep.handler)
                total += len(idxs) * channel_cost(module, is_output, positions[module], unit)
        costs[group_key(group)] = total / len(group[0].idxs)
    return costs
