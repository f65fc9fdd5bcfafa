"""The operations of a forward pass: what ran, on what sizes, and the same again on other sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...calibration.guard import evaluating
from ..structure import Forward, forward


@dataclass(frozen=True)
class Shape:
    """A tensor argument, without its sizes.

    Attributes:
        dims: number of dimensions.
        dtype: of the values.
        order: dimensions from the slowest to the fastest in memory.
        expanded: dimensions along which one value is repeated (stride 0).
    """

    dims: int
    dtype: torch.dtype
    order: tuple[int, ...]
    expanded: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tensor: Tensor) -> Shape:
        """The shape of ``tensor``."""
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
        repeated = frozenset(d for d in range(tensor.dim()) if strides[d] == 0 and tensor.shape[d] > 1)
        return cls(tensor.dim(), tensor.dtype, tuple(order), repeated)

    def strides(self, sizes: Sequence[int]) -> list[int]:
        """Strides of a dense tensor of these sizes."""
        strides, next_one = [0] * self.dims, 1
        for d in reversed(self.order):
            if d not in self.expanded:
                strides[d], next_one = next_one, next_one * sizes[d]
        return strides

    def elements(self, sizes: Sequence[int]) -> int:
        """How many values lie in memory."""
        total = 1
        for d, size in enumerate(sizes):
            total *= 1 if d in self.expanded else size
        return total


@dataclass(frozen=True)
class Operation:
    """One call of an operator.

    Attributes:
        func: the operator.
        leaves: of its arguments: a :class:`Shape` for each tensor, the value itself of anything else.
        spec: how they are nested.
        sizes: all sizes of tensors and all integers, in the order of ``leaves``.
        computes: it does something, rather than show a tensor in another way.
    """

    func: Any = field(compare=False)
    leaves: tuple[Any, ...]
    spec: Any = field(compare=False)
    sizes: tuple[int, ...]
    computes: bool = True

    @property
    def name(self) -> str:
        """Of the operator, ``"aten.conv2d.default"``."""
        return str(self.func)

    def arguments(self, sizes: Sequence[int], pool: Pool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the same kind with other ``sizes``; tensors are borrowed from ``pool``.

        The first tensor has just been written, as what the operation before has left; the others lie where nothing
        was for a while, as weights do.
        """
        values: list[Any] = []
        at = 0
        for leaf in self.leaves:
            if isinstance(leaf, Shape):
                fresh = not any(isinstance(value, Tensor) for value in values)
                values.append(pool.take(leaf, sizes[at : at + leaf.dims], fresh))
                at += leaf.dims
            elif type(leaf) is int:
                values.append(sizes[at])
                at += 1
            else:
                values.append(leaf)
        args, kwargs = pytree.tree_unflatten(values, self.spec)
        return args, kwargs


class Pool:
    """Memory that operations under test are lent in turn: none finds its tensors where the last one did.

    Args:
        device: where tensors lie.
        size: bytes that are gone round; as many as the network goes round in a pass, its parameters.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.device, self._size = device, size
        self._flat: dict[torch.dtype, Tensor] = {}
        self._next: dict[torch.dtype, int] = {}

    def take(self, shape: Shape, sizes: Sequence[int], fresh: bool = False) -> Tensor:
        """The next piece of memory as a tensor.

        Args:
            shape: of the tensor.
            sizes: of its dimensions.
            fresh: write it now.
        """
        count = -(-shape.elements(sizes) // 64) * 64
        flat = self._flat.get(shape.dtype)
        if flat is None or len(flat) < 4 * count:
            whole = max(4 * count, self._size // shape.dtype.itemsize)
            flat = self._flat[shape.dtype] = _values(whole, shape.dtype, self.device)
        start = self._next.get(shape.dtype, 0)
        start = start if start + count <= len(flat) else 0
        self._next[shape.dtype] = start + count
        if fresh:
            flat[start : start + count].fill_(1 if shape.dtype.is_floating_point else 0)
        return flat.as_strided(list(sizes), shape.strides(sizes), start)


def _values(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that are valid anywhere: positive, for variances; indices of the first row."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(count, dtype=dtype, device=device)
    return torch.linspace(0.5, 1.5, count, device=device).to(dtype)


class Recorder(TorchDispatchMode):
    """Writes down the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves, spec = pytree.tree_flatten((args, kwargs or {}))
        sizes: list[int] = []
        kept: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                sizes.extend(leaf.shape)
                kept.append(Shape.of(leaf))
            else:
                sizes.extend([leaf] if type(leaf) is int else [])
                kept.append(leaf)
        self.operations.append(Operation(func, tuple(kept), spec, tuple(sizes), _computes(func, leaves, out)))
        return out


def record(model: nn.Module, inputs: Any, forward_fn: Forward | None = None) -> list[Operation]:
    """The operations of a forward pass in eval mode."""
    recorder = Recorder()
    with evaluating(model), torch.inference_mode(), recorder:
        forward(model, inputs, forward_fn)
    return recorder.operations


def _computes(func: Callable[..., Any], leaves: Sequence[Any], out: Any) -> bool:
    """Whether an operation wrote something: its output is no view of an input, or it changed one in place."""
    if func._schema.is_mutable:  # type: ignore[attr-defined]
        return True
    given = {_storage(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
    made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    return any(_storage(tensor) not in given for tensor in made)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
