"""From what a forward pass showed to sets of channels that can go: which slabs of tensors, which stay and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .labels import Classes, Facts, Site, squeezed, varying


@dataclass(eq=False)
class Layout:
    """Classes of channels: those of one class go together.

    Attributes:
        classes: the sets.
        reasons: by representative of a set, why it has to stay.
    """

    classes: Classes
    reasons: dict[int, str]

    def of(self, labels: Tensor) -> Tensor:
        """The class of each label; 0 for what has to stay."""
        found = self.classes.find(labels)
        return torch.where(self._stays[found], 0, found)

    def why(self, labels: Tensor) -> str:
        """Why some of these labels have to stay; empty if none has to."""
        for root in self.classes.find(labels).unique().tolist():
            if root in self.reasons:
                return self.reasons[root]
        return ""

    def __post_init__(self) -> None:
        self._stays = torch.zeros(len(self.classes), dtype=torch.bool)
        self._stays[0] = True
        self._stays[list(self.reasons)] = True


def decide(facts: Facts, *, keep: Iterable[tuple[Tensor, str]] = ()) -> Layout:
    """Choose along which axis slabs of each tensor can go.

    Whole heads of attention go. Elsewhere the axis with more slabs is taken: positions within the parts of a
    convolution or a shuffle.

    Args:
        facts: what a forward pass showed; not changed.
        keep: further labels that have to stay, with the reason.
    """
    classes = facts.classes.copy()
    fixed = [*facts.fixed, *keep]
    sites = sorted(facts.sites, key=lambda site: site.prefer is None)
    open_sites, open_parents = list(sites), list(facts.parents)
    while True:
        changed = False
        for site in open_sites:
            if _settle(classes, site, fixed):
                changed = True
        waiting = []
        for parent, members in open_parents:
            roots = classes.find(members).unique()
            if len(roots) == 1:
                classes.union(roots, torch.tensor([parent]))
                changed = True
            else:
                waiting.append((parent, members))
        open_parents = waiting
        if not changed:
            break
    for parent, _ in open_parents:
        fixed.append((torch.tensor([parent]), "it counts parts, each of which keeps some channels"))
    reasons: dict[int, str] = {}
    for labels, reason in fixed:
        for root in classes.find(labels).unique().tolist():
            reasons.setdefault(root, reason)
    reasons.pop(0, None)
    return Layout(classes, reasons)


def _settle(classes: Classes, site: Site, fixed: list[tuple[Tensor, str]]) -> bool:
    """Tie what has to go together on one tensor; whether there was anything to tie."""
    planes = [squeezed(classes.find(plane)) for plane in site.planes]
    axes = [varying(plane) for plane in planes]
    used = {axis for a in axes for axis in a}
    if len(used) == sum(map(len, axes)) and all(len(a) < 2 for a in axes):
        return False
    crossing = [a for a in axes if len(a) > 1]
    if not crossing:  # several planes along one axis
        changed = False
        for axis in used:
            changed |= _tie(classes, planes, axis, fixed)
        return changed
    choices = sorted({axis for a in crossing for axis in a} - site.fixed)
    if site.prefer in choices:
        choices = [site.prefer]
    if not choices:
        _fix(fixed, planes, "no part of its tensor can go alone")
        return _seal(classes, planes)
    axis = choices[0] if len(choices) == 1 else max(choices, key=lambda a: _preference(planes, a))
    return _tie(classes, planes, axis, fixed)


def _seal(classes: Classes, planes: list[Tensor]) -> bool:
    """Make one class of everything on a tensor that stays whole, so that it is looked at once."""
    for plane in planes:
        labels = plane[plane > 0].reshape(-1)
        if labels.numel():
            classes.union(labels[:1], labels)
    return True


def _fix(fixed: list[tuple[Tensor, str]], planes: Iterable[Tensor], reason: str) -> None:
    for plane in planes:
        labels = plane[plane > 0].unique()
        if labels.numel():
            fixed.append((labels, reason))


def _preference(planes: list[Tensor], axis: int) -> tuple[int, float]:
    """The more slabs the better; of as many, single ones: two heads, not query and key beside value."""
    count = _slabs(planes, axis)
    return count, count / max(plane.shape[axis] for plane in planes)


def _slabs(planes: list[Tensor], axis: int) -> int:
    """How many sets of channels are left when slabs along ``axis`` are tied."""
    local = Classes()
    labels = torch.cat([plane.reshape(-1) for plane in planes if varying(plane)])
    known, place = torch.unique(labels, return_inverse=True)
    numbers = local.fresh(len(known))
    at = 0
    for plane in planes:
        if not varying(plane):
            continue
        own = numbers[place[at : at + plane.numel()]].view(plane.shape)
        at += plane.numel()
        if axis in varying(plane):
            rows = own.movedim(axis, 0).flatten(1) if own.dim() > 1 else own.view(-1, 1)
            local.union(rows[:, :1], rows)
    return int(local.find(numbers).unique().numel())


def _tie(classes: Classes, planes: list[Tensor], axis: int, fixed: list[tuple[Tensor, str]]) -> bool:
    """Whole slabs along ``axis`` go."""
    before = len(classes.find(torch.cat([p.reshape(-1) for p in planes])).unique())
    over: set[int] = set()
    first = None
    for plane in planes:
        if axis not in varying(plane):
            continue
        over |= set(varying(plane)) - {axis}
        rows = plane.movedim(axis, 0).reshape(plane.shape[axis], -1)
        torn = (rows > 0).any(1) & (rows == 0).any(1)
        if bool(torn.any()):
            _fix(fixed, [rows[torn]], "a part of it has no channels")
        lead = rows.amax(1)
        classes.union(lead.view(-1, 1).expand_as(rows), rows)
        if first is not None:
            alone = (first > 0) != (lead > 0)
            _fix(
                fixed,
                [torch.where(alone, torch.maximum(first, lead), 0)],
                "it meets values that are not channels",
            )
            classes.union(first, lead)
        first = lead if first is None else first
    for plane in planes:
        if varying(plane) and set(varying(plane)) <= over and not _all_in(plane, fixed):
            _fix(fixed, [plane], "it counts parts, each of which keeps some channels")
    after = len(classes.find(torch.cat([p.reshape(-1) for p in planes])).unique())
    return after < before


def _all_in(plane: Tensor, fixed: list[tuple[Tensor, str]]) -> bool:
    labels = plane[plane > 0].unique()
    return any(torch.equal(labels, known) for known, _ in fixed[-8:])
