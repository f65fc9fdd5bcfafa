"""Compensation: after a cut, refit each layer to what it gave before, from what it reads now."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..calibration.batches import as_call, batches_of
from ..calibration.guard import preserved
from ..calibration.processes import all_or_none, unsynchronised
from ..calibration.subject import eagerly, resolve
from ..errors import NEVER_CALLED, NotCalibratedError, ObservationError
from ..graph.attention import update_attention
from ..graph.groups import graph_of
from .cutlayer import CutLayer, norm_after
from .refitting import LayerReport, refit_layers
from .samples import Samples


@dataclass(frozen=True)
class CompensationReport:
    """One :class:`LayerReport` per layer that lost inputs or reads other values than before, in forward order."""

    rows: tuple[LayerReport, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows)) or "no layer lost input channels"


class Compensation:
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

    needs_gradients = False

    def __init__(self, ridge: float | None = None, max_samples: int = 1024, memory: int = 1 << 30) -> None:
        if ridge is not None and not 0 <= ridge < float("inf"):
            raise ValueError(f"ridge={ridge!r}; give a number >= 0, or None to choose it by cross-validation")
        if not 2 <= max_samples < float("inf"):
            raise ValueError(f"max_samples={max_samples!r}; give a number >= 2")
        if not 0 < memory < float("inf"):
            raise ValueError(f"memory={memory!r}; give a positive number of bytes")
        self.ridge, self.max_samples, self.memory = ridge, int(max_samples), int(memory)
        self._samples = Samples(self.max_samples)

    # -- calibration -------------------------------------------------------------------------------------------

    @contextmanager
    def observe(self, target: Any) -> Iterator[Compensation]:
        """Keep inputs while your own loop calls the model, with or without gradients.

        Args:
            target: a ``torch_pruning`` pruner or ``DependencyGraph``, or the model.

        Raises:
            ObservationError: the model was not called, or its inputs cannot be joined.
            TypeError: ``target`` is none of the above.

        Under ``torch.distributed`` every rank has to enter; on exit all of them hold the samples of all.
        Starts anew; :meth:`merge` adds. An exception inside leaves the previous samples in place. The model is
        left as it was found, buffers included.
        """
        _, model = resolve(target)
        samples = Samples(self.max_samples)

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            samples.add(args, kwargs)

        with all_or_none():
            with preserved(model), unsynchronised(target), eagerly():
                handle = model.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
                try:
                    yield self
                finally:
                    handle.remove()
            if samples.count == 0:
                raise ObservationError(NEVER_CALLED)
        samples.gather()
        self._samples = samples

    def calibrate(
        self, target: Any, loader: Iterable[Any], max_samples: int | None = None, progress: bool = True
    ) -> Compensation:
        """Keep inputs from ``loader``; no forward pass is needed.

        Args:
            target: as for :meth:`observe`.
            loader: iterable of ``(inputs, targets)`` batches or of inputs alone; ``inputs`` is a tensor, a tuple
                of positional or a dict of keyword arguments. They are moved to the model's device.
            max_samples: stop after so many samples.
            progress: show a progress bar if tqdm is installed.

        Raises:
            ValueError: the loader is empty.
            ObservationError: inputs cannot be joined: they differ in shape, or have no batch dimension.
        """
        _, model = resolve(target)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        samples = Samples(self.max_samples)
        with all_or_none():
            for inputs, _ in batches_of(loader, device, max_samples, progress, type(self).__name__):
                samples.add(*as_call(inputs))
        samples.gather()
        self._samples = samples
        return self

    def reset(self) -> None:
        """Forget all samples."""
        self._samples = Samples(self.max_samples)

    def merge(self, other: Compensation) -> None:
        """Take the samples of ``other`` as well.

        Raises:
            NotCalibratedError: ``other`` has none.
        """
        if other._samples.count == 0:
            raise NotCalibratedError("the other object holds no samples to merge: calibrate it first.")
        self._samples.merge(other._samples)

    def state_dict(self) -> dict[str, Any]:
        """The samples, as CPU tensors and plain types (``torch.load(..., weights_only=True)``).

        Raises:
            NotCalibratedError: there are none.
        """
        self._check_calibrated()
        return self._samples.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._samples.load_state_dict(state)

    def _check_calibrated(self) -> None:
        if self._samples.count == 0:
            raise NotCalibratedError(
                "Compensation has no samples yet. Before compensation.step(pruner), run\n"
                "    compensation.calibrate(pruner, loader)\n"
                "or, around your own loop,\n"
                "    with compensation.observe(pruner):\n"
                "        for images, _ in loader:\n"
                "            model(images)"
            )

    # -- the step ----------------------------------------------------------------------------------------------

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
