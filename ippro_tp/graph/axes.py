"""Axes of layers, bare parameters and numbers of modules: what shrinks when channels go, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from .labels import Facts
from .layout import Layout
from .matrices import drop, lower, matrix_of

BOX = tp.pruner.function.PrunerBox
TYPES = tp.ops.OPTYPE


@dataclass(eq=False)
class Axis:
    """Something whose size is a number of channels.

    Attributes:
        owner: name of the module.
        labels: ``(size,)`` label of each channel.
        classes: ``(size,)`` class of each channel, 0 for those that stay.
        handler: a bound method that takes the module and the indices that go.
        is_root: a layer's output channels, which a group can be named after.
        is_output: the layer's output channels, or a bare tensor.
    """

    owner: str
    labels: Tensor
    classes: Tensor
    handler: Callable[[nn.Module, list[int]], Any]
    is_root: bool = False
    is_output: bool = True

    @property
    def pruner(self) -> Any:
        """What the handler is a method of."""
        return self.handler.__self__  # type: ignore[attr-defined]

    def forget(self, gone: Sequence[int]) -> None:
        """Drop the channels that were pruned."""
        keep = torch.ones(len(self.labels), dtype=torch.bool)
        keep[list(gone)] = False
        self.labels, self.classes = self.labels[keep], self.classes[keep]


class TensorPruner(tp.pruner.BasePruningFunc):  # type: ignore[misc]
    """Prunes one axis of a parameter or buffer of any module."""

    def __init__(self, leaf: str, axis: int) -> None:
        super().__init__()
        self.leaf, self.axis = leaf, axis

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Drop ``idxs``."""
        return drop(layer, self.leaf, self.axis, idxs)

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """As :meth:`prune_out_channels`."""
        return self.prune_out_channels(layer, idxs)

    def get_out_channels(self, layer: nn.Module) -> int:
        """Size of the axis."""
        return int(getattr(layer, self.leaf).shape[self.axis])

    get_in_channels = get_out_channels


class NormPruner(tp.pruner.function.LayernormPruner):  # type: ignore[misc]
    """Torch-Pruning's, with the remaining weights in their order: 1.6 takes them as a set of Python gives them."""

    def prune_out_channels(self, layer: nn.LayerNorm, idxs: Sequence[int]) -> nn.LayerNorm:
        """Drop ``idxs`` of the last axis."""
        gone = set(idxs)
        keep = [i for i in range(layer.normalized_shape[-1]) if i not in gone]
        for leaf in ("weight", "bias"):
            if getattr(layer, leaf, None) is not None:
                setattr(layer, leaf, self._prune_parameter_and_grad(getattr(layer, leaf), keep, -1))
        layer.normalized_shape = (*layer.normalized_shape[:-1], len(keep))
        return layer

    prune_in_channels = prune_out_channels


NORM = NormPruner()


class NumberPruner(TensorPruner):
    """Lowers a number that a module keeps: an int, or one entry of a tuple or list of ints."""

    def __init__(self, leaf: str, entry: int | None) -> None:
        super().__init__(leaf, 0)
        self.entry = entry

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Take away as many as there are ``idxs``."""
        lower(layer, self.leaf, self.entry, len(idxs))
        return layer

    def get_out_channels(self, layer: nn.Module) -> int:
        """The number."""
        value = getattr(layer, self.leaf)
        return int(value if self.entry is None else value[self.entry])

    get_in_channels = get_out_channels


def number_axis(owner: str, leaf: str, entry: int | None, labels: Tensor, layout: Layout) -> Axis:
    """The axis of a number that a module keeps."""
    return Axis(owner, labels, layout.of(labels), NumberPruner(leaf, entry).prune_out_channels, is_output=False)


def axes_of(model: nn.Module, facts: Facts, layout: Layout) -> list[Axis]:
    """All axes of a model in the order of its modules, with Torch-Pruning's functions where they fit."""
    found: list[Axis] = []
    left = dict(facts.slots)

    def take(name: str, axis: int) -> Tensor | None:
        return left.pop((name, axis), None)

    for owner, module in model.named_modules():
        prefix = f"{owner}." if owner else ""
        weight = module._parameters.get("weight")
        if isinstance(module, (_ConvNd, nn.Linear)) and weight is not None:
            found += _layer_axes(owner, module, prefix, take, layout)
        elif isinstance(module, _BatchNorm) and (first := _first(facts, prefix, module)) is not None:
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                take(f"{prefix}{leaf}", 0)
            found.append(_axis(owner, first, layout, BOX[TYPES.BN].prune_out_channels))
        elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and weight is not None:
            slots = take(f"{prefix}weight", 0)
            take(f"{prefix}bias", 0)
            if slots is not None:
                found.append(_axis(owner, slots, layout, NORM.prune_out_channels))
        elif isinstance(module, nn.GroupNorm) and weight is not None:
            slots = take(f"{prefix}weight", 0)
            take(f"{prefix}bias", 0)
            if slots is not None:
                found.append(_axis(owner, slots, layout, BOX[TYPES.GN].prune_out_channels))
        elif isinstance(module, _InstanceNorm) and weight is not None and not module.track_running_stats:
            slots = take(f"{prefix}weight", 0)
            take(f"{prefix}bias", 0)
            if slots is not None:
                found.append(_axis(owner, slots, layout, BOX[TYPES.IN].prune_out_channels))
        elif isinstance(module, nn.Embedding) and weight is not None:
            slots = take(f"{prefix}weight", 1)
            if slots is not None:
                found.append(_axis(owner, slots, layout, BOX[TYPES.EMBED].prune_out_channels))
        elif isinstance(module, nn.PReLU) and (slots := take(f"{prefix}weight", 0)) is not None:
            found.append(_axis(owner, slots, layout, BOX[TYPES.PRELU].prune_out_channels))
        elif (matrix := matrix_of(facts, owner)) is not None:
            outs, ins = (take(f"{prefix}{matrix.leaf}", axis) for axis in (matrix.out, matrix.into))
            if outs is not None:
                found.append(_axis(owner, outs, layout, matrix.prune_out_channels, is_root=True))
            if ins is not None:
                found.append(_axis(owner, ins, layout, matrix.prune_in_channels, is_output=False))
        for name, axis in [key for key in left if key[0].rpartition(".")[0] == owner]:
            slots = left.pop((name, axis))
            pruner = TensorPruner(name.rpartition(".")[2], axis)
            found.append(_axis(owner, slots, layout, pruner.prune_out_channels))
    return found


def _axis(owner: str, labels: Tensor, layout: Layout, handler: Any, **kinds: bool) -> Axis:
    return Axis(owner, labels, layout.of(labels), handler, **kinds)


def _first(facts: Facts, prefix: str, module: nn.Module) -> Tensor | None:
    for leaf in ("weight", "running_mean"):
        if (slots := facts.slots.get((f"{prefix}{leaf}", 0))) is not None:
            return slots
    return None


def _layer_axes(owner: str, module: Any, prefix: str, take: Any, layout: Layout) -> list[Axis]:
    """Input and output channels of a convolution or Linear layer."""
    conv = isinstance(module, _ConvNd)
    transposed = conv and module.transposed
    groups = module.groups if conv else 1
    outs = take(f"{prefix}weight", int(transposed))
    ins = take(f"{prefix}weight", 1 - int(transposed))
    bias = take(f"{prefix}bias", 0)
    if conv:
        for axis in range(2, module.weight.dim()):
            take(f"{prefix}weight", axis)
        depthwise = groups > 1 and module.in_channels == groups
        if depthwise and transposed:
            outs, ins = ins, None
        if depthwise and module.out_channels == groups:
            box = BOX[TYPES.DEPTHWISE_CONV]
            return [] if outs is None else [_axis(owner, outs, layout, box.prune_out_channels, is_root=True)]
        if depthwise and outs is not None:  # several channels from each: Torch-Pruning keeps the number of groups
            lead = outs.view(groups, -1)[:, 0]
            made = [_axis(owner, outs, layout, TensorPruner("weight", 0).prune_out_channels, is_root=True)]
            if bias is not None:
                made.append(_axis(owner, bias, layout, TensorPruner("bias", 0).prune_out_channels))
            for leaf, labels in (("out_channels", outs), ("in_channels", lead), ("groups", lead)):
                made.append(number_axis(owner, leaf, None, labels, layout))
            return made
        box = BOX[TYPES.CONV]
    else:
        box = BOX[TYPES.LINEAR]
    made = []
    if outs is not None:
        made.append(_axis(owner, outs, layout, box.prune_out_channels, is_root=True))
    if ins is not None:
        ins = ins.repeat(groups) if groups > 1 else ins
        made.append(_axis(owner, ins, layout, box.prune_in_channels, is_output=False))
    return made
