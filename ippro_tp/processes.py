"""Several processes of ``torch.distributed``: what they tell each other when an observation ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .errors import ObservationError


def several() -> bool:
    """Whether there are other processes to talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process among them; 0 if there is but one."""
    return dist.get_rank() if several() else 0


def gather(value: Any) -> list[Any]:
    """What every rank gave, in the order of ranks. All ranks have to call it."""
    if not several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block that succeeds on every rank or on none: where one fails, the others raise as well.

    So no rank waits for ever in a later reduction for one that has given up. A process that dies, or is
    interrupted from the keyboard, tells nothing: for that there is the timeout of the backend.

    Raises:
        ObservationError: another rank failed; the message is its error's first line.
    """
    try:
        yield
    except Exception as error:
        if several():
            _tell(error)
        raise
    failed = [(rank, told) for rank, told in enumerate(gather("")) if told]
    if failed:
        rank, told = failed[0]
        raise ObservationError(f"calibration failed on rank {rank}, so no rank keeps statistics. There: {told}")


def _tell(error: Exception) -> None:
    text = str(error).strip()
    try:
        gather(f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}")
    except RuntimeError as lost:  # the error to raise is the first one
        warnings.warn(f"the other processes could not be told of the error: {lost}", RuntimeWarning, stacklevel=2)


def unsynchronised(model: Any) -> AbstractContextManager[None]:
    """A context in which a DistributedDataParallel wrapper does not reduce gradients."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def reducing() -> bool:
    """Whether a DistributedDataParallel wrapper runs its forward pass now and will reduce gradients after it."""
    active = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return active is not None and bool(active.require_backward_grad_sync)
