"""Refitting the layers of a cut model front to back, in one pass over all samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..calibration.guard import evaluating
from .cutlayer import CutLayer
from .patches import inputs_at, outputs_at
from .regression import refit
from .samples import Samples

ROWS, MOST_ROWS, WORK = 4096, 16384, 1 << 32
"""A layer with f features is fitted to WORK / f^2 output positions, at least ROWS, at most MOST_ROWS."""
CHUNK = 64
"""Samples per forward pass of the uncut model."""


@dataclass(frozen=True)
class LayerReport:
    """What :meth:`Compensation.step` did to one layer.

    Attributes:
        name: dotted module name.
        kept, removed: numbers of input channels; none may be removed: a layer whose inputs changed because of
            cuts before it is refitted as well.
        lost: error of its output on held-out samples, as a share of the output's power, after the layers before it
            were compensated and before it is.
        left: the same after it is; NaN where nothing could be held out.
        ridge: the ridge used, as a multiple of the features' mean variance; inf where only the mean was made up
            for, NaN where the layer was left as it is.
        constant: where the mean went: ``"bias"``, ``"norm"`` (the BatchNorm that follows) or ``""``.
        skipped: why the layer was left as Torch-Pruning left it; empty if it was not.
    """

    name: str
    kept: int
    removed: int
    lost: float = float("nan")
    left: float = float("nan")
    ridge: float = float("nan")
    constant: str = ""
    skipped: str = ""

    def __str__(self) -> str:
        head = f"{self.name}: {self.removed} of {self.kept + self.removed} inputs removed"
        if self.skipped:
            return f"{head}; not compensated: {self.skipped}"
        how = {True: "left as it is"}.get(math.isnan(self.ridge), f"ridge {self.ridge:.0e}")
        return f"{head}; output error {self.lost:.2%} -> {self.left:.2%} ({how})"


def refit_layers(
    model: nn.Module,
    uncut: nn.Module,
    layers: Sequence[CutLayer],
    samples: Samples,
    ridge: float | None,
    memory: int,
) -> list[LayerReport]:
    """Refit each layer of ``model`` to the outputs it has in ``uncut``, from what it reads in ``model``.

    Args:
        model: the cut model; its weights, biases and BatchNorm means are changed.
        uncut: a copy from before the cut.
        layers: those of ``model`` that may be refitted.
        samples: what the models are called with.
        ridge: see :func:`ippro_tp.compensation.regression.refit`.
        memory: bytes that the largest output of a module may take, over all samples that are used.

    Returns:
        Reports in forward order; layers that give what they gave are left out.
    """
    with evaluating(model), evaluating(uncut):
        probe = _Probe(uncut, layers, samples)
        used = Samples(max(2, min(samples.count, int(memory // max(1, probe.largest)))))
        used.merge(samples)
        wanted = _wanted(uncut, layers, used, probe)
        return _Pass(layers, wanted, used.count, ridge, probe).run(model, used)


class _Probe:
    """One sample through the uncut model: how often layers are called, and how large activations are.

    Attributes:
        calls: per layer.
        per_sample: per layer, entries of dimension 0 of its input per sample.
        largest: bytes of the largest output of a module, per sample.
    """

    def __init__(self, uncut: nn.Module, layers: Sequence[CutLayer], samples: Samples) -> None:
        self.calls: dict[str, int] = {}
        self.per_sample: dict[str, float] = {}
        self.largest = 0

        def note(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            self.per_sample[name] = float(x.shape[0])

        def measure(module: nn.Module, args: Any, y: Any) -> None:
            if isinstance(y, Tensor):
                self.largest = max(self.largest, y.numel() * y.element_size())

        handles = [module.register_forward_hook(measure) for module in uncut.modules()]
        try:
            with _outputs(uncut, layers, note):
                args, kwargs = samples.arguments(0, 1)
                uncut(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def reason(self, layer: CutLayer, x: Tensor, count: int) -> str:
        """Why a layer that reads ``x`` for ``count`` samples cannot be refitted; empty if it can."""
        calls = self.calls.get(layer.name, 0)
        if layer.unfit:
            return layer.unfit
        if calls != 1:
            return f"a forward pass calls it {calls} times"
        if isinstance(layer.module, _ConvNd) and x.dim() != len(layer.module.kernel_size) + 2:
            return "its input has no batch dimension"
        if x.shape[0] != self.per_sample[layer.name] * count:
            return "dimension 0 of its input does not count samples"
        return ""

    def positions(self, layer: CutLayer, count: int) -> int:
        """Output positions to fit a layer to: per row of a convolution's input, per sample of a Linear layer."""
        rows = min(MOST_ROWS, max(ROWS, WORK // layer.features**2))
        own = self.per_sample[layer.name] if isinstance(layer.module, _ConvNd) else 1
        return max(1, math.ceil(rows / (count * own)))


def _wanted(uncut: nn.Module, layers: Sequence[CutLayer], samples: Samples, probe: _Probe) -> Mapping[str, Tensor]:
    """Per layer, ``(rows, outputs left)``: what it gives in the uncut model, at some positions."""
    found: dict[str, list[Tensor]] = {}
    by_name = {layer.name: layer for layer in layers}
    first = 0

    def keep(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        layer, count = by_name[name], min(CHUNK, samples.count - first)
        if not probe.reason(layer, x, count):
            some = probe.positions(layer, samples.count)
            rows = outputs_at(module, y, first, count, some)
            found.setdefault(name, []).append(rows[:, layer.outputs.to(y.device)])

    with _outputs(uncut, layers, keep):
        for first in range(0, samples.count, CHUNK):
            args, kwargs = samples.arguments(first, first + CHUNK)
            uncut(*args, **kwargs)
    return {name: torch.cat(parts) for name, parts in found.items()}


class _Pass:
    """One forward pass of the cut model; before a layer runs, it is refitted.

    Args:
        layers: that may be refitted.
        wanted: see :func:`_wanted`.
        count: number of samples.
        ridge: see :func:`refit_layers`.
        probe: of the uncut model.
    """

    def __init__(
        self,
        layers: Sequence[CutLayer],
        wanted: Mapping[str, Tensor],
        count: int,
        ridge: float | None,
        probe: _Probe,
    ) -> None:
        self._layers, self._wanted, self._probe = layers, wanted, probe
        self._count, self._ridge = count, ridge
        self._reports: dict[str, LayerReport] = {}

    def run(self, model: nn.Module, samples: Samples) -> list[LayerReport]:
        """Refit all layers that the pass reaches."""
        handles = [x.module.register_forward_pre_hook(self._before(x), with_kwargs=True) for x in self._layers]
        try:
            args, kwargs = samples.arguments(0, samples.count)
            model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for layer in self._layers:
            if (
                layer.name not in self._reports
                and layer.inputs < layer.all_inputs
                and not self._probe.calls.get(layer.name)
            ):
                self._skip(layer, "the model's forward does not call it")
        return [report for report in self._reports.values() if report.removed or report.skipped or report.lost > 0]

    def _before(self, layer: CutLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor) or layer.name in self._reports:
                return
            reason = self._probe.reason(layer, x, self._count)
            if not reason and layer.name not in self._wanted:
                reason = "its input differs in size between calls"
            if reason:
                self._skip(layer, reason)
            else:
                self._reports[layer.name] = self._refit(layer, x)

        return hook

    def _skip(self, layer: CutLayer, reason: str) -> None:
        removed = layer.all_inputs - layer.inputs
        self._reports[layer.name] = LayerReport(layer.name, layer.inputs, removed, skipped=reason)

    def _refit(self, layer: CutLayer, x: Tensor) -> LayerReport:
        kept, removed = layer.inputs, layer.all_inputs - layer.inputs
        some = self._probe.positions(layer, self._count)
        read = inputs_at(layer.module, x, 0, self._count, some).double()
        wanted = self._wanted[layer.name].double().unflatten(1, (layer.groups, -1)).transpose(0, 1)
        error = wanted - read @ layer.matrix()
        if layer.module.bias is not None:
            error -= layer.module.bias.double().view(layer.groups, 1, -1)
        power = float(wanted.square().mean(1).sum())
        rounding = (4 * torch.finfo(layer.module.weight.dtype).eps) ** 2 * power
        if float(error.square().mean(1).sum()) <= rounding:
            return LayerReport(layer.name, kept, removed, 0.0, 0.0)
        even = torch.arange(self._count, device=x.device) % 2 == 0
        even = even.repeat_interleave(read.shape[1] // self._count)
        update = refit(read, error, even, layer.constant != "", self._ridge, 1 / self._count)
        layer.add(update.delta, update.constant)
        share = 1 / power if power > 0 else 0.0
        constant = layer.constant if update.constant is not None else ""
        return LayerReport(
            layer.name, kept, removed, update.before * share, update.after * share, update.ridge, constant
        )


@contextmanager
def _outputs(
    model: nn.Module, layers: Sequence[CutLayer], see: Callable[[str, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, module, input, output)`` whenever ``model`` calls the layer of one of ``layers``."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor) and isinstance(y, Tensor):
                see(name, module, x, y)

        return hook

    modules = dict(model.named_modules())
    handles = [
        modules[layer.name].register_forward_hook(hook_for(layer.name), with_kwargs=True) for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
