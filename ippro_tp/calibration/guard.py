"""Leave a model exactly as it was found: gradients, flags, buffers and train/eval modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore the model on exit, also after an exception.

    Inside, every ``.grad`` is ``None``: gradients the user holds are set aside and come back untouched.

    Args:
        model: any module. Covered: ``training`` of every submodule, ``requires_grad`` and ``.grad`` of every
            parameter, identity and value of every buffer.

    Example:
        >>> bn = nn.BatchNorm1d(2)
        >>> with preserved(bn):
        ...     _ = bn(torch.randn(8, 2))
        >>> int(bn.num_batches_tracked)
        0
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.detach().clone(), buffer._version)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for p, _, _ in parameters:
            p.grad = None
        yield
    finally:
        was_training = dict(modes)
        with torch.no_grad():
            for module, name, buffer, value, version in buffers:
                # A BatchNorm in train mode updates its statistics without counting up their version.
                if buffer._version != version or module.training or was_training[module]:
                    buffer.copy_(value)
                module._buffers[name] = buffer
        for module, mode in modes:
            module.training = mode
        for p, requires_grad, grad in parameters:
            p.requires_grad_(requires_grad)
            p.grad = grad


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; on exit every submodule's ``training`` is as before.

    Args:
        model: any module.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(net):
        ...     assert not net[0].training
        >>> net[0].training, net[1].training
        (True, False)
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
