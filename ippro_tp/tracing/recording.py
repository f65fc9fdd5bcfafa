"""What a measuring run of a model notes of each tensor that would be tapped, and what it does to them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .rows import Rows

Key = tuple[str, str, int]
"""Kind of tap, name of the layer or activation, how many like it came before in the forward pass."""


class Recording:
    """What one run saw: of each tapped tensor a number for each row, and the tensors if asked for.

    Args:
        keep: keys of tensors that are kept, in order to ask for their gradients.
        shaken: tensors that get noise in the rows of one sample, and how the samples lie in them.
        sample: that one.
        loud: how much noise, in root mean squares of the tensor's entries.
        fixed: tensors whose memory is not to be written to: parameters, buffers, inputs.
    """

    def __init__(
        self,
        keep: frozenset[Key] = frozenset(),
        shaken: Mapping[Key, Rows] | None = None,
        sample: int = 0,
        loud: float = 1.0,
        fixed: Collection[Tensor] = (),
    ) -> None:
        self.marks: dict[Key, Tensor] = {}
        self.kept: dict[Key, tuple[Tensor, int]] = {}
        self.outputs: list[Tensor] = []
        self._keep, self._shaken, self._sample, self._loud = keep, shaken or {}, sample, loud
        self._fixed = {x.untyped_storage().data_ptr() for x in fixed} if self._shaken else set()
        self._generator = torch.Generator().manual_seed(0)
        self._weights: dict[tuple[int, torch.device], Tensor] = {}

    def is_table(self, key: Key) -> bool:
        """Whether a tensor may be shared by all samples."""
        return key in self._keep

    def add(self, key: Key, x: Tensor, axis: int) -> None:
        """Note a tensor with channels along ``axis``, and shake it if it is to be."""
        if key in self._keep or (self._keep and key[0] == "tables"):
            self.kept[key] = x, axis
        size = (x.shape[axis], x.device)
        if size not in self._weights:  # no two channels weigh the same: what adds up to one does not cancel
            generator = torch.Generator().manual_seed(0)
            self._weights[size] = (0.5 + torch.rand(size[0], generator=generator)).to(x.device)
        with torch.no_grad():
            self.marks[key] = _weighted(x.detach().float(), self._weights[size], axis).flatten()
            if (rows := self._shaken.get(key)) is not None:
                self._shake(x.detach(), axis, rows)

    def _shake(self, x: Tensor, axis: int, rows: Rows) -> None:
        """Add noise to the rows of the sample, in place."""
        spread_out = any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))
        if spread_out or x.untyped_storage().data_ptr() in self._fixed or x.numel() == 0:
            return
        own = rows.of_sample(self._sample).to(x.device)
        shape = [size for number, size in enumerate(x.shape) if number != axis % x.dim()]
        if own.numel() != x.numel() // x.shape[axis]:
            return
        size = x.float().square().mean().sqrt()
        size = torch.where((size > 0) & size.isfinite(), size, torch.ones_like(size))
        noise = torch.randn(x.shape, generator=self._generator).to(x.device)
        x.add_((self._loud * size * noise * own.view(shape).unsqueeze(axis)).to(x.dtype))


def _weighted(x: Tensor, weights: Tensor, axis: int) -> Tensor:
    """The sum of ``x`` times ``weights`` along an axis."""
    if axis == x.dim() - 1:
        return x @ weights
    if axis == 1 and x.is_contiguous():
        return weights @ x.flatten(2)
    shape = [1] * x.dim()
    shape[axis] = -1
    return (x * weights.view(shape)).sum(axis)
