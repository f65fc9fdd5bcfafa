"""A cut: which channels of which layers go, by name, so that it applies to any copy of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .structure import Structure


@dataclass(frozen=True)
class _Place:
    """A side of a layer, or a bare parameter."""

    name: str
    dep: Any = field(compare=False)
    idxs: list[int] = field(compare=False)


class Cut:
    """The channels to be removed, over all groups of a structure: each layer is touched once on each side.

    Indices are those of the unpruned layers. They are collected before anything is cut: no index map is asked
    while widths change.

    Args:
        structure: of the unpruned model.
        removed: per group, boolean mask ``(width,)`` of the positions that go.
    """

    def __init__(self, structure: Structure, removed: Mapping[str, Tensor]) -> None:
        self._structure = structure
        graph = structure.graph
        sides: dict[tuple[Any, Any], tuple[Any, set[int]]] = {}
        for key, mask in removed.items():
            group = structure.groups[key].group
            roots = list(group[0][1])
            gone = {root for root, out in zip(roots, mask.tolist(), strict=True) if out}
            if not gone:
                continue
            for item in group:
                module = item.dep.target.module
                idxs = {i for i, r in zip(item.idxs, item.root_idxs, strict=True) if r in gone}
                if idxs and (isinstance(module, nn.Parameter) or module in graph._module2name):
                    side = sides.setdefault((item.dep.target, item.dep.handler), (item.dep, set()))
                    side[1].update(idxs)
        self._places = [
            _Place(_name_of(graph, dep.target.module), dep, sorted(idxs)) for dep, idxs in sides.values()
        ]

    def __iter__(self) -> Iterator[tuple[Any, list[int]]]:
        """``(dependency, indices)``, as a group of Torch-Pruning gives them."""
        for place in self._places:
            yield place.dep, place.idxs

    def __len__(self) -> int:
        return len(self._places)

    @property
    def names(self) -> list[str]:
        """Names of the layers and parameters that lose something."""
        return list(dict.fromkeys(place.name for place in self._places))

    def prune(self) -> None:
        """Cut the structure's own model, which is not to be used with the structure any more."""
        self.apply(self._structure.model)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Cut ``model``, the structure's own or a copy of it."""
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        for place in self._places:
            owner, _, leaf = place.name.rpartition(".")
            handler = place.dep.handler
            handler.__self__.pruning_dim = place.dep.target.pruning_dim
            if isinstance(place.dep.target.module, nn.Parameter):
                parent = model.get_submodule(owner)
                setattr(parent, leaf, handler(getattr(parent, leaf), place.idxs))
            else:
                handler(model.get_submodule(place.name), list(place.idxs))
        for name, parameter in model.named_parameters():  # Torch-Pruning's new ones all ask for gradients
            parameter.requires_grad_(flags[name])


def _name_of(graph: Any, module: Any) -> str:
    names: dict[Any, str] = graph._param_to_name if isinstance(module, nn.Parameter) else graph._module2name
    return names[module]


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
