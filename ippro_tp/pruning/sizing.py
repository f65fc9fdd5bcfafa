"""Copies of a model that are cut to see how large they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import IPPROError, StructureError
from ..graph.trial import module_of
from .counter import Counts
from .cut import Cut
from .measure import Meter, Unit
from .order import Ranked
from .search import Sizes
from .structure import Prunable, Structure

BROKEN = "the model does not run once it is cut"


def mask_of(prunable: Prunable, units: Tensor) -> Tensor:
    """Which positions of a group go, where some of its units do."""
    gone = torch.zeros(prunable.units, dtype=torch.bool)
    gone[units] = True
    return gone[prunable.unit]


def multiple_of(prunable: Prunable, round_to: int) -> int:
    """So many units, or a multiple, have to stay for all layers' widths to be multiples of ``round_to``."""
    if not round_to:
        return 1
    layers = (*prunable.record.producers, *prunable.record.consumers)
    shares = {len(layer.index) // prunable.units for layer in layers} - {0}
    return math.lcm(*(round_to // math.gcd(round_to, share) for share in shares))


def cut_copy(structure: Structure, ranked: Sequence[Ranked], gone: Mapping[str, int]) -> nn.Module:
    """A copy of the structure's model without so many units of each group: those that go, as sizes may differ."""
    model = structure.model
    if not any(gone.values()):
        return model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}  # those that are cut are made anew
    made = copy.deepcopy(model, shared)
    masks = {r.key: mask_of(structure.groups[r.key], r.order[: gone[r.key]]) for r in ranked if gone[r.key]}
    with explained(BROKEN):
        Cut(structure, masks).apply(made)
    return made


def cut_sizes(structure: Structure, ranked: Sequence[Ranked], meter: Meter, whole: Counts, unit: Unit) -> Sizes:
    """Fractions of the unpruned model, in ``unit``, that are left where units of groups are gone.

    Args:
        structure: of the model.
        ranked: its groups, in the order in which their units go.
        meter: counts MACs.
        whole: size of the unpruned model.
        unit: ``"macs"`` or ``"params"``.
    """

    def left(gone: Mapping[str, int]) -> float:
        model = cut_copy(structure, ranked, gone)
        if unit == "params":
            return sum(p.numel() for p in model.parameters()) / whole.params
        return macs_of(model, meter, gone) / whole.macs

    return left


def macs_of(model: nn.Module, meter: Meter, gone: Mapping[str, int]) -> int:
    """MACs of a cut copy.

    Raises:
        BrokenCutError: it does not run without these units.
    """
    try:
        with explained(BROKEN):
            return meter.counts(model).macs
    except StructureError as error:
        cause = error.__cause__
        place = module_of(cause, model) if isinstance(cause, Exception) else None
        raise BrokenCutError(str(error), gone, place) from cause


class BrokenCutError(StructureError):
    """A model does not run at the widths of a cut.

    Attributes:
        gone: units gone of each group.
        place: name of the module that raised; ``None`` if none did.
    """

    def __init__(self, message: str, gone: Mapping[str, int], place: str | None) -> None:
        super().__init__(message)
        self.gone, self.place = gone, place


def widened(ranked: Sequence[Ranked], structure: Structure, broken: BrokenCutError, meter: Meter) -> list[Ranked]:
    """The same groups, of which those that the model does not run without keep more units than they had then.

    Some layers do not run at every width: statistics of one number, kernels for multiples. Groups at the module
    that raised keep a unit more. Where there are none, as in a check of the model's own forward pass, one whose
    units make the model run again is looked for, and keeps as many as it takes.

    Args:
        ranked: the groups.
        structure: of the model.
        broken: at which widths it does not run.
        meter: runs it.

    Raises:
        BrokenCutError: no group there can keep more.
    """
    made, place = [], broken.place
    for group in ranked:
        record = structure.groups[group.key].record
        names = [layer.name for layer in (*record.producers, *record.consumers, *record.others)]
        there = bool(place) and any(name == place or name.startswith(f"{place}.") for name in names)
        gone = broken.gone.get(group.key, 0)
        made.append(replace(group, least=group.units - gone + 1) if there and gone else group)
    if any(one is not other for one, other in zip(made, ranked, strict=True)):
        return made

    def runs(gone: Mapping[str, int]) -> bool:
        try:
            macs_of(cut_copy(structure, ranked, gone), meter, gone)
        except StructureError:
            return False
        return True

    for number, group in enumerate(ranked):
        low, high = 0, broken.gone.get(group.key, 0)
        if not high or not runs({**broken.gone, group.key: 0}):
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if runs({**broken.gone, group.key: middle}) else (low, middle)
        made[number] = replace(group, least=group.units - low)
        return made
    raise broken


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Say of an exception of the model's what was going on.

    Raises:
        StructureError: for any that is none of the package's own.
    """
    try:
        yield
    except (IPPROError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise StructureError(f"{what}: {type(error).__name__}: {error}") from error
