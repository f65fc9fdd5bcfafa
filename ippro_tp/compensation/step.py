"""Compensation: after a cut, refit each layer to what it gave before, from what it reads now."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..graph.attention import update_attention
from ..graph.groups import graph_of
from .cutlayer import CutLayer, norm_after
from .inputs import KeptInputs
from .refitting import LayerReport, refit_layers


@dataclass(frozen=True)
class CompensationReport:
    """One :class:`LayerReport` per layer that lost inputs or reads other values than before, in forward order."""

    rows: tuple[LayerReport, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows)) or "no layer lost input channels"


class Compensation(KeptInputs):
    r"""Training-free compensation: each layer of the cut model is refitted to what it gave before the cut.

    Layer by layer, in forward order, the weight becomes the ridge regression of the layer's outputs in the uncut
    model on what it reads in the cut one, where all layers before it are refitted already
    (:mod:`compensation.regression`). The part of a removed channel that the remaining ones predict is folded into
    their weights, and errors of earlier layers are repaired. The mean goes into the bias, or into the running
    mean of the BatchNorm that alone reads the output. Labels and gradients are not needed, and it works for any
    criterion.

    Convolutions of any stride, padding, dilation and grouping, transposed convolutions and Linear layers, also
    after flattening or concatenation, in residual streams and in transformers. Layers of other kinds
    (``nn.MultiheadAttention``'s own projections, LSTM, weights that are parametrized or changed in a forward of
    their own) and layers that a forward pass calls several times are left as Torch-Pruning leaves them.

    Calibration keeps inputs, nothing else. :meth:`step` runs the uncut model over them, in parts, and the cut one
    once, all samples side by side.

    Args:
        ridge: a multiple of the mean variance of what the layer reads. ``None``: chosen for each layer by two-fold
            cross-validation over the samples, with "leave it" among the candidates.
        max_samples: inputs that are kept at most; of more, an even choice.
        memory: bytes that the largest activation of all samples may take, in the one pass over them; a few of
            that size live at a time. Fewer samples are used where they would take more.

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

    def __init__(self, ridge: float | None = None, max_samples: int = 1024, memory: int = 1 << 30) -> None:
        if ridge is not None and not 0 <= ridge < float("inf"):
            raise ValueError(f"ridge={ridge!r}; give a number >= 0, or None to choose it by cross-validation")
        super().__init__(max_samples)
        if not 0 < memory < float("inf"):
            raise ValueError(f"memory={memory!r}; give a positive number of bytes")
        self.ridge, self.memory = ridge, int(memory)

    @torch.no_grad()
    def step(self, pruner: Any, repair: Callable[[nn.Module], None] | None = None) -> CompensationReport:
        """``pruner.step()``, and every layer that reads other values than before is refitted.

        Samples stay valid: in the next step, layers are refitted to what the model gives then.

        Args:
            pruner: a ``torch_pruning`` pruner, on the model of the calibration or another that takes its inputs.
            repair: called with the model after the cut and before it runs, to set what its forward pass keeps as
                plain numbers. For attention as in timm that is done already (:func:`update_attention`).

        Returns:
            What was done to each layer.

        Raises:
            NotCalibratedError: there are no samples.
            TypeError: ``pruner`` is no pruner.
        """
        graph = graph_of(pruner)
        if graph is None or not hasattr(pruner, "step"):
            raise TypeError(f"expected a torch_pruning pruner, got {type(pruner).__name__}")
        self._check_calibrated()
        model = graph.model
        uncut = copy.deepcopy(model)
        layers = {
            module: CutLayer(name, module, norm_after(graph, module))
            for module, name in graph._module2name.items()
            if isinstance(module, (_ConvNd, nn.Linear))
        }
        others: dict[str, LayerReport] = {}
        cut = False
        for group in pruner.step(interactive=True):
            for dep, idxs in group:
                module = dep.target.module
                layer = layers.get(module)
                outputs = graph.is_out_channel_pruning_fn(dep.handler)
                if layer is not None and idxs and outputs:
                    layer.remove_outputs(idxs)
                elif isinstance(module, (nn.MultiheadAttention, nn.LSTM)) and idxs and not outputs:
                    name, kind = graph._module2name[module], type(module).__name__
                    others[name] = LayerReport(
                        name, 0, len(idxs), skipped=f"layers of type {kind} are not covered"
                    )
            group.prune()
            cut = True
        if not cut:
            return CompensationReport(())
        update_attention(pruner)
        if repair is not None:
            repair(model)
        fitted = refit_layers(model, uncut, list(layers.values()), self._samples, self.ridge, self.memory)
        return CompensationReport((*fitted, *others.values()))
