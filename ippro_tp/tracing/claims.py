"""What the name of a function and the shapes around it promise of channels; :mod:`tracing.trial` checks it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..layers import is_activation
from ..records import Label

# fmt: off
MIXING = frozenset({
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
    "bilinear", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "addmm", "baddbmm", "einsum", "tensordot",
    "scaled_dot_product_attention", "multi_head_attention_forward", "softmax", "log_softmax", "glu",
    "cross_entropy", "nll_loss", "embedding", "one_hot", "cumsum", "sort", "topk", "argmax", "backward",
})
"""Functions after which channels are no longer what they were."""
# fmt: on
_INPLACE_DUNDERS = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__setitem__"}


def is_inplace(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call overwrites its first argument."""
    if name in _INPLACE_DUNDERS or (name.endswith("_") and not name.endswith("__")):
        return True
    if kwargs.get("inplace"):
        return True
    takes = is_activation(name) or name in ("dropout", "dropout2d")
    return takes and any(a is True for a in args[1:])


def carried(
    name: str, x: Tensor, label: Label, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> Label | None:
    """The label of ``out``, computed from ``x`` alone; ``None`` where channels cannot be followed."""
    axis, size = label.axis, x.shape[label.axis]
    if (moved := _moved_axis(name, x, axis, args, kwargs)) is not None:
        return replace(label, axis=moved)
    if name in ("__get__", "t") and out.dim() == 2 and x.dim() == 2 and out.shape == x.shape[::-1]:
        return replace(label, axis=1 - axis) if out.shape != x.shape else None
    if name in ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze"):
        return _reshaped(label, x, out)
    if name in ("narrow", "__getitem__", "select", "index_select"):
        return _sliced(name, label, x, args, out)
    if out.dim() == x.dim():
        # Channels of a broadcast operand stand where they stood; everything else must keep the axis.
        return label if out.shape[axis] == size else None
    if name in ("mean", "sum", "amax", "amin", "max", "min", "std", "var", "norm", "logsumexp"):
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dims is None:
            return None
        gone = {int(d) % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
        return None if axis in gone else replace(label, axis=axis - sum(d < axis for d in gone))
    return None


def _moved_axis(name: str, x: Tensor, axis: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Where transpose or permute puts an axis; ``None`` for other functions."""
    if name in ("transpose", "swapaxes", "swapdims") and len(args) >= 3:
        a, b = int(args[1]) % x.dim(), int(args[2]) % x.dim()
        return {a: b, b: a}.get(axis, axis)
    if name == "permute":
        dims = kwargs.get("dims", args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:])
        return [int(d) % x.dim() for d in dims].index(axis)
    return None


def _reshaped(label: Label, x: Tensor, out: Tensor) -> Label | None:
    """Find the axis of ``out`` that begins where the channel axis of ``x`` begins (row-major)."""
    before = math.prod(x.shape[: label.axis])
    size = x.shape[label.axis]
    for axis in range(out.dim()):
        if math.prod(out.shape[:axis]) != before or out.shape[axis] == 1:
            continue
        if out.shape[axis] == size:
            return replace(label, axis=axis)
        if out.shape[axis] % size == 0:
            repeat = out.shape[axis] // size
            spans = tuple(replace(s, at=s.at * repeat, repeat=s.repeat * repeat) for s in label.spans)
            return Label(axis, spans)
        return None
    return None


def _sliced(name: str, label: Label, x: Tensor, args: tuple[Any, ...], out: Tensor) -> Label | None:
    """Follow ``x[...]`` of ints, full slices and one plain slice on the channel axis, and ``narrow``."""
    if name == "narrow":
        dim, start, length = int(args[1]) % x.dim(), int(args[2]), int(args[3])
        return label.narrowed(start, length) if dim == label.axis else label
    if name == "select":
        dim = int(args[1]) % x.dim()
        return None if dim == label.axis else replace(label, axis=label.axis - (dim < label.axis))
    if name == "index_select":
        return label if int(args[1]) % x.dim() != label.axis else None
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(not isinstance(i, (int, slice, type(Ellipsis))) for i in index):
        return None
    if Ellipsis in index:
        at = index.index(Ellipsis)
        fill = (slice(None),) * (x.dim() - len(index) + 1)
        index = index[:at] + fill + index[at + 1 :]
    axis = label.axis
    here = index[axis] if axis < len(index) else slice(None)
    if not isinstance(here, slice):
        return None
    start, stop, step = here.indices(x.shape[axis])
    if step != 1:
        return None
    moved = replace(label, axis=axis - sum(isinstance(i, int) for i in index[:axis]))
    return moved if (start, stop) == (0, x.shape[axis]) else moved.narrowed(start, max(0, stop - start))
