r"""The two estimators of the projective offset: what each gathers, and the score it makes of it.

An estimator is two functions of sums: ``update`` adds what one pass gave, ``scores`` turns sums into a score
for each channel of a group.

* :class:`PaperEstimator`: Eq. 4 of IPPRO on gradients accumulated over the calibration set.
* :class:`ExpectedEstimator`: the expectation, over samples, of the size of each sample's own offset. Freeze the
  reference coordinate D and take the step that is natural on projective space, :math:`\lambda\lVert F\rVert^2`: as
  :math:`\lambda \to 0`, sample n moves the logarithm of :math:`\tan\theta` by :math:`-\lambda\,t_n` with
  :math:`t_n = F\cdot\nabla_n`. The extension with sigma = identity at the producer's output gives :math:`t_n`
  directly; no weight gradient is formed. The accumulated gradient of Eq. 4 is a *signed* sum that vanishes at a
  trained optimum, so important channels are as likely to rank low as high; :math:`E_n|t_n|` does not cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from .coupling import Coupling, offset_products
from .flow import Span
from .groups import CHANNEL_NORMS, GroupRecord, Layer
from .passes import Pass, Site
from .projective import pro_excess
from .statistics import Sums


@dataclass(frozen=True)
class Wiring:
    """What the forward passes showed about the model.

    Attributes:
        sites: activation calls that stand for sigma, in order.
        norm_of: layer -> the channel norm its output runs into.
        seen: producers that were called.
        centered: groups that were measured where they are read.
    """

    sites: tuple[Site, ...] = ()
    norm_of: Mapping[str, str] = field(default_factory=dict)
    seen: frozenset[str] = frozenset()
    centered: frozenset[str] = frozenset()

    @property
    def names(self) -> dict[str, list[str]]:
        """``seen`` and ``centered`` as sorted lists."""
        return {"seen": sorted(self.seen), "centered": sorted(self.centered)}

    @cached_property
    def _sites_of(self) -> dict[str, list[tuple[Site, Span]]]:
        found: dict[str, list[tuple[Site, Span]]] = {}
        for site in self.sites:
            for span in site.label.spans:
                found.setdefault(span.layer, []).append((site, span))
        return found

    def sites_of(self, layer: str) -> Sequence[tuple[Site, Span]]:
        """Activation calls that follow ``layer``, in order, and where its channels stand in each."""
        return self._sites_of.get(layer, ())

    def site_of(self, layer: str) -> str | None:
        """Name of the activation that follows ``layer``; ``None`` means the identity at its output."""
        return next((site.name for site, _ in self.sites_of(layer)), None)


class Estimator(Protocol):
    """What an observation and a score need to know of an estimator."""

    name: str
    taps_activations: bool
    taps_through_norms: bool
    taps_inputs: bool
    centered: frozenset[str]

    def trained_parameters(self, model: nn.Module, records: Sequence[GroupRecord]) -> dict[str, nn.Parameter]:
        """Parameters, by name, whose gradients are needed."""

    def update(self, sums: Sums, records: Sequence[GroupRecord], done: Pass) -> None:
        """Add one pass."""

    def unneeded(self, records: Sequence[GroupRecord], done: Pass) -> tuple[set[str], set[str]]:
        """Producers whose outputs, and readers whose inputs, need no tap, as the first forward pass shows."""

    def layers(self, record: GroupRecord, wiring: Wiring) -> tuple[Layer, ...]:
        """The producers of a group that carry its score."""

    def scores(self, sums: Sums, record: GroupRecord, wiring: Wiring, reduction: str, model: nn.Module) -> Tensor:
        """``(record.width,)`` scores, higher = keep."""


def reduce_layers(values: Sequence[Tensor], layers: Sequence[Layer], width: int, reduction: str) -> Tensor:
    """Combine the scores of coupled layers into one a position, in Torch-Pruning's vocabulary.

    Args:
        values: per layer, ``(k,)`` scores of ``layer.index``.
        layers: the layers, of the same order.
        width: positions in the group.
        reduction: "mean", "sum", "max", "prod" or "first".

    Returns:
        ``(width,)``.

    Raises:
        ValueError: unknown reduction.

    Example:
        >>> both = Layer("a", torch.arange(2), torch.arange(2), 2)
        >>> reduce_layers([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], [both, both], 2, "max")
        tensor([3., 4.])
    """
    if reduction == "first":
        values, layers, reduction = values[:1], layers[:1], "sum"
    modes = {"mean": "sum", "sum": "sum", "prod": "prod", "max": "amax"}
    if reduction not in modes:
        raise ValueError(f"unknown group_reduction {reduction!r}")
    start = {"sum": 0.0, "prod": 1.0, "amax": float("-inf")}[modes[reduction]]
    out = values[0].new_full((width,), start)
    for value, layer in zip(values, layers, strict=True):
        out.scatter_reduce_(0, layer.root.to(value.device), value, reduce=modes[reduction])
    if reduction == "mean":
        out /= len(values)
    return torch.where(out.isinf(), torch.zeros_like(out), out) if reduction == "max" else out


class ExpectedEstimator:
    """Mean over samples of the size of the offset of each sample.

    Args:
        power: 1 for the mean of abs(t), 2 for the mean of t squared.
        joint: one point a group: sum t over the producers of a channel, then take the size.
        loss_scale: ``(batch size) -> factor`` that turns gradients of the loss into per-sample gradients.
        coupled: also gather what :meth:`coupling` needs; with ``joint`` only.
    """

    name = "expected"
    taps_activations = False
    taps_through_norms = False
    taps_inputs = False
    centered: frozenset[str] = frozenset()

    def __init__(self, power: int, joint: bool, loss_scale: Callable[[int], float], coupled: bool = False) -> None:
        self._power, self._joint, self._loss_scale, self._coupled = power, joint, loss_scale, coupled
        self._plans: dict[tuple[Layer, torch.device], tuple[Tensor, Tensor] | None] = {}

    def trained_parameters(self, model: nn.Module, records: Sequence[GroupRecord]) -> dict[str, nn.Parameter]:
        """None: offsets come from activations' gradients alone."""
        return {}

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

    def unneeded(self, records: Sequence[GroupRecord], done: Pass) -> tuple[set[str], set[str]]:
        """None: offsets are those at the producers."""
        return set(), set()

    def layers(self, record: GroupRecord, wiring: Wiring) -> tuple[Layer, ...]:
        """Producers that no channel norm stands for."""
        return tuple(p for p in record.producers if p.name not in wiring.norm_of)

    def scores(self, sums: Sums, record: GroupRecord, wiring: Wiring, reduction: str, model: nn.Module) -> Tensor:
        """Mean size over the samples."""
        if reduction == "joint":
            total = sums.get(record.key)
            return (total if total is not None else torch.zeros(record.width)) / sums["samples"]
        layers = [p for p in self.layers(record, wiring) if f"{record.key}/{p.name}" in sums]
        if not layers:
            return torch.zeros(record.width)
        # Rows are in the group's coordinates already (see _gather), so each layer maps 0..width-1 to itself.
        values = [sums[f"{record.key}/{layer.name}"] / sums["samples"] for layer in layers]
        own = torch.arange(record.width)
        aligned = [Layer(layer.name, own, own, record.width) for layer in layers]
        return reduce_layers(values, aligned, record.width, reduction)

    def _size(self, t: Tensor) -> Tensor:
        return (t.abs() if self._power == 1 else t.square()).sum(0, dtype=torch.float64)

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


class PaperEstimator:
    """Eq. 4 on accumulated gradients.

    Args:
        step_size: lambda; 0 is the limit.
        target: "conv": F is the filter of a Conv or Linear layer. "norm": F is (gamma, beta) of the channel norm
            that follows it, where there is one (Sec. 4.2 of the paper).
    """

    name = "paper"
    taps_activations = True
    taps_through_norms = True
    taps_inputs = False
    centered: frozenset[str] = frozenset()

    def __init__(self, step_size: float, target: str) -> None:
        self._step_size, self._target = step_size, target

    def trained_parameters(self, model: nn.Module, records: Sequence[GroupRecord]) -> dict[str, nn.Parameter]:
        """Weights (and affine parameters of norms, for target "norm") of all producers."""
        found: dict[str, nn.Parameter] = {}
        for record in records:
            for layer in record.producers:
                module = model.get_submodule(layer.name)
                if isinstance(module, CHANNEL_NORMS) and self._target == "conv":
                    continue
                for name, parameter in _filter_parameters(module).items():
                    found[f"{layer.name}.{name}"] = parameter
        return found

    def update(self, sums: Sums, records: Sequence[GroupRecord], done: Pass) -> None:
        """Add the offsets d of one pass, summed over its samples."""
        for name, t in (*done.outputs.items(), *done.activations.items()):
            sums.add(f"offset/{name}", t.sum(0))

    def unneeded(self, records: Sequence[GroupRecord], done: Pass) -> tuple[set[str], set[str]]:
        """None: sigma is the identity for all that no activation follows."""
        return set(), set()

    def layers(self, record: GroupRecord, wiring: Wiring) -> tuple[Layer, ...]:
        """One layer for each filter: the layer itself, or the norm that follows it."""
        by_name = {layer.name: layer for layer in record.producers}
        if self._target == "norm":
            chosen = [wiring.norm_of.get(name, name) for name in by_name]
            return tuple(by_name[name] for name in dict.fromkeys(chosen) if name in by_name)
        norms = set(wiring.norm_of.values())
        return tuple(layer for name, layer in by_name.items() if name not in norms)

    def scores(self, sums: Sums, record: GroupRecord, wiring: Wiring, reduction: str, model: nn.Module) -> Tensor:
        r""":math:`\tan^2\theta' - 1`: the order of Eq. 4 without its rounding (see :func:`pro_excess`)."""
        layers = [
            p
            for p in self.layers(record, wiring)
            if p.name in wiring.seen and _filter_parameters(model.get_submodule(p.name))
        ]
        if not layers:
            return torch.zeros(record.width)
        parts = [self._filter_sums(sums, model, layer) for layer in layers]
        if reduction != "joint":
            scores = []
            for (square, dot, grad), layer in zip(parts, layers, strict=True):
                offset = self._layer_offset(sums, wiring, layer)
                scores.append(pro_excess(square.sqrt(), dot, grad.sqrt(), offset, self._step_size))
            return reduce_layers(scores, layers, record.width, reduction)
        square, dot, grad = (
            reduce_layers([part[i] for part in parts], layers, record.width, "sum") for i in range(3)
        )
        offset = self._joint_offset(sums, wiring, layers, record.width).to(square.device)
        return pro_excess(square.sqrt(), dot, grad.sqrt(), offset, self._step_size)

    def _filter_sums(self, sums: Sums, model: nn.Module, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """|F|^2, F.grad and |grad|^2 of the rows ``layer.index``, float64."""
        module = model.get_submodule(layer.name)
        totals: list[Tensor] = []
        for name, parameter in _filter_parameters(module).items():
            weight = parameter.detach()
            grad = sums.get(f"grad/{layer.name}.{name}")
            f = _rows(module, weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight)
            g = _rows(module, grad.to(f)) if grad is not None else torch.zeros_like(f)
            products = (f.square(), f * g, g.square())
            totals.append(torch.stack([product.sum(1, dtype=torch.float64) for product in products]))
        total = torch.stack(totals).sum(0)[:, layer.index.to(totals[0].device)]
        return total[0], total[1], total[2]

    def _layer_offset(self, sums: Sums, wiring: Wiring, layer: Layer) -> Tensor:
        """D of a layer's channels ``layer.index``, float64: over all calls of its sigma."""
        found = None
        for positions, channels, d in _site_parts(sums, wiring, layer.name):
            part = d.new_zeros(layer.channels).index_add_(0, channels, d[positions])
            found = part if found is None else found + part
        if found is None:
            found = sums[f"offset/{layer.name}"].double()
        return found[layer.index.to(found.device)]

    def _joint_offset(self, sums: Sums, wiring: Wiring, layers: Sequence[Layer], width: int) -> Tensor:
        """D of coupled filters as one point: every activation that follows any of them counts once."""
        total: Tensor | None = None
        counted: set[str] = set()
        for layer in layers:
            to_group = torch.full((layer.channels,), -1, dtype=torch.long)
            to_group[layer.index] = layer.root
            names = list(dict.fromkeys(site.name for site, _ in wiring.sites_of(layer.name)))
            if not names:
                part = reduce_layers([self._layer_offset(sums, wiring, layer)], [layer], width, "sum")
                total = part if total is None else total + part
            for name in names:
                if name in counted:
                    continue
                counted.add(name)
                for positions, channels, d in _site_parts(sums, wiring, layer.name, name):
                    root = to_group.to(d.device)[channels]
                    part = d.new_zeros(width).index_add_(0, root[root >= 0], d[positions[root >= 0]])
                    total = part if total is None else total + part
        assert total is not None
        return total


def _site_parts(
    sums: Sums, wiring: Wiring, layer: str, only: str | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``(positions, channels of layer, d of the site)`` of each activation call that follows ``layer``."""
    parts = []
    for site, span in wiring.sites_of(layer):
        if only is None or site.name == only:
            d = sums[f"offset/{site.name}"].double()
            parts.append((span.positions().to(d.device), span.channels().to(d.device), d))
    return parts


def _filter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that make up F: the weight, and the bias too where F = (gamma, beta)."""
    if isinstance(module, nn.MultiheadAttention):
        module, prefix, names = module.out_proj, "out_proj.", ["weight"]
    else:
        prefix, names = "", ["weight", "bias"] if isinstance(module, CHANNEL_NORMS) else ["weight"]
    return {prefix + name: p for name in names if isinstance(p := getattr(module, name, None), nn.Parameter)}


def _rows(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight as one row a filter (output channel)."""
    if weight.dim() == 1:
        return weight[:, None]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        groups = module.groups
        grouped = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)
    if isinstance(module, nn.Embedding):
        return weight.t()
    return weight.flatten(1)
