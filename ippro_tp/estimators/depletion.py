r"""What a channel costs when others of its group have gone before it.

A ranking adds up what single channels lose. But the fewer channels a group has left, the more each of them
carries: with the last one everything goes. So let the loss of a group grow with the logarithm of what is left,
:math:`L = -Q \ln(R/Q)`, where q is the loss of a single channel, :math:`E\,t^2` or :math:`(E|t|)^2`, Q the
sum of q over the group and R the sum over those that stay. At first that is the sum of what goes,
:math:`L \approx Q - R`; as the group is emptied it grows without bound. The channel that goes when all of lower
score have gone adds

.. math:: \Delta L_k \approx q_k\, \frac{Q}{\sum_{j:\,q_j \ge q_k} q_j}

Without Q this is the score of LAMP (Lee et al., ICLR 2021), for which all layers are worth the same. Within a
group the order stays as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor


def depletion_factors(scores: Tensor, degree: float = 1.0, unit: Tensor | None = None) -> Tensor:
    """Factors of the scores of one group for what has gone of it before each channel.

    Args:
        scores: ``(channels,)``, not negative, any float dtype.
        degree: 1 for scores that go as abs(t), whose squares are the q above; 2 for scores that are q.
        unit: ``(channels,)`` int64, the number of the unit that each channel goes with, where they do not go one
            by one: heads, convolution groups. The mean of a unit is then its score.

    Returns:
        ``(channels,)`` float64: 1 for the lowest score, more for higher ones; equal for equal scores, and 1 where
        all are zero.

    Example:
        >>> depletion_factors(torch.tensor([3.0, 1.0, 4.0]), degree=2).tolist()
        [1.1428571428571428, 1.0, 2.0]
    """
    if unit is not None:
        means = scores.new_zeros(int(unit.max()) + 1, dtype=torch.float64)
        means.scatter_reduce_(0, unit.to(scores.device), scores.double(), "mean", include_self=False)
        return depletion_factors(means, degree)[unit.to(scores.device)]
    largest = scores.max()
    losses = (scores.double() / torch.where(largest > 0, largest, 1)).pow(2 / degree)
    ordered = losses.sort(descending=True).values
    left = ordered.cumsum(0)
    left, total = left[torch.searchsorted(-ordered, -losses, right=True) - 1], left[-1]
    return torch.where(left > 0, total / left, 1).pow(degree / 2)
