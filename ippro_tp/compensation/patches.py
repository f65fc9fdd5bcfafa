"""What a convolution or Linear layer reads for single positions of its output: geometry only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Rows:
    """Some positions of a layer's output.

    Attributes:
        shape: all of them: ``(batch, *spatial)`` of a convolution, everything but channels of a Linear layer.
        index: ``(rows,)`` int64, those chosen, in the flattened ``shape``.
    """

    shape: tuple[int, ...]
    index: Tensor

    def coordinate(self, axis: int) -> Tensor:
        """``(rows,)`` int64: where along ``axis`` of ``shape`` each row lies."""
        return self.index // math.prod(self.shape[axis + 1 :]) % self.shape[axis]


def choose(total: int, some: int) -> Tensor:
    """``(min(some, total),)`` int64, ascending: different numbers below ``total``, one from each of equal parts.

    Where in its part each lies goes by steps of the golden ratio, so that batch and space are both covered.
    """
    if some >= total:
        return torch.arange(total)
    if 2 * some > total:  # too close together: choose those that are left out
        kept = torch.ones(total, dtype=torch.bool)
        kept[choose(total, total - some)] = False
        return kept.nonzero().view(-1)
    part = torch.arange(some, dtype=torch.float64)
    return ((part + part * GOLDEN % 1) * total / some).long()


def rows_of(module: nn.Module, y: Tensor) -> tuple[int, ...]:
    """The :attr:`Rows.shape` of a layer's output ``y``."""
    return (y.shape[0], *y.shape[2:]) if isinstance(module, _ConvNd) else tuple(y.shape[:-1])


def outputs_at(module: nn.Module, y: Tensor, rows: Rows) -> Tensor:
    """``(rows, channels)``: a layer's output ``y`` at some positions."""
    index = rows.index.to(y.device)
    if not isinstance(module, _ConvNd):
        return y.reshape(-1, y.shape[-1]).index_select(0, index)
    space = math.prod(rows.shape[1:])
    found: Tensor = y.flatten(2)[index // space, :, index % space] if y.dim() > 2 else y[index]
    return found


def sum_at(module: nn.Module, terms: Iterable[Tensor], rows: Rows, dtype: torch.dtype) -> Tensor:
    """``(rows, channels)``: the sum at some positions of tensors laid out like a layer's output."""
    found: Tensor = sum(outputs_at(module, term, rows).to(dtype) for term in terms)  # type: ignore[assignment]
    return found


def inputs_at(module: nn.Module, x: Tensor, rows: Rows, groups: Tensor | None = None) -> Tensor:
    """What a layer reads for the outputs that :func:`outputs_at` gives.

    Args:
        module: a Conv or Linear layer.
        x: its input.
        rows: which.
        groups: int64, those of a convolution's groups that are asked for; ``None``: all.

    Returns:
        ``(groups, rows, features)``; features are those of one filter: taps times channels, taps slowest.
    """
    index = rows.index.to(x.device)
    if not isinstance(module, _ConvNd):
        return x.reshape(-1, x.shape[-1]).index_select(0, index).unsqueeze(0)
    where, inside = _read_from(module, tuple(x.shape[2:]), rows.shape[1:], index % math.prod(rows.shape[1:]))
    sample, space = (index // math.prod(rows.shape[1:])).unsqueeze(1), math.prod(x.shape[2:])
    x = x.flatten(2)
    channels = torch.arange(x.shape[1], device=x.device).view(module.groups, -1)
    channels = channels if groups is None else channels[groups.to(x.device)]
    if where.numel() * 4 < x.shape[0] * space:  # few: not worth turning the whole input round
        values = (
            x[sample, :, where]
            if groups is None
            else x[sample.unsqueeze(2), channels.view(-1), where.unsqueeze(2)]
        )
        values = values.unflatten(2, channels.shape).permute(2, 0, 1, 3)
    elif module.groups == 1:
        values = x.transpose(1, 2).flatten(0, 1).index_select(0, (sample * space + where).view(-1))
        values = values.view(1, *where.shape, -1)
    else:  # in the order in which they are given
        x = x if groups is None else x[:, channels.view(-1)]
        values = x.transpose(0, 1).flatten(1).index_select(1, (sample * space + where).view(-1))
        values = values.view(*channels.shape, *where.shape).permute(0, 2, 3, 1)
    values = values.contiguous()
    if inside is not None:
        values *= inside.unsqueeze(-1)
    rows_read: Tensor = values.flatten(2)
    return rows_read


def tap_sources(module: _ConvNd, dim: int, length: int, outputs: int | None = None) -> Tensor:
    """Input position that each tap reads for each output along one spatial dimension; -1: a zero.

    Args:
        module: a convolution, transposed or not.
        dim: spatial dimension, 0 for the first.
        length: size of the input along it.
        outputs: size of the output along it, if known. Where the layer's own padding would give another one,
            zeros are taken to be added on both sides alike, as in TensorFlow's ``"SAME"``.

    Returns:
        ``(outputs, kernel)`` int64. Zeros are those of padding, or gaps of a transposed convolution.
    """
    kernel, stride, dilation = module.kernel_size[dim], module.stride[dim], module.dilation[dim]
    taps = torch.arange(kernel) * dilation
    if isinstance(module, _ConvTransposeNd):
        padding = int(module.padding[dim])
        usual = (length - 1) * stride - 2 * padding + dilation * (kernel - 1) + module.output_padding[dim] + 1
        reached = torch.arange(usual if outputs is None else outputs).unsqueeze(1) + padding - taps
        source = reached // stride
        return torch.where((reached % stride == 0) & (source >= 0) & (source < length), source, -1)
    # torch keeps the padding last dimension first, as (before, after) pairs.
    pairs = module._reversed_padding_repeated_twice
    at = 2 * (len(module.kernel_size) - 1 - dim)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    numbers = torch.arange(1.0, length + 1, dtype=torch.float64).view(1, 1, -1)
    padded = F.pad(numbers, (pairs[at], pairs[at + 1]), mode=mode).view(-1).long() - 1
    usual = max(0, (padded.numel() - dilation * (kernel - 1) - 1) // stride + 1)
    if outputs is None or outputs == usual:
        return padded[torch.arange(usual).unsqueeze(1) * stride + taps]
    missing = max(0, (outputs - 1) * stride + dilation * (kernel - 1) + 1 - length)
    source = torch.arange(outputs).unsqueeze(1) * stride + taps - missing // 2
    return torch.where((source >= 0) & (source < length), source, -1)


def _read_from(
    module: _ConvNd, lengths: tuple[int, ...], sizes: tuple[int, ...], position: Tensor
) -> tuple[Tensor, Tensor | None]:
    """``(rows, taps)``: flat input positions, and whether they lie inside; ``None``: all do."""
    index = torch.zeros(len(position), 1, dtype=torch.long, device=position.device)
    inside = torch.ones_like(index, dtype=torch.bool)
    rest = position
    for dim in reversed(range(len(sizes))):  # taps are joined last dimension fastest, as in the weight
        source = tap_sources(module, dim, lengths[dim], sizes[dim]).to(position.device)
        read = source[rest % sizes[dim]].unsqueeze(-1)
        rest = rest // sizes[dim]
        index = (read.clamp_min(0) * math.prod(lengths[dim + 1 :]) + index.unsqueeze(-2)).flatten(-2)
        inside = ((read >= 0) & inside.unsqueeze(-2)).flatten(-2)
    return index, None if bool(inside.all()) else inside
