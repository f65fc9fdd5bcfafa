r"""The expectation, over samples, of the magnitude of each sample's own projective offset.

Freeze the reference coordinate D and take the step that is natural on projective space,
:math:`\lambda\lVert F\rVert^2`: as :math:`\lambda \to 0`, sample n moves the logarithm of :math:`\tan\theta` by
:math:`-\lambda\,t_n` with :math:`t_n = F\cdot\nabla_n`. The extension with sigma = identity at the producer's
output gives :math:`t_n` directly; no weight gradient is formed. The accumulated gradient of Eq. 4 is a *signed*
sum that vanishes at a trained optimum, so important channels are as likely to rank low as high; :math:`E_n|t_n|`
does not cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..records import GroupRecord, Layer, Pass, Wiring
from .base import Estimator, LossScale, reduce_layers
from .coupling import Coupling, offset_products
from .redundancy import Redundancy, moments
from .sums import Sums

READERS = 3
"""The largest number of layers of a group at which it is noted how channels predict each other."""


class ExpectedEstimator(Estimator):
    """Mean over samples of the magnitude of each sample's offset.

    Args:
        power: 1 for the mean of abs(t), 2 for the mean of t squared.
        joint: one point per group: sum t over the producers of a channel, then take the magnitude.
        loss_scale: ``(batch size) -> factor`` that turns gradients of the loss into per-sample gradients.
        coupled: also gather the second moments for :meth:`coupling`; with ``joint`` only.
        compensated: also gather those for :meth:`redundancy`.
    """

    def __init__(
        self, power: int, joint: bool, loss_scale: LossScale, coupled: bool = False, compensated: bool = False
    ) -> None:
        self._power, self._joint, self._loss_scale, self._coupled = power, joint, loss_scale, coupled
        self._compensated = compensated
        self._plans: dict[tuple[Layer, torch.device], tuple[Tensor, Tensor] | None] = {}
        self._places: dict[tuple[Layer, torch.device], tuple[Tensor, Tensor]] = {}

    def update(self, sums: Sums, records: Sequence[GroupRecord], done: Pass) -> None:
        """Add the sizes of one batch's offsets, ``(width,)`` a group (or a layer)."""
        device = next(iter((*done.outputs.values(), *done.inputs.values()))).device
        sums.add("samples", torch.full((), float(done.batch), dtype=torch.float64, device=device))
        scale = self._loss_scale(done.batch)
        for record in records:
            if not self._joint:
                for layer, part in self._parts(record, done):
                    sums.add(f"{record.key}/{layer.name}", self._size(part * scale))
            elif (offsets := self._offsets(record, done)) is not None:
                self._add(sums, record, offsets * scale, done)
            for reader in _sampled(record) if self._compensated else ():
                rows = [self._spread(record, reader, each) for each in done.rows.get(reader.name, ())]
                if rows:
                    sums.add(_moments_of(record, reader), moments(torch.cat(rows)))

    def sampled(self, records: Sequence[GroupRecord]) -> set[str]:
        """Some readers of each group, if the network is refitted after pruning."""
        return {reader.name for record in records for reader in _sampled(record)} if self._compensated else set()

    def _add(self, sums: Sums, record: GroupRecord, offsets: Tensor, done: Pass) -> None:
        """Add what is kept of the ``(batch, width)`` offsets of a group as one point."""
        sums.add(record.key, self._size(offsets))
        if self._coupled:
            sums.add(f"{record.key}#products", offset_products(offsets))

    def _parts(self, record: GroupRecord, done: Pass) -> list[tuple[Layer, Tensor]]:
        """Per producer, the ``(batch, width)`` offsets of its channels."""
        layers = [layer for layer in record.producers if layer.name in done.outputs]
        return [(layer, self._gather(record, layer, done.outputs[layer.name])) for layer in layers]

    def _offsets(self, record: GroupRecord, done: Pass) -> Tensor | None:
        """``(batch, width)``, those of the whole group as one point; ``None`` if it was not called."""
        parts = [part for _, part in self._parts(record, done)]
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def coupling(self, sums: Sums, record: GroupRecord) -> Coupling | None:
        """How the offsets of the group's channels go together; ``None`` if it was not gathered."""
        products = sums.get(f"{record.key}#products")
        return None if products is None else Coupling(products, record.tied)

    def redundancy(self, sums: Sums, record: GroupRecord, centered: bool) -> Redundancy | None:
        """How the group's channels predict each other where they are read; ``None`` if it was not gathered.

        Args:
            sums: what was gathered.
            record: the group, with tied positions joined.
            centered: whether its offsets are measured from the mean.
        """
        readers = [reader for reader in _sampled(record) if _moments_of(record, reader) in sums]
        read = torch.zeros(record.width, dtype=torch.bool)
        for reader in readers:
            read[reader.root] = True
        return Redundancy.of([sums[_moments_of(record, reader)] for reader in readers], read, centered)

    def scores(self, sums: Sums, record: GroupRecord, wiring: Wiring, reduction: str, model: nn.Module) -> Tensor:
        """Mean size over the samples."""
        if reduction == "joint":
            total = sums.get(record.key)
            total = sums["samples"].new_zeros(record.width) if total is None else total
            return total / sums["samples"]
        layers = [p for p in self.layers(record, wiring) if f"{record.key}/{p.name}" in sums]
        if not layers:
            return sums["samples"].new_zeros(record.width)
        # Rows are in the group's coordinates already (see _gather), so each layer maps 0..width-1 to itself.
        values = [sums[f"{record.key}/{layer.name}"] / sums["samples"] for layer in layers]
        own = torch.arange(record.width)
        aligned = [Layer(layer.name, own, own, record.width) for layer in layers]
        return reduce_layers(values, aligned, record.width, reduction)

    def _size(self, t: Tensor) -> Tensor:
        return (t.abs() if self._power == 1 else t.square()).sum(0, dtype=torch.float64)

    def _spread(self, record: GroupRecord, layer: Layer, rows: Tensor) -> Tensor:
        """``(rows, layer channels)`` -> ``(rows, group width)``; where maps were flattened, a row a position."""
        key = (layer, rows.device)
        if key not in self._places:
            order = layer.root.argsort(stable=True)
            root, count = layer.root[order].unique_consecutive(return_counts=True)
            each = int(count.min())  # positions of a channel; the same for all, but for maps of several sizes
            first = count.cumsum(0) - count
            at = layer.index[order][first[:, None] + torch.arange(each)]
            self._places[key] = root.to(rows.device), at.to(rows.device)
        root, at = self._places[key]
        found = rows.new_zeros(len(rows) * at.shape[1], record.width)
        found[:, root] = rows[:, at].transpose(1, 2).reshape(-1, len(root))
        return found

    def _gather(self, record: GroupRecord, layer: Layer, t: Tensor) -> Tensor:
        """``(batch, layer channels)`` -> ``(batch, group width)``."""
        key = (layer, t.device)
        if key not in self._plans:
            aligned = layer.aligned and layer.channels == record.width
            self._plans[key] = None if aligned else (layer.index.to(t.device), layer.root.to(t.device))
        plan = self._plans[key]
        if plan is None:
            return t
        return t.new_zeros(t.shape[0], record.width).index_add_(1, plan[1], t[:, plan[0]])


def _moments_of(record: GroupRecord, reader: Layer) -> str:
    """What the moments of a group's channels at one of its readers are called among the sums."""
    return f"moments/{record.key}/{reader.name}"


def _sampled(record: GroupRecord) -> list[Layer]:
    """Evenly spaced readers of a group, the last among them."""
    count = len(record.consumers)
    some = min(count, READERS)
    return [record.consumers[(number + 1) * count // some - 1] for number in range(some)]
