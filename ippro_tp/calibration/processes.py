"""Several processes of ``torch.distributed``: what they tell each other when an observation ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..errors import ObservationError
from ..estimators.sums import Sums


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


def all_reduce(sums: Sums) -> None:
    """Add up over all processes of ``torch.distributed``, once; afterwards every rank holds the same sums.

    A sum that some ranks do not hold counts as zero there.

    Raises:
        RuntimeError: a sum has different shapes or dtypes on different ranks: they observed different models.
    """
    if not several():
        return
    forms: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for theirs in gather({name: (value.shape, value.dtype) for name, value in sums.items()}):
        for name, form in theirs.items():
            if forms.setdefault(name, form) != form:
                raise RuntimeError(
                    f"the processes gathered different statistics: {name!r} is {_form(forms[name])} on one "
                    f"and {_form(form)} on another. Calibrate the same model on every rank."
                )
    device = next((value.device for value in sums.values()), torch.device("cpu"))
    for dtype in sorted({dtype for _, dtype in forms.values()}, key=str):
        names = sorted(name for name, form in forms.items() if form[1] == dtype)
        parts = [
            sums[name] if name in sums else torch.zeros(forms[name][0], dtype=dtype, device=device)
            for name in names
        ]
        flat = torch.cat([part.reshape(-1).to(device) for part in parts])
        dist.all_reduce(flat)
        for name, part, total in zip(names, parts, flat.split([p.numel() for p in parts]), strict=True):
            sums[name] = total.view(part.shape).to(part.device)


def _form(form: tuple[torch.Size, torch.dtype]) -> str:
    return f"{tuple(form[0])} {str(form[1]).removeprefix('torch.')}"
