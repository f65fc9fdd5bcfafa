"""Refitting the layers of a cut model front to back, and taking it back where the model became worse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .cutlayer import CutLayer
from .fitting import FittingPass
from .passes import output_error
from .recording import Recording
from .reports import LayerReport, Outcome
from .samples import Samples


class Refit:
    """Two passes over the same samples: one before the cut, one after it, in which layers are refitted.

    Args:
        model: the model, uncut.
        layers: those that may be refitted.
        samples: finite ones.
        ridge: see :func:`ippro_tp.compensation.regression.refit`.
        memory: bytes that activations and kept outputs may take at a time.

    Raises:
        ObservationError: the model does not repeat what it did.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[CutLayer], samples: Samples, ridge: float | None, memory: int
    ) -> None:
        self._ridge = ridge
        self._shapes = {module: _own_shapes(module) for module in model.modules()}
        self._recording = Recording(model, layers, samples, memory)

    def run(self, layers: Sequence[CutLayer]) -> Outcome:
        """Refit the layers of the cut model, and judge the whole.

        Args:
            layers: as given at first, of the cut model.
        """
        before = output_error(self._recording.judge(), self._recording.outputs)
        cut = [m for m, shapes in self._shapes.items() if _own_shapes(m) != shapes]
        done = FittingPass(self._recording, layers, cut, self._ridge)
        rows = done.run()
        if done.mixed:
            reason = (
                f"layer {done.mixed!r} gives other values than before although nothing before it was cut: "
                "the model does not repeat what it did"
            )
            return _revert(layers, rows, before, float("nan"), reason)
        after = output_error(self._recording.judge(), self._recording.outputs)
        if before is None or after is None:
            return Outcome(tuple(rows))
        if not after <= before and any(layer.changed for layer in layers):
            return _revert(layers, rows, before, after, "the model's outputs on held-out samples became worse")
        return Outcome(tuple(rows), before, after)


def _revert(
    layers: Sequence[CutLayer], rows: list[LayerReport], before: float | None, after: float, reason: str
) -> Outcome:
    for layer in layers:
        layer.undo()
    left = tuple(
        row if row.skipped else LayerReport(row.name, row.kept, row.removed, skipped=f"taken back: {reason}")
        for row in rows
    )
    return Outcome(left, float("nan") if before is None else before, after, reason)


def _own_shapes(module: nn.Module) -> dict[str, torch.Size | None]:
    tensors = {**module._parameters, **module._buffers}
    return {name: None if tensor is None else tensor.shape for name, tensor in tensors.items()}
