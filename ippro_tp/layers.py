"""Kinds of layers that the rooms distinguish, and the registers that users may add to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

NOT_PRODUCERS = (nn.LayerNorm, nn.PReLU)

Norm = TypeVar("Norm", bound=type[nn.Module])
Function = TypeVar("Function", bound=Callable[..., Any])
_NORMS: list[type[nn.Module]] = [_BatchNorm, _InstanceNorm, nn.GroupNorm]
# fmt: off
_ACTIVATIONS = {
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "prelu", "rrelu", "threshold", "gelu",
    "silu", "mish", "hardswish", "softplus", "softsign", "tanh", "sigmoid", "hardsigmoid", "logsigmoid",
    "relu_", "hardtanh_", "leaky_relu_", "elu_", "selu_", "celu_", "rrelu_", "threshold_", "silu_", "mish_",
    "hardswish_", "tanh_", "sigmoid_", "hardsigmoid_",
}
# fmt: on


def register_norm(cls: Norm) -> Norm:
    """Register a layer class as a channel norm; usable as a decorator.

    A channel norm normalises each channel by itself (or few channels together) and has its channels in dimension
    1. It removes the scale of the filter before it, so its affine ``weight`` and ``bias`` take the filter's place.
    A LayerNorm mixes all channels and is not a channel norm.

    Example:
        >>> @register_norm
        ... class FilterNorm(nn.Module): ...
        >>> is_channel_norm(FilterNorm()), is_channel_norm(nn.LayerNorm(2))
        (True, False)
    """
    _NORMS.append(cls)
    return cls


def register_activation(function: Function) -> Function:
    """Register a PyTorch function or custom operator as an activation for ``PROImportance(estimator="paper")``.

    It must be element-wise and take the tensor as its first argument.

    Example:
        >>> import torch
        >>> _ = register_activation(torch.erf)
        >>> is_activation("erf"), is_activation("softmax")
        (True, False)
    """
    _ACTIVATIONS.add(function.__name__)
    return function


def is_channel_norm(module: nn.Module) -> bool:
    """Whether a layer is a channel norm; see :func:`register_norm`."""
    return isinstance(module, tuple(_NORMS))


def is_activation(name: str) -> bool:
    """Whether the PyTorch function ``name`` is registered as an activation."""
    return name in _ACTIVATIONS


def is_writer(module: nn.Module) -> bool:
    """Whether a layer writes channels of its own, although its inputs and outputs are pruned by one function.

    Torch-Pruning treats such layers like element-wise ones.
    """
    return is_channel_norm(module) or isinstance(module, (_ConvNd, nn.MultiheadAttention, nn.Embedding))


def forget_caches(module: nn.Module) -> None:
    """Empty dicts of plain tensors that a forward pass filled: they hold widths of the past."""
    for key, value in vars(module).items():
        if (
            key not in ("_parameters", "_buffers", "_modules")
            and isinstance(value, dict)
            and value
            and all(isinstance(v, Tensor) for v in value.values())
        ):
            value.clear()


@contextmanager
def unfused() -> Iterator[None]:
    """Transformer layers call their layers, without the fused path of inference and its nested tensors."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
