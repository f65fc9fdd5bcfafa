"""Copies of a model that are cut to see how large they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import IPPROError, StructureError
from .counter import Counts
from .cut import Cut
from .measure import Meter, Unit
from .order import Ranked
from .search import Sizes
from .structure import Prunable, Structure


def mask_of(prunable: Prunable, units: Tensor) -> Tensor:
    """Which positions of a group go, where some of its units do."""
    gone = torch.zeros(prunable.units, dtype=torch.bool)
    gone[units] = True
    return gone[prunable.unit]


def cut_copy(structure: Structure, ranked: Sequence[Ranked], gone: Mapping[str, int]) -> nn.Module:
    """A copy of the structure's model without so many units of each group: those that go, as sizes may differ."""
    model = structure.model
    if not any(gone.values()):
        return model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}  # those that are cut are made anew
    made = copy.deepcopy(model, shared)
    masks = {r.key: mask_of(structure.groups[r.key], r.order[: gone[r.key]]) for r in ranked if gone[r.key]}
    with explained("the model does not run once it is cut"):
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
        with explained("the model does not run once it is cut"):
            if unit == "params":
                return sum(p.numel() for p in model.parameters()) / whole.params
            return meter.counts(model).macs / whole.macs

    return left


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
