"""A cut: which channels of which layers go, by name, so that it applies to any copy of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import forget_caches
from .structure import Structure, retie


class Cut:
    """The channels to be removed, over all groups of a structure: each layer is touched once on each side.

    Indices are those of the unpruned layers. They are collected before anything is cut: nothing is asked of the
    graph while widths change.

    Args:
        structure: of the unpruned model.
        removed: per group, boolean mask ``(width,)`` of the positions that go; whole units.
    """

    def __init__(self, structure: Structure, removed: Mapping[str, Tensor]) -> None:
        self._structure = structure
        sides: dict[tuple[str, int, str], tuple[Any, set[int]]] = {}
        for key, mask in removed.items():
            group = structure.groups[key].group
            roots = list(group[0][1])
            gone = {root for root, out in zip(roots, mask.tolist(), strict=True) if out}
            for item in group if gone else ():
                handler = item.dep.handler
                idxs = {i for i, r in zip(item.idxs, item.root_idxs, strict=True) if r in gone}
                if idxs:
                    name = structure.graph._module2name[item.dep.target.module]
                    side = sides.setdefault((name, id(handler.__self__), handler.__name__), (item.dep, set()))
                    side[1].update(idxs)
        self._places = [(name, dep, sorted(idxs)) for (name, _, _), (dep, idxs) in sides.items()]

    def __iter__(self) -> Iterator[tuple[Any, list[int]]]:
        """``(dependency, indices)``, as a group of Torch-Pruning gives them."""
        for _, dep, idxs in self._places:
            yield dep, idxs

    def __len__(self) -> int:
        return len(self._places)

    def prune(self) -> None:
        """Cut the structure's own model, which is not to be used with the structure any more."""
        self.apply(self._structure.model)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Cut ``model``, the structure's own or a copy of it."""
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        for name, dep, idxs in self._places:
            dep.handler.__self__.pruning_dim = -1
            dep.handler(model.get_submodule(name), list(idxs))
        retie(model, self._structure.graph._tied)
        for module in model.modules():
            forget_caches(module)
        for name, parameter in model.named_parameters():  # Torch-Pruning's new ones all ask for gradients
            parameter.requires_grad_(flags[name])


class Step:
    """What :class:`~ippro_tp.Compensation` takes for a pruner: one step that makes a cut.

    Args:
        structure: of the model.
        cut: what goes.
    """

    def __init__(self, structure: Structure, cut: Cut) -> None:
        self.DG, self.model, self._cut = structure.graph, structure.model, cut

    def step(self, interactive: bool = False) -> list[Cut] | None:
        """Make the cut, or give it as the one group of the step."""
        if interactive:
            return [self._cut]
        self._cut.prune()
        return None
