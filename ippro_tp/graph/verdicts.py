"""What is known of a group once it was tried, and how many of its units are tried."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

Status = Literal["proved", "repaired", "whole"]


@dataclass(frozen=True)
class Verdict:
    """What is known of a group.

    Attributes:
        status: ``"proved"``; ``"repaired"``: proved after numbers that modules keep were found by trial, or with
            dimensions of heads instead of heads; ``"whole"``: left as it is.
        reason: why it is left whole, or what was repaired; empty for ``"proved"``.
        multiple: the units that stay have to be a multiple of this.
    """

    status: Status
    reason: str = ""
    multiple: int = 1


def counts_of(width: int) -> list[int]:
    """Up to four numbers of units to remove, around a quarter.

    What is left has no factor in common with ``width`` if possible: a width that a forward pass holds as a number,
    ``x.view(n, 12, -1)``, should not fit by chance.

    Example:
        >>> counts_of(64), counts_of(12)
        ([15, 17, 13, 19], [1, 5, 7, 3])
    """
    if width < 2:
        return [0]
    some = range(1, max(2, 3 * width // 4 + 1))
    return sorted(some, key=lambda count: (math.gcd(width - count, width) > 1, abs(count - width / 4)))[:4]


def kind_of(key: str) -> str:
    """What keys of groups at the same place of repeated blocks have in common."""
    return re.sub(r"[0-9]+", "#", key)
