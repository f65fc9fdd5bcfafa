"""What a convolution or Linear layer reads for single positions of its output: geometry only."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

GOLDEN = (5**0.5 - 1) / 2


def tap_sources(module: _ConvNd, dim: int, length: int) -> Tensor:
    """Input position that each tap reads for each output along one spatial dimension; -1: a zero.

    Args:
        module: a convolution, transposed or not.
        dim: spatial dimension, 0 for the first.
        length: size of the input along it.

    Returns:
        ``(outputs, kernel)`` int64. Zeros are those of padding, or gaps of a transposed convolution.
    """
    kernel, stride, dilation = module.kernel_size[dim], module.stride[dim], module.dilation[dim]
    taps = torch.arange(kernel) * dilation
    if isinstance(module, _ConvTransposeNd):
        padding = int(module.padding[dim])
        outputs = (length - 1) * stride - 2 * padding + dilation * (kernel - 1) + module.output_padding[dim] + 1
        reached = torch.arange(outputs).unsqueeze(1) + padding - taps
        source = reached // stride
        return torch.where((reached % stride == 0) & (source >= 0) & (source < length), source, -1)
    # torch keeps the padding last dimension first, as (before, after) pairs.
    pairs = module._reversed_padding_repeated_twice
    at = 2 * (len(module.kernel_size) - 1 - dim)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    numbers = torch.arange(1.0, length + 1, dtype=torch.float64).view(1, 1, -1)
    padded = F.pad(numbers, (pairs[at], pairs[at + 1]), mode=mode).view(-1).long() - 1
    outputs = max(0, (padded.numel() - dilation * (kernel - 1) - 1) // stride + 1)
    return padded[torch.arange(outputs).unsqueeze(1) * stride + taps]


def positions(first: int, samples: int, some: int, total: int) -> Tensor:
    """``(samples, min(some, total))`` int64: positions out of ``total`` for the samples from number ``first`` on.

    They follow a golden-ratio sequence, so that all positions have their turn, whatever the batches.
    """
    if some >= total:
        return torch.arange(total).expand(samples, -1)
    turn = torch.arange(first * some, (first + samples) * some, dtype=torch.float64)
    return (turn * GOLDEN % 1 * total).long().view(samples, some)


def outputs_at(module: nn.Module, y: Tensor, first: int, samples: int, some: int) -> Tensor:
    """Outputs of a layer at some positions per sample.

    Args:
        module: a Conv or Linear layer.
        y: its output. A convolution's ``(B, channels, ...)``, B a multiple of ``samples``, each of which is
            B / samples rows; a Linear layer's ``(B, ..., channels)``.
        first: number of the first sample.
        samples: how many there are.
        some: positions per row of a convolution, per sample of a Linear layer.

    Returns:
        ``(rows, channels)``, those of a sample next to each other.
    """
    y = y.flatten(2) if isinstance(module, _ConvNd) else _by_sample(y, samples).transpose(1, 2)
    chosen = _chosen(y, first, samples, some, y.shape[2])
    at = chosen.unsqueeze(1).expand(-1, y.shape[1], -1)
    return y.gather(2, at).transpose(1, 2).flatten(0, 1)


def inputs_at(module: nn.Module, x: Tensor, first: int, samples: int, some: int) -> Tensor:
    """What a layer reads for the outputs that :func:`outputs_at` gives.

    Args:
        module: as there.
        x: its input.
        first: as there.
        samples: as there.
        some: as there.

    Returns:
        ``(groups, rows, features)``; features are those of one filter: channels times taps, channels slowest.
    """
    if not isinstance(module, _ConvNd):
        values = _by_sample(x, samples).transpose(1, 2)
        chosen = _chosen(values, first, samples, some, values.shape[2])
        at = chosen.unsqueeze(1).expand(-1, values.shape[1], -1)
        return values.gather(2, at).transpose(1, 2).flatten(0, 1).unsqueeze(0)
    sources = [tap_sources(module, d, n).to(x.device) for d, n in enumerate(x.shape[2:])]
    total = math.prod(s.shape[0] for s in sources)
    values = _patches(x, sources, _chosen(x, first, samples, some, total))
    rows: Tensor = values.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return rows


def _by_sample(x: Tensor, samples: int) -> Tensor:
    """``(B, ..., c)`` as ``(samples, positions, c)``."""
    return x.reshape(samples, -1, x.shape[-1])


def _chosen(x: Tensor, first: int, samples: int, some: int, total: int) -> Tensor:
    per_sample = x.shape[0] // samples
    return positions(first * per_sample, x.shape[0], some, total).to(x.device)


def _patches(x: Tensor, sources: list[Tensor], chosen: Tensor) -> Tensor:
    """``(n, channels * taps, outputs)`` of ``(n, channels, *lengths)`` for the ``(n, outputs)`` outputs chosen."""
    n, channels = x.shape[:2]
    sizes = [s.shape[0] for s in sources]
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
    values = values * inside.unsqueeze(1).to(x.dtype)
    return values.transpose(2, 3).flatten(1, 2)
