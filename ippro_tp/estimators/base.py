"""The interface of estimators: ``update`` adds one pass to sums, ``scores`` turns sums into scores of channels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..records import GroupRecord, Layer, Pass, Wiring
from .sums import Sums

LossScale = Callable[[int], float]
"""``(batch size) -> factor`` that turns gradients of the loss into per-sample gradients."""
OWN = ("expected", "paper")
"""Names of the package's own estimators."""
_REGISTERED: dict[str, Callable[[LossScale], Estimator]] = {}
_Made = TypeVar("_Made", bound=Callable[[LossScale], "Estimator"])


class Estimator(ABC):
    """Base class of estimators; subclasses implement :meth:`update` and :meth:`scores`.

    Attributes:
        taps_activations: whether the estimator needs :attr:`Pass.activations`.
        taps_through_norms: whether sigma may follow the norm after a layer.
        taps_inputs: whether the estimator needs :attr:`Pass.inputs` and :attr:`Pass.reads`.
        centered: groups that are measured where they are read.
    """

    taps_activations = False
    taps_through_norms = False
    taps_inputs = False
    centered: frozenset[str] = frozenset()

    @abstractmethod
    def update(self, sums: Sums, records: Sequence[GroupRecord], done: Pass) -> None:
        """Add one forward and backward pass to ``sums``."""

    @abstractmethod
    def scores(self, sums: Sums, record: GroupRecord, wiring: Wiring, reduction: str, model: nn.Module) -> Tensor:
        """``(record.width,)`` scores, higher = keep."""

    def trained_parameters(self, model: nn.Module, records: Sequence[GroupRecord]) -> dict[str, nn.Parameter]:
        """Parameters, by name, whose gradients are needed; by default none."""
        return {}

    def unneeded(self, records: Sequence[GroupRecord], done: Pass) -> tuple[set[str], set[str]]:
        """Names of producers and of readers that turn out, in the first forward pass, to need no tap."""
        return set(), set()

    def sampled(self, records: Sequence[GroupRecord]) -> set[str]:
        """Names of readers of which the estimator needs :attr:`Pass.rows`; by default none."""
        return set()

    def layers(self, record: GroupRecord, wiring: Wiring) -> tuple[Layer, ...]:
        """The producers of a group that carry its score: those that no channel norm stands for."""
        return tuple(p for p in record.producers if p.name not in wiring.norm_of)


def register_estimator(name: str) -> Callable[[_Made], _Made]:
    """Register the decorated :class:`Estimator` for use as ``PROImportance(estimator=name)``.

    It is created by ``cls(loss_scale)``, where ``loss_scale(batch_size)`` is the factor that turns gradients of
    the loss into per-sample gradients. CONTRIBUTING.md has an example.

    Raises:
        ValueError: ``name`` is one of the package's own estimators.
    """
    if name in OWN:
        raise ValueError(f"the estimator {name!r} is the package's own; choose another name")

    def register(made: _Made) -> _Made:
        _REGISTERED[name] = made
        return made

    return register


def registered_estimators() -> Mapping[str, Callable[[LossScale], Estimator]]:
    """Registered estimators, by name."""
    return _REGISTERED


def reduce_layers(values: Sequence[Tensor], layers: Sequence[Layer], width: int, reduction: str) -> Tensor:
    """Combine the scores of coupled layers into one per position, with Torch-Pruning's reductions.

    Args:
        values: per layer, ``(k,)`` scores of ``layer.index``.
        layers: the layers, in the same order.
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
