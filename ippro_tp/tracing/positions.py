"""A few positions of what a layer reads, kept with the pass that is running."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..records import Pass
from .plan import channel_axis

POSITIONS = 32
"""The largest number of positions of a sample that are kept, where the first dimension is the samples'."""


def spread_rows(x: Tensor, axis: int) -> Tensor:
    """A copy of ``x`` at evenly spaced positions, as rows of channels.

    The first dimension is kept whole, so that a sample gives the same rows whatever its batch.

    Args:
        x: of any shape with channels along ``axis``.
        axis: non-negative.

    Returns:
        ``(rows, channels)``.

    Example:
        >>> spread_rows(torch.zeros(2, 3, 8, 8), axis=1).shape
        torch.Size([32, 3])
    """
    rows = x.detach().movedim(axis, -1)
    counts = rows.shape[1:-1]
    stride = max(1, int((math.prod(counts) / POSITIONS) ** (1 / max(len(counts), 1))))  # none below it will do
    while math.prod(-(-count // stride) for count in counts) > POSITIONS:
        stride += 1
    for dim in range(1, rows.dim() - 1):
        first = min(stride, rows.shape[dim]) // 2
        rows = rows.narrow(dim, first, rows.shape[dim] - first)[
            (slice(None),) * dim + (slice(None, None, stride),)
        ]
    return rows.reshape(-1, rows.shape[-1]).clone()


def keep_rows(name: str, running: Callable[[], Pass | None]) -> Callable[[nn.Module, Any], None]:
    """A forward pre-hook of the layer ``name`` that adds to the rows of the pass that is running, if one is."""

    def hook(module: nn.Module, args: Any) -> None:
        current, x = running(), args[0] if args else None
        if current is not None and isinstance(x, Tensor) and x.is_floating_point():
            with torch._C.DisableTorchFunction(), torch.no_grad():
                current.rows.setdefault(name, []).append(spread_rows(x, channel_axis(module, x)))

    return hook
