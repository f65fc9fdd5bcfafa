"""Compensation: after pruning, refit each layer to its former outputs from its present inputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import ObservationError
from ..graph.attention import update_attention
from ..graph.following import norm_after
from ..graph.groups import Graph, graph_of
from ..graph.matrices import matrices_of
from .attention import Projections, Stand, can_be_taken_apart, taken_apart
from .cutlayer import CutLayer
from .inputs import KeptInputs
from .refitting import Refit
from .reports import LayerReport
from .rollback import undone_on_error
from .samples import Samples
from .turned import as_linear


@dataclass(frozen=True)
class CompensationReport:
    """The outcome of a step.

    Attributes:
        rows: one :class:`LayerReport` per layer that lost inputs or whose inputs have changed, in forward order.
        before: squared error of the pruned model's outputs on held-out samples, relative to their variance; NaN if
            outputs cannot be compared.
        after: the same after compensation.
        reverted: why all layers were left as pruned; empty if they were refitted.
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
    r"""Training-free compensation: each layer of the pruned model is refitted to its outputs before pruning.

    Layer by layer, in forward order, the weight is replaced by the ridge regression of the layer's outputs in the
    unpruned model on its inputs in the pruned one, in which all layers before it are already refitted
    (:mod:`compensation.regression`). The part of a removed channel that the remaining ones predict is folded into
    their weights, and errors of earlier layers are corrected. Where the output is added to another tensor, as in
    residual streams, the target is the sum (:mod:`compensation.additions`). The mean goes into the bias, or into
    the running mean of a BatchNorm that is the only reader of the output. Neither labels nor gradients are needed,
    and any criterion can be used.

    Supported are convolutions of any stride, padding, dilation and grouping, transposed convolutions, Linear
    layers and the projections of ``nn.MultiheadAttention``, also after flattening or concatenation, in residual
    streams and in transformers. A layer that a forward pass calls several times is fitted to all its calls. Layers
    whose output is measured to differ from weight times input, whose weight is shared, parametrized or used
    elsewhere, or whose rows do not belong to one sample each, are left as pruned; the report gives the reason.

    Some samples are held out. If compensation takes the model's outputs on them further away from the unpruned
    model's, all weights are left as pruned, and the report says so.

    Calibration stores inputs only. :meth:`step` runs the model on all of them before and after pruning.

    Args:
        ridge: a multiple of the mean variance of the layer's inputs. ``None``: chosen for each layer by two-fold
            cross-validation over the samples; leaving the weight as it is, is one of the candidates.
        max_samples: the largest number of inputs to store; from more, an even selection is kept.
        memory: bytes that activations and stored outputs may take at a time in :meth:`step`; fewer samples are
            used if they would take more. The regression of a layer needs, in addition, a few times the size of
            its largest matrix.

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
        """Run ``pruner.step()`` and refit every layer whose inputs have changed.

        The samples remain valid: the next step refits layers to the model's outputs at that time. After an
        exception, even in the middle of pruning, the model and the pruner are as they were.

        Args:
            pruner: a ``torch_pruning`` pruner, on the calibrated model or another that takes the same inputs.
            repair: called with the pruned model before it is run, to update sizes that its forward pass stores as
                plain numbers. Attention as in timm is updated anyway (:func:`update_attention`).

        Returns:
            A report of each layer.

        Raises:
            NotCalibratedError: there are no samples.
            ObservationError: all samples contain NaN or inf, or the model is not deterministic.
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
        names = graph._module2name
        self._stands: dict[nn.Module, Callable[[], Stand | None]] = {
            m: partial(as_linear, m, matrix.leaf, matrix.out) for m, matrix in matrices_of(graph).items()
        }
        self._stands.update((m, partial(Projections, m)) for m in names if can_be_taken_apart(m))  # type: ignore[arg-type]
        self._projections = {m: found for m, made in self._stands.items() if (found := made()) is not None}
        self._own = {
            module: CutLayer(name, module, norm_after(graph, module))
            for module, name in names.items()
            if isinstance(module, (_ConvNd, nn.Linear))
        }
        self._parts = {
            module: {part: CutLayer(_named(names[module], part), layer) for part, layer in p.layers.items()}
            for module, p in self._projections.items()
        }
        self.others: list[LayerReport] = []

    @property
    def all(self) -> list[CutLayer]:
        return [*self._own.values(), *(layer for parts in self._parts.values() for layer in parts.values())]

    @property
    def projections(self) -> list[Stand]:
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
            if (found := self._stands[module]()) is None:
                raise RuntimeError(f"{self._graph._module2name[module]} computes something else once it is cut")
            self._projections[module] = found
            for part, layer in found.layers.items():
                parts[part].module = layer

    def _note(self, dep: Any, idxs: list[int]) -> None:
        module, outputs = dep.target.module, self._graph.is_out_channel_pruning_fn(dep.handler)
        inputs = not outputs and self._graph.is_in_channel_pruning_fn(dep.handler)
        if not idxs or not isinstance(module, nn.Module):
            return
        if module in self._parts and not isinstance(module, nn.MultiheadAttention):
            if outputs:
                self._parts[module][""].remove_outputs(idxs)
        elif module in self._parts:  # all projections lose the same, as outputs and as inputs
            for layer in (*self._parts[module].values(), self._own[module.out_proj]):  # type: ignore[index]
                layer.remove_outputs(idxs)
        elif module in self._own and outputs:
            self._own[module].remove_outputs(idxs)
        elif inputs and (isinstance(module, (nn.MultiheadAttention, nn.LSTM)) or module in self._stands):
            name, kind = self._graph._module2name[module], type(module).__name__
            self.others.append(LayerReport(name, 0, len(idxs), skipped=f"layers of type {kind} are not covered"))


def _named(module: str, part: str) -> str:
    return f"{module}.{part}_proj" if part else module


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
