"""What a trial of a cut needs: the cut, the original without the channels, and how far the two are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .axes import Axis
from .dependency import RepairedGraph, retie
from .onepass import run


def reference_outputs(graph: RepairedGraph, model: nn.Module, removed: Tensor) -> list[Tensor]:
    """Outputs of the unpruned ``model`` in which channels are left out where they are read.

    Products read zeros; norms, means, maxima and softmax over the axis see the channels that remain; attention
    keeps the scale of its logits.

    Args:
        graph: of ``model`` or of a copy of it.
        model: a copy that may be run.
        removed: ``(n,)`` classes that are left out.
    """
    classes = graph.layout.classes
    facts = replace(graph.facts, classes=classes)
    dead = torch.isin(classes.find(torch.arange(len(classes))), removed)
    dead[0] = False
    settings = graph._settings
    return run(
        model,
        like(settings.inputs, model),
        facts,
        removed=dead,
        forward_fn=settings.forward_fn,
        output_transform=settings.output_transform,
    )


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference of the outputs, relative to the largest value of each; infinite for other shapes."""
    if len(found) != len(wanted):
        return float("inf")
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if not one.numel():
            continue
        one, other = one.detach().double(), other.detach().double()
        if not bool(torch.equal(one.isfinite(), other.isfinite())):
            return float("inf")
        one, other = one.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
        worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp_min(1e-12)))
    return worst


def cut(graph: RepairedGraph, model: nn.Module, removed: Tensor, axes: Sequence[Axis] | None = None) -> None:
    """Remove classes of channels from ``model``, a copy of the graph's."""
    with torch.no_grad():
        for axis in graph.axes if axes is None else axes:
            gone = torch.isin(axis.classes, removed).nonzero().view(-1)
            if gone.numel():
                axis.pruner.pruning_dim = -1
                axis.handler(model.get_submodule(axis.owner), gone.tolist())
    retie(model, graph._tied)


def module_of(error: Exception, model: nn.Module) -> str | None:
    """Name of the innermost module with code of its own in whose forward pass an error arose."""
    names = {module: name for name, module in model.named_modules()}
    found, trace = None, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in names and trace.tb_frame.f_code.co_name != "_call_impl":
            found = owner
        trace = trace.tb_next
    if found is None:
        return None
    name: str = names[found]
    return name.rpartition(".")[0] if type(found).__module__.startswith("torch.nn") else name


def like(inputs: Any, model: nn.Module) -> Any:
    """``inputs`` in the precision of the model."""
    double = any(p.dtype == torch.float64 for p in model.parameters())
    if not double:
        return inputs
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {key: like(value, model) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(like(value, model) for value in inputs)
    return inputs


def spread(model: nn.Module, seed: int) -> nn.Module:
    """Noise on parameters of one number: a branch that is multiplied by 0 or 1e-6 would prove nothing."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all()):
                noise = torch.rand(tensor.shape, generator=random).to(tensor)
                tensor.add_(noise, alpha=0.5 if "running" in name or bool((tensor > 0.5).all()) else 0.1)
    return model
