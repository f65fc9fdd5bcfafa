r"""Predicting removed channels from kept ones: moments in, weights out. No modules, no Torch-Pruning.

A consumer's weight is seen as ``(groups, outputs, channels, taps)``: the taps are the kernel positions of a
convolution, the positions per channel of a flattened feature map, or one. The inputs of one group are random
vectors x with second moments over images and positions. With r the removed and k the kept inputs,

.. math:: x_r \approx A x_k + c, \qquad A = C_{rk} (C_{kk} + \rho s I)^{-1}, \qquad c = \mu_r - A \mu_k,

where C are central moments and s is their mean variance over the kept inputs. Without a bias to put c into,
c = 0 and C are moments about zero. A is folded into the weight: W_k + W_r A.

If the moments are those of channels, A is between channels and the same for all taps. If they are those of
patches (every channel at every tap), A is between all of them: a tap of a removed channel is then predicted from
the whole patch, which is the least-squares solution for the layer's output itself.

Sources: ordinary ridge regression (Hoerl and Kennard 1970); as a repair of pruned layers: He, Zhang and Sun,
"Channel pruning for accelerating very deep neural networks", ICCV 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (0.0, *(10.0**e for e in range(-11, -4)), 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridges tried by cross-validation, as multiples of the mean variance of the kept channels."""


@dataclass(frozen=True)
class Moments:
    """Sums over rows (positions of images) of one consumer's inputs.

    Attributes:
        rows: ``(1,)`` number of rows.
        first: ``(groups, channels)`` sum of x.
        second: ``(groups, channels, channels)`` sum of x x^T.
    """

    rows: Tensor
    first: Tensor
    second: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.rows + other.rows, self.first + other.first, self.second + other.second)

    @property
    def mean(self) -> Tensor:
        """``(groups, channels)`` mean of x."""
        return self.first / self.rows

    def about(self, point: Tensor) -> Tensor:
        """``(groups, channels, channels)``: mean of (x - point)(x - point)^T."""
        mean, raw = self.mean, self.second / self.rows
        shift = mean - point
        # E[xx'] - mm' + (m - p)(m - p)': each outer product is symmetric to the bit.
        return raw - mean.unsqueeze(-1) * mean.unsqueeze(-2) + shift.unsqueeze(-1) * shift.unsqueeze(-2)


@dataclass(frozen=True)
class Fold:
    """What happens to one consumer.

    Attributes:
        weight: ``(groups, outputs, kept, taps)`` the new weight.
        method: ``"patch"`` (A between channels and taps), ``"channel"`` (A between channels), ``"mean"`` (the mean
            of what was removed is made up for, nothing else) or ``"none"``.
        ridge: the ridge that was used, in units of the mean variance; NaN for the last two.
        lost: held-out power of what the removed channels fed into the outputs.
        left: the part of it that is still missing after the fold, held out; NaN if nothing could be held out.
    """

    weight: Tensor
    method: str
    ridge: float
    lost: float
    left: float


class _Predictor:
    """Ridge regression of removed on kept channels for all ridges at once, of one group.

    Args:
        moment: ``(c, c)`` second moments to fit, central or not.
        kept, removed: indices.
    """

    def __init__(self, moment: Tensor, kept: Tensor, removed: Tensor) -> None:
        g_kk, g_rk = moment[kept][:, kept], moment[removed][:, kept]
        self.scale = g_kk.diagonal().mean() if kept.numel() else moment.new_zeros(())
        values, self.basis = torch.linalg.eigh(g_kk)
        # Directions without variance are left out: their eigenvalue is rounding noise of either sign.
        floor = values.amax().clamp_min(0) * max(1, kept.numel()) * torch.finfo(values.dtype).eps
        self.values, self.usable = values.clamp_min(0), values > floor
        self.cross = g_rk @ self.basis

    def gains(self, ridges: Sequence[float]) -> Tensor:
        """``(ridges, kept)``: 1 / (eigenvalue + ridge), 0 in unusable directions."""
        ridge = torch.tensor(ridges, dtype=self.values.dtype, device=self.values.device)
        return torch.where(self.usable, 1 / (self.values + ridge.unsqueeze(-1) * self.scale), 0.0)

    def matrix(self, ridge: float) -> Tensor:
        """``(removed, kept)``: A."""
        matrix: Tensor = (self.cross * self.gains([ridge])) @ self.basis.T
        return matrix

    def errors(
        self, ridges: Sequence[float], test: Tensor, kept: Tensor, removed: Tensor, power: Tensor
    ) -> Tensor:
        """``(ridges,)``: tr(power E[e e^T]) of the error e = x_r - A x_k under the moments ``test``."""
        gains = self.gains(ridges)
        rotated = self.basis.T @ test[kept][:, kept] @ self.basis
        linear = ((power @ self.cross) * (test[removed][:, kept] @ self.basis)).sum(0)
        quadratic = (self.cross.T @ power @ self.cross) * rotated
        constant = (power * test[removed][:, removed]).sum()
        errors: Tensor = constant - 2 * gains @ linear + ((gains @ quadratic) * gains).sum(-1)
        return errors


class _Problem:
    """One consumer's prediction problem: which candidates there are, their errors, their solutions.

    Args:
        weight: ``(groups, outputs, channels, taps)``.
        features: per group, of the moments: channels, or channels * taps.
        kept, removed: ``(groups, k)``, ``(groups, r)`` channels.
        affine: whether the mean can be made up for.
        ridges: to try.
    """

    def __init__(
        self,
        weight: Tensor,
        features: int,
        kept: Tensor,
        removed: Tensor,
        affine: bool,
        ridges: Sequence[float],
    ) -> None:
        _, _, channels, self.taps = weight.shape
        self.weight, self.affine, self.ridges = weight, affine, ridges
        self.by_patch = self.taps > 1 and features == channels * self.taps
        self._channels = (kept, removed)
        self.kept, self.removed = (self._features(index) for index in self._channels)
        flat = weight.flatten(2).unsqueeze(-1) if self.by_patch else weight
        self.power = [tap_power(flat[g : g + 1, :, r])[0] for g, r in enumerate(self.removed)]

    @property
    def candidates(self) -> list[tuple[str, float]]:
        """Methods and ridges, from bold to cautious."""
        methods = (["patch"] if self.by_patch else []) + ["channel"]
        mean = [("mean", float("nan"))] if self.affine else []
        return [(method, ridge) for method in methods for ridge in self.ridges] + mean

    def moment(self, fit: Moments, of: Moments | None = None) -> Tensor:
        """Second moments of ``of`` (``fit`` itself) about what a constant fitted to ``fit`` accounts for."""
        return (of or fit).about(fit.mean if self.affine else torch.zeros_like(fit.mean))

    def errors(self, train: Moments, test: Moments) -> Tensor:
        """``(candidates,)``: power of the output error under ``test`` of all candidates fitted to ``train``."""
        fitted, held_out = self.moment(train), self.moment(train, test)
        total = fitted.new_zeros(len(self.candidates))
        for g, power in enumerate(self.power):
            k, r = self.kept[g], self.removed[g]
            parts = [_Predictor(fitted[g], k, r).errors(self.ridges, held_out[g], k, r, power)]
            if self.by_patch:
                parts.append(self._shared_errors(fitted[g], held_out[g], g))
            if self.affine:
                parts.append((power * held_out[g][r][:, r]).sum().view(1))
            total = total + torch.cat(parts)
        return total

    def nothing(self, test: Moments) -> Tensor:
        """Power of the output error under ``test`` if the removed channels are replaced by zeros."""
        raw = test.second / test.rows
        return torch.stack([(p * raw[g][r][:, r]).sum() for g, (p, r) in enumerate(self._removals)]).sum()

    def solve(self, moments: Moments, method: str, ridge: float) -> Tensor:
        """``(groups, outputs, kept, taps)``: the folded weight."""
        moment = self.moment(moments)
        folded = []
        for g, weight in enumerate(self.weight):
            k, r = (index[g] for index in self._channels)
            plain, gone = weight[:, k], weight[:, r]
            if method == "patch":
                matrix = _Predictor(moment[g], self.kept[g], self.removed[g]).matrix(ridge)
                more = (gone.flatten(1) @ matrix).view_as(plain)
            else:
                matrix = _Predictor(self._shared(moment[g]), k, r).matrix(ridge)
                more = torch.einsum("ort,rk->okt", gone, matrix)
            folded.append(plain + more)
        return torch.stack(folded)

    @property
    def _removals(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.power, self.removed, strict=True))

    def _features(self, channels: Tensor) -> Tensor:
        if not self.by_patch:
            return channels
        taps = torch.arange(self.taps, device=channels.device)
        return (channels.unsqueeze(-1) * self.taps + taps).flatten(1)

    def _shared(self, moment: Tensor) -> Tensor:
        """``(c, c)``: moments of channels, summed over the taps of a patch."""
        if not self.by_patch:
            return moment
        return torch.einsum("ctdt->cd", moment.view(-1, self.taps, moment.shape[0] // self.taps, self.taps))

    def _shared_errors(self, fitted: Tensor, held_out: Tensor, g: int) -> Tensor:
        """Errors of one A for all taps, under the moments of patches."""
        channels = fitted.shape[0] // self.taps
        k, r = (index[g] for index in self._channels)
        predictor = _Predictor(self._shared(fitted), k, r)
        blocks = held_out.view(channels, self.taps, channels, self.taps)
        power = self.power[g].view(r.numel(), self.taps, r.numel(), self.taps)
        kept, cross, own = blocks[k][:, :, k], blocks[k][:, :, r], blocks[r][:, :, r]
        errors = []
        for ridge in self.ridges:
            matrix = predictor.matrix(ridge)
            linear = torch.einsum("rk,ktsu->rtsu", matrix, cross)
            quadratic = torch.einsum("rtku,sk->rtsu", torch.einsum("rk,ktju->rtju", matrix, kept), matrix)
            errors.append((power * (own - 2 * linear + quadratic)).sum())
        return torch.stack(errors)


def tap_power(weight: Tensor) -> Tensor:
    """``(groups, c, c)``: sum over outputs and taps of w w^T for ``(groups, outputs, c, taps)``.

    The power that an input error e puts on the outputs is tr(power E[e e^T]) if errors at different taps are
    uncorrelated; correlated ones count alike for all candidates that are compared.
    """
    flat = weight.transpose(1, 2).flatten(2)
    return flat @ flat.transpose(1, 2)


def output_power(weight: Tensor, moments: Moments) -> float:
    """Second moment of the outputs, summed over them, of ``(groups, outputs, channels, taps)``."""
    by_patch = moments.first.shape[1] == weight.shape[2] * weight.shape[3]
    power = tap_power(weight.flatten(2).unsqueeze(-1) if by_patch else weight)
    return float((power * moments.second).sum() / moments.rows)


def fold(
    weight: Tensor,
    halves: tuple[Moments, Moments],
    kept: Tensor,
    removed: Tensor,
    affine: bool,
    ridge: float | None = None,
    margin: float = 0.0,
) -> Fold:
    """Fold a linear prediction of the removed channels into the weights of the kept ones.

    Args:
        weight: ``(groups, outputs, channels, taps)`` over all channels, float64.
        halves: moments of channels or patches over two disjoint sets of samples, float64 on the device of
            ``weight``.
        kept: ``(groups, k)`` channels that stay, within their group.
        removed: ``(groups, r)`` channels that go, r >= 1.
        affine: whether the caller can make up for a change of the mean output.
        ridge: in units of the kept inputs' mean variance; ``None``: chosen by two-fold cross-validation, where
            doing nothing, making up for the mean alone and, for moments of patches, one A for all taps are
            candidates as well. With a ridge given, moments of patches are solved by patch.
        margin: relative error of the held-out errors themselves. A candidate must beat doing nothing by so much
            on either half.

    Returns:
        The fold. With ``ridge=None`` it is never worse on either held-out half than doing nothing; with samples
        in one half only, nothing can be held out and nothing is done.
    """
    plain = torch.stack([w[:, k] for w, k in zip(weight, kept, strict=True)])
    both = halves[0] + halves[1]
    features = both.first.shape[1]
    problem = _Problem(weight, features, kept, removed, affine, RIDGES if ridge is None else (ridge,))
    none = ("none", float("nan"))
    choice = problem.candidates[0] if ridge is not None else none
    lost = float(problem.nothing(both))
    left = lost if ridge is None else float("nan")
    if kept.numel() == 0:
        choice = none
    elif all(float(half.rows) > 0 for half in halves):
        errors = torch.stack([problem.errors(*halves), problem.errors(*halves[::-1])])
        nothing = torch.stack([problem.nothing(halves[1]), problem.nothing(halves[0])])
        # Doing nothing is in the error's own currency: the same samples, the same outputs.
        lost = left = float(nothing.sum()) / 2
        safe = (errors <= (1 - margin) * nothing.unsqueeze(-1)).all(0) & errors.isfinite().all(0)
        at = 0 if ridge is not None else int(torch.where(safe, errors.sum(0), torch.inf).argmin())
        if ridge is not None or bool(safe[at]):
            choice, left = problem.candidates[at], float(errors[:, at].sum()) / 2
    method, used = choice
    solved = plain if method in ("none", "mean") else problem.solve(both, method, used)
    return Fold(solved, method, used, lost, left)
