"""PROImportance: the projective offset as an importance criterion for every Torch-Pruning pruner."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..calibration.calibrated import Calibrated, LossFn
from ..calibration.gradients import GradientObservation, loss_scale_of
from ..calibration.losses import DefaultLoss, cross_entropy
from ..calibration.processes import rank
from ..errors import NotCalibratedError, ObservationError
from ..estimators.base import Estimator
from ..estimators.centered import MADE_UP, CenteredEstimator
from ..estimators.coupling import Coupling, Offsets, coupled_factors, offset_products
from ..estimators.depletion import depletion_factors
from ..estimators.expected import ExpectedEstimator
from ..estimators.paper import PaperEstimator
from ..graph.cost import CostFn, group_cost
from ..graph.units import raise_the_best, ranks_everything, units_of
from ..records import GroupRecord, Label, Site, Span, Wiring
from .report import GroupReport, Report

ESTIMATORS = ("expected", "paper")
REDUCTIONS = ("joint", "mean", "sum", "max", "prod", "first")
TARGETS = ("conv", "norm")
REFERENCES = ("auto", "origin", "mean")
LOSS_REDUCTIONS = ("mean", "sum")


class PROImportance(Calibrated, tp.importance.Importance):  # type: ignore[misc]
    r"""Importance of channels by the offset of their filters in projective space.

    Source: IPPRO, arXiv 2507.14171; the estimator ``"expected"`` is this package's.

    Args:
        estimator: ``"expected"``: mean over samples of :math:`|F\cdot\nabla_n|` (default).
            ``"paper"``: Eq. 4 on the accumulated gradient.
        step_size: :math:`\lambda` of Eq. 3, for ``"paper"`` only; 0 is the limit.
        group_reduction: ``"joint"`` (coupled filters are one point), or, over the scores of the coupled layers,
            ``"mean"``, ``"sum"``, ``"max"``, ``"prod"``, ``"first"``.
        normalizer: ``None``, or a name or callable of ``tp.importance.GroupMagnitudeImportance``. Scores of
            ``"expected"`` are comparable across layers without.
        target: for ``"paper"``: ``"conv"`` takes rows of convolutions as F, ``"norm"`` the (gamma, beta) of the
            norm that follows, as the paper does in ResNets.
        cost: divides the scores of a group by what one of its channels costs, so that a global ranking removes
            what costs much and matters little: ``"macs"``, ``"params"``, ``None``, or a callable ``(record, model)
            -> cost`` (a measured latency, say). ``"auto"``: ``"macs"`` for ``"expected"`` where the pruner that
            was calibrated ranks globally, else ``None``. Within a group it changes nothing.
        depletion: makes channels dearer as others of their group go. ``"log"``: the loss of a group grows with the
            logarithm of what is left of it (see :mod:`estimators.depletion`); ``"coupled"``: besides, channels
            that pull the same way cost more together, and those that make up for each other less, by a part of
            their covariance (see :mod:`estimators.coupling`), which is gathered then, up to 1,024 numbers a
            channel, and the order within a group changes; ``None``: each counts by itself. ``"auto"``: for
            ``"expected"``, where the pruner that was calibrated ranks globally and there is a ``cost``,
            ``"coupled"`` with ``group_reduction="joint"``, ``"log"`` with others; else ``None``.
        cost_exponent: power of the cost; ``None`` follows the quadratic model of the loss, ``power / 2``.
        power: for ``"expected"``: 1 for the mean of abs(t), 2 for the mean of t squared.
        reference: for ``"expected"`` with ``group_reduction="joint"``: what offsets are measured from.
            ``"origin"``: zero, which a removed channel is set to. ``"mean"``: the mean of what is read of the
            channel (see :mod:`estimators.centered`), as if all readers were compensated after the cut. ``"auto"``:
            near the mean where a BatchNorm follows the layer that reads the channel and takes its mean up when
            it is re-estimated or trained, zero elsewhere.
        seed: of the labels that ``calibrate`` draws when no loss is given; every rank draws its own.

    ``observe(target, loss_reduction="mean")`` and ``calibrate(..., loss_reduction="mean")`` take ``"sum"`` for a
    loss that is summed over the batch: per-sample gradients of ``"expected"`` then need no factor.
    ``"paper"`` takes the gradients as they come, as ``.grad`` would.

    ``observe(target, loss_scale=scaler)``, for a loop with ``scaler.scale(loss).backward()`` under fp16 autocast,
    takes the scale out again and leaves out batches that overflow; a number does for a scale of your own.
    Without it, a constant scale s multiplies all scores of ``"expected"`` by s to the power of ``power``, which
    changes no order, and acts on ``"paper"`` like a larger ``step_size``. Leave ``scaler.step`` out of the loop:
    there are no gradients for it.

    Without ``loss_fn``, ``calibrate`` differentiates noise on every output for ``"expected"``, which needs no
    labels: :class:`~ippro_tp.FisherNoise` on class scores, :class:`~ippro_tp.LogitNoise` on the rest, as
    ``report()`` says; and the cross-entropy with the labels for ``"paper"``.

    Raises:
        ValueError: an option is none of the above.

    Example:
        >>> import torch, torch_pruning as tp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3),
        ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5))
        >>> imp = PROImportance()
        >>> pruner = tp.pruner.BasePruner(model, torch.randn(1, 3, 8, 8), importance=imp, pruning_ratio=0.5,
        ...     ignored_layers=[model[5]])
        >>> _ = imp.calibrate(pruner, [torch.randn(4, 3, 8, 8)], progress=False)
        >>> pruner.step()
        >>> model[0].out_channels, model[2].out_channels
        (4, 2)
    """

    def __init__(
        self,
        estimator: str = "expected",
        step_size: float = 0.01,
        group_reduction: str = "joint",
        normalizer: str | Callable[[Tensor], Tensor] | None = None,
        target: str = "conv",
        power: int = 1,
        cost: str | CostFn | None = "auto",
        cost_exponent: float | None = None,
        seed: int = 0,
        reference: str = "auto",
        depletion: str | None = "auto",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("estimator", estimator, ESTIMATORS),
            ("group_reduction", group_reduction, REDUCTIONS),
            ("target", target, TARGETS),
            ("power", power, (1, 2)),
            ("reference", reference, REFERENCES),
            ("cost", cost if not callable(cost) else None, ("auto", "macs", "params", None)),
            ("depletion", depletion, ("auto", "coupled", "log", None)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}; choose one of {', '.join(map(repr, known))}")
        if not step_size >= 0:
            raise ValueError(f"step_size={step_size!r}; it must not be negative")
        if reference == "mean" and (estimator, group_reduction) != ("expected", "joint"):
            raise ValueError(
                'reference="mean" goes with estimator="expected" and group_reduction="joint": what a channel does '
                "is told from the layers that read it, not from single producers"
            )
        if depletion in ("log", "coupled") and estimator != "expected":
            raise ValueError(
                f'depletion="{depletion}" goes with estimator="expected": the scores of Eq. 4 have a sign'
            )
        if depletion == "coupled" and group_reduction != "joint":
            raise ValueError('depletion="coupled" goes with group_reduction="joint"')
        self.reference = reference
        self.estimator, self.step_size, self.target = estimator, float(step_size), target
        self.group_reduction, self.normalizer = group_reduction, normalizer
        self.power, self.seed = power, seed
        self.cost, self.depletion = cost, depletion
        self.cost_exponent = power / 2 if cost_exponent is None else cost_exponent
        self._positions: dict[str, int] = {}
        self._unscored: dict[str, str] = {}
        self._pruner: weakref.ref[Any] | None = None
        self._raised_at: tuple[int, dict[str, Tensor]] = (-1, {})  # the pruner's step, other scores for it
        self._costs: dict[str, float] | None = None
        self._normalize = tp.importance.GroupMagnitudeImportance(normalizer=normalizer)._normalize
        self._wiring = Wiring()

    # -- scores ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, group: Any, **_: Any) -> Tensor | None:
        """Scores of a group's channels.

        Args:
            group: a ``torch_pruning`` group, full or partial.
            **_: ignored; older versions of Torch-Pruning pass more.

        Returns:
            ``(len(group[0].idxs),)`` float32 on the device of the group's layers, finite, higher = keep; ``None``
            only where the group has no producer, or where Torch-Pruning would prune something else than it says:
            channels of one layer are tied to positions of another, or a layer reads them through its weight alone,
            ``F.linear(x, self.qkv.weight)``, and would not be cut. ``calibrate`` warns, ``report()`` shows which.

        Raises:
            NotCalibratedError: there are no statistics for this group.
            StaleStatisticsError: the model has been pruned since calibration.
        """
        found = self._lookup(group)
        if found is None:
            return None
        record, positions = found
        if record.key in self._unscored:
            return None
        model: nn.Module = group._DG.model
        picked = self._comparable(record, group._DG, positions)
        if (raised := self._raised(group._DG).get(record.key)) is not None:
            picked = raised[positions.to(raised.device)]
        device = next(iter(model.get_submodule(record.producers[0].name).parameters()), picked).device
        picked = picked.to(device)
        # A normaliser divides by zero where all scores of a group are zero; there, all are equally unimportant.
        return picked.float().nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max)

    def _group_scores(self, record: GroupRecord, model: nn.Module) -> Tensor:
        assert self._sums is not None
        key = record.key
        if self.estimator == "paper" or key not in self._cache:  # Eq. 4 reads the weights, which may be training
            scores = self._make_estimator().scores(
                self._sums, record.joined, self._wiring, self.group_reduction, model
            )
            self._cache[key] = (scores if record.tied is None else scores[record.tied.to(scores.device)]).float()
        return self._cache[key]

    def _comparable(self, record: GroupRecord, graph: Any, positions: Tensor | None = None) -> Tensor:
        """What a ranking over several groups compares, of all channels of a group or some: the same order."""
        scores = self._depleted(record, graph)
        scores = scores if positions is None else scores[positions.to(scores.device)]
        compared: Tensor = self._normalize(scores, self.normalizer)
        return compared / self._relative_cost(record, graph.model)

    @property
    def _couples(self) -> bool:
        """Whether calibration gathers how channels go together."""
        possible = (self.estimator, self.group_reduction) == ("expected", "joint")
        return possible and self.depletion in ("auto", "coupled")

    def _depleted(self, record: GroupRecord, graph: Any) -> Tensor:
        how = self.depletion
        if how == "auto":
            ranks = self.estimator == "expected" and self._ranks_globally and self.cost is not None
            how = ("coupled" if self._couples else "log") if ranks else None
        if how is None:
            return self._group_scores(record, graph.model)
        pruner = self._pruner_of(graph)
        kind = f"#{how}{'#pruner' * (pruner is not None)}"
        if record.key + kind not in self._cache:
            groups = list(self._records.values()) if how == "coupled" else [record]
            scores = [self._group_scores(r, graph.model) for r in groups]
            units = [units_of(pruner, graph, r) for r in groups]
            if how == "coupled":
                found = zip(scores, map(self._coupling, groups), units, strict=True)
                factors = coupled_factors([Offsets(*one) for one in found], self.power)
            else:
                factors = [depletion_factors(scores[0], self.power, units[0])]
            for r, own, factor in zip(groups, scores, factors, strict=True):
                self._cache[r.key + kind] = (own * factor).float()
        return self._cache[record.key + kind]

    def _coupling(self, record: GroupRecord) -> Coupling:
        assert self._sums is not None
        coupling = self._expected().coupling(self._sums, record)
        if coupling is None and record.key in self._sums:
            raise NotCalibratedError(
                f"depletion={self.depletion!r} was chosen after calibration: calibrate again."
            )
        # A group that was never called has no offsets, and no score but zero.
        return coupling or Coupling(offset_products(torch.zeros(1, record.width)))

    def coupling(self, group: Any) -> Coupling | None:
        """How the offsets of a group's channels go together.

        ``None`` where it was not gathered (see ``depletion``), or the group was never called.

        Raises:
            NotCalibratedError, StaleStatisticsError: as for scores.
        """
        found = self._lookup(group)
        if found is None or self._sums is None:
            return None
        return self._expected().coupling(self._sums, found[0])

    def _pruner_of(self, graph: Any) -> Any | None:
        """The pruner that was calibrated, if it is the one whose graph asks."""
        pruner = self._pruner() if self._pruner is not None else None
        return pruner if pruner is not None and pruner.DG is graph else None

    def _raised(self, graph: Any) -> dict[str, Tensor]:
        """Other scores for the groups that the pruner's present global step would leave whole."""
        pruner = self._pruner_of(graph)
        if pruner is None or not ranks_everything(pruner):
            return {}
        if self._raised_at[0] != pruner.current_step:
            known = {key: r for key, r in self._records.items() if r.producers and key not in self._unscored}
            scores = {key: self._comparable(record, graph).cpu() for key, record in known.items()}
            self._raised_at = pruner.current_step, raise_the_best(pruner, known, scores)
        return self._raised_at[1]

    def _asked_by(self, target: Any) -> None:
        self._pruner = weakref.ref(target) if hasattr(target, "per_step_pruning_ratio") else None
        self._raised_at = (-1, {})
        self._cache = {}  # which channels are one unit is for the pruner to say

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pruner": None}

    def _relative_cost(self, record: GroupRecord, model: nn.Module) -> float:
        """Cost of one of the group's channels to the power of ``cost_exponent``, relative to the mean group."""
        cost = self.cost
        if cost == "auto":
            cost = "macs" if self.estimator == "expected" and self._ranks_globally else None
        if cost is None:
            return 1.0
        if self._costs is None:
            if callable(cost):
                self._costs = {key: float(cost(r, model)) for key, r in self._records.items()}
            else:
                self._costs = {
                    key: group_cost(r, model, self._positions, cost) for key, r in self._records.items()
                }
        mean = sum(self._costs.values()) / len(self._costs)
        if not self._costs[record.key] > 0:
            raise ValueError(
                f"a channel of group {record.key!r} costs {self._costs[record.key]}; cost must be positive."
            )
        return float((self._costs[record.key] / mean) ** self.cost_exponent)

    def report(self) -> Report:
        """Per group: producers, where sigma was found, score range, ties and dead channels.

        ``low``, ``median`` and ``high`` are as the estimator gives them; ``ranked_low`` and ``ranked_high`` are
        what a ranking over groups compares, after ``depletion``, ``normalizer`` and ``cost``. These two and the
        cost are told as long as the pruner that was calibrated exists, and its model is unpruned.

        Raises:
            NotCalibratedError: there are no statistics; or, for ``"paper"``, the calibrated model is gone.
            ValueError: ``cost`` gives a group a cost that is not positive.
        """
        if self._sums is None:
            raise NotCalibratedError(self._how_to_calibrate())
        model = self._model() if self._model is not None else None
        if model is None and self.estimator == "paper":
            raise NotCalibratedError("the calibrated model is gone; Eq. 4 needs its weights to give a report.")
        estimator = self._make_estimator()
        pruner = self._pruner() if self._pruner is not None else None
        if pruner is not None and self._replaced(pruner.model, self._records.values()):
            pruner = None
        rows = []
        for record in self._records.values():
            scores = self._group_scores(record, model if model is not None else nn.Module())
            layers = estimator.layers(record, self._wiring)
            sites = {p.name: self._wiring.site_of(p.name) for p in layers if p.name in self._wiring.seen}
            unseen = tuple(p.name for p in record.producers if p.name not in self._wiring.seen)
            why = self._unscored.get(record.key)
            notes = [] if why is None else [f"not scored: {why}"]
            notes += ["measured at its readers"] if record.key in self._wiring.centered else []
            ranked, cost = None, 1.0
            if pruner is not None and record.producers and why is None:
                ranked, cost = self._comparable(record, pruner.DG), self._relative_cost(record, pruner.model)
            rows.append(GroupReport.of(record, scores, sites, unseen, tuple(notes), ranked, cost))
        return Report(tuple(rows), self._notes)

    # -- calibration -------------------------------------------------------------------------------------------

    def _make_estimator(self, loss_reduction: str = "mean", model: nn.Module | None = None) -> Estimator:
        """The estimator; to make scores of sums it needs no model."""
        if loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"loss_reduction={loss_reduction!r}; choose one of 'mean', 'sum'")
        if self.estimator == "paper":
            return PaperEstimator(self.step_size, self.target)
        return self._expected(loss_reduction, model)

    def _expected(self, loss_reduction: str = "mean", model: nn.Module | None = None) -> ExpectedEstimator:
        def scale(batch: int) -> float:
            return float(batch) if loss_reduction == "mean" else 1.0

        if self.group_reduction != "joint" or self.reference == "origin":
            return ExpectedEstimator(self.power, self.group_reduction == "joint", scale, self._couples)
        if self.reference == "mean":
            return CenteredEstimator(self.power, scale, self._couples, lambda norm: 1.0)
        modules = () if model is None else model.named_modules()
        norms = {name for name, module in modules if isinstance(module, _BatchNorm)}
        if model is not None and not norms:
            return ExpectedEstimator(self.power, True, scale, self._couples)
        return CenteredEstimator(self.power, scale, self._couples, lambda norm: MADE_UP * (norm in norms))

    def _observation(
        self,
        model: nn.Module,
        groups: Callable[[tuple[Any, ...], dict[str, Any]], Iterable[GroupRecord]],
        loss_reduction: str = "mean",
        loss_scale: Any = None,
        **options: Any,
    ) -> GradientObservation:
        if options:
            raise TypeError(
                f"unknown option {next(iter(options))!r}; observe() takes loss_reduction and loss_scale"
            )
        estimator = self._make_estimator(loss_reduction, model)
        return GradientObservation(model, groups, estimator, loss_scale_of(loss_scale))

    def _commit(self, observation: GradientObservation) -> None:
        counts = ("samples", "read/", "rows/")  # not made of gradients
        if not any(v.count_nonzero() for name, v in observation.sums.items() if not name.startswith(counts)):
            raise ObservationError(
                "all gradients are exactly zero, so nothing can be ranked: the prediction is saturated (a softmax "
                "of huge logits), the loss does not depend on the output, or they vanish in float16. Give "
                "calibrate() another loss_fn, LogitNoise() for example; under fp16 autocast use bf16, or a "
                "GradScaler that observe(..., loss_scale=scaler) is told of."
            )
        self._wiring = observation.wiring
        self._positions = observation.positions
        self._unscored = observation.unscored
        self._costs = None
        if self._unscored:
            group, why = next(iter(self._unscored.items()))
            warnings.warn(
                f"{len(self._unscored)} groups get no score and will not be pruned. {group!r}: {why}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _default_loss(self) -> LossFn:
        return cross_entropy if self.estimator == "paper" else DefaultLoss(seed=self.seed + 1_000_003 * rank())

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"class": type(self).__name__, "estimator": self.estimator}
        if self.estimator == "paper":
            return {**settings, "target": self.target}
        settings |= {"power": self.power, "joint": self.group_reduction == "joint"}
        settings = {**settings, "coupled": True} if self._couples else settings
        return {**settings, "reference": self.reference} if settings["joint"] else settings

    def _extra_state(self) -> dict[str, Any]:
        sites = [
            {
                "name": site.name,
                "axis": site.label.axis,
                "spans": [[s.layer, s.start, s.count, s.at, s.repeat] for s in site.label.spans],
            }
            for site in self._wiring.sites
        ]
        extra = {"positions": dict(self._positions), "unscored": dict(self._unscored)}
        return {**extra, "sites": sites, "norm_of": dict(self._wiring.norm_of), **self._wiring.names}

    def _load_extra_state(self, extra: Any) -> None:
        sites = tuple(
            Site(site["name"], Label(site["axis"], tuple(Span(*span) for span in site["spans"])))
            for site in extra["sites"]
        )
        self._positions, self._costs = dict(extra["positions"]), None
        self._unscored = dict(extra["unscored"])
        self._wiring = Wiring(
            sites, dict(extra["norm_of"]), frozenset(extra["seen"]), frozenset(extra["centered"])
        )
