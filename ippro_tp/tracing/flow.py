"""Where the channels of a layer go: labels that travel with tensors through one forward pass.

A forward pass is watched call by call. The output of a producer carries a :class:`Label`: which axis holds
which channels of which layer. Operations that keep channels apart (normalisation, add, concat, split,
pooling, flatten, permute, ...) hand the label on; operations that mix channels end it. So when an activation
is called, its argument's label says whose activation it is, no matter whether the call comes from a module, a
function, a method or an in-place operation, and how often a module is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, ValuesView
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..records import Label, Span
from .claims import MIXING, carried
from .tensormap import TensorMap
from .trial import Trials


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, ValuesView)):
        for each in value:
            yield from _tensors(each)


def _union(labels: list[Label]) -> Label:
    axis = labels[0].axis
    spans = dict.fromkeys(span for label in labels if label.axis == axis for span in label.spans)
    return Label(axis, tuple(spans))


class ChannelFlow:
    """Labels of the tensors of one forward pass.

    Where channels go is told by the names of functions and by shapes, and then tried (:mod:`tracing.trial`): a
    label that the trial contradicts is dropped, and where names say nothing, the trial may.

    Args:
        trials: what is known of functions from other passes.
    """

    def __init__(self, trials: Trials | None = None) -> None:
        self._trials = trials if trials is not None else Trials()
        self._labels: TensorMap[Label] = TensorMap()
        self.crossed: set[frozenset[str]] = set()  # layers whose channels met along different axes

    def __getitem__(self, x: Any) -> Label | None:
        return self._labels.get(x) if isinstance(x, Tensor) else None

    def set(self, x: Tensor, label: Label | None) -> None:
        """Label ``x``, or remove its label."""
        if label is not None:
            self._labels[x] = label
        else:
            self._labels.discard(x)

    def propagate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Label the result of ``func(*args, **kwargs)``."""
        name = getattr(func, "__name__", "")
        first = args[0] if args else next(iter(kwargs.values()), None)
        if name in MIXING:
            return
        before = [(x, label) for x in _tensors((args, kwargs.values())) if (label := self[x]) is not None]
        if not before:
            return
        self._claim(name, first, args, kwargs, out)
        parts = [part for part in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(part, Tensor)]
        claimed = [(number, label) for number, part in enumerate(parts) if (label := self[part]) is not None]
        if claimed and not self._trials.holds(func, args, kwargs, before, claimed):
            for part in parts:
                self.set(part, None)
            claimed = []
        if not claimed and len(before) == 1 and isinstance(out, Tensor):
            axis = self._trials.axis(func, args, kwargs, before[0], out)
            self.set(out, None if axis is None else replace(before[0][1], axis=axis))

    def _claim(self, name: str, first: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Label the result by the name of the function."""
        if name in ("cat", "concat", "concatenate"):
            self._concat(first, args, kwargs, out)
            return
        operands = (first,) if name.endswith("_as") else (*args, *kwargs.values())  # the others give a shape
        labelled = [(x, label) for x in operands if (label := self[x]) is not None]
        if not labelled:
            return
        x, label = max(labelled, key=lambda one: one[0].dim())  # the others are broadcast
        if isinstance(out, (tuple, list)):
            self._split(x, label, out)
        elif isinstance(out, Tensor) and out is not None:
            if len(labelled) > 1:
                same = [lab for t, lab in labelled if t.dim() == out.dim()]
                # A single channel is never removed: what it is tied to does not matter.
                self._cross([lab for t, lab in labelled if t.shape == out.shape and t.shape[lab.axis] > 1])
                label = _union(same or [label])
            self.set(out, carried(name, x, label, args, kwargs, out))

    def _cross(self, labels: list[Label]) -> None:
        for one in labels:
            for other in labels:
                if one.axis != other.axis:
                    pairs = ((a.layer, b.layer) for a in one.spans for b in other.spans if a.layer != b.layer)
                    self.crossed.update(map(frozenset, pairs))

    def _concat(self, parts: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        dim = int(kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))) % out.dim()
        spans: list[Span] = []
        at = 0
        axes = {label.axis for part in parts if (label := self[part]) is not None}
        if len(axes) != 1:
            return
        axis = axes.pop()
        for part in parts:
            label = self[part]
            if label is not None:
                spans += [replace(s, at=s.at + (at if dim == axis else 0)) for s in label.spans]
            at += part.shape[dim]
        self.set(out, Label(axis, tuple(dict.fromkeys(spans))))

    def _split(self, x: Tensor, label: Label, parts: Any) -> None:
        """Parts of x along the label's axis, as from split, chunk, tensor_split."""
        tensors = [p for p in parts if isinstance(p, Tensor)]
        if not tensors or len(tensors) != len(parts) or any(p.dim() != x.dim() for p in tensors):
            return
        axis = label.axis
        along = sum(p.shape[axis] for p in tensors) == x.shape[axis] and len(tensors) > 1
        at = 0
        for part in tensors:
            if along:
                self.set(part, label.narrowed(at, part.shape[axis]))
                at += part.shape[axis]
            elif part.shape[axis] == x.shape[axis]:
                self.set(part, label)
