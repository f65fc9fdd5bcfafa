r"""Ridge regression of a layer's output error on what the layer reads. No modules, no Torch-Pruning.

A layer whose inputs changed gives other outputs. With x what it reads for one output position (channels times
taps) and e the error of its output there, the update of its weight is

.. math:: \Delta = (C_{xx} + \rho s I)^{-1} C_{xe}, \qquad c = \bar e - \bar x \Delta,

C central second moments over positions and samples, s the mean variance of x. The ridge draws the weight towards
what it is, not towards zero. Without a constant, c = 0 and C are moments about zero.

Sources: Hoerl and Kennard, "Ridge regression", 1970; the reconstruction of pruned layers from their actual
inputs: He, Zhang and Sun, "Channel pruning for accelerating very deep neural networks", ICCV 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RIDGES = (1e-10, 1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridges tried by cross-validation, as multiples of the mean variance of the features."""
FEW_RIDGES, LARGE = (1e-10, 1e-3, 3e-2, 0.3, 3.0), 1024
"""The same for layers with more than LARGE features."""
JUDGED = 64
"""Outputs on which ridges are compared, at most: an even choice of all."""
FLOOR = 1e-13
"""Least ridge: keeps a singular problem solvable."""


@dataclass(frozen=True)
class Update:
    """What happens to one layer.

    Attributes:
        delta: ``(groups, features, outputs)`` to be added to the weight; ``None``: leave it.
        constant: ``(groups, outputs)`` to be added to the mean output; ``None``: leave it.
        ridge: the ridge that was used; inf where the constant alone is changed, NaN where nothing is.
        before: mean square of the error, summed over outputs.
        after: what is left of it on held-out samples; NaN where nothing could be held out.
    """

    delta: Tensor | None
    constant: Tensor | None
    ridge: float
    before: float
    after: float


class _Fit:
    """Ridge regressions of e on x for several ridges, on one set of rows, all groups at once.

    Args:
        x: ``(groups, rows, features)`` float64.
        e: ``(groups, rows, outputs)`` float64.
        affine: fit a constant as well.
        gram: ``(groups, features, features)`` sum over the rows of x x^T, if it is known.
    """

    def __init__(self, x: Tensor, e: Tensor, affine: bool, gram: Tensor | None = None) -> None:
        self._mean_x = x.mean(1, keepdim=True) if affine else torch.zeros_like(x[:, :1])
        self._mean_e = e.mean(1, keepdim=True) if affine else torch.zeros_like(e[:, :1])
        rows, features = x.shape[1:]
        self._features, self._dual = features, features > rows
        if self._dual:
            self._x, self._cross = x - self._mean_x, e - self._mean_e
            self._gram = self._x @ self._x.mT
        else:
            self._cross = x.mT @ (e - self._mean_e)
            self._gram = (x.mT @ x if gram is None else gram) - rows * self._mean_x.mT @ self._mean_x
        self._unit = self._gram.diagonal(dim1=-2, dim2=-1).sum(-1) / features  # rows times the mean variance

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """``(groups, features, outputs)`` and ``(groups, 1, outputs)``; NaN where it is singular to rounding."""
        if ridge == float("inf"):
            return self._cross.new_zeros(len(self._cross), self._features, self._cross.shape[2]), self._mean_e
        shift = (max(ridge, FLOOR) * self._unit).clamp_min(torch.finfo(self._cross.dtype).tiny)
        matrix = self._gram.clone()
        matrix.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
        factor, failed = torch.linalg.cholesky_ex(matrix)
        delta = torch.cholesky_solve(self._cross, factor)
        delta = self._x.mT @ delta if self._dual else delta
        if bool((failed != 0).any()):
            delta = torch.full_like(delta, torch.nan)
        return delta, self._mean_e - self._mean_x @ delta


def refit(
    x: Tensor, e: Tensor, even: Tensor, affine: bool, ridge: float | None = None, margin: float = 0.0
) -> Update:
    """Change a layer's weight so that its output error shrinks.

    Args:
        x: ``(groups, rows, features)`` float64, what the layer reads.
        e: ``(groups, rows, outputs)`` float64, wanted minus actual output.
        even: ``(rows,)`` bool, which rows belong to the one half of the samples.
        affine: whether the caller can change the mean output.
        ridge: in units of the mean variance of x; ``None``: chosen by two-fold cross-validation, changing the
            mean alone and nothing among the candidates.
        margin: a candidate must take away so large a part of the error on either half.

    Returns:
        The update. With ``ridge=None`` its held-out error on either half is no larger than before; with samples
        in one half only, nothing can be held out and nothing is done.
    """
    few = x.shape[2] > LARGE
    ridges: tuple[float, ...] = (ridge,) if ridge is not None else FEW_RIDGES if few else RIDGES
    if ridge is None and affine:
        ridges = (*ridges, float("inf"))
    nothing = Update(None, None, float("nan"), float(e.square().mean(1).sum()), float("nan"))
    center = x.mean(1, keepdim=True) if affine else torch.zeros_like(x[:, :1])
    x = x - center  # moments are taken about the mean: no digits are lost
    halves = [half for half in (even, ~even) if bool(half.any())]
    primal = x.shape[2] <= min(int(half.sum()) for half in halves)
    grams = [x[:, half].mT @ x[:, half] if primal else None for half in halves]
    choice = ridge
    if len(halves) == 2:
        before, after = _held_out(x, e, halves, grams, affine, ridges)
        at = 0
        if ridge is None:
            safe = (after <= (1 - margin) * before.unsqueeze(-1)).all(0) & after.isfinite().all(0)
            at = int(torch.where(safe, after.sum(0), torch.inf).argmin())
            choice = ridges[at] if bool(safe[at]) else None
        now = before if choice is None else after[:, at]
        left = float(now.sum() / before.sum()) if float(before.sum()) > 0 else 0.0
        nothing = replace(nothing, after=nothing.before * left)
    if choice is None:
        return nothing
    whole = grams[0] + grams[1] if len(halves) == 2 and primal else None  # type: ignore[operator]
    delta, constant = _Fit(x, e, affine, whole).solve(choice)
    if not bool(delta.isfinite().all()):
        return nothing
    constant = constant - center @ delta
    return Update(
        None if choice == float("inf") else delta,
        constant.squeeze(1) if affine else None,
        choice,
        nothing.before,
        nothing.after,
    )


def _held_out(
    x: Tensor,
    e: Tensor,
    halves: Sequence[Tensor],
    grams: Sequence[Tensor | None],
    affine: bool,
    ridges: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """``(2,)`` errors of doing nothing and ``(2, ridges)`` of the candidates, each half judged by the other."""
    e = e[:, :, :: -(-e.shape[2] // JUDGED)]
    before, after = [], []
    for train, test, gram in ((*halves, grams[0]), (*halves[::-1], grams[1])):
        fit = _Fit(x[:, train], e[:, train], affine, gram)
        seen, wanted = x[:, test], e[:, test]
        errors = []
        for ridge in ridges:
            delta, constant = fit.solve(ridge)
            errors.append((wanted - constant - seen @ delta).square().mean(1).sum())
        before.append(wanted.square().mean(1).sum())
        after.append(torch.stack(errors))
    return torch.stack(before), torch.stack(after)
