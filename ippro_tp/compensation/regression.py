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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .moments import Dual, Primal, Sums

RIDGES = (1e-10, 1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridges that cross-validation chooses from, as multiples of the mean variance of the features."""
FIRST = (5, 8)
"""Those tried first, on one half; then the neighbours of the best, until it lies between two that are worse."""
EXACT = 1e-4
"""An error of which no more than this is left is worked out in double precision."""
TRIES = 3
"""Candidates that are judged on both halves, at most, the best ones first."""


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

    def unless_worse(self) -> Update:
        """The update, or none where it would leave more of the error."""
        if not self.after > self.before:
            return self
        return Update(None, None, float("nan"), self.before, self.before)


def refit(
    x: Tensor, e: Tensor, even: int, affine: bool, ridge: float | None = None, margin: float = 0.0
) -> Update:
    """Change a layer's weight so that its output error shrinks.

    Args:
        x: ``(groups, rows, features)``, what the layer reads. It is overwritten: centred where ``affine``.
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
    center = x.mean(1, keepdim=True) if affine else torch.zeros_like(x[:, :1])
    x -= center  # moments are taken about the mean: no digits are lost
    found = _refit(x, e, even, affine, ridge, margin)
    if (
        x.dtype != torch.float64 and found.after < EXACT * found.before
    ):  # more than single precision can tell apart
        found = _refit(x.double(), e.double(), even, affine, ridge, margin)
    if found.constant is None or found.delta is None:
        return found
    return replace(found, constant=found.constant - (center.double() @ found.delta).squeeze(1))


def _refit(x: Tensor, e: Tensor, even: int, affine: bool, ridge: float | None, margin: float) -> Update:
    nothing = Update(None, None, float("nan"), mean_square(e), float("nan"))
    rows, features = x.shape[1:]
    make = Dual if 2 * features > rows else Primal
    sums: Sums = make(x, e, even, affine)
    choice = ridge
    if 0 < even < rows:
        before = now = sums.power
        if ridge is None:
            choice, now = _search(sums, margin)
        else:
            now = torch.stack([sums.held_out(ridge, half) for half in (0, 1)])
        left = float(now.sum() / before.sum()) if float(before.sum()) > 0 else 0.0
        nothing = replace(nothing, after=nothing.before * left)
    if choice is None:
        return nothing
    for used in (choice, *(r for r in RIDGES if r > choice)):  # what is singular to rounding needs more
        delta, constant = sums.solve(used)
        if bool(delta.isfinite().all()):
            break
    else:
        return replace(nothing, after=nothing.before if 0 < even < rows else nothing.after)
    return Update(
        None if choice == float("inf") else delta,
        constant.squeeze(1) if affine else None,
        used,
        nothing.before,
        nothing.after,
    )


def _search(sums: Sums, margin: float) -> tuple[float | None, Tensor]:
    """The ridge of the least held-out error that is less than now on either half, and those errors.

    The error is taken to fall and rise once over the ridges.
    """
    found: dict[float, Tensor] = {}

    def error(ridge: float) -> float:
        if ridge not in found:
            found[ridge] = sums.held_out(ridge, 0)
        value = float(found[ridge])
        return value if value == value else float("inf")

    tried = {RIDGES[i] for i in FIRST}
    while True:
        best = RIDGES.index(min(sorted(tried), key=error))
        near = {RIDGES[i] for i in (best - 1, best + 1) if 0 <= i < len(RIDGES)} - tried
        if not near:
            break
        tried |= near
    candidates = sorted({*tried, float("inf")} if sums.affine else tried, key=error)
    for ridge in candidates[:TRIES]:
        left = torch.stack([found[ridge], sums.held_out(ridge, 1)])
        if bool((left <= (1 - margin) * sums.power).all()) and bool(left.isfinite().all()):
            return ridge, left
    return None, sums.power


def mean_square(e: Tensor) -> float:
    """Mean square of e over rows, summed over groups and outputs."""
    return float(e.square().sum()) / max(1, e.shape[1])
