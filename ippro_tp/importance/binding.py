"""Which pruner asks: the one that was bound or calibrated, or the one whose step is running."""

from __future__ import annotations

import weakref
from typing import Any

import torch_pruning as tp

from ..calibration.calibrated import Calibrated
from ..graph.steps import running_pruner


class Bound(Calibrated):
    """Remembers weakly the pruner whose graph asks; copies and pickles leave it behind."""

    _pruner: weakref.ref[Any] | None = None

    def bind(self, pruner: Any | None) -> None:
        """Choose the pruner that defines heads, convolution groups and the next target size.

        One calibration serves several pruners of the same model, or of copies of it. The pruner that was
        calibrated is bound, and so is one whose ``step()`` is running; ``bind`` is for scores requested outside a
        step.

        Args:
            pruner: a ``tp.pruner.BasePruner``; ``None`` for none.

        Raises:
            TypeError: ``pruner`` is something else.
        """
        if pruner is not None and not isinstance(pruner, tp.pruner.BasePruner):
            raise TypeError(f"bind() needs a torch_pruning pruner or None, not {type(pruner).__name__}")
        self._pruner = None if pruner is None else weakref.ref(pruner)
        self._rebound()

    def reset(self) -> None:
        """Forget all statistics, and the pruner."""
        super().reset()
        self._pruner = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pruner": None}

    def _rebound(self) -> None:
        """Called when another pruner may ask."""

    def _pruner_of(self, graph: Any) -> Any | None:
        """The pruner that asks for a group of ``graph``, if it is known."""
        pruner = self._pruner() if self._pruner is not None else None
        if pruner is None or pruner.DG is not graph:
            pruner = running_pruner(graph)
            if pruner is not None:
                self.bind(pruner)
        return pruner
