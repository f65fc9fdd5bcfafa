"""One forward pass in which every operation says where the channels of its operands go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .labels import Facts, Site, compact, rows_of, squeezed, varying
from .meetings import fallback, opaque
from .rules import READERS, RULES


@dataclass(eq=False)
class Shadow:
    """What is known of a tensor.

    Attributes:
        planes: labels of its elements; each plane has the tensor's shape and is expanded where it can be.
        wild: the tensor holds one number only (zeros, ones) and takes any channels written into it.
    """

    planes: list[Tensor]
    wild: bool = False


class ReplayError(RuntimeError):
    """A forward pass does other operations than the one that was followed."""


class Provenance(TorchDispatchMode):
    """Follows channels through the operations of a forward pass.

    Operations that only move numbers are applied to the labels as well, so every index map is exact. Others are
    described by :mod:`.rules`; what nobody describes keeps the channels that enter it.

    Args:
        facts: what is found is added here.
        removed: ``(labels,)`` boolean; channels whose numbers are left out wherever several are summed.
        replaying: take from ``facts`` which channels every operation reads, instead of following them again.
    """

    strict = False  # for tests of rules: raise instead of keeping what a rule fails on

    def __init__(self, facts: Facts, removed: Tensor | None = None, *, replaying: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.replaying, self._next_read, self._operation = replaying, 0, ""
        self.facts, self.removed = facts, removed
        self.module: list[str] = [""]
        self._rules = RULES
        self._fallback, self._opaque = fallback, opaque
        self._shadows = WeakIdKeyDictionary()
        self.slices = WeakIdKeyDictionary()  # per tensor, by axis and size, where each slice starts
        self._written: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._owners = WeakIdKeyDictionary()
        self.parameters: dict[str, dict[str, Tensor]] = {}
        self._maker = WeakIdKeyDictionary()
        self._sites: dict[Any, Site] = {}
        self._parents: dict[bytes, int] = {}
        self._seen: set[Any] = set()
        self._stay = torch.zeros(len(facts.classes), dtype=torch.bool)
        self._any_stay = False

    # -- tensors -------------------------------------------------------------------------------------------------

    def register(self, model: nn.Module) -> None:
        """Give labels to every axis of every floating-point parameter and buffer."""
        tensors = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in tensors:
            if not tensor.is_floating_point() and not tensor.is_complex():
                continue
            planes = []
            for axis, size in enumerate(tensor.shape):
                if size < 2:
                    continue
                if (name, axis) not in self.facts.slots:
                    self.facts.slots[name, axis] = self.facts.classes.fresh(size)
                shape = [1] * tensor.dim()
                shape[axis] = size
                planes.append(self.facts.slots[name, axis].view(shape).expand(tensor.shape))
            self._shadows[tensor] = Shadow(planes)
            owner, _, leaf = name.rpartition(".")
            self._owners[tensor] = owner
            self.parameters.setdefault(owner, {})[leaf] = tensor

    def planes(self, tensor: Any) -> list[Tensor]:
        """Planes of a tensor; none for anything unknown."""
        if self.replaying or not isinstance(tensor, Tensor):
            return []
        if self._written and (found := self._written.get(_storage(tensor))) is not None:
            size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
            return [plane.as_strided(size, stride, offset) for plane in found[1]]
        shadow = self._shadows.get(tensor)
        return shadow.planes if shadow is not None else []

    def is_wild(self, tensor: Tensor) -> bool:
        """Whether the tensor holds one number only and has no channels."""
        if self._written and _storage(tensor) in self._written:  # of its parts, those that were not written yet
            return not any(bool(plane.any()) for plane in self.planes(tensor))
        shadow = self._shadows.get(tensor)
        return shadow is not None and shadow.wild

    def put(self, tensor: Any, planes: Sequence[Tensor], *, wild: bool = False) -> None:
        """Say what is known of a new tensor."""
        if not isinstance(tensor, Tensor) or self.replaying:
            return
        planes = [plane.expand(tensor.shape) if plane.shape != tensor.shape else plane for plane in planes]
        self._shadows[tensor] = Shadow(list(planes), wild)
        if planes:
            self._remember(planes)

    def write(self, tensor: Tensor, planes: Sequence[Tensor]) -> None:
        """Say what is known of a tensor that was written into."""
        if not planes:
            return
        key = _storage(tensor)
        if key in self._written:
            for place, plane in zip(self.planes(tensor), planes, strict=False):
                place.copy_(torch.where(place == 0, plane.expand(tensor.shape), place))
            return
        if self.planes(tensor):
            shadow = self._shadows.get(tensor)
            if shadow is not None and len(planes) > len(shadow.planes):
                self.put(tensor, planes)
            return
        numel = tensor.untyped_storage().nbytes() // tensor.element_size()
        stores = [torch.zeros(numel, dtype=torch.long) for _ in planes]
        for store, plane in zip(stores, planes, strict=True):
            place = store.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
            place.copy_(plane.expand(tensor.shape))
        self._written[key] = (tensor, stores)

    def _remember(self, planes: Sequence[Tensor]) -> None:
        """Keep vectors of labels for the numbers that the current module may keep."""
        for plane in planes:
            small = compact(plane)
            axes = varying(small)
            if axes and small.numel() <= 1 << 16:
                key = (self.module[-1], small.shape, small.untyped_storage().data_ptr(), small.storage_offset())
                if key not in self._seen:
                    self._seen.add(key)
                    self.facts.seen.setdefault(self.module[-1], []).append(small)

    # -- what rules say ------------------------------------------------------------------------------------------

    def canonical(self, plane: Tensor) -> Tensor:
        """Representatives of a plane's labels, with size 1 along axes along which they are all the same.

        Channels that stay are no channels to whom they meet later.
        """
        found = self.facts.classes.find(compact(plane))
        if self.removed is None and self._any_stay:
            if len(self._stay) < len(self.facts.classes):
                self._stay = torch.cat([self._stay, torch.zeros(len(self.facts.classes), dtype=torch.bool)])
            found = torch.where(self._stay[found] | self._stay[compact(plane)], 0, found)
        return squeezed(found)

    def union(self, one: Tensor, other: Tensor) -> None:
        """Labels that go together; where one of them is 0 the other has to stay."""
        if self.removed is not None:
            return
        one, other = torch.broadcast_tensors(one, other)
        lonely = (one == 0) != (other == 0)
        if bool(lonely.any()):
            self.fix(torch.where(one == 0, other, one)[lonely], "part of it meets values that are not channels")
        self.facts.classes.union(one, other)

    def fix(self, labels: Tensor, reason: str) -> None:
        """Labels that have to stay."""
        if self.removed is not None:
            return
        labels = compact(labels).reshape(-1)
        labels = labels[labels > 0]
        if labels.numel():
            where = f" in {self.module[-1]!r}" if self.module[-1] else ""
            labels = labels.unique()
            self.facts.fixed.append((labels, reason + where))
            self._any_stay = True
            if len(self._stay) < len(self.facts.classes):
                self._stay = torch.cat([self._stay, torch.zeros(len(self.facts.classes), dtype=torch.bool)])
            self._stay[labels] = True
            self._stay[self.facts.classes.find(labels)] = True

    def site(
        self, planes: Sequence[Tensor], fixed: frozenset[int] = frozenset(), prefer: int | None = None
    ) -> None:
        """A tensor of which only whole slabs along an axis can go."""
        if self.removed is not None:
            return
        axes = [varying(plane) for plane in planes]
        crossing = any(len(a) > 1 for a in axes) or len({x for a in axes for x in a}) < sum(map(len, axes))
        if not crossing:
            return
        key = (
            tuple((p.shape, p.storage_offset(), hash(p.numpy().tobytes())) for p in planes),
            fixed,
            prefer,
        )
        if key not in self._sites:
            self._sites[key] = made = Site(tuple(planes), fixed, prefer, self.module[-1])
            self.facts.sites.append(made)

    def consumed(self, plane: Tensor, axes: Sequence[int]) -> Tensor | None:
        """The plane of a result summed over ``axes``; ``None`` where all of it reads the same channels."""
        rows, which = rows_of(plane, axes)
        if len(rows) < 2:
            return None
        labels = torch.zeros(len(rows), dtype=torch.long)
        for number, row in enumerate(rows):
            members = row[row > 0].unique()
            if members.numel() < 2:
                labels[number] = members[0] if members.numel() else 0
                continue
            if self.removed is not None:
                continue  # what counts several classes stays
            key = members.numpy().tobytes()
            if key not in self._parents:
                self._parents[key] = int(self.facts.classes.fresh(1))
                self.facts.parents.append((self._parents[key], members))
            labels[number] = self._parents[key]
        return labels[which]

    def dead(self, tensor: Tensor) -> list[Tensor]:
        """Which elements of a tensor are of channels that are removed: a mask for each plane that has any."""
        if self.removed is None:
            self.facts.reads.append((self._operation, [self.canonical(plane) for plane in self.planes(tensor)]))
            return []
        if self.replaying:
            operation, planes = self.facts.reads[self._next_read]
            self._next_read += 1
            if operation != self._operation:
                raise ReplayError(f"{self._operation} instead of {operation}")
        else:
            planes = [compact(plane) for plane in self.planes(tensor)]
        return [gone for labels in planes if bool((gone := self.removed[labels]).any())]

    def alive(self, tensor: Tensor) -> Tensor | None:
        """Which elements of a tensor are of channels that remain; ``None`` if all are."""
        gone = None
        for mask in self.dead(tensor):
            gone = mask if gone is None else gone | mask
        return None if gone is None else ~gone

    # -- the mode ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and its rule."""
        kwargs = kwargs or {}
        self._operation = name = func._schema.name.removeprefix("aten::")
        if self.replaying:
            return self._rules[name](self, func, args, kwargs) if name in READERS else func(*args, **kwargs)
        rule = self._rules.get(name)
        try:
            out = (rule or self._fallback)(self, func, args, kwargs)
        except (RuntimeError, IndexError, ValueError, TypeError, KeyError, NotImplementedError):
            if self.strict:
                raise
            out = self._opaque(self, func, args, kwargs)  # raises again what is the model's own
        if self.removed is None:
            self._note_readers(name, args, out)
        return out

    def _note_readers(self, name: str, args: Any, out: Any) -> None:
        """Which layer reads whose output as it is."""
        operands = [a for a in args if isinstance(a, Tensor)]
        owner = next((self._owners[t] for t in operands if t in self._owners), None)
        maker = owner if owner is not None and name in MAKERS else ""
        for tensor in operands:
            if (source := self._maker.get(tensor)) is not None:
                self.facts.readers.setdefault(source, []).append(maker)
        if maker and isinstance(out, Tensor):
            self._maker[out] = maker
        elif maker and isinstance(out, tuple) and out and isinstance(out[0], Tensor):
            self._maker[out[0]] = maker


MAKERS = (
    "convolution",
    "addmm",
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
)


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return 0
