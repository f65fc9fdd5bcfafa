"""Compensation: after a cut, refit each layer to what it gave before, from what it reads now."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import ObservationError
from ..graph.attention import update_attention
from ..graph.following import norm_after
from ..graph.groups import Graph, graph_of
from .attention import Projections, can_be_taken_apart, taken_apart
from .cutlayer import CutLayer
from .inputs import KeptInputs
from .refitting import Refit
from .reports import LayerReport
from .rollback import undone_on_error
from .samples import Samples


@dataclass(frozen=True)
class CompensationReport:
    """What a step did.

    Attributes:
        rows: one :class:`LayerReport` per layer that lost inputs or reads other values than before, in forward
            order.
        before: error of the model's outputs as cut, on samples that no layer was fitted to: squared, as a share of
            their variance. NaN where outputs cannot be compared.
        after: the same after compensation.
        reverted: why all layers were left as Torch-Pruning left them; empty if they were not.
    """

    rows: tuple[LayerReport, ...]
    before: float = float("nan")
    after: float = float("nan")
    reverted: str = ""

    def __str__(self) -> str:
        lines = [*map(str, self.rows)] or ["no layer lost input channels"]
        if self.reverted:
            lines.append(f"all layers left as they were cut: {self.reverted}")
        elif not math.isnan(self.after):
            lines.append(f"the model's output error on held-out samples: {self.before:.2%} -> {self.after:.2%}")
        return "\n".join(lines)


class Compensation(KeptInputs):
    r"""Training-free compensation: each layer of the cut model is refitted to what it gave before the cut.

    Layer by layer, in forward order, the weight becomes the ridge regression of the layer's outputs in the uncut
    model on what it reads in the cut one, where all layers before it are refitted already
    (:mod:`compensation.regression`). The part of a removed channel that the remaining ones predict is folded into
    their weights, and errors of earlier layers are repaired. The mean goes into the bias, or into the running
    mean of the BatchNorm that alone reads the output. Labels and gradients are not needed, and it works for any
    criterion.

    Convolutions of any stride, padding, dilation and grouping, transposed convolutions and Linear layers, also
    after flattening or concatenation, in residual streams and in transformers, and the projections of
    ``nn.MultiheadAttention``. A layer that a forward pass calls several times is fitted to all its calls. Left as
    Torch-Pruning leaves them, with the reason in the report: layers whose output is measured to be something else
    than their weight times what they read, whose weight is shared, parametrized or used elsewhere, or whose
    rows do not belong to one sample each.

    Some samples are kept from the fit. If the model's outputs on them are further from the uncut model's with
    compensation than without, all weights stay as Torch-Pruning left them, and the report says so.

    Calibration keeps inputs, nothing else. :meth:`step` runs the model over them before and after the cut, all
    samples side by side.

    Args:
        ridge: a multiple of the mean variance of what the layer reads. ``None``: chosen for each layer by two-fold
            cross-validation over the samples, with "leave it" among the candidates.
        max_samples: inputs that are kept at most; of more, an even choice.
        memory: bytes that activations and the outputs kept of them may take at a time in :meth:`step`. Fewer
            samples are used where they would take more. The regression of a layer takes besides what its
            largest matrix takes a few times.

    Raises:
        ValueError: an option is negative or not finite.

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

    _VERB = "step(pruner)"

    def __init__(self, ridge: float | None = None, max_samples: int = 1024, memory: int = 1 << 31) -> None:
        if ridge is not None and not 0 <= ridge < float("inf"):
            raise ValueError(f"ridge={ridge!r}; give a number >= 0, or None to choose it by cross-validation")
        super().__init__(max_samples)
        if not 0 < memory < float("inf"):
            raise ValueError(f"memory={memory!r}; give a positive number of bytes")
        self.ridge, self.memory = ridge, int(memory)

    @torch.no_grad()
    def step(self, pruner: Any, repair: Callable[[nn.Module], None] | None = None) -> CompensationReport:
        """``pruner.step()``, and every layer that reads other values than before is refitted.

        Samples stay valid: in the next step, layers are refitted to what the model gives then. After an exception,
        also in the middle of pruning, the model and the pruner are as they were.

        Args:
            pruner: a ``torch_pruning`` pruner, on the model of the calibration or another that takes its inputs.
            repair: called with the model after the cut and before it runs, to set what its forward pass keeps as
                plain numbers. For attention as in timm that is done already (:func:`update_attention`).

        Returns:
            What was done to each layer.

        Raises:
            NotCalibratedError: there are no samples.
            ObservationError: the samples all hold NaN or inf, or the model does not repeat what it does.
            TypeError: ``pruner`` is no pruner.
        """
        graph = graph_of(pruner)
        if graph is None or not hasattr(pruner, "step"):
            raise TypeError(f"expected a torch_pruning pruner, got {type(pruner).__name__}")
        self._check_calibrated()
        samples = _finite(self._samples)
        model = graph.model
        with undone_on_error(model, pruner) as before:
            watched = _Layers(graph)
            with taken_apart(watched.projections):
                fit = Refit(model, watched.all, samples, self.ridge, self.memory)
            before.restore()  # what a forward pass may have left behind
            if not watched.cut(pruner):
                return CompensationReport(())
            update_attention(pruner)
            if repair is not None:
                repair(model)
            watched.renew()
            with taken_apart(watched.projections):
                found = fit.run(watched.all)
        return CompensationReport((*found.rows, *watched.others), found.before, found.after, found.reverted)


class _Layers:
    """The layers of a model that may be refitted, and what a step cuts of them.

    Attributes:
        all: those that may.
        others: reports of layers that may not and lost inputs.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._attention = {m: n for m, n in graph._module2name.items() if can_be_taken_apart(m)}
        self._projections: dict[nn.Module, Projections] = {m: Projections(m) for m in self._attention}  # type: ignore[arg-type]
        self._own = {
            module: CutLayer(name, module, norm_after(graph, module))
            for module, name in graph._module2name.items()
            if isinstance(module, (_ConvNd, nn.Linear))
        }
        self._parts = {
            module: {
                part: CutLayer(f"{self._attention[module]}.{part}_proj", layer) for part, layer in p.layers.items()
            }
            for module, p in self._projections.items()
        }
        self.others: list[LayerReport] = []

    @property
    def all(self) -> list[CutLayer]:
        return [*self._own.values(), *(layer for parts in self._parts.values() for layer in parts.values())]

    @property
    def projections(self) -> list[Projections]:
        """To be taken apart while the model runs."""
        return list(self._projections.values())

    def cut(self, pruner: Any) -> bool:
        """Let the pruner make its step, and note which outputs go; whether there was anything to cut."""
        cut = False
        for group in pruner.step(interactive=True):
            for dep, idxs in group:
                self._note(dep, idxs)
            group.prune()
            cut = True
        return cut

    def renew(self) -> None:
        """Look at the weights that attention has now."""
        for module, parts in self._parts.items():
            self._projections[module] = Projections(module)  # type: ignore[arg-type]
            for part, layer in self._projections[module].layers.items():
                parts[part].module = layer

    def _note(self, dep: Any, idxs: list[int]) -> None:
        module, outputs = dep.target.module, self._graph.is_out_channel_pruning_fn(dep.handler)
        if not idxs or not isinstance(module, nn.Module):
            return
        if module in self._parts:  # all projections lose the same, as outputs and as inputs
            for layer in (*self._parts[module].values(), self._own[module.out_proj]):  # type: ignore[index]
                layer.remove_outputs(idxs)
        elif module in self._own and outputs:
            self._own[module].remove_outputs(idxs)
        elif isinstance(module, (nn.MultiheadAttention, nn.LSTM)) and not outputs:
            name, kind = self._graph._module2name[module], type(module).__name__
            self.others.append(LayerReport(name, 0, len(idxs), skipped=f"layers of type {kind} are not covered"))


def _finite(samples: Samples) -> Samples:
    """The samples without those that hold NaN or inf."""
    good = samples.finite()
    bad = int((~good).sum())
    if not bad:
        return samples
    if bad == samples.count:
        raise ObservationError(
            "all samples hold NaN or inf: check the inputs of the calibration. Nothing has been cut."
        )
    warnings.warn(
        f"{bad} of {samples.count} samples hold NaN or inf and are left out of the compensation",
        RuntimeWarning,
        stacklevel=3,
    )
    left = Samples(samples.limit)
    left.add(*samples.arguments(good.nonzero().view(-1)))
    return left
