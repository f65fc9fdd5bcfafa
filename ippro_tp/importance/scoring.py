"""Scores of groups as functions of statistics and options, computed once: alone, and in a global ranking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..errors import NotCalibratedError
from ..estimators.coupling import Coupling, offset_products
from ..estimators.ranking import COUPLING, Ranked, rank
from ..estimators.redundancy import Redundancy
from ..estimators.sums import Sums
from ..graph.cost import group_cost
from ..records import GroupRecord, Work
from .estimators import estimator_of, expected_estimator
from .observed import Observed
from .options import Options

BY_PARAMETERS = "cost by parameters: no operation of its layers is counted"
UNCOUNTED = "cost by parameters: the forward pass could not be counted"


class Scoring:
    """Scores of the groups of one calibration under fixed options; if either changes, make a new object.

    Args:
        options: of the importance.
        sums: what was gathered.
        records: the groups.
        observed: what else the calibration showed.
        globally: whether groups are ranked against each other.
    """

    def __init__(
        self,
        options: Options,
        sums: Sums,
        records: Mapping[str, GroupRecord],
        observed: Observed,
        globally: bool,
    ) -> None:
        self._options = options.ranked(globally)
        self._sums, self._records, self._observed = sums, records, observed
        self._alone: dict[str, Tensor] = {}
        self._ranked: dict[str, Tensor] = {}
        self._costs: dict[str, tuple[float, str | None]] = {}
        self.raised: tuple[int, dict[str, Tensor]] = (-1, {})
        """The step of a pruner, and other scores for it."""

    def alone(self, record: GroupRecord, model: nn.Module) -> Tensor:
        """``(width,)`` scores as the estimator gives them, of each channel by itself."""
        if self._options.estimator == "paper":  # Eq. 4 reads the weights, which may be training
            return self._score(record, model)
        if record.key not in self._alone:
            self._alone[record.key] = self._score(record, model)
        return self._alone[record.key]

    def ranked(
        self, record: GroupRecord, model: nn.Module, unit_of: Callable[[GroupRecord], Tensor | None]
    ) -> Tensor:
        """``(width,)`` scores that a ranking over groups compares: with depletion, normalizer and cost.

        Args:
            record: the group.
            model: gives weights and parameters.
            unit_of: the unit of each channel of a group.
        """
        if self._options.estimator == "paper":
            return self._rank([record], model, unit_of)[0]
        if record.key not in self._ranked:
            # All at once is faster where channels are coupled.
            groups = list(self._records.values()) if self._options.depletion == "coupled" else [record]
            groups = [g for g in groups if g.producers]
            self._ranked |= zip((g.key for g in groups), self._rank(groups, model, unit_of), strict=True)
        return self._ranked[record.key]

    def cost(self, record: GroupRecord, model: nn.Module) -> tuple[float, str | None]:
        """The cost of one of the group's channels as a fraction of the model's, and a note if it is a fallback."""
        if record.key not in self._costs:
            self._costs[record.key] = self._cost(record, model)
        return self._costs[record.key]

    def divisor(self, record: GroupRecord, model: nn.Module) -> tuple[float, str | None]:
        """The divisor of the group's scores, and a note if the cost is a fallback."""
        cost, note = self.cost(record, model)
        return float(cost ** self._options.in_force["cost_exponent"]), note

    def coupling(self, record: GroupRecord) -> Coupling | None:
        """How the offsets of the group's channels go together; ``None`` if it was not gathered."""
        return expected_estimator(self._options).coupling(self._sums, record)

    def _score(self, record: GroupRecord, model: nn.Module) -> Tensor:
        estimator = estimator_of(self._options)
        wiring, reduction = self._observed.wiring, self._options.group_reduction
        scores = estimator.scores(self._sums, record.joined, wiring, reduction, model)
        return (scores if record.tied is None else scores[record.tied.to(scores.device)]).float()

    def _rank(
        self, records: list[GroupRecord], model: nn.Module, unit_of: Callable[[GroupRecord], Tensor | None]
    ) -> list[Tensor]:
        options, values = self._options, self._options.in_force
        how = options.depletion
        groups = []
        for record in records:
            scores, unit = self.alone(record, model), unit_of(record)
            pairs = redundancy = None
            if options.refitted:
                redundancy = self._redundancy(record)
                if unit is None and record.tied is not None:
                    unit = record.tied.unique(return_inverse=True)[1]
            elif how == "coupled":
                pairs = self._pairs(record, scores)
            groups.append(Ranked(scores, unit, pairs, self.cost(record, model)[0], redundancy))
        kappa = {"coupled": COUPLING, "log": 0.0, None: None}[how]
        return rank(
            groups,
            degree=values["power"],
            kappa=kappa,
            cost_exponent=values["cost_exponent"],
            normalize=None if options.normalizer is None else self._normalize,
        )

    def _redundancy(self, record: GroupRecord) -> Redundancy | None:
        estimator = expected_estimator(self._options)
        return estimator.redundancy(self._sums, record.joined, record.key in self._observed.wiring.centered)

    def _pairs(self, record: GroupRecord, scores: Tensor) -> Coupling:
        found = self.coupling(record)
        if found is None and record.key in self._sums:
            raise NotCalibratedError(
                f"depletion={self._options.depletion!r} was chosen after calibration: calibrate again."
            )
        # A group that was never called has no offsets, and no score but zero.
        return found or Coupling(offset_products(torch.zeros(1, record.width, device=scores.device)))

    def _normalize(self, scores: Tensor) -> Tensor:
        normalizer: Any = self._options.normalizer
        found: Tensor = tp.importance.GroupMagnitudeImportance(normalizer=normalizer)._normalize(
            scores, normalizer
        )
        return found

    def _cost(self, record: GroupRecord, model: nn.Module) -> tuple[float, str | None]:
        how, work = self._options.cost, self._observed.work
        if how is None:
            return 1.0, None
        if callable(how):
            cost = float(how(record, model))
            if not cost > 0:
                raise ValueError(f"a channel of group {record.key!r} costs {cost}; cost must be positive.")
            return cost, None
        note = None
        if how == "macs":
            cost = 0.0 if work is None else group_cost(record, model, work) / max(work.total, 1)
            if cost > 0:
                return cost, None
            note = UNCOUNTED if work is None else BY_PARAMETERS
        total = sum(p.numel() for p in model.parameters())
        return max(group_cost(record, model, work or Work(), "params"), 1.0) / max(total, 1), note
