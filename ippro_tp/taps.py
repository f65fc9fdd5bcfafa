"""Which input positions the taps of a convolution read: geometry only."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

GOLDEN = (5**0.5 - 1) / 2


def tap_sources(module: _ConvNd, dim: int, length: int) -> Tensor:
    """Input position that each tap reads for each output along one spatial dimension; -1: a zero of padding.

    Args:
        module: a convolution that is not transposed.
        dim: spatial dimension, 0 for the first.
        length: size of the input along it.

    Returns:
        ``(outputs, kernel)`` int64.
    """
    kernel, stride, dilation = module.kernel_size[dim], module.stride[dim], module.dilation[dim]
    # torch keeps the padding last dimension first, as (before, after) pairs.
    pairs = module._reversed_padding_repeated_twice
    at = 2 * (len(module.kernel_size) - 1 - dim)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    numbers = torch.arange(1.0, length + 1, dtype=torch.float64).view(1, 1, -1)
    padded = F.pad(numbers, (pairs[at], pairs[at + 1]), mode=mode).view(-1).long() - 1
    outputs = max(0, (padded.numel() - dilation * (kernel - 1) - 1) // stride + 1)
    return padded[torch.arange(outputs).unsqueeze(1) * stride + torch.arange(kernel) * dilation]


def tap_reach(module: _ConvNd, dim: int, length: int) -> Tensor:
    """How often tap i of a convolution reads position q along one spatial dimension, per output.

    Args:
        module: a convolution, transposed or not.
        dim: spatial dimension, 0 for the first.
        length: size of the input along it.

    Returns:
        ``(kernel, length)`` float64. Times the mean image it gives the mean that each tap reads, with what
        padding adds and what strides skip.
    """
    kernel = module.kernel_size[dim]
    if isinstance(module, _ConvTransposeNd):
        stride, dilation, padding = module.stride[dim], module.dilation[dim], int(module.padding[dim])
        outputs = (length - 1) * stride - 2 * padding + dilation * (kernel - 1) + module.output_padding[dim] + 1
        written = torch.arange(length) * stride - padding + dilation * torch.arange(kernel).unsqueeze(1)
        return ((written >= 0) & (written < outputs)).double() / max(1, outputs)
    sources = tap_sources(module, dim, length)
    reach = torch.zeros(kernel, length + 1, dtype=torch.float64)
    reach.scatter_add_(1, sources.T % (length + 1), torch.ones(kernel, sources.shape[0], dtype=torch.float64))
    return reach[:, :length] / max(1, sources.shape[0])


def patches(x: Tensor, sources: list[Tensor], first: int, some: int, padded: bool = True) -> Tensor:
    """What a convolution reads for some of its outputs.

    Args:
        x: ``(n, channels, *lengths)``.
        sources: of :func:`tap_sources`, for each spatial dimension, on the device of ``x``.
        first: number of the first sample: different samples give different outputs, in a golden-ratio sequence,
            so that all positions have their turn.
        some: outputs per sample; all of them if there are no more.
        padded: whether ``sources`` hold any -1.

    Returns:
        ``(n, channels * taps, outputs)``, channels slowest.
    """
    n, channels = x.shape[:2]
    sizes = [s.shape[0] for s in sources]
    total = math.prod(sizes)
    if some >= total:
        chosen = torch.arange(total, device=x.device).expand(n, -1)
    else:
        turn = torch.arange(first * some, (first + n) * some, dtype=torch.float64)
        chosen = (turn * GOLDEN % 1 * total).long().view(n, some).to(x.device)
    index = torch.zeros(n, chosen.shape[1], 1, dtype=torch.long, device=x.device)
    inside = torch.ones_like(index, dtype=torch.bool)
    rest = chosen
    for dim in reversed(range(len(sources))):  # taps are joined last dimension fastest, as in the weight
        read = sources[dim][rest % sizes[dim]].unsqueeze(-1)
        rest = rest // sizes[dim]
        step = math.prod(x.shape[3 + dim :])
        index = (read.clamp_min(0) * step + index.unsqueeze(-2)).flatten(-2)
        inside = ((read >= 0) & inside.unsqueeze(-2)).flatten(-2)
    where = index.flatten(1).unsqueeze(1).expand(-1, channels, -1)
    values = x.flatten(2).gather(2, where).view(n, channels, *index.shape[1:])
    if padded:
        values = values * inside.unsqueeze(1).to(x.dtype)
    return values.transpose(1, 2).flatten(2).transpose(1, 2)  # features lie next to each other in memory
