"""The estimator that options ask for."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..estimators.base import Estimator, LossScale, registered_estimators
from ..estimators.centered import MADE_UP, CenteredEstimator
from ..estimators.expected import ExpectedEstimator
from ..estimators.paper import PaperEstimator
from .options import LossReduction, Options


def estimator_of(
    options: Options, loss_reduction: LossReduction = "mean", model: nn.Module | None = None
) -> Estimator:
    """The estimator; to make scores of sums it needs no model."""
    if loss_reduction not in get_args(LossReduction):
        raise ValueError(f"loss_reduction={loss_reduction!r}; choose one of 'mean', 'sum'")
    values = options.in_force
    if options.estimator in registered_estimators():
        return registered_estimators()[options.estimator](_loss_scale(loss_reduction))
    if options.estimator == "paper":
        return PaperEstimator(values["step_size"], values["target"])
    return expected_estimator(options, loss_reduction, model)


def expected_estimator(
    options: Options, loss_reduction: LossReduction = "mean", model: nn.Module | None = None
) -> ExpectedEstimator:
    """The estimator ``"expected"``, with offsets measured from where the options say."""
    scale = _loss_scale(loss_reduction)
    values, joint = options.in_force, options.group_reduction == "joint"
    power, reference = values["power"], values["reference"]
    if not joint or reference == "origin":
        return ExpectedEstimator(power, joint, scale, options.couples, options.refitted)
    if reference == "mean":
        return CenteredEstimator(power, scale, options.couples, lambda norm: 1.0, options.refitted)
    modules = () if model is None else model.named_modules()
    norms = {name for name, module in modules if isinstance(module, _BatchNorm)}
    if model is not None and not norms:
        return ExpectedEstimator(power, True, scale, options.couples, options.refitted)
    share = partial(_share, norms)
    return CenteredEstimator(power, scale, options.couples, share, options.refitted)


def _share(norms: Collection[str], norm: str | None) -> float:
    return MADE_UP if norm in norms else 0.0


def _loss_scale(loss_reduction: LossReduction) -> LossScale:
    """A mean over the batch divides each sample's gradient by its size."""
    return (lambda batch: float(batch)) if loss_reduction == "mean" else (lambda batch: 1.0)
