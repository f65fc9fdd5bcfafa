"""What a user gives to be calibrated: a pruner, a graph or a model, possibly wrapped."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import ObservationError
from ..graph.groups import Graph, graph_of


def resolve(target: Any) -> tuple[Graph | None, nn.Module]:
    """The dependency graph of ``target``, if it has one, and the model that is to be watched.

    Raises:
        TypeError: ``target`` is neither a pruner, nor a graph, nor a model.
        ObservationError: the model is wrapped in a way that hides its layers.
    """
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


def eagerly() -> AbstractContextManager[Any]:
    """A context in which compiled functions run as they were written, so that layers can be watched."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    return nullcontext() if set_stance is None else set_stance("force_eager")


def _compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None
