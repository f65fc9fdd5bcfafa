"""Published importances that look at what layers read: CHIP and VBP, our implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from benchmarks.criteria.peer_maths import Moments, channel_independence
from ippro_tp.graph.groups import read_group

CHIP_IMAGES = 64
"""Of the calibration images; CHIP's authors use 640. Maps of more than 64 channels and positions take long."""
CHIP_WORK = 2e9
"""Largest sum of cubed sizes of the matrices of a layer, which stands for seconds: fewer images beyond it."""

Update = Callable[[str, Tensor], None]


@contextmanager
def watching(model: nn.Module, update: Update) -> Iterator[None]:
    """Call ``update(name, x)`` with what each Conv and Linear layer reads, ``(samples, channels, positions)``."""

    def hook(name: str) -> Callable[[nn.Module, tuple], None]:
        def look(module: nn.Module, args: tuple) -> None:
            x = args[0].detach()
            x = x.movedim(-1, 1) if isinstance(module, nn.Linear) else x
            update(name, x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2))

        return look

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, _ConvNd | nn.Linear)]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_plain(group) -> bool:
    """Whether the channels of a group go one by one and no LayerNorm mixes them, as the papers assume.

    Heads of attention and the streams of transformers are none.
    """
    record, names = read_group(group), group._DG._module2name
    modules = [item.dep.target.module for item in group if item.dep.target.module in names]
    single = record.tied is None and all(len(layer.index) == record.width for layer in record.producers)
    return single and not any(isinstance(module, nn.LayerNorm) for module in modules)


def is_hidden(group) -> bool:
    """Whether a plain group is a hidden layer: one dense layer writes it. Several layers add to a stream."""
    layers = [group._DG.model.get_submodule(layer.name) for layer in read_group(group).producers]
    return is_plain(group) and sum(map(is_dense, layers)) == 1


def is_dense(module: nn.Module) -> bool:
    """Whether each output of a layer reads all of its inputs."""
    return isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1)


class ReaderScores(tp.importance.Importance):
    """Scores of channels where they are read: the mean over the layers that read a group.

    Args:
        scores: ``(channels,)`` by the name of the layer that reads them.
        chosen: Which groups have scores; the others keep all channels.
    """

    def __init__(self, scores: Mapping[str, Tensor], chosen: Callable[[object], bool] = is_plain) -> None:
        self.scores, self.chosen = dict(scores), chosen

    @torch.no_grad()
    def __call__(self, group, **kwargs) -> Tensor | None:
        """Return one score per root channel."""
        record = read_group(group)
        readers = [layer for layer in record.consumers if layer.name in self.scores]
        if not readers or not self.chosen(group):
            return None
        layers = []
        for layer in readers:
            own = self.scores[layer.name]
            mean = torch.zeros(record.width, dtype=own.dtype)
            layers.append(mean.scatter_reduce(0, layer.root, own[layer.index], "mean", include_self=False))
        return torch.stack(layers).mean(0)


class OnlyWhere(tp.importance.Importance):
    """Another importance, of chosen groups; the others keep all channels."""

    def __init__(self, importance: Callable, chosen: Callable[[object], bool]) -> None:
        self.importance, self.chosen = importance, chosen

    def __call__(self, group, **kwargs) -> Tensor | None:
        """Return the other's scores, or None."""
        return self.importance(group, **kwargs) if self.chosen(group) else None


@torch.no_grad()
def chip(model: nn.Module, batches: Iterable, images: int = CHIP_IMAGES) -> ReaderScores:
    """CHIP's channel independence of the maps that layers read, after the activation as its authors take them."""
    scores: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def update(name: str, x: Tensor) -> None:
        size = min(x.shape[1], x.shape[2])
        most = min(images, max(4, int(CHIP_WORK / (x.shape[1] * size**3))))
        x = x[: max(most - counts.get(name, 0), 0)]
        if len(x) and x.shape[2] > 1:  # the rank of single numbers says nothing
            counts[name] = counts.get(name, 0) + len(x)
            scores[name] = scores.get(name, 0) + channel_independence(x.cpu()) * len(x)

    _run(model, batches, update)
    return ReaderScores({name: total / counts[name] for name, total in scores.items()})


@torch.no_grad()
def variance(model: nn.Module, batches: Iterable, hidden: bool = True) -> ReaderScores:
    """VBP's variance of what layers read: of hidden layers, as published, or of all plain groups."""
    found = moments(lambda update: _run(model, batches, update))
    return ReaderScores({name: own.variance for name, own in found.items()}, is_hidden if hidden else is_plain)


def moments(run: Callable[[Update], None], products: bool = False) -> dict[str, Moments]:
    """Moments of what each Conv and Linear layer reads while ``run`` is at work."""
    found: dict[str, Moments] = {}

    def update(name: str, x: Tensor) -> None:
        if name not in found:
            found[name] = Moments(x.shape[1], products)
        found[name].add(x)

    run(update)
    return found


def _run(model: nn.Module, batches: Iterable, update: Update) -> None:
    device = next(model.parameters()).device
    model.eval()
    with watching(model, update):
        for batch in batches:
            model((batch[0] if isinstance(batch, tuple | list) else batch).to(device))
