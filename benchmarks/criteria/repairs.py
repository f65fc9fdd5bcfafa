"""What published methods do to the layers that stay once it is known which channels go: our implementations.

Each has the interface of ``ippro_tp.Compensation`` and can take its place in ``prune()`` and in the harness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from benchmarks.criteria.peer_maths import Moments, clusters, merged, ridge_map
from benchmarks.criteria.peers import is_dense, is_plain, moments, watching
from benchmarks.harness.evaluate import reestimate_batchnorm
from ippro_tp import Compensation, update_attention
from ippro_tp.compensation.step import CompensationReport
from ippro_tp.graph.following import norm_after
from ippro_tp.graph.groups import groups_of, read_group
from ippro_tp.records import GroupRecord, Layer

BATCH = 50


class Repair(Compensation):
    """Cuts, but first changes the weights of the whole layers by :meth:`rewrite`; keeps inputs as its base does.

    Re-estimates BatchNorm statistics afterwards, unless ``renorm`` is false.
    """

    renorm = True
    products: bool | None = None
    """Whether :meth:`rewrite` needs products of channels; None: no moments at all."""

    @torch.no_grad()
    def step(self, pruner: Any, repair: Callable[[nn.Module], None] | None = None) -> CompensationReport:
        """Run ``pruner.step()`` with the repair; the report is empty."""
        self._check_calibrated()
        self.graph = pruner.DG
        self.groups = [(group, read_group(group)) for group in groups_of(pruner)]
        self.moments: dict[str, Moments] = {}
        if self.products is not None:
            self.moments = moments(lambda update: self._run(pruner.model, update), self.products)
        self.alive = {name: torch.arange(found.channels) for name, found in self.moments.items()}
        for cut in pruner.step(interactive=True):
            self.rewrite(list(cut))
            self._note(cut)
            cut.prune()
        update_attention(pruner)
        if repair is not None:
            repair(pruner.model)
        if self.renorm:
            device = next(pruner.model.parameters()).device
            reestimate_batchnorm(pruner.model, ((images, None) for images in self._batches()), device)
        del self.graph, self.groups, self.moments, self.alive
        return CompensationReport(())

    def rewrite(self, cut: list[tuple[Any, list[int]]]) -> None:
        """Change weights of layers that are not cut yet.

        Args:
            cut: dependencies and the indices that are about to go, as Torch-Pruning's groups give them.
        """

    def readers(self, cut: list[tuple[Any, list[int]]]) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """Dense layers that lose inputs: name, layer, and which go."""
        for dep, idxs in cut:
            module = dep.target.module
            dense = is_dense(module) and not isinstance(module, _ConvTransposeNd)
            outputs = self.graph.is_out_channel_pruning_fn(dep.handler)
            inputs = not outputs and self.graph.is_in_channel_pruning_fn(
                dep.handler
            )  # else a number that it keeps
            if dense and idxs and inputs:
                name = self.graph._module2name[module]
                if name in self.moments:  # it was called
                    yield name, module, torch.tensor(sorted(idxs))

    def _note(self, cut: Any) -> None:
        for name, _, gone in self.readers(list(cut)):
            self.alive[name] = self.alive[name][_others(len(self.alive[name]), gone)]

    def _batches(self) -> Iterator[Any]:
        for index in torch.arange(self._samples.count).split(BATCH):
            args, kwargs = self._samples.arguments(index)
            (images,) = (*args, *kwargs.values())  # the networks of the benchmark take one tensor
            yield images

    def _run(self, model: nn.Module, update: Callable[[str, Tensor], None]) -> None:
        model.eval()
        with watching(model, update):
            for images in self._batches():
                model(images)


class MeanFold(Repair):
    """VBP's: the mean of what a layer no longer reads moves into its bias (or the mean of its BatchNorm)."""

    renorm, products = False, False

    def rewrite(self, cut: list[tuple[Any, list[int]]]) -> None:
        """Add each reader's weight times the mean of the inputs that go."""
        for name, module, gone in self.readers(cut):
            mean = self.moments[name].mean[self.alive[name][gone]]
            shift = torch.einsum("oit,i->o", _taps(module)[:, gone], mean)
            norm = norm_after(self.graph, module)
            if module.bias is not None:
                module.bias.add_(shift)
            elif norm is not None and norm.running_mean is not None:
                norm.running_mean.sub_(shift)
            else:
                module.bias = nn.Parameter(shift.to(module.weight))


class GramRidge(Repair):
    """GRAIL's: each reader's weight times the ridge regression of all its inputs on those that stay.

    Args:
        strength: of the ridge, as a multiple of the mean second moment; theirs is 0.001.
    """

    products = True

    def __init__(self, strength: float = 1e-3) -> None:
        super().__init__()
        self.strength = strength

    def rewrite(self, cut: list[tuple[Any, list[int]]]) -> None:
        """Map the columns of each reader onto those that stay."""
        for name, module, gone in self.readers(cut):
            alive = self.alive[name]
            gram = self.moments[name].gram[alive][:, alive]
            kept = _others(len(alive), gone)
            new = torch.einsum("oit,ik->okt", _taps(module), ridge_map(gram, kept, self.strength))
            module.weight[:, kept] = new.to(module.weight).view_as(module.weight[:, kept])


class Folding(Repair):
    """Model folding: as many clusters of channels as would stay, averaged; readers' weights added up.

    Which channels an importance would have removed does not matter, their number does. Rows of k-means are all
    weights of a channel: those that make it, of its BatchNorm, and those that read it. Groups that are not plain
    are left as they are cut.

    Args:
        seed: Of k-means.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def rewrite(self, cut: list[tuple[Any, list[int]]]) -> None:
        """Write the merged channels of each group to the places of those that stay."""
        names = self.graph._module2name
        outs = {
            names[dep.target.module]: set(idxs)
            for dep, idxs in cut
            if dep.target.module in names and self.graph.is_out_channel_pruning_fn(dep.handler)
        }
        for group, record in self.groups:
            root = next((layer for layer in record.producers if layer.name in outs), None)
            if root is None or not is_plain(group):
                continue
            gone = root.root[torch.tensor([i in outs[root.name] for i in root.index.tolist()])].unique()
            self._fold(record, _others(record.width, gone))

    def _fold(self, record: GroupRecord, kept: Tensor) -> None:
        made, readers = [self._places(record, layers) for layers in (record.producers, record.consumers)]
        read = [(m.weight.transpose(0, 1), at) for m, at in readers]
        tensors = [(t, at) for m, at in made for t in _channel_tensors(m)]
        rows = [t[at].flatten(1) for t, at in tensors if isinstance(t, nn.Parameter)]
        rows += [columns[at].flatten(1) for columns, at in read]
        labels = clusters(torch.cat(rows, 1), len(kept), self.seed)
        for average, places in ((True, tensors), (False, read)):
            for tensor, at in places:
                new = merged(tensor[at], labels, len(kept), average)
                tensor[at] = 0  # what goes has no say in the clusters of later groups
                tensor[at[kept]] = new

    def _places(self, record: GroupRecord, layers: tuple[Layer, ...]) -> list[tuple[nn.Module, Tensor]]:
        """Each layer with ``(width, channels of a position)`` numbers of its channels."""
        found = []
        for layer in layers:
            order = layer.root.argsort(stable=True)
            found.append((self.graph.model.get_submodule(layer.name), layer.index[order].view(record.width, -1)))
        return found


class NormStatistics(Repair):
    """Nothing but new BatchNorm statistics."""


def _channel_tensors(module: nn.Module) -> list[Tensor]:
    names = ("weight", "bias", "running_mean", "running_var")
    return [t for name in names if isinstance(t := getattr(module, name, None), Tensor)]


def _taps(module: nn.Module) -> Tensor:
    """``(outputs, inputs, taps)`` float64: the weight of a Conv or Linear layer."""
    weight = module.weight.detach().double()
    return weight[..., None] if weight.dim() == 2 else weight.flatten(2)


def _others(count: int, gone: Tensor) -> Tensor:
    stays = torch.ones(count, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().view(-1)


REPAIRS: dict[str, Callable[[], Compensation]] = {
    "bn": NormStatistics,
    "mean": MeanFold,
    "folding": Folding,
    "gram": GramRidge,
}
"""By what ``--refits`` and ``--compensate`` call them."""
