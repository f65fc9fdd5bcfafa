"""What of a model can be pruned: groups of coupled channels, their units, and the groups that are left whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StructureError
from ..graph.dependency import ROOTS, GraphError, RepairedGraph, build_graph, retie
from ..graph.groups import read_group
from ..graph.onepass import call as forward
from ..graph.onepass import tensors_in
from ..graph.proof import prove
from ..records import GroupRecord

Forward = Callable[[nn.Module, Any], Any]
Transform = Callable[[Any], Any]

__all__ = ["Forward", "Prunable", "Structure", "Transform", "forward", "read_structure", "retie", "tensors_in"]


@dataclass(frozen=True, eq=False)
class Prunable:
    """A group of channels that can lose some.

    Attributes:
        group: of the dependency graph, over all channels that can go.
        record: the same as index tensors.
        unit: ``(width,)`` int64, the unit that each position goes with: positions of one unit go together.
        units: how many there are.
        note: what was repaired to make it right; empty if nothing had to be.
        multiple: the units that stay have to be a multiple of this.
    """

    group: Any
    record: GroupRecord
    unit: Tensor
    units: int
    note: str = ""
    multiple: int = 1

    def indispensable(self, scores: Tensor) -> Tensor:
        """Units that have to stay, so that no layer is emptied: the best of each that only some pass through.

        Args:
            scores: ``(units,)``.
        """
        record = self.record
        found = set()
        for layer in (*record.producers, *record.consumers, *record.others):
            units = self.unit[layer.root].unique()
            if len(units) < self.units and len(layer.index.unique()) == layer.channels:
                found.add(int(units[scores[units].argmax()]))
        return torch.tensor(sorted(found), dtype=torch.long)


@dataclass(frozen=True, eq=False)
class Structure:
    """A traced model: what an importance is calibrated with, and what is cut.

    Attributes:
        graph: the dependency graph.
        groups: by key, in the order of the model.
        left_whole: reason by key, for groups that keep all of their channels.
        global_pruning: whether scores of different groups are compared.
        ignored_layers: always empty: the graph offers no group that is left whole.
    """

    graph: RepairedGraph
    groups: Mapping[str, Prunable]
    left_whole: Mapping[str, str]
    global_pruning: bool = True
    ignored_layers: list[nn.Module] = field(default_factory=list)
    root_module_types: tuple[Any, ...] = ROOTS

    @property
    def DG(self) -> RepairedGraph:  # Torch-Pruning's name
        """The dependency graph, by the name that importances look for on a pruner."""
        return self.graph

    @property
    def group_records(self) -> tuple[GroupRecord, ...]:
        """Of the groups that can be pruned."""
        return tuple(prunable.record for prunable in self.groups.values())

    @property
    def model(self) -> nn.Module:
        """The traced model."""
        model: nn.Module = self.graph.model
        return model


def read_structure(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward_fn: Forward | None = None,
    output_transform: Transform | None = None,
    ignored: Iterable[nn.Module] = (),
    global_pruning: bool = True,
) -> Structure:
    """Trace ``model``, find what can be pruned, and prove it on copies.

    Args:
        model: on whose modules the structure will act; left as it is found.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        forward_fn: ``(model, example_inputs) -> outputs``, instead of a plain call.
        output_transform: picks the outputs that matter.
        ignored: layers, or modules all of whose layers, keep their output channels.
        global_pruning: see :class:`Structure`.

    Raises:
        StructureError: the model cannot be traced.
    """
    try:
        graph = build_graph(
            model,
            example_inputs,
            forward_fn=forward_fn,
            output_transform=output_transform,
            ignored_layers=list(ignored),
        )
        verdicts = prove(graph)
    except GraphError as error:
        raise StructureError(str(error)) from error
    groups: dict[str, Prunable] = {}
    for group in graph.get_all_groups():
        record = read_group(group)
        unit = torch.unique(group.unit, return_inverse=True)[1]
        verdict = verdicts.get(record.key)
        note = verdict.reason if verdict is not None and verdict.status == "repaired" else ""
        multiple = 1 if verdict is None else verdict.multiple
        groups[record.key] = Prunable(group, record, unit, int(unit.max()) + 1, note, multiple)
    return Structure(graph, groups, dict(graph.left_whole), global_pruning)
