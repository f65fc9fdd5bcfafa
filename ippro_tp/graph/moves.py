"""Operations that only move channels: views, permutations, slices, pieces, concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .labels import compact, squeezed, varying
from .rules import rule

if TYPE_CHECKING:
    from .provenance import Provenance

MOVES = (
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "slice", "select",
    "unsqueeze", "squeeze", "alias", "detach", "clone", "as_strided", "flip", "roll", "repeat", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "index_select", "gather", "index", "diagonal",
    "unfold", "tril", "triu", "lift_fresh", "lift", "view_copy", "movedim", "rot90", "contiguous", "narrow",
    "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "unbind",
    "repeat_interleave", "take_along_dim", "tensor_split", "view_as", "expand_as", "swapaxes", "swapdims",
)  # fmt: skip
FLOAT_MOVES = ("constant_pad_nd", "im2col", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
               "replication_pad2d", "replication_pad3d", "_pad_circular", "pad")  # fmt: skip
VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "view_as"}
RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "pixel_shuffle", "pixel_unshuffle"}
PIECES = {"split", "unsafe_split", "chunk", "unsafe_chunk"}


@rule(*MOVES, *FLOAT_MOVES)
def move(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """The same operation on the labels."""
    out = func(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    planes = mode.planes(args[0]) if isinstance(args[0], Tensor) else []
    results = out if isinstance(out, (tuple, list)) else [out]
    moved: list[list[Tensor]] = [[] for _ in results]
    for plane in planes:
        if name in ("constant_pad_nd", "pad"):
            there: Any = _padded(mode.canonical(plane), args[1], out.shape)
        elif name in FLOAT_MOVES:
            there = func(plane.double(), *args[1:], **kwargs).long()
        elif name in ("clone", "contiguous", "alias", "detach", "lift_fresh", "lift"):
            there = plane
        elif name in VIEWS:
            there = plane.reshape(out.shape)
        else:
            there = func(plane, *args[1:], **{k: v for k, v in kwargs.items() if k != "memory_format"})
        parts = there if isinstance(there, (tuple, list)) else [there]
        for number, part in enumerate(parts):
            moved[number].append(part)
        if name == "select" and varying(mode.canonical(plane)):
            small = mode.canonical(plane)
            if small.shape[args[1] % plane.dim()] > 1 and not varying(mode.canonical(parts[0])):
                mode.fix(parts[0], "one channel is picked out by its number")
    wild = isinstance(args[0], Tensor) and mode.is_wild(args[0])
    for result, found in zip(results, moved, strict=True):
        kept = [small for plane in found if bool((small := mode.canonical(plane)).any())]
        mode.put(result, kept, wild=wild)
        if name in RESHAPES and kept:
            mode.site(kept)
    if name in PIECES and len(results) > 1 and planes:
        _equal_pieces(mode, [mode.planes(r) for r in results if r.shape == results[0].shape], len(results))
    elif name == "slice" and moved[0]:
        _note_slice(mode, args, out)
    return out


def _padded(small: Tensor, pads: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Labels of a padded tensor: added positions belong to the channels along other axes."""
    for pair in range(len(pads) // 2):
        axis = small.dim() - 1 - pair
        if small.shape[axis] > 1:
            around = [0, 0] * pair + list(pads[2 * pair : 2 * pair + 2])
            small = torch.constant_pad_nd(small, around, 0)
    return small.expand(shape)


def _note_slice(mode: Provenance, args: Any, out: Tensor) -> None:
    """Slices that cut a tensor into equal parts are pieces: forward passes halve what there is."""
    axis = (args[1] if len(args) > 1 else 0) % out.dim()
    size, part = args[0].shape[axis], out.shape[axis]
    if part in (0, size) or size % part:
        return
    pieces = mode.slices.setdefault(args[0], {}).setdefault((axis, part), {})
    pieces[args[2] if len(args) > 2 and args[2] is not None else 0] = mode.planes(out)
    if len(pieces) == size // part and set(pieces) <= set(range(0, size, part)):
        _equal_pieces(mode, [pieces[start] for start in sorted(pieces)], len(pieces))


def _equal_pieces(mode: Provenance, same: Sequence[Sequence[Tensor]], count: int) -> None:
    """Pieces of one size stay pieces of one size: the same channels of each go."""
    if len(same) < count:
        return
    for planes in zip(*same, strict=False):
        if len({compact(p).shape for p in planes}) == 1:
            mode.site(
                [squeezed(torch.stack([mode.facts.classes.find(compact(p)) for p in planes]))], frozenset({0})
            )


@rule("as_strided_", "squeeze_", "unsqueeze_", "t_", "transpose_", "resize_")
def reshaped_in_place(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Another shape or other strides for the same numbers: the same operation on a copy of the labels."""
    x = args[0]
    planes, shape = mode.planes(x), x.shape
    out = func(*args, **kwargs)
    if out.shape != shape and out.numel() == shape.numel() and func._schema.name != "aten::t_":
        planes = [plane.reshape(out.shape) for plane in planes] if "squeeze" in func._schema.name else []
    elif out.shape != shape:
        planes = []
    mode.put(out, planes)
    if x is not out:
        mode.put(x, planes)
    return out


@rule("cat", "concat", "concatenate")
def cat(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Channels along the axis of concatenation stand side by side, those along others meet."""
    out = func(*args, **kwargs)
    pieces = [t for t in args[0] if t.numel() or t.dim() == out.dim()]
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % max(1, out.dim())
    _join(mode, pieces, axis, out)
    return out


@rule("stack")
def stack(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Like ``cat`` along a new axis."""
    out = func(*args, **kwargs)
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    pieces = []
    for tensor in args[0]:
        piece = tensor.unsqueeze(axis)
        mode.put(piece, [plane.unsqueeze(axis) for plane in mode.planes(tensor)], wild=mode.is_wild(tensor))
        pieces.append(piece)
    _join(mode, pieces, axis, out)
    return out


def _join(mode: Provenance, pieces: Sequence[Tensor], axis: int, out: Tensor) -> None:
    found = [
        [small for plane in mode.planes(piece) if bool((small := mode.canonical(plane)).any())] for piece in pieces
    ]
    planes = []
    along = [[p for p in own if varying(p) == (axis,) or not varying(p)] for own in found]
    if any(along):
        parts = []
        for piece, own in zip(pieces, along, strict=True):
            size = [1] * out.dim()
            size[axis] = piece.shape[axis]
            parts.append(own[0].expand(size) if own else torch.zeros(size, dtype=torch.long))
            for other in own[1:]:
                mode.union(own[0], other)
        planes.append(torch.cat(parts, axis))
    across = [[p for p in own if set(varying(p)) - {axis}] for own in found]
    keys = list(dict.fromkeys(tuple(a for a in varying(p) if a != axis) for own in across for p in own))
    for key in keys:
        parts, reference = [], None
        for piece, own in zip(pieces, across, strict=True):
            match = [p for p in own if tuple(a for a in varying(p) if a != axis) == key]
            size = [s if a in key or a == axis else 1 for a, s in enumerate(piece.shape)]
            part = match[0].expand(size) if match else torch.zeros(size, dtype=torch.long)
            if match or not mode.is_wild(piece):
                first = part.narrow(axis, 0, 1) if part.shape[axis] else None
                if first is not None and reference is not None:
                    mode.union(reference, first)
                reference = first if reference is None else reference
            parts.append(part)
        if any(
            axis in varying(p) for own in across for p in own if tuple(a for a in varying(p) if a != axis) == key
        ):
            planes.append(torch.cat(parts, axis))
        elif reference is not None:
            planes.append(reference)
    mode.put(out, planes)
    mode.site([mode.canonical(plane) for plane in planes])
