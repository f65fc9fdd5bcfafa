"""Sums over the rows of a regression, of two halves of the samples. No modules, no Torch-Pruning.

Rows are read once: each half of the samples is summed up into moments, from which regressions on either half, on
both, and their errors on the other half follow. With more features than rows, products between rows take the
place of products between features.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

JUDGED = 64
"""Outputs on which ridges are compared, at most: an even choice of all."""
FLOOR = 1e-13
"""Least ridge: keeps a singular problem solvable."""
SHORT = 1e-2
"""From this ridge on, single precision solves for what has been read in single precision."""
BLOCKS = 4
"""A product of a matrix with its own transpose is made of so many blocks each way, the lower ones mirrored."""


class Sums(abc.ABC):
    """Moments of two halves of the rows, and the regressions that follow from them."""

    affine: bool
    power: Tensor
    """``(2,)``: mean square of the error on each half, summed over groups and the outputs that are judged."""

    @abc.abstractmethod
    def held_out(self, ridge: float, half: int) -> Tensor:
        """What a regression on the other half leaves of :attr:`power` on ``half``."""

    @abc.abstractmethod
    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """``(groups, features, outputs)`` and ``(groups, 1, outputs)``, of all rows; NaN where singular."""


class Primal(Sums):
    """Moments between features; for fewer features than rows."""

    def __init__(self, x: Tensor, e: Tensor, even: int, affine: bool) -> None:
        self.affine, self._kind = affine, x.dtype
        halves = [(x[:, part], e[:, part]) for part in (slice(even), slice(even, None)) if len(x[0, part])]
        parts = [_Moments.of(*half) for half in halves]
        self._whole = parts[0] if len(halves) == 1 else parts[0].plus(parts[1])
        self._judged = {torch.float64: [part.judged() for part in parts]}
        self._judged[self._kind] = [part.to(self._kind) for part in self._judged[torch.float64]]
        self.power = torch.stack([part.error(None, None) for part in self._judged[torch.float64]])

    def held_out(self, ridge: float, half: int) -> Tensor:
        """See :class:`Sums`."""
        parts = self._judged[self._kind if ridge >= SHORT else torch.float64]
        return parts[half].error(*parts[1 - half].solve(ridge, self.affine)).double()

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """See :class:`Sums`."""
        whole = self._whole.to(self._kind) if ridge >= SHORT else self._whole
        delta, constant = whole.solve(ridge, self.affine)
        return delta.double(), constant.double()


@dataclass(frozen=True)
class _Moments:
    """Sums over rows: number, x, e, x x^T, x e^T, and e^2."""

    rows: int
    x: Tensor
    e: Tensor
    xx: Tensor
    xe: Tensor
    ee: Tensor

    @classmethod
    def of(cls, x: Tensor, e: Tensor) -> _Moments:
        square = e.square().sum(1, keepdim=True).double()
        return cls(x.shape[1], _total(x), _total(e), gram(x).double(), (x.mT @ e).double(), square)

    def plus(self, other: _Moments) -> _Moments:
        return _Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @cached_property
    def central(self) -> tuple[Tensor, Tensor]:
        """Sums of x x^T and x e^T about the means."""
        return self.xx - self.x.mT @ (self.x / self.rows), self.xe - self.x.mT @ (self.e / self.rows)

    def to(self, kind: torch.dtype) -> _Moments:
        """The same in another precision."""
        return _Moments(self.rows, *(t.to(kind) for t in (self.x, self.e, self.xx, self.xe, self.ee)))

    def judged(self) -> _Moments:
        """The same for an even choice of outputs."""
        step = -(-self.e.shape[2] // JUDGED)
        return replace(self, e=self.e[..., ::step], xe=self.xe[..., ::step], ee=self.ee[..., ::step])

    def solve(self, ridge: float, affine: bool) -> tuple[Tensor, Tensor]:
        mean = self.e / self.rows if affine else torch.zeros_like(self.e)
        if ridge == float("inf"):
            return torch.zeros_like(self.xe), mean
        xx, xe = self.central if affine else (self.xx, self.xe)
        delta = _solve(xx, xe, ridge, xx.diagonal(dim1=-2, dim2=-1).mean(-1))
        return delta, mean - self.x / self.rows @ delta if affine else mean

    def error(self, delta: Tensor | None, constant: Tensor | None) -> Tensor:
        """Mean square of what is left of e after ``constant + x delta``, summed over groups and outputs."""
        total = self.ee.sum()
        if delta is not None and constant is not None:
            seen = self.xx @ delta - 2 * self.xe + 2 * self.x.mT @ constant
            total = total + (delta * seen).sum() + (constant * (self.rows * constant - 2 * self.e)).sum()
        return total.clamp_min(0) / self.rows


class Dual(Sums):
    """Products between rows; for more features than rows. Where there is a constant, x has mean zero."""

    def __init__(self, x: Tensor, e: Tensor, even: int, affine: bool) -> None:
        self.affine = affine
        self._x, self._e = x, e
        self._halves = slice(even), slice(even, x.shape[1])
        self._between: dict[tuple[torch.dtype, int], tuple[Tensor, Tensor]] = {}
        products = gram(x.mT)  # (groups, rows, rows)
        self._products = {torch.float64: products.double(), x.dtype: products}
        judged = e[:, :, :: -(-e.shape[2] // JUDGED)]
        self._judged = {torch.float64: judged.double(), x.dtype: judged}
        self.power = torch.stack(
            [self._judged[torch.float64][:, half].square().mean(1).sum() for half in self._halves]
        )

    def held_out(self, ridge: float, half: int) -> Tensor:
        """See :class:`Sums`."""
        kind = self._x.dtype if ridge >= SHORT else torch.float64
        test, train = self._halves[half], self._halves[1 - half]
        e = self._judged[kind]
        if (kind, half) not in self._between:
            products = self._products[kind]
            self._between[kind, half] = self._centred(products[:, train, train], products[:, test, train])
        own, between = self._between[kind, half]
        alpha, mean = self._fit(own, e[:, train], ridge)
        rest = e[:, test] - mean - (0 if alpha is None else between @ alpha)
        return rest.double().square().mean(1).sum()

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """See :class:`Sums`."""
        if ridge < SHORT and self._x.shape[2] <= self._x.shape[1]:  # products of rows would be singular
            return Primal(self._x, self._e, self._x.shape[1], self.affine).solve(ridge)
        kind = self._x.dtype if ridge >= SHORT else torch.float64
        alpha, mean = self._fit(self._products[kind], self._e.to(kind), ridge)
        if alpha is None:
            return mean.new_zeros(len(mean), self._x.shape[2], mean.shape[2]).double(), mean.double()
        return (self._x.mT @ alpha.to(self._x.dtype)).double(), mean.double()

    def _centred(self, own: Tensor, between: Tensor) -> tuple[Tensor, Tensor]:
        """Products of rows with each other and with others, about the mean of the former where that is free."""
        if not self.affine:
            return own, between
        shared = own.mean(1, keepdim=True)
        middle = shared.mean(2, keepdim=True)
        return own - shared - shared.mT + middle, between - between.mean(2, keepdim=True) - shared + middle

    def _fit(self, own: Tensor, wanted: Tensor, ridge: float) -> tuple[Tensor | None, Tensor]:
        """Weights of rows whose products with each other are ``own``, and their mean of e."""
        mean = wanted.mean(1, keepdim=True) if self.affine else torch.zeros_like(wanted[:, :1])
        if ridge == float("inf"):
            return None, mean
        unit = own.diagonal(dim1=-2, dim2=-1).sum(-1) / self._x.shape[2]
        return _solve(own, wanted - mean, ridge, unit), mean


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
    return x.sum(1, keepdim=True).double()


def _solve(matrix: Tensor, right: Tensor, ridge: float, unit: Tensor) -> Tensor:
    """``(matrix + ridge * unit * I)^-1 right``; NaN where it is singular to rounding."""
    shift = (max(ridge, FLOOR) * unit).to(matrix.dtype).clamp_min(torch.finfo(matrix.dtype).tiny)
    matrix = matrix.clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(right, factor)
    return torch.full_like(solution, torch.nan) if bool((failed != 0).any()) else solution
