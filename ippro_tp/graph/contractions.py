"""Operations that sum over channels: products and convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .labels import varying
from .masks import zeroed
from .matrices import note_product
from .meetings import apart, meet
from .rules import rule

if TYPE_CHECKING:
    from .provenance import Provenance


def _pair(mode: Provenance, one: list[Tensor], other: list[Tensor], size: int) -> list[Tensor]:
    """Channels that are summed over meet; canonical planes of both, aligned, come back united."""
    if size < 2:
        return []
    one, other = (sorted(planes, key=lambda p: -len(varying(p))) for planes in (one, other))
    for planes in (one, other):
        for plane in planes[1:]:
            if varying(plane) == varying(planes[0]):  # otherwise their tensor says how they go together
                mode.union(planes[0], plane)
    if one and other:
        mode.union(one[0], other[0])
    else:
        for plane in (*one, *other):
            mode.fix(plane, "it is multiplied with a tensor that has no channels there")
    return [*one[:1], *other[:1]]


def _factors(mode: Provenance, a: Tensor, b: Tensor, axis: int, other: int) -> tuple[Tensor, Tensor]:
    """Operands of a product summed over an axis of each, with zeros for the removed channels.

    Zeros in the smaller one are enough, along the axis: whoever reads the others leaves them out.
    """
    masks = mode.dead(a), mode.dead(b)
    along = [[m for m in own if m.shape[x] > 1] for own, x in zip(masks, (axis, other), strict=True)]
    if not along[0] and not along[1]:
        return a, b
    if len(along[0]) == len(along[1]) == 1:
        one, two = along[0][0], along[1][0]
        sizes = one.numel(), two.numel(), one.shape[axis], two.shape[other]
        if len(set(sizes)) == 1 and torch.equal(one.reshape(-1), two.reshape(-1)):
            return (zeroed(a, [one]), b) if a.numel() <= b.numel() else (a, zeroed(b, [two]))
    return zeroed(a, masks[0]), zeroed(b, masks[1])


@rule("bmm", "mm", "mv", "dot", reads=True)
def product(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Matrix product, batched or not."""
    a, b = args[:2]
    out = func(*_factors(mode, a, b, -1, max(0, b.dim() - 2)))
    mode.put(out, _product(mode, a, b))
    return out


@rule("addmm", "baddbmm", reads=True)
def add_product(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Matrix product and a bias."""
    bias, a, b = args[:3]
    out = func(bias, *_factors(mode, a, b, -1, b.dim() - 2), *args[3:], **kwargs)
    mode.put(out, _product(mode, a, b))
    mode.put(out, meet(mode, out.shape, [out, bias]))
    return out


@rule("linear", reads=True)
def linear(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """``x @ w.T + bias`` where it is not taken apart."""
    x, w = args[:2]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    out = func(*_factors(mode, x, w, -1, -1), bias)
    flat, turned = x.reshape(-1, x.shape[-1]), w.t()
    mode.put(flat, [p.reshape(flat.shape) for p in mode.planes(x)])
    mode.put(turned, [p.t() for p in mode.planes(w)])
    planes = [p.expand(flat.shape[0], w.shape[0]).reshape(out.shape) for p in _product(mode, flat, turned)]
    mode.put(out, planes)
    if bias is not None:
        mode.put(out, meet(mode, out.shape, [out, bias]))
    return out


def _product(mode: Provenance, a: Tensor, b: Tensor) -> list[Tensor]:
    """Planes of ``a @ b``, aligned as ``(n, m, k, p)``."""
    size = a.shape[-1]
    batched = a.dim() == 3
    if mode.removed is None and a.dim() == b.dim() == 2:
        note_product(mode, a, 1, 0)
        note_product(mode, b, 0, 1)
    left = [mode.canonical(p) for p in mode.planes(a)]
    right = [mode.canonical(p) for p in mode.planes(b)]
    if a.dim() == 1:
        left = [p.view(1, -1) for p in left]
    if b.dim() == 1:
        right = [p.view(-1, 1) for p in right]
    if not batched:
        left, right = [p.unsqueeze(0) for p in left], [p.unsqueeze(0) for p in right]
    left = [p.unsqueeze(3) for p in left]  # n, m, k, 1
    right = [p.unsqueeze(1) for p in right]  # n, 1, k, p
    summed = _pair(
        mode,
        [p for p in left if 2 in varying(p)],
        [p for p in right if 2 in varying(p)],
        size,
    )
    planes = [p for p in (*left, *right) if 2 not in varying(p) and bool(p.any())]
    if summed:
        wide = [mode.canonical(p) for p in summed]
        united = wide[0] if len(varying(wide[0])) >= len(varying(wide[-1])) else wide[-1]
        if len(varying(united)) > 1:
            mode.site([united, *[p for p in planes if 0 in varying(p)]], prefer=0)
            there = mode.consumed(united, [2])
            if there is not None:
                planes.append(there)
    planes = [p.select(2, 0) for p in planes]  # n, m, p
    merged: dict[tuple[int, ...], Tensor] = {}
    for plane in planes:
        key = varying(plane)
        if key in merged:
            mode.union(merged[key], plane)
        else:
            merged[key] = plane
    planes = apart(mode, [mode.canonical(p) for p in merged.values() if bool(p.any())])
    mode.site(planes, prefer=0 if any(0 in varying(p) for p in planes) else None)
    if not batched:
        planes = [p.squeeze(0) for p in planes]
    if a.dim() == 1:
        planes = [p.squeeze(-2) for p in planes]
    if b.dim() == 1:
        planes = [p.squeeze(-1) for p in planes]
    return planes


def _vector(mode: Provenance, tensor: Tensor, axis: int) -> Tensor | None:
    """Labels of a tensor along one axis; channels along other axes stay as they are."""
    found = None
    for plane in mode.planes(tensor):
        small = mode.canonical(plane)
        if varying(small) == (axis,):
            if found is not None:
                mode.union(found, small)
            found = small if found is None else found
    return None if found is None else found.reshape(-1)


@rule("convolution", "_convolution", "conv2d", "conv1d", "conv3d", reads=True)
def convolution(mode: Provenance, func: Any, args: Any, kwargs: Any) -> Any:
    """Convolution of any number of axes, grouped or transposed."""
    x, w, bias = args[0], args[1], args[2]
    transposed, groups = bool(args[6]), int(args[8])
    out = func(*_factors(mode, x, w, 1, 0 if args[6] else 1), *args[2:], **kwargs)
    into, made = (0, 1) if transposed else (1, 0)
    reads, writes = _vector(mode, w, into), _vector(mode, w, made)
    for plane in mode.planes(w):
        small = mode.canonical(plane)
        if set(varying(small)) - {0, 1}:
            mode.fix(small, "positions of a kernel")
    planes = []
    carried = None
    pointwise = {*w.shape[2:], *args[3]} == {1} and not any(args[4])  # every position by itself
    for plane in mode.planes(x):
        small = mode.canonical(plane)
        axes = varying(small)
        if not pointwise and set(axes) - {0, 1} and 1 not in axes:
            mode.fix(small, "a convolution mixes its positions")
        elif 1 not in axes:
            planes.append(small)
        elif carried is None:
            carried = small
        else:
            mode.union(carried, small)
    channels, width = x.shape[1], out.shape[1]
    if transposed and groups > 1 and not groups == channels == width:
        for vector in (reads, writes, carried):
            if vector is not None:
                mode.fix(vector, "a transposed convolution with groups")
        mode.put(out, [])
        return out
    per_in, per_out = channels // groups, width // groups
    shape = (1, -1) + (1,) * (x.dim() - 2)
    if groups > 1 and per_in == 1:  # one channel in, per_out channels out
        slots = reads if transposed else writes
        labels = slots if slots is not None else torch.zeros(width, dtype=torch.long)
        if carried is not None:
            wide = carried.repeat_interleave(per_out, 1) if per_out > 1 else carried
            mode.union(wide, labels.view(shape))
            mode.put(out, [*planes, labels.view(shape) if slots is not None else mode.canonical(wide)])
        else:
            mode.fix(labels, "its input has no channels")
            mode.put(out, planes)
    else:
        if channels > 1:
            if reads is not None and groups > 1 and not transposed:
                reads = reads.repeat(groups)
            if reads is not None and carried is not None:
                mode.union(carried, reads.view(shape))
            else:
                for vector in (reads, carried):
                    if vector is not None:
                        mode.fix(vector, "a convolution reads what has no channels")
        if groups > 1:
            if reads is not None:
                mode.site([mode.facts.classes.find(reads).view(groups, per_in)], frozenset({0}))
            if writes is not None and per_out > 1:
                mode.site([mode.facts.classes.find(writes).view(groups, per_out)], frozenset({0}))
            elif writes is not None:
                mode.fix(writes, "each group of a convolution makes one channel")
        if writes is not None:
            planes.append(writes.view(shape))
        mode.put(out, planes)
    if isinstance(bias, Tensor):
        wide = bias.view(shape)
        mode.put(wide, [p.reshape(shape) for p in mode.planes(bias)])
        mode.put(out, meet(mode, out.shape, [out, wide]))
    return out
