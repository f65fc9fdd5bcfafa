"""The one counter of MACs and parameters: whatever tells a size or aims at one asks here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..calibration.batches import as_call
from ..calibration.guard import preserved
from ..calibration.subject import eagerly
from ..tracing.flops import counting


@dataclass(frozen=True)
class Counts:
    """Size of a model.

    Attributes:
        macs: multiply-accumulates of one forward pass: matrix products, convolutions, attention. Element-wise
            operations, norms and biases count nothing.
        params: elements of all parameters.
        by_layer: ``macs`` by module name, each operation at the innermost module whose forward runs it. Modules
            without any are left out.
    """

    macs: int
    params: int
    by_layer: dict[str, int]


def count(
    model: nn.Module, example_inputs: Any, forward_fn: Callable[[nn.Module, Any], Any] | None = None
) -> Counts:
    """Count the MACs of one forward pass in eval mode, and the parameters.

    Layers are counted by the operations that they run, so subclasses of ``Conv2d`` and ``Linear``, layers that
    are called several times and products of activations (attention) all count. The model, its buffers, its
    train/eval flags and the random state are as before, also after an exception.

    Args:
        model: on any device.
        example_inputs: a tensor, a tuple or list of positional, or a dict of keyword arguments, on the same
            device. MACs are those of the whole batch.
        forward_fn: ``(model, example_inputs) -> output``, for models that are called in another way.

    Example:
        >>> counts = count(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.zeros(1, 3, 10, 10))
        >>> counts.macs == 3 * 8 * 9 * 64, counts.params, counts.by_layer
        (True, 224, {'0': 13824})
    """
    args, kwargs = as_call(example_inputs)
    with preserved(model), eagerly(), _same_draws(model), torch.inference_mode(False), torch.no_grad():
        # Torch's tracker of modules asks parameters that were expanded without gradients for their function.
        model.eval().requires_grad_(False)
        with counting(model) as counter:
            if forward_fn is not None:
                forward_fn(model, example_inputs)
            else:
                model(*args, **kwargs)
    return Counts(counter.total, sum(p.numel() for p in model.parameters()), dict(counter.by_layer))


@contextmanager
def _same_draws(model: nn.Module) -> Iterator[None]:
    """Leave the random state of the CPU and of the model's devices as it is."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index or 0 for device in devices]):
        yield
