"""How far a training has come, by epochs or by the clock, and the learning rate that goes with it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Part of a training that is done, from 0 to 1.

    Args:
        total_steps: Steps of the whole, where there is no time limit.
        seconds: Time limit from now; 0 for none.
    """

    total_steps: int
    seconds: float = 0.0
    steps: int = 0
    _begin: float = field(default_factory=time.perf_counter)

    @property
    def part(self) -> float:
        """Return what is done, as a part of the whole."""
        if self.seconds > 0:
            return min(1.0, (time.perf_counter() - self._begin) / self.seconds)
        return self.steps / self.total_steps


def warm_cosine(part: float, warmup: float) -> float:
    """Return the factor of the learning rate: a linear rise up to ``warmup``, then a cosine down to 0."""
    if part < warmup:
        return max(part / warmup, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (part - warmup) / (1 - warmup)))
