"""Time of an operation over its widths: linear between measured points, with the steps of a staircase."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGNMENTS = (16, 8, 4, 2, 1)
"""Widths are told apart by the largest of these that divides them: kernels work on blocks."""
GRID = 2
"""Operations with more widths than this are measured along each of them rather than on a grid."""
FLAT = 0.25
"""Times are a staircase where channels within a step save less than this part of their share of the time."""
Widths = tuple[int, ...]


def alignment(width: int) -> int:
    """The largest of :data:`ALIGNMENTS` that divides ``width``."""
    return next(a for a in ALIGNMENTS if width % a == 0)


@dataclass(frozen=True)
class Surface:
    """Measured times and what lies between them.

    Attributes:
        knots: per variable, the widths that were measured, ascending; the last is the full one.
        seconds: by widths.
        factors: per variable, by alignment: how much longer a width takes than one that is a multiple of 16 would;
            1 where nothing is said.
        steps: per variable, in which steps times fall; 1 where nothing is said.
    """

    knots: tuple[Widths, ...]
    seconds: Mapping[Widths, float]
    factors: tuple[Mapping[int, float], ...] = ()
    steps: tuple[int, ...] = ()

    @property
    def full(self) -> Widths:
        """The widths before pruning."""
        return tuple(knots[-1] for knots in self.knots)

    def at(self, widths: Sequence[int]) -> float:
        """Seconds of one call at these widths."""
        factors = self.factors or ({},) * len(self.knots)
        scale = 1.0
        for width, known in zip(widths, factors, strict=True):
            scale *= known.get(alignment(width), 1.0)
        steps = self.steps or (1,) * len(self.knots)
        stepped = [
            min(-(-width // step) * step, full) for width, step, full in zip(widths, steps, self.full, strict=True)
        ]
        return self._smooth(stepped, factors) * scale

    def _smooth(self, widths: Sequence[int], factors: Sequence[Mapping[int, float]]) -> float:
        def known(at: Widths) -> float:
            value = self.seconds[at]
            for width, by_alignment in zip(at, factors, strict=True):
                value /= by_alignment.get(alignment(width), 1.0)
            return value

        full = self.full
        if len(full) > GRID:
            whole = known(full)
            total = whole
            for place, (width, knots) in enumerate(zip(widths, self.knots, strict=True)):
                for knot, share in _neighbours(knots, width):
                    total += share * (known((*full[:place], knot, *full[place + 1 :])) - whole)
            return max(total, 0.0)
        total = 0.0
        around = [_neighbours(knots, width) for knots, width in zip(self.knots, widths, strict=True)]
        for corner in itertools.product(*around):
            share = 1.0
            for _, part in corner:
                share *= part
            total += share * known(tuple(knot for knot, _ in corner))
        return max(total, 0.0)


def _neighbours(knots: Widths, width: int) -> list[tuple[int, float]]:
    """The measured widths around ``width`` and their shares; beyond the ends the nearest line goes on."""
    if len(knots) == 1:
        return [(knots[0], 1.0)]
    upper = min(max(bisect_right(knots, width), 1), len(knots) - 1)
    low, high = knots[upper - 1], knots[upper]
    share = (width - low) / (high - low)
    return [(knot, part) for knot, part in ((low, 1 - share), (high, share)) if part]


def knots_of(full: int, step: int, count: int, lowest: float = 0.1) -> Widths:
    """Widths to measure between ``lowest`` of the full one and it: multiples of 16 or 8 where there are enough.

    Args:
        full: the full width.
        step: widths differ from it by multiples of this.
        count: of widths.
        lowest: fraction of the full width.

    Example:
        >>> knots_of(64, 1, 4), knots_of(10, 1, 4)
        ((16, 32, 48, 64), (1, 4, 7, 10))
    """
    chosen = {full}
    multiple = next((m for m in (16, 8) if full >= 4 * m), 1)
    for number in range(count - 1):
        wanted = full * (lowest + (1 - lowest) * number / (count - 1))
        near = max(round(wanted / multiple), 1) * multiple
        chosen.add(reachable(near, full, step))
    return tuple(sorted(chosen))


def reachable(width: int, full: int, step: int) -> int:
    """The width nearest to ``width`` that differs from ``full`` by a multiple of ``step``, and is positive."""
    times = min(max(round((full - width) / step), 0), (full - 1) // step)
    return full - times * step


def points_of(knots: Sequence[Widths]) -> list[Widths]:
    """Where to measure: on the grid of all knots or, with many variables, along each."""
    if len(knots) <= GRID:
        return list(itertools.product(*knots))
    full = tuple(k[-1] for k in knots)
    found = {full: None}
    for place, widths in enumerate(knots):
        found.update({(*full[:place], width, *full[place + 1 :]): None for width in widths})
    return list(found)


def probes_of(full: Widths, place: int, step: int) -> list[Widths]:
    """Where to look for steps of a staircase along one variable: at multiples of 16 and just below."""
    if full[place] < 32 or step > 1:
        return []
    bases = {max(int(full[place] * share) // 16 * 16, 16) for share in (0.55, 0.8, 1.0)}
    widths = [base - below for base in sorted(bases) for below in (0, 1, 2, 4, 8)]
    return [(*full[:place], width, *full[place + 1 :]) for width in widths]


Stair = tuple[int, float, float]
"""Channels below a multiple of 16, the same as a fraction of it, and the fraction of its time that is saved."""


def stairs_of(place: int, times: Mapping[Widths, float]) -> list[Stair]:
    """What widths below multiples of 16 save, along one variable."""
    found = []
    for widths, seconds in times.items():
        base = -(-widths[place] // 16) * 16
        top = times.get((*widths[:place], base, *widths[place + 1 :]))
        if top and base > widths[place]:
            below = base - widths[place]
            found.append((below, below / base, 1 - seconds / top))
    return found


def step_of(stairs: Sequence[Stair]) -> int:
    """In which steps times fall: channels within one save less than a part of their share; 1 if there is none."""
    for step in ALIGNMENTS[:-1]:
        within = [(share, saved) for below, share, saved in stairs if below < step]
        if within and sum(saved for _, saved in within) < FLAT * sum(share for share, _ in within):
            return step
    return 1


def factors_of(surface: Surface, probed: Sequence[Mapping[Widths, float]]) -> tuple[Mapping[int, float], ...]:
    """Medians of measured over interpolated times, by alignment, for each variable."""
    found = []
    for place, times in enumerate(probed):
        ratios: dict[int, list[float]] = {}
        for widths, seconds in times.items():
            smooth = surface.at(widths)
            if smooth > 0:
                ratios.setdefault(alignment(widths[place]), []).append(seconds / smooth)
        found.append({kind: sorted(values)[len(values) // 2] for kind, values in ratios.items()})
    return tuple(found)
