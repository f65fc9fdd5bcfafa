"""Residual additions: where a layer's output is added to another tensor, found while a model runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .cutlayer import CutLayer
from .passes import read_by

aten = torch.ops.aten
ADD = (aten.add.Tensor, aten.add_.Tensor)
MULTIPLY = (aten.mul.Tensor, aten.mul_.Tensor)
LEAST_FACTOR = 1e-2
"""Least factor of a channel, as a part of their root mean square, that a change of a sum is divided by."""


@dataclass(frozen=True)
class Branch:
    """What a layer gives on its way to an addition: through its BatchNorm, factors per channel, permutations.

    Attributes:
        layer: whose output it is.
        steps: what has been done to the output so far: functions of it.
        factors: those of the channels so far, ``(channels,)``.
        dims: dimension of the layer's output that each dimension is now.
        read: what the layer read, and how often that had been changed in place by then.
    """

    layer: CutLayer
    steps: tuple[Callable[[Tensor], Tensor], ...]
    factors: Tensor
    dims: tuple[int, ...]
    read: tuple[Tensor, int] | None = None

    @property
    def channel(self) -> int:
        """Dimension of the channels, now."""
        return self.dims.index(1 if isinstance(self.layer.module, _ConvNd) else len(self.dims) - 1)

    def apply(self, y: Tensor) -> Tensor:
        """Another output of the layer, taken the same way."""
        for step in self.steps:
            y = step(y)
        return y

    def as_given(self, x: Tensor) -> Tensor:
        """A tensor of the addition with dimensions in the order of the layer's output."""
        return x.permute([self.dims.index(d) for d in range(len(self.dims))])

    def divisors(self) -> Tensor:
        """``(channels,)``: the factors, those next to zero replaced by small ones of their sign."""
        least = LEAST_FACTOR * self.factors.square().mean().sqrt().clamp_min(torch.finfo(self.factors.dtype).tiny)
        return torch.where(self.factors < 0, -1.0, 1.0) * self.factors.abs().clamp_min(least)


Meet = Callable[[Branch, Tensor, Tensor], Tensor | None]


class Additions(TorchDispatchMode):
    """Follows outputs of layers to where they are added to a tensor of the same shape.

    Only outputs that nothing else reads on the way are followed. Of two layers whose outputs are added to each
    other, the one that reads more per output counts.

    Args:
        layers: those to follow.
        meet: called before an addition with the branch, its values and what they are added to; what it
            returns is added in their place, ``None`` changes nothing.

    Attributes:
        added: names of layers whose outputs were added and read by nothing else, so far.
        refused: names of those that were read otherwise.
    """

    def __init__(self, layers: Sequence[CutLayer], meet: Meet | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers, self._meet = layers, meet
        self._branches: dict[int, tuple[weakref.ref[Tensor], Branch]] = {}
        self._done: dict[int, tuple[weakref.ref[Tensor], Branch]] = {}
        self._inside: nn.Module | None = None
        self._handles: list[Any] = []
        self._found: set[str] = set()
        self.refused: set[str] = set()

    @property
    def added(self) -> set[str]:
        """See the class."""
        return self._found - self.refused

    def __enter__(self) -> Additions:
        for layer in self._layers:
            self._handles.append(layer.module.register_forward_hook(self._starts(layer), with_kwargs=True))
            if layer.norm is not None:
                self._handles += [
                    layer.norm.register_forward_pre_hook(self._norm_begins),
                    layer.norm.register_forward_hook(self._norm_ends, always_call=True),
                ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._branches.clear()
        self._done.clear()
        self._inside = None

    def returned(self, outputs: Any) -> None:
        """Note that a model returns these: layers whose output is among them are refused."""
        for x in pytree.tree_leaves(outputs):
            self._read_again(x)
            if (branch := self._of(x)) is not None:
                self._refuse(branch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside is not None or not (self._branches or self._done):
            return func(*args, **kwargs)
        given = _tensors(args, kwargs)
        for x in given:
            self._read_again(x)
        read = [(x, branch) for x in given if (branch := self._of(x)) is not None]
        if not read:
            return func(*args, **kwargs)
        for x, branch in read:
            self._finish(x, branch)
        if func in ADD and _alike(args) and kwargs.get("alpha", 1) == 1:
            return self._add(func, args, read)
        out = func(*args, **kwargs)
        if func is aten.mul.Tensor and args[1] is read[0][0]:
            args = args[::-1]
        following = _through(func, args, read[0][1]) if len(read) == 1 and args[0] is read[0][0] else None
        if following is None:
            self._refuse(*(branch for _, branch in read))
        else:
            self._follow(out, following)
        return out

    def _add(self, func: Any, args: Any, read: list[tuple[Tensor, Branch]]) -> Any:
        value, branch = max(read, key=lambda each: each[1].layer.features)
        self._refuse(*(other for _, other in read if other is not branch))
        if args[0] is args[1]:
            self._refuse(branch)
            return func(*args)
        if branch.read is not None and branch.read[0]._version != branch.read[1]:
            self._refuse(branch)  # what it read is no longer there to refit it to
        first = args[0] is value
        self._found.add(branch.layer.name)
        changed = None
        if self._meet is not None and branch.layer.name not in self.refused:
            changed = self._meet(branch, value, args[1] if first else args[0])
        if func is aten.add_.Tensor and first:
            self._done.pop(id(value), None)  # it is the sum from here on
        if changed is None:
            return func(*args)
        if not first:
            return func(args[0], changed)
        return func(value.copy_(changed) if func is aten.add_.Tensor else changed, args[1])

    def _starts(self, layer: CutLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            x = read_by(args, kwargs)
            if not isinstance(y, Tensor) or y.is_nested or not y.is_floating_point():
                return
            channels = y.shape[1 if isinstance(module, _ConvNd) else -1]
            factors = torch.ones(channels, dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)
            read = None if x is None or x.is_inference() else (x, x._version)
            self._follow(y, Branch(layer, (), factors, tuple(range(y.dim())), read))

        return hook

    def _norm_begins(self, norm: nn.Module, args: Any) -> None:
        self._inside = norm

    def _norm_ends(self, norm: nn.Module, args: Any, out: Any) -> None:
        self._inside = None
        branch = self._of(args[0]) if len(args) == 1 else None
        if branch is None:
            return
        self._finish(args[0], branch)
        if branch.layer.norm is not norm or norm.running_var is None or not isinstance(out, Tensor):
            self._refuse(branch)
            return
        scale = (norm.running_var + norm.eps).to(branch.factors.dtype).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.detach()
        step: Callable[[Tensor], Tensor] = norm.forward
        self._follow(out, replace(branch, steps=(*branch.steps, step), factors=branch.factors * scale))

    def _of(self, x: Any) -> Branch | None:
        known = self._branches.get(id(x))
        return known[1] if known is not None and known[0]() is x else None

    def _follow(self, x: Any, branch: Branch) -> None:
        self._done.pop(id(x), None)  # changed in place, or another tensor's number
        self._branches[id(x)] = weakref.ref(x), branch

    def _finish(self, x: Tensor, branch: Branch) -> None:
        del self._branches[id(x)]
        self._done[id(x)] = weakref.ref(x), replace(branch, read=None)  # not to keep what it read alive

    def _read_again(self, x: Any) -> None:
        known = self._done.get(id(x))
        if known is not None and known[0]() is x:
            self._refuse(known[1])

    def _refuse(self, *branches: Branch) -> None:
        self.refused.update(branch.layer.name for branch in branches)


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """What an operator is called with: tensors, and lists of them."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


def _alike(args: Any) -> bool:
    return len(args) == 2 and all(isinstance(x, Tensor) for x in args) and args[0].shape == args[1].shape


def _through(func: Any, args: Any, branch: Branch) -> Branch | None:
    """The branch after ``func``; ``None`` where it can be followed no further."""
    if func in MULTIPLY and len(args) == 2 and isinstance(args[1], Tensor):
        other, rank, channel = args[1], len(branch.dims), branch.channel
        wanted = [1] * rank
        wanted[channel] = len(branch.factors)
        shape = [1] * (rank - other.dim()) + list(other.shape)
        if shape != wanted:
            return None
        factors = branch.factors * other.detach().flatten()
        return replace(branch, steps=(*branch.steps, lambda y: y * other), factors=factors)
    if func is aten.permute.default:
        order = [d % len(branch.dims) for d in args[1]]
    elif func is aten.transpose.int:
        order = list(range(len(branch.dims)))
        a, b = args[1], args[2]
        order[a], order[b] = order[b], order[a]
    else:
        return None
    return replace(
        branch, steps=(*branch.steps, lambda y: y.permute(order)), dims=tuple(branch.dims[d] for d in order)
    )
