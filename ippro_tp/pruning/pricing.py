"""Scores of any importance made comparable over groups: by what a channel costs, by what its group has left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..calibration.batches import as_call
from ..calibration.work import measure_work
from ..estimators.ranking import Ranked, rank
from ..graph.cost import Unit, group_cost
from ..records import Work
from .structure import Structure


@dataclass(frozen=True)
class Pricing:
    """What :class:`~ippro_tp.PROImportance` does by itself, for importances that do not.

    Attributes:
        unit: that scores are divided by; ``None``: they are not.
        depletion: whether scores rise as their group is emptied.
        degree: 1 for scores that go as ``|t|``, 2 for those that go as ``t^2``.
    """

    unit: Unit | None
    depletion: bool
    degree: float

    def apply(self, scores: Mapping[str, Tensor], structure: Structure, example_inputs: Any) -> dict[str, Tensor]:
        """Scores of channels that can be compared over groups.

        Args:
            scores: ``(width,)`` of each group.
            structure: of the model.
            example_inputs: what its layers' MACs are counted on.

        Raises:
            ValueError: scores that are to be depleted are negative.
        """
        costs = dict.fromkeys(scores, 1.0) if self.unit is None else self._costs(scores, structure, example_inputs)
        groups = [Ranked(values, structure.groups[key].unit, cost=costs[key]) for key, values in scores.items()]
        ranked = rank(groups, degree=self.degree, kappa=0.0 if self.depletion else None)
        return dict(zip(scores, ranked, strict=True))

    def _costs(self, scores: Mapping[str, Tensor], structure: Structure, example_inputs: Any) -> dict[str, float]:
        """A group whose layers do nothing that is counted costs what its parameters are of all."""
        model = structure.model
        records = {key: structure.groups[key].record for key in scores}
        layers = {layer.name for r in records.values() for layer in (*r.producers, *r.consumers)}
        work = Work()
        if self.unit == "macs":
            args, kwargs = as_call(example_inputs)
            work = measure_work(model, args, kwargs, layers)
        found = {}
        for key, record in records.items():
            macs = group_cost(record, model, work) / max(work.total, 1) if self.unit == "macs" else 0.0
            found[key] = macs or _share_of_parameters(model, group_cost(record, model, work, "params"))
        return found


def _share_of_parameters(model: nn.Module, count: float) -> float:
    return max(count, 1.0) / max(sum(p.numel() for p in model.parameters()), 1)
