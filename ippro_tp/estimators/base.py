"""What an estimator is: ``update`` adds what one pass gave, ``scores`` turns sums into a score a channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..records import GroupRecord, Layer, Pass, Wiring
from .sums import Sums


class Estimator(Protocol):
    """What an observation and a score need to know of an estimator."""

    name: str
    taps_activations: bool
    taps_through_norms: bool
    taps_inputs: bool
    centered: frozenset[str]

    def trained_parameters(self, model: nn.Module, records: Sequence[GroupRecord]) -> dict[str, nn.Parameter]:
        """Parameters, by name, whose gradients are needed."""

    def update(self, sums: Sums, records: Sequence[GroupRecord], done: Pass) -> None:
        """Add one pass."""

    def unneeded(self, records: Sequence[GroupRecord], done: Pass) -> tuple[set[str], set[str]]:
        """Producers whose outputs, and readers whose inputs, need no tap, as the first forward pass shows."""

    def layers(self, record: GroupRecord, wiring: Wiring) -> tuple[Layer, ...]:
        """The producers of a group that carry its score."""

    def scores(self, sums: Sums, record: GroupRecord, wiring: Wiring, reduction: str, model: nn.Module) -> Tensor:
        """``(record.width,)`` scores, higher = keep."""


def reduce_layers(values: Sequence[Tensor], layers: Sequence[Layer], width: int, reduction: str) -> Tensor:
    """Combine the scores of coupled layers into one a position, in Torch-Pruning's vocabulary.

    Args:
        values: per layer, ``(k,)`` scores of ``layer.index``.
        layers: the layers, of the same order.
        width: positions in the group.
        reduction: "mean", "sum", "max", "prod" or "first".

    Returns:
        ``(width,)``.

    Raises:
        ValueError: unknown reduction.

    Example:
        >>> both = Layer("a", torch.arange(2), torch.arange(2), 2)
        >>> reduce_layers([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], [both, both], 2, "max")
        tensor([3., 4.])
    """
    if reduction == "first":
        values, layers, reduction = values[:1], layers[:1], "sum"
    modes = {"mean": "sum", "sum": "sum", "prod": "prod", "max": "amax"}
    if reduction not in modes:
        raise ValueError(f"unknown group_reduction {reduction!r}")
    start = {"sum": 0.0, "prod": 1.0, "amax": float("-inf")}[modes[reduction]]
    out = values[0].new_full((width,), start)
    for value, layer in zip(values, layers, strict=True):
        out.scatter_reduce_(0, layer.root.to(value.device), value, reduce=modes[reduction])
    if reduction == "mean":
        out /= len(values)
    return torch.where(out.isinf(), torch.zeros_like(out), out) if reduction == "max" else out
