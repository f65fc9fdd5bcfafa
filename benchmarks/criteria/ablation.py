"""The reference that no first-order criterion can beat on single channels: remove each one and look.

One pass over the images for each channel, so it is minutes for the smallest networks and no criterion to use.
It tells how far a ranking of single channels can get, however well their effects are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.criteria.baselines import samples
from benchmarks.tasks.base import Batch
from ippro_tp.graph.groups import read_group
from ippro_tp.records import GroupRecord

IMAGES = 500
"""Of the calibration images; each is seen once for every channel."""


class Ablation(tp.importance.Importance):
    """Mean size of the change of the logits when a channel is not read any more.

    Channels are masked where Conv and Linear layers read them, which is what removing them does to a network
    without layer norms. A change that is the same for all logits is none.

    Args:
        model: The unpruned network, in eval mode.
        batches: Calibration batches.
    """

    def __init__(self, model: nn.Module, batches: list[Batch]) -> None:
        device = next(model.parameters()).device
        self._model = model
        self._images = [images.to(device) for images, _ in samples(batches, IMAGES, 250)]
        self._logits = self._run()

    @torch.no_grad()
    def __call__(self, group, **kwargs) -> Tensor | None:
        """Return one score per root channel; None where no Conv or Linear layer reads them."""
        record = read_group(group)
        if not record.consumers:
            return None
        scores = torch.zeros(record.width)
        for position in range(record.width):
            with self._masked(record, position):
                changes = self._run() - self._logits
            scores[position] = (changes - changes.mean(1, keepdim=True)).norm(dim=1).mean()
        return scores

    @torch.no_grad()
    def _run(self) -> Tensor:
        return torch.cat([self._model(images) for images in self._images])

    @contextmanager
    def _masked(self, record: GroupRecord, position: int) -> Iterator[None]:
        handles = []
        for layer in record.consumers:
            module, channels = self._model.get_submodule(layer.name), layer.index[layer.root == position]
            handles.append(
                module.register_forward_pre_hook(_mask(channels, -1 if isinstance(module, nn.Linear) else 1))
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _mask(channels: Tensor, axis: int) -> Callable[[nn.Module, tuple], tuple]:
    def hook(module: nn.Module, args: tuple) -> tuple:
        return (args[0].index_fill(axis, channels.to(args[0].device), 0.0), *args[1:])

    return hook
