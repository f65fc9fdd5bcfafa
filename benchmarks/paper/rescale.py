"""Rescaling a network without changing its function: what a criterion should not notice."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from benchmarks.errors import UsageError
from benchmarks.harness.prune import build_pruner
from benchmarks.harness.scores import prunable_groups
from benchmarks.tasks import Task
from ippro_tp.graph.groups import read_group
from ippro_tp.layers import is_channel_norm
from ippro_tp.records import GroupRecord, Layer

KINDS = ("between layers", "before BatchNorm")
TOLERANCE = 1e-3


def rescaled(task: Task, kind: str, seed: int) -> nn.Module:
    """Return a copy of the task's network that computes the same with other weights.

    Args:
        task: The network; all channels of its prunable groups are scaled.
        kind: ``"between layers"``: what a channel's layers write is multiplied by s (gamma and beta where a
            BatchNorm follows, else filter and bias), and the weights that read it are divided by s; exact for
            ReLU networks. ``"before BatchNorm"``: filters that a BatchNorm follows are multiplied by s, and its
            running statistics with them.
        seed: Of the factors, ``10 ** uniform(-2, 2)``, one per channel.

    Raises:
        UsageError: The network has no such symmetry: its outputs changed.
    """
    model = copy.deepcopy(task.model)
    generator = torch.Generator().manual_seed(seed)
    groups = list(_groups(model, task))
    with torch.no_grad():
        for record, normed in groups:
            factors = 10 ** (4 * torch.rand(record.width, generator=generator) - 2)
            if kind == "between layers":
                _between_layers(model, record, normed, factors)
            else:
                _before_norm(model, record, normed, factors)
    difference = output_difference(task, model)
    if not difference < TOLERANCE:
        raise UsageError(
            f"rescaling {kind} changes the outputs of {task.model_name} by {difference:.1%}: only networks whose "
            "layers are joined by ReLU-like activations have this symmetry; choose another --model"
        )
    return model


def output_difference(task: Task, model: nn.Module) -> float:
    """Return the largest change of an output, relative to the largest output, on sixteen calibration images."""
    images = task.calibration(0, 16, 16)[0][0].to(task.example.device)
    with torch.no_grad():
        before, after = task.model.eval()(images), model.eval()(images)
    return float((after - before).abs().max() / before.abs().max())


def _groups(model: nn.Module, task: Task) -> Iterator[tuple[GroupRecord, dict[str, str]]]:
    """Yield each group with the norm that directly follows each of its producers."""
    pruner = build_pruner(model, task.example, task.ignored, lambda group: None)
    for group in prunable_groups(pruner):
        normed = {}
        for item in group:
            name = pruner.DG._module2name.get(item.dep.target.module)
            for after in item.dep.target.outputs:
                if is_channel_norm(after.module):
                    normed[name] = pruner.DG._module2name[after.module]
        yield read_group(group), normed


def _between_layers(model: nn.Module, record: GroupRecord, normed: dict[str, str], factors: Tensor) -> None:
    for layer in record.producers:
        module = model.get_submodule(layer.name)
        if layer.name not in normed:
            _multiply(module, layer, factors)
    for layer in record.consumers:
        module = model.get_submodule(layer.name)
        _refuse_groups(module, layer)
        columns = module.weight.shape[1]
        shape = (1, columns) + (1,) * (module.weight.ndim - 2)
        module.weight /= _spread(layer, factors, columns).view(shape)


def _before_norm(model: nn.Module, record: GroupRecord, normed: dict[str, str], factors: Tensor) -> None:
    for layer in record.producers:
        if layer.name not in normed:
            continue
        norm = model.get_submodule(normed[layer.name])
        if getattr(norm, "running_var", None) is None:
            raise UsageError(f"{normed[layer.name]} keeps no statistics; rescaling before it is not written")
        _multiply(model.get_submodule(layer.name), layer, factors)
        scale = _spread(layer, factors, layer.channels)
        norm.running_mean *= scale
        # The variance plus eps is what is divided by: this makes the new one an exact multiple of the old one.
        norm.running_var.add_(norm.eps).mul_(scale.square()).sub_(norm.eps)


def _multiply(module: nn.Module, layer: Layer, factors: Tensor) -> None:
    """Multiply what ``module`` writes into each channel."""
    _refuse_groups(module, layer)
    scale = _spread(layer, factors, layer.channels)
    module.weight *= scale.view((-1,) + (1,) * (module.weight.ndim - 1))
    if module.bias is not None:
        module.bias *= scale


def _spread(layer: Layer, factors: Tensor, channels: int) -> Tensor:
    """Return one factor per channel of a layer, from one per position of the group."""
    scale = torch.ones(channels)
    scale[layer.index] = factors[layer.root]
    return scale


def _refuse_groups(module: nn.Module, layer: Layer) -> None:
    if isinstance(module, _ConvNd) and (module.groups > 1 or module.transposed):
        raise UsageError(f"{layer.name} is a grouped or transposed convolution; rescaling it is not written")
