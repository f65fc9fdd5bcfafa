"""Labels of channels: which elements of a tensor belong to which channel, and which channels go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Classes:
    """Disjoint sets of channel labels; label 0 means "no channel".

    Example:
        >>> classes = Classes()
        >>> one, other = classes.fresh(2), classes.fresh(2)
        >>> classes.union(one, other)
        >>> torch.equal(classes.find(one), classes.find(other))
        True
    """

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.long)
        self._size = 1

    def __len__(self) -> int:
        return self._size

    def fresh(self, count: int) -> Tensor:
        """``(count,)`` labels that were not used before."""
        start, self._size = self._size, self._size + count
        if self._size > len(self._parent):
            spare = torch.arange(len(self._parent), 2 * self._size)
            self._parent = torch.cat([self._parent, spare])
        return torch.arange(start, self._size)

    def find(self, labels: Tensor) -> Tensor:
        """The representative of each label's set, the smallest label in it."""
        found = self._parent[labels]
        while True:
            further = self._parent[found]
            if torch.equal(found, further):
                return found
            found = further

    def union(self, one: Tensor, other: Tensor) -> None:
        """Unite the sets of labels that stand at the same place; pairs with a 0 are left out."""
        one, other = torch.broadcast_tensors(one, other)
        pairs = torch.stack([self.find(one.reshape(-1)), self.find(other.reshape(-1))])
        pairs = pairs[:, (pairs > 0).all(0)]
        while True:
            pairs = pairs[:, pairs[0] != pairs[1]]
            if not pairs.numel():
                return
            low, high = pairs.amin(0), pairs.amax(0)
            self._parent.scatter_reduce_(0, high, low, "amin")
            pairs = self.find(torch.stack([low, high]))

    def copy(self) -> Classes:
        """The same sets, to be united further without changing these."""
        made = Classes()
        made._parent, made._size = self._parent.clone(), self._size
        return made


@dataclass(eq=False)
class Site:
    """Labels on one tensor that vary along several of its axes, so that not every set of them can go.

    What is left of the tensor has to be a smaller tensor: whole slabs along an axis go. Which axis is decided
    when all of the model is known.

    Attributes:
        planes: labels, each of the tensor's shape with 1 for the axes it does not vary along.
        fixed: axes that something without labels runs along, so that no slab along them can go.
        prefer: the axis that heads lie along, where the tensor entered a batched product.
        module: name of the module whose forward pass made the tensor.
    """

    planes: tuple[Tensor, ...]
    fixed: frozenset[int] = frozenset()
    prefer: int | None = None
    module: str = ""


@dataclass
class Facts:
    """What one forward pass told about the channels of a model.

    Attributes:
        classes: labels that have to go together whatever else is decided.
        slots: by name of a parameter or buffer and axis, the label of each index.
        fixed: labels that have to stay, each with the reason.
        sites: tensors of which only slabs can go.
        parents: a label that stands for the result of a product, and the labels that were summed over.
        seen: per module name, vectors of labels along one axis of a tensor inside its forward pass.
        readers: per parameter-owning module, what reads its output directly: module names, "" for anything else.
        reads: in the order of the pass, every operand that is summed over: the operation and the operand's planes.
        products: per running module, its own weights that were multiplied: name, axes summed over and kept.
        matrices: per module that is a layer by what it does: its weight and the axes of its outputs and inputs.
    """

    classes: Classes = field(default_factory=Classes)
    slots: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    fixed: list[tuple[Tensor, str]] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    parents: list[tuple[int, Tensor]] = field(default_factory=list)
    seen: dict[str, list[Tensor]] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    reads: list[tuple[str, list[Tensor]]] = field(default_factory=list)
    products: dict[str, set[tuple[str, int, int]]] = field(default_factory=dict)
    matrices: dict[str, tuple[str, int, int]] = field(default_factory=dict)


def compact(plane: Tensor) -> Tensor:
    """``plane`` with size 1 along the axes it is expanded along (stride 0)."""
    for axis, (size, stride) in enumerate(zip(plane.shape, plane.stride(), strict=True)):
        if stride == 0 and size > 1:
            plane = plane.narrow(axis, 0, 1)
    return plane


def varying(plane: Tensor) -> tuple[int, ...]:
    """Axes of a compact plane along which it has more than one label."""
    return tuple(axis for axis, size in enumerate(plane.shape) if size > 1)


def squeezed(plane: Tensor) -> Tensor:
    """``plane`` with size 1 along every axis along which all of its labels are the same."""
    plane = compact(plane)
    for axis, size in enumerate(plane.shape):
        if size > 1:
            first = plane.narrow(axis, 0, 1)
            if bool((plane == first).all()):
                plane = first
    return plane


def rows_of(plane: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The distinct sequences of labels along ``axes``.

    Returns:
        ``(distinct, K)`` rows, and for each remaining position which row it has, with size 1 along ``axes``.
    """
    keep = [axis for axis in range(plane.dim()) if axis not in axes]
    rows = plane.permute(*keep, *axes).reshape(
        -1, max(1, int(torch.tensor([plane.shape[a] for a in axes]).prod()))
    )
    distinct, which = torch.unique(rows, dim=0, return_inverse=True)
    shape = [1 if axis in axes else size for axis, size in enumerate(plane.shape)]
    return distinct, which.view(shape)
