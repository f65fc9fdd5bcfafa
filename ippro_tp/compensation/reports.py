"""What a refit did: one report per layer, and the outcome for the whole model."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """How :meth:`Compensation.step` changed one layer.

    Attributes:
        name: dotted module name; projections of ``nn.MultiheadAttention`` are ``q_proj``, ``k_proj``, ``v_proj``.
        kept, removed: numbers of input channels. ``removed`` can be 0: a layer whose inputs changed because of
            pruning before it is refitted too.
        lost: relative squared error of its output on held-out samples before its own refit, with all layers
            before it already refitted.
        left: the same after its refit; NaN if no samples could be held out.
        ridge: the ridge used, as a multiple of the features' mean variance; inf if only the mean was corrected,
            NaN if the layer was left as it was.
        constant: where the mean went: ``"bias"``, ``"norm"`` (the BatchNorm that follows) or ``""``.
        skipped: why the layer was not refitted; empty if it was.
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
        how = "left as it is" if math.isnan(self.ridge) else f"ridge {self.ridge:.0e}"
        if math.isnan(self.left):
            return f"{head}; output error {self.lost:.2%}, too few samples to hold some out ({how})"
        return f"{head}; output error {self.lost:.2%} -> {self.left:.2%} ({how})"


@dataclass(frozen=True)
class Outcome:
    """What a refit came to.

    Attributes:
        rows: one report per layer that reads other values than before the cut, in forward order.
        before: error of the model's outputs on held-out samples as cut, see :func:`output_error`; NaN if unknown.
        after: the same after the refit.
        reverted: why all layers were left as they were cut after all; empty if they were not.
    """

    rows: tuple[LayerReport, ...]
    before: float = float("nan")
    after: float = float("nan")
    reverted: str = ""
