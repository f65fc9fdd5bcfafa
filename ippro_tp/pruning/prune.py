"""``prune()``: from a model and a target to a smaller model, in one call."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..calibration.subject import resolve
from ..compensation.recovery import Recovery
from ..compensation.step import Compensation
from ..errors import StructureError
from ..importance.pro import PROImportance
from .arguments import check, check_tools, names_of, one_target
from .latency import LatencyTable
from .loop import Loop
from .measure import Meter, Unit
from .pricing import Pricing
from .recovering import recovered
from .result import PruneResult
from .scoring import Importance, LossFn, Scorer
from .steps import Options, Scope
from .structure import Forward, Transform


def prune(
    model: nn.Module,
    example_inputs: Any,
    loader: Iterable[Any],
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    ratio: float | None = None,
    importance: Importance | None = None,
    compensation: bool | Compensation = True,
    recover: bool | Recovery = False,
    scope: Scope = "global",
    steps: int = 1,
    ignored_layers: Sequence[nn.Module | str] | None = None,
    round_to: int | None = None,
    max_pruning_ratio: float = 0.9,
    forward_fn: Forward | None = None,
    output_transform: Transform | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    progress: bool = True,
    latency_table: LatencyTable | None = None,
) -> PruneResult:
    """Prune a copy of a model to a target size and refit it, without training.

    The layers that produce the model's outputs keep their width, all heads of an attention layer keep the same
    size, and groups that cannot be pruned safely are left whole and listed in the result. ``model``, the
    importance, the compensation and torch's random state are not changed, even if an exception is raised.

    Args:
        model: any model that Torch-Pruning can trace.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments; usually a batch
            of one. MACs and latency are measured on them.
        loader: calibration data: an iterable of ``(inputs, targets)`` batches or of inputs alone. A few hundred
            samples are enough; the default importance needs no labels.
        macs: target: the fraction of multiply-accumulates to keep, met within 0.01. Give exactly one target.
        params: target: the fraction of parameters to keep, met within 0.01.
        latency: target: the fraction of the time of a forward pass on ``example_inputs`` to keep, on the model's
            device and with torch's current number of threads. The search uses the predictions of a
            :class:`~ippro_tp.LatencyTable`, corrected by end-to-end measurements, and ends within 5 % of the
            target. Unless ``importance`` or ``round_to`` is given, channels are ranked by loss per second saved,
            and widths follow the steps in which kernels get faster.
        ratio: target: the fraction of channels to remove.
        importance: an importance of Torch-Pruning or of this package, not yet calibrated; those that read
            ``.grad`` get a backward pass. ``None``: :class:`~ippro_tp.PROImportance`.
        compensation: refit the remaining layers after pruning; pass a :class:`~ippro_tp.Compensation` to change
            its settings.
        recover: then distil the unpruned model into the pruned one on the same samples, without labels, which
            takes minutes; pass a :class:`~ippro_tp.Recovery` to change its settings.
        scope: ``"global"``: channels of all layers are ranked together. ``"local"``: every layer loses the same
            fraction.
        steps: number of pruning steps on the way to the target, each with its own calibration.
        ignored_layers: modules of ``model``, or their names, that keep their output channels, in addition to the
            layers that produce the model's outputs.
        round_to: make widths multiples of this.
        max_pruning_ratio: the largest fraction of its channels that a layer may lose, over all steps.
        forward_fn: ``(model, inputs) -> outputs``, if ``model(inputs)`` is not how the model is called.
        output_transform: selects the outputs that matter, for tracing and for the loss.
        loss_fn: ``(outputs, targets) -> scalar``, averaged over the batch, for the importance.
        seed: of all random numbers; the same seed removes the same channels (except for ``latency``).
        progress: show progress bars if tqdm is installed.
        latency_table: measured earlier on this model; ``None``: measured now, which takes about a minute, if
            ``latency`` is the target.

    Returns:
        The pruned model and its measured size.

    Raises:
        ValueError: an argument is out of range, or not exactly one target is given.
        TargetError: the target cannot be met; ``nearest`` holds the nearest value that can.
        StructureError: the model cannot be copied or traced.
        LatencyTableError: ``latency_table`` was measured on another machine or model.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        >>> x = torch.randn(32, 4)
        >>> result = prune(model, x[:1], [x], macs=0.5, progress=False)
        >>> result.model[0].out_features, round(result.macs, 2)
        (32, 0.5)
    """
    return prune_layers(
        model,
        example_inputs,
        loader,
        {},
        {"macs": macs, "params": params, "latency": latency, "ratio": ratio},
        importance=importance,
        compensation=compensation,
        recover=recover,
        scope=scope,
        steps=steps,
        ignored_layers=ignored_layers,
        round_to=round_to,
        max_pruning_ratio=max_pruning_ratio,
        forward_fn=forward_fn,
        output_transform=output_transform,
        loss_fn=loss_fn,
        seed=seed,
        progress=progress,
        latency_table=latency_table,
    )


def prune_layers(
    model: nn.Module,
    example_inputs: Any,
    loader: Iterable[Any],
    layer_ratios: Mapping[str, float],
    targets: Mapping[str, float | None],
    *,
    importance: Importance | None,
    compensation: bool | Compensation,
    recover: bool | Recovery = False,
    scope: Scope,
    steps: int,
    ignored_layers: Sequence[nn.Module | str] | None,
    round_to: int | None,
    max_pruning_ratio: float,
    forward_fn: Forward | None = None,
    output_transform: Transform | None = None,
    loss_fn: LossFn | None = None,
    seed: int,
    progress: bool,
    pricing: Pricing | None = None,
    latency_table: LatencyTable | None = None,
) -> PruneResult:
    """:func:`prune`, with other ratios for some layers.

    Args:
        model: see :func:`prune`, as for all that is not named here.
        example_inputs: as there.
        loader: as there.
        layer_ratios: fraction of channels that goes, by regular expression: the first that is found in the name of
            a layer of a group decides for the group, whatever the target.
        targets: by unit; all but one ``None``.
        importance: as there.
        compensation: as there.
        recover: as there.
        scope: as there.
        steps: as there.
        ignored_layers: as there.
        round_to: as there.
        max_pruning_ratio: as there.
        forward_fn: as there.
        output_transform: as there.
        loss_fn: as there.
        seed: as there.
        progress: as there.
        pricing: of scores, for importances that do not know costs.
        latency_table: as there.
    """
    unit, target = one_target(targets)
    check(scope, steps, round_to, max_pruning_ratio, unit, target)
    check_tools(importance, compensation)
    _, given = resolve(model)
    ignored = names_of(given, ignored_layers or ())
    try:
        copied = copy.deepcopy(given)
    except Exception as error:
        raise StructureError(
            f"the model cannot be copied ({type(error).__name__}: {error}). If a forward pass stored tensors "
            "that require grad on it, build it anew; hooks and locks cannot be copied either."
        ) from error
    device = next((p.device for p in given.parameters()), torch.device("cpu"))
    example_inputs = _moved(example_inputs, device)
    if iter(loader) is loader:  # it is read more than once
        loader = list(loader)
    table = None
    if unit == "latency":
        with _seeded(seed, device):
            table = _table(copied, example_inputs, latency_table, forward_fn, output_transform)
    stairs = table.round_to or 0 if table is not None and round_to is None else 0
    options = Options(
        unit, target, scope, steps, round_to or 0, max_pruning_ratio, ignored, example_inputs, forward_fn,
        output_transform, progress, layer_ratios, table, stairs,
    )  # fmt: skip
    importance = _default(seed, scope, unit, table) if importance is None else importance
    scorer = Scorer(
        importance, loader, loss_fn=loss_fn, forward_fn=forward_fn, output_transform=output_transform, seed=seed,
        progress=progress, pricing=pricing, example_inputs=example_inputs, compensated=compensation is not False,
    )  # fmt: skip
    refit = copy.deepcopy(compensation) if isinstance(compensation, Compensation) else Compensation()
    with _seeded(seed, device):
        loop = Loop(copied, options, scorer, loader, refit if compensation is not False else None)
        records = loop.run()
        report = recovered(
            copied, given, loader, recover, forward_fn=forward_fn, seed=seed, progress=progress
        )  # of the weights alone: sizes stay
        meter = Meter(example_inputs, forward_fn)
        before, after = loop.whole, meter.counts(copied)
        time = meter.latency(copied, copy.deepcopy(given)) if unit == "latency" else None
    copied.zero_grad()
    return PruneResult(
        copied, after.macs / before.macs, after.params / before.params, time, before, after, tuple(records), scope,
        type(importance).__name__, seed, report, example_inputs if forward_fn is None else None,
    )  # fmt: skip


def _default(seed: int, scope: Scope, unit: Unit, table: LatencyTable | None) -> PROImportance:
    """What a channel costs is told in what is aimed at."""
    if scope == "global" and table is not None:
        return PROImportance(seed=seed, cost=table)
    if scope == "global" and unit == "params":
        return PROImportance(seed=seed, cost="params")
    return PROImportance(seed=seed)


def _table(
    model: nn.Module,
    example_inputs: Any,
    given: LatencyTable | None,
    forward_fn: Forward | None,
    output_transform: Transform | None,
) -> LatencyTable:
    if given is None:
        return LatencyTable.measure(
            model, example_inputs, forward_fn=forward_fn, output_transform=output_transform
        )
    given.check(model, example_inputs)
    return given


def _moved(value: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(device), value)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """All of torch's random streams start at ``seed`` inside, and go on as they were afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield
