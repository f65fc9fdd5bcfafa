"""Running a model again and again from the same state, and leaving it as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Run a model without a trace, layers without parts in eval mode.

    Attributes (train/eval flags among them), buffers and the random streams of PyTorch, Python and NumPy are as
    before on exit.

    Yields:
        A function that rewinds all of them, so that the next run is like the first one.
    """
    modules = list(model.modules())
    attributes = [(m, dict(m.__dict__), dict(m._buffers)) for m in modules]
    buffers = [(b, b.detach().clone(), b._version) for b in model.buffers()]
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    numpy = sys.modules.get("numpy.random")
    python_state, numpy_state = random.getstate(), numpy.get_state() if numpy else None
    with torch.random.fork_rng(devices):
        cpu_state = torch.get_rng_state()
        device_states = [torch.cuda.get_rng_state(i) for i in devices]

        def restore() -> None:
            for module, values, own in attributes:
                module.__dict__.clear()
                module.__dict__.update(values)
                module._buffers.clear()
                module._buffers.update(own)
            with torch.no_grad():
                for buffer, value, version in buffers:
                    if buffer._version != version:
                        buffer.copy_(value)
            random.setstate(python_state)
            if numpy is not None:
                numpy.set_state(numpy_state)

        def again() -> None:
            restore()
            torch.set_rng_state(cpu_state)
            for index, state in zip(devices, device_states, strict=True):
                torch.cuda.set_rng_state(state, index)
            for module in modules:
                if module.training and not module._modules:
                    module.training = False

        try:
            yield again
        finally:
            restore()
