"""How far down a removal order a target is met: the number of units is searched for, sizes are measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .order import RemovalOrder

TOLERANCE = 0.01
"""A target is met within this fraction of the whole."""
CLOSE = 0.001
"""Nearer than this is not searched for."""
ATTEMPTS = 24
"""Searches with other bounds, where a group's next step is too large, before a target is refused."""
Sizes = Callable[[Mapping[str, int]], float]
"""Units gone of each group -> the fraction of the whole that is left; the more are gone, the less is left."""


@dataclass(frozen=True)
class Found:
    """Units gone of each group, the fraction that is left then, and how many sizes were measured to find it."""

    gone: dict[str, int]
    left: float
    tries: int


def tolerance(target: float) -> float:
    """How far from ``target`` is near enough: a hundredth of the whole, and a tenth of a small target."""
    return min(TOLERANCE, target / 10)


def find(order: RemovalOrder, sizes: Sizes, target: float) -> Found:
    """The cut whose size is nearest to ``target``, along ``order``.

    Where a group's next step is too large, the group stays before the step and the others go on; or it takes the
    step, and the others stay behind. So narrow groups, or widths in multiples, still add up to the target.

    Args:
        order: of removal.
        sizes: measures what is left.
        target: the fraction that is wanted.
    """
    known: dict[tuple[int, ...], float] = {}

    def left(gone: dict[str, int]) -> float:
        key = tuple(gone.values())
        if key not in known:
            known[key] = sizes(gone)
        return known[key]

    start = order.gone(0)
    best = Found(start, left(start), 0)
    waiting: deque[tuple[dict[str, int], dict[str, int]]] = deque([({}, {})])
    for _ in range(ATTEMPTS):
        if not waiting or abs(best.left - target) <= tolerance(target):
            break
        least, most = waiting.popleft()
        low, high = _bracket(order, least, most, left, target)
        before, after = order.gone(low, least, most), order.gone(high, least, most)
        for gone in (before, after):
            if abs(left(gone) - target) < abs(best.left - target):
                best = Found(gone, left(gone), 0)
        for key in before:
            if before[key] != after[key]:
                waiting.append((least, {**most, key: before[key]}))
                waiting.append(({**least, key: after[key]}, most))
    return Found(best.gone, best.left, len(known))


def _bracket(
    order: RemovalOrder,
    least: Mapping[str, int],
    most: Mapping[str, int],
    left: Callable[[dict[str, int]], float],
    target: float,
) -> tuple[int, int]:
    """Neighbouring counts, more left than ``target`` at the first and not more at the second, or both the same."""

    def at(count: int) -> float:
        return left(order.gone(count, least, most))

    low, high = 0, len(order)
    above, below = at(low), at(high)
    if below > target:
        return high, high
    if above <= target:
        return low, low
    halve = False
    while high - low > 1:
        # Sizes fall nearly linearly; where interpolation narrows little, halve.
        share = 0.5 if halve else min(max((above - target) / (above - below), 0.02), 0.98)
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        size = at(middle)
        if abs(size - target) <= min(CLOSE, tolerance(target)):
            return middle, middle
        narrowed = (high - low) / 2
        low, high, above, below = (middle, high, size, below) if size > target else (low, middle, above, size)
        halve = high - low > narrowed
    return low, high
