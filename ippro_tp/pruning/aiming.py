"""A latency that is asked for: searched for with a table's predictions, and corrected by what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from .latency import LatencyTable
from .search import Found, Sizes

WITHIN = 0.05
"""A latency is met within this fraction of itself."""
NEAR = 0.015
"""Nearer than this is not aimed again: times are no more certain."""
SHOTS = 6


@dataclass(frozen=True)
class LatencyAim:
    """Finds the cut of a latency.

    Args:
        table: predicts; of the unpruned model.
        measure: fraction of the unpruned model's time that a model takes, end to end.
    """

    table: LatencyTable
    measure: Callable[[nn.Module], float]

    def predicted(self, model: nn.Module) -> Sizes:
        """Predicted fractions of the time that is left, for more units gone of ``model``'s groups."""
        present, whole = self.table.gone(model), self.table.seconds({})

        def left(gone: Mapping[str, int]) -> float:
            at = {key: count + gone.get(key, 0) for key, count in present.items()}
            return self.table.seconds(at) / whole

        return left

    def find(
        self,
        search: Callable[[float], Found],
        cut: Callable[[Mapping[str, int]], nn.Module],
        wanted: float,
    ) -> tuple[Found, float]:
        """The cut that is measured nearest to ``wanted``, and what was predicted for it.

        Where the measured time is off, the search aims as much higher or lower the next time; from the third on
        the two nearest shots tell how much.

        Args:
            search: the cut whose predicted time is nearest to its argument.
            cut: a copy of the model with so many units gone of each group.
            wanted: fraction of the unpruned model's time.
        """
        aim, tries = wanted, 0
        shots: list[tuple[float, float, Found]] = []
        for _ in range(SHOTS):
            found = search(aim)
            tries += found.tries
            known = next((m for _, m, other in shots if other.gone == found.gone), None)
            measured = self.measure(cut(found.gone)) if known is None else known
            shots.append((found.left, measured, found))
            if known is not None or abs(measured - wanted) <= NEAR * wanted:
                break
            aim = min(max(_next(shots, wanted), 0.01), 0.999)
        predicted, measured, best = min(shots, key=lambda shot: abs(shot[1] - wanted))
        return Found(best.gone, measured, tries), predicted


def _next(shots: list[tuple[float, float, Found]], wanted: float) -> float:
    """Where to aim: along the line through the shots on both sides of ``wanted``, else shifted by what was off."""
    above = min((s for s in shots if s[1] > wanted), key=lambda s: s[1], default=None)
    below = max((s for s in shots if s[1] <= wanted), key=lambda s: s[1], default=None)
    if above is not None and below is not None and above[0] > below[0]:
        return below[0] + (above[0] - below[0]) * (wanted - below[1]) / (above[1] - below[1])
    nearest = min(shots, key=lambda s: abs(s[1] - wanted))
    return nearest[0] + wanted - nearest[1]
