"""The arms. A new criterion is one short function under ``@criterion``.

The function gets the network (a private copy), a TP pruner over it, the calibration batches and the seed, and
returns a TP importance that is evaluated right afterwards, once per group. A name that ends in ``<value>`` is
a family: the number in its place is passed as a fifth argument.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import nn

from benchmarks.criteria import baselines, peers
from benchmarks.criteria.ablation import Ablation
from benchmarks.errors import UsageError
from benchmarks.tasks.base import Batch

Build = Callable[[nn.Module, tp.pruner.BasePruner, list[Batch], int], Callable]


@dataclass(frozen=True)
class Criterion:
    """One arm: how its importance is made, and what the harness has to know about it."""

    name: str
    build: Build
    data: str
    """``none``, ``forward`` or ``backward``: what it needs of the calibration images."""
    degree: float
    """How scores grow with the loss increase's root: 1 for ``|t|``, 2 for ``t^2``; twice the cost exponent."""
    seeded: bool
    """Whether another calibration seed gives other scores."""
    signed: bool = False
    """Whether scores can be negative: they are no losses then, which could add up."""
    coupled: bool = False
    """Whether it knows how the channels of a group go together."""


_REGISTRY: dict[str, Criterion] = {}


def criterion(
    name: str,
    *,
    data: str = "none",
    degree: float = 1.0,
    seeded: bool | None = None,
    signed: bool = False,
    coupled: bool = False,
):
    """Register the decorated function as the arm ``name``.

    Args:
        name: What ``--criteria`` calls it; with a trailing ``<value>`` a family of arms.
        data: ``"none"``, ``"forward"`` or ``"backward"``.
        degree: 1 if the scores behave like ``|t|``, 2 if like ``t^2``.
        seeded: Whether the scores depend on the seed; by default those that use data do.
        signed: Whether scores can be negative.
        coupled: Whether it knows how the channels of a group go together.
    """

    def register(build):
        changes = data != "none" if seeded is None else seeded
        _REGISTRY[name] = Criterion(name, build, data, degree, changes, signed, coupled)
        return build

    return register


def known_criteria() -> list[str]:
    """Return the names of all arms, families with their ``<value>``."""
    return list(_REGISTRY)


def find_criterion(name: str) -> Criterion:
    """Return the arm called ``name``.

    Raises:
        UsageError: There is none; the message lists all.
    """
    if name in _REGISTRY and "<value>" not in name:
        return _REGISTRY[name]
    for pattern, found in _REGISTRY.items():
        if pattern.endswith("<value>"):
            match = re.fullmatch(re.escape(pattern.removesuffix("<value>")) + r"([0-9.eE+-]+)", name)
            if match:
                try:
                    build = functools.partial(found.build, value=float(match.group(1)))
                except ValueError:
                    continue
                return dataclasses.replace(found, name=name, build=build)
    raise UsageError(f"unknown criterion {name!r}; known: {', '.join(known_criteria())}")


@criterion("random", seeded=True)
def _random(model, pruner, batches, seed):
    torch.manual_seed(seed)
    return tp.importance.RandomImportance()


@criterion("l1")
def _l1(model, pruner, batches, seed):
    return tp.importance.MagnitudeImportance(p=1)


@criterion("l2", degree=2)
def _l2(model, pruner, batches, seed):
    return tp.importance.MagnitudeImportance(p=2)


@criterion("bn")
def _bn(model, pruner, batches, seed):
    return tp.importance.BNScaleImportance()


@criterion("lamp", degree=2)
def _lamp(model, pruner, batches, seed):
    return tp.importance.LAMPImportance()


@criterion("fpgm", degree=2)
def _fpgm(model, pruner, batches, seed):
    return tp.importance.FPGMImportance()


@criterion("fpgm-fixed")
def _fpgm_fixed(model, pruner, batches, seed):
    return baselines.SignedFPGM()


@criterion("taylor", data="backward")
def _taylor(model, pruner, batches, seed):
    baselines.accumulate_gradients(model, batches)
    return tp.importance.TaylorImportance()


@criterion("taylor-gate", data="backward")
def _taylor_gate(model, pruner, batches, seed):
    baselines.accumulate_gradients(model, batches)
    return baselines.GateTaylor()


@criterion("hessian", data="backward", degree=2)
def _hessian(model, pruner, batches, seed):
    importance = tp.importance.HessianImportance()
    baselines.per_sample_hessian(importance, model, batches)
    return importance


@criterion("hessian-fixed", data="backward", degree=2)
def _hessian_fixed(model, pruner, batches, seed):
    importance = baselines.AccumulatedHessian()
    baselines.per_sample_hessian(importance, model, batches)
    return importance


@criterion("ablation", data="forward")
def _ablation(model, pruner, batches, seed):
    """No criterion to use: a pass over the images for each channel."""
    return Ablation(model, batches)


@criterion("chip", data="forward")
def _chip(model, pruner, batches, seed):
    return peers.chip(model, batches)


@criterion("vbp-all", data="forward", degree=2)
def _vbp_all(model, pruner, batches, seed):
    return peers.variance(model, batches, hidden=False)


@criterion("pro", data="backward", coupled=True)
def _pro(model, pruner, batches, seed):
    from ippro_tp import PROImportance

    return _single(PROImportance(seed=seed, cost=None, depletion="coupled"), pruner, batches)


@criterion("pro-labels", data="backward", coupled=True)
def _pro_labels(model, pruner, batches, seed):
    """The default, but of the loss with the true labels."""
    from ippro_tp import PROImportance

    importance = PROImportance(cost=None, depletion="coupled")
    return _single(importance, pruner, batches, torch.nn.functional.cross_entropy)


@criterion("pro-noise", data="backward", coupled=True)
def _pro_noise(model, pruner, batches, seed):
    """The default, but of the logits dotted with white noise."""
    from ippro_tp import LogitNoise, PROImportance

    return _single(PROImportance(cost=None, depletion="coupled"), pruner, batches, LogitNoise(seed))


@criterion("pro-square", data="backward", degree=2, coupled=True)
def _pro_square(model, pruner, batches, seed):
    """The mean square of the offset instead of its mean size."""
    from ippro_tp import PROImportance

    return _single(PROImportance(power=2, seed=seed, cost=None, depletion="coupled"), pruner, batches)


@criterion("pro-origin", data="backward", coupled=True)
def _pro_origin(model, pruner, batches, seed):
    """The default, but with offsets towards zero everywhere."""
    from ippro_tp import PROImportance

    importance = PROImportance(reference="origin", seed=seed, cost=None, depletion="coupled")
    return _single(importance, pruner, batches)


@criterion("pro-mean", data="backward", coupled=True)
def _pro_mean(model, pruner, batches, seed):
    """The default, but with offsets towards the mean everywhere, as if all readers were compensated."""
    from ippro_tp import PROImportance

    return _single(PROImportance(reference="mean", seed=seed, cost=None, depletion="coupled"), pruner, batches)


@criterion("ispasp", data="forward")
def _ispasp(model, pruner, batches, seed):
    from ippro_tp import SpaSPImportance

    # Without a pruner: scores for the global scope. In the local scope the harness binds each pruner in turn.
    importance = _calibrated(SpaSPImportance(), pruner, batches)
    importance.bind(None)
    return importance


@criterion("pro-paper-lam<value>", data="backward", signed=True)
def _pro_paper(model, pruner, batches, seed, value):
    from ippro_tp import PROImportance

    return _calibrated(PROImportance(estimator="paper", step_size=value), pruner, batches)


@criterion("pro-paper-norm-lam<value>", data="backward", signed=True)
def _pro_paper_norm(model, pruner, batches, seed, value):
    from ippro_tp import PROImportance

    return _calibrated(PROImportance(estimator="paper", step_size=value, target="norm"), pruner, batches)


def _single(importance, pruner, batches, loss_fn=None):
    """Calibrate PRO with what every depletion needs; its scores are then those of single channels.

    Cost and depletion are axes of the harness, the same for all arms: not part of this one.
    """
    _calibrated(importance, pruner, batches, loss_fn).depletion = None
    return importance


def _calibrated(importance, pruner, batches, loss_fn=None):
    """Calibrate one of ``ippro_tp``'s importances on the batches."""
    device = next(pruner.model.parameters()).device
    importance.calibrate(pruner, [(x.to(device), y.to(device)) for x, y in batches], loss_fn, progress=False)
    return importance
