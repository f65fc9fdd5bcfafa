"""What a user gives to be calibrated: a pruner, a graph or a model, and what of it cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import ObservationError
from ..graph.groups import Graph, graph_of
from ..layers import unfused
from ..records import GroupRecord
from ..tracing.arguments import arrangements


def resolve(target: Any) -> tuple[Graph | None, nn.Module]:
    """The dependency graph of ``target``, if it has one, and the model that is to be watched.

    Raises:
        TypeError: ``target`` is neither a pruner, nor a graph, nor a model.
        ObservationError: the model is wrapped in a way that hides its layers.
    """
    if isinstance(target, type):
        raise TypeError(f"observe() needs an object, not the class {target.__name__}")
    graph = graph_of(target)
    model = graph.model if graph is not None else target
    if not isinstance(model, nn.Module):
        raise TypeError(
            "observe() needs a torch_pruning pruner, a DependencyGraph or an nn.Module, "
            f"not {type(target).__name__}"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        if graph is not None:
            raise ObservationError(
                "the pruner was built on a DistributedDataParallel wrapper, which goes on with the old parameters "
                "after pruning. Build it on ddp.module, and wrap the pruned model again."
            )
        model = model.module
    if isinstance(model, nn.DataParallel):
        raise ObservationError(
            "nn.DataParallel runs copies of the model, which cannot be watched. Calibrate its .module, or use "
            "DistributedDataParallel."
        )
    if any(hasattr(module, "_orig_mod") or _compiled(module) for module in model.modules()):
        raise ObservationError(
            "the model, or a part of it, is wrapped by torch.compile. Calibrate the original model "
            "(model._orig_mod) and compile the pruned one."
        )
    return graph, model


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dependency graph of a bare model, from one sample of its first batch."""
    args, kwargs = arrangements(args, kwargs)[0].first(1)
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    hooks = [(module._forward_hooks, dict(module._forward_hooks)) for module in model.modules()]
    try:
        for p, _ in flags:
            p.requires_grad_(True)  # TP follows autograd: frozen layers would be invisible
        with torch.enable_grad():  # forward-only criteria are calibrated under no_grad
            return tp.DependencyGraph().build_dependency(
                model, example_inputs=None, forward_fn=lambda m, _: m(*args, **kwargs), verbose=False
            )
    except BaseException:
        for present, before in hooks:  # Torch-Pruning leaves its own behind
            present.clear()
            present.update(before)
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)


def check_layers(model: nn.Module, records: Iterable[GroupRecord]) -> None:
    """Look for layers that a pruner cannot prune, or does not see.

    Raises:
        ObservationError: a layer of a group is complex or has a weight that is computed; or there is no group, for
            the layers are frozen.

    Warns:
        RuntimeWarning: some layers are in no group, for they are frozen.
    """
    records = list(records)
    for name in dict.fromkeys(layer.name for r in records for layer in (*r.producers, *r.consumers)):
        module = model.get_submodule(name)
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and "weight" not in module._parameters and "weight" not in module._buffers:
            raise ObservationError(
                f"the weight of {name!r} is computed from other parameters (weight_norm, spectral_norm or another "
                "parametrization), which Torch-Pruning does not prune. Take it off before pruning, with "
                'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight"), and put it back afterwards; '
                "or put the layer, and those that it reads from, into ignored_layers."
            )
        if any(p.is_complex() for p in module.parameters(recurse=False)):
            raise ObservationError(
                f"{name!r} has complex weights, whose channels have no score. Put it, and the layers that it "
                "reads from, into the pruner's ignored_layers."
            )
    if not (frozen := _frozen(model, records)):
        return
    what = (
        f"{len(frozen)} layers with frozen weights are in no group ({', '.join(map(repr, frozen[:3]))}"
        f"{', ...' if len(frozen) > 3 else ''}): Torch-Pruning follows autograd and does not see layers with "
        "requires_grad=False. Call model.requires_grad_(True) before the pruner is made, and freeze afterwards."
    )
    if not any(record.producers for record in records):
        raise ObservationError(f"there is no group to score. {what}")
    warnings.warn(what, RuntimeWarning, stacklevel=2)


def _frozen(model: nn.Module, records: Iterable[GroupRecord]) -> list[str]:
    """Layers with weights that do not require grad and that are in no group."""
    known = {name for record in records for name in record.members}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, _ConvNd)) and name not in known and not module.weight.requires_grad
    ]


@contextmanager
def eagerly() -> Iterator[None]:
    """A context in which code runs as it was written, layer by layer, so that layers can be watched.

    Compiled functions run eagerly, and ``nn.TransformerEncoder`` does not take the fused path of inference, which
    skips its layers and packs padded samples into nested tensors.
    """
    with unfused(), torch.compiler.set_stance("force_eager"):
        yield


def _compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None
