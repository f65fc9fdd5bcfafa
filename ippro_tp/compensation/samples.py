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


class Samples:
    """Keeps the arguments of calls, sample by sample, at most ``limit`` of them.

    When there are more, every second one is dropped, and from then on only every second (fourth, ...) new one is
    taken: an ordered data set is covered from end to end. Private copies are kept, on the inputs' device.

    Args:
        limit: samples to keep at most, at least 2.

    Example:
        >>> kept = Samples(limit=4)
        >>> kept.add((torch.arange(6.0).view(6, 1),), {})
        >>> kept.count, kept.arguments(0, 9)[0][0].flatten()
        (3, tensor([0., 2., 4.]))
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self._stride = 1  # every so-manieth sample is kept
        self._seen = 0
        self._leaves: list[Any] = []  # tensors of samples are lists of batches
        self._by_sample: list[bool] = []
        self._spec: pytree.TreeSpec | None = None

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what a model is called with.

        Raises:
            ObservationError: no argument has a batch dimension, or calls differ by more than their samples.
        """
        batch = samples_of_call(args, dict(kwargs))
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        by_sample = [isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == batch for x in leaves]
        if self._spec is None:
            self._spec, self._by_sample = spec, by_sample
            self._leaves = [[] if many else _private(x) for x, many in zip(leaves, by_sample, strict=True)]
        elif spec != self._spec or by_sample != self._by_sample:
            raise ObservationError("calls of the model differ in their arguments; give batches of one form.")
        index = torch.arange(min(-self._seen % self._stride, batch), batch, self._stride)
        for kept, x, many in zip(self._leaves, leaves, by_sample, strict=True):
            if not many:
                if not _equal(kept, x):
                    raise ObservationError(
                        "an argument without a batch dimension changes from call to call, so that batches cannot "
                        "be joined. Give inputs as tensors with samples in dimension 0, images of one size."
                    )
                continue
            if kept and kept[0].shape[1:] != x.shape[1:]:
                raise ObservationError(
                    f"inputs of shapes {tuple(kept[0].shape[1:])} and {tuple(x.shape[1:])} cannot be joined: give "
                    "samples of one shape."
                )
            kept.append(x.detach()[index.to(x.device)])
        self._seen += batch
        self.count += len(index)
        while self.count > self.limit:
            self._thin()

    def arguments(self, first: int, last: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call with the kept samples ``first`` to ``last - 1``."""
        assert self._spec is not None
        self._join()
        leaves = [x[0][first:last] if many else x for x, many in zip(self._leaves, self._by_sample, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs

    def chosen(self, which: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same with the kept samples of the numbers ``which``, in that order."""
        assert self._spec is not None
        self._join()
        leaves = [
            x[0][which.to(x[0].device)] if many else x
            for x, many in zip(self._leaves, self._by_sample, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs

    def merge(self, other: Samples) -> None:
        """Take the samples of ``other`` as well, thinned to the limit."""
        if other.count:
            self.add(*other.arguments(0, other.count))

    def gather(self) -> None:
        """Share samples between all processes of ``torch.distributed``: every rank then holds the same ones."""
        if not several():
            return
        device = next((x[0].device for x, many in zip(self._leaves, self._by_sample, strict=True) if many), None)
        for rank, share in enumerate(gather(self.state_dict())):
            if rank == 0:
                self.load_state_dict(share, device)
                continue
            other = Samples(self.limit)
            other.load_state_dict(share, device)
            self.merge(other)

    def state_dict(self) -> dict[str, Any]:
        """The samples as CPU tensors and plain types."""
        self._join()
        leaves = [x[0].cpu() if many else x for x, many in zip(self._leaves, self._by_sample, strict=True)]
        spec = None if self._spec is None else pytree.treespec_dumps(self._spec)
        return {"leaves": leaves, "by_sample": list(self._by_sample), "spec": spec}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Take over what :meth:`state_dict` gave, moved to ``device``."""
        self.__init__(self.limit)  # type: ignore[misc]
        if state["spec"] is None:
            return
        leaves = [x.to(device) if isinstance(x, Tensor) and device is not None else x for x in state["leaves"]]
        args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(state["spec"]))
        self.add(args, kwargs)

    def _join(self) -> None:
        for kept, many in zip(self._leaves, self._by_sample, strict=True):
            if many and len(kept) > 1:
                kept[:] = [torch.cat(kept)]

    def _thin(self) -> None:
        self._join()
        self._stride *= 2
        for kept, many in zip(self._leaves, self._by_sample, strict=True):
            if many:
                kept[0] = kept[0][::2].clone()
        self.count = (self.count + 1) // 2


def _private(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    return type(a) is type(b) and bool(a == b)
