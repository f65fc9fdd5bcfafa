r"""The expected offset towards the mean of a channel instead of towards zero.

What a removed channel brought on average is made up for by BatchNorm re-estimation, by a bias or by
``Compensation``; what is lost is its variation. So the offset is taken where the channel is read, towards its
mean: with x the input of a layer that reads it and g the gradient there, sample n has

.. math:: t_n = \sum_{readers} \sum_{positions} g\,(x - \mathrm E x) = \sum_k a_{kn} - m_k b_{kn},

a the sum of g x, b that of g, m the mean of x over samples and positions. The mean is known at the end only, but
:math:`\mathrm E t^2` is a function of the sums of a a, a b, b b and x, which add up over batches and processes.
For a reader of a ReLU's output and m = 0 this is the offset at the producer, :math:`F\cdot\nabla_n`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .estimators import ExpectedEstimator, Wiring
from .groups import GroupRecord
from .passes import Pass
from .statistics import Sums


class CenteredEstimator(ExpectedEstimator):
    """Mean square of the offset towards the mean, where readers see the channels of all producers.

    Elsewhere (queries and keys of attention, streams that a LayerNorm mixes) it is the mean square of the offset
    towards zero at the producers.

    Args:
        loss_scale: ``(batch size) -> factor`` that turns gradients of the loss into per-sample gradients.
    """

    taps_inputs = True

    def __init__(self, loss_scale: Callable[[int], float]) -> None:
        super().__init__(2, True, loss_scale)

    def update(self, sums: Sums, records: Sequence[GroupRecord], done: Pass) -> None:
        """Add the moments of one batch's offsets."""
        covered = [record for record in records if _covered(record, done)]
        super().update(sums, [record for record in records if record not in covered], done)
        scale = self._loss_scale(done.batch)
        for name, (total, rows) in done.reads.items():
            sums.add(f"read/{name}", total)
            sums.add(f"rows/{name}", rows)
        for record in covered:
            parts = [done.inputs[reader.name] for reader in record.consumers]
            a, b = (
                torch.stack(
                    [self._gather(record, r, p[i]) for r, p in zip(record.consumers, parts, strict=True)]
                ).double()
                * scale
                for i in (0, 1)
            )
            total = a.sum(0)
            sums.add(f"aa/{record.key}", total.square().sum(0))
            sums.add(f"ab/{record.key}", torch.einsum("nw,knw->kw", total, b))
            sums.add(f"bb/{record.key}", torch.einsum("knw,jnw->kjw", b, b))

    def unneeded(self, records: Sequence[GroupRecord], done: Pass) -> set[str]:
        """Producers of groups that are measured where they are read, and of no other."""
        covered = {record.key: _covered(record, done) for record in records}
        needed = {p.name for record in records if not covered[record.key] for p in record.producers}
        return {p.name for record in records for p in record.producers} - needed

    def scores(self, sums: Sums, record: GroupRecord, wiring: Wiring, reduction: str, model: nn.Module) -> Tensor:
        """Mean square of the offsets, ``(width,)`` float64."""
        square = sums.get(f"aa/{record.key}")
        if square is None:
            return super().scores(sums, record, wiring, reduction, model)
        means = []
        for reader in record.consumers:
            mean = sums[f"read/{reader.name}"] / sums[f"rows/{reader.name}"]
            count = mean.new_zeros(record.width).index_add_(
                0, reader.root.to(mean.device), mean.new_ones(len(reader.root))
            )
            total = mean.new_zeros(record.width).index_add_(
                0, reader.root.to(mean.device), mean[reader.index.to(mean.device)]
            )
            means.append(total / count.clamp_min(1))  # flattened maps: one mean for all positions of a channel
        m = torch.stack(means)
        cross = (m * sums[f"ab/{record.key}"]).sum(0)
        own = torch.einsum("kw,jw,kjw->w", m, m, sums[f"bb/{record.key}"])
        return (square - 2 * cross + own).clamp_min(0) / sums["samples"]


def _covered(record: GroupRecord, done: Pass) -> bool:
    """Whether all that the group's channels do passes through layers that read them, channel by channel."""
    readers = [reader.name for reader in record.consumers]
    if not readers or any(name not in done.inputs for name in readers):
        return False
    own = {producer.name for producer in record.producers}
    seen = {layer for name in (*readers, *own) for layer in done.read_layers.get(name, ())}
    return all(name in seen or name in done.norm_of for name in own)
