"""What can be pruned of a model, before any pruning: groups, widths, MACs, reasons."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from .counter import count
from .structure import Forward, Structure, Transform, read_structure


@dataclass(frozen=True)
class InspectedGroup:
    """A group of channels that can lose some.

    Attributes:
        key: root layer and side.
        layers: names of the layers whose output channels it holds.
        readers: names of the layers whose input channels it holds.
        width: channels of its root.
        units: how many can go one by one.
        note: what was repaired of it.
        macs: of the layers that its channels enter or leave.
    """

    key: str
    layers: tuple[str, ...]
    readers: tuple[str, ...]
    width: int
    units: int
    note: str
    macs: int


@dataclass(frozen=True, eq=False)
class Inspection:
    """All groups of a model, in the order of its modules; why others are left whole, by key; its size."""

    model: nn.Module = field(repr=False)
    groups: tuple[InspectedGroup, ...]
    left_whole: Mapping[str, str]
    macs: int
    params: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without the model."""
        return {
            "model": type(self.model).__name__,
            "macs": self.macs,
            "params": self.params,
            "groups": [asdict(group) for group in self.groups],
            "left_whole": dict(self.left_whole),
        }


def inspect_model(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward_fn: Forward | None = None,
    output_transform: Transform | None = None,
    ignored_layers: Sequence[str] = (),
) -> Inspection:
    """What :func:`ippro_tp.prune` would act on; ``model`` is left as it is.

    Args:
        model: the model.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        forward_fn: ``(model, inputs) -> outputs``.
        output_transform: picks the outputs that matter.
        ignored_layers: names of modules that keep their outputs.

    Raises:
        StructureError: the model cannot be traced.
    """
    counts = count(model, example_inputs, forward_fn)
    copied = copy.deepcopy(model)
    structure = read_structure(
        copied,
        example_inputs,
        forward_fn=forward_fn,
        output_transform=output_transform,
        ignored=[copied.get_submodule(name) for name in ignored_layers],
    )
    place = {name: number for number, (name, _) in enumerate(model.named_modules())}
    groups = _groups(structure, counts.by_layer)
    groups.sort(key=lambda group: min(place[name] for name in group.layers))
    return Inspection(model, tuple(groups), structure.left_whole, counts.macs, counts.params)


def _groups(structure: Structure, macs: Mapping[str, int]) -> list[InspectedGroup]:
    found = []
    for key, prunable in structure.groups.items():
        layers, readers = (
            tuple(layer.name for layer in side) for side in (prunable.record.producers, prunable.record.consumers)
        )
        work = sum(n for name, n in macs.items() if any(_within(name, layer) for layer in {*layers, *readers}))
        found.append(
            InspectedGroup(key, layers, readers, prunable.record.width, prunable.units, prunable.note, work)
        )
    return found


def _within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")
