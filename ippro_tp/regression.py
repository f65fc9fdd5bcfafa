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
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-10, 1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridges tried by cross-validation, as multiples of the mean variance of the features."""
FEW_RIDGES, LARGE = (1e-10, 1e-3, 3e-2, 0.3, 3.0), 1024
"""The same for layers with more than LARGE features."""
TEST_ROWS = 2048
"""Rows on which a candidate is judged, at most."""
FLOOR = 1e-13
"""Least ridge: keeps a singular problem solvable."""


@dataclass(frozen=True)
class Update:
    """What happens to one layer.

    Attributes:
        delta: ``(groups, features, outputs)`` to be added to the weight; ``None``: leave it.
        constant: ``(groups, outputs)`` to be added to the mean output; ``None``: leave it.
        ridge: the ridge that was used; inf where the constant alone is changed, NaN where nothing is.
        before: mean square of the error on held-out samples, summed over outputs.
        after: what is left of it; NaN where nothing could be held out.
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
    """

    def __init__(self, x: Tensor, e: Tensor, affine: bool) -> None:
        self._mean_x = x.mean(1, keepdim=True) if affine else torch.zeros_like(x[:, :1])
        self._mean_e = e.mean(1, keepdim=True) if affine else torch.zeros_like(e[:, :1])
        self._x, self._e = x - self._mean_x, e - self._mean_e
        rows, features = x.shape[1:]
        self._dual = features > rows
        self._gram = self._x @ self._x.mT if self._dual else self._x.mT @ self._x
        self._cross = self._e if self._dual else self._x.mT @ self._e
        self._unit = self._gram.diagonal(dim1=-2, dim2=-1).sum(-1) / features  # rows times the mean variance

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """``(groups, features, outputs)`` and ``(groups, 1, outputs)``."""
        if ridge == float("inf"):
            return self._x.new_zeros(len(self._x), self._x.shape[2], self._e.shape[2]), self._mean_e
        shift = (max(ridge, FLOOR) * self._unit).clamp_min(torch.finfo(self._x.dtype).tiny)
        matrix = self._gram.clone()
        matrix.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool((failed != 0).any()):  # singular to rounding
            delta = torch.full((len(self._x), self._x.shape[2], self._e.shape[2]), torch.nan).to(self._x)
        else:
            delta = torch.cholesky_solve(self._cross, factor)
            delta = self._x.mT @ delta if self._dual else delta
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
    halves = [half for half in (even, ~even) if bool(half.any())]
    choice = ridge
    if len(halves) == 2:
        before, after = _held_out(x, e, halves, affine, ridges)
        at = 0
        if ridge is None:
            safe = (after <= (1 - margin) * before.unsqueeze(-1)).all(0) & after.isfinite().all(0)
            at = int(torch.where(safe, after.sum(0), torch.inf).argmin())
            choice = ridges[at] if bool(safe[at]) else None
        now = before if choice is None else after[:, at]
        nothing = Update(None, None, float("nan"), float(before.mean()), float(now.mean()))
    if choice is None:
        return nothing
    delta, constant = _Fit(x, e, affine).solve(choice)
    if not bool(delta.isfinite().all()):
        return nothing
    return Update(
        None if choice == float("inf") else delta,
        constant.squeeze(1) if affine else None,
        choice,
        nothing.before,
        nothing.after,
    )


def _held_out(
    x: Tensor, e: Tensor, halves: Sequence[Tensor], affine: bool, ridges: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """``(2,)`` errors of doing nothing and ``(2, ridges)`` of the candidates, each half judged by the other."""
    before, after = [], []
    for train, test in (halves, halves[::-1]):
        fit = _Fit(x[:, train], e[:, train], affine)
        rows = test.nonzero().view(-1)
        rows = rows[:: max(1, len(rows) // TEST_ROWS)]
        seen, wanted = x[:, rows], e[:, rows]
        errors = []
        for ridge in ridges:
            delta, constant = fit.solve(ridge)
            errors.append((wanted - constant - seen @ delta).square().mean(1).sum())
        before.append(wanted.square().mean(1).sum())
        after.append(torch.stack(errors))
    return torch.stack(before), torch.stack(after)
