r"""The ranking across groups: scores that account for channels removed before, and for cost.

A ranking of single channels adds up their losses. But the fewer channels a group has left, the more each of them
matters: with the last one everything is lost. So let the loss of a group grow with the logarithm of what remains,
:math:`L = -Q \ln(R/Q)`, where q is the loss of a single channel, :math:`E\,t^2` or :math:`(E|t|)^2`, Q the
sum of q over the group and R the sum over the remaining channels. At first this is the sum over the removed ones,
:math:`L \approx Q - R`; as the group is emptied, it grows without bound. Without the factor Q this is the score of
LAMP (Lee et al., ICLR 2021), which values all layers equally.

To first order, removing the set S of a group's channels changes the loss of sample n by
:math:`\sum_{i \in S} t_{ni}`, and the quadratic model of the loss has
:math:`E(\sum_S t)^2 = \sum_{i,j \in S} C_{ij}` with :math:`C_{ij} = E\,t_i t_j`. Scores of single channels are its
diagonal. But channels with the same effect cost more together than one by one, and channels that offset each other
cost less. Since the first order does not hold that far, covariances are shrunk towards the diagonal by a factor
kappa. Taken together, a channel k that is removed after those of S adds

.. math:: \Delta L_k = \Big(q_k + 2\kappa \sum_{i \in S} C_{ik}\Big)\, \frac{Q}{\sum_{j \notin S} q_j}

and the channel that adds least is removed next. With kappa = 0 the order within a group is that of the scores.
If the network is refitted after pruning, what counts is what the remaining channels do not predict instead: see
:mod:`estimators.redundancy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .coupling import BLOCK, Coupling
from .redundancy import ROUNDS, Redundancy, removal_order

COUPLING = 0.25
"""The kappa above, chosen on held-out images of five networks (``benchmarks/results/research.md``)."""
AT_ONCE = 1 << 25
"""Largest number of elements in the products of groups that are processed together."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """A group in a ranking across groups.

    Attributes:
        scores: ``(channels,)``, any float dtype: scores of single channels.
        unit: ``(channels,)`` int64, the number of each channel's unit (from 0, without gaps), if channels cannot
            be removed one by one: a head, one channel of every convolution group, positions tied by a product. A
            unit's score is the mean over its channels. ``None``: each channel is a unit.
        coupling: second moments of the channels' offsets; ``None`` if they are not known.
        cost: of one channel, in any unit that is the same for all groups.
        redundancy: how channels predict each other, if the network is refitted after pruning; replaces
            ``coupling``.
    """

    scores: Tensor
    unit: Tensor | None = None
    coupling: Coupling | None = None
    cost: float = 1.0
    redundancy: Redundancy | None = None


def rank(
    groups: Sequence[Ranked],
    *,
    degree: float = 1.0,
    kappa: float | None = COUPLING,
    cost_exponent: float | None = None,
    normalize: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Scores that can be compared across groups: the channels with the lowest scores are removed first.

    Args:
        groups: the groups to rank; a group's result does not depend on the others.
        degree: 1 for scores that behave like abs(t), whose squares are the q above; 2 for scores that are q.
        kappa: weight of the covariance, from 0 to 1, where it is known; 0: depletion only; ``None``: each channel
            counts by itself.
        cost_exponent: power of the cost; ``None``: ``degree / 2``, from the quadratic model of the loss.
        normalize: applied to the scores of each group before they are divided by the cost.

    Returns:
        For each group ``(channels,)`` float32 on the device of its scores; see :func:`unit_scores`.

    Raises:
        ValueError: a cost is not positive, or scores are negative and ``kappa`` is not ``None``.

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
    """Factors by which scores rise as other channels of their group are removed.

    Args:
        groups: independent of each other; those of equal width are processed together, which is faster.
        degree: as for :func:`rank`.
        kappa: as there.

    Returns:
        For each group ``(channels,)`` float64 on the device of its scores: 1 for the lowest score, or less if the
        remaining channels predict it, and such that no channel ranks below those removed before it; 1 if all
        scores are zero.

    Example:
        >>> depletion_factors([Ranked(torch.tensor([3.0, 1.0, 4.0]))], degree=2)[0].tolist()
        [1.1428571428571428, 1.0, 2.0]

        Two identical channels and a third: the second of the two costs more than it would alone.

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
        if (redundancy := groups[number].redundancy) is not None:
            own = _shared_out(loss, sizes[number].square(), redundancy.read, units[number])
            added = _refitted(loss, own, redundancy, units[number])
            factors[number] = _factors(added, loss, degree, units[number])
            continue
        blocks = 1 if coupling is None or units[number] is not None else coupling.products.shape[0]
        dtype = None if coupling is None else coupling.products.dtype
        alike.setdefault((len(loss), blocks, loss.device, dtype), []).append(number)
    for (width, _, _, _), numbers in alike.items():
        most = max(1, AT_ONCE // (width * min(width, BLOCK)))
        for part in (numbers[first : first + most] for first in range(0, len(numbers), most)):
            known = [(pairs[n], sizes[n], units[n]) for n in part]
            products = [c.with_sizes(own, 2 * kappa, unit) for c, own, unit in known if c is not None]
            own_losses = torch.stack([losses[n] for n in part])
            found = _leaving(own_losses, torch.stack(products)) if products else _sorted_leaving(own_losses)
            for n, added in zip(part, found, strict=True):
                factors[n] = _factors(added, losses[n], degree, units[n])
    return factors


def _factors(added: Tensor, loss: Tensor, degree: float, unit: Tensor | None) -> Tensor:
    """From the loss that each unit adds, and that of each by itself, to factors of the scores of channels."""
    ratio = torch.where(loss > 0, added / loss, 1).pow(degree / 2)
    return ratio if unit is None else ratio[unit.to(ratio.device)]


def _shared_out(loss: Tensor, squares: Tensor, read: Tensor, unit: Tensor | None) -> Tensor:
    """``(channels,)``, the loss of each unit shared out among its channels that are read."""
    if unit is None:
        return loss * read.to(loss.device)
    unit, part = unit.to(loss.device), squares * read.to(loss.device)
    total = torch.zeros_like(loss).index_add_(0, unit, part)
    return part * torch.where(total > 0, loss / total, 0)[unit]


def _refitted(loss: Tensor, own: Tensor, redundancy: Redundancy, unit: Tensor | None) -> Tensor:
    """``(units,)``, the loss that each unit adds if the cheapest is always removed next and the rest refitted.

    Blocks of channels are emptied side by side.
    """
    if unit is None:
        blocks, size = redundancy.correlation.shape[0], redundancy.correlation.shape[1] - 1
        spread = (pad(each, (0, blocks * size - len(each))).view(blocks, size) for each in (loss, own))
        by_block = next(spread)
        order, values = removal_order(by_block, next(spread), redundancy.correlation, None)
        return _depleted(by_block, order, values).flatten()[: len(loss)]
    order, values = removal_order(loss[None], own[None], redundancy.whole(len(own))[None], unit.to(loss.device))
    return _depleted(loss[None], order, values)[0]


def _relative(scores: Tensor, degree: float) -> Tensor:
    """Magnitudes of offsets, scaled so that the largest is 1."""
    largest = scores.max()
    return (scores.double() / torch.where(largest > 0, largest, 1)).pow(1 / degree)


def _sorted_leaving(losses: Tensor) -> Tensor:
    """The loss that each channel adds after those of lower loss: ``(groups, channels)`` float64."""
    ordered, order = losses.sort(dim=1, stable=True)
    return torch.empty_like(losses).scatter_(1, order, ordered * _depletion(ordered))


def _depletion(ordered: Tensor) -> Tensor:
    """The total loss of each group divided by what remains, before each channel in the order of removal."""
    left = ordered.flip(1).cumsum(1).flip(1)
    return torch.where(left > 0, left[:, :1] / left, 1)


def _leaving(losses: Tensor, products: Tensor) -> Tensor:
    """The loss that each channel adds if the cheapest is always removed next: ``(groups, channels)`` float64.

    Args:
        losses: ``(groups, channels)`` float64, q.
        products: ``(groups, blocks, size, size)``, the rise of a channel's loss after another was removed.
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
    return _depleted(losses, torch.cat(order, 1), torch.cat(values, 1))


def _depleted(losses: Tensor, order: Tensor, values: Tensor) -> Tensor:
    """What is added in ``order``, ``(groups, units)``, with depletion, put back in the order of the units."""
    added = values * _depletion(losses.gather(1, order))
    # None costs less than those before it, and always a little more: Torch-Pruning removes all of equal score.
    added = added.cummax(1).values * (1 + 1e-6 * torch.arange(losses.shape[1], device=added.device))
    return torch.empty_like(losses).scatter_(1, order, added)
