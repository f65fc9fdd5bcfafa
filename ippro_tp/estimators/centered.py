r"""The expected offset towards the mean of a channel instead of towards zero.

The mean contribution of a removed channel is restored by a BatchNorm after the layer that reads it, once its
statistics are re-estimated or trained, or by ``Compensation``; only its variation is lost. So the offset is
measured where the channel is read, towards its mean: with x the input of a layer that reads it, g the gradient
there and m the mean of x over samples and positions, sample n has

.. math:: t_n = \sum_{readers} \sum_{positions} g\,(x - s\,m) = a_n - \sum_{readers} s\,m\,b_n,

where a is the sum of g x over all readers, b that of g at one reader, and s the fraction of the mean that is
restored there. For s = 0 and readers of a ReLU's output this is the offset at the producer,
:math:`F\cdot\nabla_n`. The mean is known only at the end, but :math:`E\,t^2` is a function of the sums of a a,
a b, b b and x, which add up over batches and processes. :math:`E|t|` is not, and is assumed to shrink as its
square does,

.. math:: (E|t|)^2 = (E|a|)^2\,\frac{E\,t^2}{E\,a^2}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..records import GroupRecord, Layer, Pass, Wiring
from .coupling import Coupling, block_products, in_blocks
from .expected import ExpectedEstimator
from .sums import Sums

MADE_UP = 0.85
"""The fraction of the mean that is assumed to be restored if a BatchNorm follows the reader: nearly all after
re-estimation, none before (chosen on held-out images, ``benchmarks/results/research.md``)."""


class CenteredEstimator(ExpectedEstimator):
    """Magnitude of the offset towards the mean, for groups whose channels have no effect except through readers.

    For others (queries and keys of attention, streams that a LayerNorm mixes), and if no mean is restored, it is
    the magnitude of the offset towards zero at the producers.

    Args:
        power: as for :class:`ExpectedEstimator`.
        loss_scale: as there.
        coupled: as there. Covariances of offsets towards the mean are exact if one layer reads the group; with
            several readers, each with its own mean, those of offsets towards zero stand in.
        share: the s above, given the channel norm that follows a reader, or ``None`` if none does.
        compensated: as for :class:`ExpectedEstimator`.
    """

    taps_inputs = True

    def __init__(
        self,
        power: int,
        loss_scale: Callable[[int], float],
        coupled: bool,
        share: Callable[[str | None], float],
        compensated: bool = False,
    ) -> None:
        super().__init__(power, True, loss_scale, coupled, compensated)
        self._share_after = share
        self.centered: frozenset[str] = frozenset()
        self._shares: dict[str, float] = {}

    def update(self, sums: Sums, records: Sequence[GroupRecord], done: Pass) -> None:
        """Add the moments of one batch's offsets, and the shares of the means."""
        super().update(sums, records, done)
        for name in sorted(_names(self._making_up(record) for record in records if record.key in self.centered)):
            total, rows = done.reads[name]
            sums.add(f"read/{name}", total * self._shares[name])
            sums.add(f"rows/{name}", rows)

    def _add(self, sums: Sums, record: GroupRecord, offsets: Tensor, done: Pass) -> None:
        super()._add(sums, record, offsets, done)
        if record.key not in self.centered:
            return
        readers, scale = self._making_up(record), self._loss_scale(done.batch)
        b = [torch.zeros_like(offsets) for _ in readers]  # of a reader that no gradient reaches
        for number, reader in enumerate(readers):
            if reader.name in done.inputs:
                b[number] = self._gather(record, reader, done.inputs[reader.name][1]) * scale
        if self._coupled and len(record.consumers) == 1:
            left, right = in_blocks(offsets), in_blocks(b[0])
            sums.add(f"{record.key}#cross", block_products(left, right))
            sums.add(f"{record.key}#ones", block_products(right, right))
        a, ones = offsets.double(), torch.stack(b).double()
        sums.add(f"aa/{record.key}", a.square().sum(0))
        sums.add(f"ab/{record.key}", torch.einsum("nw,knw->kw", a, ones))
        sums.add(f"bb/{record.key}", torch.einsum("knw,jnw->kjw", ones, ones))

    def unneeded(self, records: Sequence[GroupRecord], done: Pass) -> tuple[set[str], set[str]]:
        """Producers of groups that are measured where they are read, readers of the others."""
        self._shares = {name: self._share_after(done.norm_of.get(name)) for name in done.reads}
        self.centered = frozenset(r.key for r in records if self._making_up(r) and _covered(r, done))
        at_readers = [record for record in records if record.key in self.centered]
        others = [record for record in records if record.key not in self.centered]
        producers = _names(r.producers for r in records) - _names(r.producers for r in others)
        return producers, _names(r.consumers for r in records) - _names(r.consumers for r in at_readers)

    def scores(self, sums: Sums, record: GroupRecord, wiring: Wiring, reduction: str, model: nn.Module) -> Tensor:
        """Mean size over the samples."""
        found = super().scores(sums, record, wiring, reduction, model)
        square = sums.get(f"aa/{record.key}")
        if square is None:
            return found
        m = torch.stack([_mean(sums, record, r) for r in record.consumers if f"read/{r.name}" in sums])
        cross = (m * sums[f"ab/{record.key}"]).sum(0)
        own = torch.einsum("kw,jw,kjw->w", m, m, sums[f"bb/{record.key}"])
        left = (square - 2 * cross + own).clamp_min(0)
        return found * torch.where(square > 0, left / square, 0).pow(self._power / 2)

    def coupling(self, sums: Sums, record: GroupRecord) -> Coupling | None:
        """How the offsets of the group's channels go together; ``None`` if it was not gathered."""
        found, cross = super().coupling(sums, record), sums.get(f"{record.key}#cross")
        if found is None or cross is None:
            return found
        m = in_blocks(_mean(sums, record, record.consumers[0]).to(cross)[None])[:, 0]
        mixed = cross * m[:, None]
        products = found.products - mixed - mixed.mT + sums[f"{record.key}#ones"] * m[:, :, None] * m[:, None]
        # What is left of a channel that hardly varies may be rounding: it goes with no other more than wholly.
        square = products.diagonal(dim1=1, dim2=2)
        square.copy_(square.maximum(1e-6 * found.products.diagonal(dim1=1, dim2=2)))
        size = square.sqrt()
        limit = size[:, :, None] * size[:, None]
        return Coupling(products.clamp(-limit, limit), record.tied)

    def _making_up(self, record: GroupRecord) -> tuple[Layer, ...]:
        """The readers after which a mean is restored."""
        return tuple(reader for reader in record.consumers if self._shares.get(reader.name, 0) > 0)

    def _parts(self, record: GroupRecord, done: Pass) -> list[tuple[Layer, Tensor]]:
        if record.key not in self.centered:
            return super()._parts(record, done)
        reached = [reader for reader in record.consumers if reader.name in done.inputs]
        return [(reader, self._gather(record, reader, done.inputs[reader.name][0])) for reader in reached]


def _mean(sums: Sums, record: GroupRecord, reader: Layer) -> Tensor:
    """``(record.width,)`` float64, share times mean of what ``reader`` reads of each channel."""
    mean = sums[f"read/{reader.name}"] / sums[f"rows/{reader.name}"]
    root, index = reader.root.to(mean.device), reader.index.to(mean.device)
    count = mean.new_zeros(record.width).index_add_(0, root, mean.new_ones(len(root)))
    total = mean.new_zeros(record.width).index_add_(0, root, mean[index])
    return total / count.clamp_min(1)  # flattened maps: one mean for all positions of a channel


def _names(layers: Iterable[tuple[Layer, ...]]) -> set[str]:
    return {layer.name for some in layers for layer in some}


def _covered(record: GroupRecord, done: Pass) -> bool:
    """Whether all that the group's channels do passes through layers that read them, channel by channel."""
    readers = [reader.name for reader in record.consumers]
    if not readers or any(name not in done.reads for name in readers):
        return False
    own = {producer.name for producer in record.producers}
    seen = {layer for name in (*readers, *own) for layer in done.read_layers.get(name, ())}
    return all(name in seen or name in done.norm_of for name in own)
