"""In which order the units of all groups go, and how many of each group are gone after so many: no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class Ranked:
    """A group in the ranking.

    Attributes:
        key: of the group.
        order: ``(units,)`` int64, its units, those that go first at the front.
        scores: ``(units,)`` float64 of the units in that order, ascending but for those that have to stay.
        least: units that have to stay.
        multiple: units that stay are a multiple of this, unless all do.
    """

    key: str
    order: Tensor
    scores: Tensor
    least: int
    multiple: int = 1

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.order)

    @property
    def most(self) -> int:
        """How many units can go."""
        return self.rounded(self.units - max(self.least, 1))

    def rounded(self, gone: int) -> int:
        """The largest number of units up to ``gone`` that can go together."""
        kept = self.units - gone
        kept = min(-(-kept // self.multiple) * self.multiple, self.units)
        return self.units - kept

    @classmethod
    def of(
        cls, key: str, scores: Tensor, least: int, multiple: int = 1, indispensable: Tensor | None = None
    ) -> Ranked:
        """Rank the units of a group by their ``scores``; equal ones in their own order.

        Args:
            key: of the group.
            scores: ``(units,)``.
            least: units that have to stay, whichever.
            multiple: see above.
            indispensable: numbers of units that have to stay.
        """
        values = scores.detach().double().cpu()
        order = values.argsort(stable=True)
        if indispensable is not None and len(indispensable):
            stays = torch.isin(order, indispensable)
            order = torch.cat((order[~stays], order[stays]))
            least = max(least, len(indispensable))
        return cls(key, order, values[order], least, multiple)


class RemovalOrder:
    """All units that can go, one after another.

    Args:
        groups: what is ranked.
        scope: ``"global"``: by score over all groups; equal scores alternate between groups. ``"local"``: so that
            all groups lose the same fraction at any time, up to one unit.
    """

    def __init__(self, groups: Sequence[Ranked], scope: str) -> None:
        self.groups = tuple(groups)
        keys, owners, places = [], [], []
        for number, group in enumerate(groups):
            most = group.most
            # Groups of one width would all lose their next unit at once: stagger them.
            place = (torch.arange(most) + (number + 1) * GOLDEN % 1) / max(group.units, 1)
            keys.append(group.scores[:most] if scope == "global" else place.double())
            places.append(place)
            owners.append(torch.full((most,), number))
        self._owner = torch.cat([*owners, torch.zeros(0, dtype=torch.long)])
        key, place = (torch.cat([*parts, torch.zeros(0).double()]) for parts in (keys, places))
        by_place = place.argsort(stable=True)
        self._owner = self._owner[by_place][key[by_place].argsort(stable=True)]

    def __len__(self) -> int:
        return len(self._owner)

    def gone(
        self, count: int, least: Mapping[str, int] | None = None, most: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Units that are gone of each group after the first ``count``.

        Args:
            count: of units of all groups.
            least: groups that lose at least so many.
            most: groups that lose at most so many.
        """
        tally = torch.bincount(self._owner[:count], minlength=len(self.groups)).tolist()
        low, high = least or {}, most or {}
        return {
            group.key: group.rounded(min(max(number, low.get(group.key, 0)), high.get(group.key, group.units)))
            for group, number in zip(self.groups, tally, strict=True)
        }
