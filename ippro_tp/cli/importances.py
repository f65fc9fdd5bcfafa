"""Importances by the names that ``--importance`` takes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import UsageError

LossFn = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Named:
    """An importance, and what the flags have to know about it.

    Attributes:
        name: what ``--importance`` calls it.
        make: ``(seed, cost, depletion) -> importance``; the last two are ``None`` but for those of this package.
        loss: ``seed -> loss_fn``, where it is another than the importance's own.
        labels: whether it needs labels of whole images.
        priced: whether it takes a cost and a depletion itself.
        degree: 1 if its scores behave like ``|t|``, 2 if like ``t^2``.
        signed: whether scores can be negative: they are no losses then, which could add up.
    """

    name: str
    make: Callable[[int, Any, Any], Any]
    loss: Callable[[int], LossFn] | None = None
    labels: bool = False
    priced: bool = False
    degree: float = 1.0
    signed: bool = False


def _pro(**options: Any) -> Callable[[int, Any, Any], Any]:
    def make(seed: int, cost: Any, depletion: Any) -> Any:
        from ..importance.pro import PROImportance

        return PROImportance(seed=seed, cost=cost, depletion=depletion, **options)

    return make


def _paper(step_size: float, target: Any) -> Callable[[int, Any, Any], Any]:
    def make(seed: int, cost: Any, depletion: Any) -> Any:
        from ..importance.pro import PROImportance

        return PROImportance(estimator="paper", step_size=step_size, target=target)

    return make


def _spasp(seed: int, cost: Any, depletion: Any) -> Any:
    from ..importance.spasp import SpaSPImportance

    return SpaSPImportance()


def _torch_pruning(name: str, **options: Any) -> Callable[[int, Any, Any], Any]:
    def make(seed: int, cost: Any, depletion: Any) -> Any:
        import torch_pruning as tp

        return getattr(tp.importance, name)(**options)

    return make


def _noise(seed: int) -> LossFn:
    from ..calibration.losses import LogitNoise

    return LogitNoise(seed)


def _cross_entropy(seed: int) -> LossFn:
    from ..calibration.losses import cross_entropy

    return cross_entropy


IMPORTANCES = {
    named.name: named
    for named in (
        Named("pro", _pro(), priced=True),
        Named("pro-labels", _pro(), _cross_entropy, labels=True, priced=True),
        Named("pro-noise", _pro(), _noise, priced=True),
        Named("pro-square", _pro(power=2), priced=True, degree=2),
        Named("pro-origin", _pro(reference="origin"), priced=True),
        Named("pro-mean", _pro(reference="mean"), priced=True),
        Named("ispasp", _spasp),
        Named("random", _torch_pruning("RandomImportance")),
        Named("l1", _torch_pruning("MagnitudeImportance", p=1)),
        Named("l2", _torch_pruning("MagnitudeImportance", p=2), degree=2),
        Named("bn", _torch_pruning("BNScaleImportance")),
        Named("lamp", _torch_pruning("LAMPImportance"), degree=2),
        Named("fpgm", _torch_pruning("FPGMImportance"), degree=2),
        Named("taylor", _torch_pruning("TaylorImportance"), labels=True),
        Named("hessian", _torch_pruning("HessianImportance"), labels=True, degree=2),
    )
}
FAMILIES = {"pro-paper-lam": "conv", "pro-paper-norm-lam": "norm"}
"""Eq. 4 with the step size that follows the name, and what it takes for a filter."""


def find_importance(name: str) -> Named:
    """Return the importance called ``name``: one of the list, or ``PACKAGE.MODULE:NAME``, a class or function.

    Raises:
        UsageError: There is none; the message lists all.
    """
    if name in IMPORTANCES:
        return IMPORTANCES[name]
    for prefix, target in FAMILIES.items():
        match = re.fullmatch(re.escape(prefix) + r"([0-9.]+(?:[eE][+-]?[0-9]+)?)", name)
        if match:
            return Named(name, _paper(float(match.group(1)), target), labels=True, signed=True)
    module, found, attribute = name.partition(":")
    if found:
        try:
            made = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"--importance {name}: {error}") from error
        return Named(name, lambda seed, cost, depletion: made())
    known = [*IMPORTANCES, *(f"{prefix}<value>" for prefix in FAMILIES), "PACKAGE.MODULE:NAME"]
    raise UsageError(f"unknown importance {name!r}; known: {', '.join(known)}")
