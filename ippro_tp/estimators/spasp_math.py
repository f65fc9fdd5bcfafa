r"""The maths of i-SpaSP (PMLR v168, Algorithms 1 and 2) on summed activations: tensors in, tensors out.

The algorithm sums gradients over samples before it looks at them, and a layer without its non-linearity is
affine, so the samples can be summed first. With :math:`P_{c'}` the output that channel c' alone makes of the
summed input :math:`\bar H` and :math:`K_c` the layer's answer to a channel c of ones,

.. math:: y_c = \sum_{c' \notin S} M_{cc'} + y^0_c [t = 0], \qquad M_{cc'} = \langle K_c, P_{c'} \rangle .

Everything is exact, zero padding included, and runs in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1 << 23  # float64 numbers worked on at a time: 64 MiB
CACHED = 1 << 18  # where a block is passed over several times, so that it stays in the cache: 2 MiB


@dataclass
class Response:
    r"""How the importance of each unit depends on what is missing: the matrix :math:`M` and what goes with it.

    A unit is a channel, or channels that can only be removed together.

    Attributes:
        activation: ``(U,)`` float64, by what units are thresholded; the paper's :math:`h = \mu(H)`.
        offset: ``(U,)`` float64, :math:`y^0`: added to the importances of the first iteration.
        matrix: ``(U, U)`` float64, or ``None`` while the factors say it all.
        factors: pairs ``(r, U), (r, U)`` with :math:`M` the sum of ``left.T @ right``.
        removals: for each consumer a function of an order of removal, ``(U,)`` int64 with 0 for the unit that
            goes first: ``(U,)`` float64, the energy that its output has lost after each removal.
    """

    activation: Tensor
    offset: Tensor
    matrix: Tensor | None
    factors: list[tuple[Tensor, Tensor]]
    removals: list[Callable[[Tensor], Tensor]]

    @classmethod
    def zero(cls, units: int, device: torch.device) -> Response:
        """The response of no consumer at all."""
        nothing = torch.zeros(units, dtype=torch.float64, device=device)
        return cls(nothing, nothing.clone(), None, [], [])

    def add_matrix(self, matrix: Tensor, unit: Tensor) -> None:
        """Add ``(k, k)`` over channels whose units are ``unit``, ``(k,)``."""
        total = summed_by_unit(matrix, unit, self.activation.numel())
        self.matrix = total if self.matrix is None else self.matrix + total

    def add_factors(self, left: Tensor, right: Tensor) -> None:
        """Add ``left.T @ right``, both ``(r, U)``; multiplied out once that is the smaller form."""
        self.factors.append((left, right))
        units = self.activation.numel()
        if self.matrix is not None or 2 * sum(part.shape[0] for part, _ in self.factors) > units:
            for one, other in self.factors:
                product = one.T @ other
                self.matrix = product if self.matrix is None else self.matrix.add_(product)
            self.factors = []

    def importance(self, missing: Tensor) -> Tensor:
        """``(m, U)`` importances without the offset, for ``(m, U)`` float64 masks of missing units."""
        total = torch.zeros_like(missing) if self.matrix is None else missing @ self.matrix.T
        for left, right in self.factors:
            total = total + (missing @ right.T) @ left
        return total


def summed_by_unit(matrix: Tensor, unit: Tensor, units: int) -> Tensor:
    """``(units, units)``: rows and columns of ``(k, k)`` added up by unit."""
    rows = matrix.new_zeros(units, matrix.shape[1]).index_add_(0, unit, matrix)
    return matrix.new_zeros(units, units).index_add_(1, unit, rows)


# -- what consumers add to a response --------------------------------------------------------------------------


def add_linear(
    response: Response,
    weight: Tensor,
    gain: Tensor,
    total: Tensor,
    shift: Tensor | None,
    index: Tensor,
    unit: Tensor,
) -> None:
    """Add a Linear consumer.

    Args:
        response: added to; its activation is left alone.
        weight: ``(O, C)``, any dtype.
        gain: ``(O,)`` float64, factors of the outputs.
        total: ``(C,)`` float64, the input summed over samples and leading axes.
        shift: ``(O,)`` float64, what is added to the outputs, times the number of rows summed; ``None`` for no
            offset at all.
        index: ``(k,)`` the input columns that belong to the group.
        unit: ``(k,)`` the unit of each.
    """
    units = response.activation.numel()
    others = total.clone()
    others[index] = 0
    for start in range(0, weight.shape[0], max(1, BLOCK // weight.shape[1])):
        rows = slice(start, start + max(1, BLOCK // weight.shape[1]))
        full = weight[rows].to(gain) * gain[rows, None]
        part = full[:, index]
        left = part.new_zeros(part.shape[0], units).index_add_(1, unit, part)
        right = part.new_zeros(part.shape[0], units).index_add_(1, unit, part * total[index])
        response.add_factors(left, right)
        if shift is not None:
            response.offset += left.T @ (full @ others + shift[rows])


def conv_matrix(
    weight: Tensor,
    total: Tensor,
    shift: Tensor | None,
    index: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""M and the offset of a zero-padded 2-D convolution, exact at the borders.

    .. math:: M_{cc'} = \sum_{o,\tau} W_{oc\tau} \sum_{\tau'} W_{oc'\tau'} T_{c'\tau'\tau}, \quad
        T_{c\tau'\tau} = \sum_{q \in valid(\tau)} \bar H_c[t q + \tau'],

    with valid(:math:`\tau`) the outputs whose tap :math:`\tau` reads a real pixel.

    Args:
        weight: ``(O, C / groups, kh, kw)`` float64, scaled by a following BatchNorm.
        total: ``(C, H, W)`` float64, the input summed over samples.
        shift: ``(O,)`` float64, bias times the number of samples; ``None`` for no offset at all.
        index: ``(k,)`` the input channels that belong to the group.
        stride: of the convolution.
        padding: of the convolution.
        dilation: of the convolution.
        groups: of the convolution.

    Returns:
        ``(k, k)`` and ``(k,)``, float64, in the order of ``index``.
    """
    if groups > 1:
        return _grouped(weight, total, shift, index, stride, padding, dilation, groups)
    taps = weight.shape[2] * weight.shape[3]
    how = {"kernel_size": weight.shape[2:], "stride": stride, "padding": padding, "dilation": dilation}
    valid = F.unfold(torch.ones_like(total[:1])[None], **how)[0]  # (taps, Q)
    flat = weight[:, index].flatten(2)  # (O, k, taps)
    seen = torch.cat(
        [
            F.unfold(part[None], **how)[0].view(len(part), taps, -1) @ valid.T
            for part in total[index].split(max(1, BLOCK // (taps * max(1, valid.shape[1]))))
        ]
    )  # (k, taps', taps)
    matrix = weight.new_zeros(len(index), len(index))
    for tap in range(taps):
        answer = torch.einsum("oct,ct->oc", flat, seen[:, :, tap])
        matrix.addmm_(flat[:, :, tap].T, answer)
    if shift is None:
        return matrix, matrix.new_zeros(len(index))
    others = total.clone()
    others[index] = 0
    constant = F.conv2d(others[None], weight, None, stride, padding, dilation)[0].flatten(1) + shift[:, None]
    return matrix, torch.einsum("oct,ot->c", flat, constant @ valid.T)


def _grouped(
    weight: Tensor,
    total: Tensor,
    shift: Tensor | None,
    index: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """A grouped convolution is ``groups`` convolutions side by side: M has one block for each."""
    outputs, inputs = weight.shape[0] // groups, total.shape[0] // groups
    matrix, offset = weight.new_zeros(len(index), len(index)), weight.new_zeros(len(index))
    for group in range(groups):
        rows, columns = slice(group * outputs, (group + 1) * outputs), slice(group * inputs, (group + 1) * inputs)
        own = (index // inputs == group).nonzero().view(-1)
        if not own.numel():
            continue
        block, constant = conv_matrix(
            weight[rows],
            total[columns],
            None if shift is None else shift[rows],
            index[own] - columns.start,
            stride,
            padding,
            dilation,
        )
        matrix[own[:, None], own[None, :]] = block
        offset[own] = constant
    return matrix, offset


def operator_matrix(
    operator: Callable[[Tensor], Tensor], total: Tensor, constant: Tensor | None, index: Tensor
) -> tuple[Tensor, Tensor]:
    """M and the offset of any linear map of images, by forward and vector-Jacobian product.

    Args:
        operator: ``(B, C, *size) -> (B, O, *size')``, linear and differentiable, float64.
        total: ``(C, *size)`` float64, the input summed over samples.
        constant: ``(O, *size')`` float64, what the map left out for being affine, times the number of samples;
            ``None`` for no offset at all.
        index: ``(k,)`` the input channels that belong to the group.

    Returns:
        ``(k, k)`` and ``(k,)``, float64, in the order of ``index``.
    """

    def importance(images: Tensor, added: Tensor | float = 0.0) -> Tensor:
        with torch.enable_grad():
            images = images.detach().requires_grad_(True)
            output = operator(images)
            residual = output.detach() + added
            (gradient,) = torch.autograd.grad(output, images, residual)
        return gradient.flatten(1).view(*images.shape[:2], -1).sum(2)[:, index]

    columns = []
    for part in index.split(max(1, BLOCK // (4 * total.numel()))):
        images = total.new_zeros(len(part), *total.shape)
        rows = torch.arange(len(part), device=part.device)
        images[rows, part] = total[part]
        columns.append(importance(images))
    matrix = torch.cat(columns).T.contiguous()
    if constant is None:
        return matrix, matrix.new_zeros(len(index))
    others = total.clone()
    others[index] = 0
    return matrix, importance(others[None], constant)[0]


# -- second moments --------------------------------------------------------------------------------------------


def energy_matrix(weight: Tensor, gram: Tensor) -> Tensor:
    r"""Inner products of what channels contribute to the output: the sum over samples of <P_c, P_c'>.

    Args:
        weight: ``(O, C / groups, taps)`` float64.
        gram: ``(groups, C / groups * taps, C / groups * taps)`` second moments of what the taps read.

    Returns:
        ``(C, C)`` float64; zero between groups of a convolution.
    """
    groups, taps = gram.shape[0], weight.shape[2]
    blocks = []
    for rows, moments in zip(weight.flatten(1).chunk(groups), gram, strict=True):
        products = (rows.T @ rows).mul_(moments)
        blocks.append(products.view(weight.shape[1], taps, weight.shape[1], taps).sum((1, 3)))
    energies: Tensor = torch.block_diag(*blocks)
    return energies


def contribution_sums(weight: Tensor, read: Tensor, constant: Tensor) -> Tensor:
    """Inner product of each channel's contribution with a constant output.

    Args:
        weight: ``(O, C / groups, taps)`` float64.
        read: ``(C, taps)`` sums over samples and positions of what each tap reads.
        constant: ``(O,)``.

    Returns:
        ``(C,)``.
    """
    groups = read.shape[0] // weight.shape[1]
    per_group = torch.einsum("goct,go->gct", weight.unflatten(0, (groups, -1)), constant.view(groups, -1))
    return (per_group.flatten(0, 1) * read).sum(1)


# -- the iteration ---------------------------------------------------------------------------------------------
