"""Reductions and norms over the channels that remain, on tensors that still hold all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def zeroed(tensor: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """``tensor`` with zeros where a mask says so."""
    for mask in masks:
        tensor = torch.where(mask, torch.zeros((), dtype=tensor.dtype), tensor)
    return tensor


def moments(x: Tensor, alive: Tensor, axes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over ``axes`` (kept) of the elements that are alive."""
    weight = alive.expand(x.shape).to(x.dtype)
    count = weight.sum(axes, keepdim=True)
    mean = (x * weight).sum(axes, keepdim=True) / count.clamp_min(1)
    variance = ((x - mean).square() * weight).sum(axes, keepdim=True) / count.clamp_min(1)
    return mean, variance, count


def reduced(func: Any, args: Any, kwargs: Any, x: Tensor, alive: Tensor, axes: list[int]) -> Any:
    """The reduction of what is alive; ``dim`` and ``keepdim`` as in the call."""
    name = func._schema.name.removeprefix("aten::")
    zero = torch.where(alive, x, torch.zeros((), dtype=x.dtype))
    if name in ("sum", "linalg_vector_norm", "norm", "any"):
        return func(zero, *args[1:], **kwargs)
    if name in ("amax", "max", "logsumexp"):
        return func(x.masked_fill(~alive, float("-inf")), *args[1:], **kwargs)
    if name in ("amin", "min"):
        return func(x.masked_fill(~alive, float("inf")), *args[1:], **kwargs)
    if name in ("prod", "all"):
        return func(torch.where(alive, x, torch.ones((), dtype=x.dtype)), *args[1:], **kwargs)
    plain = func(*args, **kwargs)
    mean, variance, count = moments(x, alive, axes)
    correction = kwargs.get("correction")
    if correction is None:
        correction = 1.0
        if "unbiased" in kwargs or (
            len(args) > 2 and isinstance(args[2], bool) and func._overloadname != "correction"
        ):
            correction = float(kwargs.get("unbiased", args[2] if len(args) > 2 else True))
    variance = variance * count / (count - correction).clamp_min(1e-12)
    shape = (plain[0] if isinstance(plain, tuple) else plain).shape
    if name == "mean":
        return mean.reshape(shape)
    if name == "var":
        return variance.reshape(shape)
    if name == "std":
        return variance.sqrt().reshape(shape)
    if name in ("var_mean", "std_mean"):
        first = variance if name == "var_mean" else variance.sqrt()
        return first.reshape(shape), mean.reshape(shape)
    return plain


def normalized(x: Tensor, alive: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` normalised over ``axes`` by what is alive, with the mean and the reciprocal deviation."""
    mean, variance, _ = moments(x, alive, axes)
    inverse = (variance + eps).rsqrt()
    return (x - mean) * inverse, mean, inverse
