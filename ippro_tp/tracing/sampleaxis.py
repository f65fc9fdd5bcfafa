"""Where the samples of the batch lie in a tensor, followed call by call from the model's inputs.

Nearly always that is axis 0. Transformers with ``batch_first=False`` put the tokens there: their rows must not be
taken for samples, nor those of tables that all samples share.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .flow import moved_axis
from .tensormap import TensorMap

_MOVES = frozenset({"transpose", "swapaxes", "swapdims", "permute", "unsqueeze", "stack", "view", "reshape"})


class SampleAxis:
    """The samples' axis of the tensors of one forward pass."""

    def __init__(self) -> None:
        self._axes: TensorMap[int] = TensorMap()

    def of(self, x: Tensor, batch: int, table: bool = False) -> int | None:
        """The axis along which ``batch`` samples lie: 0 unless they were moved, as for ``(L, N, E)``.

        ``None`` where all samples share ``x``: it does not come of the model's inputs, and it was looked up in a
        table or has one row. (Operations that cannot be seen may hide where x comes from: rows are then samples.)
        """
        axis = self._axes.get(x)
        if axis is None:
            return None if table or x.shape[0] == 1 else 0
        return axis if axis < x.dim() and x.shape[axis] % batch == 0 else 0

    def start(self, inputs: Any) -> None:
        """Note the model's inputs, samples along axis 0. What does not come of them (masks, tables) has none."""
        for x in inputs.values() if isinstance(inputs, dict) else inputs:
            if isinstance(x, Tensor):
                self._axes[x] = 0
            elif isinstance(x, (tuple, list, dict)):
                self.start(x)

    def copy(self, x: Tensor, out: Any) -> None:
        """Give ``out``, made of ``x``, the samples' axis of ``x``."""
        if out is not x and isinstance(out, Tensor) and (axis := self._axes.get(x)) is not None:
            self._axes[out] = axis

    def follow(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note where the samples lie in the result of the function called ``name``."""
        known: tuple[Tensor, int] | None = None
        for given in (*args, *kwargs.values()):
            for x in given if isinstance(given, (tuple, list)) else (given,):
                if isinstance(x, Tensor) and (found := self._axes.get(x)) is not None:
                    known = (x, found) if known is None or x.dim() > known[0].dim() else known
        if known is None:
            return
        x, axis = known
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, Tensor):
                moves = axis > 0 or name in _MOVES
                self._axes[part] = _carry(name, x, axis, args, kwargs, part) if moves else 0


def _carry(name: str, x: Tensor, axis: int, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> int:
    """The samples' axis of ``out``, computed from ``x``; 0 where it cannot be followed."""
    if (moved := moved_axis(name, x, axis, args, kwargs)) is not None:
        return moved
    if name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"):
        before = math.prod(x.shape[:axis])
        fits = (i for i in range(out.dim()) if math.prod(out.shape[:i]) == before)
        return next((i for i in fits if out.shape[i] == x.shape[axis]), 0)
    if name == "stack":
        dim = int(kwargs.get("dim", args[1] if len(args) > 1 else 0)) % out.dim()
        return axis + (dim <= axis)
    if out.dim() < x.dim():  # a reduction or an index
        first = args[1] if len(args) > 1 else kwargs.get("dim")
        first = first[0] if isinstance(first, (tuple, list)) and first else first
        leading = isinstance(first, int) and (name == "__getitem__" or first % x.dim() < axis)
        axis -= (x.dim() - out.dim()) * leading
    return axis if out.dim() > axis else 0
