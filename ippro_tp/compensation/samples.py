"""A bounded, even choice of the inputs that a model was called with, kept for running it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..calibration.processes import gather, several
from ..errors import ObservationError
from ..tracing.passes import samples_of_call

SAME, TENSOR, LIST = "same", "tensor", "list"
"""Kinds of arguments: equal in all calls, samples in dimension 0, or a list with one image a sample."""


class Samples:
    """Keeps the arguments of calls, sample by sample, at most ``limit`` of them, spread evenly over all offered.

    Private copies are kept, on the inputs' device. While calls are added, up to twice as many are held;
    :meth:`settle` brings them down to ``limit``.

    Args:
        limit: samples to keep at most, at least 2.

    Example:
        >>> kept = Samples(limit=4)
        >>> kept.add((torch.arange(10.0).view(10, 1),), {})
        >>> kept.settle()
        >>> kept.count, kept.seen, kept.arguments()[0][0].flatten()
        (4, 10, tensor([0., 2., 6., 8.]))
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.seen = 0
        self._stride = 1  # sample number 0, stride, 2 * stride, ... of those offered is held
        self._leaves: list[Any] = []  # of an argument with samples: a list of its batches
        self._kinds: list[str] = []
        self._spec: pytree.TreeSpec | None = None

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what a model is called with.

        Raises:
            ObservationError: no argument has a batch dimension, or calls differ by more than their samples.
        """
        batch = samples_of_call(args, dict(kwargs))
        self._append(*_taken_apart(args, kwargs, batch), batch)
        while self.count > 2 * self.limit:
            self._stride *= 2
            self._keep(torch.arange(0, self.count, 2))

    def settle(self) -> None:
        """Bring the samples down to ``limit``, an even choice."""
        if self.count > self.limit:
            self._keep(even_choice(self.count, self.limit))

    def arguments(
        self, index: Tensor | None = None, device: torch.device | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call with the samples ``index``, or with all.

        Args:
            index: int64 numbers of samples.
            device: where tensors are moved to; ``None``: they stay where they are.
        """
        assert self._spec is not None
        self._join()
        leaves = []
        for kept, kind in zip(self._leaves, self._kinds, strict=True):
            leaf = kept if kind == SAME else kept[0] if index is None else _take(kept[0], index)
            leaves.append(pytree.tree_map_only(Tensor, lambda t: t.to(device), leaf) if device else leaf)
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs

    def finite(self) -> Tensor:
        """``(count,)`` bool: whether a sample holds neither NaN nor inf. Booleans and integers are finite."""
        self._join()
        good = torch.ones(self.count, dtype=torch.bool)
        for kept, kind in zip(self._leaves, self._kinds, strict=True):
            if kind == TENSOR and kept[0].is_floating_point():
                good &= (
                    kept[0].flatten(1).isfinite().all(1).cpu() if kept[0].dim() > 1 else kept[0].isfinite().cpu()
                )
            elif kind == LIST:
                good &= torch.tensor([bool(x.isfinite().all()) for x in kept[0]])
        return good

    def merge(self, other: Samples) -> None:
        """Take the samples of ``other`` as well, both thinned in proportion to what was offered to them."""
        if not other.count:
            return
        self.settle()
        theirs = Samples(other.limit)
        theirs.load_state_dict(other.state_dict(), other._device())
        theirs.settle()
        total = min(self.limit, self.count + theirs.count)
        seen = self.seen + theirs.seen
        mine = min(self.count, max(total - theirs.count, round(total * self.seen / seen)))
        if mine < self.count:
            self._keep(even_choice(self.count, mine))
        args, kwargs = theirs.arguments(even_choice(theirs.count, total - mine))
        self._stride = 1
        if total > mine:
            self._append(*_taken_apart(args, kwargs, total - mine), total - mine)
        self.seen = seen

    def gather(self) -> None:
        """Share samples between all processes of ``torch.distributed``: every rank then holds the same ones."""
        if not several():
            return
        device = self._device()
        for rank, share in enumerate(gather(self.state_dict())):
            other = Samples(self.limit)
            other.load_state_dict(share, device)
            if rank == 0:
                self.__dict__.update(other.__dict__)
            else:
                self.merge(other)

    def state_dict(self) -> dict[str, Any]:
        """The samples as CPU tensors and plain types."""
        self._join()
        leaves = [
            kept if kind == SAME else pytree.tree_map_only(Tensor, lambda t: t.cpu(), kept[0])
            for kept, kind in zip(self._leaves, self._kinds, strict=True)
        ]
        spec = None if self._spec is None else pytree.treespec_dumps(self._spec)
        return {"leaves": leaves, "kinds": list(self._kinds), "spec": spec, "count": self.count, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Take over what :meth:`state_dict` gave, moved to ``device``; nothing changes if it is something else.

        Raises:
            ValueError: the state is no such thing.
        """
        loaded = Samples(self.limit)
        try:
            count, seen, kinds = int(state["count"]), int(state["seen"]), [str(kind) for kind in state["kinds"]]
            if state["spec"] is not None:
                loaded._spec = pytree.treespec_loads(state["spec"])
                leaves = pytree.tree_map_only(Tensor, lambda t: t.to(device or t.device), list(state["leaves"]))
                lengths = [len(x) for x, kind in zip(leaves, kinds, strict=True) if kind != SAME]
                if loaded._spec.num_leaves != len(leaves) or set(lengths) != {count} or not set(kinds) <= _KINDS:
                    raise ValueError(f"{lengths} samples in its tensors, {count} noted")
                loaded._leaves = [x if kind == SAME else [x] for x, kind in zip(leaves, kinds, strict=True)]
            loaded._kinds, loaded.count, loaded.seen = kinds, count, seen
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"this is not a state_dict() of a Compensation of this version ({error!r}): calibrate again."
            ) from error
        self.__dict__.update(loaded.__dict__)

    def _append(self, leaves: list[Any], kinds: list[str], spec: pytree.TreeSpec, batch: int) -> None:
        if self._spec is None:
            self._spec, self._kinds = spec, kinds
            self._leaves = [_private(x) if kind == SAME else [] for x, kind in zip(leaves, kinds, strict=True)]
        elif spec != self._spec or kinds != self._kinds:
            raise ObservationError("calls of the model differ in their arguments; give batches of one structure.")
        for kept, x, kind in zip(self._leaves, leaves, kinds, strict=True):
            if kind == SAME and not _equal(kept, x):
                raise ObservationError(
                    "an argument without a batch dimension changes from call to call, so batches cannot "
                    "be joined. Give inputs as tensors with samples in dimension 0, images of one size."
                )
            if kind == TENSOR and kept and kept[0].shape[1:] != x.shape[1:]:
                raise ObservationError(
                    f"inputs of shapes {tuple(kept[0].shape[1:])} and {tuple(x.shape[1:])} cannot be joined: give "
                    "samples of one shape."
                )
        index = torch.arange(min(-self.seen % self._stride, batch), batch, self._stride)
        for kept, x, kind in zip(self._leaves, leaves, kinds, strict=True):
            if kind != SAME:
                kept.append(_take(x, index))
        self.seen += batch
        self.count += len(index)

    def _keep(self, index: Tensor) -> None:
        self._join()
        for kept, kind in zip(self._leaves, self._kinds, strict=True):
            if kind != SAME:
                kept[0] = _take(kept[0], index)
        self.count = len(index)

    def _join(self) -> None:
        for kept, kind in zip(self._leaves, self._kinds, strict=True):
            if kind == TENSOR and len(kept) > 1:
                kept[:] = [torch.cat([part.to(kept[0].device) for part in kept])]
            elif kind == LIST and len(kept) > 1:
                kept[:] = [[image for part in kept for image in part]]

    def _device(self) -> torch.device | None:
        tensors = pytree.tree_leaves(
            [x for x, kind in zip(self._leaves, self._kinds, strict=True) if kind != SAME]
        )
        return next((x.device for x in tensors if isinstance(x, Tensor)), None)


_KINDS = {SAME, TENSOR, LIST}


def even_choice(count: int, some: int) -> Tensor:
    """``(some,)`` int64: that many numbers below ``count``, at equal distances up to rounding.

    Example:
        >>> even_choice(10, 4)
        tensor([1, 3, 6, 8])
    """
    return (2 * torch.arange(some) + 1) * count // max(2 * some, 1)


def _taken_apart(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int
) -> tuple[list[Any], list[str], pytree.TreeSpec]:
    def images(x: Any) -> bool:
        return isinstance(x, list) and len(x) == batch and all(isinstance(t, Tensor) and t.dim() == 3 for t in x)

    leaves, spec = pytree.tree_flatten((args, dict(kwargs)), is_leaf=images)
    if any(isinstance(x, Tensor) and x.is_nested for x in leaves):
        raise ObservationError(
            "an input is a nested tensor, whose samples cannot be kept side by side: give a padded "
            "tensor and a mask."
        )
    kinds = [
        LIST if images(x) else TENSOR if isinstance(x, Tensor) and x.dim() and x.shape[0] == batch else SAME
        for x in leaves
    ]
    return leaves, kinds, spec


def _take(x: Any, index: Tensor) -> Any:
    return (
        [t.detach().clone() for t in map(x.__getitem__, index)]
        if isinstance(x, list)
        else x.detach()[index.to(x.device)]
    )


def _private(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    return type(a) is type(b) and bool(a == b)
