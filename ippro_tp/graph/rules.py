"""What operations do to channels: move them, meet element by element, sum over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from .labels import compact, squeezed, varying

if TYPE_CHECKING:
    from .provenance import Provenance

Rule = Callable[["Provenance", Any, Any, Any], Any]
RULES: dict[str, Rule] = {}
READERS: set[str] = set()
"""Operations whose rule asks which elements are of channels that remain."""


def rule(*names: str, reads: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for operations of ``torch.ops.aten``; with ``reads`` it leaves out removed channels."""

    def register(made: Rule) -> Rule:
        for name in names:
            RULES[name] = made
        if reads:
            READERS.update(names)
        return made

    return register


# -- moving ----------------------------------------------------------------------------------------------------

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


# -- element by element ----------------------------------------------------------------------------------------


def meet(mode: Provenance, shape: Sequence[int], operands: Sequence[Tensor]) -> list[Tensor]:
    """Planes of a result whose elements are made of the elements at the same place of the operands."""
    rank = len(shape)
    found: dict[tuple[int, ...], Tensor] = {}
    own: list[tuple[tuple[int, ...], set[tuple[int, ...]]]] = []
    for tensor in operands:
        planes = mode.planes(tensor)
        if (not planes and tensor.numel() < 2) or mode.is_wild(tensor):
            continue
        keys = set()
        for plane in planes:
            small = mode.canonical(plane)
            if not bool(small.any()):
                continue
            small = small.view((1,) * (rank - small.dim()) + tuple(small.shape))
            key = varying(small)
            keys.add(key)
            if key in found:
                mode.union(found[key], small)
            else:
                found[key] = small
        own.append(((1,) * (rank - tensor.dim()) + tuple(tensor.shape), keys))
    blocked: set[int] = set()
    for size, keys in own:
        covered = {axis for key in keys for axis in key}
        for key, plane in found.items():
            bare = {axis for axis in key if size[axis] > 1} - covered
            if key in keys or not bare:
                continue
            if bare == set(key):
                mode.fix(plane, "it meets a tensor that has no channels there")
            else:
                blocked |= bare
    planes = list(found.values())
    if len(found) > 1 or blocked:
        planes = mode.apart([mode.canonical(p) for p in planes])
        mode.site(planes, frozenset(blocked))
    return planes


MEETINGS = (
    "copy_", "copy", "_to_copy", "masked_fill", "masked_fill_", "where", "lerp", "addcmul", "addcdiv",
     "addcmul_", "rand_like", "randn_like", "zeros_like", "ones_like", "empty_like", "full_like",
    "bernoulli", "native_dropout", "dropout", "fill_", "zero_", "prelu", "_prelu_kernel", "rrelu", "gelu",
    "bernoulli_", "normal_", "uniform_", "hardswish", "hardsigmoid", "hardsigmoid_", "silu", "silu_",
    "mish", "mish_", "leaky_relu", "elu", "elu_", "selu", "celu", "relu6", "hardtanh", "hardtanh_",
    "log_sigmoid", "log_sigmoid_forward", "threshold", "hardshrink", "softshrink", "relu", "relu_",
    "sigmoid", "sigmoid_", "tanh", "tanh_", "erf", "exp", "gelu_", "threshold_", "nan_to_num", "clamp",
    "to", "type_as", "view_as_real_copy", "_foreach_add", "softplus", "hardswish_", "leaky_relu_",
)  # fmt: skip
"""Element-wise operations that PyTorch does not tag as such, and copies."""


def pointwise(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Element by element, in place or not."""
    operands = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    before = {id(t): mode.planes(t) for t in operands}
    written = args[0] if _writes(func) and isinstance(args[0], Tensor) else None
    planes: list[Tensor] = []
    if any(before.values()):
        planes = meet(mode, torch.broadcast_shapes(*(t.shape for t in operands)), operands)
    wild = not planes and bool(operands) and all(t.numel() < 2 or mode.is_wild(t) for t in operands)
    out = func(*args, **kwargs)
    if written is not None:
        mode.write(written, planes)
        if written is not out and isinstance(out, Tensor):
            mode.put(out, planes)
        return out
    for result in out if isinstance(out, (tuple, list)) else [out]:
        if isinstance(result, Tensor):
            mode.put(result, planes if planes and _fits(planes, result) else [], wild=wild)
    return out


def _fits(planes: Sequence[Tensor], result: Tensor) -> bool:
    return all(
        p.dim() == result.dim() and all(a in (1, b) for a, b in zip(p.shape, result.shape, strict=True))
        for p in planes
    )


def _writes(func: Any) -> bool:
    arguments = func._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write


@rule(*MEETINGS)
def meeting(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """As :func:`pointwise`."""
    if func._schema.name == "aten::_prelu_kernel" or func._schema.name == "aten::prelu":
        x, weight = args
        if weight.numel() > 1 and weight.dim() == 1:
            wide = weight.view(-1, *[1] * (x.dim() - 2))
            mode.put(wide, [p.view(-1, *[1] * (x.dim() - 2)) for p in mode.planes(weight)])
            planes = meet(mode, x.shape, [x, wide])
            out = func(*args, **kwargs)
            mode.put(out, planes)
            return out
    return pointwise(mode, func, args, kwargs)


@rule("glu")
def gated(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """One half of the channels meets the other."""
    out = func(*args, **kwargs)
    axis = (args[1] if len(args) > 1 else -1) % out.dim()
    halves = []
    for start in (0, out.shape[axis]):
        half = args[0].narrow(axis, start, out.shape[axis])
        mode.put(half, [plane.narrow(axis, start, out.shape[axis]) for plane in mode.planes(args[0])])
        halves.append(half)
    mode.put(out, meet(mode, out.shape, halves))
    return out


@rule(
    "zeros",
    "ones",
    "empty",
    "full",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "empty_strided",
    "new_empty_strided",
    "scalar_tensor",
)
def create(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """A tensor of one number."""
    out = func(*args, **kwargs)
    mode.put(out, [], wild=True)
    return out


# -- what nobody describes -------------------------------------------------------------------------------------


def fallback(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Pointwise operations by their tag; of anything else the channels that enter stay."""
    if torch.Tag.pointwise in func.tags:
        return pointwise(mode, func, args, kwargs)
    return opaque(mode, func, args, kwargs)


def opaque(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """The channels that enter an operation stay, and none leave it."""
    operands = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    out = func(*args, **kwargs)
    for tensor in operands:
        for plane in mode.planes(tensor):
            mode.fix(plane, f"it enters {func._schema.name}, which is not understood")
    tree_map(lambda t: mode.put(t, []) if isinstance(t, Tensor) and t not in mode._shadows else None, out)
    return out
