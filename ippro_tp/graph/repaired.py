"""A group of Torch-Pruning made of axes: which channels of which layers go with which of the root's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch_pruning as tp
from torch import Tensor
from torch_pruning._helpers import GroupItem
from torch_pruning.dependency.dependency import Dependency

from .axes import Axis

if TYPE_CHECKING:
    from .dependency import RepairedGraph


class RepairedGroup(tp.dependency.Group):  # type: ignore[misc]
    """A group of :class:`RepairedGraph`, full or partial.

    Attributes:
        unit: ``(width,)`` int64, the class of each position: positions of one class only go together.
    """

    def __init__(self, graph: RepairedGraph, axes: Sequence[tuple[Axis, Tensor]], root: Axis) -> None:
        super().__init__()
        self._DG = graph
        self._axes = [axis for axis, _ in axes]
        idxs = dict(zip(map(id, self._axes), (index for _, index in axes), strict=True))
        roots = idxs[id(root)]
        self.unit: Tensor = root.classes[roots]
        order = torch.argsort(self.unit, stable=True)
        start = torch.searchsorted(self.unit[order], self.unit[order].unique())
        sizes = torch.diff(start, append=torch.tensor([len(order)]))
        known = self.unit[order].unique()
        for axis in (root, *(a for a in self._axes if a is not root)):
            index = idxs[id(axis)]
            shared = (known, start, sizes, order, roots)
            partner = roots if axis is root else _partners(axis.classes[index], *shared)
            source, target = graph._node(root), graph._node(axis)
            dep = Dependency(root.handler, axis.handler, source=source, target=target)
            item = GroupItem(dep, index.tolist())
            item.root_idxs = partner.tolist()
            self._group.append(item)

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the channels of the group, or those of ``idxs`` (of the root) and what goes with them."""
        if idxs is not None:
            root = self._group[0].dep
            self._DG.get_pruning_group(root.target.module, root.handler, list(idxs)).prune(None, record_history)
            return
        graph: RepairedGraph = self._DG
        with torch.no_grad():
            for axis, (dep, gone) in zip(self._ordered(), self._group, strict=True):
                dep(gone)
                axis.forget(gone)
        graph._shrunk()
        if record_history:
            root = self._group[0].dep
            name = graph._module2name[root.target.module]
            graph._pruning_history.append(
                [name, graph.is_out_channel_pruning_fn(root.handler), self._group[0].idxs]
            )

    def _ordered(self) -> list[Axis]:
        """Axes in the order of the items: the root first."""
        by_handler = {(id(a.pruner), a.handler.__name__, a.owner): a for a in self._axes}
        names = self._DG._module2name
        return [
            by_handler[id(d.handler.__self__), d.handler.__name__, names[d.target.module]] for d, _ in self._group
        ]


def _partners(
    classes: Tensor, known: Tensor, start: Tensor, sizes: Tensor, order: Tensor, roots: Tensor
) -> Tensor:
    """The root channel that each channel goes with: the first with the first of its class, and so on."""
    which = torch.searchsorted(known, classes)
    by_class = torch.argsort(which, stable=True)
    counts = torch.bincount(which, minlength=len(known))
    first = torch.cumsum(counts, 0) - counts
    rank = torch.empty_like(which)
    rank[by_class] = torch.arange(len(which)) - first[which[by_class]]
    place = rank * sizes[which] // counts[which].clamp_min(1)
    return roots[order[start[which] + place]]
