"""Seeds derived from what they are for, so that a run that goes on needs no history."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(*parts: int | str) -> int:
    """Return a 63-bit seed that is a function of ``parts``."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Let torch's CPU stream start at ``derive(*parts)`` inside, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(*parts))
        yield


def permutation(count: int, *parts: int | str) -> list[int]:
    """Return the numbers below ``count`` in an order that is a function of ``parts``."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive(*parts))).tolist()
