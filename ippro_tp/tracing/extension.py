r"""The extension layer psi of IPPRO (Eq. 5) and the taps that read its gradient.

:math:`\psi(x) = D x - \bar D x + \sigma(x)` with :math:`D = \bar D = \mathrm{diag}\lVert F_i\rVert` and
:math:`\bar D` constant: the output is :math:`\sigma(x)`, and the gradient with respect to D is
:math:`d_i = \sum g\,x` over batch and positions, g the gradient at the output. Nothing but d is ever read, so
:class:`Tap` computes d inside the backward pass and leaves the forward values alone to the bit;
:class:`LiteralExtension` is the layer as the paper writes it, the reference the tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ObservationError


class LiteralExtension(nn.Module):
    r"""Eq. 5 with real parameters: :math:`\psi(x) = D x - \bar D x + \sigma(x)`.

    Args:
        sigma: the activation that is replaced.
        norms: ``(channels,)`` filter norms, the value of D and of its frozen copy.
        axis: the channel axis of x.

    Example:
        >>> psi = LiteralExtension(torch.relu, torch.ones(2))
        >>> x = torch.tensor([[-1.0, 2.0]])
        >>> psi(x)
        tensor([[0., 2.]], grad_fn=<AddBackward0>)
        >>> psi(x).sum().backward(); psi.D.grad
        tensor([-1.,  2.])
    """

    def __init__(self, sigma: Callable[[Tensor], Tensor], norms: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.sigma = sigma
        self.axis = axis
        self.D = nn.Parameter(norms.detach().clone())
        self.D_bar: Tensor
        self.register_buffer("D_bar", norms.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the extended activation to ``x``, whose ``axis`` has one entry a channel."""
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return self.D.view(shape) * x - self.D_bar.view(shape) * x + self.sigma(x)


def sample_sums(
    grad: Tensor, values: Sequence[Tensor | None], axis: int, batch: int, outer: int | None = 1
) -> list[Tensor]:
    """Sum ``grad * value`` over all positions, for each sample and channel, for each of some values.

    Args:
        grad: gradient, any floating dtype.
        values: tensors of the same shape; ``None`` for ones.
        axis: the channel axis.
        batch: number of samples.
        outer: how they lie in the rows, the entries but for the channel axis in row-major order: row r belongs to
            sample ``r // inner % batch``, with ``outer * batch * inner`` rows. 1 is batch-major. ``None`` for a
            tensor that all samples share, a table of positions, of whose sum every sample gets an equal part.

    Returns:
        For each value ``(batch, channels)``, float32 or wider.

    Raises:
        ObservationError: the number of rows is not a multiple of ``outer * batch``.

    Example:
        >>> sample_sums(torch.ones(2, 3, 4), [torch.full((2, 3, 4), 0.5)], axis=1, batch=2)
        [tensor([[2., 2., 2.],
                [2., 2., 2.]])]
    """
    if grad.dtype in (torch.float16, torch.bfloat16):
        grad, values = grad.float(), [None if value is None else value.float() for value in values]
    axis %= grad.dim()
    rest = [i for i in range(grad.dim()) if i != axis]
    if outer is None:
        batch, outer, parts = 1, 1, batch
    else:
        parts = 1
    rows = grad.numel() // max(grad.shape[axis], 1)
    if rows % (outer * batch):
        raise ObservationError(
            f"a layer sees {rows} rows for a batch of {batch} samples, so its gradients cannot be told apart by "
            "sample."
        )
    at, blocks = _sample_dim([grad.shape[i] for i in rest], outer, batch)
    if at is None:  # samples lie across several dimensions
        products = [grad if value is None else grad * value for value in values]
        shape = (outer, batch, -1, grad.shape[axis]) if rows else (1, batch, 0, grad.shape[axis])
        return [product.movedim(axis, -1).reshape(shape).sum((0, 2)) for product in products]
    dim = rest[at]
    if (axis, dim) == (1, 0) and _in_planes(grad, values):
        sums = _plane_sums(grad, values)
    else:
        others = [i for i in rest if i != dim]
        products = [grad if value is None else grad * value for value in values]
        sums = [product.sum(others) if others else product for product in products]
        sums = sums if dim < axis else [each.T for each in sums]
    if sums[0].shape[0] != batch:
        sums = [each.reshape(blocks, batch, -1, each.shape[1]).sum((0, 2)) for each in sums]
    return sums if parts == 1 else [(each / parts).expand(parts, -1) for each in sums]


def _sample_dim(sizes: Sequence[int], outer: int, batch: int) -> tuple[int | None, int]:
    """The dimension of the rows within which samples begin and end, and its blocks of all samples."""
    before = 1
    for at, size in enumerate(sizes):
        if before and outer % before == 0 and size and size % (outer // before * batch) == 0:
            return at, outer // before
        before *= size
    return None, 1


def _in_planes(grad: Tensor, values: Sequence[Tensor | None]) -> bool:
    """Whether :func:`_plane_sums` applies, is faster (not for small planes) and as exact (not for large ones)."""
    if grad.device.type != "cpu" or grad.dtype not in (torch.float32, torch.float64):
        return False
    if not 16 <= math.prod(grad.shape[2:]) <= 65_536 or grad.numel() == 0:
        return False
    given = [value for value in values if value is not None]
    return bool(given) and all(x.is_contiguous() and x.dtype == grad.dtype for x in (grad, *given))


def _plane_sums(grad: Tensor, values: Sequence[Tensor | None]) -> list[Tensor]:
    """``(rows, channels)`` sums over planes, contiguous ``(rows, channels, ...)``, without forming products.

    The gradients of a BatchNorm's weight and bias are the sums of g x and of g for each channel, if mean and
    variance are 0 and 1: one fused kernel that reads both once, here with a channel for each plane.
    """
    rows, channels = grad.shape[:2]
    mean, variance = grad.new_zeros(rows * channels), grad.new_ones(rows * channels)
    sums: dict[int, Tensor] = {}
    for number, value in enumerate(values):
        if value is not None:
            _, sums[number], ones = torch.ops.aten.native_batch_norm_backward(
                grad.view(1, rows * channels, -1), value.view(1, rows * channels, -1), None, mean, variance, None,
                None, False, 0.0, [False, True, True],
            )  # fmt: skip
    return [sums.get(number, ones).view(rows, channels) for number in range(len(values))]


def storage_of(x: Tensor) -> int:
    """Address of the memory that ``x`` lives in, to notice that it is about to be overwritten."""
    return x.untyped_storage().data_ptr()


class Term:
    """A summand of what a tap reads: a tensor, or what one scale and one shift a channel make of it.

    A BatchNorm's output is read as a term of its input, which autograd keeps in any case; a sum of two such
    outputs as two terms. The output, and the sum, may then be freed or overwritten.

    Args:
        value: the tensor. No copy is made.
        affine: ``(scale, shift)``, each ``(channels,)``: the summand is ``scale * value + shift``.
    """

    def __init__(self, value: Tensor, affine: tuple[Tensor, Tensor] | None = None) -> None:
        self.value, self.affine = value.detach(), affine
        self._version = value._version

    @property
    def storage(self) -> int:
        """:func:`storage_of` the value."""
        return storage_of(self.value)

    @property
    def overwritten(self) -> bool:
        """Whether an in-place operation has changed ``value``."""
        return self.value._version != self._version

    def accept_overwriting(self) -> None:
        """Take what an in-place operation left for the value."""
        self._version = self.value._version

    def apart_from(self, storage: int) -> Term:
        """This term; with a private copy of the value if that lives in ``storage``, which will be overwritten."""
        return Term(self.value.clone(), self.affine) if self.storage == storage else self

    def sums(self, sums: Tensor, ones: Tensor | None) -> Tensor:
        """The sums of g x for this summand, of those of g times its value and those of g."""
        return sums if self.affine is None or ones is None else sums * self.affine[0] + ones * self.affine[1]


class Tap:
    r"""The extension at one call: sends ``(batch, channels)`` sums of :math:`g\,x` to ``sink`` on backward.

    Args:
        terms: what x, the input of sigma, is the sum of; for sigma = identity the output itself.
        output: sigma(x), whose gradient is read.
        axis: channel axis of both.
        batch: number of samples.
        sink: called once for every backward pass through ``output``.
        name: what to call this place in errors.
        gradients: send ``(2, batch, channels)``, the sums of g x and those of g.
        outer: how samples lie in the rows, see :func:`sample_sums`.
    """

    def __init__(
        self,
        terms: tuple[Term, ...],
        output: Tensor,
        axis: int,
        batch: int,
        sink: Callable[[Tensor], None],
        name: str,
        gradients: bool = False,
        outer: int | None = 1,
    ) -> None:
        self.axis, self.batch, self.name, self._gradients = axis, batch, name, gradients
        self._outer = outer
        self._sink = sink
        self.terms = terms
        """What is kept of x; empty once closed."""
        self._handle: RemovableHandle = output.register_hook(self._on_grad)

    def accept_overwriting(self) -> None:
        """Go on with what an in-place operation left of x: it is x wherever the gradient is not zero."""
        for term in self.terms:
            term.accept_overwriting()

    def copy_values(self, storage: int) -> None:
        """Keep private copies of what lives in ``storage``: an in-place operation is about to overwrite it."""
        self.terms = tuple(term.apart_from(storage) for term in self.terms)

    def close(self) -> None:
        """Forget x and read no further gradient. May be called twice."""
        self.terms = ()
        self._handle.remove()

    def _on_grad(self, grad: Tensor) -> None:
        if not self.terms:
            return
        if any(term.overwritten for term in self.terms):
            raise ObservationError(
                f"the output of {self.name} was overwritten by an in-place operation that cannot be seen from "
                "Python (a scripted or custom op). Run the calibration with its plain PyTorch version."
            )
        with torch.no_grad():
            values: list[Tensor | None] = [term.value for term in self.terms]
            if self._gradients or any(term.affine is not None for term in self.terms):
                values.append(None)
            found = sample_sums(grad, values, self.axis, self.batch, self._outer)
            ones = found[len(self.terms)] if len(found) > len(self.terms) else None
            parts = [term.sums(products, ones) for term, products in zip(self.terms, found, strict=False)]
            sums = sum(parts[1:], parts[0])
            self._sink(torch.stack([sums, ones]) if self._gradients and ones is not None else sums)


class _Root(torch.autograd.Function):
    """Make a tensor part of the graph although no parameter before it requires grad."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return None, None


def require_grad(x: Tensor) -> Tensor:
    """Return ``x`` as a non-leaf tensor that requires grad, so that in-place operations may follow.

    Example:
        >>> require_grad(torch.ones(2)).relu_().requires_grad
        True
    """
    if x.requires_grad:
        return x
    out: Tensor = _Root.apply(x, torch.empty((), requires_grad=True))
    return out
