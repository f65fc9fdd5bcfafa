"""Compensation: fold what kept channels know about removed ones into the layers that read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .calibration import Calibrated, LossFn
from .consumer import Consumer, UnfitError, norm_after
from .errors import NotCalibratedError, StaleStatisticsError
from .groups import GroupRecord, graph_of
from .leastsquares import fold, output_power
from .moments import MomentObservation, moments_of, tap_means


@dataclass(frozen=True)
class ConsumerReport:
    """What :meth:`Compensation.step` did to one layer.

    Attributes:
        name: dotted module name.
        kept, removed: numbers of input channels.
        lost: share of the layer's output power (second moment; where moments are those of
            channels, taps are taken as uncorrelated) that came from the
            removed channels: what is missing without compensation.
        left: share that is still missing after it, on held-out samples; NaN where nothing could be held out.
        method: ``"patch"``, ``"channel"``, ``"mean"`` or ``"none"``; see :class:`ippro_tp.leastsquares.Fold`.
        ridge: the ridge used, as a multiple of the kept inputs' mean variance; NaN where there is none.
        constant: where the mean went: ``"bias"``, ``"norm"`` (the BatchNorm that follows) or ``""``.
        skipped: why the layer was left as Torch-Pruning left it; empty if it was not.
    """

    name: str
    kept: int
    removed: int
    lost: float = float("nan")
    left: float = float("nan")
    method: str = "none"
    ridge: float = float("nan")
    constant: str = ""
    skipped: str = ""

    def __str__(self) -> str:
        head = f"{self.name}: {self.removed} of {self.kept + self.removed} inputs removed"
        if self.skipped:
            return f"{head}; not compensated: {self.skipped}"
        how = self.method if self.ridge != self.ridge else f"{self.method}, ridge {self.ridge:.0e}"
        return f"{head}; missing power {self.lost:.2%} -> {self.left:.2%} ({how})"


@dataclass(frozen=True)
class CompensationReport:
    """One :class:`ConsumerReport` per layer that lost input channels."""

    rows: tuple[ConsumerReport, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows)) or "no layer lost input channels"


class Compensation(Calibrated):
    r"""Training-free compensation: removed channels are predicted from the kept ones, inside the next layer.

    For every layer that reads pruned channels, :math:`W_k \leftarrow W_k + W_r A` with
    :math:`A = C_{rk} (C_{kk} + \rho s I)^{-1}` from the second moments of its inputs over a calibration set
    (see :mod:`ippro_tp.leastsquares`); the mean that is left goes into its bias, or into the running mean of the
    BatchNorm that alone reads its output. Labels and gradients are not needed. Convolutions of any stride,
    padding, dilation and grouping, transposed convolutions and Linear layers, also after flattening or
    concatenation and in residual streams, are covered. Layers of other kinds (``nn.MultiheadAttention``'s own
    projection, LSTM, weights that are parametrized) are left as Torch-Pruning leaves them. Where a LayerNorm
    stands before the layer, what it does is taken as unchanged, although it averages over fewer channels.

    All removals of one :meth:`step` are solved jointly, against the statistics of the unpruned model, so that
    the order of the groups does not matter. After a step the statistics are stale: calibrate again before the
    next one.

    Args:
        ridge: :math:`\rho`, a multiple of the kept channels' mean variance s. ``None``: chosen for each layer by
            two-fold cross-validation over the calibration samples, with "no compensation" among the candidates.
        max_features: a convolution (or Linear layer after flattening) with at most so many channels times taps,
            per group, may predict each tap from the whole patch; beyond, and for transposed convolutions, all
            taps share one prediction between channels. Costs max_features squared times 16 bytes per layer at
            most; 0 for channels only.

    Raises:
        ValueError: ``ridge`` or ``max_features`` is negative or not finite.

    Example:
        >>> import torch, torch_pruning as tp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> pruner = tp.pruner.BasePruner(model, torch.randn(1, 4), tp.importance.RandomImportance(),
        ...     pruning_ratio=0.5, ignored_layers=[model[2]])
        >>> comp = Compensation().calibrate(pruner, [torch.randn(32, 4)], progress=False)
        >>> report = comp.step(pruner)
        >>> report.rows[0].name, report.rows[0].kept, report.rows[0].removed
        ('2', 4, 4)
    """

    needs_gradients = False

    def __init__(self, ridge: float | None = None, max_features: int = 1152) -> None:
        super().__init__()
        if ridge is not None and not 0 <= ridge < float("inf"):
            raise ValueError(f"ridge={ridge!r}; give a number >= 0, or None to choose it by cross-validation")
        if not 0 <= max_features < float("inf"):
            raise ValueError(f"max_features={max_features!r}; give a number >= 0")
        self.ridge, self.max_features = ridge, int(max_features)
        self._spans: dict[str, int] = {}

    def calibrate(  # type: ignore[override]  # there is no loss
        self,
        target: Any,
        loader: Iterable[Any],
        max_samples: int | None = None,
        progress: bool = True,
        **options: Any,
    ) -> Compensation:
        """Run forward passes over ``loader`` in eval mode; see :meth:`Calibrated.calibrate`."""
        return super().calibrate(target, loader, None, max_samples, progress, **options)

    @torch.no_grad()
    def step(self, pruner: Any) -> CompensationReport:
        """``pruner.step()``, with every layer that loses input channels compensated.

        Args:
            pruner: a ``torch_pruning`` pruner on the calibrated model or on a copy of it.

        Returns:
            What was done to each layer.

        Raises:
            NotCalibratedError: there are no statistics.
            StaleStatisticsError: the model has been pruned since calibration, or is another one.
            TypeError: ``pruner`` is no pruner.
        """
        graph = graph_of(pruner)
        if graph is None or not hasattr(pruner, "step"):
            raise TypeError(f"expected a torch_pruning pruner, got {type(pruner).__name__}")
        if self._sums is None:
            raise NotCalibratedError(self._how_to_calibrate())
        self._check_model(graph.model)
        layers = {
            module: Consumer(name, module, norm_after(graph, module))
            for module, name in graph._module2name.items()
            if isinstance(module, (_ConvNd, nn.Linear))
        }
        for group in pruner.step(interactive=True):
            for dep, idxs in group:
                consumer = layers.get(dep.target.module) if idxs else None
                if consumer is not None:
                    consumer.remove(idxs, graph.is_out_channel_pruning_fn(dep.handler))
            group.prune()
        return CompensationReport(tuple(self._compensate(c) for c in layers.values() if c.removed_inputs))

    def _compensate(self, consumer: Consumer) -> ConsumerReport:
        assert self._sums is not None
        name, removed = consumer.name, consumer.removed_inputs
        kept = len(consumer.inputs)

        def skip(reason: str) -> ConsumerReport:
            return ConsumerReport(name, kept, removed, skipped=reason)

        if f"second/{name}" not in self._sums:
            return skip("its input was not seen during calibration")
        span = self._spans[name]
        device = consumer.module.weight.device
        try:
            plan = consumer.plan(span)
        except UnfitError as reason:
            return skip(str(reason))
        halves = moments_of(self._sums, name, device)
        margin = min(1.0, float(self._sums["samples"]) ** -0.5)
        result = fold(plan.weight, halves, plan.kept, plan.removed, consumer.constant != "", self.ridge, margin)
        power = output_power(plan.weight, halves[0] + halves[1])
        share = 1 / power if power > 0 else 0.0
        if result.method != "none":
            shift = None
            if consumer.constant:
                groups, _, channels, taps = plan.weight.shape
                means = tap_means(self._sums, name, (groups, channels, taps), device)
                kept_means = torch.stack([m[k] for m, k in zip(means, plan.kept, strict=True)])
                shift = _mean_output(plan.weight, means) - _mean_output(result.weight, kept_means)
            consumer.write(result.weight, shift)
        return ConsumerReport(
            name,
            kept // span,
            removed // span,
            result.lost * share,
            max(result.left, 0.0) * share if result.left == result.left else result.left,
            result.method,
            result.ridge,
            consumer.constant if result.method != "none" else "",
        )

    def _check_model(self, model: nn.Module) -> None:
        """Raise StaleStatisticsError unless ``model`` still has the layers and widths of the calibration."""
        modules = dict(model.named_modules())
        for record in self._records.values():
            for layer, side in [(x, 0) for x in record.producers] + [(x, 1) for x in record.consumers]:
                now = _width(modules.get(layer.name), side)
                if now is not None and now != layer.channels:
                    raise StaleStatisticsError(
                        f"{layer.name!r} has {now or 'no'} channels but had {layer.channels} during calibration: "
                        "the model has been pruned since, or is another one. Calibrate again before each step."
                    )
            if record.producers:
                self._check_weights(model, record)

    # -- calibration -------------------------------------------------------------------------------------------

    def _observation(
        self,
        model: nn.Module,
        groups: Callable[[tuple[Any, ...], dict[str, Any]], Iterable[GroupRecord]],
        **options: Any,
    ) -> MomentObservation:
        if options:
            raise TypeError(f"unknown option {next(iter(options))!r}; observe() takes none")
        return MomentObservation(model, groups, self.max_features)

    def _commit(self, observation: MomentObservation) -> None:
        self._spans = dict(observation.spans)

    def _default_loss(self) -> LossFn:
        return _no_loss

    def _run(self, model: nn.Module, inputs: Any, targets: Any, loss_fn: LossFn) -> None:
        super()._run(model, inputs, None, loss_fn)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "max_features": self.max_features}

    def _extra_state(self) -> dict[str, int]:
        return dict(self._spans)

    def _load_extra_state(self, extra: Mapping[str, int]) -> None:
        self._spans = dict(extra)

    def reset(self) -> None:
        """Forget all statistics."""
        super().reset()
        self._spans = {}

    def _how_to_calibrate(self) -> str:
        return (
            "Compensation has no statistics yet. Before compensation.step(pruner), run\n"
            "    compensation.calibrate(pruner, loader)\n"
            "or, around your own loop,\n"
            "    with compensation.observe(pruner):\n"
            "        for images, _ in loader:\n"
            "            model(images)"
        )


def _no_loss(outputs: Any, targets: Any) -> Tensor:
    raise AssertionError("compensation computes no loss")


def _mean_output(weight: Tensor, means: Tensor) -> Tensor:
    """``(groups, outputs)`` of ``(groups, outputs, channels, taps)`` and ``(groups, channels, taps)``."""
    return torch.einsum("goct,gct->go", weight, means)


def _width(module: nn.Module | None, side: int) -> int | None:
    """Output (0) or input (1) channels of a layer: 0 if there is none, None if it does not say."""
    if module is None:
        return 0
    names = (
        ("out_channels", "out_features", "num_features", "num_channels")
        if side == 0
        else ("in_channels", "in_features")
    )
    return next((int(getattr(module, n)) for n in names if isinstance(getattr(module, n, None), int)), None)
