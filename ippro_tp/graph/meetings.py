"""Operations element by element, in which channels meet, and operations that nobody describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from .labels import varying
from .rules import rule

if TYPE_CHECKING:
    from .provenance import Provenance


def apart(mode: Provenance, planes: Sequence[Tensor]) -> list[Tensor]:
    """Those of some canonical planes that vary: a channel that all elements belong to beside others stays."""
    wide = [plane for plane in planes if varying(plane)]
    if not wide:
        return list(planes)
    for plane in planes:
        if not varying(plane):
            mode.fix(plane, "every channel of a tensor depends on it")
    return wide


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
        planes = apart(mode, [mode.canonical(p) for p in planes])
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
