"""A consumer of a group as the affine map that i-SpaSP sees: the layer with its following BatchNorm folded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ObservationError
from . import spasp_math as maths
from . import spasp_ranking as ranking
from .spasp_math import Response

Summed = tuple[Tensor, Tensor]
"""Inputs of one size: their sum ``(C, *size)`` and how many were summed, ``()``; float64."""

LARGEST_GRAM = 8192  # rows of a second-moment matrix: 512 MiB in float64


@dataclass(frozen=True, eq=False)
class Consumer:
    """A Conv or Linear layer, times ``gain``, plus ``shift``.

    Attributes:
        module: the layer; its weights are read when they are needed.
        gain: ``(O,)`` float64, scale of the BatchNorm that is the layer's only successor; else ones.
        shift: ``(O,)`` float64, what that BatchNorm adds; else zeros.
    """

    module: nn.Module
    gain: Tensor
    shift: Tensor

    @classmethod
    def of(cls, module: nn.Module, norm: _BatchNorm | None, width: int, device: torch.device) -> Consumer:
        """Read a layer of ``width`` outputs and the BatchNorm that follows it; arithmetic will run on ``device``.

        A BatchNorm without running statistics normalises by the batch and is no part of the map.
        """
        if norm is None or norm.running_var is None:
            one = torch.ones(width, dtype=torch.float64, device=device)
            return cls(module, one, torch.zeros_like(one))
        assert norm.running_mean is not None
        mean, variance = (v.detach().to(device, torch.float64) for v in (norm.running_mean, norm.running_var))
        gain = (variance + norm.eps).rsqrt()
        if norm.affine:
            gain = gain * norm.weight.detach().to(device, torch.float64)
        shift = -mean * gain
        return cls(module, gain, shift + norm.bias.detach().to(device, torch.float64) if norm.affine else shift)

    def add(self, response: Response, inputs: Sequence[Summed], index: Tensor, unit: Tensor, bias: bool) -> None:
        """Add M, the offset and the removal energies of this consumer to ``response``.

        Args:
            response: of the group.
            inputs: what was summed, one entry for each size of input.
            index: ``(k,)`` the input channels that belong to the group.
            unit: ``(k,)`` the unit of each.
            bias: whether the first residual holds what is not the group's.
        """
        units = response.activation.numel()
        response.removals.append(lambda rank: self._removal_energy(inputs, index, rank[unit], units))
        if is_plain_linear(self.module):
            for total, count in inputs:
                shift = count * self._constant() if bias else None
                maths.add_linear(response, self.weight, self.gain, total, shift, index, unit)
            return
        for total, count in inputs:
            if is_plain_conv(self.module):
                shift = count * self._constant() if bias else None
                matrix, offset = maths.conv_matrix(self._weight(), total, shift, index, **_geometry(self.module))
            else:
                operator, rest = self._operator(total)
                matrix, offset = maths.operator_matrix(operator, total, count * rest if bias else None, index)
            response.add_matrix(matrix, unit)
            response.offset.index_add_(0, unit, offset)

    def add_gated(
        self, response: Response, gram: Tensor, inputs: Sequence[Summed], index: Tensor, unit: Tensor, bias: bool
    ) -> None:
        r"""Add Q in place of M: :math:`Q_{cc'} = \sum_n \langle P_c(n), P_{c'}(n) \rangle`, and its offset.

        Args:
            response: of the group.
            gram: as the function :func:`gram` gives it, summed over the calibration set.
            inputs: what was summed, one entry for each size of input.
            index: ``(k,)`` the input channels that belong to the group.
            unit: ``(k,)`` the unit of each.
            bias: whether the first residual holds what is not the group's.
        """
        weight = self._flat_weight()
        energy = maths.energy_matrix(weight, gram)
        others = torch.ones(len(energy), dtype=torch.float64, device=energy.device).index_fill(0, index, 0.0)
        units = response.activation.numel()
        own = maths.summed_by_unit(energy[index][:, index], unit, units)

        def removal(rank: Tensor) -> Tensor:
            return ranking.removal_energy_of_matrix(maths.summed_by_unit(own, rank, units))

        response.removals.append(removal)
        response.matrix = own if response.matrix is None else response.matrix + own
        if not bias:
            return
        offset = energy @ others
        for total, _ in inputs:
            offset += maths.contribution_sums(weight, _columns(self.module, total).sum(2), self._constant())
        response.offset.index_add_(0, unit, offset[index])

    def _removal_energy(self, inputs: Sequence[Summed], index: Tensor, rank: Tensor, units: int) -> Tensor:
        """``(units,)`` energies that the mean output loses; ``rank`` says when each entry of ``index`` goes."""
        energies = torch.zeros(units, dtype=torch.float64, device=index.device)
        for total, count in inputs:
            if not (is_plain_linear(self.module) or is_plain_conv(self.module)):
                contribution, size = self._other_contribution(total, index)
                energies += ranking.removal_energy(contribution, rank, units, size) / count
                continue
            taps, positions = _columns(self.module, total[:1]).shape[1:]
            size = len(self.gain) * positions
            # Products of all pairs of channels, or all contributions one by one: about 0.1 against 20 ns each.
            if taps == 1 and len(index) * (len(self.gain) + positions + 100) < 200 * size:
                read = _columns(self.module, total).view(getattr(self.module, "groups", 1), -1, positions)
                products = maths.energy_matrix(self._flat_weight(), read @ read.mT)[index][:, index]
                path = ranking.removal_energy_of_matrix(maths.summed_by_unit(products, rank, units))
            else:
                path = ranking.removal_energy(self._plain_contribution(total, index), rank, units, size)
            energies += path / count
        return energies

    def _plain_contribution(self, total: Tensor, index: Tensor) -> Callable[[Tensor], Tensor]:
        """What channels ``index[numbers]`` bring to the output, ``(b, O * positions)``."""
        groups = getattr(self.module, "groups", 1)
        inputs, outputs = len(total) // groups, len(self.gain) // groups
        raw = self.weight.flatten(2) if self.weight.dim() > 2 else self.weight[:, :, None]

        def contribution(numbers: Tensor) -> Tensor:
            channels = index[numbers]
            read = _columns(self.module, total[channels])  # (b, taps, positions)
            rows = (channels // inputs)[:, None] * outputs + torch.arange(outputs, device=channels.device)
            weight = raw[rows, (channels % inputs)[:, None]].to(self.gain) * self.gain[rows][:, :, None]
            parts = weight.bmm(read)
            if groups > 1:
                full = parts.new_zeros(len(channels), len(self.gain), parts.shape[2])
                parts = full.scatter_(1, rows[:, :, None].expand_as(parts), parts)
            return parts.flatten(1)

        return contribution

    def _other_contribution(self, total: Tensor, index: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
        operator, rest = self._operator(total)

        def contribution(channels: Tensor) -> Tensor:
            images = total.new_zeros(len(channels), *total.shape)
            images[torch.arange(len(channels), device=channels.device), index[channels]] = total[index[channels]]
            return operator(images).detach().flatten(1)

        return contribution, max(rest.numel(), total.numel())

    @property
    def weight(self) -> Tensor:
        """The layer's own weight."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def _weight(self) -> Tensor:
        weight = self.weight.to(self.gain)
        return weight * self.gain.view(-1, *[1] * (weight.dim() - 1))

    def _flat_weight(self) -> Tensor:
        weight = self._weight()
        return weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]

    def _constant(self) -> Tensor:
        bias = self.module.bias
        return self.shift + self.gain * bias.detach().to(self.gain) if isinstance(bias, Tensor) else self.shift

    def _operator(self, total: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The linear part as a function of images, and the constant part as a map ``(O, *size)``."""
        module = copy.deepcopy(self.module).to(total)
        spread = self.gain.view(-1, *[1] * (total.dim() - 1))
        # Hooks are of no use here, and may be the user's.
        zero = module.forward(torch.zeros_like(total)[None]).detach()

        def linear(images: Tensor) -> Tensor:
            output: Tensor = (module.forward(images) - zero) * spread
            return output

        return linear, zero[0] * spread + self.shift.view_as(spread)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the layer computes ``x @ weight.T + bias``, and not a subclass's own ``forward``."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_plain_conv(module: nn.Module) -> bool:
    """Whether the layer is a 2-D convolution with symmetric zero padding, computed as PyTorch does."""
    return (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _geometry(module: nn.Module) -> dict[str, Any]:
    return {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}


def _columns(module: nn.Module, x: Tensor) -> Tensor:
    """``(C, taps, Q)`` values that the taps of a plain layer read in ``x``, ``(C, *size)``."""
    if isinstance(module, nn.Linear):
        return x[:, None, None]
    assert isinstance(module, nn.Conv2d)
    assert not isinstance(module.padding, str)
    taps = F.unfold(x[None], module.kernel_size, module.dilation, module.padding, module.stride)[0]
    return taps.view(x.shape[0], -1, taps.shape[1])


def gram(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """Second moments of what a plain layer reads: ``(groups, C / groups * taps, C / groups * taps)``.

    Args:
        name: of the layer, for messages.
        module: a plain convolution or Linear.
        x: its input, ``(N, C, H, W)`` or ``(rows, C)``.

    Raises:
        ObservationError: the layer is of another kind, or the matrix would be too large to keep.
    """
    hint = 'use signed="abs", which needs no second moments.'
    if is_plain_linear(module):
        taps = x.T[None]
    elif is_plain_conv(module):
        assert isinstance(module, nn.Conv2d)
        assert not isinstance(module.padding, str)
        taps = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        taps = taps.view(x.shape[0], module.groups, -1, taps.shape[2]).permute(1, 2, 0, 3).flatten(2)
    else:
        raise ObservationError(
            f'signed="gated" reads Linear layers and zero-padded Conv2d only, and {name!r} is a '
            f"{type(module).__name__}: {hint}"
        )
    if taps.shape[0] * taps.shape[1] ** 2 > LARGEST_GRAM**2:
        raise ObservationError(
            f'signed="gated" would keep a {taps.shape[1]} x {taps.shape[1]} matrix for {name!r}: {hint}'
        )
    return taps @ taps.transpose(1, 2)
