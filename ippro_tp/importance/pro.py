"""PROImportance: the projective offset as an importance criterion for every Torch-Pruning pruner."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch_pruning as tp
from torch import nn

from ..calibration.calibrated import LossFn
from ..calibration.gradients import GradientObservation, loss_scale_of
from ..calibration.losses import DefaultLoss, cross_entropy
from ..calibration.processes import rank
from ..calibration.work import measure_work
from ..errors import ObservationError
from ..graph.cost import CostFn
from ..graph.units import units_of
from ..records import GroupRecord, Work
from ..tracing.arguments import arrangements
from . import options as choice
from .estimators import estimator_of
from .observed import Observed
from .options import Option, Options
from .scored import Scored


class PROImportance(Scored, tp.importance.Importance):  # type: ignore[misc]
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
        cost_exponent: power of the cost; ``None``: ``power / 2``, from the quadratic model of the loss, or, with
            ``compensated=True``, ``0.6 * power``, which was found by experiment.
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
        compensated: whether :class:`ippro_tp.Compensation` will refit the network after pruning. ``True``: a
            channel counts by what the remaining channels of its group do not predict of it where it is read (see
            :mod:`estimators.redundancy`), instead of by the covariance of offsets. This requires
            ``depletion="auto"`` or ``"coupled"``, changes the order within a group, and is gathered during
            calibration (up to 3,072 numbers per channel). ``"auto"`` (default): decided by :func:`ippro_tp.prune`;
            ``False`` elsewhere.

    ``PROImportance(cost=None, depletion=None)`` returns the estimator's scores unchanged.

    Options may be changed after calibration; a change of ``estimator``, ``target``, ``power``, ``reference``,
    ``group_reduction``, ``compensated`` or to ``depletion="coupled"`` requires a new calibration.

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
    compensated = Option()

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
        compensated: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self._options = Options(
            estimator, step_size, group_reduction, normalizer, target, power, cost, cost_exponent, seed, reference,
            depletion, compensated,
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
        counts = ("samples", "read/", "rows/", "moments/")  # not made of gradients
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

    def _expect(self, compensated: bool) -> None:
        if self._options.compensated == "auto":
            self._choose(compensated=compensated and self._options.may_be_compensated)

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
        self._observed = Observed()

    def _settings(self) -> dict[str, Any]:
        return {"class": type(self).__name__, **self._options.of_statistics}

    def _extra_state(self) -> Any:
        return self._observed.pack()

    def _load_extra_state(self, extra: Any) -> None:
        self._observed = replace(Observed.unpack(extra), options=self._options.of_statistics)


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
