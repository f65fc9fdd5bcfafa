"""Second moments of what layers read, per channel, in halves that can be held out against each other."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .groups import GroupRecord, Layer
from .inputs import InputObservation
from .leastsquares import Moments
from .observer import batch_size
from .statistics import Sums
from .taps import patches, tap_reach, tap_sources

WORK, LEAST = 4096, 32
"""Second moments of channels are taken over WORK / channels positions per sample, and LEAST at least: neighbouring
positions tell almost the same, and a thousand samples still give hundreds of rows per channel. Models in float64
give all positions, so that results can be checked to the last digit."""
PATCH_WORK, PATCH_LEAST = 1 << 19, 4
"""The same for second moments of patches: PATCH_WORK / features^2 outputs per sample, and PATCH_LEAST at least."""
EXACT = 1 << 19
"""Multiplications per sample up to which all positions are used and second moments computed in float64."""


class _Parts(NamedTuple):
    """What one call of a layer adds; halves are even and odd samples.

    Attributes:
        rows: of either half.
        first: of either half, ``(groups, features)``, about ``center``.
        second: of either half, ``(groups, features, features)``, about ``center``.
        taps: ``(1 + channels * taps,)``: number of inputs, and the sum over them of the mean that each tap reads.
        center: ``(groups, features)`` float64, or ``None`` for zero.
        coverage: share of what taps read that is no zero of padding and no gap of a transposed convolution.
    """

    rows: tuple[float, float]
    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    taps: Tensor
    center: Tensor | None
    coverage: float = 1.0


class MomentObservation(InputObservation):
    """Adds up first and second moments of every consumer's input channels, apart for even and odd samples.

    Sums, all float64, for a consumer ``name`` with g groups of f features. A feature is what a tap reads of a
    channel (g * f = channels * taps) where there are at most ``max_features`` in a group, else a channel.

    - ``rows/name`` ``(2,)``, ``first/name`` ``(2, g, f)``, ``second/name`` ``(2, g, f, f)``: over positions and
      samples; the first axis is the parity of the sample's number since the start of the observation.
    - ``reads/name`` ``(2,)``: rows, and those of zeros that padding adds. For patches it is in the rows already.
    - ``taps/name`` ``(1 + channels * taps,)``: number of inputs, and the sum over them of the mean that each tap
      reads, over all positions.

    Args:
        model: the model that is calibrated.
        groups: as for :class:`InputObservation`.
        max_features: see above.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Callable[[tuple[Any, ...], dict[str, Any]], Iterable[GroupRecord]],
        max_features: int,
    ) -> None:
        self._max_features = max_features
        self.spans: dict[str, int] = {}

        def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[GroupRecord]:
            records = list(groups(args, kwargs))
            self.spans = _spans(model, [layer for record in records for layer in record.consumers])
            return records

        super().__init__(model, read, self._add)
        self._before = self._batch = 0
        self._last: list[tuple[weakref.ref[Tensor], Any, _Parts]] = []
        self._centers: dict[str, Tensor | None] = {}
        self._geometry: dict[Any, tuple[list[Tensor], list[Tensor], float]] = {}

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._start(module, args, kwargs)
        if self._live:
            self._before += self._batch
            self._batch = batch_size((args, kwargs)) or 0
            self._last = []

    def finish(self) -> None:
        """Make the sums: put the centers back.

        Raises:
            ObservationError: the model was not called.
        """
        super().finish()
        for name, center in self._centers.items():
            if center is not None:
                rows, first, second = (self.sums[f"{kind}/{name}"] for kind in ("rows", "first", "second"))
                count = rows.view(2, 1, 1)
                cross = first.unsqueeze(-1) * center.unsqueeze(-2)
                second += cross + cross.transpose(-1, -2)
                second += count.unsqueeze(-1) * (center.unsqueeze(-1) * center.unsqueeze(-2))
                first += count * center

    def _add(self, sums: Sums, name: str, module: nn.Module, x: Tensor) -> None:
        span = self.spans[name]
        if not x.is_floating_point() or span == 0 or x.numel() == 0:
            return
        with torch.autocast(x.device.type, enabled=False):
            parts = self._parts(name, module, x, span)
        if f"rows/{name}" not in sums:
            self._centers[name] = parts.center
            shape = parts.second[0].shape
            for kind, size in (("rows", ()), ("reads", ()), ("first", shape[:2]), ("second", shape)):
                sums.add(f"{kind}/{name}", parts.taps.new_zeros(2, *size))
        sums.add(f"taps/{name}", parts.taps)
        for half in (0, 1):
            sums[f"rows/{name}"][half] += parts.rows[half]
            sums[f"reads/{name}"][half] += parts.rows[half] / parts.coverage
            sums[f"first/{name}"][half] += parts.first[half]
            sums[f"second/{name}"][half] += parts.second[half]

    def _parts(self, name: str, module: nn.Module, x: Tensor, span: int) -> _Parts:
        shape = _shape_of(module)
        key = None if x.is_inference() else (x._version, span, shape)
        self._last = [entry for entry in self._last if entry[0]() is not None]
        for known, known_key, parts in self._last:  # several branches often read one tensor
            same = key is not None and known() is x and known_key == key
            if same and self._centers.get(name, parts.center) is parts.center:
                return parts
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        given = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if isinstance(module, _ConvNd) and _reads_unevenly(module):
            parts = self._convolution(name, module, given, shape, wide)
        else:
            parts = self._pointwise(name, module, given, span, wide)
        self._last.append((weakref.ref(x), key, parts))
        return parts

    def _convolution(self, name: str, module: _ConvNd, x: Tensor, shape: Any, wide: torch.dtype) -> _Parts:
        """A layer whose taps read different positions."""
        spatial = len(module.kernel_size)
        x = x.unsqueeze(0) if x.dim() == spatial + 1 else x
        lengths = tuple(x.shape[2:])
        if (shape, lengths, x.device) not in self._geometry:
            reach = [tap_reach(module, d, n).to(x.device, wide) for d, n in enumerate(lengths)]
            sources = [] if module.transposed else [tap_sources(module, d, n) for d, n in enumerate(lengths)]
            covered = math.prod(float(matrix.sum(1).mean()) for matrix in reach)
            self._geometry[shape, lengths, x.device] = reach, [s.to(x.device) for s in sources], covered
        reach, sources, covered = self._geometry[shape, lengths, x.device]
        width, taps = x.shape[1] // module.groups, math.prod(module.kernel_size)
        by_patch = not module.transposed and taps > 1 and width * taps <= self._max_features
        features = width * taps if by_patch else width
        outputs = math.prod(s.shape[0] for s in sources) if by_patch else math.prod(lengths)
        exact = x.dtype == torch.float64 or outputs * module.groups * features**2 <= EXACT
        x = x.to(wide) if exact else x
        image = x.sum(0)
        means = image.to(wide)
        for matrix in reach:
            means = torch.tensordot(means, matrix, dims=([1], [1]))
        n, coverage = len(x), 1.0
        if by_patch:
            some = outputs if exact else max(PATCH_LEAST, PATCH_WORK // (module.groups * features**2))
            first = self._before * max(1, n // max(1, self._batch))
            values, center = patches(x, sources, first, some, covered < 1), means.flatten() / n
        else:
            values, center = _thinned(x.flatten(2), width, x.shape[-1], exact), image.flatten(1).mean(1) / n
            coverage = covered
        return self._half_moments(name, values, module.groups, center, means, n)._replace(coverage=coverage)

    def _pointwise(self, name: str, module: nn.Module, x: Tensor, span: int, wide: torch.dtype) -> _Parts:
        """A layer that reads every position, or every so-manieth, once; or flattened maps."""
        period = x.shape[-1] if isinstance(module, _ConvNd) else 1
        values = _by_channel(module, x, span)
        n, channels = values.shape[:2]
        groups = module.groups if isinstance(module, _ConvNd) else 1
        by_patch = span > 1 and channels * span <= self._max_features
        if by_patch:
            values = values.reshape(n, channels * span, 1)
        width = values.shape[1] // groups
        exact = x.dtype == torch.float64 or values.shape[2] * groups * width**2 <= EXACT
        values = values.to(wide) if exact else values
        image = values.sum(0)
        means = image if span > 1 else image.mean(-1)
        center = image.mean(-1) / n
        values = _thinned(values, width, period, exact or span > 1)
        return self._half_moments(name, values, groups, center, means.to(wide), n)

    def _half_moments(self, name: str, x: Tensor, groups: int, mean: Tensor, taps: Tensor, samples: int) -> _Parts:
        """Moments of ``(n, features, positions)`` by the parity of the sample.

        Args:
            name: the consumer.
            x: float32 or float64.
            groups: features are split into so many blocks, and only moments within a block are taken.
            mean: ``(features,)`` about their mean. In float32, digits are kept for the differences from that of
                the first batch, which :meth:`finish` puts back in float64.
            taps: sum over the inputs of the mean that each tap reads.
            samples: number of inputs.
        """
        n, features, positions = x.shape
        wide = taps.dtype
        per_sample = n // self._batch if self._batch and n % self._batch == 0 else 1  # windows, crops, beams
        center = self._centers.get(name)
        if center is None and name not in self._centers and x.dtype == torch.float32 != wide:
            center = mean.float().to(wide).view(groups, -1)
        counts, firsts, seconds = [], [], []
        for half in (0, 1):
            start = (half - self._before) % 2
            part = x.unflatten(0, (-1, per_sample))[start::2].flatten(0, 1) if per_sample > 1 else x[start::2]
            if center is not None:
                part = part - center.to(x.dtype).view(-1, 1)
            counts.append(float(part.shape[0] * positions))
            firsts.append(part.sum(0).sum(-1).view(groups, features // groups))
            seconds.append(_products(part, groups))
        counted = torch.cat([taps.new_full((1,), float(samples)), taps.flatten()])
        return _Parts((counts[0], counts[1]), (firsts[0], firsts[1]), (seconds[0], seconds[1]), counted, center)


def moments_of(sums: Sums, name: str, device: torch.device) -> tuple[Moments, Moments]:
    """The two halves of the consumer ``name``, float64 on ``device``."""
    rows, first, second = (sums[f"{kind}/{name}"].to(device) for kind in ("reads", "first", "second"))
    even, odd = (Moments(rows[h : h + 1].double(), first[h].double(), second[h].double()) for h in (0, 1))
    return even, odd


def tap_means(sums: Sums, name: str, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """``(groups, channels, taps)``: mean over samples and outputs of what each tap of the layer reads."""
    packed = sums[f"taps/{name}"].to(device).double()
    return (packed[1:] / packed[0]).view(-1, shape[1], packed[1:].numel() // (shape[0] * shape[1])).expand(shape)


def _shape_of(module: nn.Module) -> tuple[Any, ...]:
    """What decides how a layer reads its input."""
    if not isinstance(module, _ConvNd):
        return (type(module),)
    geometry = (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
    return (type(module), module.groups, *geometry)


def _reads_unevenly(module: nn.Module) -> bool:
    """Whether different taps of a layer read different positions."""
    return isinstance(module, _ConvNd) and (
        max(module.kernel_size) > 1 or any(module._reversed_padding_repeated_twice) or module.transposed
    )


def _subsampling(module: nn.Module) -> tuple[int, ...]:
    """Strides of a layer that reads only every so-manieth position; empty for all others."""
    if isinstance(module, _ConvNd) and not _reads_unevenly(module) and max(module.stride) > 1:
        return module.stride
    return ()


def _by_channel(module: nn.Module, x: Tensor, span: int) -> Tensor:
    """The input as ``(samples, channels, positions)``, a view where the memory layout allows it."""
    if isinstance(module, _ConvNd):
        spatial = len(module.kernel_size)
        if x.dim() == spatial + 1:
            x = x.unsqueeze(0)
        for dim, stride in enumerate(_subsampling(module)):
            index = [slice(None)] * x.dim()
            index[2 + dim] = slice(None, None, stride)
            x = x[tuple(index)]
        if x.stride(1) == 1 and x.shape[1] > 1:  # channels last
            return x.movedim(1, -1).flatten(1, -2).transpose(1, 2)
        return x.flatten(2)
    if span > 1:
        return x.reshape(-1, x.shape[-1] // span, span)
    if x.dim() == 1:
        x = x.unsqueeze(0)
    return x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)


def _thinned(x: Tensor, width: int, period: int, all_of_them: bool) -> Tensor:
    """``(n, channels, positions)`` at fewer positions, for ``width`` channels per group; see :data:`WORK`."""
    if all_of_them:
        return x
    return x[:, :, :: _step(x.shape[2], max(LEAST, WORK // width), period)]


def _step(positions: int, some: int, period: int) -> int:
    """Take every so-manieth position for about ``some`` of them, not the same ones in each row of ``period``."""
    step = positions // some
    while step > 1 and math.gcd(step, period) > 1:
        step += 1
    return max(1, step)


def _products(x: Tensor, groups: int) -> Tensor:
    """``(g, c, c)``: sum of x x^T over the first and last axis of ``(n, g * c, positions)``."""
    n, channels, positions = x.shape
    blocks = x.unflatten(1, (groups, channels // groups))
    if x.stride(1) != 1 and positions >= channels // groups:
        return torch.matmul(blocks, blocks.transpose(-1, -2)).sum(0)
    columns = blocks.permute(1, 0, 3, 2).reshape(groups, n * positions, channels // groups)
    return torch.bmm(columns.transpose(1, 2), columns)


def _spans(model: nn.Module, layers: Iterable[Layer]) -> dict[str, int]:
    """Columns per channel of each consumer: more than 1 after flattening; 0 where they lie scattered."""
    spans: dict[str, int] = {}
    for layer in layers:
        roots, counts = layer.root.unique(return_counts=True)
        span = int(counts[0]) if roots.numel() and bool((counts == counts[0]).all()) else 0
        if span > 1:
            start = layer.index.sort().values.view(-1, span)
            whole = bool((start == start[:, :1] + torch.arange(span)).all()) and not bool(
                (start[:, 0] % span).any()
            )
            same = bool((layer.root[layer.index.argsort()].view(-1, span).diff(dim=1) == 0).all())
            if not (whole and same and layer.channels % span == 0) or not isinstance(
                model.get_submodule(layer.name), nn.Linear
            ):
                span = 0
        spans[layer.name] = span if spans.get(layer.name, span) == span else 0
    return spans
