r"""Ridge regression of a layer's output error on what the layer reads. No modules, no Torch-Pruning.

A layer whose inputs changed gives other outputs. With x what it reads for one output position (channels times
taps) and e the error of its output there, the update of its weight is

.. math:: \Delta = (C_{xx} + \rho s I)^{-1} C_{xe}, \qquad c = \bar e - \bar x \Delta,

C central second moments over positions and samples, s the mean variance of x. The ridge draws the weight towards
what it is, not towards zero. Without a constant, c = 0 and C are moments about zero.

Rows are read once: each half of the samples is summed up into moments, from which regressions on either half, on
both, and their errors on the other half follow. With more features than rows, products between rows take the
place of products between features.

Sources: Hoerl and Kennard, "Ridge regression", 1970; the reconstruction of pruned layers from their actual
inputs: He, Zhang and Sun, "Channel pruning for accelerating very deep neural networks", ICCV 2017.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

RIDGES = (1e-10, 1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridges that cross-validation chooses from, as multiples of the mean variance of the features."""
FIRST = (2, 5, 8)
"""Those tried first; then the neighbours of the best, until it lies between two that are worse."""
JUDGED = 64
"""Outputs on which ridges are compared, at most: an even choice of all."""
FLOOR = 1e-13
"""Least ridge: keeps a singular problem solvable."""
EXACT = 1e-4
"""An error of which no more than this is left is worked out in double precision."""
BLOCKS = 4
"""A product of a matrix with its own transpose is made of so many blocks each way, the lower ones mirrored."""


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


def refit(
    x: Tensor, e: Tensor, even: int, affine: bool, ridge: float | None = None, margin: float = 0.0
) -> Update:
    """Change a layer's weight so that its output error shrinks.

    Args:
        x: ``(groups, rows, features)``, what the layer reads.
        e: ``(groups, rows, outputs)``, wanted minus actual output.
        even: the first so many rows belong to the one half of the samples, the rest to the other.
        affine: whether the caller can change the mean output.
        ridge: in units of the mean variance of x; ``None``: chosen by two-fold cross-validation, changing the
            mean alone and nothing among the candidates.
        margin: a candidate must take away so large a part of the error on either half.

    Returns:
        The update, float64. With ``ridge=None`` its held-out error on either half is no larger than before; with
        samples in one half only, nothing can be held out and nothing is done.
    """
    found = _refit(x, e, even, affine, ridge, margin)
    if (
        x.dtype != torch.float64 and found.after < EXACT * found.before
    ):  # more than single precision can tell apart
        found = _refit(x.double(), e.double(), even, affine, ridge, margin)
    return found


def _refit(x: Tensor, e: Tensor, even: int, affine: bool, ridge: float | None, margin: float) -> Update:
    nothing = Update(None, None, float("nan"), float(e.double().square().mean(1).sum()), float("nan"))
    center = x.mean(1, keepdim=True) if affine else torch.zeros_like(x[:, :1])
    x = x - center  # moments are taken about the mean: no digits are lost
    rows, features = x.shape[1:]
    make = _Dual if 2 * features > rows else _Primal
    sums: _Sums = make(x, e, even, affine)
    choice = ridge
    if 0 < even < rows:
        before = sums.power
        tried = _search(sums, before, margin) if ridge is None else {ridge: sums.held_out(ridge)}
        if ridge is None:
            safe = [r for r, after in tried.items() if _is_safe(after, before, margin)]
            choice = min(safe, key=lambda r: float(tried[r].sum())) if safe else None
        now = before if choice is None else tried[choice]
        left = float(now.sum() / before.sum()) if float(before.sum()) > 0 else 0.0
        nothing = replace(nothing, after=nothing.before * left)
    if choice is None:
        return nothing
    delta, constant = sums.solve(choice)
    if not bool(delta.isfinite().all()):
        return nothing
    constant = constant - center.double() @ delta
    return Update(
        None if choice == float("inf") else delta,
        constant.squeeze(1) if affine else None,
        choice,
        nothing.before,
        nothing.after,
    )


def _is_safe(after: Tensor, before: Tensor, margin: float) -> bool:
    return bool((after <= (1 - margin) * before).all()) and bool(after.isfinite().all())


def _search(sums: _Sums, before: Tensor, margin: float) -> dict[float, Tensor]:
    """Held-out errors of ridges around the best; the error is taken to fall and rise once over the ridges."""
    tried = {ridge: sums.held_out(ridge) for ridge in (RIDGES[i] for i in FIRST)}
    if sums.affine:
        tried[float("inf")] = sums.held_out(float("inf"))

    def error(ridge: float) -> float:
        total = float(tried[ridge].sum())
        return total if total == total else float("inf")

    while True:
        known = [r for r in RIDGES if r in tried]
        best = RIDGES.index(min(known, key=error))
        near = [RIDGES[i] for i in (best - 1, best + 1) if 0 <= i < len(RIDGES) and RIDGES[i] not in tried]
        if not near:
            return tried
        for ridge in near:
            tried[ridge] = sums.held_out(ridge)


class _Sums(abc.ABC):
    """Moments of two halves of the rows, and the regressions that follow from them."""

    affine: bool
    power: Tensor
    """``(2,)``: mean square of the error on each half, summed over groups and the outputs that are judged."""

    @abc.abstractmethod
    def held_out(self, ridge: float) -> Tensor:
        """``(2,)``: what a regression on the other half leaves of :attr:`power` on each half."""

    @abc.abstractmethod
    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """``(groups, features, outputs)`` and ``(groups, 1, outputs)``, of all rows; NaN where singular."""


class _Primal(_Sums):
    """Moments between features; for fewer features than rows."""

    def __init__(self, x: Tensor, e: Tensor, even: int, affine: bool) -> None:
        self.affine = affine
        halves = [(x[:, part], e[:, part]) for part in (slice(even), slice(even, None)) if len(x[0, part])]
        self._parts = [_Moments.of(*half) for half in halves]
        self._whole = self._parts[0] if len(halves) == 1 else self._parts[0].plus(self._parts[1])
        self._judged = [part.judged() for part in self._parts]
        self.power = torch.stack([part.error(None, None) for part in self._judged])

    def held_out(self, ridge: float) -> Tensor:
        left = []
        for test, train in zip(self._judged, self._judged[::-1], strict=True):
            left.append(test.error(*train.solve(ridge, self.affine)))
        return torch.stack(left)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        return self._whole.solve(ridge, self.affine)


@dataclass(frozen=True)
class _Moments:
    """Sums over rows, float64: number, x, e, x x^T, x e^T, and e^2 over groups and outputs."""

    rows: int
    x: Tensor
    e: Tensor
    xx: Tensor
    xe: Tensor
    ee: Tensor

    @classmethod
    def of(cls, x: Tensor, e: Tensor) -> _Moments:
        cross = (x.mT @ e).double()
        square = e.double().square().sum(1, keepdim=True)
        return cls(x.shape[1], _total(x), _total(e), gram(x).double(), cross, square)

    def plus(self, other: _Moments) -> _Moments:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Moments(*(mine + theirs for mine, theirs in pairs))

    def judged(self) -> _Moments:
        """The same for an even choice of outputs."""
        step = -(-self.e.shape[2] // JUDGED)
        return replace(self, e=self.e[..., ::step], xe=self.xe[..., ::step], ee=self.ee[..., ::step])

    def solve(self, ridge: float, affine: bool) -> tuple[Tensor, Tensor]:
        mean = self.e / self.rows if affine else torch.zeros_like(self.e)
        if ridge == float("inf"):
            return torch.zeros_like(self.xe), mean
        xx, xe = self.xx, self.xe
        if affine:
            xx = xx - self.x.mT @ (self.x / self.rows)
            xe = xe - self.x.mT @ mean
        delta = _solve(xx, xe, ridge, xx.diagonal(dim1=-2, dim2=-1).mean(-1))
        return delta, mean - self.x / self.rows @ delta if affine else mean

    def error(self, delta: Tensor | None, constant: Tensor | None) -> Tensor:
        """Mean square of what is left of e after ``constant + x delta``, summed over groups and outputs."""
        total = self.ee.sum()
        if delta is not None and constant is not None:
            seen = self.xx @ delta - 2 * self.xe + 2 * self.x.mT @ constant
            total = total + (delta * seen).sum() + (constant * (self.rows * constant - 2 * self.e)).sum()
        return total.clamp_min(0) / self.rows


class _Dual(_Sums):
    """Products between rows; for more features than rows."""

    def __init__(self, x: Tensor, e: Tensor, even: int, affine: bool) -> None:
        self.affine = affine
        self._x, self._e, self._even, self._rows = x, e.double(), even, x.shape[1]
        self._products = gram(x.mT).double()  # (groups, rows, rows)
        self._judged = self._e[:, :, :: -(-e.shape[2] // JUDGED)]
        self.power = torch.stack(
            [half.square().mean(1).sum() for half in (self._judged[:, :even], self._judged[:, even:])]
        )

    def held_out(self, ridge: float) -> Tensor:
        halves = slice(self._even), slice(self._even, self._rows)
        left = []
        for test, train in (halves, halves[::-1]):
            alpha, mean, between = self._fit(train, self._judged, ridge, self._products[:, test, train])
            rest = self._judged[:, test] - mean - (0 if alpha is None else between @ alpha)
            left.append(rest.square().mean(1).sum())
        return torch.stack(left)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        everything = slice(0, self._rows)
        alpha, mean, _ = self._fit(everything, self._e, ridge, self._products[:, :1])
        if alpha is None:
            return self._e.new_zeros(len(self._e), self._x.shape[2], self._e.shape[2]), mean
        center = self._x.mean(1, keepdim=True) if self.affine else torch.zeros_like(self._x[:, :1])
        delta = ((self._x - center).mT @ alpha.to(self._x.dtype)).double()
        return delta, mean - center.double() @ delta if self.affine else mean

    def _fit(self, train: slice, e: Tensor, ridge: float, between: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Weights of the rows ``train``, the mean of e, products ``between`` others and those rows, centred."""
        own, wanted = self._products[:, train, train], e[:, train]
        mean = wanted.mean(1, keepdim=True) if self.affine else torch.zeros_like(wanted[:, :1])
        if ridge == float("inf"):
            return None, mean, between
        if self.affine:
            shared = own.mean(1, keepdim=True)
            middle = shared.mean(2, keepdim=True)
            between = between - between.mean(2, keepdim=True) - shared + middle
            own = own - shared - shared.mT + middle
        unit = own.diagonal(dim1=-2, dim2=-1).sum(-1) / self._x.shape[2]
        return _solve(own, wanted - mean, ridge, unit), mean, between


def gram(x: Tensor) -> Tensor:
    """``x.mT @ x`` of ``(groups, rows, features)``, with half of the work left out where that pays."""
    features = x.shape[2]
    if len(x) > 1 or features < 32 * BLOCKS:
        return x.mT @ x
    out = x.new_empty(1, features, features)
    bounds = [features * i // BLOCKS for i in range(BLOCKS + 1)]
    for low, high in pairwise(bounds):
        torch.matmul(x[..., low:high].mT, x[..., low:], out=out[:, low:high, low:])
        out[:, high:, low:high] = out[:, low:high, high:].mT
    return out


def _total(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True, dtype=torch.float64)


def _solve(matrix: Tensor, right: Tensor, ridge: float, unit: Tensor) -> Tensor:
    """``(matrix + ridge * unit * I)^-1 right``; NaN where it is singular to rounding."""
    shift = (max(ridge, FLOOR) * unit).clamp_min(torch.finfo(matrix.dtype).tiny)
    matrix = matrix.clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(right, factor)
    return torch.full_like(solution, torch.nan) if bool((failed != 0).any()) else solution
