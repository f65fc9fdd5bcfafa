"""Search for the pruning ratio that meets a MACs target.

MACs fall in steps, and not always: Torch-Pruning skips a group whose channels would all go, so that a larger
ratio can leave more MACs. The search bisects a bracket; if that ends beside the target, it scans for other
brackets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

WIDTH = 2e-4
"""Brackets narrower than this are not split."""


@dataclass(frozen=True)
class Found:
    """The ratio nearest to the target, and whether it is near enough."""

    ratio: float
    macs: float
    hit: bool
    tries: int


def find_ratio(
    macs_at: Callable[[float], float],
    target: float,
    memo: dict[float, float],
    tolerance: float = 0.01,
    upper: float = 0.9,
    max_tries: int = 40,
) -> Found:
    """Return the ratio whose MACs are nearest to ``target``; stop at the first within half the tolerance.

    Args:
        macs_at: Remaining MACs, as a fraction of the unpruned network's, at a ratio.
        target: Wanted fraction.
        memo: MACs of ratios that were tried before, for this and other targets; extended.
        tolerance: ``hit`` means at most this far from ``target``.
        upper: Largest ratio.
        max_tries: Evaluations of ``macs_at`` at most.
    """
    memo.setdefault(0.0, 1.0)
    tries = 0

    def evaluate(ratio: float) -> None:
        nonlocal tries
        if ratio not in memo:
            memo[ratio] = macs_at(ratio)
            tries += 1

    def best() -> float:
        return min(memo, key=lambda ratio: (abs(memo[ratio] - target), ratio))

    def near(margin: float) -> bool:
        return abs(memo[best()] - target) <= margin

    def bisect() -> None:
        for low, high in _brackets(memo, target):
            while high - low > WIDTH and tries < max_tries and not near(tolerance / 2):
                middle = round((low + high) / 2, 6)
                evaluate(middle)
                low, high = (middle, high) if memo[middle] > target else (low, middle)

    evaluate(upper)
    bisect()
    if not near(tolerance):
        for step in range(1, 16):
            if tries < max_tries:
                evaluate(round(upper * step / 16, 6))
        bisect()
    ratio = best()
    return Found(ratio, memo[ratio], near(tolerance), tries)


def _brackets(memo: dict[float, float], target: float) -> list[tuple[float, float]]:
    """Return neighbouring ratios with MACs above the target at the lower and not above it at the upper one."""
    ratios = sorted(memo)
    return [(a, b) for a, b in pairwise(ratios) if memo[a] > target >= memo[b]]
