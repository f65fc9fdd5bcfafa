"""How the sizes of a model's operations and parameters follow the widths of its groups: measured, unit by unit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...errors import StructureError
from ..cut import Cut
from ..order import GOLDEN
from ..structure import Forward, Structure
from .operations import Operation, record

Row = tuple[tuple[str, int], ...]
"""What a size loses with one unit of each group: ``(group, count)`` pairs."""


@dataclass(frozen=True)
class Gauge:
    """Where the width of a group can be read off a model.

    Attributes:
        parameter: dotted name.
        dim: of the parameter.
        size: before anything was pruned.
        per_unit: what the dimension loses with one unit.
        units: of the group.
        width: channels of the group.
        layers: whose outputs they are.
    """

    parameter: str
    dim: int
    size: int
    per_unit: int
    units: int
    width: int
    layers: tuple[str, ...]

    def gone(self, model: nn.Module) -> int:
        """Units that ``model`` has lost."""
        return (self.size - model.get_parameter(self.parameter).shape[self.dim]) // self.per_unit


@dataclass(frozen=True)
class Variable:
    """Sizes of an operation that change together.

    Attributes:
        slots: ``(place in the sizes, what it loses at a time)``.
        full: the largest of these sizes, at full width.
        step: what that one loses at a time.
        row: how many times, with one unit of each group.
    """

    slots: tuple[tuple[int, int], ...]
    full: int
    step: int
    row: Row


@dataclass(frozen=True)
class Varying:
    """An operation and how its sizes change."""

    operation: Operation
    variables: tuple[Variable, ...]

    def widths(self, gone: Mapping[str, int]) -> tuple[int, ...]:
        """Of the variables, where the groups have lost so many units."""
        return tuple(
            max(v.full - v.step * sum(count * gone.get(key, 0) for key, count in v.row), 1) for v in self.variables
        )

    def sizes(self, widths: tuple[int, ...]) -> list[int]:
        """All sizes where each variable's largest one is so wide."""
        sizes = list(self.operation.sizes)
        for variable, width in zip(self.variables, widths, strict=True):
            times = (variable.full - width) // variable.step
            for slot, lost in variable.slots:
                sizes[slot] = max(sizes[slot] - lost * times, 1)
        return sizes


@dataclass(frozen=True)
class Reach:
    """What pruning can change.

    Attributes:
        operations: of a forward pass, all of them.
        gauges: by group.
    """

    operations: tuple[Varying, ...]
    gauges: Mapping[str, Gauge]


def reach(structure: Structure, example_inputs: Any, forward_fn: Forward | None = None) -> Reach:
    """Take units out of the groups and see which sizes change with which group.

    Passes run on the meta device, without values, where the model can; else as they are.

    Raises:
        StructureError: a model that is cut runs other operations.
    """
    base = record(structure.model, example_inputs, forward_fn)
    model, inputs, whole = _without_values(structure.model, example_inputs, base, forward_fn)
    trial = _Trial(structure, model, inputs, forward_fn, whole)
    rows = _decoded(trial, list(structure.groups))
    ends = [0]
    for op in base:
        ends.append(ends[-1] + len(op.sizes))
    operations = tuple(
        Varying(op, _variables(op, rows[start:stop]))
        for op, start, stop in zip(base, ends[:-1], ends[1:], strict=True)
    )
    return Reach(operations, _gauges(structure, trial.parameters, rows[ends[-1] :]))


@dataclass(frozen=True)
class _Trial:
    """A model that is cut and run to see its sizes."""

    structure: Structure
    model: nn.Module
    inputs: Any
    forward_fn: Forward | None
    whole: list[Operation]

    @property
    def parameters(self) -> list[tuple[str, int, int]]:
        """``(name, dimension, size)`` of all dimensions of parameters."""
        return [(name, dim, n) for name, p in self.model.named_parameters() for dim, n in enumerate(p.shape)]

    def lost(self, groups: Iterable[str]) -> Tensor:
        """What all sizes of operations, then those of parameters, lose with a unit of each of these groups."""
        structure = self.structure
        cut_model = copy.deepcopy(self.model)
        Cut(structure, {key: structure.groups[key].unit == 0 for key in groups}).apply(cut_model)
        ran = record(cut_model, self.inputs, self.forward_fn)
        if [op.name for op in ran] != [op.name for op in self.whole]:
            raise StructureError(f"without a unit of {', '.join(groups)}, the model runs other operations")
        before = [n for op in self.whole for n in op.sizes] + [n for _, _, n in self.parameters]
        after = [n for op in ran for n in op.sizes] + [n for p in cut_model.parameters() for n in p.shape]
        return torch.tensor(before) - torch.tensor(after)


def _decoded(trial: _Trial, groups: list[str]) -> list[Row]:
    """The row of each size, from few trials: the groups cut in trial b are those with bit b in their number.

    A size that loses all or nothing of what it can lose in each trial follows the one group of that number, for
    sizes only shrink; where a size follows several groups, these are tried one by one.
    """
    everything = trial.lost(groups)
    bits = max(len(groups) - 1, 1).bit_length()
    coded = torch.stack([trial.lost([g for n, g in enumerate(groups) if n >> bit & 1]) for bit in range(bits)])
    pure = ((coded == 0) | (coded == everything)).all(0) & (everything > 0)
    number = ((coded != 0) * (2 ** torch.arange(bits))[:, None]).sum(0)
    mixed = ~pure & ((everything != 0) | (coded != 0).any(0))
    rows: list[Row] = [
        ((groups[n], total),) if one else ()
        for n, total, one in zip(number.tolist(), everything.tolist(), pure.tolist(), strict=True)
    ]
    if mixed.any():
        single = {group: trial.lost([group]).tolist() for group in groups}
        for at in mixed.nonzero().flatten().tolist():
            rows[at] = tuple((group, lost[at]) for group, lost in single.items() if lost[at])
    return rows


def _without_values(
    model: nn.Module, inputs: Any, base: list[Operation], forward_fn: Forward | None
) -> tuple[nn.Module, Any, list[Operation]]:
    """The model and its inputs on the meta device, if the same operations run there."""
    try:
        light = copy.deepcopy(model).to("meta")
        light_inputs = tree_map_only(Tensor, lambda t: t.to("meta"), inputs)
        ran = record(light, light_inputs, forward_fn)
        if [(op.name, op.sizes) for op in ran] == [(op.name, op.sizes) for op in base]:
            return light, light_inputs, ran
    except Exception:  # values are asked for, or tensors are made elsewhere
        pass
    return model, inputs, base


def _variables(operation: Operation, rows: Sequence[Row]) -> tuple[Variable, ...]:
    """Sizes whose losses are proportional change together."""
    together: dict[Row, list[tuple[int, int]]] = {}
    for slot, row in enumerate(rows):
        if row:
            common = math.gcd(*(count for _, count in row)) * (1 if row[0][1] > 0 else -1)
            together.setdefault(tuple((key, count // common) for key, count in row), []).append((slot, common))
    variables = []
    for row, slots in together.items():
        principal, lost = max(slots, key=lambda item: operation.sizes[item[0]])
        variables.append(Variable(tuple(slots), operation.sizes[principal], abs(lost), row))
    return tuple(variables)


def _gauges(
    structure: Structure, parameters: Sequence[tuple[str, int, int]], rows: Sequence[Row]
) -> dict[str, Gauge]:
    found: dict[str, tuple[int, str, int, int]] = {}
    for (name, dim, size), row in zip(parameters, rows, strict=True):
        if len(row) == 1 and row[0][1] > 0:
            key, lost = row[0]
            found[key] = min(found.get(key, (lost, name, dim, size)), (lost, name, dim, size), key=lambda g: g[0])
    gauges = {}
    for key, prunable in structure.groups.items():
        if key not in found:
            raise StructureError(f"no parameter's size tells the width of {key!r} alone")
        lost, name, dim, size = found[key]
        layers = tuple(layer.name for layer in prunable.record.producers)
        gauges[key] = Gauge(name, dim, size, lost, prunable.units, prunable.record.width, layers)
    return gauges


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters lie."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def cuts_to_measure(units: Mapping[str, int]) -> list[dict[str, int]]:
    """Units gone in models to be measured as a whole: none; about half, multiples of 16 staying; uneven parts."""
    half = {key: n - max(n // 32 * 16 if n >= 32 else n // 2, 1) for key, n in units.items()}
    uneven = {key: int(n * (0.1 + 0.6 * ((place * GOLDEN) % 1))) for place, (key, n) in enumerate(units.items())}
    return [{}, half, uneven]


def cut_copy(structure: Structure, gone: Mapping[str, int]) -> nn.Module:
    """A copy of the structure's model in eval mode without so many units of each group."""
    model = copy.deepcopy(structure.model).eval()
    masks = {key: structure.groups[key].unit < count for key, count in gone.items() if count}
    Cut(structure, masks).apply(model)
    return model
