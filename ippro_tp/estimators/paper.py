"""Eq. 4 of IPPRO on gradients accumulated over the calibration set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import is_channel_norm
from ..records import GroupRecord, Layer, Pass, Wiring
from .base import Estimator, reduce_layers
from .projective import SCORE_LIMIT, pro_excess
from .sums import Sums


class PaperEstimator(Estimator):
    """Eq. 4 on accumulated gradients.

    Args:
        step_size: lambda; 0 is the limit.
        target: "conv": F is the filter of a Conv or Linear layer. "norm": F is (gamma, beta) of the channel norm
            that follows it, where there is one (Sec. 4.2 of the paper).
    """

    taps_activations = True
    taps_through_norms = True

    def __init__(self, step_size: float, target: str) -> None:
        self._step_size, self._target = step_size, target

    def trained_parameters(self, model: nn.Module, records: Sequence[GroupRecord]) -> dict[str, nn.Parameter]:
        """Weights (and affine parameters of norms, for target "norm") of all producers."""
        found: dict[str, nn.Parameter] = {}
        for record in records:
            for layer in record.producers:
                module = model.get_submodule(layer.name)
                if is_channel_norm(module) and self._target == "conv":
                    continue
                for name, parameter in _filter_parameters(module).items():
                    found[f"{layer.name}.{name}"] = parameter
        return found

    def update(self, sums: Sums, records: Sequence[GroupRecord], done: Pass) -> None:
        """Add the offsets d of one pass, summed over its samples."""
        for name, t in (*done.outputs.items(), *done.activations.items()):
            sums.add(f"offset/{name}", t.sum(0))

    def layers(self, record: GroupRecord, wiring: Wiring) -> tuple[Layer, ...]:
        """One layer for each filter: the layer itself, or the norm that follows it."""
        by_name = {layer.name: layer for layer in record.producers}
        if self._target == "norm":
            chosen = [wiring.norm_of.get(name, name) for name in by_name]
            return tuple(by_name[name] for name in dict.fromkeys(chosen) if name in by_name)
        norms = set(wiring.norm_of.values())
        return tuple(layer for name, layer in by_name.items() if name not in norms)

    def scores(self, sums: Sums, record: GroupRecord, wiring: Wiring, reduction: str, model: nn.Module) -> Tensor:
        r"""The order of Eq. 4 without its rounding near 1.

        That is :math:`\tan^2\theta' - 1` (see :func:`pro_excess`) of the coupled filters as one point or, with
        other reductions than "joint", of the reduced :math:`\tan\theta'` of the layers.
        """
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
            if self._step_size == 0:  # in the limit a product is the sum of its logarithms
                reduction = "sum" if reduction == "prod" else reduction
                return reduce_layers(scores, layers, record.width, reduction)
            return _reduce_tangents(scores, layers, record.width, reduction)
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
                    root = torch.where(root < 0, width, root)  # not in the group; a mask would make us wait
                    part = d.new_zeros(width + 1).index_add_(0, root, d[positions])[:width]
                    total = part if total is None else total + part
        assert total is not None
        return total


def _reduce_tangents(excess: Sequence[Tensor], layers: Sequence[Layer], width: int, reduction: str) -> Tensor:
    r"""Reduce :math:`\tan\theta'` over layers: :math:`\tan^2\theta' - 1` of each in, that of the result out.

    What is reduced is :math:`\tan - 1 = s / (1 + \sqrt{1 + s})`, which keeps the digits of s.
    """
    less = [s / (1 + (1 + s).clamp_min(0).sqrt()) for s in excess]
    if reduction == "prod":
        reduced = reduce_layers([x.log1p() for x in less], layers, width, "sum").expm1()
    else:
        reduced = reduce_layers(less, layers, width, reduction)
    if reduction in (
        "sum",
        "mean",
        "first",
    ):  # a position that fewer layers have lacks a tangent of about 1 for each
        counted = layers[:1] if reduction == "first" else layers
        counts = reduce_layers([torch.ones_like(x) for x in less[: len(counted)]], counted, width, "sum")
        reduced = reduced + (counts - counts.max()) / (len(less) if reduction == "mean" else 1)
    # The square, less one; below any tangent it goes on without a turn.
    return torch.where(reduced > -1, reduced * (2 + reduced), reduced).clamp(-SCORE_LIMIT, SCORE_LIMIT)


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
        prefix, names = "", ["weight", "bias"] if is_channel_norm(module) else ["weight"]
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
