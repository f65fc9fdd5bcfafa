"""PROImportance: the projective offset as an importance criterion for every Torch-Pruning pruner."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..calibration.calibrated import Calibrated, LossFn
from ..calibration.gradients import GradientObservation, loss_scale_of
from ..calibration.losses import DefaultLoss, cross_entropy
from ..calibration.processes import rank
from ..calibration.work import measure_work
from ..errors import NotCalibratedError, ObservationError
from ..estimators.coupling import Coupling
from ..graph.cost import CostFn
from ..graph.groups import group_key
from ..graph.steps import Asked, keep_the_best, ranks_everything
from ..graph.units import units_of
from ..records import GroupRecord, Work
from ..tracing.arguments import arrangements
from . import options as choice
from .binding import Bound
from .estimators import estimator_of
from .observed import Observed
from .options import Option, Options
from .report import GroupReport, Report
from .scoring import Scoring


class PROImportance(Bound, Calibrated, tp.importance.Importance):  # type: ignore[misc]
    r"""Importance of channels by the offset of their filters in projective space.

    Source: IPPRO, arXiv 2507.14171; the estimator ``"expected"`` is this package's own.

    Scores depend on the statistics, the options and the pruner that asks for them, and on nothing else: a copy, a
    reloaded state, a second pruner, and a calibration with the pruner, its graph or the model all prune the same
    channels. What matters of the pruner is its units (heads, convolution groups) and, for ``"auto"``, whether it
    ranks globally. During its ``step()`` the pruner is found automatically; otherwise it is the one that was bound
    (:meth:`bind`), or one like the pruner that was calibrated. In a global step no group loses more than the
    pruner's ``max_pruning_ratio``, even if all of it ranks lowest.

    Args:
        estimator: ``"expected"`` (default): mean over samples of :math:`|F\cdot\nabla_n|`. ``"paper"``: Eq. 4 on
            the accumulated gradient. Or a name given to :func:`ippro_tp.register_estimator`.
        step_size: for ``"paper"`` only: :math:`\lambda` of Eq. 3, by default 0.01; 0 is the limit.
        group_reduction: ``"joint"``: coupled filters are one point. Otherwise how the scores of coupled layers are
            combined: ``"mean"``, ``"sum"``, ``"max"``, ``"prod"``, ``"first"``.
        normalizer: ``None``, or a name or callable as in ``tp.importance.GroupMagnitudeImportance``. Scores of
            ``"expected"`` are comparable across layers without one.
        target: for ``"paper"`` only: ``"conv"`` (default) takes the rows of convolutions as F, ``"norm"`` the
            (gamma, beta) of the norm that follows, as the paper does in ResNets.
        power: for ``"expected"`` only: 1 (default) for the mean of abs(t), 2 for the mean of t squared.
        cost: scores of a group are divided by the cost of one of its channels, so that a global ranking removes
            channels that are expensive and matter little: ``"macs"``, ``"params"``, ``None``, or a callable
            ``(record, model) -> cost``, for a measured latency say. MACs are counted by
            ``torch.utils.flop_counter``; groups without any fall back to parameters, see :meth:`report`.
            ``"auto"``: ``"macs"`` for ``"expected"`` if the pruner ranks globally, else ``None``. The order within
            a group does not depend on it.
        cost_exponent: power of the cost; ``None``: ``power / 2``, from the quadratic model of the loss.
        seed: for ``"expected"`` only: seed of the noise that ``calibrate`` draws if no loss is given; every rank
            draws its own.
        reference: for ``"expected"`` with ``group_reduction="joint"`` only: where offsets are measured from.
            ``"origin"``: zero, the value of a removed channel. ``"mean"``: the mean of the channel where it is
            read (see :mod:`estimators.centered`), as if all consumers were compensated afterwards. ``"auto"``
            (default): close to the mean if a BatchNorm follows the consumer, which absorbs the mean when it is
            re-estimated or trained; zero otherwise.
        depletion: raises the scores of channels as others of their group are removed (see
            :mod:`estimators.ranking`). ``"log"``: the loss of a group grows with the logarithm of what remains.
            ``"coupled"``: in addition, channels with similar effects cost more together and channels that offset
            each other cost less, by a fraction of their covariance, which changes the order within a group and is
            gathered during calibration (up to 1,024 numbers per channel). ``None``: each channel counts by itself.
            ``"auto"``: for ``"expected"`` with a ``cost``, if the pruner ranks globally, ``"coupled"``
            (``"log"`` without ``group_reduction="joint"``); else ``None``.

    ``PROImportance(cost=None, depletion=None)`` returns the estimator's scores unchanged.

    Options may be changed after calibration; a change of ``estimator``, ``target``, ``power``, ``reference``,
    ``group_reduction`` or to ``depletion="coupled"`` requires a new calibration.

    ``observe`` and ``calibrate`` take ``loss_reduction="sum"`` for a loss that is summed over the batch instead of
    averaged, so that ``"expected"`` scales per-sample gradients correctly. ``"paper"`` uses gradients as they are.

    ``observe(pruner, loss_scale=scaler)`` is for loops with ``scaler.scale(loss).backward()`` under fp16 autocast:
    gradients are unscaled, and batches that overflow are skipped. A number stands for a constant scale. Without
    it, a constant scale s multiplies the scores of ``"expected"`` by ``s ** power``, which changes no order, and
    acts on ``"paper"`` like a larger ``step_size``. Leave ``scaler.step`` out of the loop: there are no gradients.

    Without ``loss_fn``, ``calibrate`` needs no labels for ``"expected"``: it differentiates
    :class:`~ippro_tp.FisherNoise` on class scores and :class:`~ippro_tp.LogitNoise` on other outputs, as
    ``report()`` says. For ``"paper"`` it takes the cross-entropy with the labels.

    Raises:
        ValueError: an option is unknown, or does not go with another option or the estimator.

    Example:
        >>> import torch, torch_pruning as tp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3),
        ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5))
        >>> imp = PROImportance()
        >>> pruner = tp.pruner.BasePruner(model, torch.randn(1, 3, 8, 8), importance=imp, pruning_ratio=0.5,
        ...     ignored_layers=[model[5]])
        >>> imp.calibrate(pruner, [torch.randn(4, 3, 8, 8)], progress=False)
        PROImportance(): 4 samples, 2 groups
        >>> pruner.step()
        >>> model[0].out_channels, model[2].out_channels
        (4, 2)
    """

    estimator = Option()
    step_size = Option()
    group_reduction = Option()
    normalizer = Option()
    target = Option()
    power = Option()
    cost = Option()
    cost_exponent = Option()
    seed = Option()
    reference = Option()
    depletion = Option()

    def __init__(
        self,
        estimator: choice.EstimatorName | str = "expected",
        *,
        step_size: float | None = None,
        group_reduction: choice.Reduction = "joint",
        normalizer: str | choice.Normalizer | None = None,
        target: choice.FilterKind | None = None,
        power: choice.Power | None = None,
        cost: choice.Cost | CostFn | None = "auto",
        cost_exponent: float | None = None,
        seed: int | None = None,
        reference: choice.Reference | None = None,
        depletion: choice.Depletion | None = "auto",
    ) -> None:
        super().__init__()
        self._options = Options(
            estimator, step_size, group_reduction, normalizer, target, power, cost, cost_exponent, seed, reference,
            depletion,
        )  # fmt: skip
        self._observed = Observed()

    def __repr__(self) -> str:
        """Options that differ from the defaults, and what was gathered."""
        if self._sums is None:
            return f"PROImportance({self._options}): not calibrated"
        samples = f"{int(self._sums['samples'])} samples, " if "samples" in self._sums else ""
        return f"PROImportance({self._options}): {samples}{len(self._records)} groups"

    def _choose(self, **options: Any) -> None:
        self._options = replace(self._options, **options)
        self._cache = {}

    # -- scores ------------------------------------------------------------------------------------------------

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
            None if found is None or self.estimator != "expected" else self._scoring(group._DG).coupling(found[0])
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
        raise NotCalibratedError(f"{said}={getattr(self, said)!r} was chosen after calibration: calibrate again.")

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
        if model is None and self.estimator == "paper":
            raise NotCalibratedError("the calibrated model is gone; Eq. 4 needs its weights for a report.")
        pruner = self._pruner() if self._pruner is not None else None
        if pruner is not None and self._replaced(pruner.model, self._records.values()):
            pruner = None
        estimator, wiring = estimator_of(self._options), self._observed.wiring
        rows = []
        for record in self._records.values():
            scores = self._scoring().alone(record, model if model is not None else nn.Module())
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

    # -- calibration -------------------------------------------------------------------------------------------

    def _observation(
        self,
        model: nn.Module,
        groups: Callable[[tuple[Any, ...], dict[str, Any]], Iterable[GroupRecord]],
        loss_reduction: choice.LossReduction = "mean",
        loss_scale: Any = None,
        **options: Any,
    ) -> GradientObservation:
        if options:
            raise TypeError(
                f"unknown option {next(iter(options))!r}; observe() takes loss_reduction and loss_scale"
            )

        def counted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[GroupRecord]:
            records = list(groups(args, kwargs))
            observation.work = _work(model, args, kwargs, records)
            return records

        estimator = estimator_of(self._options, loss_reduction, model)
        observation = GradientObservation(model, counted, estimator, loss_scale_of(loss_scale))
        return observation

    def _commit(self, observation: GradientObservation) -> None:
        counts = ("samples", "read/", "rows/")  # not made of gradients
        if not any(v.count_nonzero() for name, v in observation.sums.items() if not name.startswith(counts)):
            raise ObservationError(
                "all gradients are exactly zero, so nothing can be ranked: the prediction is saturated (a softmax "
                "of huge logits), the last layer holds zeros, the loss does not depend on the output, or they "
                "vanish in float16. Give "
                "calibrate() another loss_fn, LogitNoise() for example; under fp16 autocast use bf16, or a "
                "GradScaler, passed as observe(..., loss_scale=scaler)."
            )
        gathered = self._options.of_statistics
        self._observed = Observed(observation.wiring, observation.work, observation.unscored, options=gathered)
        if observation.unscored:
            group, why = next(iter(observation.unscored.items()))
            warnings.warn(
                f"{len(observation.unscored)} groups get no score and will not be pruned. {group!r}: {why}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _asked_by(self, target: Any) -> None:
        pruner = target if isinstance(target, tp.pruner.BasePruner) else None
        self.bind(pruner)
        known = getattr(target, "units", {})
        if pruner is not None:
            known = {record.key: units_of(pruner, pruner.DG, record) for record in self._records.values()}
        units = {key: unit for key, unit in known.items() if unit is not None and int(unit.max()) + 1 < len(unit)}
        globally = bool(getattr(target, "global_pruning", False))
        self._observed = replace(self._observed, units=units, globally=globally)

    def _default_loss(self) -> LossFn:
        return cross_entropy if self.estimator == "paper" else DefaultLoss(seed=self.seed + 1_000_003 * rank())

    # -- what is kept ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all statistics, and the pruner."""
        super().reset()
        self._pruner, self._observed = None, Observed()

    def _settings(self) -> dict[str, Any]:
        return {"class": type(self).__name__, **self._options.of_statistics}

    def _extra_state(self) -> Any:
        return self._observed.pack()

    def _load_extra_state(self, extra: Any) -> None:
        self._observed = replace(Observed.unpack(extra), options=self._options.of_statistics)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pruner": None, "_cache": {}}


def _work(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], records: Iterable[GroupRecord]
) -> Work | None:
    """MACs of the model's layers, from one sample of a batch; ``None`` where it does not run a second time."""
    layers = {layer.name for r in records for layer in (*r.producers, *r.consumers, *r.others)}
    for some, named in (arrangements(args, kwargs)[0].first(1), (args, kwargs)):
        try:
            return measure_work(model, some, named, layers)
        except Exception:  # of the model's own: what it says to fewer samples is no matter here
            continue
    return None
