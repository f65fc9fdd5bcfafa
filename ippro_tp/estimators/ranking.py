r"""The ranking over groups: what a channel costs when others of its group have gone before it, and in compute.

A ranking adds up what single channels lose. But the fewer channels a group has left, the more each of them
carries: with the last one everything goes. So let the loss of a group grow with the logarithm of what is left,
:math:`L = -Q \ln(R/Q)`, where q is the loss of a single channel, :math:`E\,t^2` or :math:`(E|t|)^2`, Q the
sum of q over the group and R the sum over those that stay. At first that is the sum of what goes,
:math:`L \approx Q - R`; as the group is emptied it grows without bound. Without Q this is the score of LAMP (Lee
et al., ICLR 2021), for which all layers are worth the same.

To first order, removing the set S of a group's channels changes the loss of sample n by
:math:`\sum_{i \in S} t_{ni}`, and the quadratic model of the loss has
:math:`E(\sum_S t)^2 = \sum_{i,j \in S} C_{ij}` with :math:`C_{ij} = E\,t_i t_j`. Single channels count its
diagonal alone. But channels that pull the same way cost more together than singly, whole layers of them much more,
and channels that make up for each other cost less. The first order does not hold all the way, so covariances are
shrunk towards the diagonal: a pair counts for kappa of what it says. Together, the channel k that goes after those
of S adds

.. math:: \Delta L_k = \Big(q_k + 2\kappa \sum_{i \in S} C_{ik}\Big)\, \frac{Q}{\sum_{j \notin S} q_j}

and the one that adds least is the next to go. With kappa = 0 the order within a group stays that of the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .coupling import BLOCK, Coupling

COUPLING = 0.25
"""The kappa above, chosen on held-out images of five networks (``benchmarks/results/research.md``)."""
ROUNDS = 128
"""Channels of a group leave one by one, or in so many lots."""
AT_ONCE = 1 << 25
"""Numbers in the products of groups of one width that are worked through together."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """A group in a ranking over groups.

    Attributes:
        scores: ``(channels,)``, any float dtype: those of single channels.
        unit: ``(channels,)`` int64, the number (from 0, none left out) of the unit that each channel goes with,
            where channels do not go one by one: the places of all heads, or of all convolution groups, that go
            together; positions tied by a product. A unit's score is the mean over its channels. ``None``: each
            channel is a unit.
        coupling: how the offsets of the channels go together; ``None`` if it is not known.
        cost: of one channel, in any unit that is the same for all groups.
    """

    scores: Tensor
    unit: Tensor | None = None
    coupling: Coupling | None = None
    cost: float = 1.0


def rank(
    groups: Sequence[Ranked],
    *,
    degree: float = 1.0,
    kappa: float | None = COUPLING,
    cost_exponent: float | None = None,
    normalize: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Scores that can be compared over groups: the channels of lowest score, of whatever group, go first.

    Args:
        groups: all that are ranked; a group's result does not depend on the others.
        degree: 1 for scores that go as abs(t), whose squares are the q above; 2 for scores that are q.
        kappa: how much of the covariance counts, from 0 to 1, where it is known; 0 for depletion alone; ``None``:
            each channel counts by itself.
        cost_exponent: power of the cost; ``None`` follows the quadratic model of the loss, ``degree / 2``.
        normalize: applied to the scores of each group before they are divided by the cost.

    Returns:
        For each group ``(channels,)`` float32 on the device of its scores; see :func:`unit_scores`.

    Raises:
        ValueError: a cost is not positive, or scores to be depleted are negative.

    Example:
        >>> cheap, dear = (Ranked(torch.tensor([1.0, 2.0]), cost=cost) for cost in (1.0, 4.0))
        >>> rank([cheap, dear], kappa=None)
        [tensor([1., 2.]), tensor([0.5000, 1.0000])]
    """
    exponent = degree / 2 if cost_exponent is None else cost_exponent
    for group in groups:
        if not group.cost > 0:
            raise ValueError(f"a channel costs {group.cost}; cost must be positive")
    least = [group.scores.min() for group in groups if group.scores.numel()]
    # Asked once for all, as a device has to be waited for.
    if kappa is not None and least and bool((torch.stack([each.to(least[0]) for each in least]) < 0).any()):
        raise ValueError("scores are negative: depletion is not for them")
    scores = [group.scores for group in groups]
    if kappa is not None:
        found = depletion_factors(groups, degree, kappa)
        scores = [own * factor for own, factor in zip(scores, found, strict=True)]
    scores = [own.float() for own in scores]
    if normalize is not None:
        scores = [normalize(own) for own in scores]
    return [own / group.cost**exponent for own, group in zip(scores, groups, strict=True)]


def unit_scores(scores: Tensor, unit: Tensor | None) -> Tensor:
    """``(units,)``, the mean over the channels of each unit.

    Example:
        >>> unit_scores(torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0, 1, 0, 1]))
        tensor([2.0000, 3.5000])
    """
    if unit is None:
        return scores
    means = scores.new_zeros(int(unit.max()) + 1)
    return means.scatter_reduce_(0, unit.to(scores.device), scores, "mean", include_self=False)


def depletion_factors(groups: Sequence[Ranked], degree: float = 1.0, kappa: float = COUPLING) -> list[Tensor]:
    """Factors of the scores of groups for what has gone of each before a channel, and how they go together.

    Args:
        groups: each by itself; those of one width are worked through together, which is faster.
        degree: as for :func:`rank`.
        kappa: as there.

    Returns:
        For each group ``(channels,)`` float64 on the device of its scores: 1 for the lowest score, and such that
        no channel is cheaper than those that go before it; 1 where all are zero.

    Example:
        >>> depletion_factors([Ranked(torch.tensor([3.0, 1.0, 4.0]))], degree=2)[0].tolist()
        [1.1428571428571428, 1.0, 2.0]

        Two channels that do the same, and a third: the second of the two costs more than it would alone.

        >>> twins = Coupling(torch.tensor([[[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]]))
        >>> scores = torch.tensor([1.0, 1.1, 1.2])
        >>> factors = depletion_factors([Ranked(scores, coupling=twins)], kappa=1.0)[0]
        >>> (scores * factors).argsort().tolist()
        [0, 2, 1]
    """
    factors: list[Tensor] = [group.scores for group in groups]
    alike: dict[tuple[int, int, torch.device, torch.dtype | None], list[int]] = {}
    units = [group.unit for group in groups]
    sizes = [_relative(group.scores, degree) for group in groups]
    losses = [unit_scores(own.pow(degree), unit).pow(2 / degree) for own, unit in zip(sizes, units, strict=True)]
    pairs = [group.coupling if kappa else None for group in groups]
    for number, (loss, coupling) in enumerate(zip(losses, pairs, strict=True)):
        blocks = 1 if coupling is None or units[number] is not None else coupling.products.shape[0]
        dtype = None if coupling is None else coupling.products.dtype
        alike.setdefault((len(loss), blocks, loss.device, dtype), []).append(number)
    for (width, _, _, _), numbers in alike.items():
        most = max(1, AT_ONCE // (width * min(width, BLOCK)))
        for part in (numbers[first : first + most] for first in range(0, len(numbers), most)):
            known = [(pairs[n], sizes[n], units[n]) for n in part]
            products = [c.with_sizes(own, 2 * kappa, unit) for c, own, unit in known if c is not None]
            own_losses = torch.stack([losses[n] for n in part])
            added = _leaving(own_losses, torch.stack(products)) if products else _sorted_leaving(own_losses)
            for n, own in zip(part, added, strict=True):
                ratio = torch.where(losses[n] > 0, own / losses[n], 1).pow(degree / 2)
                unit = units[n]
                factors[n] = ratio if unit is None else ratio[unit.to(ratio.device)]
    return factors


def _relative(scores: Tensor, degree: float) -> Tensor:
    """Sizes of offsets, the largest being 1."""
    largest = scores.max()
    return (scores.double() / torch.where(largest > 0, largest, 1)).pow(1 / degree)


def _sorted_leaving(losses: Tensor) -> Tensor:
    """What each channel adds when those of lower loss have gone: ``(groups, channels)`` float64."""
    ordered, order = losses.sort(dim=1, stable=True)
    return torch.empty_like(losses).scatter_(1, order, ordered * _depletion(ordered))


def _depletion(ordered: Tensor) -> Tensor:
    """All losses of each group over those that are left, from each channel on in the order of leaving."""
    left = ordered.flip(1).cumsum(1).flip(1)
    return torch.where(left > 0, left[:, :1] / left, 1)


def _leaving(losses: Tensor, products: Tensor) -> Tensor:
    """What each channel adds when the cheapest leave first: ``(groups, channels)`` float64.

    Args:
        losses: ``(groups, channels)`` float64, q.
        products: ``(groups, blocks, size, size)``, what the loss of a channel grows by when another is gone.
    """
    groups, blocks, size, _ = products.shape
    width, total = losses.shape[1], blocks * size
    products.diagonal(dim1=2, dim2=3).fill_(torch.inf)  # who is gone does not go again
    rows = products.view(-1, size)
    loss = pad(losses.to(products), (0, total - width), value=torch.inf).view(-1, size)
    base = torch.arange(groups, device=loss.device)[:, None] * total
    lot, values, order = -(-width // ROUNDS), [], []
    for first in range(0, width, lot):
        value, place = loss.view(groups, total).topk(min(lot, width - first), largest=False)
        row = (place + base).view(-1)
        loss.index_add_(0, row // size, rows[row])
        values.append(value)
        order.append(place)
    leaving = torch.cat(order, 1)
    added = torch.cat(values, 1) * _depletion(losses.gather(1, leaving))
    # None is cheaper than those before it, and always a little dearer: Torch-Pruning removes all of equal score.
    added = added.cummax(1).values * (1 + 1e-6 * torch.arange(width, device=added.device))
    return torch.empty_like(losses).scatter_(1, leaving, added)
