"""Clocks: many calls timed in turns, so that a machine that is busy for a while is busy for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

Clock = Callable[[], float]
"""Seconds that go by."""
SHORTEST = 2e-4
"""What is timed takes so many seconds at least: short calls are repeated."""
MOST_CALLS = 30
FEW_CALLS = 3
ROUNDS = (3, 9)
MOST_ROUNDS = 25


def wall_clock() -> float:
    """The clock of :mod:`torch.utils.benchmark`, which waits for the accelerator first."""
    from torch.utils.benchmark.utils.timer import timer  # late: it looks for compilers, and may warn

    return float(timer())


@dataclass
class Job:
    """Something to be timed.

    Attributes:
        prepare: makes the call; not timed.
        together: repeated calls follow each other without a look at the clock, which on an accelerator waits.
        repeats: calls that are timed in each round.
        seconds: of one call, one number for each round.
    """

    prepare: Callable[[], Callable[[], Any]]
    together: bool = False
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median over rounds."""
        return median(self.seconds)

    def warm_up(self, clock: Clock) -> None:
        """Call until all is in place, and find out how many calls make a measurement."""
        self.prepare()()
        call = self.prepare()
        start = clock()
        call()
        once = max(clock() - start, 1e-7)
        self.repeats = min(max(math.ceil(SHORTEST / once), 1), MOST_CALLS if self.together else FEW_CALLS)

    def measure(self, clock: Clock) -> None:
        """Time once."""
        if self.together:
            calls = [self.prepare() for _ in range(self.repeats)]
            start = clock()
            for call in calls:
                call()
            seconds = clock() - start
        else:
            seconds = 0.0
            for _ in range(self.repeats):
                call = self.prepare()
                start = clock()
                call()
                seconds += clock() - start
        self.seconds.append(seconds / self.repeats)


def interleaved(jobs: Sequence[Job], clock: Clock, budget: float) -> None:
    """Time all jobs in turn, round after round.

    Args:
        jobs: what is timed.
        clock: seconds.
        budget: seconds to be spent, about.
    """
    start = wall_clock()
    for job in jobs:
        job.warm_up(clock)
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and (wall_clock() - start) * (number + 1) / max(number, 1) > budget:
            break
        for job in jobs:
            job.measure(clock)


class Stopwatch(TorchDispatchMode):
    """Times each operation that runs inside.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._clock = clock
        self.seconds: list[float] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        start = self._clock()
        out = func(*args, **(kwargs or {}))
        self.seconds.append(self._clock() - start)
        return out


@dataclass(frozen=True)
class Timed:
    """A forward pass.

    Attributes:
        whole: median seconds.
        spread: half the interquartile range, as a fraction of the median.
        operations: median seconds of each operation in it, those that compute nothing too.
    """

    whole: float
    spread: float
    operations: tuple[float, ...]


def timed_in_place(
    passes: Sequence[tuple[Callable[[], Any], Callable[[], Any]]], clock: Clock, budget: float
) -> list[Timed]:
    """Time whole passes, and the operations in them, in turns.

    Args:
        passes: for each, the call that is timed as a whole and the one whose operations are.
        clock: seconds.
        budget: seconds to be spent, about.
    """
    wholes: list[list[float]] = [[] for _ in passes]
    parts: list[list[list[float]]] = [[] for _ in passes]
    begin = wall_clock()
    for whole, eager in passes:
        whole()
        eager()
    for number in range(MOST_ROUNDS):
        if number >= 3 and (wall_clock() - begin) * (number + 2) / (number + 1) > budget:
            break
        for (whole, eager), seconds, operations in zip(passes, wholes, parts, strict=True):
            start = clock()
            whole()
            seconds.append(clock() - start)
            watch = Stopwatch(clock)
            with watch:
                eager()
            operations.append(watch.seconds)
    found = []
    for seconds, operations in zip(wholes, parts, strict=True):
        low, middle, high = quantiles(seconds, n=4, method="inclusive")
        each = tuple(median(values) for values in zip(*operations, strict=True))
        found.append(Timed(middle, (high - low) / 2 / middle if middle else 0.0, each))
    return found
