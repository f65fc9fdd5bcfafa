"""From the statistics of a calibration to the scores that a pruner asks for, and the report on them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotCalibratedError
from ..estimators.coupling import Coupling
from ..graph.groups import group_key
from ..graph.steps import Asked, keep_the_best, ranks_everything
from ..graph.units import units_of
from ..records import GroupRecord
from .binding import Bound
from .estimators import estimator_of
from .observed import Observed
from .options import Options
from .report import GroupReport, Report
from .scoring import Scoring


class Scored(Bound):
    """Scores of groups as the pruner that asks ranks them.

    What a pruner compares is made of the estimator's scores, its own units and whether it ranks globally.
    """

    _options: Options
    _observed: Observed

    @torch.no_grad()
    def __call__(self, group: Any, **_: Any) -> Tensor | None:
        """Scores of a group's channels.

        Args:
            group: a ``torch_pruning`` group, full or partial.
            **_: ignored; older versions of Torch-Pruning pass more arguments.

        Returns:
            ``(len(group[0].idxs),)`` float32 on the device of the group's layers, finite; higher = keep. ``None``
            only if the group has no producer, or if Torch-Pruning would prune it wrongly: channels of one layer
            are tied to positions of another, or a layer is only read through its weight,
            ``F.linear(x, self.qkv.weight)``. ``calibrate`` warns about such groups and ``report()`` lists them.

        Raises:
            NotCalibratedError: there are no statistics for this group, or for the current options.
            StaleStatisticsError: the model was pruned after calibration, or is a different model.
        """
        found = self._lookup(group)
        if found is None or found[0].key in self._observed.unscored:
            return None
        record, positions = found
        graph = group._DG
        pruner = self._pruner_of(graph)
        picked = self._ranked(record, graph)
        picked = picked[positions.to(picked.device)]
        if pruner is not None and ranks_everything(pruner) and pruner.current_step > 0:
            raised = self._kept(pruner).get(group_key(group))
            picked = raised if raised is not None and raised.shape == picked.shape else picked
        device = next(iter(graph.model.get_submodule(record.producers[0].name).parameters()), picked).device
        # A normaliser divides by zero where all scores of a group are zero; there, all are equally unimportant.
        return picked.to(device).float().nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max)

    def coupling(self, group: Any) -> Coupling | None:
        """Second moments of the offsets of a group's channels.

        ``None`` if they were not gathered (see ``depletion``), or the group was never called.

        Raises:
            NotCalibratedError, StaleStatisticsError: as for scores.
        """
        found = self._lookup(group)
        return (
            None
            if found is None or self._options.estimator != "expected"
            else self._scoring(group._DG).coupling(found[0])
        )

    @property
    def unscored(self) -> dict[str, str]:
        """Groups without a score, with the reason."""
        return dict(self._observed.unscored)

    def _group_scores(self, record: GroupRecord, model: nn.Module) -> Tensor:
        """``(width,)`` scores as the estimator gives them, before cost and depletion."""
        return self._scoring().alone(record, model)

    def _scoring(self, graph: Any | None = None) -> Scoring:
        """The one cache of scores, as the pruner of ``graph`` ranks; whatever changes them empties it."""
        pruner = None if graph is None else self._pruner_of(graph)
        globally = self._observed.globally if pruner is None else bool(pruner.global_pruning)
        name = "global" if globally else "local"
        if name not in self._cache:
            assert self._sums is not None
            self._check_options()
            self._cache[name] = Scoring(self._options, self._sums, self._records, self._observed, globally)
        scoring: Scoring = self._cache[name]
        return scoring

    def _check_options(self) -> None:
        """Raise NotCalibratedError where statistics were gathered for other options."""
        wanted, gathered = self._options.of_statistics, self._observed.options
        changed = [name for name in wanted if wanted[name] != gathered.get(name)]
        if not changed:
            return
        said = {"joint": "group_reduction", "coupled": "depletion"}.get(changed[0], changed[0])
        raise NotCalibratedError(
            f"{said}={getattr(self._options, said)!r} was chosen after calibration: calibrate again."
        )

    def _ranked(self, record: GroupRecord, graph: Any) -> Tensor:
        """``(width,)`` scores of a full group that a ranking over groups compares."""
        return self._scoring(graph).ranked(record, graph.model, partial(self._unit_of, graph))

    def _unit_of(self, graph: Any, record: GroupRecord) -> Tensor | None:
        pruner = self._pruner_of(graph)
        if pruner is None and record.key in self._observed.units:
            return self._observed.units[record.key]
        return units_of(pruner, graph, record)

    def _kept(self, pruner: Any) -> dict[str, Tensor]:
        """Other scores for the present step of a pruner that ranks all groups against each other."""

        def ask(group: Any) -> Asked | None:
            found = self._lookup(group)
            if found is None or found[0].key in self._observed.unscored:
                return None
            record, positions = found
            tied = None if record.tied is None else record.tied[positions].unique(return_inverse=True)[1]
            return Asked(group_key(group), self._ranked(record, pruner.DG).cpu()[positions], tied)

        scoring = self._scoring(pruner.DG)
        if scoring.raised[0] != pruner.current_step:
            scoring.raised = pruner.current_step, keep_the_best(pruner, ask)
        return scoring.raised[1]

    def _rebound(self) -> None:
        self._cache = {}  # which channels are one unit is for the pruner to say

    def report(self) -> Report:
        """Per group: producers, where sigma was found, score range, ties, dead channels and cost.

        ``low``, ``median`` and ``high`` are the estimator's scores; ``ranked_low`` and ``ranked_high`` are what a
        global ranking compares, after ``depletion``, ``normalizer`` and ``cost``. These two and the cost are known
        as long as the calibrated pruner exists and its model is unpruned.

        Raises:
            NotCalibratedError: there are no statistics; or, for ``"paper"``, the calibrated model is gone.
            ValueError: ``cost`` returns a cost that is not positive.
        """
        if self._sums is None:
            raise NotCalibratedError(self._how_to_calibrate())
        model = self._model() if self._model is not None else None
        if model is None and self._options.estimator == "paper":
            raise NotCalibratedError("the calibrated model is gone; Eq. 4 needs its weights for a report.")
        pruner = self._pruner() if self._pruner is not None else None
        if pruner is not None and self._replaced(pruner.model, self._records.values()):
            pruner = None
        estimator, wiring = estimator_of(self._options), self._observed.wiring
        rows = []
        for record in self._records.values():
            scores = self._group_scores(record, model if model is not None else nn.Module())
            layers = estimator.layers(record, wiring)
            sites = {p.name: wiring.site_of(p.name) for p in layers if p.name in wiring.seen}
            unseen = tuple(p.name for p in record.producers if p.name not in wiring.seen)
            why = self._observed.unscored.get(record.key)
            notes = [] if why is None else [f"not scored: {why}"]
            notes += ["measured at its readers"] if record.key in wiring.centered else []
            ranked, cost = None, 1.0
            if pruner is not None and record.producers and why is None:
                ranked = self._ranked(record, pruner.DG)
                cost, fallback = self._scoring(pruner.DG).divisor(record, pruner.model)
                notes += [] if fallback is None else [fallback]
            rows.append(GroupReport.of(record, scores, sites, unseen, tuple(notes), ranked, cost))
        return Report(tuple(rows), self._notes)
