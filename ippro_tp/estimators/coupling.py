"""Second moments of the offsets of a group's channels: sums of products, gathered during calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 1024
"""Channels of wider groups are coupled within blocks of at most so many, which stand for the whole group."""


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
    """Second moments of the offsets of a group's channels.

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
        count = torch.bincount(unit.cpu()).to(whole.device)  # units are known on the CPU: nothing to wait for
        unit = unit.to(whole.device)
        rows: Tensor = whole.new_zeros(len(count), len(sizes)).index_add_(0, unit, whole)
        pairs: Tensor = rows.new_zeros(len(count), len(count)).index_add_(1, unit, rows)[None] / count
        return pairs
