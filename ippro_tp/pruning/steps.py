"""What steps of pruning are asked for, and the record of what one did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..compensation.step import CompensationReport
from .latency import LatencyTable
from .measure import Unit
from .structure import Forward, Transform

Scope = Literal["global", "local"]


@dataclass(frozen=True)
class Options:
    """How the loop prunes; see :func:`ippro_tp.prune`.

    Attributes:
        layer_ratios: fraction of channels that goes, by regular expression: the first that is found in the name of
            a layer of a group decides for the group, whatever the target.
        table: predicts latencies, where they are the target.
        stairs: widths of groups that have room for it are multiples of this, where ``round_to`` says nothing.
    """

    unit: Unit
    target: float
    scope: Scope
    steps: int
    round_to: int
    max_pruning_ratio: float
    ignored: tuple[str, ...]
    example_inputs: Any
    forward_fn: Forward | None
    output_transform: Transform | None
    progress: bool
    layer_ratios: Mapping[str, float] = field(default_factory=dict)
    table: LatencyTable | None = None
    stairs: int = 0


@dataclass(frozen=True)
class GroupChange:
    """What a step did to one group.

    Attributes:
        key: root layer and side.
        layers: names of the layers whose output channels it holds.
        before, after: channels of the group.
        units: how many of them could go one by one.
        scores: one per unit; empty where there are none.
        removed: units that went.
        reason: why it was left whole; empty where it was not.
    """

    key: str
    layers: tuple[str, ...]
    before: int
    after: int
    units: int
    scores: tuple[float, ...] = ()
    removed: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class StepRecord:
    """One step: all groups, what was refitted, and the size it led to as a fraction of the unpruned model.

    Attributes:
        groups: in the order of the model's modules, those that are left whole too.
        refitted: what the compensation did; ``None`` without.
        left: in the unit of the target.
        tries: sizes that were measured, or predicted, to find the cut.
        predicted: latency that the table predicts, as a fraction; ``None`` where another target was given.
    """

    groups: tuple[GroupChange, ...]
    refitted: CompensationReport | None
    left: float
    tries: int
    predicted: float | None = None
