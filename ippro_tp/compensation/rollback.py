"""A model and its pruner as they were: everything a step changes can be put back, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """What a model and a pruner hold: weights by value, attributes and containers by what is in them.

    Covered: every module of the model with its attributes, parameters, buffers and gradients, and all objects of
    Torch-Pruning that can be reached from the pruner (the graph, its nodes and index maps, the history).

    Args:
        model: the model.
        others: the pruner, or whatever else changes with it.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = Snapshot(layer)
        >>> layer.weight = nn.Parameter(torch.zeros(1, 2)); layer.out_features = 1
        >>> before.restore()
        >>> layer.weight.shape, layer.out_features
        (torch.Size([2, 2]), 2)
    """

    def __init__(self, model: nn.Module, *others: Any) -> None:
        self._attributes: list[tuple[Any, type, dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._values: list[tuple[Tensor, Tensor, bool, Tensor | None]] = []
        kinds = {type(other).__module__ for other in others}
        in_model = set(map(id, model.modules()))
        seen: set[int] = set()
        waiting: list[tuple[Any, bool]] = [(model, True), *((other, False) for other in others)]
        while waiting:
            thing, owned = waiting.pop()
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            if isinstance(thing, Tensor):
                if owned:
                    self._values.append((thing, thing.detach().clone(), thing.requires_grad, thing.grad))
            elif isinstance(thing, (dict, list, set)):
                self._contents.append((thing, thing.copy()))
                waiting += [(x, owned) for x in (thing.values() if isinstance(thing, dict) else thing)]
            elif isinstance(thing, tuple):
                waiting += [(x, owned) for x in thing]
            elif id(thing) in in_model or _is_pruners(thing, kinds):
                self._attributes.append((thing, type(thing), dict(vars(thing))))
                waiting += [(x, id(thing) in in_model) for x in vars(thing).values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back. May be called more than once."""
        for thing, kind, attributes in self._attributes:
            if type(thing) is not kind:
                thing.__class__ = kind
            vars(thing).clear()
            vars(thing).update(attributes)
        for container, content in self._contents:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        for tensor, value, requires_grad, grad in self._values:
            if tensor.shape != value.shape or tensor.dtype != value.dtype:
                tensor.data = value.clone()
            elif not torch.equal(tensor, value):
                tensor.copy_(value)
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.is_leaf and tensor.grad is not grad:
                tensor.grad = grad


@contextmanager
def undone_on_error(model: nn.Module, *others: Any) -> Iterator[Snapshot]:
    """A block that leaves the model and ``others`` as they were if it fails, whatever it fails of."""
    before = Snapshot(model, *others)
    try:
        yield before
    except BaseException:
        before.restore()
        raise


def _is_pruners(thing: Any, kinds: set[str]) -> bool:
    kind = type(thing)
    ours = kind.__module__ in kinds or kind.__module__.partition(".")[0] == "torch_pruning"
    return ours and hasattr(thing, "__dict__") and not isinstance(thing, type)
