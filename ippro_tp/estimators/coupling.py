r"""What a channel costs when others of its group go with it: the covariance of their offsets.

To first order, removing the set S of a group's channels changes the loss of sample n by
:math:`\sum_{i \in S} t_{ni}`, and the quadratic model of the loss has
:math:`E(\sum_S t)^2 = \sum_{i,j \in S} C_{ij}` with :math:`C_{ij} = E\,t_i t_j`. Single channels count its
diagonal alone. But channels that pull the same way cost more together than singly, whole layers of them much more,
and channels that make up for each other cost less. The first order does not hold all the way, so covariances are
shrunk towards the diagonal: a pair counts for kappa of what it says. Together with depletion
(:mod:`estimators.depletion`), the channel k that goes after those of S adds

.. math:: \Delta L_k = \Big(q_k + 2\kappa \sum_{i \in S} C_{ik}\Big)\, \frac{Q}{\sum_{j \notin S} q_j}

and the one that adds least is the next to go. With kappa = 0 this is depletion alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

COUPLING = 0.25
"""The kappa above, chosen on held-out images of five networks (``benchmarks/results/research.md``)."""
ROUNDS = 128
"""Channels of a group leave one by one, or in so many lots."""
BLOCK = 1024
"""Channels of wider groups are coupled within blocks of at most so many, which stand for the whole group."""
AT_ONCE = 1 << 25
"""Numbers in the products of groups of one width that are worked through together."""


def offset_products(t: Tensor) -> Tensor:
    """Sums over the samples of the products of offsets, within blocks of channels.

    Args:
        t: ``(samples, channels)``, the offset of each channel for each sample.

    Returns:
        ``(blocks, size, size)`` float32 or wider: one block for up to ``BLOCK`` channels, else blocks of equal
        size, zero beyond the last channel.

    Example:
        >>> offset_products(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
        tensor([[[10., -1.],
                 [-1.,  5.]]])
    """
    parts = in_blocks(t)
    return block_products(parts, parts)


def in_blocks(t: Tensor) -> Tensor:
    """``(samples, channels)`` as ``(blocks, samples, size)``, float32 or wider, zero beyond the last channel."""
    blocks = -(-t.shape[1] // BLOCK)
    size = -(-t.shape[1] // blocks)
    wide = t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
    return pad(wide, (0, blocks * size - t.shape[1])).view(len(t), blocks, size).transpose(0, 1)


def block_products(left: Tensor, right: Tensor) -> Tensor:
    """Sums over the samples of the products of each channel of ``left`` with each of ``right``, block by block."""
    return left.mT @ right


@dataclass(frozen=True, eq=False)
class Coupling:
    """How the offsets of a group's channels go together.

    Attributes:
        products: sums of :func:`offset_products`.
        tied: ``(channels,)`` int64, whose offsets those of each position are, where some only go together.
    """

    products: Tensor
    tied: Tensor | None = None

    @property
    def rms(self) -> Tensor:
        """``(blocks, size)``, the root of the diagonal: never zero."""
        diagonal: Tensor = self.products.diagonal(dim1=1, dim2=2)
        return diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny).sqrt()

    @property
    def correlation(self) -> Tensor:
        """``(blocks, size, size)``, uncentred; zero where a channel has no offset."""
        found: Tensor = self.products / self.rms[:, :, None] / self.rms[:, None, :]
        return found

    def with_sizes(self, sizes: Tensor, factor: float = 1.0, unit: Tensor | None = None) -> Tensor:
        """Products of offsets of other sizes but the same correlations: what each channel adds for each other.

        Args:
            sizes: ``(channels,)``, the size of each channel's offset.
            factor: of the result.
            unit: ``(channels,)`` int64, the number of the unit that each goes with; ``None``: each is one.

        Returns:
            ``(blocks, size, size)`` of the dtype of ``products``: ``[b, i, k]`` for k when i is gone, the mean
            over the channels of k if they are units. Blocks stand for the whole group.
        """
        blocks, size, _ = self.products.shape
        spread = pad(sizes.to(self.products), (0, blocks * size - len(sizes))).view(blocks, size) / self.rms
        found: Tensor = (self.products * (factor * blocks * spread[:, :, None])).mul_(spread[:, None, :])
        if unit is None and self.tied is None:
            return found
        whole: Tensor = torch.block_diag(*found)[: len(sizes), : len(sizes)]
        if self.tied is not None:
            whole = whole[:, self.tied.to(whole.device)]
        if unit is None:
            return whole[None]
        count = torch.bincount(unit)
        rows: Tensor = whole.new_zeros(len(count), len(sizes)).index_add_(0, unit, whole)
        pairs: Tensor = rows.new_zeros(len(count), len(count)).index_add_(1, unit, rows)[None] / count
        return pairs


@dataclass(frozen=True, eq=False)
class Offsets:
    """What is known of one group.

    Attributes:
        scores: ``(channels,)``, not negative, any float dtype: those of single channels.
        coupling: of the same channels.
        unit: ``(channels,)`` int64, the number of the unit that each channel goes with, where they do not go one
            by one: heads, convolution groups. The mean of a unit is then its score.
    """

    scores: Tensor
    coupling: Coupling
    unit: Tensor | None = None


def coupled_factors(groups: Sequence[Offsets], degree: float = 1.0, kappa: float = COUPLING) -> list[Tensor]:
    """Factors of the scores of groups for what has gone of each before a channel, and how they go together.

    Args:
        groups: each by itself; those of one width are worked through together, which is faster.
        degree: 1 for scores that go as abs(t), whose squares are the q above; 2 for scores that are q.
        kappa: how much of the covariance counts, from 0 to 1.

    Returns:
        For each group ``(channels,)`` float64 on the device of its scores: 1 for the lowest score, and such that
        no channel is cheaper than those that go before it; 1 where all are zero.

    Example:
        Two channels that do the same, and a third: the second of the two costs more than it would alone.

        >>> twins = Coupling(torch.tensor([[[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]]))
        >>> scores = torch.tensor([1.0, 1.1, 1.2])
        >>> (scores * coupled_factors([Offsets(scores, twins)], kappa=1.0)[0]).argsort().tolist()
        [0, 2, 1]
    """
    factors: list[Tensor] = [group.scores for group in groups]
    alike: dict[tuple[int, int, torch.device, torch.dtype], list[int]] = {}
    units = [None if group.unit is None else group.unit.to(group.scores.device) for group in groups]
    sizes = [_relative(group.scores, degree) for group in groups]
    losses = [_losses(own, unit, degree) for own, unit in zip(sizes, units, strict=True)]
    for number, (group, loss) in enumerate(zip(groups, losses, strict=True)):
        blocks = group.coupling.products.shape[0] if units[number] is None else 1
        alike.setdefault((len(loss), blocks, loss.device, group.coupling.products.dtype), []).append(number)
    for (width, _, _, _), numbers in alike.items():
        most = max(1, AT_ONCE // (width * min(width, BLOCK)))
        for part in (numbers[first : first + most] for first in range(0, len(numbers), most)):
            products = [groups[n].coupling.with_sizes(sizes[n], 2 * kappa, units[n]) for n in part]
            added = _leaving(torch.stack([losses[n] for n in part]), torch.stack(products))
            for n, own in zip(part, added, strict=True):
                ratio = torch.where(losses[n] > 0, own / losses[n], 1).pow(degree / 2)
                unit = units[n]
                factors[n] = ratio if unit is None else ratio[unit]
    return factors


def _relative(scores: Tensor, degree: float) -> Tensor:
    """Sizes of offsets, the largest being 1."""
    largest = scores.max()
    return (scores.double() / torch.where(largest > 0, largest, 1)).pow(1 / degree)


def _losses(sizes: Tensor, unit: Tensor | None, degree: float) -> Tensor:
    """The q of each channel or unit."""
    if unit is None:
        return sizes.square()
    means = sizes.new_zeros(int(unit.max()) + 1)
    return means.scatter_reduce_(0, unit, sizes.pow(degree), "mean", include_self=False).pow(2 / degree)


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
    ordered = losses.gather(1, leaving)
    left = ordered.flip(1).cumsum(1).flip(1)
    added = torch.cat(values, 1) * torch.where(left > 0, losses.sum(1, keepdim=True) / left, 1)
    # None is cheaper than those before it, and by a hair dearer: Torch-Pruning removes all of equal score.
    added = added.cummax(1).values * (1 + 1e-6 * torch.arange(width, device=added.device))
    return torch.empty_like(losses).scatter_(1, leaving, added)
