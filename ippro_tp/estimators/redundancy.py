r"""What the remaining channels do not tell of a channel: a ranking for networks that are refitted after pruning.

A layer that reads a group is refitted to its former outputs after pruning (:class:`ippro_tp.Compensation`), so
what the remaining channels R predict of a removed one is not lost. With C the correlation of the channels where
they are read, b the coefficients of the regression of the removed channels S on those of R, and q the loss of a
channel by itself, removing channel k after those of S adds

.. math:: \Delta L_k = \Big(q_k + \sum_{i \in S} q_i\, b_{ik}^2\Big)\, \rho_k\,\frac{Q}{\sum_{j \notin S} q_j},
          \qquad \rho_k = \frac{1}{(C_{RR}^{-1})_{kk}},

where :math:`\rho_k` is the share of k's variance that the others of R do not predict, and the sum is over what k
predicted of channels that are gone. The last factor is the depletion of :mod:`estimators.ranking`. The channel
that adds least is removed next.

The regression has a constant term: where offsets are measured from zero, C is of second moments about zero, and a
constant is among the predictors; where they are measured from the mean, C is centred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .coupling import in_blocks

RIDGE = 0.01
"""Share of its variance that a channel is taken to have for itself at least."""
ROUNDS = 128
"""Units of a group are removed one by one, or in this many lots."""


def moments(x: Tensor) -> Tensor:
    """Sums over the rows of the products of channels and a one, within blocks of channels.

    Args:
        x: ``(rows, channels)``, what a layer reads.

    Returns:
        ``(blocks, size + 1, size + 1)`` float32 or wider, blocks as in :mod:`estimators.coupling`. The last row
        and column belong to the one.

    Example:
        >>> moments(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
        tensor([[[10., -1.,  4.],
                 [-1.,  5.,  1.],
                 [ 4.,  1.,  2.]]])
    """
    parts = pad(in_blocks(x), (0, 1), value=1.0)
    return parts.mT @ parts


@dataclass(frozen=True, eq=False)
class Redundancy:
    """How the channels of a group predict each other where they are read.

    Attributes:
        correlation: ``(blocks, size + 1, size + 1)`` float64, of the channels and a constant, which is the last;
            regularised, with a unit diagonal.
        read: ``(channels,)`` bool: channels that a layer reads. The loss of a unit is shared out among these.
    """

    correlation: Tensor
    read: Tensor

    @staticmethod
    def of(found: Sequence[Tensor], read: Tensor, centered: bool) -> Redundancy | None:
        """The mean over the layers that read a group.

        Args:
            found: sums of :func:`moments`, for each of some layers.
            read: ``(channels,)`` bool.
            centered: whether offsets are measured from the mean.

        Returns:
            ``None`` if nothing was read.
        """
        each = [_correlation(own if own.device.type == "mps" else own.double(), centered) for own in found]
        return Redundancy(torch.stack(each).mean(0), read) if each else None

    def whole(self, width: int) -> Tensor:
        """``(n, n)``, all blocks as one matrix: the channels first, then a constant for each block."""
        blocks, size, _ = self.correlation.shape
        channel = torch.arange(width, device=self.correlation.device)
        constant = torch.arange(1, blocks + 1, device=channel.device) * size - 1
        at = torch.cat([channel + channel // (size - 1), constant])
        joined: Tensor = torch.block_diag(*self.correlation)
        return joined[at][:, at]


def _correlation(sums: Tensor, centered: bool) -> Tensor:
    rows = sums[:, -1:, -1:].clamp_min(1)
    second = sums / rows
    power = second.diagonal(dim1=1, dim2=2).clone()
    if centered:
        mean = second[:, -1:].clone()
        mean[..., -1] = 0
        second = second - mean.mT * mean
        second[:, -1, :-1] = second[:, :-1, -1] = 0
    square = second.diagonal(dim1=1, dim2=2)
    # What does not vary neither predicts nor is predicted.
    size = torch.where(square > 1e-6 * power, square, torch.inf).sqrt()
    found = second / size[:, :, None] / size[:, None]
    # Few rows explain more by chance.
    found = found / (1 + RIDGE + sums.shape[1] / rows)
    found.diagonal(dim1=1, dim2=2).fill_(1)
    return found


def removal_order(losses: Tensor, own: Tensor, correlation: Tensor, unit: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""The order in which units are removed, and what each adds to the loss before depletion.

    With H at first the diagonal matrix of q, a channel adds :math:`H_{kk}\rho_k`. Removing the channels K, whose
    regression on the others has the coefficients a, turns H into
    :math:`H + H_{:K} a + (H_{:K} a)^T + a^T H_{KK} a`.

    Args:
        losses: ``(groups, units)`` float64, of each unit by itself.
        own: ``(groups, channels)`` float64, q: parts of these losses.
        correlation: ``(groups, n, n)`` with n > channels, see :class:`Redundancy`.
        unit: ``(channels,)`` int64, the unit of each channel, for a single group; ``None``: each channel is one.

    Returns:
        ``(groups, units)`` int64 and float64.
    """
    width = losses.shape[1]
    inverse = torch.linalg.inv_ex(correlation).inverse
    hessian = torch.diag_embed(pad(own.to(inverse), (0, correlation.shape[1] - own.shape[1])))
    # What no layer reads has no share in its unit's loss, but a unit that nobody reads has its loss.
    held = own if unit is None else torch.zeros_like(losses).index_add_(1, unit, own)
    rest = (losses - held).clamp_min(0)
    members = None if unit is None else _members(unit)
    gone = torch.zeros_like(losses, dtype=torch.bool)
    lot, order, values = -(-width // ROUNDS), [], []
    for first in range(0, width, lot):
        kept = 1 / inverse.diagonal(dim1=1, dim2=2)[:, : own.shape[1]].clamp_min(1)  # of a correlation: at most 1
        cost = hessian.diagonal(dim1=1, dim2=2)[:, : own.shape[1]] * kept
        cost = cost if unit is None else torch.zeros_like(losses).index_add_(1, unit, cost.to(losses))
        cost = (cost.to(losses) + rest).masked_fill(gone, torch.inf)
        value, place = cost.topk(min(lot, width - first), largest=False)
        gone.scatter_(1, place, True)
        order.append(place)
        values.append(value)
        out = place if members is None else members(place)
        _remove(inverse, hessian, out)
    return torch.cat(order, 1), torch.cat(values, 1)


def _members(unit: Tensor) -> Callable[[Tensor], Tensor]:
    """From ``(1, k)`` units to ``(1, channels)``, the channels that belong to them."""
    order = unit.argsort(stable=True)
    count = torch.bincount(unit.cpu())  # units are known on the CPU: nothing to wait for
    if bool((count == count[0]).all()):
        table = order.view(len(count), -1)
        return lambda units: table[units[0]].view(1, -1)
    return lambda units: torch.isin(unit, units[0]).nonzero().T


def _remove(inverse: Tensor, hessian: Tensor, out: Tensor) -> None:
    """Remove the channels ``out``, ``(groups, k)``, from both matrices: their rows and columns become zero."""
    size = inverse.shape[1]
    rows = out[:, :, None].expand(-1, -1, size)
    columns = out[:, None].expand(-1, out.shape[1], -1)
    found, loss = inverse.gather(1, rows), hessian.gather(1, rows)
    # The coefficients a, and -1 for the removed themselves.
    told = -torch.linalg.solve_ex(found.gather(2, columns), found).result
    half = loss + 0.5 * loss.gather(2, columns) @ told
    hessian.baddbmm_(half.mT, told).baddbmm_(told.mT, half)
    inverse.baddbmm_(found.mT, told)
