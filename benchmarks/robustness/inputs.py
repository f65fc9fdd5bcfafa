"""Random inputs that the lines share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def image(n: int, generator: torch.Generator) -> Tensor:
    """Small images."""
    return torch.randn(n, 3, 8, 8, generator=generator)


def pair(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two views."""
    return image(n, generator), image(n, generator)


def video(n: int, generator: torch.Generator) -> Tensor:
    """Four frames a sample."""
    return torch.randn(n, 4, 3, 8, 8, generator=generator)


def tokens(n: int, generator: torch.Generator) -> Tensor:
    """Seven tokens of six numbers."""
    return torch.randn(n, 7, 6, generator=generator)


def vector(n: int, generator: torch.Generator) -> Tensor:
    """Twelve numbers."""
    return torch.randn(n, 12, generator=generator)


def images(side: int) -> Callable[[int, torch.Generator], Tensor]:
    """Images of so many pixels a side."""
    return lambda n, generator: torch.randn(n, 3, side, side, generator=generator)
