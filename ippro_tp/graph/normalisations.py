"""Normalisations: of each channel by itself, or over the channels that remain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .labels import varying
from .masks import normalized
from .meetings import meet
from .rules import rule

if TYPE_CHECKING:
    from .provenance import Provenance


def _affine(mode: Provenance, x: Tensor, axis: int, vectors: tuple[Any, ...]) -> list[Tensor]:
    """Planes of ``x`` after parameters along one of its axes met it."""
    operands = [x]
    for vector in vectors:
        if isinstance(vector, Tensor) and vector.numel() > 1:
            wide = vector.view([-1 if a == axis else 1 for a in range(x.dim())])
            mode.put(wide, [p.reshape(wide.shape) for p in mode.planes(vector)])
            operands.append(wide)
    return meet(mode, x.shape, operands)


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
    "cudnn_batch_norm",
    "batch_norm",
    "_native_batch_norm_legit_functional",
    "_batch_norm_no_update",
    reads=True,
)
def batch_norm(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Each channel by itself, with running statistics or those of the batch."""
    out = func(*args, **kwargs)
    x = args[0]
    training = [a for a in args[3:6] if isinstance(a, bool)]
    alive = mode.alive(x)
    others = [a for a in range(x.dim()) if a != 1]
    if alive is not None and any(training) and any(alive.shape[a] > 1 for a in others):
        eps = [a for a in args if isinstance(a, float)][-1]
        made, mean, inverse = normalized(x, alive, others, eps)
        shape = [-1 if a == 1 else 1 for a in range(x.dim())]
        for number, value in ((1, torch.mul), (2, torch.add)):
            if isinstance(args[number], Tensor):
                made = value(made, args[number].view(shape))
        out = (made, mean.reshape(-1), inverse.reshape(-1), *out[3:])
    mode.put(out[0] if isinstance(out, tuple) else out, _affine(mode, x, 1, args[1:5]))
    return out


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm", reads=True)
def layer_norm(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Over the last axes, of the channels that remain."""
    x, shape = args[0], args[1]
    out = func(*args, **kwargs)
    name = func._schema.name
    axes = list(range(x.dim() - len(shape), x.dim()))
    weights = [a for a in args[2:4] if isinstance(a, Tensor)]
    alive = mode.alive(x)
    extra: list[Tensor] = []
    if alive is not None and any(alive.shape[a] > 1 for a in axes):
        eps = [a for a in (*args, *kwargs.values()) if isinstance(a, float)]
        if "rms" in name:
            epsilon = eps[-1] if eps else torch.finfo(x.dtype).eps
            weight = alive.expand(x.shape).to(x.dtype)
            power = (x.square() * weight).sum(axes, keepdim=True) / weight.sum(axes, keepdim=True)
            made = x * (power + epsilon).rsqrt()
        else:
            made, *extra = normalized(x, alive, axes, eps[-1])
        if weights:
            made = made * weights[0]
        if len(weights) > 1:
            made = made + weights[1]
        made = made.contiguous()  # as the operation's own: what follows may depend on it
        out = (made, *extra)[: len(out)] if isinstance(out, tuple) else made
    mode.put(out[0] if isinstance(out, tuple) else out, meet(mode, x.shape, [x, *weights]))
    return out


@rule("native_group_norm", "group_norm", reads=True)
def group_norm(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Over the channels of a group that remain; every group keeps the same number."""
    out = func(*args, **kwargs)
    x, weight, bias = args[0], args[1], args[2]
    groups = int(args[6] if func._schema.name == "aten::native_group_norm" else args[1])
    if func._schema.name == "aten::group_norm":
        weight, bias = args[2], args[3]
    eps = [a for a in args if isinstance(a, float)][-1]
    alive = mode.alive(x)
    if alive is not None:
        flat = x.reshape(x.shape[0], groups, -1)
        made, mean, inverse = normalized(flat, alive.expand(x.shape).reshape(flat.shape), [2], eps)
        made = made.reshape(x.shape)
        shape = [-1 if a == 1 else 1 for a in range(x.dim())]
        made = made if weight is None else made * weight.view(shape)
        made = made if bias is None else made + bias.view(shape)
        out = (made, mean.flatten(1), inverse.flatten(1)) if isinstance(out, tuple) else made
    planes = _affine(mode, x, 1, (weight, bias))
    mode.put(out[0] if isinstance(out, tuple) else out, planes)
    if groups > 1:
        for plane in planes:
            small = mode.canonical(plane)
            if varying(small) == (1,):
                mode.site([small.reshape(groups, -1)], frozenset({0}))
    return out
