"""The recovery of a pruned model on the calibration batches, as :func:`ippro_tp.prune` does it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..calibration.batches import batches_of
from ..calibration.guard import evaluating
from ..compensation.recovery import Recovery, RecoveryReport
from .structure import Forward


def recovered(
    model: nn.Module,
    unpruned: nn.Module,
    loader: Iterable[Any],
    how: bool | Recovery,
    *,
    forward_fn: Forward | None,
    seed: int,
    progress: bool,
) -> RecoveryReport | None:
    """Train ``model`` to predict what ``unpruned`` does; ``None`` if that is not wanted.

    Args:
        model: the pruned model, changed in place.
        unpruned: left as it is.
        loader: calibration batches.
        how: whether, or with which settings; an object that is given is not changed.
        forward_fn: see :func:`ippro_tp.prune`.
        seed: of the default settings.
        progress: show progress bars.
    """
    if how is False:
        return None
    recovery = copy.deepcopy(how) if isinstance(how, Recovery) else Recovery(seed=seed)
    if forward_fn is None:
        recovery.calibrate(unpruned, loader, progress=progress)
    else:
        device = next((p.device for p in unpruned.parameters()), torch.device("cpu"))
        with evaluating(unpruned), recovery.observe(unpruned), torch.no_grad():
            for inputs, _ in batches_of(loader, device, None, progress, "Recovery"):
                forward_fn(unpruned, inputs)
    return recovery.run(model, unpruned, progress=progress)
